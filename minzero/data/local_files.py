"""Documents from local files: finding the files of --input, and reading text, JSON lines and parquet."""

import codecs
import collections
import contextlib
import glob
import io
import json
import os
import stat
from pathlib import Path

import orjson

from minzero.data.documents import (
    SET_COLUMN,
    BadDocument,
    Source,
    checked_value,
    is_far,
    missing_column,
    plural,
    printable,
    without_nulls,
)
from minzero.errors import UserError, describe
from minzero.files import nearest

TEXT_PIECE = 1 << 24  # characters of a text file that make one document; more would not fit bounded memory
BOUNDARY = 1 << 16  # bytes searched for the end of a paragraph where a file is cut


class Files(Source):
    """The documents of local files: each row of .jsonl and .parquet, each .txt file; .jsonl and .txt also as .gz and
    .zst. The case of a suffix does not matter. A folder gives its files of these kinds; a file of another kind is read
    as text if it, or a glob, was named.

    patterns: files, folders and globs. kind: the type of the column's values, str or list; dict for whole rows, which
    are read from .json as well. `summary`: one line on the files that were found and passed over. Raises UserError if
    nothing matches."""

    def __init__(self, patterns, column="text", kind=str):
        self.column = column
        self.kind = kind
        self.readers = READERS | {".json": read_json} if kind is dict else READERS
        self.cuts = frozenset()  # names of the files that are cut in two; see cut_large
        found = []
        passed_over = collections.Counter()
        if isinstance(patterns, str | Path):
            patterns = [patterns]
        for pattern in patterns:
            found += find_files(os.fspath(pattern), passed_over, self.readers)
        # a file named twice, as a.txt and x/../a.txt, is read once
        self.paths = sorted({os.path.abspath(path): path for path in sorted(found, reverse=True)}.values())
        self.root = os.path.commonpath([path.parent for path in self.paths])
        try:
            self.sizes = [path.stat().st_size for path in self.paths]
        except OSError as error:
            raise UserError(f"--input: {printable(error.filename)}: {error.strerror}; remove it or try again") from None
        self.bytes_read = 0
        self.description = f"{len(self.paths)} files, {sum(self.sizes)} bytes, column {column}"
        self.summary = summary(self.paths, self.sizes, passed_over, self.readers)

    @property
    def fraction(self):
        return self.bytes_read / max(1, sum(self.sizes))

    def name(self, path):
        """The path relative to the folder that holds all files, which does not change when that folder moves."""
        return os.path.relpath(path, self.root)

    def cut_large(self, val_fraction, split_of):
        """Choose text files to cut in two, if a hash of the names would split the bytes badly.

        Badly: validation gets less than half or more than twice `val_fraction` of the bytes. Then the largest text
        files, as few as put it right, are cut at the end of a paragraph: training gets the beginning and validation
        the last val_fraction of each. Decided by names and sizes alone, so a later call decides the same.

        split_of: key -> "train" or "val". Returns a line about it, or None if no file is cut."""
        total = sum(self.sizes)
        if self.kind is not str or not total or not 0 < val_fraction < 1:
            return None
        texts = []  # (bytes, name, bytes that the hash gives to validation)
        for path, size in zip(self.paths, self.sizes, strict=True):
            if kind_of(path) in (".txt", None) and not compression(path) and size:
                name = self.name(path)
                texts.append((size, name, bytes_in_val(name, size, split_of)))
        # of rows and compressed files the hash is taken to give val_fraction
        of_others = total - sum(size for size, _, _ in texts)
        by_hash = val_fraction * of_others + sum(in_val for _, _, in_val in texts)
        cuts = set()
        share = by_hash
        for size, name, in_val in sorted(texts, key=lambda file: (-file[0], file[1])):  # the largest first
            if not is_far(share / total, val_fraction):
                break
            cuts.add(name)
            share += val_fraction * size - in_val
        self.cuts = frozenset(cuts)
        self.val_fraction = val_fraction
        if not cuts:
            return None
        return (
            f"{plural(len(cuts), 'file')} cut in two: training gets the beginning of each and validation the last "
            f"{val_fraction:.3g} of it; a hash of the names would give validation {max(0, by_hash / total):.2%} of "
            f"the text, and --val_fraction asks for {val_fraction:.2%}"
        )

    def side(self, key):
        """The split of a document from a file that is cut in two, None for other documents."""
        name, _, rest = key.rpartition(" row ")
        return rest.rpartition(" of ")[2] if name in self.cuts else None

    def __iter__(self):
        before = 0  # bytes of the files already read
        for path, size in zip(self.paths, self.sizes, strict=True):
            reader = self.readers.get(kind_of(path, self.readers), read_text)
            name = self.name(path)
            row = 0
            position = 0
            try:
                parts = halves(path, size, self.val_fraction) if name in self.cuts else [("", {})]
                for part, bounds in parts:
                    for row, text, position in reader(path, self.column, self.kind, **bounds):
                        self.bytes_read = before + position
                        found = [self.raise_or_yield(text)]
                        text = None  # as in the readers
                        yield f"{name} row {row}{part}", found.pop()
            except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
                raise UserError(
                    f"{printable(path)} row {row + 1}: could not be read ({describe(error)}); fix or remove the file"
                ) from None
            before += size
        self.bytes_read = before


