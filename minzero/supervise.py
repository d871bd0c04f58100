"""Brings a run back after every failure: starts the same command again for as long as the run gets further.

    out/<run>/supervise.json   the starts and failures so far, by which another supervisor continues
    out/<run>/supervise.log    all that the command printed
    out/<run>/supervise.lock   locked by the supervisor: there is one a run

The command runs in a session of its own and prints into the file, so it lives on when the supervisor dies, and the next
supervisor finds it by the file. Whether the run is complete, stopped or failed is read from status.json, and how far it
is from its checkpoints; the launchers' exit codes differ (`deepspeed` returns 0 where its child was killed).
"""

import contextlib
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from minzero.checkpoint_names import newest_save, newest_step
from minzero.commands import REFUSED
from minzero.errors import UserError, one_line
from minzero.failures import MAY_PASS, NODE_ENDED, REFUSAL, in_words, telling_line
from minzero.files import write_atomically, write_json
from minzero.nodes import choose, hostfile_text, nodes_that_failed, that_answer
from minzero.run_folder import NO_LOCKS, holder_of, lock_within, read_status

FAILED, GAVE_UP = 1, 3  # exit codes, besides 0 (complete, or stopped by STOP), 2 (refused) and 128 + a signal's number
LONGEST_PAUSE = 600  # seconds
LAUNCHER_SECONDS = 60  # that a launcher may live on: without ranks, or at the start without one of its nodes
LOOK = 0.2  # seconds from one look at the command to the next
TAIL = 1 << 18  # bytes at the end of the log in which the reason of a failure is looked for
LARGEST_LOG = 1 << 26  # bytes; a larger one is renamed to supervise.log.1 before the next start
NEW = {"attempts": 0, "step": -1, "without_progress": 0, "failures": [], "failures_of_nodes": {}}
LATER = {"running": None, "nodes_without_progress": {}, "begun_by": None, "saved_before": 0}  # younger than some files
FULL = 1 << 20  # bytes; on a disk with less room the last lines of a log may be missing
# ssh ends, and pdsh with it, when a node has not answered for so long, as where a cable is cut
KEEPALIVE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Orders(NamedTuple):
    """What a supervisor is asked to do."""

    command: list  # its words
    folder: Path  # of the run
    tries: int  # failures in a row without progress after which it gives up
    pause: float  # seconds after the first failure; doubled after each one without progress
    patience: float  # seconds that ranks without a launcher may live on
    once: bool = False  # start the command once, for a scheduler that starts it again
    again: bool = False  # forget the failures so far
    resumes: bool = False  # train.resume says where the first start begins; the others continue
    nodes: dict | None = None  # {node: slots}, of a hostfile
    wanted: int = 0  # how many of them
    divides: object = None  # function of a number of ranks: whether the batch divides by it
    ssh_port: str | None = None


