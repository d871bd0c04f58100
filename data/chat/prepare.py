"""Conversations for supervised fine-tuning, of which only the assistant's words are learned: lilLM's, or your own.

python data/chat/prepare.py --tokenizer tokenizers/simple
python data/chat/prepare.py --input 'mine/*.jsonl' --column messages --out data/mine --tokenizer gpt2

Each row holds a list of messages, {"role": "system", "user" or "assistant", "content": "..."}. Take the tokenizer that
the model was trained with.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.data import pipeline, sources
from minzero.data.conversations import Conversations


def documents(args):
    return Conversations(sources.open_source(args, "CohleM/lillm-sft-dataset-v1", kind=list))


def main(arguments):
    parser = pipeline.options(__doc__, Path(__file__).parent, val_fraction=0.02)
    parser.set_defaults(column="conversation")
    args = parser.parse_args(arguments)
    pipeline.prepare(documents(args), args.tokenizer, args, loss_mask=True)


if __name__ == "__main__":
    run_command(main)
