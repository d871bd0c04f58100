"""What watches over a run: requests to stop, ranks that die or hang, and numbers that must not reach the weights."""

import contextlib
import functools
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import psutil
from torch import distributed

from minzero import checkpoint, dist
from minzero.errors import SharedError, UserError
from minzero.zero import first_not_finite, forget_powers, optimizers

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
WINDOW = 128  # good steps that a spike is measured against; half of them must be there


def end(reason, code, out_dir, folder=None):
    """Say in one line why this rank ends, also in the status of the run's folder, and leave without waiting for ranks
    that are gone, as the interpreter's own exit would."""
    remedy = "no checkpoint was saved yet"
    with contextlib.suppress(OSError, UserError):
        if found := checkpoint.find(out_dir):
            remedy = f"resume from {found}"
    if folder:
        with contextlib.suppress(OSError, UserError):
            folder.report("stopped" if code == 130 else "failed", reason=reason)
    with contextlib.suppress(OSError):  # the terminal may be gone too
        print(f"train.py: rank {os.environ.get('RANK', '0')} {reason}; {remedy}", file=sys.stderr, flush=True)
    os._exit(code)


def is_gone(process):
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # not ours to look at, so it is there
        return False


def launchers():
    """The processes above this one that belong to DeepSpeed's launcher. When somebody ends the `deepspeed`
    command, the ranks are not told: they are left as orphans."""
    found = []
    for process in psutil.Process().parents()[:2]:
        with contextlib.suppress(psutil.Error):
            if any("deepspeed" in os.path.basename(word) for word in process.cmdline()[:4]):
                found.append(process)
    return found


