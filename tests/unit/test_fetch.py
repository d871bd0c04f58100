"""Models opened from an address of train.copy_to: s3://bucket/run, a folder."""

import json
import re
import shutil
import sys

import pytest
import torch

import eval as evaluation
import export
import sample
from minzero import checkpoint, checkpoint_folder, fetch
from minzero.checkpoint_folder import name_of
from minzero.copier import Copying
from minzero.errors import UserError
from minzero.store import Store
from minzero.trained import load, load_model, open_trained
from tests.helpers.s3_server import s3  # noqa: F401
from tests.helpers.saved_checkpoints import WHOLE, save
from tests.helpers.trained_runs import GPT2, write_data, write_run


def copy_all(run, address):
    copying = Copying(run, address)
    for path in checkpoint_folder.complete_checkpoints(run / "checkpoints"):
        copying.add(path.name)
    while copying.waiting:
        assert copying.step() == 0
    return address


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with one checkpoint at step 5, and its model."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", write_run(folder / "run", GPT2, write_data(folder / "data"))


@pytest.fixture(params=["memory", "file", "s3"])
def address(request, tmp_path, monkeypatch):
    if request.param == "memory":
        return f"memory://{tmp_path.name}/run"
    if request.param == "file":
        return f"file://{tmp_path}/elsewhere/run"
    server = request.getfixturevalue("s3")
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://runs/{tmp_path.name}"


def test_a_model_is_opened_from_an_address(address, trained):
    run, model = trained
    copy_all(run, address)
    for name in (address, f"{address}/", f"{address}/checkpoints/{name_of(5)}"):
        source = open_trained(name)
        assert source.description == f"{address}/checkpoints/{name_of(5)}"
        found = dict(load_model(source).cpu().named_parameters())
        assert all(torch.equal(found[key], parameter) for key, parameter in model.named_parameters())
    model, tokenizer = load(address)
    assert tokenizer is not None


def said(main, capsys, *words):
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def test_the_commands_say_the_same_of_a_run_and_of_its_copies(address, trained, tmp_path, capsys):
    run, _ = trained
    copy_all(run, address)
    words = ("--prompt", "abc", "--tokens", 5)
    assert said(sample.main, capsys, address, *words) == said(sample.main, capsys, run, *words)
    result = said(evaluation.main, capsys, address, "--json")
    assert result.replace(address, str(run)) == said(evaluation.main, capsys, run, "--json")
    for number, path in enumerate((address, run)):
        done = said(export.main, capsys, path, tmp_path / f"hf{number}")
        assert done.startswith(f"{path}/checkpoints/{name_of(5)} -> ")
    names = sorted(path.name for path in (tmp_path / "hf0").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "hf1").iterdir()) and "loss.png" in names
    weights = [(tmp_path / f"hf{number}" / "model.safetensors").read_bytes() for number in (0, 1)]
    assert weights[0] == weights[1]


def test_a_folder_of_copies_is_read_where_it_lies(trained, tmp_path, capsys):
    away = copy_all(trained[0], str(tmp_path / "away"))
    assert open_trained(away).path == tmp_path / "away/checkpoints" / name_of(5)
    assert open_trained(f"file://{away}").path == tmp_path / "away/checkpoints" / name_of(5)


def test_weights_alone_are_fetched(tmp_path, monkeypatch):
    """The moments stay holes: nothing reads them, and their bytes are not asked for."""
    monkeypatch.setattr(fetch, "GAP", 0)
    asked = []
    read = Store.read_ranges
    monkeypatch.setattr(
        Store, "read_ranges", lambda self, path, ranges: asked.extend(ranges) or read(self, path, ranges)
    )
    run = tmp_path / "run"
    path = save(run, 5)
    address = copy_all(run, f"memory://{tmp_path.name}/run")
    found = fetch.fetch_checkpoint(address, "best")
    read_weight = checkpoint.open_weights(found)[2]
    assert torch.equal(read_weight("a.weight").flatten(), WHOLE["fp32/a.weight/0"])
    content = (path / "rank_00000.safetensors").read_bytes()
    fetched = (found / "rank_00000.safetensors").read_bytes()
    assert len(fetched) == len(content) and fetched[:-80] == content[:-80], "the header and 10 weights of 4 bytes"
    assert fetched[-80:] == bytes(80) != content[-80:], "two moments of each"
    assert sum(end - begin for begin, end in asked) == len(content) - 80


