"""benchmark.py: two rows through the real launcher, what it says of a row that fails, and bad input."""

import json
import os
import sys

import pytest

import benchmark
from config import UserError
from tests.conftest import ROOT, run

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 50}
TRAIN = {"micro_batch_size": 2, "global_batch_tokens": 128, "max_tokens": 128}


def write_config(folder, **deepspeed):
    path = folder / "small.json"
    data = {"path": str(folder / "nothing")}
    path.write_text(json.dumps({"model": SMALL, "data": data, "train": TRAIN, "deepspeed": deepspeed}))
    return path


def test_one_row_runs_and_one_fails(tmp_path):
    """On one rank and random tokens. DeepSpeed itself refuses round-robin gradients that stage 3 does not have; a
    switched-off row of stage 0 does not see them."""
    config, out = write_config(tmp_path), tmp_path / "results"
    broken = "--deepspeed.zero_optimization.sub_group_size=-1"
    command = [sys.executable, ROOT / "benchmark.py", config, "--gpus", 1, "--steps", 2, "--warmup", 1]
    found = run([*command, "--rows", "ddp", "--out", out, "--json", broken], timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
