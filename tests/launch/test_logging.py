"""The logs of a run that is killed after a checkpoint and resumed: every log then holds each step once."""

import gzip
import json
import re
import sys

import pytest

from minzero.metrics import read_metrics
from tests.helpers.processes import deepspeed_command, run
from tests.unit.test_loggers import wandb_rows

CONFIG = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 64},
    "train": {"micro_batch_size": 2, "global_batch_tokens": 512, "max_tokens": 30 * 512, "lr": 1e-2, "log_every": 1}
    | {"eval_every": 10, "eval_tokens": 512, "save_every": 10, "save_best": False, "profile": "4:6"}
    | {"loggers": ["tensorboard", "wandb"]},
    "deepspeed": {"zero_optimization": {"stage": 1}},
}
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def write_config(folder, small_data):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"data": {"path": str(small_data)}}))
    return folder / "config.json"


@pytest.fixture(scope="module")
def resumed_run(small_data, tmp_path_factory):
    """A run that was killed after step 10 and resumed: (folder, output before and after, lines and profile before)."""
    folder = tmp_path_factory.mktemp("logging")
    command = [sys.executable, "train.py", write_config(folder, small_data), "--train.out_dir", folder / "run"]
    code = "import os, signal, sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n"
    code += "    if 'step 13/' in line: os.kill(int(sys.argv[1]), signal.SIGKILL)"
    shell = f'{" ".join(map(str, command))} > >({sys.executable} -c "{code}" $$) 2>&1'
    killed = run(["bash", "-c", f"exec {shell}"], **OFFLINE)
    assert killed.returncode == -9, killed.stdout + killed.stderr
    before = read_metrics(folder / "run"), {path: path.read_bytes() for path in (folder / "run/profile").iterdir()}
    done = run(command, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "the run continues without it" not in killed.stdout + done.stdout
    return folder / "run", killed.stdout, done.stdout, *before


def test_every_log_of_an_interrupted_run_holds_each_step_once(resumed_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, said, lines_before, _ = resumed_run
    resumed_at = int(re.search(r"continuing from .*: step (\d+),", said)[1])
    assert 10 <= resumed_at < lines_before[-1]["step"], "some steps are written twice"
    lines = read_metrics(folder)
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in steps] == list(range(1, 31))
    evaluations = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    assert [step for step, _ in evaluations] == [10, 20, 30]

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for key, expected in (("loss", steps), ("val_loss", evaluations)):
        found = events.Scalars(key)
        assert [event.step for event in found] == [step for step, _ in expected]
        assert [event.value for event in found] == pytest.approx([value for _, value in expected])

    rows = wandb_rows(folder)
    for key, expected in (("loss", steps), ("val_loss", evaluations)):
        assert [(row["_step"], row[key]) for row in rows if key in row] == expected
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


def test_a_line_says_where_the_time_went(resumed_run):
    lines = [line for line in read_metrics(resumed_run[0]) if "loss" in line]
    keys = "step tokens loss lr grad_norm skipped step_seconds data_seconds forward_backward_seconds optimizer_seconds "
    keys += "tokens_per_second tflops mfu hfu peak_memory_bytes peak_reserved_bytes peak_cpu_bytes "
    keys += "goodput run_seconds run_productive_seconds"
    assert all(list(line) == keys.split() for line in lines)
    parts = ("data_seconds", "forward_backward_seconds", "optimizer_seconds")
    assert all(line[part] > 0 for line in lines for part in parts)
    assert all(sum(line[part] for part in parts) <= line["step_seconds"] for line in lines)
    seconds = {key: sum(line[key] for line in lines) for key in (*parts, "step_seconds")}
    assert sum(seconds[part] for part in parts) > 0.9 * seconds["step_seconds"], seconds
    assert seconds["forward_backward_seconds"] > seconds["data_seconds"]
    assert all(line["tokens_per_second"] == pytest.approx(512 / line["step_seconds"]) for line in lines)
    assert all(line["peak_cpu_bytes"] == line["peak_memory_bytes"] > 2**27 for line in lines), "no GPU here"
    assert all(line["eval_seconds"] > 0 for line in read_metrics(resumed_run[0]) if "val_loss" in line)


def test_the_profile_holds_its_steps_and_a_resumed_run_leaves_it(resumed_run):
    folder, said_before, said_after, _, profile = resumed_run
    assert {path.name for path in profile} == {"steps_4_to_6.json.gz", "steps_4_to_6.txt"}
    assert all(path.read_bytes() == content for path, content in profile.items())
    with gzip.open(folder / "profile" / "steps_4_to_6.json.gz") as file:
        events = json.load(file)["traceEvents"]
    # three steps of eight micro-batches
    assert sum(event.get("name") == "aten::embedding" for event in events) == 3 * 8 * 2
    table = (folder / "profile" / "steps_4_to_6.txt").read_text()
    assert len(table.splitlines()) == 11 and "aten::" in table and table in said_before
    assert "profile of steps" not in said_after


@pytest.mark.slow
def test_deepspeeds_communication_log_is_printed_on_demand(small_data, tmp_path):
    config = write_config(tmp_path, small_data)
    command = ["train.py", config, "--train.out_dir", tmp_path / "run", "--train.max_tokens", 3 * 512]
    command += ["--train.profile", "null", "--train.loggers", "[]", "--deepspeed.comms_logger.enabled", "true"]
    command += ["--deepspeed.comms_logger.verbose", "true", "--train.verbose", "true"]
    done = run(deepspeed_command(*command))
    assert done.returncode == 0, done.stderr
    assert "comm op: all_reduce | time (ms): " in done.stdout, "DeepSpeed's own log"
    assert done.stdout.count("Comm. Op") == 1 and re.search(r"^all_reduce$", done.stdout, re.MULTILINE)
