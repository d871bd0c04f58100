"""Documents -> token shards: in parallel, in bounded memory, the same bytes whatever the number of
processes, and safe to kill: a second call continues after the last finished shard.

A document is a pair (key, text). A hash of the key decides whether it goes to training or validation,
so a document keeps its side whatever comes before it. Its tokens follow one end-of-text token.

What happens in which order, so that a kill between any two steps loses nothing but time:

1. Tokens are appended to <split>_000003.bin.tmp until it holds --shard_tokens.
2. Its header is written, and both splits' .tmp files are flushed to the disk.
3. progress.json says atomically: this shard is whole, that many tokens lie in the other split's .tmp,
   and that many documents are done.
4. The whole shard loses its .tmp. A later call does so itself if progress.json promises it.

At the end meta.json is written and progress.json removed. A document that cannot be used ends it, or
with --on_bad_document skip is left out and named in skipped.jsonl, of which progress.json says the length.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minzero.config import UserError
from minzero.data.conversations import LEARNED
from minzero.data.shards import (
    HEADER_BYTES,
    NO_LOSS,
    check_progress,
    read_meta,
    shard_header,
    shard_layout,
    token_dtype,
)
from minzero.data.sources import BadDocument, is_far, plural
from minzero.data.tokenizer import (
    END_OF_TEXT,
    cut_long_runs,
    faster,
    fingerprint,
    load_tokenizer,
    missing_characters,
    without_surrogates,
)
from minzero.files import cannot_write, checksum, is_regular, make_folder, make_way, write_json
from minzero.flags import FlagParser, a_number, a_path, at_least, check_can_write

BATCH = 1 << 20  # characters handed to a worker at a time: large enough to hide the hand-over
BATCH_DOCUMENTS = 1 << 14  # and at most so many documents, which take memory even when they are empty

MOST_IDS = 10_000_000  # of a tokenizer that is learned: the library takes memory for all of them at once
SMALL_PIECE = 10_000  # characters that the tokenizer is given at a time where it fails on a whole text


def options(description, folder, tokenizer="gpt2", val_fraction=0.05, **extra):
    """The flags every prepare script has, with the defaults of this one. `extra`: further flags."""
    parser = FlagParser(description)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--tokenizer", default=tokenizer, help="tiktoken's name, 'bytes', or a trained one's folder")
    parser.add_argument("--out", type=a_data_folder, default=os.path.relpath(folder), help="folder for the shards")
    share = a_number(0, 1)
    parser.add_argument("--val_fraction", type=share, default=val_fraction, help="share of documents for validation")
    tokens = at_least(1, 2**30)
    parser.add_argument("--shard_tokens", type=tokens, default=100_000_000, help="a shard ends with the batch past it")
    parser.add_argument("--workers", type=at_least(1, 4096), default=cores, help="processes that tokenize")
    parser.add_argument("--input", nargs="+", help="local copies of the source: files, folders, quoted globs")
    parser.add_argument("--column", default="text", help="the column that holds the text")
    parser.add_argument("--limit", type=at_least(1), help="take only the first documents")
    parser.add_argument("--streaming", action="store_true", help="read from the hub without keeping a copy")
    parser.add_argument(
        "--on_bad_document",
        choices=["stop", "skip"],
        default="stop",
        help="one that cannot be read or tokenized ends the preparation, or is left out and named in skipped.jsonl",
    )
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=at_least(1, MOST_IDS) if type(default) is int else str, default=default)
    return parser


def a_data_folder(text):
    """The type of --out: a folder that can be written, which is looked at before a source is opened, a tokenizer
    learned or a document read. One that is finished may be on a disk that cannot be written."""
    folder = a_path(text)
    if not os.path.exists(folder / "meta.json"):
        check_can_write("--out", folder, folder=True)
    return folder


def split_of(key, val_fraction):
    """`val` for about val_fraction of all keys, else `train`."""
    position = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return "val" if position < val_fraction else "train"


# -- in the workers ------------------------------------------------------------------------------


def start_worker(tokenizer, loss_mask):
    global encoding, with_loss_mask
    encoding = faster(load_tokenizer(tokenizer))
    with_loss_mask = loss_mask
    parent = multiprocessing.parent_process()
    if parent is not None:
        # a worker whose parent was killed would wait for work for ever
        threading.Thread(target=lambda: connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def encode(batch):
    """[(split, key, text or BadDocument)] -> {split: (tokens, number of documents, bytes of text)} and a list of (key,
    BadDocument): what cannot be used, in order."""
    end_of_text = np.array([encoding._special_tokens[END_OF_TEXT]], dtype=np.uint32)
    parts = {}
    counts = {}
    bad = []
    for split, key, text in batch:
        try:
            if isinstance(text, BadDocument):
                raise text
            if not isinstance(text, str):
                raise BadDocument(key, f"found {type(text).__name__}, expected a string")
            arrays, size = encode_document(key, text, end_of_text)
        except BadDocument as error:
            bad.append((key, error))
            continue
        parts.setdefault(split, []).extend(arrays)
        documents, size_before = counts.get(split, (0, 0))
        counts[split] = documents + 1, size_before + size
    result = {}
    for split, arrays in parts.items():
        tokens = np.concatenate(arrays)
        largest = (tokens & ~NO_LOSS).max() if with_loss_mask else tokens.max()
        if largest >= encoding.n_vocab:
            raise UserError(f"--tokenizer: {encoding.name} gave id {largest}, expected below {encoding.n_vocab}")
        result[split] = tokens.astype(token_dtype(encoding.n_vocab, with_loss_mask)), *counts[split]
    return result, bad


def encode_document(key, text, end_of_text):
    """A document's tokens, as a list of uint32 arrays, and the bytes of text the loss is of. Raises BadDocument."""
    if not with_loss_mask:
        tokens, size = encode_text(key, text)
        return [end_of_text, *tokens], size
    arrays, size = [end_of_text | NO_LOSS], 0
    for number, piece in enumerate(text.split(LEARNED)):
        tokens, length = encode_text(key, piece)
        if number % 2:  # what the loss is of, its end too
            arrays += *tokens, end_of_text
            size += length
        else:
            arrays += (part | NO_LOSS for part in tokens)
    return arrays, size


