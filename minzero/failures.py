"""The failures of a supervised run: what a start's log says about them, and a line about each."""

import errno
import os
import re
from datetime import datetime

# train.py refuses with one line and code 2; these are of the machine, and may pass.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)
MAY_PASS = (
    *map(os.strerror, PASSING),
    "are free, and a checkpoint takes",
    "could not meet",
    "is held by another run",
    "lost contact",
)
TIMES = (("began", "%Y-%m-%d %H:%M:%S"), ("ended", "%H:%M:%S"))
NODE_ENDED = re.compile(r"^pdsh@\S+: \S+: ssh exited with exit code")
REFUSAL = re.compile(r"\btrain\.py: (?:rank \d+: )?error: ")


def in_words(failure):
    """A failure as one line: which start, when, how far, where, and the last thing that it said."""
    times = [datetime.fromtimestamp(failure[key]).strftime(form) for key, form in TIMES]
    nodes = f", {', '.join(failure['nodes'])}" if failure["nodes"] else ""
    code = "" if failure["code"] is None else f", code {failure['code']}"
    saved = f"saved step {failure['step']}" if failure["step"] >= 0 else "nothing saved"
    further = "" if failure["further"] else " as before"
    return f"start {failure['attempt']}, {times[0]} to {times[1]}, {saved}{further}{code}{nodes}: {failure['line']}"


def telling_line(lines):
    """The line of a log that says best why a start failed; None if it is empty."""
    lines = [line.strip() for line in lines if line.strip()]
    for words in ("train.py: ", "stopped by ", "Error", "error:", "exits with return code"):
        if found := [line for line in lines if words in line]:
            return found[-1]
    return lines[-1] if lines else None
