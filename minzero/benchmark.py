"""Measures settings: each is a short run of train.py in a process group of its own, and becomes a row of a table.

Used by benchmark.py and benchmarks/gpu.py. A run is started by `launch`, ended as soon as its steps are in
metrics.jsonl, and neither evaluates nor saves.
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from minzero import report
from minzero.config.deepspeed import gradient_accumulation
from minzero.config.sections import OF_A_LONG_RUN, LoraConfig, TrainConfig
from minzero.data.mixture import Mixture
from minzero.data.shards import token_dtype, write_shard
from minzero.errors import UserError
from minzero.files import ROOT, write_atomically, write_json
from minzero.metrics import read_metrics
from minzero.planner.memory import peak_bytes
from minzero.planner.search import with_choice
from minzero.planner.settings import settings_as_run
from minzero.planner.units import in_units
from minzero.plot import pyplot

# name on the command line: (title, stage, offload as in search.with_choice, whether all blocks are recomputed)
ROWS = {
    "ddp": ("DDP", 0, "none", False),
    "zero1": ("ZeRO-1", 1, "none", False),
    "zero2": ("ZeRO-2", 2, "none", False),
    "zero3": ("ZeRO-3", 3, "none", False),
    "checkpointing": ("ZeRO-3, activation checkpointing", 3, "none", True),
    "offload": ("ZeRO-3, optimizer on CPU", 3, "optimizer", False),
    "offload_checkpointing": ("ZeRO-3, optimizer on CPU, activation checkpointing", 3, "optimizer", True),
    "offload_param": ("ZeRO-3, optimizer and parameters on CPU", 3, "param", False),
}
SET_BY_ROWS = (
    "train.activation_checkpointing",
    "deepspeed.zero_optimization.stage",
    "deepspeed.zero_optimization.offload_optimizer",
    "deepspeed.zero_optimization.offload_param",
)
OUT_OF_TIME = "not done in the time it was given"
COLUMNS = {  # heading: (key of a row, how it is written)
    "step, s": ("step_seconds", "{:.3f}".format),
    "slowest, s": ("slowest_seconds", "{:.3f}".format),
    "tokens/s": ("tokens_per_second", "{:,.0f}".format),
    "TFLOP/s a rank": ("tflops", "{:.3g}".format),
    "MFU": ("mfu", "{:.1%}".format),
    "allocated": ("allocated_bytes", in_units),
    "reserved": ("reserved_bytes", in_units),
    "CPU memory": ("cpu_bytes", in_units),
    "predicted": ("predicted_bytes", in_units),
    "error": ("error", "{:+.1%}".format),
}


def this_device():
    """(a description of this machine's devices, the number of GPUs)."""
    import torch

    if gpus := torch.cuda.device_count():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
        except OSError:
            driver = "unknown"
        return f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}", gpus
    processor = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {processor[1] if processor else 'a CPU'}, no GPU", 0


def random_tokens(folder, config):
    """Shards of random tokens, for a model whose data is not there."""
    if config.model.vocab_size > 2**32:
        raise UserError(f"model.vocab_size: found {config.model.vocab_size}, expected at most {2**32}")
    folder.mkdir()
    tokens = max(2**20, 16 * (config.model.block_size + 1))
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        ids = generator.integers(config.model.vocab_size, size=tokens, dtype=token_dtype(config.model.vocab_size))
        write_shard(folder / f"{split}_000000.bin", ids)


def prepare_data(config, temporary):
    """Point the config at its data if it is prepared, else at random tokens, which are written. Returns which, in
    words."""
    model = config.model
    try:
        for split in ("train", "val"):
            more = config.train.seed, None, config.data.document_mask
            data = Mixture(config.data.path, split, model.block_size, model.vocab_size, *more)
            data.check_loss("next_token")
    except UserError as error:
        random_tokens(temporary / "data", config)
        config.data.path = str(temporary / "data")
        config.data.document_mask = False
        return f"random tokens ({error})"
    return f"data {config.data.path}"


# ---- one run


