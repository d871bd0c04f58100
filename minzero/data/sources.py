"""Where documents come from: local files, or a data set of the Hugging Face hub.

A source is an iterable of (key, text) pairs (see documents.py). It also has `fraction`, how much of it has been read,
and `description`, by which a later call sees that the source is still the same.
"""

import os
import sysconfig
import urllib.request
from pathlib import Path

from minzero.data.documents import BadDocument, Source, checked_value, missing_column, without_nulls
from minzero.data.local_files import Files
from minzero.errors import UserError, describe


def open_source(args, name, config=None, kind=str, **load_arguments):
    """The local files of --input, or without it data set `name` of the Hugging Face hub, with the same columns.

    args: the flags (see pipeline.options). config: of the data set, as the hub calls it. kind: the type of the
    column's values, str or list; dict for whole rows. load_arguments: further ones of datasets.load_dataset. Raises
    UserError if the source cannot be opened."""
    if args.input:
        return Files(args.input, args.column, kind)
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging

        print(f"opening {name} on the Hugging Face hub")
        logging.set_verbosity_error()  # else each of five attempts on a lost network prints a line
        dataset = load_dataset(name, config, split="train", streaming=args.streaming, **load_arguments)
    except Exception as error:  # the hub's libraries raise a dozen types, which are one fault to the user
        raise UserError(
            f"{name}: could not be loaded from the Hugging Face hub ({describe(error)}); without a network, give a "
            "local copy: --input 'folder/*.parquet' (or .jsonl, .jsonl.gz, .jsonl.zst)"
        ) from None
    return Hub(dataset, args.column, " ".join(filter(None, (name, config))), kind)


def one_text(args, address):
    """The whole text of the --input files, or without them of the file at this URL. Raises UserError."""
    if args.input:
        files = Files(args.input, args.column)
        print(files.summary)
        try:
            return "".join(text for _, text in files)
        except BadDocument as error:  # the only document cannot be left out
            raise UserError(f"{error.where}: {error.reason}; {error.remedy}") from None
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            return response.read().decode()
    except (OSError, ValueError) as error:  # a ValueError: not UTF-8
        raise UserError(f"{address}: could not be downloaded ({describe(error)}); give a copy: --input FILE") from None


def text_in_two(args, address):
    """`one_text` as two documents: the first 1 - val_fraction of its characters for training, the rest for
    validation. The keys are the names of the splits. Raises UserError."""
    text = one_text(args, address)
    cut = int(len(text) * (1 - args.val_fraction))
    return [("train", text[:cut]), ("val", text[cut:])]


class StandardLibrary:
    """The source files of Python's standard library, in the order of their paths; the key is the path in CPython's
    repository. folders: where it is; default: that of the running Python. Tests and installed packages are left out.
    Iterating raises UserError if a folder or file cannot be read."""

    LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

    def __init__(self, folders=None):
        self.folders = [Path(folder) for folder in folders or [sysconfig.get_path("stdlib")]]

    def __iter__(self):
        for library in self.folders:
            if not os.path.isdir(library):
                raise UserError(f"--input: {library} is no folder, expected one that holds Python's standard library")
            for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
                name = path.relative_to(library)
                if not self.LEFT_OUT.isdisjoint(name.parts):
                    continue
                try:
                    yield f"cpython/Lib/{name.as_posix()}", path.read_text(encoding="utf-8")
                except OSError as error:
                    raise UserError(f"{path}: could not be read ({error.strerror}); remove it") from None
                except UnicodeDecodeError:
                    continue  # a few files exist to test other encodings


class Hub(Source):
    """The documents of a datasets.Dataset or IterableDataset (streaming)."""

    def __init__(self, dataset, column="text", description="dataset", kind=str):
        self.dataset = dataset
        self.column = column
        self.description = description
        self.kind = kind
        self.rows = len(dataset) if hasattr(dataset, "__len__") else None
        self.row = 0  # read so far

    @property
    def fraction(self):
        return self.row / self.rows if self.rows else None

    def __iter__(self):
        return self.skip(0)

    def skip(self, documents):
        """Iterate over the documents after the first `documents`."""
        self.row = documents
        dataset = self.dataset
        of_a_column = self.kind is not dict
        if of_a_column and dataset.column_names and self.column not in dataset.column_names:
            raise missing_column(self.description, self.column, dataset.column_names)
        if self.rows is not None:
            dataset = dataset.select(range(documents, self.rows))
        elif documents:
            dataset = dataset.skip(documents)
        try:
            # in batches: reading row by row costs more than the tokenizer
            dataset = dataset.select_columns(self.column) if of_a_column else dataset
            for batch in dataset.iter(batch_size=256):
                for text in batch[self.column] if of_a_column else rows_of(batch):
                    self.row += 1
                    text = checked_value(f"{self.description} row {self.row}", text, self.column, self.kind)
                    yield f"row {self.row}", self.raise_or_yield(text)
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # a lost connection, a damaged cache file
            raise UserError(
                f"{self.description}: row {self.row + 1} could not be read ({describe(error)}); run the same command "
                "again, it continues after the last finished shard"
            ) from None


def rows_of(batch):
    """{column: values} as rows, {column: value}."""
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, map(without_nulls, values), strict=True))
