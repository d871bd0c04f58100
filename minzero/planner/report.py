"""A plan as a person reads it: text, notes, the command that runs it, a picture of the memory."""

import functools
import json
import shlex

from minzero.config.deepspeed import gradient_accumulation, offload_device
from minzero.config.sections import Recomputation
from minzero.errors import UserError
from minzero.planner.gpus import COMFORTABLE, USABLE, GiB, in_units
from minzero.planner.replay import PARTS
from minzero.planner.search import (
    CHOICES,
    RECOMPUTED,
    anything_fits,
    cheapest_change,
    enough_gpus,
    overrides,
    with_choice,
)
from minzero.planner.settings import OTHER_ZERO_KEYS, WITHOUT_EFFECT, ZERO_KEYS
from minzero.plot import pyplot
from minzero.sizes import expert_sizes, wide_heads


def plan_text(plan, config, hardware, notes):
    """The plan as lines of text. notes: of `notes_on`."""
    lines = [headline(plan, config, hardware), "", *memory_lines(plan, hardware)]
    if plan["tokens_per_second"]:
        lines += speed_lines(plan, config, hardware)
    if of_experts := note_on_experts(plan, config):
        notes = [of_experts, *notes]
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def headline(plan, config, hardware):
    """The setting in one line."""
    nodes = f"{hardware.nodes} node{'s' if hardware.nodes > 1 else ''}"
    stage = f"ZeRO stage {plan['stage']}"
    if plan["offload_optimizer"]:
        stage += ", optimizer on CPU"
    if plan["offload_param"]:
        stage += ", parameters on CPU"
    active = f" ({plan['active_parameters']:,} active per token)" if config.model.n_expert else ""
    return (
        f"{plan['parameters']:,} parameters{active} on {hardware.gpus} x {hardware.gpu} of {hardware.gibibytes} GiB, "
        f"{nodes}; {stage}; micro-batch {plan['micro_batch_size']} x {config.model.block_size} tokens x "
        f"{plan['gradient_accumulation_steps']} accumulated; {recomputed_in_words(plan['activation_checkpointing'])}"
    )


def recomputed_in_words(activation_checkpointing):
    """The value of this key of the train section, as words."""
    every, selective, budget = Recomputation.of(activation_checkpointing)
    if selective:
        return "recomputed: all but attention and every other matrix product"
    if budget < 1:
        return f"recomputed: what does not fit into {budget:.0%} of the activations"
    blocks = {0: "none", 1: "all"}.get(every, f"one in {every}")
    return f"recomputed blocks: {blocks}"


def memory_lines(plan, hardware):
    lines = [f"memory of one GPU at its peak, in the {plan['peak_phase']} phase:"]
    for part, size in plan["gpu_parts"].items():
        lines.append(f"  {part:12s} {in_units(size):>13s}  {'#' * round(40 * size / plan['gpu_bytes'])}")
    second = plan["runner_up"]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    tight = ", tight" if plan["fits"] and plan["gpu_fraction"] > COMFORTABLE else ""
    low, high = plan["cpu_bytes_range"]
    saving = plan["cpu_bytes_of_saving"]
    copied = f"; {in_units(saving)} of it while a checkpoint is written in the background" if saving else ""
    return [
        *lines,
        f"  {'allocated':12s} {in_units(plan['gpu_bytes']):>13s}  (runner-up: {second['phase']}, "
        f"{in_units(second['gpu_bytes'])})",
        f"{verdict}: {plan['gpu_fraction']:.0%} of {hardware.gibibytes} GiB{tight} (at most {USABLE:.0%} can be "
        "allocated beside fragments, the CUDA context and NCCL)",
        "",
        f"CPU memory of a node: {in_units(low)} to {in_units(high)} (pinned blocks may be rounded up to powers of "
        f"two), and each rank's Python and libraries{copied}",
        f"a checkpoint on disk: {in_units(plan['checkpoint_bytes'])}",
    ]


def speed_lines(plan, config, hardware):
    cost = f", {plan['cost']:,.0f} $ at {hardware.price:g} $ a GPU and hour" if plan["cost"] else ""
    return [
        f"{plan['tokens_per_second']:,.0f} tokens/s, {config.train.max_tokens:,} tokens in {plan['days']:,.2f} days, "
        f"{plan['gpu_hours']:,.0f} GPU hours{cost}",
        parts_line(plan),
    ]


def parts_line(plan):
    """The parts of a step, and which is the largest."""
    parts = plan["step_parts"]
    compute = parts["products"] + parts["attention"] + parts["traffic"] + parts["optimizer"]
    return (
        f"  a step of {plan['step_seconds']:.3g} s: compute {compute:.2g} s, communication "
        f"{parts['communication']:.2g} s (hidden {parts['hidden']:.2g}), offload {parts['offload']:.2g}, host "
        f"{parts['host']:.2g}: bound by {plan['bound_by']}"
    )


def notes_on(config, gpus):
    """Notes on settings that the plan ignores or approximates, as sentences."""
    notes = []
    zero = config.deepspeed.get("zero_optimization", {})
    unknown = sorted(
        {name for name in zero if zero[name] != "auto"} - set(ZERO_KEYS) - OTHER_ZERO_KEYS - WITHOUT_EFFECT
    )
    if unknown:
        notes.append(f"not modelled, of deepspeed.zero_optimization: {', '.join(unknown)}")
    if "nvme" in (offload_device(zero, "offload_optimizer"), offload_device(zero, "offload_param")):
        notes.append("NVMe is counted as CPU memory, with its speed")
    if heads := wide_heads(config.model):
        notes.append(heads)
    try:
        gradient_accumulation(config, gpus)
    except UserError as error:
        notes.append(f"train.py will refuse this batch: {error}")
    return notes


