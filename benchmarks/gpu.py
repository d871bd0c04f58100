"""Measurements that need a GPU, all of them by one command, and as many of them as the time allows.

    python benchmarks/gpu.py --out FOLDER [--nanogpt PATH/TO/nanoGPT/model.py] [--data FOLDER]
                             [--parts speed kernels memory offload planner options convergence parity]
                             [--first N] [--rows NAME ...] [--minutes 9] [--again] [--beside] [--tiny]

speed: 124M and 1.5B parameters, against nanoGPT's model and step, and the cost of single choices. kernels: NVIDIA
Apex's and DeepSpeed's against torch's. memory: minGPT's table, and the deepest model that fits. offload: what its
settings cost. planner: plan.py's predicted memory against what was allocated. options: Muon, attention within
documents, LoRA. convergence: the losses of ZeRO's stages and of nanoGPT's step on the same batches. parity: bf16,
eager and compiled, against float32, for a small model of each family.

Each part is a list of measurements, the most important first (--first N: only so many of each; --rows: only these).
Every measurement is a process of its own: a run of train.py, as benchmark.py makes them, or a function of kernels.py,
nanogpt.py or parity.py. The remaining time is divided evenly among the remaining parts; what is not done by then is
ended.
--beside: other measurements run on the GPU at the same time, so no times are kept.
FOLDER/results.json is written after every measurement, and the same command continues with what is missing (--again:
also with what failed). FOLDER/report.md has all tables and their conditions. --tiny shrinks models and steps for two
CPU cores: it shows that everything runs, and its figures mean nothing.
"""

import importlib
import inspect
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts import PARTS, UNPREDICTED, Bench, Row, extensions_folder
from benchmarks.gpu_report import write_report
from minzero import benchmark
from minzero.commands import run_command
from minzero.config.build import build
from minzero.data.shards import write_shard
from minzero.errors import UserError
from minzero.files import git_commit, make_folder, write_json
from minzero.flags import FlagParser, a_number, a_path, at_least
from minzero.sizes import flops_per_token

LEAST_SECONDS = 15  # with less time left, no measurement is begun
TIMES = {"step_seconds", "slowest_seconds", "all_step_seconds", "tokens_per_second", "tflops", "mfu"}
FUNCTIONS = {  # name, as a row gives it: its module, which loads torch and DeepSpeed
    "products": "benchmarks.nanogpt",
    "nanogpt_speed": "benchmarks.nanogpt",
    "nanogpt_losses": "benchmarks.nanogpt",
    "compare_norms": "benchmarks.kernels",
    "compare_adams": "benchmarks.kernels",
    "parity": "benchmarks.parity",
}

# ---- measuring


