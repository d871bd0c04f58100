"""Documents in windows, for attention within each: where they begin, and conversations that are packed by best fit.

A batch has a third array here, the position of each token in its document. A document that a window cuts begins at
position 0 in the next one. Pairs for preference tuning are packed by best fit as well.
"""

import bisect

import numpy as np

from minzero.data.meta import read_meta
from minzero.data.shards import NO_LOSS, TokenStream, document_of, holds_data, knows_documents
from minzero.errors import UserError
from minzero.nearest import suggesting
from minzero.sizes import IGNORE_INDEX

SCANNED = 1 << 22  # tokens read at a time to find the documents
SAMPLED = 64  # windows whose documents are measured


def positions_of(first):
    """Positions in documents, (..., n) int64. first: which tokens begin one, (..., n) bool; that of a row does."""
    places = np.broadcast_to(np.arange(first.shape[-1]), first.shape)
    begins = np.where(first, places, 0)
    return places - np.maximum.accumulate(begins, axis=-1)


def best_fit(sizes, room):
    """Put items into bins of `room`, each into the one with the least room left that takes it, the largest first: the
    bin of each item, (k,) int64, and the number of bins. sizes: (k,) integers, 1 to room.

    Best-fit decreasing (Johnson 1973, Near-optimal bin packing algorithms), as in Ding et al. 2024, arXiv 2404.10830,
    section 3."""
    bin_of = np.empty(len(sizes), dtype=np.int64)
    bins_with = {}  # room left -> bins
    rooms = []  # those that some bin has left, ascending
    count = 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            chosen, left = count, room
            count += 1
        else:
            left = rooms[place]
            chosen = bins_with[left].pop()
            if not bins_with[left]:
                del rooms[place]
        bin_of[item] = chosen
        left -= size
        if left:
            same = bins_with.setdefault(left, [])
            if not same:
                bisect.insort(rooms, left)
            same.append(chosen)
    return bin_of, count


class DocumentStream(TokenStream):
    """A TokenStream whose batches have the positions of tokens in their documents. A target is IGNORE_INDEX where it
    begins another document, unless that token is also the end of the one before.

    Raises UserError if nothing tells where the documents of the folder begin."""

    has_documents = True

    def __init__(self, folder, split, block_size):
        super().__init__(folder, split, block_size)
        if not knows_documents(self.meta):
            found = "no meta.json" if self.meta is None else "conversations of an earlier version"
            raise UserError(
                f"data.document_mask: {self.folder} does not say where its documents begin ({found}); prepare it "
                "again, or set data.document_mask to false"
            )

    @property
    def begins_another(self):
        """Whether the token that begins a document is not also the end of the one before."""
        return not self.loss_mask and bool(document_of(self.meta)[1])

    def summary(self):
        return f"{self.folder}: attention within documents, of {self.attended():,.0f} tokens for the mean token"

    def inputs_and_targets(self, tokens, position):
        inputs, targets = super().inputs_and_targets(tokens, position)
        first = self.begins_document(tokens)
        if self.begins_another:
            targets[first[..., 1:]] = IGNORE_INDEX
        return inputs, targets, positions_of(first[..., :-1])

    @property
    def is_uneven(self):
        return self.loss_mask or self.begins_another

    def attended(self):
        """The mean length of a token's document within its window, over some windows, in tokens."""
        windows = self.validation_windows(SAMPLED)
        positions = self.batch(windows)[2]
        return mean_attended(np.diff(np.append(np.flatnonzero(positions == 0), positions.size)))


def mean_attended(lengths):
    """The mean over all tokens of the length of their document. lengths: of the documents, (k,)."""
    lengths = np.asarray(lengths, dtype=np.float64)
    return float((lengths**2).sum() / lengths.sum())


