"""Started by test_hf.py under the launcher on two ranks: runs that start from weights of transformers' or
of another run's, at several ZeRO stages and precisions in one process group.

    start_from.py DATA FOLDER      FOLDER holds a folder of each family in transformers' format
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

import train
from minzero import dist
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config
from minzero.config.load import load_config
from minzero.engine import build_engine
from minzero.hf.families import FAMILIES
from minzero.init_from import model_defaults
from minzero.trained import open_weights
from tests.helpers.ranks import run_ranks

DATA, FOLDER = sys.argv[-2], Path(sys.argv[-1])
CONTINUED = ("mistral", "qwen2", "qwen3", "olmo2", "smollm3", "pythia", "mixtral", "qwen3_moe", "olmoe")
SHARDED = ["--deepspeed.zero_optimization.stage3_param_persistence_threshold", "100"]


def config_of(family, name, stage, steps, source, **more):
    settings = {"out_dir": str(FOLDER / name), "micro_batch_size": 2, "global_batch_tokens": 8 * 16, "lr": 1e-2}
    settings |= {"max_tokens": steps * 8 * 16, "schedule": "constant", "log_every": 1, "eval_tokens": 5 * 16}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 4096}
    zero |= {"stage3_prefetch_bucket_size": 4096}
    sections = {"model": json.loads((FOLDER / f"{family}.json").read_text()) | more, "data": {"path": DATA}}
    sections |= {"train": settings | {"init_from": str(source)}, "deepspeed": {"zero_optimization": zero}}
    return build(sections, name)


def starting_weights(family, stage, precision):
    """Every parameter, whole, right after the engine was made."""
    device, _, world_size = dist.init_process()
    config = config_of(family, "unused", stage, 1, FOLDER / family)
    _, load = open_weights(config.train.init_from, config.model)
    engine = build_engine(config, deepspeed_config(config, world_size, precision, False), device, load_weights=load)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def continue_published(family, *overrides, steps=1):
    """Steps that do not change the weights, of a run whose config sets only the context of the model section."""
    flags = {"out_dir": FOLDER / f"{family}_3", "micro_batch_size": 2, "global_batch_tokens": 128}
    flags |= {"max_tokens": steps * 128, "lr": 0, "log_every": 1, "eval_tokens": 5 * 16}
    words = [word for name, value in flags.items() for word in (f"--train.{name}", str(value))]
    words += ["--deepspeed.zero_optimization.stage", "3"]
    path = FOLDER / f"continue_{family}.json"
    train.main(load_config([str(path), *words, *SHARDED, *overrides], model_defaults))


def main():
    _, rank, _ = dist.start_process_group()
    weights = {
        f"{family} {stage} {precision}": starting_weights(family, stage, precision)
        for family in ("gpt2", "llama")
        for stage, precision in ((0, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16"))
    }
    others = [family for family in FAMILIES if family not in ("gpt2", "llama")]
    weights |= {f"{family} 3 bf16": starting_weights(family, 3, "bf16") for family in others}
    torch.save(weights, FOLDER / f"weights_{rank}.pt")
    for family in ("gpt2", "llama"):
        for stage in (0, 3):
            train.main(config_of(family, f"{family}_{stage}", stage, 1, FOLDER / family))
    for family in [family for family in others if family not in CONTINUED]:
        train.main(config_of(family, f"{family}_3", 3, 1, FOLDER / family))
    train.main(config_of("gpt2", "short", 3, 1, FOLDER / "gpt2", block_size=8))
    # resumed: the model it started from is not there any more
    train.main(config_of("llama", "llama_3", 3, 2, FOLDER / "gone"))
    train.main(config_of("llama", "from_a_run", 0, 1, FOLDER / "llama_3"))
    for family in CONTINUED:
        continue_published(family)
    continue_published("qwen3", "--train.init_from", str(FOLDER / "gone"), steps=2)  # resumed, as above
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main())
