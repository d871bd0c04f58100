"""The same numbers at every ZeRO stage, on one and two ranks, after resuming, and after moving a run from one to
the other: three launches in all."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from minzero import checkpoint_state, tensor_files
from minzero.data import pipeline
from minzero.data.conversations import with_marks
from minzero.data.shards import TokenStream
from minzero.evaluate_loss import validation_loss
from minzero.metrics import read_metrics
from minzero.tensor_files import SavedPieces
from minzero.trained import load_model, open_trained
from minzero.zero import KINDS
from tests.helpers.processes import deepspeed_command, run
from tests.launch.parity_settings import MOVES, OTHERS, SETTINGS, SETTINGS_OF_OTHERS, model_of

SCRIPT = Path(__file__).with_name("parity.py")
RUNS = [f"{precision}_stage{stage}_{offload}" for stage, precision, offload in SETTINGS]
OF_OTHERS = {
    model: [f"{model}_{precision}_stage{stage}" for stage, precision in SETTINGS_OF_OTHERS] for model in OTHERS
}
RESUMED = [name for names in OF_OTHERS.values() for name in names[3:]]  # at stage 3
LENGTHS = [1, 40, 3, 90, 2, 7, 1, 1, 60, 5] * 8  # of the answers: micro-batches differ in how many tokens count
MOVED = {name: origin for moves in MOVES.values() for name, origin in moves.items()}


@pytest.fixture(scope="module")
def folder(small_data, tmp_path_factory):
    """What parity.py left after running on two ranks, on one, and on two again."""
    out = tmp_path_factory.mktemp("parity")
    talks = [
        with_marks("", [{"role": "user", "content": "?"}, {"role": "assistant", "content": n * "ha "}]) for n in LENGTHS
    ]
    flags = ["--out", str(out / "conversations"), "--workers", "1", "--val_fraction", "0.3"]
    documents = ((str(number), talk) for number, talk in enumerate(talks))
    pipeline.prepare(documents, "bytes", pipeline.options("", ".").parse_args(flags), loss_mask=True)
    for part, ranks in (("first", 2), ("second", 1), ("third", 2)):
        command = [SCRIPT, small_data, out, part]
        done = run(deepspeed_command(*command) if ranks > 1 else [sys.executable, *command], timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert (out / f"done_{part}").exists()
    return out


def losses(run_folder):
    return [line["loss"] for line in read_metrics(run_folder) if "loss" in line]


def steps_and_evaluations(run_folder):
    """Without the lines on checkpoints, whose place depends on how long the writing took."""
    return [line for line in read_metrics(run_folder) if "save_seconds" not in line]


def test_initial_weights_are_the_same_bit_for_bit(folder):
    ranks = [torch.load(folder / f"weights_{number}.pt") for number in (1, 2)]
    reference = ranks[0]["fp32 0"]
    assert len(reference) > 10 and reference["token_embedding.weight"].std() > 0.04
    for weights in ranks:
        for setting, state in weights.items():
            assert state.keys() == reference.keys()
            for name, weight in state.items():
                expected = reference[name] if setting.startswith("fp32") else reference[name].bfloat16()
                assert torch.equal(weight, expected), f"{name} with {setting}"


@pytest.mark.parametrize(
    "names, first",
    [(RUNS, "fp32_stage0_none"), *((names, names[0]) for names in OF_OTHERS.values())],
    ids=["GPT-2", *OF_OTHERS],
)
def test_first_20_losses_agree_between_stages_ranks_and_offload(folder, names, first):
    reference = losses(folder / f"{first}_ranks1")
    assert len(reference) == 20 and reference[-1] < 0.8 * reference[0]
    worst = 0
    for name in names:
        for ranks in (1, 2):
            if "fp32" in name:
                found = losses(folder / f"{name}_ranks{ranks}")
                difference = max(abs(a / b - 1) for a, b in zip(found, reference, strict=True))
                worst = max(worst, difference)
                assert difference < 2e-6, f"{name}, {ranks} ranks: {difference:.1e}"
    print(f"largest relative difference of 20 losses: {worst:.1e}")


def test_of_conversations_every_answered_token_counts_the_same_on_any_number_of_ranks(folder):
    one, two = (steps_and_evaluations(folder / f"conversations_ranks{ranks}") for ranks in (1, 2))
    assert len(one) == len(two) == 21 and one[19]["loss"] < 0.8 * one[0]["loss"]
    for ours, theirs in zip(one, two, strict=True):
        for key in ours.keys() & {"loss", "grad_norm", "val_loss"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


def test_validation_and_gradient_norms_agree_between_stages_and_ranks(folder):
    reference = steps_and_evaluations(folder / "fp32_stage0_none_ranks1")
    for stage in (0, 1, 2, 3):
        for ranks in (1, 2):
            found = steps_and_evaluations(folder / f"fp32_stage{stage}_none_ranks{ranks}")
            for ours, theirs in zip(found, reference, strict=True):
                assert ours.keys() - {"slowest"} == theirs.keys() - {"slowest"}, (
                    "which rank is slow is up to the machine"
                )
                for key in theirs.keys() & {"val_loss", "grad_norm", "lr", "tokens"}:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-5), f"{key}, stage {stage}, {ranks} ranks"


@pytest.mark.parametrize("ranks", [1, 2])
def test_selective_recomputation_has_the_same_losses(folder, ranks):
    """In eager ZeRO-3 with biases and gathered matrices, where DeepSpeed's linear function would add biases twice."""
    found = losses(folder / f"selective_ranks{ranks}")
    assert found == pytest.approx(losses(folder / f"fp32_stage3_none_ranks{ranks}"), rel=1e-5)


