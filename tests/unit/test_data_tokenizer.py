"""Tokenizers: what is trained here gives tiktoken and transformers the same ids."""

import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.patterns import OLD_PATTERN
from minzero.data.learn_tokenizer import characters, own_tokenizer, train_tokenizer
from minzero.data.tokenizer import TiktokenTokenizer, load_tokenizer
from minzero.data.tokenizer_files import (
    END_OF_TEXT,
    GPT2_PATTERNS,
    PATTERN,
    byte_ranks,
    huggingface_json,
    open_huggingface,
    save_tokenizer,
)
from minzero.errors import UserError
from tests.helpers.processes import ROOT, environment


def library(count):
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:count]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


MIXED = [
    "naïve café 東京都 привет мир 😀👩‍👩‍👧 שלום नमस्ते",
    "aaaa abababab aabaab",
    "\r\n\t  x=1\n\n\n    y\u00a0z",
    "1234567 ½ ²",
] * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(tiktoken's, transformers') of one tokenizer of 2,000 ids, learnt from code, runs and many scripts."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trained")
    generator = random.Random(0)
    runs = ["".join(generator.choice("ab") for _ in range(300)) + "a" * 300 for _ in range(30)]
    texts = [*library(40), *MIXED, *runs]
    save_tokenizer(folder, *train_tokenizer(texts, 2000, ["<|user|>", END_OF_TEXT]))
    return load_tokenizer(str(folder)), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")), folder


def same(trained, text):
    ours, theirs = trained[0].encode_ordinary(text), trained[1].encode(text)
    assert ours == theirs
    assert trained[0].decode(ours) == trained[1].decode(theirs) == text


def test_same_ids_on_real_text(trained):
    for text in [*library(120)[40:], *MIXED]:
        same(trained, text)


def test_same_ids_on_the_shared_texts(trained, shared):
    for path in sorted((shared / "text").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        for start in range(0, len(text), 20_000):
            same(trained, text[start : start + 20_000])


@given(st.text(max_size=200))
@settings(max_examples=300)
def test_same_ids_on_any_text(trained, text):
    assume(
        "<|" not in text
    )  # Hypothesis takes the source's own strings too, and encode_ordinary knows no special token
    same(trained, text)


@given(st.text(alphabet="ab ", max_size=120))
@settings(max_examples=500)
def test_same_ids_where_merges_compete(trained, text):
    """Runs and near-runs, where the same token can be joined from several pairs."""
    same(trained, text)


def test_special_tokens(trained):
    tiktoken_s, transformers_s, folder = trained
    assert tiktoken_s._special_tokens == {"<|user|>": 1998, END_OF_TEXT: 1999}
    text = f"<|user|>x = 1{END_OF_TEXT}"
    ids = tiktoken_s.encode(text, allowed_special="all")
    assert ids[0] == 1998 and ids[-1] == 1999
    assert transformers_s.encode(text) == ids
    assert END_OF_TEXT not in tiktoken_s.decode(tiktoken_s.encode_ordinary("x"))
    from transformers import AutoTokenizer

    automatic = AutoTokenizer.from_pretrained(str(folder))
    assert automatic.eos_token_id == 1999 and automatic.encode("def f(x):") == tiktoken_s.encode_ordinary("def f(x):")


def test_characters(tmp_path):
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(tmp_path, *characters("héllo\n wörld"))
    encoding = load_tokenizer(str(tmp_path))
    assert encoding.n_vocab == len(set("héllo\n wörld")) + 1
    ids = encoding.encode_ordinary("wörld hé")
    assert ids == [sorted(set("héllo\n wörld")).index(character) for character in "wörld hé"]
    assert PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).encode("wörld hé") == ids
    assert encoding.missing_characters("zx héy") == ["x", "y", "z"]
    assert load_tokenizer("bytes").missing_characters("zx 東") == []


