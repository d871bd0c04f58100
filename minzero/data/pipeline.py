"""Documents -> token shards: in parallel, in bounded memory, the same bytes whatever the number of processes, and safe
to kill: a second call continues after the last finished shard.

A document is a pair (key, text). A hash of the key decides whether it goes to training or validation, so a document
keeps its split whatever comes before it.

The order of steps, in which a kill between any two loses nothing but time:

1. Tokens are appended to <split>_000003.bin.tmp until it holds --shard_tokens.
2. Its header is written, and the .tmp files of both splits are flushed to the disk.
3. progress.json records atomically: this shard is whole, the other split's .tmp holds that many tokens, and that many
   documents are done.
4. The whole shard's .tmp is removed from its name. A later call does so itself if progress.json records the shard.

At the end meta.json is written and progress.json removed. A document that cannot be used ends the preparation, or with
--on_bad_document skip is left out and named in skipped.jsonl, whose length progress.json records. So are documents that
--dedup and --decontaminate leave out (see clean.py).
"""

import contextlib
import hashlib
import itertools
import os
from pathlib import Path

from tqdm import tqdm

from minzero.data.clean import WORDS, Duplicates, Evaluation, an_evaluation_file, evaluation_files
from minzero.data.documents import BadDocument, is_far, plural
from minzero.data.encode import BATCH, encode_batches, make_batches
from minzero.data.fast_encoding import BulkEncoder
from minzero.data.meta import check_progress, read_meta
from minzero.data.output import SkippedLog, SplitWriter, locked
from minzero.data.shards import token_dtype
from minzero.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from minzero.errors import UserError
from minzero.files import check_can_write, make_folder, write_json
from minzero.flags import FlagParser, a_number, a_path, at_least

MOST_LIGHT_WORKERS = 4  # two processes with gigatoken take all that one can read
MOST_IDS = 10_000_000  # of a learned tokenizer: the library allocates memory for all of them at once


def options(description, folder, tokenizer="gpt2", val_fraction=0.05, **extra):
    """The parser of a prepare script, with its defaults. folder: the script's own, the default of --out. extra: {name:
    default} of further flags."""
    parser = PrepareParser(description, folder)
    parser.add_argument(
        "--tokenizer", default=tokenizer, help="tiktoken's name, 'bytes', a folder, or a name on the hub"
    )
    parser.add_argument("--out", type=a_data_folder, help="folder for the shards")
    share = a_number(0, 1)
    parser.add_argument("--val_fraction", type=share, default=val_fraction, help="share of documents for validation")
    tokens = at_least(1, 2**30)
    parser.add_argument("--shard_tokens", type=tokens, default=100_000_000, help="a shard ends with the batch past it")
    parser.add_argument(
        "--workers",
        type=at_least(1, 4096),
        help="processes that tokenize; default: one a core, or with gigatoken as many as reading can supply",
    )
    parser.add_argument(
        "--encoder",
        choices=["fast", "reference"],
        default="fast",
        help="fast: gigatoken, where it gives the same ids; reference: the tokenizer's own library alone",
    )
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
    dedup = "exact: leave out a document whose text an earlier one has"
    parser.add_argument("--dedup", choices=["none", "exact"], default="none", help=dedup)
    same = f"leave out documents that share {WORDS} words in a row with these files (.txt, .jsonl, .parquet)"
    parser.add_argument("--decontaminate", nargs="+", type=an_evaluation_file, metavar="FILE", help=same)
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=at_least(1, MOST_IDS) if type(default) is int else str, default=default)
    return parser


class PrepareParser(FlagParser):
    """The parser of a prepare script. Without --out the shards go into `folder`, the script's own."""

    def __init__(self, description, folder):
        super().__init__(description)
        self.folder = folder

    def parse_args(self, *arguments):
        args = super().parse_args(*arguments)
        if args.out is None:
            check_same_checkout(self.folder)
            args.out = a_data_folder(os.path.relpath(self.folder))
        return args


