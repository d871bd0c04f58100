"""DeepSpeed's private layout: where an engine keeps master weights and optimizer states, at any ZeRO stage.

This is the only file that knows the internals of DeepSpeed 0.19.8. A rank updates contiguous parts of the parameters,
here called fragments; `fragments_in_memory` gives their float32 weights and moments as flat tensors.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import distributed

from minzero.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of train.precision
KINDS = ("exp_avg", "exp_avg_sq", "fp32")  # per element: Adam's two moments and the float32 weight
KINDS_OF_MUON = ("exp_avg", "fp32")  # its momentum is the mean of gradients that Adam's first moment is


def torch_linear():
    """Restore torch's linear function, which building a ZeRO-3 engine in this process has replaced."""
    # imported here: eval.py, sample.py and plot.py read checkpoints without the seconds that DeepSpeed takes to import
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    if hasattr(InsertPostInitMethodToModuleSubClasses, "linear_bk"):
        torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk


def grad_norm_of(engine):
    """The norm of the last gradient over all ranks, where DeepSpeed finds one; NaN if it was not finite."""
    norm = float(engine.optimizer._global_grad_norm)
    return norm if norm >= 0 else math.nan  # DeepSpeed's -1 stands for a NaN or an infinity


def undo_trial_step(engine):
    """At stage 0 in 16 bits DeepSpeed tries the optimizer when the engine is made: the step is counted and the weights
    have decayed. Put both back."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return
    engine.basic_optimizer.state.clear()
    masters = stage_0_masters(engine)
    for _, parameter in trained_parameters(engine):
        masters[id(parameter)].data.copy_(parameter.data)


def set_prefetch(engine, elements):
    """Stage 3: let DeepSpeed fetch so many elements ahead of their use. With stage3_allgather_sequential it sets 1,
    which would leave every matrix of a block but the first to wait for."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    coordinator._PartitionedParameterCoordinator__prefetch_bucket_sz = int(elements)


# -- optimizers ------------------------------------------------------------------------------------


def optimizers(engine):
    """The engine's optimizers. With partial offload (offload_optimizer.ratio below 1) there are two: the CPU's, and one
    that DeepSpeed adds for the tensors that stay on the GPU. DeepSpeed sets the learning rate of the first only."""
    on_gpu = getattr(engine.optimizer, "backup_optimizer", None)
    return [engine.basic_optimizer] + ([on_gpu] if on_gpu else [])


def relative_rates(engine):
    """The rate of each parameter group over AdamW's, the same in each of `optimizers`: the groups of the second are
    those of the first, but for that of the first group, which DeepSpeed makes again."""
    return [group.get("relative_rate", 1) for group in engine.basic_optimizer.param_groups]


def optimizer_of(engine, group):
    """The one of `optimizers` that updates a parameter group, given its index (stage 3: of a sub-group)."""
    on_cpu, *on_gpu = optimizers(engine)
    if on_gpu and engine.optimizer.subgroup_to_device[group] != "cpu":
        return on_gpu[0]
    return on_cpu


def optimizer_state(optimizer, flat, kinds=KINDS):
    """The state {"step", "exp_avg", "exp_avg_sq"} of one flat tensor, created as zeros before the first step. kinds: of
    its fragments; Muon's have no "exp_avg_sq"."""
    state = optimizer.state[flat]
    if not state:
        if isinstance(optimizer, torch.optim.AdamW):
            device = flat.device if optimizer.defaults.get("fused") else "cpu"
            state["step"] = torch.zeros((), device=device)
        else:  # DeepSpeed's counts in a plain number
            state["step"] = 0
        for kind in kinds:
            if kind != "fp32":
                state[kind] = torch.zeros_like(flat, requires_grad=False)
    return state


def optimizer_steps(engine):
    """The number of steps that the optimizer has made. Every tensor counts its own; all must agree."""
    steps = set()
    for fragment in local_fragments(engine):
        state = optimizer_of(engine, fragment.group).state[fragment.flat]
        steps.add(int(state["step"]) if state else 0)
    assert len(steps) == 1, f"the parts of the optimizer disagree on the number of steps: {steps}"
    return steps.pop()


def set_optimizer_steps(state, steps):
    """Set the step count of one tensor's Adam state: torch's Adam keeps it in a tensor, DeepSpeed's in a number."""
    state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps


