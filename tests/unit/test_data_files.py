"""Local files: which are read and which passed over, and which are cut in two for the split."""

import contextlib
import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from minzero.data import pipeline
from minzero.data.documents import BadDocument
from minzero.data.local_files import Files
from minzero.errors import UserError
from tests.helpers.data_sets import (
    BYTES,
    contents,
    meta_of,
    prepare,
    run,
    text_of,
)
from tests.helpers.processes import ROOT

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


def test_summary_of_one_kind_of_file(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("x")
    for number in range(12):
        (tmp_path / f"{number}{'.md' if number < 8 else '.py'}").write_text("x")
    assert Files(str(tmp_path)).summary == (
        "read 3 .txt files, passed over 12 (.md 8, .py 4): name them with a glob to read them as text"
    )
    assert Files(str(tmp_path / "*.txt")).summary == "read 3 .txt files, passed over none"


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
