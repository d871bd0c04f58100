"""FineWeb-Edu, web pages chosen for what they teach: a sample of 10 billion tokens.

python data/fineweb_edu/prepare.py [--input 'fineweb_edu/*.parquet'] [--streaming --limit 100000]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.data import pipeline, sources


def documents(args):
    return sources.open_source(args, "HuggingFaceFW/fineweb-edu", "sample-10BT")


def main(arguments):
    args = pipeline.options(__doc__, Path(__file__).parent, val_fraction=0.0005).parse_args(arguments)
    pipeline.prepare(documents(args), args.tokenizer, args)


if __name__ == "__main__":
    run_command(main)