def test_best_latest_and_a_step(tmp_path, capsys):
    run = tmp_path / "run"
    for step, loss in ((5, 2.0), (10, 1.0), (15, 3.0)):
        save(run, step, loss, keep=9)
    address = copy_all(run, f"memory://{tmp_path.name}/run")
    for which, step in (("best", 10), ("latest", 15), ("5", 5)):
        assert fetch.fetch_checkpoint(address, which).name == name_of(step)
    with pytest.raises(UserError, match=rf"^path: {address}: no checkpoint '7'; .* steps: 5, 10, 15$"):
        fetch.fetch_checkpoint(address, "7")


def damage(store, step, place=-90):
    """Change a byte of a weight."""
    name = ("checkpoints", name_of(step), "rank_00000.safetensors")
    content = bytearray(store.read(*name))
    content[place] ^= 1
    store.write(bytes(content), *name)


def test_a_damaged_copy_is_named_and_another_taken(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (5, 10, 15, 20):
        save(run, step, keep=9)
    address = copy_all(run, f"memory://{tmp_path.name}/run")
    store = Store(address)
    store.fs.rm_file(store.path("checkpoints", name_of(20), "state.json"))  # was never finished
    store.fs.rm_file(store.path("checkpoints", name_of(15), "rank_00000.safetensors"))
    damage(store, 10)
    capsys.readouterr()
    assert fetch.fetch_checkpoint(address, "latest").name == name_of(5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"ignored {address}/checkpoints/step_") for line in lines)
    assert "found no rank_00000.safetensors" in lines[0] and "found checksum" in lines[1]
    with pytest.raises(UserError, match="found checksum"):
        fetch.fetch_checkpoint(address, "10")
    damage(store, 5)
    with pytest.raises(UserError, match=rf"^path: {address}: found no whole checkpoint there"):
        fetch.fetch_checkpoint(address, "latest")


@pytest.mark.parametrize(
    "given, expected",
    [
        (
            "s4://bucket/run",
            "path: s4://bucket/run: ValueError: Protocol not known: s4; expected a folder, or an address",
        ),
        ("gs://bucket/run", "path: gs://bucket/run: needs a package that is not installed"),
        ("memory://none/run", "path: memory://none/run: found no whole checkpoint there; expected what train.copy_to"),
        ("file:///none/run", "path: file:///none/run: found no whole checkpoint there; expected what train.copy_to"),
        ("s3://none/run", "path: s3://none/run: found no whole checkpoint there"),
    ],
)
def test_addresses_without_a_model(given, expected, monkeypatch, request):
    if given.startswith("s3"):
        for name, value in request.getfixturevalue("s3").variables.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for command in (sample.main, evaluation.main):
        with pytest.raises(UserError, match=f"^{re.escape(expected)}") as error:
            command([given])
        assert "\n" not in str(error.value)


def test_copies_of_older_code_are_fetched_whole(trained, tmp_path):
    """Their files have one checksum each."""
    old = shutil.copytree("tests/data/run_of_e029d1a/run", tmp_path / "old")
    (path,) = checkpoint_folder.complete_checkpoints(old / "checkpoints")
    assert "header_crc32" not in json.dumps(json.loads((path / "state.json").read_text())["files"])
    address = copy_all(old, f"memory://{tmp_path.name}/run")
    source, ours = open_trained(address), open_trained(old)
    for name in ("token_embedding.weight", "final_norm.weight"):
        read, expected = source.load()(name), ours.load()(name)
        assert torch.equal(read, expected)
