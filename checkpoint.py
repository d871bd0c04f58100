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
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import distributed

from config import Config, ModelConfig, UserError, build, flat, read_json
from data.mixture import check_same_data
from data.shards import cannot_write, write_atomically, write_json
from pieces import (
    fill,
    loss_scaler,
    only_on_nvme,
    optimizer_steps,
    own_layout,
    own_tensors,
    pieces_in_memory,
    refresh_weights,
    saved_pieces,
    write_tensors,
)

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what fp16's loss scaler remembers


def name_of(step):
    return f"step_{step:08d}"


# -- saving --------------------------------------------------------------------------------------


class Saving:
    """A checkpoint on its way to the disk: everything the run needs to go on. Every rank must make one, and later
    call `finish`, which commits it.

    state: what state.json records besides what is found here, `step` among it. best: also mark this
    checkpoint as the best. keep: how many of the newest stay on the disk. background: take a copy in the
    CPU's memory, so that the run can go on while a thread writes; else it is written when this returns.
    progress: called for each tensor that is written."""

    def __init__(self, engine, folder, state, best, keep, background=False, progress=lambda: None):
        self.began, self.folder, self.name = time.perf_counter(), Path(folder), name_of(state["step"])
        self.state, self.best, self.keep = state | description(engine), best, keep
        self.file, self.written, fault = f"rank_{distributed.get_rank():05d}.safetensors", None, None
        self.progress, self.temporary = progress, self.folder / f"{self.name}.tmp"
        if distributed.get_rank() == 0:
            try:
                for left_over in self.folder.glob("step_*.tmp"):  # of a save that was killed
                    shutil.rmtree(left_over)
                self.temporary.mkdir(parents=True)
            except OSError as error:
                fault = str(cannot_write(self.temporary, error))
        distributed.barrier()
        sizes, tensors = own_tensors(engine)
        self.writer = None
        if background and not only_on_nvme(engine):
            copies = [tensor.to("cpu", copy=True) for tensor in tensors]
            self.writer = threading.Thread(target=self.write, args=(sizes, copies, fault))
            self.writer.start()
        else:
            self.write(sizes, tensors, fault)
        self.stalled = time.perf_counter() - self.began

    def write(self, sizes, tensors, fault):
        try:
            tensors = (self.progress() or tensor for tensor in tensors)
            self.written = fault or write_tensors(self.temporary / self.file, sizes, tensors)
        except OSError as error:
            self.written = str(cannot_write(self.temporary / self.file, error))

    def finish(self):
        """Commit what all ranks have written, and only then delete what is older. Returns its path, the seconds
        from the beginning to here, and those in which the run stood still. Raises UserError on every rank
        if one of them could not write; the checkpoints that were there stay as they are."""
        went_on = time.perf_counter()
        if self.writer:
            self.writer.join()
        everyone = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, (self.file, self.written))
        fault = next((written for _, written in everyone if isinstance(written, str)), None)
        if distributed.get_rank() == 0 and not fault:
            try:
                commit(self.folder, self.name, self.state | {"files": dict(everyone)}, self.best)
                prune(self.folder, self.keep)
            except UserError as error:
                fault = str(error)
        fault = [fault]
        distributed.broadcast_object_list(fault)
        if fault[0]:
            if distributed.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)  # room for what the user does next
            raise UserError(fault[0])
        now = time.perf_counter()
        return self.folder / self.name, now - self.began, self.stalled + now - went_on


def save(engine, folder, state, best, keep):
    """Save and commit at once. Returns the checkpoint's path. Raises UserError."""
    return Saving(engine, folder, state, best, keep).finish()[0]


def description(engine):
    """What state.json says of the engine."""
    scaler = loss_scaler(engine) if engine.fp16_enabled() else None
    parameters = dict(engine.module.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    everything = engine.module.named_parameters(remove_duplicate=False)
    return {
        "optimizer_steps": optimizer_steps(engine),
        "loss_scaler": {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)},
        "parameters": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()},
        "tied": {name: names[id(p)] for name, p in everything if name != names[id(p)]},
    }


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


def must_find(path, which):
    """As `find`, but raises UserError also where there is none."""
    found = find(path, which)
    if found is None:
        what = "no complete checkpoint" if Path(path).exists() else "no such folder, so no complete checkpoint"
        raise UserError(f"{path}: {what}; expected the folder of a run, as out/tiny, or a checkpoint")
    return found


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


