"""Shards: what is written is read again, whatever the borders; what is broken is refused by name."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minzero.data.mixture import Mixture, check_same_data
from minzero.data.shards import TokenStream, shard_layout, write_shard
from minzero.errors import UserError
from minzero.files import write_json


def make(folder, parts, split="train", meta=True, vocab_size=1000):
    """Write `parts`, lists of token ids, as shards; returns the folder."""
    folder.mkdir(exist_ok=True)
    entries = [
        write_shard(folder / f"{split}_{number:06d}.bin", np.array(part, dtype="<u2" if vocab_size <= 65536 else "<u4"))
        for number, part in enumerate(parts)
    ]
    if meta:
        tokenizer = {"name": "bytes", "trained": False, "fingerprint": "f"}
        splits = {split: {"tokens": sum(map(len, parts)), "shards": entries}}
        write_json(folder / "meta.json", {"tokenizer": tokenizer, "vocab_size": vocab_size, "splits": splits})
    return folder


@given(st.data())
def test_round_trip(tmp_path_factory, data):
    """Any tokens, cut into any shards, of either width, read from any place in any length."""
    vocab_size = data.draw(st.sampled_from([256, 65536, 65537, 200_000]))
    parts = data.draw(st.lists(st.lists(st.integers(0, vocab_size - 1), max_size=40), min_size=1, max_size=5))
    block = data.draw(st.integers(1, 12))
    tokens = [token for part in parts for token in part]
    folder = make(tmp_path_factory.mktemp("round"), parts, vocab_size=vocab_size)
    assert shard_layout(folder / "train_000000.bin")[0].itemsize == (2 if vocab_size <= 65536 else 4)
    if len(tokens) <= block:
        with pytest.raises(UserError, match=f"has {len(tokens)} tokens, fewer than one window"):
            TokenStream(folder, "train", block)
        return
    stream = TokenStream(folder, "train", block)
    start = data.draw(st.integers(0, len(tokens)))
    length = data.draw(st.integers(0, len(tokens) - start))
    assert stream.read(start, length).tolist() == tokens[start : start + length]
    inputs, targets = stream.batch(range(stream.windows))
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.ravel().tolist() == tokens[: stream.windows * block]
    assert targets.ravel().tolist() == tokens[1 : stream.windows * block + 1]


def test_more_shards_than_open_files(tmp_path):
    parts = [[number % 1000] * 3 for number in range(300)]
    stream = TokenStream(make(tmp_path / "many", parts), "train", 4)
    expected = [token for part in parts for token in part]
    for _ in range(2):
        assert stream.batch(range(stream.windows))[0].ravel().tolist() == expected[: stream.windows * 4]
    assert len(stream.files) == 128


def test_nanogpt_files(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert TokenStream(tmp_path, "train", 9).tokens == 100
    assert TokenStream(tmp_path, "val", 9).read(40, 10).tolist() == list(range(40, 50))


def test_llmc_file_names(tmp_path):
    """llm.c names its shards after the data set and has no meta.json."""
    write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(50, dtype="<u2"))
    write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(20, dtype="<u2"))
    assert TokenStream(tmp_path, "train", 8).tokens == 50


def refused(folder, *words, block=4, split="train"):
    with pytest.raises(UserError) as caught:
        TokenStream(folder, split, block)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def test_refusals_name_file_found_and_expected(tmp_path):
    folder = make(tmp_path / "a", [[1] * 20, [2] * 20])
    second = folder / "train_000001.bin"
    whole = second.read_bytes()

    second.write_bytes(whole[:-3])
    refused(folder, second, len(whole) - 3, len(whole), "truncated")
    second.write_bytes(whole[:7])
    refused(folder, second, "7 bytes")
    second.write_bytes(np.array([20230101, 1, 20], "<i4").tobytes() + whole[12:])
    refused(folder, second, 20230101, 20240520, 20240801)
    second.write_bytes(np.array([20240520, 3, 20], "<i4").tobytes() + whole[12:])
    refused(folder, second, "version 3", "expected 1")
    write_shard(second, np.array([2] * 30, dtype="<u2"))
    refused(folder, second, "30 tokens", "expected 20", "meta.json")
    write_shard(second, np.array([2] * 20, dtype="<u4"))
    refused(folder, second, "uint32", "uint16")
    second.unlink()
    refused(folder, second, "No such file")
    second.write_bytes(whole)
    TokenStream(folder, "train", 4)


def test_other_refusals(tmp_path):
    none = tmp_path / "none"
    refused(none, "no folder", f"with a prepare script, as python data/text/prepare.py --input TEXT --out {none}")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no train shards")
    half = make(tmp_path / "half", [[1] * 20], meta=False)
    (half / "progress.json").write_text("{}")
    refused(half, "half prepared")
    refused(make(tmp_path / "short", [[1] * 4]), "4 tokens", "block_size + 1 = 5")


def test_a_folder_that_is_not_there_names_a_script_that_is_and_the_nearest_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    make(tmp_path / "data" / "stdlib", [[1] * 20])
    make(tmp_path / "data" / "stdlib", [[1] * 20], split="val")
    with pytest.raises(UserError, match=r"^[^\n]+data/text/prepare.py [^\n]+; did you mean data/stdlib\?$"):
        Mixture("data/stdlb", "train", 4, 1000, 0)
    with pytest.raises(UserError, match=r"--out data/old$"):
        Mixture("data/old", "train", 4, 1000, 0)


def test_an_unprepared_folder_names_its_own_script(tmp_path):
    (tmp_path / "prepare.py").touch()
    refused(tmp_path, "holds no train shards", f"run python {tmp_path / 'prepare.py'}")


def test_shard_cut_while_reading(tmp_path):
    """A memory map would die of SIGBUS here."""
    folder = make(tmp_path / "a", [[1] * 4000])
    stream = TokenStream(folder, "train", 4)
    os.truncate(folder / "train_000000.bin", 3000)
    stream.batch([0])
    with pytest.raises(UserError, match=r"train_000000.bin: was cut short"):
        stream.batch([900])


def test_tokens_above_the_vocabulary(tmp_path):
    folder = make(tmp_path / "a", [[1] * 50, [7, 8, 9, 500] * 20], meta=False)
    Mixture(str(folder), "train", 4, 501, 0)
    with pytest.raises(UserError, match=r"train_000001.bin: found token id 500, expected ids below .* 500"):
        Mixture(str(folder), "train", 4, 500, 0)
    with pytest.raises(UserError, match=r"model.vocab_size: 999, .* up to 999; set it to at least 1000"):
        Mixture(str(make(tmp_path / "b", [[1] * 50])), "train", 4, 999, 0)


def test_the_checkpoints_data(tmp_path):
    """Another tokenizer, vocabulary or shard is another fingerprint, and refused by name."""
    folder = make(tmp_path / "a", [[1] * 50])
    data = Mixture(str(folder), "train", 4, 1000, 0)
    recorded = json.loads(json.dumps(data.fingerprint()))
    check_same_data(recorded, data, "out/run")
    meta = json.loads((folder / "meta.json").read_text())
    for change, words in (
        ({"tokenizer": {"name": "x", "trained": False, "fingerprint": "g"}}, "found tokenizer g, expected f"),
        ({"vocab_size": 900}, "found vocab_size 900, expected 1000"),
    ):
        write_json(folder / "meta.json", meta | change)
        with pytest.raises(UserError, match=words):
            check_same_data(recorded, Mixture(str(folder), "train", 4, 1000, 0), "out/run")
    make(folder, [[1] * 49 + [2]])
    with pytest.raises(UserError, match=r"found shards .*, expected .* as in out/run"):
        check_same_data(recorded, Mixture(str(folder), "train", 4, 1000, 0), "out/run")
    with pytest.raises(UserError, match="as in out/run"):
        check_same_data({}, data, "out/run")


def test_mixing_tokenizers_is_refused(tmp_path):
    a, b = make(tmp_path / "a", [[1] * 50]), make(tmp_path / "b", [[1] * 50])
    meta = json.loads((b / "meta.json").read_text())
    meta["tokenizer"]["fingerprint"] = "other"
    write_json(b / "meta.json", meta)
    with pytest.raises(UserError, match="expected one tokenizer for all"):
        Mixture({str(a): 1, str(b): 2}, "train", 4, 1000, 0)


@pytest.mark.parametrize("content", [[], {"splits": {}}, {"vocab_size": "64"}, {"tokenizer": "gpt2"}, {"splits": []}])
def test_a_damaged_meta_json_is_named(tmp_path, content):
    folder = make(tmp_path, [[1] * 50])
    meta = json.loads((folder / "meta.json").read_text())
    write_json(folder / "meta.json", meta | content if content else content)
    with pytest.raises(UserError, match=r"meta.json: damaged|holds no train shards"):
        TokenStream(folder, "train", 8)
