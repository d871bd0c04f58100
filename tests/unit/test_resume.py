"""Which checkpoint a run continues from, and what it refuses."""

import os
import zlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from minzero import checkpoint, resume
from minzero.checkpoint_folder import find, name_of
from minzero.checkpoint_state import read_state
from minzero.config.sections import Config
from minzero.errors import SharedError, UserError
from minzero.zero import KINDS
from tests.helpers.saved_checkpoints import (
    make,
    mark,
    marks,
    no_reader_may_hang,  # noqa: F401, a fixture for every test here
    save,
    state_of,
    steps_of,
    write_state,
)


def test_of_other_data_nothing_that_was_measured_is_kept(tmp_path):
    """Neither the best loss nor the losses that a spike is compared with; what was counted stays."""
    measured = {"loss": [3.0], "gradient norm": [1.0], "skipped": 4, "bad": [], "skipped_in_a_row": 0}
    state = {"step": 9, "best_val_loss": 2.0, "bad_steps": measured}
    kept = {name: measured[name] for name in ("skipped", "bad", "skipped_in_a_row")}
    a, b, c = ({"tokens": number} for number in (5, 6, 7))

    def state_for(before, path_before, now, path_now):
        saved = state | {"data": before, "config": {"data": {"path": path_before}}}
        found = resume.for_data(saved, SimpleNamespace(fingerprint=lambda: now), path_now)
        assert found == (saved if found is saved else saved | {"best_val_loss": None, "bad_steps": kept})
        return found is saved

    assert state_for({"a": a}, "a", {"a": a}, "a") and state_for({"a": a}, "a", {"moved": a}, "moved")
    two, moved = {"a": a, "b": b}, {"x": b, "y": a}
    assert state_for(two, {"a": 0.9, "b": 0.1}, moved, {"x": 1, "y": 9})
    assert not state_for({"a": a}, "a", {"a": b}, "a") and not state_for({"a": a}, "a", two, {"a": 1, "b": 1})
    assert not state_for(two, {"a": 0.9, "b": 0.1}, two, {"a": 0.1, "b": 0.9})
    assert not state_for(two, {"a": 1, "b": 1}, {"a": a, "c": c}, {"a": 1, "c": 1})


def test_a_run_goes_back_to_where_it_started_or_to_what_it_has_saved_since(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "as_rank_0", lambda choose: choose())
    faults = {}
    monkeypatch.setattr(resume, "fault_of", lambda path, *_: faults.get(path))
    assert resume.WayBack(tmp_path / "new", None).newest() == (None, None, [])
    saved = {step: save(tmp_path, step, keep=9) for step in (5, 10, 15)}
    for start in (saved[5], save(tmp_path / "trunk", 5)):  # its own folder, or that of a branch which holds none of it
        back = resume.WayBack(tmp_path, start)
        assert back.newest()[0] == start
    later = save(tmp_path, 8, keep=9)
    assert back.newest()[0] == later
    newest = save(tmp_path, 12, keep=9)
    assert back.newest()[0] == newest
    faults[newest] = "bytes"
    found, _, ignored = back.newest()
    assert found == later and ignored == [f"ignored {newest}: bytes"]
    faults[later] = faults[start] = "bytes"
    with pytest.raises(UserError, match=r"train.bad_step rollback: .*: bytes; no checkpoint of this run is whole"):
        back.newest()


