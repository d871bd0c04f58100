"""Tokenizers, all through tiktoken: its own by name (gpt2, o200k_base, ...), `bytes`, or a folder that
holds one trained here (tokenizer.tiktoken in tiktoken's file format, tokenizer.json beside it).
"""

import base64
import hashlib
import json
import re
from pathlib import Path

import tiktoken

from config import UserError, did_you_mean, read_json
from data.shards import write_atomically, write_json

END_OF_TEXT = "<|endoftext|>"

# How text is cut into pieces that no token crosses: letters with one space or mark before them, up to
# three digits, marks with the line end and indentation after them, line ends with theirs. On source
# code this takes 6% fewer tokens than GPT-2's pattern with 4,096 ids (NOTES.md has the figures).
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)|[^\s\p{L}\p{N}]?\p{L}+| ?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
)


def load_tokenizer(name):
    """A tiktoken encoding by tiktoken's name, `bytes`, or a folder written by `save_tokenizer`.

    Raises UserError if there is no such tokenizer or its files are broken."""
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]", mergeable_ranks=byte_ranks(), special_tokens={END_OF_TEXT: 256}
        )
    folder = Path(name)
    if (folder / "tokenizer.tiktoken").exists():
        return load_trained(folder)
    if name not in tiktoken.list_encoding_names():
        raise UserError(
            f"tokenizer: {name!r} is neither 'bytes', nor a folder with tokenizer.tiktoken, nor one of tiktoken's; "
            f"{did_you_mean(str(name), tiktoken.list_encoding_names())}"
        )
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors too
        raise UserError(
            f"tokenizer: {name} could not be downloaded ({type(error).__name__}); on a machine without a network "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from None


def byte_ranks():
    return {bytes([value]): value for value in range(256)}


def load_trained(folder):
    settings = read_json(folder / "tokenizer_settings.json")
    try:
        ranks = {}
        for line in (folder / "tokenizer.tiktoken").read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        return tiktoken.Encoding(
            folder.name, pat_str=settings["pattern"], mergeable_ranks=ranks, special_tokens=settings["special_tokens"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: broken tokenizer ({error}); train or copy it again") from None


def fingerprint(encoding):
    """A hash of everything that decides how text is encoded."""
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(token + b" %d\n" % rank)
    digest.update(json.dumps(sorted(encoding._special_tokens.items())).encode())
    return digest.hexdigest()[:16]


def faster(encoding):
    r"""The same encoding, some 1.7 times as fast: the same pieces of text from a pattern that tiktoken's
    regular expressions take better.

    All of tiktoken's patterns and ours end in a look-ahead, `\s+(?!\S)`, for which the library walks through
    the whole pattern step by step. What stands before it needs no such walk once it is a group without
    possessive quantifiers (`++`), which goes through the library's automaton. Greedy ones match the same
    here: what follows each cannot match a character that it would have to give back."""
    head, look_ahead, tail = encoding._pat_str.partition(r"|\s+(?!\S)")
    if not look_ahead:
        return encoding
    head = re.sub(r"([+*?]|\{\d+,\d+\})\+", r"\1", head)
    return tiktoken.Encoding(
        encoding.name,
        pat_str=f"(?:{head}){look_ahead}{tail}",
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=encoding._special_tokens,
    )


def train_tokenizer(texts, vocab_size, special_tokens=(END_OF_TEXT,)):
    """Learn a byte-level BPE of `vocab_size` ids, the special tokens last. Returns (ranks, special).

    texts: an iterator of strings. Raises UserError if the text is too small for that many ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    wanted = vocab_size - len(special_tokens)
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    from_unicode = {char: value for value, char in enumerate(byte_level_alphabet())}
    ranks = byte_ranks()
    for left, right in merges:
        ranks.setdefault(bytes(from_unicode[char] for char in left + right), len(ranks))
    if len(ranks) != wanted:
        raise UserError(f"tokenizer: the text gives only {len(ranks)} of {wanted} tokens; give more text or fewer ids")
    return ranks, {token: wanted + i for i, token in enumerate(special_tokens)}


def byte_level_alphabet():
    """GPT-2's printable stand-in for each of the 256 bytes, which `tokenizers` uses as well: a byte
    that prints stands for itself, the others for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    stand_in = {value: chr(value) for value in printable} | {v: chr(256 + i) for i, v in enumerate(others)}
    return [stand_in[value] for value in range(256)]


def save_tokenizer(folder, ranks, special_tokens, pattern=PATTERN):
    """Write a trained tokenizer into `folder`: in tiktoken's format, for `load_tokenizer`, and as
    tokenizer.json, for transformers. tokenizer.tiktoken comes last: a folder with it is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer_settings.json", {"pattern": pattern, "special_tokens": special_tokens})
    save_for_transformers(folder, ranks, special_tokens, pattern)
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    write_atomically(folder / "tokenizer.tiktoken", b"".join(lines))


def save_for_transformers(folder, ranks, special_tokens, pattern, **settings):
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, with which AutoTokenizer of
    transformers 4 and 5 gives the ids of the tiktoken encoding that these make. settings: more keys of
    tokenizer_config.json.

    The end of text is all four special tokens, as GPT-2 has it for three: there is no other id to pad with. Batches
    are padded on the left, so that `generate` continues the text."""
    write_atomically(folder / "tokenizer.json", huggingface_json(ranks, special_tokens, pattern).encode())
    names = ("bos_token", "eos_token", "unk_token", "pad_token") if END_OF_TEXT in special_tokens else ()
    special = dict.fromkeys(names, END_OF_TEXT)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a class of both versions
        "model_input_names": ["input_ids", "attention_mask"],  # else transformers 4 adds token_type_ids
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): {"content": token} | flags for token, index in special_tokens.items()},
    }
    write_json(folder / "tokenizer_config.json", config | special | settings)
    write_json(folder / "special_tokens_map.json", special)