def where_to_start(config, data, known_faults=()):
    """The checkpoint to continue from, or None, and its state. known_faults: {path: what is wrong with it}.
    data: the run's training Mixture. Raises UserError if the run folder holds what this run must not
    continue or overwrite."""
    run, resume = Path(config.train.out_dir), config.train.resume
    if resume == "never" and find(run):
        raise UserError(f"train.out_dir: {run} already holds a run; choose another, or drop --train.resume never")
    passed_over = []
    # of another run: only the beginning, else the same command would begin there again and again
    begins = resume not in ("auto", "never") and run.resolve() not in (Path(resume) / "state.json").resolve().parents
    if resume in ("auto", "never") or (begins and find(run)):
        found, state, passed_over = newest_usable(run, known_faults)
    else:
        found = find(resume)
        if found is None:
            raise UserError(f"train.resume: {resume} holds no complete checkpoint; expected auto, never or one's path")
        if found in known_faults:
            raise UserError(known_faults[found])
        state = read_state(found)
    news = [line for line in passed_over if not known_faults or str([*known_faults][-1]) in line]
    for line in news if os.environ["RANK"] == "0" else []:
        print(line, flush=True)
    if found:
        check_same_run(found, state, config)
        if "data.path" not in config.train.allow_changed:
            check_same_data(state["data"], data, found)
    return found, state or {"step": 0, "tokens": 0, "best_val_loss": None}


# -- loading -------------------------------------------------------------------------------------


@torch.no_grad()
def load(engine, path, state, seed, progress=lambda: None):
    """Restore weights, optimizer, loss scale and random state of a checkpoint into `engine`: bit for bit, and
    on another number of ranks all but the random state, which then begins anew from (seed, step, rank).
    The learning rate, betas, epsilon and decay of each parameter group stay those of this run's config.
    state: of `read_state`. progress: called for each piece. Raises UserError."""
    saved = saved_pieces(path, state)
    for piece, parts, adam in pieces_in_memory(engine, own_layout(engine), changed=True):
        progress()
        counted = state["optimizer_steps"]  # torch's Adam keeps it in a tensor, DeepSpeed's in a number
        adam["step"] = torch.full_like(adam["step"], counted) if torch.is_tensor(adam["step"]) else counted
        for kind, part in parts.items():
            fill(part, piece.start, saved[kind, piece.parameter], f"{path}: {kind} of {piece.parameter}")
    refresh_weights(engine)
    scaler = loss_scaler(engine)
    for key, value in state["loss_scaler"].items():  # a scale that stays (fp16.loss_scale) is this run's
        if engine.fp16_enabled() and engine.dynamic_loss_scale() and hasattr(scaler, key):
            setattr(scaler, key, value)
    engine.global_steps, engine.global_samples = state["step"], state["step"] * engine.train_batch_size()

    rank = distributed.get_rank()
    own = Path(path) / f"rank_{rank:05d}.safetensors"
    if state["world_size"] != distributed.get_world_size():
        torch.manual_seed(int(np.random.SeedSequence([seed, state["step"], rank]).generate_state(1, np.uint64)[0]))
        return
    with safe_open(own, "pt") as file:
        torch.set_rng_state(file.get_tensor("random/cpu/0"))
        if torch.cuda.is_available() and "random/cuda/0" in set(file.keys()):
            torch.cuda.set_rng_state(file.get_tensor("random/cuda/0"))


def open_weights(path):
    """A checkpoint of any ZeRO stage -> (its state, Config, a function from a parameter's name to its whole
    float32 value), in one process and without DeepSpeed. Reads a parameter when it is asked for, and keeps
    none. Raises UserError if it is damaged."""
    path = Path(path)
    state = read_state(path)
    check_sums(path, state["files"])
    saved = saved_pieces(path, state)
    config = build({name: state["config"][name] for name in ("model", "data", "train")}, path / "state.json")

    def read(name):
        name = state["tied"].get(name, name)
        shape = state["parameters"][name]
        flat = torch.empty(int(np.prod(shape)))
        fill(flat, 0, saved["fp32", name], f"{path}: fp32 of {name}")
        return flat.view(shape)

    return state, config, read


# -- is it the same run? -------------------------------------------------------------------------


def check_same_run(path, state, config):
    """Refuse to continue a run as a different one. Raises UserError with what differs, but for keys that
    train.allow_changed names."""
    saved, now = state["config"], config.to_dict()
    defaults = ModelConfig().__dict__  # of keys that are younger than the checkpoint
    pairs = [(f"model.{name}", saved["model"].get(name, defaults[name]), v) for name, v in now["model"].items()]
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


def changed_settings(saved, now):
    """{key: (value in the checkpoint, value now)} of all keys of a run's config that differ, but for those that only
    say where the run lies and how it is resumed. saved, now: `Config.to_dict()`; keys that are younger than the
    checkpoint had their default."""
    defaults = Config().to_dict()
    changed = {}
    for section in now:
        was = saved.get(section, {})
        if section != "deepspeed":
            was = defaults[section] | was
        before, after = flat(was, f"{section}."), flat(now[section], f"{section}.")
        for name in dict.fromkeys([*before, *after]):
            values = before.get(name), after.get(name)
            if values[0] != values[1] and name not in ("train.out_dir", "train.resume", "train.allow_changed"):
                changed[name] = values
    return changed


def saved_train_config(state):
    """The TrainConfig that a checkpoint was saved with."""
    return build({"train": state["config"]["train"]}, "state.json").train


def setting(world_size, stage, precision):
    """Where a run ran, for the line that says that it goes on elsewhere."""
    return f"{world_size} rank{'s' if world_size > 1 else ''} at ZeRO stage {stage} in {precision}"
