"""What the tests share: the repository on the path, shared texts where they are, runs under the launcher."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BIN = Path(sys.executable).parent

# A shell's background job ignores Ctrl-C and hands that down to the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared():
    """The folder of texts and tokenizers beside the repository; tests that need it skip without."""
    folder = os.environ.get("MINZERO_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MINZERO_SHARED names no folder")
    return Path(folder)


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def deepspeed_command(*arguments, processes=2, port=29500):
    launcher = [str(BIN / "deepspeed"), "-q", "--num_gpus", str(processes), "--master_port", str(port)]
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


@pytest.fixture
def start():
    """Start commands in the background, each in a process group of its own that ends with the test."""
    started = []

    def begin(command, cwd=ROOT, **more):
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A small data set of tokens that follow a rule, so that a model can learn it: 3 shards, 64 ids."""
    return write_small_data(tmp_path_factory.mktemp("small_data"))


def write_small_data(folder):
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


@pytest.fixture
def quick():
    """A folder in memory where there is one, for tests that flush to the disk thousands of times."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="minzero_", dir=base))
    yield folder
    shutil.rmtree(folder)
