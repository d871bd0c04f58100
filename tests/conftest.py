"""What the tests share: the repository on the path, shared texts where they are, commands in the background."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers.processes import ROOT, environment, write_small_data
from tests.helpers.ranks import collect_garbage

# An example of hypothesis may take as long as it does: the cores are shared.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# Sums depend on the number of threads, so what is computed here equals what a command computes; and two workers share
# the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores Ctrl-C and hands that down to the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared():
    """The folder of texts and tokenizers beside the repository; tests that need it skip without."""
    folder = os.environ.get("MINZERO_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MINZERO_SHARED names no folder")
    return Path(folder)


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
    return write_small_data(tmp_path_factory.mktemp("small_data"))


@pytest.fixture
def quick():
    """A folder in memory where there is one, for tests that flush to the disk thousands of times."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="minzero_", dir=base))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", autouse=True)
def as_in_a_new_process():
    """What a file's tests leave in the environment, and a process group, are not there for the next file's, which may
    be any file. What was imported or is kept stays, and the collections of garbage, of which each engine and each run
    makes some, need not look through it."""
    collect_garbage()
    with mock.patch.dict(os.environ):
        yield
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A process group of this process alone."""
    from torch import distributed  # which most tests' processes need not load

    file = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
