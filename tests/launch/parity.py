"""Started by test_parity.py under the launcher, on two ranks, on one, and on two again: trains 20 steps at
every ZeRO stage in one process group, continues from checkpoints, and moves runs to other ranks and stages.

    parity.py DATA FOLDER first|second|third
"""

import dataclasses
import itertools
import json
import shutil
import sys
from itertools import chain
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm

import train
from minzero import checkpoint, checkpoint_folder, checkpoint_state, dist
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config
from minzero.config.nested import merge
from minzero.data import mixture
from minzero.engine import count_real_parameters
from minzero.files import ROOT, read_json
from tests.helpers.ranks import collect_garbage, run_ranks
from tests.helpers.variants import all_changed
from tests.launch.parity_settings import MOVES, OTHERS, SETTINGS, SETTINGS_OF_OTHERS, model_of

DATA, FOLDER, PART = sys.argv[-3], Path(sys.argv[-2]), sys.argv[-1]
MODEL = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "vocab_size": 64, "init_std": 0.05}


def config_of(name, stage, offload="none", steps=20, **more):
    collect_garbage()  # of the run before
    settings = {"out_dir": str(FOLDER / name), "micro_batch_size": 2, "global_batch_tokens": 8 * 32}
    settings |= {"max_tokens": steps * 8 * 32, "lr": 1e-2, "log_every": 1, "eval_every": 0, "save_every": 10}
    settings |= {"eval_tokens": 13 * 32, "warmup_tokens": 5 * 8 * 32, "keep_checkpoints": 20, **more.pop("train", {})}
    # the defaults, but a matrix of this small model is sharded and gathered, not kept whole
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 4096}
    zero |= {"offload_optimizer": {"device": offload}}
    deepspeed = merge(read_json(ROOT / "ds_config.json"), {"zero_optimization": zero})
    model = MODEL | more.pop("model", {})
    data = {"path": more.pop("data", DATA)}
    return build({"model": model, "data": data, "train": settings, "deepspeed": deepspeed}, "")


def config_of_moved(name, stage, offload="none"):
    """150 steps with a checkpoint every 50."""
    settings = {"lr": 3e-3, "save_every": 50, "save_best": False, "micro_batch_size": 4}
    return config_of(name, stage, offload, steps=150, train=settings, model=model_of(name))


def engine_of(stage, precision="fp32", offload="none", **more):
    device, _, world_size = dist.init_process()
    config = config_of("unused", stage, offload, **more)
    return train.build_engine(config, deepspeed_config(config, world_size, precision, False), device)


def initial_weights(stage, precision):
    """Every parameter, whole, right after the engine was made."""
    engine = engine_of(stage, precision, model=dataclasses.asdict(all_changed(**MODEL, head_dim=24)))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    assert count_real_parameters(engine.module) == sum(weight.numel() for weight in weights.values())
    return weights


def loaded_and_saved_again(stage, offload):
    """The checkpoint of two ranks at stage 3 loaded into a run with other optimizer settings, and saved from
    there without a step: [(weight decay, betas, eps) of each parameter group]."""
    changed = {"weight_decay": 0.5, "betas": [0.5, 0.6], "eps": 1e-3}
    engine = engine_of(stage, offload=offload, train=changed)
    path = FOLDER / "moved" / "checkpoints" / "step_00000050"
    state = checkpoint_state.read_state(path)
    checkpoint.load(engine, path, state, 0)
    where = {"world_size": comm.get_world_size(), "stage": stage}
    folder = FOLDER / f"again_stage{stage}_{offload}_ranks{comm.get_world_size()}"
    checkpoint.save(engine, folder, state | where, False, 1)
    return [(group["weight_decay"], *group["betas"], group["eps"]) for group in engine.optimizer.param_groups]


def copy_until(name, step, new):
    """A copy of a run as it was when it was stopped after that step: what it saved later is removed."""
    comm.barrier()
    if comm.get_rank() == 0:
        shutil.copytree(FOLDER / name, FOLDER / new)
        for later in (FOLDER / new / "checkpoints").glob("step_*"):
            if later.name > checkpoint_folder.name_of(step):
                shutil.rmtree(later)
    comm.barrier()


def keep_record_of_samples(name):
    """Have sample_numbers write down, for rank 0's log, what this rank was given."""
    numbers, seen = mixture.sample_numbers, []

    def and_record(first_sample, *rest):
        samples = numbers(first_sample, *rest)
        seen.extend((first_sample // 8, int(sample)) for sample in samples)  # 8 samples a step
        return samples

    mixture.sample_numbers = and_record

    def finish():
        mixture.sample_numbers = numbers
        everyone = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(everyone, seen)
        if comm.get_rank() == 0:
            (FOLDER / f"{name}.samples.json").write_text(json.dumps(sorted(chain(*everyone))))

    return finish


def parity_of_stages(world_size, rank):
    weights = {f"{p} {stage}": initial_weights(stage, p) for p in ("fp32", "bf16") for stage in (0, 1, 2, 3)}
    if rank == 0:
        torch.save(weights, FOLDER / f"weights_{world_size}.pt")
    for stage, precision, offload in SETTINGS:
        # run to the end, and once more from its checkpoint of step 10
        name = f"{precision}_stage{stage}_{offload}_ranks{world_size}"
        for path in (name, f"resumed_{name}"):
            train.main(config_of(path, stage, offload, train={"precision": precision}))
            if path == name:
                copy_until(name, 10, f"resumed_{name}")
    for model, (stage, precision) in itertools.product(OTHERS, SETTINGS_OF_OTHERS):
        name = f"{model}_{precision}_stage{stage}_ranks{world_size}"
        for path in (name, f"resumed_{name}") if stage == 3 else (name,):
            train.main(config_of(path, stage, model=model_of(name), train={"precision": precision}))
            if path == name and stage == 3:
                copy_until(name, 10, f"resumed_{name}")
    train.main(config_of(f"selective_ranks{world_size}", 3, train={"activation_checkpointing": "selective"}))
    conversations = {"data": str(FOLDER / "conversations"), "model": {"vocab_size": 257}}
    train.main(config_of(f"conversations_ranks{world_size}", 3, **conversations))
    # with dropout, and saving in the background, from a step that is no round number
    for kind in ("dropout", "background"):
        name = f"{kind}_ranks{world_size}"
        for path in (name, f"resumed_{name}"):
            settings = {"save_every": 7, "save_in_background": kind == "background"}
            train.main(config_of(path, 3, model={"dropout": 0.1 if kind == "dropout" else 0.0}, train=settings))
            if path == name:
                copy_until(name, 7, f"resumed_{name}")


def main():
    _, rank, world_size = dist.start_process_group()
    if PART == "first":
        train.main(config_of_moved("moved", 3))
        for model in OTHERS:
            train.main(config_of_moved(f"{model}_moved", 3))
    if PART != "third":
        parity_of_stages(world_size, rank)
        settings = {f"stage{s}_{o}": loaded_and_saved_again(s, o) for s, p, o in SETTINGS if p == "fp32"}
        if rank == 0:
            (FOLDER / f"settings_{world_size}.json").write_text(json.dumps(settings))
    for name, (origin, step, stage, offload) in MOVES[PART].items():
        copy_until(origin, step, name)
        finish = keep_record_of_samples(name)
        train.main(config_of_moved(name, stage, offload))
        finish()
    if rank == 0:
        (FOLDER / f"done_{PART}").touch()
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main())
