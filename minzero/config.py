"""JSON file -> typed, checked configuration -> command line -> DeepSpeed's half.

A run is described by four sections: `model`, `data`, `train` (the dataclasses below, every key with
its meaning and unit) and `deepspeed` (DeepSpeed's own keys, merged over `ds_config.json`). Any key
can be overridden on the command line: `--train.lr 1e-4 --deepspeed.zero_optimization.stage 2`.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from minzero import commands, deepspeed_keys
from minzero.commands import UserError
from minzero.launchers import find_ranks

ROOT = Path(__file__).resolve().parents[1]
IGNORE = -1  # a target that does not count


def git_commit():
    """The commit of this copy of the code, with "-dirty" where files were changed, or None."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # a container without git
        return None


class SharedError(UserError):
    """A UserError that several ranks end by: the one of this number says it, and the others end without a word."""

    def __init__(self, message, said_by=0):
        super().__init__(message)
        self.said_by = said_by


def key(default, meaning, choices=None, minimum=None, maximum=None, off=None):
    """A configuration key: its default, its meaning with the unit, and the values it may take. off: of the model
    section, the value with which the model is the one without this key (see `switched_on`)."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    metadata = {"meaning": meaning, "choices": choices, "minimum": minimum, "maximum": maximum, "off": off}
    return field(**factory, metadata=metadata)


@dataclass
class ModelConfig:
    n_layer: int = key(12, "transformer blocks", minimum=1, maximum=10**5)
    n_head: int = key(12, "query heads of each attention", minimum=1, maximum=2**20)
    n_kv_head: int | None = key(
        None, "key and value heads, shared by groups of query heads; null: n_head", minimum=1, maximum=2**20
    )
    n_embd: int = key(768, "width of the residual stream", minimum=1, maximum=2**20)
    block_size: int = key(1024, "context length in tokens", minimum=1, maximum=2**30)
    vocab_size: int = key(50257, "number of token ids", minimum=1, maximum=2**32)
    mlp_hidden: int | None = key(
        None,
        "hidden width of the MLP; null: 4 n_embd (gelu), 8/3 n_embd up to a multiple of 64 (swiglu)",
        minimum=1,
        maximum=2**24,
    )
    dropout: float = key(0.0, "probability of dropping an activation", minimum=0, maximum=0.99)
    bias: bool = key(True, "biases in the linear layers and layer norms")
    norm: str = key("layernorm", "normalisation before each sub-layer", ["layernorm", "rmsnorm"])
    norm_eps: float = key(
        1e-5, "what the norms add to the variance or mean square before its root", minimum=1e-12, maximum=1
    )
    position: str = key("learned", "how a token knows its position", ["learned", "rotary"])
    rotary_theta: float = key(10000.0, "base of the rotary wavelengths", minimum=1, maximum=1e12)
    mlp: str = key("gelu", "activation of the MLP", ["gelu", "swiglu"])
    tie_embeddings: bool = key(True, "the output layer shares the token embedding's weights")
    init_std: float = key(0.02, "standard deviation of the initial weights", minimum=1e-6, maximum=1)

    def check(self):
        if self.n_embd % self.n_head:
            raise UserError(
                f"model.n_head: {self.n_head} does not divide model.n_embd {self.n_embd}; "
                f"nearest that do: {nearest_divisors(self.n_embd, self.n_head)}"
            )
        if self.n_head % self.kv_heads:
            raise UserError(
                f"model.n_kv_head: {self.n_kv_head} does not divide model.n_head {self.n_head}; "
                f"nearest that do: {nearest_divisors(self.n_head, self.n_kv_head)}"
            )
        if self.position == "rotary" and (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"model.position: rotary turns pairs of channels, but a head has {self.n_embd // self.n_head}; "
                "choose n_embd and n_head so that n_embd / n_head is even"
            )

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self):
        """Hidden width of the MLP. SwiGLU has three matrices instead of two, so 8/3 of the width
        keeps the parameters of a GELU MLP of 4 (Shazeer 2020, arXiv 2002.05202, section 2)."""
        if self.mlp_hidden:
            return self.mlp_hidden
        return 4 * self.n_embd if self.mlp == "gelu" else -(-8 * self.n_embd // 3 // 64) * 64


def switched_on(model: ModelConfig, known):
    """Keys of the model section that are not in `known` and may change what the model computes, as a list of
    (key, value, the value that changes nothing or None). That value is a key's `off`, or a default that says it:
    false, null, 0, none. A key with neither is always in the list."""
    found = []
    for one in dataclasses.fields(model):
        off, value = one.metadata.get("off"), getattr(model, one.name)
        says_off = off is not None or one.default in (False, None, 0, "none", "off")
        off = one.default if off is None and says_off else off
        if one.name not in known and not (says_off and value == off):
            found.append((one.name, value, off))
    return found


@dataclass
class DataConfig:
    path: str | dict = key(
        "data/openwebtext", "folder of token shards, as a prepare script writes them; or several: {folder: weight}"
    )
    verify: bool = key(False, "read every shard before training and compare its checksum with meta.json's")

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


@dataclass
class TrainConfig:
    out_dir: str | None = key(None, "folder of the run; null: out/<name of the config file>")
    seed: int = key(1337, "of the initial weights, the data order and dropout", minimum=0, maximum=2**62)
    precision: str = key(
        "auto", "auto: bf16 on GPUs that have it, else fp16; fp32 on CPU", ["auto", "bf16", "fp16", "fp32"]
    )
    micro_batch_size: int = key(8, "sequences one rank takes at a time", minimum=1, maximum=2**30)
    global_batch_tokens: int = key(524288, "tokens of one optimizer step, over all ranks", minimum=1, maximum=10**10)
    max_tokens: int = key(10_000_000_000, "length of the run in tokens", minimum=1, maximum=10**18)
    warmup_tokens: int = key(0, "tokens over which the learning rate rises from zero", minimum=0, maximum=10**18)
    lr: float = key(6e-4, "peak learning rate", minimum=0, maximum=10)
    min_lr_ratio: float = key(0.1, "last learning rate over the peak", minimum=0, maximum=1)
    schedule: str = key("cosine", "fall of the learning rate after warm-up", ["cosine", "linear", "constant"])
    weight_decay: float = key(0.1, "AdamW's decay, on matrices only", minimum=0, maximum=100)
    betas: list[float] = key([0.9, 0.95], "AdamW's decay rates of its two moments")
    eps: float = key(1e-8, "AdamW's epsilon", minimum=1e-16, maximum=1)
    grad_clip: float = key(1.0, "largest global norm of the gradient; 0: no clipping", minimum=0, maximum=1e9)
    activation_checkpointing: bool | int = key(
        False,
        "recompute blocks in the backward pass, for less memory: true: every block; k: every k-th",
        minimum=0,
        maximum=10**5,
    )
    checkpoints_on_cpu: bool = key(False, "keep the inputs of recomputed blocks in CPU memory")
    kernels: str = key(
        "auto", "norms and Adam: NVIDIA Apex's where it is installed on a GPU, else torch's", ["auto", "apex", "torch"]
    )
    compile: bool | str = key("auto", "torch.compile the blocks and the loss; auto: on GPUs", [True, False, "auto"])
    log_every: int = key(10, "optimizer steps between two lines of metrics", minimum=1, maximum=10**15)
    eval_every: int = key(
        1000, "optimizer steps between two evaluations; 0: only at the end", minimum=0, maximum=10**15
    )
    eval_tokens: int = key(
        1_048_576, "validation tokens of one evaluation, the same each time", minimum=1, maximum=10**15
    )
    save_every: int = key(
        1000, "optimizer steps between two checkpoints; 0: only at the end", minimum=0, maximum=10**15
    )
    save_every_seconds: float = key(
        0.0, "also save when the last checkpoint is that old; 0: never", minimum=0, maximum=1e9
    )
    save_in_background: bool = key(False, "copy to the CPU's memory and write while training continues")
    save_best: bool = key(True, "also save when the validation loss is the lowest so far")
    keep_checkpoints: int = key(2, "newest checkpoints kept, besides the best", minimum=1, maximum=10**9)
    resume: str = key(
        "auto",
        "auto: continue if the run folder holds a checkpoint; never; or the path of a checkpoint or a run, one outside "
        "the run folder only while that holds none",
    )
    init_from: str | None = key(
        None,
        "start from these weights: a folder in transformers' format, a name on the Hugging Face hub, or a run or "
        "checkpoint of ours; null: random. Prepare the data with that model's tokenizer",
    )
    bad_step: str = key(
        "skip",
        "a step with a NaN, an infinity or a spike: pass over it; end the run; load the last checkpoint and "
        "continue after it",
        ["skip", "stop", "rollback"],
    )
    spike_zscore: float = key(
        0.0,
        "standard deviations above the last 128 good steps that make a loss or gradient norm a spike; 0: none",
        minimum=0,
        maximum=1e6,
    )
    max_bad_steps: int = key(10, "bad steps in a row that end the run", minimum=1, maximum=10**9)
    timeout_seconds: float = key(
        1500.0, "without progress after which a run that hangs is ended", minimum=1, maximum=10**9
    )
    allow_changed: list[str] = key(
        [],
        "keys in which a resumed run may differ from its checkpoint",
        ["data.path", "train.seed", "train.global_batch_tokens"],
    )
    loggers: list[str] = key([], "where metrics go besides metrics.jsonl", ["tensorboard", "wandb"])
    profile: str | None = key(
        None, "steps that torch's profiler records on rank 0, into the run's folder: FIRST:LAST; null: none"
    )
    verbose: bool = key(False, "show DeepSpeed's own log")

    def check(self):
        if len(self.betas) != 2 or not all(0 <= beta <= 0.99999 for beta in self.betas):
            raise UserError(f"train.betas: found {in_short(self.betas)}, expected two numbers from 0 to 0.99999")
        if 0 < self.grad_clip < 1e-6:  # a gradient divided by less overflows float32
            raise UserError(f"train.grad_clip: found {self.grad_clip}, expected at least 1e-06, or 0 for no clipping")
        if 0 < self.spike_zscore < 1:
            raise UserError(f"train.spike_zscore: found {self.spike_zscore}, expected at least 1, or 0 for no spikes")
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
            steps = self.max_tokens // self.global_batch_tokens
            if not 1 <= first <= last or (last > steps and not self.allow_changed):
                raise UserError(
                    f"train.profile: found {json.dumps(self.profile)}, expected the first and last step to record, "
                    f"as 10:15, of 1 to {steps}"
                )

    @property
    def profile_steps(self):
        """First and last step to record, or None."""
        numbers = re.fullmatch(r"(\d+):(\d+)", self.profile or "")
        return tuple(map(int, numbers.groups())) if numbers else None


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: dict = field(default_factory=dict)

    def to_dict(self):
        return dataclasses.asdict(self)


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}

# 512 MiB in 16 bits: a GPU multiplies large matrices faster, and adds up fewer partial gradients
LOGITS_AT_A_TIME = 2**28


def tokens_at_a_time(vocab_size, on_gpu):
    """How many tokens' logits the loss shall hold: a power of two, so that chunks are mostly of one size, and few
    enough for sums over them in fp16. Here, because plan.py knows it without loading torch."""
    logits = LOGITS_AT_A_TIME if on_gpu else LOGITS_AT_A_TIME // 4
    return min(4096, 1 << max(0, (logits // vocab_size).bit_length() - 1))


def width_of_logits(vocab_size, on_gpu):
    """How many columns of logits the loss computes: on a GPU a multiple of 64, as it multiplies matrices of GPT-2's
    50,257 columns more slowly than of 50,304."""
    return -(-vocab_size // 64) * 64 if on_gpu else vocab_size


def data_weights(path):
    """`data.path`, a folder or {folder: weight}, as {folder: weight}."""
    return path if isinstance(path, dict) else {path: 1}


def zero_stage(deepspeed):
    """The ZeRO stage of a DeepSpeed configuration."""
    return deepspeed.get("zero_optimization", {}).get("stage", 0)


def offload_device(zero, what):
    """Where `offload_optimizer` or `offload_param` is kept: none (on the GPU), cpu or nvme."""
    return (zero.get(what) or {}).get("device", "none")


def offload_ratio(zero):
    """Which part of an offloaded optimizer leaves the GPU."""
    return (zero.get("offload_optimizer") or {}).get("ratio", 1.0)


def offloads_optimizer(deepspeed):
    """Whether a DeepSpeed configuration keeps the optimizer's state in CPU memory or on NVMe."""
    return offload_device(deepspeed.get("zero_optimization", {}), "offload_optimizer") != "none"


