"""JSON file -> typed, checked configuration -> command line -> DeepSpeed's half.

A run is described by four sections: `model`, `data`, `train` (the dataclasses below, every key with
its meaning and unit) and `deepspeed` (DeepSpeed's own keys, merged over `ds_config.json`). Any key
can be overridden on the command line: `--train.lr 1e-4 --deepspeed.zero_optimization.stage 2`.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent
IGNORE = -1  # a target that does not count


def git_commit():
    """The commit of this copy of the code, with "-dirty" where files were changed, or None."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # a container without git
        return None


class UserError(Exception):
    """Bad input. The message is the whole line the user sees: where, what was found, what was
    expected, and the remedy. Commands print it and exit with code 2, without a traceback."""


def key(default, meaning, choices=None, minimum=None, maximum=None, off=None):
    """A configuration key: its default, its meaning with the unit, and the values it may take. off: of the model
    section, the value with which the model is the one without this key (see `switched_on`)."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    metadata = {"meaning": meaning, "choices": choices, "minimum": minimum, "maximum": maximum, "off": off}
    return field(**factory, metadata=metadata)


@dataclass
class ModelConfig:
    n_layer: int = key(12, "transformer blocks", minimum=1)
    n_head: int = key(12, "query heads of each attention", minimum=1)
    n_kv_head: int | None = key(None, "key and value heads, shared by groups of query heads; null: n_head", minimum=1)
    n_embd: int = key(768, "width of the residual stream", minimum=1)
    block_size: int = key(1024, "context length in tokens", minimum=1)
    vocab_size: int = key(50257, "number of token ids", minimum=1)
    mlp_hidden: int | None = key(
        None, "hidden width of the MLP; null: 4 n_embd (gelu), 8/3 n_embd up to a multiple of 64 (swiglu)", minimum=1
    )
    dropout: float = key(0.0, "probability of dropping an activation", minimum=0)
    bias: bool = key(True, "biases in the linear layers and layer norms")
    norm: str = key("layernorm", "normalisation in front of each sub-layer", ["layernorm", "rmsnorm"])
    norm_eps: float = key(1e-5, "what the norms add to the variance or mean square before its root", minimum=0)
    position: str = key("learned", "how a token knows its position", ["learned", "rotary"])
    rotary_theta: float = key(10000.0, "base of the rotary wavelengths", minimum=1)
    mlp: str = key("gelu", "activation of the MLP", ["gelu", "swiglu"])
    tie_embeddings: bool = key(True, "the output layer shares the token embedding's weights")
    init_std: float = key(0.02, "standard deviation of the initial weights", minimum=0)

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
        if self.dropout >= 1:
            raise UserError(f"model.dropout: found {self.dropout}, expected a probability below 1")

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

    @property
    def weights(self):
        """{folder: weight}, also of a single folder."""
        return data_weights(self.path)

    def check(self):
        weights = self.weights
        if not weights or "" in weights:
            raise UserError("data.path: found no folder, expected a folder or {folder: weight}")
        for folder, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise UserError(f"data.path: {folder}: found weight {json.dumps(weight)}, expected a number above 0")


@dataclass
class TrainConfig:
    out_dir: str | None = key(None, "folder of the run; null: out/<name of the config file>")
    seed: int = key(1337, "of the initial weights, the data order and dropout", minimum=0, maximum=2**62)
    precision: str = key(
        "auto", "auto: bf16 on GPUs that have it, else fp16; fp32 on CPU", ["auto", "bf16", "fp16", "fp32"]
    )
    micro_batch_size: int = key(8, "sequences one rank takes at a time", minimum=1)
    global_batch_tokens: int = key(524288, "tokens of one optimizer step, over all ranks", minimum=1)
    max_tokens: int = key(10_000_000_000, "length of the run in tokens", minimum=1)
    warmup_tokens: int = key(0, "tokens over which the learning rate rises from zero", minimum=0)
    lr: float = key(6e-4, "peak learning rate", minimum=0)
    min_lr_ratio: float = key(0.1, "last learning rate over the peak", minimum=0, maximum=1)
    schedule: str = key("cosine", "fall of the learning rate after warm-up", ["cosine", "linear", "constant"])
    weight_decay: float = key(0.1, "AdamW's decay, on matrices only", minimum=0)
    betas: list[float] = key([0.9, 0.95], "AdamW's decay rates of its two moments")
    eps: float = key(1e-8, "AdamW's epsilon", minimum=0)
    grad_clip: float = key(1.0, "largest global norm of the gradient; 0: no clipping", minimum=0)
    activation_checkpointing: bool | int = key(
        False, "recompute blocks in the backward pass, for less memory: true: every block; k: every k-th", minimum=0
    )
    checkpoints_on_cpu: bool = key(False, "keep the inputs of recomputed blocks in CPU memory")
    kernels: str = key(
        "auto", "norms and Adam: NVIDIA Apex's where it is installed on a GPU, else torch's", ["auto", "apex", "torch"]
    )
    compile: bool | str = key("auto", "torch.compile the blocks and the loss; auto: on GPUs", [True, False, "auto"])
    log_every: int = key(10, "optimizer steps between two lines of metrics", minimum=1)
    eval_every: int = key(1000, "optimizer steps between two evaluations; 0: only at the end", minimum=0)
    eval_tokens: int = key(1_048_576, "validation tokens of one evaluation, the same each time", minimum=1)
    save_every: int = key(1000, "optimizer steps between two checkpoints; 0: only at the end", minimum=0)
    save_every_seconds: float = key(0.0, "also save when the last checkpoint is that old; 0: never", minimum=0)
    save_in_background: bool = key(False, "copy to the CPU's memory and write while training goes on")
    save_best: bool = key(True, "also save when the validation loss is the lowest so far")
    keep_checkpoints: int = key(2, "newest checkpoints kept, besides the best", minimum=1)
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
        "a step with a NaN, an infinity or a spike: pass over it; end the run; load the last checkpoint and go on "
        "behind it",
        ["skip", "stop", "rollback"],
    )
    spike_zscore: float = key(
        0.0,
        "standard deviations above the last 128 good steps that make a loss or gradient norm a spike; 0: none",
        minimum=0,
    )
    max_bad_steps: int = key(10, "bad steps in a row that end the run", minimum=1)
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
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.betas: found {self.betas}, expected two numbers from 0 up to, not including, 1")
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

# DeepSpeed's keys that follow from ours; two places for one fact would let them disagree.
OURS = {
    "train_batch_size": "train.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_tokens",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule",
    "steps_per_print": "train.log_every",
}


# The other names that DeepSpeed 0.19.8 reads at the top of its configuration; it passes over unknown ones in silence.
DEEPSPEED_KEYS = set(
    "activation_checkpointing aio amp autotuning bf16 checkpoint comet comms_logger communication_data_type "
    "compile compression_training csv_monitor curriculum_learning data_efficiency data_types "
    "dataloader_drop_last disable_allgather disable_python_gc dump_state elasticity expert_parallel "
    "flops_profiler fp16 gradient_allreduce_op gradient_predivide_factor hybrid_engine legacy_fusion log_level "
    "memory_breakdown nebula pipeline prescale_gradients progressive_layer_drop "
    "seq_parallel_communication_data_type sparse_gradients tensor_parallel tensorboard timers torch_autocast "
    "use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization".split()
)


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


def offload_section(zero, what):
    """`offload_optimizer` or `offload_param` of DeepSpeed's zero_optimization section. Raises UserError."""
    section = zero.get(what) or {}
    if not isinstance(section, dict):
        key = f"deepspeed.zero_optimization.{what}"
        raise UserError(f'{key}: found {json.dumps(section)}, expected an object, as {{"device": "cpu"}}')
    return section


