"""Finding, checking and pruning checkpoints; saving and loading real ones is in end_to_end."""

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import pieces
from config import Config, UserError
from data.shards import write_json
from tests.trained_runs import write_file

TENSORS = {
    "random/cpu/0": torch.arange(13, dtype=torch.uint8),
    "fp32/a.weight/0": torch.arange(6.0),
    "fp32/a.weight/6": torch.arange(6.0, 10.0),
    "exp_avg/a.weight/0": torch.randn(10).bfloat16(),
}


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


def make(run, step):
    """A checkpoint of two ranks, with one parameter of 2 x 5."""
    folder = run / "checkpoints" / checkpoint.name_of(step)
    folder.mkdir(parents=True)
    halves = [{k: v for k, v in TENSORS.items() if k.endswith("/6") == second} for second in (False, True)]
    names = ("rank_00000.safetensors", "rank_00001.safetensors")
    files = {name: write_file(folder / name, part) for name, part in zip(names, halves, strict=True)}
    state = state_of(step, files)
    write_json(folder / "state.json", state | {"crc32": checkpoint.seal(state)})
    return folder


def mark(run, which, step):
    (run / "checkpoints" / which).write_text(checkpoint.name_of(step))


def test_what_is_written_is_safetensors(tmp_path):
    entry = write_file(tmp_path / "a.safetensors", TENSORS)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert entry["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    checkpoint.check_sums(tmp_path, {"a.safetensors": entry})


def test_pieces_are_cut_and_joined_wherever_they_begin(tmp_path):
    """Files of two ranks, 6 and 4 elements, read by any number of ranks."""
    folder = make(tmp_path, 5)
    saved = pieces.SavedPieces(folder, checkpoint.read_state(folder))
    for start in range(10):
        for end in range(start + 1, 11):
            piece = torch.zeros(end - start)
            saved.fill(piece, start, "fp32", "a.weight")
            assert piece.tolist() == list(range(start, end))
    saved.index["a.weight"] = [[1, 6, 4, 4]]  # as if the first file held none of it
    with pytest.raises(UserError, match=r"a\.weight: found 4 of 6 elements; the checkpoint is damaged"):
        saved.fill(torch.zeros(6), 4, "fp32", "a.weight")


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


def test_the_newest_usable_says_what_it_passed_over(tmp_path):
    assert checkpoint.newest_usable(tmp_path) == (None, None, [])
    folders = {step: make(tmp_path, step) for step in (5, 10, 15, 30)}
    mark(tmp_path, "latest", 15)  # 30 was left by an earlier continuation
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir()
    path, state, passed_over = checkpoint.newest_usable(tmp_path)
    unfinished = f"ignored {tmp_path}/checkpoints/step_00000020.tmp: its save was not finished"
    assert path == folders[15] and state["step"] == 15 and passed_over == [unfinished]
    (folders[15] / "rank_00001.safetensors").write_bytes(b"x")
    path, _, passed_over = checkpoint.newest_usable(tmp_path)
    assert path == folders[10] and len(passed_over) == 2
    assert f"ignored {folders[15]}: {folders[15]}/rank_00001.safetensors: 1 bytes, expected" in passed_over[1]
    path, _, passed_over = checkpoint.newest_usable(tmp_path, {folders[10]: "a wrong checksum"})
    assert path == folders[5] and passed_over[2] == f"ignored {folders[10]}: a wrong checksum"
    for folder in (folders[5], folders[10], folders[30]):
        (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint of this run is whole: choose another") as error:
        checkpoint.newest_usable(tmp_path)
    assert "\n" not in str(error.value)


def test_the_first_save_that_was_killed_is_said_and_starts_anew(tmp_path):
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir(parents=True)
    path, state, passed_over = checkpoint.newest_usable(tmp_path)
    assert path is state is None and passed_over[0].endswith("step_00000020.tmp: its save was not finished")


def test_pruning_keeps_the_newest_and_what_is_marked(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    mark(tmp_path, "latest", 6)
    mark(tmp_path, "best", 2)
    checkpoint.prune(tmp_path / "checkpoints", 2)
    left = [int(p.name[5:]) for p in checkpoint.complete_checkpoints(tmp_path / "checkpoints")]
    assert left == [2, 5, 6]


@pytest.mark.parametrize("file", ["rank_00000.safetensors", "rank_00001.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "one bit"])
def test_each_damaged_file_is_named_and_an_older_checkpoint_taken(tmp_path, file, damage):
    older, newer = make(tmp_path, 5), make(tmp_path, 10)
    mark(tmp_path, "latest", 10)
    content = bytearray((newer / file).read_bytes())
    if damage == "missing":
        (newer / file).unlink()
    elif damage == "one bit":
        content[len(content) // 2] ^= 0x80
        (newer / file).write_bytes(content)
    else:
        (newer / file).write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.raises(UserError) as error:
        checkpoint.open_weights(newer)
    assert file in str(error.value) and "\n" not in str(error.value)
    path, _, passed_over = checkpoint.newest_usable(tmp_path)
    if path == newer:  # sizes are right: only reading it shows the wrong bit
        path, _, passed_over = checkpoint.newest_usable(tmp_path, {newer: str(error.value)})
    assert path == older and len(passed_over) == 1 and str(newer) in passed_over[0]
    _, _, read = checkpoint.open_weights(older)
    for name in ("a.weight", "b.weight"):  # tied
        assert read(name).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_another_run_is_refused_with_what_differs(tmp_path):
    state, config = checkpoint.read_state(make(tmp_path, 5)), Config()
    checkpoint.check_same_run(tmp_path, state, config)
    del state["config"]["model"]["norm_eps"]  # saved before there was that key
    checkpoint.check_same_run(tmp_path, state, config)
    config.model.n_layer, config.train.seed = 3, 7
    with pytest.raises(UserError, match=r"model.n_layer 12 -> 3; train.seed 1337 -> 7"):
        checkpoint.check_same_run(tmp_path, state, config)
    config.train.allow_changed = ["train.seed"]
    with pytest.raises(UserError, match=r"settings: model.n_layer 12 -> 3; set them back, or start another run with"):
        checkpoint.check_same_run(tmp_path, state, config)
    config.model.n_layer = 12
    checkpoint.check_same_run(tmp_path, state, config)
    config = Config()
    config.train.micro_batch_size, config.train.eval_every = 1, 5
    checkpoint.check_same_run(tmp_path, state, config)  # neither changes what is learned


@pytest.mark.parametrize("content", [{}, [], {"step": 5}, state_of(5, []), state_of("5", {})])
def test_a_damaged_state_is_named(tmp_path, content):
    folder = make(tmp_path, 5)
    write_json(folder / "state.json", content)
    with pytest.raises(UserError, match=r"state.json: no \w+ \(\w+\); the checkpoint is damaged"):
        checkpoint.read_state(folder)


def test_a_wrong_digit_in_the_state_is_no_other_setting(tmp_path):
    file = make(tmp_path, 5) / "state.json"
    file.write_text(file.read_text().replace('"step": 5', '"step": 7'))
    with pytest.raises(UserError, match=r"state.json: its checksum is wrong; the checkpoint is damaged"):
        checkpoint.read_state(file.parent)
