"""The checkpoints of a run: which are in its folder, which is the latest and the best, and which may be deleted.

    step_00001000/       a checkpoint; complete, because a save gets this name when it is finished
    step_00001000.tmp    a save in progress; .old.tmp: one being replaced, .deleted.tmp: one being deleted
    latest, best         names of checkpoints, for people

Latest and best follow from `save_number` and `val_loss` in each state.json; the files `latest` and `best` are corrected
by the next start or save if they are wrong.

A run that is resumed from an older checkpoint leaves later ones in the folder. These are stale: never the latest, and
deleted once the continued run has saved train.keep_checkpoints of its own. The best one is always kept. Only folders
that hold exactly what a run writes are deleted (`is_ours`). They are renamed first, so that a later start or save
finishes a deletion that was killed.
"""

import contextlib
import functools
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from minzero.checkpoint_names import complete_checkpoints, folders_of_run, is_complete, name_of, step_and_suffix
from minzero.checkpoint_state import RANK_FILE, state_if_whole
from minzero.errors import UserError
from minzero.files import write_atomically
from minzero.tensor_files import open_plain_file

TRIES = 100  # of a reader while a run deletes and replaces checkpoints


# -- which are there -------------------------------------------------------------------------------


def read_mark(mark):
    """The content of the file `latest` or `best`, or None if it is damaged or missing."""
    try:
        with open_plain_file(mark) as file:
            return file.read(100).decode("ascii").strip()
    except (OSError, ValueError):
        return None


def write_marks(folder):
    """Write the files `latest` and `best` if they are missing or wrong. Raises UserError."""
    saved = Saved(folder)
    for which, path in (("latest", saved.latest), ("best", saved.best)):
        mark = folder / which
        if path and read_mark(mark) != path.name:
            write_atomically(mark, path.name.encode())


def is_within(path, run):
    """Whether a checkpoint is in the folder of this run, and not another's."""
    return Path(path).resolve().is_relative_to(Path(run).resolve())


def identity(path):
    """A value that differs for a checkpoint of the same name with other content; None if there is no checkpoint."""
    try:
        status = os.stat(path / "state.json")
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=10_000)  # so that a save does not read every state.json again
def summary(path, identity):
    """The fields of a checkpoint's state.json that `Saved` needs, as far as they are recorded; None if it is damaged.
    identity: `identity(path)`."""
    state = state_if_whole(path)
    keys = ("save_number", "val_loss", "best_val_loss", "suspect")
    return None if state is None else {key: state[key] for key in keys if key in state}


def read_summaries(folder):
    """{path: its `summary`} of the complete checkpoints in a folder, while a run may be saving and deleting there."""
    for _ in range(TRIES):
        states = {path: summary(path, identity(path)) for path in complete_checkpoints(folder)}
        # the run may have deleted one that was listed, or all of them before they were listed
        if all(is_complete(path) for path in states) and (states or not os.path.lexists(folder / "latest")):
            break
    return states


class Entry(NamedTuple):
    """A complete checkpoint.

    number: increases with every save of a run. val_loss: measured at its step, or None. readable: state.json is whole,
    whatever the state of the other files. recorded: saved by code that records number and validation loss. suspect: the
    last step before it was bad, or its validation loss is not finite: its weights are finite, but may be useless."""

    path: Path
    step: int
    number: int
    val_loss: float | None
    readable: bool
    recorded: bool
    suspect: bool


class Saved:
    """The complete checkpoints in out/<run>/checkpoints.

    entries: all of them, as Entry, in the order in which they were saved
    latest, best: paths; None if there is none, or none was evaluated
    own: the entries that led to the latest one, and it
    good, last_good: those of `own` that are readable and not suspect; the path of the last one, or None
    stale: the entries left there when the run was resumed from an older one

    The files `latest` and `best` count only for checkpoints that do not record it: of older code, or damaged ones."""

    def __init__(self, folder):
        folder = Path(folder)
        states = read_summaries(folder)
        named = {which: folder / (read_mark(folder / which) or "none") for which in ("latest", "best")}
        marked = {which: path for which, path in named.items() if path in states}
        entries = entries_of(states, marked)
        self.entries = sorted(entries.values(), key=lambda entry: (entry.number, entry.step))

        latest = entries.get(marked.get("latest"))
        if self.entries and (latest is None or latest.number < self.entries[-1].number):
            latest = self.entries[-1]
        self.latest = latest and latest.path
        best = self.find_best(entries.get(marked.get("best")))
        self.best = best and best.path

        # an entry belongs to the continued run if every later save has a higher step
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

    def find_best(self, marked):
        """The entry with the lowest validation loss. marked: the entry that the file `best` names, or None; it counts
        if its loss is unknown because older code saved it, or it is damaged."""
        measured = [entry for entry in self.entries if entry.val_loss is not None]
        lowest = min(measured, key=lambda entry: entry.val_loss, default=None)
        if marked is None:
            return lowest
        if marked.val_loss is None:
            return lowest if marked.recorded else marked
        return lowest if lowest.val_loss < marked.val_loss else marked


