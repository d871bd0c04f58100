"""Checkpoints: saved by all ranks, complete or absent, verified, and loaded on any number of ranks.

    out/<run>/checkpoints/step_00001000/rank_00000.safetensors, ...   one file a rank
    out/<run>/checkpoints/step_00001000/state.json                    everything else

A rank's file holds the fragments of the parameters that it updates, flat, without padding and in float32, and the
optimizer's moments of the same elements (see `tensor_files`). Fragments are named by parameter and first element, so
any number of ranks, at any ZeRO stage, with or without offload, reads what it needs: moving a run is the same code as
resuming it.
Loading a checkpoint executes nothing from it and opens no file outside its folder.

All ranks write into step_00001000.tmp. When all have finished, rank 0 adds state.json, with the size and checksum of
every file, and renames the folder; so a folder with its final name is complete. A checkpoint with a NaN or an infinity
in a weight or moment is never committed.

Finding checkpoints is in checkpoint_folder.py, their state.json in checkpoint_state.py.
"""

import contextlib
import functools
import math
import os
import shutil
import threading
import time
import traceback
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from minzero import dist, errors
from minzero.checkpoint_folder import Saved, is_ours, name_of, prune, remove_unfinished, write_marks
from minzero.checkpoint_state import SCALER, as_saved, lora_of, read_state, state_checksum
from minzero.commands import is_first_rank
from minzero.config.build import build
from minzero.config.sections import DataConfig, TrainConfig
from minzero.errors import SharedError, UserError
from minzero.files import cannot_write, make_way, write_json
from minzero.tensor_files import SavedPieces, check_sums, damaged, index_of, merged, pieces_in, write_tensors
from minzero.zero import (
    fragments_in_memory,
    local_fragments,
    loss_scaler,
    nvme_swapper,
    optimizer_steps,
    refresh_weights,
    set_optimizer_steps,
    trained_parameters,
)


def as_rank_0(choose):
    """The result of choose() on rank 0, returned on every rank; every rank must call this. For decisions that depend on
    files: a network file system may show each rank another state. A UserError of rank 0 is raised on all as
    SharedError."""
    answer = [None, None]  # value, fault
    if distributed.get_rank() == 0:
        try:
            answer[0] = choose()
        except UserError as error:
            answer[1] = str(error)
    value, fault = dist.from_rank_0(answer)
    if fault is not None:
        raise SharedError(fault)
    return value


# -- saving ----------------------------------------------------------------------------------------


