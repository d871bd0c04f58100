"""To and from transformers: GPT-2's settings are its GPT2LMHeadModel, Llama's its LlamaForCausalLM, and GPT-2's
with rotary positions, as min-LLM's, its GPTNeoXForCausalLM.

    python export.py out/tiny hf/tiny [--checkpoint best|latest|STEP] [--dtype float32|bfloat16|float16]

writes a folder that AutoModelForCausalLM and AutoTokenizer load. The way back is `--train.init_from`:
`open_weights` looks at what a run shall start from, `copy_into` reads it into the run's model.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import contextlib
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import torch

from minzero import checkpoint, checkpoint_folder, checkpoint_state
from minzero.commands import run_command
from minzero.config.build import build
from minzero.config.sections import ModelConfig, switched_on
from minzero.data.shards import read_meta
from minzero.errors import UserError
from minzero.files import check_can_write, read_json, refuse_pipe, write_json
from minzero.flags import FlagParser, a_checkpoint, a_path
from model import GPT

MAX_SHARD = "5GB"  # of one file of weights


@dataclasses.dataclass
class Family:
    """An architecture of transformers'. wanted: what a model of ours must be to be one; always_biased: it has
    biases even where the model has none."""

    architecture: str
    wanted: dict
    prefix: str  # of the names of its weights
    always_biased: bool


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", {"position": "learned", "norm": "layernorm", "mlp": "gelu"}, "transformer.", True
    ),
    "llama": Family("LlamaForCausalLM", {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu"}, "model.", False),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", {"position": "rotary", "norm": "layernorm", "mlp": "gelu"}, "gpt_neox.", True
    ),
}
MODULES = [  # ours, and in each family those whose rows make it up, one after the other
    ("token_embedding", "wte", "embed_tokens", "embed_in"),
    ("position_embedding", "wpe", "", ""),
    ("blocks.{}.attention_norm", "h.{}.ln_1", "layers.{}.input_layernorm", "layers.{}.input_layernorm"),
    (
        "blocks.{}.attention.qkv",
        "h.{}.attn.c_attn",
        "layers.{}.self_attn.q_proj layers.{}.self_attn.k_proj layers.{}.self_attn.v_proj",
        "layers.{}.attention.query_key_value",
    ),
    ("blocks.{}.attention.proj", "h.{}.attn.c_proj", "layers.{}.self_attn.o_proj", "layers.{}.attention.dense"),
    ("blocks.{}.mlp_norm", "h.{}.ln_2", *["layers.{}.post_attention_layernorm"] * 2),
    (
        "blocks.{}.mlp.up",
        "h.{}.mlp.c_fc",
        "layers.{}.mlp.gate_proj layers.{}.mlp.up_proj",
        "layers.{}.mlp.dense_h_to_4h",
    ),
    ("blocks.{}.mlp.down", "h.{}.mlp.c_proj", "layers.{}.mlp.down_proj", "layers.{}.mlp.dense_4h_to_h"),
    ("final_norm", "ln_f", "norm", "final_layer_norm"),
]
SETTINGS = [  # keys of our model section, and theirs
    ("n_layer", "n_layer", "num_hidden_layers", "num_hidden_layers"),
    ("n_head", "n_head", "num_attention_heads", "num_attention_heads"),
    ("n_kv_head", "", "num_key_value_heads", ""),
    ("n_embd", "n_embd", "hidden_size", "hidden_size"),
    ("block_size", "n_positions", "max_position_embeddings", "max_position_embeddings"),
    ("vocab_size", "vocab_size", "vocab_size", "vocab_size"),
    ("mlp_hidden", "n_inner", "intermediate_size", "intermediate_size"),
    ("norm_eps", "layer_norm_epsilon", "rms_norm_eps", "layer_norm_eps"),
    ("bias", "", "attention_bias", ""),
    ("tie_embeddings", "tie_word_embeddings", "tie_word_embeddings", "tie_word_embeddings"),
]
# The other keys of our model section that every family takes into account, here or in the functions below. A key that
# a family does not take into account must be switched off, or the model is none of that family.
IN_EVERY_FAMILY = {"n_kv_head", "bias", "dropout", "rotary_theta", "init_std"}
NOT_THE_FUNCTION = {"dropout", "init_std"}  # keys of training: the trained model computes the same with any value
HEAD = "lm_head.weight"
HEAD_IN_FILES = {"gpt_neox": "embed_out.weight"}  # its name in published files, which other libraries look for
# in old files; computed, not learned
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def of_family(table, family):
    """Pairs of our entry and this family's, where it has one."""
    column = 1 + list(FAMILIES).index(family)
    return [(row[0], row[column]) for row in table if row[column]]


