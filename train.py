"""Train a GPT with DeepSpeed.

    deepspeed --num_gpus 8 train.py                                   # configs/1p5b.json
    deepspeed --num_gpus 8 train.py configs/13b.json --train.lr 1e-4  # any key can be overridden
    deepspeed --num_gpus 2 train.py configs/tiny.json                 # no GPU: two CPU processes

Read it from top to bottom: learning rate, evaluation, set-up, loop. `train.py --help` lists every key.
"""

import contextlib
import errno
import json
import math
import os
import platform
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

from config import help_if_asked

if __name__ == "__main__":
    help_if_asked(sys.argv[1:])  # in front of the imports that take seconds
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for, so that DeepSpeed does not warn about it
import deepspeed
from deepspeed import comm
from deepspeed.utils.logging import set_log_level_from_string

import checkpoint
import export
import guard
import metrics
from config import (
    UserError,
    deepspeed_config,
    git_commit,
    gradient_accumulation,
    load_config,
    run_command,
    zero_stage,
)
from data.mixture import Mixture
from data.shards import cannot_write, make_folder, write_json
from engine import (
    build_engine,
    check_deepspeed,
    choose_kernels,
    count_real_parameters,
    resolve_precision,
    why_not_compiled,
)
from model import IGNORE
from pieces import optimizers


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
    comm.all_reduce(total)
    return (counts * len(batches) * world_size / total.clamp(min=1)).tolist()


@torch.no_grad()
def evaluate(model, stream, wanted_tokens, micro_batch_size, device, rank=0, world_size=1):
    """Mean cross-entropy in nats per token, over validation windows that are the same at every call and on
    any number of ranks. Every rank makes equally many forward passes, so none waits for ever: what a rank
    has too few of is filled with windows that do not count."""
    windows = stream.validation_windows(wanted_tokens // stream.block_size)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of targets
    model.eval()
    for first in range(0, len(windows), micro_batch_size * world_size):
        mine = windows[first + rank * micro_batch_size :][:micro_batch_size]
        filled = list(mine) + [windows[0]] * (micro_batch_size - len(mine))
        tokens, targets = to_device(stream.batch(filled), device)
        targets[len(mine) :] = IGNORE
        count = (targets != IGNORE).sum()
        totals[0] += model(tokens, targets).double() * count
        totals[1] += count
    model.train()
    if world_size > 1:
        comm.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def find_place(verbose):
    """(device, rank, number of ranks) of this process, from what the launcher put into the environment; a
    process started as `python train.py` is a group of one. Starts no communication yet."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # 0: whichever is free
    set_log_level_from_string("info" if verbose else "error")
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed calls old names
    if "OMP_NUM_THREADS" not in os.environ:  # else every rank takes all cores, on a GPU machine for CPU Adam
        share = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", 1)))
        os.environ["OMP_NUM_THREADS"] = str(share)  # for what is compiled with an OpenMP of its own
        torch.set_num_threads(share)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # DeepSpeed's shared-memory all-reduce is compiled for a minute at first use and needs a C++ compiler.
        # ZeRO-3 gathers and scatters, which it does not speed up: plain gloo is as fast here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return device, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def versions():
    """What made this run, for its config.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "git": git_commit(),
        "device": device,
    }