def bytes_in_val(name, size, split_of):
    """How many bytes of an uncut text file a hash of its documents' keys gives to validation."""
    starts = range(0, size, TEXT_PIECE)
    rows = [(f"{name} row {row}", min(TEXT_PIECE, size - start)) for row, start in enumerate(starts, 1)]
    return sum(length for key, length in rows if split_of(key) == "val")


# -- finding files -------------------------------------------------------------------------------


def find_files(pattern, passed_over, readers):
    """The files, a list of Path, that one value of --input names.

    passed_over: a Counter by suffix, to which a folder's files of other kinds are added. Raises UserError if there is
    no file, or a folder cannot be read."""
    shown = printable(pattern)
    if "\0" in pattern:
        raise UserError(f"--input: {shown}: a path holds no NUL byte; name files, folders or globs")
    if os.path.isdir(pattern):
        return files_in_folder(pattern, passed_over, readers)
    # a file may really be called "a[1].txt"
    matches = [pattern] if os.path.lexists(pattern) else sorted(expand(pattern))
    found = [Path(path) for path in matches if os.path.isfile(path)]
    for path in matches:
        if not os.path.isfile(path) and not os.path.isdir(path):
            if not glob.has_magic(pattern) or path == pattern:
                raise UserError(f"--input: {printable(path)} is {type_of_path(path)}, expected a file, folder or glob")
            passed_over[type_of_path(path)] += 1
    if not found:
        missing = ""
        if not os.path.isdir(os.path.dirname(pattern) or "."):
            missing = f" (nearest existing folder: {printable(os.path.abspath(nearest(pattern)))})"
        raise UserError(
            f"--input: {shown} matches no file{missing}; name files, folders of {', '.join(readers)}, or globs"
        )
    return found


def files_in_folder(folder, passed_over, readers):
    """The files of known kinds below a folder. Links to folders are not followed: they may lead in circles."""
    found = []
    others = collections.Counter()

    def cannot_read(error):
        raise UserError(
            f"--input: {printable(error.filename)}: {error.strerror}; make it readable, or name only what is"
        )

    for parent, folders, names in os.walk(folder, onerror=cannot_read):
        others["links to folders"] += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        for name in names:
            path = Path(parent, name)
            if not os.path.isfile(path):
                others[type_of_path(path)] += 1
            elif kind_of(path, readers):
                found.append(path)
            else:
                suffix = path.suffix.lower()
                if not 1 < len(suffix) < 12 or not suffix.isprintable():
                    suffix = "without suffix"
                others[suffix] += 1
    if not found:
        raise UserError(
            f"--input: {printable(folder)} matches no file of a known kind ({', '.join(readers)}); {left_out(+others)}"
        )
    passed_over.update(others)
    return found