def unlock_extensions(folder):
    """Have compiled extensions kept in this folder, and remove the locks there: a process that is ended while it
    compiles leaves its lock, and every later one would wait for it for ever."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    for lock in folder.rglob("lock"):
        lock.unlink(missing_ok=True)


def measure_row(bench, row, seconds, folder):
    """The result of one row, within these seconds, as a dictionary; `failed` is the reason why there is none, or
    None. folder: for the run, not there yet."""
    unlock_extensions(bench.extensions)
    result = {"title": row.title} | row.facts
    if row.impossible:
        return result | {"failed": row.impossible}
    if row.on_base:
        row.config.train.init_from = base_for(bench, row.config)
    if row.config:
        row.config.data.path = data_for(bench)
        result["micro_batch_size"] = row.config.train.micro_batch_size
        result["n_layer"] = row.config.model.n_layer
        result["flops_per_token"] = flops_per_token(row.config.model)
        result["global_batch_tokens"] = row.config.train.global_batch_tokens
    if row.function:
        return result | call_function(bench, row, seconds, folder)
    return result | run_training(bench, row, seconds, folder)


def run_training(bench, row, seconds, folder):
    """A run of train.py: its speed and memory, or the profiler's table if the row's config has one made."""
    steps, warmup = row.steps, row.warmup
    if bench.tiny and warmup:
        steps, warmup = min(steps, 2), min(warmup, 1)
    launching = {"seconds": seconds, "environment": row.environment}
    if row.switch:
        launching["program"] = ("benchmarks/gpu.py", "--switch", row.switch)
    if not row.config.train.profile:
        result = benchmark.measure(row.config, 1, steps, warmup, folder, bool(bench.gpus), **launching)
        if row.switch in UNPREDICTED:
            result |= {"predicted_bytes": None, "error": None}
        return result
    last_profiled = row.config.train.profile_steps[1]
    config = benchmark.benchmark_config(row.config, folder)
    _, failed = benchmark.launch(config, 1, last_profiled + 2, folder, bool(bench.gpus), **launching)
    tables = sorted((folder / "profile").glob("*.txt"))
    return {"failed": failed, "profile": tables[0].read_text() if tables else None}


def call_function(bench, row, seconds, folder):
    """The result of the row's function, called in a process of its own; of one that was ended or raised, what it had
    by then."""
    folder.mkdir()
    arguments = dict(row.arguments)
    if row.function == "nanogpt_speed":
        arguments |= {"steps": 2, "warmup": 1} if bench.tiny else {"steps": row.steps, "warmup": row.warmup}
    config = row.config.to_dict() if row.config else None
    call = {"function": row.function, "arguments": arguments, "config": config}
    write_json(folder / "call.json", call)
    command = [sys.executable, __file__, "--call", folder / "call.json", folder / "result.json"]
    code = benchmark.run_until(lambda: False, command, folder / "log", seconds, row.environment)
    written = folder / "result.json"
    result = json.loads(written.read_text()) if written.exists() else {}
    if code == 0:
        return result | {"failed": None}
    return result | {"failed": benchmark.why_it_ended((folder / "log").read_text(errors="replace"), code)}


def answer_call(call_path, result_path):
    """In a process of its own: call a function by its name, and write its result, or as a generator yields them one
    after the other in place of the one before."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    call = json.loads(Path(call_path).read_text())
    config = build(call["config"], call_path) if call["config"] else None
    name = call["function"]
    function = getattr(importlib.import_module(FUNCTIONS[name]), name)
    result = function(config, **call["arguments"])
    for so_far in result if inspect.isgenerator(result) else [result]:
        write_json(Path(result_path), so_far)


def data_for(bench):
    """The folder of the data: the given one, else tokens that follow a rule, each 1 to 3 above the one before, written
    at first use."""
    if bench.data:
        return str(bench.data)
    path = bench.temporary / "data"
    if not path.exists():
        path.mkdir()
        steps = np.random.default_rng(0).integers(1, 4, 2**23 if bench.gpus else 2**20)
        for split in ("train", "val"):
            write_shard(path / f"{split}_000000.bin", (np.cumsum(steps) % 512).astype(np.uint16))
    return str(path)


def base_for(bench, config):
    """The folder of a model of this config with random weights, as transformers writes it, made at first use."""
    path = bench.temporary / "base"
    if not path.exists():
        import torch
        from transformers import AutoModelForCausalLM

        from minzero.hf.families import transformers_config

        model = AutoModelForCausalLM.from_config(transformers_config(config.model), dtype=torch.bfloat16)
        model.save_pretrained(path)
    return str(path)


def is_wanted(result, seconds, again):
    """Whether a row is to be measured that has this result (None: none yet), with these seconds left: one that ran out
    of time is tried again with more of it."""
    if result is None:
        return True
    if result["failed"] == benchmark.OUT_OF_TIME:
        return seconds > 1.2 * result["seconds_given"]
    return again and bool(result["failed"])


