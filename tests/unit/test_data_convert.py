"""Token files of Megatron, OLMo, nanoGPT and llm.c become shards with the same ids, and shards become nanoGPT's files.

The files are written here, byte by byte, as those programs write them, and results are read as those programs read."""

import base64
import glob
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import convert as command
from minzero.commands import run_command
from minzero.data import convert, foreign, pipeline
from minzero.data.convert import to_nanogpt, to_shards
from minzero.data.shards import TokenStream, write_shard
from minzero.data.tokenizer import characters, save_tokenizer
from minzero.data.verify import verify_folder
from minzero.errors import UserError
from minzero.files import write_json
from tests.helpers.data_sets import (
    contents,
    ended_by,
    in_a_child,
    killed_before_each_operation,
    looks_finished,
    meta_of,
    numbered,
    prepare,
    shards,
    text_of,
)
from tests.helpers.processes import ROOT, environment
from tests.helpers.token_files import index_of, write_ids, write_megatron

END = 256  # of the tokenizer `bytes`
DOCUMENTS = [list(f"The document of number {i}, with {i * i} in it.".encode()) for i in range(300)]


def ids_of(folder, split):
    """All ids of a split, read from its shards: the header of 1,024 bytes is skipped."""
    parts = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        magic, _, tokens = struct.unpack("<3i", path.read_bytes()[:12])
        parts.append(np.frombuffer(path.read_bytes()[1024:], "<u2" if magic == 20240520 else "<u4"))
        assert len(parts[-1]) == tokens
    return [token for part in parts for token in part.tolist()]


def expected(documents, name, fraction):
    """{split: ids}: each document ends with an end of text, and a hash of its number says where it goes."""
    found = {"train": [], "val": []}
    for number, document in enumerate(documents):
        found[pipeline.split_of(f"{name} {number}", fraction)] += document
    return found


def ended(document):
    """The document with an end of text, if it has none at either end."""
    return document if not document or END in (document[0], document[-1]) else [*document, END]


# -- Megatron ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_megatron(tmp_path, capsys, dtype):
    """Every type of ids. Without --append-eod the end of text is added, as Megatron would have."""
    to_shards([write_megatron(tmp_path / "in/set", DOCUMENTS, dtype)], "bytes", tmp_path / "out", val_fraction=0.2)
    assert "added the end of text (id 256) to 300 documents that had none" in capsys.readouterr().out
    right = expected([[*document, END] for document in DOCUMENTS], "set", 0.2)
    assert {split: ids_of(tmp_path / "out", split) for split in right} == right
    assert 30 < len(right["val"]) / sum(map(len, right.values())) * 300 < 90
    faults, _ = verify_folder(tmp_path / "out")
    assert faults == []
    if dtype in ("uint8", "int8"):
        return
    with_ends = write_megatron(tmp_path / "again/set", [[*document, END] for document in DOCUMENTS], dtype)
    to_shards([with_ends], "bytes", tmp_path / "out2", val_fraction=0.2)
    assert "added" not in capsys.readouterr().out
    assert shards(tmp_path / "out") == shards(tmp_path / "out2")


IDS = st.lists(st.sampled_from([1, 2, 3, END]), max_size=9)


IN_MEMORY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@IN_MEMORY
@given(st.data())
def test_megatron_in_blocks(quick, data):
    """Any sequences in any documents, whatever block they fall into, cut into shards of any size."""
    documents = data.draw(st.lists(st.lists(IDS, max_size=3), min_size=1, max_size=12))
    flat = [list(itertools.chain(*document)) for document in documents]
    fraction = data.draw(st.sampled_from([0, 0.3]))
    right = expected(map(ended, flat), "set", fraction)
    folder = Path(tempfile.mkdtemp(dir=quick))
    write_megatron(folder / "set", [document or [[]] for document in documents])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "BLOCK", data.draw(st.integers(1, 12)))
        patch.setattr(foreign, "INDEX_BLOCK", data.draw(st.integers(1, 5)))
        how = {"val_fraction": fraction, "shard_tokens": data.draw(st.integers(1, 40))}
        if not any(token != END for token in right["train"]):
            with pytest.raises(UserError, match=r"found no ids|found no text|no text fell into the train split"):
                to_shards([folder / "set"], "bytes", folder / "out", **how)
            return
        to_shards([folder / "set"], "bytes", folder / "out", **how)
    assert {split: ids_of(folder / "out", split) for split in right} == right
    meta = meta_of(folder / "out")
    assert [meta["splits"][split]["tokens"] for split in right] == [len(ids) for ids in right.values()]
    assert sum(meta["splits"][split]["documents"] for split in right) == sum(map(bool, flat))


