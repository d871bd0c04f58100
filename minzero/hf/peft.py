"""Adapters in PEFT's format (github.com/huggingface/peft): adapter_config.json and adapter_model.safetensors."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minzero import adapters
from minzero.adapters import CONFIG
from minzero.config.sections import LoraConfig, ModelConfig
from minzero.config.values import in_short
from minzero.data.meta import read_object
from minzero.errors import UserError
from minzero.files import write_json
from minzero.hf.comparison import check_expressible
from minzero.hf.families import FAMILIES, family_of
from minzero.hf.weights import rearrangements
from minzero.hf.write import check_new_folder, written_whole

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of adapter_config.json that do not change what a trained adapter computes, or that are seen in its weights.
# Any other, of PEFT's now or later, must be off: none, false, empty or "none".
NO_MATTER = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
NO_MATTER |= {"target_modules", "exclude_modules", "layers_pattern", "fan_in_fan_out", "lora_dropout", "megatron_core"}
NO_MATTER |= {"qalora_group_size", "runtime_config", "ensure_weight_tying"}
NO_MATTER |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # of ways to begin, which are:
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base when it is loaded
DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's, of what is left out


def their_modules(model: ModelConfig, matrix):
    """The names of transformers' modules that a matrix of ours is, with {} for the layer."""
    return FAMILIES[family_of(model)].modules[f"blocks.{{}}.{adapters.MODULES[matrix]}"]


def target_modules(model: ModelConfig, config: LoraConfig):
    """The names by which PEFT finds the matrices: as self_attn.q_proj."""
    theirs = [name for matrix in config.matrices for name in their_modules(model, matrix)]
    return [".".join(name.split(".")[-2:]) for name in theirs]


def parts_of(model: ModelConfig, config: LoraConfig):
    """Yields, for each adapter of PEFT's: the names of its A and B, ours, their shapes, and two functions that bring
    the rows of B from our order to theirs and back."""
    prefix = PREFIX + FAMILIES[family_of(model)].prefix
    shapes = adapters.adapter_shapes(model, config)
    for layer in range(model.n_layer):
        for matrix in config.matrices:
            module = f"blocks.{layer}.{adapters.MODULES[matrix]}"
            there, back = rearrangements(f"{module}.bias", model)  # what is done to rows
            for part, name in enumerate(their_modules(model, matrix)):
                theirs = [f"{prefix}{name.format(layer)}.lora_{kind}.weight" for kind in "AB"]
                ours = [f"{module}{adapters.MARK}{kind}.{part}.weight" for kind in "ab"]
                yield theirs, ours, [shapes[name] for name in ours], there, back


def write_adapter(source, folder, dtype="float32"):
    """Write the adapters of a run as a folder that PEFT loads, which must not be there yet, or be empty. source: of
    `trained.open_checkpoint`. Returns a description. Raises UserError."""
    model, config = source.model, source.config.lora
    check_expressible(model)
    folder = Path(folder).resolve()
    temporary = folder.with_name(folder.name + ".tmp")
    check_new_folder(folder, temporary)
    read = source.load_adapters()
    tensors = {}
    for (first, second), (a, b), _, there, _ in parts_of(model, config):
        tensors[first] = read(a).to(getattr(torch, dtype))
        tensors[second] = there(read(b)).to(getattr(torch, dtype)).contiguous()
    base = source.config.train.init_from  # as it was given: often a name on the hub
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": target_modules(model, config),
        "fan_in_fan_out": FAMILIES[family_of(model)].linear_is_transposed,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with written_whole(folder, temporary):
        write_json(temporary / CONFIG, settings)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)  # else nobody but the owner may read it
    return f"PEFT's adapter of rank {config.rank}, {dtype}, for the model in {base}"


def other_base(folder, base):
    """A warning if the adapter in a folder says that it was trained beside another model than `base`, or None. Only the
    names are known: the same model may have two. Raises UserError."""
    trained = read_object(Path(folder) / CONFIG).get("base_model_name_or_path")
    if not trained or trained == base:
        return None
    return f"warning: lora.init_from: {folder} was trained beside {in_short(trained)}; train.init_from is {base}"


def open_adapter(config: LoraConfig, model: ModelConfig):
    """The adapters in the folder lora.init_from -> a function load() that gives read(name of an adapter's parameter).
    Raises UserError if they are not those of lora.rank, alpha and matrices, or cannot be used."""
    folder = Path(config.init_from)
    settings = read_object(folder / CONFIG, "expected the folder of an adapter, as PEFT writes it")
    check_expressible(model)
    for name, found in (DEFAULTS | settings).items():
        if expected := expected_instead(name, found, config):
            raise UserError(f"{folder / CONFIG}: {name}: found {in_short(found)}, expected {expected}")
    file = folder / WEIGHTS
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: could not be read ({error}); expected an adapter's weights") from None
    wanted = {}
    for theirs, _, sizes, *_ in parts_of(model, config):
        wanted |= zip(theirs, sizes, strict=True)
    for name in dict.fromkeys((*wanted, *shapes)):
        if shapes.get(name) != wanted.get(name):
            raise UserError(
                f"{file}: {name}: found {shapes.get(name, 'none')}, expected {wanted.get(name, 'none')} by this model "
                f"and lora.matrices {', '.join(config.matrices)}; set these to those of the adapter"
            )
    return lambda: reader(file, model, config)


def expected_instead(name, found, config: LoraConfig):
    """What a setting of adapter_config.json has to be in place of what was found, with the remedy; None if it is
    right."""
    if name in DEFAULTS:
        key = {"r": "rank", "lora_alpha": "alpha"}[name]
        value = getattr(config, key)
        return None if found == value else f"{in_short(value)}; set lora.{key} to {in_short(found)}"
    if name == "peft_type":
        is_right = found == "LORA"
        expected = '"LORA"'
    elif name == "init_lora_weights":
        is_right = found in BEGINNINGS
        expected = f"one of {', '.join(map(in_short, BEGINNINGS))}"
    else:
        is_right = name in NO_MATTER or not found or found == "none"
        expected = "it to be off"
    return None if is_right else f"{expected}; other adapters are not known here"


def reader(file, model: ModelConfig, config: LoraConfig):
    """read(name of an adapter's parameter) -> its value in float32, made of PEFT's."""
    of_ours = {}
    for (first, second), (a, b), _, _, back in parts_of(model, config):
        of_ours |= {a: (first, lambda weight: weight), b: (second, back)}

    def read(name):
        theirs, back = of_ours[name]
        with safe_open(file, "pt") as opened:
            return back(opened.get_tensor(theirs).float())

    return read
