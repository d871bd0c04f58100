"""A model in transformers' format, ours or published: its config.json as a ModelConfig, and its weights as ours."""

import dataclasses
import json
import re
from pathlib import Path

import torch

from minzero.config.build import build
from minzero.config.sections import ModelConfig
from minzero.config.values import in_short
from minzero.errors import UserError, describe
from minzero.files import from_hub, read_json, refuse_pipes
from minzero.hf.comparison import check_expressible
from minzero.hf.families import ALIASES, FAMILIES, HEAD, family_of
from minzero.hf.settings import explicit
from minzero.hf.weights import from_transformers, to_transformers, weightless

# keys of training, and of export: the trained model computes the same with any value
KEYS_OF_TRAINING = {"dropout", "init_std", "family", "balance_loss", "balance_over", "router_z_loss"}
# in old files; computed, not learned
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def is_published(folder):
    """Whether a folder is in transformers' format, as far as its config.json tells. Raises UserError if that cannot be
    read and is not a run's, which does not need it."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return False
    try:
        raw = read_json(folder / "config.json")
    except UserError:
        if (folder / "checkpoints").is_dir():
            return False
        raise
    return isinstance(raw, dict) and "model_type" in raw


# -- settings ------------------------------------------------------------------------------------


# Settings that change nothing of what a model computes in evaluation, or that other checks look at.
HARMLESS = set(
    "architectures model_type torch_dtype dtype transformers_version use_cache pretraining_tp initializer_range "
    "bos_token_id eos_token_id pad_token_id sep_token_id max_window_layers no_rope_layer_interval rope_theta "
    "rope_scaling rope_parameters rotary_emb_base rotary_pct partial_rotary_factor n_ctx reorder_and_upcast_attn "
    "task_specific_params attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop "
    "gradient_checkpointing output_router_logits is_llama_config transformers.js_config unsloth_version "
    "unsloth_fixed model_max_length tokenizer_class id2label label2id problem_type return_dict output_attentions "
    "output_hidden_states finetuning_task keys_to_ignore_at_inference name_or_path".split()
)


def read_model_config(folder):
    """config.json of a folder in transformers' format -> the ModelConfig that computes the same. Raises
    UserError if none does."""
    from transformers import AutoConfig

    path = folder / "config.json"
    raw = read_json(path)
    name = raw["model_type"]
    if name not in list(FAMILIES):  # a list, as JSON can hold what has no hash
        raise UserError(f"{path}: model_type: found {name!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    try:
        theirs = AutoConfig.for_model(**raw)  # fills in what is left out
        keys = family.read(theirs)
    except Exception as error:  # of many classes, some of them libraries' own
        raise UserError(f"{path}: not a configuration of {name}: {describe(error)}") from None
    model = build_model(path, keys)
    if family.is_rotary:
        check_old_rotary_settings(path, raw, theirs)
    expected = {"quantization_config": None} | family.written(model)
    for setting, value in expected.items():
        found = getattr(theirs, setting, None)
        if setting == family.activation:
            found = ALIASES.get(found, found)
        if setting == "rope_parameters":
            found = {part: found[part] for part in found if part != "type"}
        if setting == "n_inner" and found is None:  # as GPT-2 itself is published
            found = 4 * theirs.n_embd
        if setting == "head_dim" and found is None:  # as Mixtral is published
            found = theirs.hidden_size // theirs.num_attention_heads
        if found != value:
            raise UserError(f"{path}: {setting}: found {found!r}, expected {value!r}; model.py computes nothing else")
    refuse_unknown_settings(path, raw, theirs, HARMLESS | expected.keys() | set(family.unused))
    if family_of(model) != name:
        model = dataclasses.replace(model, family=name)
    return explicit(model)


def build_model(path, keys):
    """The keys of a model section, read from `path`, as a ModelConfig. Raises UserError for values that it has not."""
    try:
        return build({"model": keys}, path).model
    except UserError as error:
        raise UserError(f"{error}; model.py computes nothing else") from None


def refuse_unknown_settings(path, raw, theirs, known):
    """Raises UserError for a setting of a config.json that is neither known here nor to its architecture, unless it
    reads as off, and for one that its architecture knows with another value than the architecture's own."""
    if raw.get("is_causal") not in (None, True):  # read wherever it stands, and true where it does not
        raise UserError(
            f"{path}: is_causal: found {in_short(raw['is_causal'])}, expected true; model.py sees no future"
        )
    default = type(theirs)()
    for name, other in theirs.attribute_map.items():  # two names of one setting
        known |= {name, other} if {name, other} & known else set()
        if name in raw and other in raw and raw[name] != raw[other]:
            raise UserError(
                f"{path}: {name}: found {in_short(raw[name])}, expected {in_short(raw[other])} as in {other}; they are "
                "two names of one setting, so make them equal"
            )
    for name, value in raw.items():
        if name in known or name.startswith(("_", "summary_")) or value is None:
            continue
        if not hasattr(default, name):
            if value in (False, [], {}):
                continue
            raise UserError(
                f"{path}: {name}: found {in_short(value)}, a setting that is not known; remove it if it changes nothing"
            )
        if getattr(theirs, name) != getattr(default, name):
            expected = in_short(getattr(default, name))
            raise UserError(
                f"{path}: {name}: found {in_short(value)}, expected {expected}; model.py computes nothing else"
            )


