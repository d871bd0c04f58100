"""A plan as a person reads it: text, notes, the command that runs it. picture.py draws it."""

import functools
import json
import shlex

from minzero.config.deepspeed import offload_device
from minzero.config.sections import Recomputation
from minzero.planner.gpus import COMFORTABLE, PROCESS, USABLE, GiB
from minzero.planner.search import anything_fits, cheapest_change, enough_gpus, overrides
from minzero.planner.settings import OTHER_ZERO_KEYS, WITHOUT_EFFECT, ZERO_KEYS
from minzero.planner.speed import StepTime
from minzero.planner.units import in_count, in_digits, in_money, in_percent, in_round_units, in_time, in_units, rounded
from minzero.sizes import expert_sizes, wide_heads

FRAGMENTS = "fragmentation, the CUDA context and NCCL take the rest"
DEVICES = {"cpu": "CPU", "nvme": "NVMe"}


def plan_text(plan, config, hardware, notes):
    """The plan as lines of text. notes: of `notes_on`."""
    lines = [*headline(plan, config, hardware), "", *memory_lines(plan, hardware), *limit_lines(plan, hardware)]
    lines += [ram_line(plan, hardware), f"a checkpoint on disk: {in_units(plan['checkpoint_bytes'])}"]
    if plan["tokens_per_second"]:
        lines += ["", *speed_lines(plan, config, hardware), *rests_on(plan, config, hardware)]
    if of_experts := note_on_experts(plan, config):
        notes = [of_experts, *notes]
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def headline(plan, config, hardware):
    """The setting in two lines: the model and the GPUs, and how it is trained on them."""
    nodes = f"{hardware.nodes} node{'s' if hardware.nodes > 1 else ''}"
    active = f" ({in_count(plan['active_parameters'])} active per token)" if config.model.n_expert else ""
    stage, zero = f"ZeRO stage {plan['stage']}", config.deepspeed["zero_optimization"]
    for part, section in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        if plan[section]:
            stage += f", {part} on {DEVICES[offload_device(zero, section)]}"
    if config.lora.rank:
        frozen = f"frozen in {config.lora.base_bits} bits" if config.lora.base_bits else "frozen"
        active += f", {frozen}, and {in_count(plan['trained_parameters'])} in adapters of rank {config.lora.rank},"
    steps = plan["gradient_accumulation_steps"]
    accumulated = f"{steps:,} micro-batches a step" if steps > 1 else "one a step"
    return [
        f"{in_count(plan['parameters'])} parameters{active} on {hardware.gpus} x {hardware.gpu} of "
        f"{hardware.gibibytes} GiB, {nodes}",
        f"{stage}; micro-batch of {plan['micro_batch_size']} x {config.model.block_size:,} tokens, {accumulated}; "
        f"{recomputed_in_words(plan['activation_checkpointing'])}",
    ]


def recomputed_in_words(activation_checkpointing):
    """The value of this key of the train section, as words."""
    every, selective, budget = Recomputation.of(activation_checkpointing)
    if selective:
        return "recomputed: selectively (attention, qkv and up are kept)"
    if budget < 1:
        return f"recomputed: what does not fit into {budget:.0%} of the activations"
    blocks = {0: "none", 1: "all"}.get(every, f"one in {every}")
    return f"recomputed blocks: {blocks}"


def memory_lines(plan, hardware):
    """The parts of a GPU's memory, without those below a thousandth of it."""
    total = plan["gpu_bytes"]
    lines = [f"memory of one GPU at its peak, in the {plan['peak_phase']} phase:"]
    for part, size in plan["gpu_parts"].items():
        if size >= total / 1000:
            lines.append(f"  {part:12s} {in_units(size):>11s}  {'#' * round(40 * size / total)}".rstrip())
    second = plan["runner_up"]
    lines.append(
        f"  {'total':12s} {in_units(total):>11s}  (next: {second['phase']} phase, {in_units(second['gpu_bytes'])})"
    )
    return lines


