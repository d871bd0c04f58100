"""Token shards: one file format, a writer that never leaves a partial file, a reader for any size.

A shard is 256 little-endian int32 of header, then the tokens. The header is llm.c's: a magic number,
a version and the number of tokens; the magic tells uint16 from uint32. `meta.json` beside the shards
says which tokenizer made them and is written last, so a folder without it was never finished.
Plain headerless uint16 files named train.bin and val.bin (nanoGPT's) are read as well.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import stat
import struct
import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np

from minzero.data.meta import read_meta
from minzero.data.order import validation_windows
from minzero.errors import UserError
from minzero.files import checksum, open_regular, write_atomically
from minzero.sizes import IGNORE_INDEX

HEADER_BYTES = 256 * 4
FORMATS = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}  # dtype: (magic, version)
OPEN_FILES = 128  # of a process: data sets have thousands of shards, and the usual limit is 1,024 open files
HEADERS_AT_START = 64  # shards of a data set whose headers are read at the start; of the others, the sizes
# Set in a token if meta.json says loss_mask: it is read but not a target, and it is the first of a conversation.
NO_LOSS = np.uint32(1 << 31)
STARTS = np.uint32(1 << 30)
MARKS = NO_LOSS | STARTS


def token_dtype(vocab_size, loss_mask=False):
    """The smaller of the two token types that holds every id of the vocabulary, and MARKS if there is a mask."""
    return np.dtype("<u2") if vocab_size <= 65536 and not loss_mask else np.dtype("<u4")


# -- writing -------------------------------------------------------------------------------------


def shard_header(dtype, tokens):
    """The 1,024 bytes before `tokens` tokens."""
    header = np.zeros(256, dtype="<u4")
    header[:3] = *FORMATS[np.dtype(dtype)], tokens
    return header.tobytes()


def write_shard(path, tokens):
    """Write one shard. `tokens`: (n,) uint16 or uint32. Returns its entry for meta.json."""
    tokens = np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<"))
    write_atomically(path, shard_header(tokens.dtype, len(tokens)), tokens.data)
    return {"file": Path(path).name, "tokens": len(tokens), "sha256": checksum(path)}


# -- reading -------------------------------------------------------------------------------------


def open_shard(path):
    """`open_regular`, whose errors become a UserError."""
    try:
        return open_regular(path)
    except (OSError, ValueError) as error:  # a ValueError: a name that holds a NUL byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: {reason}; expected a token shard; copy or prepare it again") from None


def shard_layout(path):
    """Read a shard's header: (dtype, bytes before the tokens, number of tokens).

    Raises UserError for a file that is not a shard, or has another size than its header says."""
    file = open_shard(path)
    try:
        dtype, offset, tokens = layout_of(file, path)
        size = os.fstat(file).st_size
    finally:
        os.close(file)
    expected = offset + tokens * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path}: truncated shard: found {size} bytes, expected {expected} for the {tokens} tokens its "
            "header promises; copy or prepare it again"
        )
    return dtype, offset, tokens


def layout_of(file, path):
    """As `shard_layout`, but the size is not checked. file: the shard's descriptor."""
    try:
        start = os.pread(file, 12, 0)
        size = os.fstat(file).st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a token shard; copy or prepare it again") from None
    magic, version, tokens = struct.unpack("<3I", start) if len(start) == 12 else (None, None, None)
    by_magic = {magic: (dtype, version) for dtype, (magic, version) in FORMATS.items()}
    if magic not in by_magic:
        if os.path.basename(path) in ("train.bin", "val.bin") and size and size % 2 == 0:
            return np.dtype("<u2"), 0, size // 2  # nanoGPT's: no header
        found = f"{size} bytes" if magic is None else f"magic number {magic}"
        magics = " or ".join(map(str, by_magic))
        raise UserError(f"{path}: not a token shard: found {found}, expected magic {magics}; prepare the data again")
    dtype, expected = by_magic[magic]
    if version != expected:
        raise UserError(f"{path}: found shard version {version}, expected {expected}; prepare the data again")
    return dtype, HEADER_BYTES, tokens


