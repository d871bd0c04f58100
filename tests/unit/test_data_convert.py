"""Token files of Megatron, OLMo, nanoGPT and llm.c become shards with the same ids, and shards become nanoGPT's files.

The files are written here, byte by byte, as those programs write them, and results are read as those programs read."""

import base64
import glob
import itertools
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minzero.data import convert, foreign, pipeline
from minzero.data.convert import to_nanogpt, to_shards
from minzero.data.learn_tokenizer import characters
from minzero.data.shards import TokenStream, write_shard
from minzero.data.tokenizer_files import save_tokenizer
from minzero.data.verify import verify_folder
from minzero.errors import UserError
from minzero.files import write_json
from tests.helpers.data_sets import (
    contents,
    meta_of,
    numbered,
    prepare,
    shards,
    text_of,
)
from tests.helpers.token_files import DOCUMENTS, END, ended, expected, ids_of, index_of, write_ids, write_megatron

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


IN_MEMORY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


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


def test_a_tokenizer_folder_called_gpt2_is_not_gpt2(tmp_path):
    save_tokenizer(tmp_path / "a/gpt2", *characters("abc\n"))
    prepare(numbered_abc(), tmp_path / "a", tokenizer=str(tmp_path / "a/gpt2"))
    to_nanogpt(tmp_path / "a", tmp_path / "nano")
    assert (tmp_path / "nano/meta.pkl").exists()


def test_a_conversion_without_ends_of_text_continues(tmp_path, monkeypatch):
    """As nanoGPT's Shakespeare: of such a file no document is counted."""
    tokens = np.arange(4000, dtype="<u2") % 97
    for name in ("train", "val"):
        (tmp_path / "in").mkdir(exist_ok=True)
        tokens.tofile(tmp_path / f"in/{name}.bin")
    to_shards([tmp_path / "in"], "bytes", tmp_path / "whole", shard_tokens=500)
    saved = []
    save = convert.Conversion.save

    def killed(self, *finished):
        save(self, *finished)
        saved.append(finished)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(convert.Conversion, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        to_shards([tmp_path / "in"], "bytes", tmp_path / "out", shard_tokens=500)
    monkeypatch.setattr(convert.Conversion, "save", save)
    with pytest.raises(UserError, match="already holds data made with another shard_tokens"):
        to_shards([tmp_path / "in"], "bytes", tmp_path / "out", shard_tokens=1000)
    to_shards([tmp_path / "in"], "bytes", tmp_path / "out", shard_tokens=500)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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
    write_json(tmp_path / "masked/meta.json", meta | {"vocab_size": 100, "end_of_text": 1, "document": {}})
    refused("val_000000.bin: found token id", tmp_path / "masked")
    refused("no such folder", tmp_path / "nowhere")
    refused("choose another folder", prepared, prepared)
    for path in prepared.glob("val_*"):
        path.unlink()
    refused("val_000000.bin: No such file", prepared)
    (tmp_path / "wide").mkdir()
    for split in ("train", "val"):
        write_shard(tmp_path / f"wide/{split}_0.bin", np.zeros(9, "<u4"))
    refused("found no meta.json, expected token shards with one", tmp_path / "wide")
    entry = {"file": "train_0.bin", "tokens": 9}
    splits = {"train": {"shards": [entry]}, "val": {"shards": [entry | {"file": "val_0.bin"}]}}
    write_json(tmp_path / "wide/meta.json", meta | {"splits": splits})
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
    assert encoding.decode([0, 1, 2, 3]) == "\nabc"
    size = sum(meta_of(tmp_path / "out")["splits"][split]["bytes"] for split in ("train", "val"))
    assert size == sum(map(len, documents))


def numbered_abc():
    return ((f"row {i}", "abc\n" * 20) for i in range(60))
