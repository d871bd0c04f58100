"""The files that a preparation writes as it proceeds, each of which can be restored after a kill at any moment.

Each file's length is recorded in progress.json. A later call cuts the file back to that length, so whatever was
appended after the last record is forgotten and made again.
"""

import contextlib
import fcntl
import json
import os

from minzero.data.documents import Dropped
from minzero.data.shards import HEADER_BYTES, shard_header, shard_layout
from minzero.errors import UserError
from minzero.files import cannot_write, checksum, is_regular, make_folder, make_way

DROPPED = ("duplicates", "contaminated", "too_long")  # kinds of documents.Dropped


@contextlib.contextmanager
def locked(folder):
    """Make a folder, if it is not there, and hold it for one preparation at a time. The lock ends with the process,
    however that ends. A folder that was made here and is still empty is removed at the end. Raises UserError."""
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    if made:
        make_folder("--out", folder)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out: {folder}: {error.strerror}; choose a folder that can be read and written") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"--out: another process is preparing {folder}; wait for it, or choose another") from None
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # mostly it is not empty
            for path in made:
                path.rmdir()


class SplitWriter:
    """The shards of one split: finished ones, and the .tmp file that is to become the next."""

    def __init__(self, folder, name, dtype, progress):
        self.folder = folder
        self.name = name
        self.dtype = dtype
        self.shards = progress.get("shards", [])  # entries for meta.json
        self.waiting = progress.get("waiting", 0)  # tokens in the .tmp file
        self.documents = progress.get("documents", 0)
        self.bytes = progress.get("bytes", 0)  # of text
        self.cut = progress.get("cut", 0)  # documents

    @property
    def path(self):
        return self.folder / f"{self.name}_{len(self.shards):06d}.bin"

    @property
    def temporary(self):
        return self.path.with_suffix(".bin.tmp")

    @property
    def tokens(self):
        return sum(shard["tokens"] for shard in self.shards) + self.waiting

    def recover(self):
        """Restore the files to the state that progress.json records. Raises UserError if that cannot be done."""
        self.publish()
        for shard in self.shards:
            if shard_layout(self.folder / shard["file"])[2] != shard["tokens"]:
                raise UserError(f"{self.folder / shard['file']}: not the {shard['tokens']} tokens of progress.json")
        if self.waiting:
            size = HEADER_BYTES + self.waiting * self.dtype.itemsize
            if not is_regular(self.temporary) or self.temporary.stat().st_size < size:
                raise cut_short(self.temporary, size)
            os.truncate(self.temporary, size)  # what was appended after the last record is made again

    def add(self, tokens, documents, size, cut=0):
        """Append tokens (n,), which come from this many documents and bytes of text, to the .tmp file. cut: how many of
        the documents were cut."""
        new = not self.waiting
        try:
            with open(self.temporary, "wb" if new else "ab") as file:
                if new:
                    file.write(bytes(HEADER_BYTES))
                file.write(tokens)
        except OSError as error:
            raise cannot_write(self.temporary, error) from None
        self.waiting += len(tokens)
        self.documents += documents
        self.bytes += size
        self.cut += cut

    def flush(self, finish):
        """Flush the .tmp file to the disk. finish: as a whole shard. Returns the entry for progress.json."""
        if self.waiting:
            try:
                with open(self.temporary, "r+b") as file:
                    if finish:
                        file.write(shard_header(self.dtype, self.waiting))
                        file.flush()
                    os.fsync(file.fileno())
                if finish:
                    entry = {"file": self.path.name, "tokens": self.waiting, "sha256": checksum(self.temporary)}
                    self.shards = [*self.shards, entry]
                    self.waiting = 0
            except OSError as error:
                raise cannot_write(self.temporary, error) from None
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "cut": self.cut,
            "waiting": self.waiting,
            "shards": self.shards,
        }

    def publish(self):
        """Remove .tmp from the name of the last shard that progress.json records."""
        for shard in self.shards[-1:]:
            temporary = self.folder / (shard["file"] + ".tmp")
            if temporary.exists():
                try:
                    os.replace(temporary, self.folder / shard["file"])
                except OSError as error:
                    raise cannot_write(self.folder / shard["file"], error) from None


class SkippedLog:
    """skipped.jsonl: a line {"key", "reason"} for each document that was left out."""

    def __init__(self, folder, progress):
        self.path = folder / "skipped.jsonl"
        self.documents = progress.get("documents", 0)
        self.size = progress.get("bytes", 0)
        self.dropped = {kind: progress.get(kind, 0) for kind in DROPPED}  # among the documents

    @property
    def unusable(self):
        """Documents that could not be read or tokenized."""
        return self.documents - sum(self.dropped.values())

    def recover(self, known):
        """Restore the file to the state that progress.json records. known: whether there was a progress.json; without
        one, a file of this name may be somebody else's and is moved to another name. Raises UserError."""
        if not self.size:
            if not known or self.path.is_dir():
                make_way(self.path, for_a_folder=True)
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(self.path, error) from None
        elif not is_regular(self.path) or self.path.stat().st_size < self.size:
            raise cut_short(self.path, self.size)
        else:
            os.truncate(self.path, self.size)

    def add(self, left_out):
        """Append documents, [(key, BadDocument or Dropped)]."""
        lines = "".join(json.dumps({"key": key, "reason": why.reason}) + "\n" for key, why in left_out).encode()
        try:
            with open(self.path, "ab") as file:
                file.write(lines)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.documents += len(left_out)
        self.size += len(lines)
        for _, why in left_out:
            if isinstance(why, Dropped):
                self.dropped[why.kind] += 1

    def flush(self):
        """Flush the file to the disk. Returns the entry for progress.json."""
        if self.size:
            try:
                with open(self.path, "r+b") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise cannot_write(self.path, error) from None
        return {"documents": self.documents, "bytes": self.size} | self.dropped


def cut_short(path, size):
    """The UserError for a file that is missing or shorter than progress.json records."""
    return UserError(
        f"{path}: missing or cut, expected at least {size} bytes; remove progress.json from {path.parent} to start "
        "again"
    )
