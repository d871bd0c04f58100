"""Rows of conversations in the formats of others: recognised, read from every kind of file, refused in one line."""

import datetime
import decimal
import gzip
import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from minzero.data.chat_formats import FORMATS, LISTS, read_messages, read_row, recognise, tools_as_text
from minzero.data.chat_templates import ChatTemplate
from minzero.data.conversations import HEADINGS, LEARNED, NOT_LEARNED, Conversations, with_marks
from minzero.data.documents import BadDocument
from minzero.data.local_files import Files
from minzero.data.shards import NO_LOSS, TokenStream
from minzero.data.sources import Hub
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from tests.helpers.data_sets import meta_of, run, zstd

ASKED = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2."}]
BRIEF = {"role": "system", "content": "Be brief."}
CALL = {"name": "add", "arguments": {"a": 1, "b": 1}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def bytes_template(text, name):
    return ChatTemplate(load_tokenizer("bytes").as_transformers(None), text, name)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


# (name, format, row, the messages, which of them are learned)
ROWS = [
    ("openai", "messages", {"messages": ASKED}, ASKED, [0, 1]),
    ("other columns", "messages", {"id": 1, "conversation": ASKED, "score": 0.5}, ASKED, [0, 1]),
    ("conversations", "messages", {"conversations": [BRIEF, *ASKED]}, [BRIEF, *ASKED], [0, 0, 1]),
    (
        "parts",
        "messages",
        {"messages": [{"role": "user", "content": parts("1 +", " 1?")}, {"role": "assistant", "content": parts("2.")}]},
        ASKED,
        [0, 1],
    ),
    ("developer", "messages", {"messages": [BRIEF | {"role": "developer"}, *ASKED]}, [BRIEF, *ASKED], [0, 0, 1]),
    (
        "weights",
        "messages",
        {"messages": [ASKED[0], ASKED[1] | {"weight": 0}, ASKED[0], ASKED[1] | {"weight": 1, "train": None}]},
        ASKED * 2,
        [0, 0, 0, 1],
    ),
    (
        "axolotl",
        "messages",
        {"messages": [*ASKED, ASKED[0], ASKED[1] | {"training": False}, ASKED[0], ASKED[1] | {"train": True}]},
        ASKED * 3,
        [0, 1, 0, 0, 0, 1],
    ),
    (
        "sharegpt",
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "1 + 1?"},
                {"from": "gpt", "value": "2.", "weight": 1},
            ]
        },
        [BRIEF, *ASKED],
        [0, 0, 1],
    ),
    (
        "sharegpt with a tool",
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2."},
            ],
            "tools": json.dumps([TOOL]),
        },
        [
            ASKED[0],
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "2"},
            ASKED[1],
        ],
        [0, 1, 0, 1],
    ),
    (
        "openai with a tool",
        "messages",
        {
            "messages": [
                ASKED[0],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "7",
                            "type": "function",
                            "function": CALL | {"arguments": json.dumps(CALL["arguments"])},
                        }
                    ],
                },
                {"role": "tool", "content": "2", "tool_call_id": "7"},
                ASKED[1],
            ],
            "tools": [TOOL],
        },
        [
            ASKED[0],
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL, "id": "7"}]},
            {"role": "tool", "content": "2", "tool_call_id": "7"},
            ASKED[1],
        ],
        [0, 1, 0, 1],
    ),
    ("alpaca", "alpaca", {"instruction": "1 + 1?", "input": "", "output": "2.", "text": "..."}, ASKED, [0, 1]),
    (
        "alpaca with all",
        "alpaca",
        {
            "instruction": "Add.",
            "input": "1, 1",
            "output": "2.",
            "system": "Be brief.",
            "history": [["1 + 1?", "2."]],
        },
        [BRIEF, *ASKED, {"role": "user", "content": "Add.\n\n1, 1"}, ASKED[1]],
        [0, 0, 1, 0, 1],
    ),
    *(
        (f"system beside {name}", name, row | {"system": "Be brief."}, [BRIEF, *ASKED], [0, 0, 1])
        for name, row in (
            ("messages", {"messages": ASKED}),
            ("sharegpt", {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2."}]}),
            ("prompt_completion", {"prompt": "1 + 1?", "completion": "2."}),
        )
    ),
    (
        "system in parts",
        "messages",
        {"messages": ASKED, "system": parts("Be ", "brief.")},
        [BRIEF, *ASKED],
        [0, 0, 1],
    ),
    *(
        (f"no text of the system: {value}", "messages", {"messages": talk, "system": value}, talk, learned)
        for value, talk, learned in (
            ("", ASKED, [0, 1]),
            (None, ASKED, [0, 1]),
            (False, ASKED, [0, 1]),
            (7, [BRIEF, *ASKED], [0, 0, 1]),
        )
    ),
    ("two of the system", "messages", {"messages": [BRIEF, *ASKED], "system": "Or not."}, [BRIEF, *ASKED], [0, 0, 1]),
    ("prompt", "prompt_completion", {"prompt": "1 + 1?", "completion": "2."}, ASKED, [0, 1]),
    (
        "prompt in messages",
        "prompt_completion",
        {"prompt": [*ASKED, ASKED[0]], "completion": [ASKED[1]]},
        ASKED * 2,
        [0, 0, 0, 1],
    ),
]


@pytest.mark.parametrize("name, format_name, row, messages, learned", ROWS, ids=[row[0] for row in ROWS])
def test_each_format_is_recognised_and_read(name, format_name, row, messages, learned):
    found_format, column = recognise(row)
    assert found_format == format_name in FORMATS
    found = read_row("row 1", row, found_format, column)
    assert found.messages == messages and found.learned == [bool(counts) for counts in learned]
    assert found.tools == ([TOOL] if "tools" in row else None)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "hub", "streaming"])
