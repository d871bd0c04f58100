"""Kill a run with -9 again and again, continue each time, and compare it with one that was left alone.

    python tests/chaos.py [--kills 50] [--inside_a_save 15] [--steps 2000]

Every other time it saves in the background. Prints what was killed when, and fails unless the weights, moments
and losses are the same bit for bit, every step there once. The short form of it runs in `make test`.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minzero import checkpoint_folder, checkpoint_state
from minzero.metrics import read_metrics
from tests.helpers.processes import ROOT, deepspeed_command, environment, run, write_small_data

# large enough that a save takes some hundredths of a second
MODEL = {"n_layer": 2, "n_head": 4, "n_embd": 192, "block_size": 32, "vocab_size": 64, "init_std": 0.05, "dropout": 0.1}
QWEN3 = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": "false", "n_kv_head": 2}
MODEL |= QWEN3 | {"head_dim": 64, "qk_norm": "head"}


def flags_of(data, out, steps, background=False):
    """The flags of train.py with configs/tiny.json."""
    keys = {f"model.{name}": value for name, value in MODEL.items()} | {"data.path": data, "train.out_dir": out}
    keys |= {"train.micro_batch_size": 2, "train.global_batch_tokens": 8 * 32, "train.max_tokens": steps * 8 * 32}
    keys |= {"train.log_every": 1, "train.save_every": 5, "train.eval_every": 0, "train.eval_tokens": 1024}
    keys |= {"train.warmup_tokens": 0, "train.lr": 1e-3, "deepspeed.zero_optimization.reduce_bucket_size": 4096}
    keys["train.save_in_background"] = str(background).lower()
    return [str(word) for name, value in keys.items() for word in (f"--{name}", value)]


def command_of(data, out, steps, background=False):
    return deepspeed_command("train.py", "configs/tiny.json", *flags_of(data, out, steps, background))


def unfinished(out):
    """What saves left that were not finished: {(name, time)}."""
    found = set()
    for path in (out / "checkpoints").glob("step_*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # renamed in this moment
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def wait_for_save(out, seconds=30):
    """Wait for the beginning of a save. Returns whether there was one in this time."""
    before, began = unfinished(out), time.monotonic()
    while unfinished(out) <= before:
        if time.monotonic() - began > seconds:
            return False
        time.sleep(0.0005)
    return True


def start_and_kill(command, out, moment, generator):
    """One attempt: killed while it starts, between two steps, or inside a save. True if it was not finished."""
    before = unfinished(out)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if moment == "start":
        time.sleep(generator.uniform(0, 12))
    else:
        for line in process.stdout:
            if "| loss " in line:
                break
        os.set_blocking(process.stdout.fileno(), False)  # the pipe holds 64 kB, more than it will say from here on
        time.sleep(generator.uniform(0, 1.5))
    while moment == "save" and process.poll() is None and unfinished(out) <= before:
        time.sleep(0.0005)
    if moment == "save":
        time.sleep(generator.uniform(0, 0.02))
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def losses_of(out, steps):
    """The loss of each step of a run. Fails unless every step is there once."""
    lines = [line for line in read_metrics(out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    return [line["loss"] for line in lines]


def check_same(whole, killed, steps):
    """Fail unless two runs of `command_of` have equal last checkpoints and losses, each step once."""
    last = [
        checkpoint_state.read_state(path / "checkpoints" / checkpoint_folder.name_of(steps)) for path in (whole, killed)
    ]
    assert last[0]["files"] == last[1]["files"], "weights, moments and random state, by checksum"
    losses = [losses_of(path, steps) for path in (whole, killed)]
    assert losses[0] == losses[1]
    assert last[1]["tokens"] == steps * 8 * 32 and last[1]["optimizer_steps"] == steps


def main(folder, kills, inside_a_save, steps):
    folder, generator = Path(folder), random.Random(1)
    data, whole, killed = write_small_data(folder), folder / "whole", folder / "killed"
    done = run(command_of(data, whole, steps), timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    inside = count = 0
    while count < kills or inside < inside_a_save:
        count += 1
        moment = "save" if inside < inside_a_save and count % 3 else generator.choice(["start", "step", "step", "step"])
        before = unfinished(killed)
        assert start_and_kill(command_of(data, killed, steps, count % 2 == 0), killed, moment, generator), (
            "raise --steps"
        )
        left, found = sorted(name for name, _ in unfinished(killed) - before), checkpoint_folder.find(killed)
        inside += bool(left)
        print(f"kill {count}: {moment}; complete {found and found.name}, cut off {left}", flush=True)
    done = run(command_of(data, killed, steps), timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    check_same(whole, killed, steps)
    print(f"{count} kills, {inside} inside a save; {steps} steps, each once; last checkpoint equal bit for bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--inside_a_save", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary, args.kills, args.inside_a_save, args.steps)
