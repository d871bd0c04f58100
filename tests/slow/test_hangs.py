"""A rank that hangs at the start, in an evaluation or in a save ends the run by the limit of that alone, with a line
that names it. In a step: tests/launch/test_stopping.py."""

import signal
import socket
import threading
import time

import psutil
import pytest

from minzero.metrics import read_metrics
from minzero.run_folder import read_status
from tests.helpers.processes import deepspeed_command, ranks_of, wait_for_step
from tests.launch.test_stopping import RUN, wait_for_end

pytestmark = pytest.mark.slow

LONG = 300  # seconds: limits that must not end the run
KEYS = {"start": "start_timeout_seconds", "step": "timeout_seconds"}
KEYS |= {"evaluation": "eval_timeout_seconds", "save": "save_timeout_seconds"}


def command(out, *more, **limits):
    """A run of two ranks with these limits, {a key of KEYS: seconds}, and long other ones."""
    flags = [f"--train.{key}={limits.get(doing, LONG)}" for doing, key in KEYS.items()]
    return deepspeed_command(*RUN, "--train.out_dir", out, *flags, *more)


def wait_until(condition, seconds=60, lines=()):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "".join(lines)
        time.sleep(0.0005)


def rank_1(process):
    """The process of rank 1, as soon as there is one."""
    wait_until(lambda: "1" in ranks_of(process))
    return ranks_of(process)["1"]


def check_end(process, hung, out, line, launcher_ends_it=False):
    """The run ends with this line once, and all its processes are gone. hung: the rank that hangs."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    lines = []
    reader = threading.Thread(target=lambda: [lines.append(said) for said in process.stdout])
    reader.start()
    if not launcher_ends_it:
        wait_until(lambda: any(line in said for said in lines), lines=lines)
        hung.send_signal(signal.SIGKILL)  # as the launcher does, half a minute later
    process.wait(timeout=120)
    wait_for_end(everyone, 10)
    reader.join()
    said = "".join(lines)
    assert process.returncode != 0 and "Traceback" not in said, said
    assert [one for one in lines if "waited" in one] == [one for one in lines if line in one], said
    status = read_status(out)
    assert status["state"] == "failed" and f"rank 0 {status['reason']}; " in line, status
    return said


def here():
    return f"rank 1 hangs on {socket.gethostname()}"


def test_a_rank_that_hangs_at_the_start(start, tmp_path):
    out = tmp_path / "run"
    process = start(command(out, start=6))
    hung = rank_1(process)
    wait_until((out / "lock").exists)  # all have met; the model is not made yet
    hung.suspend()
    said = check_end(process, hung, out, f"rank 0 waited 6 s at the start: {here()}; no checkpoint was saved yet", True)
    assert "step 1" not in said


def test_a_rank_that_hangs_in_an_evaluation_and_one_that_is_slow_there(start, tmp_path):
    out = tmp_path / "run"
    # an evaluation takes some seconds, and begins at once after the step's line
    more = ("--train.eval_every", 5, "--train.eval_tokens", 2**17, "--train.micro_batch_size", 1)
    process = start(command(out, *more, step=8, evaluation=20))
    wait_for_step(process, " 5/100")
    hung = rank_1(process)
    hung.suspend()
    time.sleep(10)  # longer than a step may take
    hung.resume()
    wait_for_step(process, "step 5: validation loss")
    wait_for_step(process, " 10/100")
    hung.suspend()
    check_end(process, hung, out, f"rank 0 waited 20 s in an evaluation: {here()}; resume from {out}/checkpoints/step_")
    (seconds,) = [line["eval_seconds"] for line in read_metrics(out) if "eval_seconds" in line]
    assert seconds > 10


def test_a_rank_that_hangs_in_a_save(start, tmp_path):
    out = tmp_path / "run"
    process = start(command(out, "--train.save_every", 1, "--train.max_tokens", 10_000 * 2048, save=6))
    wait_for_step(process, "saved ")
    hung = rank_1(process)
    saving = out / "checkpoints"

    def stopped_in_a_save():
        wait_until(lambda: list(saving.glob("*.tmp")))
        hung.suspend()
        time.sleep(1)
        if list(saving.glob("*.tmp")):  # still there: rank 0 waits for rank 1's part
            return True
        hung.resume()
        return False

    wait_until(stopped_in_a_save)
    check_end(process, hung, out, f"rank 0 waited 6 s in a save: {here()}; resume from {out}/checkpoints/step_")
