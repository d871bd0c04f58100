"""Conversions of token files that are killed, of malformed files, and with wrong flags."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from data import convert as command
from minzero.commands import run_command
from minzero.data.convert import to_nanogpt, to_shards
from minzero.errors import UserError
from minzero.files import write_json
from tests.helpers.data_sets import (
    contents,
    ended_by,
    in_a_child,
    killed_before_each_operation,
    killed_until_done,
    looks_finished,
    numbered,
    prepare,
    shards,
)
from tests.helpers.processes import ROOT, environment
from tests.helpers.token_files import DOCUMENTS, END, ended, expected, ids_of, index_of, write_ids, write_megatron

# -- killed and continued ------------------------------------------------------------------------


@pytest.fixture
def source(quick):
    """Two data sets of Megatron's, and documents longer than a block."""
    write_megatron(quick / "in/a", [*DOCUMENTS[:100], [7] * 5000, [8] * 2000])
    write_megatron(quick / "in/b", DOCUMENTS[100:])
    return quick / "in"


def convert_to(folder, source):
    to_shards([source], "bytes", folder, val_fraction=0.2, shard_tokens=1500)


def assert_again_gives(folder, right, source):
    assert not looks_finished(folder) or contents(folder)["meta.json"] == right["meta.json"]
    assert ended_by(in_a_child(lambda: convert_to(folder, source))) == 0
    assert contents(folder) == right


def test_kill_before_each_file_operation(quick, source):
    convert_to(quick / "whole", source)
    right, kills = contents(quick / "whole"), 0
    assert len(right) > 8
    for folder in killed_before_each_operation(quick, lambda folder: convert_to(folder, source)):
        kills += 1
        if folder.exists():
            assert_again_gives(folder, right, source)
            shutil.rmtree(folder)
    assert kills > 40


def test_kill_again_and_again(quick, source):
    """The same folder, killed until it is done: each call continues where the last finished a shard."""
    convert_to(quick / "whole", source)
    right, folder = contents(quick / "whole"), quick / "again"
    seen = killed_until_done(folder, 26, lambda folder: convert_to(folder, source), 100)
    assert contents(folder) == right
    assert len(seen) > 3 and seen == sorted(seen)


def test_kill_while_nanogpts_files_are_written(quick):
    """train.bin is there only when everything is, and the same call again ends with the same files."""
    prepare(numbered(), quick / "data")
    to_nanogpt(quick / "data", quick / "whole")
    right, kills = contents(quick / "whole"), 0
    for folder in killed_before_each_operation(quick, lambda folder: to_nanogpt(quick / "data", folder)):
        kills += 1
        if folder.exists():
            found = contents(folder)
            assert "train.bin" not in found or found == right
            assert all(found[name] == right[name] for name in found.keys() & right.keys())
            to_nanogpt(quick / "data", folder)
            assert contents(folder) == right
    assert kills >= 8


def test_kill_the_command(tmp_path):
    """The real command, ended by SIGKILL while it writes."""
    write_megatron(tmp_path / "set", DOCUMENTS * 60)
    flags = ["--tokenizer", "bytes", "--shard_tokens", "20000"]

    def start(out):
        words = [sys.executable, ROOT / "data/convert.py", tmp_path / "set", *flags, "--out", tmp_path / out]
        return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    assert start("whole").wait() == 0
    process = start("killed")
    while not list((tmp_path / "killed").glob("train_*.bin")):
        time.sleep(0.001)
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not looks_finished(tmp_path / "killed")
    output, error = start("killed").communicate(timeout=60)
    assert "resuming after token" in output, output + error
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_finished_data_is_left_alone(tmp_path, capsys, source):
    convert_to(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    convert_to(tmp_path / "out", source)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="data made with another val_fraction; choose another --out"):
        to_shards([source], "bytes", tmp_path / "out", shard_tokens=1500)
    with pytest.raises(UserError, match="data made with another source"):
        convert_to(tmp_path / "out", source / "a")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("converted", [{"tokens": 10, "ends_added": 0}, {"tokens": "many"}, [], None, {"tokens": 1.5}])
