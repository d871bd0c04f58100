"""Started by test_parity.py under the launcher, once on one and once on two ranks: trains 20 steps at
every ZeRO stage in one process group, and does it again from a checkpoint halfway.

    parity.py DATA FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm

import checkpoint
import train
from config import build, deepspeed_config
from engine import build_engine

DATA, FOLDER = sys.argv[-2], Path(sys.argv[-1])
MODEL = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "vocab_size": 64, "init_std": 0.05}


def config_of(name, stage, **more):
    settings = {"out_dir": str(FOLDER / name), "micro_batch_size": 2, "global_batch_tokens": 8 * 32}
    settings |= {"max_tokens": 20 * 8 * 32, "lr": 1e-2, "log_every": 1, "eval_every": 10, "save_every": 10}
    settings |= {"eval_tokens": 13 * 32, "warmup_tokens": 5 * 8 * 32, **more.pop("train", {})}
    # small enough that matrices are sharded and gathered, not kept whole
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 4096}
    zero |= {"stage3_prefetch_bucket_size": 4096}
    model = MODEL | more.pop("model", {})
    return build(
        {"model": model, "data": {"path": DATA}, "train": settings, "deepspeed": {"zero_optimization": zero}}, ""
    )


def initial_weights(stage, precision):
    """Every parameter, whole, right after the engine was made."""
    device, _, world_size = train.find_place(False)
    config = config_of("unused", stage, model={"bias": False, "norm": "rmsnorm"})
    engine = build_engine(config, deepspeed_config(config, world_size, precision, False), device)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def settings_after_loading(stage, world_size):
    """A checkpoint loaded into a run with another optimizer setting: [(weight decay, betas, eps) a group]."""
    device, _, _ = train.find_place(False)
    changed = {"weight_decay": 0.5, "betas": [0.5, 0.6], "eps": 1e-3}
    config = config_of("unused", stage, train=changed)
    engine = build_engine(config, deepspeed_config(config, world_size, "fp32", False), device)
    checkpoint.load(engine, FOLDER / f"stage{stage}_ranks{world_size}" / "checkpoints" / "step_00000020")
    return [(group["weight_decay"], *group["betas"], group["eps"]) for group in engine.optimizer.param_groups]


def main():
    _, rank, world_size = train.find_place(False)
    deepspeed.init_distributed("gloo", verbose=False)
    weights = {f"{p} {stage}": initial_weights(stage, p) for p in ("fp32", "bf16") for stage in (0, 1, 2, 3)}
    if rank == 0:
        torch.save(weights, FOLDER / f"weights_{world_size}.pt")
    for stage in (0, 1, 2, 3):
        train.main(config_of(f"stage{stage}_ranks{world_size}", stage))

    # the same run, stopped behind step 10: its last checkpoint and all it did since are taken away
    for name, more in (("plain", {}), ("dropout", {"model": {"dropout": 0.1}})):
        whole, resumed = f"whole_{name}_ranks{world_size}", f"resumed_{name}_ranks{world_size}"
        train.main(config_of(whole, 3, **{key: dict(value) for key, value in more.items()}))
        comm.barrier()
        if rank == 0:
            shutil.copytree(FOLDER / whole, FOLDER / resumed)
            shutil.rmtree(FOLDER / resumed / "checkpoints" / "step_00000020")
        comm.barrier()
        train.main(config_of(resumed, 3, **{key: dict(value) for key, value in more.items()}))
    settings = {stage: settings_after_loading(stage, world_size) for stage in (0, 1, 3)}
    if rank == 0:
        (FOLDER / f"done_{world_size}.json").write_text(json.dumps(settings))
    comm.barrier()
    comm.destroy_process_group()


if __name__ == "__main__":
    main()
