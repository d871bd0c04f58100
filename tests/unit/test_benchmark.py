"""benchmark.py: rows through the real launcher, one of which fails; what is said of failures and of bad input."""

import json
import sys

import pytest

import benchmark
from minzero.benchmark import benchmark_config, launch, why_it_ended
from minzero.config.build import build
from minzero.config.load import load_config
from minzero.errors import UserError
from tests.helpers.processes import ROOT, run

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 50}
TRAIN = {"micro_batch_size": 2, "global_batch_tokens": 128, "max_tokens": 128}
COMMAND = [sys.executable, ROOT / "benchmark.py"]


@pytest.fixture
def config(tmp_path):
    """A small run whose data is not there."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"model": SMALL, "data": {"path": str(tmp_path / "nothing")}, "train": TRAIN}))
    return path


def test_a_row_that_runs_and_one_that_fails(config, tmp_path):
    """Gradients in fp32 beside bf16 are for stages 2 and 3 alone."""
    out, override = tmp_path / "results", ["--train.precision=bf16", "--deepspeed.data_types.grad_accum_dtype=fp32"]
    flags = ["--gpus", 1, "--steps", 2, "--warmup", 1, "--rows", "ddp", "zero2", "--out", out, "--json", *override]
    ended = run([*COMMAND, config, *flags], timeout=200, CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    answer = json.loads(ended.stdout.splitlines()[-1])
    assert answer == json.loads((out / "small.json").read_text())
    failed, ran = answer["rows"]
    assert failed["row"] == "ddp" and "\n" not in failed["failed"] and "step_seconds" not in failed
    assert ran["row"] == "zero2" and ran["failed"] is None
    assert len(ran["all_step_seconds"]) == 2 and ran["step_seconds"] <= ran["slowest_seconds"]
    assert ran["tokens_per_second"] == pytest.approx(128 / ran["step_seconds"])
    assert ran["cpu_bytes"] > ran["predicted_bytes"] > 0
    assert ran["allocated_bytes"] is ran["error"] is ran["mfu"] is None
    table = (out / "small.md").read_text()
    assert "random tokens" in table and f"failed: {failed['failed']}"[:40] in table
    assert (out / "small.png").read_bytes().startswith(b"\x89PNG")
    assert not (config.parent / "nothing").exists()


@pytest.mark.parametrize(
    "log, code, reason",
    [
        (
            "Traceback\n[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to\n",
            1,
            "torch.OutOfMemoryError: CUDA",
        ),
        ("train.py: rank 1: error: train.kernels: found apex\nValueError: later\n", 2, "train.kernels: found apex"),
        ("Traceback\nValueError: first\nRuntimeError: second\n", 1, "ValueError: first"),
        ("[rank0]: deepspeed.ops.Error: no\n", 1, "deepspeed.ops.Error: no"),
        ("quiet\n", 247, "a rank was killed"),
        ("quiet\n", 3, "ended with code 3"),
    ],
)
def test_why_a_run_ended(log, code, reason):
    assert why_it_ended(log, code).startswith(reason)


EAGER_RUN = """
import json, sys
from pathlib import Path
folder = Path(json.loads(Path(sys.argv[1]).read_text())["train"]["out_dir"])
print("kernels: torch (asked for); compiled: no (RuntimeError: it (the compiler) broke)", flush=True)
(folder / "config.json").write_text(json.dumps({"compiled": False}))
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 8, "step_seconds": 0.1, "loss": 1.0}))
"""


@pytest.mark.parametrize("wanted", [True, False, "auto"])
def test_an_eager_run_is_no_measurement_of_a_compiled_one(config, tmp_path, wanted):
    (tmp_path / "eager.py").write_text(EAGER_RUN)
    asked = benchmark_config(load_config([str(config)]), tmp_path / "run")
    asked.train.compile = wanted
    lines, failed = launch(asked, 1, 1, tmp_path / "run", on_gpu=False, program=(str(tmp_path / "eager.py"),))
    assert len(lines) == 1
    if wanted is True:
        reason = "RuntimeError: it (the compiler) broke"
        assert failed == f"train.compile is true, but the model was not compiled: {reason}"
    else:
        assert failed is None


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--steps 0", "--steps"),
        ("--rows zero4", "zero4"),
        ("--gpus 3", "global_batch_tokens"),
        ("--deepspeed.zero_optimization.stage 2", "--rows"),
        ("--train.activation_checkpointing=true", "--rows"),
        ("--model.n_layers 2", "n_layer"),
    ],
)
def test_bad_input_is_one_line(config, monkeypatch, flags, word):
    monkeypatch.setattr(benchmark, "this_device", lambda: ("a machine", 0))
    with pytest.raises(UserError, match=word):
        benchmark.main([str(config), *flags.split()])


def test_a_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        benchmark.main([str(config), "--gpus", "1", "--out", str(tmp_path / "file" / "results")])


def test_a_benchmark_has_nothing_of_a_longer_run(tmp_path):
    """A config with copies would have them fetched, and sent, by a run that only measures."""
    train = {"copy_to": "s3://bucket/run", "loggers": ["wandb"], "keep_every": 5, "save_every_seconds": 60.0}
    train |= {"first_batch_tokens": 1024, "batch_ramp_tokens": 10**6, "eval_tasks": ["arc_easy"], "sample_every": 5}
    found = benchmark_config(build({"train": train}, "x"), tmp_path).train
    assert found.copy_to is None and found.loggers == found.eval_tasks == []
    assert found.keep_every == found.save_every_seconds == found.sample_every == found.batch_ramp_tokens == 0
    assert found.first_batch_tokens is None
