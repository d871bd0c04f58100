"""Tiny Shakespeare letter by letter: a vocabulary of its 65 characters and the end of text.

python data/shakespeare_char/prepare.py [--input input.txt]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from data.shakespeare.prepare import documents
from minzero.commands import run_command
from minzero.data import pipeline
from minzero.data.tokenizer import characters, own_tokenizer


def main(arguments):
    args = pipeline.options(__doc__, Path(__file__).parent, tokenizer=None, val_fraction=0.1).parse_args(arguments)
    parts = documents(args)
    tokenizer = args.tokenizer or own_tokenizer(
        args.out / "tokenizer", lambda: characters("".join(text for _, text in parts))
    )
    pipeline.prepare(parts, tokenizer, args, side=str)


if __name__ == "__main__":
    run_command(main)
