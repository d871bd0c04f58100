"""Disturb a supervised run on two nodes again and again, and compare it with one that was left alone.

    python tests/chaos_nodes.py [--minutes 30] [--mean_seconds 60] [--steps 5000] [--seed 1]
    python tests/chaos_nodes.py --short

Nodes are namespaces of this machine with one CPU rank each (tests/helpers/nodes.py), so it needs root. The supervisor
runs on node1, and is started again when it was killed, as a service manager does. The run's folder is on a disk of its
own, which can be full. Prints each disturbance and tables, and fails unless the run ends complete by itself, with every
step once, and weights, moments and losses bit for bit those of the other run; where it continued on fewer ranks, losses
within 5e-6. The short form of it: tests/slow/test_chaos_nodes.py
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minzero.goodput import KINDS
from minzero.run_folder import read_status
from tests import chaos
from tests.helpers.nodes import Nodes
from tests.helpers.processes import BIN, ROOT, free_port, run, write_small_data

DISK = 150 << 20  # bytes of the disk with the run's folder: four checkpoints and more
AWAY = 2.0  # seconds until a node, or the supervisor, is started again
FULL_FOR, CUT_FOR = 60.0, 400.0  # seconds that the disk is full, or the cable cut, at most: until a start fails
PATIENT = ("--pause", 5, "--tries", 10)  # at this rate some starts in a row do not come to a checkpoint
DISTURBANCES = (
    "kill -9 of a rank",
    "kill -9 inside a save",
    "kill -9 of node1",  # and of the supervisor, which runs there
    "kill -9 of node2",
    "a cut cable",
    "SIGTERM to a rank",
    "SIGTERM to a launcher",
    "a full disk",
    "kill -9 of the supervisor",
)


@contextlib.contextmanager
def disk(path, size=DISK):
    """A context in which the folder `path` is a small disk of its own, for nodes that are booted in it. What it held at
    the end is copied beside it."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "disk", path], check=True)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(path, path.with_name("disk_at_the_end"))
        subprocess.run(["umount", "--lazy", path], check=True)


