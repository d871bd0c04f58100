"""Finding, checking and pruning checkpoints; saving and loading real ones is in end_to_end."""

import json
import os
import shutil
import signal
import threading
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from minzero import checkpoint, dist, guard
from minzero import zero as pieces
from minzero.config import Config, SharedError, TrainConfig, UserError
from minzero.files import write_json
from tests.trained_runs import write_file

TENSORS = {
    "random/cpu/0": torch.arange(13, dtype=torch.uint8),
    "fp32/a.weight/0": torch.arange(6.0),
    "fp32/a.weight/6": torch.arange(6.0, 10.0),
    "exp_avg/a.weight/0": torch.randn(10).bfloat16(),
}

WHOLE = {name: torch.arange(10.0) for name in ("fp32/a.weight/0", "exp_avg/a.weight/0", "exp_avg_sq/a.weight/0")}


def state_of(step, files):
    state = {"step": step, "tokens": step * 8, "optimizer_steps": step, "files": files, "config": Config().to_dict()}
    state |= {
        "parameters": {"a.weight": [2, 5]},
        "tied": {"b.weight": "a.weight"},
        "loss_scaler": {},
        "data": {},
        "best_val_loss": None,
    }
    return state | {"world_size": 8, "stage": 3, "precision": "fp32"}


def make(run, step):
    """A checkpoint of two ranks, with one parameter of 2 x 5."""
    folder = run / "checkpoints" / checkpoint.name_of(step)
    folder.mkdir(parents=True)
    halves = [{k: v for k, v in TENSORS.items() if k.endswith("/6") == second} for second in (False, True)]
    names = ("rank_00000.safetensors", "rank_00001.safetensors")
    files = {name: write_file(folder / name, part) for name, part in zip(names, halves, strict=True)}
    state = state_of(step, files)
    write_json(folder / "state.json", state | {"crc32": checkpoint.seal(state)})
    return folder


@pytest.fixture(autouse=True)
def no_reader_may_hang():
    """As one that opens a pipe would."""
    signal.alarm(120)
    yield
    signal.alarm(0)


def save(run, step, val_loss=None, keep=2):
    """What the ranks and rank 0 do to save a checkpoint, without an engine."""
    folder, name = run / "checkpoints", checkpoint.name_of(step)
    checkpoint.make_room(folder, name)
    files = {"rank_00000.safetensors": write_file(folder / f"{name}.tmp" / "rank_00000.safetensors", WHOLE)}
    checkpoint.commit(folder, name, state_of(step, files) | {"val_loss": val_loss, "world_size": 1}, False)
    checkpoint.prune(folder, keep)
    return folder / name


def marks(run):
    return tuple(int((run / "checkpoints" / which).read_text()[5:]) for which in ("latest", "best"))


def steps_of(run):
    return [int(path.name[5:]) for path in checkpoint.complete_checkpoints(run / "checkpoints")]


def mark(run, which, step):
    (run / "checkpoints" / which).write_text(checkpoint.name_of(step))


