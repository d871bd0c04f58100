"""How fast the model is against nanoGPT's, and how much memory its options save.

    python benchmarks/model.py speed --nanogpt PATH/TO/nanoGPT/model.py [--shape gpt2-124m] [--rounds 5]
    python benchmarks/model.py memory

speed: tokens/s of forward and backward pass, and of a whole step with clipping and AdamW, the same batch for
both. Theirs is the step of nanoGPT's train.py: bf16 by autocast, its own configure_optimizers. Ours is the
engine that train.py builds, on one rank: stage 0 in fp32, ZeRO-1 in bf16, with float32 masters. All settings take turns
in one process, round by round, so that a busy minute hits all; medians are printed. Beside them is the
processor's rate for products of 1024 x 1024 matrices, in the same rounds, and each speed's share of it.
memory: the most that one forward and backward pass allocates above weights and gradients, from torch's
profiler.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model
from benchmarks.nanogpt import load_nanogpt, nanogpt_optimizer, nanogpt_passes, product_rate
from minzero import dist
from minzero import loss as losses
from minzero.config.deepspeed import deepspeed_config
from minzero.config.sections import Config, ModelConfig, TrainConfig
from minzero.engine import build_engine
from minzero.sizes import flops_per_token, loss_chunk_tokens

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {  # ours, sequences of a batch: GPT-2's smallest, and nanoGPT's model of Shakespeare's characters
    "gpt2-124m": (ModelConfig(vocab_size=50304), 1),
    "6x384": (ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=128), 16),
}


def nanogpt(path, config, tokens, precision, compiled):
    """(forward and backward pass, whole step) of nanoGPT."""
    gpt = load_nanogpt(path, config)
    _, update = nanogpt_optimizer(gpt, TrainConfig())
    run = torch.compile(gpt) if compiled else gpt

    def passes():
        return nanogpt_passes(run, [(tokens, tokens)], precision).item()

    def step():
        passes()
        update()

    def alone():
        passes()
        gpt.zero_grad(set_to_none=True)

    return alone, step


def ours(config, tokens, precision, compiled):
    """(forward and backward pass, whole step) of this repository."""
    gpt = model.GPT(config).to(TYPES[precision])
    if compiled:
        gpt.compile()

    def alone():
        gpt(tokens, tokens).backward()
        gpt.zero_grad(set_to_none=True)

    settings = TrainConfig(micro_batch_size=len(tokens), global_batch_tokens=tokens.numel())
    stage = 0 if precision == "fp32" else 1  # as the figures of docs/benchmarks.md were taken
    whole = Config(config, train=settings, deepspeed={"zero_optimization": {"stage": stage}})
    engine = build_engine(whole, deepspeed_config(whole, 1, precision, False), torch.device("cpu"), compiled=compiled)

    def step():
        loss = engine(tokens, tokens)
        engine.backward(loss)
        engine.step()
        loss.item()

    return alone, step


def time_rounds(rows, rounds):
    """Call each function of rows, {name: (passes, step)}, once a round. Returns {name: (seconds of passes, of steps)},
    and {precision: FLOP/s of matrix products}, lists over the rounds."""
    seconds = {name: ([], []) for name in rows}
    rates = {precision: [] for precision in TYPES}
    for number in range(rounds + 1):
        for precision, dtype in TYPES.items():
            rates[precision].append(product_rate(dtype))
        for name, functions in rows.items():
            for column, function in zip(seconds[name], functions, strict=True):
                started = time.perf_counter()
                function()
                if number:  # the first warms up, and compiles
                    column.append(time.perf_counter() - started)
    return seconds, rates


def speed(args):
    """Prints tokens/s of all settings, and ours over nanoGPT's."""
    config, batch = SHAPES[args.shape]
    tokens = torch.randint(config.vocab_size, (batch, config.block_size), generator=torch.Generator().manual_seed(0))
    dist.start_process_group()
    torch.set_num_threads(args.threads)
    rows = {}
    for precision in TYPES:
        for compiled in (False, True):
            name = f"{precision} {'compiled' if compiled else 'eager'}"
            rows[f"nanoGPT {name}"] = nanogpt(args.nanogpt, config, tokens, precision, compiled)
            rows[f"ours {name}"] = ours(config, tokens, precision, compiled)
    seconds, rates = time_rounds(rows, args.rounds)
    rates = {precision: statistics.median(found) for precision, found in rates.items()}
    print(f"{args.shape}, {batch} x {config.block_size} tokens, {args.threads} threads, torch {torch.__version__}")
    print(f"matrix products: fp32 {rates['fp32'] / 1e9:.0f} GFLOP/s, bf16 {rates['bf16'] / 1e9:.0f} GFLOP/s")
    print(f"{'':24s}{'passes':>10s}{'of products':>12s}{'step':>10s}{'of products':>12s}   tokens/s")
    speeds = {}
    for name, columns in seconds.items():
        speeds[name] = [tokens.numel() / statistics.median(column) for column in columns]
        rate = rates[name.split()[1]]
        cells = "".join(f"{found:10.0f}{found * flops_per_token(config) / rate:12.0%}" for found in speeds[name])
        print(f"{name:24s}{cells}")
    for column, title in enumerate(("forward and backward pass", "whole step")):
        print(f"{title}: {ratios(speeds, column)}")


