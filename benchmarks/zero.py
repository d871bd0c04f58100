"""Seconds of an optimizer step: our ZeRO stages, torch's DDP and FSDP2, Hugging Face's Trainer, in turns.

    deepspeed --num_gpus 2 benchmarks/zero.py --out FOLDER [--sizes 12m 50m] [--rows NAME ...] [--rounds 7]
        [--minutes 30] [--micro_batch_size 4] [--accumulation 4] [--precision fp32] [--recompute] [--compile]

All rows live in one process group, of GPUs or of CPU processes. In each round every row takes one step, in an order
that is reversed every other round, so that a busy minute hits all rows. The first two rounds warm up, and the second
also measures memory. The time of a step is the slowest rank's, that of a row the median of the rounds. FOLDER/zero.md
has the tables, FOLDER/zero.json all numbers; both are written after each size.

All rows start from the same weights and take the same batches, with the same AdamW, clipping and learning rate. A row
whose losses are not those of the first row computes something else, and is marked.

zero0 to zero3: `train_step` of train.py, with its checks of loss and gradient, and ds_config.json as it is.
zero3_whole, zero3_gathered: the same with ZeRO-3's thresholds so that all weights, or only vectors, stay on each rank.
ddp, fsdp2_*: the same GPT in a plain loop, with torch's fused AdamW. fsdp2_whole: weights are gathered once a step.
*_once: gradients are reduced once a step, else at every micro-batch. In bf16 the weights that AdamW changes are
float32; FSDP2 gathers and reduces bf16, DDP reduces bf16.
hf_zero3: transformers' model of the same architecture with our weights, in its Trainer with DeepSpeed ZeRO-3, values
"auto" and the Trainer's own AdamW. `Trainer.train()` itself runs: the other rows take their steps inside its callback
`on_step_end`. Its step is timed from the return of that callback to its next call, which includes the data loader.
Attention, GELU and loss are transformers' own. --compile compiles the model of every row but this one.

Memory is that of the rank which has most, and of the row alone: what it holds after its first step, and the most above
that during its second. On a GPU by torch.cuda.max_memory_allocated, reset for the step; on a CPU by the C library's
count of what the process has allocated (mallinfo2), read every half a millisecond.
"""

import dataclasses
import functools
import gc
import shlex
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import zero_trainer
from benchmarks.turns import WARMUP, Row, take_turns
from benchmarks.zero_rows import TOLERANCE, Setting, ddp, fsdp2, zero
from minzero import benchmark, dist
from minzero.commands import run_command
from minzero.files import make_folder, write_atomically, write_json
from minzero.flags import SUPPRESS, FlagParser, a_number, a_path, at_least
from minzero.planner.units import in_units
from minzero.sizes import count_parameters

SIZES = {
    "12m": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 4096},
    "50m": {"n_layer": 9, "n_head": 10, "n_embd": 640, "block_size": 256, "vocab_size": 8192},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 256},  # its figures mean nothing
}
TABLES = {  # heading: the rows of the table; the tokens/s of the others are divided by those of the first
    "weights gathered for each use": (
        "fsdp2_gathered",
        "fsdp2_gathered_once",
        "zero3_gathered",
        "hf_zero3",
    ),
    "weights kept whole": (
        "fsdp2_whole",
        "fsdp2_whole_once",
        "zero3",
        "zero3_whole",
        "ddp",
        "zero0",
        "zero1",
        "zero2",
    ),
}
COLUMNS = {
    "step, s": ("step_seconds", "{:.3f}".format),
    "fastest, s": ("fastest_seconds", "{:.3f}".format),
    "tokens/s": ("tokens_per_second", "{:,.0f}".format),
    "of the first row": ("ratio", "{:.2f}".format),
    "peak memory": ("peak_memory_bytes", in_units),
    "last loss": ("last_loss", "{:.5f}".format),
    "loss differs by": ("largest_loss_difference", "{:.1e}".format),
}


# ---- the rows


def above_vectors(shape):
    """More elements than the longest bias has."""
    return max(shape.mlp_width, 3 * shape.n_embd) + 1


def all_parameters(shape):
    return count_parameters(shape)[0]


