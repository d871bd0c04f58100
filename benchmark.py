"""What a setting costs, measured: DDP, ZeRO's stages, offload and recomputation, each as a short run of train.py.

    python benchmark.py configs/1p7b.json [--gpus N] [--steps 10] [--warmup 3] [--rows ddp zero3 ...] [--out FOLDER]
                        [--json] [--section.key value ...]

Every row is a process group of its own, started by DeepSpeed's launcher on this machine and ended as soon as its
steps are in metrics.jsonl: nothing is evaluated or saved, and the runs live in a temporary folder. A row that fails
shows why, and the others continue. Writes FOLDER/<config>.md, .json and .png (default out/benchmark) after each row.
Without a GPU the ranks are CPU processes.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

from minzero.config import ROOT, UserError, gradient_accumulation, load_config, run_command
from minzero.data.mixture import Mixture
from minzero.data.shards import token_dtype, write_shard
from minzero.files import make_folder, write_atomically, write_json
from minzero.flags import FlagParser, a_path, at_least
from minzero.metrics import read_metrics
from minzero.planner.memory import simulate
from minzero.sizes import check_counted
from plan import in_units, settings_of, with_choice

# name on the command line: (title, stage, what is kept in CPU memory, whether all blocks are recomputed)
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
SET_BY_ROWS = ("train.activation_checkpointing", "deepspeed.zero_optimization.stage")
SET_BY_ROWS += ("deepspeed.zero_optimization.offload_optimizer", "deepspeed.zero_optimization.offload_param")
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
    """The devices of this machine in words, and the number of GPUs."""
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


def find_data(config, temporary):
    """Point the config at its data if it is prepared, else at random tokens. Returns which, in words."""
    model = config.model
    try:
        for split in ("train", "val"):
            Mixture(config.data.path, split, model.block_size, model.vocab_size, config.train.seed)
    except UserError as error:
        random_tokens(temporary / "data", config)
        config.data.path = str(temporary / "data")
        return f"random tokens ({error})"
    return f"data {config.data.path}"


def configure(config, row):
    """The configuration of one row."""
    _, stage, offload, recompute = ROWS[row]
    return with_choice(config, stage, offload, recompute, config.train.micro_batch_size)


def as_measured(config, folder):
    """A copy of the configuration for a run in this folder of which nothing but speed and memory is wanted: nothing is
    evaluated or saved, every step is logged, and the run continues until it is ended."""
    config = copy.deepcopy(config)
    train = config.train
    train.out_dir, train.resume, train.init_from, train.loggers = str(folder), "never", None, []
    train.log_every, train.eval_every, train.save_every, train.save_every_seconds = 1, 0, 0, 0
    train.save_best, train.max_tokens = False, 10**9 * train.global_batch_tokens
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
    """Run train.py, under DeepSpeed's launcher if there are several ranks, until `wanted` steps are logged. Returns
    their lines of metrics.jsonl and None, or what there is of them and why the run ended early. program: what takes
    train.py's place, a path in the repository and its arguments; environment: more variables."""
    folder.mkdir()
    write_json(folder / "benchmark.json", config.to_dict())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / program[0]), *program[1:]]
    if gpus > 1:
        beside = Path(sys.executable).with_name("deepspeed")  # of this environment, active or not
        launcher = [str(beside) if beside.exists() else shutil.which("deepspeed") or "deepspeed", "-q"]
        command = [*launcher, "--num_gpus", str(gpus), "--master_port", str(port), *command[1:]]
    environment = (environment or {}) | ({} if on_gpu else {"DS_ACCELERATOR": "cpu"})

    def finished():
        return len(steps_of(folder)) >= wanted

    code = run_until(finished, [*command, folder / "benchmark.json"], folder / "log", seconds, environment)
    lines = steps_of(folder)
    log = (folder / "log").read_text(errors="replace")
    return lines[:wanted], None if len(lines) >= wanted else why_it_ended(log, code)


def steps_of(folder):
    return [line for line in read_metrics(folder) if "step_seconds" in line]


