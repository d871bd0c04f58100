"""The file system of a run's folder: every node must see the same folder, and a checkpoint must fit into it."""

import os
import shutil
import time
from pathlib import Path

from minzero.errors import UserError
from minzero.files import nearest

PATIENCE = 10.0  # seconds that another node's file may need to become visible
GIB = 2**30


def check_is_shared(path, text, host):
    """Raise UserError unless this path leads to the folder that rank 0 holds on another machine. path: train.out_dir;
    text: of rank 0's lock file in it; host: rank 0's machine.

    Makes what rank 0 must have made, which has to fail: a network file system answers that from its server, while it
    may answer from a cache, for a minute, that a name is not there (nfs(5), acdirmax)."""
    path = Path(path).absolute()
    try:
        shared = not make_missing(path) and lock_holds(path / "lock", text)
    except OSError as error:
        raise UserError(f"train.out_dir: {error.filename}: {error.strerror}; give all nodes the right to it") from None
    if not shared:
        raise UserError(
            f"train.out_dir: {path} is not the folder that rank 0 sees on {host}, so no checkpoint would be whole; "
            "choose one on a file system that all nodes share"
        )


def make_missing(path):
    """Try to make a folder that should be there, and remove it again. Returns whether it was not there. Raises
    OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    made = []
    for folder in reversed(missing):
        try:
            folder.mkdir()
            made.append(folder)
        except FileExistsError:
            continue
    for folder in reversed(made):
        folder.rmdir()
    return bool(made)


def lock_holds(lock, text):
    """Whether the lock file is there already and has this text. Raises OSError."""
    try:
        os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        lock.unlink()
        return False
    except FileExistsError:
        pass
    began = time.monotonic()
    while lock.read_text(errors="replace") != text:
        if time.monotonic() - began > PATIENCE:
            return False
        time.sleep(0.2)
    return True


def check_space(path, size, keeps, saved):
    """Check that the file system of a run's folder has room for checkpoints. size: bytes of one. keeps: the most
    checkpoints that the run has at a time, the one that it writes included; saved: how many of them are there.

    Returns a warning where there is room for one and not for all, else None. Raises UserError where there is room for
    none: the first save would end the run."""
    path = Path(path)
    usage = shutil.disk_usage(path if path.is_dir() else nearest(path))
    if not usage.total:  # a file system that does not say
        return None
    if usage.free < size:
        raise UserError(
            f"train.out_dir: {path}: {usage.free / GIB:,.2f} GiB are free, and a checkpoint takes {size / GIB:,.2f} "
            "GiB; make room on that disk, or choose another folder"
        )
    room = saved + usage.free // size
    if room >= keeps:
        return None
    return (
        f"warning: {path} has room for {room} checkpoints of {size / GIB:,.2f} GiB ({usage.free / GIB:,.2f} GiB free), "
        f"and this run keeps up to {keeps}; make room, or keep fewer (train.keep_checkpoints, train.keep_every)"
    )
