"""Documents that cannot be used, and texts that the tokenizer cannot be given at once."""

import contextlib
import io
import json
import os
import shutil
import signal
import time

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from minzero.data import encode, sources
from minzero.data.conversations import Conversations
from minzero.data.documents import BadDocument
from minzero.data.fast_encoding import BulkEncoder
from minzero.data.learn_tokenizer import characters
from minzero.data.local_files import Files
from minzero.data.shards import TokenStream
from minzero.data.text import LONGEST_RUN, cut_long_runs
from minzero.data.tokenizer import load_tokenizer
from minzero.data.tokenizer_files import save_tokenizer
from minzero.errors import UserError
from tests.helpers.data_sets import (
    contents,
    ended_by,
    in_a_child,
    killed_before_each_operation,
    meta_of,
    prepare,
    text_of,
)

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
    save_tokenizer(quick / "ab", *characters("ab"))
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


def test_a_source_without_files_says_nothing_of_them(tmp_path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        prepare([("a", "text of a"), ("b", "text of b")], tmp_path, side=lambda key: "train")
    assert "passed over" not in out.getvalue()


# -- long texts, and many of them -------------------------------------------------------------------


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
    most = LONGEST_RUN
    for text in ("", "a", "a" * most, " " * most, "word " * most, "a" * most + " " * most + "b" * most):
        assert list(cut_long_runs(text)) == [text]
    for text in ("a" * (most + 1), "x " + " " * 5 * most + "y", "x" * 77 + "\n" * (most + 1) + "y" * (3 * most)):
        parts = list(cut_long_runs(text))
        assert len(parts) > 1 and "".join(parts) == text
        assert max(len(run) for part in parts for run in part.split()) <= most
        assert all(len(part) <= 2 * most + 100 for part in parts)


def test_any_text_that_makes_the_tokenizer_fail_is_given_in_small_pieces(monkeypatch):
    """As another's pattern may choke where ours does not."""
    real = load_tokenizer("bytes")

    class Choking:
        def __getattr__(self, name):
            return getattr(real, name)

        def ids(self, text):
            if len(text) > 20_000:
                raise ValueError("Max stack size exceeded")
            return real.ids(text)

    encode.use_encoder(BulkEncoder(Choking(), use_gigatoken=False), False)
    tokens = encode.encode_text("key", b"word " * 10_000)
    assert real.decode(np.concatenate(tokens).tolist()) == "word " * 10_000


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
