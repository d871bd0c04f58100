"""The optimizer on the CPU in part: DeepSpeed gives the tensors that stay on the GPU an optimizer of their own, and
neither the learning rate, nor checkpoints, nor bad steps may pass it over."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minzero.metrics import read_metrics
from tests.helpers.processes import run

SCRIPT = Path(__file__).with_name("partial_offload.py")


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def content(run_folder, step):
    return load_file(run_folder / "checkpoints" / f"step_{step:08d}" / "rank_00000.safetensors")


@pytest.mark.slow  # DeepSpeed compiles its Adam for the CPU
def test_partial_offload_trains_saves_and_resumes_as_the_whole_does(small_data, tmp_path):
    done = run([sys.executable, SCRIPT, small_data, tmp_path, "x"], 600, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    whole, part = losses(tmp_path / "whole"), losses(tmp_path / "part")
    assert len(whole) == 12 and whole[-1] < 0.9 * whole[0]
    assert part == pytest.approx(whole, rel=1e-6)  # the learning rate changes in every step
    assert losses(tmp_path / "part_to_whole") == pytest.approx(whole, rel=1e-6)
    ours, theirs = (content(tmp_path / name, 12) for name in ("part_resumed", "part"))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    moments = [tensor for name, tensor in theirs.items() if name.startswith("exp_avg_sq/")]
    assert len(moments) > 10 and all(moment.any() for moment in moments)
    first, last = (content(tmp_path / "bad", step) for step in (1, 4))
    assert all((first[name] == last[name]).all() for name in first if name.startswith("fp32/"))