def check_old_rotary_settings(path, raw, theirs):
    """Raises UserError if the names of transformers 4, which does not read rope_parameters, say something else."""
    new = raw.get("rope_parameters")
    theta = float(theirs.rope_parameters["rope_theta"])
    for name in ("rope_theta", "rotary_emb_base"):
        if raw.get(name) not in (None, theta):
            raise UserError(
                f"{path}: {name}: found {raw[name]!r}, expected {theta!r} as in rope_parameters; versions of "
                "transformers read one or the other, so make them equal"
            )
    old = raw.get("rope_scaling")
    if isinstance(new, dict) and isinstance(old, dict):
        different = [name for name in old if name != "type" and old[name] != new.get(name, ...)]
        if different:
            raise UserError(
                f"{path}: rope_scaling: found {in_short(old)}, expected rope_parameters' {in_short(new)}; "
                "versions of transformers read one or the other, so make them equal"
            )


def names_of(model):
    """The keys of the model section."""
    return [field.name for field in dataclasses.fields(model)]


def refuse_differences(source, model: ModelConfig, saved: ModelConfig):
    """Raises UserError with every key in which `model` is not the saved one, and the flags that set it right.
    Keys of training do not count, nor does the base of rotary positions where there are none."""
    ignored = KEYS_OF_TRAINING | {"block_size"}
    if saved.position != "rotary":
        ignored |= {name for name in names_of(model) if name.startswith("rotary_")} | {"no_rotary_layers"}
    names = [name for name in names_of(model) if name not in ignored]
    ours, theirs = explicit(model), explicit(saved)
    triples = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    triples = [triple for triple in triples if triple[1] != triple[2]]
    if model.block_size > saved.block_size:  # fewer positions than it learned are the same model
        triples.append(("block_size", model.block_size, saved.block_size))
    if not triples:
        return
    keys, flags = [], []
    for name, *values in triples:
        found, expected = (value if isinstance(value, str) else json.dumps(value) for value in values)
        keys.append(f"model.{name}: {found}, expected {expected}")
        flags.append(f"--model.{name} {expected}")
    raise UserError(f"{source}: {'; '.join(keys)}; set {' '.join(flags)}")


def refuse_other_model(folder, model: ModelConfig, published: ModelConfig):
    """`refuse_differences` from the model of a folder in transformers' format."""
    if FAMILIES[family_of(published)].always_biased:  # no biases are biases of zero, which check_tensors looks for
        published = dataclasses.replace(published, bias=model.bias)
    refuse_differences(folder, model, published)


# -- weights -------------------------------------------------------------------------------------


