"""Tokenizers that are learned here: the text held out for their report, the report, and their special tokens."""

import json
import random

import pytest
from transformers import AutoTokenizer

from data.train_tokenizer import main
from minzero.data import learn_tokenizer
from minzero.data.learn_tokenizer import HeldOut, bytes_per_token, checked_special_tokens, train_tokenizer
from minzero.data.sources import StandardLibrary
from minzero.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from minzero.data.tokenizer_files import END_OF_TEXT, save_tokenizer
from minzero.errors import UserError
from tests.helpers.foreign_tokenizers import KINDS, save

WORDS = ["alpha ", "beta ", "naïve ", "東京", "gamma\n", "x = 1\n", "'s "]


def documents(count, words, seed=0):
    choose = random.Random(seed)
    return [f"{number} " + "".join(choose.choices(WORDS, k=words)) for number in range(count)]


def held_out(texts):
    """(the texts learned from, the HeldOut)."""
    kept = HeldOut(iter(texts))
    return list(kept), kept


def size(texts):
    return sum(len(text.encode()) for text in texts)


# -- the text that is held out ---------------------------------------------------------------------


def test_many_documents_are_held_out_whole():
    texts = documents(3000, 40)
    learned, kept = held_out(texts)
    assert sorted([*learned, *kept.texts]) == sorted(["", *texts])
    assert 0.03 * size(texts) < kept.size == size(kept.texts) < 0.07 * size(texts) and kept.total == size(texts)
    assert set(held_out(texts[::-1])[1].texts) == set(kept.texts)  # no matter in which order they come


def test_copies_are_on_the_same_side():
    learned, kept = held_out(documents(500, 40) * 3)
    assert kept.texts and not set(learned) & set(kept.texts)


def test_at_most_so_many_bytes_from_everywhere(monkeypatch):
    monkeypatch.setattr(learn_tokenizer, "HELD_OUT_BYTES", 20_000)
    monkeypatch.setattr(learn_tokenizer, "HELD_OUT_DOCUMENT", 5000)
    texts = documents(10_000, 20)
    learned, kept = held_out([*texts, "a long one " * 1000])
    assert 5000 < kept.size == size(kept.texts) <= 20_000
    assert sorted([*learned, *kept.texts]) == sorted(["", *texts, "a long one " * 1000])
    numbers = sorted(int(text.split()[0]) for text in kept.texts)
    assert numbers[0] < 1000 and numbers[-1] > 9000


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("seed", range(5))
def test_of_few_documents_one_is_cut(count, seed):
    """Whatever the hash says, some text is held out, and most is learned from."""
    texts = documents(count, 2000, seed)
    learned, kept = held_out(texts)
    assert 0.01 * size(texts) <= kept.size == size(kept.texts) <= 0.101 * size(texts)
    assert size(learned) + kept.size == size(texts)
    whole = [text for text in texts if text not in learned and text not in kept.texts]
    if whole:  # its beginning is learned from
        beginning = next(text for text in learned if text and whole[0].startswith(text))
        assert whole == [beginning + kept.texts[-1]]


def test_a_large_document_among_small_ones_is_cut():
    texts = [*documents(5, 3), *documents(1, 50_000), *documents(5, 4)]
    learned, kept = held_out(texts)
    assert 0.04 * size(texts) < kept.size < 0.06 * size(texts) and size(learned) + kept.size == size(texts)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_no_held_out_text(texts):
    learned, kept = held_out(texts)
    assert not any(learned) and not kept.texts and kept.size == kept.total == 0


def test_text_that_is_no_utf_8_is_held_out_too():
    _, kept = held_out(["a\ud83d word " * 1000])
    assert kept.texts and bytes_per_token(load_tokenizer("bytes"), kept.texts) == 1


# -- the report ------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, (_, text) in enumerate(StandardLibrary()):
        if number == 25:
            break
        (folder / f"{number}.txt").write_text(text)
    return folder


