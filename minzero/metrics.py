"""The numbers of a run: throughput, memory, the time of each part of a step, and metrics.jsonl, which holds them all.

torch is imported where it is used: what only reads metrics.jsonl, such as plot.py, starts without it.
"""

import json
import math
import resource
import time
from pathlib import Path

from minzero.adapters import count_adapters
from minzero.cards import peak_flops
from minzero.errors import UserError
from minzero.files import is_number, write_atomically
from minzero.goodput import KINDS
from minzero.sizes import count_parameters, flops_per_token, recomputed_flops_per_token

# The keys of a line of metrics.jsonl that hold a number, besides `step` and `tokens`.
NUMBERS = {
    "loss",
    "val_loss",
    "lr",
    "grad_norm",
    "skipped",
    "step_seconds",
    "data_seconds",
    "forward_backward_seconds",
    "optimizer_seconds",
    "tokens_per_second",
    "tflops",
    "mfu",
    "hfu",
    "peak_memory_bytes",
    "peak_reserved_bytes",
    "peak_cpu_bytes",
    "eval_seconds",
    "eval_tasks_seconds",
    "save_seconds",
    "stall_seconds",
    "balance_loss",
    "router_z_loss",
    "expert_load_max",
    "expert_load_min",
    "reward_accuracy",
    "reward_margin",
    "reward_chosen",
    "reward_rejected",
    "val_accuracy",
    "val_margin",
    "goodput",
    "run_seconds",
    *(f"run_{kind}_seconds" for kind in KINDS),
}

OF_TASKS = "task_"  # how the keys of train.eval_tasks' scores begin, which are numbers as well


def task_key(task, metric):
    """The key of a task's score in metrics.jsonl."""
    return f"{OF_TASKS}{task}_{metric}"


# -- speed and memory ----------------------------------------------------------------------------


def formula_fault(model, parameters):
    """Why the formulas of sizes.py do not describe the model that is trained, in words; None if they do.
    model: ModelConfig; parameters: the number of parameters of the real model."""
    try:
        counted, _ = count_parameters(model)
    except UserError as error:
        return str(error)
    if counted != parameters:
        return f"sizes.py counts {counted:,} parameters, but the model has {parameters:,}"
    return None


def throughput(config, tokens_per_second, devices, device_name, parameters=None, attended=None):
    """The speed of a step, as metrics.jsonl has it.

    config: of the run; tokens_per_second: of all devices; devices: how many took part; parameters: the number of
    parameters of the real model; attended: see sizes.attention_flops_per_token.
    tflops: model FLOPs per second of one device, in 10^12 (PaLM, https://arxiv.org/abs/2204.02311, appendix B);
    mfu, hfu: model FLOPs, and those with recomputation, over the device's peak. mfu and hfu are None for a device
    whose peak is not known, and all three for a model that the formulas do not describe."""
    speed = {"tokens_per_second": tokens_per_second, "tflops": None, "mfu": None, "hfu": None}
    if parameters is not None and formula_fault(config.model, parameters):
        return speed

    model_flops = flops_per_token(config.model, attended, count_adapters(config.model, config.lora))
    flops_per_second = tokens_per_second * model_flops / devices
    speed["tflops"] = flops_per_second / 1e12

    peak = peak_flops(device_name)
    if peak:
        recomputation = config.train.activation_checkpointing
        recomputed_flops = recomputed_flops_per_token(config.model, recomputation, attended)
        speed["mfu"] = flops_per_second / peak
        speed["hfu"] = speed["mfu"] * (model_flops + recomputed_flops) / model_flops
    return speed


