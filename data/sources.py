"""Where documents come from: local files, or a data set of the Hugging Face hub.

A source yields (key, text) pairs in a fixed order. The key says where a document is from, for the
split and for error messages. Beside that a source knows `fraction`, how much of itself it has given,
and `description`, by which a later call sees that the source is still the same.
"""

import glob
import io
import json
import os
import urllib.request
from pathlib import Path

from config import UserError

TEXT_PIECE = 1 << 24  # characters of a text file that make one document; more would not fit bounded memory


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
    """The whole text of the --input files, or else of the file at `address`."""
    if args.input:
        return "".join(text for _, text in Files(args.input, args.column))
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read().decode()
    except OSError as error:
        raise UserError(f"{address}: could not be downloaded ({one_line(error)}); give a copy: --input FILE") from None


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Hub:
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
        """Iterate from the document behind the first `documents` on."""
        self.row, dataset = documents, self.dataset
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
                    if not isinstance(text, self.kind):
                        raise no_text(f"{self.description} row {self.row}", self.column, text, self.kind)
                    yield f"row {self.row}", text
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # a lost connection, a damaged file of the cache
            raise UserError(
                f"{self.description}: row {self.row + 1} could not be read ({one_line(error)}); run the same command "
                "again, it goes on behind the last finished shard"
            ) from None


def no_text(where, column, found, kind):
    found = "nothing" if found is None else type(found).__name__
    missing, expected = ("text", "a string") if kind is str else ("conversation", "a list of messages")
    return UserError(
        f"{where}: no {missing}: found {found}, expected {expected} under {column!r}; mend it or set --column"
    )


def no_columns(where, column, found):
    return UserError(f"{where}: no column {column!r}: found {', '.join(found)}; say with --column which holds the text")


class Files:
    """The documents of local files: each row of .jsonl, .jsonl.gz, .jsonl.zst and .parquet, each .txt file.

    patterns: files, folders and globs. kind: of the column's values, str or list. Raises UserError if nothing
    matches."""

    def __init__(self, patterns, column="text", kind=str):
        self.column, self.kind, paths = column, kind, set()
        for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
            if os.path.isdir(pattern):
                found = [p for p in Path(pattern).rglob("*") if p.name.endswith(tuple(READERS)) and p.is_file()]
            else:
                found = [Path(p) for p in glob.glob(str(pattern), recursive=True) if os.path.isfile(p)]
            if not found:
                raise UserError(f"--input: {pattern} matches no file; expected {', '.join(READERS)} files")
            paths.update(found)
        self.paths = sorted(paths)
        for path in self.paths:
            if not path.name.endswith(tuple(READERS)):
                raise UserError(f"--input: {path}: found another kind of file, expected {', '.join(READERS)}")
        self.root = os.path.commonpath([path.parent for path in self.paths])
        self.sizes = [path.stat().st_size for path in self.paths]
        self.bytes_read = 0
        self.description = f"{len(self.paths)} files, {sum(self.sizes)} bytes, column {column}"

    @property
    def fraction(self):
        return self.bytes_read / max(1, sum(self.sizes))

    def __iter__(self):
        before = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            reader = next(READERS[suffix] for suffix in READERS if path.name.endswith(suffix))
            name, row = os.path.relpath(path, self.root), 0
            try:
                for row, text, position in reader(path, self.column):
                    self.bytes_read = before + position
                    if not isinstance(text, self.kind):
                        raise no_text(f"{path} row {row}", self.column, text, self.kind)
                    yield f"{name} row {row}", text
            except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors or OSErrors
                raise UserError(
                    f"{path} row {row + 1}: could not be read ({one_line(error)}); mend or remove the file"
                ) from None
            before += size
        self.bytes_read = before


def read_jsonl(path, column):
    """Yield (row from 1, text, bytes of the file read)."""
    with open(path, "rb") as file:
        rows = file
        if path.suffix != ".jsonl":
            import pyarrow

            kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
            rows = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), kind), 1 << 20)
        for row, line in enumerate(rows, 1):
            if line.strip():
                content = json.loads(line)
                yield row, content.get(column) if isinstance(content, dict) else None, file.tell()


def read_parquet(path, column):
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise no_columns(path, column, file.schema_arrow.names)
        row, rows, size = 0, file.metadata.num_rows, path.stat().st_size
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield row, text, size * row // rows


def read_text(path, column):
    """One document; a file above TEXT_PIECE characters is cut at line ends into several."""
    with open(path, encoding="utf-8", newline="") as file:
        row = 0
        while text := file.read(TEXT_PIECE):
            if len(text) == TEXT_PIECE:
                text += file.readline(TEXT_PIECE)
            row += 1
            yield row, text, file.buffer.tell()


READERS = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
    ".txt": read_text,
}
