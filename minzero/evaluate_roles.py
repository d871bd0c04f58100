"""Held-out conversations in parts: the loss of each role's words, also of those that are only read, and the
assistant's by the length of the conversation and by the number of the answer."""

import bisect
import math

import numpy as np
import torch
from torch import distributed

from minzero.data.chat_templates import ChatTemplate
from minzero.data.conversations import learned_template
from minzero.data.packing import PackedStream
from minzero.data.pipeline import tokenizer_of
from minzero.data.shards import NO_LOSS
from minzero.errors import UserError
from minzero.evaluate_loss import loss_of_each_token
from minzero.sizes import IGNORE_INDEX
from minzero.trained import best_device

ROLES = ("system", "user", "assistant")
SHORTEST = 64  # tokens: conversations up to so many are one group, each further group reaches twice as far
ANSWERS = ("1", "2", "3", "4 and more")
PROBE = [("system", "words of the system"), ("user", "words of the user"), ("assistant", "words of the assistant")]


def squeezed(text):
    """A text without blanks: some tokenizers add one at the start, and some special tokens take those after them."""
    return "".join(text.split())


def system_marks(template):
    """By what a system message is found in a conversation: (the line that begins it, the text between it and the
    user's message), both `squeezed`. None where the ChatTemplate takes no such message, or makes it a part of the
    user's."""

    def before_user(messages):
        text = template.render([{"role": role, "content": content} for role, content in messages])[0]
        return text[: text.index(PROBE[1][1])]

    try:
        begin, _, between = before_user(PROBE).partition(PROBE[0][1])
        plain = squeezed(before_user(PROBE[1:]))
    except Exception:  # a template may raise anything
        return None
    begin, between = squeezed("".join(begin.partition("\n")[:2])), squeezed(between)
    is_always_there = plain.endswith(between)  # with words of its own
    if not between or (plain.startswith(begin) and not is_always_there):
        return None
    return begin, between


class Roles:
    """Tells who says a token of the conversations of a PackedStream. Raises UserError if its shards do not."""

    def __init__(self, stream):
        if not isinstance(stream, PackedStream):
            found = "conversations, but data.document_mask is false" if stream.loss_mask else "no conversations"
            raise UserError(f"--by_role: {stream.folder}: found {found}; expected conversations, each by itself")
        if stream.meta.get("learn") == "all":
            raise UserError(
                f"--by_role: {stream.folder}: was prepared with --learn all, which does not keep the roles; prepare "
                "the same conversations with --learn assistant, and give them as --data"
            )
        self.tokenizer = tokenizer_of(stream.folder)
        text = learned_template(self.tokenizer, [stream.folder])
        self.marks = system_marks(ChatTemplate(self.tokenizer.as_transformers(None), text, "of the data"))

    def of(self, ids, learned):
        """The number in ROLES of each token, (n,) int64: assistant where it is learned, system from the first token up
        to the text between a system message and the user's, else user: headings, results of tools, and answers that
        are not learned as well. ids: of a conversation, (n,). learned: (n,) bool."""
        roles = np.where(learned, 2, 1)
        if self.marks:
            before = ids[: int(learned.argmax())].tolist()
            text = squeezed(self.tokenizer.decode(before))
            begin, between = self.marks
            place = text.find(between) if text.startswith(begin) else -1
            if place >= 0:
                roles[: self.tokens_until(before, place)] = 0
        return roles

    def tokens_until(self, ids, place):
        """How many of these ids stand for the first `place` characters of their `squeezed` text."""

        def characters(count):
            return len(squeezed(self.tokenizer.decode(ids[:count])))

        return bisect.bisect_left(range(len(ids)), place, key=characters)


