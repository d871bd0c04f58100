"""The curves of runs, read from their metrics.jsonl, smoothed and thinned; plot.py draws them."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from minzero.adapters import count_adapters
from minzero.config.build import build
from minzero.config.hints import rename_old_keys
from minzero.errors import UserError
from minzero.files import read_json
from minzero.metrics import OF_TASKS, good_lines
from minzero.nearest import suggesting
from minzero.sizes import flops_per_token

LARGEST = 1e100  # a larger number is not drawn, like an infinity
MOST_POINTS = 2000  # of a raw curve: about as many as a panel has pixels
SMOOTHED_POINTS = 500  # of a smoothed curve
PANELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "expert_load_max": "busiest expert's load",  # over an equal share
    "reward_accuracy": "reward accuracy",  # the part of the pairs whose preferred answer has the higher reward
    "reward_margin": "reward margin",
    "bits_per_byte": "task bits per byte",
    "accuracy": "task accuracy",
}
ONLY_OF_SOME = ("expert_load_max", "reward_accuracy", "reward_margin")  # panels of runs with experts, or of pairs
# panels with a curve a task: of the first of these metrics that it has
TASK_PANELS = {"bits_per_byte": ("bits_per_byte",), "accuracy": ("acc_norm", "acc")}
VALIDATION = {"reward_accuracy": "val_accuracy", "reward_margin": "val_margin"}  # what is drawn into the same panel


def panels_of(runs):
    """{key of PANELS: its title} of those that these runs have: the experts' only where there are experts."""
    return {key: title for key, title in PANELS.items() if any(has_panel(run, key) for run in runs)}


def has_panel(run, key):
    if key in TASK_PANELS:
        return bool(task_curves(run, key))
    return key not in ONLY_OF_SOME or key in run.curves


def task_curves(run, panel):
    """{name of a task of train.eval_tasks: (x, y)} of one of TASK_PANELS."""
    found = {}
    for metric in TASK_PANELS[panel]:
        for key, curve in run.curves.items():
            if key.startswith(OF_TASKS) and key.endswith(f"_{metric}"):
                found.setdefault(key[len(OF_TASKS) : -len(metric) - 1], curve)
    return found


# -- reading runs --------------------------------------------------------------------------------


@dataclasses.dataclass
class RunCurves:
    """The data of a run that is drawn."""

    folder: Path
    name: str
    lines: list  # of its metrics.jsonl
    curves: dict  # key -> (x, y), in the order of the steps; null is NaN; of a step written twice the last line counts
    bad_steps: np.ndarray  # their x
    seconds: float  # spent in steps
    skipped: int  # lines of metrics.jsonl that train.py would not write


def read_runs(folders, x="tokens"):
    """The curves of several runs; x as in `read_run`. Raises UserError, also for a folder without metrics."""
    runs = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        run = read_run(folder, x, name)
        if not run.lines:
            none = f"; none of the {run.skipped} lines there is one" if run.skipped else ""
            with suggesting(run.folder, is_run):
                raise UserError(
                    f"{run.folder}: no metrics.jsonl with lines{none}; expected the folder of a run, as out/tiny"
                )
        runs.append(run)
    return runs


def is_run(folder):
    """Whether a folder is that of a run."""
    return (Path(folder) / "metrics.jsonl").is_file()


def read_config(run):
    """A run's config.json, or, where that is damaged, what its latest checkpoint records of it. Raises UserError if
    there is neither."""
    path = Path(run) / "config.json"
    try:
        config = read_json(path)
        for section in ("model", "data", "train", "deepspeed"):
            if not isinstance(config, dict) or not isinstance(config.get(section), dict):
                raise UserError(f"{path}: no section {section}")
    except UserError as error:
        from minzero.checkpoint_folder import Saved  # these take seconds to import
        from minzero.checkpoint_state import state_if_whole

        for entry in reversed(Saved(Path(run) / "checkpoints").entries):
            if state := state_if_whole(entry.path):
                return state | {"deepspeed": {}} | state["config"]
        raise UserError(f"{error}; expected the config.json that train.py writes") from None
    versions = config.get("versions")
    config, _ = rename_old_keys(config, path)
    if not isinstance(versions, dict):
        versions = {}
    return config | {"versions": versions}


def read_config_if_whole(run):
    """As `read_config`, but {} if there is none: damage to a file that train.py can write again stops no page."""
    try:
        return read_config(run)
    except UserError:
        return {}