def divisors(number):
    """All of them, the smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_divisors(number, wanted):
    """The two divisors of `number` nearest to `wanted`, for error messages."""
    return " or ".join(str(d) for d in sorted(sorted(divisors(number), key=lambda d: abs(d - wanted))[:2]))


def did_you_mean(name, valid):
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(valid))}"


def type_name(expected):
    """A key's type in words: int, float, list[str], str or null."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    plain = {types.NoneType: "null", bool: "bool", int: "int", float: "float", str: "str", dict: "dict"}
    return " or ".join(plain.get(option, str(option)) for option in options)  # list[str] is written like that


def where_it_belongs(name, section=None):
    """The remedy for a key that `section`, or the top of the file, does not know: another section's, or the
    nearest name."""
    for other, cls in SECTIONS.items():
        if other != section and name in cls.__dataclass_fields__:
            return f"{name} is a key of the section {other}"
    return did_you_mean(name, SECTIONS[section].__dataclass_fields__ if section else [*SECTIONS, "deepspeed"])


def fits(value, option):
    """Whether a JSON value is of this type. A whole float is an int, an int is a float, a boolean neither."""
    if option in (int, float):
        return type(value) is int or (type(value) is float and (option is float or value.is_integer()))
    if typing.get_origin(option) is list:
        return isinstance(value, list) and all(fits(one, typing.get_args(option)[0]) for one in value)
    return isinstance(value, option)