def test_newest_usable_names_what_it_ignored(tmp_path):
    assert resume.newest_usable(tmp_path) == (None, None, [])
    folders = {step: make(tmp_path, step) for step in (5, 10, 15, 30)}
    mark(tmp_path, "latest", 15)  # 30 was left by an earlier continuation
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir()
    path, state, passed_over = resume.newest_usable(tmp_path)
    unfinished = f"ignored {tmp_path}/checkpoints/step_00000020.tmp: its save was not finished"
    assert path == folders[15] and state["step"] == 15 and passed_over == [unfinished]
    (folders[15] / "rank_00001.safetensors").write_bytes(b"x")
    path, _, passed_over = resume.newest_usable(tmp_path)
    assert path == folders[10] and len(passed_over) == 2
    assert f"ignored {folders[15]}: {folders[15]}/rank_00001.safetensors: 1 bytes, expected" in passed_over[1]
    path, _, passed_over = resume.newest_usable(tmp_path, {folders[10]: "a wrong checksum"})
    assert path == folders[5] and passed_over[2] == f"ignored {folders[10]}: a wrong checksum"
    for folder in (folders[5], folders[10], folders[30]):
        (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint of this run is whole: choose another") as error:
        resume.newest_usable(tmp_path)
    assert "\n" not in str(error.value)


def test_a_killed_first_save_is_reported_and_the_run_starts_at_step_0(tmp_path):
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir(parents=True)
    path, state, passed_over = resume.newest_usable(tmp_path)
    assert path is state is None and passed_over[0].endswith("step_00000020.tmp: its save was not finished")


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
    path, _, passed_over = resume.newest_usable(tmp_path)
    if path == newer:  # sizes are right: only reading it shows the wrong bit
        path, _, passed_over = resume.newest_usable(tmp_path, {newer: str(error.value)})
    assert path == older and len(passed_over) == 1 and str(newer) in passed_over[0]
    _, _, read = checkpoint.open_weights(older)
    for name in ("a.weight", "b.weight"):  # tied
        assert read(name).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_another_run_is_refused_with_what_differs(tmp_path):
    state, config = read_state(make(tmp_path, 5)), Config()
    resume.check_same_run(tmp_path, state, config)
    del state["config"]["model"]["norm_eps"]  # saved before there was that key
    resume.check_same_run(tmp_path, state, config)
    config.model.n_layer, config.train.seed = 3, 7
    with pytest.raises(UserError, match=r"model.n_layer 12 -> 3; train.seed 1337 -> 7"):
        resume.check_same_run(tmp_path, state, config)
    config.model.n_expert, config.model.tie_embeddings, config.model.mlp = 8, False, "swiglu"
    with pytest.raises(UserError, match=r'mlp "gelu" -> "swiglu"; model.n_expert null -> 8; model.t\w+ true -> false;'):
        resume.check_same_run(tmp_path, state, config)
    config.model.n_expert, config.model.tie_embeddings, config.model.mlp = None, True, "gelu"
    config.train.allow_changed = ["train.seed"]
    with pytest.raises(UserError, match=r"settings: model.n_layer 12 -> 3; set them back, or start another run with"):
        resume.check_same_run(tmp_path, state, config)
    config.model.n_layer = 12
    resume.check_same_run(tmp_path, state, config)
    config = Config()
    config.train.optimizer = "muon"
    with pytest.raises(UserError, match=r'settings: train.optimizer "adamw" -> "muon"; .* with --train.out_dir$'):
        resume.check_same_run(tmp_path, state, config)
    config = Config()
    config.train.micro_batch_size, config.train.eval_every = 1, 5
    resume.check_same_run(tmp_path, state, config)  # neither changes what is learned


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_checkpoint_of_older_code_loads(tmp_path, spoilt):
    """Files without checksums in their headers, one of the whole file in state.json, no index, none of the newer keys;
    the marks say which is the best."""
    for step in (5, 10, 15):
        folder, files = tmp_path / "checkpoints" / name_of(step), {}
        folder.mkdir(parents=True)
        for rank, elements in enumerate((range(6), range(6, 10))):
            part = torch.tensor([float(step + number) for number in elements])
            file = folder / f"rank_{rank:05d}.safetensors"
            names = [f"{kind}/a.weight/{elements.start}" for kind in KINDS]
            save_file({name: part.clone() for name in names} | {"random/cpu/0": torch.get_rng_state()}, file)
            content = file.read_bytes()
            files[file.name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        state = state_of(step, files) | {"best_val_loss": 2.0}
        write_state(folder, state)
    mark(tmp_path, "latest", 10)
    mark(tmp_path, "best", 5)
    assert [find(tmp_path, which).name[-2:] for which in ("latest", "best")] == ["10", "05"]
    if spoilt:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"rank_00001.safetensors: found checksum \w+, expected"):
            checkpoint.open_weights(folder)
        return
    for step, found in ((5, "best"), (10, "latest"), (15, "15")):
        _, _, read = checkpoint.open_weights(find(tmp_path, found))
        assert read("a.weight").flatten().tolist() == [float(step + number) for number in range(10)]
    save(tmp_path, 12, 3.0)
    assert marks(tmp_path) == (12, 5) and resume.newest_usable(tmp_path)[1]["step"] == 12
    save(tmp_path, 14, 1.0)
    assert marks(tmp_path) == (14, 14) and steps_of(tmp_path) == [12, 14]


def test_a_second_choice_of_a_checkpoint_is_rank_0s(tmp_path, monkeypatch):
    """On a network file system one rank may still see a checkpoint that another no longer sees."""
    on_this_rank, on_rank_0 = tmp_path / "as_this_rank_sees_it", tmp_path / "run"
    for step in (5, 10, 15):
        make(on_rank_0, step)
        if step != 10:
            make(on_this_rank, step)
    faults = {on_rank_0 / "checkpoints" / name_of(15): "a wrong checksum"}
    told = []

    def broadcast(values, src):
        """The first call is rank 0's and is remembered; later calls receive its values."""
        if not told:
            told.extend(values)
        values[:] = told

    monkeypatch.setattr(checkpoint.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "1", "WORLD_SIZE": "2"})
    config, answers = Config(), []
    config.train.allow_changed = ["data.path"]
    for rank, folder in enumerate((on_rank_0, on_this_rank)):
        monkeypatch.setattr(checkpoint.distributed, "get_rank", lambda rank=rank: rank)
        config.train.out_dir = str(folder)
        data = SimpleNamespace(fingerprint=dict, check_chat_template=lambda: None)
        answers.append(resume.where_to_start(config, data, faults))
    assert answers[0] == answers[1] and answers[0][1]["step"] == 10

    told.clear()
    for folder in (on_rank_0 / "checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    for rank, folder in enumerate((on_rank_0, on_this_rank)):
        monkeypatch.setattr(checkpoint.distributed, "get_rank", lambda rank=rank: rank)
        config.train.out_dir = str(folder)
        with pytest.raises(SharedError, match="no checkpoint of this run is whole"):
            resume.where_to_start(config, None, faults)
