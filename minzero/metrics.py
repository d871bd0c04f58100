"""What a run measures, and where the numbers go: throughput, memory, the parts of a step, a profile; console,
metrics.jsonl, TensorBoard and W&B."""

import contextlib
import json
import math
import re
import resource
import secrets
import shutil
import time
from pathlib import Path

import torch
from torch import distributed

from minzero.errors import UserError
from minzero.files import is_number, write_atomically
from minzero.sizes import count_parameters, flops_per_token, peak_flops, recomputed_flops_per_token

# Seconds that W&B may take to begin, which is how long a run without a network waits, and to end, where it would
# wait for the network for ever. In between it never waits.
WANDB_PATIENCE = {"init_timeout": 20, "finish_timeout": 60}

# What a line of metrics.jsonl says in numbers, besides its step and tokens.
NUMBERS = set(
    "loss val_loss lr grad_norm skipped step_seconds data_seconds forward_backward_seconds optimizer_seconds "
    "tokens_per_second tflops mfu hfu peak_memory_bytes peak_reserved_bytes peak_cpu_bytes eval_seconds save_seconds "
    "stall_seconds".split()
)


def formula_fault(model, parameters):
    """Why sizes.py's formulas are not those of the model that is trained, in words, or None if they are.
    parameters: how many that model has."""
    try:
        counted, _ = count_parameters(model)
    except UserError as error:
        return str(error)
    if counted != parameters:
        return f"sizes.py counts {counted:,} parameters, but the model has {parameters:,}"
    return None


def throughput(config, step_seconds, devices, device_name, parameters=None):
    """What a step line says of speed. config: of the run; devices: how many took part; parameters: of the real model.
    tflops: model FLOPs per second of one device, in 10^12; mfu, hfu: its model and hardware FLOPs over its peak, None
    where that is unknown. All three are None for a model that the formulas do not describe."""
    tokens_per_second = config.train.global_batch_tokens / step_seconds
    if parameters is not None and formula_fault(config.model, parameters):
        return {"tokens_per_second": tokens_per_second, "tflops": None, "mfu": None, "hfu": None}
    flops, peak = flops_per_token(config.model), peak_flops(device_name)
    recomputed = recomputed_flops_per_token(config.model, int(config.train.activation_checkpointing))
    per_device = tokens_per_second * flops / devices
    mfu = per_device / peak if peak else None
    return {
        "tokens_per_second": tokens_per_second,
        "tflops": per_device / 1e12,
        "mfu": mfu,
        "hfu": mfu * (flops + recomputed) / flops if peak else None,
    }


def peak_memory():
    """Most bytes that any rank has held so far, as a step line has them: tensors on its GPU (resident memory
    where there is none), what torch's allocator took from the GPU for them (null where there is none), and
    resident memory of the process. Every rank must call this: it asks the others."""
    on_gpu = torch.cuda.is_available()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    allocated, reserved = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_gpu else (0, 0)
    peaks = torch.tensor([allocated, reserved, resident], device="cuda" if on_gpu else "cpu")
    distributed.all_reduce(peaks, op=distributed.ReduceOp.MAX)
    allocated, reserved, resident = peaks.tolist()
    return {
        "peak_memory_bytes": allocated if on_gpu else resident,
        "peak_reserved_bytes": reserved if on_gpu else None,
        "peak_cpu_bytes": resident,
    }


