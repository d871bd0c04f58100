"""Token files of other programs -> token shards, and token shards -> nanoGPT's files.

To shards. Files are read in blocks and written as pipeline.py writes them: a call that was killed continues after the
last finished shard, the bytes do not depend on where it was killed, and meta.json is written last. Where documents are
known, a hash of the file's name and the document's number decides between training and validation, so a document keeps
its split when files are added. nanoGPT's and llm.c's files are whole splits already: their names decide.

To nanoGPT. Each file is written under a temporary name, and train.bin, which nanoGPT opens first, last.
"""

import os
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minzero.data.documents import plural, printable
from minzero.data.foreign import open_token_files, split_in_name
from minzero.data.meta import damaged, read_meta
from minzero.data.output import locked
from minzero.data.pipeline import Preparation, tokenizer_of
from minzero.data.shards import TokenStream, token_dtype
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.files import cannot_write, is_count, is_regular, make_way, write_atomically

BLOCK = 1 << 20  # tokens read at a time
NANOGPT_MOST = 65536  # ids: nanoGPT reads uint16


class Ids:
    """The ids of a tokenizer: `tokenizer`, their number `n_vocab`, `end_of_text`, and `sizes`: the bytes of the text of
    each, (n_vocab,) int64. name: as --tokenizer takes it. Raises UserError."""

    def __init__(self, name):
        self.name = name
        self.tokenizer = load_tokenizer(name)
        self.end_of_text = self.tokenizer.end_of_text
        if self.end_of_text is None:
            raise UserError(f"--tokenizer: {name} has no token that ends a text; choose one that has, as gpt2")
        self.n_vocab = self.tokenizer.n_vocab
        self.sizes = np.array([len(token) for token in self.tokenizer.token_bytes()])

    def check(self, tokens, file, first):
        """Raise UserError if one of `tokens`, read from `file` at its token `first`, is not an id."""
        largest = int(tokens.max())
        if largest < self.n_vocab and (tokens.dtype.kind == "u" or tokens.min() >= 0):
            return
        place = int(np.argmax((tokens < 0) | (tokens >= self.n_vocab)))
        raise UserError(
            f"{printable(file.path)}: token {first + place}: found id {tokens[place]}, expected 0 to "
            f"{self.n_vocab - 1}, the ids of --tokenizer {self.name}; name the tokenizer that made the file"
            f"{', or its type with --dtype' if file.is_plain else ''}"
        )


# -- to shards -----------------------------------------------------------------------------------


def to_shards(sources, tokenizer, out, val_fraction=None, shard_tokens=100_000_000, dtype=None, split_by=None):
    """Convert token files into shards and meta.json in `out`.

    sources: files, folders, Megatron's prefixes. tokenizer: the one that made the ids. val_fraction: share of the
    documents for validation, 0.05 by default. dtype: "uint16" or "uint32", of files without a header, or None.
    split_by: "document" or "name" (of the file), or None: as files of this format are mostly split. Raises UserError;
    finished shards stay and are not made again."""
    ids = Ids(tokenizer)
    files = open_token_files(sources, dtype, token_dtype(ids.n_vocab).name)
    for file in files.files:
        if os.path.realpath(file.path.parent) == os.path.realpath(out):
            raise UserError(f"--out: {out} holds {printable(file.path)}, which is converted; choose another folder")
    by_name = (split_by or ("name" if files.kind in ("nanoGPT", "llm.c") else "document")) == "name"
    if by_name:
        if val_fraction is not None:
            raise UserError(
                f"--val_fraction: found {val_fraction}, but the files' names tell train from val; leave it out, or "
                "split by document: --split_by document"
            )
        val_fraction = sum(file.tokens for file in files.files if split_in_name(file.name) == "val") / files.tokens
    elif val_fraction is None:
        val_fraction = 0.05
    args = Namespace(
        out=Path(out),
        input=[str(source) for source in sources],
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        limit=None,
        column=None,
        dedup="none",
        decontaminate=None,
    )
    with locked(args.out):
        Conversion(files, ids, args, by_name).run()


