"""Runs that branch from a stable one, and batches that grow: equal to the run that was planned so, and to the same
steps in plain torch."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minzero import replay, schedule
from minzero.checkpoint import open_weights
from minzero.checkpoint_folder import complete_checkpoints
from minzero.config.build import build
from minzero.data.mixture import Mixture
from minzero.engine import parameter_groups
from minzero.errors import UserError
from minzero.files import write_json
from minzero.metrics import read_metrics
from model import GPT
from tests.helpers.processes import ROOT, deepspeed_command, run

SCRIPT = Path(__file__).with_name("schedules.py")
BATCH = 8 * 16
RAMP_ENDS = [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 46, 52, 58, 64, 72, 80]  # in sequences


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedules")
    done = run(deepspeed_command(SCRIPT, small_data, folder), timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "said.txt").write_text(done.stdout)
    return folder


def numbers_of(run, *names):
    """{step: numbers} of the lines that have a loss."""
    return {line["step"]: tuple(line[name] for name in names) for line in read_metrics(run) if "loss" in line}


def weights_of(run):
    """{name: weight} of the last checkpoint."""
    state, _, read = open_weights(complete_checkpoints(run / "checkpoints")[-1])
    return {name: read(name) for name in state["parameters"]}


def test_a_branch_is_the_run_that_was_planned_so(runs):
    names = "loss", "grad_norm", "lr", "tokens"
    long, planned, branch = (numbers_of(runs / name, *names) for name in ("long", "planned", "branch"))
    assert list(planned) == list(long) == list(range(1, 13)) and list(branch) == [9, 10, 11, 12]
    assert {step: planned[step] for step in range(1, 9)} == {step: long[step] for step in range(1, 9)}
    assert branch == {step: planned[step] for step in branch}, "bit for bit, with dropout"
    assert branch[10] != long[10]
    for name, weight in weights_of(runs / "planned").items():
        assert torch.equal(weight, weights_of(runs / "branch")[name]), name
    assert numbers_of(runs / "extended", *names) == planned, "a finished run that is extended, in the same folder"


def test_the_rates_of_the_decay(runs):
    progress = [0.25, 0.5, 0.75, 1.0]
    expected = {
        "planned": [1 - math.sqrt(part) for part in progress],
        "planned_linear": [1 - part for part in progress],
        "planned_cosine": [(1 + math.cos(math.pi * part)) / 2 for part in progress],
    }
    for name, shape in expected.items():
        rates = [rate for (rate,) in numbers_of(runs / name, "lr").values()]
        assert rates == pytest.approx([0.01 / 3, 0.02 / 3] + [0.01] * 6 + [0.01 * part for part in shape], abs=1e-15)


def test_a_branch_is_replayed_from_where_it_began(runs):
    branch, began = runs / "branch", runs / "long" / "checkpoints" / "step_00000008"
    done = run(deepspeed_command("--module", "minzero.replay", branch, 10))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"steps 9 to 10 of {branch}, from {began}" in done.stdout
    assert "equal bit for bit: 2 recorded of 2 steps" in done.stdout


def test_a_branch_that_another_command_continued_is_replayed_from_where_it_began(runs):
    branch, began = runs / "continued", runs / "long" / "checkpoints" / "step_00000008"
    assert json.loads((branch / "config.json").read_text())["train"]["resume"] == "auto"
    assert [path.name for path in complete_checkpoints(branch / "checkpoints")] == ["step_00000012"]
    path, state, _, then = replay.find_start(branch, 10)
    assert path == began and state["step"] == 8 and list(then) == [9, 10, 11, 12]
    assert then == replay.find_start(runs / "long", 9)[3]


def test_a_step_before_a_branch_is_another_runs(runs, tmp_path):
    with pytest.raises(UserError, match=r"^step 8: .*branch is a branch of .*long.*step_00000008, step 8; expected a"):
        replay.find_start(runs / "branch", 8)
    shutil.copytree(runs / "branch", tmp_path / "branch")
    for path in (tmp_path / "branch").rglob("*.json"):
        path.write_text(path.read_text().replace(str(runs / "long"), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"^train\.resume: .* began at .*gone.*found no complete checkpoint there"):
        replay.find_start(tmp_path / "branch", 10)


def test_what_a_changed_schedule_does_to_the_rate_is_said(runs):
    lines = (runs / "said.txt").read_text().splitlines()
    (line,) = [line for line in lines if "checkpoint: train.decay_tokens 0 -> 512; " in line]
    assert "the learning rate goes from 1.00e-02 at step 8 to 5.00e-03 at step 9 and to 0.00e+00 at the end" in line


def test_a_branch_that_would_have_no_step_is_refused(runs, tmp_path):
    sections = sections_of(runs / "planned")
    sections["train"] |= {"max_tokens": 8 * BATCH, "resume": str(runs / "long"), "out_dir": str(tmp_path / "branch")}
    write_json(tmp_path / "config.json", sections)
    done = run([sys.executable, ROOT / "train.py", tmp_path / "config.json"], DS_ACCELERATOR="cpu")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"train.max_tokens: found {8 * BATCH}, but " in done.stderr and f"has {12 * BATCH} tokens" in done.stderr
    assert not (tmp_path / "branch").exists()


def test_checkpoints_to_branch_from_are_never_deleted(runs):
    """train.keep_checkpoints is 1 there."""
    assert [path.name for path in complete_checkpoints(runs / "long" / "checkpoints")] == [
        f"step_{step:08}" for step in (4, 8, 12)
    ]


def sections_of(run):
    """The config of a run."""
    settings = json.loads((run / "config.json").read_text())
    return {name: settings[name] for name in ("model", "data", "train", "deepspeed")}


# -- a batch that grows ----------------------------------------------------------------------------


def in_plain_torch(run, ends):
    """The losses of the same steps by one process without DeepSpeed: each step's batch at once. ends: of the steps, in
    sequences."""
    config = build(sections_of(run), run)
    torch.manual_seed(0)
    model = GPT(config.model, config.train.seed)
    data = Mixture(config.data.path, "train", config.model.block_size, config.model.vocab_size, config.train.seed)
    groups = parameter_groups(model, config)
    optimizer = torch.optim.AdamW(groups, betas=tuple(config.train.betas), eps=config.train.eps)
    losses = []
    for first, end in zip([0, *ends], ends, strict=False):
        inputs, targets = map(torch.from_numpy, data.batch(data.windows_of(np.arange(first, end))))
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(config.train, end * config.model.block_size)
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["stage_0", "stage_1", "stage_2", "stage_2_offloaded", "stage_3", "jumps"])
def test_each_step_is_that_of_plain_torch(runs, name):
    # two jumps: 2 sequences, 4 from the middle of the ramp on, 8 after it
    ends = [*range(2, 31, 2), *range(34, 63, 4), 70, 78] if name == "jumps" else RAMP_ENDS
    lines = [line for line in read_metrics(runs / name) if "loss" in line]
    assert [line["tokens"] for line in lines] == [16 * end for end in ends]
    expected = in_plain_torch(runs / name, ends)
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=5e-6)
    wrong = in_plain_torch(runs / name, [2 * end for end in range(1, len(ends) + 1)])
    assert [line["loss"] for line in lines] != pytest.approx(wrong, rel=1e-3), "a batch that does not grow is noticed"


def test_killed_and_on_other_ranks(runs, small_data, tmp_path, start):
    """Killed while the batch grows; one rank continues what two began."""
    sections = sections_of(runs / "stage_1")
    sections["train"] |= {"out_dir": str(tmp_path / "run"), "save_every": 3}
    write_json(tmp_path / "config.json", sections)
    process = start(deepspeed_command(ROOT / "train.py", tmp_path / "config.json"))
    for line in process.stdout:
        if "step  9/" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not complete_checkpoints(tmp_path / "run" / "checkpoints")[-1].name.endswith("21")
    done = run([sys.executable, ROOT / "train.py", tmp_path / "config.json"], DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "continuing from" in done.stdout
    found, whole = (numbers_of(folder, "tokens", "lr") for folder in (tmp_path / "run", runs / "stage_1"))
    assert found == whole
    losses, others = (numbers_of(folder, "loss") for folder in (tmp_path / "run", runs / "stage_1"))
    assert [loss for (loss,) in losses.values()] == pytest.approx([loss for (loss,) in others.values()], rel=5e-6)
