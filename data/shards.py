"""Token shards: one file format, a writer that never leaves half a file, a memory-mapped reader.

A shard is 256 little-endian int32 of header, then the tokens. The header is llm.c's: a magic number,
a version and the number of tokens; the magic tells uint16 from uint32. `meta.json` beside the shards
says which tokenizer made them and is written last, so a folder without it was never finished.
Plain headerless uint16 files named train.bin and val.bin (nanoGPT's) are read as well.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from config import UserError, read_json

HEADER_BYTES = 256 * 4
FORMATS = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}  # dtype: (magic, version)


def token_dtype(vocab_size):
    """The smallest of the two token types that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def write_atomically(path, *chunks):
    """Write bytes under a temporary name, flush them to the disk, rename. A crash leaves either the
    old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, content):
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_shard(path, tokens):
    """Write one shard. `tokens`: (n,) uint16 or uint32. Returns its entry for meta.json."""
    tokens = np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<"))
    magic, version = FORMATS[tokens.dtype]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    write_atomically(path, header.tobytes(), tokens.data)
    digest = hashlib.sha256(header.tobytes())
    digest.update(tokens.data)
    return {"file": Path(path).name, "tokens": len(tokens), "sha256": digest.hexdigest()}


def open_shard(path):
    """Memory-map one shard -> (n,) tokens. Raises UserError for a file that is not a whole shard."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=3)
    by_magic = {magic: (dtype, version) for dtype, (magic, version) in FORMATS.items()}
    if len(header) < 3 or int(header[0]) not in by_magic:
        if Path(path).name in ("train.bin", "val.bin") and size and size % 2 == 0:
            return np.memmap(path, dtype="<u2", mode="r")  # nanoGPT's: nothing but tokens
        found = int(header[0]) if len(header) else "an empty file"
        magics = " or ".join(map(str, by_magic))
        raise UserError(f"{path}: not a token shard: magic number {found}, expected {magics}; prepare the data again")
    dtype, version = by_magic[int(header[0])]
    if header[1] != version:
        raise UserError(f"{path}: shard version {header[1]}, expected {version}; prepare the data again")
    tokens = int(np.uint32(header[2]))
    expected = HEADER_BYTES + tokens * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path}: truncated shard: {size} bytes, but its header promises {tokens} tokens = {expected} bytes; "
            "copy or prepare it again"
        )
    if tokens == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(tokens,))


class TokenStream:
    """The shards of one split, in the order of their names, read as one long array of tokens.

    Window w is the block_size + 1 tokens from w * block_size on: its inputs and, one further, its
    targets. Neighbouring windows share one token, so every token but the first is a target once.

    Raises UserError if a shard is missing, broken, or the split is shorter than one window."""

    def __init__(self, folder, split, block_size):
        self.folder, self.split, self.block_size = Path(folder), split, block_size
        if not self.folder.is_dir():
            script = self.folder / "prepare.py"
            raise UserError(f"data.path: no folder {folder}; expected token shards: make them with python {script}")
        self.meta = read_meta(self.folder)
        names = [entry["file"] for entry in self.meta["splits"][split]["shards"]] if self.meta else None
        if names is None:
            found = sorted(p.name for p in self.folder.glob("*.bin"))
            names = [n for n in found if n.startswith(f"{split}_") or f"_{split}_" in n or n == f"{split}.bin"]
        if not names:
            script = self.folder / "prepare.py"
            command = f"python {script}" if script.exists() else "one of the prepare scripts in data/"
            raise UserError(f"data.path: {folder} holds no {split} shards ({split}_000000.bin ...); run {command}")
        for name in names:
            if not (self.folder / name).exists():
                raise UserError(f"{self.folder / name}: missing, but meta.json lists it; prepare the data again")
        self.shards = [open_shard(self.folder / name) for name in names]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.tokens = int(self.starts[-1])
        self.windows = (self.tokens - 1) // block_size
        if self.windows < 1:
            raise UserError(
                f"data.path: the {split} split of {folder} has {self.tokens} tokens, fewer than one window of "
                f"model.block_size + 1 = {block_size + 1}; prepare more data or lower model.block_size"
            )

    def read(self, start, length):
        """Tokens [start, start + length) -> (length,) int64, across shard boundaries."""
        out = np.empty(length, dtype=np.int64)
        shard, done = int(np.searchsorted(self.starts, start, side="right")) - 1, 0
        while done < length:
            offset = start + done - int(self.starts[shard])
            piece = self.shards[shard][offset : offset + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return out

    def batch(self, windows):
        """Window numbers -> inputs and targets, both (len(windows), block_size) int64."""
        rows = np.stack([self.read(int(w) * self.block_size, self.block_size + 1) for w in windows])
        return rows[:, :-1], rows[:, 1:]


def read_meta(folder):
    """meta.json of a data folder, or None where there is none (shards from elsewhere)."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return None
    meta = read_json(path)
    for name in ("tokenizer", "vocab_size", "splits"):
        if not isinstance(meta, dict) or name not in meta:
            raise UserError(f"{path}: no key {name!r}; expected what a prepare script writes; prepare the data again")
    return meta
