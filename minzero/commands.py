"""How every command begins and ends: its streams, Ctrl-C, and one line for what a user can cause.

A command calls `begin` before the imports that take seconds, and this file imports next to nothing, so that a Ctrl-C
meets `begin` as early as can be. `config.run_command` runs the rest of a command.
"""

import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
import time

BROKEN_PIPE, INTERRUPTED, REFUSED = 141, 130, 2  # exit codes; the first two as a shell has them for the signals
LONGEST = 2000  # characters of a line about a fault: a number or a name in it may be of any length

# What to do about an answer of the operating system.
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
# What torch says, in errors of no class of their own, of memory and of sizes beyond any memory.
OF_MEMORY = r"out of memory|can't allocate memory|not enough memory|[Uu]nable to allocate|cannot allocate memory"
OF_SIZE = r"Storage size calculation overflowed|multiplication overflow|Overflow when unpacking long|too large to"
OF_SIZE += r"|Maximum allowed dimension exceeded|array is too big|Exceeds the limit \(\d+ digits\)"


class UserError(Exception):
    """Bad input. The message is the whole line the user sees: where, what was found, what was
    expected, and the remedy. Commands print it and exit with code 2, without a traceback."""


def one_line(text):
    """Text as one line that a terminal shows as it is: control characters escaped, a very long middle left out."""
    text = str(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 3 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def explain(error):
    """What to say of an exception that a user, or the machine, can cause; None for a fault in the program."""
    if isinstance(error, UserError):
        return str(error)
    import re

    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(OF_MEMORY, text)):
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
        start = error.object[max(0, error.start - 20) : error.start + 20]
        return f"{start}: found bytes that are not {error.encoding} text, expected {error.encoding} text"
    if isinstance(error, ValueError) and re.search("embedded null (byte|character)", text):
        return "a path or name: found a NUL character in it; remove it"
    if isinstance(error, RecursionError):
        return f"input nested too deeply ({text}); expected a few levels"
    if isinstance(error, OverflowError) or (
        isinstance(error, RuntimeError | ValueError | TypeError) and re.search(OF_SIZE, text)
    ):
        return f"a number or size is too large ({text}); choose a smaller one"
    if isinstance(error, ModuleNotFoundError) and not is_ours(error.name):
        return (
            f"{error.name}: no such package in {sys.executable}; install the requirements (make setup) and call "
            ".venv/bin/python"
        )
    return None


def is_ours(module):
    """Whether a module of this name belongs to this repository."""
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), module.partition(".")[0])
    return os.path.isdir(path) or os.path.exists(f"{path}.py")


def explain_os_error(error):
    """What to say of what the operating system, or the network, answered."""
    if error.errno is None or error.strerror is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    path = error.filename if error.filename is not None else file_written(error.__traceback__)
    path = os.fsdecode(path) if isinstance(path, bytes) else path
    remedy = REMEDIES.get(error.errno, "fix that and run the same command again")
    return f"{'a file or standard output' if path is None else path}: {error.strerror}; {remedy}"


def file_written(traceback):
    """The name of the file that the innermost function of a traceback had open, or None: an error in writing, unlike
    one in opening, does not tell it."""
    found = None
    while traceback:
        for value in traceback.tb_frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(getattr(value, "name", None), str):
                found = value.name
        traceback = traceback.tb_next
    return {"<stdout>": "standard output", "<stderr>": "standard error"}.get(found, found)


# -- streams -------------------------------------------------------------------------------------


def set_up_streams():
    """Make standard output and error take any text, whatever the terminal's encoding. One that was closed goes
    nowhere: else the next file that is opened would take its place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def has_no_reader(stream):
    """Whether what a stream leads to has gone: `| head -1` that has read enough, a terminal that was closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file of the operating system
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def silence(stream):
    """Let a stream lead nowhere, so that the interpreter's own flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def flush_output():
    """Write out what was printed. Nobody there to read it is no fault; else raises UserError if it cannot be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        gone = has_no_reader(sys.stdout)
        silence(sys.stdout)
        if not gone:
            raise UserError(f"standard output: {explain_os_error(error)}") from None


