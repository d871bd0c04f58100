"""supervise.py over train.py on two ranks: it is killed in every way and ends complete, bit for bit as undisturbed."""

import json
import os
import signal
import sys

import psutil
import pytest

from minzero.metrics import read_metrics
from minzero.run_folder import read_status
from tests import chaos
from tests.helpers.processes import ranks_of, run, wait_for_step

STEPS = 300


def supervised(command):
    return [sys.executable, "supervise.py", "--pause", "1", "--tries", "3", *command]


def processes_of(out):
    """{"rank 0", "rank 1", "launcher", "deepspeed": psutil.Process} of the start that is running."""
    session = json.loads((out / "supervise.json").read_text())["running"]["process"]
    top = psutil.Process(session)
    launchers = [child for child in top.children() if "deepspeed.launcher.launch" in child.cmdline()]
    found = {f"rank {rank}": child for rank, child in ranks_of(top).items()}
    return found | {"deepspeed": top, "launcher": launchers[0]}


def disturb(what, process, out, start, command):
    """Do one thing to a run that is in its loop. Returns the supervisor's process, which may be another one."""
    found = processes_of(out)
    if what == "kill -9 of a rank":
        found["rank 1"].kill()
    elif what == "kill -9 inside a save":
        chaos.wait_for_save(out)
        found["rank 0"].kill()
    elif what == "kill -9 of the launcher":
        found["launcher"].kill()
    elif what == "kill -9 of all":
        os.killpg(found["deepspeed"].pid, signal.SIGKILL)
    elif what == "SIGTERM to a rank":
        found["rank 0"].terminate()
    elif what == "kill -9 of the supervisor":
        process.kill()
        process.wait()
        process = start(supervised(command))
        wait_for_step(process, "found start ")
        found["rank 0"].kill()
    elif what == "SIGTERM to the supervisor":
        process.terminate()
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == 143 and "stopped by SIGTERM" in rest, rest
        assert read_status(out)["state"] == "stopped" and not [p for p in found.values() if p.is_running()]
        process = start(supervised(command))
    return process


@pytest.mark.slow
def test_a_run_comes_back_from_every_failure_bit_for_bit(start, small_data, tmp_path):
    data, whole, out = small_data, tmp_path / "whole", tmp_path / "out"
    done = run(chaos.command_of(data, whole, STEPS), timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    command = chaos.command_of(data, out, STEPS, background=True)
    process = start(supervised(command))
    disturbances = ["kill -9 of a rank", "kill -9 inside a save", "kill -9 of the launcher", "kill -9 of all"]
    disturbances += ["SIGTERM to a rank", "kill -9 of the supervisor", "SIGTERM to the supervisor"]
    for what in disturbances:
        wait_for_step(process, "supervise.py: start ")
        wait_for_step(process)
        wait_for_step(process, "saved ")
        process = disturb(what, process, out, start, command)
    rest = process.communicate(timeout=600)[0]
    assert process.returncode == 0, rest
    assert f"{len(disturbances) + 1} starts, {len(disturbances) - 1} failures" in rest, rest
    assert "Traceback" not in rest, rest
    chaos.check_same(whole, out, STEPS)
    status = read_status(out)
    assert 0 < status["goodput"] < 1 and all(
        status["seconds"][kind] > 0 for kind in ("start", "resume", "lost", "down")
    )
    print(rest[rest.index("goodput ") :])

    again = run(supervised(command))
    assert again.returncode == 0 and "is complete: 300 of 300 steps" in again.stdout


@pytest.mark.slow
def test_what_train_refuses_ends_the_supervisor(small_data, tmp_path):
    command = chaos.command_of(tmp_path / "none", tmp_path / "out", 10)
    done = run(supervised(command))
    assert done.returncode == 2 and "train.py: error: " in done.stdout and "start 2" not in done.stdout, done.stdout
    done = run(supervised([*chaos.command_of(small_data, tmp_path / "out", 10), "--train.lr", "x"]))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "train.lr" in done.stderr
    assert not read_metrics(tmp_path / "out")


@pytest.mark.slow
def test_a_file_stop_ends_the_supervisor_too(start, small_data, tmp_path):
    out = tmp_path / "out"
    process = start(supervised(chaos.command_of(small_data, out, 5000)))
    wait_for_step(process)
    (out / "STOP").touch()
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped by the file STOP" in rest and "start 2" not in rest, rest