class Saving:
    """A checkpoint being written. Every rank must make one, and later call `finish`, which commits it.

    folder: out/<run>/checkpoints
    state: fields of state.json besides those that are found here; with `step`, `best_val_loss`, and `val_loss` if it
        was measured at this step
    best: its validation loss is the lowest so far
    keep: how many of the newest checkpoints to keep
    background: copy the tensors to CPU memory and let a thread write them while training continues; otherwise they are
        written when this returns
    progress: called for each tensor that is written
    is_copied, keep_every: see `checkpoint_folder.prune`

    Errors are raised by `finish`, on all ranks."""

    def __init__(
        self, engine, folder, state, best, keep, background=False, progress=lambda: None, is_copied=None, keep_every=0
    ):
        self.began = time.perf_counter()
        self.folder = Path(folder)
        self.name = name_of(state["step"])
        self.temporary = self.folder / f"{self.name}.tmp"
        self.file = f"rank_{distributed.get_rank():05d}.safetensors"
        self.state = state | description(engine)
        self.best = best
        self.keep, self.keep_every = keep, keep_every
        self.progress = progress
        self.is_copied = is_copied
        self.written = None  # the file's entry in state.json, or a str: the fault
        self.writer = None
        fault = None
        if distributed.get_rank() == 0:
            try:
                make_room(self.folder, self.name)
            except OSError as error:
                fault = str(cannot_write(self.temporary, error))
        dist.begins_exchange()
        distributed.barrier()
        sizes, tensors = tensors_to_save(engine)
        self.pieces = pieces_in({name: elements for name, (_, elements) in sizes.items()})
        if background and not nvme_swapper(engine):
            try:
                tensors = [tensor.to("cpu", copy=True) for tensor in tensors]
            except Exception as error:  # such as no memory for a copy
                fault = fault or self.explain(error)
            self.writer = threading.Thread(target=self.write, args=(sizes, tensors, fault))
            self.writer.start()
        else:
            self.write(sizes, tensors, fault)
        self.stalled = time.perf_counter() - self.began

    def write(self, sizes, tensors, fault):
        """Write this rank's file, unless there is a fault already, and set `written`. Raises nothing."""

        def with_progress():
            for tensor in tensors:
                self.progress()
                yield tensor

        try:
            self.written = fault or write_tensors(self.temporary / self.file, sizes, with_progress())
        except Exception as error:
            self.written = self.explain(error)

    def explain(self, error):
        """Why this rank cannot save, in one line, for any exception. If an exception ended the thread or this rank
        alone, the other ranks would wait, or commit a checkpoint without this rank's part."""
        file = self.temporary / self.file
        if isinstance(error, OSError):
            return str(cannot_write(file, error))
        if isinstance(error, UserError):
            return f"step {self.state['step']}: {not_finite(error, self.folder)}"
        explained = errors.explain(error)
        if explained is None:
            traceback.print_exception(error)  # a bug
        return f"{file}: could not be written: {explained or repr(error)}"

    def finish(self):
        """Wait for all ranks' files, commit the checkpoint, then delete old ones. Every rank must call this. Returns
        (its path, seconds from the start to here, seconds of these in which training stood still). Raises SharedError
        on every rank if one of them could not write, or has a number that is not finite; existing checkpoints are then
        left as they are."""
        waited_from = time.perf_counter()
        if self.writer:
            self.writer.join()
        own = {self.file: self.written}, index_of([self.pieces])
        of_all = dist.merge_on_rank_0(own, merged)
        try:
            as_rank_0(lambda: self.commit(*of_all))
        except SharedError:
            if distributed.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)  # it would only take space
            raise
        now = time.perf_counter()
        return self.folder / self.name, now - self.began, self.stalled + now - waited_from

    def commit(self, files, pieces):
        """Rank 0's part of `finish`. files: {file: `written`} of all ranks; pieces: their `index_of`. Raises
        UserError."""
        for file, written in files.items():
            if not isinstance(written, dict):
                raise UserError(written or f"{self.temporary / file}: was not written")
        try:
            commit(self.folder, self.name, self.state | {"files": files, "pieces": pieces}, self.best)
            prune(self.folder, self.keep, self.is_copied, self.keep_every)
        except OSError as error:
            raise cannot_write(self.folder / self.name, error) from None


def save(engine, folder, state, best, keep):
    """Save and commit at once; arguments as for `Saving`. Returns the checkpoint's path. Raises SharedError."""
    return Saving(engine, folder, state, best, keep).finish()[0]


def make_room(folder, name):
    """Make the folder that all ranks write into; delete the remains of killed saves. Raises OSError."""
    remove_unfinished(folder)
    (folder / f"{name}.tmp").mkdir(parents=True)


def tensors_to_save(engine):
    """The content of this rank's file: its fragments and the states of its random generators. Returns
    {name: (dtype, number of elements)}, and an iterator of the flat tensors in the same order, each valid until the
    next iteration."""
    fragments = local_fragments(engine)
    if engine.zero_optimization_stage() == 0:  # all ranks have all parameters: each writes a share of them
        fragments = fragments[distributed.get_rank() :: distributed.get_world_size()]
    random = {"random/cpu/0": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["random/cuda/0"] = torch.cuda.get_rng_state()
    sizes = {name: (state.dtype, len(state)) for name, state in random.items()}
    for fragment in fragments:
        for kind in fragment.kinds:
            sizes[f"{kind}/{fragment.parameter}/{fragment.start}"] = (torch.float32, fragment.length)
    tensors = (part for _, parts, _ in fragments_in_memory(engine, fragments) for part in parts.values())
    return sizes, chain(random.values(), tensors)


def description(engine):
    """The fields of state.json that describe the engine."""
    scaler = loss_scaler(engine) if engine.fp16_enabled() else None
    parameters = dict(trained_parameters(engine))
    names = {id(parameter): name for name, parameter in parameters.items()}
    with_duplicates = engine.module.named_parameters(remove_duplicate=False)
    return {
        "optimizer_steps": optimizer_steps(engine),
        "loss_scaler": {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)},
        "parameters": shapes_of(parameters),
        "tied": {name: names[id(p)] for name, p in with_duplicates if name != names.get(id(p), name)},
    }