class Conversion(Preparation):
    """A preparation (pipeline.py) whose documents are tokens already. by_name: the files are whole splits."""

    def __init__(self, files, ids, args, by_name):
        side = split_in_name if by_name else None  # None: a hash
        super().__init__(files, ids.tokenizer, args, side, loss_mask=False)
        self.files = files
        self.ids = ids
        self.by_name = by_name
        self.document = {"begin": [], "end": [] if by_name else [ids.end_of_text]}
        self.settings["split_by"] = "name" if by_name else "document"

    def open_output(self):
        self.done = self.recorded.get("settings", {}).get("converted", {"tokens": 0, "ends_added": 0})
        super().open_output()
        written = sum(split.tokens for split in self.splits.values())
        counts = self.done if isinstance(self.done, dict) else {}
        right = counts.keys() == {"tokens", "ends_added"} and all(map(is_count, counts.values()))
        if not right or sum(counts.values()) != written:
            expected = f"two numbers, tokens and ends_added, of the sum {written}"
            raise damaged(self.progress_file, "settings.converted", self.done, expected)

    def save(self, *finished):
        self.settings["converted"] = self.done  # by which a later call continues
        super().save(*finished)

    def tokenize(self):
        """Copy the tokens that are left."""
        done = self.done["tokens"]
        if done:
            print(f"resuming after token {done:,}, where an earlier call finished a shard")
        before = 0  # tokens of the files before this one
        out = str(self.args.out)
        with tqdm(initial=done, total=self.files.tokens, unit=" tokens", unit_scale=True, desc=out) as bar:
            for file in self.files.files:
                if before + file.tokens > done:
                    self.copy(file, max(0, done - before), bar)
                before += file.tokens
        self.report_ends()

    def copy(self, file, start, bar):
        """Copy a file from its token `start` on. What is before it is read again, for it decides where documents
        are."""
        dtype = token_dtype(self.ids.n_vocab)
        if self.by_name and file.is_plain:
            documents = WholeFile(self.side(file.name))
        else:
            documents = Documents(lambda number: self.side(f"{file.name} {number}"), self.ids.end_of_text, dtype)
        place = 0
        for tokens, ends in file.blocks(min(BLOCK, self.args.shard_tokens), self.ids.end_of_text):
            if place >= start:
                self.ids.check(tokens, file, place)
            parts, added = documents.split(tokens.astype(dtype, copy=False), ends)
            place += len(tokens)
            if place > start:
                self.write(parts)
                self.done = {
                    "tokens": self.done["tokens"] + len(tokens),
                    "ends_added": self.done["ends_added"] + added,
                }
                bar.update(len(tokens))
                full = [split for split in self.splits.values() if split.waiting >= self.args.shard_tokens]
                if full:
                    self.save(*full)

    def write(self, parts):
        """Append {split: (arrays of tokens, number of documents)} to the shards."""
        for name, (arrays, documents) in parts.items():
            tokens = np.concatenate(arrays)
            self.splits[name].add(tokens, documents, int(self.ids.sizes[tokens].sum()))

    def report_ends(self):
        """Print how the documents are separated, where that is not as expected."""
        added = self.done["ends_added"]
        if added:
            print(f"added the end of text (id {self.ids.end_of_text}) to {plural(added, 'document')} that had none")
        files = self.files.files
        if files[0].is_plain and not self.by_name and self.documents_done() <= len(files):
            print(
                f"warning: found no id {self.ids.end_of_text}, the end of text of {self.ids.name}, between documents, "
                "so each file is one document; is it the tokenizer that made the ids?"
            )


class WholeFile:
    """A file whose tokens are all of one split."""

    def __init__(self, side):
        self.side = side

    def split(self, tokens, ends):
        """As `Documents.split`."""
        return {self.side: ([tokens], len(ends))}, 0


class Documents:
    """Gives each document of a file to a split, block after block, and ends it with an end of text unless it has one at
    either end. side: number of the document -> split. dtype: of the tokens."""

    def __init__(self, side, end_of_text, dtype):
        self.side = side
        self.end_of_text = np.array([end_of_text], dtype)
        self.number = 0
        # of the document that is being read
        self.split_now = None  # None before its first token
        self.has_end_in_front = False
        self.has_end = False  # after the tokens read so far

    def split(self, tokens, ends):
        """A block of tokens (n,), and where documents end in it -> {split: (arrays of tokens, number of documents that
        begin)}, and the number of ends of text that were added."""
        parts = {}
        added = 0
        start = 0
        for end in ends.tolist():
            self.add(tokens[start:end], parts)
            if self.split_now and not (self.has_end_in_front or self.has_end):
                parts.setdefault(self.split_now, ([], 0))[0].append(self.end_of_text)
                added += 1
            self.number += 1
            self.split_now = None
            start = end
        self.add(tokens[start:], parts)
        return parts, added

    def add(self, tokens, parts):
        """Add tokens of the current document to `parts`, {split: (arrays, documents)}."""
        if not len(tokens):
            return
        begins = self.split_now is None
        if begins:
            self.split_now = self.side(self.number)
            self.has_end_in_front = tokens[0] == self.end_of_text[0]
        self.has_end = tokens[-1] == self.end_of_text[0]
        arrays, documents = parts.get(self.split_now, ([], 0))
        arrays.append(tokens)
        parts[self.split_now] = arrays, documents + begins


# -- to nanoGPT ----------------------------------------------------------------------------------


