"""Tokenizers, all through tiktoken: its own by name (gpt2, o200k_base, ...), `bytes`, or the folder of one trained
here (tokenizer.tiktoken in tiktoken's file format, with tokenizer.json beside it).
"""

import base64
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import tiktoken

from minzero.config.values import did_you_mean
from minzero.data.meta import read_object
from minzero.errors import UserError
from minzero.files import check_can_write, is_regular, make_folder, write_atomically, write_json

END_OF_TEXT = "<|endoftext|>"
LONGEST_RUN = 100_000  # characters, all blank or all not, that the tokenizer is given at once
LONGEST_LEARNED = 10_000  # the same for its training, whose time grows with the square of the length

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


def load_tokenizer(name):
    """A tiktoken encoding by tiktoken's name, `bytes`, or a folder written by `save_tokenizer`.

    Raises UserError if there is no such tokenizer or its files are broken."""
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]", mergeable_ranks=byte_ranks(), special_tokens={END_OF_TEXT: 256}
        )
    if os.path.lexists(os.path.join(name, "tokenizer.tiktoken")):
        return load_trained(Path(name))
    if name not in tiktoken.list_encoding_names():
        raise UserError(
            f"tokenizer: {name!r} is neither 'bytes', nor a folder with tokenizer.tiktoken, nor one of tiktoken's; "
            f"{did_you_mean(str(name), tiktoken.list_encoding_names())}"
        )
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # also all errors of requests
        raise UserError(
            f"tokenizer: {name} could not be downloaded ({type(error).__name__}); on a machine without a network "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from None
    except ValueError as error:  # a damaged file in its cache
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer: {name} could not be read ({reason}); remove it from TIKTOKEN_CACHE_DIR") from None


SAMPLE = "".join(map(chr, [9, 10, 13, *range(32, 127)])) + "  \n\n \t x 12345 caf\u00e9 \u6771\u4eac \U0001f600."


def byte_ranks():
    """{byte: rank} of the 256 bytes."""
    return {bytes([value]): value for value in range(256)}


def load_trained(folder):
    """A tokenizer that `save_tokenizer` wrote, as a tiktoken encoding. Raises UserError that names the faulty file and
    line."""
    file = folder / "tokenizer.tiktoken"
    settings_file = folder / "tokenizer_settings.json"
    if not is_regular(file):
        raise UserError(f"{file}: not a regular file; train or copy the tokenizer again")
    ranks = read_ranks(file)
    settings = read_object(settings_file, "train or copy the tokenizer again")
    pattern = settings.get("pattern")
    special = settings.get("special_tokens")
    if not isinstance(pattern, str) or not isinstance(special, dict):
        raise UserError(
            f"{settings_file}: broken tokenizer: expected an object with a pattern (a string) and special_tokens (an "
            "object); train or copy the tokenizer again"
        )
    check_ranks(file, ranks, settings_file, special)
    try:
        encoding = tiktoken.Encoding(folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        known = set(SAMPLE).difference(missing_characters(encoding, SAMPLE))
        sample = "".join(character for character in SAMPLE if character in known)
        kept = encoding.decode(encoding.encode_ordinary(sample))
    except BaseException as error:  # tiktoken's panics are not Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: broken tokenizer ({reason}); train or copy it again") from None
    if kept != sample:
        raise UserError(
            f"{settings_file}: broken tokenizer: its pattern loses text ({len(kept)} of {len(sample)} characters are "
            "left of a sample); train or copy the tokenizer again"
        )
    return encoding


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


def without_surrogates(text):
    """The text with U+FFFD in place of half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_long_runs(text, longest=LONGEST_RUN):
    """Yield `text` in parts that tiktoken's regular expressions can handle; joined, they are the text.

    Mostly there is one part. A run of more than `longest` blanks, or of more than `longest` other characters, is cut
    after every `longest` characters. Each part is tokenized by itself, so ids can differ from those of the whole only
    at these cuts."""
    half = longest // 2
    start = 0
    # a run of `longest` contains a whole block of half its length; a mixed block mostly shows in its first characters
    blocks = (text[place : place + half] for place in range(0, len(text) - half, half))
    if len(text) > longest and any(block.isspace() or not BLANK.search(block) for block in blocks):
        for run in re.finditer(r"\s+|\S+", text):
            for end in range(run.start() + longest, run.end(), longest):
                yield text[start:end]
                start = end
    yield text[start:]


BLANK = re.compile(r"\s")


def fingerprint(encoding):
    """A hash of everything that decides how text is encoded."""
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(token + b" %d\n" % rank)
    digest.update(json.dumps(sorted(encoding._special_tokens.items())).encode())
    return digest.hexdigest()[:16]


def faster(encoding):
    r"""The same encoding, about 1.7 times as fast: the same pieces of text from a pattern that suits the regular
    expression library of tiktoken.

    All of tiktoken's patterns and ours end in a look-ahead, `\s+(?!\S)`, which makes the library match the whole
    pattern by backtracking. The part before it is matched by the library's automaton instead, if it is a group without
    possessive quantifiers (`++`). Greedy quantifiers match the same here: the expression after each of them cannot
    match a character that it would have to give back."""
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


def byte_level_alphabet():
    """The printable character for each of the 256 bytes, as GPT-2 and `tokenizers` write them: a printable byte is its
    own character, the others are the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    characters = {value: chr(value) for value in printable}
    characters |= {value: chr(256 + number) for number, value in enumerate(others)}
    return [characters[value] for value in range(256)]


def save_tokenizer(folder, ranks, special_tokens, pattern=PATTERN):
    """Write a trained tokenizer into `folder`: in tiktoken's format, for `load_tokenizer`, and as tokenizer.json, for
    transformers. tokenizer.tiktoken is written last: a folder that has it is complete. Raises UserError."""
    folder = Path(folder)
    make_folder("--out", folder)
    write_json(folder / "tokenizer_settings.json", {"pattern": pattern, "special_tokens": special_tokens})
    save_for_transformers(folder, ranks, special_tokens, pattern)
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    write_atomically(folder / "tokenizer.tiktoken", b"".join(lines))


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
        return Tokenizer.from_buffer(path.read_bytes())
    except BaseException as error:  # the library has no class for it, and its panics are not Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: broken tokenizer ({reason}); {remedy}") from None


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


def missing_characters(encoding, text):
    """The characters of `text` that `encoding` has no token for. Encodings with all 256 bytes miss none; a tokenizer of
    characters has only its own."""
    if all(byte in encoding._mergeable_ranks for byte in byte_ranks()):
        return []
    return sorted(char for char in set(text) if char.encode(errors="replace") not in encoding._mergeable_ranks)
