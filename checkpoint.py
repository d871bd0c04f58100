"""Checkpoints: saved by all ranks, complete or not there at all, found again, resumed on any number of ranks.

    out/<run>/checkpoints/step_00001000/   one safetensors file a rank, and state.json
    out/<run>/checkpoints/latest, best     the names of two of them

A rank's file holds the pieces of the parameters that it owns, flat and without padding, in full precision:
`fp32/<parameter>/<first element>`, and `exp_avg/...`, `exp_avg_sq/...` of the same elements. Pieces say which
parameter they belong to and where they begin, so any number of ranks, at any ZeRO stage, with or without
offload, picks what it needs from them: resuming elsewhere is the same code as resuming. Nothing in a
checkpoint is executed by loading it.

All ranks write into step_00001000.tmp; when all have, rank 0 adds state.json with the size and checksum of
every file and renames the folder. A folder that has its final name is therefore complete.
"""

import json
import os
import shutil
import struct
import zlib
from collections import defaultdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import distributed

from config import UserError, build, read_json
from data.shards import cannot_write, write_atomically, write_json

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what fp16's loss scaler remembers


def name_of(step):
    return f"step_{step:08d}"


# -- what a rank owns: the one place that knows how DeepSpeed lays things out ----------------------


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


def pieces(engine):
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


