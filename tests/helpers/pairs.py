"""Pairs of answers, and their shards."""

import numpy as np

from minzero.data import pipeline
from minzero.data.documents import Source
from minzero.data.preferences import Preferences


class Rows(Source):
    """A source of rows."""

    description = "rows"
    fraction = None

    def __init__(self, found):
        self.found = found

    def __iter__(self):
        for number, row in enumerate(self.found):
            yield f"row {number}", row


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
    flags = ["--out", str(folder), "--val_fraction", str(val_fraction), "--workers", "1"]
    pairs = Preferences(Rows(rows() if found is None else found))
    pipeline.prepare(pairs, tokenizer, pipeline.options("", ".").parse_args(flags), loss_mask=True)
    return folder