def main(config, watch=None):
    """Train as `config` says, from the beginning or from the run's newest checkpoint. Returns the last
    validation loss. Raises UserError for what the user can mend, before anything is started or written.
    watch: notices requests to stop."""
    train = config.train
    watch = watch or guard.Watch(train.out_dir, train.timeout_seconds)
    device, rank, world_size = find_place(train.verbose)

    def say(line):
        if rank == 0:
            with contextlib.suppress(OSError):  # a lost terminal must not cost the run
                print(line, flush=True)

    # ---- data: batch(windows) gives inputs and targets, both (micro_batch_size, block_size)
    train_data, val_data = (
        Mixture(config.data.path, split, config.model.block_size, config.model.vocab_size, train.seed)
        for split in ("train", "val")
    )

    # ---- batch arithmetic: tokens a step = micro_batch_size x block_size x ranks x accumulation
    accumulation = gradient_accumulation(config, world_size)
    precision = resolve_precision(train.precision, device)
    if precision == "fp32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as plan.py counts on
    ds_config = deepspeed_config(config, world_size, precision, on_gpu=device.type == "cuda")
    check_deepspeed(ds_config)
    kernels, why_kernels = choose_kernels(train.kernels, device)

    # ---- model and optimizer, new or from a checkpoint
    run, stage = Path(train.out_dir), zero_stage(ds_config)
    resume_from, state = checkpoint.where_to_start(config, train_data)
    weights, load_weights = None, None
    if train.init_from and not resume_from:
        weights, load_weights = export.open_weights(train.init_from, config.model)
    make_folder("train.out_dir", run)
    patience = timedelta(seconds=max(1800, 2 * train.timeout_seconds))  # `watch` knows first, and which rank hangs
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(backend, timeout=patience, verbose=train.verbose)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        remedy = "if another run uses that port, choose one with deepspeed --master_port"
        raise UserError(f"ranks could not meet at {address} ({str(error).splitlines()[0]}); {remedy}") from None
    everyone = [None] * world_size
    torch.distributed.all_gather_object(everyone, str(resume_from))
    if len(set(everyone)) > 1:
        found = ", ".join(sorted(set(everyone)))
        raise UserError(f"train.out_dir: {run}: ranks found different checkpoints ({found}); put it where all see it")
    known_faults = {}
    while resume_from and (fault := checkpoint.fault_of(resume_from, state)):
        known_faults[resume_from] = fault
        resume_from, state = checkpoint.where_to_start(config, train_data, known_faults)
    first_step, best_val_loss = state["step"], state["best_val_loss"]
    # other than zero only where train.global_batch_tokens was changed on the way
    tokens_before = state["tokens"] - first_step * train.global_batch_tokens
    total_steps = (train.max_tokens - tokens_before) // train.global_batch_tokens
    if first_step >= total_steps:
        say(f"{run} is complete: {first_step} of {total_steps} steps; raise train.max_tokens to train it longer")
        return best_val_loss
    not_compiled = why_not_compiled(train.compile, config.model, device, kernels, precision)
    engine = build_engine(config, ds_config, device, kernels, not not_compiled, load_weights)
    plain = stage == 0 and precision == "fp32"  # the one case in which DeepSpeed keeps no gradient norm
    torch.manual_seed(train.seed + 1 + rank)  # each rank drops other activations
    if resume_from:
        checkpoint.load(engine, resume_from, state, train.seed)
        was = checkpoint.setting(state["world_size"], state["stage"], state["precision"])
        now = checkpoint.setting(world_size, stage, precision)
        say(
            f"continuing from {resume_from}: step {first_step}, {state['tokens']:,} tokens"
            + (f"; saved on {was}, now {now}" if was != now else "")
        )
    elif weights:
        say(f"weights from {weights}")
    steps = guard.BadSteps(engine, train.spike_zscore, state.get("bad_steps"))
    watch.meet()

    # ---- what is logged, and what a checkpoint records
    made_with = versions()
    record = {"config": config.to_dict(), "versions": made_with, "data": train_data.fingerprint()}
    record |= {"world_size": world_size, "stage": stage, "precision": precision}
    record |= {"kernels": kernels, "compiled": not not_compiled}
    parameters = count_real_parameters(engine.module)
    if rank == 0:
        write_json(run / "config.json", config.to_dict() | {key: record[key] for key in record if key != "config"})
        log = metrics.MetricsLog(run, first_step, train.loggers, config.to_dict())
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
        say(f"saved {path} in {seconds:.2f} s, {stalled:.2f} s of them standing still")
        if rank == 0:
            line = {"step": save.state["step"], "tokens": save.state["tokens"]}
            log.write(line | {"save_seconds": seconds, "stall_seconds": stalled})

    # ---- the loop: `step` is the number of optimizer steps done, which is all a run needs to go on
    val_loss, saved_at, save = None, time.monotonic(), None
    clock, profiler = metrics.Stopwatch(device), metrics.Profiler(run, train.profile_steps if rank == 0 else None)
    for step in range(first_step + 1, total_steps + 1):
        clock.start_step()
        profiler.start_step(step)
        tokens_seen = tokens_before + step * train.global_batch_tokens
        lr = learning_rate(train, tokens_seen)
        for optimizer in optimizers(engine):
            for group in optimizer.param_groups:
                group["lr"] = lr

        # forward and backward: DeepSpeed averages the gradient over micro-batches and ranks, and steps
        # behind the last micro-batch
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
                comm.all_reduce(everyone)  # here the host waits for the GPU, once a step
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
            say(f"step {step}: {fault}; samples {samples[0]} to {samples[1]} {steps.answer(step, train)}")

        if step % train.log_every == 0 or step == 1 or step == total_steps:
            line = {"step": step, "tokens": tokens_seen, "loss": loss, "lr": lr}
            line |= {"grad_norm": steps.grad_norm, "skipped": steps.skipped} | clock.read()
            line |= metrics.throughput(config, line["step_seconds"], world_size, made_with["device"], parameters)
            line |= metrics.peak_memory()
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
            val_loss = evaluate(engine, val_data, train.eval_tokens, train.micro_batch_size, device, rank, world_size)
            eval_seconds = time.perf_counter() - began
            # a NaN is never the best, and nothing is ever measured against one
            best_now = val_loss < (math.inf if best_val_loss is None else best_val_loss)
            best_val_loss = val_loss if best_now else best_val_loss
            say(f"step {step}: validation loss {val_loss:.4f}{', the best so far' if best_now else ''}")
            if rank == 0:
                line = {"step": step, "tokens": tokens_seen, "val_loss": val_loss}
                log.write(line | {"eval_seconds": eval_seconds})
                try:
                    import plot  # matplotlib takes a second to import, and only rank 0 draws

                    plot.plot_loss([run], run / "loss.png")
                except Exception as error:  # a picture must not cost the run
                    say(f"{run / 'loss.png'} was not drawn: {type(error).__name__}: {error}")
        save_now |= best_now and train.save_best
        if save and (save_now or have_written == world_size):
            finish(save)
            save = None
        if save_now:
            watch.beat()
            state = record | {"step": step, "tokens": tokens_seen, "best_val_loss": best_val_loss}
            state["bad_steps"] = steps.state()
            place, keep, saved_at = run / "checkpoints", train.keep_checkpoints, time.monotonic()
            save = checkpoint.Saving(engine, place, state, best_now, keep, train.save_in_background)
            if last or stopping or not train.save_in_background:
                finish(save)
                save = None
        if stopping and not last:
            say(f"stopped by {watch.reason or 'a signal to another rank'} behind step {step}; the same command goes on")
            break

    if ds_config.get("comms_logger", {}).get("enabled"):
        comm.log_summary()  # rank 0 prints; the others are asked
    if rank == 0:
        log.close()
    return val_loss


def command(arguments):
    """main from the command line."""
    config = load_config(arguments)
    watch = guard.Watch(config.train.out_dir, config.train.timeout_seconds).start()
    try:
        main(config, watch)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        raise cannot_write(error.filename or config.train.out_dir, error) from None
    except RuntimeError as error:  # torch's DistBackendError, which NCCL raises, is one as well
        if not any(word in str(error) for word in ("gloo", "Connection closed", "NCCL", "onnection reset")):
            raise
        reason = " ".join(str(error).split())[:400]
        guard.end(f"lost contact with another rank ({reason})", 1, config.train.out_dir)
    finally:
        watch.finish()
    if comm.is_initialized():
        comm.barrier()  # gloo aborts at exit if a peer still talks
        comm.destroy_process_group()


if __name__ == "__main__":
    run_command(command)
