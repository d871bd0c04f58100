"""The error of gradients that are added up in bf16, against sums of the same gradients in float32.

    python benchmarks/accumulation.py [--stages 2 3] [--micro_batches 4 64 256]

For each stage, number of micro-batches and deepspeed.data_types.grad_accum_dtype: the norm of the difference of the
engine's gradient from the float32 sum of the same micro-batches' bf16 gradients, over the norm of that sum. One
process, on CPU or GPU; a model of two layers of width 64, random tokens. Prints a Markdown table.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from minzero import dist
from minzero.commands import run_command
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config
from minzero.engine import build_engine
from minzero.flags import FlagParser, at_least
from model import GPT

BLOCK, IDS, SEQUENCES = 64, 512, 2
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": BLOCK, "vocab_size": IDS}


def engine_of(stage, micro_batches, accumulated, device):
    tokens = micro_batches * SEQUENCES * BLOCK
    train = {"micro_batch_size": SEQUENCES, "global_batch_tokens": tokens, "max_tokens": tokens, "precision": "bf16"}
    deepspeed_keys = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": accumulated}}
    config = build({"model": MODEL, "train": train | {"grad_clip": 0}, "deepspeed": deepspeed_keys}, "")
    on_gpu = device.type == "cuda"
    return build_engine(config, deepspeed_config(config, 1, "bf16", on_gpu), device), config.model


def reference(engine, model_config, batches, device):
    """{parameter: the float32 mean of the batches' bf16 gradients}, of a model with the engine's weights."""
    with device:
        model = GPT(model_config).to(torch.bfloat16)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for parameter, weight in zip(model.parameters(), engine.module.parameters(), strict=True):
            parameter.copy_(weight)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in model.named_parameters()}
    for inputs, targets in batches:
        model.zero_grad()
        model(inputs, targets).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.float() / len(batches)
    return sums


def error(stage, micro_batches, accumulated, device):
    """The error of one setting, as a part of the gradient."""
    engine, model_config = engine_of(stage, micro_batches, accumulated, device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(IDS, (micro_batches, SEQUENCES, BLOCK + 1), generator=generator).to(device)
    batches = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]
    expected = reference(engine, model_config, batches, device)
    for number, batch in enumerate(batches, start=1):
        engine.backward(engine(*batch))
        if number < micro_batches:
            engine.step()
    found = {name: safe_get_full_grad(parameter).float() for name, parameter in engine.module.named_parameters()}
    engine.destroy()
    apart = sum((found[name].view_as(sum_) - sum_).square().sum() for name, sum_ in expected.items())
    return (apart / sum(sum_.square().sum() for sum_ in expected.values())).sqrt().item()


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("--stages", type=at_least(2, 3), nargs="+", default=[2, 3])
    parser.add_argument("--micro_batches", type=at_least(1), nargs="+", default=[4, 64, 256])
    args = parser.parse_args(arguments)
    device, *_ = dist.start_process_group(may_be_alone=True)
    print("| stage | micro-batches | added up in bf16 | in fp32 |\n|---|--:|--:|--:|")
    for stage in args.stages:
        for micro_batches in args.micro_batches:
            errors = [error(stage, micro_batches, kind, device) for kind in ("bf16", "fp32")]
            print(f"| ZeRO-{stage} | {micro_batches} | {errors[0]:.2%} | {errors[1]:.4%} |", flush=True)
    dist.stop_process_group()


if __name__ == "__main__":
    run_command(main)