# -- the two forms of the weights ----------------------------------------------------------------


def consumed(family):
    """The keys of our model section that a family takes into account."""
    return set(dict(of_family(SETTINGS, family))) | set(FAMILIES[family].wanted) | IN_EVERY_FAMILY


def family_of(model: ModelConfig):
    """`gpt2`, `llama` or `gpt_neox`. Raises UserError, which names the keys, if the model is none of them."""
    wrong = {}  # family: [(key, found, expected)]
    for family, entry in FAMILIES.items():
        pairs = [(key, getattr(model, key), value) for key, value in entry.wanted.items()]
        if "n_kv_head" not in dict(of_family(SETTINGS, family)):
            pairs.append(("n_kv_head", model.kv_heads, model.n_head))
        wrong[family] = [(key, found, value) for key, found, value in pairs if found != value]
        wrong[family] += switched_on(model, consumed(family))
    nearest = min(FAMILIES, key=lambda family: len(wrong[family]))
    if wrong[nearest]:
        keys = "; ".join(f"model.{key}: found {found}, expected {value}" for key, found, value in wrong[nearest])
        raise UserError(
            f"{keys}: transformers' {FAMILIES[nearest].architecture} is the nearest to this model, "
            "and it computes nothing else"
        )
    return nearest


def same(weight):
    return weight


def rearrangements(ours, model: ModelConfig, family):
    """How a weight or bias of ours becomes theirs, and back: two functions. Nothing is permuted for rotary
    positions: in all of these channel i is paired with i + D/2."""
    linear = ours.startswith("blocks") and "norm" not in ours
    if family == "gpt2" and linear and ours.endswith("weight"):  # multiplies from the other side
        return torch.t, torch.t
    if family == "gpt_neox" and ".qkv." in ours:  # ours: all queries, all keys, all values; there: head by head
        size = model.n_embd // model.n_head
        outer = (3, model.n_head)

        def swap(weight, first, second):
            return weight.view(first, second, size, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)

        return (lambda weight: swap(weight, *outer)), (lambda weight: swap(weight, *reversed(outer)))
    return same, same


def correspondence(model: ModelConfig):
    """{name of our weight: transformers' names of the parts that its rows are cut into}, with the biases that
    some families have even where the model has none. A tied output layer is not listed."""
    family, names = family_of(model), {}
    prefix, always_biased = FAMILIES[family].prefix, FAMILIES[family].always_biased
    for pattern, theirs in of_family(MODULES, family):
        in_block, norm = pattern.startswith("blocks"), pattern.endswith("norm")
        has_bias = (in_block or norm) if always_biased else (in_block and not norm and model.bias)
        for layer in range(model.n_layer if in_block else 1):
            parts = [prefix + name.format(layer) for name in theirs.split()]
            for kind in ("weight", "bias") if has_bias else ("weight",):
                names[f"{pattern.format(layer)}.{kind}"] = [f"{name}.{kind}" for name in parts]
    if not model.tie_embeddings:
        names["head.weight"] = [HEAD]
    return names


def to_transformers(model: ModelConfig, read):
    """Yields pairs of transformers' name and tensor, made of what read(our name) gives, and zeros where a family
    has biases and the model has none. Keeps nothing: of our weights one at a time is in memory."""
    family = family_of(model)
    key_width = model.kv_heads * model.n_embd // model.n_head
    for ours, theirs in correspondence(model).items():
        if ours.endswith(".bias") and not model.bias:
            weight = read(ours.removesuffix("bias") + "weight")
            weight = weight.new_zeros(len(weight))
        else:
            weight = read(ours)
        there, _ = rearrangements(ours, model, family)
        rows = [model.n_embd, key_width, key_width] if len(theirs) == 3 else len(weight) // len(theirs)
        yield from zip(theirs, there(weight).split(rows) if len(theirs) > 1 else [there(weight)], strict=True)


