"""The pieces of the parameters: which of them this rank owns, at any ZeRO stage, and how they lie in a file.

This is the one place that knows how DeepSpeed 0.19.8 lays out weights and optimizer states.
"""

import contextlib
import json
import os
import struct
import zlib
from collections import defaultdict
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import distributed

from config import UserError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


# -- in the engine ---------------------------------------------------------------------------------


def stage_0_masters(engine):
    """Stage 0: {id of a parameter: the tensor that the optimizer updates}, in 16 bits a float32 copy."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        return {id(parameter): parameter for parameter in engine.module.parameters()}
    pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
    return {id(parameter): master for parameter, master in pairs}


def optimizers(engine):
    """The engine's optimizers: in partial offload (offload_optimizer.ratio below 1) the CPU's, and one that DeepSpeed
    makes for the tensors that stay on the GPU, and does not tell of another learning rate."""
    on_gpu = getattr(engine.optimizer, "backup_optimizer", None)
    return [engine.basic_optimizer] + ([on_gpu] if on_gpu else [])


def optimizer_of(engine, group):
    """The one of `optimizers` that updates this group of parameters, by its number (stage 3: sub-group)."""
    on_cpu, *on_gpu = optimizers(engine)
    return on_gpu[0] if on_gpu and engine.optimizer.subgroup_to_device[group] != "cpu" else on_cpu


def adam_state(optimizer, flat):
    """Adam's state of one tensor, made if the first step has not made it yet; `step` is each tensor's own."""
    state = optimizer.state[flat]
    if not state:
        torch_adam = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's counts in a plain number
        device = flat.device if optimizer.defaults.get("fused") else "cpu"
        state["step"] = torch.zeros((), device=device) if torch_adam else 0
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(flat, requires_grad=False) for _ in range(2))
    return state


class Piece(NamedTuple):
    """Elements [start, start + length) of a parameter, which are [offset, offset + length) of a tensor that this
    rank's optimizer updates, that of the group of this number."""

    parameter: str
    start: int
    length: int
    flat: torch.Tensor
    offset: int
    group: int


def fragments(engine):
    """Stages 1 and 2: {id of a parameter: (group, the tensor that the optimizer updates, first element of the
    parameter in it, where that lies in the tensor, number of elements)}, of the parameters that this rank updates a
    part of. The parameters of a group lie in a row, which is cut into equal parts, one a rank. Read from the row
    itself: a parameter's own `_hp_mapping` is wrong with round_robin_gradients, which orders the row differently."""
    zero, found = engine.optimizer, {}
    groups = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, zero.partition_size, strict=True)
    for group, (parameters, offsets, length) in enumerate(groups):
        flat, begin = zero.single_partition_of_fp32_groups[group], distributed.get_rank() * length
        for parameter, offset in zip(parameters, offsets, strict=True):
            first, end = max(offset, begin), min(offset + parameter.numel(), begin + length)
            if first < end:
                found[id(parameter)] = group, flat, first - offset, first - begin, end - first
    return found


def own_layout(engine):
    """The Pieces that this rank updates, those of one tensor of the optimizer one after the other. At stage 0
    every rank updates everything."""
    stage, zero, found = engine.zero_optimization_stage(), engine.optimizer, []
    masters = stage_0_masters(engine) if stage == 0 else None
    rows = fragments(engine) if stage in (1, 2) else None
    for name, parameter in engine.module.named_parameters():
        group = 0
        if stage == 0:
            flat, start, offset = masters[id(parameter)], 0, 0
            length = elements = parameter.numel()
        elif stage == 3:  # every parameter is cut into equal parts, the last one padded
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            flat, elements = zero.fp32_partitioned_groups_flat[group], parameter.ds_numel
            start = distributed.get_rank() * length
        elif id(parameter) not in rows:
            continue  # no part of this one is ours
        else:
            group, flat, start, offset, length = rows[id(parameter)]
            elements = parameter.numel()
        length = min(length, elements - start)
        if length > 0:
            found.append(Piece(name, start, length, flat, offset, group))
    return sorted(found, key=lambda piece: piece.group)


def nvme_swapper(engine, flat):
    """DeepSpeed's swapper, if the optimizer keeps this tensor and its moments on NVMe, else None."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    return swapper if swapper and flat.ds_id in swapper.swap_params_info else None


@contextlib.contextmanager
def in_memory(engine, flat, group, changed):
    """Inside, a tensor of the optimizer, that of a group, and its moments are in memory, wherever they are kept.
    changed: they will have been written to. Gives Adam's state."""
    swapper = nvme_swapper(engine, flat)
    if swapper is None:
        yield adam_state(optimizer_of(engine, group), flat)
        return
    swapper.swap_in_optimizer_state(flat, async_parameter=None)
    new = not engine.basic_optimizer.state[flat]
    yield adam_state(engine.basic_optimizer, flat)
    if changed or new:
        swapper.writeback_optimizer_state_and_gradients(flat, write_opt_state=True, write_gradients=False)
    else:
        swapper.release_swap_buffers(flat)
    flat.grad = None  # which was swapped in as well, and belongs to a step that is done