def test_damaged_progress(quick, source, converted):
    """Numbers that do not fit what was written would lose or repeat ids."""
    folders = killed_before_each_operation(quick, lambda folder: convert_to(folder, source))
    folder = next(folder for folder in folders if folder.exists() and shards(folder))
    progress = json.loads((folder / "progress.json").read_text())
    progress["settings"]["converted"] = converted
    write_json(folder / "progress.json", progress)
    with pytest.raises(UserError, match=r"progress.json: damaged: settings.converted: found .*, expected two numbers"):
        convert_to(folder, source)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Peak memory of the command for 100 MB of ids and for a few."""
    code = "import runpy, sys; runpy.run_path('data/convert.py')['main'](sys.argv[1:])\n"
    code += "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    peaks = []
    for name, count in (("small", 1000), ("large", 50_000_000)):
        np.tile(np.array([*range(249), END], "<u2"), count // 250).tofile(tmp_path / f"{name}.npy")
        words = [sys.executable, "-c", code, tmp_path / f"{name}.npy", "--tokenizer", "bytes", "--out", tmp_path / name]
        output = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout
        peaks.append(int(output.split()[-2]) / 1024)  # MB
    assert peaks[1] - peaks[0] < 30, peaks


# -- malformed input -----------------------------------------------------------------------------


def spoiled(**how):
    """A function that writes a data set whose index is not as it should be."""
    return lambda place: write_megatron(place / "set", [[1, 2, 3], [4, 5]], **how)


def with_index(*arguments, **how):
    def write(place):
        prefix = write_megatron(place / "set", [[1, 2, 3], [4, 5]])
        prefix.with_suffix(".idx").write_bytes(index_of(*arguments, **how))

    return write


def with_bytes(change, suffix=".idx"):
    def write(place):
        path = write_megatron(place / "set", [[1, 2, 3], [4, 5]]).with_suffix(suffix)
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)

    return write


def plain(name, ids, dtype="uint16"):
    return lambda place: write_ids(place / name, ids, dtype)


def numpy_file(array):
    def write(place):
        np.save(place / "part.npy", array)

    return write


def header_of(text):
    """numpy's header, version 1, with this description of the array."""
    return b"\x93NUMPY\1\0" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"


def bits(text):
    return lambda place: (place / "part.npy").write_bytes(text)


