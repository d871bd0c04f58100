"""The source of Python's own standard library as training data: real text on every machine, no download.

python data/stdlib/prepare.py [--out data/stdlib] [--vocab_size 4096] [--val_fraction 0.05]
"""

import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from config import run_command  # noqa: E402
from data import pipeline  # noqa: E402
from data.tokenizer import save_tokenizer, train_tokenizer  # noqa: E402

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def documents(library=None):
    """Yield (path in CPython's repository, text) of every source file, in the order of the paths."""
    library = Path(library or sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        name = path.relative_to(library)
        if LEFT_OUT.isdisjoint(name.parts):
            try:
                yield f"cpython/Lib/{name.as_posix()}", path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # the few files that are there to test other encodings


def main(arguments):
    options = pipeline.options(__doc__, Path(__file__).parent, tokenizer=None, vocab_size=4096)
    args = options.parse_args(arguments)
    tokenizer = args.tokenizer
    if tokenizer is None:
        tokenizer = args.out / "tokenizer"
        save_tokenizer(tokenizer, *train_tokenizer((text for _, text in documents(args.input)), args.vocab_size))
    pipeline.prepare(documents(args.input), tokenizer, args)


if __name__ == "__main__":
    run_command(main)
