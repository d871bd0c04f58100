"""Preparing: the same bytes from every kind of source, with any number of workers, and one clear line for whatever is
wrong with the input or the machine."""

import gzip
import json
import os
import resource
import subprocess
import sys

import pytest

from minzero.data import local_files, pipeline, sources
from minzero.data.shards import TokenStream
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.files import checksum
from tests.helpers.data_sets import (  # noqa: F401
    TEXTS,
    contents,
    jsonl,
    large,
    looks_finished,
    numbered,
    prepare,
    run,
    write_parquet,
    zstd,
)
from tests.helpers.processes import environment

# -- what comes out ------------------------------------------------------------------------------


def test_shards_hold_the_documents(tmp_path):
    prepare(numbered(), tmp_path)
    meta, encoding = json.loads((tmp_path / "meta.json").read_text()), load_tokenizer("bytes")
    found = {}
    for split in ("train", "val"):
        stream = TokenStream(tmp_path, split, 8)
        text = encoding.decode(stream.read(0, stream.tokens).tolist())
        found[split] = text.split("<|endoftext|>")[1:]
        assert meta["splits"][split]["documents"] == len(found[split])
        assert meta["splits"][split]["bytes"] == sum(len(part.encode()) for part in found[split])
        for shard in meta["splits"][split]["shards"]:
            assert checksum(tmp_path / shard["file"]) == shard["sha256"]
    for split, texts in found.items():
        assert texts == [text for i, text in enumerate(TEXTS) if pipeline.split_of(f"row {i}", 0.2) == split]
    assert len(meta["splits"]["train"]["shards"]) > 3
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "progress.json").exists()


