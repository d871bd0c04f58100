"""Tokenizers: tiktoken's by name (gpt2, o200k_base, ...), `bytes`, the folder of one trained here, and any of
transformers': a folder with tokenizer.json, or a name on the Hugging Face hub.

Every tokenizer has, whatever it is made of: `n_vocab` (ids are below it), `encode_ordinary(text)` and `decode(ids)` as
tiktoken's, in which the names of special tokens are text like any other, and

    ids(text)        the same ids as an array, (n,) uint32
    begin, end       ids before and after each document in the shards, and start_of_document, which is one of them
    end_of_text      the id that ends a document, None if there is none
    stops            ids after which a model stops: the end of text and, of a tokenizer for conversations, of a turn
    pad              the id for padding, None if there is none
    adds_space       whether a space is put before a text, so that the ids of a whole are not those of its parts
    added_tokens     tokens that are no special ones, and are found in a text before it is cut into pieces
    fingerprint()    a hash of everything that decides how text is encoded
    vocabulary()     {token as tokenizer.json writes it: id}, of tiktoken's without special tokens
    known_ids()      the set of ids that stand for a token
    token_bytes()    the bytes of text that each id stands for, a list; none for ids that are special or not used
    missing_characters(text)
    to_json()        the content of tokenizer.json, as text
    as_transformers(chat_template, replace), save(folder, **settings)
"""

import functools
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import tiktoken

from minzero.config.values import did_you_mean
from minzero.data.meta import read_object
from minzero.data.tokenizer_files import (
    A_CHARACTER,
    END_OF_TEXT,
    byte_level_alphabet,
    byte_level_names,
    byte_ranks,
    check_ranks,
    huggingface_json,
    open_huggingface,
    read_ranks,
    save_for_transformers,
)
from minzero.errors import UserError, describe, panics_as_exceptions
from minzero.files import from_hub, is_regular, read_json, refuse_pipes, write_json

SAMPLE = "".join(map(chr, [9, 10, 13, *range(32, 127)])) + "  \n\n \t x 12345 caf\u00e9 \u6771\u4eac \U0001f600."
# text in which classes of transformers differ; it is a part of fingerprints that are stored, so it stays as it is
FINGERPRINTED = (
    "I'm we'LL  12345 x1\n\n\tif a:\n    b = <s>'\u00e9'e\u0301 \u6771\u4eac\u00a0\u2026 \U0001f600\r\n<|endoftext|>"
)
# what transformers may need of a folder to build the tokenizer
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES += ("chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model")
# names in transformers 5 and 4 of the class that takes tokenizer.json as it is
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")  # of a byte, in a BPE with byte fallback
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Tokens that end a turn of a conversation, and the token that ended a document when the same models were pre-trained.
OF_PRETRAINING = {
    "<|im_end|>": "<|endoftext|>",  # Qwen, SmolLM
    "<|eot_id|>": "<|end_of_text|>",  # Llama 3
    "<|end|>": "<|endoftext|>",  # Phi
    "<end_of_turn>": "<eos>",  # Gemma
}
# Names of the end of a document, for a tokenizer.json without a tokenizer_config.json.
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|end\u2581of\u2581sentence|>")


class Tokenizer:
    """Base of TiktokenTokenizer and HuggingFaceTokenizer. folder: where its files are, or None; hub_name: its name on
    the hub, or None."""

    folder = None
    hub_name = None

    adds_space = False

    @property
    def start_of_document(self):
        """The id that stands before the first token of a document."""
        return [*self.end, *self.begin][-1]

    @property
    def stops(self):
        return () if self.end_of_text is None else (self.end_of_text,)

    @property
    def pad(self):
        return self.end_of_text


# -- tiktoken's ----------------------------------------------------------------------------------


