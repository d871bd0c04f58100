"""Commands in processes of their own, by the launcher or without, and a small data set to train on."""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

# Below those that the system hands out to clients. Each worker of pytest-xdist has a share of its own, and another run
# of the tests, on the same machine, most likely begins elsewhere.
SHARE = 12_000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = itertools.count(20_000 + SHARE * worker + os.getpid() * 61 % (SHARE - 500))


def free_port():
    """A port of this machine that nothing uses, never the same twice."""
    return next(port for port in PORTS if is_free(port))


def is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def ended(process, seconds=120):
    """(exit code, the rest of what it said); no traceback in it."""
    said = process.communicate(timeout=seconds)[0]
    assert "Traceback" not in said, said
    return process.returncode, said


def environment(**more):
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # a test's own client
    paths = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | more


def deepspeed_command(*arguments, processes=2, port=None):
    launcher = [str(BIN / "deepspeed"), "-q", "--num_gpus", str(processes), "--master_port", str(port or free_port())]
    return launcher + [str(argument) for argument in arguments]


def run(command, timeout=300, **more):
    """Run a command from the repository's root, to its end."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def ranks_of(process):
    """{"0": psutil's process of that rank, ...}: the ranks below a launcher that have begun.

    A process that was forked a moment ago, and has not started its program yet, has its parent's command line: below a
    rank it is not taken for the rank, as psutil names parents before their children."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            ranks = [word for word in child.cmdline() if word.startswith("--local_rank=")]
            if ranks:
                found.setdefault(ranks[0].partition("=")[2], child)
    return found


def wait_for_step(process, word="| loss "):
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError("the run ended before its first step")


def write_small_data(folder):
    """A small data set of tokens that follow a rule, so that a model can learn it: 3 shards, 64 ids."""
    import numpy as np

    from minzero.data.shards import write_shard
    from minzero.files import write_json

    generator, splits = np.random.default_rng(0), {}
    for split, sizes in (("train", (20_000, 31_000, 9_000)), ("val", (5_000,))):
        shards = []
        for number, size in enumerate(sizes):
            steps = generator.integers(1, 4, size)
            tokens = (np.cumsum(steps) % 64).astype("<u2")
            shards.append(write_shard(folder / f"{split}_{number:06d}.bin", tokens))
        splits[split] = {"tokens": sum(sizes), "documents": 1, "bytes": sum(sizes), "shards": shards}
    tokenizer = {"name": "bytes", "trained": False, "fingerprint": "0"}
    write_json(folder / "meta.json", {"tokenizer": tokenizer, "vocab_size": 64, "end_of_text": 0, "splits": splits})
    return folder


def folder_beside(name):
    """Where `beside` has the packages of this name."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minzero-tests"
    return cache / f"{name}-python{sys.version_info.major}.{sys.version_info.minor}"


def beside(name, *packages, whole=False, without=()):
    """A folder with these packages, to come before the installed ones. Skips where there is no package index.

    whole: with the packages that they need; without: the names of modules to leave out of those."""
    folder = folder_beside(name)
    if not folder.exists():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        alone = [] if whole else ["--no-deps"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *alone, "--target", temporary, *packages]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if "No matching distribution" in done.stderr:
            pytest.skip("no package index")
        assert done.returncode == 0, done.stderr
        for module in without:
            shutil.rmtree(temporary / module, ignore_errors=True)
        temporary.rename(folder)
    return folder
