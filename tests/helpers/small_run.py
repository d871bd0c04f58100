"""The config and the data of a run of some seconds, in a folder."""

import shutil

from minzero.files import write_json

MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64}
TRAIN = {"micro_batch_size": 2, "global_batch_tokens": 64, "max_tokens": 192, "eval_tokens": 64, "log_every": 1}
TRAIN |= {"save_every": 0, "eval_every": 0, "lr": 0.01}
LONG = ["--train.max_tokens", 64 * 100_000]


def write_small_run(folder, data):
    """Write config.json into a folder, and a copy of the shards in the folder `data`. Returns the folder."""
    shutil.copytree(data, folder / "data")
    zero = {"zero_optimization": {"stage": 1}}
    write_json(folder / "config.json", {"model": MODEL, "data": {"path": "data"}, "train": TRAIN, "deepspeed": zero})
    return folder
