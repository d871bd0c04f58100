"""train.copy_to in real runs: an empty machine continues bit for bit from the copies, whatever was killed."""

import json
import os
import shutil
import signal
import sys

import pytest

from minzero.checkpoint_folder import complete_checkpoints
from minzero.files import write_json
from minzero.metrics import read_metrics
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.s3_server import s3  # noqa: F401

MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64}
TRAIN = {"micro_batch_size": 2, "global_batch_tokens": 64, "max_tokens": 64 * 12, "eval_tokens": 64, "log_every": 1}
TRAIN |= {"save_every": 4, "eval_every": 0, "lr": 0.01, "save_best": False, "keep_checkpoints": 1}


@pytest.fixture
def config(small_data, tmp_path):
    write_json(tmp_path / "config.json", {"model": MODEL, "data": {"path": str(small_data)}, "train": TRAIN})
    return tmp_path / "config.json"


def command(config, out, *more):
    return deepspeed_command("train.py", config, "--train.out_dir", out, *more)


def losses(out):
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in read_metrics(out) if "loss" in line}


def last_files(out):
    path = complete_checkpoints(out / "checkpoints")[-1]
    return path.name, {file.name: file.read_bytes() for file in path.glob("rank_*")}


def test_an_empty_machine_continues_from_s3(config, tmp_path, s3):  # noqa: F811
    out = tmp_path / "out"
    copied = command(config, out, "--train.copy_to", "s3://runs/of_two_ranks")
    done = run([*copied, "--train.max_tokens", 64 * 8], **s3.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("copied ") == 2
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == ["step_00000008"]
    shutil.rmtree(out)
    done = run(copied, **s3.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"fetched s3://runs/of_two_ranks/checkpoints/step_00000008 into {out}/checkpoints" in done.stdout
    copies = json.loads((out / "copied.json").read_text())["copies"]
    assert sorted(copies) == [f"step_{step:08d}" for step in (4, 8, 12)]
    assert sorted(losses(out)) == list(range(1, 13))
    found = []
    for path in (out, "s3://runs/of_two_ranks"):  # rank 0 fetches the weights for both
        done = run(deepspeed_command("eval.py", path, "--json"), **s3.variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{path}/checkpoints/step_00000012: " in done.stdout
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]


def test_a_complete_run_is_said_to_be_so_and_copies_what_is_missing(config, tmp_path):
    """Its last start was killed between its last checkpoint and the end; the store fails first; then a copy is damaged
    and the folder lost."""
    out, away = tmp_path / "out", tmp_path / "away[1]"

    def train(*more):
        more = ["--train.keep_checkpoints", "2", *more]
        return run([sys.executable, "train.py", config, "--train.out_dir", out, *more], DS_ACCELERATOR="cpu")

    def state():
        return json.loads((out / "status.json").read_text())["state"]

    done = train()
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "running"}))
    done = train()
    assert done.returncode == 0 and "is complete: 12 of 12" in done.stdout and state() == "complete", done.stdout
    assert json.loads((out / "status.json").read_text())["seconds"] == status["seconds"]
    (out / "status.json").unlink()
    away.write_text("in the way")
    done = train("--train.copy_to", away)
    assert done.returncode == 2 and "train.copy_to" in done.stderr, done.stdout + done.stderr
    away.unlink()
    done = train("--train.copy_to", away)
    assert done.returncode == 0 and state() == "complete" and done.stdout.count("copied ") == 2, done.stdout
    files = {path: path.read_bytes() for path in sorted(away.glob("checkpoints/step_*/rank_*"))}
    assert [path.parent.name for path in files] == ["step_00000008", "step_00000012"]
    last = list(files)[-1]
    last.write_bytes(files[last][:-1] + bytes([files[last][-1] ^ 1]))
    shutil.rmtree(out)
    done = train("--train.copy_to", away)
    assert done.returncode == 0 and "ignored " in done.stdout and "step_00000008 into" in done.stdout, done.stdout
    assert {path: path.read_bytes() for path in files} == files, "copied again, bit for bit"


def test_killed_with_9_and_moved_to_an_empty_folder_it_is_the_same_bit_for_bit(config, tmp_path, start):
    plain, out, away = tmp_path / "plain", tmp_path / "out", tmp_path / "away"
    assert run(command(config, plain)).returncode == 0
    copied = command(config, out, "--train.copy_to", away)
    process = start([str(word) for word in copied])
    for line in process.stdout:
        if line.startswith("copied ") and "step_00000004" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(out, ignore_errors=True)
    done = run(copied)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fetched " in done.stdout
    assert losses(out) == losses(plain) and last_files(out) == last_files(plain)
