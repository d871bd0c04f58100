"""Tiny Shakespeare in GPT-2's tokens: 1.1 MB of plays, for a first fine-tuning.

python data/shakespeare/prepare.py [--input input.txt]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.data import pipeline, sources

ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def documents(args):
    """Two documents: the first nine tenths of the text for training, the rest for validation."""
    text = sources.one_text(args, ADDRESS)
    cut = int(len(text) * (1 - args.val_fraction))
    return [("train", text[:cut]), ("val", text[cut:])]


def main(arguments):
    args = pipeline.options(__doc__, Path(__file__).parent, val_fraction=0.1).parse_args(arguments)
    pipeline.prepare(documents(args), args.tokenizer, args, side=str)


if __name__ == "__main__":
    run_command(main)