class Supervisor:
    """Starts a command again and again, as `orders` says. `run` returns the exit code."""

    def __init__(self, orders):
        self.orders = orders
        self.folder = orders.folder
        self.log = self.folder / "supervise.log"
        self.hostfile = self.folder / "supervise.hosts"
        self.copied = 0  # bytes of the log that were printed
        self.signals = []  # that came, in their order
        self.passed_on = 0  # how many of them
        self.wrote_stop = False
        self.record = self.read_record()

    # -- its own file --------------------------------------------------------------------------------

    def read_record(self):
        """supervise.json, or a new one where it is missing or damaged."""
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            found = json.loads((self.folder / "supervise.json").read_bytes())
            if all(type(found.get(key)) is type(value) for key, value in NEW.items()):
                return copy.deepcopy(LATER) | found
        return copy.deepcopy(NEW | LATER) | {
            "began": time.time(),
            "step": newest_step(self.folder),
        }

    def begins_elsewhere(self):
        """Whether the run begins where train.resume says: this command has saved nothing yet under a supervisor, and
        the checkpoints that are there may be of a continuation that it gives up."""
        return self.orders.resumes and newest_save(self.folder)[0] <= self.record["saved_before"]

    def newest(self):
        """The step of the newest checkpoint of this run, -1 if there is none."""
        return -1 if self.begins_elsewhere() else newest_step(self.folder)

    def write_record(self):
        """Write supervise.json. On a full disk the run matters more."""
        try:
            write_json(self.folder / "supervise.json", self.record)
        except UserError as error:
            tell(f"warning: {error}")

    @contextlib.contextmanager
    def alone(self):
        """A context in which this is the run's only supervisor. Raises UserError if there is another."""
        path = self.folder / "supervise.lock"
        with open(path, "a+") as file:
            try:
                lock_within(file, 1.0)
            except BlockingIOError:
                file.seek(0)
                holder = one_line(file.read(200)) or "another process"
                raise UserError(f"{self.folder}: found a supervisor ({holder}), expected none; stop it first") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            with contextlib.suppress(OSError):  # a full disk
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield

    # -- the whole -----------------------------------------------------------------------------------

    def run(self):
        """Supervise until the run is complete, stopped or refused, or does not get further. Returns the exit code."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks of SIGHUP
                signal.signal(number, lambda number, _: self.signals.append(number))
        with self.alone():
            self.record = self.read_record()
            if self.orders.again:
                self.record |= {"without_progress": 0, "failures": []}
                self.record |= {"failures_of_nodes": {}, "nodes_without_progress": {}}
            if self.orders.resumes and self.record["begun_by"] != self.orders.command:
                saved_before, _ = newest_save(self.folder)
                self.record |= {"begun_by": self.orders.command, "saved_before": saved_before, "step": -1}
            if not self.record["running"] and self.newest() > self.record["step"]:  # it went on without a supervisor
                self.record |= {"step": self.newest(), "without_progress": 0}
            code = None
            if self.record["running"]:
                tell(f"found start {self.record['attempts']} of this run, and watches it")
                self.copied = self.log.stat().st_size if self.log.exists() else 0
                code = self.judge(self.watch(None))
            while code is None:
                code = self.next_start()
            return code

    def next_start(self):
        """Wait, start the command and watch it to its end. Returns the exit code if that was the last start."""
        if self.record["without_progress"] >= self.orders.tries:
            return self.give_up()
        code = self.wait_for_turn()
        if code is None:
            self.record["attempts"] += 1
            nodes, line = self.choose_nodes()
            fault = self.write_hostfile(nodes) if nodes else None
            if fault:
                code = self.fail([], None, fault)
            elif nodes is None:
                code = self.fail([], None, line)
            else:
                tell(f"start {self.record['attempts']}{f' on {line}' if nodes else ''}")
                code = self.judge(self.watch(self.start(nodes)))
        if code is None and self.orders.once:
            code = self.give_up() if self.record["without_progress"] >= self.orders.tries else FAILED
        return code

    def wait_for_turn(self):
        """Wait until the pause after a failure is over and no run holds the folder. Returns the exit code if the run is
        asked to stop meanwhile."""
        failures = self.record["without_progress"]
        seconds = min(self.orders.pause * 2 ** max(0, failures - 1), LONGEST_PAUSE) if self.record["failures"] else 0
        begin = self.record.get("ended", 0) + seconds
        if begin - time.time() > 1:
            tell(f"starts again in {begin - time.time():.0f} s")
        told = None
        while True:
            if self.signals:
                return self.stopped_by_signal()
            if self.take_stop_file():
                tell("stopped by the file STOP")
                return 0
            if not 0 < begin - time.time() <= LONGEST_PAUSE:  # the clock may have been set back
                holder = holder_of(self.folder)
                if holder is None:
                    return None
                if holder != told:
                    told = holder
                    tell(f"{self.folder} is held by a run ({holder}): waits for its end")
            time.sleep(LOOK)

    # -- one start -----------------------------------------------------------------------------------

    def start(self, nodes):
        """Start the command. nodes: {node: slots}, empty without a hostfile. Returns its Popen. Raises UserError."""
        command = list(self.orders.command)
        if self.orders.resumes and not self.begins_elsewhere():
            command += ["--train.resume", "auto"]
        if nodes:
            place = next(place for place, word in enumerate(command) if os.path.basename(word) == "deepspeed")
            command[place + 1 : place + 1] = ["--hostfile", str(self.hostfile), "--force_multi"]
        if self.log.exists() and self.log.stat().st_size > LARGEST_LOG:
            os.replace(self.log, self.folder / "supervise.log.1")
        with open(self.log, "ab") as log:
            self.copied = log.tell()
            try:
                process = subprocess.Popen(
                    command,
                    env=(KEEPALIVE if nodes else {}) | os.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"{command[0]}: {error.strerror}; expected a command that can be run") from None
        self.record["running"] = {
            "host": socket.gethostname(),
            "process": process.pid,
            "began": time.time(),
            "log_from": self.copied,
            "status_before": self.status_written(),
            "nodes": nodes,
        }
        self.write_record()
        return process

    def choose_nodes(self):
        """(the nodes of this start, a line about them) as `choose` gives them: {} without a hostfile, None where none
        can run it."""
        if not self.orders.nodes:
            return {}, None
        answering = that_answer(self.orders.nodes, self.orders.ssh_port)
        failures, ever = self.record["nodes_without_progress"], self.record["failures_of_nodes"]
        chosen, line = choose(self.orders.nodes, self.orders.wanted, failures, answering, self.orders.divides, ever)
        return chosen or None, line

    def write_hostfile(self, nodes):
        """Write the hostfile of a start, if it is another one. Returns why it could not be written, as on a full disk;
        else None. nodes: {node: slots}."""
        text = hostfile_text(nodes).encode()
        try:
            if not self.hostfile.exists() or self.hostfile.read_bytes() != text:
                write_atomically(self.hostfile, text)
        except (UserError, OSError) as error:
            return one_line(str(error))
        return None

    def processes(self):
        """The processes of the command that is running, on this machine: those of its session."""
        running = self.record["running"]
        if running["host"] != socket.gethostname():
            return []
        with contextlib.suppress(psutil.Error):  # the numbers of processes begin again with a machine or a container
            if psutil.Process(1).create_time() > running["began"] + 1:
                return []
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) != running["process"]:
                    continue
                process = psutil.Process(pid)
                if process.create_time() > running["began"] - 60 and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def status(self):
        """status.json, if it was written since this start; else an empty dictionary."""
        is_new = self.status_written() != self.record["running"]["status_before"]
        return read_status(self.folder) if is_new else {}

    def status_written(self):
        """When status.json was written, in nanoseconds; None if there is none."""
        with contextlib.suppress(OSError):
            return os.stat(self.folder / "status.json").st_mtime_ns
        return None

    def watch(self, process):
        """Watch a start to its end: its processes are gone and the folder is free. process: its Popen, or None where
        another supervisor started it. Returns its exit code, None where that is not known."""
        alone_since = free_since = None  # since when the launcher is gone; since when no rank holds the folder any more
        fewer_since = None  # since when one of the nodes is gone that were to begin together
        was_held = asked = False
        looked = 0.0
        while True:
            self.pass_signals_on()
            self.print_log()
            code = process.poll() if process else None
            now = time.monotonic()
            if now - looked > 1 or code is not None:
                looked = now
                left = self.processes()
                over = code is not None or not process
                if over and not left and holder_of(self.folder) is None:
                    break
                alone_since = (alone_since or now) if code is not None else None
                is_held = bool(self.status()) and holder_of(self.folder) is not None
                was_held |= is_held
                free_since = (free_since or now) if was_held and not is_held else None
                if alone_since and now - alone_since > self.orders.patience:
                    self.kill(left, f"still there {self.orders.patience:.0f} s after their launcher")
                fewer_since = (fewer_since or now) if self.a_node_has_ended() else None
                if fewer_since and now - fewer_since > 2 * LAUNCHER_SECONDS:
                    self.kill(left, f"still there {LAUNCHER_SECONDS} s after SIGTERM")
                elif fewer_since and now - fewer_since > LAUNCHER_SECONDS and not asked:
                    asked = True
                    tell(
                        f"ends this start: a node's ranks ended {LAUNCHER_SECONDS} s ago, and the others wait for them"
                    )
                    self.send(left, signal.SIGTERM)
                if free_since and now - free_since > LAUNCHER_SECONDS:
                    self.kill(left, f"still there {LAUNCHER_SECONDS} s after the last rank")
            time.sleep(LOOK)
        self.print_log()
        return code

    def a_node_has_ended(self):
        """Whether a node has ended before the run has begun. The others then wait for it, as long as they may."""
        return not self.status() and any(map(NODE_ENDED.search, self.lines_of_log()))

    def kill(self, processes, why):
        tell(f"kills {len(processes)} processes: {why}")
        self.send(processes, signal.SIGKILL)

    def send(self, processes, number):
        """Send a signal to some processes."""
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def print_log(self):
        """Print what the command has printed since the last call."""
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            log.seek(self.copied)
            while chunk := log.read(1 << 20):
                self.copied += len(chunk)
                with contextlib.suppress(OSError, ValueError):  # a lost terminal must not cost the run
                    sys.stdout.write(chunk.decode(errors="replace"))
                    sys.stdout.flush()

    # -- requests to stop ----------------------------------------------------------------------------

    def pass_signals_on(self):
        """Ask the run to save and end, as a signal asks the supervisor to. The first becomes a file STOP if the run is
        in its loop: a launcher that receives a signal kills its ranks 30 s later, saved or not, and those of other
        nodes it does not tell. Any other signal goes to all processes of the command."""
        while self.passed_on < len(self.signals):
            number = self.signals[self.passed_on]
            self.passed_on += 1
            name = signal.Signals(number).name
            if self.passed_on == 1 and self.status().get("state") == "running" and self.write_stop_file():
                tell(f"{name}: asks the run to save and end; once more passes it on to the command")
                continue
            tell(f"{name}: passes it on to the command")
            self.send(self.processes(), number)

    def write_stop_file(self):
        try:
            (self.folder / "STOP").touch()
        except OSError:  # a full disk
            return False
        self.wrote_stop = True
        return True

    def take_stop_file(self):
        """Whether there is a file STOP, which is deleted."""
        try:
            (self.folder / "STOP").unlink()
        except OSError:
            return False
        return True

    def stopped_by_signal(self):
        tell(f"stopped by {signal.Signals(self.signals[0]).name}; the same command continues")
        return 128 + self.signals[0]

    # -- what has come of it -------------------------------------------------------------------------

    def judge(self, code):
        """What a start has come to. code: its exit code, or None. Returns the supervisor's exit code if that was the
        last start, else None."""
        status, lines = self.status(), self.lines_of_log()
        state = status.get("state")
        if code in (0, None) and any(" is complete: " in line for line in lines):  # it was before
            state = read_status(self.folder).get("state")
        stopped = state == "stopped" and str(status.get("reason")).endswith("STOP")
        if self.wrote_stop:
            self.take_stop_file()
        if state == "complete":
            self.finish(code)
            tell("complete")
            self.print_failures()
            return 0
        if self.signals:
            self.finish(code)
            return self.stopped_by_signal()
        if stopped:
            self.finish(code)
            tell("stopped by the file STOP; the same command continues")
            return 0
        return self.fail(lines, code, status.get("reason"))

    def finish(self, code):
        """Record the end of a start. Returns whether the run got further in it."""
        step = self.newest()
        further = step > self.record["step"]
        self.record |= {"running": None, "ended": time.time(), "code": code, "step": max(step, self.record["step"])}
        if further:
            self.record |= {"without_progress": 0, "nodes_without_progress": {}}
        self.write_record()
        return further

    def fail(self, lines, code, reason):
        """Record a failure. lines: of the log; reason: in words, where the log says nothing. Returns the exit code if
        the run must not be started again."""
        running = self.record["running"] or {"began": time.time(), "nodes": {}}
        had_begun = bool(self.record["running"] and self.status())
        line = one_line(telling_line(lines) or reason or "it printed nothing")
        if self.disk_is_full():
            line = f"no space left in {self.folder}; {line}"
        nodes = nodes_that_failed(lines, running["nodes"])
        further = self.finish(code)
        self.record["without_progress"] += not further
        failure = {"attempt": self.record["attempts"], "began": running["began"], "ended": time.time(), "code": code}
        failure |= {"step": self.record["step"], "further": further, "nodes": sorted(nodes), "line": line}
        self.record["failures"] = [*self.record["failures"][-99:], failure]
        for counts in ("failures_of_nodes", *([] if further else ["nodes_without_progress"])):
            self.record[counts] |= {node: self.record[counts].get(node, 0) + 1 for node in nodes}
        self.write_record()
        tell(f"failed: {in_words(failure)}")
        # A run that had begun, or had no room for its line, may end with this code by a full disk.
        alone = code == REFUSED and not had_begun and not self.disk_is_full()
        refused = alone or any(REFUSAL.search(line) for line in lines)
        if refused and not nodes and not any(words in line for words in MAY_PASS):
            tell("train.py refuses this run, so it is not started again")
            return REFUSED
        return None

    def lines_of_log(self):
        """The last lines that this start has printed."""
        try:
            with open(self.log, "rb") as log:
                log.seek(max(self.record["running"]["log_from"], os.fstat(log.fileno()).st_size - TAIL))
                return log.read().decode(errors="replace").splitlines()
        except OSError:
            return []

    def disk_is_full(self):
        """Whether the disk of the run's folder has no room for the lines that the command prints."""
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(self.folder)
            return usage.total > 0 and usage.free < FULL
        return False

    def give_up(self):
        count = self.record["without_progress"]
        tell(f"gives up: {count} failures, and no checkpoint after step {max(0, self.record['step'])}")
        self.print_failures()
        tell("repair the cause, and call it with --again")
        return GAVE_UP

    def print_failures(self):
        failures = self.record["failures"]
        tell(f"{self.record['attempts']} starts, {len(failures)} failures{':' if failures else ''}")
        for failure in failures[-20:]:
            tell(f"  {in_words(failure)}")


def tell(line):
    """Print a line of the supervisor's own."""
    with contextlib.suppress(OSError, ValueError):  # a lost terminal must not cost the run
        print(f"supervise.py: {one_line(line)}", flush=True)
