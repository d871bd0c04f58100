"""Token files of other programs, read in blocks, whatever their size:

- Megatron's indexed data sets: PREFIX.bin, the ids alone, and PREFIX.idx, which says where documents end
  (`IndexedDataset` in megatron/core/datasets/indexed_dataset.py);
- OLMo's .npy: ids alone, in spite of the suffix, and numpy's own .npy;
- nanoGPT's train.bin and val.bin: uint16 ids alone;
- llm.c's shards, which are ours without meta.json.
"""

import contextlib
import hashlib
import os
import re
import struct
from pathlib import Path

import numpy as np

from minzero.data.documents import plural, printable
from minzero.data.shards import FORMATS, shard_layout
from minzero.errors import UserError, describe
from minzero.files import nearest, open_regular

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, document indices
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}  # by Megatron's codes
INDEX_BLOCK = 1 << 16  # entries of an index read at a time
NUMPY_MAGIC = b"\x93NUMPY"
WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}  # in the names of files
REMEDY = "copy or make it again"


class Reader:
    """A regular file, read by position. Raises UserError if it cannot be opened or read."""

    def __init__(self, path):
        self.path = path
        try:
            self.file = open_regular(path)
        except (OSError, ValueError) as error:  # a ValueError: a name that holds a NUL byte
            raise UserError(f"{printable(path)}: {getattr(error, 'strerror', None) or error}; {REMEDY}") from None
        self.size = os.fstat(self.file).st_size

    def close(self):
        os.close(self.file)

    def array(self, dtype, offset, count):
        """(count,) values from byte `offset` on."""
        out = np.empty(count, dtype)
        left = memoryview(out).cast("B")
        while len(left):  # one call reads less than 2 GiB
            try:
                done = os.preadv(self.file, [left], offset)
            except OSError as error:
                raise UserError(f"{printable(self.path)}: byte {offset}: {error.strerror}; {REMEDY}") from None
            if not done:
                raise UserError(f"{printable(self.path)}: was cut short while it was read, at byte {offset}; {REMEDY}")
            left = left[done:]
            offset += done
        return out


def reading(path):
    """A context with a Reader that is closed at its end."""
    return contextlib.closing(Reader(path))


class Ascending:
    """Ascending numbers that come in arrays, taken up to a limit at a time."""

    def __init__(self, arrays):
        self.arrays = iter(arrays)
        self.rest = np.empty(0, np.int64)

    def take(self, most):
        """The numbers up to `most` that were not taken before."""
        parts = []
        while self.rest is not None:
            cut = np.searchsorted(self.rest, most, side="right")
            parts.append(self.rest[:cut])
            self.rest = self.rest[cut:]
            if len(self.rest):
                break
            self.rest = next(self.arrays, None)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


# -- the files -----------------------------------------------------------------------------------


class PlainTokens:
    """Ids alone, maybe after a header. Documents are told apart by the end of text.

    kind: whose file it is. offset: bytes before the ids. tokens: their number."""

    is_plain = True

    def __init__(self, path, kind, dtype, offset, tokens):
        self.path = Path(path)
        self.name = self.path.name
        self.kind = kind
        self.dtype = np.dtype(dtype)
        self.offset = offset
        self.tokens = tokens

    def blocks(self, size, end_of_text):
        """Yield (tokens, ends): at most `size` ids at a time, and, ascending, where documents end: the number of this
        block's ids before it.

        An end of text ends its document (OLMo, nanoGPT), unless it is the first id of the file: then documents begin
        with it (llm.c)."""
        with reading(self.path) as file:
            for first in range(0, self.tokens, size):
                count = min(size, self.tokens - first)
                tokens = file.array(self.dtype, self.offset + first * self.dtype.itemsize, count)
                if first == 0:
                    in_front = tokens[0] == end_of_text
                ends = np.flatnonzero(tokens == end_of_text)
                if not in_front:
                    ends = ends + 1
                elif first == 0:
                    ends = ends[1:]
                if first + count == self.tokens and (not len(ends) or ends[-1] != count):
                    ends = np.append(ends, count)
                yield tokens, ends