def check_layout(path, layout, dtype, entry, first):
    """Raise UserError if a shard's layout is not that of the first shard or not what meta.json lists."""
    if layout[0] != dtype:
        raise UserError(f"{path}: found {layout[0].name} tokens, expected {dtype.name} as in {first}")
    if layout[2] != entry.get("tokens", layout[2]):
        raise UserError(
            f"{path}: found {layout[2]} tokens, expected {entry['tokens']} as meta.json lists; copy it again"
        )


class OpenFiles:
    """At most `most` open shards, of all data sets of this process together: the least recently used is closed."""

    def __init__(self, most):
        self.most = most
        self.files = OrderedDict()  # (number of the stream, number of its shard) -> descriptor

    def __len__(self):
        return len(self.files)

    def get(self, stream, shard, path, check):
        """The descriptor of a shard. check(descriptor): called when it is opened; raises UserError to refuse it."""
        key = stream, shard
        if key in self.files:
            self.files.move_to_end(key)
            return self.files[key]
        file = open_shard(path)
        try:
            check(file)
        except UserError:
            os.close(file)
            raise
        while len(self.files) >= self.most:
            os.close(self.files.popitem(last=False)[1])
        self.files[key] = file
        return file

    def close(self, stream):
        """Close the shards of a stream that is no longer used."""
        for key in [key for key in self.files if key[0] == stream]:
            with contextlib.suppress(OSError):
                os.close(self.files.pop(key))


SHARED_FILES = OpenFiles(OPEN_FILES)
STREAMS = itertools.count()


def holds_data(path):
    """Whether a path is a folder of token shards."""
    path = Path(path)
    return path.is_dir() and any((path / name).exists() for name in ("meta.json", "val_000000.bin", "val.bin"))


