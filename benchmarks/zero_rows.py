"""Rows of zero.py that train our GPT: under ZeRO as train.py does, and in a plain loop under torch's DDP and FSDP2.

Each maker takes a Setting and returns the row's step: a function from the step's number, counted from 1, to its mean
loss, of this rank or of all."""

import math

import numpy as np
import torch
from torch.nn import functional as F

import train
from minzero import engine
from minzero.bad_steps import BadSteps
from minzero.config.load import load_config
from minzero.data.mixture import Mixture
from minzero.data.shards import token_dtype, write_shard
from minzero.errors import UserError
from minzero.files import write_json
from minzero.run import Run
from minzero.run_folder import RunFolder
from minzero.watchdog import Watchdog
from minzero.zero import torch_linear
from model import GPT

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}  # of a loss, relative, in the precisions that every row has


class Setting:
    """What all rows of one size have in common."""

    def __init__(self, args, size, shape, group, folder):
        """args: the flags of zero.py. size: the name of the model section `shape`. folder: for files of the runs."""
        self.args = args
        self.group = group
        self.device = group.device
        self.folder = folder
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
        write_json(self.path, {"model": shape | {"dropout": 0.0}, "data": {"path": str(folder / size)}, "train": keys})
        self.config = self.config_with({})
        self.precision = engine.resolve_precision(args.precision, group.device)
        if self.precision not in TOLERANCE:
            raise UserError(f"--precision: found {self.precision}, expected {' or '.join(TOLERANCE)}")
        write_tokens(folder / size, self.config.model.vocab_size)
        model, seed = self.config.model, self.config.train.seed
        self.data = Mixture(str(folder / size), "train", model.block_size, model.vocab_size, seed)

    def config_with(self, zero):
        """The configuration, read as train.py reads it, with these keys of DeepSpeed's section zero_optimization."""
        flags = [(f"--deepspeed.zero_optimization.{name}", str(value)) for name, value in zero.items()]
        return load_config([str(self.path), *(word for flag in flags for word in flag)])

    def gpt(self):
        """Our model with its initial weights, which are the same in all rows."""
        with self.device:
            return GPT(self.config.model, self.config.train.seed, self.args.recompute)

    def micro_batches(self, number):
        """This rank's batches of a step, from 1: pairs of inputs and targets, (B, T) on the device."""
        sizes = self.args.micro_batch_size, self.args.accumulation
        first_sample = (number - 1) * self.group.world_size * math.prod(sizes)
        for batch in self.data.batches(first_sample, self.group.rank, self.group.world_size, *sizes):
            yield train.to_device(batch, self.device)


def write_tokens(folder, vocab_size):
    """A shard of tokens that follow a rule, so that the loss falls: each is 1 to 3 above the one before."""
    folder.mkdir()
    steps = np.random.default_rng(0).integers(1, 4, 2**20)
    write_shard(folder / "train_000000.bin", (np.cumsum(steps) % vocab_size).astype(token_dtype(vocab_size)))


def zero(stage, **keys):
    """Our training under a stage of ZeRO. keys: of DeepSpeed's section zero_optimization; a function is called with the
    model's configuration."""

    def build(setting):
        shape = setting.config.model
        made = {name: value(shape) if callable(value) else value for name, value in keys.items()}
        config = setting.config_with({"stage": stage} | made)
        setup = train.choose_setup(
            config, setting.group, setting.precision, train.machine_of_all(setting.group).memory_bytes
        )
        torch_linear()
        ds_engine, not_compiled = train.make_engine(config, setting.group, setup, train.Start(None, {}))
        if config.train.compile and not_compiled:
            raise UserError(f"not compiled: {not_compiled}")
        folder = RunFolder(config.train.out_dir, setting.group.rank)
        watchdog = Watchdog(config.train)
        beginning = {"step": 0, "tokens": 0, "best_val_loss": math.inf}
        run = Run(config, setting.group, folder, watchdog, setup, beginning)
        run.bad_steps = BadSteps(ds_engine, config.train.spike_zscore)

        linear = F.linear  # ZeRO-3 replaces it for the whole process

        def step(number):
            F.linear = linear
            run.clock.reset()
            run.clock.start_step()
            result = train.train_step(run, ds_engine, setting.data, number)
            if result.fault:
                raise UserError(f"step {number}: {result.fault}")
            return result.facts.loss

        return step

    return build


def plain_step(setting, model, update, prepare=lambda is_last: None):
    """The step of a plain loop. update: clips and changes the weights. prepare: called before each micro-batch with
    whether it is the step's last."""
    accumulation = setting.args.accumulation

    def step(number):
        torch_linear()  # a row of ZeRO-3 has replaced it
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
    groups = engine.parameter_groups(model, setting.config)
    for group in groups:
        group["params"] = [theirs[id(parameter)] for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=keys.lr, betas=tuple(keys.betas), eps=keys.eps, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(parameters, keys.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def compile_if_asked(setting, gpt):
    if setting.args.compile:
        gpt.compile()


def ddp(setting):
    """torch's DistributedDataParallel, which sums gradients once a step."""
    gpt = setting.gpt()
    compile_if_asked(setting, gpt)
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
        compile_if_asked(setting, gpt)
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