def from_transformers(model: ModelConfig, read):
    """A function from the name of a weight of ours to the weight, made of what read(transformers' name) gives."""
    family, names = family_of(model), correspondence(model)

    def make(ours):
        parts = [read(name) for name in names[ours]]
        _, back = rearrangements(ours, model, family)
        return back(torch.cat(parts) if len(parts) > 1 else parts[0])

    return make


@torch.no_grad()
def build_transformers(model: ModelConfig, read):
    """The model as transformers', in float32 in memory, of what read(our name) gives, one weight at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        theirs = AutoModelForCausalLM.from_config(transformers_config(model))
    theirs.tie_weights()
    parameters = dict(theirs.named_parameters())
    for name, tensor in to_transformers(model, read):
        parameters.pop(name).copy_(tensor)
    assert not parameters, f"without a value: {parameters.keys()}"
    return theirs


def own_shapes(model: ModelConfig):
    """{name of a parameter: its shape as a list} of model.py's model."""
    with torch.device("meta"):  # shapes without memory
        return checkpoint.shapes_of(dict(GPT(model).named_parameters()))


def check_parameters(model: ModelConfig):
    """Raises UserError, which names the parameters, unless the model's family has a place for each parameter of
    model.py's model and needs no other."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        theirs = dict(AutoModelForCausalLM.from_config(transformers_config(model)).named_parameters())
    make, expected = from_transformers(model, theirs.get), {}
    for name in correspondence(model):
        if model.bias or not name.endswith(".bias"):  # else it is made of zeros
            expected[name] = list(make(name).shape)
    if wrong := checkpoint.differences(own_shapes(model), expected):
        raise UserError(
            f"model.py: its parameters are not those of transformers' {FAMILIES[family_of(model)].architecture}: "
            f"{wrong}; add them to export.py's tables if that has them"
        )


def smaller(model: ModelConfig):
    """The same settings with small sizes: at most two layers, heads of 8 channels in as many groups as fit."""
    groups = min(2, model.kv_heads)
    heads = groups * model.n_head // model.kv_heads
    sizes = {"n_layer": min(2, model.n_layer), "n_head": heads, "n_kv_head": groups, "n_embd": 8 * heads}
    sizes |= {"block_size": 64, "vocab_size": 64, "mlp_hidden": 40 if model.mlp_hidden else None}
    return dataclasses.replace(model, **sizes, init_std=0.2)


@torch.no_grad()
def check_expressible(model: ModelConfig):
    """Raises UserError unless transformers' model can be the same as model.py's with these settings: every key of the
    model section and every parameter is taken into account, and a small model of these settings with random weights
    gives the same logits. The last finds what has neither a key nor a parameter, such as another activation."""
    check_parameters(model)
    small = smaller(model)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        ours = GPT(small, seed=1).eval()
        for parameter in ours.parameters():
            if parameter.dim() == 1:  # norms of ones and biases of zeros would hide a difference
                parameter.add_(0.3 * torch.randn(parameter.shape))
        tokens = torch.randint(small.vocab_size, (2, small.block_size))
    expected = ours(tokens)
    found = build_transformers(small, ours.state_dict().__getitem__).eval()(tokens).logits
    worst, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not worst <= 1e-4 * scale:
        raise UserError(
            f"model.py: with random weights in a small model of these settings its logits differ by {worst:.2g} of "
            f"{scale:.2g} from those of transformers' {FAMILIES[family_of(model)].architecture}; model.py was changed "
            "in a way that export.py does not know"
        )


# -- the two forms of the settings ---------------------------------------------------------------


def explicit(model: ModelConfig):
    """The same model with its widths in place of null."""
    return dataclasses.replace(model, n_kv_head=model.kv_heads, mlp_hidden=model.mlp_width)


def transformers_config(model: ModelConfig, dtype="float32", end_of_text=None):
    """transformers' configuration of the same model. Raises UserError if it has none."""
    from transformers import AutoConfig

    family = family_of(model)
    settings = {theirs: getattr(explicit(model), ours) for ours, theirs in of_family(SETTINGS, family)}
    rope = {"rope_type": "default", "rope_theta": model.rotary_theta}
    if family == "gpt2":
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)
    elif family == "llama":  # has no dropout but in attention
        settings |= {"mlp_bias": model.bias, "head_dim": model.n_embd // model.n_head, "rope_parameters": rope}
    else:
        settings |= dict.fromkeys(("hidden_dropout", "attention_dropout"), model.dropout)
        settings |= {"hidden_act": "gelu_new", "use_parallel_residual": False}
        settings |= {"rope_parameters": rope | {"partial_rotary_factor": 1.0}}
    settings |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "initializer_range": model.init_std}
    if family != "llama":  # there it would name a row of the embedding that no gradient reaches
        settings["pad_token_id"] = end_of_text
    return AutoConfig.for_model(family, **settings, architectures=[FAMILIES[family].architecture], dtype=dtype)