def learn(inputs, out, *flags):
    main(["--input", str(inputs), "--vocab_size", "600", "--out", str(out), *map(str, flags)])
    return json.loads((out / "tokenizer_report.json").read_text())


def no_network(name):
    raise OSError("no network")


def test_the_report_compares_with_others(inputs, tmp_path, capsys, shared):
    save(KINDS["qwen"][0](), tmp_path / "base", eos_token=END_OF_TEXT)
    found = learn(inputs, tmp_path / "new", "--compare", tmp_path / "base", "bytes", "gpt2")
    printed = capsys.readouterr().out
    rows = {row["name"]: row for row in found["tokenizers"]}
    assert rows["this one"]["ids"] == 600 and rows["gpt2"]["ids"] == 50257 and rows["bytes"]["bytes_per_token"] == 1
    base = rows[str(tmp_path / "base")]
    assert base["ids"] == load_tokenizer(tmp_path / "base").n_vocab
    assert 1.5 < rows["this one"]["bytes_per_token"] < base["bytes_per_token"]  # which has 2.5 times as many ids
    assert found["fingerprint"] == load_tokenizer(tmp_path / "new").fingerprint()
    total = size(path.read_text() for path in inputs.iterdir())
    assert found["held_out_text"]["share"] == found["held_out_text"]["bytes"] / total
    for row in rows.values():
        line = next(line for line in printed.splitlines() if line.startswith(row["name"] + " "))
        assert line.split()[-2:] == [f"{row['ids']:,}", f"{row['bytes_per_token']:.3f}"]
    assert f"on {found['held_out_text']['bytes']:,} bytes of text" in printed


def test_bytes_per_token_is_that_of_tiktoken(shared):
    texts = ["naïve “café” 東京 <|endoftext|>", "x = 1\n\n    y = 2\n", "", "w" * 250_000]
    tokenizer = load_tokenizer("gpt2")
    tokens = sum(len(tokenizer.encode_ordinary(text)) for text in texts[:3])
    assert bytes_per_token(tokenizer, texts[:3]) == size(texts[:3]) / tokens
    assert bytes_per_token(tokenizer, texts) > 1