def pieces_in_memory(engine, layout, changed=False):
    """Yield (Piece, {"fp32", "exp_avg", "exp_avg_sq": flat tensor}, Adam's state) for each piece of a layout. The
    tensors are views, good until the next is asked for: read them to save, copy into them (`changed`) to load."""
    for _, pieces in groupby(layout, key=lambda piece: id(piece.flat)):
        pieces = list(pieces)
        flat = pieces[0].flat
        with in_memory(engine, flat, pieces[0].group, changed) as state:
            whole = {"fp32": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for piece in pieces:
                part = slice(piece.offset, piece.offset + piece.length)
                yield piece, {kind: tensor.view(-1)[part] for kind, tensor in whole.items()}, state


def optimizer_steps(engine):
    """How many steps the optimizer has made, which each of its tensors counts by itself."""
    states = (optimizer_of(engine, piece.group).state[piece.flat] for piece in own_layout(engine))
    steps = {int(state["step"]) if state else 0 for state in states}
    assert len(steps) == 1, f"the parts of the optimizer disagree on the number of steps: {steps}"
    return steps.pop()


def refresh_weights(engine):
    """Give the weights of the forward pass the values of the float32 ones that the optimizer keeps."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
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
        for parameter in engine.module.parameters():
            parameter.data.copy_(masters[id(parameter)].data)


def forget_powers(optimizer):
    """DeepSpeed's CPU Adam multiplies beta^t up from step to step, but computes it again after a checkpoint: one
    rounding apart. Called before every step, this makes it compute it again always: it updates one
    element that nobody needs, as a step that is never the one before the true one."""
    if hasattr(optimizer, "ds_opt_adam"):
        group, far_away = optimizer.param_groups[0], 1 << 30
        nothing = [torch.zeros(1) for _ in range(4)]  # weight, gradient, both moments
        settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, far_away, *settings, *nothing)


def loss_scaler(engine):
    """The object that holds fp16's loss scale, under the name that the ZeRO stages or stage 0 give it."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def own_tensors(engine):
    """What this rank writes, its pieces and the state of its random numbers: {name: (dtype, number of elements)},
    and an iterator of the tensors in this order, each good until the next is asked for."""
    layout, kinds = own_layout(engine), ("fp32", "exp_avg", "exp_avg_sq")
    if engine.zero_optimization_stage() == 0:  # what all hold, one of them writes
        layout = layout[distributed.get_rank() :: distributed.get_world_size()]
    random = {"random/cpu/0": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["random/cuda/0"] = torch.cuda.get_rng_state()
    header = {name: (state.dtype, len(state)) for name, state in random.items()}
    header |= {f"{kind}/{p.parameter}/{p.start}": (torch.float32, p.length) for p in layout for kind in kinds}
    pieces = (parts[kind] for _, parts, _ in pieces_in_memory(engine, layout) for kind in kinds)
    return header, chain(random.values(), pieces)


def only_on_nvme(engine):
    """Whether there may be no room in memory for all that `own_tensors` gives."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    return bool(swapper and swapper.swap_params_info)


# -- in files --------------------------------------------------------------------------------------


def write_tensors(path, sizes, tensors):
    """Write a safetensors file (8 bytes of length, a JSON header, the bytes of the tensors), one tensor after the
    other: no second copy of them all is ever in memory. sizes: {name: (dtype, number of elements)} of the flat
    tensors, in their order. Returns the file's size and checksum. Raises OSError."""
    header, end, check = {}, 0, 0
    for name, (dtype, elements) in sizes.items():
        begin, end = end, end + elements * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": [elements], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        contents = (tensor.cpu().view(torch.uint8).numpy().data for tensor in tensors)
        for content in chain((struct.pack("<Q", len(text)), text), contents):
            check = zlib.crc32(content, check)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        assert file.tell() == 8 + len(text) + end, "a tensor was not as long as its header says"
        return {"bytes": file.tell(), "crc32": f"{check:08x}"}


def saved_pieces(path, state):
    """{(kind, parameter): [(first element, number of elements, piece)]} of all files of a checkpoint; nothing
    is read before a piece is sliced. Raises UserError."""
    found = defaultdict(list)
    for name in state["files"]:
        try:
            file = safe_open(Path(path) / name, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}/{name}: {error}; the checkpoint is damaged, use an older one") from None
        for key in sorted(file.keys()):
            kind, parameter, start = key.split("/")
            piece = file.get_slice(key)
            found[kind, parameter].append((int(start), piece.get_shape()[0], piece))
    return found


def fill(tensor, start, saved, what):
    """Copy elements [start, start + len(tensor)) of a parameter into a flat tensor, from whatever saved pieces
    hold them. Raises UserError if there are too few of them."""
    filled = 0
    for first, length, piece in saved:
        begin, end = max(start, first), min(start + len(tensor), first + length)
        if begin < end:
            tensor[begin - start : end - start].copy_(piece[begin - first : end - first])
            filled += end - begin
    if filled != len(tensor):
        raise UserError(
            f"{what}: found {filled} of {len(tensor)} elements; the checkpoint is damaged, use an older one"
        )