def in_all_words(theirs):
    """transformers' configuration as config.json holds it: every setting of the architecture, those at their defaults
    too, in the words of transformers 5 and of 4, which other programs read as well (llama.cpp's converter,
    CTranslate2)."""
    from transformers import PreTrainedConfig

    of_any_model = PreTrainedConfig().to_dict()
    found = {name: value for name, value in theirs.to_dict().items() if value != of_any_model.get(name, ...)}
    found |= {"torch_dtype": found["dtype"], "tie_word_embeddings": theirs.tie_word_embeddings}
    found["transformers_version"] = of_any_model["transformers_version"]
    found |= {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if theirs.model_type == "gpt2":
        found["n_ctx"] = theirs.n_positions
    else:
        found |= {"rope_theta": theirs.rope_parameters["rope_theta"], "rope_scaling": None}
    if theirs.model_type == "gpt_neox":
        part = theirs.rope_parameters["partial_rotary_factor"]
        found |= {"rotary_pct": part, "partial_rotary_factor": part, "rotary_emb_base": found["rope_theta"]}
    return found


def generation_settings(end_of_text):
    """generation_config.json, in words that transformers 4 and 5 share."""
    if end_of_text is None:
        return {}
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text) | {"do_sample": False}


def published_model(folder):
    """config.json of a folder in transformers' format -> the ModelConfig that computes the same. Raises
    UserError if none does."""
    from transformers import AutoConfig

    path = folder / "config.json"
    raw = read_json(path)
    family = raw["model_type"]
    if family not in list(FAMILIES):  # a list, as JSON can hold what has no hash
        raise UserError(f"{path}: model_type: found {family!r}, expected {' or '.join(FAMILIES)}")
    try:
        theirs = AutoConfig.for_model(**raw)  # fills in what is left out
        theta = None if family == "gpt2" else float(theirs.rope_parameters["rope_theta"])
    except Exception as error:  # of many classes, some of them libraries' own
        raise UserError(f"{path}: not a configuration of {family}: {' '.join(str(error).split())}") from None
    settings = {ours: getattr(theirs, name) for ours, name in of_family(SETTINGS, family)} | FAMILIES[family].wanted
    settings |= {"rotary_theta": theta} if theta is not None else {}
    rope = {"rope_type": "default", "rope_theta": theta}
    for name in ("rope_theta", "rotary_emb_base"):  # of transformers 4, which does not read rope_parameters
        if theta is not None and raw.get(name) not in (None, theta):
            raise UserError(
                f"{path}: {name}: found {raw[name]!r}, expected {theta!r} as in rope_parameters; versions of "
                "transformers read one or the other, so make them equal"
            )
    wanted, activation = {"quantization_config": None}, "activation_function" if family == "gpt2" else "hidden_act"
    if family == "gpt2":
        wanted |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    elif family == "llama":
        wanted |= {"rope_parameters": rope, "mlp_bias": theirs.attention_bias}
        wanted |= {"head_dim": theirs.hidden_size // theirs.num_attention_heads}
    else:
        wanted |= {"use_parallel_residual": False, "attention_bias": True}
        wanted |= {"rope_parameters": rope | {"partial_rotary_factor": 1.0}}
    if getattr(theirs, activation) != "gelu_pytorch_tanh" or family == "llama":  # another name of gelu_new
        wanted |= {activation: "silu" if family == "llama" else "gelu_new"}
    for name, expected in wanted.items():
        found = getattr(theirs, name, None)
        if found != expected:
            raise UserError(f"{path}: {name}: found {found!r}, expected {expected!r}; model.py computes nothing else")
    return explicit(ModelConfig(**settings))


def refuse_differences(source, model: ModelConfig, published: ModelConfig):
    """Raises UserError with every key in which `model` is not the published one, and the flags that set it right.
    Keys of training count for nothing, and so does the base of rotary positions where there are none."""
    passed_over = NOT_THE_FUNCTION | {"block_size"} | (set() if published.position == "rotary" else {"rotary_theta"})
    names = dict.fromkeys([ours for ours, *_ in SETTINGS] + [one.name for one in dataclasses.fields(model)])
    names = [name for name in names if name not in passed_over]
    pairs = [(name, getattr(explicit(model), name), getattr(explicit(published), name)) for name in names]
    pairs = [pair for pair in pairs if pair[1] != pair[2]]
    if model.block_size > published.block_size:  # fewer positions than it learned are the same model
        pairs.append(("block_size", model.block_size, published.block_size))
    if pairs:
        pairs = [(name, *(v if isinstance(v, str) else json.dumps(v) for v in values)) for name, *values in pairs]
        keys = "; ".join(f"model.{name}: {found}, expected {right}" for name, found, right in pairs)
        raise UserError(f"{source}: {keys}; set {' '.join(f'--model.{name} {right}' for name, _, right in pairs)}")


# -- from there: the start of a run --------------------------------------------------------------


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


def open_tensors(folder, family):
    """A folder in transformers' format -> {name: (open file, its path, the name there)}; no tensor is
    read yet. Raises UserError if a file is missing or broken."""
    from safetensors import SafetensorError, safe_open

    index, files, tensors = folder / "model.safetensors.index.json", ["model.safetensors"], {}
    prefix = FAMILIES[family].prefix
    if index.is_file():
        try:
            files = sorted(set(map(str, read_json(index)["weight_map"].values())))
            if odd := next((name for name in files if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name)), None):
                raise UserError(f"{index}: found the file name {odd[:100]!r}, expected one in the same folder")
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: no weight_map of names to files; copy the folder again") from None
    elif not (folder / files[0]).exists():
        remedy = "copy the folder again"
        if list(folder.glob("*.bin")):
            remedy = "convert its .bin files: transformers' from_pretrained loads them, save_pretrained writes these"
        raise UserError(f"{folder}: found no model.safetensors, nor an index of its parts; {remedy}")
    for path in (folder / file for file in files):
        try:
            if not path.is_file():  # links are followed: a download of the hub has them
                raise OSError("no such file, or not a plain one")
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}; copy the file again") from None
        for stored in sorted(file.keys()):
            if not stored.endswith(BUFFERS):
                name = HEAD if stored == HEAD_IN_FILES.get(family) else stored
                if not name.startswith((prefix, "lm_head.")):  # GPT-2 itself is published without
                    name = prefix + name
                tensors[name] = file, path, stored
    return tensors


