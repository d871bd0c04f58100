"""Seconds of an optimizer step: our ZeRO stages against torch's DDP and FSDP2 and Hugging Face's Trainer, interleaved.

    deepspeed --num_gpus 2 benchmarks/zero.py --out FOLDER [--sizes 12m 50m] [--rows NAME ...] [--rounds 7] [--minutes 30]
                             [--micro_batch_size 4] [--accumulation 4] [--precision fp32] [--recompute] [--compile]

All rows live in one process group, of GPUs or of CPU processes. In each round every row takes one step, in an order that
is reversed every other round, so that a busy minute hits all rows. The first two rounds warm up; the second one also
measures memory. A time is the slowest rank's, and a row's time the median of the rounds. FOLDER/zero.md has the tables,
FOLDER/zero.json all numbers; both are written after each size.

All rows start from the same weights and take the same batches, with the same AdamW, clipping and constant learning rate.
A row whose losses are not those of the first row computes something else, and is marked.

zero*: `train_step` of train.py, with its checks of loss and gradient; in zero0 to zero3 ds_config.json is as it is.
ddp, fsdp2_*: our GPT in a plain loop, AdamW fused. In bf16 FSDP2 shards float32 weights, gathers and reduces bf16; DDP has
bf16 weights, with float32 copies of them in the optimizer.
hf_zero3: transformers' model of the same architecture with our weights, in its Trainer with DeepSpeed ZeRO-3 and "auto"
values. `Trainer.train()` itself runs: the other rows take their steps inside its callback `on_step_end`, and its step is
timed from that callback's return to its next call. That includes its data loader. It computes attention, GELU and loss as
transformers does. --compile compiles every row but this one.

Memory is that of the rank which has most, and of the row alone: what it holds after its first step, and the most
above that during its second. On a GPU by torch.cuda.max_memory_allocated, reset for the step; on a CPU by the C library's
count of what the process has allocated (mallinfo2), read every half a millisecond.
"""

import copy
import ctypes
import dataclasses
import gc
import math
import shlex
import statistics
import sys
import tempfile
import threading
import time
import traceback
from datetime import date
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from deepspeed import comm

import train
from benchmarks.nanogpt import now
from minzero import benchmark, dist, engine
from minzero.bad_steps import BadSteps
from minzero.commands import run_command
from minzero.config.load import load_config
from minzero.data.mixture import Mixture
from minzero.data.order import sample_numbers
from minzero.data.shards import token_dtype, write_shard
from minzero.errors import UserError
from minzero.files import make_folder, write_atomically, write_json
from minzero.flags import SUPPRESS, FlagParser, a_number, a_path, at_least
from minzero.planner.gpus import in_units
from minzero.run import Run
from minzero.run_folder import RunFolder
from minzero.sizes import count_parameters
from minzero.watchdog import Watchdog
from minzero.zero import copy_into
from model import GPT