class MegatronTokens:
    """An indexed data set of Megatron's, PREFIX.bin and PREFIX.idx, whose whole index is checked at the start. Raises
    UserError if it is damaged.

    A document is one or more sequences. Without document indices (a single 0) each sequence is one, as Megatron's own
    GPTDataset takes it."""

    kind = "Megatron"
    is_plain = False

    def __init__(self, prefix):
        self.name = os.path.basename(prefix)
        self.path = Path(f"{prefix}.bin")
        self.index = Path(f"{prefix}.idx")
        for path, other in ((self.path, self.index), (self.index, self.path)):
            if not os.path.lexists(path):
                raise UserError(
                    f"{printable(path)}: no such file; expected it beside {printable(other.name)}: Megatron's data "
                    "sets are both"
                )
        with reading(self.index) as file:
            self.read_header(file)
            self.tokens = self.check_sequences(file)
            self.check_documents(file)
        with reading(self.path) as file:
            expected = self.tokens * self.dtype.itemsize
            if file.size != expected:
                raise UserError(
                    f"{printable(self.path)}: found {file.size} bytes, expected {expected}: the {self.tokens} "
                    f"{self.dtype.name} ids of {self.index.name}; {REMEDY}"
                )

    def wrong(self, found, expected, remedy=REMEDY):
        return UserError(f"{printable(self.index)}: found {found}, expected {expected}; {remedy}")

    def read_header(self, file):
        """Set `dtype`, `sequences`, `indices` (of documents: one more than documents, or 0) and the places of the
        arrays."""
        start = file.array("u1", 0, min(file.size, INDEX_HEADER.size)).tobytes()
        if not start.startswith(INDEX_MAGIC):
            remedy = "convert its older format with Megatron" if start.startswith(b"TNTIDX") else REMEDY
            raise self.wrong(f"magic {start[:9]!r}", f"{INDEX_MAGIC!r} of Megatron's index", remedy)
        if len(start) < INDEX_HEADER.size:
            raise self.wrong(f"{len(start)} bytes", f"a header of {INDEX_HEADER.size}")
        _, version, code, self.sequences, self.indices = INDEX_HEADER.unpack(start)
        if version != 1:
            raise self.wrong(f"version {version}", "version 1")
        if code not in DTYPES:
            raise self.wrong(f"dtype code {code}", f"a code from 1 to {max(DTYPES)}")
        self.dtype = np.dtype(DTYPES[code])
        if self.dtype.kind == "f":
            raise self.wrong(f"dtype code {code} ({self.dtype.name})", "token ids, which are whole numbers")
        self.pointers_at = INDEX_HEADER.size + 4 * self.sequences
        self.indices_at = self.pointers_at + 8 * self.sequences
        size = self.indices_at + 8 * self.indices
        if self.sequences and file.size == size + self.sequences:
            raise self.wrong("a mode for each sequence", "token ids alone", "multimodal data sets cannot be converted")
        if file.size != size:
            counts = f"{self.sequences} sequences and {self.indices} document indices"
            raise self.wrong(f"{file.size} bytes", f"{size} for the {counts} that its header promises")

    def lengths(self, file):
        """Yield (number of the first sequence, their lengths as int64) in blocks."""
        for first in range(0, self.sequences, INDEX_BLOCK):
            count = min(INDEX_BLOCK, self.sequences - first)
            yield first, file.array("<i4", INDEX_HEADER.size + 4 * first, count).astype(np.int64)

    def document_indices(self, file):
        """Yield the document indices in blocks: the numbers of the sequences that begin documents, and last the number
        of all sequences."""
        for first in range(0, self.indices, INDEX_BLOCK):
            yield file.array("<i8", self.indices_at + 8 * first, min(INDEX_BLOCK, self.indices - first))

    def check_sequences(self, file):
        """Raise UserError unless the sequences follow each other without a gap. Returns the number of tokens."""
        total = 0
        for first, lengths in self.lengths(file):
            if lengths.min() < 0:
                place = int(lengths.argmin())
                raise self.wrong(f"length {lengths[place]} of sequence {first + place}", "a length from 0 on")
            before = total + np.cumsum(lengths) - lengths
            pointers = file.array("<i8", self.pointers_at + 8 * first, len(lengths))
            different = np.flatnonzero(pointers != before * self.dtype.itemsize)
            if len(different):
                place = int(different[0])
                expected = before[place] * self.dtype.itemsize
                raise self.wrong(f"sequence {first + place} at byte {pointers[place]}", f"byte {expected}")
            total += int(lengths.sum())
        return total

    def check_documents(self, file):
        """Raise UserError unless the document indices ascend from 0 to the number of sequences."""
        last = 0
        for number, indices in enumerate(self.document_indices(file)):
            if (number == 0 and indices[0] != 0) or indices[0] < last or np.any(np.diff(indices) < 0):
                raise self.wrong("document indices that do not ascend from 0", "ascending numbers of sequences")
            last = int(indices[-1])
        if self.indices > 1 and last != self.sequences:
            raise self.wrong(f"{last} as the last document index", f"the number of sequences, {self.sequences}")

    def document_ends(self, file):
        """Yield arrays of where documents end: the numbers of tokens before that."""
        indices = Ascending(self.document_indices(file)) if self.indices > 1 else None
        total = 0
        for first, lengths in self.lengths(file):
            ends = total + np.cumsum(lengths)
            starts = np.concatenate([[total], ends])
            total = int(ends[-1])
            if indices is not None:
                taken = indices.take(first + len(lengths)) - first
                ends = starts[taken[1:] if first == 0 else taken]  # the first index is where the first one begins
            yield ends

    def blocks(self, size, end_of_text):
        """Yield (tokens, ends) as `PlainTokens.blocks` does."""
        with reading(self.path) as file, reading(self.index) as index:
            ends = Ascending(self.document_ends(index))
            for first in range(0, self.tokens, size):
                count = min(size, self.tokens - first)
                tokens = file.array(self.dtype, first * self.dtype.itemsize, count)
                yield tokens, ends.take(first + count) - first


