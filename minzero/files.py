"""Files and folders, for all parts of the package: the repository's folder and commit, atomic writes, safe reads, and
checks of values read from JSON. Needs only the standard library."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import stat
import subprocess
from pathlib import Path

from minzero.errors import UserError, describe

ROOT = Path(__file__).resolve().parents[1]


def git_commit():
    """The commit of this copy of the code, with "-dirty" where files were changed, or None."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # a container without git
        return None


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


def check_can_write(flag, path, folder=False):
    """Raise UserError unless a file can be written at this path. Called before the work that makes its content; writes
    nothing itself.

    flag: the flag or key of the config that names the path. folder: the path is for a folder, which need not exist."""
    path = os.fspath(path)
    try:
        reason = obstacle(path, folder)
    except OSError as error:
        reason = error.strerror
    except UnicodeEncodeError:
        reason = "found a name that is not UTF-8"
    except ValueError:
        reason = "found a NUL byte in the name"
    if reason:
        name = path if path.isprintable() else ascii(path)
        name = f"{flag}: {name}" if folder else name
        raise UserError(f"{name}: could not be written ({reason}); choose another {flag}")


def obstacle(path, folder):
    """Why no file (or folder) can be written at a path, or None if it can. Raises OSError, and ValueError for a path
    that is not valid."""
    if folder:
        path.encode()  # libraries that write into a folder take only UTF-8
    place = os.path.abspath(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(place).st_mode)
    except FileNotFoundError:
        pass
    else:
        if is_folder != folder:
            return os.strerror(errno.ENOTDIR if folder else errno.EISDIR)
        if not os.access(place, os.W_OK):
            return os.strerror(errno.EACCES)
    above = place if folder else os.path.dirname(place)
    while folder and not os.path.lexists(above):
        above = os.path.dirname(above)
    where = "" if above == place or not folder else f": {above}"
    if not os.path.isdir(above):
        return os.strerror(errno.ENOTDIR if os.path.lexists(above) else errno.ENOENT) + where
    if not os.access(above, os.W_OK | os.X_OK):
        return os.strerror(errno.EACCES) + where
    return None


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


def refuse_pipe(path):
    """Raises UserError if the path is a pipe, socket or device: reading one may never end."""
    with contextlib.suppress(OSError, ValueError):  # a missing file or a bad path: the reader says it
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path}: found a pipe, socket or device, expected a plain file; put the file there")


def refuse_pipes(folder):
    """`refuse_pipe` of every file in a folder of transformers' that it and `tokenizers` may read: they would wait."""
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".jinja"):
            refuse_pipe(path)


def is_hub_name(name):
    """Whether a name can be a repository's on the Hugging Face hub: owner/name, or an old one's name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def from_hub(key, name, patterns):
    """The folder to which files of a repository on the Hugging Face hub were downloaded, now or earlier. key: the flag
    or config key that names it; patterns: of the files. Raises UserError."""
    from huggingface_hub import snapshot_download

    if not is_hub_name(name):
        raise UserError(
            f"{key}: {name}: no such folder here; expected a folder, or a name on the Hugging Face hub (owner/name)"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of many classes: no such name, no network, no permission, no space
        raise UserError(
            f"{key}: {name}: no such folder here, and not to be had from the Hugging Face hub ({describe(error)}); "
            "download it, and give its folder"
        ) from None


def read_json(path, regular=True):
    """The content of a JSON file.

    regular: refuse everything but a plain file; with False a pipe can be read as well. Raises UserError that names
    the file, and the line and column of a syntax error."""
    if regular:
        refuse_pipe(path)

    def without_repeats(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the key {json.dumps(twice)} stands twice in one object; remove one of them")
        return content

    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a readable JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a JSON file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected JSON of a few levels") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; expected JSON") from None
    except ValueError:  # a number of more digits than Python converts; a NUL in the path
        raise UserError(f"{path}: holds a number of thousands of digits, or is no path; expected JSON") from None


# -- values from JSON ----------------------------------------------------------------------------


def is_count(value):
    """Whether a JSON value is a whole number from 0 to 2^63 - 1. Booleans are not."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value, most=math.inf):
    """Whether a JSON value is a number from -most to most. NaN and booleans are not."""
    return type(value) in (int, float) and -most <= value <= most