def entries_of(states, marked):
    """{path: Entry} of `read_summaries`. marked: {"latest", "best": path}, as far as those files name a checkpoint."""
    steps = {path: step_and_suffix(path)[0] for path in states}
    numbers = {steps[path]: state.get("save_number", 0) for path, state in states.items() if state is not None}
    last_step = steps[marked["latest"]] if "latest" in marked else math.inf
    entries = {}
    for path, state in states.items():
        step = steps[path]
        known = state or {}
        recorded = "save_number" in known
        if recorded:
            number = known["save_number"]
        elif step > last_step:  # left by an earlier continuation
            number = -1
        elif state is not None:  # of older code
            number = 0
        else:
            number = max((number for other, number in numbers.items() if other < step), default=0)
        loss = known.get("best_val_loss" if not recorded and path == marked.get("best") else "val_loss")
        entries[path] = Entry(path, step, number, loss, state is not None, recorded, known.get("suspect", False))
    return entries


# -- finding one -----------------------------------------------------------------------------------


def find(path, which="latest"):
    """The checkpoint that `path` means: a checkpoint's own folder, or in a run's folder the `latest` or the `best`
    (the latest if none was evaluated), or the one of a step (`1000`).

    Returns its Path, or None if the run has no complete checkpoint. Raises UserError if there is none of that step."""
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
    """As `find`, but raises UserError also if there is none."""
    found = find(path, which)
    if found is None:
        fault = "no complete checkpoint" if Path(path).exists() else "no such folder, so no complete checkpoint"
        raise UserError(f"{path}: {fault}; expected the folder of a run, as out/tiny, or a checkpoint")
    return found


def reading(path, which, read):
    """The result of read(checkpoint) for the one that `path` and `which` mean (see `find`). If the run deletes or
    replaces it meanwhile, the next one is read instead. Raises UserError."""
    for _ in range(TRIES):
        found = must_find(path, which)
        before = identity(found)
        try:
            return read(found)
        except UserError:
            if before is not None and identity(found) == before:
                raise
    return read(must_find(path, which))


# -- deleting and repairing ------------------------------------------------------------------------


def is_ours(path):
    """Whether a folder is exactly what a run wrote: no link, named as a run names it, with the step that its state.json
    records, and containing only state.json and the ranks' files. Folders under temporary names always are."""
    step, suffix = step_and_suffix(path)
    if step is None or path.is_symlink():
        return False
    if suffix:
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


def remove(path):
    """Delete a checkpoint or the rest of one. It is renamed first, so that no reader sees a part of it. Errors are
    ignored: the next save tries again."""
    doomed = path.with_name(f"{name_of(step_and_suffix(path)[0])}.deleted.tmp")
    try:
        if path != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(folder):
    """Delete the remains of saves and deletions that were killed: folders of ours with a temporary name, and those
    without a state.json."""
    for path, _, suffix in folders_of_run(folder):
        if (suffix or not os.path.lexists(path / "state.json")) and is_ours(path):
            remove(path)


def restore_replaced(folder):
    """If a save was killed between the two renames that replace a checkpoint of the same step, rename the old one back.
    Every rank may call this; the first one does it."""
    for path, step, suffix in folders_of_run(folder):
        final = path.with_name(name_of(step))
        if suffix == ".old.tmp" and is_complete(path) and not os.path.lexists(final):
            with contextlib.suppress(OSError):
                os.rename(path, final)


def tidy(folder):
    """Repair out/<run>/checkpoints at the start of a run: finish saves and deletions that were killed, and correct
    `latest` and `best`. Must be called by one rank, and never by two runs at a time. Raises UserError."""
    restore_replaced(folder)
    remove_unfinished(folder)
    write_marks(folder)


def prune(folder, keep, is_copied=None, keep_every=0):
    """Delete old checkpoints. Kept are the newest `keep` good ones of the run as it was continued, the newest `keep`
    suspect ones after them, the latest and the best, and stale ones until the continued run has saved `keep` good ones.
    So no good checkpoint is deleted because of a suspect one or one whose state.json cannot be read. keep_every: also
    kept are those of the run as it was continued whose step is a multiple of this.

    is_copied: tells of a path whether its copy at train.copy_to is whole. The others are kept as well, unless the disk
    has no room for the next checkpoint."""
    remove_unfinished(folder)
    saved = Saved(folder)
    good = saved.good[-keep:]
    oldest = good[0] if good else None
    suspect = [entry for entry in saved.own if entry.suspect and (not good or entry.step > oldest.step)][-keep:]
    victims = [entry for entry in saved.own if entry.suspect or (good and entry.step < oldest.step)]
    if len(good) == keep and all(entry.number < oldest.number for entry in saved.stale):
        victims += saved.stale
    forever = [entry for entry in saved.own if keep_every and entry.step % keep_every == 0]
    spared = {saved.latest, saved.best, *(entry.path for entry in suspect + forever)}
    old = [entry.path for entry in victims if entry.path not in spared and is_ours(entry.path)]
    waiting = [path for path in old if is_copied and not is_copied(path)]
    for path in old:
        if path not in waiting:
            remove(path)
    for path in waiting:
        free, needed = shutil.disk_usage(folder).free, 1.2 * size_of(saved.latest)
        if free > needed:
            break
        with contextlib.suppress(OSError):  # the terminal may be gone
            space = f"{free / 1e9:.1f} GB are left on its disk and the next checkpoint takes {needed / 1.2e9:.1f}"
            print(f"warning: deleted {path} before its copy was whole: {space}", flush=True)
        remove(path)


def size_of(path):
    """Bytes of a checkpoint's files."""
    return sum(entry.stat().st_size for entry in os.scandir(path))
