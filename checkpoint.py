"""Checkpoints: saved by all ranks, complete or not there at all, found again, resumed exactly.

    out/<run>/checkpoints/step_00001000/   DeepSpeed's sharded state, each rank's random state, state.json
    out/<run>/checkpoints/latest, best     the names of two of them

All ranks write into step_00001000.tmp; behind a barrier, rank 0 adds state.json with the size of every
file and renames the folder. A folder that has its final name is therefore complete.
"""

import contextlib
import os
import shutil
from pathlib import Path

import torch
from torch import distributed

from config import ModelConfig, UserError, build, read_json, zero_stage
from data.shards import write_atomically, write_json


def name_of(step):
    return f"step_{step:08d}"


# -- saving --------------------------------------------------------------------------------------


def save(engine, folder, state, best, keep):
    """Save everything the run needs to go on. Every rank must call this.

    state: what state.json records besides the list of files, `step` among it. best: also mark this
    checkpoint as the best. keep: how many of the newest stay on the disk."""
    folder, name, rank = Path(folder), name_of(state["step"]), distributed.get_rank()
    temporary = folder / f"{name}.tmp"
    if rank == 0:
        for left_over in folder.glob("*.tmp"):  # of a save that was killed
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    torch.save(random_state(), temporary / f"random_state_{rank}.pt")
    distributed.barrier()
    if rank == 0:
        files = {str(p.relative_to(temporary)): p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
        write_json(temporary / "state.json", state | {"files": files})
        if (folder / name).exists():  # of an earlier continuation from an older checkpoint
            os.replace(folder / name, folder / f"{name}.old.tmp")
        os.replace(temporary, folder / name)
        write_atomically(folder / "latest", name.encode())
        if best:
            write_atomically(folder / "best", name.encode())
        prune(folder, keep)
    distributed.barrier()


def prune(folder, keep):
    """Delete all but the newest `keep` checkpoints and the best."""
    for old in folder.glob("*.old.tmp"):
        shutil.rmtree(old)
    marked = {(folder / mark).read_text() for mark in ("latest", "best") if (folder / mark).exists()}
    for old in complete_checkpoints(folder)[:-keep]:
        if old.name not in marked:
            shutil.rmtree(old)


def random_state():
    """The state of this rank's random numbers, which only dropout draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


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


def read_state(path):
    """state.json of a checkpoint, after a look at its files. Raises UserError if one is missing or cut."""
    state = read_json(Path(path) / "state.json")
    kinds = {"step": int, "files": dict, "config": dict, "data": dict, "world_size": int, "precision": str}
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{path}/state.json: no {name} ({kind.__name__}); the checkpoint is damaged, use another")
    for name, size in state["files"].items():
        file = Path(path) / name
        if not file.exists() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.exists() else "no such file"
            raise UserError(f"{file}: {found}, expected {size} bytes; the checkpoint is damaged, use an older one")
    return state


# -- loading -------------------------------------------------------------------------------------


def load(engine, path):
    """Restore weights, optimizer and random state of a checkpoint into `engine`, bit for bit."""
    path, rank = Path(path), distributed.get_rank()
    settings = [
        {name: group[name] for name in ("betas", "eps", "weight_decay")} for group in engine.optimizer.param_groups
    ]
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed could not load it; use an older checkpoint")
    for group, setting in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(setting)  # the checkpoint brings back the old ones, and this run's config counts
    randoms = torch.load(path / f"random_state_{rank}.pt", weights_only=True)
    torch.set_rng_state(randoms["cpu"])
    for device, cuda_state in enumerate(randoms["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)


def refuse_if_different(path, pairs):
    different = [f"{name} {was!r} -> {now!r}" for name, was, now in pairs if was != now]
    if different:
        raise UserError(
            f"{path}: was saved with other settings: {'; '.join(different)}; "
            "set them back, or start another run with --train.out_dir"
        )


def check_same_run(path, state, config):
    """Refuse to continue a run as a different one. Raises UserError with what differs."""
    saved, now = state["config"], config.to_dict()
    defaults = ModelConfig().__dict__  # of keys that are younger than the checkpoint
    pairs = [(f"model.{name}", saved["model"].get(name, defaults[name]), v) for name, v in now["model"].items()]
    for section, name in (("data", "path"), ("train", "seed"), ("train", "global_batch_tokens")):
        pairs.append((f"{section}.{name}", saved[section].get(name), now[section][name]))
    refuse_if_different(path, pairs)


def check_same_ranks(path, state, world_size, stage, precision):
    """Refuse to load a checkpoint into another number of ranks, ZeRO stage or precision. Raises UserError."""
    saved_stage = zero_stage(state["config"]["deepspeed"])
    pairs = [("number of ranks", state["world_size"], world_size), ("precision", state["precision"], precision)]
    refuse_if_different(path, [*pairs, ("deepspeed.zero_optimization.stage", saved_stage, stage)])


def load_weights(path):
    """A checkpoint of any ZeRO stage -> (its state, Config, whole float32 weights by name), in one process."""
    path = Path(path)
    state = read_state(path)
    saved = {name: state["config"][name] for name in ("model", "data", "train")}
    config = build(saved, path / "state.json")
    if zero_stage(state["config"]["deepspeed"]) == 0:
        weights = torch.load(path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    else:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for, so that DeepSpeed does not warn about it
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            weights = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
    return state, config, {name: weight.float() for name, weight in weights.items()}
