"""One run at a time holds a folder, its ranks agree, and whatever ends it leaves the folder whole and free: processes
as a user, a cluster or a power cut starts and ends them."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from minzero import checkpoint_folder, checkpoint_state, run_folder
from minzero.errors import SharedError, UserError
from minzero.files import write_json
from minzero.metrics import read_metrics
from tests.helpers.processes import ROOT, ended, environment, free_port
from tests.helpers.small_run import LONG, write_small_run


@pytest.fixture
def place(small_data, tmp_path):
    return write_small_run(tmp_path, small_data)


@pytest.fixture
def train(place, start):
    """Starts `python train.py config.json --train.out_dir out ...` in the folder `place`."""

    def begin(*arguments, cwd=place, **more):
        command = [sys.executable, ROOT / "train.py", "config.json", "--train.out_dir", "out", *arguments]
        return start([str(part) for part in command], cwd=cwd, **more)

    return begin


def wait_for(process, word):
    said = []
    for line in process.stdout:
        said.append(line)
        if word in line:
            return
    raise AssertionError(f"ended without {word!r}: {''.join(said)[-2000:]}")


def status(place):
    return json.loads((place / "out" / "status.json").read_text())


def test_one_run_at_a_time_holds_a_folder_until_it_dies(place, train):
    first = train(*LONG, "--train.save_every", 5)
    wait_for(first, "saved ")
    found = status(place)
    assert found["state"] == "running" and found["process"] == first.pid and found["host"] == socket.gethostname()
    assert {"step", "reason", "since"} <= found.keys()
    code, said = ended(train(*LONG))
    assert code == 2, said
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1 and f"held by another run (process {first.pid} on {socket.gethostname()}" in errors[0]
    assert status(place)["process"] == first.pid, "the one that was refused writes nothing"
    wait_for(first, "saved ")  # and disturbs nothing
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = train(*LONG)
    wait_for(second, "continuing from")
    wait_for(second, "| loss ")
    assert status(place)["process"] == second.pid
    (place / "out" / "STOP").touch()
    code, said = ended(second)
    assert code == 0 and "after step" in said and "the same command continues" in said
    found = status(place)
    assert found["state"] == "stopped" and found["reason"].endswith("STOP")
    lines = read_metrics(place / "out")
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, steps[-1] + 1)) and found["step"] == steps[-1]
    code, said = ended(train("--train.max_tokens", 64 * (steps[-1] + 2), "--train.lr", 0.02))
    changed = [line for line in said.splitlines() if line.startswith("changed since the checkpoint: ")]
    assert code == 0 and len(changed) == 1, said
    assert f"train.max_tokens 6400000 -> {64 * (steps[-1] + 2)}; train.lr 0.01 -> 0.02; the learning" in changed[0]
    assert status(place)["state"] == "complete" and status(place)["step"] == steps[-1] + 2


@pytest.mark.slow
def test_a_run_whose_last_rank_still_lives_holds_its_folder(place, train):
    """As when a job is requeued while ranks of the old one are left on another node."""
    port = free_port()
    ranks = [train(*LONG, **two_ranks(rank, port)) for rank in (0, 1)]
    wait_for(ranks[0], "| loss ")
    ranks[1].send_signal(signal.SIGSTOP)
    ranks[0].kill()
    ranks[0].wait()
    code, said = ended(train(*LONG))
    assert code == 2 and "held by another run" in said, said
    ranks[1].kill()
    ranks[1].wait()
    assert ended(train())[0] == 0


def two_ranks(rank, port):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def ranks_of(train, name, *arguments):
    """Two ranks that know of each other by what srun or mpirun sets alone."""
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "node1"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": f"mpi{os.getpid()}"}
    variables, *own = {
        "slurm": (slurm, "SLURM_PROCID", "SLURM_LOCALID"),
        "mpi": (mpi, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    }[name]
    return [train(*arguments, **variables, **dict.fromkeys(own, str(rank))) for rank in (0, 1)]


def test_ranks_of_slurm_are_one_run(place, train):
    said = [ended(rank) for rank in ranks_of(train, "slurm")]
    assert [code for code, _ in said] == [0, 0], said
    assert "ZeRO-1 on 2 x" in said[0][1] and "| loss " not in said[1][1]
    state = checkpoint_state.read_state(checkpoint_folder.find(place / "out"))
    assert state["world_size"] == 2 and len(state["files"]) == 2


def test_what_one_rank_meets_in_mid_run_is_one_line_of_all(place, train):
    """Of mpirun's ranks: rank 0, which keeps what the others ask, finds the run's folder gone."""
    ranks = ranks_of(train, "mpi", *LONG)
    wait_for(ranks[0], " 3/100000")
    (place / "out").rename(place / "moved")
    said = [ended(rank) for rank in ranks]
    assert [code for code, _ in said] == [2, 2], said
    lines = [line for _, text in said for line in text.splitlines() if "error: " in line or "rank 1" in line]
    assert len(lines) == 1 and "train.out_dir: out is gone" in lines[0], said


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("config", "train.lr is 0.5 instead of 0.01"),
        pytest.param("a missing config", "config.json: no such file", marks=pytest.mark.slow),
        ("copies", "train.copy_to is 'copies' instead of None"),
        ("tokens", "tokens.data/train is "),
        pytest.param("missing data", "data.path: no folder data", marks=pytest.mark.slow),
        pytest.param("deepspeed", "deepspeed.zero_optimization.stage is 2 instead of 1", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_differ_are_refused_with_what_differs_and_where(place, train, what, expected):
    """Two nodes with a copy of everything each, of which the second's has changed. `lr` is set in the file alone."""
    other = place / "other_node"
    shutil.copytree(place / "data", other / "data")
    settings = json.loads((place / "config.json").read_text())
    if what == "config":
        settings["train"]["lr"] = 0.5
    elif what == "deepspeed":
        settings["deepspeed"]["zero_optimization"]["stage"] = 2
    elif what == "copies":  # by which the ranks decide whether they fetch together
        settings["train"]["copy_to"] = "copies"
    elif what == "tokens":  # as many, and all of them known ids
        shard = other / "data" / "train_000001.bin"
        content = bytearray(shard.read_bytes())
        content[20_000] ^= 1
        shard.write_bytes(content)
    elif what == "missing data":
        shutil.rmtree(other / "data")
    write_json(other / "config.json", settings)
    if what == "a missing config":
        (other / "config.json").unlink()
    port = free_port()
    out = ["--train.out_dir", place / "out"]
    ranks = [train(*out, cwd=folder, **two_ranks(rank, port)) for rank, folder in enumerate((place, other))]
    said = [ended(rank) for rank in ranks]
    assert [code for code, _ in said] == [2, 2], said
    errors = [line for _, text in said for line in text.splitlines() if "error: " in line]
    assert len(errors) == 1 and f"rank 1 on {socket.gethostname()}" in errors[0] and expected in errors[0], errors
    assert not (place / "out").exists()


