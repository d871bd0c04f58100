"""A disk that is full or cannot be written: one line, and the last good checkpoint stays usable."""

import resource
import subprocess
import sys

import pytest

from minzero.checkpoint_folder import find, name_of
from minzero.checkpoint_state import read_state
from minzero.metrics import read_metrics
from minzero.tensor_files import check_sums
from tests.helpers.processes import ROOT, deepspeed_command, environment, run

RUN = ["train.py", "configs/tiny.json", "--train.log_every", 1, "--train.save_every", 1, "--train.eval_tokens", 1024]
RUN += ["--train.keep_checkpoints", 10]  # of 10 MB each


def check_last_good(out, step):
    found = find(out)
    assert found.name == name_of(step)
    check_sums(found, read_state(found)["files"])
    assert not list((out / "checkpoints").glob("*.tmp")), "an unfinished save is deleted: it only takes space"


def test_a_full_disk_ends_both_ranks_with_one_line_and_the_run_continues_when_there_is_space(tmp_path):
    disk, options = tmp_path / "disk", ["-t", "tmpfs", "tmpfs"]
    disk.mkdir()
    if subprocess.run(["mount", "-o", "size=25m", *options, disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        command = [*RUN, "--train.out_dir", disk / "run", "--train.max_tokens", 5 * 2048]
        done = run(deepspeed_command(*command))
        said = [line for line in done.stderr.splitlines() if "error:" in line]
        assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
        assert "step_00000003.tmp/rank_0000" in said[0] and "No space left on device" in said[0]
        check_last_good(disk / "run", 2)
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        done = run([sys.executable, *command])
        assert done.returncode == 0, done.stderr
        assert f"continuing from {disk}/run/checkpoints/step_00000002" in done.stdout
        check_last_good(disk / "run", 5)
        steps = [line["step"] for line in read_metrics(disk / "run") if "loss" in line]
        assert steps == [1, 2, 3, 4, 5]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("limit", [1 << 20, pytest.param(300, marks=pytest.mark.slow)])
def test_files_that_may_not_grow_end_the_run_with_one_line(tmp_path, limit):
    """A megabyte is too little for a checkpoint, 300 bytes for metrics.jsonl."""
    out = tmp_path / "run"
    command = [sys.executable, *RUN, "--train.out_dir", out, "--train.eval_every", 0, "--train.max_tokens"]
    assert run([*command, 2048]).returncode == 0
    done = subprocess.run(
        [str(word) for word in [*command, 3 * 2048]],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "could not be written (File too large)" in done.stderr
    check_last_good(out, 1)