@pytest.mark.parametrize("name, format_name, row, messages, learned", ROWS, ids=[row[0] for row in ROWS])
def test_each_format_from_each_kind_of_file(tmp_path, capsys, suffix, name, format_name, row, messages, learned):
    """Tables give every field in every row, mostly null."""
    lines = "".join(json.dumps(row) + "\n" for _ in range(3)).encode()
    path = tmp_path / f"rows.{suffix}"
    contents = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": zstd(lines)}
    contents["json"] = json.dumps([row] * 3, indent=1).encode()
    if suffix in contents:
        path.write_bytes(contents[suffix])
    elif suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row] * 3), path)
    if suffix in ("hub", "streaming"):
        dataset = datasets.Dataset.from_list([row] * 3)
        source = Hub(dataset if suffix == "hub" else dataset.to_iterable_dataset(), "messages", "hub", dict)
    else:
        source = Files([str(path)], "messages", dict)
    expected = tools_as_text(read_row("", row, format_name, recognise(row)[1]))
    texts = [text for _, text in Conversations(source)]
    assert texts == [with_marks("", expected.messages, expected.learned)] * 3
    assert capsys.readouterr().out.count(f"format: {format_name}") == 1


def test_json_that_is_lines_is_read_as_lines(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps({"messages": ASKED}) + "\n" for _ in range(3)))
    (tmp_path / "b.json").write_text(json.dumps([{"messages": ASKED}, 5]))
    found = list(Files([str(tmp_path / "a.json")], "messages", dict))
    assert [row for _, row in found] == [{"messages": ASKED}] * 3
    source = Files([str(tmp_path)], "messages", dict)
    assert len(source.paths) == 2
    with pytest.raises(BadDocument, match=r"b.json row 2: no conversation: found int, expected a row"):
        list(source)
    with pytest.raises(UserError, match="matches no file of a known kind"):  # of text it is none
        Files([str(tmp_path)])