def peak_memory():
    """The most bytes that any rank has held so far, as metrics.jsonl has them.

    peak_memory_bytes: tensors on the GPU, or the resident memory of the process where there is no GPU;
    peak_reserved_bytes: memory that torch's allocator took from the GPU, or None without a GPU;
    peak_cpu_bytes: resident memory of the process. A collective: every rank must call it."""
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available()
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]  # Linux counts in KiB
    if on_gpu:
        peaks += [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    over_ranks = torch.tensor(peaks, device="cuda" if on_gpu else "cpu")
    distributed.all_reduce(over_ranks, op=distributed.ReduceOp.MAX)
    peaks = over_ranks.tolist()
    resident = peaks[0]
    if not on_gpu:
        return {"peak_memory_bytes": resident, "peak_reserved_bytes": None, "peak_cpu_bytes": resident}
    return {"peak_memory_bytes": peaks[1], "peak_reserved_bytes": peaks[2], "peak_cpu_bytes": resident}


def expert_loads(routing, by_layer):
    """How the experts of a model are used, as metrics.jsonl has it, over all ranks. routing: of `GPT.take_routing`; {}
    for None. by_layer: as of `experts.router_losses`. A collective: every rank must call it.

    balance_loss, router_z_loss: of `experts.router_losses`; expert_load_max, expert_load_min: the tokens of the busiest
    and of the idlest expert of any layer, over an equal share."""
    if routing is None:
        return {}
    from torch import distributed

    from minzero.experts import router_losses

    distributed.all_reduce(routing)
    routing /= distributed.get_world_size()
    balance, square = router_losses(routing, by_layer)
    parts = routing[:, 0]
    loads = parts / parts.mean(dim=-1, keepdim=True)
    return {
        "balance_loss": balance.item(),
        "router_z_loss": square.item(),
        "expert_load_max": loads.max().item(),
        "expert_load_min": loads.min().item(),
    }


def rewards(sums):
    """The rewards of preference tuning over all ranks, as metrics.jsonl has them: means over the pairs since the last
    line. sums: of `Preference.take`; {} for None. A collective: every rank must call it.

    reward_chosen, reward_rejected: train.dpo_beta times the log-ratio of an answer to the reference; reward_accuracy:
    the part of the pairs whose preferred answer has the higher one."""
    if sums is None:
        return {}
    from torch import distributed

    from minzero.preference import METRICS

    distributed.all_reduce(sums)
    return {f"reward_{name}": (sums[place] / sums[-1]).item() for place, name in enumerate(METRICS) if place}


class Stopwatch:
    """The time of each part of a step on this rank, averaged over the steps since the last reading.

    `mark(part)` is called at the end of each part; the time since the mark before it belongs to that part. On a GPU a
    mark is an event in the GPU's queue, because the host has only queued the work by then, and the host never waits
    for it. So `data_seconds` is how long the device waited for data. The whole step is measured apart from its parts,
    by the host's clock: the difference to their sum is time that no part accounts for."""

    PARTS = ("data", "forward_backward", "optimizer")

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.reset()

    def reset(self):
        self.parts = dict.fromkeys(self.PARTS, 0.0)  # seconds
        self.marks = []  # (part that ends here, moment), the oldest first
        self.steps = 0
        self.seconds = 0.0  # of whole steps
        self.running_since = None

    def start_step(self):
        if self.running_since is None:
            self.running_since = time.perf_counter()
        self.steps += 1
        self.add_finished_parts()
        self.mark(None)

    def mark(self, part):
        """The time since the last mark belongs to `part`, one of PARTS, or with None to no part of a step."""
        if self.on_gpu:
            import torch

            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((part, moment))

    def add_finished_parts(self):
        """Add the time of each part whose end the device has already passed."""
        while len(self.marks) > 1:
            start = self.marks[0][1]
            part, end = self.marks[1]
            if self.on_gpu and not end.query():
                break
            if part is not None:
                self.parts[part] += self.seconds_between(start, end)
            del self.marks[0]

    def seconds_between(self, start, end):
        if self.on_gpu:
            return start.elapsed_time(end) / 1000
        return end - start

    def pause(self):
        """Wait for the device, and count no time until the next step: that of an evaluation or a save."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        if self.running_since is not None:
            self.seconds += time.perf_counter() - self.running_since
        self.running_since = None

    def read(self):
        """Pause, and start the averages again. Returns {"step_seconds": ..., "data_seconds": ..., ...} of one step."""
        self.pause()
        self.add_finished_parts()
        averages = {"step_seconds": self.seconds / self.steps}
        for part, seconds in self.parts.items():
            averages[f"{part}_seconds"] = seconds / self.steps
        self.reset()
        return averages


# -- text for people -----------------------------------------------------------------------------


def duration(seconds):
    """Seconds as text: "1:02:03" or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def goodput_in_words(line):
    """A line of metrics.jsonl with the keys of `TimeUse.totals` as text; None for one without."""
    everything = line.get("run_seconds")
    if not everything:
        return None
    rest = {kind: line.get(f"run_{kind}_seconds") or 0 for kind in KINDS if kind != "productive"}
    parts = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in rest.items() if seconds >= 0.5)
    share = (line.get("run_productive_seconds") or 0) / everything
    return f"{share:.1%} of {duration(everything)}{f' ({parts})' if parts else ''}"