class Stopwatch:
    """Where the time of a step goes, on this rank: averages over the steps since the last reading.

    The end of each part is marked; what lies between two marks is the second one's. On a GPU, whose work the
    host has only queued by then, a mark is an event in that queue, and the host never waits for it: so
    `data_seconds` is how long the device stood waiting for data. The whole step is measured apart from
    its parts, by the host's clock, so their sum shows what they miss."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.forget()

    def forget(self):
        self.parts = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}
        self.marks, self.steps, self.seconds, self.running_since = [], 0, 0.0, None

    def start_step(self):
        self.running_since = self.running_since or time.perf_counter()
        self.steps += 1
        self.add_up()
        self.mark(None)

    def mark(self, part):
        """What was done since the last mark was `part`, a key of self.parts; None: no part of a step."""
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((part, moment))

    def add_up(self):
        """Add up the parts whose ends the device has passed already."""
        while len(self.marks) > 1 and (not self.on_gpu or self.marks[1][1].query()):
            (_, start), (part, end) = self.marks[:2]
            if part:
                self.parts[part] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
            del self.marks[0]

    def pause(self):
        """Wait for the device; what follows until the next step, as evaluating or saving, does not count."""
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.running_since is not None:
            self.seconds += time.perf_counter() - self.running_since
        self.running_since = None

    def read(self):
        """{"step_seconds": ..., "data_seconds": ..., ...} of one step; forgets them, and pauses."""
        self.pause()
        self.add_up()
        seconds = {"step": self.seconds} | self.parts
        averages = {f"{name}_seconds": value / self.steps for name, value in seconds.items()}
        self.forget()
        return averages


def duration(seconds):
    """Seconds -> "1:02:03" or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def console_line(line, total_steps):
    """One logged step as a person reads it."""
    mfu = f" | mfu {line['mfu']:.1%}" if line["mfu"] is not None else ""
    return (
        f"step {line['step']:>{len(str(total_steps))}}/{total_steps} | loss {line['loss']:.4f} | lr {line['lr']:.2e} | "
        f"grad norm {line['grad_norm']:.2f} | {line['tokens_per_second']:,.0f} tokens/s{mfu} | "
        f"memory {line['peak_memory_bytes'] / 2**30:.2f} GiB | "
        f"ETA {duration((total_steps - line['step']) * line['step_seconds'])}"
    )


class Profiler:
    """Records what this process does in some steps with torch's profiler: run/profile/ then holds a trace, to be
    opened in ui.perfetto.dev or chrome://tracing, and a table of the ten operators that took the longest.
    steps: first and last, or None for no profile. A run that is resumed between them records the rest,
    one that is resumed after them nothing."""

    def __init__(self, run, steps):
        self.folder, self.recording = Path(run) / "profile", None
        self.first, self.last = steps or (0, -1)

    def start_step(self, step):
        if self.first <= step <= self.last and not self.recording:
            self.first, self.recording = step, torch.profiler.profile()  # of the CPU, and of a GPU if there is one
            self.recording.start()

    def end_step(self, step, ending=False):
        """After the last of the steps, or where the run ends before it, writes what was recorded. Returns the
        table and where it is, or None if there is nothing to write."""
        if not self.recording or (step < self.last and not ending):
            return None
        self.recording.stop()
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"steps_{self.first}_to_{step}"
        self.recording.export_chrome_trace(f"{path}.json.gz")
        table = heaviest_operators(self.recording.key_averages(), step + 1 - self.first)
        path.with_suffix(".txt").write_text(table + "\n")
        self.recording = None
        return f"profile of steps {self.first} to {step} of rank 0 in {path}.json.gz\n{table}"


def heaviest_operators(operators, steps, rows=10):
    """A table of the operators that took the longest by themselves, without those they call: on the GPU if
    anything ran there, else on the CPU. operators: torch.profiler's key_averages."""
    on_gpu = any(operator.self_device_time_total for operator in operators)
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # kernels have entries of their own, whose time is also that of the operator that started them
    operators = [operator for operator in operators if operator.device_type == torch.autograd.DeviceType.CPU]
    operators = sorted(operators, key=lambda operator: getattr(operator, kind), reverse=True)
    total = sum(getattr(operator, kind) for operator in operators) or 1
    device = "GPU" if on_gpu else "CPU"
    lines = [f"{'operator':60} {'calls/step':>10} {device:>4} ms/step {'share':>6}"]
    for operator in operators[:rows]:
        own, calls = getattr(operator, kind), operator.count / steps  # own: microseconds
        name = operator.key if len(operator.key) <= 60 else operator.key[:57] + "..."
        lines.append(f"{name:60} {calls:>10.1f} {own / 1000 / steps:>12.3f} {own / total:>6.1%}")
    return "\n".join(lines)


def read_metrics(run):
    """The lines of a run's metrics.jsonl as dictionaries; see `good_lines`."""
    return good_lines(run)[0]