def measure_part(bench, part, options, until, keep):
    """Measure the missing rows of a part. keep(key, result) stores a result. until: when its time is over."""
    begun = 0
    for number, row in enumerate(PARTS[part](bench)):
        key = f"{part}/{row.name}"
        left = until - time.monotonic()
        if options.first and number >= options.first:
            return
        if options.rows and row.name not in options.rows:
            continue
        if not is_wanted(bench.rows.get(key), left, options.again):
            continue
        if left < LEAST_SECONDS:
            print(f"{part}: its time is over", file=sys.stderr, flush=True)
            return
        print(f"{part}: {row.title} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=bench.temporary, ignore_cleanup_errors=True) as own:
            result = measure_row(bench, row, left, Path(own) / "run")
        begun += 1
        if result["failed"] == benchmark.OUT_OF_TIME:
            if begun > 1:  # it did not have the part's whole time
                return
            result["seconds_given"] = left
        if options.beside:
            result = {name: value for name, value in result.items() if name not in TIMES}
        keep(key, result)


# ---- the command


def memory_of_this_machine():
    """Bytes of CPU memory that this process may use: the machine's, or less where its group has a limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def read_options(arguments):
    expected = "benchmarks/gpu.py --out FOLDER [--nanogpt FILE] [--data FOLDER] [--parts NAME ...] [--tiny]"
    parser = FlagParser(__doc__, expected)
    parser.add_argument("--out", type=a_path, required=True)
    parser.add_argument("--nanogpt", type=a_path)
    parser.add_argument("--data", type=a_path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    parser.add_argument("--first", type=at_least(1))
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--minutes", type=a_number(above=True), default=9)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if rest:
        parser.error(f"unknown argument {rest[0]}")
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise UserError(f"--parts: found {unknown[0]}, expected some of: {' '.join(PARTS)}")
    for name, there in (("nanogpt", "is_file"), ("data", "is_dir")):
        path = getattr(options, name)
        if path and not getattr(path, there)():
            raise UserError(f"--{name}: {path}: no such {there.removeprefix('is_')}")
    return options


def earlier_results(folder, device, tiny):
    """The content of FOLDER/results.json, or a new one. Raises UserError for one of another machine or size."""
    path = folder / "results.json"
    if not path.exists():
        return {"device": device, "tiny": tiny, "calls": [], "rows": {}}
    try:
        found = json.loads(path.read_text())
        was = found["device"], found["tiny"]
        found["calls"], found["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not what this command writes; choose another --out") from None
    if was != (device, tiny):
        raise UserError(f"{path}: of {was[0]}, tiny {was[1]}, and this is {device}, tiny {tiny}; choose another --out")
    return found


def this_machine(options):
    """The Bench of these options, without results, and a description of the device. Raises UserError without a GPU."""
    device, gpus = benchmark.this_device()
    if not gpus and not options.tiny:
        raise UserError("no GPU found; --tiny shrinks everything so that two CPU cores can run it")
    cpu_bytes = gpu_bytes = memory_of_this_machine()
    if gpus:
        import torch

        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    bench = Bench(gpus, gpu_bytes, cpu_bytes, options.tiny, options.nanogpt, options.data)
    # others that run beside this one must not find their locks removed
    bench.extensions = extensions_folder(options.out if options.beside else None)
    return bench, device


def conditions_of_call(arguments, options, device):
    """The conditions of one call of this command, for the report."""
    versions = {"python": platform.python_version(), "torch": version("torch"), "deepspeed": version("deepspeed")}
    versions["git"] = git_commit() or "none"
    return {
        "command": f"python benchmarks/gpu.py {shlex.join(arguments)}",
        "device": device,
        "versions": versions,
        "data": str(options.data or "tokens that follow a rule"),
        "began": datetime.now().isoformat(" ", "minutes"),
    }


def main(arguments):
    began = time.monotonic()
    options = read_options(arguments)
    ends = began + 60 * options.minutes
    bench, device = this_machine(options)
    results = earlier_results(options.out, device, options.tiny)
    bench.rows = results["rows"]
    make_folder("--out", options.out)
    call = conditions_of_call(arguments, options, device)
    results["calls"].append(call)

    def keep(key=None, result=None):
        if key:
            bench.rows[key] = result | {"call": len(results["calls"])}
        write_json(options.out / "results.json", results)
        write_report(bench, options.out, results["calls"])

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs are ended with this
    with tempfile.TemporaryDirectory(prefix="minzero_gpu_", ignore_cleanup_errors=True) as temporary:
        bench.temporary = Path(temporary)
        if "speed" in options.parts:
            size = {"width": 8192, "number": 20} if bench.gpus else {"width": 512, "number": 4}
            row = Row("products", "products of large matrices", function="products", arguments=size)
            rate = measure_row(bench, row, ends - time.monotonic(), Path(temporary) / "products")
            call["product_flops"] = rate.get("flops_per_second")
        for number, part in enumerate(options.parts):
            now = time.monotonic()
            until = now + (ends - now) / (len(options.parts) - number)
            measure_part(bench, part, options, until, keep)
    keep()
    print((options.out / "report.md").read_text())


def main_or_interrupted(arguments):
    """main; a Ctrl-C is answered by a line that nothing is lost."""
    try:
        main(arguments)
    except KeyboardInterrupt:
        print("interrupted: what was measured is in --out; the same command continues", file=sys.stderr)
        raise


def train_with_switch(arguments):
    from benchmarks import switches  # loads torch, DeepSpeed and train.py

    switches.train_with_switch(arguments)


if __name__ == "__main__":
    if "--switch" in sys.argv:
        run_command(train_with_switch)
    elif sys.argv[1:2] == ["--call"]:
        run_command(lambda arguments: answer_call(*arguments[1:]))
    else:
        run_command(main_or_interrupted)