def encode_text(key, text):
    """The tokens of a text, as a list of uint32 arrays, and its length in bytes. Raises BadDocument."""
    ascii = text.isascii()  # then as many bytes as characters
    if not ascii:
        text = without_surrogates(text)
    size = len(text) if ascii else len(text.encode())
    small = (text[start : start + SMALL_PIECE] for start in range(0, len(text), SMALL_PIECE))
    for parts in (cut_long_runs(text), small):  # a pattern of another's may choke on more than our runs
        try:
            # as encode_ordinary, but without a Python integer for each token, which costs a tenth of the time
            return [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts], size
        except BaseException as error:  # tiktoken's panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if unknown := "".join(missing_characters(encoding, text)[:20]):
            failure = f"no token for {unknown!r}"
            break
    raise BadDocument(key, f"could not be tokenized ({failure})", "choose another --tokenizer")


# -- in the parent -------------------------------------------------------------------------------


def batches(documents, characters, side):
    """Group (key, text) pairs into lists of (split, key, text) of about that many characters, and of no more than
    BATCH_DOCUMENTS."""
    batch, size = [], 0
    for key, text in documents:
        batch.append((side(key), key, text))
        size += len(text) if isinstance(text, str) else 0
        if size >= characters or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(batches, tokenizer, workers, loss_mask):
    """Yield what `encode` makes of each batch, in order. At most 4 batches a worker are under way."""
    if workers == 1:
        start_worker(tokenizer, loss_mask)
        yield from map(encode, batches)
        return
    # spawn: the parent may hold threads (datasets, tokenizers) that do not survive a fork
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (tokenizer, loss_mask))
    try:
        pending = deque()
        for batch in batches:
            # this starts workers, who inherit that Ctrl-C is not for them: the parent answers it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending.append(pool.submit(encode, batch))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if len(pending) == 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "--workers: a worker process was killed, perhaps for want of memory; run the same command again, it "
            "continues after the last finished shard; fewer --workers need less memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class Split:
    """The shards of one split: those that are whole, and the .tmp file that is to be the next."""

    def __init__(self, folder, name, dtype, progress):
        self.folder, self.name, self.dtype = folder, name, dtype
        self.shards = progress.get("shards", [])  # entries for meta.json
        self.waiting = progress.get("waiting", 0)  # tokens in the .tmp file
        self.documents, self.bytes = progress.get("documents", 0), progress.get("bytes", 0)

    @property
    def path(self):
        return self.folder / f"{self.name}_{len(self.shards):06d}.bin"

    @property
    def temporary(self):
        return self.path.with_suffix(".bin.tmp")

    @property
    def tokens(self):
        return sum(shard["tokens"] for shard in self.shards) + self.waiting

    def recover(self):
        """Make the files what progress.json says, after a kill. Raises UserError if they cannot be."""
        self.publish()
        for shard in self.shards:
            if shard_layout(self.folder / shard["file"])[2] != shard["tokens"]:
                raise UserError(f"{self.folder / shard['file']}: not the {shard['tokens']} tokens of progress.json")
        if self.waiting:
            size = HEADER_BYTES + self.waiting * self.dtype.itemsize
            if not is_regular(self.temporary) or self.temporary.stat().st_size < size:
                raise UserError(
                    f"{self.temporary}: missing or cut, expected at least {size} bytes; remove progress.json from "
                    f"{self.folder} to start again"
                )
            os.truncate(self.temporary, size)  # what was appended after the last finished shard comes again

    def add(self, tokens, documents, size):
        new = not self.waiting
        try:
            with open(self.temporary, "wb" if new else "ab") as file:
                if new:
                    file.write(bytes(HEADER_BYTES))
                file.write(tokens)
        except OSError as error:
            raise cannot_write(self.temporary, error) from None
        self.waiting += len(tokens)
        self.documents += documents
        self.bytes += size

    def flush(self, finish):
        """Bring the .tmp file to the disk; with `finish`, as a whole shard. Returns the progress."""
        if self.waiting:
            try:
                with open(self.temporary, "r+b") as file:
                    if finish:
                        file.write(shard_header(self.dtype, self.waiting))
                        file.flush()
                    os.fsync(file.fileno())
                if finish:
                    entry = {"file": self.path.name, "tokens": self.waiting, "sha256": checksum(self.temporary)}
                    self.shards, self.waiting = [*self.shards, entry], 0
            except OSError as error:
                raise cannot_write(self.temporary, error) from None
        counts = {"documents": self.documents, "bytes": self.bytes, "waiting": self.waiting}
        return counts | {"shards": self.shards}

    def publish(self):
        """Rename the last shard that progress.json calls whole."""
        for shard in self.shards[-1:]:
            temporary = self.folder / (shard["file"] + ".tmp")
            if temporary.exists():
                try:
                    os.replace(temporary, self.folder / shard["file"])
                except OSError as error:
                    raise cannot_write(self.folder / shard["file"], error) from None


