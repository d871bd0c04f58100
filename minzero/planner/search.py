"""Which setting fits: the fastest one, the cheapest change, enough GPUs, the deepest model.

`planned` stands for a function: configuration -> its plan (plan.plan_run on given hardware).
"""

import copy
import json

from minzero.config.build import build
from minzero.config.deepspeed import check_together, offload_device, offloads_optimizer, zero_stage
from minzero.config.load import command_line_values
from minzero.config.nested import flat, merge
from minzero.config.sections import Recomputation
from minzero.config.values import divisors
from minzero.errors import UserError
from minzero.planner.batches import is_legal, legal_batch, micro_batches
from minzero.planner.settings import MOST_LAYERS
from minzero.sizes import parameter_sizes

# The candidates of --fit and --plot: (stage, offload). optimizer: kept in CPU memory; param: the weights too.
CHOICES = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "param")]
RECOMPUTED = (False, "selective", True)  # candidates of train.activation_checkpointing, the fastest first
WITHOUT_OFFLOAD = {"device": "none", "ratio": 1.0}  # values of an offload section that mean the same as none
MOST_GPUS_TRIED = 2**14  # by enough_gpus


def with_choice(config, stage, offload, recompute, micro_batch_size):
    """A copy of the configuration with another setting. offload: "none", "optimizer" or "param" (both). recompute: a
    value of train.activation_checkpointing."""
    config = copy.deepcopy(config)
    zero = config.deepspeed.setdefault("zero_optimization", {})
    zero["stage"] = stage
    zero.pop("offload_optimizer", None)
    zero.pop("offload_param", None)
    if offload in ("optimizer", "param"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "param":
        zero["offload_param"] = {"device": "cpu"}
    config.train.activation_checkpointing = recompute
    if recompute == "selective":  # which is refused together with it
        config.train.activation_offload = False
    config.train.micro_batch_size = micro_batch_size
    return config


def first_that_fits(candidates, planned):
    """The plan of the first of these configurations that fits, and the configuration; (None, None) if none does.
    Each must need less memory than the one before it: the list is halved, not tried one by one."""
    found = (None, None)
    low, high = 0, len(candidates)  # all before `low` do not fit, those from `high` on do
    while low < high:
        middle = (low + high) // 2
        plan = planned(candidates[middle])
        if plan["fits"]:
            found = plan, candidates[middle]
            high = middle
        else:
            low = middle + 1
    return found


def first_number(holds, limit):
    """The least whole number from 1 on for which `holds` is true, by doubling and halving; None if none is found by
    doubling up to `limit`. From one number on, it must hold for all."""
    high = 1
    while not holds(high):
        high *= 2
        if high > limit:
            return None
    low = high // 2  # does not hold for it, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def smaller_buffers(config):
    """A copy of the configuration with smaller buffers of its stage: nothing else changes, and the speed little."""
    buffers = {f"deepspeed.zero_optimization.{name}": small for name, small in buffers_to_shrink(config)}
    changed = with_overrides(config, buffers)
    changed.model = config.model
    return changed


def anything_fits(config, gpus, planned):
    """Whether --fit would find a setting."""
    least = micro_batches(legal_batch(config, gpus), gpus)[-1]
    for stage, offload in CHOICES[::-1]:
        candidate = with_choice(config, stage, offload, True, least)
        try:
            check_together(candidate.deepspeed, config.train.precision)
        except UserError:
            continue  # train.py would refuse the rest of the deepspeed section at this stage
        if planned(candidate)["fits"] or planned(smaller_buffers(candidate))["fits"]:
            return True
    return False


def deepest(config, planned):
    """The largest n_layer that fits, 0 if none does."""

    def does_not_fit(depth):
        candidate = copy.deepcopy(config)
        candidate.model.n_layer = depth
        return not planned(candidate)["fits"]

    too_deep = first_number(does_not_fit, MOST_LAYERS)
    return too_deep - 1 if too_deep else MOST_LAYERS


def enough_gpus(config, gpus, planned):
    """The least multiple of `gpus` on which train.py takes this configuration and it fits, None above MOST_GPUS_TRIED.
    planned: here (configuration, number of GPUs) -> plan, None for a number that cannot be rented."""

    def fits(number):
        return {"fits": planned(config, number)["fits"], "gpus": number}

    sequences = config.train.global_batch_tokens // config.model.block_size
    numbers = [number for number in divisors(sequences // config.train.micro_batch_size) if number % gpus == 0]
    numbers = [number for number in numbers if number <= MOST_GPUS_TRIED and is_legal(config, number)]
    return first_that_fits([number for number in numbers if planned(config, number)], fits)[1]


# ---- changes of a configuration


def overrides(given, config):
    """{key: value} of the command line that makes `config`, a copy of `given` with other keys. What only `given` has
    is set to the value that means the same as no key."""
    before, after = flat(given.to_dict()), flat(config.to_dict())
    changes = {key: value for key, value in after.items() if key not in before or before[key] != value}
    for key in before.keys() - after.keys():
        name = key.rsplit(".", 1)[-1]
        if name in WITHOUT_OFFLOAD:
            changes[key] = WITHOUT_OFFLOAD[name]
    return {key: value for key, value in changes.items() if value != {}}


def buffers_to_shrink(config):
    """(key of zero_optimization, smaller value) of the stage's buffers that are larger."""
    zero, stage = config.deepspeed.get("zero_optimization", {}), zero_stage(config.deepspeed)
    block = sum(parameter_sizes(config.model).block)
    buffers = {}  # key: its new value, which "auto" is never below (config/auto.py)
    if stage:
        buffers["reduce_bucket_size"] = min(10_000_000, max(block, 1_000_000))
    if stage == 3:
        buffers["sub_group_size"] = 100_000_000
        buffers["stage3_prefetch_bucket_size"] = min(10_000_000, block // 2)
        buffers["stage3_max_reuse_distance"] = 0
        buffers["stage3_param_persistence_threshold"] = 100_000
        buffers["stage3_max_live_parameters"] = 2 * block
    for name, small in buffers.items():
        given = zero.get(name, "auto")
        if given == "auto" or given > small:
            yield name, small


def single_changes(config):
    """Overrides that may save memory, each {key: value}: the cheapest, which cost no speed, first."""
    zero, train = config.deepspeed.get("zero_optimization", {}), config.train
    stage, section = zero_stage(config.deepspeed), "deepspeed.zero_optimization"
    for name, small in buffers_to_shrink(config):
        yield {f"{section}.{name}": small}
    for higher in range(stage + 1, 4):
        yield {f"{section}.stage": higher}
    every, selective, _ = Recomputation.of(train.activation_checkpointing)
    if every != 1 and not train.activation_offload:
        yield {"train.activation_checkpointing": "selective"}
    if every != 1 or selective:
        yield {"train.activation_checkpointing": True}
    elif not train.activation_offload:
        yield {"train.activation_offload": True}
    offload = {} if offloads_optimizer(config.deepspeed) else {f"{section}.offload_optimizer.device": "cpu"}
    if stage and offload:
        yield offload
    if stage == 3 and offload_device(zero, "offload_param") == "none":
        yield offload | {f"{section}.offload_param.device": "cpu"}


def pairs_of_changes(config):
    """Two overrides of different keys, as one {key: value}."""
    for first in single_changes(config):
        for second in single_changes(with_overrides(config, first)):
            if not first.keys() & second.keys():
                yield first | second


def with_overrides(config, change):
    """A copy of the configuration with these overrides, {key: value}."""
    words = []
    for key, value in change.items():
        words += [f"--{key}", json.dumps(value)]
    overrides, _ = command_line_values(words)
    return build(merge(config.to_dict(), overrides), "command line")


def cheapest_change(config, gpus, planned):
    """The fastest single override that fits; failing that, the fastest pair; ({key: value}, its plan) or (None, None).
    A smaller micro-batch is as large as fits."""
    sizes = [size for size in micro_batches(config, gpus) if size < config.train.micro_batch_size]

    def those_that_fit(changes):
        fitting = []
        for change in changes:
            plan = planned(with_overrides(config, change))
            if plan["fits"]:
                fitting.append((change, plan))
        return fitting

    def with_smaller_batch(change):
        changes = [change | {"train.micro_batch_size": size} for size in sizes]
        plan, _ = first_that_fits([with_overrides(config, change) for change in changes], planned)
        if plan is None:
            return []
        return [(change | {"train.micro_batch_size": plan["micro_batch_size"]}, plan)]

    fitting = those_that_fit(single_changes(config)) + with_smaller_batch({})
    if not fitting:
        fitting = those_that_fit(pairs_of_changes(config))
        for change in single_changes(config):
            fitting += with_smaller_batch(change)
    # of equally fast ones the first: it is the smaller change
    return max(fitting, key=lambda pair: pair[1]["tokens_per_second"], default=(None, None))