def offload_device(zero, what):
    """Where `offload_optimizer` or `offload_param` is kept: none (on the GPU), cpu or nvme."""
    return offload_section(zero, what).get("device", "none")


def offload_ratio(zero):
    """Which part of an offloaded optimizer leaves the GPU."""
    return offload_section(zero, "offload_optimizer").get("ratio", 1.0)


def offloads_optimizer(deepspeed):
    """Whether a DeepSpeed configuration keeps the optimizer's state in CPU memory or on NVMe."""
    return offload_device(deepspeed.get("zero_optimization", {}), "offload_optimizer") != "none"


def nearest_divisors(number, wanted):
    """The two divisors of `number` nearest to `wanted`, for error messages."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    return " or ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:2]))


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


def convert(where, value, expected, meta):
    """Return `value` as the type `expected`, or raise UserError. Whole floats count as integers, so
    that lengths can be written 1e9."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    option = next((option for option in options if fits(value, option)), None)
    if option is None:
        raise UserError(f"{where}: found {json.dumps(value)}, expected {type_name(expected)} ({meta['meaning']})")
    if value is None:
        return None
    if option in (int, float):
        value = option(value)
    elif option == list[float]:
        value = [float(one) for one in value]
    for one in value if isinstance(value, list) else [value]:
        if meta["choices"] and one not in meta["choices"]:
            names = ", ".join(str(choice).lower() for choice in meta["choices"])
            raise UserError(f"{where}: found {json.dumps(one)}, expected one of {names}")
        if isinstance(one, float) and not math.isfinite(one):  # JSON as Python reads it can hold NaN and Infinity
            raise UserError(f"{where}: found {json.dumps(one)}, expected a finite number ({meta['meaning']})")
    if meta["minimum"] is not None and value < meta["minimum"]:
        raise UserError(f"{where}: found {value}, expected at least {meta['minimum']} ({meta['meaning']})")
    if meta["maximum"] is not None and value > meta["maximum"]:
        raise UserError(f"{where}: found {value}, expected at most {meta['maximum']} ({meta['meaning']})")
    return value