class Watch:
    """Notices, in a thread of its own, what asks this run to stop: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP, a file STOP in the
    run's folder, or that the launcher has gone. `reason` then says what, and the loop saves and ends when all ranks
    know. A second Ctrl-C, and any signal before the loop has begun, ends the run at once.

    A thread, woken by a pipe, because a rank that waits in NCCL or gloo for another never comes back to
    Python's signal handlers. So it also ends this rank where the loop no longer can: the launcher sends
    SIGTERM as well when a rank has died, and a rank that hangs is named after `timeout` seconds without progress of
    any rank. What counts as progress calls `beat`: a micro-batch, a batch of an evaluation, a tensor that is saved or
    loaded."""

    def __init__(self, out_dir, timeout):
        self.out_dir, self.timeout, self.reason = Path(out_dir), timeout, None
        self.rank = int(os.environ.get("RANK") or 0)
        self.folder = None  # the RunFolder, once there is one
        self.peers, self.beats, self.last_beat, self.finished = None, 0, time.monotonic(), False
        self.beats_of_all, self.last_look, self.last_asked = None, 0.0, 0.0
        self.loop_has_begun, self.first_ctrl_c = False, None

    def start(self):
        self.launchers = launchers()
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer)
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks of SIGHUP
                signal.signal(number, lambda *_: None)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def meet(self):
        """From here on a rank that makes no progress is noticed. Every rank must call this."""
        self.rank = distributed.get_rank()
        machine = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text()  # names may repeat
        here = {rank: pid for rank, (other, pid) in enumerate(dist.gather((machine, os.getpid()))) if other == machine}
        dist.ask_store(lambda store: store.set(f"beat/{self.rank}", str(self.beats)))
        self.last_beat = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):  # it will be missed soon enough
            self.peers = {rank: psutil.Process(pid) for rank, pid in here.items()}

    def begin_loop(self):
        """From here on stop requests wait for the end of a step."""
        self.beat()
        self.loop_has_begun = True

    def beat(self):
        """This rank makes progress."""
        self.beats, self.last_beat = self.beats + 1, time.monotonic()

    def finish(self):
        """No more watching. The thread must be gone before the interpreter is: one that the interpreter's end
        finds inside torch's store takes the process down with `terminate called`."""
        self.finished = True
        os.write(self.writer, b"\0")
        self.thread.join()

    def run(self):
        told = 0
        while not self.finished:
            ready, _, _ = select.select([self.reader], [], [], 0.5)
            for number in filter(None, os.read(self.reader, 64) if ready else b""):
                self.receive(number)
            with contextlib.suppress(OSError):  # a network file system may answer the next time
                if self.rank == 0 and (self.out_dir / "STOP").exists():
                    self.reason = self.reason or f"{self.out_dir / 'STOP'}"
                    (self.out_dir / "STOP").unlink()
            if any(is_gone(process) for process in self.launchers):
                self.reason = self.reason or "the end of its launcher"
            if self.peers is None or self.finished:
                continue
            dead = [rank for rank, process in self.peers.items() if is_gone(process)]
            if self.reason and dead and not self.finished:
                end(f"stopped by {self.reason}: rank {dead[0]} is gone", 1, self.out_dir, self.folder)
            if self.beats > told:
                told = self.beats
                dist.ask_store(lambda store: store.set(f"beat/{self.rank}", str(self.beats)))
            waited = time.monotonic() - self.last_beat
            if waited > 2 and time.monotonic() - self.last_asked > max(1, distributed.get_world_size() / 100):
                self.last_asked = time.monotonic()
                if (fault := dist.told()) and fault.said_by != self.rank and not self.finished:
                    os._exit(2)  # of which another rank says the reason
            if waited > self.timeout / 2:
                self.look_at_others()
                waited = time.monotonic() - self.last_beat
            if waited > self.timeout:
                end(f"waited {self.timeout} s: {self.who_hangs()}", 1, self.out_dir, self.folder)

    def receive(self, number):
        """A signal: a request to stop, or where the loop cannot answer it, the end of this rank."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.loop_has_begun:
            end(f"stopped by {name}", 130, self.out_dir, self.folder)
        if number == signal.SIGINT:
            # a terminal and a launcher may both pass on the same Ctrl-C
            if self.first_ctrl_c and time.monotonic() - self.first_ctrl_c > 1:
                end("stopped by a second Ctrl-C", 130, self.out_dir, self.folder)
            if self.first_ctrl_c is None and self.rank == 0:
                with contextlib.suppress(OSError):
                    print("Ctrl-C: saving and ending after this step; once more ends at once", flush=True)
            self.first_ctrl_c = self.first_ctrl_c or time.monotonic()
        self.reason = self.reason or name

    def end_alone(self, reason):
        """End this rank, which has lost contact with another."""
        end(reason, 1, self.out_dir, self.folder)

    def stop_watching(self):
        """This rank ends by a fault of its own, which it says itself. Rank 0 keeps the store until the others have read
        why: until those on this machine are gone, or for ten seconds."""
        self.finished = True
        began = time.monotonic()
        others = [process for rank, process in (self.peers or {}).items() if rank != self.rank]
        while self.rank == 0 and time.monotonic() - began < 10 and self.peers and distributed.get_world_size() > 1:
            if len(others) + 1 == distributed.get_world_size() and all(map(is_gone, others)):
                break
            time.sleep(0.2)

    def all_beats(self):
        """How often each rank has called `beat`, or None if rank 0 does not answer."""
        keys = [f"beat/{rank}" for rank in range(distributed.get_world_size())]
        return dist.ask_store(lambda store: [int(value) for value in store.multi_get(keys)])

    def look_at_others(self):
        """Progress of another rank, which this one may be waiting for, counts as its own."""
        if time.monotonic() - self.last_look < min(self.timeout / 10, 60):
            return
        self.last_look = time.monotonic()
        beats = self.all_beats()
        if self.beats_of_all is not None and beats is not None and beats != self.beats_of_all:
            self.last_beat = time.monotonic()
        self.beats_of_all = beats

    def who_hangs(self):
        beats = self.all_beats()
        if beats is None:
            return "rank 0 does not answer"
        last = [rank for rank, count in enumerate(beats) if count == min(beats)]
        if len(last) == len(beats):
            return "no rank makes progress"
        return f"rank {', '.join(map(str, last))} hangs"


class BadSteps:
    """Keeps a step with a NaN, an infinity or a spike from the weights, the same way at every ZeRO stage and in
    every precision: it stands between DeepSpeed, which finds the norm of the gradient, and the optimizer,
    which would use it. A step that is not taken changes neither weights nor moments.

    state: of an earlier `state()`. The statistics hold good steps only, so one NaN does not blind them."""

    def __init__(self, engine, zscore, state=None):
        state = {"loss": [], "gradient norm": [], "skipped": 0, "bad": [], "skipped_in_a_row": 0} | (state or {})
        self.engine, self.zscore = engine, zscore
        self.seen = {name: deque(state[name], WINDOW) for name in ("loss", "gradient norm")}
        self.skipped, self.bad = state["skipped"], state["bad"]  # bad: first and last sample of each in a row
        self.skipped_in_a_row = state["skipped_in_a_row"]  # with those in which fp16 looks for its loss scale
        self.loss = self.grad_norm = self.fault = self.judged = None
        for optimizer in optimizers(engine):
            optimizer.step = functools.partial(self.update_if_good, optimizer, optimizer.step)

    def state(self):
        """What a checkpoint records."""
        seen = {name: list(numbers) for name, numbers in self.seen.items()}
        return seen | {"skipped": self.skipped, "bad": self.bad, "skipped_in_a_row": self.skipped_in_a_row}

    def expect(self, loss, grad_norm=None):
        """Before DeepSpeed's step: its loss, over all ranks, and where DeepSpeed finds none, its norm."""
        self.loss, self.grad_norm, self.judged = loss, grad_norm, False

    def update_if_good(self, optimizer, update):
        """In place of an optimizer's `step`, which ZeRO calls once for each group of parameters."""
        if not self.judged:
            self.judge()
        if self.fault is None:
            forget_powers(optimizer)
            update()

    def judge(self):
        """All ranks judge the same numbers, so they agree without another word."""
        if self.grad_norm is None:
            norm = float(self.engine.optimizer._global_grad_norm)
            self.grad_norm = norm if norm >= 0 else math.nan  # DeepSpeed's -1 stands for either
        self.fault, self.judged = None, True
        for name, value in (("loss", self.loss), ("gradient norm", self.grad_norm)):
            seen = np.array(self.seen[name])
            if not math.isfinite(value):
                self.fault = f"{name} {value}"
            elif self.zscore and len(seen) >= WINDOW // 2 and seen.std() > 0:
                score = (value - seen.mean()) / seen.std()
                if score > self.zscore:
                    self.fault = f"{name} {value:.4g}, {score:.1f} standard deviations above the last {len(seen)} steps"
            if self.fault:
                return

    def outcome(self, samples):
        """After DeepSpeed's step: what was wrong with it, or None. samples: its first and last."""
        if not self.judged:  # DeepSpeed saw an infinity itself, and did not come as far as the optimizer
            self.grad_norm = math.inf
            self.judge()
        if self.fault is None:
            self.seen["loss"].append(self.loss)
            self.seen["gradient norm"].append(self.grad_norm)
            self.bad, self.skipped_in_a_row = [], 0
            return None
        self.skipped += 1
        self.skipped_in_a_row += 1
        if not (self.engine.fp16_enabled() and math.isfinite(self.loss)):  # fp16 finds its loss scale like this
            self.bad = [*self.bad, list(samples)]
        return self.fault

    def answer(self, step, train, progress=lambda: None):
        """What the config says to do about a bad step: skips it; goes back to the weights of the last whole checkpoint
        and continues with the samples after it (going through those in between once more would end in the same
        weights); or raises SharedError, also where the weights themselves are spoilt, so that no later step can be
        good. Returns what was done, in words. progress: called for each part that is read. Every rank
        must call this."""
        if len(self.bad) >= (1 if train.bad_step == "stop" else train.max_bad_steps):
            raise SharedError(f"step {step}: {self.fault}; bad steps in a row: {len(self.bad)}, {self.remedy(train)}")
        if train.bad_step == "rollback" and self.bad:
            found, state, passed_over = checkpoint.newest_whole(train.out_dir, progress)
            if found:
                checkpoint.load(self.engine, found, state, train.seed, progress)
                return "; ".join([f"passed over, and back to the weights of {found}", *passed_over])
        if not math.isfinite(self.loss):
            everyone = [None] * distributed.get_world_size()
            distributed.all_gather_object(everyone, first_not_finite(self.engine, progress))
            if found := next(filter(None, everyone), None):
                found = f"step {step}: {self.fault}, and {found} holds a NaN or an infinity"
                raise SharedError(checkpoint.not_finite(found, Path(train.out_dir) / "checkpoints"))
        return "passed over"

    def check_end(self, step, train):
        """At the end of a run, after its last step and save: raises SharedError, on all ranks, if its last steps were
        bad, so that nobody takes the run for a good one. fp16 skips a step now and then to find its loss scale:
        there, only if it skipped max_bad_steps in a row, or every step of the run."""
        if self.bad or self.skipped_in_a_row >= min(step, train.max_bad_steps):
            count = len(self.bad) or self.skipped_in_a_row
            raise SharedError(f"step {step}, the last: {self.fault}; bad steps in a row: {count}, {self.remedy(train)}")

    def remedy(self, train):
        """The rest of a line on bad steps. Every rank must call this."""
        samples = ", ".join(f"{first} to {last}" for first, last in self.bad) or "that overflowed in fp16"

        def last_ones():
            saved = checkpoint.Saved(Path(train.out_dir) / "checkpoints")
            if saved.latest is None:
                return "no checkpoint was saved"
            if saved.last_good is None:
                return f"the last checkpoint is {saved.latest}, and none was saved before those steps"
            before = "" if saved.last_good == saved.latest else f", the last from before those steps {saved.last_good}"
            return f"the last checkpoint is {saved.latest}{before}"

        last = checkpoint.as_rank_0(last_ones)
        return f"of samples {samples}; none reached the weights; {last}; look at the data, or lower train.lr"