class TiktokenTokenizer(Tokenizer, tiktoken.Encoding):
    """A tiktoken encoding. A document follows its end of text."""

    @classmethod
    def of(cls, encoding):
        """The same tokenizer as a tiktoken.Encoding."""
        return cls(
            encoding.name,
            pat_str=encoding._pat_str,
            mergeable_ranks=encoding._mergeable_ranks,
            special_tokens=encoding._special_tokens,
        )

    @property
    def end_of_text(self):
        return self._special_tokens.get(END_OF_TEXT)

    @property
    def begin(self):
        return () if self.end_of_text is None else (self.end_of_text,)

    end = ()
    added_tokens = ()

    @functools.cached_property
    def faster(self):
        r"""The same encoding, about 1.7 times as fast: the same pieces of text from a pattern that suits the regular
        expression library of tiktoken.

        All of tiktoken's patterns and ours end in a look-ahead, `\s+(?!\S)`, which makes the library match the whole
        pattern by backtracking. The part before it is matched by the library's automaton instead, if it is a group
        without possessive quantifiers (`++`). Greedy quantifiers match the same here: the expression after each of them
        cannot match a character that it would have to give back."""
        head, look_ahead, tail = self._pat_str.partition(r"|\s+(?!\S)")
        if not look_ahead:
            return self
        head = re.sub(r"([+*?]|\{\d+,\d+\})\+", r"\1", head)
        return tiktoken.Encoding(
            self.name,
            pat_str=f"(?:{head}){look_ahead}{tail}",
            mergeable_ranks=self._mergeable_ranks,
            special_tokens=self._special_tokens,
        )

    def ids(self, text):
        # as encode_ordinary, but without a Python integer for each token, which costs a tenth of the time
        return self.faster.encode_to_numpy(text, disallowed_special=())

    def fingerprint(self):
        digest = hashlib.sha256(self._pat_str.encode())
        for token, rank in sorted(self._mergeable_ranks.items(), key=lambda item: item[1]):
            digest.update(token + b" %d\n" % rank)
        digest.update(json.dumps(sorted(self._special_tokens.items())).encode())
        return digest.hexdigest()[:16]

    def vocabulary(self):
        names = byte_level_names(self._mergeable_ranks)
        return {names[token]: rank for token, rank in self._mergeable_ranks.items()}

    def known_ids(self):
        return {*self._mergeable_ranks.values(), *self._special_tokens.values()}

    def token_bytes(self, special=False):
        """special: the names of special tokens, too."""
        tokens = [b""] * self.n_vocab
        for token, rank in self._mergeable_ranks.items():
            tokens[rank] = token
        if special:
            for name, rank in self._special_tokens.items():
                tokens[rank] = name.encode()
        return tokens

    def missing_characters(self, text):
        """The characters of `text` that it has no token for. Tokenizers with all 256 bytes miss none; a tokenizer of
        characters has only its own."""
        if all(byte in self._mergeable_ranks for byte in byte_ranks()):
            return []
        return sorted(char for char in set(text) if char.encode(errors="replace") not in self._mergeable_ranks)

    def to_json(self):
        return huggingface_json(self._mergeable_ranks, self._special_tokens, self._pat_str)

    def as_transformers(self, chat_template, replace=False):
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        special = {}
        if self.end_of_text is not None:
            special = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(self.to_json()),
            clean_up_tokenization_spaces=False,
            chat_template=chat_template,
            **special,
        )

    def save(self, folder, **settings):
        """Write the files from which transformers makes the same tokenizer. settings: keys of
        tokenizer_config.json."""
        save_for_transformers(folder, self._mergeable_ranks, self._special_tokens, self._pat_str, **settings)


