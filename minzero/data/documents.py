"""Documents, as every source gives them: (key, text) pairs in a fixed order.

The key says where a document is from; it decides the split and names the document in errors. A document that cannot
be used is a BadDocument: raised, or with `yield_bad` yielded in place of its text, so that the caller can leave it
out and read the next.
"""

import itertools
import json
from typing import NamedTuple

from tqdm import tqdm

from minzero.errors import UserError

SET_COLUMN = "fix it or set --column"  # the remedy for a row whose column holds no text


class BadDocument(UserError):
    """One document that cannot be read or tokenized. where: names it; reason: what was found and expected."""

    def __init__(self, where, reason, remedy="fix or remove it"):
        where = printable(where)
        super().__init__(where, reason, remedy)  # pickle passes these to __init__ again
        self.where = where
        self.reason = reason
        self.remedy = remedy

    def __str__(self):
        return f"{self.where}: {self.reason}; {self.remedy}, or leave such documents out: --on_bad_document skip"


class Dropped(NamedTuple):
    """Stands in place of the text of a usable document that is left out by --dedup, --decontaminate or --max_tokens.
    kind: "duplicates", "contaminated" or "too_long", the name of its count in meta.json. reason: for skipped.jsonl."""

    kind: str
    reason: str


class Source:
    """Base of all sources. yield_bad: yield a BadDocument in place of the text instead of raising it."""

    yield_bad = False

    def raise_or_yield(self, text):
        """Returns a text, or a BadDocument where `yield_bad` is set. Else raises the BadDocument."""
        if isinstance(text, BadDocument) and not self.yield_bad:
            raise text
        return text


class UsableTexts:
    """The texts of the first `limit` documents, without keys, with a progress bar named `label`.

    on_bad_document: "stop" raises a BadDocument, "skip" leaves it out and counts it in `skipped`."""

    def __init__(self, documents, limit, on_bad_document, label):
        self.documents = documents
        self.limit = limit
        self.label = label
        self.skipped = 0
        if on_bad_document == "skip" and hasattr(documents, "yield_bad"):
            documents.yield_bad = True

    def __iter__(self):
        for _, text in tqdm(itertools.islice(self.documents, self.limit), unit=" documents", desc=self.label):
            if isinstance(text, BadDocument):
                self.skipped += 1
            else:
                yield text


def checked_value(where, value, column, kind, columns=None):
    """The value of a row's column, or a BadDocument if it is not of the expected type.

    kind: the expected type, str or list; dict for a whole row. columns: the names in the row, for the message if
    `column` is not among them."""
    if isinstance(value, kind):
        return value
    found = "nothing" if value is None else type(value).__name__
    if kind is dict:
        return BadDocument(where, f"no conversation: found {found}, expected a row, an object")
    if kind is str:
        missing, expected = "text", "a string"
    else:
        missing, expected = "conversation", "a list of messages"
    row_has = ""
    if columns is not None:
        names = ", ".join(json.dumps(name)[1:-1] for name in list(columns)[:20])  # escaped: it must be one line
        row_has = f" (the row has {names[:300]})" if names else " (the row is empty)"
    return BadDocument(where, f"no {missing}: found {found}, expected {expected} under {column!r}{row_has}", SET_COLUMN)


def without_nulls(value):
    """A value of a table without the fields in it that other rows have and this one has not."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def missing_column(where, column, found):
    """The UserError for a table that has no such column. found: the names that it has."""
    return UserError(
        f"{printable(where)}: no column {column!r}: found {', '.join(found)}; say with --column which holds the text"
    )


def is_far(share, wanted):
    """Whether a split, or the other one, has less than half or more than twice its wanted share (both 0 to 1)."""
    right = wanted / 2 <= share <= wanted * 2
    other_right = (1 - wanted) / 2 <= 1 - share <= (1 - wanted) * 2
    return not (right and other_right)


# -- words for messages --------------------------------------------------------------------------


def printable(path):
    """A path for a message: escaped if it holds a line end or bytes that are not UTF-8."""
    return str(path) if str(path).isprintable() else ascii(str(path))[1:-1]


def plural(count, word):
    """ "1 file", "2 files"."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
