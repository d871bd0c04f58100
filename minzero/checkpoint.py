"""Checkpoints: saved by all ranks, complete or not there at all, found again, resumed on any number of ranks.

    out/<run>/checkpoints/step_00001000/   one safetensors file a rank, and state.json
    out/<run>/checkpoints/latest, best     the names of two of them

A rank's file holds the pieces of the parameters that it owns, flat and without padding, in full precision:
`fp32/<parameter>/<first element>`, and `exp_avg/...`, `exp_avg_sq/...` of the same elements. Pieces say which
parameter they belong to and where they begin, so any number of ranks, at any ZeRO stage, with or without
offload, picks what it needs from them: resuming elsewhere is the same code as resuming. state.json says which
file holds which elements (`pieces`), so that a rank opens only the files it needs. Nothing in a checkpoint is
executed by loading it, and no file outside its folder is opened.

All ranks write into step_00001000.tmp; when all have, rank 0 adds state.json with the size and checksum of
every file and renames the folder. A folder that has its final name is therefore complete. A checkpoint with a NaN
or an infinity in a weight or moment is never committed.

Which checkpoint is the latest and which the best follows from what each state.json records, `save_number` and
`val_loss`: the files `latest` and `best` are for people, and what is wrong in them is corrected by the next start
or save.

A run that is resumed from an older checkpoint leaves later ones in the folder, which are stale: they are never the
latest, and are deleted as soon as the continuation has saved as many of its own as train.keep_checkpoints keeps.
The best one is kept whichever it is. What is deleted is exactly what a run wrote (see `is_ours`), and is renamed
to step_00001000.deleted.tmp first, so that a deletion that was killed is finished by a later start or save.
"""

import contextlib
import json
import math
import os
import re
import shutil
import stat
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed

from minzero import commands
from minzero.config import Config, DataConfig, ModelConfig, SharedError, TrainConfig, UserError, build, flat, read_json
from minzero.data.mixture import check_same_data
from minzero.files import cannot_write, is_count, is_number, make_way, write_atomically, write_json
from minzero.zero import (
    SavedPieces,
    TensorFile,
    damaged,
    fault_of_index,
    index_of,
    loss_scaler,
    only_on_nvme,
    open_plain_file,
    optimizer_steps,
    own_layout,
    own_tensors,
    pieces_in,
    pieces_in_memory,
    refresh_weights,
    write_tensors,
)

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what fp16's loss scaler remembers
RANK_FILE = re.compile(r"rank_[0-9]{5,7}\.safetensors")
FOLDER = re.compile(r"step_([0-9]{8,15})(\.tmp|\.old\.tmp|\.deleted\.tmp)?")  # names that a run gives
MOST_STATE_BYTES = 1 << 28  # of state.json, which takes kilobytes
# keys of the train section; the first is no number
SHAPES_THE_RATE = ("schedule", "lr", "min_lr_ratio", "warmup_tokens", "max_tokens")
TRIES = 100  # of a reader that a run deletes checkpoints from under


def name_of(step):
    return f"step_{step:08d}"


def step_and_suffix(path):
    """(step, suffix or None) of the name of a folder that a run made; (None, None) for any other name."""
    match = FOLDER.fullmatch(path.name)
    if match and path.name == name_of(int(match[1])) + (match[2] or ""):
        return int(match[1]), match[2]
    return None, None


# -- saving --------------------------------------------------------------------------------------


