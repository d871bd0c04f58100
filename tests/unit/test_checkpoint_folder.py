"""Finding and deleting checkpoints, also with saves and deletions that were killed at any moment."""

import os
import shutil
import threading

import pytest

from minzero import checkpoint, checkpoint_folder, resume
from minzero.checkpoint_folder import complete_checkpoints, find, name_of, prune, reading
from minzero.checkpoint_state import read_state
from minzero.errors import UserError
from minzero.tensor_files import check_sums
from tests.helpers.saved_checkpoints import (
    make,
    mark,
    marks,
    no_reader_may_hang,  # noqa: F401, a fixture for every test here
    save,
    steps_of,
)


def test_find_takes_what_is_marked_and_nothing_incomplete(tmp_path):
    assert find(tmp_path) is None
    folders = {step: make(tmp_path, step) for step in (5, 10, 15)}
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_00000025").mkdir()  # no state.json
    assert find(tmp_path) == folders[15], "the newest where nothing is marked"
    mark(tmp_path, "latest", 10)
    mark(tmp_path, "best", 5)
    assert find(tmp_path) == folders[10]
    assert find(tmp_path, "best") == folders[5]
    assert find(tmp_path, "15") == folders[15]
    assert find(folders[5]) == folders[5]
    with pytest.raises(UserError, match=r"no checkpoint '20'; expected latest, best or one of the steps: 5, 10, 15"):
        find(tmp_path, "20")


def test_pruning_keeps_the_newest_and_what_is_marked(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    mark(tmp_path, "latest", 6)
    mark(tmp_path, "best", 2)
    prune(tmp_path / "checkpoints", 2)
    left = [int(p.name[5:]) for p in complete_checkpoints(tmp_path / "checkpoints")]
    assert left == [2, 5, 6]


class Killed(BaseException):
    """As kill -9: nothing catches it."""


def kill_at(monkeypatch, number):
    """Kill at that of the operations that change the file system. Returns those that were made."""
    made = []

    def wrap(name):
        real = getattr(os, name)

        def wrapped(*arguments, **named):
            if len(made) == number:
                raise Killed
            made.append(name)
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, wrapped)

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        wrap(name)
    return made


@pytest.mark.parametrize("step", [15, 20])
def test_a_save_killed_between_any_two_operations_is_repaired_by_the_next_start(tmp_path, monkeypatch, step):
    """Step 15 replaces a stale one of the same step, as the run was resumed from 10; step 20 is new. Both are the
    best, and both delete older ones."""
    whole = tmp_path / "whole"
    for at, loss in ((5, 3.0), (10, 2.0), (15, 1.5)):
        save(whole, at, loss, keep=3)
    if step == 15:
        save(whole, 11, 2.5, keep=9)
    number, killed, seen = 0, True, set()
    while killed:
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        with monkeypatch.context() as patch:
            made = kill_at(patch, number)
            try:
                save(run, step, 1.0)
                killed = False
            except Killed:
                seen.add(made[-1] if made else None)
        # the next start
        checkpoint_folder.restore_replaced(run / "checkpoints")
        found, state, _ = resume.newest_usable(run)
        assert found.name == name_of(state["step"]) and state["step"] in (11, 15, step)
        check_sums(found, state["files"])
        checkpoint_folder.tidy(run / "checkpoints")
        losses = {p: read_state(p)["val_loss"] for p in complete_checkpoints(run / "checkpoints")}
        assert marks(run) == (state["step"], int(min(losses, key=losses.get).name[5:]))
        assert not list((run / "checkpoints").glob("*.tmp")), number
        assert 15 in steps_of(run), "the one that was to be replaced, or the new one"
        # two later saves delete all that is older, but the best
        best = marks(run)[1]
        save(run, 30, 5.0)
        save(run, 35, 6.0)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == ["best", "latest", *(name_of(at) for at in sorted({best, 30, 35}))], number
        number += 1
    assert number > 12 and seen >= {"mkdir", "replace", "rename", "unlink", "fsync"}, (number, seen)


@pytest.mark.parametrize(
    "content", [b"step_0000000\xb5", b"", b"step_00000077", b"../../run", b"step_00000010\0", None]
)
@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_damaged_mark_is_ignored_and_corrected(tmp_path, which, content):
    for step, loss in ((5, 1.0), (10, 2.0), (15, 3.0)):
        save(tmp_path, step, loss, keep=9)
    file = tmp_path / "checkpoints" / which
    file.unlink()
    if content is None:
        (file / "folder").mkdir(parents=True)
    else:
        file.write_bytes(content)
    right = {"latest": 15, "best": 5}[which]
    assert find(tmp_path, which).name == name_of(right)
    assert resume.newest_usable(tmp_path)[1]["step"] == 15
    checkpoint_folder.tidy(tmp_path / "checkpoints")
    assert marks(tmp_path) == (15, 5)
    file.unlink()
    os.mkfifo(file)
    assert find(tmp_path, which).name == name_of(right)
    save(tmp_path, 20, 4.0, keep=9)
    assert marks(tmp_path) == (20, 5)


@pytest.mark.parametrize("wrong", [5, 10])
def test_a_mark_that_names_the_wrong_checkpoint_is_ignored(tmp_path, wrong):
    """A flipped bit, or a kill between the rename and the mark."""
    for step, loss in ((5, 2.0), (10, None), (15, 1.0), (20, 3.0)):
        save(tmp_path, step, loss, keep=9)
    mark(tmp_path, "best", wrong)
    mark(tmp_path, "latest", wrong)
    assert find(tmp_path, "best").name == name_of(15)
    assert find(tmp_path).name == name_of(20)