def limit_lines(plan, hardware):
    """Whether the plan fits, and if not, which limit it breaks and by how much."""
    usable = USABLE * hardware.memory_bytes
    allocated = f"at most {rounded(usable / GiB, 3):g} of {hardware.gibibytes} GiB can be allocated"
    if plan["fits"]:
        tight = ", tight" if plan["gpu_fraction"] > COMFORTABLE else ""
        return [f"fits: {in_percent(plan['gpu_fraction'])} of the GPU's memory{tight} ({allocated}; {FRAGMENTS})"]
    lines = []
    if not plan["fits_gpu"]:
        needed = plan["gpu_bytes"]
        lines.append(
            f"DOES NOT FIT: a GPU lacks {in_round_units(needed - usable)}; {in_round_units(needed)} are needed, and "
            f"{allocated} ({FRAGMENTS})"
        )
    if not plan["fits_cpu"]:
        needed = needed_of_node(plan)
        lines.append(
            f"DOES NOT FIT: a node's RAM lacks {in_round_units(needed - hardware.cpu_bytes)}; {in_round_units(needed)} "
            f"are needed, and it has {in_round_units(hardware.cpu_bytes)}"
        )
    return lines


def needed_of_node(plan):
    """Bytes of a node's RAM at the most, with the processes of its ranks."""
    return plan["cpu_bytes"] + PROCESS * plan["gpus"] // plan["nodes"]


def ram_line(plan, hardware):
    """The RAM of a node."""
    ranks = plan["gpus"] // plan["nodes"]
    whose = f"each of {ranks} processes" if ranks > 1 else "the process"
    needed = in_round_units(needed_of_node(plan))
    of = f"{needed} of {in_round_units(hardware.cpu_bytes)}" if hardware.cpu_bytes else needed
    processes = f"about {in_round_units(PROCESS)} for {whose}"
    if not plan["cpu_bytes"]:
        return f"RAM of a node: {of}; {processes}"
    low, high = map(in_round_units, plan["cpu_bytes_range"])
    reasons = []
    if low != high:
        reasons.append("pinned blocks may be rounded up to powers of two")
    if saving := plan["cpu_bytes_of_saving"]:
        reasons.append(f"{in_round_units(saving)} of it while a checkpoint is written in the background")
    amount = high if low == high else f"{low} to {high}"
    amount += f" ({'; '.join(reasons)})" if reasons else ""
    return f"RAM of a node: {of}; {processes}, and for tensors {amount}"


def speed_lines(plan, config, hardware):
    """The time and the cost of the run, and where the time goes."""
    card, price = hardware.card, ""
    if plan["cost"] is not None:
        source = f" ({card.priced})" if card.priced and hardware.price == card.price else ""
        price = f", {in_money(plan['cost'])} at ${hardware.price:g} per GPU hour{source}"
    lines = [
        f"{'' if plan['fits'] else 'if it did fit: '}{in_time(86400 * plan['days'])} for "
        f"{in_count(config.train.max_tokens)} tokens, {in_digits(plan['tokens_per_second'])} tokens/s, "
        f"{in_digits(plan['gpu_hours'])} GPU hours{price}",
        parts_line(plan),
    ]
    if between := between_steps(plan):
        lines.append(f"  {between}")
    return lines


def parts_line(plan):
    """The parts of a step, and which is the largest."""
    parts = {name: in_time(seconds) for name, seconds in plan["step_parts"].items()}
    compute = StepTime(**plan["step_parts"]).compute
    hidden = f" ({parts['hidden']} of it hidden)" if plan["step_parts"]["hidden"] else ""
    reached = ""
    if plan["mfu"]:
        reached = f"; MFU {in_digits(100 * plan['mfu'], 2)}%"
        reached += f", HFU {in_digits(100 * plan['hfu'], 2)}%" if plan["hfu"] > plan["mfu"] else ""
    return (
        f"  a step of {in_time(plan['step_seconds'])}: compute {in_time(compute)}, communication "
        f"{parts['communication']}{hidden}, offload {parts['offload']}, host {parts['host']}: bound by "
        f"{plan['bound_by']}{reached}"
    )


def between_steps(plan):
    """The share of evaluation and saves in the time of the run, or None where they take less than 0.1% of it."""
    shares = {"evaluation": plan["evaluation_days"], "saving checkpoints": plan["saving_days"]}
    shares = {name: days / plan["days"] for name, days in shares.items() if days >= 0.001 * plan["days"]}
    words = " and ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return f"of the time: {words}" if words else None


