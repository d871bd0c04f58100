"""OSCAR 2019, English, deduplicated: the web text min-LLM trains on.

python data/oscar/prepare.py --streaming --limit 10000000 [--input 'oscar/*.jsonl.zst' --column content]
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
    return sources.open_source(
        args, "oscar-corpus/oscar", "unshuffled_deduplicated_en", revision="refs/convert/parquet"
    )


def main(arguments):
    args = pipeline.options(__doc__, Path(__file__).parent, val_fraction=0.0005).parse_args(arguments)
    pipeline.prepare(documents(args), args.tokenizer, args)


if __name__ == "__main__":
    run_command(main)
