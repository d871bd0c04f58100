"""How every command starts and ends: its streams, Ctrl-C, and its exit code.

A command calls `begin` before the imports that take seconds, so that it handles a Ctrl-C as early as possible. This
file therefore imports little of the standard library and nothing else. `run_command` runs the command's main.
"""

import atexit
import contextlib
import errno
import gc
import os
import select
import signal
import sys
import threading
import time

from minzero.errors import SharedError, UserError, explain, explain_os_error, one_line

# Exit codes; the first two are those that a shell reports for the signals.
BROKEN_PIPE = 141
INTERRUPTED = 130
REFUSED = 2


# -- streams -------------------------------------------------------------------------------------


def set_up_streams():
    """Let standard output and error take any text, whatever the terminal's encoding. A closed one is opened on
    /dev/null; otherwise the next file that is opened would get its number."""
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
    """Whether the reader of a stream has gone: `| head -1` has read enough, or the terminal was closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file of the operating system
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def silence(stream):
    """Redirect a stream to /dev/null, so that the interpreter's own flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def flush_output():
    """Flush standard output. Raises UserError if that fails, unless its reader has gone."""
    try:
        sys.stdout.flush()
    except OSError as error:
        gone = has_no_reader(sys.stdout)
        silence(sys.stdout)
        if not gone:
            raise UserError(f"standard output: {explain_os_error(error)}") from None


def say(line):
    """Print a line to standard error; a closed standard error is ignored."""
    with contextlib.suppress(OSError, ValueError):
        name = "python" if sys.argv[0] == "-c" else os.path.basename(sys.argv[0])
        print(f"{name}: {one_line(line)}", file=sys.stderr, flush=True)


def is_first_rank():
    """Whether this process is rank 0, or the only one: it prints for all, before the process group is there."""
    return (os.environ.get("RANK") or "0") == "0"


# -- Ctrl-C --------------------------------------------------------------------------------------

own_process = None  # id of the process that called `begin`; its forks print nothing about a Ctrl-C
heard_at = None  # time.monotonic() of the first Ctrl-C


def leave(*_):
    """A handler of SIGINT: print one line and end at once, without Python's own clean-up."""
    if is_first_rank() and own_process in (None, os.getpid()):
        say("stopped by Ctrl-C")
    os._exit(INTERRUPTED)


def interrupt(*_):
    """A handler of SIGINT: the first raises KeyboardInterrupt, so that a command can clean up; the second ends it at
    once. Two within half a second, as `timeout` sends them, count as one."""
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
    """Install a handler of SIGINT and return the previous one.

    A handler that is neither ours nor Python's is left alone: a process in the background ignores Ctrl-C. Outside the
    main thread nothing is installed."""
    global heard_at
    heard_at = None
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.default_int_handler, leave):
        restore_interrupts(handler)
    return before


def restore_interrupts(handler):
    """Install the handler of SIGINT that `handle_interrupts` returned."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, handler)


def watch_interrupts():
    """End this process when no handler has run five seconds after a Ctrl-C. Python calls a handler only between its
    own instructions, and the main thread may be in a library's code for minutes, as when it trains a tokenizer."""
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


# -- start and end -------------------------------------------------------------------------------


def begin():
    """The first call of a command, before the imports that take seconds. From here on neither a Ctrl-C nor an error
    that a user can cause shows a traceback."""
    global own_process
    gc.disable()  # it would look through what is imported again and again, a fifth of the time; see run_command
    own_process = os.getpid()
    handle_interrupts(leave)
    set_up_streams()
    watch_interrupts()
    sys.excepthook = end_imports
    sys.unraisablehook = end_destructor


def end_imports(kind, error, traceback):
    """sys.excepthook: errors outside `run_command`, as in the imports."""
    line, code = ending(error)
    if code is None:
        sys.__excepthook__(kind, error, traceback)
        return
    if line:
        say(line)
    os._exit(code)


def end_destructor(unraisable):
    """sys.unraisablehook: ends the command on a Ctrl-C in a destructor or callback, which Python would only report."""
    if unraisable.exc_type is KeyboardInterrupt:
        leave()
    sys.__unraisablehook__(unraisable)


def ending(error):
    """The line to print (or None) and the exit code for an exception that ends a command. (None, None) for SystemExit
    and for a fault in the program, whose traceback a developer needs."""
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


def refuse_several_tasks():
    """Raise SharedError if a launcher started this process as one of several. For commands that share no work: all
    processes would do the same and write the same files."""
    from minzero.launchers import find_ranks  # here, to keep the start of a command short

    try:
        found = find_ranks(dict(os.environ), may_be_alone=True)
    except UserError:  # variables that only a command of several ranks needs
        return
    if found["WORLD_SIZE"] != "1":
        os.environ["RANK"] = found["RANK"]  # so that only one of them prints it
        tasks, remedy = found["WORLD_SIZE"], "start it without srun, mpirun, torchrun or deepspeed"
        raise SharedError(f"found {tasks} tasks, expected one process; {remedy}")


def run_command(function, arguments=None, may_be_many=False, is_last=True):
    """Run a command's main and end the process: code 2 and one line on stderr for an error that a user can cause, code
    130 and one line for Ctrl-C, code 141 and no line where the reader of a pipe has gone. A fault in the program shows
    its traceback.

    function: called with the list of arguments, `sys.argv[1:]` by default. may_be_many: the command may run as several
    ranks; others refuse to. is_last: the process ends after it; otherwise only a fault or SystemExit ends it."""
    set_up_streams()
    handler = handle_interrupts(interrupt)
    try:
        try:
            if not may_be_many:
                refuse_several_tasks()
            if is_last and not gc.isenabled():  # by `begin`
                gc.freeze()  # what is imported stays
                gc.enable()
            function(sys.argv[1:] if arguments is None else arguments)
        except SystemExit:
            flush_output()
            raise
        flush_output()
        if may_be_many and is_last:
            end_rank(0)
    except BaseException as error:
        line, code = ending(error)
        if code is None:
            raise
        report_fault(error, line, code)
        if may_be_many:
            end_rank(code)
        raise SystemExit(code) from None
    finally:
        restore_interrupts(handler)


def end_rank(code):
    """End this process, if it is one of several ranks, without the interpreter's own clean-up: that aborts now and then
    (`terminate called without an active exception`) because of the threads in which torch talks with other ranks.

    What was registered with `atexit` still runs after a success; after a fault it could wait for a rank that is gone.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    with contextlib.suppress(UserError):
        flush_output()
    if code == 0:
        atexit._run_exitfuncs()
    os._exit(code)


def report_fault(error, line, code):
    """Print the line of a fault, if this rank is the one to print it.

    Usually all ranks find the same fault and one line is enough. So the other ranks first wait: when rank 0 has printed
    its line and left, the launcher ends them. A rank that is still there after that is alone with its fault, and prints
    it."""
    rank = os.environ.get("RANK", "")  # the command may have set it
    rank = int(rank) if rank.isdecimal() else 0
    shared = isinstance(error, SharedError)
    prints = rank == error.said_by if shared else rank == 0 or code == REFUSED
    waits = code == REFUSED and rank != 0 and not (shared and prints)
    if waits:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2 if shared else 10)
    if line and prints:
        say(f"rank {rank}: {line}" if rank else line)