def test_what_is_written_is_safetensors(tmp_path):
    entry = write_file(tmp_path / "a.safetensors", TENSORS)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert entry["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    checkpoint.check_sums(tmp_path, {"a.safetensors": entry})


def test_pieces_are_cut_and_joined_wherever_they_begin(tmp_path):
    """Files of two ranks, 6 and 4 elements, read by any number of ranks."""
    folder = make(tmp_path, 5)
    saved = pieces.SavedPieces(folder, checkpoint.read_state(folder))
    for start in range(10):
        for end in range(start + 1, 11):
            piece = torch.zeros(end - start)
            saved.fill(piece, start, "fp32", "a.weight")
            assert piece.tolist() == list(range(start, end))
    saved.index["a.weight"] = [[1, 6, 4, 4]]  # as if the first file held none of it
    with pytest.raises(UserError, match=r"a\.weight: found 4 of 6 elements; the checkpoint is damaged"):
        saved.fill(torch.zeros(6), 4, "fp32", "a.weight")


def test_find_takes_what_is_marked_and_never_what_is_incomplete(tmp_path):
    assert checkpoint.find(tmp_path) is None
    folders = {step: make(tmp_path, step) for step in (5, 10, 15)}
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_00000025").mkdir()  # no state.json
    assert checkpoint.find(tmp_path) == folders[15], "the newest where nothing is marked"
    mark(tmp_path, "latest", 10)
    mark(tmp_path, "best", 5)
    assert checkpoint.find(tmp_path) == folders[10]
    assert checkpoint.find(tmp_path, "best") == folders[5]
    assert checkpoint.find(tmp_path, "15") == folders[15]
    assert checkpoint.find(folders[5]) == folders[5]
    with pytest.raises(UserError, match=r"no checkpoint '20'; expected latest, best or one of the steps: 5, 10, 15"):
        checkpoint.find(tmp_path, "20")


def test_the_newest_usable_says_what_it_passed_over(tmp_path):
    assert checkpoint.newest_usable(tmp_path) == (None, None, [])
    folders = {step: make(tmp_path, step) for step in (5, 10, 15, 30)}
    mark(tmp_path, "latest", 15)  # 30 was left by an earlier continuation
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir()
    path, state, passed_over = checkpoint.newest_usable(tmp_path)
    unfinished = f"ignored {tmp_path}/checkpoints/step_00000020.tmp: its save was not finished"
    assert path == folders[15] and state["step"] == 15 and passed_over == [unfinished]
    (folders[15] / "rank_00001.safetensors").write_bytes(b"x")
    path, _, passed_over = checkpoint.newest_usable(tmp_path)
    assert path == folders[10] and len(passed_over) == 2
    assert f"ignored {folders[15]}: {folders[15]}/rank_00001.safetensors: 1 bytes, expected" in passed_over[1]
    path, _, passed_over = checkpoint.newest_usable(tmp_path, {folders[10]: "a wrong checksum"})
    assert path == folders[5] and passed_over[2] == f"ignored {folders[10]}: a wrong checksum"
    for folder in (folders[5], folders[10], folders[30]):
        (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint of this run is whole: choose another") as error:
        checkpoint.newest_usable(tmp_path)
    assert "\n" not in str(error.value)


def test_the_first_save_that_was_killed_is_said_and_starts_anew(tmp_path):
    (tmp_path / "checkpoints" / "step_00000020.tmp").mkdir(parents=True)
    path, state, passed_over = checkpoint.newest_usable(tmp_path)
    assert path is state is None and passed_over[0].endswith("step_00000020.tmp: its save was not finished")


def test_pruning_keeps_the_newest_and_what_is_marked(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    mark(tmp_path, "latest", 6)
    mark(tmp_path, "best", 2)
    checkpoint.prune(tmp_path / "checkpoints", 2)
    left = [int(p.name[5:]) for p in checkpoint.complete_checkpoints(tmp_path / "checkpoints")]
    assert left == [2, 5, 6]


@pytest.mark.parametrize("file", ["rank_00000.safetensors", "rank_00001.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "one bit"])
def test_each_damaged_file_is_named_and_an_older_checkpoint_taken(tmp_path, file, damage):
    older, newer = make(tmp_path, 5), make(tmp_path, 10)
    mark(tmp_path, "latest", 10)
    content = bytearray((newer / file).read_bytes())
    if damage == "missing":
        (newer / file).unlink()
    elif damage == "one bit":
        content[len(content) // 2] ^= 0x80
        (newer / file).write_bytes(content)
    else:
        (newer / file).write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.raises(UserError) as error:
        checkpoint.open_weights(newer)
    assert file in str(error.value) and "\n" not in str(error.value)
    path, _, passed_over = checkpoint.newest_usable(tmp_path)
    if path == newer:  # sizes are right: only reading it shows the wrong bit
        path, _, passed_over = checkpoint.newest_usable(tmp_path, {newer: str(error.value)})
    assert path == older and len(passed_over) == 1 and str(newer) in passed_over[0]
    _, _, read = checkpoint.open_weights(older)
    for name in ("a.weight", "b.weight"):  # tied
        assert read(name).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_another_run_is_refused_with_what_differs(tmp_path):
    state, config = checkpoint.read_state(make(tmp_path, 5)), Config()
    checkpoint.check_same_run(tmp_path, state, config)
    del state["config"]["model"]["norm_eps"]  # saved before there was that key
    checkpoint.check_same_run(tmp_path, state, config)
    config.model.n_layer, config.train.seed = 3, 7
    with pytest.raises(UserError, match=r"model.n_layer 12 -> 3; train.seed 1337 -> 7"):
        checkpoint.check_same_run(tmp_path, state, config)
    config.train.allow_changed = ["train.seed"]
    with pytest.raises(UserError, match=r"settings: model.n_layer 12 -> 3; set them back, or start another run with"):
        checkpoint.check_same_run(tmp_path, state, config)
    config.model.n_layer = 12
    checkpoint.check_same_run(tmp_path, state, config)
    config = Config()
    config.train.micro_batch_size, config.train.eval_every = 1, 5
    checkpoint.check_same_run(tmp_path, state, config)  # neither changes what is learned


@pytest.mark.parametrize("content", [{}, [], {"step": 5}, state_of(5, []), state_of("5", {})])
def test_a_damaged_state_is_named(tmp_path, content):
    folder = make(tmp_path, 5)
    write_json(folder / "state.json", content)
    with pytest.raises(UserError, match=r"state.json: no \w+ \(\w+\); the checkpoint is damaged"):
        checkpoint.read_state(folder)


def test_a_wrong_digit_in_the_state_is_no_other_setting(tmp_path):
    file = make(tmp_path, 5) / "state.json"
    file.write_text(file.read_text().replace('"step": 5', '"step": 7'))
    with pytest.raises(UserError, match=r"state.json: its checksum is wrong; the checkpoint is damaged"):
        checkpoint.read_state(file.parent)


# -- killed at any moment ------------------------------------------------------------------------


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
def test_killed_between_any_two_operations_of_a_save_the_next_start_puts_all_right(tmp_path, monkeypatch, step):
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
        checkpoint.restore_replaced(run / "checkpoints")
        found, state, _ = checkpoint.newest_usable(run)
        assert found.name == checkpoint.name_of(state["step"]) and state["step"] in (11, 15, step)
        checkpoint.check_sums(found, state["files"])
        checkpoint.tidy(run / "checkpoints")
        losses = {p: checkpoint.read_state(p)["val_loss"] for p in checkpoint.complete_checkpoints(run / "checkpoints")}
        assert marks(run) == (state["step"], int(min(losses, key=losses.get).name[5:]))
        assert not list((run / "checkpoints").glob("*.tmp")), number
        assert 15 in steps_of(run), "the one that was to be replaced, or the new one"
        # two later saves delete all that is older, but the best
        best = marks(run)[1]
        save(run, 30, 5.0)
        save(run, 35, 6.0)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == ["best", "latest", *(checkpoint.name_of(at) for at in sorted({best, 30, 35}))], number
        number += 1
    assert number > 12 and seen >= {"mkdir", "replace", "rename", "unlink", "fsync"}, (number, seen)


@pytest.mark.parametrize(
    "content", [b"step_0000000\xb5", b"", b"step_00000077", b"../../run", b"step_00000010\0", None]
)
@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_damaged_mark_stops_nobody_and_is_put_right(tmp_path, which, content):
    for step, loss in ((5, 1.0), (10, 2.0), (15, 3.0)):
        save(tmp_path, step, loss, keep=9)
    file = tmp_path / "checkpoints" / which
    file.unlink()
    if content is None:
        (file / "folder").mkdir(parents=True)
    else:
        file.write_bytes(content)
    right = {"latest": 15, "best": 5}[which]
    assert checkpoint.find(tmp_path, which).name == checkpoint.name_of(right)
    assert checkpoint.newest_usable(tmp_path)[1]["step"] == 15
    checkpoint.tidy(tmp_path / "checkpoints")
    assert marks(tmp_path) == (15, 5)
    file.unlink()
    os.mkfifo(file)
    assert checkpoint.find(tmp_path, which).name == checkpoint.name_of(right)
    save(tmp_path, 20, 4.0, keep=9)
    assert marks(tmp_path) == (20, 5)


@pytest.mark.parametrize("wrong", [5, 10])
def test_a_mark_that_names_another_whole_checkpoint_counts_for_nothing(tmp_path, wrong):
    """A flipped bit, or a kill between the rename and the mark."""
    for step, loss in ((5, 2.0), (10, None), (15, 1.0), (20, 3.0)):
        save(tmp_path, step, loss, keep=9)
    mark(tmp_path, "best", wrong)
    mark(tmp_path, "latest", wrong)
    assert checkpoint.find(tmp_path, "best").name == checkpoint.name_of(15)
    assert checkpoint.find(tmp_path).name == checkpoint.name_of(20)


def test_a_run_resumed_from_an_older_checkpoint_deletes_the_stale_ones_and_not_its_own(tmp_path):
    for step, loss in ((10, 3.0), (40, 1.0), (50, 2.0)):
        save(tmp_path, step, loss, keep=9)
    save(tmp_path, 20, 2.9)
    assert checkpoint.find(tmp_path).name == checkpoint.name_of(20)
    assert steps_of(tmp_path) == [10, 20, 40, 50], "as long as it has not saved two of its own"
    assert checkpoint.newest_usable(tmp_path, {tmp_path / "checkpoints/step_00000020": "x"})[1]["step"] == 10
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
    assert checkpoint.Saved(tmp_path / "checkpoints").last_good.name == checkpoint.name_of(3)
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
        checkpoint.find(tmp_path, "3")
    for odd in ("\u00b2", "9" * 5000, "-1", "", "../x"):
        with pytest.raises(UserError, match="no checkpoint '"):
            checkpoint.find(tmp_path, odd)


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


def test_readers_that_lose_the_race_against_a_deletion_take_the_next(tmp_path):
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
            found, read = checkpoint.reading(tmp_path, ("latest", "best")[len(opened) % 2], look)
            assert read("a.weight").flatten().tolist() == list(range(10)), "even if it is deleted meanwhile"
            opened.append(found)
    finally:
        stop.set()
        thread.join()


# -- what a reader opens -------------------------------------------------------------------------


def many_files(run, ranks, elements=640, parameters=("a", "b", "c"), indexed=True):
    """A checkpoint as that many ranks at stage 3 write it, of parameters of so many elements."""
    folder = run / "checkpoints" / checkpoint.name_of(1)
    folder.mkdir(parents=True)
    files, pieces_of = {}, []
    each = -(-elements // ranks)
    for rank in range(ranks):
        own = range(min(elements, rank * each), min(elements, (rank + 1) * each))
        names = [f"{kind}/{name}/{own.start}" for name in parameters for kind in pieces.KINDS] if own else []
        tensors = {name: torch.arange(float(own.start), own.stop) for name in names}
        files[f"rank_{rank:05d}.safetensors"] = write_file(folder / f"rank_{rank:05d}.safetensors", tensors)
        pieces_of.append(pieces.pieces_in({name: len(tensor) for name, tensor in tensors.items()}))
    state = state_of(1, files) | {"parameters": {name: [elements] for name in parameters}, "tied": {}}
    state |= {"pieces": pieces.index_of(pieces_of)} if indexed else {}
    write_json(folder / "state.json", state | {"crc32": checkpoint.seal(state)})
    return folder


@pytest.fixture
def counted(monkeypatch):
    """{"files": names of those opened, one each time; "bytes": read of them} from here on."""
    seen = {"files": [], "bytes": 0}
    opener, read_into = pieces.open_plain_file, pieces.TensorFile.read_into

    def open_plain_file(path):
        seen["files"].append(path.name)
        return opener(path)

    def count(self, offset, out):
        seen["bytes"] += len(memoryview(out))
        read_into(self, offset, out)

    monkeypatch.setattr(pieces, "open_plain_file", open_plain_file)
    monkeypatch.setattr(pieces.TensorFile, "read_into", count)
    return seen


@pytest.mark.parametrize("ranks", [64, 48, 32, 128])
def test_a_rank_opens_only_the_files_that_hold_its_pieces(tmp_path, counted, ranks):
    """A checkpoint of 64 ranks resumed on as many, on fewer and on more: the files opened by each."""
    folder = many_files(tmp_path, 64)
    state = checkpoint.read_state(folder)
    for rank in range(ranks):
        counted["files"].clear()
        saved = pieces.SavedPieces(folder, state)
        each = -(-640 // ranks)
        own = range(min(640, rank * each), min(640, (rank + 1) * each))
        for name in "abc" if own else "":
            for kind in pieces.KINDS:
                part = torch.zeros(len(own))
                saved.fill(part, own.start, kind, name)
                assert part.tolist() == list(own)
        needed = sorted({f"rank_{element // 10:05d}.safetensors" for element in own})
        assert sorted(counted["files"]) == needed, "each once"
    assert len(state["pieces"]["a"]) == 1, "the index does not grow with the ranks"


def test_files_open_at_a_time_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "MOST_OPEN_FILES", 5)
    saved = pieces.SavedPieces(folder := many_files(tmp_path, 64), checkpoint.read_state(folder))
    whole = torch.zeros(640)
    before = len(os.listdir("/proc/self/fd"))
    saved.fill(whole, 0, "fp32", "b")
    assert whole.tolist() == list(range(640)) and len(os.listdir("/proc/self/fd")) <= before + 5


def test_weights_are_read_and_checked_without_the_moments(tmp_path, counted):
    folder = many_files(tmp_path, 4, elements=100_000)
    _, _, read = checkpoint.open_weights(folder)
    for name in "abc":
        assert read(name).tolist() == list(range(100_000))
    assert sorted(counted["files"]) == sorted(path.name for path in folder.glob("rank_*")), "each once"
    weights = 3 * 100_000 * 4
    assert weights < counted["bytes"] < weights + 4 * 4096, "the weights and the headers"


@pytest.mark.parametrize(("kind", "stops"), [("fp32", True), ("exp_avg", False), ("exp_avg_sq", False)])
def test_a_flipped_bit_stops_those_who_read_it(tmp_path, kind, stops):
    folder = many_files(tmp_path, 4)
    file = folder / "rank_00002.safetensors"
    header = json.loads(file.read_bytes()[8 : 8 + (size := int.from_bytes(file.read_bytes()[:8], "little"))])
    content = bytearray(file.read_bytes())
    content[8 + size + header[f"{kind}/b/320"]["data_offsets"][0] + 5] ^= 1
    file.write_bytes(content)
    state, _, read = checkpoint.open_weights(folder)
    assert read("a").tolist() == list(range(640))
    if stops:
        with pytest.raises(
            UserError, match=r"rank_00002.safetensors: fp32/b/320: found checksum \w+, expected \w+; the"
        ):
            read("b")
    else:
        assert read("b").tolist() == list(range(640))
    with pytest.raises(UserError, match=f"rank_00002.safetensors: {kind}/b/320: found checksum"):
        checkpoint.check_sums(folder, state["files"])


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_checkpoint_of_older_code_loads(tmp_path, spoilt):
    """Files without checksums in their headers, one of the whole file in state.json, no index, none of the newer keys;
    the marks say which is the best."""
    for step in (5, 10, 15):
        folder, files = tmp_path / "checkpoints" / checkpoint.name_of(step), {}
        folder.mkdir(parents=True)
        for rank, elements in enumerate((range(6), range(6, 10))):
            part = torch.tensor([float(step + number) for number in elements])
            file = folder / f"rank_{rank:05d}.safetensors"
            names = [f"{kind}/a.weight/{elements.start}" for kind in pieces.KINDS]
            save_file({name: part.clone() for name in names} | {"random/cpu/0": torch.get_rng_state()}, file)
            content = file.read_bytes()
            files[file.name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        state = state_of(step, files) | {"best_val_loss": 2.0}
        write_json(folder / "state.json", state | {"crc32": checkpoint.seal(state)})
    mark(tmp_path, "latest", 10)
    mark(tmp_path, "best", 5)
    assert [checkpoint.find(tmp_path, which).name[-2:] for which in ("latest", "best")] == ["10", "05"]
    if spoilt:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"rank_00001.safetensors: found checksum \w+, expected"):
            checkpoint.open_weights(folder)
        return
    for step, found in ((5, "best"), (10, "latest"), (15, "15")):
        _, _, read = checkpoint.open_weights(checkpoint.find(tmp_path, found))
        assert read("a.weight").flatten().tolist() == [float(step + number) for number in range(10)]
    save(tmp_path, 12, 3.0)
    assert marks(tmp_path) == (12, 5) and checkpoint.newest_usable(tmp_path)[1]["step"] == 12
    save(tmp_path, 14, 1.0)
    assert marks(tmp_path) == (14, 14) and steps_of(tmp_path) == [12, 14]


# -- crafted to do harm --------------------------------------------------------------------------


def deep(levels):
    return {"x": deep(levels - 1)} if levels else 1


CRAFTED = [  # key of state.json, value, or a function of the one that is there
    ("step", -1),
    ("step", 2**70),
    ("step", True),
    ("tokens", -5),
    ("optimizer_steps", 1.5),
    ("world_size", 0),
    ("world_size", 10**12),
    ("stage", 7),
    ("stage", False),
    ("precision", 3),
    ("best_val_loss", "low"),
    ("val_loss", [1]),
    ("save_number", -1),
    ("versions", "new"),
    ("suspect", 1),
    ("data", {"data": 3}),
    ("data", {"data": {"tokenizer": 5}}),
    ("loss_scaler", {"cur_scale": "x"}),
    ("loss_scaler", {"__class__": 1}),
    ("bad_steps", []),
    ("bad_steps", {"loss": ["x"], "gradient norm": [], "skipped": 0, "bad": []}),
    ("bad_steps", {"loss": [], "gradient norm": [], "skipped": 0, "bad": [[1]]}),
    ("tied", {"b.weight": "nowhere"}),
    ("tied", {"b.weight": ["a.weight"]}),
    ("parameters", {"a.weight": "2x5"}),
    ("parameters", {"a.weight": [2, -5]}),
    ("parameters", {"a.weight": [2**40, 2**40]}),
    ("parameters", {"a.weight": [2.0, 5]}),
    ("parameters", {"a.weight": None}),
    ("files", lambda files: {"../../../etc/passwd": files["rank_00000.safetensors"]}),
    ("files", lambda files: {"/etc/passwd": files["rank_00000.safetensors"]}),
    ("files", lambda files: {"/dev/zero": {"bytes": 0, "crc32": "00000000"}}),
    ("files", lambda files: {"state.json": files["rank_00000.safetensors"]}),
    ("files", lambda files: dict.fromkeys(files, 3)),
    ("files", lambda files: {name: {"bytes": "many", "crc32": "00000000"} for name in files}),
    ("files", lambda files: {name: {"bytes": -1, "crc32": "00000000"} for name in files}),
    ("files", lambda files: {name: entry | {"header_crc32": 5} for name, entry in files.items()}),
    ("files", lambda files: {name: {"bytes": entry["bytes"]} for name, entry in files.items()}),
    ("pieces", [1]),
    ("pieces", {"a.weight": 5}),
    ("pieces", {"a.weight": [[0, 0, 6]]}),
    ("pieces", {"a.weight": [[0, 0, 10, 10], [1, 6, 4, 4]]}),
    ("pieces", {"a.weight": [[9, 0, 10, 10]]}),
    ("pieces", {"a.weight": [[0, -4, 10, 10]]}),
    ("pieces", {"a.weight": [[0, 0, 1, 2**50]]}),
    ("pieces", {"a.weight": [[0, 0, 0, 10]]}),
    ("pieces", {"z.weight": [[0, 0, 10, 10]]}),
    ("config", {"model": [], "data": {}, "train": {}}),
    ("config", {"model": {}, "data": {"path": 5}, "train": {}}),
    ("config", {"model": {}, "data": {"path": {"a": "b"}}, "train": {}}),
    ("config", lambda config: config | {"train": config["train"] | {"lr": "1e-3"}}),
    ("config", lambda config: config | {"train": config["train"] | {"max_tokens": 10**400}}),
    ("config", lambda config: config | {"train": config["train"] | {"warmup_tokens": None}}),
    ("config", lambda config: config | {"train": config["train"] | {"global_batch_tokens": [1]}}),
    ("config", lambda config: config | {"train": config["train"] | {"schedule": ["cosine"]}}),
    ("config", deep(50)),
]


@pytest.mark.parametrize(("key", "value"), CRAFTED)
def test_every_field_of_the_state_is_checked_before_it_is_used(tmp_path, key, value):
    """With a right checksum of its own, as one who means harm would write it."""
    folder = make(tmp_path, 5)
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    state[key] = value(state[key]) if callable(value) else value
    write_json(folder / "state.json", state | {"crc32": checkpoint.seal(state)})
    for read in (checkpoint.read_state, checkpoint.open_weights):
        with pytest.raises(UserError, match=rf"^{folder}/state.json: (no )?{key}") as error:
            read(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert checkpoint.find(folder) == folder and checkpoint.find(tmp_path) == folder
    with pytest.raises(UserError, match="no checkpoint of this run is whole"):
        checkpoint.newest_usable(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"\xff\xfe", b'{"a": 1, "a": 2}']
)
def test_a_state_that_is_hard_to_read_is_named(tmp_path, content):
    folder = make(tmp_path, 5)
    (folder / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json: [^\n]+$"):
        checkpoint.open_weights(folder)


@pytest.mark.parametrize("what", ["pipe", "link", "link to a device", "folder", "huge"])
@pytest.mark.parametrize("file", ["rank_00001.safetensors", "state.json"])
def test_only_plain_files_of_the_checkpoint_are_opened(tmp_path, file, what):
    folder = make(tmp_path, 5)
    path = folder / file
    size = path.stat().st_size
    path.rename(tmp_path / "elsewhere")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to(tmp_path / "elsewhere" if what == "link" else "/dev/zero")
    for read in (checkpoint.read_state, checkpoint.open_weights):
        with pytest.raises(UserError, match=rf"{file}: [^\n]+$"):
            read(folder)
    if file != "state.json":
        with pytest.raises(UserError, match=rf"{file}: [^\n]+$"):
            checkpoint.check_sums(folder, {file: {"bytes": size, "header_crc32": "00000000"}})


def header_of(change):
    """A header of two tensors of 10 elements, changed."""
    whole = {
        f"{kind}/a.weight/0": {"dtype": "F32", "shape": [10], "data_offsets": [40 * number, 40 * number + 40]}
        for number, kind in enumerate(("fp32", "exp_avg"))
    }
    whole["__metadata__"] = {"crc32": " ".join([f"{zlib.crc32(bytes(40)):08x}"] * 2)}
    return change(whole)


FIRST = "fp32/a.weight/0"
HEADERS = [
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": [-40, 0]}},
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": [0, 2**60], "shape": [2**58]}},
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": [40, 80]}},
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": [0, 40.0]}},
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": 7}},
    lambda header: header | {FIRST: header[FIRST] | {"shape": [2, 5]}},
    lambda header: header | {FIRST: header[FIRST] | {"shape": [-10]}},
    lambda header: header | {FIRST: header[FIRST] | {"shape": [9]}},
    lambda header: header | {FIRST: header[FIRST] | {"dtype": "F64"}},
    lambda header: header | {FIRST: header[FIRST] | {"dtype": "BF16", "shape": [20]}},
    lambda header: header | {FIRST: 5},
    lambda header: {"fp32": header[FIRST]} | {name: header[name] for name in header if name != FIRST},
    lambda header: {"fp32/a/x": header[FIRST]} | {name: header[name] for name in header if name != FIRST},
    lambda header: {"code/a/0": header[FIRST]} | {name: header[name] for name in header if name != FIRST},
    lambda header: {name: header[name] for name in header if name != FIRST},
    lambda header: header | {"__metadata__": 5},
    lambda header: header | {"__metadata__": {"crc32": "00000000"}},
    lambda header: header | {"__metadata__": {}},
    lambda header: [],
    lambda header: deep(400),
]


@pytest.mark.parametrize("change", HEADERS)
@pytest.mark.parametrize("older_code", [False, True])
def test_a_crafted_header_is_refused(tmp_path, change, older_code):
    folder = save(tmp_path, 5)
    file = folder / "rank_00000.safetensors"
    text = json.dumps(header_of(change)).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(80)
    file.write_bytes(content)
    entry = {"header_crc32": f"{zlib.crc32(content[:-80]):08x}"}
    if older_code:
        entry = {"crc32": f"{zlib.crc32(content):08x}"}
        if header_of(change) and header_of(change).get("__metadata__") == {}:
            pytest.skip("right in older code")
    state = state_of(5, {file.name: {"bytes": len(content)} | entry})
    write_json(folder / "state.json", state | {"crc32": checkpoint.seal(state)})
    with pytest.raises(UserError, match=r"rank_00000.safetensors: its header [^\n]+$"):
        checkpoint.open_weights(folder)


@pytest.mark.parametrize("length", [0, 2**62, 2**64 - 1, 10**9])
def test_a_header_of_an_absurd_size_is_refused(tmp_path, length):
    folder = save(tmp_path, 5)
    file = folder / "rank_00000.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + bytes(100))
    state = state_of(5, {file.name: {"bytes": 108, "header_crc32": "00000000"}})
    write_json(folder / "state.json", state | {"crc32": checkpoint.seal(state)})
    with pytest.raises(UserError, match=r"rank_00000.safetensors: found (a header|checksum) [^\n]+$"):
        checkpoint.open_weights(folder)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", pieces.KINDS)
def test_a_number_that_is_not_finite_is_never_written(tmp_path, kind, spoilt):
    name = f"{kind}/a.weight/0"
    tensors = WHOLE | {name: WHOLE[name].clone()}
    tensors[name][7] = spoilt
    with pytest.raises(UserError, match=f"^{kind} of a.weight holds a NaN or an infinity$"):
        write_file(tmp_path / "a.safetensors", tensors)


@pytest.fixture(scope="module")
def alone():
    """The process group of one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {name: os.environ[name] for name in os.environ if name != "RANK"})
        dist.start_process_group(may_be_alone=True)
        yield
        dist.stop_process_group()


class Unwritable(torch.Tensor):
    """A tensor with which a writer ends by an error of this kind, in the copy or as it is written."""

    def to(self, *_, **__):
        return self if self.at == "write" else self.cpu()

    def cpu(self):
        raise self.error


@pytest.mark.parametrize("at", ["write", "copy"])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("odd"), ValueError("odd"), OSError(28, "full")])
def test_a_writer_that_ends_by_any_error_commits_nothing(tmp_path, monkeypatch, alone, error, background, at, capsys):
    before = save(tmp_path, 5)
    spoilt = torch.arange(10.0).as_subclass(Unwritable)
    spoilt.error, spoilt.at = error, at
    header = {"fp32/a.weight/0": (torch.float32, 10)}
    monkeypatch.setattr(checkpoint, "description", lambda engine: {})
    monkeypatch.setattr(checkpoint, "own_tensors", lambda engine: (header, iter([spoilt])))
    monkeypatch.setattr(checkpoint, "only_on_nvme", lambda engine: False)
    saving = checkpoint.Saving(None, tmp_path / "checkpoints", state_of(10, {}), False, 2, background)
    with pytest.raises(UserError, match=r"step_00000010.tmp/rank_00000.safetensors: could not be written") as raised:
        saving.finish()
    assert ("out of memory" if isinstance(error, MemoryError) else str(error.args[-1])) in str(raised.value)
    assert checkpoint.find(tmp_path) == before and steps_of(tmp_path) == [5]
    assert ("Traceback" in capsys.readouterr().err) == ("odd" in error.args), "a fault of the program can be found"


def test_a_writer_that_says_nothing_commits_nothing(tmp_path, monkeypatch, alone):
    """As one that was ended by what is no Exception."""
    monkeypatch.setattr(checkpoint, "description", lambda engine: {})
    monkeypatch.setattr(checkpoint, "own_tensors", lambda engine: ({}, iter([])))
    monkeypatch.setattr(checkpoint.Saving, "write", lambda *_: None)
    saving = checkpoint.Saving(None, tmp_path / "checkpoints", state_of(10, {}), False, 2)
    with pytest.raises(UserError, match=r"step_00000010.tmp/rank_00000.safetensors: was not written$"):
        saving.finish()
    assert steps_of(tmp_path) == []


def spiked(run, monkeypatch, **settings):
    """BadSteps after a bad step, without an engine, and its train section. What is loaded is found in .loaded."""
    steps = object.__new__(guard.BadSteps)
    steps.bad, steps.fault, steps.loss, steps.engine, steps.loaded = [[0, 3]], "loss 99", 99.0, None, []
    steps.skipped_in_a_row = 1

    def load(engine, path, state, seed, progress=lambda: None):
        progress()
        steps.loaded.append(path)

    monkeypatch.setattr(checkpoint, "load", load)
    return steps, TrainConfig(out_dir=str(run), **settings)


@pytest.mark.parametrize("older_code", [False, True])
def test_a_rollback_makes_progress_with_each_part_that_it_reads(tmp_path, monkeypatch, alone, older_code):
    """Else the watch takes a large checkpoint for a hang."""
    monkeypatch.setattr(pieces, "CHUNK", 16)  # of 3 tensors of 40 bytes
    found = save(tmp_path, 5)
    if older_code:
        file = found / "rank_00000.safetensors"
        files = {file.name: {"bytes": file.stat().st_size, "crc32": f"{zlib.crc32(file.read_bytes()):08x}"}}
        state = state_of(5, files) | {"world_size": 1}
        write_json(found / "state.json", state | {"crc32": checkpoint.seal(state)})
    steps, train = spiked(tmp_path, monkeypatch, bad_step="rollback")
    beats = []
    done = steps.answer(7, train, lambda: beats.append(len(steps.loaded)))
    assert done == f"passed over, and back to the weights of {found}" and steps.loaded == [found]
    assert len(beats) >= 3 * 3 + 1, "for each part, and in loading"


def test_what_all_ranks_find_is_said_by_one(tmp_path, monkeypatch, alone):
    steps, train = spiked(tmp_path, monkeypatch, bad_step="stop")
    for end in (steps.answer, steps.check_end):
        with pytest.raises(SharedError, match=r"none reached the weights; no checkpoint was saved; look"):
            end(7, train)
    found = save(tmp_path, 5, val_loss=float("nan"))
    with pytest.raises(SharedError, match=rf"; the last checkpoint is {found}, and none was saved before those steps;"):
        steps.answer(7, train)
    found = save(tmp_path, 6)
    with pytest.raises(SharedError, match=rf"; the last checkpoint is {found}; look"):
        steps.answer(7, train)
    spoilt = save(tmp_path, 7, val_loss=float("nan"))
    with pytest.raises(SharedError, match=rf"is {spoilt}, the last from before those steps {found}; look"):
        steps.answer(7, train)
    monkeypatch.setattr(guard, "first_not_finite", lambda engine, progress: "fp32 of a.weight")
    steps.loss, (_, skip) = float("nan"), spiked(tmp_path, monkeypatch, bad_step="skip")
    with pytest.raises(SharedError, match=r"fp32 of a\.weight holds a NaN or an infinity"):
        steps.answer(7, skip)
    for path in (tmp_path / "checkpoints").glob("step_*/state.json"):
        path.write_text("{")
    with pytest.raises(SharedError, match="no checkpoint of this run is whole"):
        checkpoint.newest_whole(tmp_path)
    monkeypatch.setattr(checkpoint, "description", lambda engine: {})
    monkeypatch.setattr(checkpoint, "own_tensors", lambda engine: ({}, iter([])))
    monkeypatch.setattr(checkpoint.Saving, "write", lambda saving, *_: setattr(saving, "written", "the disk is full"))
    with pytest.raises(SharedError, match=r"^the disk is full$"):
        checkpoint.save(None, tmp_path / "checkpoints", state_of(10, {}), False, 2)


def test_a_second_choice_of_a_checkpoint_is_rank_0s(tmp_path, monkeypatch):
    """On a network file system one rank may still see a checkpoint that another no longer sees."""
    on_this_rank, on_rank_0 = tmp_path / "as_this_rank_sees_it", tmp_path / "run"
    for step in (5, 10, 15):
        make(on_rank_0, step)
        if step != 10:
            make(on_this_rank, step)
    faults = {on_rank_0 / "checkpoints" / checkpoint.name_of(15): "a wrong checksum"}
    told = []

    def broadcast(values):
        """What rank 0 sends: the first call is rank 0's, which is remembered."""
        if not told:
            told.extend(values)
        values[:] = told

    monkeypatch.setattr(checkpoint.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "1", "WORLD_SIZE": "2"})
    config, answers = Config(), []
    config.train.allow_changed = ["data.path"]
    for rank, folder in enumerate((on_rank_0, on_this_rank)):
        monkeypatch.setattr(checkpoint.distributed, "get_rank", lambda rank=rank: rank)
        config.train.out_dir = str(folder)
        answers.append(checkpoint.where_to_start(config, None, faults))
    assert answers[0] == answers[1] and answers[0][1]["step"] == 10

    told.clear()
    for folder in (on_rank_0 / "checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    for rank, folder in enumerate((on_rank_0, on_this_rank)):
        monkeypatch.setattr(checkpoint.distributed, "get_rank", lambda rank=rank: rank)
        config.train.out_dir = str(folder)
        with pytest.raises(SharedError, match="no checkpoint of this run is whole"):
            checkpoint.where_to_start(config, None, faults)


def test_all_parameters_that_differ_are_named_and_a_long_list_is_cut(tmp_path):
    shapes = {f"p{number}": [number, 2] for number in range(9)}
    checkpoint.refuse_other_parameters(tmp_path, {"parameters": shapes}, dict(shapes))
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/state\.json: q: found none, expected \[3\]; p1: found \[1, 2\], "
    ):
        fewer = {name: shape for name, shape in shapes.items() if name != "p1"} | {"q": [3]}
        checkpoint.refuse_other_parameters(tmp_path, {"parameters": shapes}, fewer)
    with pytest.raises(
        UserError, match=r"p3: found none, expected \[3, 2\]; and 5 more as in the model that model\.py"
    ):
        checkpoint.refuse_other_parameters(tmp_path, {"parameters": {}}, shapes)
