"""Where documents come from: local files, or a data set of the Hugging Face hub.

A source yields (key, text) pairs in a fixed order. The key says where a document is from, for the
split and for error messages. Beside that a source knows `fraction`, how much of itself it has given,
and `description`, by which a later call sees that the source is still the same.

A document that cannot be used is a BadDocument: raised, or, where `yield_bad` is set, yielded in place
of its text, so that the caller can leave it out and read the next.
"""

import collections
import contextlib
import glob
import io
import json
import os
import stat
import urllib.request
from pathlib import Path

from minzero.errors import UserError

TEXT_PIECE = 1 << 24  # characters of a text file that make one document; more would not fit bounded memory
BOUNDARY = 1 << 16  # bytes in which a paragraph's end is looked for where a file is cut


class BadDocument(UserError):
    """One document that cannot be read or tokenized. where: names it; reason: what was found and expected."""

    def __init__(self, where, reason, remedy="fix or remove it"):
        where = printable(where)
        super().__init__(where, reason, remedy)  # what pickle gives back to it
        self.where, self.reason, self.remedy = where, reason, remedy

    def __str__(self):
        return f"{self.where}: {self.reason}; {self.remedy}, or leave such documents out: --on_bad_document skip"


def open_source(args, name, config=None, kind=str, **how):
    """The local files of --input, or else data set `name` of the Hugging Face hub, whose columns are the same. kind: of
    the column's values, str or list. how: further arguments of datasets.load_dataset. Raises UserError if it cannot
    be had."""
    if args.input:
        return Files(args.input, args.column, kind)
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging

        print(f"opening {name} on the Hugging Face hub")
        logging.set_verbosity_error()  # of a lost network one line is enough, not one for each of five attempts
        dataset = load_dataset(name, config, split="train", streaming=args.streaming, **how)
    except Exception as error:  # the hub's libraries raise a dozen kinds, and for the user they are one
        raise UserError(
            f"{name}: could not be loaded from the Hugging Face hub ({one_line(error)}); without a network, give a "
            "local copy: --input 'folder/*.parquet' (or .jsonl, .jsonl.gz, .jsonl.zst)"
        ) from None
    return Hub(dataset, args.column, " ".join(filter(None, (name, config))), kind)


def one_text(args, address):
    """The whole text of the --input files, or else of the file at `address`. Raises UserError."""
    if args.input:
        files = Files(args.input, args.column)
        print(files.summary)
        try:
            return "".join(text for _, text in files)
        except BadDocument as error:  # there is but one document, which cannot be left out
            raise UserError(f"{error.where}: {error.reason}; {error.remedy}") from None
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read().decode()
    except (OSError, ValueError) as error:  # a ValueError: not UTF-8
        raise UserError(f"{address}: could not be downloaded ({one_line(error)}); give a copy: --input FILE") from None


def printable(path):
    """A path as it is shown: escaped where it holds a line end or bytes that are not UTF-8."""
    return str(path) if str(path).isprintable() else ascii(str(path))[1:-1]


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Source:
    """What all sources have. yield_bad: yield a BadDocument instead of raising it."""

    yield_bad = False

    def usable(self, text):
        """A text, or a BadDocument if such are yielded. Raises it if not."""
        if isinstance(text, BadDocument) and not self.yield_bad:
            raise text
        return text


class Hub(Source):
    """The documents of a datasets.Dataset or IterableDataset (streaming)."""

    def __init__(self, dataset, column="text", description="dataset", kind=str):
        self.dataset, self.column, self.description, self.kind = dataset, column, description, kind
        self.rows = len(dataset) if hasattr(dataset, "__len__") else None
        self.row = 0

    @property
    def fraction(self):
        return self.row / self.rows if self.rows else None

    def __iter__(self):
        return self.skip(0)

    def skip(self, documents):
        """Iterate from the document after the first `documents` on."""
        self.row = documents
        dataset = self.dataset
        if dataset.column_names and self.column not in dataset.column_names:
            raise no_columns(self.description, self.column, dataset.column_names)
        if self.rows is not None:
            dataset = dataset.select(range(documents, self.rows))
        elif documents:
            dataset = dataset.skip(documents)
        try:
            # whole columns at a time: row by row costs more than the tokenizer
            for batch in dataset.select_columns(self.column).iter(batch_size=256):
                for text in batch[self.column]:
                    self.row += 1
                    text = of_kind(f"{self.description} row {self.row}", text, self.column, self.kind)
                    yield f"row {self.row}", self.usable(text)
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # a lost connection, a damaged file of the cache
            raise UserError(
                f"{self.description}: row {self.row + 1} could not be read ({one_line(error)}); run the same command "
                "again, it continues after the last finished shard"
            ) from None