def console_line(line, total_steps, tokens_left):
    """One logged step as text. line: of metrics.jsonl. tokens_left: of the run."""
    step = f"{line['step']:>{len(str(total_steps))}}"
    remaining_seconds = tokens_left / line["tokens_per_second"]
    parts = [
        f"step {step}/{total_steps}",
        f"loss {line['loss']:.4f}",
        f"lr {line['lr']:.2e}",
        f"grad norm {line['grad_norm']:.2f}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
    ]
    if "expert_load_max" in line:
        parts.append(f"experts {line['expert_load_min']:.2f} to {line['expert_load_max']:.2f}")
    if "reward_accuracy" in line:
        parts.append(f"accuracy {line['reward_accuracy']:.1%}, margin {line['reward_margin']:.3f}")
    if line["mfu"] is not None:
        parts.append(f"mfu {line['mfu']:.1%}")
    parts.append(f"memory {line['peak_memory_bytes'] / 2**30:.2f} GiB")
    parts.append(f"ETA {duration(remaining_seconds)}")
    if "slowest" in line:
        parts.append(line["slowest"])
    return " | ".join(parts)


# -- metrics.jsonl -------------------------------------------------------------------------------


class MetricsFile:
    """Writes a run's metrics.jsonl, one object a line.

    A run that resumes first drops the lines of steps after its checkpoint, because it will write those again, and
    damaged lines. `kept`: the lines from before the checkpoint."""

    def __init__(self, run, resumed_at):
        self.path = Path(run) / "metrics.jsonl"
        self.kept = []
        if resumed_at:
            self.kept = [line for line in read_metrics(run) if line["step"] <= resumed_at]
        write_atomically(self.path, *(f"{json.dumps(line)}\n".encode() for line in self.kept))

    def write(self, line):
        """Append a line. NaN and infinity, which JSON does not have, are written as null."""
        line = {key: null_if_not_finite(value) for key, value in line.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def null_if_not_finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(run):
    """The lines of a run's metrics.jsonl as dictionaries; see `good_lines`."""
    lines, _ = good_lines(run)
    return lines


def good_lines(run):
    """The lines of a run's metrics.jsonl as dictionaries, and the number of lines that were skipped. No damage to the
    file stops a reader, because the run can write it again: a line that train.py would not write is skipped."""
    path = Path(run) / "metrics.jsonl"
    try:
        if not path.is_file():  # a pipe may never end
            return [], 0
        content = path.read_bytes()
    except OSError:
        return [], 0
    lines = []
    skipped = 0
    for text in content.split(b"\n"):
        if not text.strip():
            continue
        line = parse_line(text)
        if line is None:
            skipped += 1
        else:
            lines.append(line)
    return lines, skipped


def parse_line(text):
    """A line of metrics.jsonl as a dictionary, or None for a damaged one."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, more digits than Python converts, nested too deeply
        return None
    return line if is_line(line) else None


def is_line(line):
    """Whether a JSON value can be a line of metrics.jsonl: an object with a step that is a whole number, in which each
    of NUMBERS, and each score of a task, is a number that a float can hold, or null, which stands for one that is not
    finite."""
    if not isinstance(line, dict) or "step" not in line:
        return False
    for key in line.keys() & {"step", "tokens"}:
        if type(line[key]) is not int or not 0 <= line[key] < 2**63:
            return False
    return all(is_number_or_null(value) for key, value in line.items() if key in NUMBERS or key.startswith(OF_TASKS))


def is_number_or_null(value):
    return value is None or type(value) is float or is_number(value, 2**1023)


def finite_numbers(line):
    """The numbers of a line of metrics.jsonl that a logger can take, without its step."""
    numbers = {}
    for key, value in line.items():
        if key == "step" or type(value) not in (int, float):
            continue
        if is_number_or_null(value) and math.isfinite(value):
            numbers[key] = value
    return numbers
