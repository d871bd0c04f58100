"""Will it fit, how fast, what does it cost: a plan of a run before anything is rented.

    python plan.py configs/1p5b.json --gpus 8 --gpu_memory 80 [--gpu h100] [--nodes 1] [--price 2.5]
                   [--section.key value ...] [--fit | --max] [--plot PICTURE.png] [--json]

--fit finds the fastest setting that fits, --max the deepest model; --plot draws the memory of every candidate. Where
nothing fits, the cheapest change that would is named. Memory is replayed allocation by allocation by
minzero/planner/memory.py. Speed
is arithmetic on stated assumptions (`Assumptions`). Nothing is allocated, and no GPU is looked for.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import bisect
import copy
import dataclasses
import functools
import json
import shlex
from dataclasses import dataclass

from minzero.commands import run_command
from minzero.config.build import build
from minzero.config.deepspeed import (
    check_together,
    gradient_accumulation,
    offload_device,
    offload_ratio,
    offloads_optimizer,
    zero_stage,
)
from minzero.config.load import command_line_values, load_config
from minzero.config.nested import merge
from minzero.config.values import divisors
from minzero.errors import UserError
from minzero.flags import FlagParser, a_number, a_path, at_least, check_can_write
from minzero.planner.memory import PARTS, Gathered, Settings, simulate
from minzero.sizes import PEAK_FLOPS, flops_per_token, peak_flops, recomputed_flops_per_token

GiB = 2**30
# How much of a GPU may be allocated: the rest is what the allocator cannot reuse, the CUDA context and NCCL. Of the
# published largest models and batches that ran, none is predicted above USABLE, and few above COMFORTABLE.
USABLE, COMFORTABLE = 0.9, 0.8
MOST_GPUS, MOST_LAYERS = 2**17, 2**12  # beyond these nothing is planned

# What --fit tries and --plot shows: stages, and what of them is kept in CPU memory ("param": the optimizer too).
CHOICES = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "param")]

# deepspeed.zero_optimization: DeepSpeed's key -> ours in Settings
ZERO_KEYS = {
    "reduce_bucket_size": "reduce_bucket_size",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "sub_group_size": "sub_group_size",
}
# read apart from these, or without effect on memory as it is modelled
OTHER_ZERO_KEYS = {"stage", "overlap_comm", "offload_optimizer", "offload_param", "contiguous_gradients"}
WITHOUT_EFFECT = {"allgather_bucket_size", "round_robin_gradients", "ignore_unused_parameters"}
WITHOUT_EFFECT |= {"stage3_gather_16bit_weights_on_model_save", "log_trace_cache_warnings", "enable_sanity_checks"}


def in_units(size):
    """Bytes -> "1,234.56 GiB" or "45.6 MiB"."""
    return f"{size / GiB:,.2f} GiB" if size >= GiB else f"{size / 2**20:.1f} MiB"


@dataclass
class Assumptions:
    """What the speed rests on. None of it is measured here; every one can be given on the command line."""

    utilisation: float = 0.4  # of the peak, by the FLOPs that the device does (recomputed ones too), within a step
    link: float = 300e9  # bytes/s between two GPUs of a node, each way (NVLink of A100; H100 has 450e9)
    network: float = 25e9  # bytes/s of one GPU to other nodes, each way (200 Gbit/s each)
    pcie: float = 25e9  # bytes/s between a GPU and its node's memory, each way (PCIe 4.0 x16)
    cpu: float = 150e9  # bytes/s of a node's memory, which bounds Adam on the CPU


def settings_of(config, gpus):
    """The simulator's Settings of a run's configuration."""
    train, zero = config.train, config.deepspeed.get("zero_optimization", {})
    stage = zero_stage(config.deepspeed)
    if config.model.n_layer > MOST_LAYERS:  # each is replayed
        raise UserError(f"model.n_layer: found {config.model.n_layer}, expected at most {MOST_LAYERS} to be planned")
    precision = "bf16" if train.precision == "auto" else train.precision
    overlap = zero.get("overlap_comm")
    accumulated = config.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return Settings(
        model=config.model,
        world_size=gpus,
        stage=stage,
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=accumulation(config, gpus),
        precision=precision,
        recompute_every=int(train.activation_checkpointing),
        inputs_on_cpu=train.activation_offload,
        offload_optimizer=offloads_optimizer(config.deepspeed),
        offload_ratio=offload_ratio(zero),
        offload_param=offload_device(zero, "offload_param") != "none",
        overlap_comm=stage == 3 if overlap is None else overlap,
        compiled=train.compile is not False,
        accumulation_bytes={"fp32": 4, "bf16": 2, "fp16": 2}.get(accumulated),
        **{ours: zero[key] for key, ours in ZERO_KEYS.items() if key in zero},
    )


def accumulation(config, gpus):
    """Micro-batches of one step; of a batch that does not divide, as many as hold it."""
    return -(-config.train.global_batch_tokens // (config.model.block_size * config.train.micro_batch_size * gpus))


def inputs_on_cpu(settings):
    """Bytes of one micro-batch's inputs of recomputed blocks that wait in CPU memory (train.activation_offload)."""
    s = settings
    if not (s.inputs_on_cpu and s.recompute_every):
        return 0
    return -(-s.model.n_layer // s.recompute_every) * s.tokens * s.model.n_embd * s.bytes


def offloaded_elements(settings, parameters):
    """How many parameters' optimizer one rank keeps in CPU memory, if it offloads any."""
    on_gpu = sum(Gathered(settings).sub_groups_on_gpu()) if settings.stage == 3 and settings.offload_ratio < 1 else 0
    return parameters / settings.world_size - on_gpu


def cpu_memory(settings, parameters, ranks):
    """(lowest, highest) bytes of CPU memory of a node with this many ranks, for tensors; each rank's Python, torch
    and CUDA libraries come on top. PyTorch rounds each pinned block up to a power of two: up to twice the bytes."""
    s, shard = settings, parameters / settings.world_size
    pageable, pinned = 0, 0
    if s.offload_optimizer:
        offloaded = offloaded_elements(s, parameters)
        pageable += (s.master_bytes + s.moment_bytes) * offloaded
        pinned += 4 * offloaded + s.bytes * shard  # float32 gradients; 16-bit ones (stage 3) or weights (1, 2)
    if s.offload_param:
        pinned += 2 * s.bytes * shard  # the flat weights, and zero.Init's pieces, which stay in the host cache
    pinned += inputs_on_cpu(s)
    return round((pageable + pinned) * ranks), round((pageable + 2 * pinned) * ranks)


def checkpoint_size(settings, parameters):
    """Bytes of one checkpoint, at any stage: master weights and Adam's moments (zero.py)."""
    return parameters * (settings.master_bytes + settings.moment_bytes)


def seconds_per_step(settings, parameters, flops, tokens, peak, nodes, assumptions):
    """One optimizer step over `tokens`. Products and communication overlap, offload's copies and Adam do not.

    Bytes of a rank: stages 0 to 2 sum the gradients (2 x) or scatter them and gather the weights (1 x each), once a
    step; stage 3 gathers the weights in each pass of each micro-batch and scatters the gradients of each."""
    s, a = settings, assumptions
    compute = flops * tokens / (s.world_size * peak * a.utilisation)
    model = parameters * s.bytes * (s.world_size - 1) / s.world_size
    passes = (3 + bool(s.recompute_every)) * s.gradient_accumulation_steps if s.stage == 3 else 2
    if s.stage == 2:
        passes = s.gradient_accumulation_steps + 1
    communication = passes * model / (a.network if nodes > 1 else a.link)
    offload, shard = 2 * inputs_on_cpu(s) * s.gradient_accumulation_steps / a.pcie, parameters / s.world_size
    if s.offload_param:
        offload += (2 + bool(s.recompute_every)) * s.gradient_accumulation_steps * shard * s.bytes / a.pcie
    if s.offload_optimizer:  # gradients down, weights up; Adam reads 16 and writes 14 bytes a parameter
        offloaded = offloaded_elements(s, parameters)
        offload += (4 + s.bytes) * offloaded / a.pcie + 30 * offloaded * s.world_size / nodes / a.cpu
    return max(compute, communication) + offload


def plan(config, gpus, nodes, memory_bytes, peak, price, assumptions):
    """Everything there is to say about one setting, as a dictionary (sizes in bytes)."""
    settings = settings_of(config, gpus)
    memory, parameters = simulate(settings)
    phases = sorted(((total, phase) for phase, (total, _) in memory.peaks.items()), reverse=True)
    total, phase = phases[0]
    parts = {part: memory.peaks[phase][1].get(part, 0) for part in PARTS}
    cpu = cpu_memory(settings, parameters, gpus // nodes)
    train = config.train
    flops = flops_per_token(config.model) + recomputed_flops_per_token(config.model, settings.recompute_every)
    tokens = settings.gradient_accumulation_steps * train.micro_batch_size * gpus * config.model.block_size
    speed = None
    if peak:
        if settings.bytes == 4:
            peak /= 2  # TF32's
        speed = tokens / seconds_per_step(settings, parameters, flops, tokens, peak, nodes, assumptions)
    days = train.max_tokens / speed / 86400 if speed else None
    return {
        "parameters": parameters,
        "gpu_bytes": total,
        "gpu_parts": parts,
        "peak_phase": phase,
        "runner_up": {"phase": phases[1][1], "gpu_bytes": phases[1][0]},
        "phases": {name: peak[0] for name, peak in memory.peaks.items()},
        "gpu_fraction": total / memory_bytes,
        "fits": total <= USABLE * memory_bytes,
        "cpu_bytes": cpu[1],
        "cpu_bytes_range": list(cpu),
        "checkpoint_bytes": checkpoint_size(settings, parameters),
        "micro_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "stage": settings.stage,
        "offload_optimizer": settings.offload_optimizer,
        "offload_param": settings.offload_param,
        "activation_checkpointing": settings.recompute_every,
        "tokens_per_second": speed,
        "days": days,
        "gpu_hours": days and days * 24 * gpus,
        "cost": days and price and days * 24 * gpus * price,
        "assumptions": dataclasses.asdict(assumptions),
    }


def with_choice(config, stage, offload, recompute, micro_batch_size):
    """A copy of the configuration with another setting. offload: "none", "optimizer" or "param" (both)."""
    config = copy.deepcopy(config)
    zero = config.deepspeed.setdefault("zero_optimization", {})
    zero["stage"] = stage
    for name, wanted in (("offload_optimizer", offload != "none"), ("offload_param", offload == "param")):
        zero.pop(name, None)
        if wanted:
            zero[name] = {"device": "cpu"}
    config.train.activation_checkpointing = recompute
    config.train.micro_batch_size = micro_batch_size
    return config


def micro_batches(config, gpus):
    """Micro-batch sizes by which each rank's share of the global batch divides, the largest first; 1 if none."""
    sequences = config.train.global_batch_tokens // config.model.block_size
    share = sequences // gpus if sequences % gpus == 0 else 1
    return divisors(max(share, 1))[::-1]


def first_that_fits(candidates, planned):
    """The plan of the first of these configurations that fits, and the configuration; (None, None) if none does.
    Each must need less memory than the one before it."""
    plans = {}

    def fits(number):
        plans[number] = planned(candidates[number])
        return plans[number]["fits"]

    first = bisect.bisect_left(range(len(candidates)), True, key=fits)
    return (plans[first], candidates[first]) if first < len(candidates) else (None, None)


def fastest(config, gpus, planned):
    """The fastest plan that fits over stages, offload, recomputation and micro-batches, and its configuration;
    (None, None) if none does. The largest micro-batch that fits is the fastest."""
    best, chosen, sizes = None, None, micro_batches(config, gpus)
    for stage, offload in CHOICES:
        try:
            check_together(with_choice(config, stage, offload, False, 1).deepspeed, config.train.precision)
        except UserError:
            continue  # train.py would refuse the rest of deepspeed at this stage
        for recompute in (False, True):
            candidates = [with_choice(config, stage, offload, recompute, size) for size in sizes]
            found, candidate = first_that_fits(candidates, planned)
            if found and (best is None or found["tokens_per_second"] > best["tokens_per_second"]):
                best, chosen = found, candidate
    return best, chosen


def single_changes(config):
    """Overrides that may save memory, each {key: value}: the cheapest, which cost no speed, first."""
    zero, train = config.deepspeed.get("zero_optimization", {}), config.train
    stage, section = zero_stage(config.deepspeed), "deepspeed.zero_optimization"
    if stage:
        buffers = {"reduce_bucket_size": (1e7, 5e8)}  # what it becomes, and DeepSpeed's default
        if stage == 3:
            buffers |= {"sub_group_size": (1e8, 1e9), "stage3_prefetch_bucket_size": (1e7, 5e7)}
            buffers |= {"stage3_max_reuse_distance": (1e8, 1e9)}
        for name, (small, default) in buffers.items():
            if zero.get(name, default) > small:
                yield {f"{section}.{name}": int(small)}
    for higher in range(stage + 1, 4):
        yield {f"{section}.stage": higher}
    if train.activation_checkpointing is not True:
        yield {"train.activation_checkpointing": True}
    elif not train.activation_offload:
        yield {"train.activation_offload": True}
    offload = {} if offloads_optimizer(config.deepspeed) else {f"{section}.offload_optimizer.device": "cpu"}
    if stage and offload:
        yield offload
    if stage == 3 and offload_device(zero, "offload_param") == "none":
        yield offload | {f"{section}.offload_param.device": "cpu"}


def changed(config, change):
    """A copy of the configuration with these overrides, {key: value}."""
    words = [word for key, value in change.items() for word in (f"--{key}", json.dumps(value))]
    overrides, _ = command_line_values(words)
    return build(merge(config.to_dict(), overrides), "command line")


def cheapest_change(config, gpus, planned):
    """The override that makes this configuration fit at the highest speed, else the pair of overrides, else
    (None, None): ({key: value}, its plan). A smaller micro-batch is as large as fits."""
    sizes = [size for size in micro_batches(config, gpus) if size < config.train.micro_batch_size]

    def with_smaller_batch(change):
        batches = [change | {"train.micro_batch_size": size} for size in sizes]
        found, _ = first_that_fits([changed(config, batch) for batch in batches], planned)
        return [(change | {"train.micro_batch_size": found["micro_batch_size"]}, found)] if found else []

    def that_fit(changes):
        """Those of them that fit, with their plans."""
        plans = ((change, planned(changed(config, change))) for change in changes)
        return [(change, found) for change, found in plans if found["fits"]]

    ones = list(single_changes(config))
    twos = [one | two for one in ones for two in single_changes(changed(config, one)) if not one.keys() & two.keys()]
    fitting = that_fit(ones) + with_smaller_batch({})
    if not fitting:
        fitting = that_fit(twos) + [pair for one in ones for pair in with_smaller_batch(one)]
    # among equally fast ones the first: it is the smaller change
    return max(fitting, key=lambda pair: pair[1]["tokens_per_second"], default=(None, None))


def enough_gpus(config, gpus, planned):
    """The least multiple of `gpus` on which this configuration fits, None above 16,384 of them; by doubling and
    halving. planned: (config, number of GPUs) -> plan."""

    def fits(number):
        return planned(config, number * gpus)["fits"]

    most = 1
    while not fits(most):
        most *= 2
        if most * gpus > 2**14:
            return None
    return gpus * (most // 2 + 1 + bisect.bisect_left(range(most // 2 + 1, most), True, key=fits))


def way_out(config, gpus, planned):
    """What is the least that must change for this configuration to fit: (in words, the overrides or None, the number
    of GPUs on which it fits as it is or None)."""
    on_these = functools.partial(planned, gpus=gpus)
    change, found = cheapest_change(config, gpus, on_these)
    if change:
        words = f"the cheapest change that fits: {in_flags(change)} ({in_short(found)})"
    elif fastest(config, gpus, on_these)[0]:
        words = "no one or two changes are enough; --fit finds what is"
    else:
        words = "no other saving is enough: it takes a shorter model.block_size or a smaller model"
    more = enough_gpus(config, gpus, planned)
    words += f"; or, as it is, {more} GPUs" if more else "; as it is, on no number of GPUs"
    return words, change, more


def in_flags(change):
    return " ".join(
        f"--{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in change.items()
    )


def in_short(found):
    return f"{in_units(found['gpu_bytes'])}, {found['tokens_per_second']:,.0f} tokens/s"


def deepest(config, planned):
    """The largest n_layer that fits, 0 if none does, by doubling and halving."""

    def fits(depth):
        candidate = copy.deepcopy(config)
        candidate.model.n_layer = depth
        return planned(candidate)["fits"]

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
        if high > MOST_LAYERS:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def command(arguments, given, config, gpus, nodes):
    """The command line that runs this configuration. arguments: what was given, and the configuration that it made."""
    zero, before = config.deepspeed["zero_optimization"], given.deepspeed.get("zero_optimization", {})
    words = [f"--train.micro_batch_size {config.train.micro_batch_size}"]
    words.append(f"--train.activation_checkpointing {json.dumps(config.train.activation_checkpointing)}")
    words.append(f"--deepspeed.zero_optimization.stage {zero['stage']}")
    for name in ("offload_optimizer", "offload_param"):
        device = "cpu" if name in zero else "none"
        if device != offload_device(before, name):
            words.append(f"--deepspeed.zero_optimization.{name}.device {device}")
    launcher = f"deepspeed --num_gpus {gpus}" if nodes == 1 else f"deepspeed --hostfile hosts --num_nodes {nodes}"
    return f"{launcher} train.py {shlex.join(arguments)} {' '.join(words)}"


def report(found, config, options, notes):
    """The plan as a person reads it."""
    lines = [
        f"{found['parameters']:,} parameters on {options.gpus} x {options.gpu} of {options.gpu_memory:g} GiB, "
        f"{options.nodes} node{'s' if options.nodes > 1 else ''}; ZeRO stage {found['stage']}"
        f"{', optimizer on CPU' if found['offload_optimizer'] else ''}"
        f"{', parameters on CPU' if found['offload_param'] else ''}; micro-batch {found['micro_batch_size']} x "
        f"{config.model.block_size} tokens x {found['gradient_accumulation_steps']} accumulated; recomputed blocks: "
        + {0: "none", 1: "all"}.get(found["activation_checkpointing"], f"every {found['activation_checkpointing']}th"),
        "",
        f"memory of one GPU at its peak, in the {found['peak_phase']} phase:",
    ]
    for part, size in found["gpu_parts"].items():
        lines.append(f"  {part:12s} {in_units(size):>13s}  {'#' * round(40 * size / found['gpu_bytes'])}")
    runner_up, (low, high) = found["runner_up"], found["cpu_bytes_range"]
    lines += [
        f"  {'allocated':12s} {in_units(found['gpu_bytes']):>13s}  (runner-up: {runner_up['phase']}, "
        f"{in_units(runner_up['gpu_bytes'])})",
        f"{'fits' if found['fits'] else 'DOES NOT FIT'}: {found['gpu_fraction']:.0%} of {options.gpu_memory:g} GiB"
        f"{', tight' if found['fits'] and found['gpu_fraction'] > COMFORTABLE else ''} (at most {USABLE:.0%} can be "
        "allocated beside fragments, the CUDA context and NCCL)",
        "",
        f"CPU memory of a node: {in_units(low)} to {in_units(high)} (pinned blocks may be rounded up to powers of "
        "two), and each rank's Python and libraries",
        f"a checkpoint on disk: {in_units(found['checkpoint_bytes'])}",
    ]
    if found["tokens_per_second"]:
        cost = f", {found['cost']:,.0f} $ at {options.price:g} $ a GPU and hour" if found["cost"] else ""
        lines.append(
            f"{found['tokens_per_second']:,.0f} tokens/s, {config.train.max_tokens:,} tokens in "
            f"{found['days']:,.2f} days, {found['gpu_hours']:,.0f} GPU hours{cost}"
        )
        a = options.assumptions
        lines.append(
            f"  assumed, not measured: {a.utilisation:.0%} of the peak, recomputed FLOPs included; GB/s: "
            f"{a.link / 1e9:g} between GPUs, {a.network / 1e9:g} between nodes, {a.pcie / 1e9:g} to the CPU, "
            f"{a.cpu / 1e9:g} in its memory"
        )
    return "\n".join(lines + [f"note: {note}" for note in notes])


def draw(config, planned, options, picture):
    """Stacked bars of one GPU's memory at its peak, by part, for every candidate of --fit at the config's micro-batch,
    with a line where the GPU ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, plans = [], []
    for stage, offload in CHOICES:
        for recompute in (False, True):
            plans.append(planned(with_choice(config, stage, offload, recompute, config.train.micro_batch_size)))
            place = {"none": "", "optimizer": ", optimizer on CPU", "param": ", optimizer and weights on CPU"}[offload]
            names.append(f"stage {stage}{place}{', recomputed' if recompute else ''}")
    largest = max(found["gpu_bytes"] for found in plans)
    unit, name = (GiB, "GiB") if largest >= GiB else (2**20, "MiB")
    whole = options.gpu_memory * GiB / unit
    end = min(1.3 * largest / unit, 2 * whole)  # a bar that goes further is cut off there
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    left = [0.0] * len(plans)
    for number, part in enumerate(PARTS):
        sizes = [found["gpu_parts"][part] / unit for found in plans]
        axes.barh(range(len(plans)), sizes, left=left, color=f"C{number}", label=part)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, found in enumerate(plans):
        total = found["gpu_bytes"] / unit
        text = f" {total:,.1f} {name}{'' if found['fits'] else ', does not fit'} "
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
        cut = total > 0.8 * end
        axes.text(end if cut else total, place, text, va="center", ha="right" if cut else "left", bbox=box)
    if USABLE * whole < end:
        axes.axvline(whole, color="black", label=f"the GPU, {options.gpu_memory:g} GiB")
        axes.axvline(USABLE * whole, color="black", linestyle="--", label=f"what can be allocated, {USABLE:.0%}")
    beyond = "" if USABLE * whole < end else f"; the GPU's {options.gpu_memory:g} GiB lie outside"
    batch = f"micro-batch {config.train.micro_batch_size} x {config.model.block_size}"
    figure.suptitle(f"peak of one GPU's memory, {options.gpus} x {options.gpu}, {batch}{beyond}")
    axes.set(xlim=(0, end), xlabel=name, yticks=range(len(plans)), yticklabels=names)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def remarks(config, gpus):
    """What the reader must know of what was not taken as it was written."""
    notes = []
    zero = config.deepspeed.get("zero_optimization", {})
    if unknown := sorted(set(zero) - set(ZERO_KEYS) - OTHER_ZERO_KEYS - WITHOUT_EFFECT):
        notes.append(f"not modelled, of deepspeed.zero_optimization: {', '.join(unknown)}")
    if "nvme" in (offload_device(zero, "offload_optimizer"), offload_device(zero, "offload_param")):
        notes.append("what goes to NVMe is counted as CPU memory, and its speed as the CPU's")
    if zero.get("contiguous_gradients") is False:
        notes.append("contiguous_gradients false is planned as true")
    try:
        gradient_accumulation(config, gpus)
    except UserError as error:
        notes.append(f"train.py will refuse this batch: {error}")
    if config.train.compile is not False:
        notes.append("compiled blocks keep fewer activations than these, which are of the model as it is written")
    return notes


def read_options(arguments):
    """plan.py's own flags, and what is left: the config file and its overrides."""
    parser = FlagParser(__doc__, "plan.py CONFIG --gpus N --gpu_memory GB [--section.key value ...]")
    parser.add_argument("--gpus", type=at_least(1, MOST_GPUS), required=True)
    parser.add_argument("--gpu_memory", type=a_number(0, 1e6, above=True), required=True)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--nodes", type=at_least(1, MOST_GPUS))
    parser.add_argument("--price", type=a_number(0, 1e6))
    parser.add_argument("--plot", type=a_path)
    for flag in ("--fit", "--max", "--json"):
        parser.add_argument(flag, action="store_true")
    for assumed in dataclasses.fields(Assumptions):
        values = a_number(0, 1, above=True) if assumed.name == "utilisation" else a_number(1, 1e15)
        parser.add_argument(f"--{assumed.name}", type=values, default=assumed.default)
    options, rest = parser.parse_known_args(arguments)
    options.nodes = options.nodes or -(-options.gpus // 8)
    if options.gpus % options.nodes:
        raise UserError(
            f"--nodes: {options.nodes} does not divide --gpus {options.gpus}; give nodes of as many GPUs each"
        )
    options.peak = peak_flops(options.gpu) or peak_flops(options.gpu.upper())
    if options.peak is None:
        names = ", ".join(pattern.replace("\\b", "").strip("$") for pattern in PEAK_FLOPS)
        raise UserError(f"--gpu: peak of {options.gpu} unknown; known names (regular expressions): {names}")
    options.assumptions = Assumptions(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Assumptions)})
    return options, rest


def main(arguments):
    options, rest = read_options(arguments)
    config = load_config(rest)

    def planned(config, gpus=options.gpus):
        nodes = -(-gpus * options.nodes // options.gpus)
        limit = options.gpu_memory * GiB
        return plan(config, gpus, nodes, limit, options.peak, options.price, options.assumptions)

    answer = {}
    if options.plot:
        check_can_write("--plot", options.plot)
        try:
            draw(config, planned, options, options.plot)
        except (OSError, ValueError) as error:  # a folder that is not there, a format that is none
            raise UserError(f"--plot: {options.plot}: {error}; expected a PICTURE.png that can be written") from None
        answer["picture"] = str(options.plot)
    if options.fit:
        found, chosen = fastest(config, options.gpus, planned)
        if found is None:
            frugal = with_choice(config, 3, "param", True, 1)
            raise UserError(
                f"--fit: nothing fits in {options.gpu_memory:g} GiB, not even stage 3 with all offload, recomputation "
                f"and a micro-batch of 1; from there, {way_out(frugal, options.gpus, planned)[0]}"
            )
        answer["command"] = command(rest, config, chosen, options.gpus, options.nodes)
        config = chosen
    if options.max:
        depth = deepest(config, planned)
        if not depth:
            raise UserError(f"--max: not even one block of this width fits in {options.gpu_memory:g} GiB; try --fit")
        config.model.n_layer = answer["n_layer"] = depth
    found = planned(config) | answer
    remedy = None
    if not found["fits"]:
        remedy, found["cheapest_change"], found["enough_gpus"] = way_out(config, options.gpus, planned)
    print(report(found, config, options, remarks(config, options.gpus)))
    if remedy:
        print(remedy)
    if "command" in found:
        print(f"the fastest that fits; run: {found['command']}")
    if "n_layer" in found:
        print(f"the deepest of this width that fits: n_layer {found['n_layer']}")
    if options.plot:
        print(f"drawn: {options.plot}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    run_command(main)
