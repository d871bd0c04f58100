"""The picture of a plan: memory, time and money of every stage, offload and recomputation."""

from minzero.config.deepspeed import check_together
from minzero.errors import UserError
from minzero.planner.gpus import USABLE, GiB
from minzero.planner.replay import PARTS
from minzero.planner.report import in_price, needed_of_node
from minzero.planner.search import CHOICES, RECOMPUTED, with_choice
from minzero.planner.units import TIMES, in_count, in_time, in_units
from minzero.plot import pyplot

LONGEST = 4  # times the shortest time: a longer bar is cut off there
GREY, RED = "0.55", "firebrick"  # of what does not fit, and of the number that is too large
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
    """Bars of one GPU's memory at its peak, by part, and of the time of the run, for every candidate; beside them the
    numbers, the RAM of a node and the cost. What does not fit is grey. A bar too long for its axis ends in an arrow.
    planned: configuration -> its plan. picture: a path; its extension is the format. Raises OSError and ValueError."""
    plt = pyplot()
    names, plans = zip(*((name, planned(candidate)) for name, candidate in candidates(config)), strict=True)
    height = 2.4 + 0.29 * len(plans)
    figure, (memory, time) = plt.subplots(
        1, 2, sharey=True, figsize=(15, height), layout="constrained", width_ratios=(3, 2)
    )
    draw_memory(memory, plans, hardware)
    draw_time(time, plans)
    memory.set(yticks=range(len(plans)), yticklabels=names, ylim=(len(plans) - 0.4, -0.6))
    own = planned(config)
    for label, plan in zip(memory.get_yticklabels(), plans, strict=True):
        label.set_color("black" if plan["fits"] else GREY)
        label.set_weight("bold" if same_setting(plan, own) else "normal")
    batch = f"micro-batch of {config.train.micro_batch_size} x {config.model.block_size:,} tokens"
    price = "" if hardware.price is None else f", ${hardware.price:g} a GPU and hour"
    figure.suptitle(
        f"{in_count(own['parameters'])} parameters on {hardware.gpus} x {hardware.gpu}, {batch}, "
        f"{in_count(config.train.max_tokens)} tokens{price}\n"
        "grey: does not fit (red: what is too much); bold: the setting that was planned"
    )
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def same_setting(plan, other):
    """Whether two plans of one configuration are of one candidate."""
    keys = ("stage", "offload_optimizer", "offload_param", "activation_checkpointing")
    return all(plan[key] == other[key] for key in keys)


def draw_memory(axes, plans, hardware):
    """The parts of a GPU's memory, and its end where that is near."""
    largest = max(plan["gpu_bytes"] for plan in plans)
    unit, unit_name = (GiB, "GiB") if largest >= GiB else (2**20, "MiB")
    gpu_size = hardware.memory_bytes / unit
    end = min(1.05 * largest / unit, 1.5 * gpu_size)
    left = [0.0] * len(plans)
    for number, part in enumerate(PARTS):
        sizes = [plan["gpu_parts"][part] / unit for plan in plans]
        colors = [f"C{number}" if plan["fits"] else GREY for plan in plans]
        axes.barh(range(len(plans)), sizes, left=left, color=colors, height=0.7)
        if max(sizes) > end / 500:  # others cannot be seen
            axes.barh(0, 0, color=f"C{number}", label=part)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    if USABLE * gpu_size < end:
        axes.axvline(gpu_size, color="black", label=f"the GPU: {hardware.gibibytes} GiB")
        axes.axvline(USABLE * gpu_size, color="black", linestyle="--", label=f"can be allocated: {USABLE:.0%}")
        title = "memory of one GPU at its peak"
    else:
        title = f"memory of one GPU at its peak (it has {hardware.gibibytes} GiB)"
    axes.set(xlim=(0, end), xlabel=unit_name, title=title)
    mark_cut(axes, [plan["gpu_bytes"] / unit for plan in plans], end)
    sizes = [(in_units(plan["gpu_bytes"]), plan["fits"], plan["fits_gpu"]) for plan in plans]
    write_column(axes, 1.12, "a GPU", sizes)
    nodes = [(in_units(needed_of_node(plan, hardware)), plan["fits"], plan["fits_cpu"]) for plan in plans]
    write_column(axes, 1.26, "a node's RAM", nodes)


def draw_time(axes, plans):
    """The time of the run, and its cost."""
    days = [plan["days"] for plan in plans]
    fitting = [plan["days"] for plan in plans if plan["fits"]]
    end = 86400 * min(1.05 * max(days), LONGEST * min(fitting or days))
    unit, length = next((name, seconds) for name, seconds in TIMES if end >= seconds)
    end /= length
    times = [86400 * each / length for each in days]
    fastest = min(fitting, default=None)
    colors = ["C2" if plan["days"] == fastest else "C0" for plan in plans]
    colors = [color if plan["fits"] else GREY for color, plan in zip(colors, plans, strict=True)]
    axes.barh(range(len(plans)), times, color=colors, height=0.7)
    title = "time of the run (green: the fastest that fits)" if fitting else "time of the run"
    axes.set(xlim=(0, end), xlabel=unit, title=title)
    axes.tick_params(axis="y", length=0)
    mark_cut(axes, times, end)
    write_column(axes, 1.22, "time", [(in_time(86400 * plan["days"]), plan["fits"], True) for plan in plans])
    write_column(axes, 1.48, "cost", [(in_price(plan), plan["fits"], True) for plan in plans])


def mark_cut(axes, lengths, end):
    """An arrow at the end of each bar that is longer than the axis."""
    rows = [row for row, length in enumerate(lengths) if length > end]
    axes.plot([0.988 * end] * len(rows), rows, linestyle="none", marker=">", color="white", markersize=6)


def write_column(axes, x, head, cells):
    """Texts to the right of the axes, one a row. x: of their right end, in widths of the axes. cells: [(text, whether
    the plan fits, whether this is within its limit)]."""
    place = {"transform": axes.get_yaxis_transform(), "ha": "right", "fontsize": 9}
    axes.text(x, -0.75, head, va="bottom", **place)
    for row, (text, fits, within) in enumerate(cells):
        color = "black" if fits else GREY
        axes.text(x, row, text, va="center", color=color if within else RED, **place)
