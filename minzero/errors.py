"""Errors that a user or the machine can cause, and the one line that says each of them.

Imports little of the standard library and nothing else, because `commands.begin` must be there as early as possible.
"""

import contextlib
import errno
import io
import os
import sys

LONGEST = 2000  # characters of an error line: a number or a name in it may be of any length

# Remedies for errors of the operating system.
REMEDIES = {
    errno.EACCES: "allow it to this user, or choose another path",
    errno.EPERM: "allow it to this user, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOSPC: "make room on that disk, or choose another path",
    errno.EDQUOT: "make room within that quota, or choose another path",
    errno.EFBIG: "choose a file system or a limit (ulimit -f) that takes larger files",
    errno.ENOENT: "expected it to be there; was it removed or renamed while this ran?",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "expected a file",
    errno.ENOTDIR: "expected a folder",
    errno.EEXIST: "expected nothing there, or a folder; choose another path",
    errno.ENOTEMPTY: "expected an empty folder; choose another path",
    errno.ELOOP: "its symbolic links lead in a circle; correct them",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "end other programs that hold files open",
    errno.ENOMEM: "end other programs, or take a machine with more memory",
    errno.EAGAIN: "raise the limit on processes (ulimit -u), or end other programs",
}
# torch raises these as plain RuntimeError, ValueError or TypeError, so only their text tells them apart.
OUT_OF_MEMORY = r"out of memory|can't allocate memory|not enough memory|[Uu]nable to allocate|cannot allocate memory"
TOO_LARGE = r"Storage size calculation overflowed|multiplication overflow|Overflow when unpacking long|too large to"
TOO_LARGE += r"|Maximum allowed dimension exceeded|array is too big|Exceeds the limit \(\d+ digits\)"


class UserError(Exception):
    """Bad input. The message is the whole line the user sees: where, what was found, what was
    expected, and the remedy. Commands print it and exit with code 2, without a traceback."""


class SharedError(UserError):
    """A UserError that several ranks end with. Only the rank `said_by` prints it; the others end silently."""

    def __init__(self, message, said_by=0):
        super().__init__(message)
        self.said_by = said_by


def one_line(text):
    """Text as one line that any terminal can show: control characters are escaped, and the middle of a very long text
    is left out."""
    text = str(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 3 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def describe(error):
    """An exception's class and message in one line of limited length: for messages of other libraries, which may have
    several lines."""
    return one_line(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


@contextlib.contextmanager
def panics_as_exceptions():
    """Turn a panic of a library in Rust, which is no Exception, into a RuntimeError in this block."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(describe(error)) from None


def explain(error):
    """The error line for an exception that a user or the machine can cause. None for a fault in the program."""
    if isinstance(error, UserError):
        return str(error)
    import re  # here, to keep the start of a command short

    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, text)):
        size = re.search(r"allocate ([\d.]+ ?\w+)", text)
        return (
            f"out of memory{f': tried to allocate {size[1]}' if size else ''}; lower train.micro_batch_size, "
            "--batch_size or the sizes of the model (python plan.py shows what fits), or end other programs"
        )
    if isinstance(error, OSError):
        return explain_os_error(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{ascii(error.object)[:200]}: found a character that {error.encoding} cannot write; remove it"
    if isinstance(error, UnicodeDecodeError):
        nearby = error.object[max(0, error.start - 20) : error.start + 20]
        return f"{nearby}: found bytes that are not {error.encoding} text, expected {error.encoding} text"
    if isinstance(error, ValueError) and re.search("embedded null (byte|character)", text):
        return "a path or name: found a NUL character in it; remove it"
    if isinstance(error, RecursionError):
        return f"input nested too deeply ({text}); expected a few levels"
    if isinstance(error, OverflowError) or (
        isinstance(error, RuntimeError | ValueError | TypeError) and re.search(TOO_LARGE, text)
    ):
        return f"a number or size is too large ({text}); choose a smaller one"
    if isinstance(error, ModuleNotFoundError) and not (error.name and is_ours(error.name)):
        missing = f"{error.name}: no such package" if error.name else one_line(error)
        return f"{missing} in {sys.executable}; install the requirements (make setup) and call .venv/bin/python"
    return None


def is_ours(module):
    """Whether a module of this name belongs to this repository."""
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), module.partition(".")[0])
    return os.path.isdir(path) or os.path.exists(f"{path}.py")


def explain_os_error(error):
    """The error line for an OSError: an answer of the operating system, or of the network."""
    if error.errno is None or error.strerror is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    path = error.filename if error.filename is not None else file_written(error.__traceback__)
    path = os.fsdecode(path) if isinstance(path, bytes) else path
    remedy = REMEDIES.get(error.errno, "fix that and run the same command again")
    return f"{'a file or standard output' if path is None else path}: {error.strerror}; {remedy}"


def file_written(traceback):
    """The name of the file that the innermost function of a traceback had open, or None. An error in writing, unlike
    one in opening, does not name its file."""
    name = None
    while traceback:
        for value in traceback.tb_frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(getattr(value, "name", None), str):
                name = value.name
        traceback = traceback.tb_next
    return {"<stdout>": "standard output", "<stderr>": "standard error"}.get(name, name)
