"""A run's folder: held by one run at a time, with a status that everyone can read.

    out/<run>/lock          locked by every rank of the run that holds the folder; its text names the holder
    out/<run>/status.json   state, step, reason, host, process, since, and where the run's seconds went (goodput.py)

The lock is the operating system's (flock): it is released when the last process of the run ends, however it ends, and
it holds across machines wherever the file system supports that (NFS 4, Lustre mounted with flock, GPFS, CephFS). The
status is for people and tools; no code decides by it. A run with status `running` whose lock is free was killed.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil

from minzero.errors import SharedError, UserError
from minzero.files import make_folder, write_atomically

PATIENCE = 5.0  # seconds that the last ranks of a run that was killed may need to notice it
STATUS_SECONDS = 2.0  # the shortest time between two updates of the step in status.json
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # file systems that cannot lock


def lock_within(file, seconds):
    """Lock a file for this process alone. Raises BlockingIOError if another process holds it all that time, and OSError
    if its file system has no locks."""
    began = time.monotonic()
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - began > seconds:
                raise
            time.sleep(0.1)


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class RunFolder:
    """The folder of a run. Use it as a context: at the end of the block the lock is released, and a block that ends by
    an error leaves the status `failed`. Only rank 0 writes the lock's text and the status."""

    def __init__(self, path, rank):
        self.path = Path(path)
        self.rank = rank
        self.lock = None  # the open file, as long as this run holds the folder
        self.is_ours = False  # to write into: a run that is refused leaves the folder as it is
        self.holder = {"host": socket.gethostname(), "process": os.getpid(), "since": now()}
        self.status = {"state": None, "step": None, "reason": None}
        self.written_at = -STATUS_SECONDS
        self.more = dict  # gives what else status.json says
        self.damaged_copies = []  # names of copies at train.copy_to that were passed over, see restore.py

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and self.is_ours:
            with contextlib.suppress(Exception):  # the error itself matters more
                self.report("failed", reason=" ".join(str(error).split()) or kind.__name__)
        try:
            self.explain(error)
        finally:
            self.release()

    def explain(self, error):
        """Raise a UserError in place of an error about a file in this folder, if it came because the whole folder was
        deleted or renamed. Any write of a run may be the first to notice that."""
        in_folder = isinstance(error, OSError) or (isinstance(error, UserError) and str(self.path) in str(error))
        if not self.lock or not in_folder:
            return
        try:
            self.check_is_there()
        except UserError as gone:
            if isinstance(error, SharedError):
                gone = SharedError(str(gone), error.said_by)
            raise gone from None

    def hold(self, new=True):
        """Lock the folder for this run. Rank 0 calls this first, the other ranks after it has returned there: they
        share the lock, so that it stays as long as any of them lives.

        new: make the folder if it is not there, and write this run's name into the lock. Otherwise write nothing, and
        only lock a folder that is there already, so that no other run starts in it.

        Returns a warning where the file system has no locks, else None. Raises UserError if another run holds the
        folder, or if it cannot be written."""
        if new:
            make_folder("train.out_dir", self.path)
        path = self.path / "lock"
        warning = None
        if not self.lock and (new or path.exists()):
            warning = self.open_and_lock(path)
        if new and self.rank == 0:
            self.is_ours = True
            self.lock.seek(0)
            self.lock.truncate()
            self.lock.write(json.dumps(self.holder))
            self.lock.flush()
        return warning

    def open_and_lock(self, path):
        """Open the lock file and lock it. Returns and raises as `hold`."""
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+")
        except OSError as error:
            raise UserError(f"train.out_dir: {path}: {error.strerror}; choose a folder that can be written") from None
        try:
            if self.rank == 0:
                lock_within(file, PATIENCE)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = describe_holder(file.read(1000))
            file.close()
            raise UserError(
                f"train.out_dir: {self.path} is held by another run{holder}; wait for its end, stop it with "
                f"`touch {self.path}/STOP`, or choose another --train.out_dir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise UserError(f"train.out_dir: {path}: {error.strerror}; choose another folder") from None
            self.lock = file
            return f"{self.path}: its file system has no locks ({error.strerror}); let no second run write into it"
        self.lock = file
        return None

    def report(self, state, step=None, reason=None):
        """Write status.json: running, complete, stopped or failed, at which step and why. `running` is written at
        most every STATUS_SECONDS. Raises UserError if the folder is gone or cannot be written."""
        if not self.is_ours:
            return
        self.check_is_there()
        is_new = state != self.status["state"] or time.monotonic() - self.written_at > STATUS_SECONDS
        self.status = {"state": state, "step": self.status["step"] if step is None else step, "reason": reason}
        if not is_new:
            return
        content = self.status | self.holder | {"written": now()} | self.more()
        write_atomically(self.path / "status.json", (json.dumps(content, indent=2) + "\n").encode())
        self.written_at = time.monotonic()

    def check_is_there(self):
        """Raise UserError if the folder that this run holds was deleted or renamed. Otherwise the next save would make
        it again, with half a run in it, while another run could use the name."""
        try:
            same = os.path.samestat(os.stat(self.path / "lock"), os.fstat(self.lock.fileno()))
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"train.out_dir: {self.path} is gone: it was deleted or renamed during the run; if it was renamed, "
                "resume with its new name as --train.out_dir"
            )

    def release(self):
        """Let another run have the folder."""
        if self.lock:
            self.lock.close()
        self.lock = None
        self.is_ours = False


def holder_of(folder):
    """The process that holds a run's folder, in words; None if none does, or the folder's file system has no locks. The
    lock is taken for a moment to find out, for which a run that starts just then waits."""
    try:
        file = os.fdopen(os.open(Path(folder) / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), "r+")
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return describe_holder(file.read(1000)).strip(" ()") or "a process that has not written its name"
        except OSError:
            return None
    return None


def read_status(folder):
    """status.json of a run's folder as a dictionary; empty where it is missing or damaged."""
    try:
        status = json.loads((Path(folder) / "status.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def describe_holder(holder):
    """The text of a lock file in words. Empty where the text is empty, damaged, or of a run that has ended: a run that
    has just begun has not written it yet."""
    try:
        found = json.loads(holder)
        if found["host"] == socket.gethostname() and not psutil.pid_exists(found["process"]):
            return ""
        return f" (process {found['process']} on {found['host']}, since {found['since']})"
    except (ValueError, KeyError, TypeError, OverflowError):
        return ""