class PackedStream(DocumentStream):
    """Conversations packed into windows by `best_fit`: each is whole in one window, as long as it has no more than
    block_size + 1 tokens, and what is longer is cut at the end. One of which that leaves no learned token is left out.
    What is left of a window does not count.

    A conversation of n tokens takes n - 1 places, because its last token is only a target."""

    def __init__(self, folder, split, block_size):
        super().__init__(folder, split, block_size)
        starts, answers = self.find_documents()
        self.choose(starts, np.diff(starts, append=self.tokens), answers)
        window_of, self.windows = self.pack()
        self.order = np.argsort(window_of, kind="stable")  # conversations window by window
        self.first = np.searchsorted(window_of[self.order], np.arange(self.windows + 1))  # of a window, in that order

    def choose(self, starts, lengths, answers):
        """Set `document_starts` and `lengths` of the conversations that are packed, `left_out`, `cut` and
        `tokens_lost`. starts, lengths, answers: of each conversation its first token, its number of tokens, and how
        many are before the first learned one, (k,) int64. Raises UserError if none is left."""
        block_size = self.block_size
        answered = answers <= block_size
        self.left_out = int((~answered).sum())
        if not answered.any():
            raise UserError(
                f"data.path: the {self.split} split of {self.folder}: none of its {len(starts):,} conversations has an "
                f"answer within model.block_size {block_size} tokens; raise model.block_size, or prepare shorter ones"
            )
        self.document_starts, lengths = starts[answered], lengths[answered]
        self.lengths = np.minimum(lengths, block_size + 1)
        self.cut = int((lengths > block_size + 1).sum())
        self.tokens_lost = int((lengths - self.lengths).sum())

    def pack(self):
        """The window of each conversation, (k,) int64, and the number of windows."""
        return best_fit(self.lengths - 1, self.block_size)

    def documents_in(self, window):
        """The numbers of the conversations in a window, in their order there, (n,) int64."""
        return self.order[self.first[int(window)] : self.first[int(window) + 1]]

    def places_in(self, window):
        """Yields the number of each conversation in a window, and the slice of its places there."""
        place = 0
        for document in self.documents_in(window):
            yield document, slice(place, place + int(self.lengths[document]) - 1)
            place += int(self.lengths[document]) - 1

    def count_windows(self):
        return None  # known when the conversations are

    @property
    def is_whole(self):
        return not (self.cut or self.left_out)

    @property
    def windows_and_rest(self):
        return self.windows

    @property
    def epoch_tokens(self):
        return self.windows * self.block_size

    def find_documents(self):
        """The places of the tokens that begin a conversation, and how many tokens are before the first learned one of
        it, both (k,) int64; the number of all tokens where none is learned."""
        starts, answers = [], []
        for start in range(0, self.tokens, SCANNED):
            tokens = np.empty(min(SCANNED, self.tokens - start), dtype=self.dtype)
            self.fill(start, tokens)
            starts.append(start + np.flatnonzero(self.begins_document(tokens)))
            learned = tokens < NO_LOSS
            learned[1:] &= tokens[:-1] >= NO_LOSS  # the first of some in a row
            answers.append(start + np.flatnonzero(learned))
        starts, answers = np.concatenate(starts), np.concatenate([*answers, [self.tokens]])
        next_answers = answers[np.searchsorted(answers, starts)]
        in_next = next_answers >= np.append(starts[1:], self.tokens)
        return starts, np.where(in_next, self.tokens, next_answers - starts)

    def batch(self, windows):
        """Window numbers -> inputs, targets and positions, each (len(windows), block_size) int64."""
        inputs = np.zeros((len(windows), self.block_size), dtype=np.int64)
        targets = np.full_like(inputs, IGNORE_INDEX)
        positions = np.empty_like(inputs)
        for row, window in enumerate(windows):
            for document, of in self.places_in(window):
                found = self.example(int(self.document_starts[document]), of.stop - of.start)
                inputs[row, of], targets[row, of], positions[row, of] = found
            positions[row, of.stop :] = np.arange(self.block_size - of.stop)
        return inputs, targets, positions

    def attended(self):
        rest = self.block_size - np.add.reduceat(self.lengths[self.order] - 1, self.first[:-1])
        return mean_attended(np.concatenate((self.lengths - 1, rest[rest > 0])))

    def fingerprint(self):
        return super().fingerprint() | {"packing": "best fit"}

    def summary(self):
        filled = (self.lengths - 1).sum() / self.epoch_tokens
        cut = f"; {self.cut:,} longer than that were cut, by {self.tokens_lost:,} tokens" if self.cut else ""
        if self.left_out:
            cut += f"; {self.left_out:,} without an answer in so many tokens were left out"
        return (
            f"{self.folder}: {len(self.lengths):,} conversations packed in {self.windows:,} windows of "
            f"{self.block_size:,} tokens, {filled:.1%} full{cut}"
        )


