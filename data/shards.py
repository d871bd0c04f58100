"""Token shards: one file format, a writer that never leaves half a file, a reader for any size.

A shard is 256 little-endian int32 of header, then the tokens. The header is llm.c's: a magic number,
a version and the number of tokens; the magic tells uint16 from uint32. `meta.json` beside the shards
says which tokenizer made them and is written last, so a folder without it was never finished.
Plain headerless uint16 files named train.bin and val.bin (nanoGPT's) are read as well.
"""

import bisect
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np

from config import IGNORE, UserError, read_json
from data.order import validation_windows

HEADER_BYTES = 256 * 4
FORMATS = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}  # dtype: (magic, version)
OPEN_FILES = 128  # a data set has thousands of shards, and a process may often hold only 1,024 files


NO_LOSS = np.uint32(1 << 31)  # set in a token that is read but no target, where meta.json says loss_mask


def token_dtype(vocab_size, loss_mask=False):
    """The smallest of the two token types that holds every id of the vocabulary, and NO_LOSS if there is a mask."""
    return np.dtype("<u2") if vocab_size <= 65536 and not loss_mask else np.dtype("<u4")


# -- writing -------------------------------------------------------------------------------------


def write_atomically(path, *chunks):
    """Write bytes under a temporary name, flush them to the disk, rename. A crash leaves either the
    old file or the new one, never a part. Raises UserError if the disk is full or not writable."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def make_way(path, for_a_folder=False):
    """Rename to NAME.moved1 (2, ...) what lies where a file is to be written and cannot be replaced by one: a folder;
    for_a_folder: whatever it is. Raises UserError."""
    path = Path(path)
    if not os.path.lexists(path) or not (for_a_folder or (path.is_dir() and not path.is_symlink())):
        return
    names = (path.with_name(f"{path.name}.moved{number}") for number in itertools.count(1))
    try:
        os.rename(path, next(name for name in names if not os.path.lexists(name)))
    except OSError as error:
        raise cannot_write(path, error) from None


def make_folder(key, path):
    """Make a folder, if it is not there, that this key of the configuration or flag names. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}; choose a folder that can be written") from None


def cannot_write(path, error):
    return UserError(f"{path}: could not be written ({error.strerror}); mend that and run the same command again")


def write_json(path, content):
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def shard_header(dtype, tokens):
    """The 1,024 bytes in front of `tokens` tokens."""
    header = np.zeros(256, dtype="<u4")
    header[:3] = *FORMATS[np.dtype(dtype)], tokens
    return header.tobytes()


def write_shard(path, tokens):
    """Write one shard. `tokens`: (n,) uint16 or uint32. Returns its entry for meta.json."""
    tokens = np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<"))
    write_atomically(path, shard_header(tokens.dtype, len(tokens)), tokens.data)
    return {"file": Path(path).name, "tokens": len(tokens), "sha256": checksum(path)}


def checksum(path):
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest, chunk = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(memoryview(chunk)[:count])
    return digest.hexdigest()


# -- reading -------------------------------------------------------------------------------------


def shard_layout(path):
    """What a shard's header and size say: (dtype, bytes in front of the tokens, number of tokens).

    Raises UserError for a file that is not a whole shard."""
    try:
        with open(path, "rb", buffering=0) as file:
            header = np.frombuffer(file.read(12), dtype="<u4")
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a token shard; copy or prepare it again") from None
    except ValueError:  # less than three numbers, and not a multiple of four bytes
        header, size = (), os.path.getsize(path)
    by_magic = {magic: (dtype, version) for dtype, (magic, version) in FORMATS.items()}
    if len(header) < 3 or int(header[0]) not in by_magic:
        if Path(path).name in ("train.bin", "val.bin") and size and size % 2 == 0:
            return np.dtype("<u2"), 0, size // 2  # nanoGPT's: nothing but tokens
        found = f"magic number {header[0]}" if len(header) else f"{size} bytes"
        magics = " or ".join(map(str, by_magic))
        raise UserError(f"{path}: not a token shard: found {found}, expected magic {magics}; prepare the data again")
    dtype, version = by_magic[int(header[0])]
    if header[1] != version:
        raise UserError(f"{path}: found shard version {header[1]}, expected {version}; prepare the data again")
    expected = HEADER_BYTES + int(header[2]) * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path}: truncated shard: found {size} bytes, expected {expected} for the {header[2]} tokens its "
            "header promises; copy or prepare it again"
        )
    return dtype, HEADER_BYTES, int(header[2])


