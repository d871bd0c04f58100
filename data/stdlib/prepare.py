"""The source of Python's own standard library as training data: real text on every machine, no download.

python data/stdlib/prepare.py [--out data/stdlib] [--vocab_size 4096] [--val_fraction 0.05]
"""

import os
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.data import pipeline
from minzero.data.tokenizer import own_tokenizer, train_tokenizer
from minzero.errors import UserError

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def documents(args):
    """Yield (path in CPython's repository, text) of every source file, in the order of the paths."""
    for library in map(Path, args.input or [sysconfig.get_path("stdlib")]):
        if not os.path.isdir(library):
            raise UserError(f"--input: {library} is no folder, expected one that holds Python's standard library")
        for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
            name = path.relative_to(library)
            if LEFT_OUT.isdisjoint(name.parts):
                try:
                    yield f"cpython/Lib/{name.as_posix()}", path.read_text(encoding="utf-8")
                except OSError as error:
                    raise UserError(f"{path}: could not be read ({error.strerror}); remove it") from None
                except UnicodeDecodeError:
                    continue  # the few files that are there to test other encodings


def main(arguments):
    args = pipeline.options(__doc__, Path(__file__).parent, tokenizer=None, vocab_size=4096).parse_args(arguments)
    tokenizer = args.tokenizer or own_tokenizer(
        args.out / "tokenizer",
        lambda: train_tokenizer((text for _, text in documents(args)), args.vocab_size),
        args.vocab_size,
    )
    pipeline.prepare(documents(args), tokenizer, args)


if __name__ == "__main__":
    run_command(main)