ROWS = {  # name: (title, how it is built; the Trainer builds its own)
    "zero0": ("ours, ZeRO-0", zero(0)),
    "zero1": ("ours, ZeRO-1", zero(1)),
    "zero2": ("ours, ZeRO-2", zero(2)),
    "zero3": ("ours, ZeRO-3, ds_config.json", zero(3)),
    "zero3_whole": (
        "ours, ZeRO-3, weights kept whole",
        zero(3, stage3_param_persistence_threshold=all_parameters),
    ),
    "zero3_gathered": (
        "ours, ZeRO-3, matrices gathered for each use",
        zero(3, stage3_param_persistence_threshold=above_vectors),
    ),
    "ddp": ("torch DDP", ddp),
    "fsdp2_gathered": ("FSDP2, gathered for each use", fsdp2(gathered=True, once=False)),
    "fsdp2_gathered_once": ("FSDP2, gathered for each use, reduces once a step", fsdp2(gathered=True, once=True)),
    "fsdp2_whole": ("FSDP2, gathered once a step", fsdp2(gathered=False, once=False)),
    "fsdp2_whole_once": ("FSDP2, gathered once a step, reduces once a step", fsdp2(gathered=False, once=True)),
    "hf_zero3": ("Hugging Face's Trainer, ZeRO-3", None),
}


# ---- results


def measure_size(args, size, group, folder, minutes):
    """Measure all rows at one size. Returns its part of the results."""
    setting = Setting(args, size, SIZES[size], group, folder)
    rows = [Row(name, group.device, in_trainer=ROWS[name][1] is None) for name in args.rows]
    for row in rows:
        if row.in_trainer:
            continue
        row.build(functools.partial(ROWS[row.name][1], setting))
        dist.print0(f"{size}: {row.name} {row.failed or 'built'}")
    turns = take_turns(rows, args.rounds, time.monotonic() + 60 * minutes)
    for row in rows:
        if row.in_trainer:
            zero_trainer.run(setting, row, turns)
    for _ in turns:  # without the Trainer, or where it has failed
        pass
    shape = setting.config.model
    tokens = setting.config.train.global_batch_tokens
    found = [result_of(row, tokens, args.accumulation) for row in rows]
    compare_losses(found, TOLERANCE[setting.precision])
    return {
        "model": dataclasses.asdict(shape),
        "parameters": count_parameters(shape)[0],
        "precision": setting.precision,
        "micro_batch_size": args.micro_batch_size,
        "micro_batches": args.accumulation,
        "tokens_per_step": tokens,
        "rounds": max((len(result.get("all_step_seconds", [])) for result in found), default=0),
        "rows": found,
    }


def result_of(row, tokens, accumulation):
    """The numbers of a row over all ranks. Every rank must call this."""
    everyone = dist.gather((row.failed, row.seconds, row.losses, row.peak))
    failures, seconds, losses, peaks = zip(*everyone, strict=True)
    result = {"row": row.name, "title": ROWS[row.name][0], "failed": next(filter(None, failures), None)}
    if result["failed"]:
        return result
    slowest = [max(times) for times in zip(*seconds, strict=True)]
    result["step_seconds"] = statistics.median(slowest)
    result["fastest_seconds"] = min(slowest)
    result["all_step_seconds"] = slowest
    result["tokens_per_second"] = tokens / result["step_seconds"]
    result["tokens_per_step"] = tokens
    result["micro_batches"] = accumulation
    result["peak_memory_bytes"] = None if None in peaks else max(peaks)
    result["losses"] = [statistics.mean(values) for values in zip(*losses, strict=True)]
    result["last_loss"] = result["losses"][-1]
    return result


def compare_losses(results, tolerance):
    """Mark the rows whose losses are not the first row's."""
    measured = [result for result in results if not result["failed"]]
    for result in measured:
        pairs = zip(result["losses"], measured[0]["losses"], strict=False)
        differences = [abs(found - expected) / abs(expected) for found, expected in pairs]
        result["largest_loss_difference"] = float(np.max(differences))  # a NaN, if one is among them
        result["losses_agree"] = result["largest_loss_difference"] <= tolerance
        if not result["losses_agree"]:
            result["title"] += " (LOSSES DIFFER: another computation)"


