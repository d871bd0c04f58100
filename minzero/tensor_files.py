"""The tensor files of a checkpoint: safetensors files of flat tensors, one a rank, with a checksum of each tensor.

A tensor holds consecutive elements of a flattened parameter. Its name is `<kind>/<parameter>/<first element>`, as
`fp32/blocks.0.mlp.up.weight/4096`. The kinds are those of `zero.KINDS` (float32 weights and Adam's moments) and
`random` (`random/cpu/0`, `random/cuda/0`: states of random generators, as bytes).

The index in state.json (`index_of`) says which file holds which elements, so that `SavedPieces` opens only the files
that it needs. Nothing that is read is trusted: a file that is damaged or crafted raises UserError.
"""

import json
import math
import os
import re
import resource
import stat
import zlib
from collections import defaultdict
from pathlib import Path

import torch

from minzero.errors import UserError
from minzero.files import open_regular
from minzero.zero import all_finite

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
MOMENTS = ("F32", "BF16", "F16")
ALLOWED = {"random": ("U8",), "fp32": ("F32",), "exp_avg": MOMENTS, "exp_avg_sq": MOMENTS}  # {kind: dtypes}
MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MOST_OPEN_FILES = 1 << 14
CHUNK = 1 << 22  # bytes read at a time where only their checksum is needed


def damaged(path, fault):
    """The UserError to raise for a file or folder of a checkpoint."""
    return UserError(f"{path}: {fault}; the checkpoint is damaged, use an older one")