def in_short(value):
    """A JSON value for an error message, cut where it is long."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):  # nested a thousand times; a number of thousands of digits
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def fault_of_text(text):
    """What keeps a string of a configuration from being a path or from being printed, or None. The limits are those of
    Linux: 255 bytes a name, 4,096 a path."""
    try:
        names = [len(name) for name in text.encode().split(b"/")]
    except UnicodeEncodeError:
        return f"found {in_short(text)}, which is no text (half of a surrogate pair); expected UTF-8"
    if not all(character.isprintable() for character in text):
        return f"found {in_short(text)}, expected no control characters"
    if max(names) > 255 or sum(names) + len(names) > 4096:
        return f"found {in_short(text)}, longer than a file system takes: 255 bytes a name, 4,096 a path"
    return None


def convert(where, value, expected, meta):
    """Return `value` as the type `expected`, or raise UserError. Whole floats count as integers, so
    that lengths can be written 1e9."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    option = next((option for option in options if fits(value, option)), None)
    if option is None:
        raise UserError(f"{where}: found {in_short(value)}, expected {type_name(expected)} ({meta['meaning']})")
    if value is None:
        return None
    numbers = option in (int, float, list[float])
    for one in value if isinstance(value, list) else [value]:
        if numbers and isinstance(one, float) and not math.isfinite(one):  # JSON as Python reads it can hold these
            raise UserError(f"{where}: found {json.dumps(one)}, expected a finite number ({meta['meaning']})")
        if meta["choices"] and one not in meta["choices"]:
            names = ", ".join(str(choice).lower() for choice in meta["choices"])
            raise UserError(f"{where}: found {in_short(one)}, expected one of {names}")
        if isinstance(one, str) and (fault := fault_of_text(one)):
            raise UserError(f"{where}: {fault} ({meta['meaning']})")
    if meta["minimum"] is not None and value < meta["minimum"]:
        raise UserError(f"{where}: found {in_short(value)}, expected at least {meta['minimum']} ({meta['meaning']})")
    if meta["maximum"] is not None and value > meta["maximum"]:
        raise UserError(f"{where}: found {in_short(value)}, expected at most {meta['maximum']} ({meta['meaning']})")
    try:
        if option in (int, float):
            return option(value)
        return [float(one) for one in value] if option == list[float] else value
    except OverflowError:  # a whole number above what a float holds
        raise UserError(f"{where}: found {in_short(value)}, expected a number that a float holds") from None


