"""Numbers that go wrong must not reach the weights, at any stage and in any precision: one launch in all."""

import json
from pathlib import Path

import pytest
import torch

from minzero.metrics import read_metrics
from tests.helpers.processes import deepspeed_command, run
from tests.launch.parity_settings import SPOILT
from tests.launch.test_parity import losses, whole_tensors

SCRIPT = Path(__file__).with_name("bad_steps.py")


@pytest.fixture(scope="module")
def folder(small_data, tmp_path_factory):
    """What bad_steps.py left."""
    out = tmp_path_factory.mktemp("bad_steps")
    done = run(deepspeed_command(SCRIPT, small_data, out, "bad_steps"), timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (out / "stdout").write_text(done.stdout)
    return out


def content(folder, step):
    state, whole = whole_tensors(folder / "checkpoints" / f"step_{step:08d}")
    return state["optimizer_steps"], whole


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_nan_in_the_gradient_of_one_rank_changes_nothing(folder, stage, precision):
    name = f"nan_{precision}_stage{stage}"
    (before, good), (after, same), (_, later) = (content(folder / name, step) for step in (4, 5, 6))
    assert before == after and all(torch.equal(good[key], same[key]) for key in good)
    assert all(torch.isfinite(tensor).all() for tensor in later.values())
    assert not torch.equal(later["fp32", "token_embedding.weight"], same["fp32", "token_embedding.weight"])
    lines = read_metrics(folder / name)
    assert [line["skipped"] for line in lines if "loss" in line] == [0, 0, 0, 0, 1, 1, 1]
    assert [(line["step"], line["samples"]) for line in lines if "bad_step" in line] == [(5, [32, 39])]


@pytest.mark.parametrize("stage", [0, 3])
def test_an_infinite_loss_changes_nothing(folder, stage):
    (before, good), (after, same) = (content(folder / f"inf_stage{stage}", step) for step in (4, 5))
    assert before == after and all(torch.equal(good[key], same[key]) for key in good)
    assert [line["bad_step"] for line in read_metrics(folder / f"inf_stage{stage}") if "bad_step" in line] == [
        "loss inf"
    ]


def test_rollback_continues_with_the_weights_of_the_last_checkpoint(folder):
    (at_5, good), (at_7, same) = (content(folder / "rollback", step) for step in (5, 7))
    assert at_5 == at_7 == 5 and all(torch.equal(good[key], same[key]) for key in good)


def test_rollback_takes_an_older_checkpoint_where_bytes_of_the_newest_are_damaged(folder):
    steps = [content(folder / "rollback_damaged", step)[0] for step in (4, 8)]
    assert steps == [4, 5], "one more step, from the weights of step 4"
    said = (folder / "stdout").read_text()
    place = folder / "rollback_damaged" / "checkpoints"
    assert f"ignored {place}/step_00000006: {place}/step_00000006/rank_00001.safetensors: " in said
    assert f"back to the weights of {place}/step_00000004" in said


@pytest.mark.parametrize(("name", "origin"), [("branch", "rolled_back"), ("again", "rolled_back_again")])
def test_rollback_goes_to_where_the_run_started_and_not_to_what_it_gave_up(folder, name, origin):
    """Weights, moments and losses are those of the run that was not stopped."""
    (at, planned), (found_at, found) = (content(folder / run, 10) for run in ("rolled_back", f"rolled_back_{name}"))
    assert at == found_at == 8, "steps 8 to 10 follow step 5"
    assert planned.keys() == found.keys() and all(torch.equal(planned[key], found[key]) for key in planned)
    said = (folder / "stdout").read_text()
    back = f"back to the weights of {folder}/{origin}/checkpoints/step_00000005"
    assert said.count(back) == (2 if name == "branch" else 1), "of the run itself, and of its branch"


def test_a_run_whose_last_step_is_bad_does_not_end_as_a_good_one(folder):
    said = json.loads((folder / "said.json").read_text())["rollback"]
    assert said.startswith(
        "step 7, the last: gradient norm inf; bad steps in a row: 1, of samples 48 to 55; none reached"
    )
    place = folder / "rollback" / "checkpoints"
    assert (
        f"the last checkpoint is {place}/step_00000007, the last from before those steps {place}/step_00000005;" in said
    )


@pytest.mark.parametrize(("stage", "precision", "kind", "settings"), SPOILT)
def test_weights_and_moments_that_an_update_spoilt_are_never_saved(folder, stage, precision, kind, settings):
    """Found on the rank that has them, before the save or at the bad step that follows."""
    name = f"spoilt_stage{stage}_{precision}_{kind}"
    said, place = json.loads((folder / "said.json").read_text())[name], folder / name / "checkpoints"
    assert f"{kind} of " in said and "holds a NaN or an infinity, expected finite numbers" in said and "\n" not in said
    assert said.startswith("step 7: loss nan, and fp32 of" if "save_every" in settings else f"step 5: {kind} of")
    assert f"the last good checkpoint is {place}/step_00000004: " in said
    left = [4] if "save_every" in settings else [1, 2, 3, 4]
    assert sorted(p.name for p in place.glob("step_*")) == [f"step_{step:08d}" for step in left]
    assert all(torch.isfinite(tensor).all() for step in left for tensor in content(folder / name, step)[1].values())
    assert (place / "latest").read_text() == "step_00000004"


def test_a_run_that_stops_for_bad_steps_names_their_samples_and_keeps_its_last_checkpoint(folder):
    said = json.loads((folder / "said.json").read_text())
    assert "step 7: gradient norm inf; bad steps in a row: 1, of samples 48 to 55;" in said["stop"]
    assert (
        "step 8: gradient norm inf; bad steps in a row: 3, of samples 40 to 47, 48 to 55, 56 to 63;" in said["in_a_row"]
    )
    for name in ("stop", "in_a_row"):
        assert (
            f"the last checkpoint is {folder}/{name}/checkpoints/step_00000005" in said[name] and "\n" not in said[name]
        )
        assert [p.name for p in (folder / name / "checkpoints").glob("step_*")] == ["step_00000005"]
        assert all(torch.isfinite(tensor).all() for tensor in content(folder / name, 5)[1].values())


def test_a_spike_is_skipped_and_resuming_before_it_changes_nothing(folder):
    for name in ("spike", "spike_resumed"):
        bad = [line for line in read_metrics(folder / name) if "bad_step" in line]
        assert [(line["step"], line["samples"]) for line in bad] == [(190, [1512, 1519])], bad
        assert "standard deviations above the last 128 steps" in bad[0]["bad_step"]
    assert losses(folder / "spike") == losses(folder / "spike_resumed") and len(losses(folder / "spike")) == 200
    said = (folder / "stdout").read_text()
    assert said.count("step 190: loss ") == 2 and "; samples 1512 to 1519 passed over" in said