def why_it_ended(log, code):
    """One line out of a run's log: what train.py says of bad input, a lack of memory, or the first exception. code: the
    process's exit code, None if it was ended because its time was over."""
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


def predicted_bytes(config, gpus, made):
    """Peak of the tensors on one device, for what the run in fact used: `made` is its config.json."""
    settings = dataclasses.replace(settings_of(config, gpus), precision=made["precision"], compiled=made["compiled"])
    return max(total for total, _ in simulate(settings)[0].peaks.values())


def measure(config, gpus, steps, warmup, folder, on_gpu, **launching):
    """What a configuration costs, as a dictionary: times in seconds, sizes in bytes and of the rank that has most.
    `failed` is why there are no numbers. launching: more arguments of launch."""
    config = as_measured(config, folder)
    lines, failed = launch(config, gpus, warmup + steps, folder, on_gpu, **launching)
    result = {"failed": failed}
    if failed:
        return result
    made, lines = json.loads((folder / "config.json").read_text()), lines[warmup:]
    seconds, last = [line["step_seconds"] for line in lines], lines[-1]
    mean = statistics.mean(seconds)
    result |= {"step_seconds": mean, "slowest_seconds": max(seconds), "all_step_seconds": seconds}
    result["losses"] = [line["loss"] for line in lines]
    result |= {"tokens_per_second": config.train.global_batch_tokens / mean}
    for rate in ("tflops", "mfu"):
        result[rate] = last[rate] and last[rate] * last["step_seconds"] / mean
    result |= {
        "allocated_bytes": last["peak_memory_bytes"] if on_gpu else None,
        "reserved_bytes": last.get("peak_reserved_bytes"),
        "cpu_bytes": last.get("peak_cpu_bytes") or (None if on_gpu else last["peak_memory_bytes"]),
        "predicted_bytes": predicted_bytes(config, gpus, made),
        "precision": made["precision"],
        "kernels": made["kernels"],
        "compiled": made["compiled"],
        "versions": made["versions"],
    }
    # resident memory holds Python, torch and what the allocator keeps: no measure of the tensors
    result["error"] = result["predicted_bytes"] / result["allocated_bytes"] - 1 if on_gpu else None
    return result


def table(results, columns=COLUMNS):
    """Lines of a Markdown table of these rows, without columns of which nothing is known, as MFU without a GPU.
    columns: as COLUMNS; the first is always there."""
    known = {key for result in results for key, value in result.items() if value is not None}
    columns = {head: entry for place, (head, entry) in enumerate(columns.items()) if entry[0] in known or not place}
    lines = [f"| setting | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for result in results:
        cells = [write(result[key]) if result.get(key) is not None else "-" for key, write in columns.values()]
        if result["failed"]:
            cells = [f"failed: {result['failed']}".replace("|", "\\|")] + [""] * (len(columns) - 1)
        lines.append(f"| {result['title']} | {' | '.join(cells)} |")
    return lines


def markdown(results, conditions):
    """The table and its conditions, as Markdown."""
    lines = [f"# {conditions['config']}: what each setting costs", "", *table(results)]
    lines += ["", *conditions["notes"], "", f"`{conditions['command']}`"]
    return "\n".join(lines) + "\n"


def draw(results, conditions, picture):
    """Bars of each row's memory, measured beside predicted, and of its throughput."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
    speed.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    for axes in (memory, speed):
        axes.margins(x=0.2)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(conditions["config"])
    if memory.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def describe(config, gpus, device, data, options, results):
    """The conditions, without which the numbers mean nothing, as sentences."""
    accumulation = gradient_accumulation(config, gpus)
    notes = [
        f"{gpus} rank{'s' if gpus > 1 else ''} on {device}; {date.today().isoformat()}. Average of {options.steps} "
        f"steps after {options.warmup} that are not counted; {config.train.global_batch_tokens:,} tokens a step "
        f"= {gpus} x {accumulation} micro-batches x {config.train.micro_batch_size} x {config.model.block_size}; "
        f"{data}."
    ]
    if measured := [result for result in results if not result["failed"]]:
        made, versions = measured[0], measured[0]["versions"]
        names = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed", "git"))
        notes.append(f"{made['precision']}, kernels {made['kernels']}, compiled: {made['compiled']}; {names}.")
    if options.gpus_found:
        notes.append("Memory is that of the rank which has most: allocated and reserved on its GPU; CPU: resident.")
    else:
        notes.append(
            "Memory is resident (CPU memory), of the rank which has most, with Python, its libraries and what the "
            "allocator keeps; the prediction is of tensors on a device alone, and what is offloaded stays in the same "
            "memory here. So the two are not compared, and there is no error."
        )
    return notes


def read_options(arguments):
    """benchmark.py's own flags, and what is left: the config file and its overrides."""
    parser = FlagParser(
        __doc__, "benchmark.py CONFIG [--gpus N] [--steps N] [--rows NAME ...] [--section.key value ...]"
    )
    parser.add_argument("--gpus", type=at_least(1))
    parser.add_argument("--steps", type=at_least(1), default=10)
    parser.add_argument("--warmup", type=at_least(0), default=3)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=a_path, default=Path("out/benchmark"))
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if unknown := [row for row in options.rows if row not in ROWS]:
        raise UserError(f"--rows: found {unknown[0]}, expected some of: {' '.join(ROWS)}")
    for argument in rest:
        name = argument.removeprefix("--").partition("=")[0]
        if any(name == key or name.startswith(key + ".") for key in SET_BY_ROWS):
            raise UserError(f"--{name}: every row sets this itself; choose the rows instead: --rows {' '.join(ROWS)}")
    return options, rest


