"""Train a GPT with DeepSpeed.

    deepspeed --num_gpus 8 train.py                                   # configs/1p5b.json
    deepspeed --num_gpus 8 train.py configs/13b.json --train.lr 1e-4  # any key can be overridden
    deepspeed --num_gpus 2 train.py configs/tiny.json                 # no GPU: two CPU processes

Read it from top to bottom: learning rate, evaluation, set-up, loop. `train.py --help` lists every key.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import contextlib
import json
import math
import time
from datetime import timedelta
from pathlib import Path

from minzero.config import help_if_asked, run_command

if __name__ == "__main__":
    run_command(help_if_asked, may_be_many=True)  # before the imports that take seconds
import torch
from torch import distributed

import export
from minzero import checkpoint, dist, guard, metrics
from minzero.config import (
    SharedError,
    TrainConfig,
    UserError,
    deepspeed_config,
    gradient_accumulation,
    load_config,
    zero_stage,
)
from minzero.data.mixture import Mixture
from minzero.data.shards import write_json
from minzero.engine import (
    build_engine,
    check_deepspeed,
    check_memory,
    choose_kernels,
    count_real_parameters,
    resolve_precision,
    why_not_compiled,
)
from minzero.loggers import MetricsLog
from minzero.profiler import Profiler
from minzero.run_folder import RunFolder
from minzero.zero import optimizers
from model import IGNORE

SHAPES_THE_RATE = [f"train.{name}" for name in checkpoint.SHAPES_THE_RATE]


def learning_rate(train, tokens):
    """The rate of the step that ends at `tokens`: linear warm-up, then the schedule from the peak down to
    min_lr_ratio of it at max_tokens. Counted in tokens, so it means the same on any number of GPUs
    (GPT-3: Brown et al. 2020, arXiv 2005.14165, appendix B)."""
    if tokens < train.warmup_tokens:
        return train.lr * tokens / train.warmup_tokens
    progress = min(1.0, (tokens - train.warmup_tokens) / max(1, train.max_tokens - train.warmup_tokens))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * fall[train.schedule])


def to_device(arrays, device):
    """NumPy batches -> tensors on the device; the copy to a GPU overlaps with its work."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def equal_weights(batches, world_size, device):
    """By what to multiply the mean losses of this rank's micro-batches of a step so that each target that counts, of
    all micro-batches and ranks, counts the same. batches: pairs of inputs and targets. Every rank must call this."""
    counts = torch.tensor([(targets != IGNORE).sum() for _, targets in batches], dtype=torch.float64, device=device)
    total = counts.sum()
    distributed.all_reduce(total)
    return (counts * len(batches) * world_size / total.clamp(min=1)).tolist()


