"""Questions and answers about Python's standard library, made of its docstrings: the same ones on every call.

Of each public module, class and function with a docstring there is a conversation; what it asks, and whether it has a
system prompt or several turns, is decided by a hash of the name. The files are parsed, not imported.
"""

import ast
import hashlib
import inspect
import re
import warnings
from typing import NamedTuple

from minzero.data.documents import Source
from minzero.data.sources import StandardLibrary

LENGTHS = range(20, 601)  # characters of an answer
LISTED = 5  # names in an answer about a module or class

FIRST = {
    "module": ("What is the module {name} for?", "What does {name} contain?", "Tell me about the module {name}."),
    "function": ("What does {name} do?", "Explain {name}.", "I found {name} in a program. What is it for?"),
    "class": ("What is {name}?", "What is the class {name} for?", "Explain {name}."),
}
NEXT = ("And {name}?", "What about {name}?")
BRIEF = "Answer in one sentence."
KINDS = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}


class Item(NamedTuple):
    """Something with a docstring. name: as in json.dumps. kind: a key of FIRST. about: the first paragraph. more: of a
    function its arguments, of others names in it, as text; or empty."""

    name: str
    kind: str
    about: str
    more: str


class Docstrings(Source):
    """The conversations as rows, {"messages": [...]}. The key is the module's path, so that all conversations about a
    module are in the same split. folders: see StandardLibrary."""

    description = "docstrings of the standard library"
    fraction = None

    def __init__(self, folders=None):
        self.library = StandardLibrary(folders)

    def __iter__(self):
        for path, text in self.library:
            items = items_of(module_name(path), text)
            for place, item in enumerate(items, 1):
                other = items[place] if place < len(items) else None
                yield path, {"messages": conversation(item, other)}


class DocstringPairs(Docstrings):
    """Pairs of answers as rows, {"prompt", "chosen", "rejected"}, to the same questions: the first sentence of the
    docstring is preferred to one that goes on, with its second sentence or else the first about the module's next
    item."""

    description = "pairs of docstrings of the standard library"

    def __iter__(self):
        for path, text in self.library:
            items = items_of(module_name(path), text)
            for place, item in enumerate(items):
                other = items[(place + 1) % len(items)]
                brief, more = [*sentences(item.about), *sentences(other.about)][:2]
                if more != brief:
                    question, answer = turn_about(item)
                    chosen, rejected = ([answer | {"content": text}] for text in (brief, f"{brief} {more}"))
                    yield path, {"prompt": [question], "chosen": chosen, "rejected": rejected}


def sentences(text):
    return re.split(r"(?<=\.)\s", text)


def turn_about(item):
    """The question about an item, and its answer, as two messages."""
    forms = FIRST[item.kind]
    return turn(forms[number_of(item) % len(forms)].format(name=item.name), item.about)


def number_of(item):
    return int.from_bytes(hashlib.sha256(item.name.encode()).digest()[:4], "big")


def module_name(path):
    """ "cpython/Lib/json/decoder.py" -> "json.decoder"."""
    return path.removeprefix("cpython/Lib/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def items_of(module, text):
    """The items of a module's source: itself first, then its functions and classes in their order."""
    if any(part.startswith("_") for part in module.split(".")):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old ways to write a string
            tree = ast.parse(text)
    except SyntaxError:
        return []  # a few files exist to test what a parser does
    found = [*items_in(tree, module, "module")]
    return [item for item in found if len(item.about) in LENGTHS]


def items_in(node, name, kind):
    """The items of a module, class or function, itself first."""
    more = ""
    inside = []
    if kind == "function":
        more = ast.unparse(node.args)
    else:
        inside = [child for child in node.body if type(child) in KINDS and not child.name.startswith("_")]
        more = ", ".join(child.name for child in inside[:LISTED])
    yield Item(name, kind, first_paragraph(node), more)
    for child in inside:
        yield from items_in(child, f"{name}.{child.name}", KINDS[type(child)])


def first_paragraph(node):
    """The first paragraph of a docstring in one line, without what is no sentence before it, as "dumps(obj) -> str"."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(ast.get_docstring(node) or ""))
    lines = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return next((line for line in lines if line.endswith((".", ":"))), "").replace(">>>", "").rstrip(":")


def conversation(item, other):
    """The messages about an item. other: the next item of the same module, or None."""
    number = number_of(item)
    messages = turn_about(item)
    shape = number // len(FIRST[item.kind]) % 4
    if shape == 0:
        messages[1]["content"] = sentences(item.about)[0]
        return [{"role": "system", "content": BRIEF}, *messages]
    if shape == 1 and item.more:
        if item.kind == "function":
            return messages + turn("Which arguments does it take?", f"({item.more})")
        return messages + turn("Name some of what it has.", item.more)
    if shape == 2 and other:
        return messages + turn(NEXT[number % len(NEXT)].format(name=other.name), other.about)
    return messages


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
