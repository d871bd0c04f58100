"""Verification of a folder of token shards: every byte is read and compared with meta.json."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minzero.data.meta import read_meta
from minzero.data.shards import shards_of, verify_shard
from minzero.errors import UserError
from minzero.files import nearest


def verify_folder(folder):
    """Returns (faults, description): a line for each fault, and words for what was found. Raises UserError if the
    folder is not one of token shards."""
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder}: no such folder (nearest existing folder: {os.path.abspath(nearest(folder))}); expected token "
            "shards"
        )
    folder = Path(folder)
    meta = read_meta(folder)
    if meta is None and (folder / "progress.json").exists():
        raise UserError(f"{folder}: only half prepared; run the command that prepares it again")
    splits = meta["splits"] if meta else ("train", "val")
    entries = [entry for split in splits for entry in shards_of(folder, split, meta)]
    if not entries:
        raise UserError(f"{folder}: holds no shards (train_000000.bin ...); expected token shards")
    faults, layouts = verify_shards(folder, entries, meta)
    if len({dtype for dtype, _, _ in layouts}) > 1:
        faults.append(f"{folder}: found shards of uint16 and of uint32 tokens, expected one width; prepare it again")
    faults += wrong_totals(folder, meta)
    return faults, description(entries, layouts, meta)


def verify_shards(folder, entries, meta):
    """Verify each shard, several at a time. entries: as meta.json lists them. Returns (faults, [(dtype, tokens, largest
    id)] of the shards that are right)."""
    vocab_size = meta.get("vocab_size") if meta else None
    loss_mask = meta.get("loss_mask", False) if meta else False

    def check(entry):
        try:
            return verify_shard(folder / entry["file"], entry, vocab_size, loss_mask)
        except UserError as error:
            return error

    # threads: hashing and reading release the interpreter's lock
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(check, entries))
    faults = [str(result) for result in results if isinstance(result, UserError)]
    return faults, [result for result in results if not isinstance(result, UserError)]


def wrong_totals(folder, meta):
    """A line for each split whose total in meta.json is not the sum of its shards."""
    if meta is None:
        return []
    faults = []
    for split, listed in meta["splits"].items():
        total = sum(shard["tokens"] for shard in listed["shards"])
        if listed.get("tokens", total) != total:
            faults.append(
                f"{folder}/meta.json: splits.{split}.tokens: found {listed['tokens']}, expected {total}, the sum of "
                "its shards; prepare it again"
            )
    return faults


def description(entries, layouts, meta):
    """Words for what was verified, and what could not be. layouts: as `verify_shards` returns them."""
    words = f"{sum(tokens for _, tokens, _ in layouts):,} tokens in {len(entries):,} shards"
    if not meta:
        largest = max((largest or 0 for _, _, largest in layouts), default=0)
        missing = "no meta.json, so checksums, totals and the vocabulary cannot be verified"
        return f"{words} ({missing}; largest id {largest})"
    without_checksum = sum("sha256" not in entry for entry in entries)
    if without_checksum:
        words += f" ({without_checksum:,} shards without a checksum in meta.json)"
    return words