def good_lines(run):
    """(the lines of a run's metrics.jsonl as dictionaries, how many others were passed over). The file can be written
    again by the run, so no damage to it stops a reader: what is no line of MetricsLog is passed over."""
    try:
        path = Path(run) / "metrics.jsonl"
        content = path.read_bytes() if path.is_file() else b""  # not of a pipe, which may never end
    except OSError:
        return [], 0
    texts = [text for text in content.split(b"\n") if text.strip()]
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
            if is_line(line):
                lines.append(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, more digits than Python converts, nested too deeply
            continue
    return lines, len(texts) - len(lines)


def is_line(line):
    """Whether a JSON value can be a line of MetricsLog: an object with a whole step, each of NUMBERS in it a number
    that a float can hold, or null, which stands for one that is not finite."""
    if not isinstance(line, dict) or "step" not in line:
        return False
    for key in line.keys() & {"step", "tokens"}:
        if type(line[key]) is not int or not 0 <= line[key] < 2**63:
            return False
    return all(is_number_or_null(line[key]) for key in line.keys() & NUMBERS)


def is_number_or_null(value):
    return value is None or type(value) is float or is_number(value, 2**1023)


def numbers_of(line):
    """What a logger is sent of a line of metrics.jsonl."""
    numbers = {key: value for key, value in line.items() if key != "step" and type(value) in (int, float)}
    return {key: value for key, value in numbers.items() if is_number_or_null(value) and math.isfinite(value)}


class MetricsLog:
    """Writes metrics.jsonl, one object a line, and sends the same numbers to TensorBoard and W&B if asked.

    A resumed run first drops the lines of steps after its checkpoint, because it will write those again, and
    lines that are damaged. It continues in the same TensorBoard folder and W&B run. Neither of the two can
    stop the run: one that fails is named once and left out from then on."""

    def __init__(self, run, resumed_at, loggers=(), config=None):
        self.path = Path(run) / "metrics.jsonl"
        self.kept = [line for line in read_metrics(run) if line["step"] <= resumed_at] if resumed_at else []
        write_atomically(self.path, *(f"{json.dumps(line)}\n".encode() for line in self.kept))
        self.loggers = {}  # name -> (send(numbers, step), close())
        for name in loggers:
            start = {"tensorboard": self.start_tensorboard, "wandb": self.start_wandb}[name]
            if started := self.attempt(name, start, Path(run), resumed_at, config):
                self.loggers[name] = started

    def start_tensorboard(self, run, resumed_at, config):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run / "tensorboard", purge_step=resumed_at + 1)  # readers drop what lies after it

        def send(numbers, step):
            for key, number in numbers.items():
                writer.add_scalar(key, number, step)
            writer.flush()  # a run that is killed must not lose steps that its checkpoint covers

        return send, writer.close

    def start_wandb(self, run, resumed_at, config):
        """A resumed run sends its whole history, which is in metrics.jsonl. Online, W&B's client passes over the
        steps that the server has, and those that were lost with a killed run arrive. Offline every start
        makes a folder, and of several with the same id `wandb sync` leaves only the last one's steps
        (wandb/wandb#3841): the last one here holds all, and the ones before it go."""
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConnectionError("no API key; call `wandb login` first, or set WANDB_MODE=offline")
        id_file = run / "wandb_id"
        try:
            last_id = id_file.read_text() if id_file.is_file() else ""  # not of a pipe, which may never end
        except (OSError, ValueError):
            last_id = ""
        last_id = last_id if re.fullmatch("[0-9a-f]{8}", last_id) else ""  # a damaged one is that of no run
        run_id = last_id if resumed_at and last_id else secrets.token_hex(4)
        write_atomically(id_file, run_id.encode())
        superseded = list((run / "wandb").glob(f"offline-run-*-{last_id}")) if last_id else []
        session = wandb.init(
            project="minzero",
            name=run.name,
            id=run_id,
            resume="allow",
            dir=run,
            config=config,
            settings=wandb.Settings(**WANDB_PATIENCE),
        )

        def send(numbers, step):
            if step >= session.step:  # the line of a save in the background may come after later ones
                session.log(numbers, step=step)

        for line in sorted(self.kept, key=lambda line: line["step"]):
            send(numbers_of(line), line["step"])
        for folder in superseded:
            shutil.rmtree(folder)
        return send, session.finish

    def attempt(self, name, action, *arguments):
        """What the action returns, or None if it failed: then the logger is left out from now on."""
        try:
            return action(*arguments)
        except Exception as error:
            self.loggers.pop(name, None)
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            with contextlib.suppress(OSError):  # of a lost terminal
                print(f"{name}: {reason}; the run continues without it", flush=True)
            return None

    def write(self, line):
        # JSON knows neither NaN nor infinity
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, (send, _) in list(self.loggers.items()):
            self.attempt(name, send, numbers_of(line), line["step"])

    def close(self):
        for name, (_, close) in list(self.loggers.items()):
            self.attempt(name, close)
