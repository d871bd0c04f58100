"""What changes from step to step, counted in tokens so that it means the same on any number of GPUs: the learning rate
and the tokens of a step."""

import itertools
import math

# keys of the train section, by what they shape; those that hold text come first
SHAPES_THE_RATE = ("schedule", "decay_shape", "lr", "min_lr_ratio", "warmup_tokens", "max_tokens", "decay_tokens")
SHAPES_THE_BATCH = ("global_batch_tokens", "first_batch_tokens", "batch_ramp_tokens", "batch_ramp_jumps")


def learning_rate(train, tokens):
    """The rate of the step that ends at `tokens`: linear warm-up, then train.schedule from the peak train.lr down to
    train.min_lr_ratio of it at train.max_tokens (GPT-3: Brown et al. 2020, arXiv 2005.14165, appendix B). train: a
    TrainConfig."""
    if tokens < train.warmup_tokens:
        return train.lr * tokens / train.warmup_tokens
    decay_begins = train.max_tokens - decay_tokens(train) if train.schedule == "wsd" else train.warmup_tokens
    progress = max(0.0, min(1.0, (tokens - decay_begins) / max(1, train.max_tokens - decay_begins)))
    if train.schedule == "range":  # of a learning-rate range test: rises exponentially
        return train.lr * train.min_lr_ratio ** (1 - progress)
    shape = train.decay_shape if train.schedule == "wsd" else train.schedule
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "constant": 1.0,
    }[shape]
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * remaining)


def decay_tokens(train):
    """Tokens of the decay at the end of a run with train.schedule wsd (warm-up, stable, decay). Where no number is
    given, a fifth of the run: with that, and 1 - sqrt as shape, Haegele et al. 2024 (arXiv 2405.18392) reach the loss
    of a cosine schedule of the same length."""
    return train.max_tokens // 5 if train.decay_tokens is None else train.decay_tokens


def batch_tokens(train, tokens):
    """Tokens of the step that begins at `tokens`. The batch grows from train.first_batch_tokens to
    train.global_batch_tokens over the run's first train.batch_ramp_tokens: linearly (as GPT-3's), or by the same factor
    train.batch_ramp_jumps times. It is a multiple of what divides both, and so divides by the ranks if both do."""
    first, last = train.first_batch_tokens or train.global_batch_tokens, train.global_batch_tokens
    if tokens >= train.batch_ramp_tokens:
        return last
    ramp, jumps = train.batch_ramp_tokens, train.batch_ramp_jumps
    if jumps:
        return size_of_jump(first, last, tokens * jumps // ramp, jumps)
    unit = math.gcd(first, last)
    return (first * ramp + (last - first) * tokens) // (ramp * unit) * unit  # whole numbers, so exact


def size_of_jump(first, last, number, jumps):
    """Tokens of a step after so many of all jumps."""
    unit = math.gcd(first, last)
    return round(first * (last / first) ** (number / jumps) / unit) * unit


def possible_jumps(first, last, most):
    """The largest number of jumps up to `most` that each change the size of a step, which is rounded; at least 1 where
    first < last."""
    for jumps in range(min(most, (last - first) // math.gcd(first, last)), 0, -1):
        sizes = (size_of_jump(first, last, number, jumps) for number in range(jumps + 1))
        if all(size < following for size, following in itertools.pairwise(sizes)):  # ends at the first that is equal
            return jumps
    return 0


def real_jumps(train):
    """How often the batch of a whole run grows: a step that is longer than the tokens between two jumps takes both."""
    return len({batch_tokens(train, end) for end in Steps(train).ends}) - 1


class Steps:
    """Where the steps of a run begin and end, from one of its checkpoints on.

    train: a TrainConfig. done, tokens: steps and tokens before. A step begins where the one before it ended, and its
    size depends on that place alone: so the steps after a checkpoint are the same whether the run stopped there or
    not. `total`: how many steps the whole run has; the last ends at train.max_tokens or less than a step before it."""

    def __init__(self, train, done=0, tokens=0):
        self.done = done
        self.last_batch = train.global_batch_tokens
        self.ends = [tokens]  # of step `done` and of those after it, as long as the batch grows
        while self.ends[-1] < train.batch_ramp_tokens:
            end = self.ends[-1] + batch_tokens(train, self.ends[-1])
            if end > train.max_tokens:
                self.total = done + len(self.ends) - 1
                return
            self.ends.append(end)
        whole = max(0, train.max_tokens - self.ends[-1]) // self.last_batch
        self.total = done + len(self.ends) - 1 + whole

    def tokens_at(self, step):
        """Tokens of the run after a step, which is `done` or a later one."""
        place = step - self.done
        known = min(place, len(self.ends) - 1)
        return self.ends[known] + (place - known) * self.last_batch

    def tokens_of(self, step):
        """Tokens of one step, a later one than `done`."""
        return self.tokens_at(step) - self.tokens_at(step - 1)