def test_megatron_without_documents(tmp_path):
    """Where no document was ended, each sequence is one, as Megatron's GPTDataset takes it."""
    for number, indices in enumerate(([0], [])):
        lengths = list(map(len, DOCUMENTS))
        prefix = write_megatron(tmp_path / f"{number}/set", DOCUMENTS)
        prefix.with_suffix(".idx").write_bytes(index_of("uint16", lengths, indices))
        to_shards([prefix], "bytes", tmp_path / f"out{number}", val_fraction=0.2)
        right = expected(map(ended, DOCUMENTS), "set", 0.2)
        assert ids_of(tmp_path / f"out{number}", "train") == right["train"]


def test_several_data_sets_and_names(tmp_path):
    """Two prefixes, named in every way; a document keeps its split; or their names are the splits."""
    write_megatron(tmp_path / "in/my_train_text", DOCUMENTS[:200])
    write_megatron(tmp_path / "in/my_valid_text", DOCUMENTS[200:])
    ways = (["in"], ["in/my_train_text.bin", "in/my_valid_text"], sorted(map(str, (tmp_path / "in").iterdir())))
    for number, names in enumerate(ways):
        to_shards([tmp_path / name for name in names], "bytes", tmp_path / f"out{number}", val_fraction=0.3)
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1") == contents(tmp_path / "out2")
    a = expected(map(ended, DOCUMENTS[:200]), "my_train_text", 0.3)
    b = expected(map(ended, DOCUMENTS[200:]), "my_valid_text", 0.3)
    assert ids_of(tmp_path / "out0", "val") == a["val"] + b["val"]
    to_shards([tmp_path / "in"], "bytes", tmp_path / "named", split_by="name")
    assert ids_of(tmp_path / "named", "val") == [token for document in DOCUMENTS[200:] for token in [*document, END]]
    assert meta_of(tmp_path / "named")["splits"]["train"]["documents"] == 200


# -- OLMo ----------------------------------------------------------------------------------------