def reset_cpu_adam_bias_correction(optimizer):
    """Make DeepSpeed's CPU Adam compute beta^t from scratch; to be called before every step. It caches beta^t between
    consecutive steps, which differs by a rounding error from what it computes after loading a checkpoint. A dummy
    update of one element with a distant step number clears the cache, so a resumed run matches bit for bit."""
    if hasattr(optimizer, "ds_opt_adam"):
        group = optimizer.param_groups[0]
        settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
        weight, gradient, exp_avg, exp_avg_sq = (torch.zeros(1) for _ in range(4))
        distant_step = 1 << 30
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, distant_step, *settings, weight, gradient, exp_avg, exp_avg_sq
        )


def loss_scaler(engine):
    """The object that holds fp16's loss scale: ZeRO stages and stage 0 keep it under different names."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def trained_parameters(engine):
    """[(name, parameter)] of those that are not frozen, in the model's order."""
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def newton_schulz(matrices):
    """Each of (n, rows, columns) with singular values near 1, by DeepSpeed's function: five Newton-Schulz steps, in
    float16 where the device has it, else in float32."""
    from deepspeed.runtime.zero.muon import original_muon  # see torch_linear

    # not compiled, as its decorator has it: a run that continues elsewhere would need the same compiler for the same
    # numbers
    return inspect.unwrap(original_muon.zeropower_via_gram_newtonschulz)(matrices, steps=5)


# -- fragments -------------------------------------------------------------------------------------


class Fragment(NamedTuple):
    """Elements [start, start + length) of a flattened parameter, which this rank updates. They are elements
    [offset, offset + length) of `flat`, a tensor of the optimizer's parameter group (stage 3: sub-group) `group`."""

    parameter: str
    start: int
    length: int
    flat: torch.Tensor
    offset: int
    group: int
    kinds: tuple = KINDS  # what the optimizer keeps of each element, with its float32 weight


def stage_0_masters(engine):
    """Stage 0: {id of a parameter: the tensor that the optimizer updates}, in 16 bits a float32 copy."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        return {id(parameter): parameter for _, parameter in trained_parameters(engine)}
    pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
    return {id(parameter): master for parameter, master in pairs}


def stage_0_fragments(engine):
    """Every rank updates every parameter, each a tensor of its own."""
    masters = stage_0_masters(engine)
    for name, parameter in trained_parameters(engine):
        yield Fragment(name, 0, parameter.numel(), masters[id(parameter)], 0, 0)


def stage_1_and_2_fragments(engine):
    """The parameters of a group are concatenated and cut into equal partitions, one a rank. Read from the offsets in
    that concatenation: a parameter's own `_hp_mapping` is wrong with round_robin_gradients, which changes the order."""
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, zero.partition_size, strict=True)
    for group, (parameters, offsets, length) in enumerate(groups):
        flat = zero.single_partition_of_fp32_groups[group]
        begin = distributed.get_rank() * length
        for parameter, offset in zip(parameters, offsets, strict=True):
            first = max(offset, begin)
            end = min(offset + parameter.numel(), begin + length)
            yield Fragment(names[id(parameter)], first - offset, end - first, flat, first - begin, group)


def stage_3_fragments(engine):
    """Every parameter is cut into equal partitions, one a rank; the last one is padded."""
    zero = engine.optimizer
    for name, parameter in trained_parameters(engine):
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        start = distributed.get_rank() * length
        flat = zero.fp32_partitioned_groups_flat[group]
        yield Fragment(name, start, min(length, parameter.ds_numel - start), flat, offset, group)


def local_fragments(engine) -> list[Fragment]:
    """The fragments that this rank updates, in the order of the model's parameters within each tensor of the optimizer;
    those of one tensor are consecutive. At stage 0 every rank has them all."""
    stages = (stage_0_fragments, stage_1_and_2_fragments, stage_1_and_2_fragments, stage_3_fragments)
    found = [fragment for fragment in stages[engine.zero_optimization_stage()](engine) if fragment.length > 0]
    by_muon = getattr(engine.basic_optimizer, "matrices", {})
    found = [f._replace(kinds=KINDS_OF_MUON) if f.parameter in by_muon else f for f in found]
    order = {name: number for number, (name, _) in enumerate(engine.module.named_parameters())}
    return sorted(found, key=lambda fragment: (fragment.group, order[fragment.parameter]))


def sharded_tensors(engine):
    """Stages 1 to 3: the tensors of the optimizer on this rank, by the index that their fragments have as `group`."""
    zero = engine.optimizer
    return (
        zero.fp32_partitioned_groups_flat
        if engine.zero_optimization_stage() == 3
        else (zero.single_partition_of_fp32_groups)
    )