def ratios(speeds, column):
    """Ours over nanoGPT's, as text: eager in fp32, and the best of each. speeds: {name: [passes, step]}."""
    eager = speeds["ours fp32 eager"][column] / speeds["nanoGPT fp32 eager"][column]
    best = {}
    for side in ("ours", "nanoGPT"):
        best[side] = max((found[column], name) for name, found in speeds.items() if name.startswith(side))
    ratio = best["ours"][0] / best["nanoGPT"][0]
    return f"eager fp32 {eager:.2f}, best {ratio:.2f} ({best['ours'][1]} over {best['nanoGPT'][1]})"


def peak_bytes(function):
    """The most that `function` holds at once on the CPU, in bytes, by torch's profiler."""
    function()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def memory(args):
    torch.set_num_threads(args.threads)
    memory_of_loss()
    memory_of_recomputation()


def memory_of_loss():
    """Prints the peak of the loss from all logits at once, and of ours in chunks."""
    tokens, width, ids = 4096, 768, 50304
    print(f"loss of {tokens} tokens x {ids} ids, width {width}: peak MB of forward and backward, and of evaluation")
    for precision, dtype in TYPES.items():
        x, weight = torch.randn(tokens, width, dtype=dtype), torch.randn(ids, width, dtype=dtype)
        targets = torch.randint(ids, (tokens,))

        def whole(x=x, weight=weight, targets=targets):
            loss = torch.nn.functional.cross_entropy((x @ weight.t()).float(), targets)
            if x.requires_grad:
                loss.backward()
                x.grad = weight.grad = None

        def chunked(x=x, weight=weight, targets=targets):
            chunk, gradients = loss_chunk_tokens(ids, False), x.requires_grad
            loss = losses.LinearCrossEntropy.apply(x, weight, targets, chunk, gradients, losses.cross_entropy)
            if gradients:
                loss.backward()
                x.grad = weight.grad = None

        for name, function in (("all logits at once", whole), ("chunked", chunked)):
            evaluation = peak_bytes(function)
            for tensor in (x, weight):
                tensor.requires_grad_()
            training = peak_bytes(function)
            for tensor in (x, weight):
                tensor.requires_grad_(False)
            print(f"  {precision} {name:20s}{training / 1e6:10.0f}{evaluation / 1e6:10.0f}")


def memory_of_recomputation():
    """Prints the peak of a model whose blocks are recomputed, or not."""
    config, batch = ModelConfig(n_layer=6, block_size=512, vocab_size=1024), 8
    print(f"6 layers of width {config.n_embd}, {batch} x {config.block_size} tokens, fp32: peak MB over the weights")
    inputs = config.n_layer * batch * config.block_size * config.n_embd * 4
    print("  with their gradients; a CPU has no second memory for the blocks' inputs: on a GPU the last row would hold")
    print(f"  {inputs / 1e6:.0f} MB less than the second, the blocks' inputs")
    example = torch.randint(config.vocab_size, (batch, config.block_size))
    options = {
        "none recomputed": {},
        "every block": {"activation_checkpointing": 1},
        "every second": {"activation_checkpointing": 2},
    }
    options |= {"every third": {"activation_checkpointing": 3}}
    options |= {"every block, inputs on CPU": {"activation_checkpointing": 1, "activation_offload": True}}
    for name, more in options.items():
        gpt = model.GPT(config, **more)

        def passes(gpt=gpt):
            gpt(example, example).backward()
            gpt.zero_grad(set_to_none=True)

        print(f"  {name:40s}{peak_bytes(passes) / 1e6:10.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--shape", default="gpt2-124m", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.what == "speed" and not args.nanogpt:
        parser.error("speed needs --nanogpt, the model.py of a copy of github.com/karpathy/nanoGPT")
    {"speed": speed, "memory": memory}[args.what](args)


if __name__ == "__main__":
    main()