def build(values, source):
    """Nested dictionaries -> Config, every key and type checked.

    `source` names the file or the command line in error messages. Raises UserError."""
    config = Config()
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a JSON object with the sections model, data, train, deepspeed")
    for section, content in values.items():
        if section not in (*SECTIONS, "deepspeed"):
            raise UserError(f"{source}: unknown section {section!r}; {where_it_belongs(section)}")
        if not isinstance(content, dict):
            raise UserError(f"{source}: section {section!r} must be a JSON object, found {json.dumps(content)[:60]}")
        if section == "deepspeed":
            for name in content:
                if name in OURS:
                    raise UserError(f"{source}: deepspeed.{name} follows from {OURS[name]}; set that and remove this")
                if name not in DEEPSPEED_KEYS:
                    raise UserError(f"{source}: unknown key deepspeed.{name}; {did_you_mean(name, DEEPSPEED_KEYS)}")
                if name in ("bf16", "comms_logger", "fp16", "zero_optimization") and not isinstance(
                    content[name], dict
                ):
                    raise UserError(
                        f"{source}: deepspeed.{name}: found {json.dumps(content[name])}, expected an object"
                    )
                if name in ("bf16", "fp16") and "enabled" in content[name]:
                    raise UserError(f"{source}: deepspeed.{name}.enabled follows from train.precision; set that")
            config.deepspeed = content
            continue
        fields = {f.name: f for f in dataclasses.fields(SECTIONS[section])}
        for name, value in content.items():
            if name not in fields:
                raise UserError(f"{source}: unknown key {section}.{name}; {where_it_belongs(name, section)}")
            where = f"{source}: {section}.{name}"
            setattr(
                getattr(config, section), name, convert(where, value, fields[name].type, dict(fields[name].metadata))
            )
    try:
        config.model.check()
        config.data.check()
        config.train.check()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return config


def nearest_file(path):
    """What to say of a config file that is not there: the nearest name of its folder and of configs/, or all."""
    ours = ROOT / "configs"
    there = {file.stem: file for folder in (ours, path.parent) for file in sorted(folder.glob("*.json"))}
    close = difflib.get_close_matches(path.stem, there, n=1, cutoff=0.5)
    if not close:
        return f"; configs holds {', '.join(sorted(file.name for file in ours.glob('*.json')))}"
    file = there[close[0]]
    return f"; did you mean {os.path.relpath(file) if file.is_relative_to(Path.cwd()) else file}?"


def read_json(path):
    """The content of a JSON file. Raises UserError that names the file, line and column."""

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


def merge(base, over):
    """`over` laid over `base`, section by section; both stay as they are."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        both = both and name != "path"  # a mixture of data sets is one value
        merged[name] = merge(merged[name], value) if both else value
    return merged


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
        if known.get(path[0]) in (str, str | None, str | dict) and value is not None and not isinstance(value, dict):
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
            facts = [type_name(f.type)]
            if f.metadata["choices"]:
                several = "list of " if typing.get_origin(f.type) is list else ""
                facts = [several + " | ".join(str(choice).lower() for choice in f.metadata["choices"])]
            for word in ("minimum", "maximum"):
                if f.metadata[word] is not None:
                    facts.append(f"at {'least' if word == 'minimum' else 'most'} {f.metadata[word]}")
            text = f"{f.metadata['meaning']} ({', '.join(facts)}; default {json.dumps(default)})"
            name = f"  --{section}.{f.name}"
            lines += textwrap.wrap(text, 118, initial_indent=f"{name:36} ", subsequent_indent=" " * 37)
    lines += [
        "",
        "deepspeed:",
        "  --deepspeed.KEY[.KEY ...]            DeepSpeed's own keys, merged over ds_config.json",
    ]
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
    path = Path(rest[0]) if rest else ROOT / default
    if not path.exists():
        raise UserError(f"{path}: no such file{nearest_file(path)}")
    values = read_json(path)
    build(values, path)  # so that an error in the file names the file
    config = build(merge(values, overrides), "command line")
    config.deepspeed = merge(read_json(ROOT / "ds_config.json"), config.deepspeed)
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
        divisors = nearest_divisors(sequences // world_size, train.micro_batch_size)
        remedy += f", or train.micro_batch_size to {divisors}"
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


def run_command(function, arguments=None):
    """Run a command's main; turn UserError into one line on stderr and exit code 2.

    Mostly every rank finds the same fault, and one line is enough: the others leave the word to rank 0,
    whose exit makes the launcher end them. A rank that nobody ends is alone with its fault and says so."""
    rank = int(os.environ.get("RANK", 0))
    try:
        function(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        where = f"rank {rank}: " if rank else ""
        print(f"{Path(sys.argv[0]).name}: {where}error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