def check_same_checkout(folder):
    """Raise UserError if a script's folder lies in one copy of this repository and the current directory in another:
    a command that is called from one copy does not write into another unless --out says so."""
    here = checkout_of(os.getcwd())
    there = checkout_of(folder)
    if here and there and not os.path.samefile(here, there):
        raise UserError(
            f"--out: none given; found the script in {there} and the current directory in another copy of this "
            f"repository, {here}; expected both in one copy; name the folder for the shards with --out"
        )


def checkout_of(path):
    """The copy of this repository that a path lies in: the nearest folder above that holds train.py, model.py and
    minzero/. None if there is none. A link on the way, as of a data folder to a larger disk, is not followed."""
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents):
        if all((folder / name).is_file() for name in ("train.py", "model.py")) and (folder / "minzero").is_dir():
            return folder
    return None


def a_data_folder(text):
    """The type of --out: a folder that can be written. This is checked before a source is opened, a tokenizer learned
    or a document read. A finished one may be on a disk that cannot be written."""
    folder = a_path(text)
    if not os.path.exists(folder / "meta.json"):
        check_can_write("--out", folder, folder=True)
    return folder


def split_of(key, val_fraction):
    """ "val" for about val_fraction of all keys, else "train", by a hash of the key."""
    position = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return "val" if position < val_fraction else "train"


def prepare(documents, tokenizer, args, side=None, loss_mask=False):
    """Tokenize `documents`, an iterable of (key, text) pairs, into shards and meta.json in args.out.

    args: as parsed by `options`. side: key -> "train" or "val"; default: `split_of`. loss_mask: the texts have
    separators (conversations.py), and the loss is of the text between them alone. Raises UserError on bad input;
    finished shards stay and are not made again."""
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer.end_of_text is None:
        raise UserError(f"--tokenizer: {tokenizer.name} has no token that ends a text; choose one that has, as gpt2")
    try:
        with locked(args.out):
            Preparation(documents, tokenizer, args, side, loss_mask).run()
    except KeyboardInterrupt:
        print("\nstopped; the same command continues after the last finished shard")
        raise SystemExit(130) from None