def read(file, _, stored):
    return file.get_tensor(stored)


def check_tensors(folder, model: ModelConfig, published: ModelConfig, tensors):
    """Every tensor there, of the right shape and type, and none besides. Raises UserError."""
    with torch.device("meta"):  # shapes without memory
        expected = dict(to_transformers(published, GPT(published).state_dict().__getitem__))
    embedding = next(iter(expected))
    if twice := published.tie_embeddings and HEAD in tensors:  # as some files have it
        expected[HEAD] = expected[embedding]
    for name, (file, path, stored) in tensors.items():
        if name not in expected:
            raise UserError(f"{path}: found {stored}, which a model of {folder}/config.json does not have")
        part, right = file.get_slice(stored), tuple(expected[name].shape)
        found = tuple(part.get_shape()), part.get_dtype()
        if found[0] != right or found[1] not in ("F32", "BF16", "F16"):
            raise UserError(f"{path}: {stored}: found shape and type {found}, expected {right} of F32, BF16 or F16")
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(f"{folder}: no tensor {missing[0]} in its safetensors, expected by its config.json")
    if twice:
        one, two = (file.get_slice(stored) for file, _, stored in (tensors[HEAD], tensors[embedding]))
        rows = range(0, published.vocab_size, 4096)
        if not all(torch.equal(one[row : row + 4096], two[row : row + 4096]) for row in rows):
            raise UserError(f"{folder}: tie_word_embeddings: found true, but {HEAD} is not {embedding}")
    if published.bias and not model.bias:
        for file, path, stored in tensors.values():
            if stored.endswith(".bias") and file.get_tensor(stored).any():
                raise UserError(
                    f"{path}: model.bias: false, expected true, as {stored} is not 0; set --model.bias true"
                )