def expand(pattern):
    """The paths that a glob matches, as glob.glob(recursive=True), but links in a circle are followed only once."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    start = "".join(part + os.sep for part in parts[:place])
    rest = os.sep.join(parts[place + 1 :])
    roots = glob.glob(start) if glob.has_magic(start) else [start]
    found = set()
    for root in roots:
        for folder in folders_below(root):
            found.update(expand(os.path.join(glob.escape(folder), rest or "*")))
    return found


def folders_below(root, above=()):
    """A folder and all folders below it, without hidden ones. Links are followed unless they lead to a folder above."""
    with contextlib.suppress(OSError):  # as in glob: a folder that cannot be read matches nothing
        status = os.stat(root or ".")
        identity = status.st_dev, status.st_ino
        if identity in above:
            return
        yield root
        with os.scandir(root or ".") as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        for name in names:
            yield from folders_below(os.path.join(root, name), (*above, identity))


def type_of_path(path):
    """Words for a path that is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "a broken link" if os.path.islink(path) else "not there"
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "no file")


def by_count(counts):
    """ ".md 8, .py 4", the most frequent first."""
    ranked = counts.most_common()
    parts = [f"{kind} {count:,}" for kind, count in ranked[:8]]
    if rest := sum(count for _, count in ranked[8:]):
        parts.append(f"others {rest:,}")
    return ", ".join(parts)


def left_out(counts):
    """ "passed over 12 (.md 8, .py 4): name them with ..."."""
    if not counts:
        return "passed over none"
    return f"passed over {sum(counts.values()):,} ({by_count(counts)}): name them with a glob to read them as text"


def summary(paths, sizes, passed_over, readers):
    """ "read 3 .txt files, passed over 12 (.md 8, .py 4): ..."."""
    kinds = collections.Counter(kind_of(path, readers) or path.suffix.lower() or "without suffix" for path in paths)
    if len(kinds) == 1:
        read = plural(len(paths), f"{next(iter(kinds))} file")
    else:
        read = f"{plural(len(paths), 'file')} ({by_count(kinds)})"
    if empty := sizes.count(0):
        read += f", {empty:,} of them empty"
    # printed before reading, so that a user sees early what is passed over; hence the past tense
    return f"read {read}, {left_out(+passed_over)}"


# -- reading files -------------------------------------------------------------------------------


def kind_of(path, readers=None):
    """The suffix in readers, by default READERS, by which a file is read, or None."""
    name = path.name.lower()
    return next((suffix for suffix in readers or READERS if name.endswith(suffix)), None)


def compression(path):
    """The compression that a suffix says, by pyarrow's name for it, or None."""
    return {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())


class Part(io.RawIOBase):
    """The bytes [start, end) of an open file, as a file."""

    def __init__(self, file, start, end):
        self.file = file
        self.left = end - start  # bytes
        file.seek(start)

    def readable(self):
        return True

    def readinto(self, buffer):
        content = self.file.read(min(len(buffer), self.left))
        buffer[: len(content)] = content
        self.left -= len(content)
        return len(content)


@contextlib.contextmanager
def opened(path, start=0, end=None):
    """Open a file for reading: (stream of its decompressed bytes, the file itself, whose tell() is the progress)."""
    with open(path, "rb") as file:
        if kind := compression(path):
            import pyarrow

            raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), kind)
        elif end is not None:
            raw = Part(file, start, end)
        else:
            raw = None
        stream = io.BufferedReader(raw, 1 << 20) if raw else file
        yield stream, file


def read_jsonl(path, column, kind):
    """Yield (row from 1, text or BadDocument, bytes of the file read so far)."""
    with opened(path) as (rows, file):
        row = 0
        for line in rows:  # not by enumerate, which would keep the line while its text is used
            row += 1
            if line.isspace():
                continue
            try:
                content = parse_json(line)
                line = None  # two copies of a large document are enough
                text = content if kind is dict else content[column]
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers too long, nested too deeply
                text = BadDocument(f"{path} row {row}", f"could not be read ({describe(error)})")
            except (KeyError, TypeError, IndexError):  # no such column, or no object
                text = without_column(f"{path} row {row}", content, column, kind)
            else:
                if not isinstance(text, kind):
                    text = checked_value(f"{path} row {row}", text, column, kind)
            found = [text]
            content = text = None  # so that a large text is freed by whoever takes it
            yield row, found.pop(), file.tell()


