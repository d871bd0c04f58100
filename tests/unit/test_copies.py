"""Copies of checkpoints at fsspec addresses: whole or not there, found again, and what is deleted only after them."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from minzero import checkpoint_folder, copier, restore
from minzero.checkpoint_folder import name_of, prune
from minzero.checkpoint_state import read_state
from minzero.config.sections import TrainConfig
from minzero.copier import Copier, Copying, checksum_of
from minzero.errors import SharedError, UserError
from minzero.files import write_json
from minzero.run_folder import RunFolder
from minzero.store import Store
from tests.helpers.processes import environment
from tests.helpers.s3_server import S3Server, s3  # noqa: F401
from tests.helpers.saved_checkpoints import save, steps_of, write_state

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(params=["memory", "folder", "s3"])
def address(request, tmp_path, monkeypatch):
    if request.param == "memory":
        return f"memory://{secrets.token_hex(4)}/run"
    if request.param == "folder":
        return str(tmp_path / "elsewhere" / "run")
    server = request.getfixturevalue("s3")
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://runs/{secrets.token_hex(4)}"


@pytest.fixture(autouse=True)
def memory_is_allowed(monkeypatch):
    """A run refuses memory://, which would end with the process that copies; here there is one process."""
    opened = restore.open_store

    def open_store(train):
        return Store(train.copy_to) if str(train.copy_to).startswith("memory:") else opened(train)

    monkeypatch.setattr(restore, "open_store", open_store)
    monkeypatch.setattr(restore, "check_same_run", lambda *_: None)  # needs a run's config; test_copies.py of launch


def copy_all(run, address, *names):
    copying = Copying(run, address)
    for name in names or [path.name for path in checkpoint_folder.complete_checkpoints(run / "checkpoints")]:
        copying.add(name)
    while copying.waiting:
        assert copying.step() == 0
    return copying


def fetch_into(run, address, **settings):
    config = SimpleNamespace(train=TrainConfig(out_dir=str(run), copy_to=address, **settings))
    with RunFolder(run, 0) as folder:
        restore.restore(config, folder, 0)


