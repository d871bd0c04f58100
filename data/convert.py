"""Convert the token files of other programs into shards, and shards into nanoGPT's files.

python data/convert.py my_text_document --tokenizer gpt2 --out data/mine             Megatron's .bin and .idx
python data/convert.py olmo/part-*.npy --tokenizer tokenizers/olmo --out data/olmo   OLMo's .npy
python data/convert.py nanoGPT/data/owt --tokenizer gpt2 --out data/owt              nanoGPT's train.bin and val.bin
python data/convert.py data/stdlib --to nanogpt --out nanoGPT/data/stdlib            shards, for nanoGPT

Sources are files, folders of them, and Megatron's prefixes. The tokenizer is the one that made the ids. llm.c reads the
shards as they are: -i 'data/stdlib/train_*.bin' -j 'data/stdlib/val_*.bin'.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.data.convert import to_nanogpt, to_shards
from minzero.data.pipeline import a_data_folder
from minzero.errors import UserError
from minzero.flags import FlagParser, a_number, a_path, at_least


def flags():
    parser = FlagParser(__doc__)
    parser.add_argument("sources", nargs="+", type=a_path, metavar="SOURCE", help="files, folders, Megatron's prefixes")
    parser.add_argument("--to", choices=["shards", "nanogpt"], default="shards", help="the format to write")
    parser.add_argument("--out", type=a_data_folder, required=True, help="folder for the converted files")
    parser.add_argument(
        "--tokenizer", help="that made the ids: tiktoken's name, 'bytes', a folder, or a name on the hub"
    )
    parser.add_argument(
        "--split_by",
        choices=["document", "name"],
        help="a hash of each document's number, or words of the file's name (train, val, valid) decide between train "
        "and val; default: document for Megatron and OLMo, name for nanoGPT and llm.c",
    )
    share = a_number(0, 1)
    parser.add_argument("--val_fraction", type=share, help="share of documents for validation, 0.05 by default")
    tokens = at_least(1, 2**30)
    parser.add_argument("--shard_tokens", type=tokens, help="a shard ends with the block past it, 100000000 by default")
    parser.add_argument(
        "--dtype",
        choices=["uint16", "uint32"],
        help="of ids in files without a header; default: uint16 for nanoGPT, for OLMo what its vocabulary needs",
    )
    return parser


def main(arguments):
    args = flags().parse_args(arguments)
    options = ("tokenizer", "split_by", "val_fraction", "shard_tokens", "dtype")
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    if args.to == "shards":
        if args.tokenizer is None:
            raise UserError("--tokenizer: none given; name the one that made the ids, as gpt2")
        to_shards(args.sources, out=args.out, **given)
        return
    if given:
        raise UserError(f"--{next(iter(given))}: the shards decide it; leave it out with --to nanogpt")
    if len(args.sources) > 1:
        raise UserError(f"--to nanogpt: found {len(args.sources)} sources, expected one folder of shards")
    to_nanogpt(args.sources[0], args.out)


if __name__ == "__main__":
    run_command(main)
