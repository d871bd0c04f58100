"""Preference tuning in processes of its own: two ranks at ZeRO-3, killed and continued bit for bit, or on one rank."""

import json
import math
import os
import shutil
import signal
import sys

import pytest

from minzero.config.sections import ModelConfig
from minzero.files import write_json
from minzero.metrics import read_metrics
from minzero.store import REFERENCE
from tests.helpers.pairs import rows, write_pairs
from tests.helpers.processes import ROOT, deepspeed_command, run
from tests.helpers.trained_runs import LLAMA, write_run

MODEL = ModelConfig(**vars(LLAMA) | {"block_size": 192})
STEPS = 8
TRAIN = {"loss": "dpo", "micro_batch_size": 2, "global_batch_tokens": 192 * 8, "max_tokens": 192 * 8 * STEPS}
TRAIN |= {"eval_tokens": 192 * 5, "log_every": 1, "eval_every": 4, "save_every": 3, "keep_checkpoints": 9, "lr": 2e-4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pairs, a model to begin with, and a config."""
    folder = tmp_path_factory.mktemp("preference")
    write_pairs(folder / "pairs", rows(90))
    write_run(folder / "base", MODEL, str(folder / "pairs"))
    train = TRAIN | {"init_from": str(folder / "base")}
    zero = {"zero_optimization": {"stage": 3}}
    everything = {"model": {}, "data": {"path": str(folder / "pairs")}, "train": train, "deepspeed": zero}
    write_json(folder / "config.json", everything)
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """The folder of a run of two ranks that nothing has disturbed."""
    done = run(command(place, "whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reference: 180 answers in" in done.stdout and "| accuracy " in done.stdout
    return place / "whole"


def command(place, out, *more):
    return deepspeed_command("train.py", place / "config.json", "--train.out_dir", place / out, *more)


def numbers(folder, kind="loss"):
    """The numbers of each step that do not depend on the clock."""
    keys = {kind, "step", "grad_norm", "reward_accuracy", "reward_margin", "reward_chosen", "val_accuracy"}
    return [{key: line[key] for key in keys & line.keys()} for line in read_metrics(folder) if kind in line]


def last_checkpoint(folder):
    return {path.name: path.read_bytes() for path in (folder / f"checkpoints/step_{STEPS:08d}").glob("rank_*")}


def test_it_begins_at_log_2_and_learns_what_is_preferred(whole):
    steps = numbers(whole)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(steps[0]["reward_margin"]) < 1e-5
    assert steps[-1]["loss"] < 0.3 and steps[-1]["reward_accuracy"] == 1
    validations = numbers(whole, "val_loss")
    assert [line["step"] for line in validations] == [4, 8] and validations[-1]["val_accuracy"] == 1
    assert (whole / "loss.png").stat().st_size > 5000


def test_killed_with_9_it_continues_bit_for_bit(place, whole, start):
    killed = start([str(part) for part in command(place, "killed")])
    for line in killed.stdout:
        if "saved " in line and "step_00000003" in line:
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert (place / "killed/checkpoints/step_00000003/state.json").exists()
    done = run(command(place, "killed"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing from" in done.stdout and "reference: " not in done.stdout
    assert numbers(place / "killed") == numbers(whole)
    assert numbers(place / "killed", "val_loss") == numbers(whole, "val_loss")
    assert last_checkpoint(place / "killed") == last_checkpoint(whole)
    assert (place / "killed" / REFERENCE).read_bytes() == (whole / REFERENCE).read_bytes()


def test_on_one_rank_it_continues_with_the_same_reference(place, whole):
    resume = whole / "checkpoints/step_00000003"
    alone = [sys.executable, "train.py", place / "config.json", "--train.out_dir", place / "alone"]
    done = run([*alone, "--train.resume", resume, "--deepspeed.zero_optimization.stage", 1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "alone" / REFERENCE).read_bytes() == (whole / REFERENCE).read_bytes()
    for found, expected in zip(numbers(place / "alone"), numbers(whole)[3:], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_step_is_computed_again_and_eval_finds_what_the_run_found(place, whole):
    done = run(deepspeed_command("--module", "minzero.replay", whole, 6))
    assert done.returncode == 0 and "equal bit for bit: 2 recorded of 2 steps" in done.stdout, done.stdout
    done = run(deepspeed_command("eval.py", whole, "--reference", place / "base", "--json"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (last,) = (line for line in read_metrics(whole) if "val_loss" in line and line["step"] == STEPS)
    assert found["accuracy"] == 1 and found["pairs"] > 20
    assert found["margin"] == pytest.approx(last["val_margin"], rel=0.2), "of all windows, and of some"


def test_without_its_reference_it_is_refused_in_one_line(place, whole):
    shutil.copytree(whole, place / "without")
    (place / "without" / REFERENCE).write_bytes(b"damaged")
    alone = [sys.executable, ROOT / "train.py", place / "config.json", "--train.out_dir", place / "without"]
    done = run([*alone, "--train.max_tokens", 192 * 8 * 20])
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"without/{REFERENCE}: missing or damaged; restore it from a copy of the run" in errors[0]


def test_adapters_begin_as_the_reference_and_are_all_that_learns(place):
    done = run(command(place, "adapters", "--lora.rank", 4, "--train.lr", 0.01))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = numbers(place / "adapters")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["loss"] < 0.5 and steps[-1]["reward_accuracy"] > 0.8
    done = run([sys.executable, "eval.py", place / "adapters", "--json"])
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and found["accuracy"] > 0.8, done.stderr
