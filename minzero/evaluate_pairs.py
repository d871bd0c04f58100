"""Pairs of answers under a model: the log-probability of each answer, the loss, and how often the better one wins."""

import contextlib

import numpy as np
import torch
from torch import distributed

from minzero.evaluate_loss import read_windows
from minzero.preference import METRICS
from minzero.trained import best_device


@contextlib.contextmanager
def sums_of_each_answer(model):
    """Gives a list to which each forward pass over pairs appends (2, answers) float64: of each answer the
    log-probability of its learned tokens in nats, and their number."""
    model = getattr(model, "module", model)
    own = model.preference
    found = []

    def keep(log_probabilities, reference, tokens):
        found.append(torch.stack((log_probabilities, tokens)))
        return log_probabilities.sum()

    model.preference = keep
    try:
        yield found
    finally:
        model.preference = own


@torch.no_grad()
def answer_log_probabilities(
    model, stream, windows, batch_size, device=None, rank=0, world_size=1, progress=lambda: None
):
    """Of each answer in these windows of a PairStream the log-probability of its learned tokens in nats, and their
    number, (2, answers of the split) float64 on the CPU, zeros elsewhere. progress: called before each forward pass,
    which has batch_size rows. Every rank must call this, and all get all. Leaves the model in evaluation mode."""
    device = device or best_device()
    model.eval()
    found = torch.zeros(2, len(stream.lengths), dtype=torch.float64, device=device)
    with sums_of_each_answer(model) as sums:
        for first in range(0, len(windows), batch_size * world_size):
            start = first + rank * batch_size
            mine = windows[start : start + batch_size]
            # a rank without windows still runs a forward pass: ZeRO-3's gathers are collective
            inputs, targets, positions, reference = read_windows(stream, mine, batch_size)
            progress()  # after the reading, which may hang on one rank
            sums.clear()
            model(inputs.to(device), targets.to(device), positions, reference)
            if mine:
                found[:, answers_in(stream, mine)] = sums[0]
    if world_size > 1:
        distributed.all_reduce(found)
    return found.cpu()


def answers_in(stream, windows):
    """The numbers of the answers in some windows of a PairStream, in their order there, (n,) int64."""
    return np.concatenate([stream.documents_in(window) for window in windows])


def evaluate_pairs(model, parts, preference, *how, **more):
    """{name of preference.METRICS: its mean over the pairs, "pairs": their number}. parts: [(PairStream with its
    reference, numbers of windows)]; preference: a Preference; the other arguments: as of `answer_log_probabilities`.
    Every rank must call this."""
    found = []
    for stream, windows in parts:
        log_probabilities, tokens = answer_log_probabilities(model, stream, windows, *how, **more)
        answers = answers_in(stream, windows)
        reference = torch.from_numpy(stream.reference[answers]).double()
        found.append(preference.of_pairs(log_probabilities[answers], reference, tokens[answers]))
    found = torch.cat(found)
    return dict(zip(METRICS, found.mean(dim=0).tolist(), strict=True)) | {"pairs": len(found)}


def validation_of_pairs(model, data, wanted_tokens, *how, **more):
    """`evaluate_pairs` over some of a Mixture's validation windows during training: the same at every call. Leaves the
    model in training mode."""
    windows = data.validation_windows(wanted_tokens // data.block_size)
    parts = [(data.streams[number], own.tolist()) for number, _, own in data.by_stream(windows)]
    preference = getattr(model, "module", model).preference
    found = evaluate_pairs(model, parts, preference, *how, **more)
    model.train()
    return found
