"""DeepSpeed's half of a configuration: checks of the section `deepspeed`, and the whole that DeepSpeed is given.

The keys that a run may set are in deepspeed_keys.py. Needs neither torch nor DeepSpeed.
"""

import json
import sys

from minzero import deepspeed_keys
from minzero.config.auto import AUTO, Facts, resolve
from minzero.config.nested import merge
from minzero.config.sections import Recomputation
from minzero.config.values import convert, did_you_mean, in_short, nearest_divisors, printable
from minzero.errors import UserError

# -- ZeRO and offload ----------------------------------------------------------------------------


def zero_stage(deepspeed):
    """The ZeRO stage of a DeepSpeed configuration."""
    return deepspeed.get("zero_optimization", {}).get("stage", 0)


def offload_device(zero, section):
    """Where the section `offload_optimizer` or `offload_param` keeps its part: none (on the GPU), cpu or nvme."""
    return (zero.get(section) or {}).get("device", "none")


def offload_ratio(zero):
    """The part of an offloaded optimizer that leaves the GPU, from 0 to 1."""
    return (zero.get("offload_optimizer") or {}).get("ratio", 1.0)


def offloads_optimizer(deepspeed):
    """Whether a DeepSpeed configuration keeps the optimizer's state in CPU memory or on NVMe."""
    return offload_device(deepspeed.get("zero_optimization", {}), "offload_optimizer") != "none"


# -- checks --------------------------------------------------------------------------------------


def checked_section(section, faults, path=""):
    """The checked keys of a DeepSpeed configuration, without those that only say that something is not used.

    faults: a list that each fault is added to as a line. path: the keys above this section, each followed by a dot
    ("zero_optimization.")."""
    kept = {}
    for name, value in section.items():
        key = path + name
        where = f"deepspeed.{path}{printable(name)}"
        accepted = deepspeed_keys.ACCEPTED.get(key) if "." not in name else None
        if key in deepspeed_keys.DERIVED_KEYS:
            if value != "auto":  # Hugging Face's word for that
                faults.append(f"{where} follows from {deepspeed_keys.DERIVED_KEYS[key]}; set that and remove this")
        elif value == "auto" and key in AUTO:
            kept[name] = value
        elif accepted:
            try:
                kept[name] = convert(where, value, accepted.kind, accepted._asdict())
            except UserError as error:
                auto = f"; only {', '.join(AUTO)} may be" if value == "auto" else ""
                faults.append(f"{error}{auto}")
        elif key in deepspeed_keys.SECTIONS:
            if value is None and "offload" in name:
                continue
            if isinstance(value, dict):
                kept[name] = checked_section(value, faults, f"{key}.")
            else:
                faults.append(f"{where}: found {in_short(value)}, expected an object")
        elif refused := deepspeed_keys.REFUSED.get(key):
            # compared as JSON, because 1 == True and 0 == False in Python
            if json.dumps(value) not in map(json.dumps, refused.unused):
                unused = f", or leave it at {json.dumps(refused.unused[-1])}" if refused.unused else ""
                faults.append(f"{where}: found {in_short(value)}, not supported: {refused.why}; remove it{unused}")
        else:
            faults.append(f"unknown key {where}; {did_you_mean(name, names_under(path))}")
    return kept


def names_under(path):
    """The names of keys and sections directly below `path`, such as "zero_optimization."."""
    keys = [key for key in (*deepspeed_keys.ACCEPTED, *deepspeed_keys.SECTIONS) if key.startswith(path)]
    return {key[len(path) :].split(".")[0] for key in keys}


def check_together(deepspeed, precision):
    """Check DeepSpeed's keys against each other, the ZeRO stage and the precision (auto, bf16, fp16 or fp32). A stage
    "auto" is checked when it is chosen. Raises UserError."""
    if zero_stage(deepspeed) != "auto":
        check_stage(deepspeed, precision)
    fp16 = deepspeed.get("fp16", {})
    lowest = fp16.get("min_loss_scale", 1)
    first = 2 ** fp16.get("initial_scale_power", 16)
    if lowest > first:
        raise UserError(f"deepspeed.fp16.min_loss_scale: found {lowest}, expected at most the first scale, {first}")


def check_stage(deepspeed, precision):
    """Check the ZeRO stage against DeepSpeed's other keys and the precision. Raises UserError."""
    zero = deepspeed.get("zero_optimization", {})
    stage = zero_stage(deepspeed)
    if precision == "fp16" and stage == 0:
        raise UserError(
            "deepspeed.zero_optimization.stage: found 0 with fp16, where DeepSpeed scales no loss; expected 1, 2 or 3, "
            "or --train.precision bf16 or fp32"
        )
    for section, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        key = f"deepspeed.zero_optimization.{section}"
        device = offload_device(zero, section)
        if device == "nvme" and stage != 3:
            raise UserError(f"{key}.device: found nvme at stage {stage}, expected stage 3, or cpu")
        if device == "nvme" and not zero[section].get("nvme_path"):
            raise UserError(f"{key}.nvme_path: found none, expected a folder on each node's own NVMe")
        if device != "none" and stage not in stages:
            expected = " or ".join(map(str, stages))
            raise UserError(f"{key}.device: found {device} at stage {stage}, expected stage {expected}, or none")
    if (size := zero.get("zero_hpz_partition_size", 1)) > 1 and stage != 3:
        raise UserError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size: found {size} at stage {stage}, expected stage 3, or "
            "1"
        )
    ratio = offload_ratio(zero)
    device = offload_device(zero, "offload_optimizer")
    if ratio != 1 and (stage != 3 or device != "cpu"):
        raise UserError(
            f"deepspeed.zero_optimization.offload_optimizer.ratio: found {ratio} with stage {stage} and device "
            f"{device}, expected 1, or stage 3 and device cpu"
        )
    accumulated = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    if accumulated not in (None, "auto", precision) and not (accumulated == "fp32" and stage >= 2):
        raise UserError(
            f"deepspeed.data_types.grad_accum_dtype: found {accumulated} at stage {stage} with train.precision "
            f"{precision}, where DeepSpeed does not obey it or takes an optimizer that checkpoints do not know; "
            "expected the precision itself, or fp32 at stage 2 or 3"
        )


