"""Documents -> tokens, in worker processes. The result does not depend on the number of workers.

Before and after each document stand the ids that its tokenizer wants there (tokenizer.begin, tokenizer.end). With a
loss mask (conversations.py), NO_LOSS is set in each token that is read but not learned, and STARTS in the first one;
what stands around a conversation is its chat template's.
"""

import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path

import numpy as np

from minzero.data.chat_templates import LEARNED, TemplateEncoder, without_marks
from minzero.data.conversations import NOT_LEARNED, PAIR, ChatEncoding
from minzero.data.documents import BadDocument, Dropped
from minzero.data.fast_encoding import BulkEncoder
from minzero.data.shards import MARKS, NO_LOSS, STARTS, token_dtype
from minzero.data.text import cut_for_tokenizer, cut_small, to_utf8
from minzero.errors import UserError, describe, panics_as_exceptions

BATCH = 1 << 20  # bytes sent to a worker at a time: enough to hide the cost of sending
BATCH_DOCUMENTS = 1 << 14  # and at most this many documents: even empty ones take memory
JOINED_AT_ONCE = 1 << 20  # tokens
ANSWERS = re.compile(f"([{LEARNED}{NOT_LEARNED}])(.*?)\\1".encode(), re.DOTALL)  # in this project's form


# -- in the workers ------------------------------------------------------------------------------


