"""Copies of a run's checkpoints at any address that fsspec knows: s3://bucket/run, gs://bucket/run, a second folder.

    ADDRESS/run_id                                     of the run whose copies these are
    ADDRESS/config.json, metrics.jsonl, wandb_id, reference.safetensors
                                                       as they were when the newest checkpoint was copied
    ADDRESS/checkpoints/step_00001000/rank_00000.safetensors, ...
    ADDRESS/checkpoints/step_00001000/state.json       written last

Object stores cannot rename. So state.json is the mark: it is written when every other file is there in its size, and
deleted before any of them is replaced. It has a checksum of itself, and the sizes and checksums of the files: a part of
it, or a mixture of two checkpoints, is never taken for a copy.

Imports nothing that takes a second: the process that copies has this file alone.
"""

import contextlib
import json
import os
from pathlib import Path

from minzero.errors import UserError, describe
from minzero.files import read_json

CHECKPOINTS = "checkpoints"
STATE = "state.json"
RUN_ID = "run_id"
REFERENCE = "reference.safetensors"  # of preference tuning, see reference.py
# of the run's folder; those that are there
SMALL_FILES = (RUN_ID, "config.json", "metrics.jsonl", "wandb_id", REFERENCE)
TRANSFERS = 4  # files at the same time, each of which s3fs cuts into parts of 50 MB, 10 at the same time
MAKE_BUCKETS = {"s3", "s3a", "gs", "gcs"}  # where making a folder would make a bucket, perhaps of a misspelt name