class PairStream(PackedStream):
    """Pairs of conversations, of which the first is preferred to the second: both whole in the same window, one after
    the other. A pair that is longer than a window is left out, and so is one of which a half has no learned token.

    A batch has a fourth array, (len(windows), block_size) float32: where a conversation begins, its `reference`;
    elsewhere NaN.

    reference: the log-probability of each conversation's learned tokens by the model that preference tuning starts
    from, in nats, (k,) float32; zeros until they are set."""

    has_pairs = True

    def __init__(self, folder, split, block_size):
        super().__init__(folder, split, block_size)
        self.reference = np.zeros(len(self.lengths), dtype=np.float32)

    def choose(self, starts, lengths, answers):
        if len(starts) % 2:
            raise UserError(
                f"data.path: the {self.split} split of {self.folder} holds {len(starts):,} conversations, expected two "
                "for each pair; prepare the data again"
            )
        places = (lengths - 1).reshape(-1, 2).sum(axis=1)
        whole = (places <= self.block_size) & (answers.reshape(-1, 2) < self.tokens).all(axis=1)
        self.left_out = int((~whole).sum())
        self.cut = self.tokens_lost = 0
        if not whole.any():
            raise UserError(
                f"data.path: the {self.split} split of {self.folder}: none of its {len(places):,} pairs fits in "
                f"model.block_size {self.block_size} tokens, both answers with their prompts; raise it to at least "
                f"{places.min():,}"
            )
        kept = np.repeat(whole, 2)
        self.document_starts, self.lengths = starts[kept], lengths[kept]

    def pack(self):
        window_of, windows = best_fit((self.lengths - 1).reshape(-1, 2).sum(axis=1), self.block_size)
        return np.repeat(window_of, 2), windows

    def batch(self, windows):
        arrays = super().batch(windows)
        reference = np.full(arrays[0].shape, np.nan, dtype=np.float32)
        for row, window in enumerate(windows):
            for document, of in self.places_in(window):
                reference[row, of.start] = self.reference[document]
        return *arrays, reference

    def fingerprint(self):
        return super().fingerprint() | {"packing": "best fit of pairs"}

    def summary(self):
        filled = (self.lengths - 1).sum() / self.epoch_tokens
        left_out = f"; {self.left_out:,} that are longer were left out" if self.left_out else ""
        return (
            f"{self.folder}: {len(self.lengths) // 2:,} pairs packed in {self.windows:,} windows of "
            f"{self.block_size:,} tokens, {filled:.1%} full{left_out}"
        )


def open_stream(folder, split, block_size, document_mask="auto"):
    """The stream of a folder that a person named. document_mask: as data.document_mask; auto: for conversations, unless
    they do not say where one begins. Its errors name the nearest folder of token shards where `folder` is none."""
    with suggesting(folder, holds_data):
        meta = read_meta(folder)
        is_masked = bool(meta and meta.get("loss_mask"))
        if meta and meta.get("pairs"):
            if document_mask is False:
                raise UserError(
                    f"data.document_mask: found false, but {folder} holds pairs of answers, which must not see each "
                    "other; set it to auto"
                )
            return PairStream(folder, split, block_size)
        if document_mask is False or (document_mask == "auto" and not (is_masked and knows_documents(meta))):
            return TokenStream(folder, split, block_size)
        return (PackedStream if is_masked else DocumentStream)(folder, split, block_size)
