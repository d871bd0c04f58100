"""Your own files: .txt, one document each, or .jsonl and .parquet, one a row; a glob of other files, as text.

python data/text/prepare.py --input 'books/**/*.txt' [--out data/books] [--tokenizer gpt2]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.data import pipeline, sources
from minzero.errors import UserError


def documents(args):
    return sources.Files(args.input, args.column)


def main(arguments):
    args = pipeline.options(__doc__, Path(__file__).parent).parse_args(arguments)
    if not args.input:
        raise UserError("--input: none given; name your files, folders or globs: --input 'books/**/*.txt'")
    pipeline.prepare(documents(args), args.tokenizer, args)


if __name__ == "__main__":
    run_command(main)
