"""Started by test_eval_tasks.py under the launcher on two ranks: runs with and without train.eval_tasks.

eval_tasks.py FOLDER      FOLDER holds data/ and tasks/
"""

import sys
from pathlib import Path

import train
from minzero import dist
from minzero.config.build import build
from minzero.errors import UserError
from tests.helpers.ranks import run_ranks

FOLDER = Path(sys.argv[-1])
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 260, "dropout": 0.1, "init_std": 0.1}
TRAIN = {"micro_batch_size": 2, "global_batch_tokens": 8 * 64, "max_tokens": 6 * 8 * 64, "lr": 1e-2, "log_every": 1}
TRAIN |= {
    "eval_every": 2,
    "eval_tokens": 640,
    "save_every": 3,
    "save_best": False,
    "precision": "fp32",
    "schedule": "constant",
}
TASKS = {"eval_tasks": ["letters", "last_letter"], "eval_tasks_path": str(FOLDER / "tasks"), "eval_tasks_every": 2}


def config_of(name, stage=3, **settings):
    train_section = TRAIN | {"out_dir": str(FOLDER / name)} | settings
    zero = {"zero_optimization": {"stage": stage}}
    parts = {"model": MODEL, "data": {"path": str(FOLDER / "data")}, "train": train_section, "deepspeed": zero}
    return build(parts, name)


def main():
    group = dist.start_process_group()
    train.main(config_of("with", **TASKS, loggers=["tensorboard"]))
    train.main(config_of("without"))
    train.main(config_of("resumed", **TASKS, resume=str(FOLDER / "with/checkpoints/step_00000003")))
    for stage in (0, 1, 2):
        train.main(config_of(f"stage_{stage}", stage, **TASKS | {"eval_tasks_every": 0}, max_tokens=2 * 8 * 64))
    try:
        train.main(config_of("refused", **TASKS | {"eval_tasks": ["letter"]}))
    except UserError as error:
        (FOLDER / f"fault_{group.rank}").write_text(str(error))
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main())
