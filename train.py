"""Train a GPT with DeepSpeed.

    deepspeed --num_gpus 8 train.py                                   # configs/1p5b.json
    deepspeed --num_gpus 8 train.py configs/13b.json --train.lr 1e-4  # any key can be overridden
    deepspeed --num_gpus 2 train.py configs/tiny.json                 # no GPU: two CPU processes

`train.py --help` lists every key. `main` is the whole run: set-up, then the loop over optimizer steps. Its parts are
above it, in the order in which it calls them. What the run remembers from step to step is in minzero/run.py.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import dataclasses
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from minzero.commands import run_command
from minzero.config.load import help_if_asked

if __name__ == "__main__":
    run_command(help_if_asked, may_be_many=True, is_last=False)  # before the imports that take seconds
import torch

from minzero import checkpoint, checkpoint_folder, dist, four_bit, reference, resume, sampling, summary, trained
from minzero.bad_steps import BadSteps
from minzero.cards import card_of_device
from minzero.checkpoint import as_rank_0
from minzero.compiled import why_not_compiled
from minzero.config.deepspeed import auto_values, deepspeed_config, gradient_accumulation, zero_stage
from minzero.config.load import load_config
from minzero.config.sections import Recomputation, TrainConfig
from minzero.data.mixture import Mixture
from minzero.engine import (
    build_engine,
    check_deepspeed,
    check_memory,
    choose_kernels,
    count_real_parameters,
    memory_per_rank,
    own_grad_norm,
    resolve_precision,
)
from minzero.errors import UserError
from minzero.evaluate_loss import validation_loss
from minzero.evaluate_pairs import validation_of_pairs
from minzero.evaluate_tasks import open_for_run, score_tasks
from minzero.goodput import TimeUse
from minzero.hf import peft
from minzero.init_from import model_defaults
from minzero.loss import equal_weights
from minzero.planner.gpus import Hardware
from minzero.planner.stage import advice, with_chosen_stage
from minzero.preference import LOSSES, Preference
from minzero.restore import restore
from minzero.run import Run, StepResult
from minzero.run_folder import RunFolder
from minzero.schedule import learning_rate
from minzero.watchdog import Watchdog, limits
from minzero.zero import optimizers, relative_rates

LINEAR = "zero_optimization.memory_efficient_linear"

# ---- set-up: whatever can refuse the run, before it writes anything


def open_data(config):
    """The training and the validation split. Each gives inputs, targets and, where attention is within documents,
    positions in these, (micro_batch_size, block_size), and of pairs of answers what the reference says of them."""
    path = config.data.path
    block_size = config.model.block_size
    vocab_size = config.model.vocab_size
    verify = dist.local_place if config.data.verify else None  # the ranks of a machine share the reading
    more = config.train.seed, verify, config.data.document_mask
    found = [Mixture(path, split, block_size, vocab_size, *more) for split in ("train", "val")]
    for data in found:
        data.check_loss(config.train.loss)
    return found


def machine_of_all(group):
    """The planner's Hardware of this run: rank 0's, with the least memory of any device. Every rank must call this."""
    nodes = max(1, group.world_size // dist.local_place[1])
    name = torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else ""
    memory = memory_per_rank(group.device)
    found = dist.from_rank_0(Hardware(group.world_size, nodes, memory, card_of_device(name)))
    return dataclasses.replace(found, memory_bytes=dist.reduce(memory, torch.distributed.ReduceOp.MIN))


class Setup(NamedTuple):
    """How this run computes, by its config and by the machine that it is on."""

    gradient_accumulation_steps: int  # micro-batches of a rank in one optimizer step, the largest where they grow
    precision: str  # bf16, fp16 or fp32
    stage: int  # of ZeRO
    ds_config: dict  # DeepSpeed's complete configuration
    auto: dict  # the values of those keys in it that are "auto" in the config
    kernels: str  # apex or torch
    why_kernels: str
    versions: dict

    @property
    def needs_own_grad_norm(self):
        """The one case in which DeepSpeed keeps no gradient norm."""
        return self.stage == 0 and self.precision == "fp32"


def choose_setup(config, group, precision, memory):
    """Setup of this run. precision: bf16, fp16 or fp32. memory: bytes of a rank's device. Raises UserError for what
    this machine or this number of ranks cannot do."""
    on_gpu = group.device.type == "cuda"
    # tokens a step = micro_batch_size x block_size x ranks x accumulation
    accumulation = gradient_accumulation(config, group.world_size)
    if precision == "fp32" and on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32, as plan.py counts on
    ds_config = deepspeed_config(config, group.world_size, precision, on_gpu, memory)
    check_deepspeed(ds_config)
    check_memory(config, ds_config, memory, on_gpu, group.world_size)
    kernels, why_kernels = choose_kernels(config.train.kernels, group.device)
    auto = auto_values(config, group.world_size, precision, memory)
    stage = zero_stage(ds_config)
    return Setup(accumulation, precision, stage, ds_config, auto, kernels, why_kernels, dist.versions())


class Start(NamedTuple):
    """Where a run starts: at a checkpoint, or at step 0 with random weights or those of another model."""

    path: Path | None  # of the checkpoint
    state: dict  # its state.json
    init_source: str | None = None  # train.init_from in words, where its weights are taken
    load_weights: Callable | None = None  # as trained.open_weights gives it
    base: dict | None = None  # with adapters: whose weights stay as they are, as trained.identity_of gives it
    load_adapters: Callable | None = None  # as peft.open_adapter gives it


def choose_start(config, train_data):
    """Start of this run, by train.resume and train.init_from. Every rank must call this. Raises UserError."""
    path, state = resume.where_to_start(config, train_data)
    if config.train.init_from and not path and not config.lora.rank:
        init_source, load_weights = trained.open_weights(config.train.init_from, config.model)
        return Start(path, state, init_source, load_weights)
    return Start(path, state)


def with_base(config, start, precision):
    """The Start of a run that trains adapters with the weights beside them, which are needed also where it is resumed;
    that of another run as it is. Every rank must call this: it begins with what rank 0 has found. Raises UserError."""
    base = as_rank_0(lambda: trained.base_of(config, start.path, start.state.get("base")))
    if base is None:
        return start
    if config.lora.base_bits:
        four_bit.require()
        if start.path and start.state["precision"] != precision:
            raise UserError(
                f"train.precision: found {precision}, expected {start.state['precision']} as in {start.path}: the base "
                "has other 4-bit weights in another precision"
            )
    init_source, load_weights = trained.open_weights(base["path"], config.model)
    load_adapters = None
    if config.lora.init_from and not start.path:
        load_adapters = peft.open_adapter(config.lora, config.model)
        dist.print0(peft.other_base(config.lora.init_from, config.train.init_from))
    return Start(start.path, start.state, init_source, load_weights, base, load_adapters)


def facts_in_common(config, setup, start, train_data, val_data):
    """What must be the same on all ranks, as nested dictionaries."""
    facts = config.to_dict()
    seen = start.path and checkpoint_folder.is_complete(start.path)  # as on rank 0, which has chosen it
    facts |= {"precision": setup.precision, "kernels": setup.kernels, "checkpoint": str(start.path if seen else None)}
    facts["base"] = start.base
    facts["versions"] = {name: setup.versions[name] for name in ("python", "torch", "deepspeed")}
    facts["code"] = dist.code_digests()
    facts["tokens"] = train_data.content_digests() | val_data.content_digests()
    facts["shards"] = {"train": train_data.fingerprint(), "val": val_data.fingerprint()}
    return facts


def skip_damaged_checkpoints(config, train_data, start):
    """`start`, or one at an older checkpoint if files of the newest are damaged. The ranks share the reading of all
    checksums. Every rank must call this."""
    known_faults = {}
    while start.path and (fault := checkpoint.fault_of(start.path, start.state)):
        known_faults[start.path] = fault
        with dist.all_or_none():
            path, state = resume.where_to_start(config, train_data, known_faults)
            start = start._replace(path=path, state=state)
    return start


def make_engine(config, group, setup, start):
    """The model and its optimizer in DeepSpeed's hands. Returns (engine, why the model is not compiled or None)."""
    zero = config.deepspeed.get("zero_optimization")
    device = group.device
    recomputation = config.train.activation_checkpointing
    not_compiled = why_not_compiled(
        config.train.compile,
        config.model,
        device,
        setup.kernels,
        setup.precision,
        zero,
        recomputation,
        config.train.activation_offload,
    )
    compiled = not_compiled is None
    if not compiled and Recomputation.of(recomputation).budget < 1:
        raise UserError(
            f"train.activation_checkpointing: found {recomputation}, which the compiler obeys, but the model is not "
            f"compiled: {not_compiled}; set train.compile to true, or this to true, a number k of blocks or selective"
        )
    loads = start.load_weights, start.load_adapters
    engine = build_engine(config, setup.ds_config, device, setup.kernels, compiled, *loads)
    if config.train.loss in LOSSES:
        engine.module.preference = Preference(config.train.loss, config.train.dpo_beta)
    torch.manual_seed(config.train.seed + 1 + group.rank)  # each rank drops other activations
    return engine, not_compiled


