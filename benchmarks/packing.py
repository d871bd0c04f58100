"""How much faster conversations are learned when they are packed, each attending to itself, than when they are padded.

    python data/stdlib_chat/prepare.py
    python benchmarks/packing.py [--block_size 128 512] [--rounds 7] [--windows 16]

The same conversations, in the model of configs/tiny.json: of each micro-batch the forward and backward pass and a step
of AdamW, eager, in one process, in fp32 on a CPU, in bf16 on a GPU.
packed: what train.py computes, windows filled by best fit, with document masks.
padded to block_size: one conversation a row.
padded to the longest: the same, and each micro-batch is as wide as its longest conversation.
Micro-batches have as many rows in all three. They take turns, round by round, so that a busy minute hits all; medians
are printed, after a round that does not count. A token is one that is read: padding is none.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model
from benchmarks.nanogpt import now, this_torch_device
from minzero.config.load import load_config
from minzero.data.packing import PackedStream
from minzero.init_from import model_defaults
from minzero.sizes import IGNORE_INDEX


def packed(stream, windows, rows):
    """Micro-batches of a PackedStream's windows: [(inputs, targets, positions)], each (rows, block_size)."""
    return [stream.batch(windows[start : start + rows]) for start in range(0, len(windows), rows)]


def padded(stream, windows, rows, width=None):
    """The conversations of these windows, one a row, in random order: [(inputs, targets)], each (rows, width). width:
    None for that of the longest of each micro-batch."""
    documents = np.concatenate([stream.order[stream.first[w] : stream.first[w + 1]] for w in windows])
    np.random.default_rng(0).shuffle(documents)
    batches = []
    for start in range(0, len(documents), rows):
        mine = documents[start : start + rows]
        inputs = np.zeros((len(mine), width or stream.lengths[mine].max() - 1), dtype=np.int64)
        targets = np.full_like(inputs, IGNORE_INDEX)
        for row, document in enumerate(mine):
            of = slice(0, int(stream.lengths[document]) - 1)
            inputs[row, of], targets[row, of], _ = stream.example(int(stream.document_starts[document]), of.stop)
        batches.append((inputs, targets))
    return batches


def trainer(config, device):
    """A function that takes one step for each of some micro-batches."""
    gpt = model.GPT(config.model, config.train.seed).to(device)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4)

    def learn(batches):
        for inputs, targets, *positions in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = gpt(inputs.to(device), targets.to(device), *positions)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return learn


def measure(config, block_size, windows, rounds):
    """Prints a table for conversations of so many windows."""
    config.model.block_size = block_size
    device = this_torch_device()
    stream = PackedStream(config.data.path, "train", block_size)
    rows = config.train.micro_batch_size
    chosen = np.random.default_rng(0).permutation(stream.windows)[:windows]
    ways = {
        "packed": packed(stream, chosen, rows),
        "padded to block_size": padded(stream, chosen, rows, block_size),
        "padded to the longest": padded(stream, chosen, rows),
    }
    ways = {name: [tuple(map(torch.from_numpy, batch)) for batch in batches] for name, batches in ways.items()}
    conversations = sum(int(stream.first[w + 1] - stream.first[w]) for w in chosen)
    of_window = [stream.lengths[stream.order[stream.first[w] : stream.first[w + 1]]] - 1 for w in chosen]
    tokens = int(sum(map(np.sum, of_window)))
    learn = trainer(config, device)
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            started = now(device)
            learn(ways[name])
            if number:
                seconds[name].append(now(device) - started)
    print(
        f"\nblock_size {block_size}: {conversations} conversations of {tokens / conversations:.0f} tokens, "
        f"{rows} rows a micro-batch, {rounds} rounds"
    )
    print("| batches | micro-batches | of their places filled | tokens/s | conversations/s | times as fast |")
    print("|---|---|---|---|---|---|")
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, batches in ways.items():
        places = sum(batch[0].numel() for batch in batches)
        ratio = statistics.median(
            slow / fast for slow, fast in zip(seconds["padded to block_size"], seconds[name], strict=True)
        )
        print(
            f"| {name} | {len(batches)} | {tokens / places:.0%} | {tokens / medians[name]:,.0f} | "
            f"{conversations / medians[name]:,.0f} | {ratio:.2f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib_chat", help="folder of conversations")
    parser.add_argument("--block_size", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--windows", type=int, default=16, help="packed windows whose conversations are learned")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(["configs/tiny.json", "--data.path", args.data], model_defaults)
    began = time.strftime("%Y-%m-%d")
    print(f"{began}, {this_torch_device()}, {args.threads} threads, torch {torch.__version__}")
    for block_size in args.block_size:
        measure(config, block_size, args.windows, args.rounds)


if __name__ == "__main__":
    main()