class TokenStream:
    """The shards of one split, in the order of their names, read as one long array of tokens.

    Window w is tokens [w * block_size, w * block_size + block_size + 1): its inputs and, shifted by one, its targets.
    Neighbouring windows share one token, so every token but the first is a target once.

    Tokens are read with pread, not through a memory map: pages of a map count as the process's own memory, and
    reading a map of a file that was cut short kills the process without a message.

    At the start every shard must have the size that meta.json lists. Headers are read of the first HEADERS_AT_START
    shards, and of each other shard when it is first opened. Without meta.json all headers are read at the start: only
    they say how many tokens there are. Ids are compared with the vocabulary on every read.

    Raises UserError if a shard is missing, broken, or the split is shorter than one window."""

    is_whole = True  # whether the windows have all tokens of the split
    has_documents = False  # whether `batch` has positions in documents, see packing.py
    has_pairs = False  # whether it has a reference's log-probabilities too

    def __init__(self, folder, split, block_size):
        self.folder = Path(folder)
        self.split = split
        self.block_size = block_size
        if not os.path.isdir(folder):
            raise UserError(
                f"data.path: no folder {folder}; expected token shards: make them with a prepare script, as "
                f"python data/text/prepare.py --input TEXT --out {folder}"
            )
        self.meta = read_meta(self.folder)
        self.loss_mask = bool(self.meta and self.meta.get("loss_mask"))
        self.vocab_size = self.meta["vocab_size"] if self.meta else None
        self.entries = shards_of(self.folder, split, self.meta)
        self.check_prepared()
        self.paths = [self.folder / entry["file"] for entry in self.entries]
        self.measure_shards()
        self.tokens = self.starts[-1]
        self.windows = self.count_windows()
        self.files = SHARED_FILES
        self.number = next(STREAMS)
        weakref.finalize(self, SHARED_FILES.close, self.number)

    def count_windows(self):
        """The number of whole windows. Raises UserError if there is none."""
        windows = (self.tokens - 1) // self.block_size
        if windows < 1:
            raise UserError(
                f"data.path: the {self.split} split of {self.folder} has {self.tokens} tokens, fewer than one window "
                f"of model.block_size + 1 = {self.block_size + 1}; prepare more data or lower model.block_size"
            )
        return windows

    @property
    def windows_and_rest(self):
        """The number of windows with the last one, which may be short."""
        return -(-(self.tokens - 1) // self.block_size)

    @property
    def epoch_tokens(self):
        """Tokens of a run's batches in which all windows are read once."""
        return self.tokens

    @property
    def is_uneven(self):
        """Whether windows have different numbers of targets that count."""
        return self.loss_mask

    def check_prepared(self):
        """Raise UserError if the preparation of the folder is not finished, or gave this split no shards."""
        script = self.folder / "prepare.py"
        command = f"python {script}" if script.exists() else "the script that prepares it"
        if self.meta is None and (self.folder / "progress.json").exists():
            raise UserError(f"data.path: {self.folder} is only half prepared; run {command} again, it resumes there")
        if not self.entries:
            remedy = f"run {command}"
            if self.meta:
                remedy = "no document fell into it when it was prepared; prepare more and smaller documents"
            raise UserError(
                f"data.path: {self.folder} holds no {self.split} shards ({self.split}_000000.bin ...); {remedy}"
            )

    def measure_shards(self):
        """Set `dtype`, `offsets` (bytes before the tokens of each shard) and `starts` (the place of each shard's first
        token in the stream, and last the number of all tokens). Raises UserError for a shard that is missing or
        broken."""
        first = self.paths[0]
        self.dtype = shard_layout(first)[0]
        self.offsets = []
        self.starts = [0]
        for number, (path, entry) in enumerate(zip(self.paths, self.entries, strict=True)):
            offset = HEADER_BYTES
            tokens = entry.get("tokens")
            if number < HEADERS_AT_START or tokens is None or not self.has_size(path, tokens):
                layout = shard_layout(path)
                check_layout(path, layout, self.dtype, entry, first)
                _, offset, tokens = layout
            self.offsets.append(offset)
            self.starts.append(self.starts[-1] + tokens)

    def has_size(self, path, tokens):
        """Whether a file exists and has the size of a shard of this many tokens."""
        try:
            status = os.stat(path)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == HEADER_BYTES + tokens * self.dtype.itemsize

    def open(self, shard):
        """The descriptor of a shard, whose header has been checked. Raises UserError."""
        path = self.paths[shard]

        def check(file):
            layout = layout_of(file, path)
            if self.offsets[shard]:  # else it has no header to check
                expected = {"tokens": self.starts[shard + 1] - self.starts[shard]}
                check_layout(path, layout, self.dtype, expected, self.paths[0])

        return self.files.get(self.number, shard, path, check)

    def fill(self, start, out):
        """Read tokens [start, start + n) into `out`, (n,) of the stream's dtype, across shard boundaries. Raises
        UserError that names the shard and the place in it."""
        shard = bisect.bisect_right(self.starts, start) - 1
        done = 0
        while done < len(out):
            first = start + done - self.starts[shard]  # in this shard
            left = self.starts[shard + 1] - self.starts[shard] - first
            piece = out[done : done + left]
            if len(piece):
                self.fill_from(shard, first, piece)
            done += len(piece)
            shard += 1

    def fill_from(self, shard, token, out):
        """As `fill`, from one shard; token: the first one's number in that shard."""
        file = self.open(shard)
        path = self.paths[shard]
        position = self.offsets[shard] + token * self.dtype.itemsize  # bytes
        left = memoryview(out).cast("B")
        while len(left):  # one call reads less than 2 GiB
            try:
                count = os.preadv(file, [left], position)
            except OSError as error:
                raise UserError(
                    f"{path}: token {token}, byte {position}: could not be read ({error.strerror}); copy or prepare "
                    "it again"
                ) from None
            if not count:
                raise UserError(
                    f"{path}: was cut short while it was read: it ends before byte {position + len(left)} (tokens "
                    f"{token} to {token + len(out) - 1}); copy or prepare it again"
                )
            left = left[count:]
            position += count

    def read(self, start, length):
        """Tokens [start, start + length) -> (length,) int64."""
        out = np.empty(length, dtype=self.dtype)
        self.fill(start, out)
        return self.ids(out, lambda place: start + place).astype(np.int64)

    def example(self, start, length):
        """Inputs and targets, both (length,) int64, of which the first input is token `start`."""
        out = np.empty(length + 1, dtype=self.dtype)
        self.fill(start, out)
        return self.inputs_and_targets(out, lambda place: start + place)

    def ids(self, tokens, position):
        """Stored tokens -> their ids, of the same dtype. position: index into the flat array -> token of the stream.
        Raises UserError that names shard and place if an id is not below the vocabulary size."""
        ids = tokens & ~MARKS if self.loss_mask else tokens
        if self.vocab_size is not None and ids.size and ids.max() >= self.vocab_size:
            start = position(int(ids.argmax()))
            shard = bisect.bisect_right(self.starts, start) - 1
            raise UserError(
                f"{self.paths[shard]}: found token id {ids.max()}, expected ids below model.vocab_size "
                f"{self.vocab_size} (token {start - self.starts[shard]} of this file); raise it, or prepare the data "
                "with the model's tokenizer; if it was right before, the file is damaged: see python data/verify.py"
            )
        return ids

    def batch(self, windows):
        """Window numbers -> inputs and targets, both (len(windows), block_size) int64."""
        length = self.block_size + 1
        rows = np.empty((len(windows), length), dtype=self.dtype)
        for row, window in zip(rows, windows, strict=True):
            self.fill(int(window) * self.block_size, row)
        return self.inputs_and_targets(
            rows, lambda place: int(windows[place // length]) * self.block_size + place % length
        )

    def inputs_and_targets(self, tokens, position):
        """Stored tokens (..., n + 1) -> inputs and targets (..., n) int64; a token without loss is IGNORE_INDEX as a
        target."""
        ids = self.ids(tokens, position)
        inputs = ids[..., :-1].astype(np.int64)
        targets = ids[..., 1:].astype(np.int64)
        if self.loss_mask:
            targets[tokens[..., 1:] >= NO_LOSS] = IGNORE_INDEX
        return inputs, targets

    def summary(self):
        """A line on how the windows were made, or None."""
        return

    def attended(self):
        """The mean number of tokens that attention compares a token with: all of its window."""
        return self.block_size

    # -- documents

    def begins_document(self, tokens):
        """Which of these stored tokens, (..., n), begin a document, as an array of bool. Where an id after each
        document tells, the first of a row is not known, and False. meta.json must satisfy `knows_documents`."""
        if self.meta.get("document_starts"):
            return tokens & STARTS != 0
        begin, end = document_of(self.meta)
        if begin:
            return tokens == (begin[0] | NO_LOSS if self.loss_mask else begin[0])
        after_end = np.zeros(tokens.shape, dtype=bool)
        after_end[..., 1:] = tokens[..., :-1] == end[-1]
        return after_end

    # -- checks

    def validation_windows(self, wanted):
        """`wanted` windows spread evenly over the stream, or all of them: the same at every evaluation."""
        return validation_windows(self.windows, wanted)

    def check_vocabulary(self, vocab_size, samples=64):
        """Raise UserError if the vocabulary of meta.json is larger than the model's, or a token in one of `samples`
        places is outside it. Later reads compare with it too."""
        if self.meta and self.meta["vocab_size"] > vocab_size:
            raise UserError(
                f"model.vocab_size: {vocab_size}, but {self.folder} has token ids up to "
                f"{self.meta['vocab_size'] - 1}; set it to at least {self.meta['vocab_size']}; a "
                "trained model keeps its own number, and its data is prepared with its tokenizer"
            )
        if not self.meta:
            self.vocab_size = vocab_size
        length = min(self.block_size + 1, self.tokens)
        for place in validation_windows(self.tokens // length, samples):
            self.read(int(place) * self.block_size, length)

    def verify(self, share=0, of=1):
        """Read shards number share, share + of, share + 2 * of, ... as a whole. Raises UserError if a checksum is not
        that of meta.json, or an id is not below the vocabulary size."""
        for path, entry in list(zip(self.paths, self.entries, strict=True))[share::of]:
            verify_shard(path, entry, self.vocab_size, self.loss_mask)

    def fingerprint(self):
        """The identity of this stream, for checkpoints: plain values that differ whenever the tokenizer, the vocabulary
        or the shards do. Shards without meta.json are identified by their names and lengths alone."""
        known = self.entries if self.meta else [path.name for path in self.paths]
        return {
            "tokenizer": self.meta["tokenizer"]["fingerprint"] if self.meta else None,
            "vocab_size": self.meta["vocab_size"] if self.meta else None,
            "tokens": self.tokens,
            "shards": hashlib.sha256(json.dumps([known, self.starts]).encode()).hexdigest()[:16],
        }


def document_of(meta):
    """The ids before and after each document of a data set, two lists. meta: its meta.json or None."""
    meta = meta or {}
    end_of_text = [meta["end_of_text"]] if "end_of_text" in meta else []
    found = meta.get("document", {"begin": end_of_text})
    return found.get("begin", []), found.get("end", [])


def knows_documents(meta):
    """Whether the shards of a data set tell where its documents begin. Conversations have an end of text after each
    answer, so that where no id is before them only STARTS tells. meta: meta.json or None."""
    begin, end = document_of(meta)
    if begin or not meta:
        return bool(begin)
    return bool(meta.get("document_starts") or (end and not meta.get("loss_mask")))


def shards_of(folder, split, meta):
    """The entries of a split's shards, [{"file", ...}]: meta.json's, or the names of the files where there is none."""
    if meta:
        return meta["splits"].get(split, {"shards": []})["shards"]
    found = sorted(path.name for path in folder.glob("*.bin"))
    return [{"file": name} for name in found if split in name.removesuffix(".bin").split("_")]


def verify_shard(path, entry, vocab_size=None, loss_mask=False):
    """Read a whole shard and compare it with its entry of meta.json. Returns (dtype, tokens, largest id, or None if it
    is empty). Raises UserError if the header, the size, the checksum or an id is wrong."""
    dtype, offset, tokens = layout = shard_layout(path)
    check_layout(path, layout, dtype, entry, path)
    digest = hashlib.sha256()
    chunk = bytearray(4 << 20)
    largest = None
    place = 0  # of the largest id
    done = 0  # bytes
    file = open_shard(path)
    try:
        while done < offset + tokens * dtype.itemsize:
            # the header by itself, so that what follows is whole tokens
            part = memoryview(chunk)[: offset if done < offset else len(chunk)]
            count = os.preadv(file, [part], done)
            digest.update(part[:count])
            if done >= offset:
                count -= count % dtype.itemsize  # if the file is cut short meanwhile
                ids = np.frombuffer(part[:count], dtype)
                if loss_mask:
                    ids = ids & ~MARKS
                if largest is None or ids.max() > largest:
                    largest = int(ids.max())
                    place = (done - offset) // dtype.itemsize + int(ids.argmax())
            done += count
    except OSError as error:
        raise UserError(f"{path}: byte {done}: could not be read ({error.strerror}); copy it again") from None
    finally:
        os.close(file)
    expected = entry.get("sha256")
    if expected not in (None, digest.hexdigest()):
        raise UserError(
            f"{path}: found SHA-256 {digest.hexdigest()[:16]}..., expected {expected[:16]}... as meta.json lists; copy "
            "or prepare it again"
        )
    if vocab_size is not None and largest is not None and largest >= vocab_size:
        raise UserError(
            f"{path}: found token id {largest} (token {place} of this file), expected ids below {vocab_size}; copy or "
            "prepare it again"
        )
    return dtype, tokens, largest
