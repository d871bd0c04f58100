"""Resuming: the checkpoint that a run starts from, whether it is of the same run, and which settings have changed."""

import json
import os
from pathlib import Path

from minzero.checkpoint import as_rank_0, fault_of
from minzero.checkpoint_folder import Saved, find, folders_of_run, is_complete, is_within, restore_replaced
from minzero.checkpoint_state import as_saved, read_state, state_if_whole
from minzero.config.nested import flat
from minzero.config.sections import Config, LoraConfig, ModelConfig, TrainConfig, data_weights
from minzero.config.values import in_short
from minzero.data.mixture import check_same_data
from minzero.dist import print0
from minzero.errors import UserError
from minzero.schedule import SHAPES_THE_BATCH, SHAPES_THE_RATE

WINDOWS = ("loss", "gradient norm")  # in the state of BadSteps: the last steps' numbers
ADAPTERS = ("rank", "alpha", "matrices", "base_bits")  # keys of the section lora
HOW_IT_RESUMES = ("train.out_dir", "train.copy_to", "train.resume", "train.allow_changed")

# -- which checkpoint ------------------------------------------------------------------------------


def where_to_start(config, data, known_faults=None):
    """The checkpoint to continue from and its state: (path, state), or (None, the state of step 0). Rank 0 looks for it
    and tells the others, so every rank must call this.

    data: the run's training Mixture. known_faults: {path: fault} of checkpoints already found damaged, the newest last.
    Rank 0 prints a line for each checkpoint that is ignored. Raises UserError if the run folder holds a run that must
    not be continued or overwritten."""
    found, state, ignored = as_rank_0(lambda: choose_start(config.train, known_faults or {}))
    if known_faults:
        latest_fault = list(known_faults)[-1]  # the others were printed by earlier calls
        ignored = [line for line in ignored if str(latest_fault) in line]
    for line in ignored:
        print0(line)
    if found is None:
        data.check_chat_template()
        return None, state_at_step_0()
    check_same_run(found, state, config)
    if "data.path" not in config.train.allow_changed:
        check_same_data(state["data"], data, found)
        return found, state
    state_for_data = for_data(state, data, config.data.path)
    if state_for_data is not state:
        data.check_chat_template()
    return found, state_for_data


def for_data(state, data, path):
    """The state of a checkpoint for a run that goes on with this Mixture of data.path. If the data or their weights are
    others, what was measured on the old ones is left out: the best validation loss, and the losses with which a spike
    is compared. The folders' names do not matter."""
    if parts_of(state["data"], state["config"]["data"]["path"]) == parts_of(data.fingerprint(), path):
        return state
    bad_steps = {name: value for name, value in state.get("bad_steps", {}).items() if name not in WINDOWS}
    return state | {"best_val_loss": None, "bad_steps": bad_steps}


def parts_of(fingerprints, path):
    """[(fingerprint of a folder's data as text, its share)] of data.path, in an order that names do not change."""
    weights = data_weights(path)
    total = sum(weights.values())
    texts = {folder: json.dumps(fingerprints.get(folder), sort_keys=True) for folder in weights}
    return sorted((texts[folder], weight / total) for folder, weight in weights.items())


def state_at_step_0():
    return {"step": 0, "tokens": 0, "best_val_loss": None}


def branch_of(train, path, state):
    """The checkpoint of another run at which this one began, or None. train: the train section; path, state: of the
    checkpoint from which it starts now, None for step 0."""
    if path is None:
        return None
    return state.get("branch_of") if is_within(path, train.out_dir) else str(path)


def saved_model(train):
    """(checkpoint, its config as a dictionary) of the run that would be continued with this train section, or None. All
    checkpoints of a run have the same model. Changes nothing and looks at state.json alone."""
    folders = []
    if train.resume != "never":
        entries = folders_of_run(Path(train.out_dir) / "checkpoints")
        folders = [path for path, _, suffix in reversed(entries) if suffix in ("", ".old.tmp")]  # see restore_replaced
    if train.resume not in ("auto", "never") and (found := find(train.resume)):
        folders.append(found)
    states = ((path, state_if_whole(path)) for path in folders)
    return next(((path, state["config"]) for path, state in states if state), None)