@IN_MEMORY
@given(st.data())
def test_olmo_in_blocks(quick, data):
    """Documents end with the end of text, or begin with it where the file does."""
    ids = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, END]), min_size=1, max_size=60))
    documents = [[]]
    for place, token in enumerate(ids):
        if ids[0] == END and token == END and place:
            documents.append([])
        documents[-1].append(token)
        if ids[0] != END and token == END and place + 1 < len(ids):
            documents.append([])
    right = expected(map(ended, documents), "part.npy", 0.3)
    folder = Path(tempfile.mkdtemp(dir=quick))
    write_ids(folder / "part.npy", ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "BLOCK", data.draw(st.integers(1, 12)))
        if not any(token != END for token in right["train"]):
            with pytest.raises(UserError, match=r"found no text|no text fell into the train split"):
                to_shards([folder / "part.npy"], "bytes", folder / "out", val_fraction=0.3)
            return
        to_shards([folder / "part.npy"], "bytes", folder / "out", val_fraction=0.3)
    assert {split: ids_of(folder / "out", split) for split in right} == right


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The folder of a tokenizer whose ids need 32 bits: every byte and every pair of bytes, and an end of text."""
    folder = tmp_path_factory.mktemp("wide")
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    special = {"<|endoftext|>": len(tokens)}
    write_json(folder / "tokenizer_settings.json", {"pattern": r"[\s\S]", "special_tokens": special})
    return str(folder)


def test_olmo_types(tmp_path, wide):
    """The type without a header follows the vocabulary, or --dtype; numpy's own header says it."""
    ids = [token for document in DOCUMENTS for token in [*document, END]]
    write_ids(tmp_path / "a/part.npy", ids)
    write_ids(tmp_path / "b/part.npy", ids, "uint32")
    for name, dtype in (("c", "uint16"), ("d", "int64"), ("e", ">u4")):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "part.npy", np.array(ids, dtype))
    for name in "acde":
        to_shards([tmp_path / name], "bytes", tmp_path / f"out_{name}")
    with pytest.raises(UserError, match=r"b/part.npy: found 0 in every second .* --dtype uint32"):
        to_shards([tmp_path / "b"], "bytes", tmp_path / "out_b")
    assert not (tmp_path / "out_b").exists()
    to_shards([tmp_path / "b"], "bytes", tmp_path / "out_b", dtype="uint32")
    assert len({str(shards(tmp_path / f"out_{name}")) for name in "abcde"}) == 1
    large = [*range(65_000, 65_792), 65_792] * 40
    write_ids(tmp_path / "large/part.npy", large, "uint32")
    to_shards([tmp_path / "large"], wide, tmp_path / "out_large", val_fraction=0)
    assert ids_of(tmp_path / "out_large", "train") == large
    with pytest.raises(UserError, match=r"part.npy: token 0: found id .*, or its type with --dtype"):
        to_shards([tmp_path / "a"], wide, tmp_path / "out_f")


def test_a_wrong_tokenizer_is_suspected(tmp_path, capsys):
    write_ids(tmp_path / "part.npy", [5] * 1000)
    to_shards([tmp_path / "part.npy"], "bytes", tmp_path / "out", val_fraction=0)
    assert "warning: found no id 256, the end of text of bytes, between documents" in capsys.readouterr().out


# -- nanoGPT -------------------------------------------------------------------------------------


def get_batch(folder, split, block_size, starts):
    """As nanoGPT's get_batch, from given starts."""
    data = np.memmap(os.path.join(folder, f"{split}.bin"), dtype=np.uint16, mode="r")
    x = [data[i : i + block_size].astype(np.int64) for i in starts]
    y = [data[i + 1 : i + 1 + block_size].astype(np.int64) for i in starts]
    return np.stack(x), np.stack(y)


@pytest.fixture
def prepared(tmp_path):
    prepare(numbered(), tmp_path / "prepared")
    return tmp_path / "prepared"


def test_round_trip_by_nanogpt(prepared, tmp_path, capsys):
    """Ours, nanoGPT's, ours: the same ids, documents and bytes of text, and nanoGPT reads the windows that we read."""
    to_nanogpt(prepared, tmp_path / "nano")
    assert sorted(contents(tmp_path / "nano")) == ["meta.pkl", "train.bin", "val.bin"]
    assert len(list(prepared.glob("train_*.bin"))) > 3
    for split in ("train", "val"):
        assert (tmp_path / "nano" / f"{split}.bin").stat().st_size == 2 * len(ids_of(prepared, split))
        stream = TokenStream(prepared, split, 16)
        ours, theirs = stream.batch([0, 3]), get_batch(tmp_path / "nano", split, 16, [0, 48])
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
    to_shards([tmp_path / "nano"], "bytes", tmp_path / "back", shard_tokens=3000)
    before, after = meta_of(prepared), meta_of(tmp_path / "back")
    for split in ("train", "val"):
        assert ids_of(tmp_path / "back", split) == ids_of(prepared, split)
        assert text_of(tmp_path / "back", split) == text_of(prepared, split)
        for key in ("tokens", "bytes"):
            assert after["splits"][split][key] == before["splits"][split][key]
    for key in ("tokenizer", "vocab_size", "end_of_text", "loss_mask", "skipped"):
        assert after[key] == before[key]
    to_nanogpt(prepared, tmp_path / "nano")  # again: the same files are not in the way