def note_on_experts(plan, config):
    """A sentence where gathered experts are what takes most of the memory at the peak, or None."""
    parts = plan["gpu_parts"]
    if not config.model.n_expert or max(parts, key=parts.get) != "gathered":
        return None
    _, *matrices = expert_sizes(config.model)
    weights = config.model.n_expert * sum(matrices)
    return (
        f"stage 3 gathers all {config.model.n_expert} experts of a block, {weights:,} weights, although a token goes "
        f"through {config.model.n_expert_per_token}; stages 0 to 2 gather nothing, and a tool with expert parallelism "
        "sends tokens in place of weights"
    )


def suggest_fix(config, gpus, planned):
    """How to make a configuration fit that does not: (in words, the overrides or None, the number of GPUs on which it
    fits as it is or None). planned: (configuration, number of GPUs) -> plan."""
    on_these = functools.partial(planned, gpus=gpus)
    change, plan = cheapest_change(config, gpus, on_these)
    if change:
        effect = f"{in_units(plan['gpu_bytes'])}, {plan['tokens_per_second']:,.0f} tokens/s"
        words = f"the cheapest change that fits: {in_flags(change)} ({effect})"
    elif anything_fits(config, gpus, on_these):
        words = "no one or two changes are enough; --fit finds what is"
    else:
        words = "no other saving is enough: it takes a shorter model.block_size or a smaller model"
    more = enough_gpus(config, gpus, planned)
    words += f"; or, as it is, {more} GPUs" if more else "; as it is, on no number of GPUs"
    return words, change, more


def in_flags(change):
    """Overrides, {key: value}, as flags of the command line."""
    return " ".join(
        f"--{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in change.items()
    )


def chosen_flags(given, config):
    """The flags that make `config` of the given configuration, the micro-batch, recomputation and stage always."""
    chosen = {
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.activation_checkpointing": config.train.activation_checkpointing,
        "deepspeed.zero_optimization.stage": config.deepspeed["zero_optimization"]["stage"],
    }
    return in_flags(chosen | overrides(given, config))


def train_command(arguments, given, config, hardware):
    """The command line that runs `config`. arguments: the given ones, and `given` the configuration that they make."""
    launcher = f"deepspeed --num_gpus {hardware.gpus}"
    if hardware.nodes > 1:
        launcher = f"deepspeed --hostfile hosts --num_nodes {hardware.nodes}"
    return f"{launcher} train.py {shlex.join(arguments)} {chosen_flags(given, config)}"


# ---- the picture


def draw(config, planned, hardware, picture):
    """Stacked bars of one GPU's memory at its peak, by part, for every candidate of --fit at the config's micro-batch,
    with a line at the end of the GPU. picture: a path; its extension is the format. Raises OSError and ValueError."""
    plt = pyplot()

    names, plans = [], []
    for stage, offload in CHOICES:
        for recompute in RECOMPUTED:
            plans.append(planned(with_choice(config, stage, offload, recompute, config.train.micro_batch_size)))
            on_cpu = {"none": "", "optimizer": ", optimizer on CPU", "param": ", optimizer and weights on CPU"}[offload]
            recomputed = {False: "", "selective": ", selective", True: ", recomputed"}[recompute]
            names.append(f"stage {stage}{on_cpu}{recomputed}")
    largest = max(plan["gpu_bytes"] for plan in plans)
    unit, unit_name = (GiB, "GiB") if largest >= GiB else (2**20, "MiB")
    gpu_size = hardware.memory_bytes / unit
    end = min(1.3 * largest / unit, 2 * gpu_size)  # a longer bar is cut off there
    figure, axes = plt.subplots(figsize=(10, 8), layout="constrained")
    draw_bars(axes, plans, unit, unit_name, end)
    beyond = f"; the GPU's {hardware.gibibytes} GiB lie outside"
    if USABLE * gpu_size < end:
        beyond = ""
        axes.axvline(gpu_size, color="black", label=f"the GPU, {hardware.gibibytes} GiB")
        axes.axvline(USABLE * gpu_size, color="black", linestyle="--", label=f"can be allocated: {USABLE:.0%}")
    batch = f"micro-batch {config.train.micro_batch_size} x {config.model.block_size}"
    figure.suptitle(f"peak of one GPU's memory, {hardware.gpus} x {hardware.gpu}, {batch}{beyond}")
    axes.set(xlim=(0, end), xlabel=unit_name, yticks=range(len(plans)), yticklabels=names)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def draw_bars(axes, plans, unit, unit_name, end):
    """One bar a plan, with its total beside it, or inside where the bar is cut off at `end`."""
    left = [0.0] * len(plans)
    for number, part in enumerate(PARTS):
        sizes = [plan["gpu_parts"][part] / unit for plan in plans]
        axes.barh(range(len(plans)), sizes, left=left, color=f"C{number}", label=part)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
    for row, plan in enumerate(plans):
        total = plan["gpu_bytes"] / unit
        text = f" {total:,.1f} {unit_name}{'' if plan['fits'] else ', does not fit'} "
        if total > 0.8 * end:
            axes.text(end, row, text, va="center", ha="right", bbox=box)
        else:
            axes.text(total, row, text, va="center", ha="left", bbox=box)