def test_tools_are_text_where_the_template_knows_none():
    row = next(row for name, _, row, _, _ in ROWS if name == "openai with a tool")
    conversation = tools_as_text(read_row("", row, *recognise(row)))
    system, asked, call, result, answer = conversation.messages
    assert system["role"] == "system" and json.dumps(TOOL) in system["content"]
    assert (asked, answer) == tuple(ASKED) and conversation.learned == [False, False, True, False, True]
    assert call == {"role": "assistant", "content": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"}
    assert result == {"role": "user", "content": "<tool_response>\n2\n</tool_response>"}
    talk = [BRIEF, *row["messages"][:2], *row["messages"][2:3] * 2, ASKED[1]]
    found = tools_as_text(read_messages("", talk, [TOOL]))
    assert found.messages[0]["content"].startswith("Be brief.\n\n") and len(found.messages) == 5
    assert found.messages[3]["content"].count("<tool_response>") == 2


BAD = [
    (
        {"text": "Hi"},
        None,
        "no conversation: found nothing, expected a list of messages under 'messages'.*row has text",
    ),
    ({"messages": "Hi"}, None, "found str, expected a list of messages under 'messages'"),
    ({"messages": [ASKED[0] | {"content": [{"type": "image_url", "image_url": "x"}]}]}, None, "a part of type 'image_"),
    ({"messages": [ASKED[0], ASKED[1] | {"weight": 0.5}]}, None, "message 2: weight: found 0.5, expected 0 or 1"),
    ({"messages": [ASKED[0], ASKED[1] | {"weight": "1"}]}, None, "message 2: weight: found '1', expected 0 or 1"),
    ({"messages": [ASKED[0], ASKED[1] | {"weight": 0}]}, None, "found no answer that is learned"),
    ({"messages": [ASKED[0], ASKED[1] | {"content": None}]}, None, "message 2: found .*a text as content"),
    ({"messages": [ASKED[0], ASKED[1] | {"tool_calls": ["x"]}]}, None, "message 2: found a tool call x, expected"),
    ({"messages": ASKED, "tools": "add"}, None, "tools: found add, expected a list of objects"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, None, "message 1: found .* expected from .*human"),
    ({"conversations": [{"from": "human"}]}, None, "message 1: found .* and value"),
    ({"conversations": [{"from": "human", "value": "x"}, 5]}, None, "message 2: found 5"),
    ({"instruction": 1, "output": "x"}, None, "found int, expected a string under 'instruction'"),
    ({"instruction": "x", "output": "x", "history": ["x"]}, None, "history: found x, expected pairs"),
    ({"instruction": "x", "output": "x", "history": 1}, None, "history: found 1, expected a list"),
    ({"messages": ASKED, "system": 5}, None, "system: found 5, expected a text"),
    ({"prompt": 1, "completion": "x"}, None, "prompt: found int, expected a text or a list of messages"),
    ({"prompt": [5], "completion": "x"}, None, "message 1: found 5"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, None, "found a pair of answers.*data/preferences/prepare.py"),
    ({"messages": ASKED}, "alpaca", "found nothing, expected a string under 'instruction'"),
    ({"messages": ASKED}, "sharegpt", "message 1: found .* expected from"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "messages", "message 1: found .* expected a role"),
]


@pytest.mark.parametrize("row, format_name, expected", BAD, ids=[bad[2] for bad in BAD])
def test_a_bad_row_is_one_line_or_left_out(tmp_path, row, format_name, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    source = Conversations(Files([str(tmp_path / "a.jsonl")], "messages", dict), None, format_name)
    with pytest.raises(BadDocument, match=rf"^a.jsonl row 1: [^\n]*{expected}[^\n]*--on_bad_document skip$"):
        list(source)
    source.yield_bad = True
    assert [type(text) for _, text in source] == [BadDocument]


@pytest.mark.parametrize(
    "fault", [decimal.Decimal(1), datetime.date(2026, 1, 1), b"x"], ids=["decimal", "date", "bytes"]
)
def test_a_table_with_what_json_cannot_hold_is_a_bad_row(tmp_path, fault):
    call = {"type": "function", "function": CALL | {"arguments": {"a": fault}}}
    for number, row in enumerate(
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}]},
            {"messages": ASKED, "tools": [{"name": "add", "default": fault}]},
        )
    ):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{number}.parquet")
        with pytest.raises(BadDocument, match=r"parquet row 1: .*found what JSON cannot hold \(.*; fix or remove it"):
            list(Conversations(Files([str(tmp_path / f"{number}.parquet")], "messages", dict)))


def test_a_row_nested_too_deeply_is_a_bad_row(tmp_path):
    """At any depth: found by the reader of the file, by the check of the tools, or by the template's guard."""
    for depth in (300, 500, 900, 1100, 100_000):
        tool = '{"name": "add", "a": ' + "[" * depth + "]" * depth + "}"
        rows = [f'{{"messages": {json.dumps(ASKED)}, "tools": [{tool}]}}', json.dumps({"messages": ASKED})]
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        template = bytes_template("{% for m in messages %}{{ m['content'] }}{% endfor %}", "plain")
        for chosen in (None, template):
            source = Conversations(Files([str(tmp_path / "a.jsonl")], "messages", dict), chosen)
            source.yield_bad = True
            found = [text for _, text in source]
            assert len(found) == 2 and isinstance(found[1], str), depth
            if isinstance(found[0], BadDocument):
                assert "deep" in str(found[0]) or "recursion" in str(found[0]), found[0]


def test_nulls_of_json_stay_and_those_of_a_table_go(tmp_path):
    """A table has every field in every row; in JSON a null is the caller's."""
    call = {"name": "add", "arguments": {"a": 1, "b": None}}
    rows = [
        {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]}
        for function in (call, call | {"arguments": json.dumps(call["arguments"])})
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": ASKED, "tools": [{"name": "add", "default": None}]}))
    parquet.write_table(pyarrow.Table.from_pylist([*rows[:1], {"messages": ASKED}]), tmp_path / "c.parquet")

    def texts(name):
        return [text for _, text in Conversations(Files([str(tmp_path / name)], "messages", dict))]

    assert all('{"a": 1, "b": null}' in text for text in texts("a.jsonl")) and len(texts("a.jsonl")) == 2
    assert '"default": null' in texts("b.jsonl")[0]
    assert '{"a": 1}' in texts("c.parquet")[0] and "null" not in texts("c.parquet")[0]