def number_of(line, key, default=math.nan):
    """The number of that name in a line of metrics.jsonl, or the default if it has none that can be drawn."""
    value = line.get(key)
    if value is None or not abs(value) <= LARGEST:
        return default
    return value


def read_run(folder, x="tokens", name=None):
    """The curves of a run. x: "tokens", "flops" (of the model) or "time" (seconds spent in steps, without evaluating
    and saving). name: shown in legends, by default the folder's name.
    Raises UserError for "flops" of a run without a readable config.json."""
    folder = Path(folder)
    scale = 1
    if x == "flops":
        found = read_config(folder)
        config = build(
            {name: found.get(name, {}) for name in ("model", "lora")}, folder / "config.json", together=False
        )
        attended = number_of(found, "attended_tokens", None)
        scale = flops_per_token(config.model, attended, count_adapters(config.model, config.lora))
    lines, skipped = good_lines(folder)
    drawn = {"loss", "val_loss", *PANELS, *VALIDATION.values()}
    points = {}  # key -> {step: (x, y)}
    bad_steps = []
    seconds = 0.0
    last_step = 0
    for line in lines:
        if "step_seconds" in line:  # the mean over the steps since the last such line
            seconds += number_of(line, "step_seconds", 0) * max(0, line["step"] - last_step)
            last_step = line["step"]
        place = seconds if x == "time" else float(line.get("tokens") or 0) * scale
        if "bad_step" in line:
            bad_steps.append(place)
        for key in line:
            if key in drawn or key.startswith(OF_TASKS):
                points.setdefault(key, {})[line["step"]] = (place, number_of(line, key))
    curves = {}
    for key, by_step in points.items():
        in_order = [point for _, point in sorted(by_step.items())]
        curves[key] = tuple(np.array(in_order, dtype=float).T)
    return RunCurves(folder, name or folder.name, lines, curves, np.array(bad_steps), seconds, skipped)


def names_of(folders):
    """A short name for each run, long enough to tell them apart."""
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}" for name in names]


# -- curves --------------------------------------------------------------------------------------


def smooth(values, half, places=None):
    """A centred moving average, which follows the raw curve without lag.

    The window (Hann's) reaches `half` points to both sides. Near the start it is narrower, a quarter of the way to the
    first point, so that it stays symmetric and follows the steep fall of a loss. Near the end, where the right side is
    cut off, it is longer on the left, and a straight line is fitted in it instead of a constant (Cleveland 1979, LOESS
    of degree 1).
    Values that are not finite are replaced by a line between their neighbours; before the first and after the last
    finite one the average is NaN. places: the indices at which the average is computed, by default all."""
    values = np.asarray(values, dtype=float)
    if places is None:
        places = np.arange(len(values))
    averages = np.full(len(places), np.nan)
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) == 0:
        return averages
    first = finite[0]
    last = finite[-1]
    filled = np.interp(np.arange(len(values)), finite, values[finite])
    for number, place in enumerate(places):
        if not first <= place <= last:
            continue
        reach = min(half, (place - first) // 4)
        right = min(reach, last - place)
        left = min(2 * reach - right, place - first)
        window = filled[place - left : place + right + 1]
        offsets = np.arange(-left, right + 1)
        weights = np.cos(0.5 * math.pi * offsets / (left + 1)) ** 2
        if left == right:
            averages[number] = np.average(window, weights=weights)
        else:
            line = np.polyfit(offsets, window, 1, w=np.sqrt(weights))
            averages[number] = line[1]  # its height at `place`
    return averages


def smoothed_curve(x, y):
    """(x, y) of at most SMOOTHED_POINTS points of a smoothed curve; the same curve if it has too few points."""
    half = len(y) // 40
    if half == 0:
        return x, y
    places = np.unique(np.linspace(0, len(y) - 1, SMOOTHED_POINTS).round().astype(int))
    return x[places], smooth(y, half, places)


def thin(x, y, most=MOST_POINTS):
    """At most that many points that look the same: the lowest and the highest of each stretch, so that no spike is
    lost."""
    if len(x) <= most:
        return x, y
    kept = set()
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        values = np.where(np.isfinite(y[stretch]), y[stretch], np.nan)
        if not np.isnan(values).all():
            kept |= {stretch[np.nanargmin(values)], stretch[np.nanargmax(values)]}
    kept = sorted(kept)
    return x[kept], y[kept]


def last_finite(values):
    """The last finite value, or None."""
    finite = values[np.isfinite(values)]
    return finite[-1] if len(finite) else None
