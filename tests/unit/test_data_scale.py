"""A trillion tokens: sparse files of their size, read as if they were full."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from minzero.data.shards import shard_header
from minzero.files import write_json
from tests.helpers.processes import ROOT, environment

SHARDS, SHARD_TOKENS = 10_000, 10**8

# Run in a process of its own, so that its memory is the reader's alone.
MEASURE = """
import json, os, resource, sys, time
import numpy as np, psutil
from minzero.data.mixture import Mixture
process = psutil.Process()
before, started = process.memory_info().rss, time.thread_time()
data = Mixture(sys.argv[1], "train", 1024, 50257, seed=1)
data.batch(data.windows_of(np.arange(12)))
first_batch = time.thread_time() - started
generator, times = np.random.default_rng(0), []
for sample in generator.integers(0, 3 * data.windows, 3000):
    started = time.thread_time()  # of the processor: pauses on a busy machine do not count
    inputs, targets = data.batch(data.windows_of([sample]))
    times.append(time.thread_time() - started)
    assert inputs.shape == targets.shape == (1, 1024) and not inputs.any()
growth = process.memory_info().rss - before
times = np.sort(times)
print(json.dumps({
    "tokens": data.streams[0].tokens, "first_batch_seconds": first_batch, "growth_mb": growth / 1e6,
    "median_ms": times[1500] * 1e3, "99th_percentile_ms": times[2970] * 1e3, "slowest_ms": times[-1] * 1e3,
}))
"""


@pytest.fixture(scope="module")
def trillion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trillion")
    entries, header = [], shard_header(np.dtype("<u2"), SHARD_TOKENS)
    for number in range(SHARDS):
        name = f"train_{number:06d}.bin"
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * SHARD_TOKENS)
        entries.append({"file": name, "tokens": SHARD_TOKENS, "sha256": "0" * 64})
    tokenizer = {"name": "gpt2", "trained": False, "fingerprint": "f"}
    meta = {"tokenizer": tokenizer, "vocab_size": 50257}
    write_json(folder / "meta.json", meta | {"splits": {"train": {"tokens": 10**12, "shards": entries}}})
    yield folder
    for entry in entries:
        os.unlink(folder / entry["file"])


def test_a_trillion_tokens(trillion):
    command = [sys.executable, "-c", MEASURE, str(trillion)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    print(found)
    assert found["tokens"] == 10**12
    assert found["first_batch_seconds"] < 2
    assert found["growth_mb"] < 100
    assert found["99th_percentile_ms"] < 1
