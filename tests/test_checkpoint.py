"""Finding, checking and pruning checkpoints; saving and loading real ones is in end_to_end."""

import pytest

import checkpoint
from config import Config, UserError
from data.shards import write_json


def state_of(step, files):
    state = {"step": step, "files": dict(files), "config": Config().to_dict(), "data": {}}
    return state | {"world_size": 8, "precision": "fp32"}


def make(run, step, files=(("weights.pt", 10),)):
    folder = run / "checkpoints" / checkpoint.name_of(step)
    folder.mkdir(parents=True)
    for name, size in files:
        (folder / name).write_bytes(bytes(size))
    write_json(folder / "state.json", state_of(step, files))
    return folder


def mark(run, which, step):
    (run / "checkpoints" / which).write_text(checkpoint.name_of(step))


def test_find_takes_what_is_marked_and_never_what_is_incomplete(tmp_path):
    assert checkpoint.find(tmp_path) is None
    folders = {step: make(tmp_path, step) for step in (5, 10, 15)}
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_00000025").mkdir()  # no state.json
    assert checkpoint.find(tmp_path) == folders[15], "the newest where nothing is marked"
    mark(tmp_path, "latest", 10)
    mark(tmp_path, "best", 5)
    assert checkpoint.find(tmp_path) == folders[10]
    assert checkpoint.find(tmp_path, "best") == folders[5]
    assert checkpoint.find(tmp_path, "15") == folders[15]
    assert checkpoint.find(folders[5]) == folders[5]
    with pytest.raises(UserError, match=r"no checkpoint '20'; expected latest, best or one of the steps: 5, 10, 15"):
        checkpoint.find(tmp_path, "20")


def test_pruning_keeps_the_newest_and_what_is_marked(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    mark(tmp_path, "latest", 6)
    mark(tmp_path, "best", 2)
    checkpoint.prune(tmp_path / "checkpoints", 2)
    left = [int(p.name[5:]) for p in checkpoint.complete_checkpoints(tmp_path / "checkpoints")]
    assert left == [2, 5, 6]


@pytest.mark.parametrize(("size", "expected"), [(9, "9 bytes, expected 10 bytes"), (None, "no such file")])
def test_a_damaged_file_is_named(tmp_path, size, expected):
    folder = make(tmp_path, 5)
    (folder / "weights.pt").unlink()
    if size is not None:
        (folder / "weights.pt").write_bytes(bytes(size))
    with pytest.raises(UserError, match=expected) as error:
        checkpoint.read_state(folder)
    assert "weights.pt" in str(error.value)


def test_another_run_is_refused_with_what_differs(tmp_path):
    state, config = checkpoint.read_state(make(tmp_path, 5)), Config()
    checkpoint.check_same_run(tmp_path, state, config)
    del state["config"]["model"]["norm_eps"]  # saved before there was that key
    checkpoint.check_same_run(tmp_path, state, config)
    config.model.n_layer, config.train.seed = 3, 7
    with pytest.raises(UserError, match=r"model.n_layer 12 -> 3; train.seed 1337 -> 7"):
        checkpoint.check_same_run(tmp_path, state, config)
    config = Config()
    config.train.micro_batch_size, config.train.eval_every = 1, 5
    checkpoint.check_same_run(tmp_path, state, config)  # neither changes what is learned
    checkpoint.check_same_ranks(tmp_path, state, 8, 0, "fp32")
    with pytest.raises(UserError, match="number of ranks 8 -> 4; precision 'fp32' -> 'bf16'"):
        checkpoint.check_same_ranks(tmp_path, state, 4, 0, "bf16")


@pytest.mark.parametrize("content", [{}, [], {"step": 5}, state_of(5, ()) | {"files": []}, state_of("5", ())])
def test_a_damaged_state_is_named(tmp_path, content):
    folder = make(tmp_path, 5)
    write_json(folder / "state.json", content)
    with pytest.raises(UserError, match=r"state.json: no \w+ \(\w+\); the checkpoint is damaged"):
        checkpoint.read_state(folder)