def benchmark_config(config, folder):
    """A copy of the configuration for a run in this folder whose speed and memory alone are wanted: it evaluates and
    saves nothing, logs every step, and continues until it is ended."""
    config = copy.deepcopy(config)
    train = config.train
    train.out_dir = str(folder)
    train.resume = "never"
    train.init_from = None
    config.lora = LoraConfig()  # adapters too need a model to start from: all weights are trained
    train.log_every = 1
    train.eval_every = train.save_every = 0
    for name in (*OF_A_LONG_RUN, "loss", "dpo_beta"):  # other losses need a model to start from
        setattr(train, name, getattr(TrainConfig(), name))
    train.save_best = False
    train.max_tokens = 10**9 * train.global_batch_tokens
    return config


def run_until(finished, command, log_path, seconds=math.inf, environment=None):
    """Run a command in a process group of its own until finished() is true, it ends by itself, or its seconds are
    over; then end the whole group. Returns its exit code, or None if the time was over."""
    deadline = time.monotonic() + seconds
    out_of_time = False
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,  # so that it can be ended with all its ranks
        )
        try:
            while process.poll() is None and not finished() and not out_of_time:
                time.sleep(0.2)
                out_of_time = time.monotonic() > deadline
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return None if out_of_time else code


def launch(config, gpus, wanted, folder, on_gpu, program=("train.py",), seconds=math.inf, environment=None):
    """Run train.py on this many ranks until `wanted` steps are logged. Returns (their lines of metrics.jsonl, None), or
    the lines so far and the reason why there is no measurement.

    program: the script, a path in the repository, and its first arguments; seconds: the most it may
    take; environment: more variables."""
    folder.mkdir()
    write_json(folder / "benchmark.json", config.to_dict())
    environment = dict(environment or {})
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"

    def finished():
        return len(steps_of(folder)) >= wanted

    command = [*launch_command(gpus, program), folder / "benchmark.json"]
    code = run_until(finished, command, folder / "log", seconds, environment)
    lines = steps_of(folder)
    log = (folder / "log").read_text(errors="replace")
    if len(lines) < wanted:
        return lines, why_it_ended(log, code)
    return lines[:wanted], why_not_as_asked(config, folder, log)


def launch_command(ranks, program):
    """The command that starts a program on this many ranks: under DeepSpeed's launcher if there are several."""
    path, *arguments = program
    if ranks == 1:
        return [sys.executable, str(ROOT / path), *arguments]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")  # of this environment, active or not
    if not launcher.exists():
        launcher = shutil.which("deepspeed") or "deepspeed"
    flags = ["-q", "--num_gpus", str(ranks), "--master_port", str(port)]
    return [str(launcher), *flags, str(ROOT / path), *arguments]


def steps_of(folder):
    return [line for line in read_metrics(folder) if "step_seconds" in line]


def why_it_ended(log, code):
    """Why a run ended, in one line of its log: train.py's own error, a lack of memory, or the first exception. code:
    the process's exit code, None if it was ended because its time was over."""
    if code is None:
        return OUT_OF_TIME
    for pattern in (
        r"^\w+\.py: (?:rank \d+: )?error: (.*)$",
        r"^.*?(\S*(?:OutOfMemoryError|out of memory|can't allocate memory).*)$",
        r"^(?:\[rank\d+\]: ?)?(\w[\w.]*(?:Error|Exception)\b.*)$",
    ):
        if found := re.search(pattern, log, re.MULTILINE):
            return found[1].strip()
    if code in (-signal.SIGKILL, 256 - signal.SIGKILL):  # the launcher's code for a rank that was killed
        return "a rank was killed (signal 9), as a machine does that runs out of memory"
    return f"ended with code {code} and no error"