def shapes_of(parameters):
    """{name: shape as a list} of {name: parameter}. ZeRO-3 keeps the whole shape beside its partition."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters.items()}


def not_finite(found, folder):
    """The error line for weights or moments that are not finite. found: which; folder: out/<run>/checkpoints."""
    last = Saved(folder).last_good
    remedy = f"the last good checkpoint is {last}: continue from it" if last else "no good checkpoint is there: begin"
    remedy += " with a lower train.lr or a larger train.eps"
    return f"{found}, expected finite numbers; such weights are never saved; {remedy}"


def commit(folder, name, state, best):
    """Complete the checkpoint that all ranks have written into `<name>.tmp`: add state.json, then rename the folder.
    best: its validation loss is state["best_val_loss"]. Raises UserError."""
    temporary, final = folder / f"{name}.tmp", folder / name
    val_loss = state.get("val_loss", state["best_val_loss"] if best else None)
    measured = val_loss is not None and math.isfinite(val_loss)
    diverged = val_loss is not None and not measured
    state = state | {
        "save_number": 1 + max((entry.number for entry in Saved(folder).entries), default=0),
        "val_loss": val_loss if measured else None,
        "suspect": diverged or bool(state.get("bad_steps", {}).get("bad")),
    }
    write_json(temporary / "state.json", state | {"crc32": state_checksum(state)})
    put_in_place(temporary, final)
    write_marks(folder)


def put_in_place(temporary, final):
    """Rename a complete checkpoint's temporary folder to its final name. Raises UserError."""
    try:
        flush_folder(temporary)
        if os.path.lexists(final):  # stale, left when the run was resumed from an older checkpoint; or the user's
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"{final} was there already and is replaced", flush=True)
            if is_ours(final):
                os.replace(final, final.with_name(f"{final.name}.old.tmp"))
            else:
                make_way(final, for_a_folder=True)
        os.replace(temporary, final)
        flush_folder(final.parent)  # the rename is on disk before older checkpoints are deleted
    except OSError as error:
        raise cannot_write(final, error) from None


def flush_folder(folder):
    """Flush the names in a folder to disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- verifying -------------------------------------------------------------------------------------


def fault_of(path, state, progress=lambda: None):
    """The first fault in the bytes of a checkpoint's files, in one line, or None; the same on all ranks. The ranks
    share the reading, and every rank must call this. state: of `read_state`; progress: called for each chunk."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    try:
        check_sums(path, dict(sorted(state["files"].items())[rank::ranks]), progress)
        fault = None
    except UserError as error:
        fault = str(error)
    found = dist.first(fault)
    return found and found[1]


def differences(found, expected):
    """The differences between two {name of a parameter: its shape}, in words, or None."""
    wrong = [
        f"{name[:100]}: found {found.get(name, 'none')}, expected {expected.get(name, 'none')}"
        for name in dict.fromkeys((*expected, *found))
        if found.get(name) != expected.get(name)
    ]
    if len(wrong) > 4:
        wrong[4:] = [f"and {len(wrong) - 4} more"]
    return "; ".join(wrong) or None


def refuse_other_parameters(path, state, expected):
    """Raises UserError unless a checkpoint holds exactly these parameters. expected: {name: shape as a list}."""
    if wrong := differences(state["parameters"], expected):
        raise UserError(
            f"{path}/state.json: {wrong} as in the model that model.py makes of its settings; use the model.py that it "
            "was trained with, or another checkpoint"
        )


