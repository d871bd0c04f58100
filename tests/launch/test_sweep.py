"""Sweeps of real runs: killed and continued, branches that are the runs they stand for, a range test."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import plan
import sweep as command
from minzero.config.sections import ModelConfig
from minzero.files import read_json, write_json
from minzero.metrics import read_metrics
from minzero.scaling import runs
from minzero.scaling.plan import Options, Sweep
from tests.helpers.processes import ROOT, environment
from tests.helpers.trained_runs import LLAMA, make_folder

CONFIG = {
    "model": {"n_layer": 1, "n_head": 4, "n_embd": 16, "block_size": 16, "vocab_size": 64},
    "train": {
        "micro_batch_size": 2,
        "global_batch_tokens": 64,
        "max_tokens": 6400,
        "eval_tokens": 1024,
        "log_every": 1,
    },
    "deepspeed": {"zero_optimization": {"stage": 1}},
}
TRAIN = {"lr": 0.01}
SIZES = ["--sizes", "3", "--spacing", "1.5", "--tokens_per_parameter", "2"]


def write_config(folder, data):
    path = folder / "small.json"
    write_json(path, CONFIG | {"data": {"path": str(data)}, "train": CONFIG["train"] | TRAIN})
    return path


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def size_of_first(out):
    """The name of the smallest size."""
    return read_json(out / "points.json")["points"][0]["size"]


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def test_a_sweep_that_is_killed_continues_and_answers(tmp_path, small_data, capsys):
    """kill -9 of sweep.py while a run trains: the next start waits for that run, repeats nothing, and ends with points
    that a single run of the same config has too."""
    config, out = write_config(tmp_path, small_data), tmp_path / "out"
    arguments = [config, "--out", out, "--flops", "2e8", "4e8", *SIZES, "--schedule", "constant", "--draws", "20"]
    first = started(*arguments)
    until(lambda: len(list(out.glob("*/trunk/metrics.jsonl"))) == 2)  # in the second size
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    (begun,) = [log for log in out.glob("*/trunk.log") if log.parent.name == size_of_first(out)]
    before = begun.read_bytes()
    second = started(*arguments)
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 0, said
    left_behind = rf"waits for the run that process {first.pid}, a sweep that has ended, left behind"
    assert re.search(left_behind, said) and "Traceback" not in said
    assert begun.read_bytes() == before  # both of its runs were done
    points = read_json(out / "points.json")["points"]
    assert len(points) == 6 and not any(point["left_out"] for point in points)
    assert "6 runs fitted" in said and (out / "scaling.png").exists()
    # nothing is left to do
    third = started(*arguments)
    again = third.communicate(timeout=100)[0]
    assert third.returncode == 0 and "FLOPs, about" not in again and "6 runs fitted" in again
    # the trunk of the size that was killed, against one run without a stop
    point = points[-1]
    single = tmp_path / "single"
    model = out / point["size"] / "model.json"
    words = ["--train.out_dir", single, "--train.max_tokens", point["tokens"], "--train.schedule", "constant"]
    line = [sys.executable, "train.py", model, *words]
    subprocess.run([str(word) for word in line], cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert losses(single) == losses(out / point["size"] / "trunk")
    assert runs.loss_at(single, point["tokens"] // 64) == point["loss"]
    plan.main([str(model), "--gpus", "1", "--train.max_tokens", "6400", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parameters"] == point["parameters"]["all"]


def test_a_branch_is_the_run_that_was_planned_so(tmp_path, small_data):
    content = CONFIG | {"data": {"path": str(small_data)}, "train": CONFIG["train"] | TRAIN}
    sweep = Sweep(tmp_path / "out", content, Options(spacing=1.5, tokens_per_parameter=2.0), [2e8, 4e8], 3)
    size = next(size for size in sweep.sizes if len(size.budgets) == 2)
    with open(tmp_path / "lock", "w") as lock:
        made = runs.Runs(sweep, lock)
        made.write_configs()
        for job in sweep.jobs_of(size):
            made.start(job)
    for budget in size.budgets:
        single = tmp_path / f"single-{budget.name}"
        keys = {"out_dir": single, "max_tokens": budget.tokens, **sweep.schedule_keys(budget)}
        flags = [word for name, value in keys.items() for word in (f"--train.{name}", value)]
        line = [sys.executable, "train.py", sweep.config_file(size), *flags]
        subprocess.run([str(word) for word in line], cwd=ROOT, env=environment(), check=True, capture_output=True)
        branch = sweep.folder_of(size, budget.name)
        whole, steps = losses(single), losses(branch)
        assert steps == {step: loss for step, loss in whole.items() if step > budget.stable_tokens // 64}
        last = budget.tokens // 64
        assert runs.loss_at(branch, last) == runs.loss_at(single, last)


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, small_data):
    config, out = write_config(tmp_path, small_data), tmp_path / "out"
    arguments = [config, "--out", out, "--flops", "2e8", "2.2e8", *SIZES, "--schedule", "constant"]
    listed = started(*arguments, "--print").communicate(timeout=60)[0].splitlines()
    assert len(listed) == 3 and all(line.startswith("python train.py ") for line in listed)
    # each run ends at the first step whose loss is above the mean of those before it, after the steps that are measured
    fragile = ["--train.spike_zscore", "1", "--train.bad_step", "stop"]
    sweep = started(config, "--out", tmp_path / "fragile", *arguments[3:], *fragile)
    said = sweep.communicate(timeout=200)[0]
    assert sweep.returncode == 2 and "Traceback" not in said
    assert len(re.findall(r"^\[\d/6\] .* failed: .* \(code 2; .*trunk\.log\); the larger budgets", said, re.M)) == 3, (
        said
    )
    assert "--fit: found 0 runs, expected at least 6" in said and "trunk failed: " in said
    # a refusal ends the sweep with the run's own words
    write_json(config, read_json(config) | {"data": {"path": str(tmp_path / "gone")}})
    refused = started(config, "--out", tmp_path / "other", *arguments[3:])
    said = refused.communicate(timeout=100)[0]
    assert refused.returncode == 2 and "train.py refuses the run" in said and "gone" in said and "Traceback" not in said


def test_a_range_test_of_a_base_that_says_its_own_shape(tmp_path, small_data, capfd):
    """A config whose model section is the base's, under a key's old name; the rates are the test's."""
    make_folder(tmp_path / "base", ModelConfig(**vars(LLAMA) | {"tie_embeddings": False}))
    kept = {key: value for key, value in CONFIG["train"].items() if key != "max_tokens"}
    content = {"train": kept | TRAIN | {"init_from": str(tmp_path / "base"), "mup_base_width": 16}}
    content["train"] |= {"activation_checkpointing": True, "checkpoints_on_cpu": True, "max_tokens": 6400}
    write_json(tmp_path / "more.json", content | {"data": {"path": str(small_data)}, "deepspeed": CONFIG["deepspeed"]})
    arguments = ["--lr_range", "--out", str(tmp_path / "range"), "--highest", "3", "--steps", "50", "--json"]
    command.main([str(tmp_path / "more.json"), *arguments])
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["suggested"] > 0
    used = read_json(tmp_path / "range/run/config.json")
    assert used["model"]["n_embd"] == LLAMA.n_embd and used["model"]["block_size"] == LLAMA.block_size
    assert used["train"]["activation_offload"] is True


def test_a_range_test_of_a_real_run_suggests_a_rate(tmp_path, small_data, capfd):
    config, out = write_config(tmp_path, small_data), tmp_path / "range"
    command.main([str(config), "--lr_range", "--out", str(out), "--highest", "3", "--steps", "120", "--json"])
    said = capfd.readouterr().out
    found = json.loads(said.splitlines()[-1])
    rates = [line["lr"] for line in read_metrics(out / "run") if "loss" in line]
    assert rates[0] == pytest.approx(3e-3 * 1000 ** (1 / 120)) and rates[-1] == pytest.approx(3) and len(rates) == 120
    assert found["rises"] and found["suggested"] == pytest.approx(found["lowest"] / 10, rel=0.1)
    assert 3e-3 < found["suggested"] < 0.3 and (out / "lr_range.png").stat().st_size > 5000
    assert f"--train.lr {found['suggested']:g}" in said