class Place:
    """A context: nodes, a data set and a small disk in a folder, and a supervised run on them."""

    def __init__(self, folder, steps, count=2, flags=(), seed=1, has_disk=True):
        """count: of nodes in the hostfile; flags: of supervise.py; has_disk: the run's folder has a small disk."""
        self.folder, self.steps, self.flags, self.has_disk = Path(folder), steps, flags, has_disk
        self.whole, self.out, self.log = (self.folder / name for name in ("whole", "disk/out", "log"))
        self.filler = self.folder / "disk/filler"
        self.generator = random.Random(seed)
        self.data = write_small_data(self.folder)
        self.nodes = Nodes(self.folder / "nodes", count)
        self.train_flags = ["--model.dropout", "0"]  # each rank draws its own, so fewer ranks would drop others
        self.supervisor = None
        self.killed_at = None  # when we killed it, until it is started again
        self.is_cut = False  # node2's cable
        self.later = []  # (condition, function): what to call when a condition holds
        # ---- from the log
        self.read = 0  # bytes
        self.is_running = False  # whether a start is
        self.starts = self.failures = self.steps_seen = 0
        self.done = collections.Counter()  # disturbances
        self.waiting = []  # (disturbance, when, starts then): those after which no later start has done a step
        self.seconds = collections.defaultdict(list)  # from a disturbance to that step

    def __enter__(self):
        variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        (self.folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        with contextlib.ExitStack() as stack:
            if self.has_disk:
                stack.enter_context(disk(self.folder / "disk"))
            stack.enter_context(self.nodes)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    # -- the run

    def run_whole(self):
        """The run that is left alone, on this machine."""
        command = [*chaos.command_of(self.data, self.whole, self.steps), *self.train_flags]
        done = run(command, timeout=3600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def start(self):
        """Start the supervisor on node1."""
        command = [BIN / "deepspeed", "-q", "--master_port", free_port(), ROOT / "train.py", ROOT / "configs/tiny.json"]
        command += [*chaos.flags_of(self.data, self.out, self.steps, background=True), *self.train_flags]
        flags = [*(self.flags or PATIENT), "--hostfile", self.nodes.hostfile()]
        words = [BIN / "python", ROOT / "supervise.py", *flags, *command]
        self.killed_at = None
        self.supervisor = self.nodes.start(1, words, self.log, cwd=self.folder, DS_ACCELERATOR="cpu")

    def look(self):
        """Read the log on, do what is due, and start a supervisor that was killed again. Returns the exit code of one
        that has ended by itself, else None."""
        self.read_log()
        for item in [item for item in self.later if item[0]()]:
            self.later.remove(item)
            item[1]()
        if self.killed_at is None:
            return self.supervisor.poll()
        if self.nodes.machines[1] and time.monotonic() > self.killed_at + AWAY:
            self.start()
        return None

    def read_log(self):
        with open(self.log, "rb") as file:
            file.seek(self.read)
            *lines, _ = file.read().split(b"\n")
        for line in lines:
            self.read += len(line) + 1
            if line.startswith(b"supervise.py: failed: "):
                self.failures += 1
                self.is_running = False
            elif line.startswith(b"supervise.py: start "):
                self.starts += 1
                self.is_running = True
            elif line.startswith(b"supervise.py: found start "):
                self.is_running = True
            elif b"| loss " in line:
                self.steps_seen += 1
                for item in [item for item in self.waiting if item[2] < self.starts]:
                    self.waiting.remove(item)
                    self.seconds[item[0]].append(time.monotonic() - item[1])

    def after(self, seconds, function):
        """Call a function after so many seconds."""
        end = time.monotonic() + seconds
        self.later.append((lambda: time.monotonic() > end, function))

    def after_failure(self, seconds, function):
        """Call a function when a start has failed, or after so many seconds."""
        before, end = self.failures, time.monotonic() + seconds
        self.later.append((lambda: self.failures > before or time.monotonic() > end, function))

    def wait(self, condition, seconds=300):
        """Look until a condition holds. Fails after that many seconds, or where the supervisor ends."""
        end = time.monotonic() + seconds
        while not condition():
            code = self.look()
            assert code is None, f"ended with {code}: {self.tail()}"
            assert time.monotonic() < end, self.tail()
            time.sleep(0.1)

    def wait_for_steps(self, count=20):
        """Wait until the run does steps again after all disturbances, and then so many more."""
        self.wait(lambda: self.steps_seen and not self.waiting)
        before = self.steps_seen
        self.wait(lambda: self.steps_seen >= before + count)

    def end(self, seconds=1800):
        """Wait for the end of the supervisor. Returns its exit code."""
        end = time.monotonic() + seconds
        while (code := self.look()) is None:
            assert time.monotonic() < end, self.tail()
            time.sleep(0.2)
        return code

    def tail(self):
        return self.log.read_text(errors="replace")[-5000:]

    # -- disturbances

    def processes(self):
        """{"ranks", "launchers", "supervisor": psutil's processes on all nodes}."""
        found = collections.defaultdict(list)
        for number in range(1, self.nodes.count + 1):
            for process in self.nodes.processes(number) if self.nodes.machines[number] else []:
                with contextlib.suppress(psutil.Error):
                    words = [os.path.basename(word) for word in process.cmdline()]
                    if len(words) < 2 or not words[0].startswith("python"):
                        continue  # pdsh, ssh and shells have the same words
                    if any(word.startswith("--local_rank") for word in words):
                        found["ranks"].append(process)
                    elif words[1] == "supervise.py":
                        found["supervisor"].append(process)
                    elif words[1] == "deepspeed" or "deepspeed.launcher.launch" in words:
                        found["launchers"].append(process)
        return found

    def disturb(self, what):
        """Do one of DISTURBANCES. Returns whether it was possible now."""
        if not (self.is_running and self.disturb_now(what, self.processes())):
            return False
        self.done[what] += 1
        print(f"{what}, start {self.starts}", flush=True)
        if what != "kill -9 of the supervisor":  # after which no start must follow
            self.expect_a_start(what)
        return True

    def expect_a_start(self, what):
        self.waiting.append((what, time.monotonic(), self.starts))

    def disturb_now(self, what, found):
        if what.startswith("kill -9 of node"):
            return self.crash(int(what[-1]))
        if what == "a cut cable":
            return self.cut()
        if what == "a full disk":
            return self.fill()
        if what == "kill -9 inside a save" and not (found["ranks"] and chaos.wait_for_save(self.out, 5)):
            return False
        kind = {"supervisor": "supervisor", "launcher": "launchers"}.get(what.split()[-1], "ranks")
        if not found[kind]:
            return False
        process = self.generator.choice(found[kind])
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate() if what.startswith("SIGTERM") else process.kill()
        if kind == "supervisor":
            self.killed_at = time.monotonic()
        return True

    def kill_rank(self, number):
        """kill -9 of the rank on a node."""
        on_node = self.nodes.processes(number)
        (rank,) = [process for process in self.processes()["ranks"] if process in on_node]
        rank.kill()
        self.expect_a_start("kill -9 of a rank")

    def lose(self, number):
        """kill -9 of a node, which stays away."""
        self.crash(number, back=False)
        self.expect_a_start(f"kill -9 of node{number}")

    def crash(self, number, back=True):
        """kill -9 of a node, if it is up. back: it is booted again."""
        if not self.nodes.machines[number]:
            return False
        if number == 1:
            self.killed_at, self.is_running = time.monotonic(), False
        self.nodes.crash(number)
        if back:
            self.after(AWAY, lambda: self.nodes.boot(number))
        return True

    def cut(self):
        """Cut node2's cable until a start has failed."""
        if self.is_cut or not self.nodes.machines[2]:
            return False
        self.nodes.cut(2)
        self.is_cut = True

        def heal():
            self.nodes.heal(2)
            self.is_cut = False

        self.after_failure(CUT_FOR, heal)
        return True

    def fill(self):
        """Fill the disk of the run's folder until a start has failed."""
        if self.filler.exists():
            return False
        with contextlib.suppress(OSError), open(self.filler, "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        self.after_failure(FULL_FOR, self.filler.unlink)
        return True


# -- the whole -------------------------------------------------------------------------------------


def disturb_at_random(place, minutes, mean_seconds):
    """A disturbance every `mean_seconds` on average, each kind as often as the others, whatever the run does then."""
    end, due, bag = time.monotonic() + 60 * minutes, time.monotonic(), []
    while place.look() is None and time.monotonic() < end:
        time.sleep(0.1)
        if time.monotonic() < due:
            continue
        bag = bag or place.generator.sample(DISTURBANCES, len(DISTURBANCES))
        for what in bag:
            if place.disturb(what):
                bag.remove(what)
                due += place.generator.uniform(0, 2 * mean_seconds)
                break


def check(place):
    """Fail unless the run that was disturbed is the one that was not. Returns how alike they are, in words."""
    if " instead of " not in place.log.read_text(errors="replace"):
        chaos.check_same(place.whole, place.out, place.steps)
        return "last checkpoint and losses equal bit for bit"
    pairs = zip(chaos.losses_of(place.whole, place.steps), chaos.losses_of(place.out, place.steps), strict=True)
    difference = max(abs(a - b) / a for a, b in pairs)
    assert difference < 5e-6, difference
    return f"continued on fewer ranks; losses equal to {difference:.1e}"


def print_table(place):
    record = json.loads((place.out / "supervise.json").read_text())
    print(f"\n{record['attempts']} starts, {len(record['failures'])} failures\n")
    print("| disturbance | times | seconds to the next start's first step, median and longest |\n|---|--:|--:|")
    for what in DISTURBANCES:
        seconds = place.seconds[what]
        words = f"{statistics.median(seconds):.0f}, {max(seconds):.0f}" if seconds else ""
        print(f"| {what} | {place.done[what]} | {words} |")
    status = read_status(place.out)
    total = sum(status["seconds"][kind] for kind in KINDS)
    print(f"\n| | of {total:.0f} s |\n|---|--:|")
    for kind in KINDS:
        print(f"| {kind} | {status['seconds'][kind] / total:.1%} |")
    assert abs(status["goodput"] - status["seconds"]["productive"] / total) < 1e-6


def main(folder, steps, minutes=30, mean_seconds=60, seed=1, disturbances=()):
    """disturbances: do these instead, each when the run does steps again."""
    with Place(folder, steps, seed=seed) as place:
        place.start()
        began = time.monotonic()
        if disturbances:
            for what in disturbances:
                place.wait_for_steps()
                place.wait(lambda what=what: place.disturb(what))
        else:
            disturb_at_random(place, minutes, mean_seconds)
        passed, count = time.monotonic() - began, sum(place.done.values())
        print(f"{count} disturbances in {passed:.0f} s, one every {passed / count:.0f} s; then it is left alone")
        code = place.end()
        assert code == 0, f"ended with {code}: {place.tail()}"
        print_table(place)
        place.run_whole()
        print(f"\ncomplete: {steps} steps, each once; {check(place)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--mean_seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, help="default: 5000, or 300")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="one of each but for the cable, each when it trains again")
    parser.add_argument("--keep", help="a new folder for all that was written, in place of a temporary one")
    args = parser.parse_args()
    if not os.environ.get("CHAOS_NODES"):  # the small disk is mounted in a namespace of its own
        words = ["unshare", "--mount", sys.executable, *sys.argv]
        os.execvpe(words[0], words, os.environ | {"CHAOS_NODES": "1"})
    with tempfile.TemporaryDirectory() as temporary:
        short = [what for what in DISTURBANCES if what != "a cut cable" and args.short]
        steps = args.steps or (300 if args.short else 5000)
        main(args.keep or temporary, steps, args.minutes, args.mean_seconds, args.seed, short)
