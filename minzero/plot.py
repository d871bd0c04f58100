"""Pictures of runs. matplotlib, which takes a second to import, is imported on use."""

import dataclasses
import io
import math

import numpy as np

from minzero.curves import (
    PANELS,
    TASK_PANELS,
    VALIDATION,
    has_panel,
    last_finite,
    names_of,
    panels_of,
    read_run,
    smoothed_curve,
    task_curves,
    thin,
)
from minzero.errors import UserError, one_line
from minzero.files import write_atomically

X_LABELS = {"tokens": "tokens", "flops": "model FLOPs", "time": "training time"}
LOSS_LABEL = "loss (nats per token)"
NOISY = (
    "grad_norm",
    "tokens_per_second",
    "expert_load_max",
    *VALIDATION,
)  # drawn smoothed over the raw curve, as the loss is

# Runs are told apart by colour and dashes. The numbers of colours and dashes have no common divisor, so each of the
# first 36 runs has a pair of its own.
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")  # C7 is grey, which the legend uses
DASHES = ((), (5, 2.5), (1, 1.5), (6, 1.5, 1, 1.5))  # in line widths, drawn and not drawn
MARKERS = "osD^v<>"


def pyplot():
    """matplotlib.pyplot, set up to draw into files on machines without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# -- axes and styles -----------------------------------------------------------------------------


@dataclasses.dataclass
class Style:
    """The look of one run in every panel."""

    color: str
    dashes: tuple  # in line widths, drawn and not drawn in turn; () is solid
    width: float  # points
    marker: str
    marker_size: float  # points
    raw_alpha: float

    @property
    def linestyle(self):
        return (0, self.dashes) if self.dashes else "-"


def styles_of(count):
    """A Style for each run. Later runs are drawn over earlier ones with thinner, dashed lines and smaller markers, so
    of runs with equal numbers each stays visible."""
    widest = 3.0 if count <= 3 else 2.4
    styles = []
    for number in range(count):
        rank = number / (count - 1) if count > 1 else 0.5  # 0 for the first run, 1 for the last
        style = Style(
            color=COLORS[number % len(COLORS)],
            dashes=DASHES[number % len(DASHES)],
            width=1.8 if count == 1 else widest - (widest - 1.3) * rank,
            marker=MARKERS[number % len(MARKERS)],
            marker_size=7 - 3 * rank,
            raw_alpha=max(0.15, 0.45 / math.sqrt(count)),
        )
        styles.append(style)
    return styles


def hex_color(color):
    """A colour of COLORS as HTML has it."""
    from matplotlib.colors import to_hex

    return to_hex(color)


def time_unit(seconds):
    """The unit that fits a time axis of this length: (its name, its length in seconds)."""
    if seconds < 180:
        return "seconds", 1
    if seconds < 180 * 60:
        return "minutes", 60
    if seconds < 72 * 3600:
        return "hours", 3600
    return "days", 24 * 3600


def x_axis(runs, x):
    """(label, how many of the runs' x are one unit of the axis)."""
    if x != "time":
        return X_LABELS[x], 1
    unit, length = time_unit(max((run.seconds for run in runs), default=0))
    return f"{X_LABELS[x]} ({unit})", length


def count_formatter():
    """Ticks of tokens as 500, 2.5K, 10M, 1.5B, 2T."""
    from matplotlib.ticker import EngFormatter

    class CountFormatter(EngFormatter):
        ENG_PREFIXES = {0: "", 3: "K", 6: "M", 9: "B", 12: "T"}

    return CountFormatter(sep="")


def set_up_axes(axes, x, xlabel, ylabel):
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if x == "tokens":
        axes.xaxis.set_major_formatter(count_formatter())
    elif x == "flops":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend_text(name):
    """A run's name as matplotlib shows it unchanged: it hides what begins with _ and reads $ as mathematics."""
    name = one_line(name)  # there are no glyphs for the rest
    if name.startswith("_"):
        name = " " + name
    return name.replace("$", r"\$")


# -- panels --------------------------------------------------------------------------------------


def draw_smoothed(axes, x, y, style, label=None):
    """A raw curve, thin and pale, and over it the smoothed one. Returns whether it was smoothed: a curve of few points
    is drawn once, as it is."""
    smooth_x, smooth_y = smoothed_curve(x, y)
    is_smoothed = smooth_y is not y
    if is_smoothed:
        axes.plot(*thin(x, y), color=style.color, alpha=style.raw_alpha, linewidth=0.6)
    look = {"color": style.color, "linestyle": style.linestyle, "linewidth": style.width, "label": label}
    if len(x) < 5:  # a line needs two points
        look |= {"marker": style.marker, "markersize": style.marker_size}
    axes.plot(smooth_x, smooth_y, **look)
    return is_smoothed


def loss_label(run):
    """A run's entry in the legend: its name and the last value of each curve."""
    last_values = []
    if "loss" in run.curves:
        _, smoothed = smoothed_curve(*run.curves["loss"])
        last_values.append(("training", last_finite(smoothed)))
    if "val_loss" in run.curves:
        last_values.append(("validation", last_finite(run.curves["val_loss"][1])))
    texts = [f"{title} {value:.3f}" for title, value in last_values if value is not None]
    if not texts:
        return run.name
    return f"{run.name}: {', '.join(texts)}"


def draw_loss(axes, runs, x, begin=-math.inf):
    """Training loss, raw and smoothed, validation loss as markers, and a cross for each bad step. Returns the kinds of
    curves that are there. A spike that towers above the rest is cut off, so that it hides nothing.
    begin: the x from which on the loss is shown, as `detail_begin` returns it."""
    xlabel, unit = x_axis(runs, x)
    heights = []
    kinds = set()
    for number, (run, style) in enumerate(zip(runs, styles_of(len(runs)), strict=True)):
        label = legend_text(loss_label(run))
        if "loss" in run.curves:
            place, loss = run.curves["loss"]
            is_smoothed = draw_smoothed(axes, place / unit, loss, style, label)
            heights += heights_to_show(place, loss, begin)
            kinds |= {"training", "smoothed"} if is_smoothed else {"training"}
            label = None
        if "val_loss" in run.curves:
            place, loss = run.curves["val_loss"]
            line = axes.plot(*thin(place / unit, loss), color=style.color, label=label)[0]
            line.set(marker=style.marker, markersize=style.marker_size, markerfacecolor="none")
            line.set_linewidth(0.9 if len(runs) <= 4 else 0)  # more lines would hide the training loss
            line.set_markevery(math.ceil(len(line.get_xdata()) / 25) or 1)
            heights.append(loss[place >= begin])
            kinds.add("validation")
        if len(run.bad_steps):
            crosses = run.bad_steps[:: math.ceil(len(run.bad_steps) / 200)] / unit
            row = np.full(len(crosses), 0.03 + 0.025 * (number % 8))  # of the axes' height: each run has its own
            axes.plot(crosses, row, "x", color=style.color, markersize=5, transform=axes.get_xaxis_transform())
            kinds.add("bad step")
    if begin > -math.inf:
        end = max(run.curves["loss"][0][-1] for run in runs if "loss" in run.curves)
        axes.set_xlim((begin - 0.03 * (end - begin)) / unit, (end + 0.03 * (end - begin)) / unit)
    of_pairs = any("reward_accuracy" in run.curves for run in runs)
    set_up_axes(axes, x, xlabel, "loss" if of_pairs else LOSS_LABEL)
    limit_heights(axes, heights, room_below=0.12 if "bad step" in kinds else 0.06)
    return kinds


def heights_to_show(place, loss, begin=-math.inf):
    """Arrays of the values of a training loss that must be inside the picture: nearly all of it, and its start."""
    smooth_place, smoothed = smoothed_curve(place, loss)
    smoothed = smoothed[np.isfinite(smoothed) & (smooth_place >= begin)]
    loss = loss[np.isfinite(loss) & (place >= begin)]
    if len(smoothed) == 0 or len(loss) == 0:
        return []
    start = smoothed[: max(1, len(smoothed) // 20)]
    calm = smoothed[smoothed <= np.percentile(smoothed, 98)]
    return [start, calm, np.percentile(loss, [2, 98])]


def limit_heights(axes, heights, room_below):
    """Fit the vertical axis to these values. room_below: as a share of their range, for crosses."""
    heights = np.concatenate(heights) if heights else np.array([])
    heights = heights[np.isfinite(heights)]
    if len(heights) == 0:
        axes.text(0.5, 0.5, "no numbers to draw", transform=axes.transAxes, ha="center", color="gray")
        axes.set(xticks=[], yticks=[])
    elif heights.max() > heights.min():
        size = heights.max() - heights.min()
        axes.set_ylim(heights.min() - room_below * size, heights.max() + 0.06 * size)


def detail_begin(runs):
    """The x from which on a second picture of the loss is worth it, or None if it is not. The loss falls so far at
    the start of a run that later differences are hard to see on the same scale."""
    curves = [run.curves["loss"] for run in runs if "loss" in run.curves]
    ends = [place[-1] for place, _ in curves]
    if not ends or max(len(place) for place, _ in curves) < 20:
        return None
    begin = max(0.5 * min(ends), 0.1 * max(ends))
    whole = [height for place, loss in curves for height in heights_to_show(place, loss)]
    later = [height for place, loss in curves for height in heights_to_show(place, loss, begin)]
    if not later or np.ptp(np.concatenate(later)) >= 0.3 * np.ptp(np.concatenate(whole)):
        return None
    return begin


def explain_kinds(axes, kinds):
    """Entries of the legend, in grey, that say what each kind of curve means."""
    looks = {
        "training": {"linewidth": 1.8},
        "validation": {"linewidth": 0.9, "marker": "o", "markerfacecolor": "none", "markersize": 5},
        "bad step": {"linestyle": "", "marker": "x", "markersize": 5},
    }
    if "smoothed" in kinds:
        axes.plot([], [], color="gray", alpha=0.6, linewidth=0.6, label="training, each logged step")
    for kind, look in looks.items():
        if kind in kinds:
            label = "training, smoothed" if kind == "training" and "smoothed" in kinds else kind
            axes.plot([], [], color="gray", label=label, **look)


def draw_panel(axes, runs, x, key):
    """A curve of each run. key: of PANELS."""
    xlabel, unit = x_axis(runs, x)
    if key in TASK_PANELS:
        draw_tasks(axes, runs, unit, key)
        set_up_axes(axes, x, xlabel, PANELS[key])
        return
    shown = []  # of each run, the values that are finite
    for run, style in zip(runs, styles_of(len(runs)), strict=True):
        if key not in run.curves:
            continue
        place, value = run.curves[key]
        if key in NOISY:
            draw_smoothed(axes, place / unit, value, style)
        else:
            look = {"color": style.color, "linestyle": style.linestyle, "linewidth": style.width}
            marker = style.marker if len(place) < 5 else None
            axes.plot(*thin(place / unit, value), marker=marker, markersize=style.marker_size, **look)
        finite = [value[np.isfinite(value)]]
        if VALIDATION.get(key) in run.curves:
            place, value = run.curves[VALIDATION[key]]
            look = {"marker": style.marker, "markersize": style.marker_size, "markerfacecolor": "none"}
            axes.plot(*thin(place / unit, value), color=style.color, linewidth=0.9, **look)
            finite.append(value[np.isfinite(value)])
        if sum(map(len, finite)):
            shown.append(np.concatenate(finite))
    set_up_axes(axes, x, xlabel, PANELS[key])
    set_up_values(axes, key, shown)


def draw_tasks(axes, runs, unit, panel):
    """A curve of each task of each run, where there is one run with a look a task; the curves of several runs have the
    look of their run, and a marker a task. panel: of curves.TASK_PANELS."""
    names = list(dict.fromkeys(name for run in runs for name in task_curves(run, panel)))
    of_runs, of_tasks = styles_of(len(runs)), dict(zip(names, styles_of(len(names)), strict=True))
    for run, of_run in zip(runs, of_runs, strict=True):
        for name, (place, value) in task_curves(run, panel).items():
            style = of_tasks[name] if len(runs) == 1 else of_run
            line = axes.plot(*thin(place / unit, value), color=style.color, linestyle=style.linestyle)[0]
            line.set(marker=of_tasks[name].marker, markersize=4, linewidth=1.3)
            line.set_markevery(math.ceil(len(line.get_xdata()) / 25) or 1)
    for name, style in of_tasks.items():
        color = style.color if len(runs) == 1 else "gray"
        linestyle = style.linestyle if len(runs) == 1 else ""
        label = legend_text(name)
        axes.plot([], [], color=color, linestyle=linestyle, marker=style.marker, markersize=4, label=label)
    axes.legend(fontsize=8, frameon=False, ncols=math.ceil(len(names) / 6))


def set_up_values(axes, key, shown):
    """The vertical axis of a panel. shown: for each run an array of its values."""
    if not shown:
        limit_heights(axes, [], 0)
        return
    values = np.concatenate(shown)
    if key == "reward_accuracy":
        axes.set_ylim(0, 1.05)
    if key in VALIDATION:
        return
    if key == "grad_norm":
        if values.min() > 0 and values.max() > 20 * np.median(values):
            axes.set_yscale("log")
        return
    peaks = [value.max() for value in shown]
    if key == "tokens_per_second":
        axes.yaxis.set_major_formatter(count_formatter())
    elif min(peaks) > 0 and max(peaks) > 20 * min(peaks):  # learning rates of a sweep
        axes.set_yscale("log")
        axes.set_ylim(min(peaks) / 20, 2 * max(peaks))
        return
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if max(peaks) > 0:
        axes.set_ylim(0, 1.08 * max(peaks))


# -- pictures ------------------------------------------------------------------------------------


def check_format(flag, picture):
    """Raise UserError unless the picture's name ends in a format that can be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if picture.suffix[1:] not in formats:
        raise UserError(f"{flag}: {picture}: expected a name that ends in one of .{', .'.join(sorted(formats))}")


def save(figure, picture):
    """Write a figure as a picture in the format that its name ends in, and close it. Raises UserError."""
    content = io.BytesIO()
    figure.savefig(content, format=picture.suffix[1:], dpi=120)
    pyplot().close(figure)
    write_atomically(picture, content.getvalue())


def add_legend(figure, axes):
    """A legend of these axes below the figure, which grows by as much as the legend needs."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = int(figure.get_figwidth() / (0.6 + 0.075 * max(map(len, labels))))  # inches of a line, of a character
    columns = min(max(1, columns), len(labels))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def plot_loss(folders, picture):
    """Draw the loss of one or several runs against tokens, as a picture of its own, and below it the scores of
    train.eval_tasks where there are any. folders: those of the runs."""
    plt = pyplot()
    runs = [read_run(folder, name=name) for folder, name in zip(folders, names_of(folders), strict=True)]
    begin = detail_begin(runs)
    rows = [["loss", "loss"] if begin is None else ["loss", "detail"]]
    of_tasks = [key for key in TASK_PANELS if any(has_panel(run, key) for run in runs)]
    if of_tasks:
        rows.append([of_tasks[0], of_tasks[-1]])
    size = (8 if begin is None else 12, 4.5 + 3 * len(rows[1:]))
    figure, panels = plt.subplot_mosaic(rows, figsize=size, layout="constrained")
    if begin is not None:
        draw_detail(panels["detail"], runs, "tokens", begin)
    for key in of_tasks:
        draw_panel(panels[key], runs, "tokens", key)
    explain_kinds(panels["loss"], draw_loss(panels["loss"], runs, "tokens"))
    add_legend(figure, panels["loss"])
    save(figure, picture)


def draw_detail(axes, runs, x, begin):
    """The loss from an x on, on a scale of its own. begin: as `detail_begin` returns it."""
    draw_loss(axes, runs, x, begin)
    axes.set_title("loss, later part", fontsize="medium")
    axes.set_ylabel("")


def draw_panels(runs, x):
    """A figure with the loss, the learning rate, the gradient norm and the throughput of runs, and where there are
    experts the busiest one's part, or where there are pairs of answers their rewards."""
    begin = detail_begin(runs)
    keys = list(panels_of(runs))
    left = ["loss"] + ["loss" if begin is None else "detail"] * (len(keys) - 1)
    rows = [list(row) for row in zip(left, keys, strict=True)]
    figure, panels = pyplot().subplot_mosaic(
        rows, figsize=(13, max(7.5, 1.9 * len(keys))), width_ratios=[3, 2], layout="constrained"
    )
    explain_kinds(panels["loss"], draw_loss(panels["loss"], runs, x))
    if begin is not None:
        draw_detail(panels["detail"], runs, x, begin)
    for key in keys:
        draw_panel(panels[key], runs, x, key)
    for key in keys[:-1]:
        panels[key].set_xlabel("")  # that of the lowest panel is enough
    add_legend(figure, panels["loss"])
    return figure
