"""Shards that are damaged, before a run and in the middle of one; handles and reads that do not grow with the shards;
verify.py and data.verify."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from data import verify
from minzero.data import pipeline, shards
from minzero.data.meta import read_meta
from minzero.data.mixture import Mixture
from minzero.data.shards import TokenStream, write_shard
from minzero.data.verify import verify_folder
from minzero.errors import UserError
from minzero.files import write_json
from tests.helpers.processes import ROOT
from tests.unit.test_data_shards import make


@pytest.fixture(autouse=True)
def no_hang():
    """A pipe in place of a file must not be waited at."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)


def opens_of(function):
    """(result, names of the files that function() opens)."""
    names, on = [], [True]

    def count(event, arguments):
        if on[0] and event == "open":
            names.append(os.path.basename(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else "")

    sys.addaudithook(count)
    result = function()
    on[0] = False
    return result, names


# -- at the start --------------------------------------------------------------------------------


def test_a_start_opens_few_of_many_shards(tmp_path):
    """One stat each, headers of 64, and 64 windows (of which some reach into a second shard) for their ids."""
    folder = make(tmp_path / "many", [[number % 1000] * 20 for number in range(1000)])
    _, names = opens_of(lambda: Mixture(str(folder), "train", 4, 1000, 0))
    assert len([name for name in names if name.endswith(".bin")]) <= 1 + 64 + 2 * 64


@pytest.mark.parametrize("place", [0, 63, 64, 500, 998])
@pytest.mark.parametrize("how", ["missing", "cut", "longer", "folder", "pipe", "broken link", "device"])
def test_a_shard_that_is_gone_or_of_another_size_is_named_at_the_start(tmp_path_factory, place, how):
    folder = tmp_path_factory.getbasetemp() / "thousand"
    if not folder.exists():
        make(folder, [[number % 1000] * 20 for number in range(999)])
    path = folder / f"train_{place:06d}.bin"
    whole = path.read_bytes()
    spoil(path, how)
    try:
        with pytest.raises(UserError, match=path.name) as caught:
            TokenStream(folder, "train", 4)
        assert "\n" not in str(caught.value)
    finally:
        os.rmdir(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)


def spoil(path, how):
    """Make something else of a shard of 20 uint16 tokens."""
    whole = path.read_bytes()
    if how in ("cut", "longer"):
        path.write_bytes(whole[:-6] if how == "cut" else whole + b"ab")
        return
    if how == "header":
        path.write_bytes(b"XXXX" + whole[4:])
        return
    if how == "count":
        path.write_bytes(whole[:8] + b"\x07" + whole[9:])
        return
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.symlink_to("/dev/zero" if how == "device" else "nowhere")


META = [  # changes of meta.json, what the line names
    ({"vocab_size": True}, "vocab_size: found true"),
    ({"vocab_size": -5}, "vocab_size: found -5"),
    ({"vocab_size": 0}, "vocab_size: found 0"),
    ({"vocab_size": 2**70}, "vocab_size: found 1180591620717411303424"),
    ({"vocab_size": 10.5}, "vocab_size: found 10.5"),
    ({"vocab_size": None}, "vocab_size: found null"),
    ({"tokenizer": []}, "tokenizer: found []"),
    ({"tokenizer": {}}, "tokenizer.fingerprint"),
    ({"tokenizer": {"fingerprint": 5}}, "tokenizer.fingerprint: found 5"),
    ({"tokenizer": {"fingerprint": "f", "name": ["gpt2"]}}, "tokenizer.name"),
    ({"tokenizer": {"fingerprint": "f", "name": "a\0b"}}, "tokenizer.name"),
    ({"tokenizer": {"fingerprint": "f", "name": "\ud800"}}, "tokenizer.name"),
    ({"tokenizer": {"fingerprint": "f", "name": "x", "trained": "yes"}}, "tokenizer.trained"),
    ({"end_of_text": "<|endoftext|>"}, "end_of_text"),
    ({"end_of_text": True}, "end_of_text"),
    ({"end_of_text": -1}, "end_of_text"),
    ({"end_of_text": 10**6}, "end_of_text: found 1000000"),
    ({"loss_mask": "no"}, "loss_mask"),
    ({"loss_mask": 1}, "loss_mask"),
    ({"loss_mask": None}, "loss_mask"),
    ({"settings": [1]}, "settings"),
    ({"skipped": -1}, "skipped"),
    ({"splits": []}, "splits"),
    ({"splits": None}, "splits"),
    ({"splits": {"train": []}}, "splits.train"),
    ({"splits": {"train": {}}}, "splits.train"),
    ({"splits": {"train": {"shards": {}}}}, "splits.train"),
    ({"splits": {"train": {"shards": [], "bytes": "many"}}}, "splits.train.bytes"),
    ({"splits": {"train": {"shards": [], "tokens": -3}}}, "splits.train.tokens"),
    ({"splits": {"train": {"shards": [], "documents": False}}}, "splits.train.documents"),
    ({"splits": {"val": {"shards": ["val.bin"]}}}, "splits.val.shards[0]"),
    ({"file": "../a/train_000000.bin"}, ".file"),
    ({"file": "/etc/passwd"}, ".file"),
    ({"file": "below/x.bin"}, ".file"),
    ({"file": ".."}, ".file"),
    ({"file": ""}, ".file"),
    ({"file": "a\0b"}, ".file"),
    ({"file": "a\nb"}, ".file"),
    ({"file": "\ud800.bin"}, ".file"),
    ({"file": 5}, ".file"),
    ({"file": None}, ".file"),
    ({"file": "x" * 300}, "File name too long"),
    ({"file": "train_000001.bin"}, "a name that no other shard has"),
    ({"tokens": -1}, ".tokens: found -1"),
    ({"tokens": True}, ".tokens: found true"),
    ({"tokens": 1.0}, ".tokens: found 1.0"),
    ({"tokens": "20"}, ".tokens"),
    ({"tokens": 2**63}, ".tokens"),
    ({"tokens": 2**62}, "train_000000.bin: found 20 tokens, expected 4611686018427387904"),
    ({"tokens": None}, ".tokens: found null"),
    ({"sha256": 5}, ".sha256"),
    ({"sha256": "abc"}, ".sha256"),
    ({"sha256": ["0"]}, ".sha256"),
]


@pytest.mark.parametrize("change, words", META, ids=lambda part: ascii(part)[:50])
def test_odd_values_in_meta_json_are_named(tmp_path, change, words):
    folder = make(tmp_path / "a", [[1] * 20, [2] * 20])
    meta = json.loads((folder / "meta.json").read_text())
    if next(iter(change)) in ("file", "tokens", "sha256"):
        meta["splits"]["train"]["shards"][0] |= change
    else:
        meta |= change
    (folder / "meta.json").write_text(json.dumps(meta))
    for read in (lambda: [TokenStream(folder, "train", 4)], lambda: verify_folder(str(folder))[0]):
        try:
            lines = read()
        except UserError as error:
            lines = [str(error)]
        assert all("\n" not in line and str(folder) in line for line in lines) and words in lines[0], lines


@pytest.mark.parametrize("how", ["folder", "pipe", "device", "digits", "deep", "missing key"])
def test_a_meta_json_that_is_no_file_or_no_json_is_named(tmp_path, how):
    folder = make(tmp_path / "a", [[1] * 20])
    path = folder / "meta.json"
    if how == "digits":
        path.write_text('{"vocab_size": ' + "9" * 5000 + "}")
    elif how == "deep":
        path.write_text("[" * 100_000)
    elif how == "missing key":
        path.write_text('{"tokenizer": {"fingerprint": "f"}, "splits": {}}')
    else:
        spoil(path, how)
    with pytest.raises(UserError, match=r"meta\.json") as caught:
        read_meta(folder)
    assert "\n" not in str(caught.value)


def test_a_data_folder_with_an_absurd_name(tmp_path):
    for name in ("x" * 300, "a\0b", "\ud800", "file/below"):
        with pytest.raises(UserError, match="no folder"):
            TokenStream(f"{tmp_path}/{name}", "train", 4)


# -- in the middle of a run ----------------------------------------------------------------------


def test_an_id_above_the_vocabulary_is_named_with_its_place_whenever_it_is_read(tmp_path):
    """Also one that is below the model's vocabulary, and is in no window that the start looks at."""
    parts, window = [[1] * 4000, [2] * 4000, [3] * 4000], (4000 + 1234) // 4
    for vocab_size, wrong in ((1000, 1000), (1000, 65535), (70_000, 70_001)):
        folder = make(tmp_path / f"{wrong}", parts, vocab_size=vocab_size)
        path, width = folder / "train_000001.bin", 2 if vocab_size < 65536 else 4
        content = bytearray(path.read_bytes())
        content[1024 + width * 1234 : 1024 + width * 1235] = wrong.to_bytes(width, "little")
        path.write_bytes(content)
        data = Mixture(str(folder), "train", 4, vocab_size + 24, 0)
        stream = data.streams[0]
        expected = rf"train_000001\.bin: found token id {wrong}, expected ids below .*{vocab_size} \(token 1234 of"
        for read, *arguments in (
            (stream.batch, [0, 5, window]),
            (data.batch, [window]),
            (stream.read, 4000, 4000),
            (stream.example, 5230, 8),
        ):
            with pytest.raises(UserError, match=expected):
                read(*arguments)
        stream.batch([0, window - 2, window + 2])


def test_an_id_above_the_vocabulary_with_a_loss_mask(tmp_path):
    mask = 1 << 31
    tokens = np.array([5 | mask] * 500 + [7] * 500, dtype="<u4")
    tokens[301], tokens[777] = 300 | mask, 300
    entry = write_shard(tmp_path / "train_000000.bin", tokens)
    meta = {"tokenizer": {"fingerprint": "f"}, "vocab_size": 257, "loss_mask": True}
    write_json(tmp_path / "meta.json", meta | {"splits": {"train": {"shards": [entry]}}})
    stream = TokenStream(tmp_path, "train", 10)
    for place in (301, 777):
        with pytest.raises(UserError, match=rf"found token id 300, .*\(token {place} of this file\)"):
            stream.batch([place // 10])
    with pytest.raises(UserError, match=r"found token id 300 \(token 301 of this file\), expected ids below 257"):
        stream.verify()
    inputs, targets = stream.batch([0, 60])
    assert inputs.max() == 7 and set(targets[0]) == {-1} and set(targets[1]) == {7}


@pytest.mark.parametrize("how", ["missing", "cut", "folder", "pipe", "device", "broken link", "header", "count"])
def test_a_shard_that_is_spoilt_in_mid_run_is_named(tmp_path, how):
    folder = make(tmp_path / "a", [[number] * 20 for number in range(200)])
    stream = TokenStream(folder, "train", 4)
    stream.batch([0])
    path = folder / "train_000150.bin"
    spoil(path, how)
    with pytest.raises(UserError, match=r"train_000150\.bin") as caught:
        stream.read(150 * 20, 20)
    assert "\n" not in str(caught.value)
    assert stream.read(149 * 20, 20).tolist() == [149] * 20


def test_an_error_of_the_disk_is_named_with_its_place(tmp_path, monkeypatch):
    stream = TokenStream(make(tmp_path / "a", [[1] * 400]), "train", 4)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shards.os, "preadv", fail)
    with pytest.raises(UserError, match=r"train_000000\.bin: token 40, byte 1104: could not be read \(Input/output"):
        stream.batch([10])


def test_reads_that_the_system_gives_in_parts_are_put_together(tmp_path, monkeypatch):
    """One call reads less than 2 GiB, and a network file system may give less."""
    stream, whole = TokenStream(make(tmp_path / "a", [list(range(400))]), "train", 4), os.preadv
    monkeypatch.setattr(shards.os, "preadv", lambda file, parts, place: whole(file, [parts[0][:7]], place))
    assert stream.read(10, 300).tolist() == list(range(10, 310))


def test_open_files_are_bounded_over_all_data_sets(tmp_path):
    folders = {str(make(tmp_path / str(n), [[n] * 20] * 40)): 1 for n in range(30)}
    before = len(os.listdir("/proc/self/fd"))
    data = [Mixture(folders, split, 4, 1000, 0) for split in ("train", "train")]
    for part in data:
        inputs, _ = part.batch(np.arange(part.windows))
        assert len(np.unique(inputs)) == 30
    assert len(shards.SHARED_FILES) == shards.OPEN_FILES
    assert len(os.listdir("/proc/self/fd")) - before <= shards.OPEN_FILES
    del data, part
    assert len(shards.SHARED_FILES) < shards.OPEN_FILES  # a stream that is gone gives its files back


# -- verify.py and data.verify -------------------------------------------------------------------


def verified(capsys, *folders):
    """(code, what verify.py printed)."""
    from minzero.commands import run_command

    try:
        run_command(verify.main, [str(folder) for folder in folders])
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr()


def test_verify_passes_what_is_whole(tmp_path, small_data, capsys):
    prepared = tmp_path / "prepared"
    args = pipeline.options("", ".").parse_args(["--out", str(prepared), "--shard_tokens", "3000", "--workers", "1"])
    pipeline.prepare(((f"row {i}", "text " * 50) for i in range(300)), "bytes", args)
    wide = make(tmp_path / "wide", [[70_000] * 30, []], vocab_size=70_001)
    capsys.readouterr()
    code, said = verified(capsys, prepared, small_data, wide)
    assert code == 0 and not said.err
    lines = said.out.splitlines()[-3:]
    assert all(": ok, " in line and line.endswith(" s") for line in lines)
    assert f"{small_data}: ok, 65,000 tokens in 4 shards" in said.out and "30 tokens in 2 shards" in said.out


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("how", ["bit", "id", "cut", "missing", "header", "pipe", "total", "half"])
def test_verify_names_each_fault(tmp_path, capsys, how, meta):
    good = make(tmp_path / "good", [[1] * 20])
    folder = make(tmp_path / "bad", [[1] * 20, [2] * 20, [3] * 20], meta=meta)
    path = folder / "train_000001.bin"
    if how in ("bit", "id"):
        content = bytearray(path.read_bytes())
        content[1024 + 10] ^= 1
        if how == "id":
            content[1024 + 11] = 255
        path.write_bytes(content)
        if not meta:  # nothing tells: it says what it cannot verify
            code, said = verified(capsys, folder)
            assert code == 0 and "cannot be verified" in said.out and "largest id" in said.out
            return
    elif how == "total":
        if not meta:
            return
        path = folder / "meta.json"
        content = json.loads(path.read_text())
        content["splits"]["train"]["tokens"] = 61
        write_json(path, content)
    elif how == "half":
        (folder / "meta.json").unlink(missing_ok=True)
        (folder / "progress.json").write_text("{}")
        path = folder
    elif how == "missing" and not meta:
        return
    else:
        spoil(path, how)
    code, said = verified(capsys, good, folder)
    assert code == 2 and f"{good}: ok" in said.out and f"{folder}: ok" not in said.out
    named = [line for line in said.out.splitlines() if str(path) in line]
    assert len(named) == 1 and said.err.count("\n") == 1 and str(folder) in said.err, said


def test_verify_of_headerless_files_and_of_what_is_no_data(tmp_path, capsys):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
    code, said = verified(capsys, tmp_path)
    assert code == 0 and "ok, 150 tokens in 2 shards (no meta.json" in said.out and "largest id 99" in said.out
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "none", tmp_path / "empty", tmp_path / "val.bin", "x" * 300):
        code, said = verified(capsys, place)
        assert code == 2 and str(place) in said.out and "Traceback" not in said.err
    code, said = verified(capsys, tmp_path / "empty" / "gone" / "further")
    assert code == 2 and f"(nearest existing folder: {tmp_path / 'empty'})" in said.out


def test_the_command_itself(tmp_path):
    folder = make(tmp_path / "a", [[1] * 20])
    command = [sys.executable, ROOT / "data/verify.py", folder]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 0
    (folder / "train_000000.bin").write_bytes(b"")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "verify.py: error: found faults in" in done.stderr


def test_a_start_verifies_where_asked_and_the_ranks_of_a_node_share_the_work(tmp_path, monkeypatch):
    folder = make(tmp_path / "a", [[number] * 20 for number in range(10)])
    read = []
    whole = shards.verify_shard
    monkeypatch.setattr(shards, "verify_shard", lambda path, *rest: read.append(path.name) or whole(path, *rest))
    for rank in range(3):
        Mixture(str(folder), "train", 4, 1000, 0, verify=(rank, 3))
    assert sorted(read) == [f"train_{number:06d}.bin" for number in range(10)]
    path = folder / "train_000005.bin"
    content = bytearray(path.read_bytes())
    content[1030] ^= 4  # an id that is as good as another
    path.write_bytes(content)
    Mixture(str(folder), "train", 4, 1000, 0)
    with pytest.raises(UserError, match=r"train_000005\.bin: found SHA-256"):
        Mixture(str(folder), "train", 4, 1000, 0, verify=(0, 1))
