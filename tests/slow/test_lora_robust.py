"""Runs that train adapters survive what other runs survive: kills, other ranks and stages, bad steps, a lost disk; and
so with the base in 4 bits, where bitsandbytes is installed."""

import importlib.util
import json
import random
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

pytestmark = pytest.mark.slow
STEPS, TOKENS = 16, 4 * 16  # tokens a step
FOUR_BIT = pytest.param(
    4,
    marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed"),
)
BASES = [None, FOUR_BIT]  # lora.base_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hf/, a model of transformers', and data/."""
    folder = tmp_path_factory.mktemp("lora_robust")
    write_data(folder / "data")
    make_folder(folder / "hf", LLAMA)
    return folder


def command(folder, out, *more, processes=2, script=("train.py",), lora=None, stage=3, **train):
    """A run of adapters of rank 3 of 16 steps. lora: more keys of this section; train: of that one."""
    settings = {
        "init_from": str(folder / "hf"),
        "out_dir": str(out),
        "micro_batch_size": 2,
        "global_batch_tokens": TOKENS,
        "max_tokens": STEPS * TOKENS,
        "warmup_tokens": 0,
        "lr": 1e-2,
        "log_every": 1,
        "save_every": 4,
        "keep_checkpoints": 99,
        "eval_every": 0,
        "eval_tokens": 64,
    }
    config = {
        "data": {"path": str(folder / "data")},
        "lora": {"rank": 3, "dropout": 0.1, **(lora or {})},
        "train": settings | train,
        "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}},
    }
    path = out.with_name(f"{out.name}.json")
    write_json(path, config)
    if processes == 1:
        return [sys.executable, *script, path, *more]
    return deepspeed_command(*script, path, *more, processes=processes)


def finish(words, code=0):
    done = run(words, timeout=600)
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


def saved_at(out, step=8):
    return ("--train.resume", out / "checkpoints" / checkpoint_folder.name_of(step))


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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bits", BASES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_bit_for_bit_at_every_stage(folder, tmp_path, stage, bits, precision):
    from deepspeed.accelerator import get_accelerator

    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        pytest.skip("this device has no fp16")
    settings = {"lora": {"base_bits": bits}, "stage": stage, "precision": precision}
    if stage == 3:
        settings["activation_checkpointing"] = True
    whole, again = tmp_path / "whole", tmp_path / "again"
    finish(command(folder, whole, **settings))
    finish(command(folder, again, *saved_at(whole), **settings))
    check_same(whole, again)
    expected, found = losses(whole), losses(again)
    assert found == {step: loss for step, loss in expected.items() if step > 8}
    assert expected[STEPS] < expected[1]
    assert all(".adapter." in name for name in state_at(whole, STEPS)["parameters"])


@pytest.mark.parametrize("bits", BASES)
def test_moved_to_other_ranks_and_stages_and_back(folder, tmp_path, bits):
    """Dropout is another on other ranks, so there is none here."""
    settings = {"lora": {"base_bits": bits, "dropout": 0.0}}
    out = {name: tmp_path / name for name in ("whole", "one_rank", "two_ranks", "stage_1", "stage_0", "stage_3")}
    finish(command(folder, out["whole"], **settings))
    finish(command(folder, out["one_rank"], *saved_at(out["whole"], 4), processes=1, **settings))
    finish(command(folder, out["two_ranks"], *saved_at(out["one_rank"]), **settings))
    finish(command(folder, out["stage_1"], *saved_at(out["whole"], 4), stage=1, **settings))
    finish(command(folder, out["stage_0"], *saved_at(out["stage_1"]), stage=0, **settings))
    finish(command(folder, out["stage_3"], *saved_at(out["stage_0"], 12), **settings))
    expected = losses(out["whole"])
    for name in list(out)[1:]:
        found = losses(out[name])
        assert found == pytest.approx({step: expected[step] for step in found}, rel=5e-6), name
        assert max(found) == STEPS


@pytest.mark.parametrize("bits", BASES)
def test_a_bad_step_is_skipped_or_rolled_back(folder, tmp_path, bits):
    """One gradient of an adapter's input is NaN on rank 1 in step 7."""
    settings = {"lora": {"base_bits": bits}, "script": ("--module", "tests.slow.lora_bad_step")}
    skipped, rolled = tmp_path / "skipped", tmp_path / "rolled"
    finish(command(folder, skipped, bad_step="skip", **settings))
    assert sorted(losses(skipped)) == list(range(1, STEPS + 1))
    last = state_at(skipped, STEPS)
    assert last["optimizer_steps"] == STEPS - 1 and last["bad_steps"]["skipped"] == 1
    weights = load(skipped)[0]
    assert all(parameter.isfinite().all() for parameter in weights.parameters())
    done = finish(command(folder, rolled, bad_step="rollback", **settings), code=2)
    assert "step 7" in done.stderr and "Traceback" not in done.stderr
    # without the fault it goes on from the checkpoint before, to the end
    finish(command(folder, rolled, lora={"base_bits": bits}, bad_step="rollback"))
    whole = tmp_path / "whole"
    finish(command(folder, whole, lora={"base_bits": bits}))
    check_same(whole, rolled)


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
    settings = {"eval_every": 8, "sample_every": 8}
    done = finish(command(folder, out, lora={"base_bits": bits, "dropout": 0.0}, **settings))
    assert done.stdout.count("sample") >= 2
    lines = read_metrics(out)
    logged = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert sorted(logged) == [8, STEPS]
    # eval.py reads base and adapters and computes the same
    eval.main([str(out), "--checkpoint", "latest", "--tokens", "64"])
    said = capsys.readouterr().out
    assert f"{logged[STEPS]:.4f}"[:5] in said
    # its merged weights are the base of another one: same loss at the beginning
    finish(command(folder, on_top, init_from=str(out), lora={"dropout": 0.0}, max_tokens=4 * TOKENS, eval_every=4))
    state = state_at(on_top, 4)
    assert state["base"]["path"].startswith(str(out.resolve()))
    model = load(on_top)[0]
    assert torch.isfinite(model(torch.zeros(1, 4).long())).all()
