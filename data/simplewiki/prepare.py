"""The Wikipedia in simple English, which FastLLM trains on: 240,000 articles, 50 million tokens.

python data/simplewiki/prepare.py [--input 'simplewiki/*.parquet']
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
    return sources.open_source(args, "wikimedia/wikipedia", "20231101.simple")


def main(arguments):
    args = pipeline.options(__doc__, Path(__file__).parent, val_fraction=0.005).parse_args(arguments)
    pipeline.prepare(documents(args), args.tokenizer, args)


if __name__ == "__main__":
    run_command(main)
