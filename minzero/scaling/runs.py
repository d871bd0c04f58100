"""The runs of a sweep: started one after the other, each an ordinary train.py, and what they came to.

A run is known by what it has left in its folder, so a sweep that was killed continues with the same command: what is
complete is passed over, what was begun resumes. A process that a killed sweep has left behind is waited for.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import time
from pathlib import Path

import psutil

from minzero.benchmark import launch_command, why_it_ended
from minzero.checkpoint_names import complete_checkpoints, name_of, newest_step, step_and_suffix
from minzero.data.meta import damaged, read_meta
from minzero.errors import UserError
from minzero.files import is_number, make_folder, read_json, write_json
from minzero.metrics import read_metrics
from minzero.planner.units import in_time
from minzero.run_folder import read_status
from minzero.scaling.plan import Options, Sweep
from minzero.scaling.shapes import COUNTS, count

REMEDY = "restore the file, or choose another --out"
PROBE_STEPS = 12
MOST_SKIPPED = 0.01  # of a run's steps: with more of them bad, its loss is not that of a run without
SECONDS_TO_SAVE = 300  # that a run which is asked to stop has before it is killed
REFUSED = 2  # the exit code of train.py for a config, data or machine that it does not take


class RunFailed(Exception):
    """A run ended before its last step; the message says why in one line."""


# ---- the folder of a sweep


@contextlib.contextmanager
def held(folder):
    """A context in which this process alone runs in the folder of a sweep. Its runs share the lock, so a sweep that
    begins while a run of a killed one is still there waits for that. Raises UserError if another sweep runs there.
    Yields the lock's file."""
    with open(folder / "sweep.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = holder_in(file.read(1000))
            if holder.get("host") != socket.gethostname() or psutil.pid_exists(holder.get("process", 0)):
                where = f"process {holder.get('process')} on {holder.get('host')}"
                raise UserError(
                    f"{folder}: found a sweep that runs in it ({where}); wait for its end, or stop it"
                ) from None
            say(f"waits for the run that process {holder['process']}, a sweep that has ended, left behind")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield file


def holder_in(text):
    """What a lock's text says of its holder, {} if it is damaged."""
    try:
        found = json.loads(text)
        return found if isinstance(found, dict) and type(found.get("process")) is int else {}
    except ValueError:
        return {}


def say(line):
    print(line, flush=True)


# ---- one run


def run_job(words, ranks, log, lock):
    """Start train.py and wait for its end; what it prints is added to the file `log`. lock: a file that it keeps open.
    Raises RunFailed, and UserError if train.py refuses to begin."""
    with open(log, "ab") as output:
        begins = output.tell()
        process = subprocess.Popen(
            launch_command(ranks, words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # a Ctrl-C comes to this process alone, which passes it on
        )
        try:
            code = process.wait()
        except BaseException:
            end(process)
            raise
    if code == 0:
        return
    with open(log, "rb") as file:
        file.seek(begins)
        why = why_it_ended(file.read().decode(errors="replace"), code)
    raise RunFailed(f"{why} (code {code}; {log})", code)


def end(process):
    """Ask a run and all its ranks to save and end; kill what is still there later."""
    for number, seconds in ((signal.SIGTERM, SECONDS_TO_SAVE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def has_checkpoint(folder, step):
    return any(step_and_suffix(path)[0] == step for path in complete_checkpoints(folder / "checkpoints"))


def loss_at(folder, step):
    """The last validation loss of a run after a step; None if it has none."""
    found = [line["val_loss"] for line in read_metrics(folder) if line["step"] == step and "val_loss" in line]
    return found[-1] if found else None


def bad_steps_of(folder, first, last):
    """How many of the steps after `first`, to `last`, were bad."""
    return len({line["step"] for line in read_metrics(folder) if "bad_step" in line and first < line["step"] <= last})


def repeated_data(sweep):
    """A line for each folder of the data that a sweep's longest run reads more than once, which no law knows of."""
    longest = max(budget.tokens for size in sweep.sizes for budget in size.budgets)
    weights = sweep.config.data.weights
    for folder, weight in weights.items():
        meta = read_meta(folder)
        tokens = meta and meta["splits"].get("train", {}).get("tokens")
        wanted = longest * weight / sum(weights.values())
        if tokens and wanted > tokens:
            yield f"data.path: {folder} has {tokens:,} tokens, the longest run reads {wanted:,.0f}: prepare more text"


# ---- the sweep


class Runs:
    """The runs of a Sweep. lock: the file of `held`."""

    def __init__(self, sweep, lock):
        self.sweep = sweep
        self.lock = lock
        self.failures = {}  # (size's name, run's name) -> why

    def is_done(self, job):
        """Whether a job has nothing left to do. A segment of the trunk is done when its last checkpoint is there, or
        the branch from it is done, after which the checkpoint may go."""
        folder = self.sweep.folder_of(job.size, job.run)
        step = job.tokens // job.size.global_batch_tokens
        if job.budget:
            return loss_at(folder, step) is not None
        if has_checkpoint(folder, step):
            return True
        branches = [other for other in self.sweep.jobs_of(job.size) if other.budget and other.begins >= job.tokens]
        return bool(branches) and all(self.is_done(branch) for branch in branches)

    def left(self):
        """[(size, its jobs that are not done)]."""
        found = [
            (size, [job for job in self.sweep.jobs_of(size) if not self.is_done(job)]) for size in self.sweep.sizes
        ]
        return [(size, jobs) for size, jobs in found if jobs]

    def write_configs(self):
        for size in self.sweep.sizes:
            path = self.sweep.config_file(size)
            make_folder("--out", path.parent)
            write_json(path, self.sweep.content_of_runs(size))

    def run(self):
        """Run all that is left, one after the other. A run that fails is named, and the larger budgets of its size are
        left out; one that train.py refuses to begin ends the sweep, because it would refuse the others too. Raises
        UserError."""
        self.write_configs()
        left = self.left()
        if not left:
            return
        seconds = self.estimate(left)
        self.say_estimate(left, seconds)
        for line in repeated_data(self.sweep):
            say(line)
        number, whole = 0, sum(len(jobs) for _, jobs in left)
        for size, jobs in left:
            for job in jobs:
                number += 1
                began = time.monotonic()
                title = f"[{number}/{whole}] {size.name} {job.run} to {job.tokens:,} tokens"
                try:
                    self.start(job)
                except RunFailed as failure:
                    self.failures[size.name, job.run] = str(failure.args[0])
                    say(f"{title}: failed: {failure.args[0]}; the larger budgets of {size.name} are left out")
                    for other in jobs[jobs.index(job) :]:
                        seconds.pop((size.name, other.run, other.tokens))
                    number += len(jobs) - jobs.index(job) - 1
                    break
                seconds.pop((size.name, job.run, job.tokens))
                loss = loss_at(self.sweep.folder_of(size, job.run), job.tokens // size.global_batch_tokens)
                shown = f"loss {loss:.4f}, " if job.budget and loss is not None else ""
                left_over = f"; about {in_time(sum(seconds.values()))} left" if seconds else ""
                say(f"{title}: {shown}{in_time(time.monotonic() - began)}{left_over}")
                if job.budget:
                    self.write_points()

    def start(self, job):
        """Run a job to its end. Raises RunFailed, and UserError where train.py refuses to begin."""
        folder = self.sweep.folder_of(job.size, job.run)
        step = job.tokens // job.size.global_batch_tokens
        if job.run == "trunk" and newest_step(folder) > step and not has_checkpoint(folder, step):
            raise UserError(self.gone(folder / "checkpoints" / name_of(step), folder.parent))
        branch_from = job.flags[job.flags.index("--train.resume") + 1] if "--train.resume" in job.flags else None
        if (
            branch_from
            and not Path(branch_from, "state.json").is_file()
            and not complete_checkpoints(folder / "checkpoints")
        ):
            raise UserError(self.gone(branch_from, folder.parent))
        words, log = self.sweep.words_of(job), folder.parent / f"{job.run}.log"
        before = read_status(folder).get("since")
        try:
            run_job(words, self.sweep.options.ranks, log, self.lock)
        except RunFailed as failure:
            why, code = failure.args
            if code == REFUSED and read_status(folder).get("since") == before:  # it never took its folder
                raise UserError(f"{folder}: train.py refuses the run: {why}; the sweep ends") from None
            raise
        if not self.is_done(job):
            raise RunFailed(f"ended before its last step ({log})", 0)

    def gone(self, checkpoint, folder):
        return f"{checkpoint}: gone, and a run needs it; remove {folder}, and the same command trains this size again"

    # -- how long --------------------------------------------------------------------------------------

    def measured(self, size):
        """(seconds of a step, of an evaluation, of a start), from a few steps of a size; they are run once."""
        folder = self.sweep.folder_of(size, "probe")
        file = folder.parent / "probe.json"
        if not file.exists():
            began = time.monotonic()
            self.start(self.sweep.probe(size, PROBE_STEPS))
            whole = time.monotonic() - began
            lines = read_metrics(folder)
            steps = [line["step_seconds"] for line in lines if line.get("step_seconds")]
            evaluation = sum(line["eval_seconds"] for line in lines if line.get("eval_seconds"))
            step = statistics.median(steps[2:])
            write_json(file, {"step": step, "evaluation": evaluation, "start": whole - sum(steps) - evaluation})
        found = read_json(file)
        return found["step"], found["evaluation"], found["start"]

    def estimate(self, left):
        """{(size, run, tokens): seconds} of the jobs that are left, from the speeds of the smallest and the largest of
        their sizes; between those the speed in FLOP/s grows as a power of the FLOPs of a token. {} where they fail."""
        ends = [left[0][0], left[-1][0]]
        try:
            measured = [self.measured(size) for size in ends]
        except RunFailed as failure:
            raise UserError(f"{self.sweep.folder}: a run of {PROBE_STEPS} steps failed: {failure.args[0]}") from None
        logs = [math.log(size.flops_per_token) for size in ends]
        speeds = [
            math.log(size.flops_per_token * size.global_batch_tokens / step)
            for size, (step, _, _) in zip(ends, measured, strict=True)
        ]
        seconds = {}
        for size, jobs in left:
            place = (math.log(size.flops_per_token) - logs[0]) / ((logs[1] - logs[0]) or 1)
            speed = math.exp(speeds[0] + place * (speeds[1] - speeds[0]))
            other = [small + place * (large - small) for small, large in zip(*measured, strict=True)]
            for job in jobs:
                flops = (job.tokens - job.begins) * size.flops_per_token
                seconds[size.name, job.run, job.tokens] = flops / speed + other[1] + other[2]
        return seconds

    def say_estimate(self, left, seconds):
        """What is to be run, and how long it will take."""
        jobs = [job for _, jobs in left for job in jobs]
        flops = sum((job.tokens - job.begins) * job.size.flops_per_token for job in jobs)
        say(
            f"{len(jobs)} runs of {len(left)} sizes, {flops:.3g} FLOPs, about {in_time(sum(seconds.values()))} by the "
            "speed of the smallest and the largest"
        )

    # -- what they came to -----------------------------------------------------------------------------

    def points(self):
        """What each run of the sweep came to, as points.json holds it."""
        found = []
        for size in self.sweep.sizes:
            for job in self.sweep.jobs_of(size):
                if job.budget:
                    found.append(self.point(size, job))
        return found

    def point(self, size, job):
        folder = self.sweep.folder_of(size, job.run)
        steps = job.tokens // size.global_batch_tokens
        loss = loss_at(folder, steps)
        begins = job.begins // size.global_batch_tokens
        skipped = bad_steps_of(folder, begins if job.run != "trunk" else 0, steps)
        if job.begins and job.run != "trunk":
            skipped += bad_steps_of(self.sweep.folder_of(size, "trunk"), 0, begins)
        return {
            "size": size.name,
            "run": str(folder),
            "budget": job.budget.flops,
            "flops": job.tokens * size.flops_per_token,
            "tokens": job.tokens,
            "parameters": {how: count(size.model, how) for how in COUNTS},
            "flops_per_token": size.flops_per_token,
            "lr": size.lr,
            "global_batch_tokens": size.global_batch_tokens,
            "loss": loss,
            "bad_steps": skipped,
            "left_out": self.why_left_out(size, job, loss, skipped, steps),
        }

    def why_left_out(self, size, job, loss, skipped, steps):
        """Why a run is no point of the fits, or None."""
        for run in (job.run, "trunk"):
            why = self.failures.get((size.name, run))
            if why and loss is None:
                return f"{run} failed: {why}"
        if loss is None:
            return "not complete"
        uniform = math.log(size.model.vocab_size)
        if not loss < uniform:
            return f"diverged: its loss {loss:.3f} is no better than a uniform guess, {uniform:.3f}"
        if skipped > MOST_SKIPPED * steps:
            return f"{skipped} of its {steps} steps were bad"
        return None

    def write_points(self):
        """Write points.json. Points whose runs are gone stay as they were. Returns all points."""
        path = self.sweep.folder / "points.json"
        points = self.points()
        if path.exists():
            earlier = read_form(path, {"points": list})["points"]
            for point in earlier:
                if not isinstance(point, dict) or not {"size", "budget", "loss", "run"} <= point.keys():
                    raise damaged(path, "points", point, "runs with size, budget, loss and run", REMEDY)
            earlier = {(point["size"], point["budget"]): point for point in earlier}
            for number, point in enumerate(points):
                before = earlier.get((point["size"], point["budget"]))
                if before and before["loss"] is not None and not Path(point["run"]).exists():
                    points[number] = before
        write_json(path, {"points": points})
        return points


# ---- sweep.json


def open_sweep(folder, content, options, flops, sizes):
    """The Sweep of a folder, new or continued: budgets may be added, nothing else may change. Makes the folder, and
    writes nothing into it. Raises UserError."""
    path = folder / "sweep.json"
    before = read_record(folder)
    if before:
        new = [budget for budget in flops if budget not in before["flops"]]
        if new and min(new) < max(before["flops"]):
            raise UserError(
                f"--flops: found {min(new):g}, less than the {max(before['flops']):g} of {path}, whose trunks are "
                "longer; add larger budgets, or choose another --out"
            )
        flops = [*before["flops"], *new]
    sweep = Sweep(folder, content, options, flops, sizes)
    record = sweep.record() | {"flops": sweep.flops, "sizes": sizes}
    if before:
        for name, was in before["options"].items():
            if record["options"].get(name) != was:
                raise UserError(
                    f"--{name}: found {record['options'].get(name)}, but {path} says {was}; {another(folder)}"
                )
        if before["config"] != record["config"] or before["sizes"] != sizes:
            what = "--sizes" if before["sizes"] != sizes else "the config"
            raise UserError(f"{what}: differs from that in {path}; {another(folder)}")
    make_folder("--out", folder)
    return sweep


def write_record(sweep, sizes):
    """Write sweep.json, by which the same command continues."""
    write_json(sweep.folder / "sweep.json", sweep.record() | {"flops": sweep.flops, "sizes": sizes})


def read_record(folder):
    """The content of a sweep's sweep.json, or None if there is none. Raises UserError."""
    path = folder / "sweep.json"
    if not path.exists():
        return None
    record = read_form(path, {"config": dict, "options": dict, "flops": list, "sizes": int})
    names = [field.name for field in dataclasses.fields(Options)]
    if not all(is_number(budget, 1e40) and budget > 0 for budget in record["flops"]) or {*record["options"]} - {*names}:
        raise damaged(path, "flops or options", record["flops"], "the budgets and options of a sweep", REMEDY)
    return record


def read_form(path, form):
    """The object in a JSON file of a sweep. form: {name: type} of what it must have. Raises UserError."""
    content = read_json(path)
    for name, kind in form.items():
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, kind):
            raise damaged(path, name, found, f"a {kind.__name__}", REMEDY)
    return content


def another(folder):
    return f"`python sweep.py {folder}` continues it as it was; choose another --out for another sweep"
