"""`python -m minzero.replay RUN STEP`: equal where the run computed right, and the step where it did not."""

import json
import shutil
import sys

import pytest

from minzero.files import write_json
from tests.helpers.processes import deepspeed_command, run, write_small_data

MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64, "dropout": 0.1}
TRAIN = {"micro_batch_size": 2, "global_batch_tokens": 64, "max_tokens": 64 * 14, "eval_tokens": 64, "log_every": 5}
TRAIN |= {"save_every": 4, "eval_every": 6, "lr": 0.01, "save_best": False, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def done_run(small_data, tmp_path_factory):
    """A run of two ranks, 14 steps, checkpoints after 4, 8, 12 and 14."""
    place = tmp_path_factory.mktemp("replay")
    write_json(place / "config.json", {"model": MODEL, "data": {"path": str(small_data)}, "train": TRAIN})
    done = run(deepspeed_command("train.py", place / "config.json", "--train.out_dir", place / "out"))
    assert done.returncode == 0, done.stderr
    return place / "out"


def content(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def replay(folder, step):
    return run(deepspeed_command("--module", "minzero.replay", folder, step))


def changed_log(source, folder, step, **values):
    """A copy of a run in whose log a line of a step is another; without the checkpoints after it."""
    shutil.copytree(source, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == step and "loss" in line:
            line |= {key: change(line[key]) for key, change in values.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name[5:]) >= step:
            shutil.rmtree(path)
    return folder


def test_a_step_that_was_not_logged_is_equal_and_nothing_is_written(done_run):
    before = content(done_run)
    done = replay(done_run, 7)  # of the log's 5 and 10 neither; the next checkpoint has it
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"steps 5 to 7 of {done_run}, from {done_run}/checkpoints/step_00000004" in done.stdout
    assert "equal bit for bit: 3 recorded of 3 steps" in done.stdout and "warning" not in done.stdout
    assert content(done_run) == before


def test_one_bit_is_found_and_other_numbers_of_ranks_are_refused(done_run, tmp_path):
    folder = changed_log(done_run, tmp_path / "out", 10, loss=lambda loss: loss * (1 + 2**-52))
    done = replay(folder, 10)  # after the last checkpoint: settings from config.json
    assert done.returncode == 1, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("different: ")]
    assert len(said) == 1 and "step 10: loss " in said[0] and "gradient norm" not in said[0]
    done = run([sys.executable, "-m", "minzero.replay", folder, 10])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "found 1 ranks, but" in done.stderr and "deepspeed --num_gpus 2 --module minzero.replay" in done.stderr


def test_from_the_beginning_on_one_rank_to_a_step_that_was_not_recorded(small_data, tmp_path):
    (tmp_path / "more").mkdir()
    data = {"path": {str(small_data): 1, str(write_small_data(tmp_path / "more")): 3}}
    config = {"model": MODEL, "data": data, "train": TRAIN | {"max_tokens": 64 * 6}}
    write_json(tmp_path / "config.json", config)
    trained = [sys.executable, "train.py", tmp_path / "config.json", "--train.out_dir", tmp_path / "out"]
    assert run([*trained, "--train.save_every", 0]).returncode == 0
    again = [sys.executable, "-m", "minzero.replay", tmp_path / "out"]
    done = run([*again, 3])
    assert done.returncode == 0 and "from the beginning" in done.stdout, done.stdout + done.stderr
    assert "equal bit for bit: 3 recorded of 3 steps" in done.stdout
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    done = run([*again, 3])  # how the data are mixed is in config.json
    assert done.returncode == 1 and "step 3 was not recorded; recorded are 5, 1" in done.stdout, done.stdout
    done = run([*again, 99])
    assert done.returncode == 2 and "the run has 6 steps" in done.stderr
    done = run([sys.executable, "-m", "minzero.replay", tmp_path / "none", 3])
    assert done.returncode == 2 and "expected the folder of a run" in done.stderr and len(done.stderr.splitlines()) == 1
