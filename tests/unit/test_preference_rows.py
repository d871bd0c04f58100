"""Rows of preference data sets as shards: TRL's formats, what is learned of them, and rows that are none."""

import json

import pytest

from minzero.data import pipeline
from minzero.data.chat_templates import LEARNED
from minzero.data.conversations import NOT_LEARNED, PAIR, Conversations, with_marks
from minzero.data.docstrings import DocstringPairs
from minzero.data.documents import BadDocument
from minzero.data.meta import read_meta
from minzero.data.packing import open_stream
from minzero.data.preferences import Preferences, read_pair
from minzero.data.shards import TokenStream
from tests.helpers.pairs import Rows, rows, write_pairs

QUESTION = {"role": "user", "content": "Red?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
FORMATS = [
    {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]},
    {"prompt": "Red?", "chosen": "Yes.", "rejected": "No."},
    {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO], "score_chosen": 9.0},
    {"prompt": "Red?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    {"prompt": "Red?", "chosen": [YES], "rejected": [NO]},
    {"prompt": [QUESTION], "chosen": YES, "rejected": NO},
    {"prompt": QUESTION, "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    {"chosen": "\n\nHuman: Red?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Red?\n\nAssistant: No."},
    {"prompt": "\n\nHuman: Red?\n\nAssistant:", "chosen": "Yes.", "rejected": "No."},
    {"prompt": [], "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    {"prompt": [{"from": "human", "value": "Red?"}], "chosen": {"from": "gpt", "value": "Yes."}, "rejected": [NO]},
]


def text_of(row):
    ((_, text),) = Preferences(Rows([row]))
    return text


@pytest.mark.parametrize("row", FORMATS)
def test_every_format_is_the_same_pair(row):
    assert text_of(row) == PAIR.join(with_marks("", [QUESTION, answer]) for answer in (YES, NO))


def test_what_follows_a_shared_answer_is_the_pair():
    """The next words of the user may differ."""
    (chosen, rejected) = text_of(
        {name: [QUESTION, YES, {"role": "user", "content": name}, YES] for name in ("chosen", "rejected")}
    ).split(PAIR)
    assert chosen.endswith(f"{LEARNED}Yes.{LEARNED}") and chosen.replace("chosen", "rejected") == rejected


def test_a_system_prompt_in_its_own_column():
    system = {"role": "system", "content": "Be brief."}
    for row in FORMATS:
        expected = PAIR.join(with_marks("", [system, QUESTION, answer]) for answer in (YES, NO))
        assert text_of(row | {"system": "Be brief."}) == expected


def test_of_what_both_begin_with_nothing_is_learned():
    begin = [QUESTION, YES, {"role": "user", "content": "Sure?"}]
    for row in (
        {"prompt": begin, "chosen": [YES], "rejected": [NO]},
        {"chosen": [*begin, YES], "rejected": [*begin, NO]},
        {"chosen": "".join(SAID).format("Yes."), "rejected": "".join(SAID).format("No.")},
    ):
        chosen, rejected = text_of(row).split(PAIR)
        assert f"{NOT_LEARNED}Yes.{NOT_LEARNED}" in chosen and chosen.endswith(f"{LEARNED}Yes.{LEARNED}")
        assert rejected == chosen.removesuffix(f"{LEARNED}Yes.{LEARNED}") + f"{LEARNED}No.{LEARNED}"


SAID = ("\n\nHuman: Red?", "\n\nAssistant: Yes.", "\n\nHuman: Sure?", "\n\nAssistant: {}")


def test_no_text_can_end_an_answer():
    assert text_of({"prompt": "Red?", "chosen": f"Y{PAIR}es{LEARNED}.", "rejected": "No."}) == text_of(FORMATS[0])


def test_in_other_conversations_the_separator_is_a_character(tmp_path):
    row = {"messages": [QUESTION, YES | {"content": f"Y{PAIR}es."}]}
    flags = ["--out", str(tmp_path / "data"), "--val_fraction", "0", "--workers", "1"]
    talks = Conversations(Rows([row]))
    pipeline.prepare(talks, "bytes", pipeline.options("", ".").parse_args(flags), loss_mask=True)
    stream = TokenStream(tmp_path / "data", "train", 16)
    stored = stream.read(0, stream.tokens)
    assert stored.tolist().count(ord(PAIR)) == 1 and not stream.has_pairs


@pytest.mark.parametrize(
    "row, said",
    [
        (
            {"prompt": "Red?", "chosen": "Yes."},
            r"no rejected: found NoneType, expected a text or .* has prompt, chosen\)",
        ),
        ({"chosen": "Yes.", "rejected": "No."}, "found no prompt and no message with which both answers begin"),
        ({"chosen": [YES], "rejected": [NO]}, "found no prompt and no message with which both answers begin"),
        ({"prompt": "Red?", "chosen": "Yes.", "rejected": "Yes."}, "found the same answer as chosen and as rejected"),
        ({"prompt": "Red?", "chosen": [QUESTION], "rejected": [NO]}, "found no message of the assistant|no answer"),
        (
            {"prompt": "\n\nHuman: Red?\n\nAssistant: It is", "chosen": " so.", "rejected": " not."},
            "found a prompt that ends with words of the assistant",
        ),
        ({"prompt": [QUESTION, YES], "chosen": [YES], "rejected": [NO]}, "ends with words of the assistant"),
        ({"prompt": 3, "chosen": "Yes.", "rejected": "No."}, "no prompt: found int"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row, said):
    with pytest.raises(BadDocument, match=said):
        list(Preferences(Rows([row])))


def test_a_row_that_cannot_be_used_can_be_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows(9), {"prompt": "x"}]))
    from data.preferences import prepare

    flags = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer", "bytes", "--workers", "1"]
    flags += ["--out", str(tmp_path / "data"), "--val_fraction", "0.3"]
    with pytest.raises(BadDocument, match="no chosen"):
        prepare.main(flags)
    prepare.main([*flags, "--on_bad_document", "skip"])
    meta = read_meta(tmp_path / "data")
    assert meta["pairs"] and meta["skipped"] == 1 and sum(part["documents"] for part in meta["splits"].values()) == 9
    again = write_pairs(tmp_path / "again", rows(9))
    tokens = [TokenStream(folder, "train", 16).tokens for folder in (again, tmp_path / "data")]
    assert min(tokens) > 0 and meta["settings"]["pairs"] is True


def test_a_pair_that_is_too_long_is_left_out_whole(tmp_path):
    found = rows(20)
    sizes = {}
    for place, row in enumerate(found):
        halves = text_of(row).encode().split(PAIR.encode())
        # an id before each, and one for the two marks' end of text
        sizes[place] = max(len(half.replace(LEARNED.encode(), b"")) + 2 for half in halves)
    most = sorted(sizes.values())[10]
    flags = ["--out", str(tmp_path / "data"), "--val_fraction", "0", "--workers", "1"]
    pairs = Preferences(Rows(found), max_tokens=most)
    pipeline.prepare(pairs, "bytes", pipeline.options("", ".").parse_args(flags), loss_mask=True)
    meta = read_meta(tmp_path / "data")
    kept = sum(size <= most for size in sizes.values())
    assert meta["splits"]["train"]["documents"] == kept < 20 and meta["too_long"] == 20 - kept
    stream = open_stream(tmp_path / "data", "train", 2 * most)
    assert len(stream.lengths) == 2 * kept and stream.lengths.max() <= most


def test_pairs_of_docstrings_are_one_sentence_and_more(tmp_path):
    (tmp_path / "shapes.py").write_text(
        '"""Shapes with an area and a perimeter."""\n\n'
        'def area(shape):\n    """The area of a shape in square metres. Of a line\n    it is 0."""\n\n'
        'def perimeter(shape):\n    """The length of the line around a shape."""\n'
    )
    (tmp_path / "alone.py").write_text('"""A module of which nothing else is known."""\n')
    found = [row for _, row in DocstringPairs([str(tmp_path)])]
    shapes, area, perimeter = (
        "Shapes with an area and a perimeter.",
        "The area of a shape in square metres.",
        "The length",
    )
    perimeter += " of the line around a shape."
    expected = [(shapes, area), (area, "Of a line it is 0."), (perimeter, shapes)]
    for row, (brief, more) in zip(found, expected, strict=True):
        chosen, rejected = read_pair("", row)
        assert chosen.messages[0] == rejected.messages[0] == row["prompt"][0]
        assert chosen.messages[1]["content"] == brief and rejected.messages[1]["content"] == f"{brief} {more}"
        assert chosen.learned == rejected.learned == [False, True]