class Preparation:
    """One call of `prepare`, in a folder that it has locked. Arguments: those of `prepare`, and the tokenizer
    itself."""

    def __init__(self, documents, tokenizer, args, side, loss_mask):
        self.documents = documents
        self.tokenizer = tokenizer
        self.args = args
        self.loss_mask = loss_mask
        self.meta_file = args.out / "meta.json"
        self.progress_file = args.out / "progress.json"
        self.begun = os.path.lexists(self.progress_file)  # an earlier call was here, whether it finished a shard or not
        self.recorded_in, self.recorded = earlier_work(self.meta_file, self.progress_file)
        self.settings = {
            "tokenizer": tokenizer.fingerprint(),
            "source": getattr(documents, "description", str(args.input)),
            "val_fraction": args.val_fraction,
            "shard_tokens": args.shard_tokens,
            "limit": args.limit,
            "column": args.column,
            "dedup": None if args.dedup == "none" else args.dedup,  # null as in data of versions that had no such flag
            "decontaminate": None,
        }
        self.document = {"begin": list(tokenizer.begin), "end": list(tokenizer.end)}  # ids before and after each
        if tokenizer.end:  # else as always: the end of text before each document
            self.settings["document"] = self.document
        if loss_mask:  # not so in data of earlier versions
            self.settings["document_starts"] = True
        self.settings |= getattr(documents, "settings", {})
        self.chat = getattr(documents, "chat", None)  # a ChatEncoding
        self.duplicates = Duplicates(args.out) if args.dedup == "exact" else None
        self.evaluation_files = evaluation_files(args.decontaminate or [])
        if self.evaluation_files:
            self.settings["decontaminate"] = {"words": WORDS, "files": list(self.evaluation_files)}
        self.by_default = side is None
        # an earlier version of this program cut no files; its work is continued without cuts
        may_cut = not self.recorded_in or "cut_files" in self.recorded.get("settings", {})
        self.side, self.cut_summary = choose_sides(documents, args, side, may_cut)
        if self.cut_summary:
            self.settings["cut_files"] = len(documents.cuts)

    def run(self):
        """Do the work that is left of the preparation."""
        self.check_same_settings()
        if self.recorded_in == self.meta_file:
            if os.path.lexists(self.progress_file):  # an earlier call was killed between its last steps
                self.remove_progress()
            print(f"{self.args.out} is already prepared with these settings; remove {self.meta_file} to make it again")
            return
        self.evaluation = Evaluation(self.evaluation_files.values()) if self.evaluation_files else None
        found = self.evaluation and self.evaluation.summary()
        for line in (getattr(self.documents, "summary", None), self.cut_summary, found):
            if line:
                print(line)
        self.open_output()
        try:
            self.tokenize()
            check_enough(self.splits, self.skipped, self.args)
        except UserError:
            self.remove_unless_started()
            raise
        self.finish()

    def check_same_settings(self):
        """Raise UserError if an earlier call did a part of the work with other settings."""
        if not self.recorded_in:
            return
        recorded = self.recorded.get("settings", {})
        different = [name for name, value in self.settings.items() if recorded.get(name) != value]
        if different:
            raise UserError(
                f"{self.recorded_in}: already holds data made with another {', '.join(different)}; "
                "choose another --out, or remove that folder's shards and this file"
            )

    def open_output(self):
        """Restore the output files to their recorded state, or begin new ones."""
        dtype = token_dtype(self.tokenizer.n_vocab, self.loss_mask)
        self.splits = {
            name: SplitWriter(self.args.out, name, dtype, self.recorded.get(name, {})) for name in ("train", "val")
        }
        self.skipped = SkippedLog(self.args.out, self.recorded.get("skipped", {}))
        self.skipped.recover(known=self.begun)
        if self.duplicates:
            self.duplicates.recover(self.documents_done())
        elif self.begun:
            Duplicates(self.args.out).remove()  # an earlier call with --dedup finished no shard
        if self.recorded_in:
            for split in self.splits.values():
                split.recover()
        else:
            self.save()  # from now on progress.json shows that the folder is unfinished, even if it has older shards

    def documents_done(self):
        """Documents written or left out, by this call and earlier ones."""
        return sum(split.documents for split in self.splits.values()) + self.skipped.documents

    def save(self, *finished):
        """Record the progress. finished: the splits whose .tmp file is now a whole shard."""
        state = {"settings": self.settings}
        for name, split in self.splits.items():
            state[name] = split.flush(finish=split in finished)
        state["skipped"] = self.skipped.flush()
        if self.duplicates:
            self.duplicates.flush()
        write_json(self.progress_file, state)
        for split in self.splits.values():
            split.publish()

    def documents_to_do(self):
        """The documents after those of earlier calls, up to --limit."""
        done = self.documents_done()
        if done:
            print(f"resuming after document {done:,}, where an earlier call finished a shard")
        documents = self.documents
        if hasattr(documents, "yield_bad"):
            documents.yield_bad = True  # so that reading continues after one, and skips those of an earlier call
        rest = documents.skip(done) if hasattr(documents, "skip") else itertools.islice(documents, done, None)
        rest = itertools.islice(rest, self.args.limit and self.args.limit - done)
        return self.duplicates.mark(rest) if self.duplicates else rest

    def tokenize(self):
        """Tokenize and write the documents that are left."""
        args = self.args
        batches = make_batches(self.documents_to_do(), min(BATCH, args.shard_tokens), self.side)
        by_template = self.chat is not None and self.chat.by_template  # which is not gigatoken's work
        encoder = BulkEncoder(self.tokenizer, use_gigatoken=args.encoder == "fast" and not by_template)
        if encoder.notice:
            print(encoder.notice)
        workers = args.workers or default_workers(work_is_light=encoder.quick is not None and not self.evaluation)
        results = encode_batches(batches, workers, encoder, self.loss_mask, self.evaluation, self.chat)
        tokens = sum(split.tokens for split in self.splits.values())
        bar = tqdm(initial=tokens, unit=" tokens", unit_scale=True, desc=str(args.out), mininterval=0.5)
        with bar, contextlib.closing(results):
            for result, left_out in results:
                bad = [why for _, why in left_out if isinstance(why, BadDocument)]
                if bad and args.on_bad_document == "stop":
                    raise bad[0]
                if left_out:
                    self.skipped.add(left_out)
                for name, (new, *counts) in result.items():
                    self.splits[name].add(new, *counts)
                    tokens += len(new)
                if fraction := self.fraction_done():
                    bar.total = max(tokens, int(tokens / fraction))  # an estimate, for the time left
                bar.update(tokens - bar.n)
                full = [split for split in self.splits.values() if split.waiting >= args.shard_tokens]
                if full:
                    self.save(*full)

    def fraction_done(self):
        """The fraction of the work that is done, 0 if that is not known."""
        of_source = getattr(self.documents, "fraction", None) or 0
        of_limit = self.documents_done() / self.args.limit if self.args.limit else 0
        return max(of_source, of_limit)

    def remove_unless_started(self):
        """Remove the files of a preparation that has failed before its first shard was finished."""
        if any(split.shards for split in self.splits.values()):
            return
        for split in self.splits.values():
            split.temporary.unlink(missing_ok=True)
        if self.duplicates:
            self.duplicates.remove()
        if not self.skipped.documents:  # else progress.json shows that skipped.jsonl belongs to a preparation
            self.progress_file.unlink(missing_ok=True)

    def remove_progress(self):
        """Remove the files that only an unfinished preparation needs."""
        if self.duplicates:
            self.duplicates.remove()
        self.progress_file.unlink()

    def finish(self):
        """Finish the last shards and write meta.json."""
        args = self.args
        splits = self.splits
        self.save(*splits.values())
        meta = {
            "tokenizer": tokenizer_entry(self.tokenizer, args.out) | {"fingerprint": self.settings["tokenizer"]},
            "vocab_size": self.tokenizer.n_vocab,
            "end_of_text": self.tokenizer.end_of_text,
            "document": self.document,
            "loss_mask": self.loss_mask,
            "document_starts": self.loss_mask,
            "settings": self.settings,
            "skipped": self.skipped.unusable,
            **self.skipped.dropped,
            **getattr(self.documents, "meta", {}),
            "splits": {
                name: {
                    "tokens": split.tokens,
                    "documents": split.documents,
                    "bytes": split.bytes,
                    "cut": split.cut,
                    "shards": split.shards,
                }
                for name, split in splits.items()
            },
        }
        write_json(self.meta_file, meta)
        self.remove_progress()
        report(splits, self.skipped, args, self.by_default)
        print(how_to_use(args.out, self.tokenizer, splits["train"].tokens))


