"""What a preparation is given: files that it passes over, splits far from what was asked, documents that are no use,
texts that the tokenizer cannot take at once, flags and paths that lead nowhere."""

import contextlib
import gzip
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from minzero.data import encode, pipeline, sources, tokenizer
from minzero.data.conversations import Conversations
from minzero.data.documents import BadDocument
from minzero.data.local_files import Files
from minzero.data.shards import TokenStream
from minzero.data.tokenizer import cut_long_runs, load_tokenizer
from minzero.errors import UserError
from tests.conftest import ROOT
from tests.test_data_pipeline import contents, ended_by, in_a_child, killed_before_each_operation, prepare, run

BYTES = ["--tokenizer", "bytes", "--workers", 1]


def text_of(folder, split):
    stream = TokenStream(folder, split, 1)
    return load_tokenizer("bytes").decode(stream.read(0, stream.tokens).tolist())


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def one_error(result):
    """The one line of a command that ended with code 2."""
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if "error: " in line]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


# -- which files ---------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """A folder with files of every kind, links in circles, a pipe and a broken link."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.TXT"):
        (folder / name).write_text(f"text {name}\n")
    (folder / "c.JSONL").write_text('{"text": "row"}\n')
    parquet.write_table(pyarrow.table({"text": ["column"]}), folder / "d.Parquet")
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"text gz\n"))
    (folder / "f.TXT.ZST").write_bytes(pyarrow.compress(b"text zst\n", codec="zstd", asbytes=True))
    for name in ("1.md", "2.md", "deep/3.md", "4.py", "noname", "g.md.gz"):
        (folder / name).write_bytes(gzip.compress(b"md gz\n") if name.endswith("gz") else f"other {name}\n".encode())
    os.mkfifo(folder / "pipe.txt")
    (folder / "broken.txt").symlink_to("nowhere")
    for name in ("loop", "deep/loop"):
        (folder / name).symlink_to(folder)
    return folder


def test_a_folder_says_what_it_passes_over_and_takes_suffixes_of_any_case(mixed, tmp_path):
    files = Files(str(mixed))
    assert [text for _, text in files] == [
        "text a.txt\n",
        "row",
        "column",
        "text deep/b.TXT\n",
        "text gz\n",
        "text zst\n",
    ]
    for words in ("read 6 files", ".txt 2", "passed over 10", ".md 3", ".py 1", "links to folders 2", "a pipe 1"):
        assert words in files.summary
    result = run("text", "--input", mixed, "--out", tmp_path / "out", *BYTES)
    assert result.returncode == 0 and files.summary in result.stdout, result.stderr
    trained = tmp_path / "tok"
    command = [sys.executable, "data/train_tokenizer.py", "--input", mixed, "--vocab_size", "258", "--out", trained]
    result = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert files.summary in result.stdout, result.stderr


def test_a_glob_or_a_name_reads_other_files_as_text(mixed):
    def found(*patterns):
        return [text for _, text in Files([str(mixed / pattern) for pattern in patterns])]

    assert found("**/*.md") == ["other 1.md\n", "other 2.md\n", "other deep/3.md\n"]
    assert found("*.md", "4.py", "noname", "g.md.gz") == [
        "other 1.md\n",
        "other 2.md\n",
        "other 4.py\n",
        "md gz\n",
        "other noname\n",
    ]
    (mixed / "h[1].md").write_text("brackets")
    assert found("h[1].md") == ["brackets"]
    for name, content in (("x.bin", b"a\0b"), ("y.pdf", b"%PDF \xff\xfe")):
        (mixed / name).write_bytes(content)
        with pytest.raises(BadDocument, match=rf"{name}.*UTF-8|{name}.*UnicodeDecodeError"):
            found(name)


def test_an_input_in_a_folder_that_is_not_there_is_refused_with_the_nearest_that_is(tmp_path):
    for below in ("gone/a.txt", "gone/further/*.txt", "gone/**/*.md"):
        with pytest.raises(UserError, match="matches no file") as caught:
            Files(str(tmp_path / below))
        assert f"(nearest existing folder: {tmp_path})" in str(caught.value)
    with pytest.raises(UserError, match=r"none.txt matches no file; name files"):
        Files(str(tmp_path / "none.txt"))


def test_links_in_circles_give_each_file_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("once")
    for name in ("l1", "l2", "l3"):  # a walk that follows three links to its own folder is of 3^40 places
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    assert [text for _, text in Files([str(tmp_path / "**" / "*.txt"), str(tmp_path)])] == ["once"]