MALFORMED = [  # writes the files, the source, what the line names
    (spoiled(magic=b"TNTIDX\0\0\0"), "set", "set.idx: found magic b'TNTIDX"),
    (spoiled(magic=b"MMIDIDY\0\0"), "set", "set.idx: found magic b'MMIDIDY"),
    (spoiled(version=2), "set", "set.idx: found version 2, expected version 1"),
    (spoiled(code=9), "set", "set.idx: found dtype code 9, expected a code from 1 to 8"),
    (spoiled(code=7), "set", "set.idx: found dtype code 7 (float32), expected token ids"),
    (spoiled(dtype="float64"), "set", "(float64), expected token ids"),
    (spoiled(code=4), "set", "set.idx: found sequence 1 at byte 6, expected byte 12"),
    (spoiled(pointers=[0, 8]), "set", "set.idx: found sequence 1 at byte 8, expected byte 6"),
    (spoiled(pointers=[2, 6]), "set", "set.idx: found sequence 0 at byte 2, expected byte 0"),
    (with_index("uint16", [3, -1], [0, 1, 2]), "set", "set.idx: found length -1 of sequence 1"),
    (with_index("uint16", [3, 3], [0, 1, 2]), "set", "set.bin: found 10 bytes, expected 12: the 6 uint16 ids"),
    (with_index("uint16", [3, 1], [0, 1, 2]), "set", "set.bin: found 10 bytes, expected 8: the 4 uint16 ids"),
    (with_index("uint16", [3, 2], [0, 2, 1]), "set", "set.idx: found document indices that do not ascend"),
    (with_index("uint16", [3, 2], [1, 1, 2]), "set", "set.idx: found document indices that do not ascend"),
    (with_index("uint16", [3, 2], [0, 1]), "set", "set.idx: found 1 as the last document index, expected the number"),
    (with_index("uint16", [3, 2], [0, 3]), "set", "set.idx: found 3 as the last document index"),
    (with_bytes(lambda content: content[:-1]), "set", "bytes, expected 82 for the 2 sequences and 3 document indices"),
    (with_bytes(lambda content: content + b"\0\0"), "set", "multimodal data sets cannot be converted"),
    (with_bytes(lambda content: content[:20]), "set", "set.idx: found 20 bytes, expected a header of 34"),
    (with_bytes(lambda content: b""), "set", "set.idx: found magic b''"),
    (with_bytes(lambda content: None), "set", "set.idx: no such file; expected it beside set.bin"),
    (with_bytes(lambda content: None), "set.bin", "set.bin: found no header of llm.c, no .idx"),
    (with_bytes(lambda content: None, ".bin"), "set", "set.bin: no such file; expected it beside set.idx"),
    (with_bytes(lambda content: None, ".bin"), "set.idx", "set.bin: no such file"),
    (with_bytes(lambda content: content[:-1], ".bin"), "set", "set.bin: found 9 bytes, expected 10"),
    (lambda place: write_megatron(place / "set", []), "set", "set.bin: found no ids"),
    (lambda place: write_megatron(place / "set", [[1, 2], [3, -4]], "int32"), "set", "set.bin: token 3: found id -4"),
    (lambda place: write_megatron(place / "set", [[1], [2, 257]]), "set", "set.bin: token 2: found id 257, expected 0"),
    (plain("part.npy", [1, 2, 256, 9000]), "part.npy", "part.npy: token 3: found id 9000, expected 0 to 256"),
    (bits(b"\1\0\2"), "part.npy", "part.npy: found 3 bytes, expected whole uint16 ids of 2 bytes"),
    (bits(b""), "part.npy", "part.npy: found no ids"),
    (bits(b"\x93NUMPY\1\0\xff\xff{"), "part.npy", "part.npy: damaged numpy file"),
    (
        bits(header_of("{'descr': '<u2', 'fortran_order': False, 'shape': (10,), ")),
        "part.npy",
        "part.npy: damaged numpy",
    ),
    (
        bits(header_of("{'descr': '<u2', 'fortran_order': False, 'shape': (True,)}")),
        "part.npy",
        "part.npy: damaged numpy",
    ),
    (bits(header_of(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**62},)}}")), "part.npy", "damaged numpy"),
    (numpy_file(np.zeros(4)), "part.npy", "part.npy: found float64 of shape (4,), expected one row of whole numbers"),
    (numpy_file(np.zeros((2, 2), int)), "part.npy", "part.npy: found int64 of shape (2, 2)"),
    (numpy_file(np.array([1, -2])), "part.npy", "part.npy: token 1: found id -2"),
    (numpy_file(np.array([object()])), "part.npy", "part.npy: damaged numpy file"),
    (plain("train.bin", [1, 300]), "train.bin", "train.bin: token 1: found id 300"),
    (plain("train.bin", [1, 2, 3], "uint8"), "train.bin", "train.bin: found 3 bytes, expected whole uint16 ids"),
    (plain("owt.bin", [1, 2]), "owt.bin", "owt.bin: found no header of llm.c"),
    (plain("owt.txt", [1, 2]), "owt.txt", "owt.txt: found a file of no known suffix"),
    (plain("train.bin", [20240520, 1, 9], "uint32"), "train.bin", "train.bin: truncated shard"),
    (plain("in/other.txt", [1]), "in", "in: found no .npy, .bin or .idx in it"),
    (plain("in/meta.json", [1]), "in", "in: found meta.json: token shards already"),
    (lambda place: [plain(f"in/{name}", [1])(place) for name in ("a.npy", "train.bin")], "in", "OLMo and nanoGPT"),
    (lambda place: os.mkfifo(place / "part.npy"), "part.npy", "part.npy: found a folder, pipe or device"),
    (lambda place: None, "nowhere/set", "nowhere/set: no such file (nearest existing folder:"),
]


