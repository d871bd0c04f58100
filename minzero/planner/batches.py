"""Batches that train.py takes: each rank has whole micro-batches of a step, and each step has global_batch_tokens."""

import dataclasses
import math

from minzero.config.values import as_flag, divisors
from minzero.errors import UserError
from minzero.schedule import SHAPES_THE_BATCH, possible_jumps

MOST_CHANGE = 0.1  # of global_batch_tokens, for a micro-batch that would be less than a quarter otherwise


def with_batch(config, micro_batch_size, global_batch_tokens=None):
    """A Config with another micro-batch, and perhaps another batch of a step; the rest is shared with the given one."""
    batch = {"micro_batch_size": micro_batch_size}
    if global_batch_tokens:
        batch["global_batch_tokens"] = global_batch_tokens
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **batch))


def sequences_of_rank(config, gpus):
    """Sequences of one rank in a step, or where the batch grows, what their number is always a multiple of; None where
    they are not whole."""
    train = config.train
    tokens = math.gcd(train.global_batch_tokens, train.first_batch_tokens or 0)
    share, rest = divmod(tokens, config.model.block_size * gpus)
    return share if share and not rest else None


def micro_batches(config, gpus):
    """Micro-batch sizes by which each rank's share of the global batch divides, the largest first; 1 if none."""
    return divisors(sequences_of_rank(config, gpus) or 1)[::-1]


def is_legal(config, gpus):
    """Whether train.py takes this batch on this many GPUs."""
    share = sequences_of_rank(config, gpus)
    return share is not None and share % config.train.micro_batch_size == 0


def legal_batch(config, gpus):
    """The nearest Config whose batch train.py takes on this many GPUs; the given one if it does. global_batch_tokens
    stays where the GPUs divide its sequences, else it is the nearest that they do; then the micro-batch is the nearest
    that divides. Where that is less than a quarter, as of a prime number of sequences, the micro-batch stays and
    global_batch_tokens is the nearest that takes it, if that is within MOST_CHANGE. first_batch_tokens follows. Raises
    UserError if the run is shorter than a sequence for each GPU."""
    if is_legal(config, gpus):
        return config
    if first := config.train.first_batch_tokens:
        legal = legal_batch(with_first_batch(config, None), gpus)
        whole = legal.train.micro_batch_size * config.model.block_size * gpus
        nearest = max(1, round(first / whole)) * whole
        last = legal.train.global_batch_tokens
        return with_first_batch(legal, min(nearest, last - whole), config.train)
    train, one_each = config.train, config.model.block_size * gpus
    below = train.global_batch_tokens // one_each * one_each
    above = below + one_each
    is_nearer = train.global_batch_tokens - below <= above - train.global_batch_tokens
    tokens = below if below and (is_nearer or above > train.max_tokens) else above
    if tokens > train.max_tokens:
        raise UserError(
            f"--gpus: {gpus} GPUs take a sequence of {config.model.block_size} tokens each, {one_each} in a step, more "
            f"than train.max_tokens {train.max_tokens}; give fewer"
        )
    sizes = divisors(tokens // one_each)
    size = min(sizes, key=lambda size: abs(size - train.micro_batch_size))
    whole = one_each * train.micro_batch_size
    nearest = max(1, round(train.global_batch_tokens / whole)) * whole
    change = abs(nearest / train.global_batch_tokens - 1)
    if 4 * size < train.micro_batch_size and change <= MOST_CHANGE and nearest <= train.max_tokens:
        return with_batch(config, train.micro_batch_size, nearest)
    return with_batch(config, size, tokens)


def with_first_batch(config, tokens, ramp=None):
    """A Config with another batch of the first step, 0 or None for a batch that does not grow. ramp: a TrainConfig that
    says how it grows; where the sizes do not have room for as many jumps, there are fewer."""
    grows = {"first_batch_tokens": None, "batch_ramp_tokens": 0, "batch_ramp_jumps": 0}
    if tokens:
        jumps = possible_jumps(tokens, config.train.global_batch_tokens, ramp.batch_ramp_jumps)
        grows = dict(zip(grows, (tokens, ramp.batch_ramp_tokens, jumps), strict=True))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **grows))


def changed_batch(given, legal):
    """{key: value} in which the batches of two configurations differ."""
    names = (*SHAPES_THE_BATCH, "micro_batch_size")
    return {
        f"train.{name}": getattr(legal.train, name)
        for name in names
        if getattr(given.train, name) != getattr(legal.train, name)
    }


def refused_batch(given, legal, gpus):
    """A line on a batch that train.py refuses, and the nearest one that it takes."""
    train, block = given.train, given.model.block_size
    whole = gpus * train.micro_batch_size * block
    tokens = train.global_batch_tokens
    if train.first_batch_tokens and tokens % whole == 0:
        tokens = train.first_batch_tokens
    found = f"{tokens:,} tokens a step are not a multiple of"
    line = f"train.py refuses this batch: {found} {gpus} GPUs x micro-batch {train.micro_batch_size} x {block:,} tokens"
    change = changed_batch(given, legal)
    flags = []
    for key, value in change.items():
        flags.append(f"--{key} {as_flag(value)}")
        if key == "train.global_batch_tokens":
            share = value / train.global_batch_tokens - 1
            flags[-1] += f" ({abs(share):.1%} {'more' if share > 0 else 'less'} in a step)"
    return f"{line}; planned is the nearest that it takes: {' '.join(flags)}"