def test_tokenizers_that_are_not_to_be_had_are_a_line(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    found = learn(inputs, tmp_path / "new")
    assert [row["name"] for row in found["tokenizers"]] == ["this one"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not compared: ")]
    assert [line.split()[2] for line in lines] == ["gpt2", "o200k_base"]
    assert all("could not be downloaded (OSError)" in line for line in lines)


def test_a_tokenizer_that_cannot_take_the_text_is_a_line(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    save_tokenizer(tmp_path / "abc", *learn_tokenizer.characters("abc"))
    found = learn(inputs, tmp_path / "new", "--compare", tmp_path / "abc")
    assert [row["name"] for row in found["tokenizers"]] == ["this one"]
    assert f"not compared: {tmp_path / 'abc'}: the held-out text could not be tokenized (no token for" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["nosuch", "", "{tmp}", "gpt2"])
def test_a_tokenizer_to_compare_with_is_opened_before_the_training(inputs, tmp_path, name, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    monkeypatch.setattr(learn_tokenizer, "train_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"^--compare: [^\n]+$"):
        learn(inputs, tmp_path / "new", "--compare", "bytes", name.format(tmp=tmp_path))
    assert not (tmp_path / "new").exists()


def test_a_report_that_cannot_be_written_fails_nothing(inputs, tmp_path, capsys, monkeypatch):
    def full(path, content):
        raise UserError(f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr(learn_tokenizer, "write_json", full)
    main(["--input", str(inputs), "--vocab_size", "600", "--out", str(tmp_path / "new")])
    assert load_tokenizer(tmp_path / "new").n_vocab == 600
    assert "the report was not kept: " in capsys.readouterr().out


def test_without_text_there_is_no_report(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("")
    main(["--input", str(tmp_path), "--vocab_size", "257", "--out", str(tmp_path / "new")])
    assert "no text could be held out" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "new").n_vocab == 257 and not (tmp_path / "new" / "tokenizer_report.json").exists()


# -- special tokens --------------------------------------------------------------------------------

SPECIAL = {
    "the end of text first": [END_OF_TEXT, "<|a|>", "<|b|>"],
    "in the middle": ["<|a|>", END_OF_TEXT, "<|b|>"],
    "one inside another": ["<|a<|b|>c|>", "<|b|>"],
    "overlapping": ["<|a|><", "<|b|>", "|><|b"],
    "blanks around": [" <|a|>", "<|b|> ", "  <|c|>  "],
    "not ASCII": ["<|東京|>", "<\uff5cuser\u2581x\uff5c>", "😀😀"],
    "as others name them": ["<s>", "</s>", "[INST]", "[PAD]", "### User:", "<think>", "</think>"],
    "three hundred": [f"<|extra_{number:03}|>" for number in range(300)],
}


@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)
def test_special_tokens_are_the_same_to_all(tmp_path, special):
    """To tiktoken, to transformers, and to our own reading of tokenizer.json, as special tokens and as text."""
    special = checked_special_tokens(special, 1000)
    texts = [text for _, text in zip(range(20), (text for _, text in StandardLibrary()), strict=False)]
    ranks, ids = train_tokenizer(texts, 456 + len(special), special)
    save_tokenizer(tmp_path, ranks, ids)
    assert list(ids) == special and list(ids.values()) == list(range(456, 456 + len(special)))
    ours = load_tokenizer(tmp_path)
    automatic = AutoTokenizer.from_pretrained(tmp_path)
    as_text = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    foreign = HuggingFaceTokenizer(tmp_path)
    assert automatic.eos_token_id == ours.end_of_text == foreign.end_of_text == ids[END_OF_TEXT]
    assert set(ids) <= set(automatic.get_vocab()) and foreign.added_tokens == ()

    choose = random.Random(0)
    words = [*special, " ", "  ", "x", "the ", " user", "é", "\n", "<|", "|>"]
    words += [part for token in special[:20] for part in (token[:-1], token[1:])]
    for _ in range(1000):
        text = "".join(choose.choice(words) for _ in range(choose.randrange(1, 8)))
        tokens = ours.encode(text, allowed_special="all")
        assert automatic.encode(text) == tokens, text
        assert automatic.decode(tokens) == ours.decode(tokens) == foreign.decode(tokens) == text
        ordinary = [token for token in tokens if token < 456]
        assert automatic.decode(tokens, skip_special_tokens=True) == ours.decode(ordinary)
        tokens = ours.encode_ordinary(text)
        assert as_text.encode(text, add_special_tokens=False) == foreign.encode_ordinary(text) == tokens, text
        assert max(tokens) < 456


@pytest.mark.parametrize(
    "special, found, words",
    [
        (["<|a|>", "<|a|>b"], "<|a|>", "with which '<|a|>b' begins"),
        (["<|a|>b", "<|a|>"], "<|a|>", "with which '<|a|>b' begins"),
        (["<|endoftext"], "<|endoftext", "with which '<|endoftext|>' begins"),
        (["<|a|>", "<|endoftext|>2"], "<|endoftext|>", "with which '<|endoftext|>2' begins"),
        (["user"], "user", "one piece of ordinary text"),
        (["###"], "###", "one piece of ordinary text"),
        (["<user"], "<user", "one piece of ordinary text"),
        (["<|é|>"], "<|\\xe9|>", "transformers would decode it to other text"),
        (["Ġuser"], "\\u0120user", "transformers would decode it to other text"),
    ],
)
def test_special_tokens_that_programs_would_find_differently_are_refused(special, found, words):
    with pytest.raises(UserError, match=r"^--special_tokens: found ") as caught:
        checked_special_tokens(special, 1000)
    assert f"found '{found}', " in str(caught.value) and words in str(caught.value)
    assert str(caught.value).endswith("; choose another name, as <|user|>")