def loss_scaler(engine):
    """The object that holds fp16's loss scale, under the name that the ZeRO stages or stage 0 give it."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


# -- saving --------------------------------------------------------------------------------------


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
    for number, (name, start, parts, _) in enumerate(pieces(engine)):
        if not everywhere or number % ranks == rank:  # what all hold, one of them writes
            tensors |= {f"{kind}/{name}/{start}": part for kind, part in parts.items()}
    return tensors


def save(engine, folder, state, best, keep):
    """Save everything the run needs to go on. Every rank must call this.

    state: what state.json records besides what is found here, `step` among it. best: also mark this
    checkpoint as the best. keep: how many of the newest stay on the disk. Returns its path. Raises UserError
    on every rank if one of them could not write; the checkpoints that were there stay as they are."""
    folder, name, rank = Path(folder), name_of(state["step"]), distributed.get_rank()
    temporary, file, fault = folder / f"{name}.tmp", f"rank_{rank:05d}.safetensors", None
    if rank == 0:
        try:
            for left_over in folder.glob("*.tmp"):  # of a save that was killed
                shutil.rmtree(left_over)
            temporary.mkdir(parents=True)
        except OSError as error:
            fault = str(cannot_write(temporary, error))
    distributed.barrier()
    try:
        written = fault or write_tensors(temporary / file, own_tensors(engine))
    except OSError as error:
        written = str(cannot_write(temporary / file, error))
    everyone = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, (file, written))
    fault = next((written for _, written in everyone if isinstance(written, str)), None)
    if rank == 0 and not fault:
        steps = {int(adam["step"]) for *_, adam in pieces(engine)}
        assert len(steps) == 1, f"the parts of the optimizer disagree on the number of steps: {steps}"
        scaler = loss_scaler(engine) if engine.fp16_enabled() else None
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        everything = engine.module.named_parameters(remove_duplicate=False)
        state = state | {
            "optimizer_steps": steps.pop(),
            "loss_scaler": {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)},
            "parameters": {n: list(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()},
            "tied": {n: names[id(p)] for n, p in everything if n != names[id(p)]},
            "files": dict(everyone),
        }
        try:
            commit(folder, name, state, best)
        except UserError as error:
            fault = str(error)
        else:
            prune(folder, keep)
    fault = [fault]
    distributed.broadcast_object_list(fault)
    if fault[0]:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # room for what the user does next
        raise UserError(fault[0])
    return folder / name


def commit(folder, name, state, best):
    """Make a folder in which all ranks have written a checkpoint, by one rename. Raises UserError."""
    temporary = folder / f"{name}.tmp"
    write_json(temporary / "state.json", state | {"crc32": seal(state)})
    try:
        if (folder / name).exists():  # of an earlier continuation from an older checkpoint
            os.replace(folder / name, folder / f"{name}.old.tmp")
        os.replace(temporary, folder / name)
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)  # the rename is on the disk before anything older is deleted
        os.close(descriptor)
    except OSError as error:
        raise cannot_write(folder / name, error) from None
    write_atomically(folder / "latest", name.encode())
    if best:
        write_atomically(folder / "best", name.encode())


def prune(folder, keep):
    """Delete all but the newest `keep` checkpoints and the best."""
    for old in folder.glob("*.old.tmp"):
        shutil.rmtree(old, ignore_errors=True)
    marked = {(folder / mark).read_text() for mark in ("latest", "best") if (folder / mark).exists()}
    for old in complete_checkpoints(folder)[:-keep]:
        if old.name not in marked:
            shutil.rmtree(old, ignore_errors=True)


# -- finding -------------------------------------------------------------------------------------


def complete_checkpoints(folder):
    """The complete checkpoints in out/<run>/checkpoints, oldest first."""
    return sorted(p for p in Path(folder).glob("step_*") if p.suffix != ".tmp" and (p / "state.json").exists())


def find(path, which="latest"):
    """The checkpoint that `path` means: a checkpoint's own folder, or in a run's folder the one marked
    `latest` or `best` (the newest if that mark is missing), or the one of a step (`1000`).

    Returns its Path, or None where the run has no complete checkpoint. Raises UserError if there is
    none of that step."""
    path = Path(path)
    if (path / "state.json").exists():
        return path
    folder = path / "checkpoints"
    complete = complete_checkpoints(folder)
    if which in ("latest", "best"):
        mark = folder / which
        marked = folder / mark.read_text().strip() if mark.exists() else None
        return marked if marked in complete else (complete or [None])[-1]
    if str(which).isdigit() and folder / name_of(int(which)) in complete:
        return folder / name_of(int(which))
    have = ", ".join(str(int(p.name.removeprefix("step_"))) for p in complete) or "none"
    raise UserError(f"{path}: no checkpoint {which!r}; expected latest, best or one of the steps: {have}")


def newest_usable(run, known_faults=()):
    """The checkpoint that a run goes on from: (its path, its state, a line for each newer one passed over).
    The path is None where the run has never finished a save.

    known_faults: {path: what is wrong with it}, found by reading it. Raises UserError if there are
    checkpoints but all are damaged: starting anew would overwrite the run."""
    folder, passed_over = Path(run) / "checkpoints", []
    complete = complete_checkpoints(folder)
    for path in sorted(set(folder.glob("step_*")) - set(complete)):
        passed_over.append(
            f"ignored {path}: " + ("its save was not finished" if path.suffix else "it has no state.json")
        )
    latest = find(run)
    # what lies behind `latest` was left by an earlier continuation, and comes last
    for path in sorted(complete, key=lambda p: (p <= latest, p), reverse=True):
        try:
            if path in known_faults:
                raise UserError(known_faults[path])
            return path, read_state(path), passed_over
        except UserError as error:
            passed_over.append(f"ignored {path}: {error}")
    if complete:
        fault = passed_over[-1].removeprefix("ignored ")
        raise UserError(f"{fault}; no checkpoint of this run is whole: choose another train.out_dir")
    return None, None, passed_over


def seal(state):
    """A checksum of what state.json says, kept in it: a wrong digit must not pass for a setting."""
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"


def read_state(path):
    """state.json of a checkpoint, after a look at its files. Raises UserError if one is missing or cut."""
    state = read_json(Path(path) / "state.json")
    kinds = {"step": int, "tokens": int, "optimizer_steps": int, "world_size": int, "stage": int, "precision": str}
    kinds |= dict.fromkeys(("config", "data", "files", "parameters", "tied", "loss_scaler"), dict)
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{path}/state.json: no {name} ({kind.__name__}); the checkpoint is damaged, use another")
    if state.pop("crc32", None) != seal(state):
        raise UserError(f"{path}/state.json: its checksum is wrong; the checkpoint is damaged, use another")
    for name, entry in state["files"].items():
        file, size = Path(path) / name, entry["bytes"]
        if not file.exists() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.exists() else "no such file"
            raise UserError(f"{file}: {found}, expected {size} bytes; the checkpoint is damaged, use an older one")
    return state


def check_sums(path, files):
    """Read files of a checkpoint and compare their checksums. files: {name: entry of state.json}.
    Raises UserError for the first that differs."""
    chunk = bytearray(1 << 22)
    for name, entry in files.items():
        check = 0
        try:
            with open(Path(path) / name, "rb", buffering=0) as file:
                while count := file.readinto(chunk):
                    check = zlib.crc32(memoryview(chunk)[:count], check)
        except OSError as error:
            raise UserError(f"{path}/{name}: {error.strerror}; the checkpoint is damaged, use an older one") from None
        if f"{check:08x}" != entry["crc32"]:
            raise UserError(
                f"{path}/{name}: found checksum {check:08x}, expected {entry['crc32']}; "
                "the checkpoint is damaged, use an older one"
            )


def fault_of(path, state):
    """What is wrong with the bytes of a checkpoint, as a line, or None. The ranks share the reading, every
    one of them must call this, and all get the same answer."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    try:
        check_sums(path, dict(sorted(state["files"].items())[rank::ranks]))
        fault = None
    except UserError as error:
        fault = str(error)
    everyone = [None] * ranks
    distributed.all_gather_object(everyone, fault)
    return next((fault for fault in everyone if fault), None)