def of_kind(where, value, column, kind, columns=None):
    """The value of a row's column, or the BadDocument that it is if it is not of this kind, str or list. columns: the
    names that the row has, where it has not this one."""
    if isinstance(value, kind):
        return value
    missing, expected = ("text", "a string") if kind is str else ("conversation", "a list of messages")
    found = "nothing" if value is None else type(value).__name__
    has = ""
    if columns is not None:
        names = ", ".join(json.dumps(name)[1:-1] for name in list(columns)[:20])  # escaped: it must be one line
        has = f" (the row has {names[:300]})" if names else " (the row is empty)"
    return BadDocument(where, f"no {missing}: found {found}, expected {expected} under {column!r}{has}", SET_COLUMN)


SET_COLUMN = "fix it or set --column"


def no_columns(where, column, found):
    return UserError(
        f"{printable(where)}: no column {column!r}: found {', '.join(found)}; say with --column which holds the text"
    )


class Files(Source):
    """The documents of local files: each row of .jsonl and .parquet, each .txt file; .jsonl and .txt also as .gz and
    .zst. The case of a suffix does not matter. A folder gives its files of these kinds; a file or a glob that is named
    is read as text if it is of no such kind.

    patterns: files, folders and globs. kind: of the column's values, str or list. `summary`: what was found and passed
    over, in a line. Raises UserError if nothing matches."""

    def __init__(self, patterns, column="text", kind=str):
        self.column, self.kind, self.cuts = column, kind, frozenset()
        found, passed_over = [], collections.Counter()
        for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
            found += found_by(os.fspath(pattern), passed_over)
        # one that is named twice, as a.txt and x/../a.txt, is read once
        self.paths = sorted({os.path.abspath(path): path for path in sorted(found, reverse=True)}.values())
        self.root = os.path.commonpath([path.parent for path in self.paths])
        try:
            self.sizes = [path.stat().st_size for path in self.paths]
        except OSError as error:
            raise UserError(f"--input: {printable(error.filename)}: {error.strerror}; remove it or try again") from None
        self.bytes_read = 0
        self.description = f"{len(self.paths)} files, {sum(self.sizes)} bytes, column {column}"
        self.summary = summary(self.paths, self.sizes, passed_over)

    @property
    def fraction(self):
        return self.bytes_read / max(1, sum(self.sizes))

    def name(self, path):
        return os.path.relpath(path, self.root)

    def cut_large(self, val_fraction, split_of):
        """Where a hash of their names would give validation less than half or more than twice `val_fraction` of the
        bytes, have the largest text files cut in two at the end of a paragraph: training gets the beginning and
        validation the rest, val_fraction of each. As few files are cut as put it right. split_of: key -> "train" or
        "val". Returns a line that says so, or None if none is cut; decided by names and sizes alone."""
        if self.kind is not str or not sum(self.sizes) or not 0 < val_fraction < 1:
            return None
        by_hash = val_fraction * sum(self.sizes)
        texts = []
        for path, size in zip(self.paths, self.sizes, strict=True):
            if kind_of(path) not in (".txt", None) or compression(path) or not size:
                continue
            pieces = enumerate(range(0, size, TEXT_PIECE), 1)
            keys = ((f"{self.name(path)} row {row}", min(TEXT_PIECE, size - start)) for row, start in pieces)
            in_val = sum(length for key, length in keys if split_of(key) == "val")
            texts.append((size, self.name(path), in_val))
            by_hash += in_val - val_fraction * size
        cuts = set()
        share = by_hash
        total = sum(self.sizes)
        for size, name, in_val in sorted(texts, key=lambda file: (-file[0], file[1])):
            if not is_far(share / total, val_fraction):
                break
            cuts.add(name)
            share += val_fraction * size - in_val
        self.cuts, self.val_fraction = frozenset(cuts), val_fraction
        if not cuts:
            return None
        return (
            f"{plural(len(cuts), 'file')} cut in two: training gets the beginning of each and validation the last "
            f"{val_fraction:.3g} of it; a hash of the names would give validation {max(0, by_hash / total):.2%} of "
            f"the text, and --val_fraction asks for {val_fraction:.2%}"
        )

    def side(self, key):
        """The split of a document from a file that is cut, else None."""
        name, _, rest = key.rpartition(" row ")
        return rest.rpartition(" of ")[2] if name in self.cuts else None

    def __iter__(self):
        before = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            reader = READERS.get(kind_of(path), read_text)
            name = self.name(path)
            row = 0
            position = 0
            try:
                parts = halves(path, size, self.val_fraction) if name in self.cuts else [("", {})]
                for part, bounds in parts:
                    for row, text, position in reader(path, self.column, self.kind, **bounds):
                        self.bytes_read = before + position
                        yield f"{name} row {row}{part}", self.usable(text)
            except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
                raise UserError(
                    f"{printable(path)} row {row + 1}: could not be read ({one_line(error)}); fix or remove the file"
                ) from None
            before += size
        self.bytes_read = before