class Skipped:
    """skipped.jsonl: a line {"key", "reason"} for each document that was left out. Like a shard's .tmp file, it is as
    long as progress.json says, whatever was appended before a kill."""

    def __init__(self, folder, progress):
        self.path = folder / "skipped.jsonl"
        self.documents, self.size = progress.get("documents", 0), progress.get("bytes", 0)

    def recover(self, ours):
        """Make the file what progress.json says, after a kill. ours: whether there was a progress.json, else what lies
        there is not known to be of a preparation and is moved to another name. Raises UserError."""
        if not self.size:
            if not ours or self.path.is_dir():
                make_way(self.path, for_a_folder=True)
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(self.path, error) from None
        elif not is_regular(self.path) or self.path.stat().st_size < self.size:
            raise UserError(
                f"{self.path}: missing or cut, expected at least {self.size} bytes; remove progress.json from "
                f"{self.path.parent} to start again"
            )
        else:
            os.truncate(self.path, self.size)

    def add(self, bad):
        lines = "".join(json.dumps({"key": key, "reason": error.reason}) + "\n" for key, error in bad).encode()
        try:
            with open(self.path, "ab") as file:
                file.write(lines)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.documents += len(bad)
        self.size += len(lines)

    def flush(self):
        if self.size:
            try:
                with open(self.path, "r+b") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise cannot_write(self.path, error) from None
        return {"documents": self.documents, "bytes": self.size}


@contextlib.contextmanager
def alone_in(folder):
    """Hold a folder for one preparation at a time. The lock goes with the process, however that ends."""
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    if new:
        make_folder("--out", folder)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out: {folder}: {error.strerror}; choose a folder that can be read and written") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"--out: another process is preparing {folder}; wait for it, or choose another") from None
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # mostly there is something in it
            for path in new:
                path.rmdir()


