"""The same numbers at every ZeRO stage, on one and two ranks, and after resuming: two launches in all."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from metrics import read_metrics
from tests.conftest import deepspeed_command, run

SCRIPT = Path(__file__).with_name("parity.py")


@pytest.fixture(scope="module")
def folder(small_data, tmp_path_factory):
    """What parity.py left after running on one rank and on two."""
    out = tmp_path_factory.mktemp("parity")
    for command in ([sys.executable, SCRIPT, small_data, out], deepspeed_command(SCRIPT, small_data, out, port=29611)):
        done = run(command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "done_1.json").exists() and (out / "done_2.json").exists()
    return out


def losses(run_folder):
    return [line["loss"] for line in read_metrics(run_folder) if "loss" in line]


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


def test_first_20_losses_agree_between_stages_and_ranks(folder):
    reference = losses(folder / "stage0_ranks1")
    assert len(reference) == 20 and reference[-1] < 0.8 * reference[0]
    worst = 0
    for stage in (0, 1, 2, 3):
        for ranks in (1, 2):
            found = losses(folder / f"stage{stage}_ranks{ranks}")
            difference = max(abs(a / b - 1) for a, b in zip(found, reference, strict=True))
            worst = max(worst, difference)
            assert difference < 2e-6, f"stage {stage}, {ranks} ranks: {difference:.1e}"
    print(f"largest relative difference of 20 losses: {worst:.1e}")


def test_validation_and_gradient_norms_agree_between_stages_and_ranks(folder):
    reference = read_metrics(folder / "stage0_ranks1")
    for stage in (0, 1, 2, 3):
        for ranks in (1, 2):
            for ours, theirs in zip(read_metrics(folder / f"stage{stage}_ranks{ranks}"), reference, strict=True):
                assert ours.keys() == theirs.keys()
                for key in theirs.keys() & {"val_loss", "grad_norm", "lr", "tokens"}:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-5), f"{key}, stage {stage}, {ranks} ranks"


@pytest.mark.parametrize("name", ["plain", "dropout"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_goes_on_bit_for_bit(folder, name, ranks):
    whole, resumed = (read_metrics(folder / f"{kind}_{name}_ranks{ranks}") for kind in ("whole", "resumed"))
    assert [line["step"] for line in whole] == [line["step"] for line in resumed]
    for ours, theirs in zip(resumed, whole, strict=True):
        assert all(ours.get(key) == theirs.get(key) for key in ("tokens", "loss", "val_loss", "grad_norm", "lr"))
    assert os.listdir(folder / f"resumed_{name}_ranks{ranks}" / "checkpoints") != []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_takes_the_optimizer_settings_of_its_config(folder, ranks):
    for stage, groups in json.loads((folder / f"done_{ranks}.json").read_text()).items():
        assert groups == [[0.5, 0.5, 0.6, 1e-3], [0.0, 0.5, 0.6, 1e-3]], f"stage {stage}"