def info_of(config, group, setup, train_data, compiled, **more):
    """What config.json and each checkpoint record of a run. more: what only some have, or None: base, of Start;
    reference, the digest of that of preference tuning; branch_of, of resume.py."""
    auto = dict(setup.auto)
    if compiled and LINEAR in auto:
        auto[LINEAR] = False  # see build_engine
    return {
        "config": config.to_dict(),
        "versions": setup.versions,
        "data": train_data.fingerprint(),
        "world_size": group.world_size,
        "stage": setup.stage,
        "precision": setup.precision,
        "kernels": setup.kernels,
        "compiled": compiled,
        "deepspeed_auto": auto,
        "attended_tokens": train_data.attended(),
    } | {name: value for name, value in more.items() if value}


# ---- the parts of a step


def set_learning_rate(engine, rate):
    for optimizer in optimizers(engine):
        for group, relative in zip(optimizer.param_groups, relative_rates(engine), strict=True):
            group["lr"] = rate * relative


def to_device(arrays, device):
    """NumPy batches -> tensors on the device; the copy to a GPU overlaps with its work."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def micro_batches(run, data, step):
    """Yields this rank's micro-batches of a step, read when it is their turn: (batch of the data, loss weight)."""
    group = run.group
    accumulation = run.accumulation_of(step)
    first_sample, _ = run.samples_of(step)
    batches = data.batches(first_sample, group.rank, group.world_size, run.config.train.micro_batch_size, accumulation)
    weights = [1.0] * accumulation
    if data.is_uneven:  # micro-batches with different numbers of tokens that count
        batches = list(batches)
        run.watchdog.turn()  # after the reading, which may hang on one rank
        weights = equal_weights(batches, group.world_size, group.device)
    yield from zip(batches, weights, strict=True)