def main(arguments):
    options, rest = read_options(arguments)
    config = load_config(rest)
    check_counted(config.model)
    device, options.gpus_found = this_device()
    gpus = options.gpus or options.gpus_found or 2
    if options.gpus_found and gpus > options.gpus_found:
        raise UserError(f"--gpus: found {gpus}, but this machine has {options.gpus_found}")
    gradient_accumulation(config, gpus)
    given = next((argument for argument in rest if argument.endswith(".json")), "configs/1p5b.json")
    make_folder("--out", options.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = []
    interrupted = False
    conditions = {"config": given, "gpus": gpus, "gpus_found": options.gpus_found, "device": device}
    conditions |= {"steps": options.steps, "warmup": options.warmup, "date": date.today().isoformat()}
    conditions |= {"command": f"python benchmark.py {shlex.join(arguments)}"}
    files = {kind: options.out / f"{Path(given).stem}.{kind}" for kind in ("md", "json", "png")}
    with tempfile.TemporaryDirectory(prefix="minzero_benchmark_", ignore_cleanup_errors=True) as temporary:
        planned = copy.deepcopy(config)
        data = find_data(planned, Path(temporary))
        for row in options.rows:
            print(f"{ROWS[row][0]} ...", file=sys.stderr, flush=True)
            folder = Path(temporary) / row
            on_gpu = bool(options.gpus_found)
            try:
                config_of_row = configure(planned, row)
                measured = measure(config_of_row, gpus, options.steps, options.warmup, folder, on_gpu)
                results.append({"row": row, "title": ROWS[row][0]} | measured)
            except KeyboardInterrupt:
                interrupted = True
                break
            conditions["notes"] = describe(config, gpus, device, data, options, results)
            write_atomically(files["md"], markdown(results, conditions).encode())
            write_json(files["json"], {"conditions": conditions, "rows": results})
            draw(results, conditions, files["png"])
            shutil.rmtree(folder, ignore_errors=True)
    if results:
        print(markdown(results, conditions))
        print(f"written: {', '.join(map(str, files.values()))}")
    if options.json and results:
        print(json.dumps({"conditions": conditions, "rows": results}))
    if interrupted:
        print(f"interrupted: {len(results)} of {len(options.rows)} rows measured", file=sys.stderr)
        raise SystemExit(130)
    if all(result["failed"] for result in results):
        raise UserError(f"{given}: no row ran; the first: {results[0]['failed']}")


if __name__ == "__main__":
    run_command(main)