def why_not_as_asked(config, folder, log):
    """None if the run compiled its model or was not told to, else why it did not: train.py tries the compiler first and
    runs eagerly where that fails, which would be a measurement of something else."""
    if config.train.compile is not True or json.loads((folder / "config.json").read_text())["compiled"]:
        return None
    found = re.search(r"compiled: no \((.*)\)$|^warning: not compiled on rank \d+: (.*)$", log, re.MULTILINE)
    reason = found[1] or found[2] if found else "no reason in the log"
    return f"train.compile is true, but the model was not compiled: {reason}"


# ---- one row


def predicted_bytes(config, gpus, made):
    """plan.py's peak of the tensors on one device, with the stage, the precision, the compilation and the values of
    "auto" that the run in fact used. made: its config.json."""
    return peak_bytes(settings_as_run(config, gpus, made))


def measure(config, gpus, steps, warmup, folder, on_gpu, **launching):
    """Run a configuration and return its row: times in seconds, sizes in bytes and of the rank that has most.
    `failed` is the reason why there are no numbers, or None. launching: more arguments of launch."""
    config = benchmark_config(config, folder)
    lines, failed = launch(config, gpus, warmup + steps, folder, on_gpu, **launching)
    if failed:
        return {"failed": failed}
    made = json.loads((folder / "config.json").read_text())
    lines = lines[warmup:]
    last = lines[-1]
    result = {"failed": None} | speeds([line["step_seconds"] for line in lines], config.train.global_batch_tokens)
    result["losses"] = [line["loss"] for line in lines]
    for rate in ("tflops", "mfu"):  # of the last step, at the mean step's speed
        result[rate] = last[rate] and last[rate] * last["step_seconds"] / result["step_seconds"]
    result["allocated_bytes"] = last["peak_memory_bytes"] if on_gpu else None
    result["reserved_bytes"] = last.get("peak_reserved_bytes")
    result["cpu_bytes"] = last.get("peak_cpu_bytes") or (None if on_gpu else last["peak_memory_bytes"])
    result["predicted_bytes"] = predicted_bytes(config, gpus, made)
    result |= {name: made[name] for name in ("precision", "kernels", "compiled", "versions")}
    result["config"] = made  # plan.py --measured reads it
    # resident memory holds Python, torch and what the allocator keeps: no measure of the tensors
    result["error"] = result["predicted_bytes"] / result["allocated_bytes"] - 1 if on_gpu else None
    return result


def speeds(seconds, tokens):
    """The part of a row that follows from the seconds of each step, of so many tokens."""
    mean = statistics.mean(seconds)
    return {
        "step_seconds": mean,
        "slowest_seconds": max(seconds),
        "all_step_seconds": seconds,
        "tokens_per_second": tokens / mean,
    }


# ---- the table


def table(results, columns=COLUMNS):
    """Lines of a Markdown table of these rows, without columns of which nothing is known, as MFU without a GPU.
    columns: as COLUMNS; the first is always there."""
    known = {key for result in results for key, value in result.items() if value is not None}
    first = next(iter(columns))
    columns = {heading: entry for heading, entry in columns.items() if heading == first or entry[0] in known}
    rows = []
    for result in results:
        if result["failed"]:
            cells = [f"failed: {result['failed']}"] + [""] * (len(columns) - 1)
        else:
            cells = [write(result[key]) if result.get(key) is not None else "-" for key, write in columns.values()]
        rows.append([result["title"], *cells])
    return report.table(["setting", *columns], rows, right_from=1).splitlines()


def markdown(results, conditions):
    """The table and its conditions, as Markdown."""
    lines = [f"# {conditions['config']}: what each setting costs", "", *table(results)]
    lines += ["", *conditions["notes"], "", f"`{conditions['command']}`"]
    return "\n".join(lines) + "\n"