class Saving:
    """A checkpoint on its way to the disk: everything the run needs to continue. Every rank must make one, and
    later call `finish`, which commits it.

    state: what state.json records besides what is found here, `step` and `best_val_loss` among it, and `val_loss`
    if it was measured at this step. best: it is the lowest so far. keep: how many of the newest stay on the
    disk. background: take a copy in the CPU's memory, so that the run can continue while a thread writes;
    else it is written when this returns. progress: called for each tensor that is written."""

    def __init__(self, engine, folder, state, best, keep, background=False, progress=lambda: None):
        self.began = time.perf_counter()
        self.folder, self.name = Path(folder), name_of(state["step"])
        self.state, self.best, self.keep = state | description(engine), best, keep
        self.file = f"rank_{distributed.get_rank():05d}.safetensors"
        self.written = fault = None
        self.temporary = self.folder / f"{self.name}.tmp"
        self.progress = progress
        if distributed.get_rank() == 0:
            try:
                make_room(self.folder, self.name)
            except OSError as error:
                fault = str(cannot_write(self.temporary, error))
        distributed.barrier()
        sizes, tensors = own_tensors(engine)
        self.pieces = pieces_in({name: elements for name, (_, elements) in sizes.items()})
        self.writer = None
        if background and not only_on_nvme(engine):
            try:
                tensors = [tensor.to("cpu", copy=True) for tensor in tensors]
            except Exception as error:  # there is no room for a copy
                fault = fault or self.in_words(error)
            self.writer = threading.Thread(target=self.write, args=(sizes, tensors, fault))
            self.writer.start()
        else:
            self.write(sizes, tensors, fault)
        self.stalled = time.perf_counter() - self.began

    def write(self, sizes, tensors, fault):
        try:
            tensors = (self.progress() or tensor for tensor in tensors)
            self.written = fault or write_tensors(self.temporary / self.file, sizes, tensors)
        except Exception as error:
            self.written = self.in_words(error)

    def in_words(self, error):
        """Why this rank cannot save, whatever it is: an error that only ended the thread, or this rank, would leave
        the others waiting, or a checkpoint without this rank's part."""
        file = self.temporary / self.file
        if isinstance(error, OSError):
            return str(cannot_write(file, error))
        if isinstance(error, UserError):
            return f"step {self.state['step']}: {not_finite(error, self.folder)}"
        explained = commands.explain(error)
        if explained is None:
            traceback.print_exception(error)  # a fault of the program
        return f"{file}: could not be written: {explained or repr(error)}"

    def finish(self):
        """Commit what all ranks have written, and only then delete what is older. Returns its path, the seconds
        from the beginning to here, and those in which the run stood still. Raises SharedError on every rank
        if one of them could not write, or holds a number that is not finite; the checkpoints that were there stay
        as they are."""
        waited_from = time.perf_counter()
        if self.writer:
            self.writer.join()
        ranks = distributed.get_world_size()
        everyone = [None] * ranks if distributed.get_rank() == 0 else None
        distributed.gather_object((self.file, self.written, self.pieces), everyone)
        fault = [None]
        if everyone:
            faults = [
                written if isinstance(written, str) else f"{self.temporary / file}: was not written"
                for file, written, _ in everyone
                if not isinstance(written, dict)
            ]
            fault = faults[:1] or [None]
        if everyone and not fault[0]:
            files = {file: written for file, written, _ in everyone}
            pieces = index_of(own for _, _, own in sorted(everyone, key=lambda entry: entry[0]))
            try:
                commit(self.folder, self.name, self.state | {"files": files, "pieces": pieces}, self.best)
                prune(self.folder, self.keep)
            except UserError as error:
                fault = [str(error)]
            except OSError as error:
                fault = [str(cannot_write(self.folder / self.name, error))]
        distributed.broadcast_object_list(fault)
        if fault[0]:
            if distributed.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)  # room for what the user does next
            raise SharedError(fault[0])
        now = time.perf_counter()
        return self.folder / self.name, now - self.began, self.stalled + now - waited_from


def make_room(folder, name):
    """Make the folder into which all ranks write a checkpoint; delete what killed saves have left. Raises OSError."""
    for path in left_over(folder):
        remove(path)
    (folder / f"{name}.tmp").mkdir(parents=True)


def save(engine, folder, state, best, keep):
    """Save and commit at once. Returns the checkpoint's path. Raises UserError."""
    return Saving(engine, folder, state, best, keep).finish()[0]


def not_finite(found, folder):
    """The line on weights or moments that an update has spoilt. folder: out/<run>/checkpoints."""
    last, remedy = Saved(folder).last_good, "no good checkpoint is there: begin"
    if last:
        remedy = f"the last good checkpoint is {last}: continue from it"
    remedy += " with a lower train.lr or a larger train.eps"
    return f"{found}, expected finite numbers; such weights are never saved; {remedy}"


def description(engine):
    """What state.json says of the engine."""
    scaler = loss_scaler(engine) if engine.fp16_enabled() else None
    parameters = dict(engine.module.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    everything = engine.module.named_parameters(remove_duplicate=False)
    return {
        "optimizer_steps": optimizer_steps(engine),
        "loss_scaler": {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)},
        "parameters": shapes_of(parameters),
        "tied": {name: names[id(p)] for name, p in everything if name != names[id(p)]},
    }