def test_own_tokenizer_is_made_once(tmp_path):
    folder = tmp_path / "tokenizer"
    own_tokenizer(folder, lambda: train_tokenizer(library(3), 300), 300)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    own_tokenizer(folder, lambda: 1 / 0, 300)
    with pytest.raises(UserError, match="found a tokenizer of 300 ids, expected --vocab_size 400"):
        own_tokenizer(folder, lambda: 1 / 0, 400)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_tokenizer_with_another_pattern_stays_as_it_is(tmp_path):
    """A folder that was written when our pattern was another: ids, fingerprint and tokenizer.json are those of then."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "tokenizer"
    ranks = byte_ranks() | {b"  ": 256, b"    ": 257, b":\n": 258, b":\n    ": 259}
    save_tokenizer(folder, ranks, {END_OF_TEXT: 260}, OLD_PATTERN)
    own_tokenizer(folder, lambda: 1 / 0, 261)
    encoding = load_tokenizer(str(folder))
    assert encoding._pat_str == OLD_PATTERN and encoding.fingerprint() == "595961fa86d0ea2f"
    text = "if a:\n    b"
    assert encoding.encode_ordinary(text) == [*b"if a", 259, *b"b"]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for other in [text, *library(20), *MIXED]:
        assert theirs.encode(other) == encoding.faster.encode_ordinary(other) == encoding.encode_ordinary(other)
    save_tokenizer(tmp_path / "new", ranks, {END_OF_TEXT: 260})
    assert load_tokenizer(str(tmp_path / "new")).encode_ordinary(text) == [*b"if a", 258, 256, *b"  b"]


def test_gpt2s_pattern_is_written_as_gpt2s(tmp_path, shared):
    """As the published tokenizer.json has it, by which other programs know it."""
    encoding = load_tokenizer("gpt2")
    assert encoding._pat_str in GPT2_PATTERNS
    save_tokenizer(tmp_path, encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str)
    cut = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]
    assert (cut["type"], cut["add_prefix_space"], cut["use_regex"]) == ("ByteLevel", False, True)


def test_our_pattern_is_written_as_llama_3s(trained):
    split, byte_level = json.loads((trained[2] / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, False)


def run(*flags):
    command = [sys.executable, str(ROOT / "data" / "train_tokenizer.py"), *map(str, flags)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path):
    for i, text in enumerate(library(12)):
        (tmp_path / f"{i}.txt").write_text(text)
    result = run("--input", tmp_path, "--vocab_size", 600, "--special_tokens", "<|user|>", "--out", tmp_path / "tok")
    assert result.returncode == 0, result.stderr
    encoding = load_tokenizer(str(tmp_path / "tok"))
    assert encoding.n_vocab == 600 and encoding._special_tokens == {"<|user|>": 598, END_OF_TEXT: 599}
    again = run("--source", "stdlib", "--limit", 20, "--vocab_size", 400, "--out", tmp_path / "stdlib")
    assert again.returncode == 0 and "20 documents" in again.stderr, again.stderr
    prepare = [sys.executable, str(ROOT / "data" / "text" / "prepare.py"), "--input", str(tmp_path / "1.txt")]
    prepare += ["--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert subprocess.run(prepare, env=environment(), capture_output=True).returncode == 0


def test_the_commands_faults(tmp_path):
    (tmp_path / "a.txt").write_text("too little")
    for flags, words in (
        (["--source", "openwebtxt"], "did you mean openwebtext?"),
        ([], "--input: none given"),
        (["--input", tmp_path, "--vocab_size", 100], "--vocab_size: found 100, expected at least 257"),
        (["--input", tmp_path, "--vocab_size", 1000], "gives only"),
    ):
        result = run(*flags, "--out", tmp_path / "tok")
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "tok").exists()


# -- what is wrong with a tokenizer's files or flags --------------------------------------------------

LINES = [  # what is done to the lines of tokenizer.tiktoken, what is said of it
    (lambda lines: [*lines, lines[5]], "line 301: .*is there twice"),
    (lambda lines: [*lines[:9], lines[9].split()[0] + b" 8", *lines[10:]], "line 10: .*is there twice"),
    (lambda lines: lines[1:], "no token has rank 0"),
    (lambda lines: lines[:100] + lines[101:], "no token has rank 100"),
    (lambda lines: [*lines[:9], lines[9].split()[0] + b" -9", *lines[10:]], "line 10: .*found .* -9"),
    (lambda lines: [*lines[:9], lines[9].split()[0] + b" 9.0", *lines[10:]], "line 10: .*found"),
    (lambda lines: [*lines[:9], lines[9].split()[0] + b" " + b"9" * 5000, *lines[10:]], "line 10: .*found"),
    (lambda lines: [*lines[:9], lines[9].split()[0] + b" 4000000000", *lines[10:]], "no token has rank 9"),
    (lambda lines: [*lines[:9], b"!!!! 9", *lines[10:]], "line 10: .*found .*expected a token in base64"),
    (lambda lines: [*lines[:9], b"QQ 9", *lines[10:]], "line 10: .*found"),
    (lambda lines: [*lines[:9], b"QUE=", *lines[10:]], "line 10: .*found"),
    (lambda lines: [*lines[:9], b"QUE= 9 9", *lines[10:]], "line 10: .*found"),
    (lambda lines: [*lines[:9], b"", *lines[10:]], "no token has rank 9"),
    (lambda lines: [*lines[:9], b"\xff\xfe 9", *lines[10:]], "line 10: .*found"),
    (lambda lines: [], "found no token"),
]


@pytest.mark.parametrize("change, words", LINES, ids=[words[:40] for _, words in LINES])
def test_a_damaged_tokenizer_file_is_named_with_its_line(tmp_path, change, words):
    save_tokenizer(tmp_path, *train_tokenizer(library(3), 301))
    path = tmp_path / "tokenizer.tiktoken"
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(UserError, match=rf"tokenizer\.tiktoken: .*{words}") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


SETTINGS = [  # keys of tokenizer_settings.json, what is said of it
    ({"pattern": 5}, "expected an object with a pattern"),
    ({"pattern": None}, "expected an object with a pattern"),
    ({"pattern": "[a-"}, "broken tokenizer"),
    ({"pattern": "(?P<"}, "broken tokenizer"),
    ({"pattern": "[a-z]+"}, "its pattern loses text"),
    ({"pattern": ""}, "broken tokenizer"),
    ({"special_tokens": ["a"]}, "expected an object with a pattern"),
    ({"special_tokens": {"<|a|>": "300"}}, "found special token"),
    ({"special_tokens": {"<|a|>": True}}, "found special token"),
    ({"special_tokens": {"<|a|>": -1}}, "found special token"),
    ({"special_tokens": {"<|a|>": 5}}, "an id that no other has"),
    ({"special_tokens": {"<|a|>": 2**40}}, "found special token"),
    ({"special_tokens": {"<|a|>": 300, "<|b|>": 300}}, "an id that no other has"),
    ({"special_tokens": {"": 300}}, "found special token"),
]


@pytest.mark.parametrize("change, words", SETTINGS, ids=[str(change)[:50] for change, _ in SETTINGS])
def test_odd_settings_of_a_tokenizer_are_named(tmp_path, change, words):
    save_tokenizer(tmp_path, *train_tokenizer(library(3), 301))
    path = tmp_path / "tokenizer_settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "tokenizer_settings.json"])
@pytest.mark.parametrize("how", ["missing", "pipe", "folder", "list", "digits", "deep"])
def test_a_tokenizer_file_that_is_no_file_is_named(tmp_path, name, how):
    save_tokenizer(tmp_path / "t", *characters("ab"))
    path = tmp_path / "t" / name
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_text({"list": "[]", "digits": "9" * 5000, "deep": "[" * 100_000}[how])
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        load_tokenizer(str(tmp_path / "t"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "5", b"\xff\x00", "missing", "pipe", "folder"])
def test_a_damaged_tokenizer_json_is_one_line(tmp_path, content):
    """What eval.py, sample.py and to_gguf.py open."""
    file = tmp_path / "tokenizer.json"
    if content == "pipe":
        os.mkfifo(file)
    elif content == "folder":
        file.mkdir()
    elif content != "missing":
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"^{file}: [^\n]+; export or copy it again$"):
        open_huggingface(file)


def test_a_whole_tokenizer_json_is_opened_wherever_it_lies(tmp_path):
    ranks, special, pattern = characters("abc")
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(huggingface_json(ranks, special, pattern))
    assert open_huggingface(folder / "tokenizer.json").get_vocab() == {"a": 0, "b": 1, "c": 2, END_OF_TEXT: 3}


def test_a_damaged_file_in_tiktokens_cache_is_named(monkeypatch):
    def damaged(name):
        raise ValueError("Hash mismatch for data downloaded\nfrom somewhere")

    monkeypatch.setattr(tiktoken, "get_encoding", damaged)
    with pytest.raises(UserError, match=r"gpt2 could not be read \(ValueError: Hash mismatch for data downloaded from"):
        load_tokenizer("gpt2")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--special_tokens", "<|a|>", "<|a|>"], "--special_tokens: found '<|a|>'"),
        (["--special_tokens", ""], "--special_tokens: found ''"),
        (["--special_tokens", "a"], "--special_tokens: found 'a'"),
        (["--special_tokens", "a\nb"], "--special_tokens: found"),
        (["--special_tokens", " word"], "was learned as a token"),
        (["--vocab_size", "1" + "0" * 12], "--vocab_size: found 1000000000000"),
        (["--vocab_size", "-1"], "--vocab_size: found -1"),
        (["--vocab_size", "257"], None),
        (["--limit", "-1"], "--limit: found -1"),
        (["--limit", "1" + "0" * 30], "--limit: found"),
    ],
)
def test_absurd_flags_of_the_training(tmp_path, flags, words, capsys):
    from data.train_tokenizer import main

    (tmp_path / "a.txt").write_text("some word and a word\n" * 300)
    given = {"--input": [str(tmp_path)], "--vocab_size": ["264"], "--out": [str(tmp_path / "t")]} | {
        flags[0]: flags[1:]
    }
    arguments = [word for name, values in given.items() for word in (name, *values)]
    if words is None:
        main(arguments)
        return
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert words in str(caught.value) and not (tmp_path / "t").exists()


def test_training_takes_what_the_preparation_takes(tmp_path):
    """Half a surrogate pair, and runs for whose length the trainer would need the square of it."""
    texts = ["a\ud83d", "x" * 3_000_000, " " * 3_000_000, *library(3)]
    ranks, _ = train_tokenizer(iter(texts), 300)
    assert len(ranks) == 299


# -- the faster pattern ----------------------------------------------------------------------------


def tiktokens_patterns():
    """The patterns of all of tiktoken's encodings, which it writes inside functions that download."""
    from tiktoken_ext import openai_public

    source = Path(openai_public.__file__).read_text()
    names = set(re.findall(r"^def (\w+)\(\)", source, re.MULTILINE))
    assert {"gpt2", "cl100k_base", "o200k_base"} <= names
    offline = {}
    exec(source, offline)
    offline |= dict.fromkeys(("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"), lambda *_, **__: {})
    return {name: offline[name]()["pat_str"] for name in sorted(names)} | {
        "ours": PATTERN,
        "our former one": OLD_PATTERN,
        "GPT-2's": GPT2_PATTERNS[-1],
    }


