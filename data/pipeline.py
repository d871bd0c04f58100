"""Documents -> token shards: in parallel, in bounded memory, the same bytes whatever the number of
processes, and safe to kill: a second call goes on behind the last finished shard.

A document is a pair (key, text). A hash of the key decides whether it goes to training or validation,
so a document keeps its side whatever comes before it. Its tokens follow one end-of-text token.
"""

import argparse
import hashlib
import itertools
import multiprocessing
import os
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, read_json
from data.shards import read_meta, token_dtype, write_json, write_shard
from data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer

BATCH_BYTES = 1 << 20  # text handed to a worker at a time: large enough to hide the hand-over


def options(description, folder, tokenizer="gpt2", **extra):
    """The flags every prepare script has. `extra`: further flags with their defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=True
    )
    parser.add_argument("--tokenizer", default=tokenizer, help="tiktoken's name, 'bytes', or a trained one's folder")
    parser.add_argument("--out", type=Path, default=Path(os.path.relpath(folder)), help="folder for the shards")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="share of documents kept for validation")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="a shard ends with the document past it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenize")
    parser.add_argument("--input", help="a local copy of the source")
    parser.add_argument("--limit", type=int, help="take only the first documents")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def split_of(key, val_fraction):
    """`val` for about val_fraction of all keys, else `train`."""
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "val" if position < val_fraction else "train"


# -- in the workers ------------------------------------------------------------------------------


def start_worker(tokenizer):
    global encoding, end_of_text, dtype
    encoding = load_tokenizer(tokenizer)
    end_of_text = encoding._special_tokens[END_OF_TEXT]
    dtype = token_dtype(encoding.n_vocab)


def encode(texts):
    """Texts -> one array of tokens each, the end-of-text token first; and the bytes of each text."""
    tokens = [np.array([end_of_text, *encoding.encode_ordinary(text)], dtype=dtype) for text in texts]
    return tokens, [len(text.encode()) for text in texts]


# -- in the parent -------------------------------------------------------------------------------


def batches(documents):
    """Group (key, text) pairs into lists of about BATCH_BYTES characters."""
    batch, size = [], 0
    for key, text in documents:
        batch.append((key, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(documents, tokenizer, workers):
    """Yield (key, tokens, bytes) for each document, in order. At most 4 batches a worker are under way."""
    if workers == 1:
        start_worker(tokenizer)
        for batch in batches(documents):
            yield from zip([key for key, _ in batch], *encode([text for _, text in batch]), strict=True)
        return
    # spawn: the parent may hold threads (datasets, tokenizers) that do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (tokenizer,)) as pool:
        pending = deque()
        for batch in itertools.chain(batches(documents), itertools.repeat(None)):
            if batch:
                pending.append(([key for key, _ in batch], pool.submit(encode, [text for _, text in batch])))
            if pending and (batch is None or len(pending) >= 4 * workers):
                keys, result = pending.popleft()
                yield from zip(keys, *result.result(), strict=True)
            if batch is None and not pending:
                return


class Split:
    """The shards of one split: those written, and the tokens waiting for the next."""

    def __init__(self, folder, name, progress):
        self.folder, self.name = folder, name
        self.shards = progress.get("shards", [])
        self.documents = progress.get("documents", 0)
        self.bytes = progress.get("bytes", 0)
        self.partial = folder / f"{name}.partial.npy"
        self.waiting = [np.load(self.partial)] if progress.get("waiting") else []
        self.waiting_tokens = sum(map(len, self.waiting))

    def add(self, tokens, size):
        self.waiting.append(tokens)
        self.waiting_tokens += len(tokens)
        self.documents += 1
        self.bytes += size

    def write(self):
        if self.waiting:
            path = self.folder / f"{self.name}_{len(self.shards):06d}.bin"
            self.shards.append(write_shard(path, np.concatenate(self.waiting)))
            self.waiting, self.waiting_tokens = [], 0

    def progress(self):
        """What a later call needs to go on from here; the waiting tokens go to a file of their own."""
        if self.waiting:
            temporary = self.partial.with_suffix(".tmp")
            with open(temporary, "wb") as file:
                np.save(file, np.concatenate(self.waiting))
            os.replace(temporary, self.partial)
        state = {"shards": self.shards, "documents": self.documents, "bytes": self.bytes}
        return state | {"waiting": self.waiting_tokens}


def prepare(documents, tokenizer, args, source=""):
    """Tokenize `documents`, an iterable of (key, text) pairs, into shards and meta.json in args.out.

    args: what `options` parses. Raises UserError on bad input; what was there before stays."""
    encoding = load_tokenizer(tokenizer)
    if END_OF_TEXT not in encoding._special_tokens:
        raise UserError(f"--tokenizer: {encoding.name} has no {END_OF_TEXT} token; choose one that has, as gpt2")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer": fingerprint(encoding), "source": source or str(args.input)}
    settings |= {name: getattr(args, name) for name in ("val_fraction", "shard_tokens", "limit")}
    progress_file, progress = args.out / "progress.json", {}
    for path, content in ((args.out / "meta.json", read_meta(args.out)), (progress_file, None)):
        if not path.exists():
            continue
        content = content or read_json(path)
        different = [name for name, value in settings.items() if content.get("settings", {}).get(name) != value]
        if different:
            raise UserError(
                f"{path}: already holds data made with another {', '.join(different)}; "
                "choose another --out, or remove that folder's shards and this file"
            )
        if path.name == "meta.json":
            print(f"{args.out} is already prepared with these settings; remove {path} to make it again")
            return
        progress = content
    splits = {name: Split(args.out, name, progress.get(name, {})) for name in ("train", "val")}
    done = sum(split.documents for split in splits.values())
    if done:
        print(f"going on behind document {done}, where an earlier call finished a shard")
    todo = itertools.islice(documents, done, args.limit)
    with tqdm(unit=" tokens", unit_scale=True, desc=str(args.out), mininterval=0.5) as bar:
        for key, tokens, size in encoded(todo, tokenizer, args.workers):
            split = splits[split_of(key, args.val_fraction)]
            split.add(tokens, size)
            bar.update(len(tokens))
            if split.waiting_tokens >= args.shard_tokens:
                split.write()
                state = {name: each.progress() for name, each in splits.items()}
                write_json(progress_file, {"settings": settings} | state)
    meta = {
        "tokenizer": tokenizer_entry(tokenizer, encoding, args.out),
        "vocab_size": encoding.n_vocab,
        "end_of_text": encoding._special_tokens[END_OF_TEXT],
        "settings": settings,
        "splits": {},
    }
    for name, split in splits.items():
        split.write()
        tokens = sum(shard["tokens"] for shard in split.shards)
        if not tokens:
            print(f"warning: no document fell into the {name} split; change --val_fraction if you need it")
        meta["splits"][name] = {"tokens": tokens, "documents": split.documents, "bytes": split.bytes}
        meta["splits"][name]["shards"] = split.shards
        print(f"{name}: {tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes of text")
    write_json(args.out / "meta.json", meta)
    for leftover in (progress_file, *(split.partial for split in splits.values())):
        leftover.unlink(missing_ok=True)


def tokenizer_entry(tokenizer, encoding, out):
    """How to find the tokenizer again: tiktoken's name, or the folder, relative to the shards."""
    trained = Path(tokenizer).is_dir()
    name = os.path.relpath(tokenizer, out) if trained else str(tokenizer)
    return {"name": name, "trained": trained, "fingerprint": fingerprint(encoding)}


def tokenizer_of(folder):
    """The tokenizer that made the shards in `folder`. Raises UserError if it is not the same any more."""
    entry = (read_meta(folder) or {}).get("tokenizer")
    if entry is None:
        raise UserError(f"{folder}: no meta.json, so the tokenizer of its shards is not known; prepare the data again")
    encoding = load_tokenizer(str(Path(folder) / entry["name"]) if entry["trained"] else entry["name"])
    if fingerprint(encoding) != entry["fingerprint"]:
        raise UserError(
            f"{folder}/meta.json: made with tokenizer {entry['fingerprint']}, but {entry['name']} is now "
            f"{fingerprint(encoding)}; prepare the data again"
        )
    return encoding
