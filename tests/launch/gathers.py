"""Started by test_gathers.py on one process: counts, in DeepSpeed's own coordinator and during a step, the weights that
ZeRO-3 gathers ahead of their use, and those that it gathers only when a module needs them and waits for.

    gathers.py NAME [KEY=VALUE ...]    prints a JSON object; the KEYs are of zero_optimization

The shapes are those of configs, scaled: every width by the same factor, so that all sizes keep their proportions."""

import gc
import inspect
import json
import sys
from collections import Counter

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

from minzero import dist
from minzero.config.build import build
from minzero.config.deepspeed import auto_values, deepspeed_config
from minzero.config.load import load_config
from minzero.config.sections import ModelConfig
from minzero.engine import build_engine
from minzero.sizes import parameter_sizes
from tests.helpers.ranks import run_ranks

GATHER = "_PartitionedParameterCoordinator__all_gather_params"
WIDTH = 64  # of the scaled models
LENGTH = 8
SAME = ("bias", "qkv_bias", "norm", "qk_norm", "norm_position", "position", "mlp", "tie_embeddings")
MEMORY = 80 * 2**30  # of the GPU that the model would have


def scaled(config):
    """The model of a Config with a width of WIDTH and everything else in proportion."""
    model = config.model
    factor = WIDTH / model.n_embd
    heads = 16
    return ModelConfig(
        n_layer=model.n_layer,
        n_head=heads,
        n_kv_head=max(1, round(heads * model.kv_heads / model.n_head)),
        n_embd=WIDTH,
        head_dim=round(model.n_head * model.head_size * factor / heads),
        block_size=LENGTH,
        vocab_size=max(heads, round(model.vocab_size * factor)),
        mlp_hidden=round(model.mlp_width * factor),
        **{name: getattr(model, name) for name in SAME},
    )


def count_gathers(counts):
    """Let DeepSpeed's coordinator count in `counts`: {(phase, "ahead" or "waited for"): elements}."""
    source, first_line = inspect.getsourcelines(Coordinator._fetch_sub_module_impl)
    when_needed = {first_line + i for i, line in enumerate(source) if "__all_gather_params(params_to_fetch" in line}
    assert when_needed, "another DeepSpeed: where does it gather what a module needs at once?"
    gather = getattr(Coordinator, GATHER)

    def counted(self, parameters, forward):
        kind = "waited for" if sys._getframe(1).f_lineno in when_needed else "ahead"
        phase = "forward" if forward else "backward"
        missing = [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        counts[f"{phase}, {kind}"] += sum(parameter.ds_numel for parameter in missing)
        gather(self, parameters, forward)
        live = self._PartitionedParameterCoordinator__n_available_params
        counts["most live"] = max(counts["most live"], live)

    setattr(Coordinator, GATHER, counted)


def main(name, *overrides):
    given = load_config([f"configs/{name}.json", "--deepspeed.zero_optimization.stage", "3"])
    model = scaled(given)
    block = sum(parameter_sizes(model).block)
    ratio = block / sum(parameter_sizes(given.model).block)
    train = {"micro_batch_size": 1, "global_batch_tokens": 2 * LENGTH, "max_tokens": 10**6, "precision": "fp32"}
    train["activation_checkpointing"] = given.train.activation_checkpointing
    zero = given.deepspeed["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 10 * given.model.n_embd  # matrices are gathered, whatever the memory
    zero = dict(zero)
    # the values are those of the whole model on a large machine, whose gathered weights would be in 16 bits
    for key, value in auto_values(given, 64, "bf16", MEMORY, 2).items():
        section, _, short = key.rpartition(".")
        is_size = section == "zero_optimization" and type(value) is int
        zero |= {short: int(value * ratio) if is_size else value} if section == "zero_optimization" else {}
    zero["stage3_param_persistence_threshold"] = 10 * WIDTH
    zero |= {name: float(value) for name, value in (word.split("=") for word in overrides)}
    config = build({"model": vars(model), "train": train, "deepspeed": {"zero_optimization": zero}}, name)
    device, *_ = dist.start_process_group(may_be_alone=True)
    engine = build_engine(config, deepspeed_config(config, 1, "fp32", False), device)
    counts = Counter()
    count_gathers(counts)
    tokens = torch.randint(model.vocab_size, (1, LENGTH))
    tensors = []  # alive after each step, without a collection of cycles
    gc.collect()
    gc.disable()
    for _ in range(5):  # two record the order of the modules; the last is counted
        counts.clear()
        for _ in range(2):  # micro-batches
            engine.backward(engine(tokens, tokens))
            engine.step()
        tensors.append(sum(torch.is_tensor(found) for found in gc.get_objects()))
    weights = sum(parameter.ds_numel for parameter in engine.module.parameters())
    found = {"weights": weights, "block": block, "limit": zero["stage3_max_live_parameters"], **counts}
    print(json.dumps(found | {"tensors": tensors, "modules on DeepSpeed's stack": len(FWD_MODULE_STACK)}))
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda arguments: main(*arguments))
