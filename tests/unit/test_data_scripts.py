"""The prepare scripts: what each of them is set to, their flags, and where their shards go."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minzero.data import pipeline
from minzero.data.shards import TokenStream
from minzero.errors import UserError
from tests.helpers.data_sets import BYTES, TEXTS, command, jsonl, meta_of, run, write_parquet, zstd
from tests.helpers.processes import ROOT, environment

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


def test_a_link_to_a_copy_is_that_copy(copy, monkeypatch):
    (copy.parent / "link").symlink_to(copy)
    (copy.parent / "disk").mkdir()
    (copy / "data" / "linked").symlink_to(copy.parent / "disk")
    monkeypatch.chdir(copy)
    for name in ("text", "linked"):
        out = pipeline.options("", copy.parent / "link" / "data" / name).parse_args([]).out
        assert os.path.samefile(out, copy / "data" / name)
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"^--out: none given; "):
        pipeline.options("", copy / "data" / "linked").parse_args([])


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
        "minzero.errors",
        "minzero.data.scripts",
    }


DEFAULTS = {  # script: tokenizer, val_fraction, column, vocab_size, loss_mask
    "chat": ("gpt2", 0.02, "conversation", None, True),
    "fineweb_edu": ("gpt2", 0.0005, "text", None, False),
    "openwebtext": ("gpt2", 0.0005, "text", None, False),
    "oscar": ("gpt2", 0.0005, "text", None, False),
    "shakespeare": ("gpt2", 0.1, "text", None, False),
    "preferences": ("gpt2", 0.02, "messages", None, True),
    "shakespeare_char": (None, 0.1, "text", None, False),
    "simplewiki": ("gpt2", 0.005, "text", None, False),
    "python": (None, 0.05, "text", 1024, False),
    "stdlib": (None, 0.05, "text", 4096, False),
    "stdlib_preferences": ("data/stdlib/tokenizer", 0.05, "messages", None, True),
    "stdlib_chat": ("data/stdlib/tokenizer", 0.05, "messages", None, True),
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


# -- each script ---------------------------------------------------------------------------------


WIKIPEDIA = {"id": ["1", "2"] * 30, "url": ["u"] * 60, "title": ["t"] * 60}
FINEWEB = {"id": ["i"] * 60, "dump": ["d"] * 60, "url": ["u"] * 60, "file_path": ["p"] * 60, "language": ["en"] * 60}
FINEWEB |= {"language_score": [0.9] * 60, "token_count": [3] * 60, "score": [3.1] * 60, "int_score": [3] * 60}


@pytest.mark.parametrize(
    ("name", "file", "more"),
    [
        ("openwebtext", "a.parquet", {}),
        ("oscar", "a.parquet", {"id": list(range(60))}),
        ("simplewiki", "a.parquet", WIKIPEDIA),
        ("fineweb_edu", "a.parquet", FINEWEB),
        ("oscar", "a.jsonl.zst", {}),
        ("text", "a.txt", {}),
        ("shakespeare", "input.txt", {}),
        ("shakespeare_char", "input.txt", {}),
        ("stdlib", "lib/b.py", {}),
    ],
)
def test_each_script_on_a_file_of_its_sources_schema(tmp_path, name, file, more):
    texts, path = TEXTS[3:63], tmp_path / file
    path.parent.mkdir(exist_ok=True)
    flags = ["--tokenizer", "bytes"]
    if path.suffix == ".parquet":
        write_parquet(path, texts, **more)
    elif path.suffix == ".zst":  # OSCAR's own files since 2023 name the column so
        path.write_bytes(zstd(jsonl(texts, "content")))
        flags += ["--column", "content"]
    else:
        path.write_text("".join(texts))
        texts = ["".join(texts)]
    if name == "shakespeare_char":
        flags = []
    given = path.parent if name == "stdlib" else path
    result = run(name, "--input", given, "--out", tmp_path / "out", "--workers", 1, *flags, "--val_fraction", 0.25)
    assert result.returncode == 0, result.stderr
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert sum(split["bytes"] for split in meta["splits"].values()) == sum(len(text.encode()) for text in texts)
    if name.startswith("shakespeare"):  # cut by place, not by document
        train, val = (TokenStream(tmp_path / "out", split, 8) for split in ("train", "val"))
        assert abs(val.tokens / (val.tokens + train.tokens) - 0.25) < 0.02
    if name == "shakespeare_char":
        assert meta["vocab_size"] == len(set(texts[0])) + 1


def test_tiny_shakespeare_has_nanogpts_tokens(tmp_path, shared):
    """1,003,854 and 111,540 characters and 65 letters, as nanoGPT counts them, and an end of text each."""
    text = shared / "text" / "tinyshakespeare.txt"
    assert run("shakespeare_char", "--input", text, "--out", tmp_path, "--workers", 1).returncode == 0
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert [meta["splits"][split]["tokens"] for split in ("train", "val")] == [1_003_855, 111_541]
    assert meta["vocab_size"] == 66


@pytest.mark.parametrize("name", ["openwebtext", "oscar", "simplewiki", "fineweb_edu"])
def test_no_network_is_one_line_with_the_remedy(tmp_path, name):
    offline = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    flags = ["--out", tmp_path / "out", "--tokenizer", "bytes"]
    result = subprocess.run(command(name, *flags), env=offline, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "--input" in result.stderr, result.stderr


def test_text_needs_input(tmp_path):
    result = run("text", "--out", tmp_path)
    assert result.returncode == 2 and "--input: none given" in result.stderr


def test_every_data_set_has_a_readme():
    for script in (ROOT / "data").glob("*/prepare.py"):
        readme = (script.parent / "readme.md").read_text()
        for word in ("Source", "Licence", "Size", "Tokens", f"python data/{script.parent.name}/prepare.py"):
            assert word in readme, f"{script.parent.name}: {word}"


# -- flags and paths -----------------------------------------------------------------------------


PATHS = ["file", "file/below", "x" * 300, "broken", os.fsdecode(b"caf\xe9"), "pipe"]


@pytest.mark.parametrize("out", PATHS, ids=ascii)
@pytest.mark.parametrize("command", ["text", "shakespeare_char", "train_tokenizer"])
def test_an_out_that_can_be_no_folder_is_refused_before_any_work(tmp_path, command, out, capsys, monkeypatch):
    from minzero.commands import run_command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text " * 100)
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    flags = ["--input", "file", "--out", out]
    if command == "train_tokenizer":
        flags += ["--vocab_size", "258"]
        monkeypatch.setattr("data.train_tokenizer.train_tokenizer", lambda *_: 1 / 0)
    module = "data.train_tokenizer" if command == "train_tokenizer" else f"data.{command}.prepare"
    with pytest.raises(SystemExit) as ended:
        run_command(
            importlib.import_module(module).main, flags + (["--tokenizer", "bytes"] if command == "text" else [])
        )
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "--out: " in error, error
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_text() == "text " * 100


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--limit", "1" + "0" * 30], "--limit: found 1000"),
        (["--val_fraction", "nan"], "--val_fraction: found nan"),
        (["--input", ""], "matches no file"),
        (["--input", "x" * 300], "matches no file"),
        (["--input", os.fsdecode(b"\xff")], "matches no file"),
        (["--tokenizer", "x" * 300], "is neither"),
        (["--tokenizer", ""], "is neither"),
        (["--tokenizer", os.fsdecode(b"\xff")], "is neither"),
        (["--tokenizer", "a\0b"], "is neither"),
        (["--input", "a\0b"], "NUL"),
        (["--out", "a\0b"], "NUL"),
    ],
    ids=lambda part: ascii(part)[:40],
)
def test_absurd_values_of_flags_are_one_line(tmp_path, flags, words, monkeypatch, capsys):
    from data.text import prepare as text
    from minzero.commands import run_command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text " * 100)
    given = {"--input": "a.txt", "--out": "out", "--tokenizer": "bytes"} | dict(
        zip(flags[::2], flags[1::2], strict=True)
    )
    with pytest.raises(SystemExit) as ended:
        run_command(text.main, [word for pair in given.items() for word in pair])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_costs_no_data(tmp_path):
    """prepare.py ... | head -1: the shards are whole whatever became of what it says."""
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 2000)
    command = [
        sys.executable,
        ROOT / "data/text/prepare.py",
        "--input",
        tmp_path / "a.jsonl",
        "--out",
        tmp_path / "out",
    ]
    command = " ".join(map(str, [*command, *BYTES]))
    done = subprocess.run(f"{command} 2>&1 | true; {command}", shell=True, capture_output=True, text=True, timeout=60)
    assert meta_of(tmp_path / "out")["splits"]["train"]["documents"] > 0, done.stderr


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py")))
def test_where_the_shards_go_is_looked_at_before_the_source(tmp_path, monkeypatch, name):
    """A download or a learned tokenizer would be for nothing."""
    command = importlib.import_module(f"data.{name}.prepare")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(command.script, "documents", lambda args: pytest.fail("opened"))
    refused = r"^--out: .*could not be written \(Not a directory\); choose another --out$"
    for out, words in (("file", refused), ("file/below", refused), ("", "^--out: .*expected a path")):
        flags = ["--input", str(tmp_path / "file"), "--out", out and str(tmp_path / out)]
        with pytest.raises(UserError, match=words):
            command.main(flags)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
