"""A training run: everything that a rank must remember of it from one step to the next."""

import gc
import json
import math
import socket
import time
from typing import NamedTuple

from minzero import checkpoint, checkpoint_folder, copier, dist, goodput, loggers, metrics, out_dir, profiler, restore
from minzero.adapters import count_adapters
from minzero.compiled import failure_in_words
from minzero.errors import SharedError, UserError
from minzero.files import write_json
from minzero.run_folder import read_status
from minzero.schedule import Steps
from minzero.sizes import count_parameters, moment_bytes

STEPS_PER_COLLECTION = 50  # of Python's unreachable cycles


class StepResult(NamedTuple):
    """What one optimizer step has produced. All ranks have the same."""

    facts: dist.StepFacts  # the loss, and what is asked of the run
    grad_norm: float  # before clipping
    fault: str | None  # why the step was not taken


class Run:
    """One training run, on one rank: its folder, its log, its best loss, the checkpoint that is being saved.

    Steps are optimizer steps, counted from 1. The number of steps done is all that a run needs to continue.
    folder: the run's RunFolder. setup: train.py's Setup. state: of the checkpoint that the run starts from. time_use:
    a goodput.TimeUse that has run since the start. Every rank has a Run and calls its methods in the same order; rank 0
    alone writes and prints."""

    def __init__(self, config, group, folder, watchdog, setup, state, time_use=None):
        train = config.train
        self.config = config
        self.group = group
        self.folder = folder
        self.watchdog = watchdog
        self.setup = setup

        # ---- how far it is
        self.steps_done = state["step"]  # before this start
        planned = Steps(train, self.steps_done, state["tokens"])
        self.total_steps = planned.total
        self.tokens_at = planned.tokens_at  # tokens that the run has seen after a step
        self.tokens_of = planned.tokens_of  # tokens of a step

        # ---- evaluations
        self.val_loss = None  # the last, of this start
        self.evaluated_at = None  # its step
        self.best_val_loss = state["best_val_loss"]
        self.best_at = None  # its step, if it is of this start

        # ---- checkpoints
        self.saving = None  # a checkpoint.Saving that is not committed yet
        self.saved_at = None  # when the last one was begun
        self.copier = None  # on rank 0, with train.copy_to

        # ---- measurements
        self.log = None  # the MetricsLog, on rank 0
        self.logged_at = self.steps_done  # the step of its last line with a loss
        self.clock = metrics.Stopwatch(group.device)
        self.time_use = time_use or goodput.TimeUse()
        self.own_time = goodput.OwnTime(group.device)
        self.slowest = None  # the rank that was clearly slower than the others at the last line of the log
        self.profiler = profiler.Profiler(folder.path, train.profile_steps if group.rank == 0 else None)

    # -- the beginning -------------------------------------------------------------------------------

    def take_folder(self, resumes):
        """Make the run's folder and lock it for this run. resumes: whether it continues from a checkpoint. Raises
        UserError if another run holds it, or has saved into it since this one looked for checkpoints."""
        is_rank_0 = self.group.rank == 0
        with dist.all_or_none():
            if is_rank_0:
                dist.print0(self.missing_space())
                dist.print0(self.folder.hold())
        self.check_folder_is_shared()
        with dist.all_or_none():  # the other ranks share the lock of rank 0
            if not is_rank_0:
                self.folder.hold()
        with dist.all_or_none():
            if self.group.rank == 0 and not resumes and checkpoint_folder.find(self.folder.path):
                path = self.folder.path
                raise UserError(f"train.out_dir: another run has just saved into {path}; start again to continue it")
            if self.group.rank == 0:
                checkpoint_folder.tidy(self.folder.path / "checkpoints")

    def missing_space(self):
        """A warning where the disk has room for fewer checkpoints than the run keeps, or None. Raises UserError where
        it has room for none."""
        train = self.config.train
        try:
            parameters, _ = count_parameters(self.config.model)
            parameters = count_adapters(self.config.model, self.config.lora) or parameters
            size = int(parameters * (4 + moment_bytes(self.config.model, train.optimizer)))  # a weight and its moments
        except UserError:  # an option that no formula knows
            return None
        saved = len(checkpoint_folder.Saved(self.folder.path / "checkpoints").entries)
        keeps = train.keep_checkpoints + train.save_best + 1
        keeps += self.total_steps // train.keep_every if train.keep_every else 0
        return out_dir.check_space(self.folder.path, size, keeps, saved)

    def check_folder_is_shared(self):
        """Raise SharedError if another machine sees another folder in the place of the one that rank 0 has just taken.
        Every rank must call this."""
        text, host = dist.from_rank_0((json.dumps(self.folder.holder), socket.gethostname()))
        with dist.all_or_none():
            if self.group.rank and dist.local_place[0] == 0:
                out_dir.check_is_shared(self.folder.path, text, host)

    def begin(self, engine, bad_steps, run_info, parameters):
        """Write config.json and open the log. run_info: what config.json and each checkpoint record. parameters: how
        many the model has."""
        self.engine = engine
        self.bad_steps = bad_steps
        self.run_info = run_info
        self.parameters = parameters
        with dist.all_or_none():
            if self.group.rank == 0:
                self.write_config()
                names = self.config.train.loggers
                self.log = loggers.MetricsLog(self.folder.path, self.steps_done, names, self.config.to_dict())
                self.begin_copies()
                self.time_use.continue_from(read_status(self.folder.path), self.log.file.kept, self.steps_done)
                self.folder.more = self.time_use.for_status
            self.folder.report("running", self.steps_done)

    def begin_copies(self):
        """On rank 0: start the process that copies checkpoints to train.copy_to."""
        if self.config.train.copy_to:
            dist.print0(restore.begin_copies(self.folder.path, self.config.train.copy_to))
            names = [path.name for path in checkpoint_folder.complete_checkpoints(self.folder.path / "checkpoints")]
            self.copier = copier.Copier(self.folder.path, self.config.train.copy_to, names, self.folder.damaged_copies)

    def finish_copies(self):
        """On rank 0: wait for the copies that are not whole yet, then delete what was kept for them."""
        if not self.copier:
            return
        train = self.config.train
        for line in self.copier.finish(train.timeout_seconds, self.watchdog.heartbeat):
            dist.print0(line)
        folder = self.folder.path / "checkpoints"
        checkpoint_folder.prune(folder, train.keep_checkpoints, self.copier.is_copied, train.keep_every)

    def write_config(self):
        """Write config.json: the sections of the run's config, and beside them on what it runs. What a checkpoint has
        as `data`, the identity of the data that were found, is `data_found` there: `data` is the section."""
        info = self.run_info | {"data_found": self.run_info["data"]}
        info = {name: value for name, value in info.items() if name not in ("config", "data")}
        write_json(self.folder.path / "config.json", self.config.to_dict() | info)

    # -- the steps -----------------------------------------------------------------------------------

    def steps(self):
        """Yields the number of each step that is still to be done, and starts to measure it."""
        self.saved_at = time.monotonic()
        self.time_use.mark("start")
        self.watchdog.begin_loop()
        gc.collect()
        gc.disable()  # a collection in the middle of a step of one rank makes the others wait
        try:
            for step in range(self.steps_done + 1, self.total_steps + 1):
                self.clock.start_step()
                self.own_time.start_step()
                self.profiler.start_step(step)
                yield step
                if step % STEPS_PER_COLLECTION == 0:
                    gc.collect(1)  # of all ranks at once
        finally:
            gc.enable()

    def is_last(self, step):
        return step == self.total_steps

    def samples_of(self, step):
        """First and last sample of a step, counted through the whole run."""
        block_size = self.config.model.block_size
        return self.tokens_at(step - 1) // block_size, self.tokens_at(step) // block_size - 1

    def accumulation_of(self, step):
        """Micro-batches of each rank in a step."""
        train = self.config.train
        return self.tokens_of(step) // (self.config.model.block_size * train.micro_batch_size * self.group.world_size)

    def stop_requested(self):
        """Whether this rank was asked to stop."""
        return self.watchdog.reason is not None

    def save_is_due(self):
        """Whether rank 0's clock says that it is time for a checkpoint."""
        if self.group.rank or not self.config.train.save_every_seconds:
            return False
        return time.monotonic() - self.saved_at > self.config.train.save_every_seconds

    def checkpoint_is_written(self):
        """Whether this rank has written its part of a checkpoint that is being saved in the background."""
        return self.saving is not None and self.saving.written is not None

    def handle_bad_step(self, step, result):
        """Log a step that was not taken, and do what train.bad_step says. Raises SharedError if that ends the run."""
        self.take_from_model()  # numbers that are not finite would be in the next line
        samples = self.samples_of(step)
        self.write(step, {"bad_step": result.fault, "samples": samples})
        done = self.bad_steps.handle(step, self.config.train, self.watchdog.heartbeat)
        if self.bad_steps.went_back:
            self.time_use.roll_back()
        dist.print0(f"step {step}: {result.fault}; samples {samples[0]} to {samples[1]} {done}")

    def take_from_model(self):
        """What the forward passes since the last call have noted: the routing of experts, the rewards of pairs, each
        None where there are none."""
        model = self.engine.module
        return model.take_routing(), model.preference and model.preference.take()

    def should_log(self, step):
        return step % self.config.train.log_every == 0 or step == 1 or self.is_last(step)

    def count_step(self, step, result):
        """The time since the last mark went into this step."""
        first = step == self.steps_done + 1
        kind = "compile" if first and self.run_info["compiled"] else "productive"
        self.time_use.mark("lost" if result.fault else kind)

    def log_step(self, step, rate, result):
        """Write and print a line of metrics: averages over the steps since the last one. Every rank must call this."""
        seconds = self.clock.read()
        self.count_step(step, result)
        measured = dist.gather_numbers(*self.own_time.read(seconds["data_seconds"]))
        device = self.setup.versions["device"]
        line = {"loss": result.facts.loss, "lr": rate}
        line |= {"grad_norm": result.grad_norm, "skipped": self.bad_steps.skipped}
        line |= seconds
        tokens = self.tokens_at(step) - self.tokens_at(self.logged_at)
        speed = tokens / (step - self.logged_at) / seconds["step_seconds"]
        whole = self.group.world_size, device, self.parameters, self.run_info["attended_tokens"]
        line |= metrics.throughput(self.config, speed, *whole)
        self.logged_at = step
        line |= metrics.peak_memory()
        routing, rewards = self.take_from_model()
        line |= metrics.expert_loads(routing, self.config.model.balance_over == "layer")
        line |= metrics.rewards(rewards)
        line |= self.time_use.for_step()
        if self.group.rank == 0:
            by_rank = [(*own, host) for own, host in zip(measured.tolist(), self.watchdog.hosts, strict=True)]
            slowest, in_words = goodput.slowest(by_rank, seconds["step_seconds"])
            if slowest is not None and slowest == self.slowest:  # twice: another program may have disturbed it once
                line["slowest"] = in_words
            self.slowest = slowest
        self.folder.report("running", step)
        self.write(step, line)
        rest = self.tokens_at(self.total_steps) - self.tokens_at(step)
        dist.print0(metrics.console_line(line | {"step": step}, self.total_steps, rest))

    def end_step(self, step, result):
        """Call before anything that is no part of a step, such as an evaluation: its time does not count."""
        does_more = self.should_evaluate(step) or self.should_save(step, result) or self.should_sample(step, result)
        does_more = does_more or self.should_score_tasks(step, result)
        if does_more or result.facts.ranks_that_wrote or step == self.profiler.last:
            self.clock.pause()
        self.watchdog.end_start()
        self.own_time.end_step()
        self.count_step(step, result)
        dist.print0(self.profiler.end_step(step, ending=self.is_last(step) or result.facts.stop_requested))

    def report_uncompiled(self, step):
        """After the first step of a compiled run: print and record where parts of the model could not be compiled on
        some rank. Every rank must call this."""
        if step > self.steps_done + 1 or not self.run_info["compiled"]:
            return
        found = dist.first(failure_in_words())
        if found is None:
            return
        dist.print0("warning: not compiled on rank {}: {}".format(*found))
        self.run_info["compiled"] = False
        if self.group.rank == 0:
            self.write_config()

    def write(self, step, numbers):
        """Add a line to the log."""
        if self.log:
            self.log.write({"step": step, "tokens": self.tokens_at(step)} | numbers)

    # -- evaluations ---------------------------------------------------------------------------------

    def should_evaluate(self, step):
        every = self.config.train.eval_every
        return self.is_last(step) or (every > 0 and step % every == 0)

    def record_validation(self, step, loss, seconds, of_pairs=None):
        """Log and print a validation loss, which took some seconds, and remember it if it is the best so far. of_pairs:
        what `validation_of_pairs` has found."""
        self.val_loss = loss
        self.evaluated_at = step
        if loss < (math.inf if self.best_val_loss is None else self.best_val_loss):  # never a NaN
            self.best_val_loss = loss
            self.best_at = step
        line = {"val_loss": loss, "eval_seconds": seconds}
        more = ""
        if of_pairs:
            line |= {f"val_{name}": of_pairs[name] for name in ("accuracy", "margin")}
            more = f", accuracy {line['val_accuracy']:.1%}, margin {line['val_margin']:.3f}"
        best = ", the best so far" if self.best_at == step else ""
        dist.print0(f"step {step}: validation loss {loss:.4f}{more}{best}")
        self.folder.report("running", step)
        self.write(step, line)

    def draw_loss(self):
        """Draw loss.png in the run's folder, on rank 0. It ends an evaluation."""
        if self.group.rank == 0:
            picture = self.folder.path / "loss.png"
            try:
                from minzero import plot  # matplotlib takes a second to import, and only rank 0 draws

                plot.plot_loss([self.folder.path], picture)
            except Exception as error:  # a picture must not cost the run
                dist.print0(f"{picture} was not drawn: {type(error).__name__}: {error}")
            self.watchdog.heartbeat()
        self.time_use.mark("evaluation")

    def should_score_tasks(self, step, result):
        if not self.config.train.eval_tasks:
            return False
        every = self.config.train.eval_tasks_every
        is_due = every > 0 and step % every == 0 and not result.facts.stop_requested
        return is_due or self.is_last(step)

    def record_tasks(self, step, scores, seconds):
        """Log and print the scores of tasks, {task: {metric: number}}, which took some seconds."""
        line = {"eval_tasks_seconds": seconds}
        parts = []
        for task, found in scores.items():
            line |= {metrics.task_key(task, metric): value for metric, value in found.items()}
            parts.append(f"{task} " + ", ".join(f"{metric} {value:.4f}" for metric, value in found.items()))
        dist.print0(f"step {step}: {'; '.join(parts)}" if parts else None)
        self.write(step, line)

    def should_sample(self, step, result):
        every = self.config.train.sample_every
        return every > 0 and (step % every == 0 or self.is_last(step)) and not result.facts.stop_requested

    def record_sample(self, step, text):
        """Log and print a text that the model wrote."""
        dist.print0(f"step {step}: the model writes: {json.dumps(text, ensure_ascii=False)}")
        self.write(step, {"sample": text})
        self.time_use.mark("evaluation")

    # -- checkpoints ---------------------------------------------------------------------------------

    def should_save(self, step, result):
        train = self.config.train
        if self.is_last(step) or result.facts.stop_requested or result.facts.save_due:
            return True
        is_best = self.best_at == step and train.save_best
        return is_best or any(every > 0 and step % every == 0 for every in (train.save_every, train.keep_every))

    def save(self, step, result):
        """Save a checkpoint. In the background, only a copy is made now, and `finish_saving` is called when all ranks
        have written it, or the next one is due. Raises SharedError on every rank if one cannot save."""
        with self.watchdog.during("save"):
            self.save_now(step, result)

    def save_now(self, step, result):
        self.finish_saving()
        with dist.all_or_none():
            self.folder.check_is_there()
        train = self.config.train
        state = self.run_info | {"step": step, "tokens": self.tokens_at(step), "best_val_loss": self.best_val_loss}
        state |= {"val_loss": self.val_loss if self.evaluated_at == step else None, "bad_steps": self.bad_steps.state()}
        self.saved_at = time.monotonic()
        self.time_use.begin_save()
        self.saving = checkpoint.Saving(
            self.engine,
            self.folder.path / "checkpoints",
            state,
            self.best_at == step,
            train.keep_checkpoints,
            train.save_in_background,
            self.watchdog.heartbeat,
            self.copier and self.copier.is_copied,
            train.keep_every,
        )
        if self.is_last(step) or result.facts.stop_requested or not train.save_in_background:
            self.finish_saving()
        self.time_use.mark("save")

    def finish_saving(self):
        """Commit the checkpoint that is being saved, if there is one."""
        if not self.saving:
            return
        with self.watchdog.during("save"):
            path, seconds, stalled = self.saving.finish()
        dist.print0(f"saved {path} in {seconds:.2f} s, {stalled:.2f} s of them standing still")
        line = {"save_seconds": seconds, "stall_seconds": stalled} | self.time_use.at_save
        self.write(self.saving.state["step"], line)
        self.saving = None
        if self.copier:
            self.copier.add(path.name)
        self.time_use.mark("save")

    # -- the end -------------------------------------------------------------------------------------

    def is_complete(self):
        return self.steps_done >= self.total_steps

    def report_complete(self, start):
        """For a run that was complete before this start. Raises SharedError if it must not be taken for a good one."""
        if start.state.get("suspect"):
            reason = "it ended after steps whose numbers were bad"
            remedy = "look at the data, or lower train.lr, in another train.out_dir"
            raise SharedError(f"{start.path}: {reason}; {remedy}")
        train = self.config.train
        if not checkpoint_folder.is_within(start.path, self.folder.path):  # a branch that would have no step
            raise SharedError(
                f"train.max_tokens: found {train.max_tokens}, but {start.path}, from which the run would start, has "
                f"{start.state['tokens']} tokens; raise it"
            )
        steps = f"{self.steps_done} of {self.total_steps} steps"
        dist.print0(f"{self.folder.path} is complete: {steps}; raise train.max_tokens to train it longer")
        with dist.all_or_none():
            if self.group.rank == 0:
                self.finish_what_is_left()

    def finish_what_is_left(self):
        """On rank 0, for a run that was complete before: copy what is not at train.copy_to, and say complete in
        status.json, where its last start ended before that."""
        status = read_status(self.folder.path)
        if status.get("state") == "complete" and not self.config.train.copy_to:
            return
        dist.print0(self.folder.hold())
        self.folder.more = lambda: {name: status[name] for name in ("goodput", "seconds") if name in status}
        self.begin_copies()
        self.finish_copies()
        self.folder.report("complete", self.total_steps)

    def stop(self, step):
        """The run was asked to stop, and has saved. Every rank must call this."""
        own = self.watchdog.reason
        rank, (reason, host) = dist.first((own, socket.gethostname()) if own else None)
        reason += f" on rank {rank}, {host}" if rank else ""
        self.folder.report("stopped", step, reason)
        dist.print0(f"stopped by {reason} after step {step}; the same command continues")

    def close(self, step):
        """After the last step of this start. Raises SharedError if the run is complete and its last steps were bad."""
        if self.setup.ds_config.get("comms_logger", {}).get("enabled"):
            dist.comm.log_summary()  # rank 0 prints; the others are asked
        if self.log:
            self.log.close()
        self.finish_copies()
        dist.print0(f"goodput {metrics.goodput_in_words(self.time_use.totals())}")
        if self.is_last(step):
            self.bad_steps.check_end(step, self.config.train)
