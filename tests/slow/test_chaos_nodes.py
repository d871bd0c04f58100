"""The short form of tests/chaos_nodes.py, and a supervised run that loses nodes for good."""

import json
import sys

import pytest

from tests import chaos_nodes
from tests.helpers.nodes import skip_without
from tests.helpers.processes import run

pytestmark = pytest.mark.slow


def test_a_run_on_two_nodes_comes_back_from_every_failure_bit_for_bit():
    skip_without("pdsh")
    done = run([sys.executable, "tests/chaos_nodes.py", "--short"], timeout=1200)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-3000:]
    assert "300 steps, each once; last checkpoint and losses equal bit for bit" in done.stdout
    assert done.stdout.count(" | 1 | ") == len(chaos_nodes.DISTURBANCES) - 1, done.stdout
    print(done.stdout)


def test_a_spare_is_taken_and_without_one_fewer_nodes(tmp_path):
    skip_without("pdsh")
    place = chaos_nodes.Place(tmp_path, 300, count=3, flags=("--nodes", 2, "--pause", 1), has_disk=False)
    with place:
        place.start()
        for _ in range(2):
            place.wait_for_steps()
            place.kill_rank(2)
        place.wait_for_steps()  # on node1 and node3
        place.lose(3)
        place.wait_for_steps()
        place.lose(2)
        assert place.end() == 0, place.tail()
        place.run_whole()
    lines = [line.partition(" on ")[2] for line in place.log.read_text().splitlines() if "supervise.py: start " in line]
    assert lines == [
        "2 nodes: node1, node2",
        "2 nodes: node1, node2",
        "2 nodes: node1, node3 (node2 failed 2 times)",
        "2 nodes: node1, node2 (node3 does not answer)",
        "1 nodes instead of 2: node1 (node2 does not answer, node3 does not answer)",
    ]
    failures = json.loads((place.out / "supervise.json").read_text())["failures"]
    assert [failure["nodes"] for failure in failures] == [["node2"], ["node2"], ["node3"], ["node2"]]
    said = chaos_nodes.check(place)
    assert "continued on fewer ranks; losses equal to" in said
    print(said)


def test_a_node_that_ends_before_the_ranks_have_met_keeps_the_others_for_a_minute(tmp_path):
    skip_without("pdsh")
    place = chaos_nodes.Place(tmp_path, 10, flags=("--pause", 5), has_disk=False)
    with place:
        place.start()
        place.wait(lambda: place.processes()["ranks"])
        assert place.crash(2)
        place.expect_a_start("kill -9 of node2")
        place.wait_for_steps(0)
        assert place.end() == 0, place.tail()
    said = place.log.read_text()
    assert "did not start within" not in said and "Traceback" not in said, said
    failures = json.loads((place.out / "supervise.json").read_text())["failures"]
    assert [failure["nodes"] for failure in failures] == [["node2"]]
    seconds = failures[0]["ended"] - failures[0]["began"]
    assert seconds < 200, "it waited for train.meet_timeout_seconds"  # 300
    print(f"{seconds:.0f} s")


def test_it_gives_up_and_says_where_it_failed(tmp_path):
    skip_without("pdsh")
    place = chaos_nodes.Place(tmp_path, 10**5, flags=("--tries", 2, "--pause", 1), has_disk=False)
    place.train_flags += ["--train.save_every", "0"]
    with place:
        place.start()
        for _ in range(2):
            place.wait_for_steps()
            place.kill_rank(2)
        assert place.end(300) == 3, place.tail()
    summary = place.tail()[place.tail().index("gives up: 2 failures, and no checkpoint after step 0") :]
    assert summary.count(", nothing saved as before, code ") == 2 and summary.count(", node2: ") == 2, summary
    assert "call it with --again" in summary
    print(summary)