# -- loading ---------------------------------------------------------------------------------------


@torch.no_grad()
def load(engine, path, state, seed, progress=lambda: None):
    """Restore weights, moments, step counts, loss scale and random state of a checkpoint, bit for bit. On another
    number of ranks, random states start from (seed, step, rank) instead. Learning rate, betas, epsilon and weight decay
    stay those of this run's config.

    Each rank opens only the files that hold what it needs. state: of `read_state`; progress: called for each fragment.
    Raises UserError."""
    refuse_other_parameters(path, state, shapes_of(dict(trained_parameters(engine))))
    saved = SavedPieces(path, state)
    for fragment, parts, adam in fragments_in_memory(engine, local_fragments(engine), changed=True):
        progress()
        set_optimizer_steps(adam, state["optimizer_steps"])
        for kind, part in parts.items():
            saved.copy_overlap(part, fragment.start, kind, fragment.parameter)
    refresh_weights(engine)
    if engine.fp16_enabled() and engine.dynamic_loss_scale():  # a constant fp16.loss_scale is this run's
        scaler = loss_scaler(engine)
        for key, value in state["loss_scaler"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)
    engine.global_steps = state["step"]
    engine.global_samples = state["step"] * engine.train_batch_size()
    restore_random_state(saved, state, seed)


def restore_random_state(saved, state, seed):
    """Set torch's random generators for this rank: as saved, or from (seed, step, rank) if the number of ranks differs.
    saved: the checkpoint's SavedPieces. Raises UserError."""
    rank = distributed.get_rank()
    if state["world_size"] != distributed.get_world_size():
        torch.manual_seed(int(np.random.SeedSequence([seed, state["step"], rank]).generate_state(1, np.uint64)[0]))
        return
    own = f"rank_{rank:05d}.safetensors"
    if own not in saved.names:
        raise damaged(saved.path, f"found no {own}, expected one of each of {state['world_size']} ranks")
    file = saved.file(saved.names.index(own))
    elements = file.elements()
    try:
        torch.set_rng_state(file.read("random/cpu/0", 0, elements.get("random/cpu/0", 1)))
        if torch.cuda.is_available() and "random/cuda/0" in elements:
            torch.cuda.set_rng_state(file.read("random/cuda/0", 0, elements["random/cuda/0"]))
    except (RuntimeError, TypeError) as error:  # raised by torch for bytes that are no such state
        raise damaged(file.path, f"random/cpu/0: {' '.join(str(error).split())[:100]}") from None


def open_weights(path, state=None):
    """Open a checkpoint of any ZeRO stage in one process, without an engine. Returns (its state, its Config, read).
    read(name) returns the whole float32 value of a parameter, in its shape; it reads and verifies only those bytes, and
    keeps nothing. Both raise UserError if the checkpoint is damaged. Ranks other than 0 open its files only to read.

    state: of `read_state`, if it was read already. Of the Config only the model section is checked. data and train are
    as they were saved: weights can be used even if today's code refuses the settings of their training."""
    path = Path(path)
    state = state or read_state(path, look_at_files=is_first_rank())
    config = build({"model": state["config"]["model"]}, path / "state.json")
    of_data = state["config"]["data"]
    config.data = DataConfig(of_data["path"], document_mask=of_data["document_mask"])
    config.train = as_saved(state, vars(TrainConfig()))
    config.lora = lora_of(state)

    @functools.cache
    def pieces():
        # files of older code have no checksum of each tensor: they are verified here as a whole
        check_sums(path, {name: entry for name, entry in state["files"].items() if "header_crc32" not in entry})
        return SavedPieces(path, state, verify=True, kinds=["fp32"])

    if is_first_rank():  # it reads for the others
        pieces().hold()

    def read(name):
        name = state["tied"].get(name, name)
        if name not in state["parameters"]:
            raise UserError(f"{path}/state.json: found no parameter {name}, expected one by its model")
        shape = state["parameters"][name]
        flat = torch.empty(math.prod(shape))
        pieces().copy_overlap(flat, 0, "fp32", name)
        return flat.view(shape)

    return state, config, read