def prepare(documents, tokenizer, args, side=None, loss_mask=False):
    """Tokenize `documents`, an iterable of (key, text) pairs, into shards and meta.json in args.out.

    args: what `options` parses. side: key -> "train" or "val"; default: `split_of`. loss_mask: the texts have marks
    (data/conversations.py), and the loss is of what stands between them alone. Raises UserError on bad input; what
    is finished stays and is not made again."""
    encoding = load_tokenizer(str(tokenizer))
    if END_OF_TEXT not in encoding._special_tokens:
        raise UserError(f"--tokenizer: {encoding.name} has no {END_OF_TEXT} token; choose one that has, as gpt2")
    try:
        with alone_in(args.out):
            prepare_alone(documents, tokenizer, encoding, args, side, loss_mask)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues after the last finished shard")
        raise SystemExit(130) from None


def earlier_work(meta_file, progress_file):
    """The file that says what an earlier call finished, and its content; (None, {}) if that is nothing."""
    if meta_file.exists():
        return meta_file, read_meta(meta_file.parent)
    if os.path.lexists(progress_file):
        progress = check_progress(progress_file)
        # without a finished shard, as after a try with a wrong --column, it is no reason to refuse other settings
        if any(progress.get(name, {}).get("documents") for name in ("train", "val")):
            return progress_file, progress
    return None, {}


def choose_sides(documents, args, side, may_cut):
    """(key -> "train" or "val", a line on the files that are cut in two or None). may_cut: not where an earlier version
    began the work, which cut none. side: the caller's own, which is kept."""
    if hasattr(documents, "cuts"):
        documents.cuts = frozenset()  # of an earlier preparation from the same object
    if side:
        return side, None

    def by_hash(key):
        return split_of(key, args.val_fraction)

    cut = documents.cut_large(args.val_fraction, by_hash) if may_cut and hasattr(documents, "cut_large") else None
    if not cut:
        return by_hash, None
    return lambda key: documents.side(key) or by_hash(key), cut


def prepare_alone(documents, tokenizer, encoding, args, side, loss_mask):
    settings = {"tokenizer": fingerprint(encoding), "source": getattr(documents, "description", str(args.input))}
    settings |= {name: getattr(args, name) for name in ("val_fraction", "shard_tokens", "limit", "column")}
    meta_file, progress_file = args.out / "meta.json", args.out / "progress.json"
    begun = os.path.lexists(progress_file)  # by an earlier call, whether it finished anything or not
    found, progress = earlier_work(meta_file, progress_file)
    recorded = progress.get("settings", {})
    by_default = side is None
    side, cut = choose_sides(documents, args, side, may_cut=not found or "cut_files" in recorded)
    if cut:
        settings["cut_files"] = len(documents.cuts)
    if found:
        different = [name for name, value in settings.items() if recorded.get(name) != value]
        if different:
            raise UserError(
                f"{found}: already holds data made with another {', '.join(different)}; "
                "choose another --out, or remove that folder's shards and this file"
            )
    if found == meta_file:
        progress_file.unlink(missing_ok=True)  # killed between the last two steps
        print(f"{args.out} is already prepared with these settings; remove {meta_file} to make it again")
        return
    for line in (getattr(documents, "summary", None), cut):
        if line:
            print(line)
    dtype = token_dtype(encoding.n_vocab, loss_mask)
    splits = {name: Split(args.out, name, dtype, progress.get(name, {})) for name in ("train", "val")}
    skipped = Skipped(args.out, progress.get("skipped", {}))

    def save(*finished):
        state = {name: split.flush(split in finished) for name, split in splits.items()}
        state["skipped"] = skipped.flush()
        write_json(progress_file, {"settings": settings} | state)
        for split in splits.values():
            split.publish()

    def documents_done():
        return sum(split.documents for split in splits.values()) + skipped.documents

    skipped.recover(ours=begun)
    if found:
        for split in splits.values():
            split.recover()
    else:
        save()  # from now on the folder shows that it is not finished, whatever older shards it holds
    if done := documents_done():
        print(f"resuming after document {done:,}, where an earlier call finished a shard")
    if hasattr(documents, "yield_bad"):
        documents.yield_bad = True  # so that the next one can be read, and those of an earlier call are passed over
    todo = documents.skip(done) if hasattr(documents, "skip") else itertools.islice(documents, done, None)
    todo = itertools.islice(todo, args.limit and args.limit - done)
    groups = batches(todo, min(BATCH, args.shard_tokens), side)
    tokens = sum(split.tokens for split in splits.values())
    bar = tqdm(initial=tokens, unit=" tokens", unit_scale=True, desc=str(args.out), mininterval=0.5)
    try:
        with bar, contextlib.closing(encoded(groups, str(tokenizer), args.workers, loss_mask)) as results:
            for result, bad in results:
                if bad and args.on_bad_document == "stop":
                    raise bad[0][1]
                if bad:
                    skipped.add(bad)
                for name, (new, *counts) in result.items():
                    splits[name].add(new, *counts)
                    tokens += len(new)
                share = documents_done() / args.limit if args.limit else 0
                if fraction := max(getattr(documents, "fraction", None) or 0, share):
                    bar.total = max(tokens, int(tokens / fraction))  # an estimate, for the time left
                bar.update(tokens - bar.n)
                full = [split for split in splits.values() if split.waiting >= args.shard_tokens]
                if full:
                    save(*full)
        check_enough(splits, skipped, args)
    except UserError:
        if not any(split.shards for split in splits.values()):  # nothing is finished: leave nothing
            for split in splits.values():
                split.temporary.unlink(missing_ok=True)
            if not skipped.documents:  # else it says that skipped.jsonl is of a preparation
                progress_file.unlink(missing_ok=True)
        raise
    save(*splits.values())
    meta = {
        "tokenizer": tokenizer_entry(tokenizer, encoding, args.out),
        "vocab_size": encoding.n_vocab,
        "end_of_text": encoding._special_tokens[END_OF_TEXT],
        "loss_mask": loss_mask,
        "settings": settings,
        "skipped": skipped.documents,
        "splits": {},
    }
    for name, split in splits.items():
        meta["splits"][name] = {"tokens": split.tokens, "documents": split.documents, "bytes": split.bytes}
        meta["splits"][name]["shards"] = split.shards
    write_json(meta_file, meta)
    progress_file.unlink()
    report(splits, skipped, args, by_default)
    use = "train on it" if splits["train"].tokens else "evaluate on it"
    print(f"{use} with --data.path {args.out} --model.vocab_size {encoding.n_vocab}")


