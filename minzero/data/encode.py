"""Documents -> tokens, in worker processes. The result does not depend on the number of workers.

Each document's tokens follow one end-of-text token. With a loss mask (conversations.py), NO_LOSS is set in each token
that is read but not learned.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

import numpy as np

from minzero.data.conversations import LEARNED
from minzero.data.documents import BadDocument, Dropped
from minzero.data.shards import NO_LOSS, token_dtype
from minzero.data.tokenizer import (
    END_OF_TEXT,
    cut_long_runs,
    faster,
    load_tokenizer,
    missing_characters,
    without_surrogates,
)
from minzero.errors import UserError

BATCH = 1 << 20  # characters sent to a worker at a time: enough to hide the cost of sending
BATCH_DOCUMENTS = 1 << 14  # and at most this many documents: even empty ones take memory
SMALL_PIECE = 10_000  # characters given to the tokenizer at a time where it fails on a whole text


# -- in the workers ------------------------------------------------------------------------------


def start_worker(tokenizer, loss_mask, evaluation_texts=None):
    """Load the tokenizer, once a process. evaluation_texts: a clean.Evaluation, or None."""
    global encoding, with_loss_mask, evaluation
    encoding = faster(load_tokenizer(tokenizer))
    with_loss_mask = loss_mask
    evaluation = evaluation_texts
    parent = multiprocessing.parent_process()
    if parent is not None:
        # a worker whose parent was killed would wait for work for ever
        threading.Thread(target=lambda: connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def encode_batch(batch):
    """[(split, key, text)], some with a BadDocument or Dropped as text -> {split: (tokens, documents, bytes of text)}
    and [(key, BadDocument or Dropped)] of those that are left out, in order."""
    if evaluation is not None:
        batch = evaluation.mark(batch)
    end_of_text = np.array([encoding._special_tokens[END_OF_TEXT]], dtype=np.uint32)
    parts = {}  # split -> arrays of tokens
    counts = {}  # split -> (documents, bytes)
    left_out = []
    for split, key, text in batch:
        if isinstance(text, Dropped):
            left_out.append((key, text))
            continue
        try:
            if isinstance(text, BadDocument):
                raise text
            if not isinstance(text, str):
                raise BadDocument(key, f"found {type(text).__name__}, expected a string")
            arrays, size = encode_document(key, text, end_of_text)
        except BadDocument as error:
            left_out.append((key, error))
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
    return result, left_out


def encode_document(key, text, end_of_text):
    """A document's tokens, as a list of uint32 arrays, and the bytes of its text that are learned. Raises
    BadDocument."""
    if not with_loss_mask:
        tokens, size = encode_text(key, text)
        return [end_of_text, *tokens], size
    arrays = [end_of_text | NO_LOSS]
    size = 0
    for number, piece in enumerate(text.split(LEARNED)):
        tokens, length = encode_text(key, piece)
        if number % 2:  # between two separators: learned, and so is the end of text after it
            arrays += *tokens, end_of_text
            size += length
        else:
            arrays += (part | NO_LOSS for part in tokens)
    return arrays, size


def encode_text(key, text):
    """The tokens of a text, as a list of uint32 arrays, and its length in bytes. Raises BadDocument."""
    ascii = text.isascii()  # then it has as many bytes as characters
    if not ascii:
        text = without_surrogates(text)
    size = len(text) if ascii else len(text.encode())
    small_pieces = (text[start : start + SMALL_PIECE] for start in range(0, len(text), SMALL_PIECE))
    for pieces in (cut_long_runs(text), small_pieces):  # a foreign tokenizer's pattern may fail on other texts
        try:
            # as encode_ordinary, but without a Python integer for each token, which costs a tenth of the time
            return [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces], size
        except BaseException as error:  # tiktoken's panics are not Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if unknown := "".join(missing_characters(encoding, text)[:20]):
            failure = f"no token for {unknown!r}"
            break
    raise BadDocument(key, f"could not be tokenized ({failure})", "choose another --tokenizer")


# -- in the parent -------------------------------------------------------------------------------


def make_batches(documents, characters, side):
    """Group (key, text) pairs into lists of (split, key, text), each of about this many characters and at most
    BATCH_DOCUMENTS documents. side: key -> split."""
    batch = []
    size = 0
    for key, text in documents:
        batch.append((side(key), key, text))
        size += len(text) if isinstance(text, str) else 0
        if size >= characters or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def encode_batches(batches, *settings, workers):
    """Yield `encode_batch` of each batch, in order. At most 4 batches a worker are in memory. settings: the arguments
    of `start_worker`."""
    if workers == 1:
        start_worker(*settings)
        yield from map(encode_batch, batches)
        return
    # spawn: the parent may have threads (datasets, tokenizers) that do not survive a fork
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, settings)
    try:
        pending = deque()
        for batch in batches:
            # submit may start workers, which inherit the blocked signal: the parent alone handles Ctrl-C
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending.append(pool.submit(encode_batch, batch))
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
