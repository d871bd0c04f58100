"""The files of tokenizers: tiktoken's format, which those trained here have, and transformers' tokenizer.json."""

import base64
import json
import os
import re
from pathlib import Path

from minzero.errors import UserError, describe, panics_as_exceptions
from minzero.files import is_regular, make_folder, write_atomically, write_json

END_OF_TEXT = "<|endoftext|>"

# How text is cut into pieces that no token crosses: Llama 3's pattern, exactly as published, because llama.cpp,
# gigatoken and others recognise it, and support no custom pattern. benchmarks/patterns.py measures its cost. A trained
# tokenizer's folder holds the pattern it was trained with, so older ones do not change.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's pattern, as tiktoken writes it now and as it did earlier. Both cut the same pieces.
GPT2_PATTERNS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)

A_CHARACTER = r"[\s\S]"  # the pattern by which each character is a piece


# -- tiktoken's format ---------------------------------------------------------------------------


def byte_ranks():
    """{byte: rank} of the 256 bytes."""
    return {bytes([value]): value for value in range(256)}


def read_ranks(path):
    """Read a file in tiktoken's format, on each line a token in base64 and its rank: {bytes: rank}. Raises
    UserError."""
    ranks = {}
    taken = set()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; train or copy the tokenizer again") from None

    for number, line in enumerate(lines, 1):
        fault = None
        parts = line.split()
        if not parts:
            continue
        try:
            token = base64.b64decode(parts[0], validate=True)
            rank = int(parts[1])
            if len(parts) != 2 or not token or not parts[1].isdigit():
                raise ValueError
        except (ValueError, IndexError):
            fault = f"found {line[:80]!r}, expected a token in base64 and its rank, a number from 0 on"
        else:
            if token in ranks or rank in taken:
                fault = f"the token {token[:40]!r} or its rank {rank} is there twice"
            ranks[token] = rank
            taken.add(rank)
        if fault:
            raise UserError(f"{path}: line {number}: broken tokenizer: {fault}; train or copy it again")
    if not ranks:
        raise UserError(f"{path}: broken tokenizer: found no token; train or copy it again")
    return ranks


def check_ranks(file, ranks, settings_file, special):
    """Raise UserError if a special token's id is taken or no id, or the tokens' ranks have a gap. file, settings_file:
    where `ranks` and `special`, {token: rank}, are from."""
    taken = set(ranks.values())
    for token, rank in special.items():
        if not token or type(rank) is not int or not 0 <= rank < 2**31 or rank in taken:
            raise UserError(
                f"{settings_file}: broken tokenizer: found special token {json.dumps(token)[:80]} with id "
                f"{json.dumps(rank)[:80]}, expected an id that no other has; train or copy the tokenizer again"
            )
        taken.add(rank)
    missing = next(rank for rank in range(len(taken) + 1) if rank not in taken)
    if missing < max(ranks.values()):
        raise UserError(f"{file}: broken tokenizer: no token has rank {missing}; train or copy it again")


def save_tokenizer(folder, ranks, special_tokens, pattern=PATTERN):
    """Write a trained tokenizer into `folder`: in tiktoken's format, for `load_tokenizer`, and as tokenizer.json, for
    transformers. tokenizer.tiktoken is written last: a folder that has it is complete. Raises UserError."""
    folder = Path(folder)
    make_folder("--out", folder)
    write_json(folder / "tokenizer_settings.json", {"pattern": pattern, "special_tokens": special_tokens})
    save_for_transformers(folder, ranks, special_tokens, pattern)
    write_ranks(folder / "tokenizer.tiktoken", ranks)


def write_ranks(path, ranks):
    """Write {bytes: rank} in tiktoken's format. Raises UserError."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    write_atomically(path, b"".join(lines))


# -- transformers' format ------------------------------------------------------------------------


def byte_level_alphabet():
    """The printable character for each of the 256 bytes, as GPT-2 and `tokenizers` write them: a printable byte is its
    own character, the others are the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    characters = {value: chr(value) for value in printable}
    characters |= {value: chr(256 + number) for number, value in enumerate(others)}
    return [characters[value] for value in range(256)]


def byte_level_names(ranks):
    """{token as bytes: the same as `tokenizers` writes it, in printable characters}."""
    alphabet = byte_level_alphabet()
    return {token: "".join(alphabet[byte] for byte in token) for token in ranks}


def pre_tokenizer(pattern):
    """The pre-tokenizer of the `tokenizers` library for a tiktoken pattern. For GPT-2's it is the library's own, by
    which other programs recognise it."""
    from tokenizers import Regex, pre_tokenizers

    if pattern in GPT2_PATTERNS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # in tiktoken `\p{N}{1,3}+` is possessive; in the regular expressions of `tokenizers` it repeats the group
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def huggingface_json(ranks, special_tokens, pattern):
    """The content of tokenizer.json: the same tokenizer for the `tokenizers` library.

    tiktoken joins any two neighbours that make a known token, the lowest rank first; `tokenizers` joins only listed
    pairs, in the order of the list. So all ways to split each token into two known ones are listed, by rank. If only
    the one pair per token were listed that training found, most random strings would get other ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    name = byte_level_names(ranks)
    merges = [
        (name[token[:cut]], name[token[cut:]])
        for token in sorted(ranks, key=ranks.get)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    # with the special tokens: those only added later get the next free ids, but tiktoken leaves gaps before its own
    vocabulary = {name[token]: rank for token, rank in ranks.items()} | special_tokens
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer.to_str(pretty=True)


def save_for_transformers(folder, ranks, special_tokens, pattern, **settings):
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, from which AutoTokenizer of transformers
    4 and 5 makes a tokenizer with the same ids. settings: more keys of tokenizer_config.json.

    The end of text is used for all four special tokens, as GPT-2 uses it for three: there is no other id for padding.
    Batches are padded on the left, so that `generate` continues the text."""
    write_atomically(folder / "tokenizer.json", huggingface_json(ranks, special_tokens, pattern).encode())
    names = ("bos_token", "eos_token", "unk_token", "pad_token") if END_OF_TEXT in special_tokens else ()
    special = dict.fromkeys(names, END_OF_TEXT)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # exists in both versions
        "model_input_names": ["input_ids", "attention_mask"],  # else transformers 4 adds token_type_ids
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): {"content": token} | flags for token, index in special_tokens.items()},
    }
    write_json(folder / "tokenizer_config.json", config | special | settings)
    write_json(folder / "special_tokens_map.json", special)


def open_huggingface(path):
    """Load a tokenizer.json with the `tokenizers` library. Raises UserError if it is missing or damaged."""
    from tokenizers import Tokenizer

    path = Path(path)
    remedy = "export or copy it again"
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; {remedy}")
    if not is_regular(path):
        raise UserError(f"{path}: not a regular file; {remedy}")
    try:
        with panics_as_exceptions():
            return Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library has no class for it
        raise UserError(f"{path}: broken tokenizer ({describe(error)}); {remedy}") from None
