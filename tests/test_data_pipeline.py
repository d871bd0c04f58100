"""Preparing: the same bytes from every kind of source, with any number of workers, after any kill; and
one clear line for whatever is wrong with the input or the machine."""

import contextlib
import gzip
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tqdm import tqdm

from minzero.data import local_files, pipeline, sources
from minzero.data.shards import TokenStream, write_shard
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.files import checksum
from tests.conftest import ROOT, environment

GENERATOR = random.Random(7)
TEXTS = [
    " ".join(GENERATOR.choice(["data", "shard", "naïve", "東京", "\n\n", "\t", "😀", "x = 1"]) for _ in range(length))
    for length in [0, 1, 2, *(GENERATOR.randint(3, 60) for _ in range(150))]
]


def jsonl(texts, column="text"):
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def write_parquet(path, texts, column="text", **more):
    parquet.write_table(pyarrow.table({column: texts, **more}), path, row_group_size=40)


def prepare(documents, out, *flags, tokenizer="bytes", **how):
    arguments = ["--out", str(out), "--shard_tokens", "3000", "--workers", "1", "--val_fraction", "0.2", *flags]
    args = pipeline.options("", ".").parse_args(arguments)
    pipeline.prepare(documents, tokenizer, args, **how)


def contents(folder):
    """Everything that a finished preparation leaves, by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def shards(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".bin")}


@pytest.fixture
def quick():
    """A folder in memory where there is one, for tests that flush to the disk thousands of times."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="minzero_", dir=base))
    yield folder
    shutil.rmtree(folder)


def numbered():
    return ((f"row {i}", text) for i, text in enumerate(TEXTS))


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


# -- kills ---------------------------------------------------------------------------------------