def to_nanogpt(folder, out):
    """Write the shards in `folder` as nanoGPT's train.bin and val.bin, and meta.pkl unless their tokenizer is gpt2.

    Raises UserError if nanoGPT cannot read them, or `out` holds other files of these names."""
    if not os.path.isdir(folder):
        raise UserError(f"{printable(folder)}: no such folder; expected token shards")
    meta = read_meta(folder)
    if meta is None:
        raise UserError(
            f"{folder}: found no meta.json, expected token shards with one, which names the tokenizer; convert other "
            "programs' files to shards first"
        )
    if meta.get("loss_mask"):
        raise UserError(
            f"{folder}: found tokens without loss (loss_mask), which nanoGPT does not know; give other data"
        )
    if meta["vocab_size"] > NANOGPT_MOST:
        raise UserError(
            f"{folder}: found a vocabulary of {meta['vocab_size']}, expected at most {NANOGPT_MOST}: nanoGPT reads "
            "uint16; prepare the data with a smaller tokenizer, as gpt2"
        )
    if os.path.realpath(folder) == os.path.realpath(out):
        raise UserError(f"--out: {out} holds the shards; choose another folder, as nanoGPT/data/NAME")
    streams = {split: TokenStream(folder, split, 1) for split in ("train", "val")}
    for stream in streams.values():
        if stream.dtype.itemsize != 2:
            raise UserError(f"{stream.paths[0]}: found {stream.dtype.name}, expected uint16: nanoGPT reads no other")
    with locked(Path(out)):
        is_gpt2 = meta["tokenizer"].get("name") == "gpt2" and not meta["tokenizer"].get("trained")
        described = None if is_gpt2 else nanogpt_meta(folder)
        check_nothing_else(Path(out), described, streams)
        write_nanogpt(Path(out), described, streams)
    for split, stream in streams.items():
        print(f"{split}.bin: {stream.tokens:,} tokens")
    reads = "meta.pkl has the vocabulary" if described else "without meta.pkl, nanoGPT takes GPT-2's vocabulary"
    print(f"{out} is nanoGPT's data/NAME: train it there with --dataset=NAME ({reads})")


def nanogpt_meta(folder):
    """meta.pkl for the tokenizer of the shards in `folder`: "vocab_size", which nanoGPT's train.py reads (without it,
    50304), and for its sample.py (without them, GPT-2's tokenizer) "itos", id -> text, and "stoi", character -> id.

    sample.py encodes a prompt by characters, so with a tokenizer of longer pieces the prompt gets more tokens than a
    text of the data has, and only characters that are tokens can be in it."""
    tokenizer = tokenizer_of(folder)
    tokens = tokenizer.token_bytes(special=True)
    itos = {number: token.decode(errors="replace") for number, token in enumerate(tokens)}
    stoi = {}
    for number, text in itos.items():
        if len(text) == 1 and text != "\N{REPLACEMENT CHARACTER}":
            stoi.setdefault(text, number)
    return pickle.dumps({"vocab_size": tokenizer.n_vocab, "itos": itos, "stoi": stoi})


def check_nothing_else(out, described, streams):
    """Raise UserError if `out` holds a file of nanoGPT's that is not one of those to be written: a call that was killed
    would leave two data sets mixed. described: meta.pkl, or None. streams: {split: TokenStream}."""
    contents = {"meta.pkl": [described] if described else None}
    contents |= {f"{split}.bin": blocks_of(stream) for split, stream in streams.items()}
    for name, blocks in contents.items():
        path = out / name
        if os.path.lexists(path) and (blocks is None or not holds(path, blocks)):
            raise UserError(f"{path}: holds something else than would be written; remove it, or choose another --out")


def write_nanogpt(out, described, streams):
    """Write the files into `out`; arguments as of `check_nothing_else`. If that fails, those that were not there before
    are removed."""
    names = ["meta.pkl"] if described else []
    names += ["val.bin", "train.bin"]  # train.bin last: nanoGPT opens it first, so it never trains on a part of them
    new = [out / name for name in names if not os.path.lexists(out / name)]
    total = sum(stream.tokens for stream in streams.values())
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc=str(out)) as bar:
        try:
            for path in new:
                if path.name == "meta.pkl":
                    write_atomically(path, described)
                else:
                    write_blocks(path, blocks_of(streams[path.stem]), bar)
        except UserError:
            for path in new:
                path.unlink(missing_ok=True)
                path.with_name(path.name + ".tmp").unlink(missing_ok=True)
            raise


def holds(path, blocks):
    """Whether the content of a file is these blocks of bytes."""
    if not is_regular(path):
        return False
    with open(path, "rb") as file:
        same = all(file.read(memoryview(block).nbytes) == memoryview(block).cast("B") for block in blocks)
        return same and not file.read(1)


def blocks_of(stream):
    """Yield the tokens of a TokenStream in blocks, (n,) uint16. Raises UserError for an id outside the vocabulary."""
    for first in range(0, stream.tokens, BLOCK):
        tokens = np.empty(min(BLOCK, stream.tokens - first), stream.dtype)
        stream.fill(first, tokens)
        yield stream.ids(tokens, lambda place, first=first: first + place)


def write_blocks(path, blocks, bar):
    """`files.write_atomically` of blocks of tokens that are not in memory together. bar: is told their number."""
    temporary = path.with_name(path.name + ".tmp")
    make_way(temporary, unless_plain=True)
    try:
        with open(temporary, "wb") as file:
            for block in blocks:
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