def draw(results, conditions, picture):
    """Bars of each row's memory, measured beside predicted, and of its throughput."""
    plt = pyplot()

    figure, (memory, speed) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.5 * len(results)), sharey=True, layout="constrained"
    )
    measured = "allocated_bytes" if conditions["gpus_found"] else "cpu_bytes"
    label = "measured: allocated" if conditions["gpus_found"] else "measured: resident, with Python and libraries"
    for place, result in enumerate(results):
        if result["failed"]:
            memory.text(0, place, f" failed: {result['failed'][:60]}", va="center", fontsize=8)
            continue
        for offset, color, key, text in (
            (-0.2, "C0", measured, label),
            (0.2, "C1", "predicted_bytes", "predicted: tensors"),
        ):
            size = result[key] or 0
            bar = memory.barh(place + offset, size / 2**30, 0.36, color=color)
            memory.bar_label(bar, [in_units(size)], padding=3, fontsize=8)
            bar.set_label(text if text not in memory.get_legend_handles_labels()[1] else "_")
        bar = speed.barh(place, result["tokens_per_second"], 0.6, color="C2")
        speed.bar_label(bar, fmt="{:,.0f}", padding=3, fontsize=8)
    memory.set_yticks(range(len(results)), [result["title"].replace(", ", ",\n", 1) for result in results], fontsize=9)
    memory.invert_yaxis()
    memory.set(xlabel="GiB", title="peak memory of a rank")
    speed.set(xlabel="tokens/s", title="throughput")
    speed.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    for axes in (memory, speed):
        axes.margins(x=0.2)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(conditions["config"])
    if memory.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def describe(config, conditions, data, results):
    """The conditions, without which the numbers mean nothing, as sentences."""
    gpus, train = conditions["gpus"], config.train
    accumulation = gradient_accumulation(config, gpus)
    notes = [
        f"{gpus} rank{'s' if gpus > 1 else ''} on {conditions['device']}; {conditions['date']}. Average of "
        f"{conditions['steps']} steps after {conditions['warmup']} that are not counted; "
        f"{train.global_batch_tokens:,} tokens a step = {gpus} x {accumulation} micro-batches x "
        f"{train.micro_batch_size} x {config.model.block_size}; {data}."
    ]
    if measured := [result for result in results if not result["failed"]]:
        made, versions = measured[0], measured[0]["versions"]
        names = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed", "git"))
        notes.append(f"{made['precision']}, kernels {made['kernels']}, compiled: {made['compiled']}; {names}.")
    if conditions["gpus_found"]:
        notes.append("Memory is that of the rank which has most: allocated and reserved on its GPU; CPU: resident.")
    else:
        notes.append(
            "Memory is resident (CPU memory), of the rank which has most, with Python, its libraries and what the "
            "allocator keeps; the prediction is of tensors on a device alone, and what is offloaded stays in the same "
            "memory here. So the two are not compared, and there is no error."
        )
    return notes


def measure_rows(config, names, conditions, out, results):
    """Measure these of ROWS and write out/<config>.md, .json and .png after each. results: a list that receives the
    rows, of which some may be there when a KeyboardInterrupt ends this.

    conditions: config (its name), gpus, gpus_found, device, steps, warmup, date, command; `notes` are added."""
    files = {kind: out / f"{Path(conditions['config']).stem}.{kind}" for kind in ("md", "json", "png")}
    on_gpu = bool(conditions["gpus_found"])
    with tempfile.TemporaryDirectory(prefix="minzero_benchmark_", ignore_cleanup_errors=True) as temporary:
        with_data = copy.deepcopy(config)
        data = prepare_data(with_data, Path(temporary))
        conditions["notes"] = describe(config, conditions, data, [])  # in case the first row is interrupted
        for name in names:
            title, stage, offload, recompute = ROWS[name]
            print(f"{title} ...", file=sys.stderr, flush=True)
            folder = Path(temporary) / name
            row_config = with_choice(with_data, stage, offload, recompute, config.train.micro_batch_size)
            measured = measure(
                row_config, conditions["gpus"], conditions["steps"], conditions["warmup"], folder, on_gpu
            )
            results.append({"row": name, "title": title} | measured)
            conditions["notes"] = describe(config, conditions, data, results)
            write_atomically(files["md"], markdown(results, conditions).encode())
            write_json(files["json"], {"conditions": conditions, "rows": results})
            draw(results, conditions, files["png"])
            shutil.rmtree(folder, ignore_errors=True)