# -- loading -------------------------------------------------------------------------------------


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


@torch.no_grad()
def load(engine, path, state, seed):
    """Restore weights, optimizer, loss scale and random state of a checkpoint into `engine`: bit for bit, and
    on another number of ranks all but the random state, which then begins anew from (seed, step, rank).
    The learning rate, betas, epsilon and decay of each parameter group stay those of this run's config.
    state: of `read_state`. Raises UserError."""
    saved = saved_pieces(path, state)
    for name, start, parts, adam in pieces(engine):
        counted = state["optimizer_steps"]  # torch's Adam keeps it in a tensor, DeepSpeed's in a number
        adam["step"] = torch.full_like(adam["step"], counted) if torch.is_tensor(adam["step"]) else counted
        for kind, part in parts.items():
            fill(part, start, saved[kind, name], f"{path}: {kind} of {name}")
    refresh_weights(engine)
    scaler = loss_scaler(engine)
    for key, value in state["loss_scaler"].items():
        if engine.fp16_enabled() and hasattr(scaler, key):
            setattr(scaler, key, value)
    engine.global_steps, engine.global_samples = state["step"], state["step"] * engine.train_batch_size()

    rank = distributed.get_rank()
    own = Path(path) / f"rank_{rank:05d}.safetensors"
    if state["world_size"] != distributed.get_world_size():
        torch.manual_seed(int(np.random.SeedSequence([seed, state["step"], rank]).generate_state(1, np.uint64)[0]))
        return
    with safe_open(own, "pt") as file:
        torch.set_rng_state(file.get_tensor("random/cpu/0"))
        if torch.cuda.is_available() and "random/cuda/0" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("random/cuda/0"))


def load_weights(path):
    """A checkpoint of any ZeRO stage -> (its state, Config, whole float32 weights by name), in one process
    and without DeepSpeed. Raises UserError if it is damaged."""
    path = Path(path)
    state = read_state(path)
    check_sums(path, state["files"])
    saved = saved_pieces(path, state)
    config = build({name: state["config"][name] for name in ("model", "data", "train")}, path / "state.json")
    weights = {}
    for name, shape in state["parameters"].items():
        flat = torch.empty(int(np.prod(shape)))
        fill(flat, 0, saved["fp32", name], f"{path}: fp32 of {name}")
        weights[name] = flat.view(shape)
    return state, config, weights | {name: weights[same] for name, same in state["tied"].items()}


# -- is it the same run? -------------------------------------------------------------------------


def check_same_run(path, state, config):
    """Refuse to continue a run as a different one. Raises UserError with what differs, but for keys that
    train.allow_changed names."""
    saved, now = state["config"], config.to_dict()
    pairs = [(f"model.{name}", saved["model"].get(name), value) for name, value in now["model"].items()]
    for key in ("data.path", "train.seed", "train.global_batch_tokens"):
        section, name = key.split(".")
        if key not in config.train.allow_changed:
            pairs.append((key, saved[section].get(name), now[section][name]))
    different = [f"{name} {was!r} -> {now!r}" for name, was, now in pairs if was != now]
    if different:
        remedy = "set them back, or start another run with --train.out_dir"
        if not any(name.startswith("model.") for name in different):
            remedy += ", or name them in train.allow_changed"
        raise UserError(f"{path}: was saved with other settings: {'; '.join(different)}; {remedy}")


def setting(world_size, stage, precision):
    """Where a run ran, for the line that says that it goes on elsewhere."""
    return f"{world_size} rank{'s' if world_size > 1 else ''} at ZeRO stage {stage} in {precision}"