def load_trained(folder):
    """A tokenizer that `save_tokenizer` wrote. Raises UserError that names the faulty file and line."""
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
        with panics_as_exceptions():
            tokenizer = TiktokenTokenizer(folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
            known = set(SAMPLE).difference(tokenizer.missing_characters(SAMPLE))
            sample = "".join(character for character in SAMPLE if character in known)
            kept = tokenizer.decode(tokenizer.encode_ordinary(sample))
    except Exception as error:
        raise UserError(f"{folder}: broken tokenizer ({describe(error)}); train or copy it again") from None
    if kept != sample:
        raise UserError(
            f"{settings_file}: broken tokenizer: its pattern loses text ({len(kept)} of {len(sample)} characters are "
            "left of a sample); train or copy the tokenizer again"
        )
    tokenizer.folder = folder
    return tokenizer


# -- transformers' -------------------------------------------------------------------------------


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a folder with tokenizer.json, with the ids of transformers' AutoTokenizer under
    split_special_tokens=True and add_special_tokens=False.

    A document begins with the tokens that the tokenizer puts before a text (BOS, or none) and ends with those that it
    puts after it, else with its end of text, as when models with such tokenizers are pre-trained.

    Raises UserError if the files are damaged, or no end of text is known."""

    def __init__(self, folder, hub_name=None):
        self.folder = Path(folder)
        self.hub_name = hub_name
        self.name = hub_name or self.folder.name
        file = self.folder / "tokenizer.json"
        open_huggingface(file)
        refuse_pipes(self.folder)
        theirs = self.as_transformers()
        # AutoTokenizer's, not the file's: some of transformers' classes build parts of it again
        self.backend = theirs.backend_tokenizer
        self.n_vocab = 1 + max(self.backend.get_vocab().values(), default=0)
        if not 2 <= self.n_vocab <= 1 << 31:
            raise UserError(f"{file}: found {self.n_vocab} ids, expected 2 to 2^31; export or copy it again")
        if getattr(self.backend.model, "dropout", None):
            raise UserError(f"{file}: model.dropout: found one, by which ids are random; set it to null")
        self.end_of_text = self.backend.token_to_id(end_of_text_token(theirs, file))
        # as its settings name them; the eos of a tokenizer for conversations is the end of a turn
        self.eos, self.their_pad = map(self.backend.token_to_id, (theirs.eos_token or "", theirs.pad_token or ""))
        self.their_class = type(theirs).__name__
        try:
            self.begin, after = tokens_around(theirs)
        except Exception as error:  # the library has no class for it
            raise UserError(f"{file}: broken tokenizer ({describe(error)}); export or copy it again") from None
        self.end = after or (self.end_of_text,)
        added = self.backend.get_added_tokens_decoder()
        self.added_tokens = tuple(token.content for _, token in sorted(added.items()) if not token.special)
        self.prepare_backend()
        parts = [*self.encode_ordinary("\n"), *self.encode_ordinary("a")]
        self.adds_space = self.encode_ordinary("\na") != parts

    @property
    def stops(self):
        return (self.end_of_text,) if self.eos in (None, self.end_of_text) else (self.end_of_text, self.eos)

    @property
    def pad(self):
        return self.end_of_text if self.their_pad is None else self.their_pad

    def prepare_backend(self):
        self.backend.encode_special_tokens = True  # which its serialized form does not keep
        self.backend.no_truncation()
        self.backend.no_padding()

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.prepare_backend()

    def ids(self, text):
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def encode_ordinary(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=False)

    def text_of(self, special_tokens):
        """The names of special tokens, given by id, one after the other."""
        return "".join(map(self.backend.id_to_token, special_tokens))

    def fingerprint(self):
        """Of tokenizer.json, and of some ids: the settings beside it may choose a class that cuts text otherwise."""
        content = read_object(self.folder / "tokenizer.json", "export or copy it again")
        for of_batches in ("padding", "truncation", "version"):
            content.pop(of_batches, None)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        digest.update(json.dumps(self.encode_ordinary(FINGERPRINTED)).encode())
        return digest.hexdigest()[:16]

    def vocabulary(self):
        return self.backend.get_vocab()

    def known_ids(self):
        return set(self.backend.get_vocab().values())

    def token_bytes(self, special=False):
        """special: the names of special tokens, too. The space that some tokenizers add before the first word of a text
        counts."""
        content = json.loads(self.backend.to_str())
        special_tokens = {token["id"] for token in content["added_tokens"] if token["special"]}
        added = {token["id"] for token in content["added_tokens"]}
        is_byte_level = '"ByteLevel"' in json.dumps(content["decoder"])
        from_unicode = {char: value for value, char in enumerate(byte_level_alphabet())}
        tokens = [b""] * self.n_vocab
        for name, number in self.backend.get_vocab().items():
            if number in special_tokens and not special:
                continue
            if number in added:
                tokens[number] = name.encode()
            elif is_byte_level:
                tokens[number] = bytes(from_unicode[char] for char in name if char in from_unicode)
            elif BYTE_NAME.fullmatch(name):
                tokens[number] = bytes([int(name[3:5], 16)])
            else:
                tokens[number] = name.replace("\u2581", " ").encode()
        return tokens

    def missing_characters(self, text):
        """None: where it has no token for a character it has one for all unknown ones, or for bytes."""
        return []

    def to_json(self):
        return self.backend.to_str()

    def as_transformers(self, chat_template=None, replace=False):
        """AutoTokenizer's. chat_template: for a tokenizer that comes with none; replace: for any."""
        from transformers import PreTrainedTokenizerFast

        path = self.folder / "tokenizer.json"
        try:
            if any((self.folder / name).exists() for name in ("tokenizer_config.json", "config.json")):
                found = from_folder(self.folder)
            else:
                found = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # of many classes, some of them libraries' own
            raise UserError(f"{path}: {describe(error)}; expected a tokenizer; export or copy it again") from None
        found.chat_template = chat_template if replace else found.chat_template or chat_template
        return found

    def copy(self, folder):
        """Copy its files into `folder`, and the model's config.json, by which transformers may know its class."""
        self.copy_files(folder, (*FILES, "config.json"))

    def copy_files(self, folder, names):
        for name in names:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def save(self, folder, **settings):
        """Copy its files into `folder`. settings: keys of tokenizer_config.json to add or replace.

        The class is named as well: without it AutoTokenizer takes that of the model in config.json, which may cut text
        in another way. So are the end of text and the start, where the tokenizer came without settings."""
        replaced = {"chat_template.jinja"} if "chat_template" in settings else set()  # it is preferred to the setting
        self.copy_files(folder, [name for name in FILES if name not in replaced])
        path = folder / "tokenizer_config.json"
        found = read_json(path) if path.exists() else {}
        is_plain = self.their_class in PLAIN_CLASSES
        found["tokenizer_class"] = "PreTrainedTokenizerFast" if is_plain else self.their_class
        if self.eos is None:
            found["eos_token"] = self.backend.id_to_token(self.end_of_text)
            if len(self.begin) == 1:
                found.setdefault("bos_token", self.text_of(self.begin))
        write_json(path, {"padding_side": "left"} | found | settings)  # as `generate` needs it


def from_folder(folder):
    """transformers' tokenizer of a folder: of the class that tokenizer_config.json names, where that says that
    tokenizer.json is to be taken as it is, for which AutoTokenizer has another class in some families (Qwen2's)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(folder) / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    is_plain = isinstance(settings, dict) and settings.get("tokenizer_class") in PLAIN_CLASSES
    loader = PreTrainedTokenizerFast if is_plain else AutoTokenizer
    return loader.from_pretrained(folder, **({} if is_plain else {"trust_remote_code": False}))


def end_of_text_token(theirs, file):
    """The token that ended a document when the model was pre-trained. theirs: transformers' tokenizer. Raises
    UserError if it cannot be known."""
    known = theirs.get_vocab()
    eos = theirs.eos_token
    if OF_PRETRAINING.get(eos) in known:
        return OF_PRETRAINING[eos]
    if eos in known:
        return eos
    usual = [token for token in USUAL_ENDS if token in known]
    if not usual:
        raise UserError(
            f"{file}: found no token that ends a document, expected eos_token in tokenizer_config.json beside it; "
            "name it there"
        )
    return usual[0]


def tokens_around(theirs):
    """(ids before, ids after) that transformers' tokenizer puts around a text."""
    for text in ("a", *theirs.get_vocab()):  # one of characters may have no "a"
        if inside := theirs(text, add_special_tokens=False)["input_ids"]:
            break
    whole = theirs(text)["input_ids"]
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return tuple(whole[:start]), tuple(whole[start + len(inside) :])
    return tuple(whole[: len(whole) - len(inside)]), ()


# -- by name -------------------------------------------------------------------------------------


def load_tokenizer(name):
    """A tokenizer by tiktoken's name, `bytes`, a folder, a tokenizer.json in a folder, or a name on the hub.

    Raises UserError if there is no such tokenizer or its files are broken."""
    name = os.fspath(name)
    if name == "bytes":
        return TiktokenTokenizer(
            "bytes", pat_str=A_CHARACTER, mergeable_ranks=byte_ranks(), special_tokens={END_OF_TEXT: 256}
        )
    if os.path.basename(name) == "tokenizer.json":
        name = os.path.dirname(name) or "."
    if any(os.path.lexists(os.path.join(name, file)) for file in ("tokenizer.tiktoken", "tokenizer_settings.json")):
        return load_trained(Path(name))
    if os.path.lexists(os.path.join(name, "tokenizer.json")):
        return HuggingFaceTokenizer(name)
    if name in tiktoken.list_encoding_names():
        return load_tiktokens(name)
    if HUB_NAME.fullmatch(name) and not os.path.isdir(name):
        return HuggingFaceTokenizer(download(name), name)
    if os.path.isdir(name):
        raise UserError(
            f"tokenizer: {name}: found neither tokenizer.tiktoken nor tokenizer.json in it, expected one of them; "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes tokenizer.json"
        )
    if os.sep in name:
        raise UserError(f"tokenizer: {name}: no such folder, expected one with tokenizer.tiktoken or tokenizer.json")
    raise UserError(
        f"tokenizer: {name!r} is neither 'bytes', nor a folder with tokenizer.tiktoken or tokenizer.json, nor one of "
        f"tiktoken's, nor a name on the Hugging Face hub (owner/name); "
        f"{did_you_mean(name, tiktoken.list_encoding_names())}"
    )


def load_tiktokens(name):
    """One of tiktoken's own. Raises UserError if it cannot be downloaded or read."""
    try:
        return TiktokenTokenizer.of(tiktoken.get_encoding(name))
    except OSError as error:  # also all errors of requests
        raise UserError(
            f"tokenizer: {name} could not be downloaded ({type(error).__name__}); on a machine without a network "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from None
    except ValueError as error:  # a damaged file in its cache
        reason = describe(error)
        raise UserError(f"tokenizer: {name} could not be read ({reason}); remove it from TIKTOKEN_CACHE_DIR") from None


def download(name):
    """The folder to which a tokenizer of the hub was downloaded, now or earlier. Raises UserError."""
    folder = from_hub("tokenizer", name, [*FILES, "config.json"])
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"tokenizer: {name}: found no tokenizer.json there, expected one; save it with transformers")
    return folder
