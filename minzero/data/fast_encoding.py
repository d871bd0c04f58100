"""Much text to ids: by gigatoken, many times as fast as tiktoken, where it gives the same ids.

gigatoken is young, and knows some patterns of byte-level BPEs only. So the tokenizer itself, tiktoken or the
`tokenizers` library, stays the reference. gigatoken is used after both gave the same ids of a thousand awkward
strings. These are compared again, with some of the text at hand, for every new copy of it, which is made now and then
because its cache grows with every word that it has not met. If a comparison fails, one line says so and the rest is
left to the reference.
"""

import contextlib
import functools
import json
import random
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import psutil

from minzero.data.tokenizer import HuggingFaceTokenizer
from minzero.data.tokenizer_files import A_CHARACTER, GPT2_PATTERNS, PATTERN, write_ranks
from minzero.errors import describe, panics_as_exceptions

RENEW_AFTER = 512 << 20  # bytes of text
RENEW_AT_GROWTH = 256 << 20  # bytes of memory of this process, but not before
RENEW_NOT_BEFORE = 8 << 20  # bytes of text
COMPARED = 1 << 16  # bytes of the text at hand that are compared when a new copy is made
MOST_IDS = 1 << 24  # of a tokenizer: gigatoken has memory for all up to the largest
LOOK_EVERY = 1 << 20  # bytes of text between two looks at the memory, which take some 10 us

FIRST_BYTE_OF_UNKNOWN = "\u0378".encode()[0]  # the first code point that is not assigned

