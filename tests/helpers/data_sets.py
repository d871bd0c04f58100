"""Helpers of the tests of data: documents, preparations, and processes that are killed."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tqdm import tqdm

from minzero.data import pipeline
from minzero.data.shards import TokenStream
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from tests.helpers.processes import ROOT, environment

GENERATOR = random.Random(7)
TEXTS = [
    " ".join(GENERATOR.choice(["data", "shard", "naïve", "東京", "\n\n", "\t", "😀", "x = 1"]) for _ in range(length))
    for length in [0, 1, 2, *(GENERATOR.randint(3, 60) for _ in range(150))]
]


BYTES = ["--tokenizer", "bytes", "--workers", 1]


def jsonl(texts, column="text"):
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def write_parquet(path, texts, column="text", **more):
    parquet.write_table(pyarrow.table({column: texts, **more}), path, row_group_size=40)


def prepare(documents, out, *flags, tokenizer="bytes", **how):
    arguments = ["--out", str(out), "--shard_tokens", "3000", "--workers", "1", "--val_fraction", "0.2", *flags]
    args = pipeline.options("", ".").parse_args(arguments)
    pipeline.prepare(documents, tokenizer, args, **how)


def contents(folder):
    """Everything that a finished preparation leaves, by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def shards(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".bin")}


def numbered():
    return ((f"row {i}", text) for i, text in enumerate(TEXTS))


def in_a_child(work):
    """Fork a process that does `work` and leaves; returns its id. Forked, for it starts in milliseconds."""
    child = os.fork()
    if child:
        return child
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared between processes, and a kill may leave it locked
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def ended_by(child, seconds=60):
    for _ in range(seconds * 200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child hangs")


def looks_finished(folder):
    """Would training take this folder?"""
    try:
        TokenStream(folder, "train", 8)
        return True
    except UserError:
        return False


def assert_rerun_gives(folder, expected, work=lambda folder: prepare(numbered(), folder)):
    assert not looks_finished(folder) or contents(folder)["meta.json"] == expected["meta.json"]
    assert ended_by(in_a_child(lambda: work(folder))) == 0
    assert contents(folder) == expected


def killed_before_each_operation(place, work):
    """Yield a folder for the first, second, third ... time that work(folder) opens, renames, cuts or removes a file in
    it, in a process that SIGKILL has ended before that, until one runs through: no order of operations is left out."""
    for kills in itertools.count():
        folder, seen = place / f"kill_{kills}", [0]

        def count(event, arguments, folder=folder, seen=seen, kills=kills):
            if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir") and str(folder) in str(arguments):
                seen[0] += 1
                if seen[0] > kills:
                    os.kill(os.getpid(), signal.SIGKILL)

        def counted(folder=folder, count=count):
            sys.addaudithook(count)
            work(folder)

        status = ended_by(in_a_child(counted))
        if status == 0:
            return
        assert status == -signal.SIGKILL
        yield folder


def killed_until_done(folder, operations, work, most):
    """Call work(folder) in a process that SIGKILL ends at its file operation number `operations`, at most `most` times,
    until one call runs through. Returns the number of shards after each call."""

    def counted():
        left = [operations]

        def count(event, arguments):
            if event in ("open", "os.rename", "os.truncate") and str(folder) in str(arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work(folder)

    seen = []
    for _ in range(most):
        status = ended_by(in_a_child(counted))
        seen.append(len(shards(folder)))
        if status == 0:
            break
    return seen


def command(name, *flags):
    return [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, flags)]


def run(name, *flags, **how):
    return subprocess.run(command(name, *flags), env=environment(), capture_output=True, text=True, timeout=120, **how)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file that takes a second to prepare, and the flags for it."""
    file = tmp_path_factory.mktemp("large") / "large.jsonl"
    file.write_bytes(jsonl(TEXTS * 150))
    return "--input", file, "--tokenizer", "bytes", "--shard_tokens", 200_000, "--val_fraction", 0.1


def children_of(process):
    import psutil

    return psutil.Process(process).children(recursive=True)


def text_of(folder, split):
    stream = TokenStream(folder, split, 1)
    return load_tokenizer("bytes").decode(stream.read(0, stream.tokens).tolist())


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def one_error(result):
    """The one line of a command that ended with code 2."""
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if "error: " in line]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]
