"""Learn a byte-level BPE of any size from any of the data sets here, or from your own files.

python data/train_tokenizer.py --source fineweb_edu --limit 100000 --vocab_size 32768 --out data/fineweb_edu/tokenizer
python data/train_tokenizer.py --input 'books/**/*.txt' --vocab_size 8192 --out tokenizers/books
python data/openwebtext/prepare.py --tokenizer tokenizers/books

Writes tokenizer.tiktoken, which everything here loads, and tokenizer.json, which transformers loads. About a
twentieth of the text, at most 20 MB, is held out, to compare the tokenizer with gpt2, o200k_base and those of
--compare; the table is printed and written to tokenizer_report.json.
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.config.values import did_you_mean
from minzero.data.documents import UsableTexts, plural
from minzero.data.learn_tokenizer import HeldOut, checked_special_tokens, load_compared, report, train_tokenizer
from minzero.data.pipeline import MOST_IDS
from minzero.data.tokenizer_files import END_OF_TEXT, save_tokenizer
from minzero.errors import UserError
from minzero.files import check_can_write
from minzero.flags import FlagParser, a_path, at_least


def flags():
    parser = FlagParser(__doc__)
    parser.add_argument("--source", default="text", help="a data set: the name of a folder in data/")
    parser.add_argument("--input", nargs="+", help="local copies of the source: files, folders, quoted globs")
    parser.add_argument("--column", default="text", help="the column that holds the text")
    parser.add_argument("--streaming", action="store_true", help="read from the hub without keeping a copy")
    parser.add_argument("--limit", type=at_least(1), default=1_000_000, help="learn from the first documents only")
    parser.add_argument(
        "--on_bad_document",
        choices=["stop", "skip"],
        default="stop",
        help="one that cannot be read: end, or leave it out",
    )
    parser.add_argument(
        "--vocab_size", type=at_least(1, MOST_IDS), default=32768, help="number of ids, with the special tokens"
    )
    parser.add_argument("--special_tokens", nargs="+", default=[END_OF_TEXT], help="get the last ids, in this order")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        help="with these as well, as the tokenizer of a published model: tiktoken's, folders, names on the hub",
    )
    parser.add_argument("--out", type=a_path, required=True, help="folder for the tokenizer")
    return parser


def main(arguments):
    args = flags().parse_args(arguments)
    args.val_fraction = 0.0  # learn from the training side where a source is cut in two
    names = sorted(path.parent.name for path in Path(__file__).parent.glob("*/prepare.py"))
    if args.source not in names:
        raise UserError(f"--source: no data set {args.source!r}; {did_you_mean(args.source, names)}")
    if args.source == "text" and not args.input:
        raise UserError("--input: none given; name your files, or a data set: --source fineweb_edu")
    check_can_write("--out", args.out, folder=True)  # before the training
    if os.path.lexists(args.out / "tokenizer.tiktoken"):
        raise UserError(f"--out: {args.out} holds a tokenizer, by which data may be made; choose another folder")
    special_tokens = checked_special_tokens(args.special_tokens, args.vocab_size)
    compared = load_compared(args.compare)

    documents = importlib.import_module(f"data.{args.source}.prepare").script.documents(args)
    if hasattr(documents, "summary"):
        print(documents.summary)
    texts = UsableTexts(documents, args.limit, args.on_bad_document, str(args.out))
    held_out = HeldOut(texts)
    save_tokenizer(args.out, *train_tokenizer(held_out, args.vocab_size, special_tokens))
    if texts.skipped:
        print(f"skipped {plural(texts.skipped, 'document')} that could not be read")
    print(f"{args.out}: {args.vocab_size:,} ids", flush=True)  # a download of the others may take its time
    report(args.out, held_out, compared)


if __name__ == "__main__":
    run_command(main)