def shapes_of(parameters):
    """{name: shape as a list} of {name: parameter}, of which ZeRO-3 may hold a part."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters.items()}


def commit(folder, name, state, best):
    """Make a folder in which all ranks have written a checkpoint, by one rename. Raises UserError."""
    temporary, final = folder / f"{name}.tmp", folder / name
    val_loss = state.get("val_loss", state["best_val_loss"] if best else None)
    state = state | {"save_number": 1 + max((entry.number for entry in Saved(folder).entries), default=0)}
    measured = val_loss is not None and math.isfinite(val_loss)
    state["val_loss"] = val_loss if measured else None
    spoilt = val_loss is not None and not measured
    state["suspect"] = spoilt or bool(state.get("bad_steps", {}).get("bad"))
    write_json(temporary / "state.json", state | {"crc32": seal(state)})
    try:
        flush_folder(temporary)
        if os.path.lexists(final):  # stale, of before the run was resumed from an older one; or not ours
            with contextlib.suppress(OSError):  # of a lost terminal
                print(f"{final} was there already and is replaced", flush=True)
            if is_ours(final):
                os.replace(final, folder / f"{name}.old.tmp")
            else:
                make_way(final, for_a_folder=True)
        os.replace(temporary, final)
        flush_folder(folder)  # the rename is on the disk before anything older is deleted
    except OSError as error:
        raise cannot_write(final, error) from None
    write_marks(folder)


def flush_folder(folder):
    """The names in a folder are on the disk when this returns. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_marks(folder):
    """Write the files `latest` and `best` where they are missing or say something else. Raises UserError."""
    saved = Saved(folder)
    for which, path in (("latest", saved.latest), ("best", saved.best)):
        mark = folder / which
        if path and read_mark(mark) != path.name:
            write_atomically(mark, path.name.encode())


def prune(folder, keep):
    """Delete all but the newest `keep` checkpoints of the run as it was continued, the best, and stale ones as long
    as it has not saved `keep` of its own since it was resumed from an older one. Nothing is deleted for one whose
    state.json cannot be read, and no good one for suspect ones, of which the newest `keep` are kept as well."""
    for path in left_over(folder):
        remove(path)
    saved = Saved(folder)
    good = saved.good[-keep:]
    oldest = good[0] if good else None
    suspect = [entry for entry in saved.own if entry.suspect and (not good or entry.step > oldest.step)][-keep:]
    victims = [entry for entry in saved.own if entry.suspect or (good and entry.step < oldest.step)]
    if len(good) == keep and all(entry.number < oldest.number for entry in saved.stale):
        victims += saved.stale
    for entry in victims:
        if entry not in suspect and entry.path not in (saved.latest, saved.best) and is_ours(entry.path):
            remove(entry.path)


def is_ours(path):
    """Whether a folder is exactly what a run wrote: no link, with a name that a run gives, of the step that its
    state.json records, in which nothing lies but state.json and the ranks' files. Temporary names are the run's
    own, whatever lies there."""
    step, suffix = step_and_suffix(path)
    if step is None or path.is_symlink():
        return False
    if suffix is not None:
        return True
    try:
        entries = list(os.scandir(path))
        plain = all(entry.is_file(follow_symlinks=False) for entry in entries)
    except OSError:
        return False
    names = {entry.name for entry in entries} - {"state.json", "state.json.tmp"}
    if not plain or not all(RANK_FILE.fullmatch(name) for name in names):
        return False
    state = state_if_whole(path)  # None: damaged, or half deleted by code that did not rename first
    return state is None or state["step"] == step


def left_over(folder):
    """What saves and deletions that were killed have left in out/<run>/checkpoints: folders of ours under a temporary
    name, and those without a state.json."""
    found = []
    for path in listed(folder):
        step, suffix = step_and_suffix(path)
        half = step is not None and (suffix is not None or not os.path.lexists(path / "state.json"))
        if half and is_ours(path):
            found.append(path)
    return found


def remove(path):
    """Delete a checkpoint or what is left of one: it is renamed first, so that no reader takes a half of it."""
    step, _ = step_and_suffix(path)
    doomed = path.with_name(f"{name_of(step)}.deleted.tmp")
    try:
        if path != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
    except OSError:  # it stays, and is tried again by the next save
        return
    shutil.rmtree(doomed, ignore_errors=True)


def restore_replaced(folder):
    """A save that was killed between the two renames with which it replaces a checkpoint of the same step: put the
    replaced one back. Every rank may call this: the first one does it."""
    for path in listed(folder):
        step, suffix = step_and_suffix(path)
        if suffix == ".old.tmp" and is_complete(path) and not os.path.lexists(path.with_name(name_of(step))):
            with contextlib.suppress(OSError):
                os.rename(path, path.with_name(name_of(step)))


def tidy(folder):
    """What the start of a run puts right in out/<run>/checkpoints: it finishes saves and deletions that were killed,
    and corrects `latest` and `best`. To be called by one rank, and by no two runs at a time. Raises UserError."""
    restore_replaced(folder)
    for path in left_over(folder):
        remove(path)
    write_marks(folder)


# -- finding -------------------------------------------------------------------------------------


