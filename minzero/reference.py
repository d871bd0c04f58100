"""The reference of preference tuning: the log-probability of every answer by the model that the tuning starts from.

    out/<run>/reference.safetensors    for each split of each data folder: (answers,) float32, in nats

It is computed once, before the first step, when the model that is trained still is the reference: so there is never a
second model in memory. Checkpoints and config.json record its digest, by which a run that continues knows it again.
"""

import hashlib
import json
import time
from pathlib import Path

import numpy as np

from minzero.checkpoint import as_rank_0
from minzero.errors import UserError, describe
from minzero.evaluate_pairs import answer_log_probabilities
from minzero.files import is_regular, write_atomically
from minzero.store import REFERENCE


def digest_of(content):
    return hashlib.sha256(content).hexdigest()[:16]


def key_of(stream):
    """The name of a PairStream's tensor: another one where it has other answers."""
    return digest_of(json.dumps([stream.fingerprint(), stream.split, stream.block_size]).encode())


# -- computing -----------------------------------------------------------------------------------


def compute(model, streams, *how, **more):
    """Set the reference of PairStreams by this model. Other arguments: as of
    `evaluate_pairs.answer_log_probabilities`. Every rank must call this. Leaves the model in evaluation mode."""
    for stream in streams:
        found, _ = answer_log_probabilities(model, stream, list(range(stream.windows)), *how, **more)
        stream.reference = found.numpy().astype(np.float32)


def provide(run, engine, start, streams):
    """Give PairStreams of the training and the validation split their reference: computed by the engine at the start of
    a run, else as the run has it. Returns the digest of its file. Every rank must call this. Raises SharedError."""
    from minzero import dist  # it alone needs DeepSpeed, which eval.py in one process does not

    if start.path:
        digest = start.state.get("reference")
        content = as_rank_0(lambda: read([run.folder.path, start.path.resolve().parents[1]], digest))
        attach(content, streams)
    else:
        began = time.perf_counter()
        compute(engine, streams, run.config.train.micro_batch_size, *run.group, progress=run.watchdog.turn)
        engine.train()
        content = as_rank_0(lambda: as_file(streams))
        answers = sum(len(stream.reference) for stream in streams)
        seconds = time.perf_counter() - began
        dist.print0(f"reference: {answers:,} answers in {seconds:.2f} s, kept in {run.folder.path / REFERENCE}")
    with dist.all_or_none():
        if run.group.rank == 0:
            write_atomically(run.folder.path / REFERENCE, content)
    return digest_of(content)


# -- the file ------------------------------------------------------------------------------------


def as_file(streams):
    """The bytes of the file for these PairStreams."""
    from safetensors.numpy import save

    return save({key_of(stream): stream.reference for stream in streams})


AGAIN = "start again from train.init_from with another --train.out_dir"


def read(folders, digest, remedy=AGAIN):
    """The bytes of the file in the first of these run folders that has it whole. digest: as a checkpoint records it;
    None: of a run that had none. Raises UserError, which ends with a remedy."""
    if digest is None:
        raise UserError(
            f"train.loss: {folders[-1]} is a run without a reference, as its train.loss was next_token; give its model "
            "as --train.init_from, and another --train.out_dir"
        )
    for folder in folders:
        path = Path(folder) / REFERENCE
        if is_regular(path) and digest_of(content := path.read_bytes()) == digest:
            return content
    raise UserError(
        f"{Path(folders[0]) / REFERENCE}: missing or damaged; restore it from a copy of the run, or {remedy}"
    )


def attach(content, streams, remedy=AGAIN):
    """Set the reference of PairStreams by the bytes of the file. Raises UserError, which ends with a remedy, if they
    are not those of these answers."""
    from safetensors.numpy import load

    try:
        found = load(content)
    except Exception as error:  # the library's own
        raise UserError(f"{REFERENCE}: damaged ({describe(error)}); restore it from a copy of the run") from None
    for stream in streams:
        reference = found.get(key_of(stream))
        if reference is None or reference.shape != stream.reference.shape:
            raise UserError(
                f"{REFERENCE}: holds nothing of the {stream.split} split of {stream.folder} as it is now; restore "
                f"those data, or {remedy}"
            )
        stream.reference = reference.astype(np.float32)
