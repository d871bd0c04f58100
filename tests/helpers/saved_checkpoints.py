"""Checkpoints written without an engine, for the tests of how they are found, read and deleted."""

import signal

import pytest
import torch

from minzero import checkpoint
from minzero.checkpoint_folder import complete_checkpoints, name_of, prune
from minzero.checkpoint_state import state_checksum
from minzero.config.sections import Config
from minzero.files import write_json
from minzero.tensor_files import index_of, pieces_in
from minzero.zero import KINDS
from tests.helpers.trained_runs import write_file

TENSORS = {
    "random/cpu/0": torch.arange(13, dtype=torch.uint8),
    "fp32/a.weight/0": torch.arange(6.0),
    "fp32/a.weight/6": torch.arange(6.0, 10.0),
    "exp_avg/a.weight/0": torch.randn(10).bfloat16(),
}


WHOLE = {name: torch.arange(10.0) for name in ("fp32/a.weight/0", "exp_avg/a.weight/0", "exp_avg_sq/a.weight/0")}


def state_of(step, files):
    state = {"step": step, "tokens": step * 8, "optimizer_steps": step, "files": files, "config": Config().to_dict()}
    state |= {
        "parameters": {"a.weight": [2, 5]},
        "tied": {"b.weight": "a.weight"},
        "loss_scaler": {},
        "data": {},
        "best_val_loss": None,
    }
    return state | {"world_size": 8, "stage": 3, "precision": "fp32"}


def write_state(folder, state):
    """Write state.json with its checksum."""
    write_json(folder / "state.json", state | {"crc32": state_checksum(state)})


def deep(levels):
    return {"x": deep(levels - 1)} if levels else 1


def make(run, step):
    """A checkpoint of two ranks, with one parameter of 2 x 5."""
    folder = run / "checkpoints" / name_of(step)
    folder.mkdir(parents=True)
    halves = [{k: v for k, v in TENSORS.items() if k.endswith("/6") == second} for second in (False, True)]
    names = ("rank_00000.safetensors", "rank_00001.safetensors")
    files = {name: write_file(folder / name, part) for name, part in zip(names, halves, strict=True)}
    state = state_of(step, files)
    write_state(folder, state)
    return folder


@pytest.fixture(autouse=True)
def no_reader_may_hang():
    """As one that opens a pipe would."""
    signal.alarm(120)
    yield
    signal.alarm(0)


def save(run, step, val_loss=None, keep=2):
    """Save a checkpoint as the ranks and rank 0 do, without an engine."""
    folder, name = run / "checkpoints", name_of(step)
    checkpoint.make_room(folder, name)
    files = {"rank_00000.safetensors": write_file(folder / f"{name}.tmp" / "rank_00000.safetensors", WHOLE)}
    checkpoint.commit(folder, name, state_of(step, files) | {"val_loss": val_loss, "world_size": 1}, False)
    prune(folder, keep)
    return folder / name


def marks(run):
    return tuple(int((run / "checkpoints" / which).read_text()[5:]) for which in ("latest", "best"))


def steps_of(run):
    return [int(path.name[5:]) for path in complete_checkpoints(run / "checkpoints")]


def mark(run, which, step):
    (run / "checkpoints" / which).write_text(name_of(step))


def many_files(run, ranks, elements=640, parameters=("a", "b", "c"), indexed=True):
    """A checkpoint as that many ranks at stage 3 write it, of parameters of so many elements."""
    folder = run / "checkpoints" / name_of(1)
    folder.mkdir(parents=True)
    files, pieces_of = {}, []
    each = -(-elements // ranks)
    for rank in range(ranks):
        own = range(min(elements, rank * each), min(elements, (rank + 1) * each))
        names = [f"{kind}/{name}/{own.start}" for name in parameters for kind in KINDS] if own else []
        tensors = {name: torch.arange(float(own.start), own.stop) for name in names}
        files[f"rank_{rank:05d}.safetensors"] = write_file(folder / f"rank_{rank:05d}.safetensors", tensors)
        pieces_of.append(pieces_in({name: len(tensor) for name, tensor in tensors.items()}))
    state = state_of(1, files) | {"parameters": {name: [elements] for name in parameters}, "tied": {}}
    state |= {"pieces": index_of(pieces_of)} if indexed else {}
    write_state(folder, state)
    return folder