def say(line):
    """Print a line to standard error, if there is anybody to read it."""
    with contextlib.suppress(OSError, ValueError):
        name = "python" if sys.argv[0] == "-c" else os.path.basename(sys.argv[0])
        print(f"{name}: {one_line(line)}", file=sys.stderr, flush=True)


# -- Ctrl-C --------------------------------------------------------------------------------------

own_process = None  # the process that `begin` was called in: what it forks does not speak for it
heard_at = None  # when the first Ctrl-C came


def leave(*_):
    """A handler of SIGINT: one line, and no more waiting, not even for Python's own clean-up."""
    if (os.environ.get("RANK") or "0") == "0" and own_process in (None, os.getpid()):
        say("stopped by Ctrl-C")
    os._exit(INTERRUPTED)


def interrupt(*_):
    """A handler of SIGINT: the first raises KeyboardInterrupt, which lets a command clean up, the second ends it at
    once. Programs such as `timeout` send two within a moment, which count as one."""
    global heard_at
    if own_process not in (None, os.getpid()):
        leave()
    now = time.monotonic()
    if heard_at is None:
        heard_at = now
        raise KeyboardInterrupt
    if now - heard_at > 0.5:
        leave()


def handle_interrupts(handler):
    """Let a Ctrl-C call this handler. Returns the handler before; leaves alone one that is neither ours nor Python's,
    as of a process in the background, which ignores Ctrl-C. Outside the main thread it does nothing."""
    global heard_at
    before, heard_at = signal.getsignal(signal.SIGINT), None
    if before in (signal.default_int_handler, leave):
        restore_interrupts(handler)
    return before


def restore_interrupts(handler):
    """Let a Ctrl-C call the handler that `handle_interrupts` returned."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, handler)


def watch_interrupts():
    """End this process when a Ctrl-C is not heard within five seconds: Python calls a handler only between its own
    instructions, and the main thread may be in a library's code for minutes, as in learning a tokenizer."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch():
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT and heard_at is None:
                time.sleep(5)
                if heard_at is None and signal.getsignal(signal.SIGINT) in (leave, interrupt):
                    leave()

    threading.Thread(target=watch, daemon=True).start()


# -- the beginning and the end -------------------------------------------------------------------


def begin():
    """The first thing a command does, before the imports that take seconds: from here on neither a Ctrl-C nor what a
    user can cause shows a traceback."""
    global own_process
    own_process = os.getpid()
    handle_interrupts(leave)
    set_up_streams()
    watch_interrupts()
    sys.excepthook = end_imports
    sys.unraisablehook = end_destructor


def end_imports(kind, error, traceback):
    """sys.excepthook: what `config.run_command` does not see."""
    line, code = ending(error)
    if code is None:
        sys.__excepthook__(kind, error, traceback)
        return
    if line:
        say(line)
    os._exit(code)


def end_destructor(unraisable):
    """sys.unraisablehook: a Ctrl-C that fell into a destructor or callback, which Python would only report."""
    if unraisable.exc_type is KeyboardInterrupt:
        leave()
    sys.__unraisablehook__(unraisable)


def ending(error):
    """How a command ends that this exception has left: (the line to say or None, the exit code). (None, None) for a
    fault in the program, whose traceback a developer needs, and for SystemExit."""
    if isinstance(error, KeyboardInterrupt) or (heard_at is not None and not isinstance(error, SystemExit)):
        return "stopped by Ctrl-C", INTERRUPTED
    if isinstance(error, SystemExit):
        return None, None
    if isinstance(error, OSError):
        gone = [stream for stream in (sys.stdout, sys.stderr) if has_no_reader(stream)]
        for stream in gone:
            silence(stream)
        if gone and error.errno in (errno.EPIPE, errno.EIO):
            return None, BROKEN_PIPE
    line = explain(error)
    try:
        flush_output()
    except UserError as of_output:
        line = str(of_output) if isinstance(error, OSError) else line
    return (None, None) if line is None else (f"error: {line}", REFUSED)
