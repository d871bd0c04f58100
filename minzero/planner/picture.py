"""The picture of a plan: memory, time and money of every stage, offload and recomputation."""

from minzero.config.deepspeed import check_together
from minzero.errors import UserError
from minzero.planner.gpus import USABLE, GiB
from minzero.planner.replay import PARTS
from minzero.planner.report import in_price, needed_of_node
from minzero.planner.search import CHOICES, RECOMPUTED, with_choice
from minzero.planner.units import TIMES, in_count, in_round_units, in_time, in_units
from minzero.plot import pyplot

LONGEST = 4  # times the shortest time: a longer bar is cut off there
GREY, GREY_TEXT = "0.8", "0.5"  # of what does not fit
RED = "firebrick"  # the number that is too large
OFFLOAD = {"none": "", "optimizer": ", optimizer on CPU", "param": ", optimizer and weights on CPU"}
RECOMPUTATION = {False: "", "selective": ", selective", True: ", recomputed"}


def candidates(config):
    """[(its name, configuration)] of the settings that train.py takes, at the micro-batch of `config`."""
    found = []
    for stage, offload in CHOICES:
        try:
            check_together(with_choice(config, stage, offload, False, 1).deepspeed, config.train.precision)
        except UserError:
            continue  # train.py refuses the rest of the deepspeed section at this stage
        for recompute in RECOMPUTED:
            name = f"stage {stage}{OFFLOAD[offload]}{RECOMPUTATION[recompute]}"
            found.append((name, with_choice(config, stage, offload, recompute, config.train.micro_batch_size)))
    return found


def draw(config, planned, hardware, picture):
    """The `figure_of` as a file. picture: a path; its extension is the format. Raises OSError and ValueError."""
    figure = figure_of(config, planned, hardware)
    figure.savefig(picture, dpi=110)
    pyplot().close(figure)


def figure_of(config, planned, hardware):
    """Bars of one GPU's memory at its peak, by part, and of the time of the run, for every candidate; beside them the
    numbers, the RAM of a node and the cost. planned: configuration -> its plan."""
    plt = pyplot()
    names, plans = zip(*((name, planned(candidate)) for name, candidate in candidates(config)), strict=True)
    height = 2.4 + 0.29 * len(plans)
    figure, (memory, sizes, time, costs) = plt.subplots(
        1, 4, sharey=True, figsize=(15, height), layout="constrained", width_ratios=(5, 1.9, 3, 1.9)
    )
    cut = [draw_memory(memory, plans, hardware), draw_time(time, plans)]
    write_columns(sizes, plans, sizes_of)
    write_columns(costs, plans, costs_of)
    memory.set(yticks=range(len(plans)), yticklabels=names, ylim=(len(plans) - 0.4, -0.6))
    own = planned(config)
    for label, plan in zip(memory.get_yticklabels(), plans, strict=True):
        label.set_color("black" if plan["fits"] else GREY_TEXT)
        label.set_weight("bold" if same_setting(plan, own) else "normal")
    batch = f"micro-batch of {config.train.micro_batch_size} x {config.model.block_size:,} tokens"
    price = "" if hardware.price is None else f", ${hardware.price:g} per GPU hour"
    meanings = {
        "bold: the setting that was planned": any(same_setting(plan, own) for plan in plans),
        "grey: does not fit (red: what is too much)": not all(plan["fits"] for plan in plans),
        "arrow: longer than the axis": any(cut),
    }
    figure.suptitle(
        f"{in_count(own['parameters'])} parameters on {hardware.gpus} x {hardware.gpu}, {batch}, "
        f"{in_count(config.train.max_tokens)} tokens{price}\n"
        + "; ".join(meaning for meaning, is_there in meanings.items() if is_there)
    )
    if any(memory.get_legend_handles_labels()):
        figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=10)
    return figure


def same_setting(plan, other):
    """Whether two plans of one configuration are of one candidate."""
    keys = ("stage", "offload_optimizer", "offload_param", "activation_checkpointing")
    return all(plan[key] == other[key] for key in keys)