def one_line(capsys, arguments):
    """The one line of a command that ended with code 2."""
    with pytest.raises(SystemExit) as end:
        run_command(command.main, list(map(str, arguments)))
    error = capsys.readouterr().err
    lines = [line for line in error.replace("\r", "\n").splitlines() if "error: " in line]
    assert end.value.code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize(("write", "name", "words"), MALFORMED, ids=[words for _, _, words in MALFORMED])
def test_malformed_files(tmp_path, capsys, write, name, words):
    """One line, and nothing is left behind."""
    (tmp_path / "place").mkdir()
    write(tmp_path / "place")
    source = tmp_path / "place" / name
    assert words in one_line(capsys, [source, "--tokenizer", "bytes", "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


FLAGS = [  # further arguments, what the line names
    ([], "--tokenizer: none given; name the one that made the ids"),
    (["--tokenizer", "gpt3"], "gpt2"),
    (
        ["--tokenizer", "bytes", "--split_by", "name", "--val_fraction", "0.1"],
        "--val_fraction: found 0.1, but",
    ),
    (["--tokenizer", "bytes", "--split_by", "name"], "set: found no split in the file's name, expected train or val"),
    (["--tokenizer", "bytes", "--split_by", "hash"], "--split_by"),
    (["--tokenizer", "bytes", "--dtype", "float32"], "--dtype"),
    (["--tokenizer", "bytes", "--val_fraction", "2"], "--val_fraction"),
    (["--tokenizer", "bytes", "--out", "place"], "which is converted; choose another folder"),
    (["--to", "nanogpt", "--tokenizer", "bytes"], "--tokenizer: the shards decide it; leave it out"),
    (["--to", "nanogpt", "other"], "--to nanogpt: found 2 sources, expected one folder of shards"),
    (["--to", "llm.c"], "--to"),
]


@pytest.mark.parametrize(("more", "words"), FLAGS)
def test_flags(tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    write_megatron(tmp_path / "place/set", DOCUMENTS)
    sources = [word for word in more if word == "other"]
    flags = [word for word in more if word != "other"]
    assert words in one_line(capsys, ["place/set", *sources, "--out", "out", *flags])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["place", "set.bin", "set.idx"]


def test_a_fault_late_in_the_files(tmp_path, capsys):
    """What was finished stays, is not taken for the whole, and the next call says the same."""
    write_megatron(tmp_path / "in/a", DOCUMENTS)
    write_megatron(tmp_path / "in/b", [*DOCUMENTS, [1, 999]])
    for _ in range(2):
        with pytest.raises(UserError, match=r"b.bin: token \d+: found id 999"):
            to_shards([tmp_path / "in"], "bytes", tmp_path / "out", shard_tokens=2000)
        assert shards(tmp_path / "out") and not looks_finished(tmp_path / "out")
    write_megatron(tmp_path / "in/b", [*DOCUMENTS, [1, 99]])
    to_shards([tmp_path / "in"], "bytes", tmp_path / "out", shard_tokens=2000)
    right = [
        expected(map(ended, documents), name, 0.05)["train"]
        for name, documents in (("a", DOCUMENTS), ("b", [*DOCUMENTS, [1, 99]]))
    ]
    assert ids_of(tmp_path / "out", "train") == [*right[0], *right[1]]