def how_to_use(out, tokenizer, has_training_tokens):
    """The flags of train.py for prepared data. The model of a tokenizer of transformers' may have more ids."""
    flags = f"--data.path {out} --model.vocab_size {tokenizer.n_vocab}"
    if not has_training_tokens:
        return f"evaluate on it with {flags}"
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return f"train on it with {flags}"
    return (
        f"train on it with --data.path {out}, and --train.init_from its model, or with --model.vocab_size "
        f"{tokenizer.n_vocab} or more"
    )


def default_workers(work_is_light):
    """The number of processes that tokenize, where nobody says. work_is_light: it takes less time than reading."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MOST_LIGHT_WORKERS, cores // 2)) if work_is_light else cores


def earlier_work(meta_file, progress_file):
    """The file that records what an earlier call finished, and its content; (None, {}) if it finished nothing."""
    if meta_file.exists():
        return meta_file, read_meta(meta_file.parent)
    if os.path.lexists(progress_file):
        progress = check_progress(progress_file)
        # without a finished shard, as after an attempt with a wrong --column, other settings need not be refused
        splits = [progress.get(name, {}) for name in ("train", "val")]
        if any(split.get("documents") or split.get("shards") for split in splits):
            return progress_file, progress
    return None, {}


def choose_sides(documents, args, side, may_cut):
    """Returns (key -> "train" or "val", a line on the files that are cut in two or None).

    side: the caller's own function, which is used as it is, or None. may_cut: whether files may be cut in two."""
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


