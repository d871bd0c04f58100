"""Which runs a sweep has: sizes at each budget, their tokens, rates and batches, and the commands that train them.

With the schedules wsd and constant the runs of one size share a trunk, at the peak rate, and each budget is a branch of
it in which the rate decays. A trunk is trained in segments, each to the start of the next decay, where its checkpoint
stays until the branch is done. With cosine and linear each run starts at step 0.

    out/<sweep>/sweep.json           the config and the options that all runs share
    out/<sweep>/points.json          what each run came to
    out/<sweep>/4x96/model.json      the config of the runs of one size
    out/<sweep>/4x96/trunk, 1e+12    runs: the trunk, and one for each budget; beside them their output, as trunk.log
"""

import copy
import dataclasses
import shlex
from pathlib import Path
from typing import NamedTuple

from minzero.checkpoint_names import name_of as name_of_checkpoint
from minzero.config.build import build
from minzero.config.nested import merge
from minzero.config.sections import EVAL_TASKS
from minzero.config.values import as_flag, in_short
from minzero.errors import UserError
from minzero.scaling.shapes import LEAST_RUNS, Family, Grid, count, name_of
from minzero.sizes import flops_per_token

SCHEDULES = ("wsd", "constant", "cosine", "linear")
LEAST_STEPS = 10  # of a run: with fewer its FLOPs are too coarse, and its loss says little
MOST_WARMUP = 0.2  # of the shortest run of a size
SAVE_SECONDS = 600  # between two checkpoints of a run, if the config names no other time
OF_A_SCHEDULE = ("schedule", "decay_tokens", "decay_shape")
NOT_OF_RUNS = ("eval_every", "save_every", "save_best", "keep_every", "keep_checkpoints", "sample_every", *EVAL_TASKS)
# keys of the train section that a sweep sets, so that its command line takes none: what sets them
SET_BY_SWEEP = {
    "schedule": "--schedule sets",
    "warmup_tokens": "--warmup sets",
    "max_tokens": "--flops sets",
    "decay_tokens": "--decay sets",
    "out_dir": "--out sets",
} | dict.fromkeys(NOT_OF_RUNS, "a sweep sets: its runs have no evaluations and checkpoints on the way")
# Keys of a config that a sweep cannot obey: (section, name, the only value that it takes)
ONLY = (
    ("train", "init_from", None),
    ("train", "loss", "next_token"),
    ("train", "copy_to", None),
    ("train", "profile", None),
    ("train", "resume", "auto"),
    ("lora", "rank", None),
)


@dataclasses.dataclass
class Options:
    """What all runs of a sweep share, besides the config."""

    spacing: float = 2.0  # of the sizes, as a factor of N
    tokens_per_parameter: float = 20.0  # where the middle of the sizes of a budget is
    count: str = "all"  # of shapes.COUNTS
    lr_exponent: float | None = None  # the rate is that of the config times (its width / width)^lr_exponent
    batch_exponent: float = 0.0  # the batch is that of the config times (N / its N)^batch_exponent
    warmup: float = 1.0  # tokens for each parameter, but at most MOST_WARMUP; Porian et al. 2024 (arXiv 2406.19146)
    decay: float = 0.2  # of each run, with wsd
    schedule: str = "wsd"
    ranks: int = 1


class Budget(NamedTuple):
    """A run of one size at one budget, in whole steps."""

    flops: float  # the budget
    tokens: int
    decay_tokens: int  # at its end; 0 without a trunk

    @property
    def name(self):
        return f"{self.flops:g}"

    @property
    def stable_tokens(self):
        """Tokens of the trunk."""
        return self.tokens - self.decay_tokens


class Size(NamedTuple):
    """A model of a sweep."""

    model: object  # ModelConfig
    flops_per_token: float
    lr: float
    global_batch_tokens: int
    warmup_tokens: int
    budgets: list  # of Budget, from the smallest

    @property
    def name(self):
        return name_of(self.model)


class Job(NamedTuple):
    """A start of train.py that belongs to a sweep."""

    size: Size
    run: str  # the name of its folder
    tokens: int  # where it ends
    begins: int  # tokens that it begins with, of the trunk
    flags: list  # of train.py, after the config file
    budget: Budget | None  # of a run that becomes a point; None for a segment of the trunk


