"""The pieces of the parameters: which of them this rank owns, at any ZeRO stage, and how they lie in a file.

This is the one place that knows how DeepSpeed 0.19.8 lays out weights and optimizer states.
"""

import json
import os
import struct
import zlib
from collections import defaultdict
from itertools import chain
from pathlib import Path

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


def adam_state(optimizer, flat):
    """Adam's state of one tensor, made if the first step has not made it yet; `step` is each tensor's own."""
    state = optimizer.state[flat]
    if not state:
        torch_adam = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's counts in a plain number
        state["step"] = torch.zeros((), device=flat.device) if torch_adam else 0
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(flat, requires_grad=False) for _ in range(2))
    return state


def own_pieces(engine):
    """Yield (parameter's name, its first element here, {"fp32", "exp_avg", "exp_avg_sq": flat tensor}, Adam's
    state) for each piece of a parameter that this rank updates. The tensors are views: read them to save,
    copy into them to load. At stage 0 every rank updates everything."""
    stage, zero, optimizer = engine.zero_optimization_stage(), engine.optimizer, engine.basic_optimizer
    masters = stage_0_masters(engine) if stage == 0 else None
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            flat, start, offset = masters[id(parameter)], 0, 0
            length = elements = parameter.numel()
        elif stage == 3:  # every parameter is cut into equal parts, the last one padded
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            flat, elements = zero.fp32_partitioned_groups_flat[group], parameter.ds_numel
            start = distributed.get_rank() * length
        elif parameter._hp_mapping is None:
            continue  # stages 1 and 2 cut the row of all parameters, and no part of this one is ours
        else:
            mapping = parameter._hp_mapping
            flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset, elements = mapping.hp_fragment_address.start, parameter.numel()
        length = min(length, elements - start)
        if length > 0:
            state = adam_state(optimizer, flat)
            whole = {"fp32": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            yield name, start, {k: v.view(-1)[offset : offset + length] for k, v in whole.items()}, state


def refresh_weights(engine):
    """Give the weights of the forward pass the values of the float32 ones that the optimizer keeps."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # small parameters are kept whole on every rank
    elif stage:
        zero.update_lp_params()
    else:
        masters = stage_0_masters(engine)
        for parameter in engine.module.parameters():
            parameter.data.copy_(masters[id(parameter)].data)


def forget_powers(optimizer):
    """DeepSpeed's CPU Adam multiplies beta^t up from step to step, but computes it anew behind a checkpoint: one
    rounding apart. Called in front of every step, this makes it compute it anew always: it updates one
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
    """What this rank writes, by name: its pieces, and the state of its random numbers."""
    tensors = {"random/cpu/0": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda/0"] = torch.cuda.get_rng_state()
    rank, ranks, everywhere = (
        distributed.get_rank(),
        distributed.get_world_size(),
        engine.zero_optimization_stage() == 0,
    )
    for number, (name, start, parts, _) in enumerate(own_pieces(engine)):
        if not everywhere or number % ranks == rank:  # what all hold, one of them writes
            tensors |= {f"{kind}/{name}/{start}": part for kind, part in parts.items()}
    return tensors


# -- in files --------------------------------------------------------------------------------------


def write_tensors(path, tensors):
    """Write {name: tensor} as a safetensors file (8 bytes of length, a JSON header, the bytes of the
    tensors), one tensor after the other: no second copy of them all is ever in memory. Returns its size
    and checksum. Raises OSError."""
    header, end, check = {}, 0, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        contents = (tensor.cpu().view(torch.uint8).numpy().data for tensor in tensors.values())
        for content in chain((struct.pack("<Q", len(text)), text), contents):
            check = zlib.crc32(content, check)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
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
        for key in file.keys():  # noqa: SIM118, for it is no dictionary
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
