"""Files and folders, for all parts of the package: atomic writes, safe reads, and checks of values read from JSON."""

import hashlib
import itertools
import json
import math
import os
import stat
from pathlib import Path

from minzero.commands import UserError
from minzero.flags import check_can_write

# -- writing -------------------------------------------------------------------------------------


def write_atomically(path, *chunks):
    """Write bytes under a temporary name, flush them to the disk, rename. A crash leaves either the old file or the
    new one, never a part. Anything that is not a file under either name is moved away first (see `make_way`).
    Raises UserError if the disk is full or not writable."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    make_way(path)
    make_way(temporary, unless_plain=True)  # a pipe would block, and a link lead elsewhere
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_json(path, content):
    """`write_atomically` of an object as indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def make_way(path, unless_plain=False, for_a_folder=False):
    """Rename an obstacle at `path` to NAME.moved1 (2, ...), where a file is to be written that cannot replace it.

    An obstacle is a folder; with unless_plain also a link, pipe or device; with for_a_folder anything.
    Raises UserError if it cannot be renamed."""
    path = Path(path)
    try:
        mode = os.lstat(path).st_mode
        in_the_way = for_a_folder or stat.S_ISDIR(mode) or (unless_plain and not stat.S_ISREG(mode))
        if not in_the_way:
            return
        names = (path.with_name(f"{path.name}.moved{number}") for number in itertools.count(1))
        os.rename(path, next(name for name in names if not os.path.lexists(name)))
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(path, error) from None


def make_folder(key, path):
    """Make a folder unless it exists. key: the flag or config key that names it, for the error.
    Raises UserError if it cannot be made or written."""
    check_can_write(key, path, folder=True)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}; choose a folder that can be written") from None


def cannot_write(path, error):
    """The UserError for an OSError met while writing `path`."""
    return UserError(f"{path}: could not be written ({error.strerror}); fix that and run the same command again")


# -- reading -------------------------------------------------------------------------------------


def is_regular(path):
    """Whether a path leads to a regular file, which can be read from any offset: no pipe, device or folder."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path, links=True):
    """Open a regular file for reading and return its descriptor. links: whether a link to one is accepted.

    Never opens a device and never blocks on a pipe. Raises OSError that says what was found."""
    status = os.stat(path) if links else os.lstat(path)  # before opening, which some devices would notice
    if stat.S_ISREG(status.st_mode):
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(path, flags if links else flags | os.O_NOFOLLOW)
        if stat.S_ISREG(os.fstat(file).st_mode):  # it may have been replaced in between
            return file
        os.close(file)
    wrong = "folder, pipe or device" if links else "link, folder, pipe or device"
    raise OSError(0, f"found a {wrong}, not a regular file")


def checksum(path):
    """SHA-256 of a file in hexadecimal, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    chunk = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(memoryview(chunk)[:count])
    return digest.hexdigest()


def nearest(path):
    """The nearest existing folder on the way to `path`, for errors about a path that does not exist.

    For "data/text/gone" it is "data/text" if that folder exists, else "data", else "."."""
    folder = os.path.dirname(os.fspath(path)) or "."
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "."
    return folder


# -- values from JSON ----------------------------------------------------------------------------


def is_count(value):
    """Whether a JSON value is a whole number from 0 to 2^63 - 1. Booleans are not."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value, most=math.inf):
    """Whether a JSON value is a number from -most to most. NaN and booleans are not."""
    return type(value) in (int, float) and -most <= value <= most
