"""The loss over a validation split, by training and by eval.py: of every token, with any number of ranks."""

import contextlib
import math

import torch
from torch import distributed
from torch.nn import functional as F

from minzero.data.shards import TokenStream
from minzero.sizes import IGNORE_INDEX
from minzero.trained import best_device


def windows_of(stream, wanted_tokens=None):
    """The numbers of the windows to evaluate. By default all of a TokenStream, also the last one, which may be short,
    so that every token but the first is predicted once; with wanted_tokens about that many tokens of a TokenStream or
    Mixture in whole windows, the same at every call."""
    if wanted_tokens is None:
        return list(range(stream.windows_and_rest))
    return stream.validation_windows(wanted_tokens // stream.block_size).tolist()


def read_windows(stream, windows, rows):
    """Inputs, targets and, where attention is within documents, positions of these windows, each (rows, block_size)
    int64; of pairs also the fourth array of a PairStream. Targets past the windows are IGNORE_INDEX."""
    inputs = torch.zeros(rows, stream.block_size, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    positions = torch.arange(stream.block_size).repeat(rows, 1)
    reference = torch.full(inputs.shape, math.nan)
    for row, window in enumerate(windows):
        first = window * stream.block_size
        is_short = isinstance(stream, TokenStream) and window >= stream.windows
        if is_short:
            found = stream.example(first, stream.tokens - 1 - first)
        else:
            found = (part[0] for part in stream.batch([window]))
        for out, part in zip((inputs, targets, positions, reference), found, strict=False):
            out[row, : len(part)] = torch.from_numpy(part)
    return (inputs, targets, positions, reference)[: 2 + stream.has_documents + stream.has_pairs]


def count_passes(stream, batch_size, world_size=1, wanted_tokens=None):
    """How often `window_losses` calls its progress."""
    return math.ceil(len(windows_of(stream, wanted_tokens)) / (batch_size * world_size))


@contextlib.contextmanager
def loss_of_each_token(model, likeliest=None):
    """Gives a list to which each forward pass with targets appends the cross-entropy of its tokens in nats, (N,)
    float32 tensors, chunk by chunk. likeliest: a list that gets, likewise, whether each target was the likeliest token.
    The model computes its own loss again after this block."""
    head = getattr(model, "module", model).head
    own = vars(head).get("cross_entropy")  # of a compiled model; else it is the class's
    found = []

    def keep(logits, targets, picked, vocab_size, with_gradient=True):
        logits = logits[:, :vocab_size].float()
        found.append(F.cross_entropy(logits, targets[:, 0], ignore_index=IGNORE_INDEX, reduction="none"))
        if likeliest is not None:
            likeliest.append(logits.argmax(dim=-1) == targets[:, 0])
        return found[-1].sum()

    head.cross_entropy = keep
    try:
        yield found
    finally:
        del head.cross_entropy
        if own:
            head.cross_entropy = own


@torch.no_grad()
def window_losses(
    model,
    stream,
    wanted_tokens=None,
    batch_size=16,
    device=None,
    rank=0,
    world_size=1,
    progress=lambda: None,
    always_full=False,
):
    """The summed cross-entropy in nats of each window of `windows_of`, (windows,) float64 on the CPU, and the number of
    targets that count. progress: called before each forward pass. always_full: every forward pass has batch_size rows,
    also where there are fewer windows, because a compiled model has been compiled for so many.

    A window's sum is its own, in float64: neither the batch nor the number of ranks that share the windows
    changes more than the rounding of the model's float32. Every rank must call this, and all get all."""
    device = device or best_device()
    windows = windows_of(stream, wanted_tokens)
    rows = batch_size if always_full else min(batch_size, len(windows))
    losses = torch.zeros(len(windows), dtype=torch.float64, device=device)
    count = torch.zeros(1, dtype=torch.float64, device=device)
    with loss_of_each_token(model) as token_losses:
        for first in range(0, len(windows), batch_size * world_size):
            start = first + rank * batch_size
            mine = windows[start : start + batch_size]
            # a rank without windows still runs a forward pass: ZeRO-3's gathers are collective
            inputs, targets, *positions = read_windows(stream, mine, rows)
            progress()  # after the reading, which may hang on one rank: the others wait for it in the forward pass
            token_losses.clear()
            model(inputs.to(device), targets.to(device), *positions)
            sums = torch.cat(token_losses).double().view(targets.shape).sum(dim=1)
            losses[start : start + len(mine)] = sums[: len(mine)]
            count += (targets != IGNORE_INDEX).sum()
    if world_size > 1:
        distributed.all_reduce(losses)
        distributed.all_reduce(count)
    return losses.cpu(), int(count)


def validation_loss(model, stream, wanted_tokens, batch_size, device, rank=0, world_size=1, progress=lambda: None):
    """Mean cross-entropy in nats per token over some of the validation windows, during training: the same windows at
    every call; NaN if no target counts. Every rank must call this; arguments as of `window_losses`. Leaves the model in
    training mode."""
    model.eval()
    losses, count = window_losses(
        model, stream, wanted_tokens, batch_size, device, rank, world_size, progress, always_full=True
    )
    model.train()
    return losses.sum().item() / count if count else math.nan
