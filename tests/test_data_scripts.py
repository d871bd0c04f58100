"""The prepare scripts: what each of them is set to, and where its shards go."""

import ast
import importlib
import os
import sys
from pathlib import Path

import pytest

from minzero.data import pipeline
from minzero.errors import UserError
from tests.conftest import ROOT

SCRIPTS = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))


def script_of(name):
    return importlib.import_module(f"data.{name}.prepare").script


@pytest.fixture
def copy(tmp_path):
    """Another copy of the repository, as far as it is known by its files."""
    folder = tmp_path / "copy"
    (folder / "minzero").mkdir(parents=True)
    (folder / "data" / "text").mkdir(parents=True)
    for name in ("train.py", "model.py"):
        (folder / name).write_text("")
    (tmp_path / "a.txt").write_text("text " * 100)
    return folder


@pytest.mark.parametrize("below", [".", "data", "data/text"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_called_in_another_copy_of_the_repository_asks_for_out(copy, monkeypatch, name, below):
    monkeypatch.chdir(copy / below)
    script = script_of(name)
    monkeypatch.setattr(script, "documents", lambda args: pytest.fail("opened"))
    with pytest.raises(UserError, match=r"^--out: none given; ") as caught:
        script.main(["--input", str(copy.parent / "a.txt"), "--tokenizer", "bytes"])
    message = str(caught.value)
    assert str(ROOT) in message and str(copy) in message and "\n" not in message
    assert sorted(os.listdir(copy / "data" / "text")) == []


def test_with_out_it_writes_there(copy, monkeypatch):
    monkeypatch.chdir(copy)
    flags = ["--input", "../a.txt", "--tokenizer", "bytes", "--workers", "1", "--val_fraction", "0"]
    script_of("text").main([*flags, "--out", "data/text"])
    assert (copy / "data" / "text" / "meta.json").exists()


def test_elsewhere_the_shards_go_into_the_scripts_folder(copy, monkeypatch):
    for place in (ROOT, ROOT / "data" / "stdlib", copy.parent):
        monkeypatch.chdir(place)
        out = pipeline.options("", ROOT / "data" / "text").parse_args([]).out
        assert out == Path(os.path.relpath(ROOT / "data" / "text"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_loads_nothing_that_takes_seconds_before_it_runs(name):
    """As in test_commands: so that a Ctrl-C meets `begin`, which is the first thing that `run` calls."""
    loaded = set()
    for file in (ROOT / "data" / name / "prepare.py", ROOT / "minzero" / "data" / "scripts.py"):
        for line in ast.parse(file.read_text()).body:
            if isinstance(line, ast.Import):
                loaded |= {alias.name for alias in line.names}
            elif isinstance(line, ast.ImportFrom):
                loaded.add(line.module)
    assert {module for module in loaded if module.split(".")[0] not in sys.stdlib_module_names} == {
        "minzero.commands",
        "minzero.data.scripts",
    }


DEFAULTS = {  # script: tokenizer, val_fraction, column, vocab_size, loss_mask
    "chat": ("gpt2", 0.02, "conversation", None, True),
    "fineweb_edu": ("gpt2", 0.0005, "text", None, False),
    "openwebtext": ("gpt2", 0.0005, "text", None, False),
    "oscar": ("gpt2", 0.0005, "text", None, False),
    "shakespeare": ("gpt2", 0.1, "text", None, False),
    "shakespeare_char": (None, 0.1, "text", None, False),
    "simplewiki": ("gpt2", 0.005, "text", None, False),
    "stdlib": (None, 0.05, "text", 4096, False),
    "text": ("gpt2", 0.05, "text", None, False),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults(tmp_path, monkeypatch, name):
    """A changed default would make other data, or refuse to continue what an earlier version has begun."""
    script = script_of(name)
    taken = []
    monkeypatch.setattr(script, "documents", taken.append)
    monkeypatch.setattr(script, "own_tokenizer", lambda documents, args: None)
    monkeypatch.setattr(pipeline, "prepare", lambda *given: taken.append(given))
    script.main(["--out", str(tmp_path)])
    args, (_, tokenizer, _, _, loss_mask) = taken
    tokenizer_, val_fraction, column, vocab_size, with_loss_mask = DEFAULTS[name]
    assert (tokenizer, args.val_fraction, args.column) == (tokenizer_, val_fraction, column)
    assert (getattr(args, "vocab_size", None), loss_mask) == (vocab_size, with_loss_mask)
