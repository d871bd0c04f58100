"""The data of a run, as `data.path` names it: one folder of shards, or several that are mixed by weight.

    {"path": "data/openwebtext"}
    {"path": {"data/fineweb_edu": 0.7, "data/simplewiki": 0.2, "data/stdlib": 0.1}}

A single folder is a mixture of one, so the rest of the code need not distinguish them.
"""

import hashlib

import numpy as np

from minzero.config.sections import data_weights
from minzero.data.order import Schedule, sample_numbers, windows_of
from minzero.data.packing import open_stream
from minzero.errors import UserError

DIGEST_TOKENS = 1 << 20  # read for a digest of the content
DIGEST_BLOCK = 4096  # tokens read at a time for it


class Mixture:
    """One split of the data. Its windows are numbered consecutively: those of the first folder, then the next.

    path: a folder, or {folder: weight} in any order. Each folder has its own epochs. verify: None, or (number of this
    rank, number of ranks) on this machine, whose ranks then share the work of reading every shard and comparing its
    checksum. document_mask: as data.document_mask. Raises UserError for shards that are broken, too short, made with
    different tokenizers, or with ids at or above `vocab_size`, and for documents that cannot be told apart."""

    def __init__(self, path, split, block_size, vocab_size, seed, verify=None, document_mask="auto"):
        weights = data_weights(path)
        self.folders = sorted(weights)
        self.block_size = block_size
        self.seed = seed
        self.streams = [open_stream(folder, split, block_size, document_mask) for folder in self.folders]
        self.schedule = Schedule([weights[folder] for folder in self.folders])
        self.first_windows = np.cumsum([0] + [stream.windows for stream in self.streams])
        self.windows = int(self.first_windows[-1])
        self.is_uneven = any(stream.is_uneven for stream in self.streams)
        self.has_documents = any(stream.has_documents for stream in self.streams)
        self.has_pairs = all(stream.has_pairs for stream in self.streams)
        known = {}  # fingerprint of a tokenizer -> the first folder made with it
        for folder, stream in zip(self.folders, self.streams, strict=True):
            stream.check_vocabulary(vocab_size)
            if stream.meta:
                known.setdefault(stream.fingerprint()["tokenizer"], folder)
        if len(known) > 1:
            found = ", ".join(f"{folder} with tokenizer {tokenizer}" for tokenizer, folder in known.items())
            raise UserError(f"data.path: found {found}; expected one tokenizer for all; prepare one of them again")
        if verify:
            for stream in self.streams:
                stream.verify(*verify)

    def windows_of(self, samples):
        """Sample numbers of a run (k,) -> window numbers (k,) int64."""
        sets, draws = self.schedule.draws(samples)
        windows = np.empty(len(sets), dtype=np.int64)
        for number in set(sets.tolist()):
            mine = sets == number
            # a seed for each folder, so that two of the same size are not read in the same order
            order = windows_of(draws[mine], self.streams[number].windows, self.seed + (number << 32))
            windows[mine] = order + self.first_windows[number]
        return windows

    def batches(self, first_sample, rank, world_size, micro_batch_size, accumulation):
        """Yield the micro-batches of one rank in one optimizer step, as `batch` returns them. first_sample: the number
        of the step's first sample. accumulation: the number of micro-batches."""
        for micro_step in range(accumulation):
            samples = sample_numbers(first_sample, micro_step, rank, world_size, micro_batch_size)
            yield self.batch(self.windows_of(samples))

    def batch(self, windows):
        """Window numbers (k,) -> inputs, targets and, where attention is within documents, positions in them, each
        (k, block_size) int64; of pairs also the fourth array of a PairStream."""
        if len(self.streams) == 1:
            return self.streams[0].batch(windows)
        shape = len(windows), self.block_size
        parts = [np.empty(shape, dtype=np.int64) for _ in range(3 if self.has_documents else 2)]
        for positions in parts[2:]:
            positions[:] = np.arange(self.block_size)  # of folders without: each window is one document
        if self.has_pairs:
            parts.append(np.empty(shape, dtype=np.float32))
        for number, mine, own in self.by_stream(windows):
            for part, of_stream in zip(parts, self.streams[number].batch(own), strict=False):
                part[mine] = of_stream
        return tuple(parts)

    def by_stream(self, windows):
        """Yields (number of a stream, places of its windows among these, their numbers in the stream)."""
        windows = np.asarray(windows)
        sets = np.searchsorted(self.first_windows, windows, side="right") - 1
        for number in sorted(set(sets.tolist())):
            mine = np.flatnonzero(sets == number)
            yield number, mine, windows[mine] - self.first_windows[number]

    def check_chat_template(self):
        """Raise UserError if the conversations are in several chat templates: sample.py and the export speak one."""
        found = {}  # text of a template, None for this project's form -> where the first conversations in it are
        for folder, stream in zip(self.folders, self.streams, strict=True):
            if stream.loss_mask:
                entry = stream.meta.get("chat_template")
                name = entry["name"] if entry else "this project's own form"
                found.setdefault(entry and entry["text"], f"{name} in {folder}")
        if len(found) > 1:
            raise UserError(
                f"data.path: found conversations in several chat templates, {' and '.join(found.values())}, expected "
                "one; prepare them again with the same --chat_template"
            )

    def check_loss(self, loss):
        """Raise UserError if train.loss is not one for these data."""
        for stream in self.streams:
            if stream.has_pairs and loss == "next_token":
                raise UserError(
                    f"data.path: {stream.folder} holds pairs of answers, and train.loss is next_token; set train.loss "
                    "to dpo, or prepare the answers to learn with data/chat/prepare.py"
                )
            if not stream.has_pairs and loss != "next_token":
                raise UserError(
                    f"train.loss: found {loss}, which compares pairs of answers, but {stream.folder} holds none; "
                    "prepare them with data/preferences/prepare.py"
                )

    def attended(self):
        """The mean number of tokens that attention compares a token with, the masked half included: its document's, or
        block_size."""
        total = self.schedule.period
        shares = zip(self.streams, self.schedule.counts, strict=True)
        return sum(count / total * stream.attended() for stream, count in shares)

    def validation_windows(self, wanted):
        """Window numbers for an evaluation, the same each time: about `wanted`, shared among the folders by weight and
        spread evenly over each. Fewer if a folder has less than its share."""
        period = self.schedule.period
        available = zip(self.streams, self.schedule.counts, strict=True)
        most = min(stream.windows * period // count for stream, count in available)
        sets, _ = self.schedule.draws(np.arange(max(1, min(wanted, most))))
        shares = np.bincount(sets, minlength=len(self.streams))
        chosen = []
        for stream, share, first_window in zip(self.streams, shares, self.first_windows, strict=False):
            if share:
                chosen.append(stream.validation_windows(int(share)) + first_window)
        return np.concatenate(chosen)

    def content_digests(self):
        """{folder/split: digest of its tokens}, by which ranks notice that they read different data. All tokens of a
        small data set are read, and about a million, spread evenly, of a large one."""
        share = max(DIGEST_BLOCK, DIGEST_TOKENS // len(self.streams))
        return {
            f"{folder}/{stream.split}": content_digest(stream, share)
            for folder, stream in zip(self.folders, self.streams, strict=True)
        }

    def fingerprint(self):
        """{folder: its identity, for checkpoints}; see TokenStream.fingerprint."""
        return {folder: stream.fingerprint() for folder, stream in zip(self.folders, self.streams, strict=True)}


def content_digest(stream, tokens=DIGEST_TOKENS):
    """A digest of a TokenStream's length and of about this many of its tokens, in blocks spread evenly over it."""
    blocks = min(-(-stream.tokens // DIGEST_BLOCK), max(1, tokens // DIGEST_BLOCK))
    length = min(DIGEST_BLOCK, stream.tokens)
    digest = hashlib.sha256(str(stream.tokens).encode())
    block = np.empty(length, dtype=stream.dtype)
    for start in np.linspace(0, stream.tokens - length, blocks).astype(np.int64).tolist():
        stream.fill(start, block)
        digest.update(block.tobytes())
    return digest.hexdigest()[:12]


def check_same_data(recorded, data, where):
    """Raise UserError if the data is not that of a checkpoint: it names the folder, what was found and what was
    expected. recorded: the Mixture.fingerprint() in the checkpoint; where: names the checkpoint."""
    for folder, now in data.fingerprint().items():
        was = recorded.get(folder, {})
        different = [name for name in dict.fromkeys([*now, *was]) if now.get(name) != was.get(name)]
        if different == ["packing"]:
            changed = "are not packed now, as they were" if was.get("packing") else "are packed now, and were not"
            remedy = "true" if was.get("packing") else "false"
            raise UserError(
                f"data.document_mask: the conversations of {folder} {changed} in {where}; set it to {remedy}"
            )
        if different:
            found = ", ".join(f"{name} {now.get(name)}" for name in different)
            expected = ", ".join(str(was.get(name)) for name in different)
            raise UserError(
                f"{folder}: found {found}, expected {expected} as in {where}; "
                "restore that data, or start another run with --train.out_dir"
            )
