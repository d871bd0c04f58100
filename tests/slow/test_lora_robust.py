"""Runs that train adapters survive what other runs survive: kills, other ranks and stages, bad steps, a lost disk; and
so with the base in 4 bits, where bitsandbytes is installed."""

import json
import random
import re
import shutil
import sys

import pytest
import torch

import eval
from minzero import checkpoint_folder, checkpoint_state, load
from minzero.files import write_json
from minzero.metrics import read_metrics
from minzero.trained import open_trained
from tests.chaos import start_and_kill, unfinished
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.trained_runs import LLAMA, make_folder, write_data
from tests.slow.lora_runs import BITS, MOVES, SAVED, STEPS, TOKENS, sections, settings

pytestmark = pytest.mark.slow
FOUR_BIT = pytest.param(4, marks=pytest.mark.skipif(4 not in BITS, reason="bitsandbytes is not installed"))
BASES = [None, FOUR_BIT]  # lora.base_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hf/, a model of transformers', and data/."""
    folder = tmp_path_factory.mktemp("lora_robust")
    write_data(folder / "data")
    make_folder(folder / "hf", LLAMA)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Those of lora_runs.py, on two ranks, one and two again."""
    for part, processes in (("first", 2), ("second", 1), ("third", 2), ("bad", 2)):
        finish(deepspeed_command("tests/slow/lora_runs.py", folder, part, processes=processes))
    return folder


def command(folder, out, processes=2, **more):
    """A run of train.py. more: see `sections`."""
    path = out.with_name(f"{out.name}.json")
    write_json(path, sections(folder, out, **more))
    return [sys.executable, "train.py", path] if processes == 1 else deepspeed_command("train.py", path)


def finish(words, code=0):
    done = run(words, timeout=1800)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def losses(out):
    """{step: loss}; fails where a step is twice."""
    lines = [line for line in read_metrics(out) if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)
    return found


def state_at(out, step):
    return checkpoint_state.read_state(out / "checkpoints" / checkpoint_folder.name_of(step))


def check_same(first, second, step=STEPS):
    """Weights, moments and random state of two runs, by checksum."""
    assert state_at(first, step)["files"] == state_at(second, step)["files"]


@pytest.mark.parametrize("bits", BASES)
def test_a_run_killed_with_9_continues_bit_for_bit(folder, tmp_path, bits):
    steps = 120
    settings = {"lora": {"base_bits": bits}, "max_tokens": steps * TOKENS, "keep_checkpoints": 2}
    whole, killed, generator = tmp_path / "whole", tmp_path / "killed", random.Random(2)
    finish(command(folder, whole, **settings))
    inside = 0
    for number, moment in enumerate(["step", "save", "start", "save", "step", "save"]):
        background = number % 2 == 0
        before = unfinished(killed)
        words = command(folder, killed, save_in_background=background, **settings)
        assert start_and_kill(words, killed, moment, generator), "raise the number of steps"
        inside += bool(unfinished(killed) - before)
    assert inside, "no kill was inside a save"
    finish(command(folder, killed, **settings))
    check_same(whole, killed, steps)
    assert losses(whole) == losses(killed) and sorted(losses(killed)) == list(range(1, steps + 1))
    assert state_at(killed, steps)["optimizer_steps"] == steps


def test_resumed_bit_for_bit_at_every_stage_and_precision(runs):
    names = [name for name, *_ in settings()]
    assert len(names) >= 8 * len(BITS)
    for name in names:
        check_same(runs / name, runs / f"{name}_again")
        expected, found = losses(runs / name), losses(runs / f"{name}_again")
        assert found == {step: loss for step, loss in expected.items() if step > SAVED}, name
        assert expected[STEPS] < expected[1], name
        assert all(".adapter." in parameter for parameter in state_at(runs / name, STEPS)["parameters"])


@pytest.mark.parametrize("bits", BASES)
def test_moved_to_other_ranks_and_stages_and_back(runs, bits):
    expected = losses(runs / f"moved_{bits}")
    for part in MOVES.values():
        for name, (_, step, _) in part.items():
            found = losses(runs / f"{name}_{bits}")
            assert sorted(found) == list(range(step + 1, STEPS + 1))
            assert found == pytest.approx({step: expected[step] for step in found}, rel=5e-6), name


@pytest.mark.parametrize("bits", BASES)
def test_a_bad_step_is_skipped_or_rolled_back(runs, bits):
    for name, steps in {"skip": STEPS - 1, "rollback": STEPS - 3}.items():  # back to the weights of step 4
        out = runs / f"{name}_{bits}"
        assert sorted({line["step"] for line in read_metrics(out) if "loss" in line}) == list(range(1, STEPS + 1))
        last = state_at(out, STEPS)
        assert last["optimizer_steps"] == steps and last["bad_steps"]["skipped"] == 1
        assert all(parameter.isfinite().all() for parameter in load(out, STEPS)[0].parameters())


def test_copied_elsewhere_and_restored(folder, tmp_path):
    out, copies = tmp_path / "out", tmp_path / "copies"
    copies.mkdir()
    finish(command(folder, out, copy_to=str(copies), processes=1, keep_checkpoints=2))
    first = losses(out)
    shutil.rmtree(out)
    done = finish(command(folder, out, copy_to=str(copies), processes=1, keep_checkpoints=2, max_tokens=20 * TOKENS))
    assert f"step_{STEPS:08d}" in done.stdout
    assert max(losses(out)) == 20 and first
    found = open_trained(str(copies / out.name) if (copies / out.name).exists() else str(copies), "latest")
    assert found.config.lora.rank == 3


@pytest.mark.parametrize("bits", BASES)
def test_steps_are_replayed_bit_for_bit(folder, tmp_path, bits):
    out = tmp_path / "out"
    finish(command(folder, out, lora={"base_bits": bits}, save_every=6))
    for step in (3, 10, 16):  # from the beginning, from a checkpoint, and before the last one
        done = finish(deepspeed_command("--module", "minzero.replay", out, step))
        assert "equal bit for bit" in done.stdout and "warning" not in done.stdout
    # without any checkpoint, by config.json
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
    done = finish(deepspeed_command("--module", "minzero.replay", out, 4))
    assert "from the beginning" in done.stdout and "equal bit for bit: 4" in done.stdout
    # another base is noticed
    config = json.loads((out / "config.json").read_text())
    config["base"]["digest"] = "0" * 16
    write_json(out / "config.json", config)
    done = finish(deepspeed_command("--module", "minzero.replay", out, 4), code=2)
    assert "there are others now" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("bits", BASES)
def test_validation_samples_and_a_run_on_top_of_the_run(folder, tmp_path, bits, capsys):
    out, on_top = tmp_path / "out", tmp_path / "on_top"
    settings = {"eval_every": 8, "sample_every": 8, "eval_tokens": 206 * 16}
    done = finish(command(folder, out, lora={"base_bits": bits, "dropout": 0.0}, **settings))
    assert done.stdout.count("sample") >= 2
    lines = read_metrics(out)
    logged = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert sorted(logged) == [8, STEPS]
    # eval.py reads base and adapters and computes the same
    eval.main([str(out), "--checkpoint", "latest"])
    said = re.search(r"validation loss ([0-9.]+)", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(logged[STEPS], rel=2e-3)  # it takes the last, shorter sequence too
    # its merged weights are the base of another one: same loss at the beginning
    finish(command(folder, on_top, init_from=str(out), lora={"dropout": 0.0}, max_tokens=4 * TOKENS, eval_every=4))
    state = state_at(on_top, 4)
    assert state["base"]["path"].startswith(str(out.resolve()))
    model = load(on_top)[0]
    assert torch.isfinite(model(torch.zeros(1, 4).long())).all()
