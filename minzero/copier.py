"""Copies committed checkpoints to train.copy_to while training continues.

A process of its own does the work (`python -m minzero.copier RUN ADDRESS`), started by rank 0: it takes no time from
the training process, and a store that hangs can be left behind. It reads lines from standard input: names of
checkpoints, `damaged NAME` of copies that are to be made again, and `end`; where its standard input ends without that,
rank 0 has died, and it ends at once. The newest checkpoint is copied first. What fails is said in one line, and tried
again after a pause that doubles each time.

    out/<run>/copied.json    {"address": ..., "copies": {name of a checkpoint: checksum of its state.json}}

A checkpoint that stands there is whole at the address, and may be deleted here.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from minzero.errors import UserError, explain, one_line
from minzero.files import ROOT, read_json, write_json
from minzero.store import CHECKPOINTS, RUN_ID, STATE, Store

RECORD = "copied.json"
PAUSES = 10.0, 600.0  # seconds: the first after a failure, and the longest
END = "end"
DAMAGED = "damaged "


def checksum_of(checkpoint):
    """The checksum that a checkpoint's state.json has of itself, which tells it from another one of the same step; None
    if there is none. Raises UserError."""
    return read_json(checkpoint / STATE).get("crc32") if (checkpoint / STATE).is_file() else None


# -- on rank 0 -------------------------------------------------------------------------------------


class Copier:
    """Rank 0's handle of the process that copies.

    run: out/<run>; address: train.copy_to; names: of the checkpoints that are there already; damaged: of copies that
    were found so."""

    def __init__(self, run, address, names=(), damaged=()):
        self.run = Path(run)
        self.address = address
        with contextlib.suppress(OSError):  # of an earlier start: the store may have been emptied since
            (self.run / RECORD).unlink()
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minzero.copier", str(self.run.resolve()), address],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a Ctrl-C at the terminal is for the ranks
        )
        for name in damaged:
            self.add(DAMAGED + name)
        for name in names:
            self.add(name)

    def add(self, name):
        """A checkpoint has been committed."""
        with contextlib.suppress(OSError, ValueError):  # a copier that has died must not cost the run
            self.process.stdin.write(f"{name}\n".encode())
            self.process.stdin.flush()

    def is_copied(self, checkpoint):
        """Whether the copy of a checkpoint is whole."""
        try:
            record = read_json(self.run / RECORD)
            return record["copies"].get(checkpoint.name) == checksum_of(checkpoint) is not None
        except (UserError, KeyError, AttributeError, TypeError):
            return False

    def finish(self, seconds, progress=lambda: None):
        """Wait at most so many seconds for the copies that are not whole yet, then end. progress: called meanwhile.
        Yields the lines to print."""
        self.add(END)
        began = time.monotonic()
        is_said = False
        while self.process.poll() is None and (waited := time.monotonic() - began) < seconds:
            if waited > 2 and not is_said:
                is_said = True
                yield f"waiting for the copy to {self.address}, at most {seconds:.0f} s"
            progress()
            time.sleep(0.1)
        if self.process.poll() is None:
            self.process.kill()
        if self.process.wait() != 0:
            yield (
                f"warning: not every checkpoint was copied to {self.address}; the same command copies what is missing "
                f"as long as {self.run} is there"
            )


# -- in the process that copies --------------------------------------------------------------------


def say(line):
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(one_line(line), flush=True)


class Copying:
    """What is to be copied, and what is. run: out/<run>; pauses: seconds, the first and the longest."""

    def __init__(self, run, address, pauses=PAUSES):
        self.run = Path(run)
        self.store = Store(address)
        self.first_pause, self.longest_pause = pauses
        self.pause = self.first_pause
        self.copies = None  # the record's; None until the store has said what is there
        self.waiting = []  # names, the newest last
        self.damaged = set()  # names of copies that are not what their state.json says

    def add(self, name):
        self.waiting = [*(other for other in self.waiting if other != name), name]

    def step(self):
        """Copy the newest checkpoint that waits. Returns seconds to wait before the next call: 0, or a pause after a
        failure, which is said in one line."""
        try:
            if self.copies is None:
                self.copies = self.whole_copies()
                self.record()
            if self.waiting:
                self.copy(self.waiting[-1])
                self.waiting.pop()
        except Exception as error:  # of many kinds; none may end the copying
            pause, self.pause = self.pause, min(2 * self.pause, self.longest_pause)
            say(f"not copied: {explain(error) or repr(error)}; tried again in {pause:.0f} s")
            return pause
        self.pause = self.first_pause
        return 0.0

    def whole_copies(self):
        """{name: checksum of its state.json} of the copies that are there, with all of their files."""
        found = {}
        for name, state in self.store.states().items():
            is_here = (self.run / CHECKPOINTS / name).is_dir()  # of others nobody asks
            if name not in self.damaged and (not is_here or self.store.has_files(name, state)):
                found[name] = state.get("crc32")
        return found

    def forget(self, name):
        """A copy was found damaged: its checkpoint is copied again."""
        self.damaged.add(name)
        if self.copies and self.copies.pop(name, None) is not None:
            self.record()

    def copy(self, name):
        """Copy one checkpoint unless its copy is there. Raises UserError or OSError."""
        checkpoint = self.run / CHECKPOINTS / name
        began = time.monotonic()
        expected = checksum_of(checkpoint)
        if expected is None or self.copies.get(name) == expected:
            return
        there = self.store.read(RUN_ID)
        own = self.run / RUN_ID
        if there is not None and own.is_file() and own.read_bytes() != there:
            raise UserError(f"train.copy_to: {self.store.address} belongs to another run now; choose another")
        self.copies.pop(name, None)
        self.record()  # before the old copy of that name is touched
        try:
            self.copies[name] = self.store.copy(checkpoint)
        except (UserError, OSError):
            if (checkpoint / STATE).is_file():
                raise
            return  # it was deleted meanwhile, for want of space
        self.record()
        say(f"copied {checkpoint} to {self.store.address} in {time.monotonic() - began:.2f} s")

    def record(self):
        write_json(self.run / RECORD, {"address": self.store.address, "copies": self.copies})


def main(run, address, lines=sys.stdin):
    """Copy what the lines name until `end`, then what is still to be copied."""
    asked = queue.Queue()

    def listen():
        for line in lines:
            asked.put(line.strip())
            if line.strip() == END:
                return
        os._exit(1)  # rank 0 is gone

    threading.Thread(target=listen, daemon=True).start()
    copying = Copying(run, address)
    is_ending, next_try = False, 0.0
    while not (is_ending and copying.copies is not None and not copying.waiting):
        is_idle = not copying.waiting and copying.copies is not None
        wait = None if is_idle and not is_ending else max(0.0, next_try - time.monotonic())
        with contextlib.suppress(queue.Empty):
            while True:
                line = asked.get(timeout=wait) if wait is None or wait > 0 else asked.get_nowait()
                wait = 0.0
                if line == END:
                    is_ending, next_try = True, 0.0
                elif line.startswith(DAMAGED):
                    copying.forget(line.removeprefix(DAMAGED))
                else:
                    copying.add(line)
        if time.monotonic() >= next_try:
            next_try = time.monotonic() + copying.step()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # rank 0 decides when to end
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    main(*sys.argv[1:])