def rests_on(plan, config, hardware):
    """Two lines: the rates that the speed is computed from, and whether the rest is assumed or measured."""
    card, rates, fp32 = hardware.card, plan["assumptions"], config.train.precision == "fp32"
    peak, precision = (card.tf32, "fp32") if fp32 else (card.bf16, card.precision)
    names = {"link": "link", "network": "network", "pcie": "PCIe", "cpu": "CPU Adam"}
    named = {"memory": card.hbm} | {name: rates[key] for key, name in names.items()}
    in_gigabytes = ", ".join(f"{name} {rounded(rate / 1e9, 4):,g}" for name, rate in named.items())
    if measured := plan.get("measured"):
        reached = f"measured ({measured})"
    elif rates["utilisation"]:
        reached = f"{rates['utilisation']:.0%}, as --utilisation says"
    else:
        reached = "assumed: measure 20 steps before you pay (--measured)"
    return [
        f"  rests on {card.name}: {peak / 1e12:g} TFLOP/s for {precision}; GB/s: {in_gigabytes}",
        f"  what this code reaches of it is {reached}",
    ]


def notes_on(config):
    """Notes on settings that the plan ignores or approximates, as sentences."""
    notes = []
    zero = config.deepspeed.get("zero_optimization", {})
    unknown = sorted(
        {name for name in zero if zero[name] != "auto"} - set(ZERO_KEYS) - OTHER_ZERO_KEYS - WITHOUT_EFFECT
    )
    if unknown:
        notes.append(f"not modelled, of deepspeed.zero_optimization: {', '.join(unknown)}")
    if "nvme" in (offload_device(zero, "offload_optimizer"), offload_device(zero, "offload_param")):
        notes.append("what is offloaded to NVMe is not in the node's RAM; its drives' 5 GB/s are assumed: --nvme")
    if heads := wide_heads(config.model):
        notes.append(heads)
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
    """How to make a configuration fit that does not: (lines of text, the overrides or None, the number of GPUs on which
    it fits as it is or None). planned: (configuration, number of GPUs) -> plan."""
    on_these = functools.partial(planned, gpus=gpus)
    change, plan = cheapest_change(config, gpus, on_these)
    if change:
        lines = [f"the cheapest change that fits: {in_flags(change)}", f"  {effect(plan)}"]
    elif anything_fits(config, gpus, on_these):
        lines = ["no one or two changes are enough; --fit finds a setting that fits"]
    else:
        lines = ["no other setting fits on these GPUs; a shorter model.block_size or a smaller model may"]
    more = enough_gpus(config, gpus, planned)
    if more:
        plan = planned(config, more)
        nodes = f" on {plan['nodes']} nodes" if plan["nodes"] > 1 else ""
        lines += [f"or unchanged on {more} GPUs{nodes}:", f"  {effect(plan)}"]
    else:
        lines.append("more GPUs alone are not enough")
    return lines, change, more


def effect(plan):
    """The memory, speed, time and cost of an advice, in one line."""
    words = [f"{in_round_units(plan['gpu_bytes'])} of a GPU", f"{in_round_units(needed_of_node(plan))} of a node's RAM"]
    if plan["days"]:
        words += [f"{in_digits(plan['tokens_per_second'])} tokens/s", in_time(86400 * plan["days"])]
        words.append(in_price(plan))
    return ", ".join(words)


def in_price(plan):
    """What a run costs: in dollars, where a price is known, or else in GPU hours."""
    if plan["cost"] is None:
        return f"{in_digits(plan['gpu_hours'])} GPU hours"
    return in_money(plan["cost"])


def in_flags(change):
    """Overrides, {key: value}, as flags of the command line."""
    return " ".join(
        f"--{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in change.items()
    )


def chosen(given, config):
    """{key: value} of what makes `config` of the given configuration, the micro-batch, recomputation and stage always;
    DeepSpeed's keys last."""
    always = {
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.activation_checkpointing": config.train.activation_checkpointing,
        "deepspeed.zero_optimization.stage": config.deepspeed["zero_optimization"]["stage"],
    }
    changes = always | overrides(given, config)
    return {key: changes[key] for key in sorted(changes, key=lambda key: key.startswith("deepspeed."))}


def without(arguments, changes):
    """Words of a command line, for a shell, less the flags of keys that are changed: each key is there once."""
    kept = []
    words = iter(arguments)
    for word in words:
        name, has_value, _ = word.removeprefix("--").partition("=")
        values = [next(words)] if word.startswith("--") and not has_value else []
        if name not in changes:
            kept += [word, *values]
    return shlex.join(kept)


def train_command(arguments, given, config, hardware):
    """The command line that runs `config`. arguments: the given ones, and `given` the configuration that they make."""
    launcher = f"deepspeed --num_gpus {hardware.gpus}"
    if hardware.nodes > 1:
        launcher = f"deepspeed --hostfile hosts --num_nodes {hardware.nodes}"
    changes = chosen(given, config)
    return f"{launcher} train.py {without(arguments, changes)} {in_flags(changes)}"