class Groups:
    """The losses of tokens, added up in groups: of each role, of lengths, of answers."""

    def __init__(self, block_size):
        self.lengths = [SHORTEST]
        while self.lengths[-1] <= block_size:  # a conversation has block_size + 1 tokens at most
            self.lengths.append(2 * self.lengths[-1])
        self.first_length = len(ROLES)
        self.first_answer = self.first_length + len(self.lengths)
        size = self.first_answer + len(ANSWERS)
        self.nats = np.zeros(size)
        self.tokens = np.zeros(size)
        self.conversations = np.zeros(size)

    def of(self, roles, learned):
        """Of each target of a conversation its role's, its length's and its answer's group, (3, n - 1), where those
        that the assistant does not say are only in the first: -1 in the others. roles, learned: (n,) of its tokens."""
        length = self.first_length + bisect.bisect_left(self.lengths, len(roles))
        begins = learned & ~np.append(False, learned[:-1])
        answer = self.first_answer + np.minimum(begins.cumsum(), len(ANSWERS)) - 1
        self.conversations[length] += 1
        found = np.stack([roles, np.full(len(roles), length), answer])
        found[1:, ~learned] = -1
        return found[:, 1:]

    def add(self, groups, losses):
        """groups: (3, ...), as of `of`. losses: of the same targets in nats, (...) float64."""
        for of_one_kind in groups:
            counted = of_one_kind >= 0
            size = len(self.nats)
            self.nats += np.bincount(of_one_kind[counted], losses[counted], size)
            self.tokens += np.bincount(of_one_kind[counted], minlength=size)

    def add_ranks(self, device):
        """Add up those of all ranks. A collective: every rank must call it."""
        sums = torch.from_numpy(np.stack([self.nats, self.tokens, self.conversations])).to(device)
        distributed.all_reduce(sums)
        self.nats, self.tokens, self.conversations = sums.cpu().numpy()

    def result(self):
        """{"roles": {role: entry}, "lengths": {tokens at most: entry}, "answers": {number: entry}}, with an entry
        {"loss": nats per token, "tokens", and of lengths "conversations"} of each group that has tokens."""
        found = {"roles": {}, "lengths": {}, "answers": {}}
        kinds = [("roles", name) for name in ROLES]
        kinds += [("lengths", str(length)) for length in self.lengths] + [("answers", name) for name in ANSWERS]
        for number, (kind, name) in enumerate(kinds):
            if tokens := int(self.tokens[number]):
                found[kind][name] = {"loss": self.nats[number] / tokens, "tokens": tokens}
                if kind == "lengths":
                    found[kind][name]["conversations"] = int(self.conversations[number])
        return found


def read_rows(stream, windows, rows, roles, groups):
    """Windows of a PackedStream: (inputs, targets, all of whose tokens count, and positions), each (rows, block_size)
    int64; and the groups of the targets, (3, rows, block_size). Rows past the windows are empty."""
    inputs = np.zeros((rows, stream.block_size), dtype=np.int64)
    targets = np.full_like(inputs, IGNORE_INDEX)
    positions = np.tile(np.arange(stream.block_size), (rows, 1))
    of_targets = np.full((3, *inputs.shape), -1)
    for row, window in enumerate(windows):
        for document, of in stream.places_in(window):
            start, length = int(stream.document_starts[document]), int(stream.lengths[document])
            stored = np.empty(length, dtype=stream.dtype)
            stream.fill(start, stored)
            ids = stream.ids(stored, lambda token, start=start: start + token).astype(np.int64)
            learned = stored < NO_LOSS
            inputs[row, of], targets[row, of], positions[row, of] = ids[:-1], ids[1:], np.arange(length - 1)
            of_targets[:, row, of] = groups.of(roles.of(ids, learned), learned)
        positions[row, of.stop :] = np.arange(stream.block_size - of.stop)
    return tuple(map(torch.from_numpy, (inputs, targets, positions))), of_targets


@torch.no_grad()
def evaluate_roles(model, streams, batch_size=16, device=None, rank=0, world_size=1, progress=lambda: None):
    """The loss of all tokens of the conversations of these PackedStreams, in groups, see `Groups.result`. Every rank
    must call this, and all get all. progress: called before each forward pass. Raises UserError."""
    device = device or best_device()
    found = Groups(max(stream.block_size for stream in streams))
    for stream in streams:
        roles = Roles(stream)
        rows = min(batch_size, stream.windows)
        with loss_of_each_token(model) as token_losses:
            for first in range(0, stream.windows, batch_size * world_size):
                start = first + rank * batch_size
                mine = range(start, min(start + batch_size, stream.windows))
                # a rank without windows still runs a forward pass: ZeRO-3's gathers are collective
                (inputs, targets, positions), of_targets = read_rows(stream, mine, rows, roles, found)
                progress()
                token_losses.clear()
                model(inputs.to(device), targets.to(device), positions)
                losses = torch.cat(token_losses).double().view(targets.shape).cpu().numpy()
                found.add(of_targets, losses)
    if world_size > 1:
        found.add_ranks(device)
    return found.result()


def report_roles(result):
    """Lines about the result of `evaluate_roles`: a table."""
    lines = [f"{'':<26}{'loss':>9}{'perplexity':>12}{'tokens':>11}{'conversations':>15}"]
    words = {"roles": "{}'s words", "lengths": "of up to {} tokens", "answers": "answer {}"}
    for kind, entries in result.items():
        for name, entry in entries.items():
            perplexity = math.exp(min(entry["loss"], 700))
            count = f"{entry['conversations']:,}" if "conversations" in entry else ""
            lines.append(
                f"{words[kind].format(name):<26}{entry['loss']:>9.4f}{perplexity:>12.2f}{entry['tokens']:>11,}"
                f"{count:>15}"
            )
    return "\n".join(line.rstrip() for line in lines)
