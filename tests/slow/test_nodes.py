"""Two nodes with networks, processes and files of their own: they agree before the first step, and what happens to one
of them ends the run on both, with one line."""

import json
import re
import signal
import subprocess
import time

import psutil
import pytest

from minzero import checkpoint_folder
from tests.helpers import nodes as helper
from tests.helpers.processes import BIN, ROOT, environment, free_port
from tests.helpers.small_run import LONG, write_small_run

pytestmark = pytest.mark.slow
KEEPALIVE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    helper.skip_without("pdsh")
    with helper.Nodes(tmp_path_factory.mktemp("nodes") / "nodes") as made:
        yield made


@pytest.fixture
def place(small_data, tmp_path):
    return write_small_run(tmp_path, small_data)


def deepspeed(nodes, *arguments):
    launcher = ["deepspeed", "-q", "--hostfile", nodes.hostfile(), "--master_port", free_port()]
    return [*launcher, ROOT / "train.py", "config.json", "--train.out_dir", "out", *arguments]


def run_with_another_folder(nodes, place, own, name):
    """The ended run of two nodes, of which the second sees the folder `own` in place of `name`."""
    nodes.bind(2, place / own, place / name)
    try:
        return nodes.run(1, deepspeed(nodes), cwd=place)
    finally:
        nodes.run(2, ["umount", place / name])


def errors_in(said):
    return [line for line in said.splitlines() if "train.py: " in line]


def wait_for_text(file, text, seconds=240):
    helper.wait_for(lambda: text in file.read_text(), seconds, repr(text))


def test_a_folder_that_nodes_do_not_share_is_found_before_the_first_step(nodes, place):
    (place / "own").mkdir()
    (place / "out").mkdir()
    done = run_with_another_folder(nodes, place, "own", "out")
    errors = errors_in(done.stdout)
    assert done.returncode == 2 and len(errors) == 1, done.stdout
    assert "rank 1 on node2: train.out_dir: " in errors[0] and "not the folder that rank 0 sees on node1" in errors[0]
    assert "step" not in errors[0] and "| loss" not in done.stdout
    assert not list((place / "own").iterdir()), "nothing is left in the other node's folder"


def test_data_on_one_node_only_ends_both_with_a_line(nodes, place):
    (place / "empty").mkdir()
    done = run_with_another_folder(nodes, place, "empty", "data")
    errors = errors_in(done.stdout)
    assert done.returncode == 2 and len(errors) == 1 and "rank 1 on node2: data" in errors[0], done.stdout
    assert not (place / "out").exists()


def test_a_node_that_does_not_start_is_named_within_the_limit(nodes, place):
    """Its Python cannot import what train.py needs, so it cannot tell the others."""
    (place / "broken").mkdir()
    nodes.bind(2, place / "broken", ROOT / "minzero")
    try:
        done = nodes.run(1, deepspeed(nodes, "--train.meet_timeout_seconds", 20), cwd=place)
    finally:
        nodes.run(2, ["umount", ROOT / "minzero"])
    errors = errors_in(done.stdout)
    assert done.returncode and len(errors) == 1, done.stdout
    assert "rank 1 of 2 did not start within 20 s; 1 did, on node1; " in errors[0]


def test_a_rank_whose_launcher_was_hung_up_while_it_started_stops_the_run(nodes, place):
    log = place / "log"
    command = nodes.start(1, deepspeed(nodes, *LONG), log, cwd=place)
    helper.wait_for(lambda: nodes.find(2, "train.py", "--local_rank"), 120, "a rank on node2")
    rank = nodes.find(2, "train.py", "--local_rank")
    launcher = [process for process in nodes.find(2, "deepspeed.launcher.launch", "-u") if process not in rank]
    for process in launcher:
        process.send_signal(signal.SIGHUP)
    command.wait(240)
    said = log.read_text()
    assert "stopped by the end of its launcher on rank 1, node2 after step 1; the same command continues" in said, said
    assert checkpoint_folder.find(place / "out").name == checkpoint_folder.name_of(1)
    assert not any(map(psutil.Process.is_running, rank))


def test_a_cut_cable_ends_both_sides_and_the_command(nodes, place):
    log = place / "log"
    command = nodes.start(1, deepspeed(nodes, *LONG, "--train.save_every", 5), log, cwd=place, **KEEPALIVE)
    try:
        wait_for_text(log, "saved ")
        ranks = nodes.find(1, "train.py", "--local_rank") + nodes.find(2, "train.py", "--local_rank")
        nodes.cut(2)
        assert command.wait(240) != 0, "the command returns while the cable is cut"
        psutil.wait_procs(ranks, 60)
        assert not any(process.is_running() for process in ranks)
    finally:
        nodes.heal(2)
    lost = [line for line in log.read_text().splitlines() if "lost contact" in line]
    assert len(lost) == 1, log.read_text()
    assert re.search(
        r"rank 0 lost contact with rank 1 on node2: no sign of life for 120 s; .*; resume from out", lost[0]
    )


def test_ranks_in_process_namespaces_of_their_own_save_when_asked_to_stop(place):
    """Containers of one machine that have its name: process 2 is rank 1 in one of them, and something else in the
    other, where it ends."""
    helper.skip_without()
    port = free_port()
    ranks = []
    for rank, script in enumerate(('sleep infinity & exec "$@"', '"$@" & wait $!')):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "bash", "-c", script, "bash"]
        words += [BIN / "python", ROOT / "train.py", "config.json", "--train.out_dir", "out", *LONG]
        with open(place / f"log{rank}", "w") as log:
            more = {"cwd": place, "env": environment(**variables), "stdout": log, "stderr": subprocess.STDOUT}
            ranks.append(subprocess.Popen([str(word) for word in words], **more))
    try:
        wait_for_text(place / "log0", " 3/")
        inside = psutil.Process(ranks[0].pid).children(recursive=True)
        (other,) = [process for process in inside if process.name() == "sleep"]
        other.kill()
        time.sleep(1)
        (rank_0,) = [process for process in inside if process.name().startswith("python")]
        rank_0.terminate()
        assert [rank.wait(120) for rank in ranks] == [0, 0], (place / "log0").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    assert "stopped by SIGTERM after step " in (place / "log0").read_text()
    found = json.loads((place / "out" / "status.json").read_text())
    assert found["state"] == "stopped" and checkpoint_folder.find(place / "out")
