"""The learning rate of each step."""

import math


def learning_rate(train, tokens):
    """The rate of the step that ends at `tokens`: linear warm-up, then train.schedule from the peak train.lr down to
    train.min_lr_ratio of it at train.max_tokens. Counted in tokens, so it means the same on any number of GPUs
    (GPT-3: Brown et al. 2020, arXiv 2005.14165, appendix B). train: a TrainConfig."""
    if tokens < train.warmup_tokens:
        return train.lr * tokens / train.warmup_tokens
    progress = min(1.0, (tokens - train.warmup_tokens) / max(1, train.max_tokens - train.warmup_tokens))
    if train.schedule == "range":  # of a learning-rate range test: rises exponentially
        return train.lr * train.min_lr_ratio ** (1 - progress)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[train.schedule]
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * remaining)
