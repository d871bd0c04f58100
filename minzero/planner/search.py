"""Which setting fits: the fastest one, the cheapest change, enough GPUs, the deepest model.

`planned` stands for a function: configuration -> its plan (plan.plan_run on given hardware).
"""

import copy
import json

from minzero.config.build import build
from minzero.config.deepspeed import check_together, offload_device, offloads_optimizer, zero_stage
from minzero.config.load import command_line_values
from minzero.config.nested import merge
from minzero.config.sections import Recomputation
from minzero.config.values import divisors
from minzero.errors import UserError
from minzero.planner.settings import MOST_LAYERS
from minzero.sizes import parameter_sizes

# The candidates of --fit and --plot: (stage, offload). optimizer: kept in CPU memory; param: the weights too.
CHOICES = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "param")]
RECOMPUTED = (False, "selective", True)  # candidates of train.activation_checkpointing, the fastest first
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


def micro_batches(config, gpus):
    """Micro-batch sizes by which each rank's share of the global batch divides, the largest first; 1 if none."""
    sequences = config.train.global_batch_tokens // config.model.block_size
    share = sequences // gpus if sequences % gpus == 0 else 1
    return divisors(max(share, 1))[::-1]


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


def fastest(config, gpus, planned):
    """The fastest plan that fits over stages, offload, recomputation and micro-batches, and its configuration;
    (None, None) if none does. The largest micro-batch that fits is the fastest."""
    best, best_config = None, None
    sizes = micro_batches(config, gpus)
    for stage, offload in CHOICES:
        try:
            check_together(with_choice(config, stage, offload, False, 1).deepspeed, config.train.precision)
        except UserError:
            continue  # train.py would refuse the rest of the deepspeed section at this stage
        for recompute in RECOMPUTED:
            candidates = [with_choice(config, stage, offload, recompute, size) for size in sizes]
            plan, candidate = first_that_fits(candidates, planned)
            if plan and (best is None or plan["tokens_per_second"] > best["tokens_per_second"]):
                best, best_config = plan, candidate
    return best, best_config


def deepest(config, planned):
    """The largest n_layer that fits, 0 if none does."""

    def does_not_fit(depth):
        candidate = copy.deepcopy(config)
        candidate.model.n_layer = depth
        return not planned(candidate)["fits"]

    too_deep = first_number(does_not_fit, MOST_LAYERS)
    return too_deep - 1 if too_deep else MOST_LAYERS


def enough_gpus(config, gpus, planned):
    """The least multiple of `gpus` on which this configuration fits, None above MOST_GPUS_TRIED. planned: here
    (configuration, number of GPUs) -> plan."""
    multiple = first_number(lambda number: planned(config, number * gpus)["fits"], MOST_GPUS_TRIED // gpus)
    return multiple and multiple * gpus


# ---- the cheapest change


def single_changes(config):
    """Overrides that may save memory, each {key: value}: the cheapest, which cost no speed, first."""
    zero, train = config.deepspeed.get("zero_optimization", {}), config.train
    stage, section = zero_stage(config.deepspeed), "deepspeed.zero_optimization"
    buffers = {}  # key: its new value
    if stage:
        buffers["reduce_bucket_size"] = 10_000_000
    if stage == 3:
        buffers["sub_group_size"] = 100_000_000
        buffers["stage3_prefetch_bucket_size"] = 10_000_000
        buffers["stage3_max_reuse_distance"] = 100_000_000
        buffers["stage3_param_persistence_threshold"] = 100_000
        buffers["stage3_max_live_parameters"] = 2 * sum(parameter_sizes(config.model).block)
    for name, small in buffers.items():
        given = zero.get(name, "auto")
        if given == "auto" or given > small:
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