def is_far(share, wanted):
    """Whether a split has less than half or more than twice of what it, or the other split, was to have."""
    return not (wanted / 2 <= share <= wanted * 2 and (1 - wanted) / 2 <= 1 - share <= (1 - wanted) * 2)


# -- finding files -------------------------------------------------------------------------------


def found_by(pattern, passed_over):
    """The files, a list of Path, that one --input names. What a folder holds of other kinds is counted by suffix in
    `passed_over`. Raises UserError if there is none, or a folder cannot be read."""
    shown = printable(pattern)
    if "\0" in pattern:
        raise UserError(f"--input: {shown}: a path holds no NUL byte; name files, folders or globs")
    if os.path.isdir(pattern):
        return in_folder(pattern, passed_over)
    # a name like "a[1].txt" may be meant as it stands
    matches = [pattern] if os.path.lexists(pattern) else sorted(expand(pattern))
    found = [Path(path) for path in matches if os.path.isfile(path)]
    for path in matches:
        if not os.path.isfile(path) and not os.path.isdir(path):
            if not glob.has_magic(pattern) or path == pattern:
                raise UserError(f"--input: {printable(path)} is {what_is(path)}, expected a file, folder or glob")
            passed_over[what_is(path)] += 1
    if not found:
        raise UserError(f"--input: {shown} matches no file; name files, folders of {', '.join(READERS)}, or globs")
    return found


def in_folder(folder, passed_over):
    """The files of known kinds below a folder. Links to folders are not followed: they may lead in circles."""
    found, others = [], collections.Counter()

    def cannot_read(error):
        raise UserError(
            f"--input: {printable(error.filename)}: {error.strerror}; make it readable, or name only what is"
        )

    for place, folders, names in os.walk(folder, onerror=cannot_read):
        others["links to folders"] += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        for name in names:
            path = Path(place, name)
            if not os.path.isfile(path):
                others[what_is(path)] += 1
            elif kind_of(path):
                found.append(path)
            else:
                suffix = path.suffix.lower()
                others[suffix if 1 < len(suffix) < 12 and suffix.isprintable() else "without suffix"] += 1
    if not found:
        raise UserError(
            f"--input: {printable(folder)} matches no file of a known kind ({', '.join(READERS)}); {left_out(+others)}"
        )
    passed_over.update(others)
    return found


def expand(pattern):
    """What a glob matches, as glob.glob(recursive=True), but through links that lead in circles only once."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    start, rest = "".join(part + os.sep for part in parts[:place]), os.sep.join(parts[place + 1 :])
    found = set()
    for root in glob.glob(start) if glob.has_magic(start) else [start]:
        for folder in folders_below(root):
            found.update(expand(os.path.join(glob.escape(folder), rest or "*")))
    return found


def folders_below(root, above=()):
    """A folder and all below it, but hidden ones. Links are followed unless they lead back to a folder above."""
    with contextlib.suppress(OSError):  # as glob does: what cannot be read matches nothing
        status = os.stat(root or ".")
        place = status.st_dev, status.st_ino
        if place in above:
            return
        yield root
        with os.scandir(root or ".") as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        for name in names:
            yield from folders_below(os.path.join(root, name), (*above, place))


def what_is(path):
    """Words for a path that is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "a broken link" if os.path.islink(path) else "not there"
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "no file")