def test_one_of_nanogpts_files(tmp_path, capsys):
    """Its name decides, also for validation alone; or it is split by document."""
    documents = [[*document, END] for document in DOCUMENTS]
    ids = [token for document in documents for token in document]
    write_ids(tmp_path / "val.bin", ids)
    to_shards([tmp_path / "val.bin"], "bytes", tmp_path / "named")
    assert ids_of(tmp_path / "named", "val") == ids and not list((tmp_path / "named").glob("train_*"))
    assert "evaluate on it with --data.path" in capsys.readouterr().out
    to_shards([tmp_path / "val.bin"], "bytes", tmp_path / "split", val_fraction=0.2, split_by="document")
    right = expected(documents, "val.bin", 0.2)
    assert {split: ids_of(tmp_path / "split", split) for split in right} == right


def test_nanogpt_with_gpt2_has_no_meta_pkl(tmp_path, shared):
    """Without meta.pkl nanoGPT takes GPT-2's vocabulary and tokenizer, with it another's."""
    prepare(numbered(), tmp_path / "a", tokenizer="gpt2")
    to_nanogpt(tmp_path / "a", tmp_path / "nano")
    assert sorted(contents(tmp_path / "nano")) == ["train.bin", "val.bin"]
    (tmp_path / "nano/meta.pkl").write_bytes(b"another")
    with pytest.raises(UserError, match=r"nano/meta.pkl: holds something else"):
        to_nanogpt(tmp_path / "a", tmp_path / "nano")


def test_meta_pkl_is_what_nanogpt_reads(tmp_path):
    """vocab_size for its train.py; stoi and itos for its sample.py, which encodes and decodes by them."""
    text = "to be, or not to be\n" * 50
    save_tokenizer(tmp_path / "tokenizer", *characters(text))
    documents = ((f"row {i}", text) for i in range(60))
    prepare(documents, tmp_path / "a", tokenizer=str(tmp_path / "tokenizer"))
    to_nanogpt(tmp_path / "a", tmp_path / "nano")
    meta = pickle.loads((tmp_path / "nano/meta.pkl").read_bytes())
    assert meta["vocab_size"] == len(set(text)) + 1 == len(meta["itos"])
    assert {character: meta["stoi"][character] for character in set(text)} == {
        character: number for number, character in enumerate(sorted(set(text)))
    }
    ids = get_batch(tmp_path / "nano", "val", len(text), [1])[0][0].tolist()
    assert ids == [meta["stoi"][character] for character in text]
    assert "".join(meta["itos"][token] for token in ids) == text


def test_what_nanogpt_cannot_read(tmp_path, prepared):
    def refused(words, source, out=tmp_path / "out"):
        with pytest.raises(UserError, match=words):
            to_nanogpt(source, out)
        assert not (tmp_path / "out").exists()

    meta = meta_of(prepared)
    shutil.copytree(prepared, tmp_path / "masked")
    write_json(tmp_path / "masked/meta.json", meta | {"loss_mask": True})
    refused("masked: found tokens without loss", tmp_path / "masked")
    write_json(tmp_path / "masked/meta.json", meta | {"vocab_size": 65537})
    refused("found a vocabulary of 65537, expected at most 65536: nanoGPT reads uint16", tmp_path / "masked")
    write_json(tmp_path / "masked/meta.json", meta | {"vocab_size": 100, "end_of_text": 1})
    refused("val_000000.bin: found token id", tmp_path / "masked")
    refused("no such folder", tmp_path / "nowhere")
    refused("choose another folder", prepared, prepared)
    for path in prepared.glob("val_*"):
        path.unlink()
    refused("val_000000.bin: No such file", prepared)
    (tmp_path / "wide").mkdir()
    for split in ("train", "val"):
        write_shard(tmp_path / f"wide/{split}_0.bin", np.zeros(9, "<u4"))
    refused("found uint32, expected uint16", tmp_path / "wide")


