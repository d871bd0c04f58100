"""Pictures of runs, from what they wrote: python plot.py out/a [out/b ...]

python plot.py out/a out/b --x flops --out both.png --html both.html
"""

from minzero.commands import begin
from minzero.errors import one_line

if __name__ == "__main__":
    begin()

import base64
import dataclasses
import html
import io
import json
import math
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from minzero import checkpoint_folder, checkpoint_state
from minzero.commands import run_command
from minzero.config.build import build
from minzero.config.hints import rename_old_keys
from minzero.errors import UserError
from minzero.files import cannot_write, check_can_write, read_json, write_atomically
from minzero.flags import FlagParser, a_path
from minzero.metrics import duration, good_lines
from minzero.sizes import flops_per_token

LARGEST = 1e100  # what is larger is drawn like an infinity: not at all
MOST_POINTS = 2000  # of a curve: about as many as a panel has pixels
X_LABELS = {"tokens": "tokens", "flops": "model FLOPs", "time": "hours of training"}
PANELS = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}


@dataclasses.dataclass
class Run:
    """What is drawn of a run. lines: of its metrics.jsonl; curves: {key: (x, y)} in the order of the steps, null as
    NaN, of a step that stands twice the last; bad: x of the bad steps; seconds:
    spent in steps; passed_over: how many lines are none."""

    folder: Path
    name: str
    lines: list
    curves: dict
    bad: np.ndarray
    seconds: float
    passed_over: int


def read_config(run):
    """A run's config.json, or where that is damaged what its latest checkpoint records of it. Raises UserError if
    there is neither."""
    path, remedy = Path(run) / "config.json", "expected the config.json that train.py writes"
    try:
        config = read_json(path)
        for section in ("model", "data", "train", "deepspeed"):
            if not isinstance(config, dict) or not isinstance(config.get(section), dict):
                raise UserError(f"{path}: no section {section}")
    except UserError as error:
        for entry in reversed(checkpoint_folder.Saved(Path(run) / "checkpoints").entries):
            if state := checkpoint_state.state_if_whole(entry.path):
                return state | {"deepspeed": {}} | state["config"]
        raise UserError(f"{error}; {remedy}") from None
    versions = config.get("versions")
    config, _ = rename_old_keys(config, path)
    return config | {"versions": versions if isinstance(versions, dict) else {}}


def read_config_if_whole(run):
    """As `read_config`, but {} if there is none: no damage to a file that train.py can write again stops a page."""
    try:
        return read_config(run)
    except UserError:
        return {}


def number_of(line, key, otherwise=math.nan):
    """The number of that name in a line, or another where there is none that can be drawn."""
    value = line.get(key)
    return otherwise if value is None or not abs(value) <= LARGEST else value


def read_run(run, x="tokens", name=None):
    """The curves of a run against tokens, model FLOPs, or the time spent in steps (without evaluating and saving).
    Raises UserError for FLOPs of a run without a readable config.json."""
    scale = 1
    if x == "flops":
        path = Path(run) / "config.json"
        scale = flops_per_token(build({"model": read_config(run)["model"]}, path).model)
    lines, passed_over = good_lines(run)
    points, bad, seconds, last_step = {}, [], 0.0, 0
    for line in lines:
        if "step_seconds" in line:
            seconds += number_of(line, "step_seconds", 0) * max(0, line["step"] - last_step)
            last_step = line["step"]
        place = seconds / 3600 if x == "time" else float(line.get("tokens") or 0) * scale
        if "bad_step" in line:
            bad.append(place)
        for key in ("loss", "val_loss", *PANELS):
            if key in line:
                points.setdefault(key, {})[line["step"]] = (place, number_of(line, key))
    curves = {}
    for key, pairs in points.items():
        in_order = [pair for _, pair in sorted(pairs.items())]
        curves[key] = tuple(np.array(in_order, dtype=float).T)
    return Run(Path(run), name or Path(run).name, lines, curves, np.array(bad), seconds, passed_over)


def names_of(runs):
    """Short names, as long as they tell the runs apart."""
    names = [Path(run).name for run in runs]
    names = names if len(set(names)) == len(names) else [str(run) for run in runs]
    return [name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}" for name in names]


def smooth(values, weight):
    """Exponential moving average that ignores what is not finite, corrected for its start."""
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        averages.append(total / norm if norm else math.nan)
    return averages


def thin(x, y, most=MOST_POINTS):
    """At most that many points that look the same: of each stretch the lowest and the highest, so that no spike is
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


def legend_text(name):
    """A run's name as matplotlib shows it unchanged: it hides what begins with _ and reads $ as mathematics."""
    name = one_line(name)  # there are no glyphs for the rest
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def marker(x):
    """A line needs two points; few points are drawn as such."""
    return "." if len(x) < 5 else None