def test_a_file_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("once")
    monkeypatch.chdir(tmp_path)
    for again in ("a.txt", "./a.txt", "deep/../a.txt", str(tmp_path / "a.txt"), "*.txt", "."):
        assert [text for _, text in Files(["a.txt", again])] == ["once"]


@pytest.mark.parametrize("name, what", [("pipe.txt", "a pipe"), ("broken.txt", "a broken link"), ("1\0", "NUL")])
def test_an_input_that_is_no_file_is_named(mixed, name, what):
    with pytest.raises(UserError, match=f"--input: .*{what}"):
        Files(f"{mixed}/{name}")


def test_names_that_are_not_utf_8(tmp_path):
    odd = os.path.join(os.fsencode(tmp_path), b"\xff\xfe.txt")
    with open(odd, "w") as file:
        file.write("odd name\n" * 50)
    prepare(Files(str(tmp_path)), tmp_path / "out")
    assert meta_of(tmp_path / "out")["splits"]["train"]["documents"] == 1


# -- the split -----------------------------------------------------------------------------------


def prose(size, word="word"):
    return "".join(f"{word} {number} of a paragraph.\n\n" for number in range(size // 25))


@pytest.mark.parametrize("val_fraction", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], list("abcdefgh")])
def test_few_large_files_are_cut_within_themselves(tmp_path, names, val_fraction):
    """Whatever the hash of the names says, validation gets about its share, and no text is lost or moved."""
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / f"{name}.txt").write_text(prose(40_000, name))
    (tmp_path / "in" / "small.txt").write_text("tiny")
    for workers in ("1", "2"):
        out = tmp_path / workers
        prepare(Files(str(tmp_path / "in")), out, "--val_fraction", str(val_fraction), "--workers", workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    sizes = {split: meta_of(out)["splits"][split]["bytes"] for split in ("train", "val")}
    share = sizes["val"] / sum(sizes.values())
    assert val_fraction / 2 <= share <= val_fraction * 2, share
    pieces = {split: text_of(out, split).split("<|endoftext|>")[1:] for split in sizes}
    for name in names:
        whole = [piece for split in ("train", "val") for piece in pieces[split] if piece.startswith(f"{name} ")]
        assert "".join(whole) == prose(40_000, name)
        assert all(piece.endswith(".\n\n") for piece in whole)


def test_files_whose_hash_gives_the_right_share_stay_whole(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(200):
        (tmp_path / "in" / f"{number}.txt").write_text(prose(500))
    prepare(Files(str(tmp_path / "in")), tmp_path / "out")
    meta = meta_of(tmp_path / "out")
    assert "cut_files" not in meta["settings"]
    assert sum(split["documents"] for split in meta["splits"].values()) == 200


@pytest.mark.parametrize("text", ["x" * 5000, "é" * 3000, "東京" * 2000, "a\r\n\r\n" * 900, "one two " * 700, "ab"])
def test_a_cut_falls_between_characters_whatever_the_text(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    files = Files(str(tmp_path))
    assert "1 file cut in two" in files.cut_large(0.2, lambda key: "val")
    parts = list(files)
    assert "".join(part for _, part in parts) == text
    assert [files.side(key) for key, _ in parts] == ["train", "val"]
    if len(text) > 100:
        assert 0.1 < len(parts[1][1]) / len(text) < 0.3


def test_a_split_far_from_what_was_asked_is_said_with_both_numbers(tmp_path, capsys):
    rows = [("a", "x" * 1000), ("b", "y" * 10)]  # of any other source: a hash decides
    prepare(rows, tmp_path / "out", "--val_fraction", "0.2")
    said = capsys.readouterr().out
    assert "warning: 0.0000% of the text is in the val split, and --val_fraction asks for 20.0000%" in said
    prepare(((f"row {i}", "text") for i in range(500)), tmp_path / "even", "--val_fraction", "0.2")
    assert "warning" not in capsys.readouterr().out


def test_data_begun_before_files_were_cut_stays_whole_and_can_be_finished(tmp_path, capsys):
    """progress.json and meta.json of the earlier version know nothing of cut files or skipped documents."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c", "d"):
        (tmp_path / "in" / f"{name}.txt").write_text(prose(40_000, name))
    whole = {"side": lambda key: pipeline.split_of(key, 0.2)}  # not the default, so nothing is cut
    prepare(Files(str(tmp_path / "in")), tmp_path / "old", **whole)
    meta = meta_of(tmp_path / "old")
    del meta["skipped"]
    (tmp_path / "old" / "meta.json").write_text(json.dumps(meta))
    before = contents(tmp_path / "old")
    prepare(Files(str(tmp_path / "in")), tmp_path / "old")
    assert contents(tmp_path / "old") == before and "already prepared" in capsys.readouterr().out
    # half done: the first shard of training is there, and what comes after is as it would have been
    half = tmp_path / "half"
    files = Files(str(tmp_path / "in"))

    def cut_short():
        for number, document in enumerate(files):
            if number == 3:
                raise RuntimeError
            yield document

    source = type("Source", (), {"__iter__": lambda self: cut_short(), "description": files.description})()
    with contextlib.suppress(RuntimeError):
        prepare(source, half, **whole)
    progress = json.loads((half / "progress.json").read_text())
    assert progress["train"]["documents"] + progress["val"]["documents"] == 3
    del progress["skipped"]
    (half / "progress.json").write_text(json.dumps(progress))
    prepare(Files(str(tmp_path / "in")), half)
    for name, content in before.items():
        assert name == "meta.json" or contents(half)[name] == content


@pytest.mark.parametrize("content", [b"", b'{"text": ""}\n' * 3, b"\n\n"])
def test_no_text_is_refused_and_leaves_nothing(tmp_path, content):
    for name in ("a.jsonl", "a.txt"):
        if name == "a.txt" and content:
            continue
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="found no text, expected at least one document with text"):
            prepare(Files(str(tmp_path / name)), tmp_path / "new" / "out")
        assert not (tmp_path / "new").exists()


def test_no_text_to_train_on_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no text fell into the train split \(5 tokens into val\)"):
        prepare([("key", "text")], tmp_path / "out", "--val_fraction", "0.999999999")
    assert not (tmp_path / "out").exists()
    prepare([("key", "text")], tmp_path / "out", "--val_fraction", "1")  # all of it for validation, as asked
    assert meta_of(tmp_path / "out")["splits"]["val"]["tokens"] == 5


# -- documents that cannot be used ---------------------------------------------------------------

BAD_ROWS = [  # the row, what is said of it
    (b'{"text": null}', "no text: found nothing, expected a string under 'text'"),
    (b'{"text": 5}', "no text: found int"),
    (b'{"text": true}', "no text: found bool"),
    (b'{"text": ["a"]}', "no text: found list"),
    (b'{"text": {"text": "a"}}', "no text: found dict"),
    (b'{"body": "a", "id": 1}', "found nothing, expected a string under 'text' (the row has body, id)"),
    (b"{}", "the row is empty"),
    (b"[1, 2]", "found list, expected an object with 'text'"),
    (b'"text"', "found str, expected an object"),
    (b"null", "found NoneType, expected an object"),
    (b"7", "found int, expected an object"),
    (b'{"text": "a"', "JSONDecodeError"),
    (b"text", "JSONDecodeError"),
    (b"[" * 100_000, "RecursionError"),
    (b'{"text": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "RecursionError"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "ValueError: Exceeds the limit"),
    (b'{"text": "\xff"}', "UnicodeDecodeError"),
    (b'{"text": "a\nb"}', "JSONDecodeError"),
]


@pytest.mark.parametrize("row, reason", BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_a_bad_row_stops_with_its_place_and_the_flag_or_is_skipped(tmp_path, row, reason):
    rows = [b'{"text": "good"}'] * 3 + row.split(b"\n") + [b'{"text": "last"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    files = Files(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError) as caught:
        prepare(files, tmp_path / "out", side=lambda key: "train")
    message = str(caught.value)
    assert f"{tmp_path}/a.jsonl row 4" in message and reason in message and "--on_bad_document skip" in message
    assert "\n" not in message and not (tmp_path / "out").exists()
    prepare(files, tmp_path / "out", "--on_bad_document", "skip", side=lambda key: "train")
    bad = len(row.split(b"\n"))
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in skipped] == [f"a.jsonl row {4 + number}" for number in range(bad)]
    assert reason in skipped[0]["reason"] and meta_of(tmp_path / "out")["skipped"] == bad
    assert text_of(tmp_path / "out", "train").split("<|endoftext|>")[1:] == ["good"] * 3 + ["last"]


def test_bad_values_of_parquet_and_the_hub(tmp_path):
    import datasets

    binary = pyarrow.array([b"a", b"\xff", None, b"d"])
    strings = pyarrow.StringArray.from_buffers(4, binary.buffers()[1], binary.buffers()[2], binary.buffers()[0])
    parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "a.parquet")
    files = Files(str(tmp_path / "a.parquet"))
    with pytest.raises(BadDocument, match=r"a.parquet row 2: could not be read \(UnicodeDecodeError"):
        list(files)
    files.yield_bad = True
    assert [text if isinstance(text, str) else type(text) for _, text in files] == ["a", BadDocument, BadDocument, "d"]
    hub = sources.Hub(datasets.Dataset.from_dict({"text": ["a", None, "c"]}))
    prepare(hub, tmp_path / "hub", "--on_bad_document", "skip", side=lambda key: "train")
    assert text_of(tmp_path / "hub", "train") == "<|endoftext|>a<|endoftext|>c"
    assert "row 2" in (tmp_path / "hub" / "skipped.jsonl").read_text()


TALK = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
BAD_TALKS = [
    None,
    "Hi",
    5,
    {"role": "user"},
    [],
    [None],
    [[TALK[0]]],
    ["line\nbreak"],
    [TALK[0], {"role": ["user"], "content": "Hi"}],
    [TALK[0], {"role": {"a": 1}, "content": "Hi"}],
    [TALK[0], {"role": None, "content": "Hi"}],
    [TALK[0], {"role": 1, "content": "Hi"}],
    [TALK[0], {"role": "robot", "content": "Hi"}],
    [TALK[0], {"role": "assistant", "content": None}],
    [TALK[0], {"role": "assistant", "content": ["Hi"]}],
    [TALK[0], {"role": "assistant", "content": 5}],
    [TALK[0], {"role": "assistant"}],
    [TALK[0], {"content": "\ud83d"}],
    [TALK[0]],
]


@pytest.mark.parametrize("talk", BAD_TALKS, ids=str)
def test_odd_conversations_stop_in_one_line_or_are_skipped(tmp_path, talk):
    rows = [json.dumps({"messages": messages}) for messages in (list(TALK), talk, list(TALK))]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = Conversations(Files(str(tmp_path / "a.jsonl"), "messages", list))
    with pytest.raises(BadDocument, match=r"a.jsonl row 2") as caught:
        list(source)
    assert "\n" not in str(caught.value)
    how = {"side": lambda key: "train", "loss_mask": True}
    prepare(source, tmp_path / "out", "--on_bad_document", "skip", **how)
    assert meta_of(tmp_path / "out")["splits"]["train"]["documents"] == 2
    assert "a.jsonl row 2" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_what_is_no_text_is_a_bad_document_whatever_the_source(tmp_path):
    documents = [("a", "good"), ("b", None), ("c", b"bytes"), ("d", "good")]
    with pytest.raises(BadDocument, match="b: found NoneType, expected a string"):
        prepare(documents, tmp_path / "out", side=lambda key: "train")
    prepare(documents, tmp_path / "out", "--on_bad_document", "skip", side=lambda key: "train")
    assert meta_of(tmp_path / "out")["skipped"] == 2


def faulty():
    """Documents of which every third is bad, some in the source and some for the tokenizer of two letters."""
    for number in range(150):
        text = "ab" * (number % 40)
        if number % 3 == 1:
            text = BadDocument(f"row {number}", "bad in the source") if number % 2 else "xyz"
        yield f"row {number}", text


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
@pytest.mark.parametrize("flags", [[], ["--on_bad_document", "skip"]], ids=["stop", "skip"])
def test_a_skipped_jsonl_of_the_users_own_is_kept(tmp_path, kind, flags):
    """It was there before the preparation, which moves it to another name and does not read, empty or remove it."""
    path = tmp_path / "skipped.jsonl"
    if kind == "file":
        path.write_text("mine\n")
    elif kind == "folder":
        path.mkdir()
        (path / "mine").write_text("mine\n")
    elif kind == "link":
        (tmp_path / "elsewhere").write_text("mine\n")
        path.symlink_to("elsewhere")
    else:
        os.mkfifo(path)
    before = os.lstat(path)
    documents = [("a", "text"), ("b", "more"), *([("c", BadDocument("c", "bad"))] if flags else [])]
    prepare(documents, tmp_path, *flags, side=lambda key: "train")
    moved = os.lstat(tmp_path / "skipped.jsonl.moved1")
    assert (moved.st_ino, moved.st_size) == (before.st_ino, before.st_size)
    assert kind != "link" or (tmp_path / "elsewhere").read_text() == "mine\n"
    named = [json.loads(line)["key"] for line in path.read_text().splitlines()] if flags else []
    assert named == (["c"] if flags else []) and path.exists() == bool(flags)


def test_the_skipped_jsonl_of_a_preparation_without_a_use_is_written_over(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match=r"found no text.*skipped 1 document: see .*skipped\.jsonl"):
            prepare([("a", BadDocument("a", "bad"))], tmp_path, "--on_bad_document", "skip")
        assert [path.name for path in tmp_path.glob("skipped.jsonl*")] == ["skipped.jsonl"]
        assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1
    prepare([("a", "text"), ("b", "more")], tmp_path, side=lambda key: "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train_000000.bin"]


def test_the_skipped_jsonl_of_a_killed_preparation_is_written_over(tmp_path):
    """progress.json says that it is one of ours, of which nothing is finished."""
    (tmp_path / "progress.json").write_text(json.dumps({"settings": {}}))
    (tmp_path / "skipped.jsonl").write_text('{"key": "old", "reason": "old"}\n')
    prepare([("a", "text"), ("b", "more")], tmp_path, side=lambda key: "train")
    assert not list(tmp_path.glob("skipped.jsonl*"))


def test_skipped_documents_are_named_once_after_any_kill(quick):
    """SIGKILL before the first, second, third ... file operation, as test_kill_before_each_file_operation does."""
    tokenizer.save_tokenizer(quick / "ab", *tokenizer.characters("ab"))
    flags = ["--on_bad_document", "skip", "--shard_tokens", "800"]
    prepare(faulty(), quick / "whole", *flags, tokenizer=quick / "ab")
    prepare(faulty(), quick / "two", *flags, "--workers", "2", tokenizer=quick / "ab")
    expected, kills = contents(quick / "whole"), 0
    assert contents(quick / "two") == expected
    named = [json.loads(line) for line in expected["skipped.jsonl"].splitlines()]
    assert [line["key"] for line in named] == [f"row {number}" for number in range(1, 150, 3)]
    assert {line["reason"] for line in named} == {
        "bad in the source",
        "could not be tokenized (no token for 'xyz')",
    }

    def work(folder):
        prepare(faulty(), folder, *flags, tokenizer=quick / "ab")

    for folder in killed_before_each_operation(quick, work):
        kills += 1
        assert ended_by(in_a_child(lambda folder=folder: work(folder))) == 0
        assert contents(folder) == expected
        shutil.rmtree(folder)
    assert kills > 30


def test_a_preparation_that_stopped_at_a_bad_document_is_continued_with_skip(tmp_path):
    rows = [{"text": None if number == 300 else "x" * 50} for number in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(tmp_path / "a.jsonl")
    with pytest.raises(BadDocument, match="row 301"):
        prepare(Files(file), tmp_path / "out")
    assert (tmp_path / "out" / "train_000000.bin").exists()
    prepare(Files(file), tmp_path / "out", "--on_bad_document", "skip")
    prepare(Files(file), tmp_path / "at_once", "--on_bad_document", "skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "at_once")


@pytest.mark.parametrize("first", [["--column", "body"], ["--limit", "1"], ["--val_fraction", "0.3"]])
def test_a_failed_try_binds_no_later_one(tmp_path, first):
    """As long as no shard is finished; also a try that was killed."""
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 20)
    out = tmp_path / "out"

    def killed():
        prepare((os.kill(os.getpid(), signal.SIGKILL) for _ in range(1)), out, *first)

    assert ended_by(in_a_child(killed)) == -signal.SIGKILL
    assert (out / "progress.json").exists()
    if first[0] == "--column":
        with pytest.raises(BadDocument, match=r"row 1: .* under 'body' \(the row has text\)"):
            prepare(Files(str(tmp_path / "a.jsonl"), "body"), out, *first)
    prepare(Files(str(tmp_path / "a.jsonl")), out)
    assert meta_of(out)["settings"]["column"] == "text" and not (out / "progress.json").exists()


# -- texts that the tokenizer cannot take at once, and many of them ------------------------------

RUNS = [" " * 1_000_000 + "x", "\n" * 1_000_000 + "y", "a" * 1_000_000, "=" * 1_000_000, "東" * 300_000, " a" * 200_000]


@pytest.mark.parametrize("text", RUNS, ids=[f"{len(text)} of {text[:2]!a}" for text in RUNS])
def test_long_runs_are_tokenized_and_give_the_same_text(tmp_path, shared, text):
    text = "before " + text + " after"
    for workers in ("1", "2"):
        documents = [("a", text), ("b", "short")]
        prepare(documents, tmp_path / workers, "--workers", workers, tokenizer="gpt2", side=lambda key: "train")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    stream = TokenStream(tmp_path / "1", "train", 1)
    found = load_tokenizer("gpt2").decode(stream.read(0, stream.tokens).tolist())
    assert found == f"<|endoftext|>{text}<|endoftext|>short"


def test_runs_up_to_the_limit_are_given_to_the_tokenizer_whole():
    most = tokenizer.LONGEST_RUN
    for text in ("", "a", "a" * most, " " * most, "word " * most, "a" * most + " " * most + "b" * most):
        assert list(cut_long_runs(text)) == [text]
    for text in ("a" * (most + 1), "x " + " " * 5 * most + "y", "x" * 77 + "\n" * (most + 1) + "y" * (3 * most)):
        parts = list(cut_long_runs(text))
        assert len(parts) > 1 and "".join(parts) == text
        assert max(len(run) for part in parts for run in part.split()) <= most
        assert all(len(part) <= 2 * most + 100 for part in parts)


def test_any_text_that_makes_the_tokenizer_fail_is_given_in_small_pieces(monkeypatch):
    """As another's pattern may choke where ours does not."""
    encode.start_worker("bytes", False)

    class Choking:
        def __getattr__(self, name):
            return getattr(real, name)

        def encode_to_numpy(self, text, **how):
            if len(text) > 20_000:
                raise ValueError("Max stack size exceeded")
            return real.encode_to_numpy(text, **how)

    real = encode.encoding
    monkeypatch.setattr(encode, "encoding", Choking())
    tokens, size = encode.encode_text("key", "word " * 10_000)
    assert size == 50_000 and real.decode(np.concatenate(tokens).tolist()) == "word " * 10_000


def test_ten_megabytes_without_a_boundary_take_seconds(tmp_path, shared):
    for letter in "a =":
        started = time.perf_counter()
        prepare([("a", letter * 10_000_000)], tmp_path / str(ord(letter)), tokenizer="gpt2", side=lambda key: "train")
        assert time.perf_counter() - started < 60  # 2 to 8 s on two busy cores


def test_batches_are_bounded_by_documents_as_well_as_by_characters(tmp_path):
    sizes = [
        len(batch) for batch in encode.make_batches(((str(i), "") for i in range(40_000)), 10**6, lambda key: "val")
    ]
    assert max(sizes) == encode.BATCH_DOCUMENTS == 16_384 and sum(sizes) == 40_000
    sizes = [
        len(batch) for batch in encode.make_batches(((str(i), "x" * 10) for i in range(100)), 100, lambda key: "val")
    ]
    assert sizes == [10] * 10


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


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "5",
        '{"settings": []}',
        '{"train": {"shards": "many"}}',
        '{"train": {"shards": [], "waiting": -1}}',
        '{"train": {"shards": [{"file": "../x", "tokens": 1}]}}',
        '{"train": {"shards": [], "documents": true}}',
        '{"skipped": {"bytes": "many"}}',
        "{",
        "9" * 5000,
    ],
)
def test_a_damaged_progress_json_is_named(tmp_path, content):
    (tmp_path / "progress.json").write_text(content)
    with pytest.raises(UserError, match=r"progress\.json") as caught:
        prepare([("a", "text")], tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "progress.json").read_text() == content


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


def test_summary_of_one_kind_of_file(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("x")
    for number in range(12):
        (tmp_path / f"{number}{'.md' if number < 8 else '.py'}").write_text("x")
    assert Files(str(tmp_path)).summary == (
        "read 3 .txt files, passed over 12 (.md 8, .py 4): name them with a glob to read them as text"
    )
    assert Files(str(tmp_path / "*.txt")).summary == "read 3 .txt files, passed over none"


def test_a_source_without_files_says_nothing_of_them(tmp_path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        prepare([("a", "text of a"), ("b", "text of b")], tmp_path, side=lambda key: "train")
    assert "passed over" not in out.getvalue()


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