# -- access to their values ------------------------------------------------------------------------


def nvme_swapper(engine):
    """DeepSpeed's swapper if tensors of the optimizer are on NVMe, else None. Memory may not hold them all at once."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    return swapper if swapper and swapper.swap_params_info else None


@contextlib.contextmanager
def in_memory(engine, flat, group, changed, kinds=KINDS):
    """Context in which a tensor of the optimizer and its moments are in memory; yields its `optimizer_state`.
    group: the index of its parameter group. changed: write the values back to NVMe at the end."""
    swapper = nvme_swapper(engine)
    if swapper is None or flat.ds_id not in swapper.swap_params_info:
        yield optimizer_state(optimizer_of(engine, group), flat, kinds)
        return
    swapper.swap_in_optimizer_state(flat, async_parameter=None)
    new = not engine.basic_optimizer.state[flat]
    yield optimizer_state(engine.basic_optimizer, flat, kinds)
    if changed or new:
        swapper.writeback_optimizer_state_and_gradients(flat, write_opt_state=True, write_gradients=False)
    else:
        swapper.release_swap_buffers(flat)
    flat.grad = None  # it was swapped in too, and belongs to a finished step


def fragments_in_memory(engine, fragments, changed=False) -> Iterator[tuple[Fragment, dict, dict]]:
    """Yield (Fragment, {kind: flat tensor of its elements} of its kinds, its `optimizer_state`) for each of
    `local_fragments`. The tensors are views, valid until the next iteration: read them to save, or copy into them
    (`changed`) to load."""
    for _, same_tensor in groupby(fragments, key=lambda fragment: id(fragment.flat)):
        same_tensor = list(same_tensor)
        flat, kinds = same_tensor[0].flat, same_tensor[0].kinds
        with in_memory(engine, flat, same_tensor[0].group, changed, kinds) as state:
            whole = {kind: flat.detach() if kind == "fp32" else state[kind] for kind in kinds}
            for fragment in same_tensor:
                part = slice(fragment.offset, fragment.offset + fragment.length)
                yield fragment, {kind: tensor.view(-1)[part] for kind, tensor in whole.items()}, state


def refresh_weights(engine):
    """Copy the optimizer's float32 master weights into the weights that the forward pass uses."""
    stage = engine.zero_optimization_stage()
    zero = engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            with in_memory(engine, flat, group, changed=False):
                zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # small parameters are kept whole on every rank
    elif stage:
        zero.update_lp_params()
    else:
        masters = stage_0_masters(engine)
        for _, parameter in trained_parameters(engine):
            parameter.data.copy_(masters[id(parameter)].data)


# -- finite numbers --------------------------------------------------------------------------------


def all_finite(tensor):
    """Whether a floating-point tensor holds neither a NaN nor an infinity. One pass without temporary tensors, many
    times faster than torch.isfinite: aminmax returns NaN if any element is NaN."""
    if not tensor.numel():
        return True
    lowest, highest = torch.aminmax(tensor)
    return math.isfinite(float(lowest)) and math.isfinite(float(highest))


def first_not_finite(engine, progress: Callable = lambda: None) -> str | None:
    """The first weight or moment of this rank that holds a NaN or an infinity, as "<kind> of <parameter>", or None.
    progress: called for each fragment."""
    for fragment, parts, _ in fragments_in_memory(engine, local_fragments(engine)):
        progress()
        for kind, part in parts.items():
            if not all_finite(part):
                return f"{kind} of {fragment.parameter}"
    return None


@torch.no_grad()
def copy_into(model, load, chosen=lambda name: True):
    """Give every parameter of `model` whose name is chosen the value read(name), where read = load(), from rank 0.
    Parameter by parameter, so that under ZeRO-3 no rank ever holds more than one whole; in the other stages
    `deepspeed.initialize` broadcasts rank 0's. Every rank must call this; all raise UserError if rank 0 cannot
    read."""
    import deepspeed  # see torch_linear

    from minzero import dist

    is_first = distributed.get_rank() == 0
    fault, read = None, None
    for name, parameter in model.named_parameters():
        if not chosen(name):
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if not is_first or fault:
                continue  # all ranks gather, whatever rank 0 finds
            try:
                read = read or load()
                parameter.copy_(read(name)[: len(parameter)])  # learned positions past block_size are left out
            except UserError as error:
                fault = error
    with dist.all_or_none():
        if fault:
            raise fault