def dress(axes, x, ylabel):
    axes.set(xlabel=X_LABELS[x], ylabel=ylabel)
    if x != "time":
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
    axes.grid(alpha=0.3)


def draw_loss(axes, runs, x):
    """Training loss, raw (pale) and smoothed, validation loss (dashed), and a cross for each bad step. What
    towers above the smoothed curve and nearly all of the raw one is cut off, so that a spike hides nothing."""
    heights, kinds = [], {}
    for number, run in enumerate(runs):
        color, label = f"C{number % 10}", legend_text(run.name)
        if "val_loss" in run.curves:
            place, loss = run.curves["val_loss"]
            finite = loss[np.isfinite(loss)]
            label += f": validation {finite[-1]:.3f}" if len(finite) else ""
            dots = {"marker": "o", "markersize": 4} if len(place) <= 50 else {}
            axes.plot(*thin(place, loss), color=color, linestyle="--", **dots)
            heights.append(finite)
            kinds["validation"] = {"linestyle": "--"} | dots
        if "loss" in run.curves:
            place, loss = run.curves["loss"]
            averages = np.array(smooth(loss, min(0.95, 1 - 1 / max(1, len(loss) / 40))))
            axes.plot(*thin(place, loss), color=color, alpha=0.25, linewidth=0.8)
            axes.plot(*thin(place, averages), color=color, label=label, marker=marker(place))
            heights += [averages, np.nanpercentile(loss, [0, 99])] if np.isfinite(loss).any() else []
            kinds |= {"training": {"alpha": 0.25}, "training, smoothed": {}}
        if len(run.bad):
            crosses = run.bad[:: -(-len(run.bad) // 200)]
            bottom = np.full(len(crosses), 0.03)
            axes.plot(crosses, bottom, "x", color=color, transform=axes.get_xaxis_transform())
            kinds["bad step"] = {"marker": "x", "linestyle": ""}
    for kind, look in sorted(kinds.items()):
        axes.plot([], [], color="gray", label=kind, **look)
    heights = np.concatenate(heights) if heights else np.array([])
    heights = heights[np.isfinite(heights)]
    if len(heights) and heights.max() > heights.min():
        margin = 0.06 * (heights.max() - heights.min())
        axes.set_ylim(heights.min() - 1.5 * margin, heights.max() + margin)
    dress(axes, x, "cross-entropy (nats per token)")


def draw_curve(axes, runs, x, key):
    values = []
    for number, run in enumerate(runs):
        if key in run.curves:
            place, value = run.curves[key]
            axes.plot(*thin(place, value), color=f"C{number % 10}", linewidth=1, marker=marker(place))
            values.append(value[np.isfinite(value)])
    dress(axes, x, PANELS[key])
    values = np.concatenate(values) if values else np.array([])
    if key == "grad_norm" and len(values) and values.min() > 0 and values.max() > 20 * np.median(values):
        axes.set_yscale("log")
    elif key == "tokens_per_second":
        axes.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axes.set_ylim(bottom=0)
    elif key == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_ylim(bottom=0)


def save(figure, picture):
    """Write a figure as a picture in the format that its name ends in. Raises UserError."""
    content = io.BytesIO()
    figure.savefig(content, format=picture.suffix[1:], dpi=120)
    plt.close(figure)
    write_atomically(picture, content.getvalue())


def plot_loss(runs, picture):
    """The loss of one or several runs against tokens, as a picture of its own. runs: their folders."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    draw_loss(axes, [read_run(run, name=name) for run, name in zip(runs, names_of(runs), strict=True)], "tokens")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    save(figure, picture)


def draw_panels(runs, x):
    """A figure with the loss, the learning rate, the gradient norm and the throughput of runs."""
    figure, panels = plt.subplot_mosaic(
        [["loss", key] for key in PANELS], figsize=(13, 7.5), width_ratios=[3, 2], layout="constrained"
    )
    draw_loss(panels["loss"], runs, x)
    for key in PANELS:
        draw_curve(panels[key], runs, x, key)
    handles, labels = panels["loss"].get_legend_handles_labels()
    if handles:
        columns = max(1, 150 // (max(map(len, labels)) + 8))
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns))
    return figure


def facts(run):
    """What a reader wants to know of a run beside its curves: {what: value as text}."""
    config = read_config_if_whole(run.folder)
    steps = [line for line in run.lines if "step_seconds" in line]
    evaluated = [line for line in run.lines if line.get("val_loss") is not None and math.isfinite(line["val_loss"])]
    best = min(evaluated, key=lambda line: line["val_loss"], default=None)
    found = {"folder": str(run.folder)}
    if steps:
        last = steps[-1]
        speeds = [number_of(line, "tokens_per_second", 0) for line in steps]
        memory = max(number_of(line, "peak_memory_bytes", 0) for line in steps)
        found |= {
            "steps": f"{last['step']:,}",
            "tokens": f"{last.get('tokens', math.nan):,}",
            "last training loss": "none" if last.get("loss") is None else f"{number_of(last, 'loss'):.4f}",
            "time in steps": duration(run.seconds),
            "tokens per second (median)": f"{np.median(speeds):,.0f}",
            "MFU (last)": "unknown" if last.get("mfu") is None else f"{number_of(last, 'mfu'):.1%}",
            "peak memory": f"{memory / 2**30:.2f} GiB",
            "bad steps": str(sum("bad_step" in line for line in run.lines)),
        }
    if best:
        found["best validation loss"] = f"{best['val_loss']:.4f} at step {best['step']:,}"
    ranks, versions = config.get("world_size", "?"), config.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    found["ran on"] = f"{ranks} x {versions.get('device')}, {config.get('precision')}, ZeRO-{config.get('stage')}"
    found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "device")
    return found


def settings(run):
    """Every key of the run's config, one deep: {"train.lr": "0.001"}."""
    config = read_config_if_whole(run.folder)
    sections = {name: config.get(name, {}) for name in ("model", "data", "train", "deepspeed")}
    return {f"{section}.{key}": json.dumps(v) for section, content in sections.items() for key, v in content.items()}


def table(rows, names):
    """HTML of a table with a column for each run. rows: a dictionary for each run."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ""
    for key in dict.fromkeys(key for row in rows for key in row):
        cells = "".join(f"<td>{html.escape(row.get(key, ''))}</td>" for row in rows)
        body += f"<tr><th>{html.escape(key)}</th>{cells}</tr>\n"
    return f"<table>\n<tr><th></th>{head}</tr>\n{body}</table>"


def write_page(runs, figure, path):
    """One HTML file that needs nothing else: the picture, the facts of each run, and in what their configs differ."""
    picture = io.BytesIO()
    figure.savefig(picture, format="svg")
    picture = base64.b64encode(picture.getvalue()).decode()
    every = [settings(run) for run in runs]
    different = [key for key in every[0] if any(row.get(key) != every[0][key] for row in every)]
    shown = [{key: row.get(key, "") for key in (different if len(runs) > 1 else row)} for row in every]
    names = [run.name for run in runs]
    title = html.escape(", ".join(names))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.4 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }}
img {{ width: 100% }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: left; overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
<img alt="loss, learning rate, gradient norm and throughput" src="data:image/svg+xml;base64,{picture}">
{table([facts(run) for run in runs], names)}
<h2>{"Settings that differ" if len(runs) > 1 else "Settings"}</h2>
{table(shown, names)}
</body></html>
"""
    try:
        Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise cannot_write(path, error) from None


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("runs", type=a_path, nargs="+", help="run folders, as out/tiny")
    parser.add_argument("--x", choices=X_LABELS, default="tokens", help="what the curves are drawn against")
    parser.add_argument("--out", type=a_path, help="the picture; default: metrics.png in the first run's folder")
    parser.add_argument("--html", type=a_path, help="also a page with the picture and a table of the runs' facts")
    args = parser.parse_args(arguments)
    names = names_of(args.runs)
    runs = [read_run(folder, args.x, name) for folder, name in zip(args.runs, names, strict=True)]
    for run in runs:
        if not run.lines:
            none = f"; none of the {run.passed_over} lines there is one" if run.passed_over else ""
            raise UserError(
                f"{run.folder}: no metrics.jsonl with lines{none}; expected the folder of a run, as out/tiny"
            )
        if run.passed_over:
            print(f"{run.folder}/metrics.jsonl: passed over {run.passed_over} lines that train.py does not write")
    picture = args.out or Path(args.runs[0]) / "metrics.png"
    formats = plt.figure().canvas.get_supported_filetypes()
    if picture.suffix[1:] not in formats:
        raise UserError(f"--out: {picture}: expected a name that ends in one of .{', .'.join(sorted(formats))}")
    if args.html == picture:
        raise UserError(f"--html: {picture}: found the picture's name; choose another")
    for flag, path in (("--out", picture), ("--html", args.html)):
        if path:
            check_can_write(flag, path)
    figure = draw_panels(runs, args.x)
    if args.html:
        write_page(runs, figure, args.html)
    save(figure, picture)
    print(f"{picture}\n{args.html}" if args.html else picture)


if __name__ == "__main__":
    run_command(main)