# -- opening -------------------------------------------------------------------------------------


class TokenFiles:
    """Token files of one kind, in a fixed order."""

    def __init__(self, files):
        self.files = files
        self.kind = files[0].kind
        self.tokens = sum(file.tokens for file in files)
        identity = [(file.name, file.tokens, file.dtype.str) for file in files]
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.description = f"{self.kind}: {plural(len(files), 'file')}, {self.tokens} tokens, {digest}"
        self.summary = f"{self.kind}'s: {plural(len(files), 'file')}, {self.tokens:,} {files[0].dtype.name} ids"


def open_token_files(sources, dtype, default_dtype):
    """The token files that are named: files, Megatron's prefixes, and folders of them.

    dtype: of ids without a header, or None: uint16 for nanoGPT's, `default_dtype` for OLMo's. Raises UserError for
    files that are damaged, of no known format, or of several formats."""
    names = [name for source in sources for name in token_files_in(str(source))]
    files = [open_token_file(name, dtype, default_dtype) for name in dict.fromkeys(names)]
    kinds = list(dict.fromkeys(file.kind for file in files))
    if len(kinds) > 1:
        raise UserError(f"{printable(files[0].path)} ...: found files of {' and '.join(kinds)}, expected one format")
    empty = [file for file in files if not file.tokens]
    if empty:
        raise UserError(f"{printable(empty[0].path)}: found no ids, expected a token file; {REMEDY}, or leave it out")
    return TokenFiles(files)


def token_files_in(source):
    """The token files of a folder, sorted; of a file, itself; of Megatron's PREFIX.bin and PREFIX.idx, PREFIX."""
    if os.path.isdir(source):
        found = sorted(os.listdir(source))
        if "meta.json" in found:
            raise UserError(f"{printable(source)}: found meta.json: token shards already; expected files to convert")
        if "progress.json" in found:
            raise UserError(f"{printable(source)}: only half prepared; run the command that prepares it again")
        names = [os.path.join(source, name) for name in found if name.endswith((".npy", ".idx", ".bin"))]
        if not names:
            raise UserError(f"{printable(source)}: found no .npy, .bin or .idx in it, expected token files")
        return [prefix_of(name) for name in names]
    if not any(os.path.lexists(name) for name in (source, f"{source}.bin", f"{source}.idx")):
        raise UserError(
            f"{printable(source)}: no such file (nearest existing folder: {os.path.abspath(nearest(source))}); "
            "expected a token file, a folder of them, or Megatron's PREFIX of .bin and .idx"
        )
    return [prefix_of(source)]