def find_weights(source):
    """The folder that `source` means: its own, or a download from the hub. Raises UserError."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # of many classes: no such name, no network, no permission, no space
        raise UserError(
            f"train.init_from: {source}: no such folder here, and not to be had from the Hugging Face hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); download it, and give its folder"
        ) from None


def open_published(folder, model: ModelConfig | None = None):
    """A folder in transformers' format -> (what it is in words, the ModelConfig that computes the same, a function
    that gives what `copy_into` needs). model: the one that is to have its weights, if that is another. Reads
    no weights yet, but has looked at all that could be wrong: raises UserError."""
    folder = Path(folder)
    for path in sorted(folder.iterdir()):  # transformers and tokenizers, which read them, would wait at a pipe
        if path.suffix in (".json", ".model", ".txt", ".jinja"):
            refuse_pipe(path)
    published = published_model(folder)
    family = family_of(published)
    check_expressible(published)
    if model:
        # no biases are biases of zero, which is for the tensors to say
        like = dataclasses.replace(published, bias=model.bias) if FAMILIES[family].always_biased else published
        refuse_differences(folder, model, like)
    model, tensors = model or published, open_tensors(folder, family)
    check_tensors(folder, model, published, tensors)
    words = f"{folder} ({FAMILIES[family].architecture})"
    return words, published, lambda: from_transformers(model, lambda name: read(*tensors[name]))


def open_weights(source, model: ModelConfig):
    """What `train.init_from` names -> (what it is in words, a function that gives what `copy_into` needs).
    Reads no weights yet, but has looked at all that could be wrong: raises UserError."""
    folder = find_weights(source)
    if is_published(folder):
        words, _, load = open_published(folder, model)
        return words.replace(str(folder), source, 1), load
    if checkpoint_folder.find(folder, "best") is None:
        raise UserError(
            f"train.init_from: {source}: found neither a config.json of transformers' nor a checkpoint; expected one"
        )
    found, saved = checkpoint_folder.reading(folder, "best", lambda found: (found, saved_model(found)))
    refuse_differences(found, model, saved)
    return str(found), lambda: checkpoint.open_weights(found)[2]


@torch.no_grad()
def copy_into(model, load):
    """Give every parameter of `model` the value read(name), where read = load(), from rank 0. Parameter by
    parameter, so that under ZeRO-3 no rank ever holds more than one whole; in the other stages `initialize`
    hands rank 0's on."""
    import deepspeed

    from minzero import dist

    first, fault, read = deepspeed.comm.get_rank() == 0, None, None
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if not first or fault:
                continue  # all ranks gather, whatever rank 0 finds
            try:
                read = read or load()
                parameter.copy_(read(name)[: len(parameter)])  # learned positions past block_size are left out
            except UserError as error:
                fault = error
    with dist.all_or_none():
        if fault:
            raise fault


# -- there: the command --------------------------------------------------------------------------


def saved_model(found):
    """The ModelConfig of a checkpoint, without its weights. Raises UserError if it holds parameters of another."""
    state = checkpoint_state.read_state(found)
    model, parameters = build({"model": state["config"]["model"]}, found / "state.json").model, state["parameters"]
    if model.n_layer > len(parameters):  # which would take long to build
        raise UserError(f"{found}/state.json: {model.n_layer} layers, but {len(parameters)} parameters; use another")
    try:
        expected = own_shapes(model)
    except RuntimeError as error:  # torch's, of sizes that no number holds
        raise UserError(f"{found}/state.json: config.model: {' '.join(str(error).split())[:200]}") from None
    checkpoint.refuse_other_parameters(found, state, expected)
    return model