class Sweep:
    """The plan of a sweep. folder: Path. content: the sections of the config, as nested dictionaries. flops: the
    budgets. sizes: how many at each budget. Raises UserError for what cannot be planned."""

    def __init__(self, folder, content, options, flops, sizes):
        self.folder = Path(folder)
        self.content = content
        self.options = options
        self.flops = sorted(set(flops))
        names = [f"{budget:g}" for budget in self.flops]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"--flops: found two budgets that are {twice[0]} in six digits; expected one of them")
        if len(names) * sizes < LEAST_RUNS:
            raise UserError(
                f"--flops: found {len(names)} budget, with {sizes} sizes, expected at least {LEAST_RUNS} runs in all: "
                "fewer cannot be fitted; add budgets, or raise --sizes"
            )
        self.config = build(content, "the sweep's config")
        self.refuse_what_no_run_obeys()
        if options.lr_exponent is None:
            # with muP the rate of a small model is that of a large one
            options.lr_exponent = 0.0 if getattr(self.config.train, "mup_base_width", None) else 1.0
        self.family = Family(self.config.model, options.count)
        self.grid = Grid(self.family, options.spacing)
        self.shares_trunk = options.schedule in ("wsd", "constant")
        powers = {}
        for budget in self.flops:
            for power in self.grid.around(budget, sizes, options.tokens_per_parameter):
                powers.setdefault(power, []).append(budget)
        self.sizes = [self.size_of(self.grid.at(power), powers[power]) for power in sorted(powers)]
        for size in self.sizes:
            try:
                build(self.content_of_runs(size), "its config")
            except UserError as error:  # as of a rate that is too high for train.py
                raise UserError(
                    f"--flops: the runs of {size.name}, of train.lr {size.lr:g} by --lr_exponent: {error}"
                ) from None

    def refuse_what_no_run_obeys(self):
        for section, name, only in ONLY:
            value = getattr(getattr(self.config, section), name)
            if value != only:
                raise UserError(
                    f"{section}.{name}: found {as_flag(value)}, expected {in_short(only)}: the runs of a sweep start "
                    "from random weights, each in a folder of its own"
                )
        if first := self.config.train.first_batch_tokens:
            raise UserError(
                f"train.first_batch_tokens: found {first}, expected null: the steps of a size all have the same batch"
            )

    # -- one size ------------------------------------------------------------------------------------

    def batch_of(self, model):
        """Tokens of a step: a multiple of what the ranks take at once."""
        train = self.config.train
        batch = train.global_batch_tokens
        if self.options.batch_exponent:
            batch *= (count(model, self.options.count) / self.grid.own) ** self.options.batch_exponent
            whole = train.micro_batch_size * self.config.model.block_size * self.options.ranks
            batch = max(1, round(batch / whole)) * whole
        return batch

    def size_of(self, model, budgets, flag="--flops"):
        """The Size of a model at some budgets. flag: names them in errors. Raises UserError for a run that is too
        short."""
        options = self.options
        per_token = flops_per_token(model)
        batch = self.batch_of(model)
        lr = self.config.train.lr * (self.config.model.n_embd / model.n_embd) ** options.lr_exponent
        found = []
        for flops in sorted(budgets):
            steps = round(flops / per_token / batch)
            if steps < LEAST_STEPS:
                raise UserError(
                    f"{flag}: {flops:g}: {name_of(model)} would have {steps} steps, expected at least {LEAST_STEPS}; "
                    "raise it, or lower --train.global_batch_tokens or --sizes"
                )
            decay = max(1, round(options.decay * steps)) if options.schedule == "wsd" else 0
            found.append(Budget(flops, steps * batch, decay * batch))
        # the same in all runs of a size, which share it
        warmup = round(min(options.warmup * count(model, "all"), MOST_WARMUP * found[0].tokens))
        if found[0].stable_tokens < warmup:
            raise UserError(f"--decay: found {options.decay}, expected at most {1 - MOST_WARMUP:g}, after the warm-up")
        return Size(model, per_token, float(f"{lr:.4g}"), batch, warmup, found)

    def content_of(self, size):
        """The config of the runs of one size."""
        shape = {name: getattr(size.model, name) for name in ("n_layer", "n_head", "n_embd")}
        shape |= {name: getattr(size.model, name) for name in ("n_kv_head", "mlp_hidden") if getattr(size.model, name)}
        train = {
            "lr": size.lr,
            "global_batch_tokens": size.global_batch_tokens,
            "warmup_tokens": size.warmup_tokens,
            "max_tokens": size.budgets[-1].tokens,
        }
        given = self.content.get("train", {})
        given = {name: value for name, value in given.items() if name not in OF_A_SCHEDULE}
        content = self.content | {"train": given}
        return merge(content, {"model": shape, "train": train | self.schedule_keys(size.budgets[-1])})

    def schedule_keys(self, budget):
        """The keys of the train section that give a run its schedule."""
        if self.options.schedule != "wsd":
            return {"schedule": self.options.schedule}
        given = self.content.get("train", {})
        shape = {name: given[name] for name in ("decay_shape",) if name in given}
        return {"schedule": "wsd", "decay_tokens": budget.decay_tokens} | shape

    def content_of_runs(self, size):
        """As `content_of`, without what only a single run has: evaluations and checkpoints on the way."""
        content = self.content_of(size)
        seconds = self.config.train.save_every_seconds or SAVE_SECONDS
        train = {"eval_every": 0, "save_every": 0, "save_every_seconds": seconds, "save_best": False}
        content = merge(content, {"train": train})
        for name in ("out_dir", "max_tokens", "keep_every", "sample_every", *OF_A_SCHEDULE, *EVAL_TASKS):
            content["train"].pop(name, None)
        return content

    # -- its runs ------------------------------------------------------------------------------------

    def folder_of(self, size, run):
        return self.folder / size.name / run

    def config_file(self, size):
        return self.folder / size.name / "model.json"

    def jobs_of(self, size):
        """The Jobs of one size in the order in which they must run."""
        jobs = []
        begins = 0
        for budget in size.budgets:
            if not self.shares_trunk:
                jobs.append(self.job(size, budget.name, budget.tokens, 0, {"schedule": self.options.schedule}, budget))
                continue
            stable = budget.stable_tokens
            keys = {"schedule": "constant", "keep_checkpoints": len(size.budgets) + 1}
            jobs.append(self.job(size, "trunk", stable, begins, keys, None if budget.decay_tokens else budget))
            begins = stable
            if budget.decay_tokens:
                at = (
                    self.folder_of(size, "trunk")
                    / "checkpoints"
                    / name_of_checkpoint(stable // size.global_batch_tokens)
                )
                keys = self.schedule_keys(budget) | {"keep_checkpoints": 1, "resume": str(at)}
                jobs.append(self.job(size, budget.name, budget.tokens, stable, keys, budget))
        return jobs

    def job(self, size, run, tokens, begins, keys, budget):
        keys = {"out_dir": str(self.folder_of(size, run)), "max_tokens": tokens} | keys
        flags = [word for name, value in keys.items() for word in (f"--train.{name}", as_flag(value))]
        return Job(size, run, tokens, begins, flags, budget)

    def probe(self, size, steps):
        """The Job of a few steps of a size, to measure them."""
        keys = {"schedule": "constant", "log_every": 1, "warmup_tokens": 0}
        return self.job(size, "probe", steps * size.global_batch_tokens, 0, keys, None)

    def words_of(self, job):
        """The words of a job's command after `python` or the launcher."""
        return ["train.py", str(self.config_file(job.size)), *job.flags]

    def command_lines(self):
        """The job list: one line a size, whose commands must run in their order."""
        launcher = "python" if self.options.ranks == 1 else f"deepspeed --num_gpus {self.options.ranks}"
        lines = []
        for size in self.sizes:
            commands = [f"{launcher} {shlex.join(self.words_of(job))}" for job in self.jobs_of(size)]
            lines.append(" && ".join(commands))
        return lines

    def record(self):
        """What sweep.json holds."""
        return {"config": copy.deepcopy(self.content), "options": dataclasses.asdict(self.options)}