def prefix_of(path):
    """PREFIX for Megatron's PREFIX.bin and PREFIX.idx; any other path as it is."""
    prefix, suffix = os.path.splitext(path)
    if suffix == ".idx" or (suffix == ".bin" and os.path.lexists(f"{prefix}.idx")):
        return prefix
    return path


def open_token_file(path, dtype, default_dtype):
    """One token file, by its name and first bytes. Raises UserError."""
    if path.endswith(".npy"):
        return open_npy(path, dtype, default_dtype)
    if not path.endswith(".bin"):
        if os.path.lexists(path) and not os.path.lexists(f"{path}.idx"):
            raise UserError(f"{printable(path)}: found a file of no known suffix, expected .npy, .bin or .idx")
        return MegatronTokens(path)
    with reading(path) as file:
        start = file.array("u1", 0, min(file.size, 4)).tobytes()
    if start in {struct.pack("<I", magic) for magic, _ in FORMATS.values()}:
        return PlainTokens(path, "llm.c", *shard_layout(path))
    if os.path.basename(path) not in ("train.bin", "val.bin") and dtype is None:
        raise UserError(
            f"{printable(path)}: found no header of llm.c, no .idx of Megatron beside it, and not the name of "
            "nanoGPT's train.bin or val.bin; if it holds ids alone, say which: --dtype uint16"
        )
    return open_headerless(path, "nanoGPT", dtype, "uint16")


def open_npy(path, dtype, default_dtype):
    """OLMo's .npy, which is ids alone, or numpy's own. Raises UserError."""
    with reading(path) as file:
        start = file.array("u1", 0, min(file.size, len(NUMPY_MAGIC))).tobytes()
        size = file.size
    if start != NUMPY_MAGIC:
        return open_headerless(path, "OLMo", dtype, default_dtype)
    try:
        with np.errstate(over="ignore"):  # of an absurd shape, which is refused
            array = np.lib.format.open_memmap(path, mode="r")
    except (Exception, MemoryError) as error:  # of many classes: numpy evaluates the header as Python
        raise UserError(f"{printable(path)}: damaged numpy file ({describe(error)}); {REMEDY}") from None
    if array.dtype.kind not in "iu" or array.ndim != 1:
        found = f"{array.dtype.name} of shape {array.shape}"
        raise UserError(f"{printable(path)}: found {found}, expected one row of whole numbers; write it again")
    if size != array.offset + array.nbytes:
        raise UserError(f"{printable(path)}: found {size} bytes, expected {array.offset + array.nbytes}; {REMEDY}")
    return PlainTokens(path, "OLMo", array.dtype, array.offset, array.size)


def open_headerless(path, kind, dtype, default_dtype):
    """A file of ids alone. Raises UserError if it cannot be one of that type."""
    chosen = np.dtype(dtype or default_dtype).newbyteorder("<")
    with reading(path) as file:
        if file.size % chosen.itemsize:
            raise UserError(
                f"{printable(path)}: found {file.size} bytes, expected whole {chosen.name} ids of {chosen.itemsize} "
                f"bytes; {REMEDY}, or say its type with --dtype"
            )
        start = file.array(chosen, 0, min(file.size // chosen.itemsize, 1024))
    if dtype is None and chosen.itemsize == 2 and len(start) >= 256 and not start[1::2].any() and start.any():
        raise UserError(
            f"{printable(path)}: found 0 in every second of {len(start)} uint16 values, expected ids: they are "
            "uint32; say so with --dtype uint32, or if that is wrong, --dtype uint16"
        )
    return PlainTokens(path, kind, chosen, 0, file.size // chosen.itemsize)


def split_in_name(name):
    """ "train" or "val", from the words of a file's name. Raises UserError if it says neither, or both."""
    found = {WORDS[word] for word in re.split("[^a-z]+", name.lower()) if word in WORDS}
    if len(found) != 1:
        raise UserError(
            f"{printable(name)}: found no split in the file's name, expected train or val (valid, validation); "
            "rename it, or split by document: --split_by document"
        )
    return found.pop()