def files_of_all(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_branch_is_not_continued_from_the_copies_of_its_trunk(tmp_path):
    """Nor are they overwritten: the branch has another address, which it finds again where its folder is empty."""
    trunk, there = tmp_path / "trunk", str(tmp_path / "copies")
    begin = save(trunk, 5)
    save(trunk, 10)
    restore.begin_copies(trunk, there)
    copy_all(trunk, there)
    before = files_of_all(there)
    for resume in (trunk, begin):
        with pytest.raises(
            UserError, match=rf"copy_to: {there} holds the copies of a run that did not begin at {resume}"
        ):
            fetch_into(tmp_path / "branch", there, resume=str(resume))
    assert files_of_all(there) == before and not (tmp_path / "branch" / "run_id").exists()

    branch, own = tmp_path / "branch", str(tmp_path / "of_the_branch")
    state = read_state(save(branch, 7)) | {"branch_of": str(begin)}
    write_state(branch / "checkpoints" / name_of(7), state)
    restore.begin_copies(branch, own)
    copy_all(branch, own)
    for number, resume in enumerate((trunk, begin)):
        fetch_into(tmp_path / f"empty{number}", own, resume=str(resume))
        assert checkpoint_folder.find(tmp_path / f"empty{number}").name == name_of(7)
    with pytest.raises(UserError, match="that did not begin at"):
        fetch_into(tmp_path / "another", own, resume=str(trunk / "checkpoints" / name_of(10)))


def test_an_empty_folder_gets_the_newest_copy(tmp_path, address, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (5, 10):
        save(run, step)
    (run / "metrics.jsonl").write_text('{"step": 10, "tokens": 1, "loss": 2.0}\n')
    (run / "reference.safetensors").write_bytes(b"what preference tuning compares with")
    copy_all(run, address)
    fetch_into(other, address)
    assert steps_of(other) == [10]
    assert files_of(other / "checkpoints" / name_of(10)) == files_of(run / "checkpoints" / name_of(10))
    for name in ("metrics.jsonl", "reference.safetensors"):
        assert (other / name).read_bytes() == (run / name).read_bytes()
    assert (other / "checkpoints" / "latest").read_text() == name_of(10)
    assert f"fetched {address}/checkpoints/{name_of(10)}" in capsys.readouterr().out
    fetch_into(other, address)
    assert not capsys.readouterr().out, "nothing newer is there"
    save(run, 15)
    copy_all(run, address)
    fetch_into(other, address)
    assert steps_of(other) == [10, 15]


def test_a_copy_without_a_file_or_with_a_wrong_byte_is_passed_over(tmp_path, address, capsys):
    run = tmp_path / "run"
    for step in (5, 10, 15, 20):
        save(run, step, keep=9)
    copy_all(run, address)
    capsys.readouterr()
    store, rank_file = Store(address), "rank_00000.safetensors"
    store.fs.rm_file(store.path("checkpoints", name_of(20), "state.json"))  # was never finished
    store.fs.rm_file(store.path("checkpoints", name_of(15), rank_file))
    content = bytearray(store.read("checkpoints", name_of(10), rank_file))
    content[-3] ^= 1
    store.write(bytes(content), "checkpoints", name_of(10), rank_file)
    fetch_into(tmp_path / "other", address)
    said = capsys.readouterr().out
    assert steps_of(tmp_path / "other") == [5] and name_of(20) not in said
    assert f"{name_of(15)}: found no {rank_file}" in said and f"{name_of(10)}: " in said and "found checksum" in said
    assert not list((tmp_path / "other" / "checkpoints").glob("*.tmp"))
    store.write(b'{"step": 5', "checkpoints", name_of(5), "state.json")  # cut short
    with pytest.raises(SharedError, match="no copy there is whole"):
        fetch_into(tmp_path / "third", address)


def test_state_json_is_written_last_and_taken_away_first(tmp_path, address, monkeypatch):
    """Whatever call to the store is the last, what is there is a whole copy or none."""
    run = tmp_path / "run"
    save(run, 5)
    first = checksum_of(run / "checkpoints" / name_of(5))
    copy_all(run, address)
    shutil.rmtree(run)
    save(run, 5, val_loss=2.0)  # another checkpoint of the same step
    second = checksum_of(run / "checkpoints" / name_of(5))
    assert first != second
    calls = ["put", "put_file", "pipe_file", "rm_file", "ls"]
    for last in range(20):
        store = Store(address)
        left = [last]

        def limited(name, store=store, left=left):
            call = getattr(store.fs, name)

            def counted(*arguments, **more):
                if left[0] == 0:
                    raise OSError("the machine is gone")
                left[0] -= 1
                return call(*arguments, **more)

            return counted

        with monkeypatch.context() as context:
            for name in calls:
                context.setattr(store.fs, name, limited(name), raising=False)
            try:
                store.copy(run / "checkpoints" / name_of(5))
                break
            except UserError as error:
                assert "the machine is gone" in str(error)
        states = Store(address).states()
        assert name_of(5) not in states or states[name_of(5)]["crc32"] == (first if last == 0 else second)
    assert last > 2 and Store(address).states()[name_of(5)]["crc32"] == second


def test_a_store_that_fails_is_asked_again_after_growing_pauses(tmp_path, capsys):
    run, away = tmp_path / "run", tmp_path / "away"
    save(run, 5)
    away.write_text("a file is in the way")
    copying = Copying(run, str(away / "run"), pauses=(1.0, 3.0))
    copying.add(name_of(5))
    assert [copying.step() for _ in range(4)] == [1, 2, 3, 3]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all(line.startswith("not copied: train.copy_to: ") for line in said)
    away.unlink()
    assert copying.step() == 0 and not copying.waiting
    assert read_state(away / "run" / "checkpoints" / name_of(5))["step"] == 5


def test_the_newest_is_copied_first_and_one_that_is_gone_is_left_out(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (5, 10, 15):
        save(run, step, keep=9)
    copying = Copying(run, str(tmp_path / "away"))
    for step in (5, 10, 15):
        copying.add(name_of(step))
    assert copying.step() == 0 and list(Store(str(tmp_path / "away")).states()) == [name_of(15)]
    shutil.rmtree(run / "checkpoints" / name_of(10))
    assert copying.step() == copying.step() == 0
    assert list(Store(str(tmp_path / "away")).states()) == [name_of(5), name_of(15)]


def test_nothing_is_deleted_before_its_copy_is_whole_unless_the_disk_is_full(tmp_path, monkeypatch, capsys):
    run, copied = tmp_path / "run", set()
    for step in (5, 10, 15, 20):
        save(run, step, keep=9)
    prune(run / "checkpoints", 1, lambda path: path.name in copied)
    assert steps_of(run) == [5, 10, 15, 20]
    copied.add(name_of(10))
    prune(run / "checkpoints", 1, lambda path: path.name in copied)
    assert steps_of(run) == [5, 15, 20] and not capsys.readouterr().out
    free = iter([100, 10**9])  # bytes, before the first and after it
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    prune(run / "checkpoints", 1, lambda path: path.name in copied)
    assert steps_of(run) == [15, 20]
    said = capsys.readouterr().out
    assert said.startswith(f"warning: deleted {run / 'checkpoints' / name_of(5)} before its copy was whole")
    assert len(said.splitlines()) == 1


def wait_until(true, seconds=60):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


def test_the_process_that_copies_says_what_is_whole_and_ends_when_asked(tmp_path):
    run, away = tmp_path / "run", tmp_path / "away"
    save(run, 5)
    process = Copier(run, str(away), [name_of(5)])
    wait_until(lambda: process.is_copied(run / "checkpoints" / name_of(5)))
    save(run, 10)
    assert not process.is_copied(run / "checkpoints" / name_of(10))
    process.add(name_of(10))
    assert list(process.finish(30)) == [] and process.process.returncode == 0
    assert process.is_copied(run / "checkpoints" / name_of(10))
    shutil.rmtree(run / "checkpoints" / name_of(10))
    save(run, 10, val_loss=1.0)
    assert not process.is_copied(run / "checkpoints" / name_of(10)), "another checkpoint of the same step"


def test_a_store_that_fails_at_the_end_is_waited_for_only_so_long(tmp_path):
    run = tmp_path / "run"
    save(run, 5)
    (tmp_path / "away").write_text("in the way")
    process = Copier(run, str(tmp_path / "away" / "run"), [name_of(5)])
    began, beats = time.monotonic(), []
    lines = list(process.finish(4, lambda: beats.append(1)))
    assert 3 < time.monotonic() - began < 20 and len(beats) > 5
    assert "at most 4 s" in lines[0] and "not every checkpoint was copied" in lines[1] and len(lines) == 2


def test_kill_9_during_a_copy_leaves_no_copy_and_the_next_start_makes_it(tmp_path):
    """The process that copies ends with rank 0. A pipe in the place of a file holds up its copy."""
    run, away = tmp_path / "run", tmp_path / "away"
    save(run, 5)
    target = away / "checkpoints" / name_of(5)
    target.mkdir(parents=True)
    os.mkfifo(target / "rank_00000.safetensors")  # opening it waits for a reader
    code = "import sys, time; from minzero.copier import Copier; copier = Copier(*sys.argv[1:3], sys.argv[3:])\n"
    code += "print(copier.process.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(run), str(away), name_of(5)], env=environment(), stdout=subprocess.PIPE
    )
    child = int(parent.stdout.readline())
    wait_until(lambda: (run / copier.RECORD).exists())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    assert Store(str(away)).states() == {} and json.loads((run / copier.RECORD).read_text())["copies"] == {}
    os.unlink(target / "rank_00000.safetensors")
    process = Copier(run, str(away), [name_of(5)])
    assert list(process.finish(30)) == [] and read_state(target)["step"] == 5


def test_two_runs_that_begin_with_one_address_do_not_mix(tmp_path, address, capsys):
    """Before the first has a copy there. The second has the address, and the first says so and copies no more."""
    first, second = tmp_path / "first", tmp_path / "second"
    for number, run in enumerate((first, second)):
        run.mkdir()
        assert restore.begin_copies(run, address) is None
        save(run, 5 * (number + 1))
    assert (first / "run_id").read_bytes() != (second / "run_id").read_bytes()
    copy_all(second, address)
    copying = Copying(first, address)
    copying.add(name_of(5))
    assert copying.step() > 0
    assert f"train.copy_to: {address} belongs to another run now; choose another" in capsys.readouterr().out
    assert sorted(Store(address).states()) == [name_of(10)]
    with pytest.raises(UserError, match="holds the copies of another run"):
        fetch_into(first, address)


def test_a_copy_that_is_not_what_it_says_is_made_again(tmp_path):
    """Files that are gone or shorter, and bytes that `restore` has found changed."""
    run, there = tmp_path / "run", tmp_path / "there"
    for step in (5, 10, 15):
        save(run, step, keep=9)
    copy_all(run, str(there))
    files = {step: there / "checkpoints" / name_of(step) / "rank_00000.safetensors" for step in (5, 10, 15)}
    whole = {step: file.read_bytes() for step, file in files.items()}
    files[5].unlink()
    files[10].write_bytes(whole[10][:-1])
    files[15].write_bytes(whole[15][:-1] + b"?")
    process = Copier(run, str(there), [name_of(step) for step in files], damaged=[name_of(15)])
    assert list(process.finish(30)) == []
    assert {step: file.read_bytes() for step, file in files.items()} == whole
    files[15].write_bytes(whole[15][:-1] + b"?")
    other = tmp_path / "other"
    config = SimpleNamespace(train=TrainConfig(out_dir=str(other), copy_to=str(there)))
    with RunFolder(other, 0) as folder:
        restore.restore(config, folder, 0)
        assert folder.damaged_copies == [name_of(15)]
    assert steps_of(other) == [10]


def test_a_path_with_signs_of_patterns(tmp_path):
    run = tmp_path / "run"
    save(run, 5)
    (tmp_path / "copies1x/checkpoints" / name_of(7)).mkdir(parents=True)
    (tmp_path / "copies1x/checkpoints" / name_of(7) / "state.json").write_text("{}")
    for number, name in enumerate(("copies[lr=1]", "copies?x", "copies*", "co{1,2}", "sp ace#%20")):
        copy_all(run, str(tmp_path / name))
        assert sorted(Store(str(tmp_path / name)).states()) == [name_of(5)]
        fetch_into(tmp_path / f"other{number}", str(tmp_path / name))
        assert steps_of(tmp_path / f"other{number}") == [5]


def test_after_a_damaged_copy_comes_one_of_the_same_continuation(tmp_path):
    """Not the newest of the one that was given up."""
    run, there = tmp_path / "run", tmp_path / "there"
    for step in (10, 20, 30, 40, 20):  # continued from 10
        save(run, step, keep=9)
        copy_all(run, str(there), name_of(step))
    config = SimpleNamespace(train=TrainConfig(out_dir=str(tmp_path / "other"), copy_to=str(there)))
    names = restore.copies_to_try(config, Store(str(there)))
    assert names == [name_of(step) for step in (20, 10, 40, 30)]


def test_copies_of_another_run_are_left_alone(tmp_path, address):
    run, other = tmp_path / "run", tmp_path / "other"
    save(run, 5)
    assert restore.begin_copies(run, address) is None
    copy_all(run, address)
    fetch_into(run, address)
    save(other, 5)
    with pytest.raises(UserError, match="holds the copies of another run"):
        fetch_into(other, address)
    with pytest.raises(UserError, match="already holds the copies of a run"):
        fetch_into(tmp_path / "third", address, resume="never")
    fetch_into(tmp_path / "fourth", address)  # an empty folder continues it
    assert (tmp_path / "fourth" / "run_id").read_bytes() == (run / "run_id").read_bytes()


@pytest.mark.parametrize(
    "given, expected",
    [
        ("s4://bucket/run", "Protocol not known: s4; expected a folder, or an address as s3://bucket/run"),
        ("hdfs://host/run", "needs a package that is not installed"),
        ("memory://run", "ends with the process"),
        ("{out}", "is in or around train.out_dir"),
        ("{out}/copies", "is in or around train.out_dir"),
    ],
)
def test_addresses_that_cannot_hold_copies(tmp_path, given, expected, monkeypatch):
    monkeypatch.undo()
    if given.startswith("hdfs"):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "fsspec.implementations.arrow", None)
    train = TrainConfig(out_dir=str(tmp_path / "run"), copy_to=given.format(out=tmp_path / "run"))
    with pytest.raises(UserError, match=r"train\.copy_to") as error:
        restore.open_store(train)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_an_empty_folder_is_not_begun_anew_while_the_store_does_not_answer(tmp_path, capsys):
    run, away = tmp_path / "run", tmp_path / "away"
    (away / "run_id").mkdir(parents=True)  # cannot be read as a file
    with pytest.raises(UserError, match=r"train\.copy_to"):
        fetch_into(run, str(away))
    save(run, 5)
    fetch_into(run, str(away))
    assert "the run continues from what is in" in capsys.readouterr().out


def test_state_json_that_names_files_elsewhere_is_refused(tmp_path, capsys):
    """What a store holds is not trusted."""
    run, away = tmp_path / "run", tmp_path / "away"
    path = save(run, 5)
    copy_all(run, str(away))
    state = read_state(path)
    state["files"] = {"../../evil": state["files"]["rank_00000.safetensors"]}
    write_state(away / "checkpoints" / name_of(5), state)
    with pytest.raises(SharedError, match="no copy there is whole"):
        fetch_into(tmp_path / "other", str(away))
    assert "expected names as rank_00000.safetensors" in capsys.readouterr().out
    write_json(away / "checkpoints" / name_of(5) / "state.json", [1])
    fetch_into(tmp_path / "third", str(away))  # no state at all: there is nothing to fetch
    assert not (tmp_path / "third").exists()


def test_s3_that_is_gone_for_a_while(tmp_path, monkeypatch, capsys):
    pytest.importorskip("flask")
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    server = S3Server()
    try:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # one that knows another server's address
        run = tmp_path / "run"
        save(run, 5)
        copying = copy_all(run, "s3://runs/a")
        server.stop()
        save(run, 10)
        copying.add(name_of(10))
        assert (
            copying.step() == copier.PAUSES[0] and "not copied: train.copy_to: s3://runs/a" in capsys.readouterr().out
        )
        server.start()  # empty
        assert copying.step() == 0
        fetch_into(tmp_path / "other", "s3://runs/a")
        assert steps_of(tmp_path / "other") == [10]
        with pytest.raises(UserError, match="specified bucket does not exist"):
            restore.begin_copies(tmp_path / "other", "s3://nowhere/a")
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
