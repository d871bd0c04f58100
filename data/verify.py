"""Check token shards: sizes, headers, checksums, ids below the vocabulary, totals of meta.json.

python data/verify.py data/openwebtext [data/stdlib ...]

Prints one line a folder, or one for each fault, which names the file. Ends with code 0, or with 2 if there is a fault.
Shards without meta.json (nanoGPT's, llm.c's) have no checksums: of them sizes and headers are checked.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.data.shards import read_meta, shards_of, verify_shard
from minzero.errors import UserError
from minzero.flags import FlagParser


def verify(folder):
    """(faults, words of what was found) of a folder of shards. Raises UserError if it is none."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; expected token shards")
    folder, meta = Path(folder), read_meta(folder)
    if meta is None and (folder / "progress.json").exists():
        raise UserError(f"{folder}: only half prepared; run the command that prepares it again")
    splits = meta["splits"] if meta else ("train", "val")
    shards = [(split, entry) for split in splits for entry in shards_of(folder, split, meta)]
    if not shards:
        raise UserError(f"{folder}: holds no shards (train_000000.bin ...); expected token shards")
    vocab_size, loss_mask = (meta.get("vocab_size"), meta.get("loss_mask", False)) if meta else (None, False)

    def check(shard):
        try:
            return verify_shard(folder / shard[1]["file"], shard[1], vocab_size, loss_mask)
        except UserError as error:
            return error

    # hashing and reading leave the interpreter's lock to others
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(check, shards))
    faults = [str(result) for result in found if isinstance(result, UserError)]
    whole = [result for result in found if not isinstance(result, UserError)]
    if len({dtype for dtype, _, _ in whole}) > 1:
        faults.append(f"{folder}: found shards of uint16 and of uint32 tokens, expected one width; prepare it again")
    for split in meta["splits"] if meta else ():
        listed = meta["splits"][split]
        total = sum(shard["tokens"] for shard in listed["shards"])
        if listed.get("tokens", total) != total:
            faults.append(
                f"{folder}/meta.json: splits.{split}.tokens: found {listed['tokens']}, expected {total}, the sum of "
                "its shards; prepare it again"
            )
    words = f"{sum(tokens for _, tokens, _ in whole):,} tokens in {len(shards):,} shards"
    without = [] if meta else ["no meta.json, so checksums, totals and the vocabulary cannot be verified"]
    if not meta:
        without.append(f"largest id {max((largest or 0 for _, _, largest in whole), default=0)}")
    elif count := sum("sha256" not in entry for _, entry in shards):
        without.append(f"{count:,} shards without a checksum in meta.json")
    return faults, words + (f" ({'; '.join(without)})" if without else "")


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders of token shards")
    args = parser.parse_args(arguments)
    wrong = []
    for folder in args.folders:
        started = time.perf_counter()
        try:
            faults, words = verify(folder)
        except UserError as error:
            faults = [str(error)]
        for fault in faults:
            print(fault, flush=True)
        if faults:
            wrong.append(folder)
        else:
            print(f"{folder}: ok, {words}, {time.perf_counter() - started:.1f} s", flush=True)
    if wrong:
        raise UserError(f"found faults in {', '.join(wrong)}; they are named above")


if __name__ == "__main__":
    run_command(main)