@torch.no_grad()
def evaluate(model, stream, wanted_tokens, micro_batch_size, device, rank=0, world_size=1, progress=lambda: None):
    """Mean cross-entropy in nats per token, over validation windows that are the same at every call and on
    any number of ranks. All ranks run the same number of forward passes (ZeRO-3's gathers are collective): a rank
    with too few windows is padded with windows that do not count. progress: called before each forward pass."""
    windows = stream.validation_windows(wanted_tokens // stream.block_size)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of targets
    model.eval()
    for first in range(0, len(windows), micro_batch_size * world_size):
        progress()
        mine = windows[first + rank * micro_batch_size :][:micro_batch_size]
        filled = list(mine) + [windows[0]] * (micro_batch_size - len(mine))
        tokens, targets = to_device(stream.batch(filled), device)
        targets[len(mine) :] = IGNORE
        count = (targets != IGNORE).sum()
        totals[0] += model(tokens, targets).double() * count
        totals[1] += count
    model.train()
    if world_size > 1:
        distributed.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def changed_settings(state, config, tokens_before):
    """What a resumed run does otherwise than its checkpoint, in one line, or None. state: the checkpoint's;
    tokens_before: see `train_in`."""
    changed = checkpoint.changed_settings(state["config"], config.to_dict())
    if not changed:
        return None
    text = "; ".join(f"{name} {json.dumps(was)} -> {json.dumps(now)}" for name, (was, now) in changed.items())
    line = f"changed since the checkpoint: {text}"
    if any(name in changed for name in SHAPES_THE_RATE):
        train, step = config.train, state["step"]
        tokens = tokens_before + (step + 1) * train.global_batch_tokens
        before = learning_rate(checkpoint.saved_train_config(state), state["tokens"])
        line += f"; the learning rate goes from {before:.2e} at step {step} to {learning_rate(train, tokens):.2e} at "
        line += f"step {step + 1} and to {learning_rate(train, train.max_tokens):.2e} at the end"
    return line


def patience(train):
    """How long a rank waits for the others: the watch notices a hang first, and names the rank."""
    return timedelta(seconds=max(1800, 2 * train.timeout_seconds))


def main(config, watch=None):
    """Train as `config` says, from the beginning or from the run's newest checkpoint. Returns the last
    validation loss. Raises UserError for what the user can fix, before anything is written.
    watch: notices requests to stop."""
    train = config.train
    watch = watch or guard.Watch(train.out_dir, train.timeout_seconds)
    device, rank, world_size = dist.start_process_group(train.verbose, patience(train))
    with RunFolder(train.out_dir, rank) as folder:
        watch.folder = folder
        return train_in(folder, config, watch, device, rank, world_size)


def train_in(folder, config, watch, device, rank, world_size):
    """`main` for one rank of a process group. folder: the run's RunFolder, which nobody holds yet."""
    train = config.train

    def say(line):
        if rank == 0 and line:
            with contextlib.suppress(OSError):  # a lost terminal must not cost the run
                print(line, flush=True)

    # ---- the folder, if it is there: no other run may be writing the checkpoints that this one looks for
    run = Path(train.out_dir)
    with dist.all_or_none():
        say(folder.hold(new=False) if rank == 0 else None)

    with dist.all_or_none():
        # ---- data: batch(windows) gives inputs and targets, both (micro_batch_size, block_size)
        sizes = config.model.block_size, config.model.vocab_size
        verify = dist.local_place if config.data.verify else None  # the ranks of a machine share the reading
        train_data, val_data = (
            Mixture(config.data.path, split, *sizes, train.seed, verify) for split in ("train", "val")
        )

        # ---- batch arithmetic: tokens a step = micro_batch_size x block_size x ranks x accumulation
        accumulation = gradient_accumulation(config, world_size)
        precision = resolve_precision(train.precision, device)
        if precision == "fp32" and device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as plan.py counts on
        ds_config = deepspeed_config(config, world_size, precision, on_gpu=device.type == "cuda")
        check_deepspeed(ds_config)
        check_memory(config, ds_config, device, world_size)
        kernels, why_kernels = choose_kernels(train.kernels, device)

        # ---- weights, new or from a checkpoint
        stage = zero_stage(ds_config)
        resume_from, state = checkpoint.where_to_start(config, train_data)
        weights, load_weights = None, None
        if train.init_from and not resume_from:
            weights, load_weights = export.open_weights(train.init_from, config.model)
        digests = train_data.content_digests() | val_data.content_digests()
        code = dist.code_digests()

    # ---- what all ranks must have in common
    made_with = dist.versions()
    facts = config.to_dict() | {"precision": precision, "kernels": kernels, "checkpoint": str(resume_from)}
    facts |= {"versions": {name: made_with[name] for name in ("python", "torch", "deepspeed")}}
    facts |= {"code": code, "tokens": digests}
    facts["shards"] = {"train": train_data.fingerprint(), "val": val_data.fingerprint()}
    dist.refuse_different_ranks(facts)
    known_faults = {}
    while resume_from and (fault := checkpoint.fault_of(resume_from, state)):
        known_faults[resume_from] = fault
        with dist.all_or_none():
            resume_from, state = checkpoint.where_to_start(config, train_data, known_faults)
    first_step, best_val_loss = state["step"], state["best_val_loss"]
    # other than zero only where train.global_batch_tokens was changed on the way
    tokens_before = state["tokens"] - first_step * train.global_batch_tokens
    total_steps = (train.max_tokens - tokens_before) // train.global_batch_tokens
    if first_step >= total_steps:
        if state.get("suspect"):
            reason = "it ended after steps whose numbers were bad"
            raise SharedError(f"{resume_from}: {reason}; look at the data, or lower train.lr, in another train.out_dir")
        say(f"{run} is complete: {first_step} of {total_steps} steps; raise train.max_tokens to train it longer")
        return best_val_loss

    # ---- from here on the run writes
    for its_turn in (rank == 0, rank != 0):  # rank 0 makes the folder and locks it, the others share the lock
        with dist.all_or_none():
            say(folder.hold() if its_turn else None)
    with dist.all_or_none():
        if rank == 0 and not resume_from and checkpoint.find(run):
            raise UserError(f"train.out_dir: another run has just saved into {run}; start again to continue it")
        if rank == 0:
            checkpoint.tidy(run / "checkpoints")
    zero = ds_config.get("zero_optimization")
    not_compiled = why_not_compiled(train.compile, config.model, device, kernels, precision, zero)
    engine = build_engine(config, ds_config, device, kernels, not not_compiled, load_weights)
    plain = stage == 0 and precision == "fp32"  # the one case in which DeepSpeed keeps no gradient norm
    torch.manual_seed(train.seed + 1 + rank)  # each rank drops other activations
    watch.meet()
    if resume_from:
        checkpoint.load(engine, resume_from, state, train.seed, watch.beat)
        was = checkpoint.setting(state["world_size"], state["stage"], state["precision"])
        now = checkpoint.setting(world_size, stage, precision)
        say(
            f"continuing from {resume_from}: step {first_step}, {state['tokens']:,} tokens"
            + (f"; saved on {was}, now {now}" if was != now else "")
        )
        say(changed_settings(state, config, tokens_before))
    elif weights:
        say(f"weights from {weights}")
    steps = guard.BadSteps(engine, train.spike_zscore, state.get("bad_steps"))

    # ---- what is logged, and what a checkpoint records
    record = {"config": config.to_dict(), "versions": made_with, "data": train_data.fingerprint()}
    record |= {"world_size": world_size, "stage": stage, "precision": precision}
    record |= {"kernels": kernels, "compiled": not not_compiled}
    parameters = count_real_parameters(engine.module)
    with dist.all_or_none():
        if rank == 0:
            write_json(run / "config.json", config.to_dict() | {key: record[key] for key in record if key != "config"})
            log = MetricsLog(run, first_step, train.loggers, config.to_dict())
        folder.report("running", first_step)
    for section, content in config.to_dict().items():
        say(f"{section}: {json.dumps(content)}")
    say(f"kernels: {kernels} ({why_kernels}); compiled: {f'no ({not_compiled})' if not_compiled else 'yes'}")
    say(
        f"{parameters:,} parameters, {precision}, ZeRO-{stage} on {world_size} x {made_with['device']}\n"
        f"{train.global_batch_tokens:,} tokens a step = {world_size} ranks x {accumulation} micro-batches x "
        f"{train.micro_batch_size} sequences x {config.model.block_size}; {total_steps:,} steps; run in {run}"
    )
    if not_counted := metrics.formula_fault(config.model, parameters):
        say(f"FLOP/s and MFU are null: {not_counted}")

    def finish(save):
        path, seconds, stalled = save.finish()
        watch.beat()
        say(f"saved {path} in {seconds:.2f} s, {stalled:.2f} s of them standing still")
        if rank == 0:
            line = {"step": save.state["step"], "tokens": save.state["tokens"]}
            log.write(line | {"save_seconds": seconds, "stall_seconds": stalled})

    # ---- the loop: `step` is the number of optimizer steps done, which is all a run needs to go on
    val_loss, saved_at, save = None, time.monotonic(), None
    clock, profiler = metrics.Stopwatch(device), Profiler(run, train.profile_steps if rank == 0 else None)
    watch.begin_loop()
    for step in range(first_step + 1, total_steps + 1):
        clock.start_step()
        profiler.start_step(step)
        tokens_seen = tokens_before + step * train.global_batch_tokens
        lr = learning_rate(train, tokens_seen)
        for optimizer in optimizers(engine):
            for group in optimizer.param_groups:
                group["lr"] = lr

        # forward and backward: DeepSpeed averages the gradient over micro-batches and ranks, and steps
        # after the last micro-batch
        mean_loss = torch.zeros((), device=device)  # of this rank
        places = (step - 1, rank, world_size, train.micro_batch_size, accumulation)
        batches = train_data.batches(*places, tokens_before // config.model.block_size)  # read when it is their turn
        weights = [1.0] * accumulation
        if train_data.loss_mask:
            batches = list(batches)
            weights = equal_weights(batches, world_size, device)
        for micro_step, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            watch.beat()
            inputs = to_device(batch, device)
            clock.mark("data")
            micro_loss = engine(*inputs) * weight
            engine.backward(micro_loss)
            mean_loss += micro_loss.detach() / accumulation
            if micro_step == accumulation - 1:  # before the step clips the gradients and drops them
                gradients = [p.grad for p in engine.module.parameters()] if plain else None
                # all ranks learn the mean loss, whether one was asked to stop, whether rank 0's clock says save,
                # and how many have written the checkpoint that is on its way
                old = rank == 0 and 0 < train.save_every_seconds < time.monotonic() - saved_at
                mine = watch.reason is not None, old, save is not None and save.written is not None
                everyone = torch.cat((mean_loss.double().view(1), mean_loss.new_tensor(mine)))
                distributed.all_reduce(everyone)  # here the host waits for the GPU, once a step
                loss_sum, stopping, saving, have_written = everyone.tolist()
                loss = loss_sum / world_size
                steps.expect(loss, float(torch.nn.utils.get_total_norm(gradients)) if plain else None)
            clock.mark("forward_backward")
            engine.step()
            clock.mark("optimizer")
        last_sample = tokens_seen // config.model.block_size - 1
        samples = (last_sample + 1 - train.global_batch_tokens // config.model.block_size, last_sample)
        if fault := steps.outcome(samples):
            if rank == 0:
                log.write({"step": step, "tokens": tokens_seen, "bad_step": fault, "samples": samples})
            say(f"step {step}: {fault}; samples {samples[0]} to {samples[1]} {steps.answer(step, train, watch.beat)}")

        if step % train.log_every == 0 or step == 1 or step == total_steps:
            line = {"step": step, "tokens": tokens_seen, "loss": loss, "lr": lr}
            line |= {"grad_norm": steps.grad_norm, "skipped": steps.skipped} | clock.read()
            line |= metrics.throughput(config, line["step_seconds"], world_size, made_with["device"], parameters)
            line |= metrics.peak_memory()
            folder.report("running", step)
            if rank == 0:
                log.write(line)
            say(metrics.console_line(line, total_steps))

        last = step == total_steps
        evaluate_now = last or (train.eval_every and step % train.eval_every == 0)
        save_now = bool(last or stopping or saving or (train.save_every and step % train.save_every == 0))
        best_now = False
        if evaluate_now or save_now or have_written or step == profiler.last:
            clock.pause()  # none of these is part of a step
        if profile := profiler.end_step(step, ending=last or stopping):
            say(profile)
        if evaluate_now:
            began = time.perf_counter()
            sizes = (train.eval_tokens, train.micro_batch_size)
            val_loss = evaluate(engine, val_data, *sizes, device, rank, world_size, watch.beat)
            eval_seconds = time.perf_counter() - began
            # a NaN is never the best, and nothing is ever measured against one
            best_now = val_loss < (math.inf if best_val_loss is None else best_val_loss)
            best_val_loss = val_loss if best_now else best_val_loss
            say(f"step {step}: validation loss {val_loss:.4f}{', the best so far' if best_now else ''}")
            folder.report("running", step)
            if rank == 0:
                line = {"step": step, "tokens": tokens_seen, "val_loss": val_loss}
                log.write(line | {"eval_seconds": eval_seconds})
                try:
                    from minzero import plot  # matplotlib takes a second to import, and only rank 0 draws

                    plot.plot_loss([run], run / "loss.png")
                except Exception as error:  # a picture must not cost the run
                    say(f"{run / 'loss.png'} was not drawn: {type(error).__name__}: {error}")
                watch.beat()
        save_now |= best_now and train.save_best
        if save and (save_now or have_written == world_size):
            finish(save)
            save = None
        if save_now:
            with dist.all_or_none():
                folder.check_is_there()
            state = record | {"step": step, "tokens": tokens_seen, "best_val_loss": best_val_loss}
            state |= {"val_loss": val_loss if evaluate_now else None, "bad_steps": steps.state()}
            place, keep, saved_at = run / "checkpoints", train.keep_checkpoints, time.monotonic()
            save = checkpoint.Saving(engine, place, state, best_now, keep, train.save_in_background, watch.beat)
            if last or stopping or not train.save_in_background:
                finish(save)
                save = None
        if stopping and not last:
            reason = watch.reason or "a signal to another rank"
            folder.report("stopped", step, reason)
            say(f"stopped by {reason} after step {step}; the same command continues")
            break
    else:
        folder.report("complete", total_steps)

    if ds_config.get("comms_logger", {}).get("enabled"):
        dist.comm.log_summary()  # rank 0 prints; the others are asked
    if rank == 0:
        log.close()
    if step == total_steps:
        steps.check_end(step, train)
    return val_loss


def command(arguments):
    """main from the command line."""
    dist.find_place()
    config, fault = None, None
    try:
        config = load_config(arguments)
    except UserError as error:
        fault = error  # perhaps of this node's file alone: the other ranks are told
    train = config.train if config else TrainConfig(out_dir=".")
    watch = guard.Watch(train.out_dir, train.timeout_seconds).start()
    try:
        with dist.ending_together(watch.end_alone, watch.stop_watching):
            dist.start_process_group(train.verbose, patience(train))
            with dist.all_or_none():
                if fault:
                    raise fault
            main(config, watch)
    finally:
        watch.finish()
    dist.stop_process_group()


if __name__ == "__main__":
    run_command(command, may_be_many=True)