def plain_name(name):
    """A key of a file for an error message: what cannot be printed, escaped."""
    return name if name.isprintable() else json.dumps(name)[1:-1]


def deepspeed_section(section, n_embd, faults, path=""):
    """The keys of a DeepSpeed configuration that a run may set, checked, with numbers for "auto"; without those that
    say that something is not used. What is wrong is added to `faults`, a list of lines."""
    found = {}
    for name, value in section.items():
        key, where = path + name, f"deepspeed.{path}{plain_name(name)}"
        known = deepspeed_keys.ACCEPTED.get(key) if "." not in name else None
        if key in deepspeed_keys.OURS:
            if value != "auto":  # Hugging Face's word for that
                faults.append(f"{where} follows from {deepspeed_keys.OURS[key]}; set that and remove this")
        elif value == "auto" and key in deepspeed_keys.AUTO:
            found[name] = deepspeed_keys.AUTO[key](n_embd)
        elif known:
            try:
                found[name] = convert(where, value, known.kind, known._asdict())
            except UserError as error:
                auto = f"; only {', '.join(deepspeed_keys.AUTO)} may be" if value == "auto" else ""
                faults.append(f"{error}{auto}")
        elif key in deepspeed_keys.SECTIONS:
            if value is None and "offload" in name:
                continue
            if isinstance(value, dict):
                found[name] = deepspeed_section(value, n_embd, faults, f"{key}.")
            else:
                faults.append(f"{where}: found {in_short(value)}, expected an object")
        elif refused := deepspeed_keys.REFUSED.get(key):
            # 1 and true, 0 and false are equal in Python
            if json.dumps(value) not in map(json.dumps, refused.unused):
                unused = f", or leave it at {json.dumps(refused.unused[-1])}" if refused.unused else ""
                faults.append(f"{where}: found {in_short(value)}, not supported: {refused.why}; remove it{unused}")
        else:
            names = [known for known in (*deepspeed_keys.ACCEPTED, *deepspeed_keys.SECTIONS) if known.startswith(path)]
            faults.append(
                f"unknown key {where}; {did_you_mean(name, {known[len(path) :].split('.')[0] for known in names})}"
            )
    return found