# gigatoken's names of patterns: of tiktoken's own encodings, and of tokenizers trained here
SCHEMES = {"gpt2": "gpt2", "r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}
SCHEMES_OF_PATTERNS = {PATTERN: "gpt4"} | dict.fromkeys(GPT2_PATTERNS, "gpt2")


class Unsuitable(Exception):
    """gigatoken cannot take the place of a tokenizer. The text says why."""


class BulkEncoder:
    """Encodes text in UTF-8, with the ids of tokenizer.ids. `notice`: a line on why gigatoken is not used,
    or None. use_gigatoken: false for the reference alone; `notice` is None then."""

    def __init__(self, tokenizer, use_gigatoken=True):
        self.tokenizer = tokenizer
        self.quick = None
        self.notice = None
        if use_gigatoken:
            try:
                self.quick = Gigatoken(tokenizer)
                self.renew()
            except Unsuitable as reason:
                self.leave_gigatoken(reason)

    def renew(self):
        """Take a new copy of gigatoken, whose cache is empty. Raises Unsuitable if it does not stand the comparison."""
        self.quick.renew()
        for text in awkward_strings(self.tokenizer.added_tokens):
            self.compare(text.encode())
        self.bytes_read = 0  # since this copy was made
        self.next_look = RENEW_NOT_BEFORE
        self.memory = resident_memory()

    def compare(self, content):
        """Raise Unsuitable if gigatoken gives other ids for a text than the tokenizer."""
        if not np.array_equal(self.quick.ids(content), self.tokenizer.ids(content.decode())):
            raise Unsuitable(f"it gives other ids for {content.decode()[:40]!a}")

    def leave_gigatoken(self, reason):
        self.quick = None
        is_small = getattr(self.tokenizer, "_pat_str", "") == A_CHARACTER  # not worth a line
        self.notice = None if is_small else f"tokenizing without gigatoken, which is much faster: {reason}"

    def encode(self, content):
        """Text in UTF-8 -> its ids, (n,) uint32."""
        if self.quick is not None:
            try:
                ids = self.quick.ids(content)
                self.bytes_read += len(content)
                if self.is_due():
                    self.compare(content[:COMPARED].decode(errors="ignore").encode())
                    self.renew()
                return ids
            except Unsuitable as reason:
                self.leave_gigatoken(reason)
                print(f"\n{self.notice}", file=sys.stderr, flush=True)
        return self.tokenizer.ids(content.decode())

    def is_due(self):
        """Whether it is time for a new copy."""
        if self.bytes_read < self.next_look:
            return False
        self.next_look = self.bytes_read + LOOK_EVERY
        return self.bytes_read >= RENEW_AFTER or resident_memory() - self.memory >= RENEW_AT_GROWTH


def resident_memory():
    """Bytes of this process."""
    return psutil.Process().memory_info().rss


# -- gigatoken -----------------------------------------------------------------------------------


class Gigatoken:
    """gigatoken's form of a tokenizer. `renew` makes the first copy, and later a new one. All methods raise Unsuitable
    where gigatoken fails."""

    def __init__(self, tokenizer):
        try:
            import gigatoken
        except Exception as error:  # missing, or built for another processor
            raise Unsuitable(f"it cannot be imported ({describe(error)})") from None
        self.library = gigatoken.Tokenizer
        self.reference = tokenizer
        self.normalize = None
        self.has_added_tokens = False  # with a normalizer
        if isinstance(tokenizer, HuggingFaceTokenizer):
            content = self.without_special_tokens(tokenizer.backend)
            self.make = lambda: self.library.from_json(content)
        else:
            scheme = SCHEMES.get(tokenizer.name) or SCHEMES_OF_PATTERNS.get(tokenizer._pat_str)
            if scheme is None:
                raise Unsuitable(f"it does not know the pattern of {tokenizer.name}")
            self.make = functools.partial(self.from_ranks, tokenizer._mergeable_ranks, scheme)

    def without_special_tokens(self, backend):
        """A tokenizer.json in which the names of special tokens are text. backend: a tokenizers.Tokenizer."""
        if self.reference.n_vocab > MOST_IDS:
            raise Unsuitable(f"it would need memory for {self.reference.n_vocab:,} ids")
        content = json.loads(backend.to_str())
        model = content["model"]
        normalizer = content["normalizer"]
        is_plain = normalizer in (None, {"type": "Sequence", "normalizers": []})
        if model["type"] != "BPE" or model.get("byte_fallback") or not (is_plain or normalizer == {"type": "NFC"}):
            raise Unsuitable("it is used for byte-level BPEs alone")
        # others, as <tool_call>, are tokens wherever they stand in a text
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        if not is_plain:
            # not its own, whose version of Unicode is another than that of `tokenizers`
            content["normalizer"] = None
            self.normalize = backend.normalizer.normalize_str
            self.has_added_tokens = bool(content["added_tokens"])
            if not all(token["content"].isascii() for token in content["added_tokens"]):
                raise Unsuitable("it is not used where a normalizer and tokens that it may change come together")
        return json.dumps(content)

    def from_ranks(self, ranks, scheme):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "ranks.tiktoken"
            write_ranks(file, ranks)
            return self.library.from_tiktoken(file, pretokenizer=scheme, special_tokens={})

    def renew(self):
        self.encode = None  # first, so that the memory of the old copy is free
        with faults_are_unsuitable(f"it cannot read {self.reference.name}"):
            self.encode = self.make().encode

    def ids(self, content):
        """Text in UTF-8 -> its ids, (n,) uint32."""
        if not content.isascii():
            if has_unknown_characters(content):
                return self.reference.ids(content.decode())
            if self.normalize is not None:
                text = content.decode()
                if not unicodedata.is_normalized("NFC", text):
                    if self.has_added_tokens:  # which are found before a text is normalized
                        return self.reference.ids(text)
                    content = self.normalize(text).encode()
        with faults_are_unsuitable("it fails on a text"):
            return self.encode(content)


@contextlib.contextmanager
def faults_are_unsuitable(words):
    """Turn whatever gigatoken raises in this block into Unsuitable."""
    try:
        with panics_as_exceptions():
            yield
    except Exception as error:
        raise Unsuitable(f"{words} ({describe(error)[:200]})") from None


def has_unknown_characters(content):
    """Whether a text in UTF-8 has characters that Python's version of Unicode does not know. Libraries with newer
    versions may know them or not, and take them for letters or not."""
    content = np.frombuffer(content, dtype=np.uint8)
    first = np.flatnonzero(content >= FIRST_BYTE_OF_UNKNOWN)
    if not len(first):
        return False
    # the bytes of each character, the first of which says how many there are
    parts = [content[np.minimum(first + place, len(content) - 1)].astype(np.uint32) for place in range(4)]
    low = [part & 0x3F for part in parts]
    two = (parts[0] & 0x1F) << 6 | low[1]
    three = (parts[0] & 0x0F) << 12 | low[1] << 6 | low[2]
    four = (parts[0] & 0x07) << 18 | low[1] << 12 | low[2] << 6 | low[3]
    codes = np.where(parts[0] < 0xE0, two, np.where(parts[0] < 0xF0, three, four))
    return bool(unassigned()[codes].any())


@functools.cache
def unassigned():
    """For each code point, whether Python's version of Unicode assigns no character to it."""
    return np.array([unicodedata.category(chr(code)) == "Cn" for code in range(sys.maxunicode + 1)])


# -- the comparison ------------------------------------------------------------------------------


PARTS = (  # what patterns treat in ways of their own
    [
        *" \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\ufeff\u200b\u200d",
        "  ",
        "    ",
        "\r\n",
        "\n\n",
    ],
    ["'s", "'S", "'ll", "'LL", "'Re", "\u2019s", "'d", "'t", "'ve", "'m", "''", "'\u017f", "don't", "I'M"],
    [*"0129", "12345", "3.14", "1,000,000", "\u0663", "\u00bd", "\u2167", "\u4e09", "\U0001d7d8", "0x1F"],
    [
        *"aZ_",
        "the",
        "The",
        "THE",
        "iPhone",
        "camelCase",
        "snake_case",
        "\u00df",
        "\u0130",
        "\u01c5",
        "\u02b0",
        "e\u0301",
    ],
    [*'!"#$%&()*+,-./:;<=>?@[\\]^`{|}~', "...", "--", "://", "();\n", "\u2026", "\u2014", "\u00ab", "\u20ac", "/*"],
    [
        "\u0416\u0443\u043a",
        "\u6771\u4eac",
        "\u05e9\u05dc",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\u0e44\u0e17\u0e22",
    ],
    ["\U0001f600", "\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001d400", "\U000e0041"],
    [
        "\0",
        "\x01",
        "\x7f",
        "\u0300",
        "\u093f",
        "\u20dd",
        "\ufffd",
        "\ue000",
        "\U0010ffff",
        "\u1aeb",
        "\u0378",
        "\uac01",
    ],
    ["<|endoftext|>", "<|im_start|>", "<s>", "</s>", "<0x0A>", "\u2581", "\u0120", "\u010a", "[INST]", "<unk>"],
)


@functools.cache
def awkward_strings(added_tokens=(), count=1000):
    """Strings, the same ones on every call, in which patterns of tokenizers differ: blanks, contractions, numbers,
    scripts, marks, and names of special tokens, each next to each. added_tokens: further parts."""
    choose = random.Random(0)
    parts = [*PARTS, list(added_tokens)] if added_tokens else PARTS
    strings = []
    for number in range(count):
        length = choose.randrange(1, 24)
        pieces = [choose.choice(choose.choice(parts)) for _ in range(length)]
        if number % 4 == 0:
            pieces.append(chr(choose.choice([choose.randrange(0xD800), choose.randrange(0xE000, 0x110000)])))
        if number % 10 == 0:
            pieces += [choose.choice(pieces) * choose.randrange(2, 40)]
        strings.append("".join(pieces))
    return strings
