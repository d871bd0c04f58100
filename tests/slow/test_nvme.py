"""The optimizer and the weights in files, as on NVMe: the same run, saved and resumed like any other."""

import os
import sys

import pytest

from minzero.checkpoint_folder import name_of
from minzero.checkpoint_state import read_state
from tests.helpers.processes import deepspeed_command, run

ZERO = "--deepspeed.zero_optimization"
MODEL = {"n_layer": 2, "n_head": 8, "n_embd": 512, "block_size": 32, "vocab_size": 64}  # DeepSpeed swaps from 1 MB on


@pytest.mark.slow  # DeepSpeed compiles its file access for minutes, once a machine
def test_a_run_on_nvme_is_that_of_cpu_offload_and_resumes_bit_for_bit(small_data, tmp_path):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible():
        pytest.skip("no compiler or no libaio")
    built = run([sys.executable, "-c", "from deepspeed.ops.op_builder import AsyncIOBuilder as a; a().load()"], 1200)
    assert built.returncode == 0, built.stderr[-3000:]

    def train(out, steps, *more):
        flags = [f"--model.{name}={value}" for name, value in MODEL.items()]
        flags += ["--data.path", small_data, "--train.out_dir", tmp_path / out, "--train.schedule", "constant"]
        flags += ["--train.micro_batch_size", 2, "--train.global_batch_tokens", 8 * 32, "--train.warmup_tokens", 0]
        flags += ["--train.max_tokens", steps * 8 * 32, "--train.eval_tokens", 1024, "--train.save_every", 3]
        done = run(deepspeed_command("train.py", "configs/tiny.json", *flags, *more))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        state = read_state(tmp_path / out / "checkpoints" / name_of(steps))
        return state["files"], state["best_val_loss"]

    on_cpu = [f"{ZERO}.offload_optimizer.device", "cpu"]
    on_nvme = [f"{ZERO}.offload_optimizer.device", "nvme", f"{ZERO}.offload_optimizer.nvme_path", tmp_path / "swap"]
    weights_too = [f"{ZERO}.offload_param.device", "nvme", f"{ZERO}.offload_param.nvme_path", tmp_path / "swap"]
    weights_too += [f"{ZERO}.offload_param.buffer_size", 2_000_000, "--train.save_in_background", "true"]
    files = {"block_size": 2**18, "queue_depth": 16, "single_submit": "true", "overlap_events": "false"}
    requests = [part for name, value in files.items() for part in (f"--deepspeed.aio.{name}", value)]
    whole = train("cpu", 6, *on_cpu)
    assert train("requests", 6, *on_nvme, *requests, f"{ZERO}.offload_optimizer.buffer_count", 6) == whole
    assert train("nvme", 6, *on_nvme) == whole
    first_half = train("moved", 3, *on_nvme, *weights_too)
    assert len(list((tmp_path / "swap").rglob("*.swp"))) > 6, "DeepSpeed kept everything in memory"
    assert first_half[0] == read_state(tmp_path / "cpu/checkpoints/step_00000003")["files"]
    assert train("moved", 6, *on_nvme, *weights_too) == whole
