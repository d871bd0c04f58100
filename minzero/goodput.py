"""Where a run's seconds went since it began, across restarts, and which rank is slower than the others.

Goodput is the share of productive seconds: of steps whose result the run still has. Everything is measured by the clock
of rank 0's machine. The seconds are in status.json, and in metrics.jsonl at each checkpoint; a start takes those of the
start before it from there. What the two do not say is what a run that was killed did after its last line in the log:
that counts as down.
"""

import math
import statistics
import threading
import time

import psutil

from minzero.files import is_number

KINDS = {
    "productive": "in steps whose result the run still has",
    "start": "from the start of rank 0's process to the first step",
    "compile": "the first step of a start whose model is compiled",
    "resume": "reading and loading a checkpoint",
    "evaluation": "evaluating, scoring tasks, drawing and sampling",
    "save": "standing still for a checkpoint",
    "lost": "steps after the checkpoint that a later start continued from, and bad steps",
    "down": "from a start's last line in the log to the next start",
}
SLOW = 1.1  # times the median, from which a rank is named


class TimeUse:
    """The seconds of a run by KINDS. Their sum is the time from the run's beginning to the last `mark`."""

    def __init__(self, began=None):
        """began: when this process began, in seconds since 1970; by default what the operating system says."""
        self.began = psutil.Process().create_time() if began is None else began
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.last = self.began
        self.kept = 0.0  # productive seconds up to the checkpoint that a rollback would load
        self.at_save = {}  # the numbers of `totals` when the checkpoint that is being saved was begun

    def mark(self, kind):
        """The time since the last mark was of this kind."""
        now = time.time()
        self.seconds[kind] += max(0.0, now - self.last)  # the clock may be set back
        self.last = now

    def begin_save(self):
        """A checkpoint is saved with what was done so far."""
        self.at_save = self.totals()
        self.kept = self.seconds["productive"]

    def roll_back(self):
        """What was productive since the last checkpoint is lost."""
        self.seconds["lost"] += self.seconds["productive"] - self.kept
        self.seconds["productive"] = self.kept

    def continue_from(self, status, kept, step):
        """Add the seconds of earlier starts. status: the status.json that they left; kept: the lines of metrics.jsonl
        up to the checkpoint that this start continues from; step: the checkpoint's, 0 for none."""
        before = status.get("seconds")
        if not (isinstance(before, dict) and all(is_second(before.get(kind)) for kind in ("began", *KINDS))):
            before = seconds_in_log(kept)
            if before is None:
                return
            before["began"] = self.began - sum(before.values())  # when that was, is not known: it was not down
        saved = [line["run_productive_seconds"] for line in kept if is_second(line.get("run_productive_seconds"))]
        productive = max(saved, default=before["productive"]) if step else 0.0
        lost = max(0.0, before["productive"] - productive)
        gap = max(0.0, self.began - before["began"] - sum(before[kind] for kind in KINDS))
        began = before["began"]
        if status.get("state") == "complete":  # a complete run that is trained longer was not down
            began, gap = began + gap, 0.0
        for kind in KINDS:
            self.seconds[kind] += before[kind]
        self.seconds["productive"] -= lost
        self.seconds["lost"] += lost
        self.seconds["down"] += gap
        self.began = began
        self.kept = self.seconds["productive"]

    def goodput(self):
        """Productive over all seconds, from 0 to 1."""
        return self.seconds["productive"] / max(sum(self.seconds.values()), 1e-9)

    def for_status(self):
        """What status.json says of it."""
        return {"goodput": self.goodput(), "seconds": {"began": self.began} | self.seconds}

    def for_step(self):
        """What the line of a step in metrics.jsonl says of it."""
        seconds = {"run_seconds": sum(self.seconds.values()), "run_productive_seconds": self.seconds["productive"]}
        return {"goodput": self.goodput()} | seconds

    def totals(self):
        """What the line of a checkpoint in metrics.jsonl says of it."""
        return self.for_step() | {f"run_{kind}_seconds": seconds for kind, seconds in self.seconds.items()}


def seconds_in_log(kept):
    """The seconds of status.json by the last line of a checkpoint in metrics.jsonl, where status.json is lost; None if
    no line has them. kept: the lines."""
    for line in reversed(kept):
        found = {kind: line.get(f"run_{kind}_seconds") for kind in KINDS}
        if all(map(is_second, found.values())):
            return found
    return None


def is_second(value):
    return is_number(value, 1e12)


# -- the slowest rank ------------------------------------------------------------------------------


class OwnTime:
    """How long this rank works by itself: its steps last as long as those of the slowest rank, for which it waits.

    On CPU that is the time in which the thread of the steps runs or is ready to run (Linux's schedstat): it sleeps
    while it waits for others. On a GPU the time in NCCL cannot be told from work without a profiler, so each line of
    the log times a matrix product, and adds what the device waited for data."""

    def __init__(self, device):
        self.device = device
        self.seconds = 0.0  # busy, in the steps since the last reading
        self.before = None  # `busy` at the beginning of the step that is running

    def start_step(self):
        self.before = self.busy()

    def end_step(self):
        """What follows is no part of a step. A second call counts nothing."""
        if self.before is not None:
            self.seconds += self.busy() - self.before
        self.before = None

    def busy(self):
        """Seconds in which this thread has run or was ready to run."""
        try:
            with open(f"/proc/self/task/{threading.get_native_id()}/schedstat") as file:
                running, ready, _ = map(int, file.read().split())
        except (OSError, ValueError):
            return time.thread_time()
        return (running + ready) / 1e9 if running else time.thread_time()

    def read(self, data_seconds):
        """(seconds a step that count as they are, a number that the rest of the step is proportional to). data_seconds:
        of a step, since the last reading."""
        if self.device.type == "cuda":
            return data_seconds, matrix_product_seconds(self.device)
        self.end_step()
        seconds, self.seconds = self.seconds, 0.0
        return 0.0, seconds


def matrix_product_seconds(device, size=2048, times=10):
    """How long the GPU takes for so many products of two matrices (size, size) in float16, after one that is not
    measured."""
    import torch

    matrix = torch.zeros(size, size, dtype=torch.float16, device=device)
    matrix @ matrix
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        matrix @ matrix
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def slowest(measured, step_seconds):
    """(the slowest rank, that in words) where it is more than SLOW times as slow as the median; else (None, None).
    measured: for each rank (seconds, number) of `OwnTime.read` and its host; step_seconds: of a step, with waiting."""
    usual = statistics.median_low([number for _, number, _ in measured])
    data = statistics.median_low([seconds for seconds, _, _ in measured])
    if len(measured) < 2 or not usual > 0:
        return None, None
    rest = max(step_seconds - data, 1e-9)
    own = [seconds + rest * number / usual for seconds, number, _ in measured]
    rank = max(range(len(own)), key=own.__getitem__)
    ratio = own[rank] / statistics.median_low(own)
    if not (math.isfinite(ratio) and ratio > SLOW):
        return None, None
    return rank, f"rank {rank} on {measured[rank][2]} is {ratio - 1:.0%} slower than the median"