# -- the whole for DeepSpeed ----------------------------------------------------------------------


def gradient_accumulation(config, world_size):
    """Micro-batches per rank and optimizer step, so that the step has exactly global_batch_tokens.

    Raises UserError with the nearest settings that divide; also where first_batch_tokens does not, and so the batches
    between them might not."""
    if config.train.first_batch_tokens:
        micro_batches_of("first_batch_tokens", config, world_size)
    return micro_batches_of("global_batch_tokens", config, world_size)


def micro_batches_of(name, config, world_size):
    """Micro-batches per rank of a step with the tokens of one key of the train section. Raises UserError."""
    train = config.train
    wanted = getattr(train, name)
    block = config.model.block_size
    sequences, remainder = divmod(wanted, block)
    per_round = train.micro_batch_size * world_size
    if not remainder and sequences % per_round == 0:
        return sequences // per_round
    unit = block * per_round
    below = wanted // unit * unit
    tokens = " or ".join(str(t) for t in (below, below + unit) if t)
    remedy = f"set train.{name} to {tokens}"
    if not remainder and sequences % world_size == 0:
        sizes = nearest_divisors(sequences // world_size, train.micro_batch_size)
        remedy += f", or train.micro_batch_size to {sizes}"
    raise UserError(
        f"train.{name}: {wanted} is not a multiple of block_size {block} x "
        f"micro_batch_size {train.micro_batch_size} x {world_size} ranks = {unit}; {remedy}"
    )


def auto_values(config, world_size, precision, memory=None, accumulation=None):
    """{key: value} of DeepSpeed's keys that are "auto" in a Config, for so many ranks. precision: bf16, fp16 or fp32.
    memory: bytes of a rank's device. accumulation: micro-batches of a step. The stage must not be "auto"."""
    deepspeed = config.deepspeed
    zero = deepspeed.get("zero_optimization", {})
    offloads = offload_device(zero, "offload_param") != "none"
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)  # DeepSpeed's default
    threshold = None if threshold == "auto" else threshold
    accumulation = accumulation or gradient_accumulation(config, world_size)
    facts = Facts(
        model=config.model,
        stage=zero_stage(deepspeed),
        world_size=world_size,
        precision=precision,
        accumulation=accumulation,
        memory=memory,
        offloads_weights=offloads,
        selective=Recomputation.of(config.train.activation_checkpointing).selective,
        reduce_scatter=zero.get("reduce_scatter", True),
        persistence=threshold,
    )
    return resolve(deepspeed, facts)


def with_auto_values(deepspeed, values):
    """A DeepSpeed configuration with the values of `auto_values` in place of "auto"; null ones are left out."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            deepspeed = merge(deepspeed, {section: {name: value}})
            continue
        rest = {other: kept for other, kept in deepspeed[section].items() if other != name}
        deepspeed = {other: kept for other, kept in deepspeed.items() if other != section}
        deepspeed |= {section: rest} if rest else {}
    return deepspeed


def check_second_copy(deepspeed, world_size):
    """Raises UserError where the ranks do not divide into groups that keep a second copy of the weights each."""
    size = deepspeed.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if world_size % min(size, world_size):
        raise UserError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size: found {size}, which does not divide {world_size} "
            "ranks; expected the number of GPUs of a node, or 1"
        )


def deepspeed_config(config, world_size, precision, on_gpu, memory=None):
    """The complete DeepSpeed configuration of this run: the user's keys, "auto" among them replaced, and those that
    follow from the `train` section. precision: bf16, fp16 or fp32. memory: bytes of a rank's device."""
    train = config.train
    check_second_copy(config.deepspeed, world_size)
    gradient_accumulation_steps = gradient_accumulation(config, world_size)
    adam = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
    # torch's AdamW needs no compiler and resumes bit for bit. DeepSpeed's own vectorised Adam is worth its
    # compilation only for state that lives in a GPU machine's CPU memory.
    if train.optimizer == "muon" or not (on_gpu and offloads_optimizer(config.deepspeed)):
        adam |= {"torch_adam": True, "fused": True}
    derived = {
        "train_batch_size": train.micro_batch_size * gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": train.grad_clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": train.optimizer == "muon",
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice per micro-batch
    }
    return merge(derived, with_auto_values(config.deepspeed, auto_values(config, world_size, precision, memory)))
