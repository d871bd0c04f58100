"""Asked to stop, a run saves and ends, whoever is asked: each time a command as a user types it."""

import json
import os
import re
import signal
import socket
import sys
import time

import psutil
import pytest

from minzero import checkpoint_folder, checkpoint_state, tensor_files
from minzero.metrics import read_metrics
from tests.helpers.processes import deepspeed_command, ranks_of, run, wait_for_step

RUN = ["train.py", "configs/tiny.json", "--train.log_every", 1, "--train.save_every", 0, "--train.eval_every", 0]
RUN += ["--train.micro_batch_size", 2, "--train.eval_tokens", 1024]  # 4 micro-batches a step
RUN += ["--train.max_tokens", 100 * 2048, "--train.warmup_tokens", 0]


def wait_for_end(processes, seconds):
    began = time.time()
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.time() - began < seconds, "a process was left behind"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "asked",
    [
        "SIGTERM to one rank",
        "Ctrl-C",
        pytest.param("SIGTERM to the group", marks=pytest.mark.slow),
        "SIGTERM to deepspeed alone",
        pytest.param("a STOP file", marks=pytest.mark.slow),
        pytest.param("SIGUSR1 to the group", marks=pytest.mark.slow),
    ],
)
def test_a_run_asked_to_stop_saves_and_ends(asked, start, tmp_path):
    out = tmp_path / "run"
    more = ["--train.save_every_seconds", 2] if asked == "a STOP file" else []
    process = start(deepspeed_command(*RUN, *more, "--train.out_dir", out))
    wait_for_step(process, " 3/100" if not more else "saved ")
    ranks = ranks_of(process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(ranks) == 2
    if asked == "SIGTERM to one rank":
        ranks["1"].terminate()
    elif asked == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    elif asked.endswith("to the group"):
        os.killpg(process.pid, signal.Signals[asked.split()[0]])
    elif asked == "SIGTERM to deepspeed alone":
        process.terminate()
    else:
        (out / "STOP").touch()
    rest = process.communicate(timeout=60)[0]
    wait_for_end(everyone, 60)
    launcher_too = "group" in asked or "deepspeed" in asked  # which dies of it at once
    if asked == "Ctrl-C":  # of which the launcher dies with a traceback of its own
        assert process.returncode != 0 and 'train.py", line' not in rest, rest
    else:
        assert process.returncode == (-signal.Signals[asked.split()[0]] if launcher_too else 0), rest
        assert "Traceback" not in rest and "error" not in rest and not (out / "STOP").exists(), rest
    stopped = [line for line in rest.splitlines() if line.startswith("stopped by")]
    assert len(stopped) == 1 and stopped[0].endswith("the same command continues"), rest
    found = checkpoint_folder.find(out)
    state = checkpoint_state.read_state(found)
    tensor_files.check_sums(found, state["files"])
    lines = read_metrics(out)
    assert state["step"] == max(line["step"] for line in lines if "loss" in line) >= 3
    assert [line["save_seconds"] > 0 for line in lines if "save_seconds" in line and line["step"] == state["step"]] == [
        True
    ]


def test_a_hung_rank_ends_the_run_with_a_line_that_names_it(start, tmp_path):
    others = [f"--train.{name}_timeout_seconds=300" for name in ("start", "eval", "save")]
    command = deepspeed_command(*RUN, "--train.out_dir", tmp_path / "run", "--train.timeout_seconds", 5, *others)
    process = start(command)
    wait_for_step(process, " 3/100")
    ranks = ranks_of(process)
    ranks["1"].suspend()
    wait_for_step(process, f"rank 0 waited 5 s in a step: rank 1 hangs on {socket.gethostname()}; ")
    ranks["1"].kill()  # as the launcher would, half a minute later
    process.communicate(timeout=60)
    wait_for_end(ranks.values(), 10)
    assert process.returncode != 0


def test_a_damaged_newest_checkpoint_is_passed_over_and_refused_by_name(tmp_path):
    """One flipped bit in the middle of the weights: only reading it shows it."""
    out = tmp_path / "run"
    command = [sys.executable, *RUN, "--train.max_tokens", 3 * 2048, "--train.save_every", 1, "--train.out_dir", out]
    assert run(command).returncode == 0
    damaged = out / "checkpoints" / "step_00000003"
    content = bytearray((damaged / "rank_00000.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (damaged / "rank_00000.safetensors").write_bytes(content)
    longer = [*command, "--train.max_tokens", 4 * 2048]
    by_name = run([*longer, "--train.resume", damaged])
    assert by_name.returncode == 2 and len(by_name.stderr.splitlines()) == 1, by_name.stderr
    assert re.search(r"step_00000003/rank_00000.safetensors: \S+: found checksum", by_name.stderr), by_name.stderr
    done = run(longer)
    assert done.returncode == 0, done.stderr
    ignored = [line for line in done.stdout.splitlines() if line.startswith("ignored ")]
    assert len(ignored) == 1 and re.search(r"step_00000003/rank_00000.safetensors: \S+: found checksum", ignored[0])
    assert f"continuing from {out}/checkpoints/step_00000002" in done.stdout
    assert json.loads((out / "checkpoints" / "step_00000004" / "state.json").read_text())["optimizer_steps"] == 4
