"""Started by test_foreign_start.py under the launcher on two ranks: a run that starts from a published model with data
of its tokenizer, and one with data of another.

    start_foreign.py FOLDER      FOLDER holds model/, data/ and other_data/
"""

import dataclasses
import sys
from pathlib import Path

import train
from minzero import dist
from minzero.config.build import build
from tests.helpers.ranks import run_ranks
from tests.helpers.trained_runs import LLAMA

FOLDER = Path(sys.argv[-1])


def config_of(name, data):
    settings = {"out_dir": str(FOLDER / name), "init_from": str(FOLDER / "model"), "micro_batch_size": 2}
    settings |= {"global_batch_tokens": 8 * 64, "max_tokens": 4 * 8 * 64, "lr": 1e-3, "log_every": 1}
    settings |= {"eval_tokens": 640, "sample_every": 2}
    model = dataclasses.asdict(LLAMA) | {"block_size": 64, "vocab_size": 1536}
    return build({"model": model, "data": {"path": str(FOLDER / data)}, "train": settings}, name)


def main():
    dist.start_process_group()
    train.main(config_of("run", "data"))
    train.main(config_of("other_run", "other_data"))
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main())