def in_a_child(work):
    """Fork a process that does `work` and leaves; returns its id. Forked, for it starts in milliseconds."""
    child = os.fork()
    if child:
        return child
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared between processes, and a kill may leave it locked
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def ended_by(child, seconds=60):
    for _ in range(seconds * 200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child hangs")


def looks_finished(folder):
    """Would training take this folder?"""
    try:
        TokenStream(folder, "train", 8)
        return True
    except UserError:
        return False


def assert_rerun_gives(folder, expected):
    assert not looks_finished(folder) or contents(folder)["meta.json"] == expected["meta.json"]
    assert ended_by(in_a_child(lambda: prepare(numbered(), folder))) == 0
    assert contents(folder) == expected


def killed_before_each_operation(place, work):
    """Yield a folder for the first, second, third ... time that work(folder) opens, renames, cuts or removes a file in
    it, in a process that SIGKILL has ended before that, until one runs through: no order of operations is left out."""
    for kills in itertools.count():
        folder, seen = place / f"kill_{kills}", [0]

        def count(event, arguments, folder=folder, seen=seen, kills=kills):
            if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir") and str(folder) in str(arguments):
                seen[0] += 1
                if seen[0] > kills:
                    os.kill(os.getpid(), signal.SIGKILL)

        def counted(folder=folder, count=count):
            sys.addaudithook(count)
            work(folder)

        status = ended_by(in_a_child(counted))
        if status == 0:
            return
        assert status == -signal.SIGKILL
        yield folder


def test_kill_before_each_file_operation(quick):
    prepare(numbered(), quick / "whole")
    expected, kills = contents(quick / "whole"), 0
    for folder in killed_before_each_operation(quick, lambda folder: prepare(numbered(), folder)):
        kills += 1
        if folder.exists():
            assert_rerun_gives(folder, expected)
            shutil.rmtree(folder)
    assert kills > 40


def test_kill_at_twenty_random_moments(quick):
    (quick / "whole").mkdir()
    started = time.perf_counter()
    assert ended_by(in_a_child(lambda: prepare(numbered(), quick / "whole"))) == 0
    duration, expected, killed = time.perf_counter() - started, contents(quick / "whole"), 0
    for moment in range(60):
        folder = quick / f"moment_{moment}"
        child = in_a_child(lambda folder=folder: prepare(numbered(), folder))
        time.sleep(GENERATOR.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        in_time = ended_by(child) == -signal.SIGKILL
        killed, duration = killed + in_time, duration * (1 if in_time else 0.9)  # measured on a busier machine
        folder.mkdir(exist_ok=True)
        assert_rerun_gives(folder, expected)
        if killed == 20:
            return
    raise AssertionError(f"only {killed} of 60 kills came before the end")


def test_kill_again_and_again(quick):
    """The same folder, killed until it is done: each run must resume from the last, not start again."""
    prepare(numbered(), quick / "whole")
    expected, folder, seen = contents(quick / "whole"), quick / "again", []
    for _ in range(200):

        def work():
            left = [22]  # file operations until the end

            def count(event, arguments):
                if event in ("open", "os.rename", "os.truncate") and str(folder) in str(arguments):
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            prepare(numbered(), folder)

        status = ended_by(in_a_child(work))
        seen.append(len(shards(folder)))
        if status == 0:
            break
    assert contents(folder) == expected
    assert len(seen) > 3 and seen == sorted(seen)


def command(name, *flags):
    return [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, flags)]


def run(name, *flags, **how):
    return subprocess.run(command(name, *flags), env=environment(), capture_output=True, text=True, timeout=120, **how)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file that takes a second to prepare, and the flags for it."""
    file = tmp_path_factory.mktemp("large") / "large.jsonl"
    file.write_bytes(jsonl(TEXTS * 150))
    return "--input", file, "--tokenizer", "bytes", "--shard_tokens", 200_000, "--val_fraction", 0.1


def children_of(process):
    import psutil

    return psutil.Process(process).children(recursive=True)


def test_kill_the_command_with_its_workers(tmp_path, large):
    """The real command: its orphaned workers leave by themselves, and the rerun ends with the same bytes."""
    assert run("text", *large, "--out", tmp_path / "whole", "--workers", 1).returncode == 0
    process = subprocess.Popen(
        command("text", *large, "--out", tmp_path / "killed", "--workers", 2),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    while not list((tmp_path / "killed").glob("train_*.bin")):
        time.sleep(0.01)
        assert process.poll() is None
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    assert not looks_finished(tmp_path / "killed")
    again = run("text", *large, "--out", tmp_path / "killed", "--workers", 2)
    assert again.returncode == 0 and "resuming after document" in again.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for worker in workers:
        worker.wait(timeout=10)


def test_a_killed_worker_and_ctrl_c(tmp_path, large):
    for end, code, words in (
        (lambda process: children_of(process.pid)[-1].kill(), 2, "a worker process was killed"),
        (lambda process: os.killpg(process.pid, signal.SIGINT), 130, "stopped; the same command continues"),
    ):
        process = subprocess.Popen(
            command("text", *large, "--out", tmp_path / str(code), "--workers", 2),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while not list((tmp_path / str(code)).glob("train_*.bin")):
            time.sleep(0.01)
            assert process.poll() is None
        end(process)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code
        assert words in output and "Traceback" not in output, output


def test_stale_files_are_harmless(quick):
    """Shards and .tmp files of an older preparation, in every place that a new one will use."""
    prepare(numbered(), quick / "whole")
    expected, folder = contents(quick / "whole"), quick / "stale"
    folder.mkdir()
    for number in range(20):
        for split in ("train", "val"):
            write_shard(folder / f"{split}_{number:06d}.bin", np.zeros(77, dtype="<u2"))
            (folder / f"{split}_{number:06d}.bin.tmp").write_bytes(b"old" * 5000)
    (folder / "meta.json.tmp").write_text("{")
    (folder / "progress.json.tmp").write_text("{")
    child = in_a_child(lambda: prepare(numbered(), folder))
    assert ended_by(child) == 0
    found = contents(folder)
    assert all(found[name] == content for name, content in expected.items())
    assert TokenStream(folder, "train", 8).tokens == TokenStream(quick / "whole", "train", 8).tokens


def test_finished_data_is_left_alone(tmp_path, capsys):
    prepare(numbered(), tmp_path)
    before = contents(tmp_path)
    prepare(iter([("other", "text")]), tmp_path)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="data made with another val_fraction; choose another --out"):
        prepare(numbered(), tmp_path, "--val_fraction", "0.5")
    assert contents(tmp_path) == before


def test_two_preparations_at_once(tmp_path):
    def documents():
        yield "a", "first"
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(numbered(), tmp_path)
        yield "b", "second"

    prepare(documents(), tmp_path)


def test_progress_that_does_not_fit_the_files(quick):
    child = in_a_child(lambda: prepare(cut_short(), quick / "a"))
    assert ended_by(child) == 1
    temporary = next((quick / "a").glob("val_*.tmp"))
    os.truncate(temporary, 1030)
    with pytest.raises(UserError, match=r"missing or cut, expected at least .* remove progress.json"):
        prepare(numbered(), quick / "a")


def cut_short():
    yield from list(numbered())[:100]
    raise RuntimeError


# -- what is wrong with the input or the machine -----------------------------------------------------


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


def test_a_disk_without_room(tmp_path, large):
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
    from minzero.data.tokenizer import characters, save_tokenizer

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


# -- the scripts -----------------------------------------------------------------------------------

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