def listed(folder):
    """The real folders in a folder, which need not be there, by name."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def is_complete(path):
    return (path / "state.json").is_file()


def complete_checkpoints(folder):
    """The complete checkpoints in out/<run>/checkpoints, by step."""
    names = [(path, step_and_suffix(path)) for path in listed(folder)]
    return [path for path, (step, suffix) in names if step is not None and suffix is None and is_complete(path)]


def read_mark(mark):
    """What the file `latest` or `best` says, or None where it is damaged or not there."""
    try:
        with open_plain_file(mark) as file:
            return file.read(100).decode("ascii").strip()
    except (OSError, ValueError):
        return None


class Entry(NamedTuple):
    """A complete checkpoint. number: grows from save to save of a run; val_loss: measured at its step, or None;
    readable: state.json is whole, whatever may be wrong with the other files; recorded: it is by code that records
    the validation loss; suspect: the last step before it was bad, or its validation loss is not finite, so that its
    weights, finite as they are, may be of no use."""

    path: Path
    step: int
    number: int
    val_loss: float | None
    readable: bool
    recorded: bool
    suspect: bool


class Saved:
    """The complete checkpoints in out/<run>/checkpoints, `entries` in the order in which they were saved, and what
    follows from what their state.json record: the paths `latest` and `best` (None where there is none, or none was
    evaluated); `own`, those that led to the latest one and it; of these the `good` ones and the path of the
    `last_good` one; `stale`, those left there when the run was resumed from an older one.

    The files `latest` and `best` count where that is not recorded: in checkpoints of older code, and where a
    state.json is damaged."""

    def __init__(self, folder):
        folder = Path(folder)
        for _ in range(TRIES):
            states = {path: summary(path) for path in complete_checkpoints(folder)}
            # a run that saves and deletes meanwhile may have taken one from the list, or each from its place in it
            if all(is_complete(path) for path in states) and (states or not os.path.lexists(folder / "latest")):
                break
        named = {which: folder / (read_mark(folder / which) or "none") for which in ("latest", "best")}
        marked = {which: path for which, path in named.items() if path in states}
        last_step = step_and_suffix(marked["latest"])[0] if "latest" in marked else math.inf
        whole = {path: state for path, state in states.items() if state is not None}
        numbers = {step_and_suffix(path)[0]: state.get("save_number", 0) for path, state in whole.items()}
        entries = []
        for path, state in states.items():
            step = step_and_suffix(path)[0]
            recorded, number = path in whole and "save_number" in state, numbers.get(step, 0)
            if not recorded:
                before = [number for other, number in numbers.items() if other < step]
                number = 0 if path in whole else max(before, default=0)
            if not recorded and step > last_step:
                number = -1
            known = whole.get(path, {})
            loss = known.get("best_val_loss" if not recorded and path == marked.get("best") else "val_loss")
            entries.append(Entry(path, step, number, loss, path in whole, recorded, known.get("suspect", False)))
        self.entries = sorted(entries, key=lambda entry: (entry.number, entry.step))
        by_path = {entry.path: entry for entry in entries}

        latest = by_path.get(marked.get("latest"))
        if self.entries and (latest is None or latest.number < self.entries[-1].number):
            latest = self.entries[-1]
        self.latest = latest and latest.path

        best = by_path.get(marked.get("best"))
        measured = [entry for entry in self.entries if entry.val_loss is not None]
        lowest = min(measured, key=lambda entry: entry.val_loss, default=None)
        outdone = best and lowest and best.val_loss is not None and lowest.val_loss < best.val_loss
        if best is None or outdone or (best.recorded and best.val_loss is None):
            best = lowest
        self.best = best and best.path

        self.own, self.stale = [], []
        lowest_step = math.inf
        for entry in reversed(self.entries):
            if entry == latest or (latest.step > entry.step and entry.step < lowest_step):
                self.own.insert(0, entry)
                lowest_step = entry.step
            else:
                self.stale.insert(0, entry)
        self.good = [entry for entry in self.own if entry.readable and not entry.suspect]
        self.last_good = self.good[-1].path if self.good else None


def state_if_whole(path):
    try:
        return read_state(path, look_at_files=False)
    except UserError:
        return None


summaries = {}  # {path: (identity, what `summary` gave)}: a run that keeps many would read all at each save


def summary(path):
    """What `Saved` needs of a checkpoint's state.json, as far as it is recorded there, or None if it is damaged."""
    now = identity(path)
    if now is None or summaries.get(path, (None, None))[0] != now:
        state = state_if_whole(path)
        keys = ("save_number", "val_loss", "best_val_loss", "suspect")
        summaries[path] = now, state if state is None else {key: state[key] for key in keys if key in state}
    return summaries[path][1]


def find(path, which="latest"):
    """The checkpoint that `path` means: a checkpoint's own folder, or in a run's folder the `latest` or the `best`
    (the latest if none was evaluated), or the one of a step (`1000`).

    Returns its Path, or None where the run has no complete checkpoint. Raises UserError if there is
    none of that step."""
    path = Path(path)
    if is_complete(path):
        return path
    folder = path / "checkpoints"
    if which in ("latest", "best"):
        saved = Saved(folder)
        return (saved.best if which == "best" else None) or saved.latest
    complete = complete_checkpoints(folder)
    if re.fullmatch("[0-9]{1,15}", str(which)) and folder / name_of(int(which)) in complete:
        return folder / name_of(int(which))
    have = ", ".join(str(step_and_suffix(found)[0]) for found in complete) or "none"
    raise UserError(f"{path}: no checkpoint {str(which)[:40]!r}; expected latest, best or one of the steps: {have}")