PATTERNS = tiktokens_patterns()
WHITE = st.text(alphabet=" \t\n\r\u00a0\u3000\x1c'sS1½aAé東\u0301_.,/?!", max_size=40)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_faster_pattern_cuts_the_same_pieces(name):
    """By another library than tiktoken's, which knows possessive quantifiers as well."""
    byte = {bytes([value]): value for value in range(256)}
    encoding = TiktokenTokenizer(name, pat_str=PATTERNS[name], mergeable_ranks=byte, special_tokens={})
    before, after = regex.compile(PATTERNS[name]), regex.compile(encoding.faster._pat_str)
    assert before.pattern != after.pattern

    @given(st.one_of(WHITE, st.text(max_size=60)))
    @settings(max_examples=300)
    def check(text):
        assert before.findall(text) == after.findall(text)

    check()
    for text in [*library(60), *MIXED]:
        assert before.findall(text) == after.findall(text)


def test_the_faster_tokenizer_gives_the_same_ids(trained, shared):
    texts = [path.read_text(encoding="utf-8") for path in sorted((shared / "text").glob("*.txt"))]
    pairs = [(encoding, encoding.faster) for encoding in (load_tokenizer("gpt2"), trained[0])]
    for text in [*library(150), *MIXED, *texts, " " * 100_000 + "x", "\n" * 100_000, "a" * 100_000]:
        for encoding, quick in pairs:
            assert quick.encode_ordinary(text) == encoding.encode_ordinary(text)

    @given(st.one_of(WHITE, st.text(max_size=60)))
    @settings(max_examples=300)
    def check(text):
        for encoding, quick in pairs:
            assert quick.encode_to_numpy(text, disallowed_special=()).tolist() == encoding.encode_ordinary(text)

    check()