@pytest.mark.parametrize("name", [*RUNS, *RESUMED, "dropout", "background"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_continues_bit_for_bit(folder, name, ranks):
    whole, resumed = (folder / f"{kind}{name}_ranks{ranks}" for kind in ("", "resumed_"))
    assert len(losses(whole)) == 20 and len(steps_and_evaluations(whole)) == 21
    for ours, theirs in zip(steps_and_evaluations(resumed), steps_and_evaluations(whole), strict=True):
        keys = ("step", "tokens", "loss", "val_loss", "grad_norm", "lr")
        assert all(ours.get(key) == theirs.get(key) for key in keys), (ours, theirs)
    same = [content_of(path / "checkpoints" / "step_00000020") for path in (whole, resumed)]
    assert same[0] == same[1], "weights, moments and random state too"


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_written_in_the_background_is_what_the_run_was_when_it_was_copied(folder, ranks):
    ours, theirs = (folder / f"{kind}_ranks{ranks}" for kind in ("background", "fp32_stage3_none"))
    assert losses(ours) == losses(theirs)
    (_, now), (_, again) = (whole_tensors(path / "checkpoints" / "step_00000020") for path in (ours, theirs))
    assert all(torch.equal(now[key], again[key]) for key in now)
    assert sum("stall_seconds" in line for line in read_metrics(ours)) >= 3


def content_of(path):
    """The checksums of a checkpoint's files, and what its state says but for the place."""
    state = checkpoint_state.read_state(path)
    del state["config"]["train"]["out_dir"]
    return state


@pytest.mark.parametrize("name", MOVED)
def test_a_run_moved_to_other_ranks_or_another_stage_continues_the_same(folder, name):
    """A table of docs/resume.md: 50 steps and more after each change, in fp32."""
    _, step, *_ = MOVED[name]
    model = name.split("_")[0]
    reference = losses(folder / (f"{model}_moved" if model in OTHERS else "moved"))
    found = losses(folder / name)
    assert len(reference) == 150 and len(found) == 150 and reference[-1] < 0.5 * reference[0]
    difference = max(abs(a / b - 1) for a, b in zip(found[step:], reference[step:], strict=True))
    print(f"{name}: {150 - step} steps, {difference:.1e}")
    assert difference < 5e-6, f"{name}: {difference:.1e}"
    samples = json.loads((folder / f"{name}.samples.json").read_text())
    assert samples == [[number // 8, number] for number in range(step * 8, 150 * 8)], "no sample twice, none left out"
    state = checkpoint_state.read_state(folder / name / "checkpoints" / "step_00000150")
    assert state["optimizer_steps"] == 150 and state["tokens"] == 150 * 8 * 32
    assert state["config"]["model"]["qk_norm"] == model_of(name).get("qk_norm", "none")


def whole_tensors(path):
    """Everything that the pieces of a checkpoint add up to: {(kind, parameter): flat tensor}."""
    state, whole = checkpoint_state.read_state(path), {}
    tensor_files.check_sums(path, state["files"])
    saved = SavedPieces(path, state, verify=True)
    for kind, name in itertools.product(KINDS, state["parameters"]):
        whole[kind, name] = torch.full((torch.Size(state["parameters"][name]).numel(),), torch.nan)
        saved.copy_overlap(whole[kind, name], 0, kind, name)
    return state, whole


@pytest.mark.parametrize("ranks", [1, 2])
def test_loading_and_saving_again_keeps_every_bit_and_the_settings_of_the_config(folder, ranks):
    """From two ranks at stage 3 to every other setting: weights and moments as saved, and each parameter group
    with this run's own decay, betas and epsilon, which DeepSpeed's universal loading mixes up."""
    state, expected = whole_tensors(folder / "moved" / "checkpoints" / "step_00000050")
    assert len(expected) == 3 * len(state["parameters"]) and len(state["files"]) == 2
    groups = json.loads((folder / f"settings_{ranks}.json").read_text())
    assert len(groups) == 6
    for name, settings in groups.items():
        assert settings == [[0.5, 0.5, 0.6, 1e-3], [0.0, 0.5, 0.6, 1e-3]], name
        again, found = whole_tensors(folder / f"again_{name}_ranks{ranks}" / "step_00000050")
        assert len(again["files"]) == ranks and again["optimizer_steps"] == 50
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize(
    "name", ["moved", "stage_3_2", "all_at_once_and_back", "qwen3_ranks_2_1_2", "olmoe_ranks_2_1_2"]
)
def test_weights_put_together_in_one_process_are_those_that_were_trained(folder, small_data, name):
    path = folder / name / "checkpoints" / "step_00000150"
    trained, wanted = open_trained(path), checkpoint_state.read_state(path)["config"]["train"]["eval_tokens"]
    stream = TokenStream(small_data, "val", trained.model.block_size)
    loss = validation_loss(load_model(trained), stream, wanted, 4, torch.device("cpu"))
    assert loss == pytest.approx(steps_and_evaluations(folder / name)[-1]["val_loss"], rel=1e-6)