def choose_start(train, known_faults=()):
    """The candidate of `where_to_start`, as `newest_usable` returns it. train: the train section. For rank 0 alone.
    Raises UserError."""
    run = Path(train.out_dir)
    resume = train.resume
    if resume == "never" and find(run):
        raise UserError(f"train.out_dir: {run} already holds a run; choose another, or drop --train.resume never")
    restore_replaced(run / "checkpoints")
    look_at_files = os.environ.get("WORLD_SIZE", "1") == "1"  # several ranks share that in `fault_of`
    own = resume in ("auto", "never")
    # a checkpoint outside out_dir is only used to start: once out_dir has its own, the same command continues from that
    outside = not own and not is_within(resume, run)
    if own or (outside and find(run)):
        return newest_usable(run, known_faults, look_at_files)
    found = find(resume)
    if found is None:
        raise UserError(f"train.resume: {resume} holds no complete checkpoint; expected auto, never or one's path")
    if found in known_faults:
        raise UserError(known_faults[found])
    return found, read_state(found, look_at_files), []


def newest_usable(run, known_faults=(), look_at_files=True):
    """The checkpoint from which a run continues: (path, state, lines about newer ones that are ignored). Path and state
    are None if the run has never finished a save. Stale checkpoints are tried last.

    known_faults: {path: fault} of checkpoints found damaged by reading them. look_at_files: see `read_state`. Raises
    UserError if there are checkpoints but all are damaged: starting from the beginning would overwrite the run."""
    folder = Path(run) / "checkpoints"
    saved = Saved(folder)
    ignored = unfinished(folder)
    for entry in [*reversed(saved.own), *reversed(saved.stale)]:
        try:
            if entry.path in known_faults:
                raise UserError(known_faults[entry.path])
            return entry.path, read_state(entry.path, look_at_files), ignored
        except UserError as error:
            ignored.append(f"ignored {entry.path}: {error}")
    if saved.entries:
        fault = ignored[-1].removeprefix("ignored ")
        raise UserError(f"{fault}; no checkpoint of this run is whole: choose another train.out_dir")
    return None, None, ignored


class WayBack:
    """The checkpoints that a run may go back to after a bad step: those that it has saved since this start, and the one
    from which it started. Others in its folder may be of a continuation that was given up. All ranks must make one
    before the first save, and call `newest` together; both may raise SharedError.

    run: the run's folder. start: the checkpoint, which may be another run's, or None for step 0."""

    def __init__(self, run, start):
        self.folder = Path(run) / "checkpoints"
        self.start = start
        self.last_before = as_rank_0(lambda: max((entry.number for entry in Saved(self.folder).entries), default=0))

    def newest(self, progress=lambda: None):
        """The newest of them of which all bytes are whole: (path, state, lines about newer ones that are not), or
        (None, None, []) before the first. progress: called for each chunk that is read. Raises SharedError if there
        are some, and none is whole."""
        known_faults = {}
        while True:
            found, state, ignored = as_rank_0(lambda: self.choose(known_faults))
            fault = found and fault_of(found, state, progress)
            if not fault:
                return found, state, ignored
            known_faults[found] = fault

    def choose(self, known_faults):
        """As `newest`, by state.json alone. known_faults: {path: fault}. For rank 0. Raises UserError."""
        own = [entry.path for entry in Saved(self.folder).own if entry.number > self.last_before]
        ignored = []
        for path in [*reversed(own), *([self.start] if self.start else [])]:
            try:
                if path in known_faults:
                    raise UserError(known_faults[path])
                return path, read_state(path), ignored
            except UserError as error:
                ignored.append(f"ignored {path}: {error}")
        if ignored:
            fault = ignored[-1].removeprefix("ignored ")
            raise UserError(f"train.bad_step rollback: {fault}; no checkpoint of this run is whole: set it to skip")
        return None, None, []


