"""Preparing that is killed, stopped or started twice: a later call continues from the last finished shard."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from minzero.data.shards import TokenStream, write_shard
from minzero.errors import UserError
from tests.helpers.data_sets import (  # noqa: F401
    GENERATOR,
    assert_rerun_gives,
    children_of,
    command,
    contents,
    ended_by,
    in_a_child,
    killed_before_each_operation,
    killed_until_done,
    large,
    looks_finished,
    numbered,
    prepare,
    run,
    shards,
)
from tests.helpers.processes import environment


@pytest.mark.parametrize("tokenizer, shard_tokens", [("bytes", 3000), ("gpt2", 600)])
def test_kill_before_each_file_operation(quick, tokenizer, shard_tokens, shared):
    """gpt2 is encoded by gigatoken, bytes by tiktoken."""

    def work(folder):
        prepare(numbered(), folder, "--shard_tokens", str(shard_tokens), tokenizer=tokenizer)

    work(quick / "whole")
    expected, kills = contents(quick / "whole"), 0
    for folder in killed_before_each_operation(quick, work):
        kills += 1
        if folder.exists():
            assert_rerun_gives(folder, expected, work)
            shutil.rmtree(folder)
    assert kills > 40


@pytest.mark.parametrize("tokenizer, shard_tokens", [("bytes", 3000), ("gpt2", 600)])
def test_kill_at_twenty_random_moments(quick, tokenizer, shard_tokens, shared):
    def work(folder):
        prepare(numbered(), folder, "--shard_tokens", str(shard_tokens), tokenizer=tokenizer)

    (quick / "whole").mkdir()
    started = time.perf_counter()
    assert ended_by(in_a_child(lambda: work(quick / "whole"))) == 0
    duration, expected, killed = time.perf_counter() - started, contents(quick / "whole"), 0
    for moment in range(60):
        folder = quick / f"moment_{moment}"
        child = in_a_child(lambda folder=folder: work(folder))
        time.sleep(GENERATOR.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        in_time = ended_by(child) == -signal.SIGKILL
        killed, duration = killed + in_time, duration * (1 if in_time else 0.9)  # measured on a busier machine
        folder.mkdir(exist_ok=True)
        assert_rerun_gives(folder, expected, work)
        if killed == 20:
            return
    raise AssertionError(f"only {killed} of 60 kills came before the end")


def test_kill_again_and_again(quick):
    """The same folder, killed until it is done: each run must resume from the last, not start again."""
    prepare(numbered(), quick / "whole")
    expected, folder = contents(quick / "whole"), quick / "again"
    seen = killed_until_done(folder, 22, lambda folder: prepare(numbered(), folder), 200)
    assert contents(folder) == expected
    assert len(seen) > 3 and seen == sorted(seen)


def test_kill_the_command_with_its_workers(tmp_path, large):  # noqa: F811
    """The real command: its orphaned workers leave by themselves, and the rerun ends with the same bytes."""
    assert run("text", *large, "--out", tmp_path / "whole", "--workers", 1).returncode == 0
    process = subprocess.Popen(
        command("text", *large, "--out", tmp_path / "killed", "--workers", 2),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    while not list((tmp_path / "killed").glob("train_*.bin")):
        time.sleep(0.01)
        assert process.poll() is None
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    assert not looks_finished(tmp_path / "killed")
    again = run("text", *large, "--out", tmp_path / "killed", "--workers", 2)
    assert again.returncode == 0 and "resuming after document" in again.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for worker in workers:
        worker.wait(timeout=10)


def test_a_killed_worker_and_ctrl_c(tmp_path, large):  # noqa: F811
    for end, code, words in (
        (lambda process: children_of(process.pid)[-1].kill(), 2, "a worker process was killed"),
        (lambda process: os.killpg(process.pid, signal.SIGINT), 130, "stopped; the same command continues"),
    ):
        process = subprocess.Popen(
            command("text", *large, "--out", tmp_path / str(code), "--workers", 2),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while not list((tmp_path / str(code)).glob("train_*.bin")):
            time.sleep(0.01)
            assert process.poll() is None
        end(process)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code
        assert words in output and "Traceback" not in output, output


def test_a_worker_killed_while_it_gives_its_result(tmp_path, large):  # noqa: F811
    """The preparation is stopped until its workers have results that nobody takes; the others must not wait for the
    killed one, nor the preparation for the rest of its result."""
    process = subprocess.Popen(
        command("text", *large, "--out", tmp_path / "out", "--workers", 2),
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not list((tmp_path / "out").glob("train_*.bin")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    workers = [child for child in children_of(process.pid) if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker process was killed" in errors, errors


def test_stale_files_are_harmless(quick):
    """Shards and .tmp files of an older preparation, in every place that a new one will use."""
    prepare(numbered(), quick / "whole")
    expected, folder = contents(quick / "whole"), quick / "stale"
    folder.mkdir()
    for number in range(20):
        for split in ("train", "val"):
            write_shard(folder / f"{split}_{number:06d}.bin", np.zeros(77, dtype="<u2"))
            (folder / f"{split}_{number:06d}.bin.tmp").write_bytes(b"old" * 5000)
    (folder / "meta.json.tmp").write_text("{")
    (folder / "progress.json.tmp").write_text("{")
    child = in_a_child(lambda: prepare(numbered(), folder))
    assert ended_by(child) == 0
    found = contents(folder)
    assert all(found[name] == content for name, content in expected.items())
    assert TokenStream(folder, "train", 8).tokens == TokenStream(quick / "whole", "train", 8).tokens


def test_finished_data_is_left_alone(tmp_path, capsys):
    prepare(numbered(), tmp_path)
    before = contents(tmp_path)
    prepare(iter([("other", "text")]), tmp_path)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="data made with another val_fraction; choose another --out"):
        prepare(numbered(), tmp_path, "--val_fraction", "0.5")
    assert contents(tmp_path) == before


def test_two_preparations_at_once(tmp_path):
    def documents():
        yield "a", "first"
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(numbered(), tmp_path)
        yield "b", "second"

    prepare(documents(), tmp_path)


def test_progress_that_does_not_fit_the_files(quick):
    child = in_a_child(lambda: prepare(cut_short(), quick / "a"))
    assert ended_by(child) == 1
    temporary = next((quick / "a").glob("val_*.tmp"))
    os.truncate(temporary, 1030)
    with pytest.raises(UserError, match=r"missing or cut, expected at least .* remove progress.json"):
        prepare(numbered(), quick / "a")


def cut_short():
    yield from list(numbered())[:100]
    raise RuntimeError