def add_ratios(results):
    """In each of TABLES, tokens/s over those of its first row."""
    by_name = {result["row"]: result for result in results if not result["failed"]}
    for names in TABLES.values():
        measured = [by_name[name] for name in names if name in by_name]
        for result in measured:
            result["ratio_to"] = measured[0]["row"]
            result["ratio"] = result["tokens_per_second"] / measured[0]["tokens_per_second"]


def markdown(results):
    """All tables with their conditions, as Markdown."""
    conditions = results["conditions"]
    versions = ", ".join(f"{name} {value}" for name, value in conditions["versions"].items() if name != "device")
    lines = ["# A step of ZeRO, DDP, FSDP2 and Hugging Face's Trainer", ""]
    lines += [f"{conditions['ranks']} ranks on {conditions['device']}; {conditions['date']}; {versions}."]
    lines += [f"Recomputed: {conditions['recompute']}; compiled: {conditions['compile']}.", ""]
    for size, found in results["sizes"].items():
        by_name = {result["row"]: result for result in found["rows"]}
        for heading, names in TABLES.items():
            rows = [by_name[name] for name in names if name in by_name]
            if rows:
                lines += [f"## {size}, {heading}", "", *benchmark.table(rows, COLUMNS), ""]
        sequences = f"{found['micro_batch_size']} x {found['model']['block_size']}"
        lines += [
            f"{found['parameters']:,} parameters, {found['precision']}; {found['tokens_per_step']:,} tokens a step = "
            f"{conditions['ranks']} x {found['micro_batches']} micro-batches x {sequences}; median of "
            f"{found['rounds']} rounds after {WARMUP}. Memory: {conditions['memory']}.",
            "",
        ]
    return "\n".join([*lines, f"`{conditions['command']}`", ""])


def conditions_of(args, group):
    if group.device.type == "cuda":
        memory = "allocated by the row, by torch.cuda.max_memory_allocated"
    else:
        memory = "allocated by the row, by the C library's mallinfo2 (not resident memory)"
    return {
        "device": benchmark.this_device()[0],
        "ranks": group.world_size,
        "date": str(date.today()),
        "versions": dist.versions() | library_versions(),
        "recompute": args.recompute,
        "compile": args.compile,
        "memory": memory,
        "command": shlex.join(["benchmarks/zero.py", *args.given]),
    }


def library_versions():
    found = {}
    for name in ("transformers", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def options(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("--out", type=a_path, required=True, help="folder for zero.md and zero.json")
    parser.add_argument("--sizes", nargs="+", default=["12m", "50m"], choices=SIZES)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--rounds", type=at_least(1), default=7, help="steps of each row that count")
    parser.add_argument("--minutes", type=a_number(above=True), default=30, help="for the rounds of all sizes together")
    parser.add_argument("--micro_batch_size", type=at_least(1), default=4)
    parser.add_argument("--accumulation", type=at_least(1), default=4, help="micro-batches of a rank in a step")
    parser.add_argument("--precision", default="auto", choices=["auto", *TOLERANCE])
    parser.add_argument("--recompute", action="store_true", help="recompute every block in the backward pass")
    parser.add_argument("--compile", action="store_true", help="compile the blocks and the loss of our model")
    parser.add_argument("--local_rank", help=SUPPRESS)  # from DeepSpeed's launcher; the environment has it too
    args = parser.parse_args(arguments)
    args.given = [word for word in arguments if not word.startswith("--local_rank")]
    return args


def main(arguments):
    args = options(arguments)
    group = dist.start_process_group()
    with dist.all_or_none():
        make_folder("--out", args.out)
    results = {"conditions": conditions_of(args, group), "sizes": {}}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="minzero_zero_") as folder:
        for place, size in enumerate(args.sizes):
            minutes = max(0, args.minutes - (time.monotonic() - began) / 60) / (len(args.sizes) - place)
            results["sizes"][size] = measure_size(args, size, group, Path(folder), minutes)
            add_ratios(results["sizes"][size]["rows"])
            gc.collect()
            if group.rank == 0:
                write_json(args.out / "zero.json", results)
                write_atomically(args.out / "zero.md", markdown(results).encode())
    dist.print0(markdown(results))
    dist.stop_process_group()


if __name__ == "__main__":
    run_command(main, may_be_many=True)
