"""Measured runs in place of assumptions: plan.py --measured RUN, or the JSON file of benchmark.py or benchmarks/gpu.py.

What a run's steps took is compared with what the planner says of the same settings, and the constants of `speed.Code`
are scaled until both agree: for other settings too, on the same card.
"""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from minzero.cards import CPU, card_of_device
from minzero.config.build import build
from minzero.errors import UserError
from minzero.files import is_number
from minzero.metrics import read_metrics
from minzero.planner.gpus import Hardware
from minzero.planner.memory import replayed
from minzero.planner.settings import Settings, settings_as_run
from minzero.planner.speed import Assumptions, code_on, step_time

# The constants of Code that are scaled together: what a measurement cannot tell apart stays in proportion.
TOGETHER = (
    ("pace",),
    ("host_compiled", "host_eager", "host_zero12", "host_zero3", "host_step"),
    ("optimizer_bytes", "cpu_adam_bytes"),
)
# What a factor costs, rather than an error that it takes away: the square of its logarithm, against the square of a
# relative error of a step's time.
COST = 0.02


class Seen(NamedTuple):
    """One measured setting."""

    settings: Settings
    hardware: Hardware
    seconds: float  # of a step, the median
    optimizer: float | None  # of it, in the optimizer's step; None: not known


def measured_code(path, assumptions=None):
    """(the Code by which measured steps take as long as they did, the Card that they ran on). path: the folder of a run
    or a benchmark's JSON file. Raises UserError where nothing measured is found."""
    path = Path(path)
    seen = list(seen_in_rows(path) if path.is_file() else seen_in_run(path))
    if not seen:
        raise UserError(f"--measured: {path}: no row with a measured step; expected rows of benchmark.py")
    cards = {one.hardware.card.name for one in seen}
    if len(cards) > 1:
        raise UserError(f"--measured: {path}: found several cards ({', '.join(sorted(cards))}), expected one")
    code = calibrated(seen, assumptions or Assumptions())
    return dataclasses.replace(code, source=str(path)), seen[0].hardware.card


# ---- reading


def seen_in_run(folder):
    """The run of train.py in this folder: the median of the later half of its steps, which leaves out the first ones
    and those before a change of its settings."""
    try:
        made = json.loads((folder / "config.json").read_text())
        lines = [line for line in read_metrics(folder) if line.get("step_seconds")]
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f"--measured: {folder}: {error}; expected the folder of a run of train.py, or a benchmark's JSON file"
        ) from None
    lines = lines[len(lines) // 2 :]
    if not lines:
        raise UserError(f"--measured: {folder}/metrics.jsonl: no step with its time; let the run log some steps")
    optimizer = [line["optimizer_seconds"] for line in lines if line.get("optimizer_seconds") is not None]
    seconds = statistics.median(line["step_seconds"] for line in lines)
    yield seen_of(made, seconds, statistics.median(optimizer) if optimizer else None, folder)


def seen_in_rows(file):
    """The rows of a benchmark that have the configuration that they ran."""
    try:
        rows = json.loads(file.read_text())["rows"]
        rows = list(rows.values() if isinstance(rows, dict) else rows)
        found = [(row["config"], row["all_step_seconds"]) for row in rows if row.get("config")]
        found = [(made, seconds) for made, seconds in found if seconds]  # a row that failed has none
        found = [(made, statistics.median(seconds)) for made, seconds in found]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--measured: {file}: expected a run's folder, or JSON of benchmark.py with its rows") from None
    for made, seconds in found:
        yield seen_of(made, seconds, None, file)


def seen_of(made, seconds, optimizer, source):
    """The Seen of a run. made: its config.json. Raises UserError for a card that is not known, or another file."""
    try:
        sections = {name: made[name] for name in ("model", "train", "deepspeed")}
        sections["lora"] = made.get("lora", {})  # of a run that is older than this section there is none
        device, gpus = made["versions"]["device"], made["world_size"]
        check_made(made, device, gpus)
        settings = settings_as_run(build(sections, str(source)), gpus, made)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--measured: {source}: not the config.json of a run: {error}") from None
    except UserError as error:  # a key that today's code does not know
        raise UserError(f"--measured: {error}") from None
    if not (is_number(seconds) and 0 < seconds < math.inf):
        raise UserError(f"--measured: {source}: found a step of {seconds} seconds, expected a number above 0")
    card = CPU if device == "cpu" else card_of_device(device)
    if card is None:
        raise UserError(f"--measured: {source}: measured on {device}, which docs/planner.md's table does not have")
    nodes = -(-gpus // card.node_gpus)
    return Seen(settings, Hardware(gpus, nodes, card.memory, card), seconds, optimizer)


def check_made(made, device, gpus):
    """Raises ValueError where a run's config.json has values that no run leaves there."""
    if not isinstance(device, str):
        raise ValueError(f"versions.device {device!r}")
    if type(gpus) is not int or gpus < 1:
        raise ValueError(f"world_size {gpus!r}")
    if made["stage"] not in (0, 1, 2, 3):
        raise ValueError(f"stage {made['stage']!r}")
    if made["precision"] not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"precision {made['precision']!r}")


# ---- scaling


def calibrated(measured, assumptions):
    """The Code with which these Seen take as long as they did: one factor for each group of TOGETHER, found by trying
    larger and smaller ones in turn, with smaller changes as none helps."""
    card = measured[0].hardware.card
    code = code_on(card)
    engines = [replayed(one.settings) for one in measured]
    logarithms = [0.0] * len(TOGETHER)

    def scaled(logarithms):
        factors = {}
        for names, logarithm in zip(TOGETHER, logarithms, strict=True):
            factors |= {name: getattr(code, name) * math.exp(logarithm) for name in names}
        return dataclasses.replace(code, **factors)

    def badness(logarithms):
        found = scaled(logarithms)
        total = 0.0
        for one, engine in zip(measured, engines, strict=True):
            total += square_of_error(step_time(one.settings, engine, one.hardware, assumptions, found), one)
        # on a CPU all is done by the same cores, and a slower one is slower at everything
        usual = statistics.mean(logarithms) if card.is_cpu else 0
        return total / len(measured) + COST * sum((logarithm - usual) ** 2 for logarithm in logarithms)

    # in small steps, so that what binds the step is scaled, and not what would bind it if it were far slower
    size, least = 0.125, badness(logarithms)
    while size > 1e-3:
        tried = [[x + step for x in logarithms] for step in (size, -size)]  # all alike
        for place in range(len(logarithms)):
            for step in (size, -size):
                tried.append([x + step * (number == place) for number, x in enumerate(logarithms)])
        best = min(tried, key=badness)
        if badness(best) < least:
            logarithms, least = best, badness(best)
        else:
            size /= 2
    return scaled(logarithms)


def square_of_error(step, one):
    """Of a StepTime against a Seen, relative to the step. Where the optimizer's share is known, that is compared
    too."""
    error = (math.log(step.seconds / one.seconds)) ** 2
    if one.optimizer is not None:
        error += ((step.optimizer + step.offload - one.optimizer) / one.seconds) ** 2
    return error