def parse_json(line):
    """A line of JSON, bytes, as Python's json reads it, several times as fast. Raises ValueError or RecursionError."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # or it is one that Python's takes: NaN, half a surrogate pair, a byte order mark
        return json.loads(line)


def read_json(path, column, kind):
    """As `read_jsonl`, of a file that is one list of rows, which is in memory as a whole. Another is read line by line:
    many files of JSON lines have this suffix."""
    with opened(path) as (content, file):
        if content.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"[":
            yield from read_jsonl(path, column, kind)
            return
        rows = parse_json(content.read())
        size = file.tell()
    for row, found in enumerate(rows, 1):
        if not isinstance(found, dict):
            found = checked_value(f"{path} row {row}", found, column, kind)
        yield row, found, size * row // len(rows)


def without_column(where, content, column, kind):
    """The BadDocument for a row of JSON that is no object, or has no such column."""
    if isinstance(content, dict):
        return checked_value(where, None, column, kind, content)
    found = type(content).__name__
    return BadDocument(where, f"no text: found {found}, expected an object with {column!r}", SET_COLUMN)


def read_parquet(path, column, kind):
    """As `read_jsonl`. The bytes read are estimated from the rows."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if kind is not dict and column not in file.schema_arrow.names:
            raise missing_column(path, column, file.schema_arrow.names)
        row = 0
        rows = file.metadata.num_rows
        size = path.stat().st_size
        for batch in file.iter_batches(batch_size=256, columns=None if kind is dict else [column]):
            values = batch.to_struct_array() if kind is dict else batch.column(0)
            batch = None
            try:
                texts = values.to_pylist()
            except ValueError:  # one of them is not UTF-8
                texts = list(map(value_or_error, values))
            values = None
            texts.reverse()
            while texts:
                row += 1
                text = texts.pop()
                if isinstance(text, ValueError):
                    text = BadDocument(f"{path} row {row}", f"could not be read ({describe(text)})")
                elif not isinstance(text, kind):
                    text = checked_value(f"{path} row {row}", text, column, kind)
                elif kind is dict:
                    text = {name: without_nulls(value) for name, value in text.items()}
                found = [text]
                text = None
                yield row, found.pop(), size * row // rows


def value_or_error(scalar):
    """A pyarrow scalar's value, or the ValueError that getting it raises."""
    try:
        return scalar.as_py()
    except ValueError as error:
        return error


def read_text(path, column, kind, start=0, end=None):
    """As `read_jsonl`: one document, or several, cut at line ends, if the file has more than TEXT_PIECE characters.
    start, end: read only these bytes [start, end)."""
    with opened(path, start, end) as (content, file), io.TextIOWrapper(content, encoding="utf-8", newline="") as text:
        row = 0
        if kind_of(path) is None and b"\0" in content.peek(1 << 13)[: 1 << 13]:
            yield 1, BadDocument(path, "is no text (it holds NUL bytes), expected UTF-8 text"), file.tell()
            return
        try:
            while piece := text.read(TEXT_PIECE):
                if len(piece) == TEXT_PIECE:
                    piece += text.readline(TEXT_PIECE)
                row += 1
                yield row, checked_value(f"{path} row {row}", piece, column, kind), file.tell()
        except UnicodeDecodeError as error:
            reason = f"could not be read ({describe(error)})"
            yield row + 1, BadDocument(f"{path} row {row + 1}", reason, "convert it to UTF-8"), file.tell()


def halves(path, size, val_fraction):
    """The two parts of a text file that is cut: [(suffix of the key, arguments of `read_text`)].

    The cut is at the first end of a paragraph after 1 - val_fraction of the bytes, else of a line, a word, or a
    character. size: bytes of the file."""
    target = min(size - 1, int(size * (1 - val_fraction)))
    with open(path, "rb") as file:
        file.seek(target)
        window = file.read(min(BOUNDARY, max(256, (size - target) // 4)))
    cut = size
    for end in (b"\n\n", b"\n\r\n", b"\n", b" "):
        place = window.find(end)
        if place >= 0 and target + place + len(end) < size:
            cut = target + place + len(end)
            break
    else:
        starts = (place for place, byte in enumerate(window) if byte & 0xC0 != 0x80)  # first bytes of UTF-8 characters
        cut = target + next(starts, 0)
    return [(" of train", {"start": 0, "end": cut}), (" of val", {"start": cut, "end": size})]


READERS = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".txt.gz": read_text,
    ".txt.zst": read_text,
}