def check_together(deepspeed, precision):
    """What DeepSpeed's keys must say together, at their stage and in this precision (auto, bf16, fp16 or fp32). Raises
    UserError."""
    zero, stage = deepspeed.get("zero_optimization", {}), zero_stage(deepspeed)
    if precision == "fp16" and stage == 0:
        raise UserError(
            "deepspeed.zero_optimization.stage: found 0 with fp16, where DeepSpeed scales no loss; expected 1, 2 or 3, "
            "or --train.precision bf16 or fp32"
        )
    for what, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        key, device = f"deepspeed.zero_optimization.{what}", offload_device(zero, what)
        if device == "nvme" and stage != 3:
            raise UserError(f"{key}.device: found nvme at stage {stage}, expected stage 3, or cpu")
        if device == "nvme" and not zero[what].get("nvme_path"):
            raise UserError(f"{key}.nvme_path: found none, expected a folder on each node's own NVMe")
        if device != "none" and stage not in stages:
            expected = " or ".join(map(str, stages))
            raise UserError(f"{key}.device: found {device} at stage {stage}, expected stage {expected}, or none")
    ratio, device = offload_ratio(zero), offload_device(zero, "offload_optimizer")
    if ratio != 1 and (stage != 3 or device != "cpu"):
        raise UserError(
            f"deepspeed.zero_optimization.offload_optimizer.ratio: found {ratio} with stage {stage} and device "
            f"{device}, expected 1, or stage 3 and device cpu"
        )
    accumulated = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    if accumulated not in (None, precision) and not (accumulated == "fp32" and stage >= 2):
        raise UserError(
            f"deepspeed.data_types.grad_accum_dtype: found {accumulated} at stage {stage} with train.precision "
            f"{precision}, where DeepSpeed does not obey it or takes an optimizer that checkpoints do not know; "
            "expected the precision itself, or fp32 at stage 2 or 3"
        )
    fp16 = deepspeed.get("fp16", {})
    lowest, first = fp16.get("min_loss_scale", 1), 2 ** fp16.get("initial_scale_power", 16)
    if lowest > first:
        raise UserError(f"deepspeed.fp16.min_loss_scale: found {lowest}, expected at most the first scale, {first}")


