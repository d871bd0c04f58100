"""The file system of a run's folder, and the words about ranks that do not come."""

import shutil
import threading
import time

import pytest
from torch import distributed

from minzero import meeting, out_dir
from minzero.errors import SharedError, UserError
from tests.helpers.processes import free_port

TEXT = '{"host": "node1", "process": 7}'


def refused(path):
    with pytest.raises(
        UserError, match=r"^train.out_dir: .* is not the folder that rank 0 sees on node1, so "
    ) as error:
        out_dir.check_is_shared(path, TEXT, "node1")
    return str(error.value)


def test_the_folder_that_rank_0_holds_is_the_same_one(tmp_path):
    (tmp_path / "lock").write_text(TEXT)
    out_dir.check_is_shared(tmp_path, TEXT, "node1")


def test_another_folder_is_refused_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(out_dir, "PATIENCE", 0.5)
    refused(tmp_path / "no" / "such" / "folder")
    refused(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "lock").write_text(TEXT.replace("7", "8"))  # of an older run
    refused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_lock_that_a_network_file_system_shows_late_is_waited_for(tmp_path):
    (tmp_path / "lock").write_text("")
    threading.Timer(0.5, (tmp_path / "lock").write_text, [TEXT]).start()
    out_dir.check_is_shared(tmp_path, TEXT, "node1")


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch):
    gib = 2**30
    usage = shutil.disk_usage(tmp_path)._replace(total=100 * gib, free=25 * gib)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = tmp_path / "new" / "run"
    with pytest.raises(UserError, match=r"25\.00 GiB are free, and a checkpoint takes 25\.01 GiB; make room"):
        out_dir.check_space(folder, 25.01 * gib, keeps=4, saved=0)
    size = 12 * gib
    assert "has room for 2 checkpoints of 12.00 GiB" in out_dir.check_space(folder, size, keeps=4, saved=0)
    assert "has room for 3 checkpoints" in out_dir.check_space(folder, size, keeps=4, saved=1)
    assert out_dir.check_space(folder, size, keeps=4, saved=2) is None
    usage = usage._replace(total=0, free=0)  # a file system that does not say
    assert out_dir.check_space(folder, size, keeps=4, saved=0) is None


def in_threads(faults, seconds=20):
    """The line with which each rank of a meeting ends, or None. faults: by rank; a rank that is False never comes."""
    store = distributed.HashStore()
    lines = {}

    def rank_of(rank):
        try:
            meeting.meet(store, rank, len(faults), seconds, faults[rank])
            lines[rank] = None
        except SharedError as error:
            lines[rank] = str(error)

    threads = [
        threading.Thread(target=rank_of, args=[rank]) for rank in range(len(faults)) if faults[rank] is not False
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return lines


def test_ranks_meet_and_one_that_cannot_take_part_ends_all_with_its_line(monkeypatch):
    monkeypatch.setattr(meeting.socket, "gethostname", lambda: "node7")
    assert in_threads([None] * 4) == dict.fromkeys(range(4))
    assert set(in_threads([None, None, "no GPU", None]).values()) == {"rank 2 on node7: no GPU"}
    assert set(in_threads(["bad config"] * 3).values()) == {"bad config"}, "all found the same: it is of no one machine"


def test_ranks_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(meeting.socket, "gethostname", lambda: "node7")
    lines = in_threads([None, False, None, False, False], seconds=1)
    assert lines.keys() == {0, 2} and len(set(lines.values())) == 1
    assert lines[0].startswith("ranks 1, 3 to 4 of 5 did not start within 1 s; 2 did, on node7; look ")


def test_a_rank_whose_rank_0_never_listens_ends_within_the_limit(monkeypatch, capfd):
    """torch's own client waits up to twice as long, and prints where in its code."""
    monkeypatch.setattr(meeting, "GRACE", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"ranks could not meet at 127.0.0.1:\d+ \(Connection refused for 2 s\); is "):
        meeting.open_store(1, 2, 2)
    assert 2 <= time.monotonic() - began < 4 and capfd.readouterr() == ("", "")


def test_a_rank_that_comes_before_rank_0_waits_for_it(monkeypatch, capfd):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    stores = []
    early = threading.Thread(target=lambda: stores.append(meeting.open_store(1, 2, 30)))
    early.start()
    time.sleep(1)
    keeper = meeting.open_store(0, 2, 30)
    early.join(30)
    keeper.set("word", "x")
    assert stores[0].get("word") == b"x" and capfd.readouterr() == ("", "")


def test_ranks_in_words():
    assert meeting.in_words([5]) == "rank 5" and meeting.in_words([0, 1, 2, 8]) == "ranks 0 to 2, 8"
    assert meeting.in_words(list(range(0, 512, 2))).endswith("14, and 248 more groups")