@contextlib.contextmanager
def written_whole(folder, temporary):
    """Inside, `temporary` is there to write into; afterwards it is `folder`, or is not there at all."""
    from safetensors import SafetensorError

    try:
        temporary.mkdir(parents=True)
        yield
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: could not be written ({error}); fix that and export again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(folder, model: ModelConfig, read, dtype):
    """model.safetensors, or its parts and their index, of what read(our name) gives. Of the weights no more than
    one part in `dtype` and one tensor are in memory."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    in_files = {HEAD: HEAD_IN_FILES.get(family_of(model), HEAD)}
    with torch.device("meta"):  # shapes without memory
        weights = GPT(model).state_dict()
    shapes = {in_files.get(name, name): tensor for name, tensor in to_transformers(model, weights.__getitem__)}
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda tensor: tensor.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    parts, missing = {}, {file: set(names) for file, names in split.filename_to_tensors.items()}
    for name, tensor in to_transformers(model, read):
        stored = in_files.get(name, name)
        file = split.tensor_to_filename[stored]
        if file not in parts:  # made at once, so that what is read in between leaves no holes in memory
            parts[file] = {name: torch.empty(shapes[name].shape, dtype=dtype) for name in missing[file]}
        parts[file][stored].copy_(tensor)
        if parts[file][stored].isinf().any() and not tensor.isinf().any():
            raise UserError(f"--dtype: {name} holds numbers too large for {dtype}; choose bfloat16 or float32")
        missing[file].remove(stored)
        if not missing[file]:
            save_file(parts.pop(file), folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # else nobody but the owner may read it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def export(found, folder, dtype="float32"):
    """A checkpoint -> a folder in transformers' format, which must not be there yet, or be empty. Returns in
    words what it is. Raises UserError."""
    from eval import check_tokenizer
    from minzero.data.conversations import CHAT_TEMPLATE
    from minzero.data.pipeline import tokenizer_of
    from minzero.data.tokenizer import END_OF_TEXT, fingerprint, save_for_transformers
    from minzero.hf.card import write_model_card

    folder = Path(folder).resolve()
    temporary = folder.with_name(folder.name + ".tmp")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: already there, expected a new or an empty folder; choose another")
    if temporary.exists():
        raise UserError(f"{temporary}: left by an export that was killed, or one is under way; remove it")
    model = saved_model(found)  # before the weights are looked at
    check_expressible(model)
    state, config, read = checkpoint.open_weights(found)
    data, tokenizer, end_of_text = sorted(config.data.weights)[0], None, None
    if read_meta(data):
        tokenizer = tokenizer_of(data)
        check_tokenizer(state, data, fingerprint(tokenizer))
        end_of_text = tokenizer._special_tokens.get(END_OF_TEXT)
    theirs = transformers_config(config.model, dtype, end_of_text)
    with written_whole(folder, temporary):
        write_json(temporary / "config.json", in_all_words(theirs))
        write_json(temporary / "generation_config.json", generation_settings(end_of_text))
        if tokenizer:
            parts = tokenizer._mergeable_ranks, tokenizer._special_tokens, tokenizer._pat_str
            more = {"model_max_length": config.model.block_size}
            more |= {"chat_template": CHAT_TEMPLATE} if read_meta(data).get("loss_mask") else {}
            save_for_transformers(temporary, *parts, **more)
        write_weights(temporary, config.model, read, getattr(torch, dtype))
        write_model_card(temporary, found, state, config, dtype)
    words = f"{theirs.architectures[0]}, {dtype}"
    if tokenizer is None:
        words += f"\nwithout tokenizer files: {data} has no meta.json, so the tokenizer is not known"
    return words


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("path", type=a_path, help="a run's folder, as out/tiny, or a checkpoint in it")
    parser.add_argument("folder", type=a_path, help="where to write; must not be there yet, or be empty")
    parser.add_argument("--checkpoint", type=a_checkpoint, default="best", help="best, latest or a step")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args(arguments)
    check_can_write("folder", args.folder, folder=True)

    def write(found):
        return f"{found} -> {args.folder}: {export(found, args.folder, args.dtype)}"

    print(checkpoint_folder.reading(args.path, args.checkpoint, write))


if __name__ == "__main__":
    run_command(main)
