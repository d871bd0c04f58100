"""Nested dictionaries, as JSON files hold them -> a checked Config."""

import copy

from minzero.config.deepspeed import check_together, checked_section, offload_device, offload_ratio
from minzero.config.hints import suggest_key
from minzero.config.sections import SECTIONS, Config, ModelConfig, Recomputation
from minzero.config.values import convert, in_short, printable
from minzero.errors import UserError


def build(values, source, model=None, together=True):
    """Nested dictionaries -> Config, every key and type checked.

    source: the file or the command line, for error messages. model: the ModelConfig whose keys count where the model
    section leaves them out; None: the defaults. together: also check that the keys go together. Raises UserError with
    all faults in one line."""
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a JSON object with the sections model, data, train, deepspeed")
    config = Config(model=copy.deepcopy(model) if model else ModelConfig())
    faults = []
    for section, content in values.items():
        if section not in (*SECTIONS, "deepspeed"):
            faults.append(f"unknown section {section!r}; {suggest_key(section)}")
        elif not isinstance(content, dict):
            faults.append(f"section {section!r} must be a JSON object, found {in_short(content)}")
        elif section in SECTIONS:
            faults += set_keys(getattr(config, section), section, content)
    if isinstance(values.get("deepspeed"), dict):
        config.deepspeed = checked_section(values["deepspeed"], faults)
    if together and not faults:  # these checks rely on keys that are right one by one
        faults += faults_between_keys(config)
    if faults:
        raise UserError(f"{source}: {'; '.join(faults)}")
    return config


def set_keys(target, section, content):
    """Set the keys of a section's dataclass. Returns a list with a line for each that cannot be set."""
    fields = target.__dataclass_fields__
    faults = []
    for name, value in content.items():
        if name not in fields:
            faults.append(f"unknown key {section}.{printable(name)}; {suggest_key(name, section)}")
            continue
        try:
            setattr(target, name, convert(f"{section}.{name}", value, fields[name].type, fields[name].metadata))
        except UserError as error:
            faults.append(str(error))
    return faults


def faults_between_keys(config):
    """A list with a line for each section whose keys do not go together."""
    faults = []
    for check in (
        config.model.check,
        config.data.check,
        config.train.check,
        lambda: config.lora.check(config.model),
        lambda: check_together(config.deepspeed, config.train.precision),
    ):
        try:
            check()
        except UserError as error:
            faults.append(str(error))
    if not faults:
        faults += faults_of_recomputation(config) + faults_of_optimizer(config)
    return faults


def faults_of_optimizer(config):
    """A list with a line for each setting that Muon or width transfer does not go with."""
    train = config.train
    zero = config.deepspeed.get("zero_optimization", {})
    of_muon, of_mup = f"train.optimizer: found {train.optimizer}", f"train.mup_base_width: found {train.mup_base_width}"
    faults = []
    if train.optimizer == "muon":
        if config.lora.rank:
            faults.append(
                f"{of_muon} with lora.rank {config.lora.rank}: Muon is for whole matrices, not for the two "
                "narrow ones of an adapter; expected adamw"
            )
        if offload_device(zero, "offload_optimizer") == "nvme":
            faults.append(
                f"{of_muon} with deepspeed.zero_optimization.offload_optimizer.device nvme, where DeepSpeed moves "
                "Adam's two moments; expected cpu, none, or train.optimizer adamw"
            )
        if offload_ratio(zero) != 1:
            faults.append(
                f"{of_muon} with deepspeed.zero_optimization.offload_optimizer.ratio {offload_ratio(zero)}, where "
                "DeepSpeed takes an Adam of its own for the rest; expected 1, or train.optimizer adamw"
            )
    if train.mup_base_width is not None:
        if config.model.tie_embeddings:
            faults.append(
                f"{of_mup} with model.tie_embeddings true: the rate of an output layer falls with the width, that of "
                "an embedding does not; set model.tie_embeddings to false"
            )
        if config.lora.rank:
            faults.append(
                f"{of_mup} with lora.rank {config.lora.rank}: it scales the rates of whole matrices; set it to null"
            )
    return faults


def faults_of_recomputation(config):
    """A list with a line for each setting with which recomputation would make wrong gradients."""
    found = f"train.activation_checkpointing: found {in_short(config.train.activation_checkpointing)} with"
    recomputation = Recomputation.of(config.train.activation_checkpointing)
    faults = []
    if recomputation.budget < 1 and config.model.dropout:  # with torch 2.13
        faults.append(
            f"{found} model.dropout {config.model.dropout}, whose gradients would be wrong: the compiler may drop "
            "other activations when it recomputes them; expected true, a number k of blocks, selective, or no dropout"
        )
    linear = config.deepspeed.get("zero_optimization", {}).get("memory_efficient_linear")
    if recomputation.selective and linear is True:
        faults.append(
            f"{found} deepspeed.zero_optimization.memory_efficient_linear true, which adds a bias in place, to a "
            "product that is kept; leave that at auto"
        )
    return faults
