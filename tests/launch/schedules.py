"""Started by test_schedules.py under the launcher on two ranks: runs that branch, and runs whose batch grows, in one
process group.

    schedules.py DATA FOLDER
"""

import sys
from pathlib import Path

import train
from minzero.config.build import build
from tests.helpers.ranks import run_ranks

DATA, FOLDER = sys.argv[-2], Path(sys.argv[-1])
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64, "dropout": 0.1}
BATCH = 8 * 16
TRAIN = {"micro_batch_size": 1, "global_batch_tokens": BATCH, "log_every": 1, "eval_tokens": 4 * 16, "lr": 1e-2}
TRAIN |= {"warmup_tokens": 3 * BATCH, "save_best": False, "save_every": 0, "eval_every": 0}
WSD = {"schedule": "wsd", "decay_tokens": 0, "min_lr_ratio": 0.0, "max_tokens": 12 * BATCH}
RAMP = {"schedule": "constant", "first_batch_tokens": 2 * 16, "batch_ramp_tokens": 60 * 16, "max_tokens": 80 * 16}
SETTINGS = {  # of a growing batch: name: (stage, what else is in the section zero_optimization, train section)
    "stage_0": (0, {}, {}),
    "stage_1": (1, {}, {}),
    "stage_2": (2, {}, {}),
    "stage_2_offloaded": (2, {"offload_optimizer": {"device": "cpu"}}, {}),
    "stage_3": (3, {}, {}),
    "jumps": (1, {}, {"batch_ramp_jumps": 2}),
}


def config_of(name, train, stage=1, dropout=0.1, **zero):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 4096} | zero
    zero |= {"stage3_prefetch_bucket_size": 4096}
    sections = {"model": MODEL | {"dropout": dropout}, "data": {"path": DATA}}
    sections |= {"train": TRAIN | {"out_dir": str(FOLDER / name)} | train, "deepspeed": {"zero_optimization": zero}}
    return build(sections, name)


def branches():
    train.main(config_of("long", WSD | {"keep_every": 4, "save_every": 1, "keep_checkpoints": 1}))
    last = {"max_tokens": 12 * BATCH, "decay_tokens": 4 * BATCH}
    train.main(config_of("planned", WSD | last))
    start = str(FOLDER / "long" / "checkpoints" / "step_00000008")
    train.main(config_of("branch", WSD | last | {"resume": start}))
    # a branch that another command continues, and whose first checkpoint goes
    train.main(config_of("continued", WSD | {"max_tokens": 10 * BATCH, "resume": start, "keep_checkpoints": 1}))
    train.main(config_of("continued", WSD | {"keep_checkpoints": 1}))
    for shape in ("linear", "cosine"):
        train.main(config_of(f"planned_{shape}", WSD | last | {"decay_shape": shape}))
    # a finished run is extended in place
    train.main(config_of("extended", WSD | {"max_tokens": 8 * BATCH}))
    train.main(config_of("extended", WSD | last))


def growing():
    for name, (stage, zero, more) in SETTINGS.items():
        train.main(config_of(name, RAMP | more, stage, 0.0, **zero))


def main(arguments):
    growing()
    branches()


if __name__ == "__main__":
    run_ranks(main)
