"""The newest copy of a run at train.copy_to, fetched into its folder where that holds no checkpoint or an older one.

All ranks fetch, each its share of the files, into checkpoints/step_00001000.tmp of the folder that they have in common.
The checksums of all files are compared before the folder gets its final name. A copy that is damaged or not whole is
named, and the next older one taken."""

import math
import secrets
import shutil
from pathlib import Path

from torch import distributed

from minzero.checkpoint import as_rank_0, fault_of, put_in_place
from minzero.checkpoint_folder import Saved, is_within, tidy, write_marks
from minzero.checkpoint_names import is_name, name_of, step_and_suffix
from minzero.checkpoint_state import read_state
from minzero.dist import all_or_none, first, print0
from minzero.errors import SharedError, UserError
from minzero.files import is_count, is_regular, make_folder, write_atomically
from minzero.resume import check_same_run
from minzero.store import CHECKPOINTS, RUN_ID, SMALL_FILES, STATE, Store


def open_store(train):
    """The Store of train.copy_to, or None without it. Raises UserError also for an address that cannot hold copies."""
    if train.copy_to is None:
        return None
    store = Store(train.copy_to)
    if "memory" in store.protocols:
        raise UserError(f"train.copy_to: {train.copy_to} ends with the process; expected a folder, or s3://bucket/run")
    run, place = Path(train.out_dir).resolve(), Path(store.root).resolve()
    if store.is_local and (place == run or run in place.parents or place in run.parents):
        raise UserError(f"train.copy_to: {place} is in or around train.out_dir {run}; choose a folder elsewhere")
    return store


def restore(config, folder, rank):
    """Fetch the newest copy into the run's folder, if there is one and it is newer than all that is there. Says so in
    lines, on rank 0. The names of copies that are damaged are in folder.damaged_copies then. Every rank must call this.

    folder: the RunFolder, which is taken and written into only if there is something to fetch. Raises UserError: for
    an address that cannot be used, for copies of another run, and, where nothing is in out_dir, for a store that does
    not answer: the run would begin from step 0 a second time."""
    with all_or_none():
        store = open_store(config.train)
    if store is None:
        return
    found = as_rank_0(lambda: copies_to_try(config, store))
    if not found:
        return
    for its_turn in (rank == 0, rank != 0):
        with all_or_none():
            print0(folder.hold() if its_turn else None)
    checkpoints = Path(config.train.out_dir) / CHECKPOINTS
    with all_or_none():
        if rank == 0:
            tidy(checkpoints)
    for number, name in enumerate(found):
        if fetch(store, checkpoints, name, config):
            print0(f"fetched {store.address}/{CHECKPOINTS}/{name} into {checkpoints}")
            folder.damaged_copies = found[:number]
            return
    if as_rank_0(lambda: not Saved(checkpoints).entries):
        raise SharedError(f"train.copy_to: {store.address}: no copy there is whole; choose another address")
    folder.damaged_copies = found


def copies_to_try(config, store):
    """The names of copies that are newer than what is in out_dir, the newest first. For rank 0 alone. Raises
    UserError."""
    train = config.train
    run = Path(train.out_dir)
    saved = Saved(run / CHECKPOINTS)
    try:
        run_id = store.read(RUN_ID)
        states = {name: state for name, state in store.states().items() if is_name(name)}
    except UserError as error:
        if not saved.entries:
            raise
        print0(f"warning: {error}; the run continues from what is in {run}")
        return []
    own_id = read_run_id(run)
    if run_id is not None and (own_id is not None or saved.entries) and own_id != run_id:
        raise UserError(f"train.copy_to: {store.address} holds the copies of another run than {run}; choose another")
    if train.resume == "never" and states:
        remedy = "choose another, or drop --train.resume never"
        raise UserError(f"train.copy_to: {store.address} already holds the copies of a run; {remedy}")
    names_a_checkpoint = train.resume not in ("auto", "never")
    if names_a_checkpoint and is_within(train.resume, run):
        return []  # one of the run's own was asked for
    if (
        names_a_checkpoint
        and not saved.entries
        and not all(is_branch(state, train.resume) for state in states.values())
    ):
        raise UserError(
            f"train.copy_to: {store.address} holds the copies of a run that did not begin at {train.resume}; "
            "choose another, or drop --train.resume to continue that run"
        )
    last = max((entry.number for entry in saved.entries), default=-1)
    numbers = {name: state.get("save_number") for name, state in states.items()}
    newer = [name for name, number in numbers.items() if is_count(number) and number > last]
    own = []
    stale = []  # as in checkpoint_folder.Saved; they are tried last
    lowest = math.inf
    for name in sorted(newer, key=lambda name: (numbers[name], name), reverse=True):
        step, _ = step_and_suffix(Path(name))
        (own if step < lowest else stale).append(name)
        lowest = min(lowest, step)
    return own + stale


def is_branch(state, source):
    """Whether a copy is of a run that began at `source`, a run or one of its checkpoints. state: its state.json."""
    began = state.get("branch_of")
    try:
        return isinstance(began, str) and is_within(began, source)
    except ValueError:  # no path
        return False


def fetch(store, checkpoints, name, config):
    """Fetch one copy and the run's small files. Returns whether it is whole and in place; if not, a line says why.
    Every rank must call this. Raises SharedError for a copy of other settings, for a store that does not answer, and
    for a folder that cannot be written."""
    temporary = checkpoints / f"{name}.tmp"
    where = f"{store.address}/{CHECKPOINTS}/{name}"
    state, fault = as_rank_0(lambda: fetch_state(store, temporary, name))
    if state:
        as_rank_0(lambda: check_same_run(where, state, config))
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        with all_or_none():
            missing = store.fetch(name, sorted(state["files"])[rank::ranks], temporary)
        found = first(missing)
        fault = found[1] if found else fault_of(temporary, state)
    if fault:
        print0(f"ignored {where}: {fault}")
    as_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True) if fault else complete(store, temporary, name))
    return not fault


def fetch_state(store, temporary, name):
    """Fetch state.json of a copy into a new folder. Returns (its content, None), or (None, what is wrong with it)."""
    make_folder("train.out_dir", temporary)
    if missing := store.fetch(name, [STATE], temporary):
        return None, missing
    try:
        state = read_state(temporary, look_at_files=False)
    except UserError as error:
        return None, str(error)
    return (state, None) if name_of(state["step"]) == name else (None, f"it is of step {state['step']}")


def complete(store, temporary, name):
    """The files are there, and whole."""
    checkpoints = temporary.parent
    for file in SMALL_FILES:
        if (content := store.read(file)) is not None:
            write_atomically(checkpoints.parent / file, content)
    put_in_place(temporary, checkpoints / name)
    write_marks(checkpoints)


# -- the id of a run -------------------------------------------------------------------------------


def read_run_id(run):
    path = run / RUN_ID
    return path.read_bytes()[:100] if is_regular(path) else None


def begin_copies(run, address):
    """Give the run and its folder at the address one random run_id, which tells its copies from another run's. A run
    without one has fetched nothing from there, so what is there is another's, which then copies no more (see
    copier.py), or of this one before its first copy. Returns a warning, or None. Raises UserError where the store
    cannot be written at the first start of a run with this address. For rank 0 alone."""
    store = Store(address)
    own = read_run_id(run)
    try:
        if own is None or store.read(RUN_ID) is None:
            store.write(own or secrets.token_hex(8).encode(), RUN_ID)
        if own is None:
            write_atomically(run / RUN_ID, store.read(RUN_ID))
    except UserError as error:
        if own is None:
            raise
        return f"warning: {error}; it is tried again"
    return None
