"""The sections of a config file: every key with its type, default, range and meaning.

A run is described by five sections: `model` (model_section.py), `data`, `train` and `lora` (the dataclasses below) and
`deepspeed` (DeepSpeed's own keys, see deepspeed_keys.py). To add a key, add a line here: reading, checks, overrides and
--help follow from it.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from minzero.config.model_section import ModelConfig
from minzero.config.values import as_flag, fault_of_text, in_short, key
from minzero.errors import UserError
from minzero.schedule import SHAPES_THE_BATCH, Steps, decay_tokens, possible_jumps


class Recomputation(NamedTuple):
    """What a value of train.activation_checkpointing means."""

    every: int = 0  # blocks 0, every, 2 every, ... are computed again in the backward pass; 0: none
    selective: bool = False  # of them all but attention and every other matrix product
    budget: float = 1.0  # the part of the activations that a compiled block keeps; the compiler chooses which

    @classmethod
    def of(cls, value):
        if value == "selective":
            return cls(every=1, selective=True)
        return cls(budget=value) if 0 < value < 1 else cls(every=int(value))

    def of_blocks(self, blocks):
        """Those of a list with one entry a block that are computed again."""
        return blocks[:: self.every] if self.every else blocks[:0]


@dataclass
class DataConfig:
    path: str | dict = key(
        "data/openwebtext", "folder of token shards, as a prepare script writes them; or several: {folder: weight}"
    )
    verify: bool = key(False, "read every shard before training and compare its checksum with meta.json's")
    document_mask: bool | str = key(
        "auto", "attention within a document only, conversations packed whole; auto: these", [True, False, "auto"]
    )

    @property
    def weights(self):
        """{folder: weight}, also of a single folder."""
        return data_weights(self.path)

    def check(self):
        weights = self.weights
        if not weights or "" in weights:
            raise UserError("data.path: found no folder, expected a folder or {folder: weight}")
        for folder, weight in weights.items():
            if fault := fault_of_text(folder):
                raise UserError(f"data.path: {fault}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-9 <= weight <= 1e9:
                raise UserError(
                    f"data.path: {folder}: found weight {in_short(weight)}, expected a number above 0 (1e-9 to 1e9)"
                )


def refuse_unused(section, values, names, why):
    """Raise UserError if one of these keys of a section is not its default. why: that they have no effect, and the
    remedy, in words that come after the value."""
    for name in names:
        value, default = getattr(values, name), getattr(type(values)(), name)
        if value != default:
            raise UserError(f"{section}.{name}: found {as_flag(value)}{why}, or this to {as_flag(default)}")


MOST_RAMP_STEPS = 10**6
EVAL_TASKS = ("eval_tasks", "eval_tasks_every", "eval_tasks_limit", "eval_tasks_path")  # of the train section
# of the train section too: what a run of some steps, which is only measured, has nothing of
OF_A_LONG_RUN = ("copy_to", "loggers", "keep_every", "sample_every", "save_every_seconds", *EVAL_TASKS)
OF_A_LONG_RUN += SHAPES_THE_BATCH[1:]


@dataclass
class TrainConfig:
    out_dir: str | None = key(None, "folder of the run; null: out/<name of the config file>")
    seed: int = key(1337, "random seed of the initial weights, the data order and dropout", minimum=0, maximum=2**62)
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 on GPUs that have it, else fp16; fp32 on CPU",
        ["auto", "bf16", "fp16", "fp32"],
    )
    micro_batch_size: int = key(8, "sequences of one forward and backward pass on one rank", minimum=1, maximum=2**30)
    global_batch_tokens: int = key(
        524288, "tokens of one optimizer step, summed over all ranks", minimum=1, maximum=10**10
    )
    first_batch_tokens: int | None = key(
        None, "tokens of the first step, if the batch grows; null: global_batch_tokens", minimum=1, maximum=10**10
    )
    batch_ramp_tokens: int = key(
        0, "tokens over which the batch grows from first_batch_tokens on", minimum=0, maximum=10**18
    )
    batch_ramp_jumps: int = key(
        0, "how often it grows, by the same factor each time; 0: linearly", minimum=0, maximum=1000
    )
    max_tokens: int = key(10_000_000_000, "length of the run in tokens", minimum=1, maximum=10**18)
    warmup_tokens: int = key(0, "tokens over which the learning rate rises from zero", minimum=0, maximum=10**18)
    optimizer: str = key(
        "adamw", "adamw; muon: Muon for the matrices of the blocks, AdamW for everything else", ["adamw", "muon"]
    )
    lr: float = key(6e-4, "peak learning rate of AdamW", minimum=0, maximum=10)
    muon_lr: float = key(0.02, "peak learning rate of Muon", minimum=0, maximum=10)
    muon_momentum: float = key(0.95, "decay rate of Muon's momentum", minimum=0, maximum=0.99999)
    mup_base_width: int | None = key(
        None,
        "the model.n_embd at which train.lr and model.init_std were chosen; at another width, those of each matrix "
        "follow from them (muP); null: one rate and one deviation for all",
        minimum=1,
        maximum=2**20,
    )
    min_lr_ratio: float = key(0.1, "last learning rate over the peak", minimum=0, maximum=1)
    schedule: str = key(
        "cosine",
        "how the learning rate falls after warm-up; wsd: it stays until the last decay_tokens, so that runs of several "
        "lengths can branch from one; range: it rises from lr x min_lr_ratio to lr, for sweep.py --lr_range",
        ["cosine", "linear", "constant", "wsd", "range"],
    )
    decay_tokens: int | None = key(
        None,
        "with schedule wsd, tokens of the fall at the end of the run; 0: none; null: a fifth of max_tokens",
        minimum=0,
        maximum=10**18,
    )
    decay_shape: str = key(
        "sqrt", "with schedule wsd, how it falls; sqrt is 1 - sqrt(progress)", ["sqrt", "linear", "cosine"]
    )
    weight_decay: float = key(0.1, "weight decay, times the learning rate, on matrices only", minimum=0, maximum=100)
    betas: list[float] = key([0.9, 0.95], "decay rates of AdamW's two moments")
    eps: float = key(1e-8, "epsilon of AdamW", minimum=1e-16, maximum=1)
    grad_clip: float = key(
        1.0, "scale the gradient down to this global norm where it is larger; 0: no clipping", minimum=0, maximum=1e9
    )
    activation_checkpointing: bool | int | float | str = key(
        False,
        "recompute in the backward pass; true: every block; k: every k-th; selective: all but attention and every "
        "other product; below 1: the part that compiled blocks keep",
        minimum=0,
        maximum=10**5,
    )
    activation_offload: bool = key(
        False, "with activation_checkpointing, keep the inputs of recomputed blocks in CPU memory until they are needed"
    )
    kernels: str = key(
        "auto",
        "implementation of norms and Adam; auto: NVIDIA Apex's where it is installed on a GPU, else torch's",
        ["auto", "apex", "torch"],
    )
    compile: bool | str = key("auto", "torch.compile the blocks and the loss; auto: on GPUs", [True, False, "auto"])
    log_every: int = key(10, "optimizer steps from one line of metrics to the next", minimum=1, maximum=10**15)
    eval_every: int = key(
        1000, "optimizer steps from one evaluation to the next; 0: only at the end", minimum=0, maximum=10**15
    )
    eval_tokens: int = key(
        1_048_576, "validation tokens of one evaluation, the same tokens each time", minimum=1, maximum=10**15
    )
    eval_tasks: list[str] = key(
        [],
        "benchmarks to score in training: names of lm-eval's tasks with given answers, or yaml files of such tasks; "
        'needs pip install "lm-eval[hf]"',
    )
    eval_tasks_every: int = key(
        0,
        "optimizer steps from one scoring of train.eval_tasks to the next; 0: only at the end",
        minimum=0,
        maximum=10**15,
    )
    eval_tasks_limit: int = key(0, "at most that many examples of each task; 0: all", minimum=0, maximum=10**9)
    eval_tasks_path: str | None = key(None, "folder of further task files for train.eval_tasks; null: none")
    sample_every: int = key(
        0,
        "optimizer steps from one text that the model writes to the next; in the console and metrics.jsonl; 0: none",
        minimum=0,
        maximum=10**15,
    )
    save_every: int = key(
        1000, "optimizer steps from one checkpoint to the next; 0: only at the end", minimum=0, maximum=10**15
    )
    save_every_seconds: float = key(
        0.0, "also save when the last checkpoint is this many seconds old; 0: never", minimum=0, maximum=1e9
    )
    save_in_background: bool = key(False, "copy a checkpoint to CPU memory, and write it while training continues")
    save_best: bool = key(True, "also save when the validation loss is the lowest so far")
    keep_checkpoints: int = key(
        2, "how many of the newest checkpoints are kept, besides the best", minimum=1, maximum=10**9
    )
    keep_every: int = key(
        0,
        "optimizer steps from one checkpoint that is kept to the next, to branch from, as long as this is set; 0: none",
        minimum=0,
        maximum=10**15,
    )
    copy_to: str | None = key(
        None,
        "copy each checkpoint there in the background, and continue from there where out_dir holds none or older ones; "
        "s3://bucket/run, gs://bucket/run, another folder, any address of fsspec's; null: no copies",
    )
    resume: str = key(
        "auto",
        "auto: continue from the newest checkpoint in out_dir, or start at step 0 if it holds none; never: start at "
        "step 0, and refuse an out_dir that holds checkpoints; the path of a checkpoint or a run: start from that, "
        "until out_dir holds a checkpoint of its own, which is then continued",
    )
    init_from: str | None = key(
        None,
        "start from these weights: a folder in transformers' format, a name on the Hugging Face hub, or a run or "
        "checkpoint of minZeRO; null: random. Keys of the model section that are left out are then that model's. "
        "Prepare the data with its tokenizer",
    )
    loss: str = key(
        "next_token",
        "next_token; or of pairs of answers (data/preferences): dpo, ipo, or dpo_norm, which is dpo per token",
        ["next_token", "dpo", "ipo", "dpo_norm"],
    )
    dpo_beta: float = key(
        0.1, "how much dpo counts a step away from train.init_from; ipo's tau", minimum=1e-6, maximum=1e6
    )
    bad_step: str = key(
        "skip",
        "at a step with a NaN, an infinity or a spike; skip: leave the weights as they were and continue; stop: end "
        "the run; rollback: load the last checkpoint and continue with the data that follows the bad step",
        ["skip", "stop", "rollback"],
    )
    spike_zscore: float = key(
        0.0,
        "a loss or gradient norm is a spike if it lies this many standard deviations above the mean of the last 128 "
        "good steps; 0: nothing is a spike",
        minimum=0,
        maximum=1e6,
    )
    max_bad_steps: int = key(10, "end the run after this many bad steps in a row", minimum=1, maximum=10**9)
    meet_timeout_seconds: float = key(300.0, "seconds for all ranks to come at the start", minimum=1, maximum=10**9)
    timeout_seconds: float = key(1500.0, "end the run after so many seconds without progress", minimum=1, maximum=10**9)
    start_timeout_seconds: float = key(1500.0, "the same until the first step has ended", minimum=1, maximum=10**9)
    eval_timeout_seconds: float = key(0.0, "the same for evaluations; 0: timeout_seconds", minimum=0, maximum=10**9)
    save_timeout_seconds: float = key(0.0, "the same for saves; 0: timeout_seconds", minimum=0, maximum=10**9)
    allow_changed: list[str] = key(
        [],
        "keys in which a resumed run may differ from its checkpoint; the last also stands for those of a growing batch",
        ["data.path", "train.seed", "train.global_batch_tokens"],
    )
    loggers: list[str] = key([], "where metrics go besides metrics.jsonl", ["tensorboard", "wandb"])
    profile: str | None = key(None, "FIRST:LAST: steps that torch's profiler records on rank 0; null: none")
    verbose: bool = key(False, "show DeepSpeed's own log")

    def check(self):
        self.check_recomputation()
        self.check_decay()
        self.check_batch_ramp()
        self.check_muon()
        if self.loss == "next_token":
            refuse_unused("train", self, ["dpo_beta"], " with train.loss next_token, which has none; set train.loss")
        self.check_eval_tasks()
        if len(self.betas) != 2 or not all(0 <= beta <= 0.99999 for beta in self.betas):
            raise UserError(f"train.betas: found {in_short(self.betas)}, expected two numbers from 0 to 0.99999")
        if self.schedule == "range" and self.min_lr_ratio < 1e-9:
            raise UserError(
                f"train.min_lr_ratio: found {self.min_lr_ratio} with train.schedule range, which rises from that part "
                "of train.lr; expected at least 1e-9, as 1e-3"
            )
        if 0 < self.grad_clip < 1e-6:  # a gradient divided by less overflows float32
            raise UserError(f"train.grad_clip: found {self.grad_clip}, expected at least 1e-06, or 0 for no clipping")
        if 0 < self.spike_zscore < 1:
            raise UserError(f"train.spike_zscore: found {self.spike_zscore}, expected at least 1, or 0 for no spikes")
        if self.init_from == "":
            raise UserError("train.init_from: found an empty name, expected a folder, a name on the hub, or null")
        if self.loss != "next_token" and self.init_from is None:
            raise UserError(
                f"train.loss: {self.loss} compares with the model that it starts from, and train.init_from names none; "
                "give a fine-tuned model there"
            )
        if self.copy_to is not None and not (self.copy_to.strip() and self.copy_to.isprintable()):
            raise UserError("train.copy_to: found an empty name, expected a folder, s3://bucket/run, or null")
        if self.lr * self.weight_decay >= 1:  # AdamW multiplies weights by 1 - lr x weight_decay
            raise UserError(
                f"train.weight_decay: found {self.weight_decay} with train.lr {self.lr}, which takes away all of the "
                "weights at each step; expected a product below 1"
            )
        if self.global_batch_tokens > self.max_tokens:
            raise UserError(
                f"train.max_tokens: {self.max_tokens} is less than one step "
                f"(train.global_batch_tokens {self.global_batch_tokens}); raise it to at least that"
            )
        if self.profile is not None:
            first, last = self.profile_steps or (0, 0)
            steps = Steps(self).total
            if not 1 <= first <= last or (last > steps and not self.allow_changed):
                raise UserError(
                    f"train.profile: found {json.dumps(self.profile)}, expected the first and last step to record, "
                    f"as 10:15, of 1 to {steps}"
                )

    def check_decay(self):
        if self.schedule != "wsd":
            why = f" with train.schedule {self.schedule}, which has no such decay; set train.schedule to wsd"
            refuse_unused("train", self, ("decay_tokens", "decay_shape"), why)
            return
        decay = decay_tokens(self)
        room = self.max_tokens - self.warmup_tokens
        if decay > max(0, room):
            given = "" if self.decay_tokens is not None else " (null: a fifth)"
            raise UserError(
                f"train.decay_tokens: found {decay}{given} of train.max_tokens {self.max_tokens} with "
                f"train.warmup_tokens {self.warmup_tokens}; expected at most {max(0, room)}, what is left after warm-up"
            )

    def check_batch_ramp(self):
        first = self.first_batch_tokens
        if first is None:
            why = " with train.first_batch_tokens null: the batch does not grow; set train.first_batch_tokens"
            refuse_unused("train", self, ("batch_ramp_tokens", "batch_ramp_jumps"), why)
            return
        if first > self.global_batch_tokens:
            raise UserError(
                f"train.first_batch_tokens: found {first}, which is more than train.global_batch_tokens "
                f"{self.global_batch_tokens}; expected at most that, or null for a batch that does not grow"
            )
        if first == self.global_batch_tokens:
            raise UserError(
                f"train.first_batch_tokens: found {first}, which is train.global_batch_tokens; expected less, "
                "or null for a batch that does not grow"
            )
        if self.batch_ramp_tokens // first > MOST_RAMP_STEPS:
            raise UserError(
                f"train.batch_ramp_tokens: found {self.batch_ramp_tokens} with train.first_batch_tokens {first}, "
                f"expected at most {MOST_RAMP_STEPS * first}: a million of the smallest steps"
            )
        if not self.batch_ramp_tokens:
            raise UserError(
                f"train.batch_ramp_tokens: found 0 with train.first_batch_tokens {first}; expected the tokens over "
                "which the batch grows, or set train.first_batch_tokens to null"
            )
        if (possible := possible_jumps(first, self.global_batch_tokens, self.batch_ramp_jumps)) < self.batch_ramp_jumps:
            unit = math.gcd(first, self.global_batch_tokens)
            raise UserError(
                f"train.batch_ramp_jumps: found {self.batch_ramp_jumps} from train.first_batch_tokens {first} to "
                f"train.global_batch_tokens {self.global_batch_tokens} in multiples of {unit}, of which some sizes are "
                f"the same; expected at most {possible}, or 0 to grow linearly"
            )

    def check_eval_tasks(self):
        if "" in self.eval_tasks or len(set(self.eval_tasks)) < len(self.eval_tasks):
            raise UserError(f"train.eval_tasks: found {in_short(self.eval_tasks)}, expected names of tasks, each once")
        if not self.eval_tasks:
            refuse_unused("train", self, EVAL_TASKS[1:], " without train.eval_tasks, which it is for; name tasks there")

    def check_muon(self):
        if self.optimizer == "adamw":
            why = " with train.optimizer adamw, which has none; set train.optimizer to muon"
            refuse_unused("train", self, ("muon_lr", "muon_momentum"), why)
        elif self.lr == 0:  # every rate of a step is train.lr's, times a constant
            raise UserError("train.lr: found 0 with train.optimizer muon, expected a rate above 0 for AdamW's weights")
        elif self.muon_lr * self.weight_decay >= 1:
            raise UserError(
                f"train.weight_decay: found {self.weight_decay} with train.muon_lr {self.muon_lr}, which takes away "
                "all of the weights at each step; expected a product below 1"
            )

    def check_recomputation(self):
        wanted = self.activation_checkpointing
        found = f"train.activation_checkpointing: found {in_short(wanted)}"
        if isinstance(wanted, str) and wanted != "selective":
            raise UserError(f"{found}, expected true, false, a number or selective")
        if not isinstance(wanted, str) and wanted > 1 and wanted != int(wanted):
            raise UserError(f"{found}, expected a whole number k (every k-th block) or one below 1 (the part kept)")
        budget = Recomputation.of(wanted).budget
        if budget < 1 and self.compile is False:
            raise UserError(f"{found} with train.compile false, but the compiler chooses what to keep; set it to auto")
        if self.activation_offload and (budget < 1 or wanted == "selective"):
            raise UserError(f"{found} with train.activation_offload, which takes true or a number k of blocks")

    @property
    def profile_steps(self):
        """First and last step to record, or None."""
        numbers = re.fullmatch(r"(\d+):(\d+)", self.profile or "")
        return tuple(map(int, numbers.groups())) if numbers else None


@dataclass
class LoraConfig:
    rank: int | None = key(
        None,
        "train only a product of two matrices of this inner width beside each matrix (LoRA), and freeze the weights of "
        "train.init_from; null: train all weights",
        minimum=1,
        maximum=2**16,
    )
    alpha: float = key(32.0, "the product is multiplied by alpha / rank", minimum=1e-6, maximum=1e6)
    dropout: float = key(0.0, "probability of dropping an input of the product", minimum=0, maximum=0.99)
    matrices: list[str] = key(
        ["qkv", "proj", "up", "down"], "which matrices of each block have one", ["qkv", "proj", "up", "down"]
    )
    init_from: str | None = key(
        None, "start from the adapter in this folder, as PEFT writes it; null: from products that are zero"
    )
    base_bits: int | None = key(
        None,
        "4: the frozen matrices of the blocks are in 4 bits (NF4 by the package bitsandbytes, as in QLoRA), whole on "
        "each rank; null: in train.precision",
        [4],
    )

    def check(self, model):
        if self.rank is None:
            why = ", but lora.rank is null, which trains all weights; set lora.rank"
            refuse_unused("lora", self, vars(self), why)
            return
        if self.base_bits and model.n_expert:
            raise UserError(
                f"lora.base_bits: found {self.base_bits} with model.n_expert {model.n_expert}; experts stay in "
                "train.precision here; set it to null"
            )
        if not self.matrices or len(set(self.matrices)) < len(self.matrices):
            raise UserError(f"lora.matrices: found {in_short(self.matrices)}, expected at least one, and each once")
        experts = [name for name in self.matrices if name in ("up", "down")]
        if model.n_expert and experts:
            raise UserError(
                f"lora.matrices: found {', '.join(experts)} with model.n_expert {model.n_expert}; experts have no "
                "adapters here; set lora.matrices to qkv, proj"
            )
        if self.init_from == "":
            raise UserError("lora.init_from: found an empty name, expected a folder, or null")

    @property
    def scale(self):
        """By what the product is multiplied."""
        return self.alpha / self.rank


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    deepspeed: dict = field(default_factory=dict)

    def to_dict(self):
        return dataclasses.asdict(self)


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "lora": LoraConfig}


def switched_on(model: ModelConfig, known):
    """Keys of the model section that are not in `known` and may change what the model computes.

    Returns a list of (key, its value, the value that changes nothing or None). That value is the key's `off`, or its
    default if that reads as off: false, null, 0, none. A key with neither is always in the list."""
    found = []
    for one in dataclasses.fields(model):
        if one.name in known:
            continue
        value = getattr(model, one.name)
        off = one.metadata.get("off")
        has_off = off is not None or one.default in (False, None, 0, "none", "off")
        if off is None and has_off:
            off = one.default
        if not has_off or value != off:
            found.append((one.name, value, off))
    return found


def data_weights(path):
    """`data.path`, a folder or {folder: weight}, as {folder: weight}."""
    return path if isinstance(path, dict) else {path: 1}