SIZES = {
    "12m": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 4096},
    "50m": {"n_layer": 9, "n_head": 10, "n_embd": 640, "block_size": 256, "vocab_size": 8192},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 256},  # its figures mean nothing
}
WARMUP = 2  # rounds
TOLERANCE = {"fp32": 3e-4, "bf16": 1e-2}  # relative difference of a loss
TABLES = {  # heading: (the rows of the table, that whose tokens/s the others are compared with first)
    "weights gathered for each use": (
        "fsdp2_gathered",
        "fsdp2_gathered_once",
        "zero3_gathered",
        "zero3",
        "hf_zero3",
    ),
    "weights kept whole": (
        "fsdp2_whole",
        "fsdp2_whole_once",
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


# ---- measuring


class MallocInfo(ctypes.Structure):
    """mallinfo2's result: uordblks and hblkhd are the bytes in use, in the heap and in pages of their own."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_in_use(device):
    """Bytes that this process has allocated and not freed: of its GPU, or of CPU memory by the C library. The CPU's are
    of all threads, and those of tensors are among them: torch keeps none. None where the C library has no mallinfo2."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


class Meter:
    """What is allocated on the device between `start` and `stop`. On a CPU a thread looks every half a millisecond, which
    is much shorter than the life of a tensor that matters."""

    def __init__(self, device):
        self.device = device
        self.on_gpu = device.type == "cuda"

    def start(self):
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = self.most = bytes_in_use(self.device)
        if not self.on_gpu and self.before is not None:
            self.finished = threading.Event()
            self.watcher = threading.Thread(target=self.watch, daemon=True)
            self.watcher.start()
        return self

    def watch(self):
        while not self.finished.wait(0.0005):
            self.most = max(self.most, bytes_in_use(self.device))

    def stop(self):
        """(bytes more at the end than at the start, the most that there was above the start), or (0, None)."""
        if self.before is None:
            return 0, None
        if self.on_gpu:
            torch.cuda.synchronize()
            self.most = torch.cuda.max_memory_allocated()
        else:
            self.finished.set()
            self.watcher.join()
        gc.collect()
        return bytes_in_use(self.device) - self.before, self.most - self.before


class Row:
    """One way of training, and what is measured of it on this rank."""

    def __init__(self, name, device):
        self.name = name
        self.device = device
        self.failed = None
        self.step = None  # number of the step, from 1 -> its loss; None: the Trainer takes its steps
        self.held = self.peak = 0  # bytes
        self.seconds = []  # of the steps that count
        self.losses = []  # of all steps, each the mean of this rank's micro-batches
        self.meter = None

    def build(self, setting):
        """Make the model and the optimizer."""
        self.meter = Meter(self.device).start()
        self.step = ROWS[self.name][1](setting)
        self.end_build()

    def end_build(self):
        self.held += self.meter.stop()[0]

    def begin_step(self, number):
        comm.barrier()
        self.meter = Meter(self.device).start() if number <= WARMUP else None
        self.began = now(self.device)

    def end_step(self, loss):
        ended = now(self.device)
        if self.meter:
            more, most = self.meter.stop()
            self.peak = None if most is None else self.held + most
            self.held += more
        else:
            self.seconds.append(ended - self.began)
        self.losses.append(float(loss))

    def take(self, number):
        """One step, unless the row has failed."""
        if self.failed:
            return
        with catching(self):
            self.begin_step(number)
            self.end_step(self.step(number))


class catching:
    """A context in which an exception is the failure of a row. Whatever a row cannot do, all ranks find at once."""

    def __init__(self, row):
        self.row = row

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception):
            return False
        self.row.failed = f"{kind.__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if not isinstance(error, UserError | ImportError) and dist.local_place[0] == 0:
            traceback.print_exception(error)
        return True


def take_turns(rows, rounds, deadline):
    """One step of each row a round, until the time is over. A generator: yields the number of the step where it is the
    Trainer's turn, which takes it before it asks for the next."""
    for number in range(1, WARMUP + rounds + 1):
        for row in rows if number % 2 else rows[::-1]:
            if row.name in IN_TRAINER:
                if not row.failed:
                    yield number
            else:
                row.take(number)
        is_over = dist.gather(time.monotonic() > deadline)[0]
        if is_over and number > WARMUP:
            break


# ---- the rows. Each function: Setting -> step(number), which trains one step and returns its loss


class Setting:
    """What all rows of one size have in common."""

    def __init__(self, args, size, group, folder):
        self.args = args
        self.group = group
        self.device = group.device
        self.folder = folder
        shape = SIZES[size] | {"dropout": 0.0}
        tokens = args.micro_batch_size * args.accumulation * group.world_size * shape["block_size"]
        keys = {
            "precision": args.precision,
            "micro_batch_size": args.micro_batch_size,
            "global_batch_tokens": tokens,
            "activation_checkpointing": args.recompute,
            "kernels": "torch",
            "compile": args.compile,
            "out_dir": str(folder / "run"),
        }
        self.path = folder / f"{size}.json"
        write_json(self.path, {"model": shape, "data": {"path": str(folder / size)}, "train": keys})
        self.config = self.config_with({})
        self.precision = engine.resolve_precision(args.precision, group.device)
        if self.precision not in TOLERANCE:
            raise UserError(f"--precision: found {self.precision}, expected {' or '.join(TOLERANCE)}")
        write_tokens(folder / size, self.config.model.vocab_size)
        self.data = Mixture(
            str(folder / size), "train", shape["block_size"], shape["vocab_size"], self.config.train.seed
        )

    def config_with(self, zero):
        """The configuration, read as train.py reads it, with these keys of DeepSpeed's section zero_optimization."""
        flags = [(f"--deepspeed.zero_optimization.{name}", str(value)) for name, value in zero.items()]
        return load_config([str(self.path), *(word for flag in flags for word in flag)])

    def gpt(self):
        """Our model with its initial weights, which are the same in all rows."""
        with self.device:
            gpt = GPT(self.config.model, self.config.train.seed, int(self.args.recompute))
        if self.args.compile:
            gpt.compile()
        return gpt

    def micro_batches(self, number):
        """This rank's batches of a step, from 1: pairs of inputs and targets, (B, T) on the device."""
        sizes = self.args.micro_batch_size, self.args.accumulation
        for batch in self.data.batches(number - 1, self.group.rank, self.group.world_size, *sizes):
            yield train.to_device(batch, self.device)


def write_tokens(folder, vocab_size):
    """A shard of tokens that follow a rule, so that the loss falls: each is 1 to 3 above the one before."""
    folder.mkdir()
    steps = np.random.default_rng(0).integers(1, 4, 2**20)
    write_shard(folder / "train_000000.bin", (np.cumsum(steps) % vocab_size).astype(token_dtype(vocab_size)))


def zero(stage, **keys):
    """Our training under a stage of ZeRO. keys: of DeepSpeed's section zero_optimization; functions are given the model's
    configuration."""

    def build(setting):
        shape = setting.config.model
        made = {name: value(shape) if callable(value) else value for name, value in keys.items()}
        config = setting.config_with({"stage": stage} | made)
        setup = train.choose_setup(config, setting.group)
        ds_engine, not_compiled = train.make_engine(config, setting.group, setup, train.Start(None, {}))
        if config.train.compile and not_compiled:
            raise UserError(f"not compiled: {not_compiled}")
        folder = RunFolder(config.train.out_dir, setting.group.rank)
        watchdog = Watchdog(config.train.out_dir, config.train.timeout_seconds)
        beginning = {"step": 0, "tokens": 0, "best_val_loss": math.inf}
        run = Run(config, setting.group, folder, watchdog, setup, beginning)
        run.bad_steps = BadSteps(ds_engine, config.train.spike_zscore)

        def step(number):
            run.clock.reset()
            run.clock.start_step()
            result = train.train_step(run, ds_engine, setting.data, number)
            if result.fault:
                raise UserError(f"step {number}: {result.fault}")
            return result.facts.loss

        return step

    return build


def plain_step(setting, model, update, prepare=lambda is_last: None):
    """The step of a plain loop. update: clips and changes the weights. prepare: called before each micro-batch."""
    accumulation = setting.args.accumulation

    def step(number):
        total = torch.zeros((), device=setting.device)
        for place, (inputs, targets) in enumerate(setting.micro_batches(number), start=1):
            prepare(place == accumulation)
            loss = model(inputs, targets) / accumulation
            loss.backward()
            total += loss.detach()
        update()
        return total

    return step


def adamw(setting, model, parameters):
    """torch's AdamW, and its update with clipping. parameters: those that it changes, in the model's order."""
    keys = setting.config.train
    pairs = zip(model.parameters(), parameters, strict=True)
    theirs = {id(parameter): changed for parameter, changed in pairs}
    groups = engine.parameter_groups(model, keys.weight_decay)
    for group in groups:
        group["params"] = [theirs[id(parameter)] for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=keys.lr, betas=tuple(keys.betas), eps=keys.eps, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(parameters, keys.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def ddp(setting):
    """torch's DistributedDataParallel, which sums gradients once a step."""
    gpt = setting.gpt()
    weights = list(gpt.parameters())
    masters = weights
    if setting.precision == "bf16":
        masters = [weight.detach().clone().requires_grad_() for weight in weights]
        gpt.to(torch.bfloat16)
    model = torch.nn.parallel.DistributedDataParallel(gpt)
    update_masters = adamw(setting, gpt, masters)

    def update():
        if masters is weights:
            update_masters()
            return
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        update_masters()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    def prepare(is_last):
        model.require_backward_grad_sync = is_last

    return plain_step(setting, model, update, prepare)


def fsdp2(gathered, once):
    """torch's fully_shard of each block and of the rest. gathered: a block's weights are there only while it computes;
    else from the step's first use to its last. once: gradients are reduced once a step, else at every micro-batch."""

    def build(setting):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        gpt = setting.gpt()
        mesh = init_device_mesh(setting.device.type, (setting.group.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if setting.precision == "bf16" else None)
        for block in gpt.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=gathered, mp_policy=policy)
        fully_shard(gpt, mesh=mesh, mp_policy=policy)  # the rest is used last and first, so it stays by default

        def prepare(is_last):
            gpt.set_requires_gradient_sync(is_last or not once)
            gpt.set_reshard_after_backward(is_last or gathered)

        return plain_step(setting, gpt, adamw(setting, gpt, list(gpt.parameters())), prepare)

    return build


# ---- Hugging Face's Trainer


def trainer_config(precision):
    """DeepSpeed's configuration as the Trainer's documentation writes it, its optimizer left to the Trainer."""
    automatic = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    of_run = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    stage_3 = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
    }
    return {
        "zero_optimization": stage_3 | dict.fromkeys(automatic, "auto"),
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(of_run, "auto"),
    }


def trainer_arguments(setting, steps):
    from transformers import TrainingArguments

    keys = setting.config.train
    return TrainingArguments(
        output_dir=str(setting.folder / "trainer"),
        deepspeed=trainer_config(setting.precision),
        per_device_train_batch_size=keys.micro_batch_size,
        gradient_accumulation_steps=setting.args.accumulation,
        max_steps=steps,
        learning_rate=keys.lr,
        lr_scheduler_type="constant",
        weight_decay=keys.weight_decay,
        adam_beta1=keys.betas[0],
        adam_beta2=keys.betas[1],
        adam_epsilon=keys.eps,
        max_grad_norm=keys.grad_clip,
        bf16=setting.precision == "bf16",
        activation_checkpointing=setting.args.recompute,
        use_cpu=setting.device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Sequences(torch.utils.data.Dataset):
    """The sequences in the order in which a Trainer deals them out: one batch to each rank in turn. The targets are given
    as they are, because transformers would shift the inputs, and leave out the last."""

    def __init__(self, setting, steps):
        self.setting = setting
        self.per_step = setting.args.accumulation * setting.group.world_size
        self.length = steps * self.per_step * setting.args.micro_batch_size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        setting = self.setting
        batch, place = divmod(index, setting.args.micro_batch_size)
        step, turn = divmod(batch, self.per_step)
        micro_step, rank = divmod(turn, setting.group.world_size)
        sizes = setting.args.micro_batch_size, setting.args.accumulation
        sample = sample_numbers(step, micro_step, rank, setting.group.world_size, *sizes)[place : place + 1]
        inputs, targets = (torch.from_numpy(part[0]) for part in setting.data.batch(setting.data.windows_of(sample)))
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def make_trainer(setting, row, steps, turns):
    """A Trainer that measures `row` and lets the other rows take their turns between its own steps."""
    import transformers
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback

    from minzero.hf.families import to_transformers, transformers_config

    transformers.utils.logging.set_verbosity_error()
    shape = setting.config.model
    arguments = trainer_arguments(setting, steps)  # first: from here on transformers shards what it makes
    their_model = AutoModelForCausalLM.from_config(transformers_config(shape))
    own = copy.copy(setting)
    own.args = SimpleNamespace(**vars(setting.args) | {"compile": False})
    copy_into(their_model, lambda: dict(to_transformers(shape, own.gpt().state_dict().__getitem__)).__getitem__)

    class Recording(Trainer):
        loss = 0.0  # of the step so far

        def training_step(self, *arguments, **more):
            loss = super().training_step(*arguments, **more)
            self.loss = self.loss + loss
            return loss

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, **more):
            row.end_build()
            self.let_others(control)

        def on_step_end(self, args, state, control, **more):
            row.end_step(trainer.loss)
            self.let_others(control)

        def let_others(self, control):
            trainer.loss = 0.0
            number = next(turns, None)
            if number is None:
                control.should_training_stop = True
            else:
                row.begin_step(number)

    trainer = Recording(their_model, arguments, train_dataset=Sequences(setting, steps), callbacks=[Turns()])
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_trainer(setting, row, turns):
    """All of the Trainer's steps, and the other rows' in between."""
    with catching(row):
        row.meter = Meter(setting.device).start()
        make_trainer(setting, row, WARMUP + setting.args.rounds, turns).train()


def largest_vector(shape):
    return max(4 * shape.n_embd, shape.mlp_width, 3 * shape.n_embd)


def all_parameters(shape):
    return count_parameters(shape)[0]


IN_TRAINER = ("hf_zero3",)
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
        zero(
            3,
            stage3_param_persistence_threshold=largest_vector,
            stage3_prefetch_bucket_size="auto",
            stage3_max_reuse_distance=0,
        ),
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
    setting = Setting(args, size, group, folder)
    rows = [Row(name, group.device) for name in args.rows]
    for row in rows:
        if row.name not in IN_TRAINER:
            with catching(row):
                row.build(setting)
        dist.print0(f"{size}: {row.name} {row.failed or 'built'}")
    turns = take_turns(rows, args.rounds, time.monotonic() + 60 * minutes)
    for row in rows:
        if row.name in IN_TRAINER:
            run_trainer(setting, row, turns)
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
        pairs = list(zip(result["losses"], measured[0]["losses"], strict=False))
        difference = max(abs(found - expected) / abs(expected) for found, expected in pairs)
        result["largest_loss_difference"] = difference
        result["losses_agree"] = difference <= tolerance
        if not result["losses_agree"]:  # also a NaN
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
    from importlib.metadata import PackageNotFoundError, version

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