def build(values, source):
    """Nested dictionaries -> Config, every key and type checked.

    `source` names the file or the command line in error messages. Raises UserError."""
    config, faults = Config(), []
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a JSON object with the sections model, data, train, deepspeed")
    for section, content in values.items():
        if section not in (*SECTIONS, "deepspeed"):
            faults.append(f"unknown section {section!r}; {where_it_belongs(section)}")
        elif not isinstance(content, dict):
            faults.append(f"section {section!r} must be a JSON object, found {in_short(content)}")
        elif section in SECTIONS:
            faults += set_keys(getattr(config, section), section, content)
    given = values.get("deepspeed")
    if isinstance(given, dict):
        config.deepspeed = deepspeed_section(given, config.model.n_embd, faults)
    checks = [config.model.check, config.data.check, config.train.check]
    checks.append(lambda: check_together(config.deepspeed, config.train.precision))
    for check in [] if faults else checks:  # they count on keys that are right by themselves
        try:
            check()
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{source}: {'; '.join(faults)}")
    return config


def set_keys(target, section, content):
    """Set the keys of a section's dataclass. Returns a list of lines, one for each that cannot be."""
    fields, faults = {f.name: f for f in dataclasses.fields(target)}, []
    for name, value in content.items():
        if name not in fields:
            faults.append(f"unknown key {section}.{plain_name(name)}; {where_it_belongs(name, section)}")
            continue
        try:
            value = convert(f"{section}.{name}", value, fields[name].type, dict(fields[name].metadata))
            setattr(target, name, value)
        except UserError as error:
            faults.append(str(error))
    return faults


def nearest_file(path):
    """What to say of a config file that is not there: the nearest name of its folder and of configs/, or all."""
    ours = ROOT / "configs"
    there = {file.stem: file for folder in (ours, path.parent) for file in sorted(folder.glob("*.json"))}
    close = difflib.get_close_matches(path.stem, there, n=1, cutoff=0.5)
    if not close:
        return f"; configs holds {', '.join(sorted(file.name for file in ours.glob('*.json')))}"
    file = there[close[0]]
    return f"; did you mean {os.path.relpath(file) if file.is_relative_to(Path.cwd()) else file}?"


def refuse_pipe(path):
    """Raises UserError if there is a pipe, socket or device, which a reader could wait at without end."""
    with contextlib.suppress(OSError, ValueError):  # nothing there, or no path: for the reader to say
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path}: found a pipe, socket or device, expected a plain file; put the file there")


def read_json(path, regular=True):
    """The content of a JSON file. regular: only of a plain file; else a pipe may be read as well. Raises UserError
    that names the file, line and column."""
    if regular:
        refuse_pipe(path)

    def without_repeats(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the key {json.dumps(twice)} stands twice in one object; remove one of them")
        return found

    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a readable JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a JSON file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected JSON of a few levels") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; expected JSON") from None
    except ValueError:  # a number of more digits than Python converts; a NUL in the path
        raise UserError(f"{path}: holds a number of thousands of digits, or is no path; expected JSON") from None


