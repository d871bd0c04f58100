"""What a run measures, and where the numbers go: throughput, FLOPs, memory, console and metrics.jsonl."""

import json
import math
import re
import resource
import secrets
from pathlib import Path

import torch
from torch import distributed

from config import ModelConfig

# Dense peak of the tensor cores in bf16 with float32 sums, without sparsity, in FLOP/s, from NVIDIA's data
# sheets. A pattern is searched in the device's name, and the first that is found counts. A device that is
# not here gets no MFU: a wrong peak is worse than none.
PEAK_FLOPS = {
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"(GH200|H200|H100|H800)\b": 989e12,
    r"B200\b": 2250e12,
    r"A[18]00\b": 312e12,
    r"L40S\b": 362e12,
    r"L4\b": 121e12,
    r"A10$": 125e12,
    r"GeForce RTX 4090$": 165e12,
    r"GeForce RTX 3090$": 71e12,
}


def peak_flops(device_name):
    """Peak bf16 FLOP/s of one device, or None for one that is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}", device_name)), None)


def count_parameters(config: ModelConfig):
    """Parameters of a GPT, from its configuration alone: (all, those that multiply activations)."""
    c, kv = config.n_embd, config.kv_heads * (config.n_embd // config.n_head)
    width, up = config.mlp_width, config.mlp_width * (2 if config.mlp == "swiglu" else 1)
    matrices = c * (c + 2 * kv) + c * c + c * up + width * c
    norm = c * (2 if config.norm == "layernorm" and config.bias else 1)
    biases = (c + 2 * kv) + c + up + c if config.bias else 0
    embeddings = config.vocab_size * c * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        embeddings += config.block_size * c
    total = config.n_layer * (matrices + 2 * norm + biases) + norm + embeddings
    return total, config.n_layer * matrices + config.vocab_size * c


def flops_per_token(config: ModelConfig):
    """Model FLOPs per training token: 6 for each parameter that multiplies an activation (2 forward, 4
    backward), and 12 n_layer n_embd block_size for attention's two products, causality not
    discounted (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
    return 6 * count_parameters(config)[1] + 12 * config.n_layer * config.n_embd * config.block_size


def recomputed_flops_per_token(config: ModelConfig, recompute_every):
    """FLOPs per training token that activation checkpointing adds: another forward pass of blocks 0, k, 2k,
    ... Hardware FLOPs are model FLOPs and these (Korthikanti et al. 2022, arXiv 2205.05198, section 6.3)."""
    if not recompute_every:
        return 0
    blocks = -(-config.n_layer // recompute_every)
    matrices = count_parameters(config)[1] - config.vocab_size * config.n_embd
    return blocks / config.n_layer * (2 * matrices + 4 * config.n_layer * config.n_embd * config.block_size)


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


def read_metrics(run):
    """The lines of a run's metrics.jsonl as dictionaries. A last line cut by a crash is left out."""
    path = Path(run) / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class MetricsLog:
    """Writes metrics.jsonl, one object a line, and sends the same numbers to TensorBoard and W&B if asked.

    A resumed run first drops the lines behind its checkpoint, because it will write those steps again;
    TensorBoard purges them too, and W&B goes on with the run of the same id. Neither can stop the run:
    one that fails is named once and left out from then on."""

    def __init__(self, run, resumed_at, loggers=(), config=None):
        self.path = Path(run) / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= resumed_at] if resumed_at else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self.loggers = {}  # name -> (send(numbers, step), close())
        for name in loggers:
            start = {"tensorboard": self.start_tensorboard, "wandb": self.start_wandb}[name]
            if started := self.attempt(name, start, Path(run), resumed_at, config):
                self.loggers[name] = started

    def start_tensorboard(self, run, resumed_at, config):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run / "tensorboard", purge_step=resumed_at + 1)
        return lambda numbers, step: [writer.add_scalar(*item, step) for item in numbers.items()], writer.close

    def start_wandb(self, run, resumed_at, config):
        import wandb

        id_file = run / "wandb_id"
        if not resumed_at or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        run_id = id_file.read_text()
        session = wandb.init(project="minzero", name=run.name, id=run_id, resume="allow", dir=run, config=config)
        return session.log, session.finish

    def attempt(self, name, action, *arguments):
        """What the action returns, or None if it failed: then the logger is left out from now on."""
        try:
            return action(*arguments)
        except Exception as error:
            self.loggers.pop(name, None)
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{name}: {reason}; the run goes on without it", flush=True)
            return None

    def write(self, line):
        # JSON knows neither NaN nor infinity
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
        for name, (send, _) in list(self.loggers.items()):
            self.attempt(name, send, numbers, line["step"])

    def close(self):
        for name, (_, close) in list(self.loggers.items()):
            self.attempt(name, close)