def test_same_bytes_with_any_number_of_workers(tmp_path):
    for workers in (1, 2, 3):
        prepare(numbered(), tmp_path / str(workers), "--workers", str(workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_same_tokens_from_every_format(tmp_path):
    folders = {name: tmp_path / name for name in ("plain", "gz", "zst", "parquet", "txt", "frames")}
    for folder in folders.values():
        folder.mkdir()
    content, half = jsonl(TEXTS), 70
    (folders["plain"] / "a.jsonl").write_bytes(content)
    (folders["gz"] / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (folders["zst"] / "a.jsonl.zst").write_bytes(zstd(content))
    # as `cat a.zst b.zst` and parallel compressors make them
    (folders["frames"] / "a.jsonl.zst").write_bytes(zstd(jsonl(TEXTS[:half])) + zstd(jsonl(TEXTS[half:])))
    write_parquet(folders["parquet"] / "a.parquet", TEXTS)
    for i, text in enumerate(TEXTS):
        (folders["txt"] / f"{i:04d}.txt").write_bytes(text.encode())
    results = {}
    for name, folder in folders.items():
        files = local_files.Files(str(folder))
        prepare(files, tmp_path / f"{name}_out", side=lambda key: "train")
        assert files.fraction == 1
        stream = TokenStream(tmp_path / f"{name}_out", "train", 8)
        results[name] = stream.read(0, stream.tokens).tolist()
    # an empty text file is no document, an empty row is one
    assert results.pop("txt") == results["plain"][1:]
    assert all(tokens == results["plain"] for tokens in results.values())


def test_hugging_face_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    for name, source in (("whole", data), ("stream", data.to_iterable_dataset(num_shards=3))):
        hub = sources.Hub(source)
        prepare(hub, tmp_path / name)
        assert [text for _, text in hub.skip(100)] == TEXTS[100:]
        assert next(iter(hub.skip(100)))[0] == "row 101"
    assert contents(tmp_path / "whole") == contents(tmp_path / "stream")
    with pytest.raises(UserError, match="dataset: no column 'content': found id, text"):
        list(sources.Hub(data, "content"))
    with pytest.raises(UserError, match="dataset row 2: no text: found nothing"):
        list(sources.Hub(datasets.Dataset.from_dict({"text": ["a", None]})))


def test_load_dataset_is_what_opens_a_source(tmp_path):
    """The code that would download, on a folder that load_dataset takes for a data set."""
    write_parquet(tmp_path / "a.parquet", TEXTS)
    for flags in ([], ["--streaming"]):
        args = pipeline.options("", ".").parse_args(flags)
        assert [text for _, text in sources.open_source(args, str(tmp_path))] == TEXTS


def test_files_folders_and_globs(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/deep/3.txt", "a/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(*patterns):
        return [text for _, text in local_files.Files([str(tmp_path / p) for p in patterns])]

    assert (
        found("**/*.txt")
        == found(".")
        == found("b", "a/*.txt", "a/deep/3.txt")
        == ["a/1.txt", "a/deep/3.txt", "b/2.txt"]
    )
    assert found("a/notes.md") == ["a/notes.md"]
    with pytest.raises(UserError, match="matches no file"):
        found("c/*.txt")


def test_long_text_files_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "TEXT_PIECE", 100)
    text = "".join(f"line {i} of a long text\r\n" for i in range(30))
    (tmp_path / "long.txt").write_bytes(text.encode())
    pieces = [piece for _, piece in local_files.Files(str(tmp_path))]
    assert "".join(pieces) == text and len(pieces) > 3
    assert all(piece.endswith("\n") and len(piece) < 130 for piece in pieces)


def test_half_a_surrogate_pair(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    prepare(local_files.Files(str(tmp_path / "a.jsonl")), tmp_path / "out", side=lambda key: "train")
    stream = TokenStream(tmp_path / "out", "train", 4)
    assert load_tokenizer("bytes").decode(stream.read(0, stream.tokens).tolist()).split("<|endoftext|>")[1:] == [
        "a�",
        "😀",
    ]


def test_limit(tmp_path):
    prepare(numbered(), tmp_path, "--limit", "20")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert sum(split["documents"] for split in meta["splits"].values()) == 20


# -- faults of the input or the machine -----------------------------------------------------------


def refused(files, *words, flags=()):
    with pytest.raises(UserError) as caught:
        list(local_files.Files([str(file) for file in files], *flags))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def test_bad_rows_are_named(tmp_path):
    file, good = tmp_path / "bad.jsonl", '{"text": "good"}\n'
    for line, words in (
        ('{"txt": "a"}\n', "no text: found nothing, expected a string under 'text'"),
        ('{"text": null}\n', "no text: found nothing"),
        ('{"text": 7}\n', "no text: found int"),
        ('"text"\n', "no text"),
        ('{"text": "a\n', "could not be read (JSONDecodeError"),
    ):
        file.write_text(good * 2 + line + good)
        refused([file], f"{file} row 3", words)
    file.write_bytes(good.encode() + b'{"text": "\xff"}\n')
    refused([file], f"{file} row 2", "UnicodeDecodeError")
    write_parquet(tmp_path / "a.parquet", ["a", None, "c"])
    refused([tmp_path / "a.parquet"], "a.parquet row 2", "no text: found nothing")
    refused([tmp_path / "a.parquet"], "no column 'content': found text", flags=["content"])


def test_broken_files_are_named(tmp_path):
    content = jsonl(TEXTS * 3)
    for name, whole in (("a.jsonl.gz", gzip.compress(content)), ("a.jsonl.zst", zstd(content))):
        file = tmp_path / name
        file.write_bytes(whole[: len(whole) // 2])
        refused([file], file, "could not be read")
        file.write_bytes(b"not compressed at all")
        refused([file], file, "row 1", "could not be read")
    write_parquet(tmp_path / "a.parquet", TEXTS)
    os.truncate(tmp_path / "a.parquet", 1000)
    refused([tmp_path / "a.parquet"], "a.parquet row 1", "could not be read")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused([tmp_path / "latin.txt"], "latin.txt row 1", "UnicodeDecodeError")


def test_a_file_that_vanishes(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    files = local_files.Files(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b.txt row 1: could not be read \(FileNotFoundError"):
        list(files)


def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_without_room(tmp_path, large):  # noqa: F811
    """The kernel refuses to let files grow: one line, exit code 2, and with room again the same bytes."""
    assert run("text", *large, "--out", tmp_path / "whole", "--workers", 1).returncode == 0
    for workers in (1, 2):
        out = tmp_path / f"full_{workers}"
        result = run("text", *large, "--out", out, "--workers", workers, preexec_fn=full_disk)
        error = result.stderr.replace("\r", "\n").strip().splitlines()[-1]
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert f"{out}/train_000000.bin.tmp: could not be written (File too large)" in error
        assert not looks_finished(out)
        assert run("text", *large, "--out", out, "--workers", 1).returncode == 0
        assert contents(out) == contents(tmp_path / "whole")


def test_documents_that_cannot_be_tokenized(tmp_path):
    from minzero.data.learn_tokenizer import characters
    from minzero.data.tokenizer_files import save_tokenizer

    save_tokenizer(tmp_path / "abc", *characters("abc é"))
    documents = [("x row 1", "cab é"), ("x row 2", "cabzüz")]
    prepare(documents[:1], tmp_path / "good", tokenizer=tmp_path / "abc")
    for workers in ("1", "2"):
        with pytest.raises(UserError, match=r"x row 2: could not be tokenized \(no token for 'zü'\)"):
            prepare(documents, tmp_path / workers, "--workers", workers, tokenizer=tmp_path / "abc")


def test_bad_flags(tmp_path):
    for flags, words in (
        (["--val_fraction", "2"], "--val_fraction: found 2.0, expected 0 to 1"),
        (["--shard_tokens", "0"], "--shard_tokens: found 0"),
        (["--workers", "0"], "--workers: found 0"),
        (["--limit", "0"], "--limit: found 0"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(numbered(), tmp_path, *flags)
    with pytest.raises(UserError, match="neither 'bytes', nor a folder"):
        prepare(numbered(), tmp_path, tokenizer="gpt3")


def test_workers_that_cannot_start_end_the_preparation(tmp_path):
    """As in a script that is not protected from being run again by each worker."""
    (tmp_path / "script.py").write_text(
        "from minzero.data import pipeline\n"
        "args = pipeline.options('', '.').parse_args(['--out', 'out', '--workers', '2'])\n"
        "pipeline.prepare([(str(i), 'word ' * 500_000) for i in range(8)], 'gpt2', args)\n"
    )
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode and "--workers: a worker process was killed" in result.stderr
