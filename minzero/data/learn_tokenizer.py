"""Tokenizers of a data set's own: a byte-level BPE that is learned from its text, or its characters; and how it
compares with published ones on text that it was not learned from."""

import itertools
import json
import os
from pathlib import Path

from minzero.data.documents import BadDocument, printable
from minzero.data.encode import encode_text, use_encoder
from minzero.data.fast_encoding import BulkEncoder
from minzero.data.pipeline import split_of
from minzero.data.text import cut_long_runs, to_utf8, without_surrogates
from minzero.data.tokenizer import load_tokenizer
from minzero.data.tokenizer_files import (
    A_CHARACTER,
    END_OF_TEXT,
    PATTERN,
    byte_level_alphabet,
    byte_level_names,
    byte_ranks,
    pre_tokenizer,
    save_tokenizer,
)
from minzero.errors import UserError
from minzero.files import check_can_write, write_json

LONGEST_LEARNED = 10_000  # characters without a blank, or all blank: the time of learning grows with the square
HELD_OUT_SHARE = 0.05  # of the bytes of text
HELD_OUT_BYTES = 20_000_000  # at most
HELD_OUT_DOCUMENT = HELD_OUT_BYTES // 4  # the largest that is held out as a whole
COMPARED = ("gpt2", "o200k_base")  # by every report
REPORT = "tokenizer_report.json"  # beside the tokenizer


def checked_special_tokens(given, vocab_size):
    """The special tokens of a tokenizer to be learned: those given, and END_OF_TEXT, which the shards need.

    Raises UserError for a name that is too short, not printable or given twice, or that tiktoken and `tokenizers` would
    not find at the same places, and if `vocab_size` has no room for them and the 256 bytes."""
    special = list(dict.fromkeys([*given, END_OF_TEXT]))
    for token in special:
        if len(token) < 2 or not token.isprintable() or given.count(token) > 1:
            raise UserError(
                f"--special_tokens: found {token!a}, expected names of two characters or more, each once, as <|user|>"
            )
        if fault := ambiguity(token, special):
            raise UserError(f"--special_tokens: found {token!a}, {fault}; choose another name, as <|user|>")
    least = 256 + len(special)
    if vocab_size < least:
        raise UserError(f"--vocab_size: found {vocab_size}, expected at least {least}: bytes and special tokens")
    return special


def ambiguity(token, special):
    """The reason why programs would disagree on where a text holds this special token, or None. special: all."""
    # tiktoken takes the first in a regular expression of no fixed order, `tokenizers` the longest
    if longer := [other for other in special if other != token and other.startswith(token)]:
        return f"with which {longer[0]!a} begins, so that a text could hold either"
    # in tokenizer.json each of these characters stands for a byte, also where a special token is decoded
    if not token.isascii() and set(token) <= set(byte_level_alphabet()):
        return "expected ASCII, or a character beyond U+0143: transformers would decode it to other text"
    # `tokenizers` looks each piece up in the vocabulary, which has the special tokens as well
    if [piece for piece, _ in pre_tokenizer(PATTERN).pre_tokenize_str(token)] == [token]:
        return "which is one piece of ordinary text, so that this text would become the special token"
    return None