def must_find(path, which):
    """As `find`, but raises UserError also where there is none."""
    found = find(path, which)
    if found is None:
        what = "no complete checkpoint" if Path(path).exists() else "no such folder, so no complete checkpoint"
        raise UserError(f"{path}: {what}; expected the folder of a run, as out/tiny, or a checkpoint")
    return found


def reading(path, which, read):
    """What read(checkpoint) returns, for the one that `path` and `which` mean (see `find`). The run it belongs to may
    delete or replace it meanwhile: then the next one is read. Raises UserError."""
    for _ in range(TRIES):
        found = must_find(path, which)
        before = identity(found)
        try:
            return read(found)
        except UserError:
            if before is not None and identity(found) == before:
                raise
    return read(must_find(path, which))


def identity(path):
    """What a checkpoint with the same name but other content differs in, or None if it is gone."""
    try:
        status = os.stat(path / "state.json")
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def unfinished(folder):
    """A line for each save that was not finished, and each folder without a state.json."""
    lines = []
    for path in listed(folder):
        step, suffix = step_and_suffix(path)
        if suffix == ".tmp":
            lines.append(f"ignored {path}: its save was not finished")
        elif step is not None and suffix is None and not is_complete(path):
            lines.append(f"ignored {path}: it has no state.json")
    return lines


def newest_usable(run, known_faults=(), look_at_files=True):
    """The checkpoint from which a run continues: (its path, its state, a line for each newer one passed over).
    The path is None where the run has never finished a save. Stale ones come last.

    known_faults: {path: what is wrong with it}, found by reading it. Raises UserError if there are
    checkpoints but all are damaged: starting from the beginning would overwrite the run."""
    folder = Path(run) / "checkpoints"
    saved, passed_over = Saved(folder), unfinished(folder)
    for entry in [*reversed(saved.own), *reversed(saved.stale)]:
        try:
            if entry.path in known_faults:
                raise UserError(known_faults[entry.path])
            return entry.path, read_state(entry.path, look_at_files), passed_over
        except UserError as error:
            passed_over.append(f"ignored {entry.path}: {error}")
    if saved.entries:
        fault = passed_over[-1].removeprefix("ignored ")
        raise UserError(f"{fault}; no checkpoint of this run is whole: choose another train.out_dir")
    return None, None, passed_over


def newest_whole(run, progress=lambda: None):
    """As `newest_usable`, with all bytes read and compared, and the same on all ranks, which must all call this.
    progress: called for each part that is read. Raises SharedError."""
    known_faults = {}
    while True:
        found, state, passed_over = as_rank_0(lambda: newest_usable(run, known_faults))
        fault = found and fault_of(found, state, progress)
        if not fault:
            return found, state, [line for line in passed_over if ".tmp: " not in line]
        known_faults[found] = fault


def as_rank_0(choose):
    """What choose() returns on rank 0, on every rank, which must all call this: each rank's file system may have heard
    something else. A UserError of rank 0 is raised on all, as SharedError."""
    answer = [None, None]  # value, fault
    if distributed.get_rank() == 0:
        try:
            answer[0] = choose()
        except UserError as error:
            answer[1] = str(error)
    distributed.broadcast_object_list(answer)
    value, fault = answer
    if fault is not None:
        raise SharedError(fault)
    return value


# -- state.json ----------------------------------------------------------------------------------


def seal(state):
    """A checksum of what state.json says, kept in it: a wrong digit must not pass for a setting."""
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"