def train_step(run, engine, data, step):
    """One optimizer step: forward and backward over this rank's micro-batches, then the update. DeepSpeed averages the
    gradient over micro-batches and ranks. Every rank must call this. Returns a StepResult."""
    accumulation = run.accumulation_of(step)
    engine.set_train_batch_size(run.tokens_of(step) // data.block_size)
    mean_loss = torch.zeros((), device=run.group.device)  # of this rank
    for micro_step, (batch, weight) in enumerate(micro_batches(run, data, step), start=1):
        run.watchdog.turn()
        inputs, targets = to_device(batch[:2], run.group.device)
        on_cpu = map(torch.from_numpy, batch[2:])  # where documents begin, which the model wants there
        run.clock.mark("data")

        engine.set_gradient_accumulation_boundary(micro_step == accumulation)
        micro_loss = engine(inputs, targets, *on_cpu) * weight
        engine.backward(micro_loss)
        mean_loss += micro_loss.detach() / accumulation
        if micro_step == accumulation:  # before engine.step() clips the gradients, updates, and frees them
            facts = dist.share_step(mean_loss, run.stop_requested(), run.save_is_due(), run.checkpoint_is_written())
            run.bad_steps.set_loss(facts.loss, own_grad_norm(engine) if run.setup.needs_own_grad_norm else None)
        run.clock.mark("forward_backward")

        engine.step()  # updates after the last micro-batch, unless bad_steps finds something wrong
        run.clock.mark("optimizer")
    fault = run.bad_steps.result(run.samples_of(step))
    return StepResult(facts, run.bad_steps.grad_norm, fault)


def validate(run, engine, data, step):
    """Evaluate, log the validation loss, and draw the run's picture. Every rank must call this."""
    train = run.config.train
    began = time.perf_counter()
    sizes = train.eval_tokens, train.micro_batch_size
    of_pairs = None
    if data.has_pairs:
        of_pairs = validation_of_pairs(engine, data, *sizes, *run.group, progress=run.watchdog.turn)
        loss = of_pairs["loss"]
    else:
        loss = validation_loss(engine, data, *sizes, *run.group, progress=run.watchdog.turn)
    run.record_validation(step, loss, time.perf_counter() - began, of_pairs)
    run.draw_loss()


def show_sample(run, engine, tokenizer, step):
    """Print and log a text that the model writes. Every rank must call this."""
    seed = run.config.train.seed + step
    run.record_sample(step, sampling.write_text(engine, tokenizer, run.group.device, seed, run.watchdog.turn))


# ---- the run


def main(config, watchdog=None):
    """Train as `config` says, from the beginning or from the run's newest checkpoint. Returns the last validation loss,
    None if it was stopped before the first; of a run that was complete before, the best.

    Raises UserError: for what is wrong with the config, the data or the machine before anything is written; later for
    a folder or disk that cannot be written, and for bad steps that end the run. watchdog: notices requests to stop."""
    train = config.train
    watchdog = watchdog or Watchdog(train)
    time_use = TimeUse()
    group = dist.start_process_group(train.verbose, group_timeout(train), meet_within=train.meet_timeout_seconds)
    watchdog.register_peers()  # from here on a rank that dies or hangs is noticed
    with RunFolder(train.out_dir, group.rank) as folder:
        watchdog.folder = folder

        # ---- set up and check everything; nothing is written yet
        hardware = machine_of_all(group)
        with dist.all_or_none():  # no other run may be writing the checkpoints that this one looks for
            dist.print0(folder.hold(new=False) if group.rank == 0 else None)
        dist.refuse_different_ranks(config.to_dict())  # by which the ranks decide what they do together
        restore(config, folder, group.rank)  # writes only if train.copy_to has newer checkpoints than the folder
        with dist.all_or_none():
            train_data, val_data = open_data(config)
            precision = resolve_precision(train.precision, group.device)
            config = with_chosen_stage(config, hardware, precision)
            setup = choose_setup(config, group, precision, hardware.memory_bytes)
        with dist.all_or_none():  # begins with what rank 0 has chosen, so a rank that fails above must not skip it
            start = choose_start(config, train_data)
        with dist.all_or_none():
            start = with_base(config, start, setup.precision)
            tokenizer = sampling.open_tokenizer(config)
            facts = facts_in_common(config, setup, start, train_data, val_data)
        dist.refuse_different_ranks(facts)
        time_use.mark("start")
        start = skip_damaged_checkpoints(config, train_data, start)
        time_use.mark("resume")

        # ---- the run takes its folder, and writes from here on
        run = Run(config, group, folder, watchdog, setup, start.state, time_use)
        if run.is_complete():
            run.report_complete(start)
            return run.best_val_loss
        tasks = open_for_run(config)
        run.take_folder(resumes=start.path is not None)

        # ---- model and optimizer: in mixed precision 16 bytes a parameter, 2 of weight, 2 of gradient, 4 of float32
        # copy and 8 of Adam's moments. ZeRO-1 shards the last 12 over the ranks, -2 the gradients too, -3 all 16
        # (Rajbhandari et al. 2020, arXiv 1910.02054, figure 1)
        if start.init_source and not start.path:
            dist.print0(f"weights from {start.init_source}")
            dist.print0(summary.adapters_line(config.lora, start.base))
            if group.rank == 0:  # here, for it draws random numbers, which begin again when the engine is made
                for line in trained.doubts_about_data(train.init_from, train_data.folders):
                    dist.print0(line)
        engine, not_compiled = make_engine(config, group, setup, start)
        watchdog.heartbeat()
        time_use.mark("start")
        if start.path:
            checkpoint.load(engine, start.path, start.state, train.seed, watchdog.heartbeat)
            time_use.mark("resume")
            dist.print0(summary.resume_line(start, group, setup))
            dist.print0(summary.changed_settings(start.state, config, setup.auto))
        digest = None  # of what the reference of preference tuning says
        if train_data.has_pairs:
            digest = reference.provide(run, engine, start, [*train_data.streams, *val_data.streams])
        way_back = resume.WayBack(train.out_dir, start.path)
        bad_steps = BadSteps(engine, train.spike_zscore, start.state.get("bad_steps"), way_back)
        more = {"base": start.base, "reference": digest, "branch_of": resume.branch_of(train, start.path, start.state)}
        info = info_of(config, group, setup, train_data, not_compiled is None, **more)
        run.begin(engine, bad_steps, info, count_real_parameters(engine.module))
        for line in summary.start_lines(run, train_data, not_compiled):
            dist.print0(line)
        if group.rank == 0:
            dist.print0(advice(config, hardware, setup.precision))

        # ---- the loop: `step` optimizer steps are done after it, tokens_at(step) tokens are seen
        for step in run.steps():
            rate = learning_rate(train, run.tokens_at(step))
            set_learning_rate(engine, rate)
            result = train_step(run, engine, train_data, step)

            # a loss or gradient that must not reach the weights, and has not
            if result.fault:
                run.handle_bad_step(step, result)
            if run.should_log(step):
                run.log_step(step, rate, result)
            run.end_step(step, result)  # what follows is no part of the step's time
            run.report_uncompiled(step)

            if run.should_evaluate(step):
                with watchdog.during("evaluation"):
                    validate(run, engine, val_data, step)
            if run.should_score_tasks(step, result):
                score_tasks(run, engine, tasks, step)

            # 12 bytes a parameter, over all ranks: the weight and Adam's two moments in float32
            if run.should_save(step, result):
                run.save(step, result)
            elif result.facts.ranks_that_wrote == group.world_size:  # in the background
                run.finish_saving()
            if run.should_sample(step, result):
                show_sample(run, engine, tokenizer, step)

            if result.facts.stop_requested and not run.is_last(step):
                run.stop(step)
                break
        else:
            folder.report("complete", run.total_steps)
        run.close(step)
        return run.val_loss


def group_timeout(train):
    """How long a rank waits for the others: longer than the watchdog, which names the rank that hangs."""
    return timedelta(seconds=max(1800, 2 * max(limits(train).values())))


def command(arguments):
    """main from the command line."""
    dist.find_place()
    config, fault = None, None
    try:
        dist.init_process()
        config = load_config(arguments, model_defaults)
    except UserError as error:
        fault = str(error)  # perhaps of this node alone: the other ranks are told
    train = config.train if config else TrainConfig(out_dir=".")
    watchdog = Watchdog(train).start()
    try:
        with dist.ending_together(watchdog.end_alone, watchdog.wait_until_others_know):
            dist.start_process_group(train.verbose, group_timeout(train), False, train.meet_timeout_seconds, fault)
            main(config, watchdog)
    finally:
        watchdog.stop()
    dist.stop_process_group()


if __name__ == "__main__":
    run_command(command, may_be_many=True)
