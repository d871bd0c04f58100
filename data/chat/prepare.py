"""Conversations for supervised fine-tuning, in which only the assistant's words are learned: lilLM's, or your own.

python data/chat/prepare.py --tokenizer tokenizers/simple
python data/chat/prepare.py --input 'mine/*.jsonl' --column messages --out data/mine --tokenizer gpt2

Each row holds a list of messages, {"role": "system", "user" or "assistant", "content": "..."}. Take the tokenizer that
the model was trained with.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, conversations, hub

script = PrepareScript(
    __file__,
    __doc__,
    conversations(hub("CohleM/lillm-sft-dataset-v1", kind=list)),
    loss_mask=True,
    column="conversation",
    val_fraction=0.02,
)
main = script.main

if __name__ == "__main__":
    script.run()
