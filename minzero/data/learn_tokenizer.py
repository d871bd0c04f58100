"""Tokenizers of a data set's own: a byte-level BPE that is learned from its text, or its characters."""

import itertools
import json
import os

from minzero.data.text import cut_long_runs, without_surrogates
from minzero.data.tokenizer import load_tokenizer
from minzero.data.tokenizer_files import (
    END_OF_TEXT,
    PATTERN,
    byte_level_alphabet,
    byte_level_names,
    byte_ranks,
    pre_tokenizer,
    save_tokenizer,
)
from minzero.errors import UserError
from minzero.files import check_can_write

LONGEST_LEARNED = 10_000  # characters without a blank, or all blank: the time of learning grows with the square


def checked_special_tokens(given, vocab_size):
    """The special tokens of a tokenizer to be learned: those given, and END_OF_TEXT, which the shards need.

    Raises UserError for a name that is too short, not printable or given twice, and if `vocab_size` has no room for
    them and the 256 bytes."""
    for token in given:
        if len(token) < 2 or not token.isprintable() or given.count(token) > 1:
            raise UserError(
                f"--special_tokens: found {token!a}, expected names of two characters or more, each once, as <|user|>"
            )
    special = list(dict.fromkeys([*given, END_OF_TEXT]))
    least = 256 + len(special)
    if vocab_size < least:
        raise UserError(f"--vocab_size: found {vocab_size}, expected at least {least}: bytes and special tokens")
    return special


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
    return ranks, {END_OF_TEXT: len(ranks)}, r"[\s\S]"