def flush(path):
    """Flush a file to the disk, whoever has written it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Store:
    """The copies at an address. Every method raises UserError where the store does not answer or refuses.

    address: as fsspec takes it; key: the key or flag that names it, for errors. Raises UserError for an address that
    names no file system, or needs a package that is not installed."""

    def __init__(self, address, key="train.copy_to"):
        from fsspec.core import url_to_fs  # here, because a run without copies does not need it

        self.key = key
        self.address = address.rstrip("/")
        try:
            self.fs, self.root = url_to_fs(self.address)
        except ImportError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{key}: {address}: needs a package that is not installed ({reason})") from None
        except Exception as error:  # of many classes, by file system
            raise UserError(
                f"{key}: {address}: {describe(error)}; expected a folder, or an address as s3://bucket/run"
            ) from None
        protocol = self.fs.protocol
        self.protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.is_local = "file" in self.protocols

    @contextlib.contextmanager
    def asked(self, name=""):
        """A context for calls of fsspec's, which raise errors of many classes, by store: raises UserError instead."""
        try:
            yield
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:
            where = f"{self.address}/{name}" if name else self.address
            raise UserError(f"{self.key}: {where}: {describe(error)}") from None

    def path(self, *parts):
        return "/".join([self.root, *parts])

    # -- small files ---------------------------------------------------------------------------------

    def read(self, *parts):
        """The bytes of a file, or None if it is not there."""
        with self.asked("/".join(parts)):
            try:
                return self.fs.cat_file(self.path(*parts))
            except FileNotFoundError:
                return None

    def read_ranges(self, path, ranges):
        """The bytes of some ranges of a file of a copy, [(begin, end)], in that order. path: (the copy, the file)."""
        place = self.path(CHECKPOINTS, *path)
        with self.asked("/".join((CHECKPOINTS, *path))):
            try:
                begins, ends = map(list, zip(*ranges, strict=True))
                found = self.fs.cat_ranges([place] * len(ranges), begins, ends, on_error="raise")
            except FileNotFoundError:
                raise UserError(f"found no {path[-1]}") from None
        for (begin, end), content in zip(ranges, found, strict=True):
            if len(content) != end - begin:
                raise UserError(f"{path[-1]}: found {len(content)} bytes from {begin} on, expected {end - begin}")
        return found

    def write(self, content, *parts):
        """Write bytes as a file."""
        with self.writing(*parts):
            self.make_folder(*parts[:-1])
            self.fs.pipe_file(self.path(*parts), content)
            if self.is_local:
                flush(self.path(*parts))

    @contextlib.contextmanager
    def writing(self, *parts):
        """As `asked`, where a file or folder that is missing, such as a bucket, is an error too."""
        try:
            with self.asked("/".join(parts)):
                yield
        except FileNotFoundError as error:
            raise UserError(f"{self.key}: {self.address}: {describe(error)}") from None

    def make_folder(self, *parts):
        if not self.protocols & MAKE_BUCKETS:
            self.fs.makedirs(self.path(*parts), exist_ok=True)

    # -- checkpoints ---------------------------------------------------------------------------------

    def names(self):
        """The names of all copies, whole or not."""
        with self.asked(CHECKPOINTS):
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.path(CHECKPOINTS), detail=False)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def states(self):
        """{name: content of state.json} of the copies that have one which is JSON of an object. Not checked further."""
        found = {}
        paths = {self.path(CHECKPOINTS, name, STATE): name for name in self.names()}
        with self.asked(CHECKPOINTS):
            places = list(paths)  # not by `cat`, which takes [ and ? in them for a pattern
            contents = self.fs.cat_ranges(places, None, None, on_error="return") if paths else []
        for path, content in zip(paths, contents, strict=True):
            if isinstance(content, FileNotFoundError | NotADirectoryError):
                continue  # never finished, or not a copy
            with self.asked(CHECKPOINTS):
                if isinstance(content, Exception):
                    raise content
            with contextlib.suppress(ValueError, RecursionError):
                state = json.loads(content)
                if isinstance(state, dict):
                    found[paths[path]] = state
        return found

    def copy(self, checkpoint):
        """Copy a committed checkpoint of out/<run>/checkpoints, and the run's small files. Returns the checksum that
        its state.json has of itself. Raises UserError; the copy is then not there."""
        checkpoint = Path(checkpoint)
        name = checkpoint.name
        state = read_json(checkpoint / STATE)
        content = (checkpoint / STATE).read_bytes()
        with self.writing(CHECKPOINTS, name):
            self.make_folder(CHECKPOINTS, name)
            if self.read(CHECKPOINTS, name, STATE) is not None:
                self.fs.rm_file(self.path(CHECKPOINTS, name, STATE))
            files = sorted(state["files"])
            self.put([checkpoint / file for file in files], [self.path(CHECKPOINTS, name, file) for file in files])
            self.check_sizes(name, {file: entry["bytes"] for file, entry in state["files"].items()})
        run = checkpoint.parents[1]
        for file in SMALL_FILES:
            if (run / file).is_file():
                self.write((run / file).read_bytes(), file)
        if (checkpoint / STATE).read_bytes() != content:
            raise UserError(f"{checkpoint} was replaced while it was copied")
        self.write(content, CHECKPOINTS, name, STATE)
        return state["crc32"]

    def put(self, files, paths):
        if getattr(self.fs, "async_impl", False):
            self.fs.put(list(map(str, files)), paths, batch_size=TRANSFERS)
            return
        for file, path in zip(files, paths, strict=True):
            self.fs.put_file(str(file), path)
            if self.is_local:
                flush(path)

    def check_sizes(self, name, expected):
        """Raises UserError unless the store has these files of a checkpoint in these sizes, {name: bytes}."""
        self.fs.invalidate_cache()
        entries = self.fs.ls(self.path(CHECKPOINTS, name), detail=True)
        found = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries}
        for file, size in expected.items():
            if found.get(file) != size:
                where = f"{self.address}/{CHECKPOINTS}/{name}/{file}"
                raise UserError(f"{self.key}: {where}: found {found.get(file)} bytes, expected {size}")

    def has_files(self, name, state):
        """Whether all files that a copy's state.json names are there in their sizes."""
        try:
            with self.asked(f"{CHECKPOINTS}/{name}"):
                self.check_sizes(name, {file: entry["bytes"] for file, entry in state["files"].items()})
        except (UserError, FileNotFoundError, KeyError, TypeError, AttributeError):  # also of a state.json that is none
            return False
        return True

    def fetch(self, name, files, folder):
        """Fetch these files of a copy into a folder, onto its disk. Returns None, or what is missing."""
        for file in files:
            with self.asked(f"{CHECKPOINTS}/{name}/{file}"):
                try:
                    self.fs.get_file(self.path(CHECKPOINTS, name, file), str(Path(folder) / file))
                    flush(Path(folder) / file)
                except FileNotFoundError:
                    return f"found no {file}"
        return None
