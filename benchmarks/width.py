"""The best learning rate at several widths, with width transfer (muP) and without, in one process without DeepSpeed.

    python benchmarks/width.py --data data/stdlib

Trains configs/tiny.json's model with two layers, heads of 16 channels and an output layer of its own for some steps at
each width and rate, and prints the mean loss of the last tenth of the steps.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from minzero.commands import run_command
from minzero.config.load import load_config
from minzero.data.mixture import Mixture
from minzero.engine import parameter_groups
from minzero.schedule import learning_rate
from model import GPT

BASE = 32


def loss_of(config, steps):
    """The mean training loss of the last tenth of the steps."""
    train = config.train
    model = GPT(config.model, train.seed, base_width=train.mup_base_width)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=tuple(train.betas), eps=train.eps, fused=True)
    data = Mixture(config.data.path, "train", config.model.block_size, config.model.vocab_size, train.seed)
    losses = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step * train.global_batch_tokens) * group.get("relative_rate", 1)
        (batch,) = data.batches((step - 1) * train.micro_batch_size, 0, 1, train.micro_batch_size, 1)
        loss = model(*map(torch.from_numpy, batch[:2]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def config_of(data, width, rate, base, steps):
    tokens = 8 * 128
    values = {"model.n_layer": 2, "model.n_embd": width, "model.n_head": width // 16, "model.mlp_hidden": 3 * width}
    values |= {"model.tie_embeddings": "false", "train.global_batch_tokens": tokens, "train.max_tokens": steps * tokens}
    values |= {"train.warmup_tokens": steps * tokens // 10, "train.lr": rate, "data.path": data}
    values |= {"train.mup_base_width": base or "null"}
    return load_config(["configs/tiny.json", *(str(part) for key in values for part in (f"--{key}", values[key]))])


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of token shards of configs/tiny.json's tokenizer")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**-power for power in (4, 5, 6, 7, 8, 9)])
    args = parser.parse_args(arguments)
    print("| width | muP |", " | ".join(f"{rate:.4g}" for rate in args.rates), "|", flush=True)
    for base in (None, BASE):
        for width in args.widths:
            losses = [loss_of(config_of(args.data, width, rate, base, args.steps), args.steps) for rate in args.rates]
            shown = [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]
            print(f"| {width} | {'yes' if base else 'no'} |", " | ".join(shown), "|", flush=True)


if __name__ == "__main__":
    run_command(lambda _: main(sys.argv[1:]))