def test_a_folder_that_is_not_shared_is_refused_before_the_first_step(place, train):
    """Two nodes with a copy of everything each, and `out` among it."""
    other = place / "other_node"
    shutil.copytree(place / "data", other / "data")
    shutil.copy(place / "config.json", other)
    port = free_port()
    first_of_node = {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    folders = enumerate((place, other))
    ranks = [train(cwd=folder, **(two_ranks(rank, port) | first_of_node)) for rank, folder in folders]
    said = [ended(rank) for rank in ranks]
    assert [code for code, _ in said] == [2, 2], said
    errors = [line for _, text in said for line in text.splitlines() if "error: " in line]
    assert len(errors) == 1 and f"rank 1 on {socket.gethostname()}: train.out_dir: {other}/out is not" in errors[0], (
        said
    )
    assert not (other / "out").exists() and not (place / "out" / "checkpoints").exists()
    assert status(place)["state"] == "failed"
    assert not any("| loss " in text for _, text in said)


def test_ranks_that_do_not_start_are_named_within_the_limit(place, train):
    """Of three, the last never comes."""
    port = free_port()
    size = {"WORLD_SIZE": "3", "LOCAL_SIZE": "3"}
    limit = ["--train.meet_timeout_seconds", 5]
    said = [ended(rank) for rank in [train(*limit, **(two_ranks(rank, port) | size)) for rank in (0, 1)]]
    assert [code for code, _ in said] == [2, 2], said
    errors = [line for _, text in said for line in text.splitlines() if "error: " in line]
    expected = f"rank 2 of 3 did not start within 5 s; 2 did, on {socket.gethostname()}; "
    assert len(errors) == 1 and expected in errors[0], said


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(place, train):
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        code, said = ended(train("--train.out_dir", disk / "run"))
        assert code == 2 and "| loss " not in said, said
        assert "train.out_dir: " in said and "GiB are free, and a checkpoint takes " in said, said
        assert not (disk / "run").exists(), "nothing was written"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(place, train):
    first = train(*LONG)
    wait_for(first, " 3/100000")
    listening = [c.laddr.ip for c in psutil.Process(first.pid).net_connections("all") if c.status == "LISTEN"]
    assert all(address == "127.0.0.1" for address in listening), "a run of one process opens no port to the network"
    first.send_signal(signal.SIGINT)
    code, said = ended(first)
    assert code == 0 and "Ctrl-C: saving and ending after this step; once more ends at once" in said
    found = checkpoint_folder.find(place / "out")
    step = checkpoint_state.read_state(found)["step"]
    assert step >= 3 and f"saved out/checkpoints/{found.name}" in said
    assert status(place)["state"] == "stopped" and status(place)["reason"] == "Ctrl-C"
    again = train(*LONG, "--train.global_batch_tokens", 64 * 100_000, "--train.out_dir", "slow")  # a step that lasts
    wait_for(again, "tokens a step")
    time.sleep(2)
    again.send_signal(signal.SIGINT)
    wait_for(again, "once more ends at once")
    time.sleep(1.5)
    again.send_signal(signal.SIGINT)
    code, said = ended(again, 20)
    assert code == 130 and "stopped by a second Ctrl-C; no checkpoint was saved yet" in said
    assert json.loads((place / "slow" / "status.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("how", ["as it was", "renamed", "replaced"])
def test_whatever_fails_in_a_folder_that_went_away_says_that(tmp_path, how):
    out = tmp_path / "out"
    errors = [
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(out / "metrics.jsonl")),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "loss.png"),
        UserError(f"{out}/loss.png: could not be written"),
        SharedError(f"{out}/checkpoints: could not be written", 3),
        UserError("step 9: the loss is NaN"),  # which the folder has nothing to do with
        ZeroDivisionError(),  # a fault in the program
    ]
    for error in errors:
        stays = how == "as it was" or error in errors[4:]
        expected = type(error) if stays else UserError
        with pytest.raises(expected) as found, run_folder.RunFolder(out, 0) as folder:
            folder.hold()
            if how != "as it was":
                out.rename(tmp_path / "moved")
            if how == "replaced":
                shutil.copytree(tmp_path / "moved", out)
            raise error
        if stays:
            assert found.value is error
        else:
            assert f"train.out_dir: {out} is gone" in str(found.value)
            assert getattr(found.value, "said_by", None) == getattr(error, "said_by", None)
        for path in (out, tmp_path / "moved"):
            shutil.rmtree(path, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["renamed", "deleted", "replaced"])
def test_a_folder_that_goes_away_under_a_run_ends_it_in_one_line(place, train, how):
    first = train(*LONG, "--train.save_every", 20)
    wait_for(first, "saved ")
    if how == "deleted":
        while (place / "out").exists():
            shutil.rmtree(place / "out", ignore_errors=True)
    else:
        (place / "out").rename(place / "moved")
    if how == "replaced":
        shutil.copytree(place / "moved", place / "out")
    code, said = ended(first)
    assert code == 2, said
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1 and "train.out_dir: out is gone" in errors[0], said
    assert (place / "out").exists() == (how == "replaced"), "it is not made again"
    if how == "renamed":
        code, said = ended(
            train("--train.out_dir", "moved", "--train.max_tokens", 64 * 100_000, "--train.profile", "1")
        )
        assert code == 2  # the folder under its new name is free: only the profile is wrong
        assert "train.profile" in said


def test_the_environment_of_these_tests_starts_one_process():
    assert not {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & environment().keys()
