"""Pairs of answers, and their shards."""

import numpy as np

from minzero.data import pipeline
from minzero.data.conversations import PAIR, with_marks


class Pairs(list):
    description = "pairs"
    meta = {"pairs": True}
    settings = {"pairs": True}


def rows(count=24):
    """Rows of a data set in TRL's explicit format, of lists of messages."""
    generator = np.random.default_rng(3)
    found = []
    for number in range(count):
        answers = ("yes, " * int(generator.integers(1, 7)), "no. " * int(generator.integers(1, 7)))
        chosen, rejected = ([{"role": "assistant", "content": text.strip()}] for text in answers)
        found.append({"prompt": [{"role": "user", "content": f"{number}?"}], "chosen": chosen, "rejected": rejected})
    return found


def write_pairs(folder, found=None, tokenizer="bytes", val_fraction=0.3):
    """Prepare rows as shards. Returns the folder."""
    pairs = Pairs()
    for number, row in enumerate(rows() if found is None else found):
        halves = [with_marks("x", row["prompt"] + row[name]) for name in ("chosen", "rejected")]
        pairs.append((f"pair {number}", PAIR.join(halves)))
    flags = ["--out", str(folder), "--val_fraction", str(val_fraction), "--workers", "1"]
    pipeline.prepare(pairs, tokenizer, pipeline.options("", ".").parse_args(flags), loss_mask=True)
    return folder