def start_worker(settings):
    """Make a worker process ready. settings: a file of `encode_batches`, in a folder for the results too."""
    global folder
    folder = settings.parent
    tokenizer, use_gigatoken, *how = pickle.loads(settings.read_bytes())
    use_encoder(BulkEncoder(tokenizer, use_gigatoken), *how)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # a worker whose parent was killed would wait for work for ever
        threading.Thread(target=lambda: connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def use_encoder(bulk_encoder, loss_mask=False, evaluation_texts=None, chat_encoding=None):
    """Make this process encode with a BulkEncoder. loss_mask: the texts have separators, see conversations.py.
    evaluation_texts: a clean.Evaluation, whose text is left out, or None. chat_encoding: a ChatEncoding, or None for
    its defaults."""
    global encoder, with_loss_mask, evaluation, chat, template_encoder
    encoder = bulk_encoder
    with_loss_mask = loss_mask
    evaluation = evaluation_texts
    chat = chat_encoding or ChatEncoding()
    template_encoder = TemplateEncoder(encoder.tokenizer.to_json()) if chat.by_template else None


def encode_batch(batch):
    """[(split, key, text in UTF-8, BadDocument or Dropped)] -> {split: (tokens, documents, bytes of text, documents
    that were cut)} and [(key, BadDocument or Dropped)] of those that are left out, in order."""
    if evaluation is not None:
        batch = evaluation.mark(batch)
    parts = {}  # split -> arrays of tokens
    counts = {}  # split -> (documents, bytes, documents that were cut)
    left_out = []
    for split, key, text in batch:
        if isinstance(text, Dropped):
            left_out.append((key, text))
            continue
        try:
            if isinstance(text, BadDocument):
                raise text
            arrays, size, is_cut = encode_document(key, text)
        except BadDocument as error:
            left_out.append((key, error))
            continue
        if isinstance(arrays, Dropped):
            left_out.append((key, arrays))
            continue
        parts.setdefault(split, []).extend(arrays)
        documents, size_before, cut = counts.get(split, (0, 0, 0))
        counts[split] = documents + 1, size_before + size, cut + is_cut
    return {split: (joined(arrays), *counts[split]) for split, arrays in parts.items()}, left_out


def encode_batch_to_file(number, batch):
    """As `encode_batch`, in a worker. The result goes into a file, which is returned: of a worker that is killed while
    it sends megabytes through the pool's pipe, the parent would wait for the rest for ever. Where there is no room for
    the file, the result itself is returned."""
    result = encode_batch(batch)
    path = folder / str(number)
    try:
        path.write_bytes(pickle.dumps(result, pickle.HIGHEST_PROTOCOL))
    except OSError:
        path.unlink(missing_ok=True)
        return result
    return path


def joined(arrays):
    """uint32 arrays of tokens as one in the shards' type; the list is emptied. Raises UserError for an id that the
    tokenizer should not have given."""
    n_vocab = encoder.tokenizer.n_vocab
    tokens = np.empty(sum(map(len, arrays)), dtype=token_dtype(n_vocab, with_loss_mask))
    place = 0
    arrays.reverse()
    while arrays:  # some at a time, so that a large document is not in memory twice
        some = [arrays.pop()]
        while arrays and len(some) < 1024 and len(some[-1]) < JOINED_AT_ONCE:
            some.append(arrays.pop())
        some = np.concatenate(some)
        largest = (some & ~MARKS if with_loss_mask else some).max(initial=0)
        if largest >= n_vocab:
            raise UserError(f"--tokenizer: {encoder.tokenizer.name} gave id {largest}, expected below {n_vocab}")
        tokens[place : place + len(some)] = some
        place += len(some)
    return tokens


def encode_document(key, text):
    """A document's tokens, as a list of uint32 arrays; the bytes of its text that are learned; whether it was cut.
    text: in UTF-8. Of a conversation of which nothing is left under max_tokens, a Dropped in place of the arrays.
    Raises BadDocument."""
    if not with_loss_mask:
        begin, end = (np.array(ids, dtype=np.uint32) for ids in (encoder.tokenizer.begin, encoder.tokenizer.end))
        return [begin, *encode_text(key, text), end], len(text), False
    if not chat.pairs:
        return encode_conversation(key, text)
    found = [encode_conversation(key, part) for part in text.split(PAIR.encode())]
    for arrays, _, is_cut in found:
        if is_cut or isinstance(arrays, Dropped):  # of a pair, both answers are kept whole or none
            return Dropped("too_long", f"more than {chat.max_tokens} tokens of an answer and its prompt"), 0, False
    return [array for arrays, _, _ in found for array in arrays], sum(size for _, size, _ in found), False


def encode_conversation(key, text):
    """As `encode_document`, one conversation."""
    arrays, ends, sizes = (encode_by_template if chat.by_template else encode_own_form)(key, text)
    tokens = sum(map(len, arrays))
    if chat.learn_all:
        arrays, sizes = [without_mask(arrays)], sizes_of_all(text)
    if chat.max_tokens is None or tokens <= chat.max_tokens:
        return marked_start(arrays), sum(sizes), False
    fitting = [end for end in ends if end <= chat.max_tokens]
    if not fitting:
        return Dropped("too_long", f"{tokens} tokens, and no whole answer within {chat.max_tokens}"), 0, False
    return marked_start([np.concatenate(arrays)[: fitting[-1]]]), sum(sizes[: len(fitting)]), True


def encode_own_form(key, text):
    """A conversation in this project's form: its tokens, as a list of uint32 arrays; for each learned answer, the
    number of tokens up to its end; for each, its bytes of text. Raises BadDocument."""
    end_of_text = np.array([encoder.tokenizer.end_of_text], dtype=np.uint32)
    arrays = [np.array(encoder.tokenizer.begin, dtype=np.uint32) | NO_LOSS]
    ends = []
    sizes = []
    place = 0
    for answer in ANSWERS.finditer(text):
        arrays += (part | NO_LOSS for part in encode_text(key, text[place : answer.start()]))
        place = answer.end()
        tokens = [*encode_answer(key, answer[2]), end_of_text]  # the end of text after it is learned as well
        if answer[1] == LEARNED.encode():
            arrays += tokens
            ends.append(sum(map(len, arrays)))
            sizes.append(len(answer[2]))
        else:
            arrays += (part | NO_LOSS for part in tokens)
    arrays += (part | NO_LOSS for part in encode_text(key, text[place:]))
    return arrays, ends, sizes


def encode_by_template(key, text):
    """As `encode_own_form`, for a text of a ChatTemplate."""
    text = text.decode()
    if unknown := "".join(encoder.tokenizer.missing_characters(without_marks(text))[:20]):
        raise BadDocument(key, f"could not be tokenized (no token for {unknown!r})", "choose another --tokenizer")
    try:
        with panics_as_exceptions():
            found = template_encoder.encode(text)
    except Exception as error:
        raise BadDocument(key, f"could not be tokenized ({describe(error)})", "choose another --tokenizer") from None
    if not len(found.ids):
        raise BadDocument(key, "the chat template writes nothing", "choose another --chat_template")
    return [np.where(found.learned, found.ids, found.ids | NO_LOSS)], found.ends, found.sizes


def marked_start(arrays):
    """The same uint32 arrays of a conversation's tokens, with STARTS set in the first token."""
    first = next(number for number, array in enumerate(arrays) if len(array))
    arrays[first] = arrays[first].copy()
    arrays[first][0] |= STARTS
    return arrays


def without_mask(arrays):
    """The same uint32 arrays as one, in which only the first token is not learned, because none is before it."""
    tokens = np.concatenate(arrays) & ~NO_LOSS
    tokens[0] |= NO_LOSS
    return tokens


def sizes_of_all(text):
    """The bytes of a conversation up to the end of each learned answer, without those up to the one before; and last
    those after all answers. text: with separators, in UTF-8."""
    *parts, rest = (len(without_marks(part).encode()) for part in text.decode().split(LEARNED))
    return [*map(sum, zip(parts[::2], parts[1::2], strict=True)), rest]


def encode_answer(key, text):
    """The tokens of an answer, as `encode_text` gives them: without the space that some tokenizers put before a text,
    for here it follows the line end of its heading."""
    if encoder.tokenizer.adds_space:
        line = joined(encode_text(key, b"\n"))
        whole = joined(encode_text(key, b"\n" + text))
        if np.array_equal(whole[: len(line)], line):
            return [whole[len(line) :]]
    return encode_text(key, text)


def encode_text(key, text):
    """The tokens of a text in UTF-8, as a list of uint32 arrays. Raises BadDocument."""
    # a foreign tokenizer's pattern may fail on a long text
    for cut in (cut_for_tokenizer, cut_small):
        try:
            with panics_as_exceptions():
                return [encoder.encode(piece) for piece in cut(text)]
        except Exception as error:
            failure = describe(error)
        if unknown := "".join(encoder.tokenizer.missing_characters(text.decode())[:20]):
            failure = f"no token for {unknown!r}"
            break
    raise BadDocument(key, f"could not be tokenized ({failure})", "choose another --tokenizer")


# -- in the parent -------------------------------------------------------------------------------


def make_batches(documents, most, side):
    """Group (key, text) pairs into lists of (split, key, text in UTF-8), each of about this many bytes and at most
    BATCH_DOCUMENTS documents. side: key -> split. A BadDocument or Dropped stands in place of some texts."""
    batch = []
    size = 0
    for key, text in documents:
        if isinstance(text, str):
            text = to_utf8(text)
            size += len(text)
        elif not isinstance(text, BadDocument | Dropped):
            text = BadDocument(key, f"found {type(text).__name__}, expected a string")
        batch.append((side(key), key, text))
        text = None
        if size >= most or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def encode_batches(batches, workers, encoder, *how):
    """Yield `encode_batch` of each batch, in order. At most 4 batches a worker are in memory. encoder: a BulkEncoder,
    of which each worker makes its own; how: the other arguments of `use_encoder`."""
    if workers == 1:
        use_encoder(encoder, *how)
        yield from map(encode_batch, batches)
        return
    with tempfile.TemporaryDirectory() as folder:
        # in a file: the pipe to a worker that dies at its start would take no more than a few kilobytes, and block
        settings = Path(folder) / "settings"
        settings.write_bytes(pickle.dumps((encoder.tokenizer, encoder.quick is not None, *how)))
        yield from encode_in_workers(batches, workers, settings)


def encode_in_workers(batches, workers, settings):
    """As `encode_batches`. settings: the file for `start_worker`."""
    # spawn: the parent may have threads (datasets, tokenizers) that do not survive a fork
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (settings,))
    pending = deque()

    def next_result():
        result = pending.popleft().result()
        if not isinstance(result, Path):
            return result
        content = result.read_bytes()
        result.unlink()
        return pickle.loads(content)

    try:
        for number, batch in enumerate(batches):
            # submit may start workers, which inherit the blocked signal: the parent alone handles Ctrl-C
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending.append(pool.submit(encode_batch_to_file, number, batch))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if len(pending) == 4 * workers:
                yield next_result()
        while pending:
            yield next_result()
    except BrokenProcessPool:
        raise UserError(
            "--workers: a worker process was killed, perhaps for want of memory; run the same command again, it "
            "continues after the last finished shard; fewer --workers need less memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