def checksum(content):
    """CRC-32 of bytes as 8 hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


# -- writing ---------------------------------------------------------------------------------------


def write_tensors(path, sizes, tensors):
    """Write a safetensors file: 8 bytes of header length, a JSON header, the bytes of the tensors. Tensors are written
    one at a time, so at most one copy of a tensor is in memory. The header holds the checksum of each tensor, so that
    a reader can verify exactly what it reads.

    sizes: {name: (dtype, number of elements)}; tensors: an iterable of those flat tensors, in the same order.
    Returns the file's entry in state.json: {"bytes": its size, "header_crc32": checksum of its header}. Raises OSError,
    and UserError for a tensor that holds a NaN or an infinity."""
    header = {"__metadata__": {"crc32": " ".join(["00000000"] * len(sizes))}}
    end = 0
    for name, (dtype, elements) in sizes.items():
        begin = end
        end += elements * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": [elements], "data_offsets": [begin, end]}
    text = header_bytes(header)
    sums = []
    with open(path, "wb") as file:
        file.write(text)
        for name, tensor in zip(sizes, tensors, strict=True):
            tensor = tensor.cpu()
            if tensor.is_floating_point() and not all_finite(tensor):
                kind, parameter, _ = name.split("/")
                raise UserError(f"{kind} of {parameter} holds a NaN or an infinity")
            content = tensor.view(torch.uint8).numpy().data
            sums.append(checksum(content))
            file.write(content)
        assert file.tell() == len(text) + end, "a tensor was not as long as its header says"
        header["__metadata__"]["crc32"] = " ".join(sums)  # the same length as the zeros that it replaces
        text = header_bytes(header)
        file.seek(0)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(text) + end, "header_crc32": checksum(text)}


def header_bytes(header):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# -- reading one file ------------------------------------------------------------------------------


def open_plain_file(path):
    """Open a file for reading, unbuffered, if it is a plain file: no link, and nothing that could block or be endless,
    such as a pipe or a device. Raises OSError."""
    return os.fdopen(open_regular(path, links=False), "rb", buffering=0)


def check_size(path, size):
    """Raises UserError unless `path` is a plain file of `size` bytes."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise damaged(path, f"no such file, expected {size} bytes") from None
    except OSError as error:
        raise damaged(path, error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        raise damaged(path, "found a link, folder, pipe or device, expected a plain file")
    if status.st_size != size:
        raise damaged(path, f"{status.st_size} bytes, expected {size} bytes")


class TensorFile:
    """A rank's file of a checkpoint, open for reading parts of its flat tensors. Read with pread, not through a memory
    map: reading a map of a file that is truncated meanwhile kills the process without a message.

    entry: the file's entry in state.json. Raises UserError unless the header is the one that was written and describes
    flat tensors of known kinds that fill the file without gaps.

    tensors: {name: (dtype, offset in the data in bytes, number of elements, checksum or None)}."""

    def __init__(self, path, entry):
        self.path = path
        self.size = entry["bytes"]
        check_size(path, self.size)
        try:
            self.file = open_plain_file(path)
        except OSError as error:
            raise damaged(path, error.strerror) from None
        length = int.from_bytes(self.read_bytes(0, min(8, self.size)), "little")
        if self.size < 8 or length > min(self.size - 8, MOST_HEADER_BYTES):
            raise damaged(path, f"found a header of {length} bytes in a file of {self.size}")
        text = self.read_bytes(0, 8 + length)
        expected = entry.get("header_crc32")  # older code recorded the checksum of the whole file instead
        if expected and checksum(text) != expected:
            raise damaged(path, f"found checksum {checksum(text)} of its header, expected {expected}")
        self.first_byte = 8 + length
        try:
            self.tensors = read_header(json.loads(text[8:]), self.size - self.first_byte)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise damaged(path, "its header does not describe flat tensors that fill the file") from None
        if expected and not all(found for *_, found in self.tensors.values()):
            raise damaged(path, "its header holds no checksums")

    def keep(self, kinds):
        """Forget the tensors of other kinds, of which many open files would take memory."""
        self.tensors = {name: entry for name, entry in self.tensors.items() if name.partition("/")[0] in kinds}

    def elements(self):
        """{name: number of elements} of its tensors."""
        return {name: elements for name, (_, _, elements, _) in self.tensors.items()}

    def read_into(self, offset, out):
        """Fill a writable buffer with the bytes from `offset` in the file on. Raises UserError."""
        out = memoryview(out)
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self.file.fileno(), [out[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise damaged(self.path, error.strerror) from None
            if not count:
                raise damaged(self.path, "was cut short while it was read")
            done += count

    def read_bytes(self, offset, length):
        out = bytearray(length)
        self.read_into(offset, out)
        return bytes(out)

    def read(self, name, start, stop, elements=None, verify=False):
        """Elements [start, stop) of a tensor -> flat CPU tensor. elements: how many the tensor must have (None: any).
        verify: compare its checksum, for which a part alone needs the whole tensor to be read. Raises UserError."""
        dtype, begin, length, expected = self.tensors.get(name, (None, 0, -1, None))
        if elements not in (None, length) or not 0 <= start <= stop <= length:
            found = f"{length} elements" if dtype else "nothing"
            raise damaged(self.path, f"found {found} of {name}, expected {elements or stop} elements")
        out = torch.empty(stop - start, dtype=dtype)
        content = out.view(torch.uint8).numpy().data
        self.read_into(self.first_byte + begin + start * dtype.itemsize, content)
        if verify and expected and (start, stop) == (0, length):
            self.compare(name, checksum(content), expected)
        elif verify and expected:
            self.check(name)
        return out

    def check(self, name, progress=lambda: None):
        """Read a whole tensor in chunks and compare its checksum. progress: called for each chunk. Raises UserError."""
        dtype, begin, length, expected = self.tensors[name]
        self.compare(name, self.checksum_of_range(self.first_byte + begin, length * dtype.itemsize, progress), expected)

    def checksum_of_range(self, offset, length, progress=lambda: None):
        """The checksum of a range of bytes, read in chunks. progress: called for each chunk."""
        found = 0
        chunk = bytearray(CHUNK)
        for place in range(offset, offset + length, CHUNK):
            progress()
            part = memoryview(chunk)[: min(CHUNK, offset + length - place)]
            self.read_into(place, part)
            found = zlib.crc32(part, found)
        return f"{found:08x}"

    def compare(self, name, found, expected):
        if found != expected:
            raise damaged(self.path, f"{name}: found checksum {found}, expected {expected}")


def read_header(header, data_bytes):
    """The JSON header of a safetensors file -> {name: (dtype, offset in the data in bytes, number of elements, checksum
    or None)}. Raises ValueError, TypeError, KeyError or AttributeError if the tensors are not flat, of other kinds or
    dtypes, overlap, leave gaps, or do not fill `data_bytes`."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    sums = header.pop("__metadata__", {}).get("crc32", "").split()
    sums = sums or [None] * len(header)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    found = {}
    end = 0
    for (name, entry), expected in zip(entries, sums, strict=True):
        kind, _, first = name.split("/")
        (elements,) = entry["shape"]
        begin, stop = entry["data_offsets"]
        dtype = dtypes[entry["dtype"]]
        numbers = all(type(number) is int for number in (elements, begin, stop))
        right = numbers and elements >= 0 and begin == end and stop - begin == elements * dtype.itemsize
        if not right or entry["dtype"] not in ALLOWED[kind] or not re.fullmatch("[0-9]{1,18}", first):
            raise ValueError(name)
        found[name] = (dtype, begin, elements, expected)
        end = stop
    if end != data_bytes:
        raise ValueError(end)
    return found


def check_sums(path, files, progress=lambda: None):
    """Read files of a checkpoint completely and compare their checksums. files: {name: entry of state.json}. progress:
    called for each chunk that is read. Raises UserError for the first that differs."""
    for name, entry in files.items():
        progress()
        file = TensorFile(Path(path) / name, entry)
        if "header_crc32" in entry:
            for tensor in file.tensors:
                file.check(tensor, progress)
        elif (found := file.checksum_of_range(0, file.size, progress)) != entry["crc32"]:
            raise damaged(file.path, f"found checksum {found}, expected {entry['crc32']}")


# -- which file holds what -------------------------------------------------------------------------


def pieces_in(tensors):
    """[(parameter, first element, elements)] of the weights in a file. tensors: {name: number of elements}."""
    names = ((name.split("/"), elements) for name, elements in tensors.items())
    return [(parameter, int(start), elements) for (kind, parameter, start), elements in names if kind == "fp32"]


def index_of(pieces):
    """Which file holds which elements: {parameter: [[file, first, each, total], ...]}. An entry means that elements
    [first, first + total) of the parameter lie in consecutive files from number `file` on, `each` in every file, the
    last one perhaps fewer. So the index does not grow with the number of ranks: at stage 3 it is one entry a parameter.

    pieces: `pieces_in` of each file, in the order of their names."""
    index = defaultdict(list)
    for file, own in enumerate(pieces):
        for parameter, start, length in own:
            index[parameter].append([file, start, length, length])
    return {parameter: joined(rows) for parameter, rows in index.items()}


def joined(rows):
    """Rows of the index of one parameter, as few as say the same."""
    found = []
    for row in sorted(rows, key=lambda row: (row[1], row[3], row[0])):
        if found:
            file, first, each, total = found[-1]
            follows = row[1] == first + total and row[0] == file + total // each and total % each == 0
            if follows and (row[2] == each or row[3] == row[2] < each):  # a single piece may be shorter
                found[-1][3] += row[3]
                continue
        found.append([*row])
    return found


def merged(left, right):
    """({file: its entry}, index) of some files, and those of the files whose names follow, as one."""
    (files, index), (more, other) = left, right
    rows = {name: [[file + len(files), *rest] for file, *rest in rows] for name, rows in other.items()}
    return files | more, index | {name: joined(index.get(name, []) + own) for name, own in rows.items()}


def fault_of_index(index, elements, files):
    """The first fault of an index that was read from state.json, in words, or None. elements: {parameter: its number of
    elements}; files: the number of files."""

    for parameter, rows in index.items():
        are_rows = isinstance(rows, list) and all(map(is_row, rows))
        end = 0 if are_rows and parameter in elements else math.inf  # of what the rows cover; infinite after a fault
        for file, first, each, total in rows if are_rows else ():
            right = first >= end and each > 0 and total > 0 and file >= 0 and file - (-total // each) <= files
            end = first + total if right else math.inf
        if end > elements.get(parameter, 0):
            return f"pieces: {str(parameter)[:100]}: found {str(rows)[:100]}, expected parts of it in {files} files"
    return None


def is_row(value):
    return isinstance(value, list) and [type(number) for number in value] == 4 * [int]


def may_be_open(files):
    """How many of these files may be open at a time: half of the system's limit at most, which is raised as far as it
    may be. A file that must be closed for another is opened, and its header read, again for each parameter."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2 * files:
        soft = 2 * files if hard == resource.RLIM_INFINITY else min(hard, 2 * files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return files if soft == resource.RLIM_INFINITY else max(1, min(files, soft // 2))


class SavedPieces:
    """The parameters in a checkpoint's files, read wherever their pieces lie. Opens only the files that hold what it is
    asked for, and at most MOST_OPEN_FILES at a time. path: the checkpoint; state: its state.json; verify: compare the
    checksums of all that is read; kinds: those that are asked for, if not all. Raises UserError."""

    def __init__(self, path, state, verify=False, kinds=None):
        self.path = Path(path)
        self.entries = state["files"]
        self.verify = verify
        self.kinds = kinds
        self.names = sorted(state["files"])
        self.open = {}  # {number of a file: TensorFile}, least recently used first
        self.most = may_be_open(min(MOST_OPEN_FILES, len(self.names)))
        self.index = state.get("pieces")
        if self.index is None:  # saved by older code
            files = (TensorFile(self.path / name, self.entries[name]) for name in self.names)
            self.index = index_of(pieces_in(file.elements()) for file in files)
            elements = {name: math.prod(shape) for name, shape in state["parameters"].items()}
            if fault := fault_of_index(self.index, elements, len(self.names)):
                raise damaged(self.path, fault)

    def file(self, number):
        """The TensorFile of this number in the order of names, opened if it is not open."""
        file = self.open.pop(number, None)
        if file is None:
            if len(self.open) == self.most:
                self.open.pop(next(iter(self.open))).file.close()
            name = self.names[number]
            file = TensorFile(self.path / name, self.entries[name])
            if self.kinds:
                file.keep(self.kinds)
        self.open[number] = file
        return file

    def hold(self):
        """Open as many of the files as allowed: an open file stays readable when a run deletes the checkpoint."""
        for number in range(min(len(self.names), self.most)):
            self.file(number)

    def copy_overlap(self, tensor, start, kind, parameter):
        """Copy elements [start, start + len(tensor)) of a parameter into a flat tensor, from all files that hold some
        of them. Raises UserError if elements are missing or damaged."""
        end = start + len(tensor)
        copied = 0
        for file, first, each, total in self.index.get(parameter, ()):
            low = max(start, first)
            high = min(end, first + total)
            if low >= high:
                continue
            for place in range((low - first) // each, -((first - high) // each)):
                at = first + place * each
                length = min(each, first + total - at)
                begin = max(low, at)
                stop = min(high, at + length)
                name = f"{kind}/{parameter}/{at}"
                part = self.file(file + place).read(name, begin - at, stop - at, length, self.verify)
                tensor[begin - start : stop - start].copy_(part)
                copied += stop - begin
        if copied != len(tensor):
            raise damaged(self.path, f"{kind} of {parameter}: found {copied} of {len(tensor)} elements")