def files_of(folder):
    """The names of the files that hold the weights. Raises UserError if they are not named or not safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(map(str, read_json(index)["weight_map"].values())))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: no weight_map of names to files; copy the folder again") from None
        if odd := next((name for name in files if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name)), None):
            raise UserError(f"{index}: found the file name {odd[:100]!r}, expected one in the same folder")
        return files
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    remedy = "copy the folder again"
    if list(folder.glob("*.bin")):
        remedy = "convert its .bin files: transformers' from_pretrained loads them, save_pretrained writes these"
    raise UserError(f"{folder}: found no model.safetensors, nor an index of its parts; {remedy}")


def open_tensors(folder, family):
    """A folder in transformers' format -> {name: (open file, its path, the name there)}; no tensor is
    read yet. family: an entry of FAMILIES. Raises UserError if a file is missing or broken."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in (folder / file for file in files_of(folder)):
        try:
            if not path.is_file():  # links are followed: a download of the hub has them
                raise OSError("no such file, or not a plain one")
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}; copy the file again") from None
        for stored in sorted(file.keys()):
            if stored.endswith(BUFFERS):
                continue
            name = HEAD if stored == family.head_in_files else stored
            if not name.startswith((family.prefix, "lm_head.")):  # GPT-2 itself is published without
                name = family.prefix + name
            tensors[name] = file, path, stored
    return tensors


def check_tensors(folder, model: ModelConfig, published: ModelConfig, tensors):
    """Raises UserError unless every tensor is there with the right shape and type, and no other.
    tensors: of `open_tensors`; model: the one that is to have the weights of `published`."""
    expected = dict(to_transformers(published, weightless(published).state_dict().__getitem__))
    embedding = next(iter(expected))
    head_is_stored_twice = published.tie_embeddings and HEAD in tensors  # as some files have it
    if head_is_stored_twice:
        expected[HEAD] = expected[embedding]
    for name, (file, path, stored) in tensors.items():
        if name not in expected:
            raise UserError(f"{path}: found {stored}, which a model of {folder}/config.json does not have")
        part = file.get_slice(stored)
        shape = tuple(expected[name].shape)
        found = tuple(part.get_shape()), part.get_dtype()
        if found[0] != shape or found[1] not in ("F32", "BF16", "F16"):
            raise UserError(f"{path}: {stored}: found shape and type {found}, expected {shape} of F32, BF16 or F16")
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(f"{folder}: no tensor {missing[0]} in its safetensors, expected by its config.json")
    if head_is_stored_twice and not same_rows(tensors[HEAD], tensors[embedding], published.vocab_size):
        raise UserError(f"{folder}: tie_word_embeddings: found true, but {HEAD} is not {embedding}")
    if published.bias and not model.bias:
        for file, path, stored in tensors.values():
            if stored.endswith(".bias") and file.get_tensor(stored).any():
                raise UserError(
                    f"{path}: model.bias: false, expected true, as {stored} is not 0; set --model.bias true"
                )


def same_rows(first, second, rows):
    """Whether two tensors of `open_tensors` are equal, compared some rows at a time."""
    one, two = (file.get_slice(stored) for file, _, stored in (first, second))
    return all(torch.equal(one[row : row + 4096], two[row : row + 4096]) for row in range(0, rows, 4096))


def open_published(folder, model: ModelConfig | None = None):
    """A folder in transformers' format -> (a description, the ModelConfig that computes the same, a function load()
    that gives read(name of a parameter of ours)). model: the one that is to have its weights, if that is another.
    Reads no weights yet, but has checked everything that could be wrong: raises UserError."""
    folder = Path(folder)
    refuse_pipes(folder)
    published = read_model_config(folder)
    family = FAMILIES[family_of(published)]
    check_expressible(published)
    if model:
        refuse_other_model(folder, model, published)
    target = model or published
    tensors = open_tensors(folder, family)
    check_tensors(folder, target, published, tensors)

    def read(name):
        file, _, stored = tensors[name]
        return file.get_tensor(stored)

    return f"{folder} ({family.architecture})", published, lambda: from_transformers(target, read)


def local_folder(source, weights=True):
    """The folder that `source` names; a name of the Hugging Face hub is downloaded, without weights its config.json
    alone. Raises UserError."""
    if Path(source).is_dir():
        return Path(source)
    patterns = ["config.json"]
    if weights:
        patterns += ["model*.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    return from_hub("train.init_from", source, patterns)
