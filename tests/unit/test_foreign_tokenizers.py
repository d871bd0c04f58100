"""Tokenizers of others: the ids of transformers' AutoTokenizer, documents as in pre-training, the fast path."""

import copy
import json
import os
import pickle
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from minzero.data import fast_encoding
from minzero.data.fast_encoding import BulkEncoder
from minzero.data.local_files import Files
from minzero.data.pipeline import tokenizer_of
from minzero.data.shards import TokenStream
from minzero.data.tokenizer import TiktokenTokenizer, load_tokenizer
from minzero.errors import UserError
from tests.helpers.data_sets import contents, prepare
from tests.helpers.foreign_tokenizers import KINDS, odd_strings, write_all
from tests.unit.test_data_tokenizer import PATTERNS

BYTE_LEVEL = ["gpt2", "llama3", "qwen"]
ODD = list(odd_strings(10_000, seed=1))
TEXTS = ["A first text.", "naïve “café” 東京 <|endoftext|> and </s>", "", "x = 1\n\n    y = 2\n", "don't\r\n12345"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    write_all(folder)
    return folder


def theirs(folder):
    return AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_auto_tokenizer(folders, name):
    tokenizer = load_tokenizer(str(folders / name))
    expected = theirs(folders / name)(ODD, add_special_tokens=False, verbose=False)["input_ids"]
    again = pickle.loads(pickle.dumps(tokenizer))  # as a worker process gets it
    encoder = BulkEncoder(again)
    assert (encoder.quick is not None) == (name in BYTE_LEVEL), encoder.notice
    for text, ids in zip(ODD, expected, strict=True):
        assert tokenizer.encode_ordinary(text) == ids
        assert encoder.encode(text.encode()).tolist() == again.ids(text).tolist() == ids
    assert tokenizer.n_vocab == max(theirs(folders / name).get_vocab().values()) + 1


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_documents_begin_and_end_as_in_pre_training(folders, tmp_path, name, workers):
    documents = [(str(number), text) for number, text in enumerate(TEXTS)]
    prepare(documents, tmp_path, "--workers", workers, tokenizer=str(folders / name), side=lambda key: "train")
    reference = theirs(folders / name)
    _, _, begin, end = KINDS[name]
    begin, end = (reference.convert_tokens_to_ids(tokens) for tokens in (begin, end))
    expected = []
    for text in TEXTS:
        expected += [*begin, *reference(text, add_special_tokens=False)["input_ids"], *end]
    meta = json.loads((tmp_path / "meta.json").read_text())
    stream = TokenStream(tmp_path, "train", 1)
    assert stream.read(0, stream.tokens).tolist() == expected
    assert meta["document"] == {"begin": begin, "end": end} and meta["end_of_text"] == end[0]
    assert meta["vocab_size"] == load_tokenizer(folders / name).n_vocab
    assert tokenizer_of(tmp_path).fingerprint() == meta["tokenizer"]["fingerprint"]


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "gpt2 of tiktoken"])
def test_the_shards_are_the_same_with_and_without_gigatoken(folders, tmp_path, name, shared):
    tokenizer = str(folders / name) if name in BYTE_LEVEL else "gpt2"
    rows = [*ODD[:3000], *(text[:30_000] for text in (path.read_text() for path in (shared / "text").glob("*.txt")))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for number, flags in enumerate(([], ["--workers", "2"], ["--encoder", "reference"])):
        flags = flags if "--workers" in flags else [*flags, "--workers", "1"]
        prepare(Files(tmp_path / "rows.jsonl"), tmp_path / str(number), *flags, tokenizer=tokenizer)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("name", [*fast_encoding.SCHEMES, "ours"])
def test_gigatoken_cuts_text_as_the_patterns_of_tiktoken(name):
    """Of encodings that would have to be downloaded: their patterns, with the tokens of GPT-2."""
    gpt2 = load_tokenizer("gpt2")
    tokenizer = TiktokenTokenizer(
        name, pat_str=PATTERNS[name], mergeable_ranks=gpt2._mergeable_ranks, special_tokens=gpt2._special_tokens
    )
    encoder = BulkEncoder(tokenizer)
    assert encoder.quick, encoder.notice
    for text in ODD:
        assert encoder.encode(text.encode()).tolist() == tokenizer.encode_ordinary(text)


def test_added_tokens_that_are_not_special_are_tokens_in_a_text(folders):
    tokenizer = load_tokenizer(folders / "qwen")
    number = theirs(folders / "qwen").convert_tokens_to_ids("<tool_call>")
    for text in ("<tool_call>", "e\u0301<tool_call>\u0338e\u0301", "<|im_end|><tool_call>"):
        ids = BulkEncoder(tokenizer).encode(text.encode()).tolist()
        assert number in ids and ids == theirs(folders / "qwen")(text, add_special_tokens=False)["input_ids"]


@given(
    st.text(max_size=30),
    st.sampled_from(["", "\u0378", "\u2065", "\uffff", "\U0001fbff", "\U000323b0"]),
    st.text(max_size=9),
)
@settings(max_examples=300)
def test_characters_that_unicode_may_get_are_seen(before, one, after):
    text = (before + one + after).encode("utf-8", "replace").decode()
    expected = any(unicodedata.category(char) == "Cn" for char in text)
    assert fast_encoding.has_unknown_characters(text.encode()) == expected


# -- the fast path is left where it is wrong -----------------------------------------------------


def test_without_gigatoken_one_line_says_so(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # the import raises ImportError
    prepare([("a", "text")] * 3, tmp_path, "--workers", "1", tokenizer="gpt2", side=lambda key: "train")
    said = capsys.readouterr().out
    assert said.count("tokenizing without gigatoken") == 1 and "it cannot be imported (ModuleNotFoundError" in said


class Panic(BaseException):
    """As gigatoken's, which are no Exceptions."""


def with_fault(encode, fault):
    """gigatoken's `encode`, wrong for texts with a euro sign."""

    def wrong(content):
        if "\u20ac".encode() not in content:
            return encode(content)
        if fault == "a panic":
            raise Panic("index out of bounds")
        return encode(content)[::-1]

    return wrong


@pytest.mark.parametrize("fault", ["other ids", "a panic"])
@pytest.mark.parametrize("when", ["the first copy", "a later copy", "in the text at hand"])
def test_gigatoken_is_left_where_it_differs(monkeypatch, capsys, fault, when):
    tokenizer = load_tokenizer("gpt2")
    real = fast_encoding.Gigatoken.renew

    def renew(self):
        real(self)
        self.encode = with_fault(self.encode, fault)

    monkeypatch.setattr(fast_encoding, "RENEW_NOT_BEFORE", 1000)
    monkeypatch.setattr(fast_encoding, "RENEW_AFTER", 1000)
    if when == "the first copy":
        monkeypatch.setattr(fast_encoding.Gigatoken, "renew", renew)
        encoder = BulkEncoder(tokenizer)
    else:
        encoder = BulkEncoder(tokenizer)
        assert encoder.quick and not encoder.notice
        text = "word \n"
        if when == "a later copy":
            monkeypatch.setattr(fast_encoding.Gigatoken, "renew", renew)
        else:
            encoder.quick.encode = with_fault(encoder.quick.encode, fault)
            text = "5 \u20ac"
        found = [encoder.encode(text.encode()).tolist() for _ in range(300)]
        assert found[-1] == tokenizer.encode_ordinary(text)
        if when == "a later copy" or fault == "a panic":  # else the first ones are wrong, until they are compared
            assert all(ids == found[-1] for ids in found)
    assert encoder.quick is None
    assert ("it gives other ids for" if fault == "other ids" else "it fails on a text") in encoder.notice
    assert "\n" not in encoder.notice
    assert capsys.readouterr().err.count("tokenizing without gigatoken") == (when != "the first copy")
    assert encoder.encode("5 \u20ac".encode()).tolist() == tokenizer.encode_ordinary("5 \u20ac")


def test_the_cache_of_gigatoken_is_bounded(monkeypatch):
    """Words that never repeat: a new copy is made before the memory has grown by more than the limit and a text."""
    monkeypatch.setattr(fast_encoding, "RENEW_NOT_BEFORE", 1 << 20)
    monkeypatch.setattr(fast_encoding, "RENEW_AT_GROWTH", 32 << 20)
    encoder = BulkEncoder(load_tokenizer("gpt2"))
    choose = np.random.default_rng(0)
    renewals = []
    renew = encoder.quick.renew
    monkeypatch.setattr(encoder.quick, "renew", lambda: renewals.append(1) or renew())
    before = fast_encoding.resident_memory()
    most = 0
    for _ in range(40):
        letters = choose.integers(97, 123, size=(50_000, 10), dtype=np.uint8)
        letters[:, -1] = ord(" ")
        encoder.encode(letters.tobytes())  # 0.5 MB, some 6 MB of cache
        most = max(most, fast_encoding.resident_memory() - before)
    assert most < 96 << 20 and renewals


# -- faults --------------------------------------------------------------------------------------


def test_a_tokenizer_json_alone_is_enough(folders, tmp_path):
    shutil.copy(folders / "llama3" / "tokenizer.json", tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(name)
        assert tokenizer.text_of([*tokenizer.begin, *tokenizer.end]) == "<|begin_of_text|><|end_of_text|>"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda config: {"eos_token": None}, None),  # a usual one is found
        (lambda config: "[]", "expected a tokenizer"),
        (lambda config: "{", "expected a tokenizer"),
        (lambda config: {"tokenizer_class": 5}, "expected a tokenizer"),
    ],
)
def test_damaged_settings_of_a_foreign_tokenizer_are_one_line(folders, tmp_path, change, words):
    shutil.copytree(folders / "gpt2", tmp_path / "t")
    path = tmp_path / "t" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    new = change(config)
    path.write_text(new if isinstance(new, str) else json.dumps(config | new))
    if words is None:
        assert load_tokenizer(tmp_path / "t").end == (load_tokenizer(folders / "gpt2").end_of_text,)
        return
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(tmp_path / "t")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_tokenizer_without_an_end_of_text_is_refused(folders, tmp_path):
    content = json.loads((folders / "gpt2" / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json: found no token that ends a document, expected eos_token"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_and_unknown_names(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"found neither tokenizer\.tiktoken nor tokenizer\.json in it"):
        load_tokenizer(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"'gtp2' is neither .*did you mean gpt2"):
        load_tokenizer("gtp2")
    with pytest.raises(UserError, match="nobody/nothing: no such folder here, and not to be had from the Hugging Face"):
        load_tokenizer("nobody/nothing")


def test_the_fingerprint_is_of_the_content_and_not_of_its_form(folders, tmp_path):
    before = load_tokenizer(folders / "qwen").fingerprint()
    content = json.loads((folders / "qwen" / "tokenizer.json").read_text())
    same = copy.deepcopy(content) | {"truncation": None}
    for found, is_same in ((same, True), (content | {"normalizer": None}, False)):
        (tmp_path / "tokenizer.json").write_text(json.dumps(found, indent=7))
        assert (load_tokenizer(tmp_path).fingerprint() == before) == is_same


def test_the_fingerprint_changes_with_the_class_of_transformers(folders, tmp_path):
    """Which the settings choose, and which may cut text in another way."""
    shutil.copytree(folders / "llama3", tmp_path / "t")
    before = load_tokenizer(tmp_path / "t")
    path = tmp_path / "t" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    after = load_tokenizer(tmp_path / "t")
    assert before.encode_ordinary("x12345") != after.encode_ordinary("x12345")
    assert before.fingerprint() != after.fingerprint()


# -- of the hub ----------------------------------------------------------------------------------


def test_a_tokenizer_of_the_hub_is_kept_with_the_shards(folders, tmp_path, monkeypatch, capsys):
    """Out of the hub's cache, as without a network after a first download."""
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / "models--someone--some-model" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folders / "llama3", snapshot)
    (tmp_path / "hub" / "models--someone--some-model" / "refs").mkdir()
    (tmp_path / "hub" / "models--someone--some-model" / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    documents = [("a", "one text"), ("b", "another")]
    prepare(documents, tmp_path / "out", tokenizer="someone/some-model", side=lambda key: "train")
    shutil.rmtree(tmp_path / "hub")
    tokenizer = tokenizer_of(tmp_path / "out")
    flags = f"--train.init_from its model, or with --model.vocab_size {tokenizer.n_vocab} or more\n"
    assert capsys.readouterr().out.endswith(f"train on it with --data.path {tmp_path / 'out'}, and {flags}")
    assert tokenizer.folder == tmp_path / "out" / "tokenizer_someone--some-model"
    stream = TokenStream(tmp_path / "out", "train", 1)
    expected = [*tokenizer.begin, *tokenizer.encode_ordinary("one text"), *tokenizer.end]
    assert stream.read(0, len(expected)).tolist() == expected


def test_an_nfc_normalizer_and_added_tokens(folders, tmp_path):
    """Text that is not normalized, next to tokens that are found before or after it is."""
    shutil.copytree(folders / "qwen", tmp_path / "blanks")
    path = tmp_path / "blanks" / "tokenizer.json"
    content = json.loads(path.read_text())
    first = 1 + max(token["id"] for token in content["added_tokens"])
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}

    def write(*added):
        new = [{"id": first + n, "content": text, "normalized": norm} | flags for n, (text, norm) in enumerate(added)]
        path.write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], *new]}))
        return load_tokenizer(tmp_path / "blanks")

    tokenizer = write(("  ", True), ("    ", True))  # as OLMo's
    encoder = BulkEncoder(tokenizer)
    assert encoder.quick
    for text in (*ODD[:3000], "def f():\n    return 1\n", "e\u0301    e\u0301", "\u00e9    \u00e9"):
        assert encoder.encode(text.encode()).tolist() == tokenizer.encode_ordinary(text)
    for token in ("\uc548\ub155", "A\u030a", "\u00c5"):
        for is_normalized in (False, True):
            encoder = BulkEncoder(write((token, is_normalized)))
            assert not encoder.quick and "a normalizer and tokens that it may change" in encoder.notice


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda content: content["model"].update(vocab={}, merges=[]),
            "found . ids|broken tokenizer|no token that ends",
        ),
        (lambda content: content["model"].update(dropout=0.1), "model.dropout: found one, by which ids are random"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_one_line(folders, tmp_path, change, words):
    content = json.loads((folders / "gpt2" / "tokenizer.json").read_text())
    change(content)
    content["added_tokens"] = content["added_tokens"] if content["model"]["vocab"] else []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_a_pipe_in_place_of_a_file_is_refused(folders, tmp_path, name):
    shutil.copytree(folders / "gpt2", tmp_path / "t")
    (tmp_path / "t" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "t" / name)
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path / "t")