def check_enough(splits, skipped, args):
    """Raise UserError if the documents gave nothing to train on."""
    left_out = f"; skipped {plural(skipped.documents, 'document')}: see {skipped.path}" if skipped.documents else ""
    where = " ".join(args.input) if args.input else "the source"
    if not sum(split.bytes for split in splits.values()):
        raise UserError(f"{where[:200]}: found no text, expected at least one document with text{left_out}")
    if not splits["train"].bytes and args.val_fraction < 1:
        raise UserError(
            f"{where[:200]}: no text fell into the train split ({splits['val'].tokens:,} tokens into val); give more "
            f"documents, or choose another --val_fraction than {args.val_fraction}{left_out}"
        )


def report(splits, skipped, args, by_hash):
    """Say what was made, and whether the split is far from what was asked for. by_hash: by `split_of`."""
    for name, split in splits.items():
        print(f"{name}: {split.tokens:,} tokens, {plural(split.documents, 'document')}, {split.bytes:,} bytes of text")
    if skipped.documents:
        print(f"skipped {plural(skipped.documents, 'document')} that could not be used, named in {skipped.path}")
    share = splits["val"].bytes / sum(split.bytes for split in splits.values())
    if by_hash and 0 < args.val_fraction < 1 and is_far(share, args.val_fraction):
        print(
            f"warning: {share:.4%} of the text is in the val split, and --val_fraction asks for "
            f"{args.val_fraction:.4%}: a hash of their names decides, of each document as a whole; cut them into more "
            f"and smaller ones, or choose another --val_fraction, and remove {args.out} to make it again"
        )


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
    if not {"name", "trained"} <= entry.keys():
        raise UserError(f"{folder}/meta.json: damaged: tokenizer has no name or trained; prepare the data again")
    encoding = load_tokenizer(str(Path(folder) / entry["name"]) if entry["trained"] else entry["name"])
    if fingerprint(encoding) != entry["fingerprint"]:
        raise UserError(
            f"{folder}/meta.json: made with tokenizer {entry['fingerprint']}, but {entry['name']} is now "
            f"{fingerprint(encoding)}; prepare the data again"
        )
    return encoding