def test_a_run_resumed_from_an_older_checkpoint_deletes_the_stale_ones_and_not_its_own(tmp_path):
    for step, loss in ((10, 3.0), (40, 1.0), (50, 2.0)):
        save(tmp_path, step, loss, keep=9)
    save(tmp_path, 20, 2.9)
    assert find(tmp_path).name == name_of(20)
    assert steps_of(tmp_path) == [10, 20, 40, 50], "as long as it has not saved two of its own"
    assert resume.newest_usable(tmp_path, {tmp_path / "checkpoints/step_00000020": "x"})[1]["step"] == 10
    save(tmp_path, 30, 2.8)
    assert steps_of(tmp_path) == [20, 30, 40], "40 is the best of all, and no other copy is there"
    save(tmp_path, 45, 2.7)
    assert steps_of(tmp_path) == [30, 40, 45] and marks(tmp_path) == (45, 40)
    save(tmp_path, 60, 0.5)
    assert steps_of(tmp_path) == [45, 60] and marks(tmp_path) == (60, 60)


def test_no_good_checkpoint_is_deleted_for_those_of_a_run_that_goes_wrong(tmp_path):
    """Weights can be finite and of no use, as after a step at a rate of 1e38: every later step is bad, and the
    validation loss is none."""
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        save(tmp_path, step, loss)
    for step in range(4, 9):
        save(tmp_path, step, float("nan"))
    assert steps_of(tmp_path) == [1, 2, 3, 7, 8] and marks(tmp_path) == (8, 1)
    assert checkpoint_folder.Saved(tmp_path / "checkpoints").last_good.name == name_of(3)
    save(tmp_path, 9, 4.0)
    assert steps_of(tmp_path) == [1, 3, 7, 8, 9]
    save(tmp_path, 10, 4.0)
    assert steps_of(tmp_path) == [1, 9, 10]


def test_nothing_is_deleted_but_what_a_run_wrote(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for name in ("step_00000002_keep", "step_3_backup", "step_000000002", "step_00000002.bak", "step_00000002.old"):
        shutil.copytree(folder / "step_00000001", folder / name)
    shutil.copytree(folder / "step_00000001", folder / "step_00000009")  # another step's, renamed
    shutil.copytree(save(tmp_path, 4), folder / "step_00000004_mine")
    (folder / "step_00000004" / "notes.txt").write_text("mine")
    shutil.copytree(save(tmp_path, 5), tmp_path / "elsewhere")
    shutil.rmtree(folder / "step_00000005")
    (folder / "step_00000005").symlink_to(tmp_path / "elsewhere")
    (folder / "step_00000006.tmp").symlink_to(tmp_path / "elsewhere")
    (folder / "step_00000007").mkdir()
    (folder / "step_00000007" / "plan.txt").write_text("mine")
    kept = {path.name for path in folder.iterdir()} - {"step_00000001"}
    for step in range(20, 25):
        save(tmp_path, step)
    left = {path.name for path in folder.iterdir()}
    assert left == kept | {"step_00000023", "step_00000024"}
    assert (tmp_path / "elsewhere" / "state.json").exists()
    with pytest.raises(
        UserError, match=r"no checkpoint '3'; expected latest, best or one of the steps: 4, 5, 9, 23, 24"
    ):
        find(tmp_path, "3")
    for odd in ("\u00b2", "9" * 5000, "-1", "", "../x"):
        with pytest.raises(UserError, match="no checkpoint '"):
            find(tmp_path, odd)


def test_half_a_deletion_is_finished_by_the_next_save(tmp_path):
    """Of older code, which did not rename first; and of this."""
    (save(tmp_path, 2) / "state.json").unlink()
    save(tmp_path, 3).rename(tmp_path / "checkpoints" / "step_00000003.deleted.tmp")
    save(tmp_path, 4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000004"]


def test_a_folder_of_the_user_under_the_name_of_a_save_is_moved_and_not_deleted(tmp_path, capsys):
    mine = tmp_path / "checkpoints" / "step_00000002"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    save(tmp_path, 2)
    assert steps_of(tmp_path) == [2] and (tmp_path / "checkpoints/step_00000002.moved1/notes.txt").read_text() == "mine"
    assert "step_00000002 was there already and is replaced" in capsys.readouterr().out


def test_a_reader_whose_checkpoint_is_deleted_reads_the_next(tmp_path):
    save(tmp_path, 1, 9.0)
    stop, opened = threading.Event(), []

    def train():
        step = 1
        while not stop.is_set():
            step += 1
            save(tmp_path, step, 1 / step, keep=1)

    def look(found):
        _, _, read = checkpoint.open_weights(found)
        return found, read

    thread = threading.Thread(target=train)
    thread.start()
    try:
        while len(set(opened)) < 20:  # so many that the run has saved, and deleted, meanwhile
            found, read = reading(tmp_path, ("latest", "best")[len(opened) % 2], look)
            assert read("a.weight").flatten().tolist() == list(range(10)), "even if it is deleted meanwhile"
            opened.append(found)
    finally:
        stop.set()
        thread.join()
