"""meta.json of a folder of token shards, and progress.json of a half prepared one: read, with every field checked."""

import json
import os
import re
from pathlib import Path

from minzero.errors import UserError
from minzero.files import is_count, is_regular, read_json

SHA256 = re.compile("[0-9a-f]{64}")


def read_meta(folder):
    """meta.json of a data folder, every field checked, or None if there is none (shards of other programs). Raises
    UserError."""
    path = Path(folder) / "meta.json"
    if not os.path.lexists(path):
        return None
    meta = read_object(path)

    def expect(right, name, value, expected):
        if not right:
            raise damaged(path, name, value, expected)

    for name, expected in (("vocab_size", "a number of ids"), ("tokenizer", "an object"), ("splits", "an object")):
        expect(name in meta, name, None, expected)
    vocab_size = meta["vocab_size"]
    tokenizer = meta["tokenizer"]
    expect(is_count(vocab_size) and 0 < vocab_size <= 2**31, "vocab_size", vocab_size, "a number of ids, 1 to 2^31")
    expect(isinstance(tokenizer, dict), "tokenizer", tokenizer, "an object")
    for name, kind in (("fingerprint", str), ("name", str), ("trained", bool)):
        value = tokenizer.get(name, "" if name == "fingerprint" else kind())
        expect(isinstance(value, kind), f"tokenizer.{name}", value, f"a {kind.__name__}")
        expect(value or name != "fingerprint", f"tokenizer.{name}", value, "a string")
        expect(kind is bool or value.isprintable(), f"tokenizer.{name}", value, "printable text")
    end = meta.get("end_of_text", 0)
    expect(is_count(end) and end < vocab_size, "end_of_text", end, f"a token id below vocab_size {vocab_size}")
    for name in ("loss_mask", "document_starts", "pairs"):
        expect(isinstance(meta.get(name, False), bool), name, meta.get(name), "true or false")
    is_marked = meta.get("loss_mask") and meta.get("document_starts")
    expect(is_marked or not meta.get("pairs"), "pairs", True, "true only with loss_mask and document_starts")
    document = meta.get("document", {})
    expect(isinstance(document, dict), "document", document, "an object")
    for name, ids in document.items():
        known = isinstance(ids, list) and all(is_count(number) and number < vocab_size for number in ids)
        expected = f"a list of token ids below vocab_size {vocab_size}"
        expect(known and name in ("begin", "end"), f"document.{name}", ids, expected)
    expect(isinstance(meta.get("settings", {}), dict), "settings", meta.get("settings"), "an object")
    template = meta.get("chat_template", {"name": "", "text": ""})
    is_template = isinstance(template, dict) and all(isinstance(template.get(name), str) for name in ("name", "text"))
    end = template.get("end_of_turn") if is_template else None
    is_template = is_template and (end is None or (is_count(end) and end < vocab_size))
    expect(is_template, "chat_template", template, "an object with name, text and end_of_turn, an id")
    for name in ("skipped", "duplicates", "contaminated", "too_long"):
        expect(is_count(meta.get(name, 0)), name, meta.get(name), "a number of documents")
    expect(isinstance(meta["splits"], dict), "splits", meta["splits"], "an object")
    for split, content in meta["splits"].items():
        check_split(path, f"splits.{split}", content)
    return meta


def holds_conversations(folders):
    """Whether any of these data folders holds conversations, as `loss_mask` of meta.json tells. Raises UserError."""
    return any((read_meta(folder) or {}).get("loss_mask") for folder in folders)


def chat_template_of(folders):
    """The chat template of a tokenizer's own, or of a file, that the conversations of the first of these data folders
    with any are in: {"name", "text", "end_of_turn"} of meta.json. None if they have this project's form, or there are
    none. Raises UserError."""
    metas = [read_meta(folder) or {} for folder in folders]
    return next((meta.get("chat_template") for meta in metas if meta.get("loss_mask")), None)


def stops_of(tokenizer, folders):
    """The ids after which a model that learned from these data folders stops, a list: the tokenizer's own, and the one
    that ends a turn in the conversations' chat template."""
    entry = chat_template_of(folders) or {}
    end_of_turn = entry.get("end_of_turn")
    return list(dict.fromkeys([*tokenizer.stops, *([] if end_of_turn is None else [end_of_turn])]))


def check_progress(path):
    """The content of progress.json, every field checked. Raises UserError."""
    progress = read_object(path)
    for name in ("settings", "skipped"):
        if not isinstance(progress.get(name, {}), dict):
            raise damaged(path, name, progress[name], "an object")
    for name in ("train", "val"):
        check_split(path, name, progress.get(name, {"shards": []}))
    for name, value in progress.get("skipped", {}).items():
        if not is_count(value):
            raise damaged(path, f"skipped.{name}", value, "a number from 0 on")
    return progress


def read_object(path, remedy="prepare the data again"):
    """The object in a JSON file. remedy: for the error. Raises UserError, for a pipe or a device too."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; {remedy}")
    if not is_regular(path):
        raise UserError(f"{path}: not a regular file; {remedy}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise damaged(path, "its content", content, "an object", remedy)
    return content


def damaged(path, name, value, expected, remedy="prepare the data again"):
    """The UserError for a wrong value in a JSON file. name: where in it."""
    found = json.dumps(value)
    found = found if len(found) < 80 else f"{found[:80]}..."
    return UserError(f"{path}: damaged: {name}: found {found}, expected {expected}; {remedy}")


def check_split(path, where, content):
    """Raise UserError if what meta.json or progress.json says of a split is not what a prepare script writes."""
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list):
        raise damaged(path, where, content, "an object with a list of shards")
    for name in ("tokens", "documents", "bytes", "cut", "waiting"):
        if not is_count(content.get(name, 0)):
            raise damaged(path, f"{where}.{name}", content[name], "a number from 0 on")
    names = set()
    for number, shard in enumerate(shards):
        here = f"{where}.shards[{number}]"
        if not isinstance(shard, dict):
            raise damaged(path, here, shard, "an object")
        name = shard.get("file")
        tokens = shard.get("tokens")
        digest = shard.get("sha256", 64 * "0")
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or not name.isprintable():
            raise damaged(path, f"{here}.file", name, "the name of a file in this folder")
        if name in names:
            raise damaged(path, f"{here}.file", name, "a name that no other shard has")
        names.add(name)
        if not is_count(tokens):
            raise damaged(path, f"{here}.tokens", tokens, "a number from 0 on")
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise damaged(path, f"{here}.sha256", digest, "64 hexadecimal digits")