def byte_level_names(ranks):
    """{token: how `tokenizers` writes its bytes}."""
    alphabet = byte_level_alphabet()
    return {token: "".join(alphabet[byte] for byte in token) for token in ranks}


def huggingface_json(ranks, special_tokens, pattern):
    """The same tokenizer in the form of the `tokenizers` library.

    tiktoken joins any two neighbours that make a known token, the lowest rank first; `tokenizers` joins
    only listed pairs, in the order of the list. So every way to split every token into two known ones is
    listed, by rank: with the one pair per token that training found, most random strings differ."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    name = byte_level_names(ranks)
    merges = [
        (name[token[:cut]], name[token[cut:]])
        for token in sorted(ranks, key=ranks.get)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    # the special tokens too: those that are only added get the next free ids, and tiktoken's have gaps before them
    vocabulary = {name[token]: rank for token, rank in ranks.items()} | special_tokens
    # tiktoken's `\p{N}{1,3}+` gives nothing back; in the regular expressions of `tokenizers` it repeats the group
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer.to_str(pretty=True)


def own_tokenizer(folder, make, vocab_size=None):
    """The folder of a data set's own tokenizer: the one that is there, or what make() -> (ranks, special
    tokens, ...) gives. Raises UserError if the one that is there has not `vocab_size` ids."""
    if not (Path(folder) / "tokenizer.tiktoken").exists():
        save_tokenizer(folder, *make())
    found = load_tokenizer(str(folder)).n_vocab
    if vocab_size not in (None, found):
        raise UserError(
            f"{folder}: found a tokenizer of {found} ids, expected --vocab_size {vocab_size}; "
            "choose another --out, or remove that folder and the shards made with it"
        )
    return folder


def characters(text):
    """A tokenizer of the characters that occur in `text`, in their order, as `save_tokenizer` takes it."""
    ranks = {character.encode(): rank for rank, character in enumerate(sorted(set(text)))}
    return ranks, {END_OF_TEXT: len(ranks)}, r"[\s\S]"


def missing_characters(encoding, text):
    """The characters of `text` that `encoding` has no token for: none for all that know the 256 bytes,
    but a tokenizer of characters knows only its own."""
    if all(byte in encoding._mergeable_ranks for byte in byte_ranks()):
        return []
    return sorted(char for char in set(text) if char.encode(errors="replace") not in encoding._mergeable_ranks)