def check_enough(splits, skipped, args):
    """Raise UserError if the documents gave nothing to train on."""
    left_out = f"; skipped {plural(skipped.documents, 'document')}: see {skipped.path}" if skipped.documents else ""
    where = " ".join(args.input) if args.input else "the source"
    if not sum(split.bytes for split in splits.values()):
        within = f" within --max_tokens {args.max_tokens}" if getattr(args, "max_tokens", None) else ""
        raise UserError(f"{where[:200]}: found no text{within}, expected at least one document with text{left_out}")
    if not splits["train"].bytes and args.val_fraction < 1:
        raise UserError(
            f"{where[:200]}: no text fell into the train split ({splits['val'].tokens:,} tokens into val); give more "
            f"documents, or choose another --val_fraction than {args.val_fraction}{left_out}"
        )


def report(splits, skipped, args, by_hash):
    """Print what was made, and a warning if the splits are far from --val_fraction. by_hash: split by `split_of`."""
    for name, split in splits.items():
        print(f"{name}: {split.tokens:,} tokens, {plural(split.documents, 'document')}, {split.bytes:,} bytes of text")
    for count, words in (
        (skipped.unusable, "that could not be used"),
        (skipped.dropped["duplicates"], "whose text an earlier one has"),
        (skipped.dropped["contaminated"], f"sharing {WORDS} words in a row with the evaluation texts"),
        (skipped.dropped["too_long"], "with no whole answer within --max_tokens"),
    ):
        if count:
            print(f"skipped {plural(count, 'document')} {words}, named in {skipped.path}")
    if cut := sum(split.cut for split in splits.values()):
        print(f"cut {plural(cut, 'conversation')} after the last whole answer within --max_tokens")
    share = splits["val"].bytes / sum(split.bytes for split in splits.values())
    if by_hash and 0 < args.val_fraction < 1 and is_far(share, args.val_fraction):
        print(
            f"warning: {share:.4%} of the text is in the val split, and --val_fraction asks for "
            f"{args.val_fraction:.4%}: the documents are too few or too small for it, of which a hash of their names "
            f"takes each as a whole, or some were left out; cut them into more and smaller ones, or choose another "
            f"--val_fraction, and remove {args.out} to make it again"
        )


def tokenizer_entry(tokenizer, out):
    """The entry of meta.json by which `tokenizer_of` finds it: tiktoken's name, or the folder, relative to the
    shards. One of the hub, where it may change or disappear, is copied to beside them."""
    if tokenizer.folder is None:
        name = tokenizer.name
    elif tokenizer.hub_name:
        name = "tokenizer_" + tokenizer.hub_name.replace("/", "--")
        make_folder("--out", out / name)
        tokenizer.copy(out / name)
    else:
        name = os.path.relpath(tokenizer.folder, out)
    return {"name": name, "trained": tokenizer.folder is not None}


def tokenizer_of(folder):
    """The tokenizer that made the shards in `folder`. Raises UserError if it has changed since, or is not known."""
    meta = read_meta(folder) or {}
    entry = meta.get("tokenizer")
    if entry is None:
        raise UserError(f"{folder}: no meta.json, so the tokenizer of its shards is not known; prepare the data again")
    if not {"name", "trained"} <= entry.keys():
        raise UserError(f"{folder}/meta.json: damaged: tokenizer has no name or trained; prepare the data again")
    name = entry["name"]
    if entry["trained"]:
        name = str(Path(folder) / name)
        if not os.path.isdir(name):  # which might be taken for a name on the hub
            raise UserError(
                f"{folder}/meta.json: tokenizer: found no folder {os.path.normpath(name)}, expected the tokenizer that "
                "the data was made with; copy it there, or prepare the data again"
            )
    tokenizer = load_tokenizer(name)
    if tokenizer.fingerprint() != entry["fingerprint"]:
        raise UserError(
            f"{folder}/meta.json: made with tokenizer {entry['fingerprint']}, but {entry['name']} is now "
            f"{tokenizer.fingerprint()}; prepare the data again"
        )
    # that of a tokenizer.json is named in the settings beside it
    if tokenizer.end and meta.get("end_of_text", tokenizer.end_of_text) != tokenizer.end_of_text:
        raise UserError(
            f"{folder}/meta.json: made with the end of text {meta['end_of_text']}, but that of {entry['name']} is now "
            f"{tokenizer.end_of_text}; restore its tokenizer_config.json, or prepare the data again"
        )
    return tokenizer
