"""Much text to ids: by gigatoken, some twenty times as fast as tiktoken, where it gives the same ids.

gigatoken (https://pypi.org/project/gigatoken) is young, and knows some patterns of byte-level BPEs only. So the
tokenizer itself, tiktoken or the `tokenizers` library, stays the reference: gigatoken is used after both gave the same
ids of a thousand awkward strings, which are compared again with every new copy of it. A new copy is made now and then,
because its cache grows with every word that it has not met. If a comparison fails, one line says so and the rest is
left to the reference.
"""

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
from minzero.data.tokenizer_files import GPT2_PATTERNS, PATTERN, write_ranks
from minzero.errors import describe

RENEW_AFTER = 256 << 20  # bytes of text
RENEW_AT_GROWTH = 256 << 20  # bytes of memory of this process, but not before
RENEW_NOT_BEFORE = 8 << 20  # bytes of text
LOOK_EVERY = 1 << 20  # bytes of text between two looks at the memory, which take some 10 us

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
            self.renew()

    def renew(self):
        """Take a new copy of gigatoken, whose cache is empty, if it stands the comparison."""
        self.quick = None  # first, so that the old copy's memory is free
        try:
            quick = Gigatoken(self.tokenizer)
            compare(self.tokenizer, quick)
        except Unsuitable as reason:
            self.notice = f"tokenizing without gigatoken, which is some twenty times as fast: {reason}"
            return
        self.quick = quick
        self.bytes_read = 0  # since this copy was made
        self.next_look = RENEW_NOT_BEFORE
        self.memory = resident_memory()

    def encode(self, content):
        """Text in UTF-8 -> its ids, (n,) uint32."""
        if self.quick is None:
            return self.tokenizer.ids(content.decode())
        ids = self.quick.ids(content)
        self.bytes_read += len(content)
        if self.is_due():
            self.renew()
            if self.notice:
                print(f"\n{self.notice}", file=sys.stderr, flush=True)
        return ids

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
    """gigatoken's copy of a tokenizer. Raises Unsuitable if there is none."""

    def __init__(self, tokenizer):
        try:
            import gigatoken
        except Exception as error:  # missing, or built for another processor
            raise Unsuitable(f"it cannot be imported ({describe(error)})") from None
        self.normalize = None
        self.added = ()
        try:
            if isinstance(tokenizer, HuggingFaceTokenizer):
                self.open_huggingface(gigatoken, tokenizer.backend)
            else:
                self.open_tiktoken(gigatoken, tokenizer)
        except Unsuitable:
            raise
        except BaseException as error:  # a panic of its is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Unsuitable(f"it cannot read {tokenizer.name} ({describe(error)[:200]})") from None
        self.reference = tokenizer

    def open_tiktoken(self, gigatoken, tokenizer):
        scheme = SCHEMES.get(tokenizer.name) or SCHEMES_OF_PATTERNS.get(tokenizer._pat_str)
        if scheme is None:
            raise Unsuitable(f"it does not know the pattern of {tokenizer.name}")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "ranks.tiktoken"
            write_ranks(file, tokenizer._mergeable_ranks)
            # no special tokens: their names in a text are text
            self.encode = gigatoken.Tokenizer.from_tiktoken(file, pretokenizer=scheme, special_tokens={}).encode

    def open_huggingface(self, gigatoken, backend):
        content = json.loads(backend.to_str())
        if (
            content["model"]["type"] != "BPE"
            or content["model"].get("byte_fallback")
            or content["normalizer"]
            not in (
                None,
                {"type": "NFC"},
            )
        ):
            raise Unsuitable("it is used for byte-level BPEs alone")
        # as encode_special_tokens: special ones are text; others, as <tool_call>, are tokens wherever they stand
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        if content["normalizer"]:
            # not its own, whose version of Unicode is another than that of `tokenizers`
            content["normalizer"] = None
            self.normalize = backend.normalizer.normalize_str
            self.added = [token["content"] for token in content["added_tokens"]]
        self.encode = gigatoken.Tokenizer.from_json(json.dumps(content)).encode

    def ids(self, content):
        """Text in UTF-8 -> its ids, (n,) uint32."""
        if self.normalize is None:
            return self.encode(content)
        text = content.decode()
        if any(token in text for token in self.added):  # these are found before the text is normalized
            return self.reference.ids(text)
        if not is_in_nfc(text):
            content = self.normalize(text).encode()
        return self.encode(content)


def is_in_nfc(text):
    """Whether Unicode's normal form C of a text is the text, in every version of Unicode: false, too, if it holds
    characters that Python's version does not know."""
    if text.isascii():
        return True
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return unicodedata.is_normalized("NFC", text) and not unassigned()[codes].any()


@functools.cache
def unassigned():
    """For each code point, whether Python's version of Unicode assigns no character to it."""
    return np.array([unicodedata.category(chr(code)) == "Cn" for code in range(sys.maxunicode + 1)])


# -- the comparison ------------------------------------------------------------------------------


def compare(tokenizer, quick):
    """Raise Unsuitable if `quick` gives other ids than the tokenizer for one of `awkward_strings`."""
    for text in awkward_strings(tuple(tokenizer.added_tokens)):
        expected = tokenizer.ids(text)
        try:
            found = quick.ids(text.encode())
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Unsuitable(f"it fails on {text[:40]!a} ({describe(error)[:200]})") from None
        if not np.array_equal(found, expected):
            raise Unsuitable(f"it gives other ids for {text[:40]!a}")


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
            pieces += chr(choose.choice([choose.randrange(0xD800), choose.randrange(0xE000, 0x110000)]))
        if number % 10 == 0:
            pieces += [choose.choice(pieces) * choose.randrange(2, 40)]
        strings.append("".join(pieces))
    return strings