def unfinished(folder):
    """A line for each save that was not finished, and each checkpoint's folder without a state.json."""
    lines = []
    for path, _, suffix in folders_of_run(folder):
        if suffix == ".tmp":
            lines.append(f"ignored {path}: its save was not finished")
        elif not suffix and not is_complete(path):
            lines.append(f"ignored {path}: it has no state.json")
    return lines


# -- the same run? ---------------------------------------------------------------------------------


def check_same_run(path, state, config):
    """Refuse to continue a run as a different one. Raises UserError with all settings that differ and must not, except
    those that train.allow_changed names."""
    saved, now = state["config"], config.to_dict()
    defaults = vars(ModelConfig())  # of keys that are younger than the checkpoint
    pairs = [(f"model.{name}", saved["model"].get(name, defaults[name]), v) for name, v in now["model"].items()]
    pairs = [pair for pair in pairs if pair[0] != "model.family"]  # of exports alone
    before = vars(LoraConfig()) | saved.get("lora", {})
    pairs += [(f"lora.{name}", before[name], now["lora"][name]) for name in ADAPTERS]
    for name in ("loss", "optimizer"):
        default = TrainConfig.__dataclass_fields__[name].default
        pairs.append((f"train.{name}", saved["train"].get(name, default), now["train"][name]))
    for key in ("data.path", "train.seed", "train.global_batch_tokens"):
        section, name = key.split(".")
        if key not in config.train.allow_changed:
            pairs.append((key, saved[section].get(name), now[section][name]))
    was = as_saved(state, SHAPES_THE_BATCH)
    grows = state["tokens"] < max(was.batch_ramp_tokens, config.train.batch_ramp_tokens)
    if grows and "train.global_batch_tokens" not in config.train.allow_changed:
        pairs += [(f"train.{name}", getattr(was, name), now["train"][name]) for name in SHAPES_THE_BATCH[1:]]
    different = [f"{name} {in_short(was)} -> {in_short(value)}" for name, was, value in pairs if was != value]
    if different:
        remedy = "set them back, or start another run with --train.out_dir"
        if not any(name.startswith(("model.", "lora.", "train.loss", "train.optimizer")) for name in different):
            remedy += ", or name them in train.allow_changed"
        raise UserError(f"{path}: was saved with other settings: {'; '.join(different)}; {remedy}")


# -- what has changed ------------------------------------------------------------------------------


def changed_settings(saved, now):
    """{key: (value in the checkpoint, value now)} of all keys that differ, except those that only say where the run is
    and how it is resumed. saved, now: `Config.to_dict()`, with values in place of "auto" where they are known. Keys
    that are younger than the checkpoint had their default."""
    defaults = Config().to_dict()
    changed = {}
    for section in now:
        was = saved.get(section, {})
        if section != "deepspeed":
            was = defaults[section] | was
        before, after = flat(was, f"{section}."), flat(now[section], f"{section}.")
        for name in dict.fromkeys([*before, *after]):
            values = before.get(name), after.get(name)
            # auto and false differ on packed conversations alone, and check_same_data refuses those
            is_same_mask = name == "data.document_mask" and set(values) == {"auto", False}
            if values[0] != values[1] and not is_same_mask and name not in HOW_IT_RESUMES:
                changed[name] = values
    return changed


def saved_train_config(state):
    """A TrainConfig with those settings of a checkpoint that shape the learning rate. Raises UserError for a schedule
    that this code does not know."""
    train = as_saved(state, SHAPES_THE_RATE)
    for name in SHAPES_THE_RATE[:2]:
        choices, value = TrainConfig.__dataclass_fields__[name].metadata["choices"], getattr(train, name)
        if value not in choices:
            found = f"the checkpoint was saved with {value[:40]!r}"
            raise UserError(f"train.{name}: {found}, expected {', '.join(choices)}; start another run")
    return train


def setting(world_size, stage, precision):
    """Where a run ran, for the line about a run that continues elsewhere."""
    return f"{world_size} rank{'s' if world_size > 1 else ''} at ZeRO stage {stage} in {precision}"