def train_tokenizer(texts, vocab_size, special_tokens=(END_OF_TEXT,), pattern=PATTERN):
    """Learn a byte-level BPE of `vocab_size` ids, the special tokens last: ({bytes: rank}, {special token: id}).

    texts: an iterable of strings. Raises UserError if the text is too small for that many ids, or a special token was
    also learned as a token of the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer(pattern)
    wanted = vocab_size - len(special_tokens)
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    texts = (text if text.isascii() else without_surrogates(text) for text in texts)
    parts = itertools.chain.from_iterable(cut_long_runs(text, LONGEST_LEARNED) for text in texts)
    learner.train_from_iterator(parts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    from_unicode = {char: value for value, char in enumerate(byte_level_alphabet())}
    ranks = byte_ranks()
    for left, right in merges:
        ranks.setdefault(bytes(from_unicode[char] for char in left + right), len(ranks))
    if len(ranks) != wanted:
        raise UserError(f"tokenizer: the text gives only {len(ranks)} of {wanted} tokens; give more text or fewer ids")
    names = set(byte_level_names(ranks).values())  # tokenizers keeps both kinds in one table
    if learned := [token for token in special_tokens if token in names or token.encode() in ranks]:
        raise UserError(f"tokenizer: special token {learned[0]!r} was learned as a token of the text; choose others")
    return ranks, {token: wanted + i for i, token in enumerate(special_tokens)}


# -- compared with others ------------------------------------------------------------------------


class HeldOut:
    """An iterable of the texts to learn from: those of `source` but a few, which are kept to measure the tokenizer on.

    A hash of the text decides, so that copies of a text are on the same side. It keeps about HELD_OUT_SHARE of the
    texts, or less where that is more than HELD_OUT_BYTES. Of few texts it may keep far too much or too little: then the
    largest are given back, and the end of the largest one is kept.

    After an iteration: `texts`, those kept; `size`, their bytes; `total`, the bytes of all texts."""

    def __init__(self, source):
        self.source = source
        self.share = HELD_OUT_SHARE
        self.texts = []
        self.size = 0
        self.total = 0
        self.largest = ""  # of the texts that are not kept; it is learned from last, because it may be cut

    def __iter__(self):
        for text in self.source:
            size = len(to_utf8(text))
            self.total += size
            if not 0 < size <= HELD_OUT_DOCUMENT or split_of(text, self.share) == "train":
                yield self.smaller(text)
                continue
            self.texts.append(text)
            self.size += size
            while self.size > HELD_OUT_BYTES:
                yield from map(self.smaller, self.halve())
        yield from self.put_right()

    def smaller(self, text):
        """The smaller of `text` and `self.largest`, which becomes the larger."""
        smaller, self.largest = sorted((text, self.largest), key=len)
        return smaller

    def halve(self):
        """Keep about half of the texts. Returns the others."""
        self.share /= 2
        kept = {"train": [], "val": []}
        for text in self.texts:
            kept[split_of(text, self.share)].append(text)
        self.texts = kept["val"]
        self.size = sum(len(to_utf8(text)) for text in self.texts)
        return kept["train"]

    def put_right(self):
        """See the class, on few texts. Yields the rest of the texts to learn from."""
        wanted = min(HELD_OUT_SHARE * self.total, HELD_OUT_BYTES)
        self.texts.sort(key=len)
        while self.size > 2 * wanted:
            self.size -= len(to_utf8(self.texts[-1]))
            yield self.smaller(self.texts.pop())
        size = len(to_utf8(self.largest))
        if size and self.size < wanted / 5:
            part = min(0.5, (wanted - self.size) / size)
            cut = int(len(self.largest) * (1 - part))
            end = self.largest[cut:]
            self.texts.append(end)
            self.size += len(to_utf8(end))
            self.largest = self.largest[:cut]
        yield self.largest


def load_compared(names):
    """[(name, tokenizer)] of the tokenizers that --compare names. Raises UserError."""
    try:
        return [(name, load_tokenizer(name)) for name in dict.fromkeys(names)]
    except UserError as error:
        raise UserError(f"--compare: {str(error).removeprefix('tokenizer: ')}") from None


def report(folder, held_out, others):
    """Print a table of bytes per token on held-out text, of the new tokenizer in `folder`, of COMPARED and of `others`,
    and write it to REPORT. others: as of `load_compared`.

    The tokenizer is there already, so a fault is a line and no error."""
    if not held_out.size:
        print("not compared with others: no text could be held out")
        return
    new = load_tokenizer(folder)
    loaded = dict(others) | {"this one": new}
    rows = []
    for name in dict.fromkeys(["this one", *COMPARED, *loaded]):
        try:
            tokenizer = loaded.get(name) or load_tokenizer(name)
            found = bytes_per_token(tokenizer, held_out.texts)
        except BadDocument as error:
            print(f"not compared: {printable(name)}: the held-out text {error.reason}")
        except UserError as error:
            print(f"not compared: {str(error).removeprefix('tokenizer: ')}")
        else:
            rows.append({"name": name, "ids": tokenizer.n_vocab, "bytes_per_token": found})
    text = {"bytes": held_out.size, "share": held_out.size / held_out.total}
    print(f"on {text['bytes']:,} bytes of text ({text['share']:.2%} of all) that it was not learned from:")
    print_table(rows)
    try:
        fingerprint = new.fingerprint()
        write_json(Path(folder) / REPORT, {"fingerprint": fingerprint, "held_out_text": text, "tokenizers": rows})
    except UserError as error:
        print(f"the report was not kept: {error}")


def bytes_per_token(tokenizer, texts):
    """Bytes of UTF-8 for each token of these texts, without special tokens. Raises BadDocument for a text that it
    cannot encode."""
    use_encoder(BulkEncoder(tokenizer, use_gigatoken=False))
    size = tokens = 0
    for text in map(to_utf8, texts):
        size += len(text)
        tokens += sum(map(len, encode_text("held-out text", text)))
    return size / max(1, tokens)


def print_table(rows):
    """Print the rows of a report in columns."""
    names = [printable(row["name"]) for row in rows]
    width = max(map(len, [*names, "tokenizer"]))
    print(f"{'tokenizer':{width}}  {'ids':>9}  bytes per token")
    for name, row in zip(names, rows, strict=True):
        print(f"{name:{width}}  {row['ids']:>9,}  {row['bytes_per_token']:>15.3f}")


# -- of a data set alone -------------------------------------------------------------------------


def own_tokenizer(folder, make, vocab_size=None):
    """The folder of a data set's own tokenizer, made if it is not there. make: () -> arguments of `save_tokenizer`
    after the folder. Raises UserError if an existing one has another number of ids than `vocab_size`."""
    if not os.path.lexists(os.path.join(folder, "tokenizer.tiktoken")):
        check_can_write("--out", folder, folder=True)  # before the training
        save_tokenizer(folder, *make())
    found = load_tokenizer(str(folder)).n_vocab
    if vocab_size not in (None, found):
        raise UserError(
            f"{folder}: found a tokenizer of {found} ids, expected --vocab_size {vocab_size}; "
            "choose another --out, or remove that folder and the shards made with it"
        )
    return folder


def characters(text):
    """A tokenizer of the characters of `text`, in alphabetical order: the arguments of `save_tokenizer` after the
    folder."""
    ranks = {character.encode(): rank for rank, character in enumerate(sorted(set(text)))}
    return ranks, {END_OF_TEXT: len(ranks)}, A_CHARACTER