# -- llm.c ---------------------------------------------------------------------------------------


def llmc_tokens(pattern, magic=20240520, version=1, dtype="<u2", batch=64):
    """The tokens of the shards that llm.c's dataloader (llmc/dataloader.h; train_llama3.py for uint32) finds by a
    pattern, with the checks that it makes of each."""
    tokens = []
    for name in sorted(glob.glob(pattern)):
        with open(name, "rb") as file:
            header = np.frombuffer(file.read(256 * 4), np.int32)
            assert header[0] == magic and header[1] == version
            count = int(header[2])
            assert count > 0 and os.path.getsize(name) == 256 * 4 + count * np.dtype(dtype).itemsize
            assert count >= batch + 1
            tokens += np.frombuffer(file.read(), dtype).tolist()
    return tokens


def test_llmc_reads_shards_as_they_are(tmp_path, wide):
    prepare(numbered(), tmp_path / "a")
    prepare(numbered(), tmp_path / "wide", tokenizer=wide)
    for split in ("train", "val"):
        stream = TokenStream(tmp_path / "a", split, 8)
        assert llmc_tokens(f"{tmp_path}/a/{split}_*.bin") == stream.read(0, stream.tokens).tolist()
        stream = TokenStream(tmp_path / "wide", split, 8)
        found = llmc_tokens(f"{tmp_path}/wide/{split}_*.bin", 20240801, 7, "<u4")
        assert found == stream.read(0, stream.tokens).tolist()


def test_llmc_shards_get_a_meta_json(tmp_path):
    """Their names say the split; the tokenizer is recorded."""
    (tmp_path / "in").mkdir()
    for name, tokens in (("train_000001", [END, 1, 2, END, 3]), ("train_000002", [4, 5]), ("val_000000", [END, 9, 9])):
        write_shard(tmp_path / f"in/fineweb_{name}.bin", np.array(tokens, "<u2"))
    to_shards([tmp_path / "in"], "bytes", tmp_path / "out")
    assert ids_of(tmp_path / "out", "train") == [END, 1, 2, END, 3, 4, 5]
    assert ids_of(tmp_path / "out", "val") == [END, 9, 9]


# -- what the rest of the program knows of a converted folder ------------------------------------


def test_the_tokenizer_is_recorded(tmp_path):
    """As a preparation records it, the folder of a trained one relative to the shards."""
    save_tokenizer(tmp_path / "tokenizer", *characters("abc\n"))
    documents = [[0, 1, 2], [3, 3, 3]] * 50
    write_megatron(tmp_path / "in/set", documents)
    to_shards([tmp_path / "in/set"], str(tmp_path / "tokenizer"), tmp_path / "out")
    prepare(numbered_abc(), tmp_path / "prepared", tokenizer=str(tmp_path / "tokenizer"))
    for key in ("tokenizer", "vocab_size", "end_of_text"):
        assert meta_of(tmp_path / "out")[key] == meta_of(tmp_path / "prepared")[key]
    assert meta_of(tmp_path / "out")["tokenizer"]["name"] == "../tokenizer"
    encoding = pipeline.tokenizer_of(tmp_path / "out")
    assert encoding.decode(ids_of(tmp_path / "out", "train")[:4]) in ("\nab<|endoftext|>", "\n\n\n<|endoftext|>", "abc")
    size = sum(meta_of(tmp_path / "out")["splits"][split]["bytes"] for split in ("train", "val"))
    assert size == sum(map(len, documents))


def numbered_abc():
    return ((f"row {i}", "abc\n" * 20) for i in range(60))


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
    right, folder, seen = contents(quick / "whole"), quick / "again", []
    for _ in range(100):

        def work():
            left = [26]  # file operations until the end

            def count(event, arguments):
                if event in ("open", "os.rename", "os.truncate") and str(folder) in str(arguments):
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            convert_to(folder, source)

        status = ended_by(in_a_child(work))
        seen.append(len(shards(folder)))
        if status == 0:
            break
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