class TokenStream:
    """The shards of one split, in the order of their names, read as one long array of tokens.

    Window w is the block_size + 1 tokens from w * block_size on: its inputs and, one further, its
    targets. Neighbouring windows share one token, so every token but the first is a target once.

    Tokens are read with pread, not through a memory map: pages of a map count as the process's own
    memory, and a map of a file that was cut short kills the process without a word.

    Raises UserError if a shard is missing, broken, or the split is shorter than one window."""

    def __init__(self, folder, split, block_size):
        self.folder, self.split, self.block_size = Path(folder), split, block_size
        if not self.folder.is_dir():
            script = self.folder / "prepare.py"
            raise UserError(f"data.path: no folder {folder}; expected token shards: make them with python {script}")
        self.meta = read_meta(self.folder)
        self.loss_mask = bool(self.meta and self.meta.get("loss_mask"))
        entries = self.meta["splits"].get(split, {"shards": []})["shards"] if self.meta else None
        if entries is None:
            found = sorted(p.name for p in self.folder.glob("*.bin"))
            names = [name for name in found if split in name.removesuffix(".bin").split("_")]
            entries = [{"file": name} for name in names]
        script = self.folder / "prepare.py"
        command = f"python {script}" if script.exists() else "the script that prepares it"
        if self.meta is None and (self.folder / "progress.json").exists():
            raise UserError(f"data.path: {folder} is only half prepared; run {command} again, it goes on from there")
        if not entries:
            remedy = f"run {command}"
            if self.meta:
                remedy = "no document fell into it when it was prepared; prepare more and smaller documents"
            raise UserError(f"data.path: {folder} holds no {split} shards ({split}_000000.bin ...); {remedy}")
        self.paths = [self.folder / entry["file"] for entry in entries]
        layouts = [shard_layout(path) for path in self.paths]
        self.dtype, self.offsets, self.starts = layouts[0][0], [], [0]
        for path, entry, (dtype, offset, tokens) in zip(self.paths, entries, layouts, strict=True):
            if dtype != self.dtype:
                raise UserError(f"{path}: found {dtype.name} tokens, expected {self.dtype.name} as in {self.paths[0]}")
            if tokens != entry.get("tokens", tokens):
                raise UserError(
                    f"{path}: found {tokens} tokens, expected {entry['tokens']} as meta.json lists; copy it again"
                )
            self.offsets.append(offset)
            self.starts.append(self.starts[-1] + tokens)
        self.tokens = self.starts[-1]
        self.windows = (self.tokens - 1) // block_size
        self.files = {}  # number of a shard -> its open file
        if self.windows < 1:
            raise UserError(
                f"data.path: the {split} split of {folder} has {self.tokens} tokens, fewer than one window of "
                f"model.block_size + 1 = {block_size + 1}; prepare more data or lower model.block_size"
            )

    def fill(self, start, out):
        """Put tokens from `start` on into `out`, (n,) of the stream's dtype, across shard boundaries."""
        shard, done = bisect.bisect_right(self.starts, start) - 1, 0
        while done < len(out):
            here = start + done - self.starts[shard]
            piece = out[done : done + self.starts[shard + 1] - self.starts[shard] - here]
            if shard not in self.files:
                if len(self.files) == OPEN_FILES:
                    self.files.pop(next(iter(self.files))).close()
                self.files[shard] = open(self.paths[shard], "rb", buffering=0)  # noqa: SIM115
            position = self.offsets[shard] + here * self.dtype.itemsize
            if os.preadv(self.files[shard].fileno(), [piece], position) != piece.nbytes:
                raise UserError(f"{self.paths[shard]}: was cut short while it was read; copy or prepare it again")
            done += len(piece)
            shard += 1

    def read(self, start, length):
        """Tokens [start, start + length) -> (length,) int64."""
        out = np.empty(length, dtype=self.dtype)
        self.fill(start, out)
        return self.ids(out)

    def example(self, start, length):
        """Inputs and targets, both (length,) int64, from the token `start` on."""
        out = np.empty(length + 1, dtype=self.dtype)
        self.fill(start, out)
        return self.inputs_and_targets(out)

    def ids(self, tokens):
        return (tokens & ~NO_LOSS if self.loss_mask else tokens).astype(np.int64)

    def batch(self, windows):
        """Window numbers -> inputs and targets, both (len(windows), block_size) int64."""
        rows = np.empty((len(windows), self.block_size + 1), dtype=self.dtype)
        for row, window in zip(rows, windows, strict=True):
            self.fill(int(window) * self.block_size, row)
        return self.inputs_and_targets(rows)

    def inputs_and_targets(self, tokens):
        """Stored tokens (..., n + 1) -> inputs and targets (..., n) int64; a target that is none is IGNORE."""
        inputs, targets = self.ids(tokens[..., :-1]), self.ids(tokens[..., 1:])
        if self.loss_mask:
            targets[tokens[..., 1:] >= NO_LOSS] = IGNORE
        return inputs, targets

    def validation_windows(self, wanted):
        """`wanted` windows spread evenly over the stream, or all of them: the same at every evaluation."""
        return validation_windows(self.windows, wanted)

    def check_vocabulary(self, vocab_size, samples=64):
        """Raise UserError if meta.json, or a token in one of `samples` windows, is above the vocabulary."""
        if self.meta and self.meta["vocab_size"] > vocab_size:
            raise UserError(
                f"model.vocab_size: {vocab_size}, but {self.folder} has token ids up to "
                f"{self.meta['vocab_size'] - 1}; set it to at least {self.meta['vocab_size']}"
            )
        for window in self.validation_windows(samples):
            start = int(window) * self.block_size
            tokens = self.read(start, self.block_size + 1)
            if tokens.max() >= vocab_size:
                shard = bisect.bisect_right(self.starts, start + int(tokens.argmax())) - 1
                raise UserError(
                    f"{self.paths[shard]}: found token id {tokens.max()}, expected ids below model.vocab_size "
                    f"{vocab_size}; raise it, or prepare the data with the model's tokenizer"
                )

    def fingerprint(self):
        """What a checkpoint records of this stream: plain values that differ whenever the tokenizer, the
        vocabulary or the shards do. Shards without meta.json are known by their names and lengths alone."""
        entries = self.meta["splits"][self.split]["shards"] if self.meta else None
        known = entries or [path.name for path in self.paths]
        return {
            "tokenizer": self.meta["tokenizer"]["fingerprint"] if self.meta else None,
            "vocab_size": self.meta["vocab_size"] if self.meta else None,
            "tokens": self.tokens,
            "shards": hashlib.sha256(json.dumps([known, self.starts]).encode()).hexdigest()[:16],
        }


def read_meta(folder):
    """meta.json of a data folder, or None where there is none (shards from elsewhere)."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return None
    meta = read_json(path)
    try:
        right = isinstance(meta["vocab_size"], int) and isinstance(meta["tokenizer"]["fingerprint"], str)
        for split in meta["splits"].values():
            for shard in split["shards"]:
                right = right and isinstance(shard["file"], str) and isinstance(shard["tokens"], int)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({error!r}); expected what a prepare script writes; prepare it again"
        ) from None
    if not right:
        raise UserError(f"{path}: damaged; expected what a prepare script writes; prepare the data again")
    return meta
