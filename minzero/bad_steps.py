"""Numbers that must not reach the weights: a step with a NaN, an infinity or a spike is not taken."""

import functools
import math
from collections import deque
from pathlib import Path

import numpy as np

from minzero import checkpoint, checkpoint_folder, dist, resume
from minzero.errors import SharedError
from minzero.zero import first_not_finite, grad_norm_of, optimizers, reset_cpu_adam_bias_correction

WINDOW = 128  # good steps that a spike is measured against; half of them must be there


class BadSteps:
    """Keeps a step with a NaN, an infinity or a spike from the weights, the same way at every ZeRO stage and in
    every precision. It is called between DeepSpeed, which computes the norm of the gradient, and the optimizer,
    which would use it. A step that is not taken changes neither weights nor moments.

    In each step: `set_loss` before engine.step(), `result` after it, and `handle` if that returned a fault.

    zscore: train.spike_zscore. state: of an earlier `state()`. The statistics hold good steps only, so that one NaN
    does not hide the next. way_back: a resume.WayBack, for `handle`."""

    def __init__(self, engine, zscore, state=None, way_back=None):
        state = {"loss": [], "gradient norm": [], "skipped": 0, "bad": [], "skipped_in_a_row": 0} | (state or {})
        self.engine = engine
        self.zscore = zscore
        self.way_back = way_back
        self.seen = {name: deque(state[name], WINDOW) for name in resume.WINDOWS}
        self.skipped = state["skipped"]  # in the whole run
        self.bad = state["bad"]  # first and last sample of each bad step in a row
        self.skipped_in_a_row = state["skipped_in_a_row"]  # with those in which fp16 looks for its loss scale
        self.loss = self.grad_norm = self.fault = None
        self.is_checked = None
        self.went_back = False  # whether the last call of `handle` loaded a checkpoint
        for optimizer in optimizers(engine):
            optimizer.step = functools.partial(self.update_if_good, optimizer, optimizer.step)

    def state(self):
        """What a checkpoint records."""
        seen = {name: list(numbers) for name, numbers in self.seen.items()}
        return seen | {"skipped": self.skipped, "bad": self.bad, "skipped_in_a_row": self.skipped_in_a_row}

    def set_loss(self, loss, grad_norm=None):
        """Call before the step's last engine.step(). loss: the mean over all ranks. grad_norm: the gradient's norm,
        where DeepSpeed computes none."""
        self.loss = loss
        self.grad_norm = grad_norm
        self.is_checked = False

    def update_if_good(self, optimizer, update):
        """Replaces an optimizer's `step`, which ZeRO calls once for each group of parameters."""
        if not self.is_checked:
            self.check()
        if self.fault is None:
            reset_cpu_adam_bias_correction(optimizer)
            update()

    def check(self):
        """Set `fault` to the first thing that is wrong with this step's numbers, or None. All ranks check the same
        numbers, so they agree without communication."""
        if self.grad_norm is None:
            self.grad_norm = grad_norm_of(self.engine)
        self.fault = self.fault_of("loss", self.loss) or self.fault_of("gradient norm", self.grad_norm)
        self.is_checked = True

    def fault_of(self, name, value):
        """What is wrong with one number of this step, in words, or None."""
        if not math.isfinite(value):
            return f"{name} {value}"
        seen = np.array(self.seen[name])
        if not self.zscore or len(seen) < WINDOW // 2 or seen.std() == 0:
            return None
        score = (value - seen.mean()) / seen.std()
        if score <= self.zscore:
            return None
        return f"{name} {value:.4g}, {score:.1f} standard deviations above the last {len(seen)} steps"

    def result(self, samples):
        """Call after engine.step(). Returns the fault, or None. samples: the step's first and last."""
        if not self.is_checked:  # DeepSpeed found an infinity itself, and did not call the optimizer
            self.grad_norm = math.inf
            self.check()
        if self.fault is None:
            self.seen["loss"].append(self.loss)
            self.seen["gradient norm"].append(self.grad_norm)
            self.bad = []
            self.skipped_in_a_row = 0
            return None
        self.skipped += 1
        self.skipped_in_a_row += 1
        if not (self.engine.fp16_enabled() and math.isfinite(self.loss)):  # fp16 finds its loss scale like this
            self.bad = [*self.bad, list(samples)]
        return self.fault

    def handle(self, step, train, progress=lambda: None):
        """Apply train.bad_step: skip; roll back to the weights of the last whole checkpoint and continue with later
        samples (repeating the steps since then would lead to the same weights); or raise SharedError. Also raises
        SharedError where the weights themselves are spoilt, so that no later step can be good. Returns what was done,
        in words. progress: called for each part that is read. Every rank must call this."""
        self.went_back = False
        if len(self.bad) >= (1 if train.bad_step == "stop" else train.max_bad_steps):
            raise SharedError(f"step {step}: {self.fault}; bad steps in a row: {len(self.bad)}, {self.remedy(train)}")
        if train.bad_step == "rollback" and self.bad:
            found, state, passed_over = self.way_back.newest(progress)
            if found:
                checkpoint.load(self.engine, found, state, train.seed, progress)
                self.went_back = True
                return "; ".join([f"passed over, and back to the weights of {found}", *passed_over])
        if not math.isfinite(self.loss) and (found := dist.first(first_not_finite(self.engine, progress))):
            found = f"step {step}: {self.fault}, and {found[1]} holds a NaN or an infinity"
            raise SharedError(checkpoint.not_finite(found, Path(train.out_dir) / "checkpoints"))
        return "passed over"

    def check_end(self, step, train):
        """Call after the run's last step and save. Raises SharedError, on all ranks, if its last steps were bad, so
        that nobody takes the run for a good one. fp16 skips a step now and then to find its loss scale: there, only
        if it skipped max_bad_steps in a row, or every step of the run."""
        if self.bad or self.skipped_in_a_row >= min(step, train.max_bad_steps):
            count = len(self.bad) or self.skipped_in_a_row
            raise SharedError(f"step {step}, the last: {self.fault}; bad steps in a row: {count}, {self.remedy(train)}")

    def remedy(self, train):
        """The rest of a line on bad steps. Every rank must call this."""
        samples = ", ".join(f"{first} to {last}" for first, last in self.bad) or "that overflowed in fp16"

        def last_ones():
            saved = checkpoint_folder.Saved(Path(train.out_dir) / "checkpoints")
            if saved.latest is None:
                return "no checkpoint was saved"
            if saved.last_good is None:
                return f"the last checkpoint is {saved.latest}, and none was saved before those steps"
            before = "" if saved.last_good == saved.latest else f", the last from before those steps {saved.last_good}"
            return f"the last checkpoint is {saved.latest}{before}"

        last = checkpoint.as_rank_0(last_ones)
        return f"of samples {samples}; none reached the weights; {last}; look at the data, or lower train.lr"
