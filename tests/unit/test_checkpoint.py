"""Errors while saving and rolling back; saving and loading with real engines is in tests/launch."""

import os
import zlib

import pytest
import torch

from minzero import bad_steps, checkpoint, dist, resume, tensor_files
from minzero.checkpoint_folder import find
from minzero.config.sections import TrainConfig
from minzero.errors import SharedError, UserError
from tests.helpers.saved_checkpoints import save, state_of, steps_of, write_state


@pytest.fixture(scope="module")
def alone():
    """The process group of one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {name: os.environ[name] for name in os.environ if name != "RANK"})
        dist.start_process_group(may_be_alone=True)
        yield
        dist.stop_process_group()


class Unwritable(torch.Tensor):
    """A tensor that raises `error` when it is copied or when it is written (`at`)."""

    def to(self, *_, **__):
        return self if self.at == "write" else self.cpu()

    def cpu(self):
        raise self.error


@pytest.mark.parametrize("at", ["write", "copy"])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("odd"), ValueError("odd"), OSError(28, "full")])
def test_a_writer_that_ends_by_any_error_commits_nothing(tmp_path, monkeypatch, alone, error, background, at, capsys):
    before = save(tmp_path, 5)
    spoilt = torch.arange(10.0).as_subclass(Unwritable)
    spoilt.error, spoilt.at = error, at
    header = {"fp32/a.weight/0": (torch.float32, 10)}
    monkeypatch.setattr(checkpoint, "description", lambda engine: {})
    monkeypatch.setattr(checkpoint, "tensors_to_save", lambda engine: (header, iter([spoilt])))
    monkeypatch.setattr(checkpoint, "nvme_swapper", lambda engine: None)
    saving = checkpoint.Saving(None, tmp_path / "checkpoints", state_of(10, {}), False, 2, background)
    with pytest.raises(UserError, match=r"step_00000010.tmp/rank_00000.safetensors: could not be written") as raised:
        saving.finish()
    assert ("out of memory" if isinstance(error, MemoryError) else str(error.args[-1])) in str(raised.value)
    assert find(tmp_path) == before and steps_of(tmp_path) == [5]
    assert ("Traceback" in capsys.readouterr().err) == ("odd" in error.args), "a fault of the program can be found"


def test_a_writer_that_says_nothing_commits_nothing(tmp_path, monkeypatch, alone):
    """As a thread that a BaseException ended."""
    monkeypatch.setattr(checkpoint, "description", lambda engine: {})
    monkeypatch.setattr(checkpoint, "tensors_to_save", lambda engine: ({}, iter([])))
    monkeypatch.setattr(checkpoint.Saving, "write", lambda *_: None)
    saving = checkpoint.Saving(None, tmp_path / "checkpoints", state_of(10, {}), False, 2)
    with pytest.raises(UserError, match=r"step_00000010.tmp/rank_00000.safetensors: was not written$"):
        saving.finish()
    assert steps_of(tmp_path) == []


def spiked(run, monkeypatch, **settings):
    """BadSteps after a bad step, without an engine, and its train section. The loaded paths are in .loaded."""
    steps = object.__new__(bad_steps.BadSteps)
    steps.bad, steps.fault, steps.loss, steps.engine, steps.loaded = [[0, 3]], "loss 99", 99.0, None, []
    steps.skipped_in_a_row = 1
    steps.way_back = resume.WayBack(run, find(run))

    def load(engine, path, state, seed, progress=lambda: None):
        progress()
        steps.loaded.append(path)

    monkeypatch.setattr(checkpoint, "load", load)
    return steps, TrainConfig(out_dir=str(run), **settings)


@pytest.mark.parametrize("older_code", [False, True])
def test_a_rollback_makes_progress_with_each_part_that_it_reads(tmp_path, monkeypatch, alone, older_code):
    """Else the watch takes a large checkpoint for a hang."""
    monkeypatch.setattr(tensor_files, "CHUNK", 16)  # of 3 tensors of 40 bytes
    found = save(tmp_path, 5)
    if older_code:
        file = found / "rank_00000.safetensors"
        files = {file.name: {"bytes": file.stat().st_size, "crc32": f"{zlib.crc32(file.read_bytes()):08x}"}}
        state = state_of(5, files) | {"world_size": 1}
        write_state(found, state)
    steps, train = spiked(tmp_path, monkeypatch, bad_step="rollback")
    beats = []
    done = steps.handle(7, train, lambda: beats.append(len(steps.loaded)))
    assert done == f"passed over, and back to the weights of {found}" and steps.loaded == [found]
    assert len(beats) >= 3 * 3 + 1, "for each part, and in loading"


def test_a_fault_that_all_ranks_see_is_reported_once(tmp_path, monkeypatch, alone):
    steps, train = spiked(tmp_path, monkeypatch, bad_step="stop")
    for end in (steps.handle, steps.check_end):
        with pytest.raises(SharedError, match=r"none reached the weights; no checkpoint was saved; look"):
            end(7, train)
    found = save(tmp_path, 5, val_loss=float("nan"))
    with pytest.raises(SharedError, match=rf"; the last checkpoint is {found}, and none was saved before those steps;"):
        steps.handle(7, train)
    found = save(tmp_path, 6)
    with pytest.raises(SharedError, match=rf"; the last checkpoint is {found}; look"):
        steps.handle(7, train)
    spoilt = save(tmp_path, 7, val_loss=float("nan"))
    with pytest.raises(SharedError, match=rf"is {spoilt}, the last from before those steps {found}; look"):
        steps.handle(7, train)
    monkeypatch.setattr(bad_steps, "first_not_finite", lambda engine, progress: "fp32 of a.weight")
    steps.loss, (_, skip) = float("nan"), spiked(tmp_path, monkeypatch, bad_step="skip")
    with pytest.raises(SharedError, match=r"fp32 of a\.weight holds a NaN or an infinity"):
        steps.handle(7, skip)
    for path in (tmp_path / "checkpoints").glob("step_*/state.json"):
        path.write_text("{")
    with pytest.raises(SharedError, match="no checkpoint of this run is whole"):
        resume.WayBack(tmp_path, spoilt).newest()
    monkeypatch.setattr(checkpoint, "description", lambda engine: {})
    monkeypatch.setattr(checkpoint, "tensors_to_save", lambda engine: ({}, iter([])))
    monkeypatch.setattr(checkpoint.Saving, "write", lambda saving, *_: setattr(saving, "written", "the disk is full"))
    with pytest.raises(SharedError, match=r"^the disk is full$"):
        checkpoint.save(None, tmp_path / "checkpoints", state_of(10, {}), False, 2)


def test_all_parameters_that_differ_are_named_and_a_long_list_is_cut(tmp_path):
    shapes = {f"p{number}": [number, 2] for number in range(9)}
    checkpoint.refuse_other_parameters(tmp_path, {"parameters": shapes}, dict(shapes))
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/state\.json: q: found none, expected \[3\]; p1: found \[1, 2\], "
    ):
        fewer = {name: shape for name, shape in shapes.items() if name != "p1"} | {"q": [3]}
        checkpoint.refuse_other_parameters(tmp_path, {"parameters": shapes}, fewer)
    with pytest.raises(
        UserError, match=r"p3: found none, expected \[3, 2\]; and 5 more as in the model that model\.py"
    ):
        checkpoint.refuse_other_parameters(tmp_path, {"parameters": {}}, shapes)