def read_state(path, look_at_files=True):
    """state.json of a checkpoint, every field of it checked; keys that are younger than the checkpoint are missing.
    look_at_files: also at the sizes of its files. Raises UserError if something is missing, cut or odd."""
    file = Path(path) / "state.json"
    try:
        with open_plain_file(file) as opened:
            size = os.fstat(opened.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise damaged(file, error.strerror) from None
    if size > MOST_STATE_BYTES:
        raise damaged(file, f"found {size} bytes, expected at most {MOST_STATE_BYTES}")
    try:
        state = read_json(file)
    except MemoryError:
        raise damaged(file, f"found {size} bytes that no memory here holds as JSON") from None
    kinds = {"step": int, "tokens": int, "optimizer_steps": int, "world_size": int, "stage": int, "precision": str}
    kinds |= dict.fromkeys(("config", "data", "files", "parameters", "tied", "loss_scaler"), dict)
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{file}: no {name} ({kind.__name__}); the checkpoint is damaged, use another")
    try:
        right = state.pop("crc32", None) == seal(state)
    except RecursionError:
        raise damaged(file, "nested too deeply") from None
    if not right:
        raise UserError(f"{file}: its checksum is wrong; the checkpoint is damaged, use another")
    if fault := fault_of_state(state):
        raise damaged(file, fault)
    state.setdefault("best_val_loss", None)  # younger than some checkpoints
    for name, entry in state["files"].items() if look_at_files else ():
        check_size(Path(path) / name, entry["bytes"])
    return state


def check_size(file, size):
    """Raises UserError unless this is a plain file of so many bytes."""
    try:
        status = os.lstat(file)
    except FileNotFoundError:
        raise damaged(file, f"no such file, expected {size} bytes") from None
    except OSError as error:
        raise damaged(file, error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        raise damaged(file, "found a link, folder, pipe or device, expected a plain file")
    if status.st_size != size:
        raise damaged(file, f"{status.st_size} bytes, expected {size} bytes")


def is_checksum(value):
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None


def is_loss(value):
    return value is None or is_number(value, 1e300)


def is_file_entry(entry):
    return isinstance(entry, dict) and is_count(entry.get("bytes")) and ("crc32" in entry or "header_crc32" in entry)


def is_bad_steps(value):
    """Whether it is what guard.BadSteps records."""
    if not isinstance(value, dict) or not isinstance(value.get("bad"), list):
        return False
    if not is_count(value.get("skipped")) or not is_count(value.get("skipped_in_a_row", 0)):
        return False
    lists = [value.get("loss"), value.get("gradient norm")]
    pairs = all(isinstance(pair, list) and len(pair) == 2 and all(map(is_count, pair)) for pair in value["bad"])
    return pairs and all(isinstance(numbers, list) and all(map(is_number, numbers)) for numbers in lists)


def is_data(value):
    """Whether it is what data.mixture's fingerprint gives."""
    known = {"tokenizer": str | None, "vocab_size": int | None, "tokens": int, "shards": str}
    folders = [entry if isinstance(entry, dict) else {} for entry in value.values()]
    return all("tokenizer" in entry for entry in folders) and all(
        isinstance(entry[name], known[name]) for entry in folders for name in entry.keys() & known.keys()
    )


def is_config(config):
    """Whether it has the sections, names its data, and holds numbers where the learning rate needs them, as train.py
    records a config. Which values are taken is for the code that trains: a checkpoint may be older."""
    path = config["data"].get("path") if isinstance(config.get("data"), dict) else None
    sections = all(isinstance(config.get(section), dict) for section in ("model", "data", "train"))
    weights = isinstance(path, dict) and path and all(is_number(weight) for weight in path.values())
    if not sections or not (isinstance(path, str) or weights):
        return False
    train = config["train"]
    numbers = (train.get(name, 0) for name in (*SHAPES_THE_RATE[1:], "global_batch_tokens"))
    return isinstance(train.get("schedule", ""), str) and all(is_number(number, 1e300) for number in numbers)


def fault_of_state(state):
    """What is wrong with the fields of state.json, whose types are right, in words, or None."""
    files, parameters = state["files"], state["parameters"]
    shapes = parameters.values()
    rules = [  # key, whether it is right, what is expected
        ("step", is_count(state["step"]), "0 or more"),
        ("tokens", is_count(state["tokens"]), "0 or more"),
        ("optimizer_steps", is_count(state["optimizer_steps"]), "0 or more"),
        ("world_size", 0 < state["world_size"] <= 10**7, "a number of ranks"),
        ("stage", type(state["stage"]) is int and state["stage"] in range(4), "0 to 3"),
        ("save_number", is_count(state.get("save_number", 0)), "0 or more"),
        ("best_val_loss", is_loss(state.get("best_val_loss")), "a number or null"),
        ("val_loss", is_loss(state.get("val_loss")), "a number or null"),
        ("suspect", isinstance(state.get("suspect", False), bool), "true or false"),
        ("versions", isinstance(state.get("versions", {}), dict), "an object"),
        ("files", all(map(RANK_FILE.fullmatch, files)), "names as rank_00000.safetensors"),
        ("files", all(map(is_file_entry, files.values())), "the size and checksum of each"),
        ("parameters", all(isinstance(shape, list) and all(map(is_count, shape)) for shape in shapes), "shapes"),
        ("tied", all(isinstance(name, str) and name in parameters for name in state["tied"].values()), "parameters"),
        ("loss_scaler", state["loss_scaler"].keys() <= set(SCALER), f"keys among {', '.join(SCALER)}"),
        ("loss_scaler", all(is_number(value, 2.0**100) for value in state["loss_scaler"].values()), "numbers"),
        ("bad_steps", "bad_steps" not in state or is_bad_steps(state["bad_steps"]), "what a run records of them"),
        ("data", is_data(state["data"]), "what a run records of its data"),
        ("config", is_config(state["config"]), "the sections of a run's config"),
        ("pieces", isinstance(state.get("pieces", {}), dict), "an object"),
    ]
    for name, right, expected in rules:
        if not right:
            return f"{name}: found {str(state[name])[:100]}, expected {expected}"
    sums = [entry.get("header_crc32", entry.get("crc32")) for entry in files.values()]
    if not all(map(is_checksum, sums)):
        return f"files: found {str(files)[:100]}, expected checksums of 8 hexadecimal digits"
    elements = {name: math.prod(shape) for name, shape in parameters.items()}
    size = sum(entry["bytes"] for entry in files.values())
    if 4 * sum(elements.values()) > size:
        return f"parameters: found {sum(elements.values())} elements, expected at most what {size} bytes of files hold"
    return fault_of_index(state.get("pieces", {}), elements, len(files))


def check_sums(path, files, progress=lambda: None):
    """Read files of a checkpoint and compare their checksums. files: {name: entry of state.json}. progress: called for
    each part that is read. Raises UserError for the first that differs."""
    for name, entry in files.items():
        progress()
        file = TensorFile(Path(path) / name, entry)
        if "header_crc32" in entry:
            for tensor in file.tensors:
                file.check(tensor, progress)
        elif (found := file.checksum(progress)) != entry["crc32"]:
            raise damaged(file.path, f"found checksum {found}, expected {entry['crc32']}")


def fault_of(path, state, progress=lambda: None):
    """What is wrong with the bytes of a checkpoint, as a line, or None. The ranks share the reading, every
    one of them must call this, and all get the same answer. progress: as `check_sums` has it."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    try:
        check_sums(path, dict(sorted(state["files"].items())[rank::ranks]), progress)
        fault = None
    except UserError as error:
        fault = str(error)
    everyone = [None] * ranks
    distributed.all_gather_object(everyone, fault)
    return next((fault for fault in everyone if fault), None)


def where_to_start(config, data, known_faults=()):
    """The checkpoint to continue from, or None, and its state. known_faults: {path: what is wrong with it}: where there
    are any, all ranks get rank 0's choice, and every rank must call this. data: the run's training Mixture. Raises
    UserError if the run folder holds what this run must not continue or overwrite."""
    if known_faults:
        found, state, passed_over = as_rank_0(lambda: choose_start(config.train, known_faults))
    else:
        found, state, passed_over = choose_start(config.train)
    news = [line for line in passed_over if not known_faults or str([*known_faults][-1]) in line]
    for line in news if os.environ["RANK"] == "0" else []:
        print(line, flush=True)
    if found:
        check_same_run(found, state, config)
        if "data.path" not in config.train.allow_changed:
            check_same_data(state["data"], data, found)
    return found, state or {"step": 0, "tokens": 0, "best_val_loss": None}


def choose_start(train, known_faults=()):
    """What `where_to_start` considers: as `newest_usable`, of the train section's run or of what it resumes."""
    run, resume = Path(train.out_dir), train.resume
    if resume == "never" and find(run):
        raise UserError(f"train.out_dir: {run} already holds a run; choose another, or drop --train.resume never")
    restore_replaced(run / "checkpoints")
    look_at_files = os.environ.get("WORLD_SIZE", "1") == "1"  # many ranks share that in `fault_of`
    # of another run: only the beginning, else the same command would begin there again and again
    begins = resume not in ("auto", "never") and run.resolve() not in (Path(resume) / "state.json").resolve().parents
    if resume in ("auto", "never") or (begins and find(run)):
        return newest_usable(run, known_faults, look_at_files)
    found = find(resume)
    if found is None:
        raise UserError(f"train.resume: {resume} holds no complete checkpoint; expected auto, never or one's path")
    if found in known_faults:
        raise UserError(known_faults[found])
    return found, read_state(found, look_at_files), []


# -- loading -------------------------------------------------------------------------------------


@torch.no_grad()
def load(engine, path, state, seed, progress=lambda: None):
    """Restore weights, optimizer, loss scale and random state of a checkpoint into `engine`: bit for bit, and
    on another number of ranks all but the random state, which then starts from (seed, step, rank).
    The learning rate, betas, epsilon and decay of each parameter group stay those of this run's config.
    Each rank opens only the files that hold what it needs. state: of `read_state`. progress: called for each piece.
    Raises UserError."""
    refuse_other_parameters(path, state, shapes_of(dict(engine.module.named_parameters())))
    saved = SavedPieces(path, state)
    for piece, parts, adam in pieces_in_memory(engine, own_layout(engine), changed=True):
        progress()
        counted = state["optimizer_steps"]  # torch's Adam keeps it in a tensor, DeepSpeed's in a number
        adam["step"] = torch.full_like(adam["step"], counted) if torch.is_tensor(adam["step"]) else counted
        for kind, part in parts.items():
            saved.fill(part, piece.start, kind, piece.parameter)
    refresh_weights(engine)
    scaler = loss_scaler(engine)
    for key, value in state["loss_scaler"].items():  # a scale that stays (fp16.loss_scale) is this run's
        if engine.fp16_enabled() and engine.dynamic_loss_scale() and hasattr(scaler, key):
            setattr(scaler, key, value)
    engine.global_steps, engine.global_samples = state["step"], state["step"] * engine.train_batch_size()

    rank = distributed.get_rank()
    if state["world_size"] != distributed.get_world_size():
        torch.manual_seed(int(np.random.SeedSequence([seed, state["step"], rank]).generate_state(1, np.uint64)[0]))
        return
    own = f"rank_{rank:05d}.safetensors"
    if own not in saved.names:
        raise damaged(path, f"found no {own}, expected one of each of {state['world_size']} ranks")
    file = saved.file(saved.names.index(own))
    elements = file.elements()
    try:
        torch.set_rng_state(file.read("random/cpu/0", 0, elements.get("random/cpu/0", 1)))
        if torch.cuda.is_available() and "random/cuda/0" in elements:
            torch.cuda.set_rng_state(file.read("random/cuda/0", 0, elements["random/cuda/0"]))
    except (RuntimeError, TypeError) as error:  # torch's, of bytes that are no such state
        raise damaged(file.path, f"random/cpu/0: {' '.join(str(error).split())[:100]}") from None


def differences(found, expected):
    """What differs between two {name of a parameter: its shape}, in words, or None."""
    wrong = [
        f"{name[:100]}: found {found.get(name, 'none')}, expected {expected.get(name, 'none')}"
        for name in dict.fromkeys((*expected, *found))
        if found.get(name) != expected.get(name)
    ]
    return "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "") if wrong else None


def refuse_other_parameters(path, state, expected):
    """Raises UserError unless a checkpoint holds these parameters, {name: shape as a list}, and no others."""
    if wrong := differences(state["parameters"], expected):
        raise UserError(
            f"{path}/state.json: {wrong} as in the model that model.py makes of its settings; use the model.py that it "
            "was trained with, or another checkpoint"
        )


def open_weights(path):
    """A checkpoint of any ZeRO stage -> (its state, Config, a function from a parameter's name to its whole
    float32 value), in one process and without DeepSpeed. Reads a parameter when it is asked for, compares the
    checksum of what it reads and of nothing else, and keeps none. Both raise UserError if it is damaged.

    Of the Config only the model section is checked: data and train are as they were saved, by a version of this code
    that may have taken other values than this one does, and the weights are what they are."""
    path = Path(path)
    state = read_state(path)
    check_sums(path, {name: entry for name, entry in state["files"].items() if "header_crc32" not in entry})
    config = build({"model": state["config"]["model"]}, path / "state.json")
    config.data, config.train = DataConfig(state["config"]["data"]["path"]), as_saved(state, vars(TrainConfig()))
    saved = SavedPieces(path, state, verify=True)
    if os.environ.get("RANK", "0") == "0":  # which reads for the others
        saved.hold()

    def read(name):
        name = state["tied"].get(name, name)
        if name not in state["parameters"]:
            raise UserError(f"{path}/state.json: found no parameter {name}, expected one by its model")
        shape = state["parameters"][name]
        flat = torch.empty(math.prod(shape))
        saved.fill(flat, 0, "fp32", name)
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


def as_saved(state, names):
    """A TrainConfig in which these keys have the values that a checkpoint was saved with, whichever this code takes.
    The others, and those that are younger than the checkpoint, have their defaults."""
    saved = state["config"]["train"]
    return TrainConfig(**{name: saved[name] for name in names if name in saved})


def saved_train_config(state):
    """What shapes the learning rate of the TrainConfig that a checkpoint was saved with. Raises UserError for a
    schedule that this code does not know."""
    train = as_saved(state, [*SHAPES_THE_RATE, "global_batch_tokens"])
    schedules = TrainConfig.__dataclass_fields__["schedule"].metadata["choices"]
    if train.schedule not in schedules:
        found = f"the checkpoint was saved with {train.schedule[:40]!r}"
        raise UserError(f"train.schedule: {found}, expected {', '.join(schedules)}; start another run")
    return train


def setting(world_size, stage, precision):
    """Where a run ran, for the line that says that it continues elsewhere."""
    return f"{world_size} rank{'s' if world_size > 1 else ''} at ZeRO stage {stage} in {precision}"
