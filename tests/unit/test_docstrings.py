"""Conversations made of the standard library's docstrings: true, the same on every call, no module in both splits."""

import inspect
import json
import logging

from minzero.data.chat_formats import read_messages
from minzero.data.docstrings import BRIEF, Docstrings, conversation, items_of, module_name
from tests.helpers.data_sets import meta_of, run

SOURCE = '''"""A module
of tests.

More about it.
"""


def add(a, *, b=1):
    """add(a, b) -> sum

    Return the sum of two numbers. Nothing is rounded.
    """


class Shape:
    """A shape that has an area."""

    async def area(self):
        """Return the area in square metres."""

    def _hidden(self):
        """Return what nobody may see here."""


def nothing():
    return 1


def _private():
    """Return what nobody may see here."""
'''


def test_items_of_a_module():
    assert [tuple(item) for item in items_of("shapes", SOURCE)] == [  # the module's own is too short
        ("shapes.add", "function", "Return the sum of two numbers. Nothing is rounded.", "a, *, b=1"),
        ("shapes.Shape", "class", "A shape that has an area.", "area"),
        ("shapes.Shape.area", "function", "Return the area in square metres.", "self"),
    ]
    longer = SOURCE.replace("of tests.", "of tests of shapes.")
    assert tuple(items_of("shapes", longer)[0]) == (
        "shapes",
        "module",
        "A module of tests of shapes.",
        "add, Shape, nothing",
    )
    assert items_of("shapes._private", SOURCE) == items_of("shapes", "def (") == []
    assert module_name("cpython/Lib/json/__init__.py") == "json"
    assert module_name("cpython/Lib/json/decoder.py") == "json.decoder"


def test_what_is_said_is_in_the_docstrings():
    rows = list(Docstrings())
    assert rows == list(Docstrings()) and len(rows) > 1000
    shapes = set()
    for key, row in rows:
        found = read_messages(key, row["messages"])
        roles = [message["role"] for message in found.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        shapes.add((found.messages[0]["role"], len(roles)))
    assert shapes == {("system", 2), ("user", 2), ("user", 4)}
    texts = "\n".join(message["content"] for _, row in rows for message in row["messages"])
    for value in (json.dumps, json.JSONEncoder.encode, logging.getLogger):
        first = inspect.getdoc(value).split("\n\n")[0]
        assert " ".join(first.split()) in texts or " ".join(first.split()).split(". ")[0] in texts
    brief = [row["messages"] for _, row in rows if row["messages"][0]["content"] == BRIEF]
    assert len(brief) > 100 and not any(". " in talk[2]["content"].rstrip(". ") for talk in brief)


def test_an_item_without_a_next_one_still_has_a_conversation():
    for item in items_of("shapes", SOURCE):
        talk = conversation(item, None)
        assert item.name in " ".join(message["content"] for message in talk)
        assert talk[-1]["role"] == "assistant"


def test_the_command_makes_data_in_which_no_module_is_in_both_splits(tmp_path):
    library = tmp_path / "lib"
    library.mkdir()
    for number in range(30):
        (library / f"shapes{number}.py").write_text(SOURCE)
    flags = ["--tokenizer", "bytes", "--workers", 1, "--val_fraction", 0.3]
    done = run("stdlib_chat", "--input", library, "--out", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    splits = meta_of(tmp_path / "out")["splits"]
    assert [splits[name]["documents"] % 3 for name in ("train", "val")] == [0, 0]  # three of each module
    assert splits["train"]["documents"] + splits["val"]["documents"] == 90 and splits["val"]["documents"]
    without = run("stdlib_chat", "--input", library, "--out", tmp_path / "no", "--tokenizer", tmp_path / "none")
    assert without.returncode == 2 and "no such folder" in without.stderr