def test_a_byte_order_mark_before_a_list(tmp_path):
    for name, text in (("a.json", json.dumps([{"messages": ASKED}])), ("b.jsonl", json.dumps({"messages": ASKED}))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert len(list(Conversations(Files([str(tmp_path / name)], "messages", dict)))) == 1


def test_reasoning_that_is_left_out_is_said_once(tmp_path, capsys):
    rows = [{"messages": [ASKED[0], ASKED[1] | {"reasoning_content": "Two ones."}]}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def said(template):
        list(Conversations(Files([str(tmp_path / "a.jsonl")], "messages", dict), template))
        return capsys.readouterr().out.count("reasoning_content: ")

    shows = "{% for m in messages %}{{ m['content'] }}{{ m.get('reasoning_content') }}{% endfor %}"
    assert said(None) == 1
    assert said(bytes_template("{% for m in messages %}{{ m['content'] }}{% endfor %}", "a")) == 1
    assert said(bytes_template(shows, "b")) == 0


def test_rows_are_of_the_format_of_the_first(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"messages": ASKED}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadDocument, match=r"a.jsonl row 2: prompt: found NoneType, expected a text"):
        list(Conversations(Files([str(tmp_path / "a.jsonl")], "messages", dict)))


def test_in_our_own_form_an_answer_that_is_not_learned_is_read_to_its_end(tmp_path):
    text = with_marks("", ASKED * 2, [False, False, False, True])
    assert text.count(LEARNED) == text.count(NOT_LEARNED) == 2
    rows = [{"messages": [*ASKED, ASKED[0], ASKED[1] | {"weight": 0}]}] * 9
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--tokenizer", "bytes", "--workers", 1, "--val_fraction", 0]
    done = run("chat", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert "format: messages, in column messages" in done.stdout
    stream, encoding = TokenStream(tmp_path / "out", "train", 8), load_tokenizer("bytes")
    tokens = stream.read(0, stream.tokens)
    _, targets = stream.example(0, stream.tokens - 1)
    end = "<|endoftext|>"
    whole = "".join(f"{HEADINGS['user']}1 + 1?\n\n{HEADINGS['assistant']}2.{end}" for _ in range(2))
    assert encoding.decode(tokens.tolist()) == f"{end}{whole}" * 9
    assert encoding.decode([token for token in targets.tolist() if token >= 0]) == f"2.{end}" * 9
    assert int(NO_LOSS) == 1 << 31 and meta_of(tmp_path / "out")["splits"]["train"]["bytes"] == 18


def test_flags_of_the_command(tmp_path):
    """Formats in other columns, forced formats, a template of one's own, and lengths."""
    rows = [{"prompt": "a" * number, "completion": "b" * 20, "talk": ASKED} for number in range(1, 60)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}A: {{ m['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% else %}Q: {{ m['content'] }} {% endif %}{% endfor %}"
    )
    flags = ["--tokenizer", "bytes", "--workers", 1, "--val_fraction", 0, "--input", tmp_path / "a.json"]

    def tokens_of(name, *more):
        done = run("chat", *flags, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        stream = TokenStream(tmp_path / name, "train", 8)
        return load_tokenizer("bytes").decode(stream.read(0, stream.tokens).tolist()), done.stdout

    text, said = tokens_of("talk", "--column", "talk")
    assert text.count("1 + 1?") == 59 and "aaa" not in text and "format: messages, in column talk" in said
    text, said = tokens_of("prompts", "--chat_template", tmp_path / "mine.jinja", "--max_tokens", 50)
    assert text.startswith("Q: a A: bbbb") and "format: prompt_completion" in said
    assert "mine.jinja; what the assistant says is found by its {% generation %} marks" in said
    # "Q: " + n + " A: " + 20 + the end of text
    assert meta_of(tmp_path / "prompts")["splits"]["train"]["documents"] == 50 - 28
    assert meta_of(tmp_path / "prompts")["too_long"] == 59 - 22 and "no whole answer within --max_tokens" in said
    refused = [
        (["--column", "none"], "no conversation: found nothing, expected a list of messages under 'none'"),
        (["--format", "alpaca"], "found nothing, expected a string under 'instruction'"),
        (["--format", "chatty"], "--format: invalid choice: 'chatty'"),
        (["--chat_template", "base"], "--chat_template: base: bytes comes with no chat template"),
        (["--max_tokens", "1"], "--max_tokens: found 1, expected 2 or more"),
    ]
    for more, expected in refused:
        done = run("chat", *flags, "--out", tmp_path / "refused", *more)
        assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert set(LISTS) == {"messages", "conversation", "conversations"}