def plural(count, word):
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def by_count(counts):
    """ ".md 8, .py 4", the most frequent first."""
    several = counts.most_common()
    named = [f"{kind} {count:,}" for kind, count in several[:8]]
    rest = sum(count for _, count in several[8:])
    return ", ".join(named + ([f"others {rest:,}"] if rest else []))


def left_out(counts):
    if not counts:
        return "passed over none"
    return f"passed over {sum(counts.values()):,} ({by_count(counts)}): name them with a glob to read them as text"


def summary(paths, sizes, passed_over):
    """ "read 3 .txt files, passed over 12 (.md 8, .py 4): ..."."""
    kinds = collections.Counter(kind_of(path) or path.suffix.lower() or "without suffix" for path in paths)
    if len(kinds) == 1:
        read = plural(len(paths), f"{next(iter(kinds))} file")
    else:
        read = f"{plural(len(paths), 'file')} ({by_count(kinds)})"
    empty = sizes.count(0)
    # printed before the reading, for what is passed over should be known early
    return f"read {read}{f', {empty:,} of them empty' if empty else ''}, {left_out(+passed_over)}"


# -- reading files -------------------------------------------------------------------------------


def kind_of(path):
    """The suffix in READERS by which a file is read, or None."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def compression(path):
    return {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())


class Part(io.RawIOBase):
    """The bytes [start, end) of an open file."""

    def __init__(self, file, start, end):
        self.file, self.left = file, end - start
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
    """(a stream of the file's bytes, decompressed; the file itself, whose tell() says how far it was read)."""
    with open(path, "rb") as file:
        if kind := compression(path):
            import pyarrow

            raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), kind)
        elif end is not None:
            raw = Part(file, start, end)
        else:
            raw = None
        yield io.BufferedReader(raw, 1 << 20) if raw else file, file


def read_jsonl(path, column, kind):
    """Yield (row from 1, text or BadDocument, bytes of the file read)."""
    with opened(path) as (rows, file):
        for row, line in enumerate(rows, 1):
            if not line.strip():
                continue
            where = f"{path} row {row}"
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers too long, nested too deeply
                yield row, BadDocument(where, f"could not be read ({one_line(error)})"), file.tell()
                continue
            if isinstance(content, dict):
                columns = None if column in content else content
                text = of_kind(where, content.get(column), column, kind, columns)
            else:
                what = type(content).__name__
                text = BadDocument(where, f"no text: found {what}, expected an object with {column!r}", SET_COLUMN)
            yield row, text, file.tell()


def read_parquet(path, column, kind):
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise no_columns(path, column, file.schema_arrow.names)
        row, rows, size = 0, file.metadata.num_rows, path.stat().st_size
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            values = batch.column(0)
            try:
                texts = values.to_pylist()
            except ValueError:  # one of them is no UTF-8
                texts = map(value_or_error, values)
            for text in texts:
                row += 1
                where = f"{path} row {row}"
                if isinstance(text, ValueError):
                    text = BadDocument(where, f"could not be read ({one_line(text)})")
                else:
                    text = of_kind(where, text, column, kind)
                yield row, text, size * row // rows


def value_or_error(scalar):
    try:
        return scalar.as_py()
    except ValueError as error:
        return error


def read_text(path, column, kind, start=0, end=None):
    """One document; a file above TEXT_PIECE characters is cut at line ends into several. With `end`, of the bytes
    [start, end) alone."""
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
                yield row, of_kind(f"{path} row {row}", piece, column, kind), file.tell()
        except UnicodeDecodeError as error:
            reason = f"could not be read ({one_line(error)})"
            yield row + 1, BadDocument(f"{path} row {row + 1}", reason, "convert it to UTF-8"), file.tell()


def halves(path, size, val_fraction):
    """The two parts of a text file: [(words for the key, bounds for `read_text`)]. Cut at the first end of a paragraph,
    else of a line, else of a word, else of a character, from 1 - val_fraction of its bytes on."""
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
        starts = (place for place, byte in enumerate(window) if byte & 0xC0 != 0x80)  # of UTF-8 characters
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
