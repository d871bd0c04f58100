"""The learning-rate range test: one short run whose rate rises exponentially, the loss over the rate, a peak rate.

Smith 2015 (arXiv 1506.01186), as fast.ai's lr_find has it, which reads the rate off where the smoothed loss falls
fastest, or as a tenth of where it is lowest. The average here is centred (curves.py): one that only looks back shows
both at higher rates than they are.
"""

import math
from typing import NamedTuple

import numpy as np

from minzero.config.sections import OF_A_LONG_RUN, TrainConfig
from minzero.curves import smooth
from minzero.errors import UserError
from minzero.metrics import read_metrics

SPAN = 1e-3  # the first rate over the last
HALF = 1 / 20  # of the steps, that the average reaches to both sides
SKIPPED = 0.1  # of the steps at the start, in which the average has little to go by
RISE = 0.02  # of the fall of the loss, by which it must rise again before its minimum is one
LEAST_STEPS = 30
NOT_OF_A_TEST = (*OF_A_LONG_RUN, "profile", "resume", "spike_zscore", "decay_tokens", "decay_shape")
OF_THE_TEST = ("schedule", "min_lr_ratio", "warmup_tokens", "log_every", "bad_step", "max_bad_steps")
OF_THE_TEST += ("eval_every", "save_every", "save_best")
# keys of the train section that the test sets, so that its command line takes none: what sets them
SET_BY_TEST = {"out_dir": "--out sets", "max_tokens": "--steps sets"}
SET_BY_TEST |= dict.fromkeys((*NOT_OF_A_TEST, *OF_THE_TEST), "the range test sets")


class Found(NamedTuple):
    """What a range test says."""

    rates: np.ndarray  # of each step
    losses: np.ndarray
    smoothed: np.ndarray
    steepest: float  # the rate at which the smoothed loss falls fastest, over ln rate
    lowest: float  # the rate at which it is lowest
    rises: bool  # whether it rises again after that
    suggested: float
    why: str


def train_keys(config, out_dir, highest, steps):
    """The keys of the train section of the run: of the config's own those that shape a step, and nothing of a longer
    run, its copies and its other schedule. Muon's rate rises with AdamW's. Raises UserError for a rate of zero."""
    train = config.train
    if not highest:
        raise UserError(
            "train.lr: found 0, expected a rate above it, from which the test's is 30 times; or give --highest"
        )
    defaults = TrainConfig()
    keys = {name: getattr(defaults, name) for name in NOT_OF_A_TEST}
    if train.optimizer == "muon":
        keys["muon_lr"] = min(10.0, train.muon_lr * highest / train.lr) if train.lr else train.muon_lr
    return keys | {
        "out_dir": str(out_dir),
        "schedule": "range",
        "lr": highest,
        "min_lr_ratio": SPAN,
        "warmup_tokens": 0,
        "max_tokens": steps * train.global_batch_tokens,
        "log_every": 1,
        "eval_every": 0,
        "save_every": 0,
        "save_best": False,
        "bad_step": "skip",
        "max_bad_steps": steps,
    }


def read_curve(folder):
    """(rates, losses) of a run's steps, up to the first whose loss is no number. Raises UserError for too few."""
    lines = [line for line in read_metrics(folder) if "loss" in line and "lr" in line]
    rates, losses = [], []
    for line in lines:
        if line["loss"] is None or not math.isfinite(line["loss"]):
            break
        rates.append(line["lr"])
        losses.append(line["loss"])
    if len(rates) < LEAST_STEPS:
        raise UserError(
            f"{folder}: found {len(rates)} steps with a loss, expected at least {LEAST_STEPS}; lower --highest"
        )
    return np.array(rates), np.array(losses)


def suggest(rates, losses):
    """The Found of a curve. The suggestion is a tenth of the rate at which the smoothed loss is lowest, because beyond
    that it rises: a run stays at its peak rate for long, which asks for room. Where the loss does not rise, it is the
    rate at which it falls fastest, which is only known to be safe."""
    curve = smooth(losses, max(1, round(HALF * len(losses))))
    first = int(SKIPPED * len(curve))
    logs = np.log(rates)
    place = first + int(np.argmin(curve[first:]))
    fall = curve[first] - curve[place]
    rises = bool(fall > 0 and curve[place:].max() - curve[place] > RISE * fall)
    until = max(place, first + 2)
    slopes = np.gradient(curve, logs)
    steepest = first + int(np.argmin(slopes[first : until + 1]))
    lowest = float(rates[place])
    if rises:
        suggested, why = lowest / 10, f"a tenth of {lowest:.3g}, where the loss is lowest; beyond that it rises"
    else:
        suggested = float(rates[steepest])
        why = (
            f"where the loss falls fastest; it does not rise up to the highest rate, {rates[-1]:.3g}: a higher "
            "--highest would say more"
        )
    return Found(rates, losses, curve, float(rates[steepest]), lowest, rises, float(f"{suggested:.2g}"), why)


def draw(found, picture):
    """The loss over the rate."""
    from minzero.plot import pyplot, save

    figure, axes = pyplot().subplots(figsize=(8, 4.8), layout="constrained")
    axes.plot(found.rates, found.losses, color="C0", alpha=0.35, linewidth=0.8, label="loss of each step")
    axes.plot(found.rates, found.smoothed, color="C0", linewidth=1.8, label="smoothed")
    axes.axvline(found.steepest, color="C1", linestyle="--", label=f"falls fastest: {found.steepest:.2g}")
    if found.rises:
        axes.axvline(found.lowest, color="C3", linestyle=":", label=f"lowest, then rises: {found.lowest:.2g}")
    axes.axvline(found.suggested, color="C2", label=f"suggested: {found.suggested:.2g}")
    seen = found.losses[np.isfinite(found.losses)]
    top = max(seen[: max(1, len(seen) // 20)].max(), float(np.percentile(seen, 50)))
    bottom = found.smoothed.min()
    axes.set_ylim(min(bottom, seen.min()) - 0.05 * (top - bottom), top + 0.15 * (top - bottom))
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9)
    save(figure, picture)