def merge(base, over):
    """`over` laid over `base`, section by section; both stay as they are."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        both = both and name != "path"  # a mixture of data sets is one value
        merged[name] = merge(merged[name], value) if both else value
    return merged


def flat(values, prefix=""):
    """{"train": {"lr": 1}} -> {"train.lr": 1}, for nested dictionaries."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def command_line_values(arguments):
    """`--train.lr 1e-4 --model.bias=false` -> {"train": {"lr": 1e-4}, "model": {"bias": False}}.

    Values are JSON; what is not JSON is a string. Returns the values and what is left over."""
    values, rest = {}, []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("--local_rank"):  # the launcher's; RANK in the environment says it too
            continue
        if not argument.startswith("--"):
            if argument.startswith("-") or re.match(r"(model|data|train|deepspeed)\.\w+=", argument):
                raise UserError(
                    f"{argument}: unknown flag; keys are written --section.key value, as in --train.lr 1e-4"
                )
            rest.append(argument)
            continue
        name, given, raw = argument[2:].partition("=")
        if "." not in name:
            raise UserError(f"--{name}: unknown flag; keys are written --section.key value, as in --train.lr 1e-4")
        if not given:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(f"--{name}: no value given; write --{name} VALUE (booleans: true or false)")
            raw = arguments.pop(0)
        section, *path = name.split(".")
        if section not in (*SECTIONS, "deepspeed") or not all(path):
            raise UserError(f"--{name}: unknown section {section!r}; expected model, data, train or deepspeed")
        known = {f.name: f.type for f in dataclasses.fields(SECTIONS[section])} if section in SECTIONS else {}
        try:
            value = json.loads(raw)
        except json.JSONDecodeError:
            value = raw
        except (ValueError, RecursionError):  # more digits than Python converts, or brackets
            raise UserError(f"--{name}: found {raw[:20]}... ({len(raw)} characters), expected less") from None
        kind = known.get(path[0])
        if section == "deepspeed" and (accepted := deepspeed_keys.ACCEPTED.get(".".join(path))):
            kind = accepted.kind
        if kind in (str, str | None, str | dict) and value is not None and not isinstance(value, dict):
            value = raw.strip('"')  # a folder may be called 2024
        target = values.setdefault(section, {})
        for part in path[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UserError(
                    f"--{name}: {part} was given the value {json.dumps(target)} before; give only one of them"
                )
        target[path[-1]] = value
    return values, rest


def described(name, kind, meta, default):
    """Lines about one key for --help: its meaning, type, range and default."""
    facts = [type_name(kind)]
    if meta["choices"]:
        several = "list of " if typing.get_origin(kind) is list else ""
        facts = [several + " | ".join(str(choice).lower() for choice in meta["choices"])]
    for word, limit in (("least", meta["minimum"]), ("most", meta["maximum"])):
        facts += [] if limit is None else [f"at {word} {limit}"]
    text = f"{meta['meaning']} ({', '.join(facts)}; default {json.dumps(default)})"
    return textwrap.wrap(text, 118, initial_indent=f"{f'  --{name}':36} ", subsequent_indent=" " * 37)


def help_text():
    """Every key with its meaning, type, range and default, from the definitions above."""
    lines = ["usage: deepspeed [--num_gpus N] train.py [CONFIG.json] [--section.key VALUE ...]", ""]
    lines += [
        "CONFIG.json is configs/1p5b.json if none is given. VALUE is written as in JSON: 1e-4, true, null, [0.9, 0.95]"
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"{section}:"]
        for f in dataclasses.fields(cls):
            default = list(f.default_factory()) if f.default is dataclasses.MISSING else f.default
            lines += described(f"{section}.{f.name}", f.type, f.metadata, default)
    lines += [
        "",
        "deepspeed:",
        *textwrap.wrap(
            "DeepSpeed's own keys, merged over ds_config.json; others are refused. "
            f'{", ".join(deepspeed_keys.AUTO)} may be "auto", which means what it means to Hugging Face\'s Trainer: '
            "the square of n_embd, 0.9 times that, and 10 n_embd.",
            118,
            initial_indent="  ",
            subsequent_indent="  ",
        ),
    ]
    for name, known in deepspeed_keys.ACCEPTED.items():
        lines += described(f"deepspeed.{name}", known.kind, known._asdict(), known.default)
    return "\n".join(lines)


def help_if_asked(arguments):
    """Print the keys and end, if --help is among the arguments. Of several ranks the first prints."""
    if "--help" in arguments or "-h" in arguments:
        if os.environ.get("RANK", "0") == "0":
            print(help_text())
        raise SystemExit(0)


def load_config(arguments, default="configs/1p5b.json"):
    """Command-line arguments -> Config: the config file (or `default`) with the overrides over it."""
    help_if_asked(arguments)
    overrides, rest = command_line_values(arguments)
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: expected one config file, and {rest[0]} was already given")
    if rest and (fault := fault_of_text(rest[0])):
        raise UserError(f"config file: {fault}")
    path = Path(rest[0]) if rest else ROOT / default
    if not path.exists():
        raise UserError(f"{path}: no such file{nearest_file(path)}")
    # each by itself first, so that an error names its file
    below = {"deepspeed": read_json(ROOT / "ds_config.json")}
    build(below, "ds_config.json")
    values = read_json(path, regular=False)  # a shell's <(...) is a pipe
    if isinstance(values, dict):
        values = merge(below, values)
    build(values, path)
    config = build(merge(values, overrides), "command line")
    config.train.out_dir = config.train.out_dir or f"out/{path.stem}"
    return config


def gradient_accumulation(config, world_size):
    """Micro-batches per rank and optimizer step, so that the step has exactly global_batch_tokens.

    Raises UserError with the nearest settings that divide."""
    train, block = config.train, config.model.block_size
    sequences, remainder = divmod(train.global_batch_tokens, block)
    per_round = train.micro_batch_size * world_size
    if not remainder and sequences % per_round == 0:
        return sequences // per_round
    unit = block * per_round
    below = train.global_batch_tokens // unit * unit
    tokens = " or ".join(str(t) for t in (below, below + unit) if t)
    remedy = f"set train.global_batch_tokens to {tokens}"
    if not remainder and sequences % world_size == 0:
        sizes = nearest_divisors(sequences // world_size, train.micro_batch_size)
        remedy += f", or train.micro_batch_size to {sizes}"
    raise UserError(
        f"train.global_batch_tokens: {train.global_batch_tokens} is not a multiple of block_size {block} x "
        f"micro_batch_size {train.micro_batch_size} x {world_size} ranks = {unit}; {remedy}"
    )


def deepspeed_config(config, world_size, precision, on_gpu):
    """The complete DeepSpeed configuration of this run: the user's keys and those that follow from
    the `train` section. `precision` is bf16, fp16 or fp32."""
    train = config.train
    accumulation = gradient_accumulation(config, world_size)
    adam = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
    # torch's AdamW needs no compiler and resumes bit for bit; only for state that lives in a GPU
    # machine's CPU memory is DeepSpeed's own vectorised Adam worth its compilation.
    adam |= {} if on_gpu and offloads_optimizer(config.deepspeed) else {"torch_adam": True, "fused": True}
    ours = {
        "train_batch_size": train.micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.grad_clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a micro-batch
    }
    return merge(ours, config.deepspeed)


def refuse_several_tasks():
    """Raise SharedError if a launcher has started this process as one of several, of a command that shares no work:
    they would do the same, and write the same files."""
    try:
        found = find_ranks(dict(os.environ), may_be_alone=True)
    except UserError:  # variables that only a command of several ranks needs
        return
    if found["WORLD_SIZE"] != "1":
        os.environ["RANK"] = found["RANK"]  # so that one of them says it
        tasks, remedy = found["WORLD_SIZE"], "start it without srun, mpirun, torchrun or deepspeed"
        raise SharedError(f"found {tasks} tasks, expected one process; {remedy}")


def run_command(function, arguments=None, may_be_many=False):
    """Run a command's main, and end it as commands.py says: what a user can cause in one line on stderr and code 2,
    Ctrl-C in one line and 130, a pipe whose reader has gone in silence. A fault in the program shows its traceback.

    Mostly every rank finds the same fault, and one line is enough: the others leave the word to rank 0,
    whose exit makes the launcher end them. A rank that nobody ends is alone with its fault and says so.
    may_be_many: the command may run as several ranks."""
    commands.set_up_streams()
    handler = commands.handle_interrupts(commands.interrupt)
    try:
        try:
            if not may_be_many:
                refuse_several_tasks()
            function(sys.argv[1:] if arguments is None else arguments)
        except SystemExit:
            commands.flush_output()
            raise
        commands.flush_output()
    except BaseException as error:
        line, code = commands.ending(error)
        if code is None:
            raise
        rank = os.environ.get("RANK", "")  # the function may have found it
        rank = int(rank) if rank.isdecimal() else 0
        shared = isinstance(error, SharedError)
        says_it = rank == error.said_by if shared else not rank or code == commands.REFUSED
        if code == commands.REFUSED and rank and not (shared and says_it):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2 if shared else 10)
        if line and says_it:
            commands.say(f"rank {rank}: {line}" if rank else line)
        if may_be_many and os.environ.get("WORLD_SIZE", "1") != "1":
            # the interpreter's own end aborts (`terminate called`) where torch's threads wait for other ranks
            with contextlib.suppress(UserError):
                commands.flush_output()
            os._exit(code)
        raise SystemExit(code) from None
    finally:
        commands.restore_interrupts(handler)