def draw_memory(axes, plans, hardware):
    """The parts of a GPU's memory, and its end where that is near. Returns whether a bar is cut off."""
    largest = max(plan["gpu_bytes"] for plan in plans)
    unit, unit_name = (GiB, "GiB") if largest >= GiB else (2**20, "MiB")
    gpu_size = hardware.memory_bytes / unit
    end = min(1.05 * largest / unit, 1.5 * gpu_size)
    left = [0.0] * len(plans)
    for number, part in enumerate(PARTS):
        sizes = [plan["gpu_parts"][part] / unit for plan in plans]
        colors = [f"C{number}" if plan["fits"] else GREY for plan in plans]
        axes.barh(range(len(plans)), sizes, left=left, color=colors, height=0.7)
        seen = [size for size, plan in zip(sizes, plans, strict=True) if plan["fits"] and size > end / 500]
        if seen:
            axes.barh(0, 0, color=f"C{number}", label=part)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    if USABLE * gpu_size < end:
        axes.axvline(gpu_size, color="black", label=f"the GPU: {hardware.gibibytes} GiB")
        axes.axvline(USABLE * gpu_size, color="black", linestyle="--", label=f"can be allocated: {USABLE:.0%}")
        title = "memory of one GPU at its peak"
    else:
        title = f"memory of one GPU at its peak (it has {hardware.gibibytes} GiB)"
    axes.set(xlim=(0, end), xlabel=unit_name, title=title)
    return mark_cut(axes, [plan["gpu_bytes"] / unit for plan in plans], end)


def draw_time(axes, plans):
    """The time of the run. Returns whether a bar is cut off."""
    days = [plan["days"] for plan in plans]
    fitting = [plan["days"] for plan in plans if plan["fits"]]
    end = 86400 * min(1.05 * max(days), LONGEST * min(fitting or days))
    unit, length = next((name, seconds) for name, _, seconds in TIMES if end >= seconds)
    end /= length
    times = [86400 * each / length for each in days]
    fastest = min(fitting, default=None)
    colors = ["C2" if plan["days"] == fastest else "C0" for plan in plans]
    colors = [color if plan["fits"] else GREY for color, plan in zip(colors, plans, strict=True)]
    axes.barh(range(len(plans)), times, color=colors, height=0.7)
    title = "time (green: the fastest that fits)" if fitting else "time, if it did fit"
    axes.set(xlim=(0, end), xlabel=unit, title=title)
    axes.tick_params(axis="y", length=0)
    return mark_cut(axes, times, end)


def mark_cut(axes, lengths, end):
    """An arrow at the end of each bar that is longer than the axis. Returns whether there is one."""
    rows = [row for row, length in enumerate(lengths) if length > end]
    axes.plot([0.988 * end] * len(rows), rows, linestyle="none", marker=">", color="white", markersize=6)
    return bool(rows)


def sizes_of(plan):
    """{head of a column: (text, whether it is within its limit)}."""
    return {
        "a GPU": (in_units(plan["gpu_bytes"]), plan["fits_gpu"]),
        "a node's RAM": (in_round_units(needed_of_node(plan)), plan["fits_cpu"]),
    }


def costs_of(plan):
    """As `sizes_of`."""
    return {"time": (in_time(86400 * plan["days"]), True), "cost": (in_price(plan), True)}


def write_columns(axes, plans, cells_of):
    """Two columns of text in place of a plot. cells_of: plan -> its cells, as `sizes_of`."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    place = {"ha": "right", "fontsize": 9}
    for right, head in zip((0.42, 1), cells_of(plans[0]), strict=True):
        axes.text(right, -0.75, head, va="bottom", **place)
        for row, plan in enumerate(plans):
            text, within = cells_of(plan)[head]
            color = "black" if plan["fits"] else GREY_TEXT
            axes.text(right, row, text, va="center", color=color if within else RED, **place)
