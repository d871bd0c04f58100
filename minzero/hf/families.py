"""The architectures of transformers that a model of ours can be: one row a family, and conversions made of them.

A row says which values of our model section a family computes, how it names its weights and settings, and which
settings have one value here. A new family is an entry of FAMILIES; `check_expressible` then tries it on a small model.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minzero import checkpoint
from minzero.config.sections import ModelConfig, is_chosen, switched_on
from minzero.errors import UserError
from model import GPT

HEAD = "lm_head.weight"


# -- settings that are not one key of ours for one of theirs -----------------------------------------


class Translation(NamedTuple):
    """Keys of our model section and the settings that say the same."""

    keys: tuple  # of ours
    write: Callable  # (ModelConfig) -> {their setting: value}
    read: Callable  # (their configuration) -> {key: value}


def write_rotary(model: ModelConfig):
    scaling = model.rotary_scaling or {"rope_type": "default"}
    return {"rope_parameters": scaling | {"rope_theta": model.rotary_theta}}


def read_rotary(theirs):
    rope = dict(theirs.rope_parameters)
    keys = {"rotary_theta": float(rope.pop("rope_theta"))}
    rope.pop("partial_rotary_factor", None)
    rope.pop("type", None)  # an older name of rope_type
    keys["rotary_scaling"] = None if rope == {"rope_type": "default"} else rope
    return keys


def write_partial_rotary(model: ModelConfig):
    rope = write_rotary(model)["rope_parameters"]
    return {"rope_parameters": rope | {"partial_rotary_factor": model.rotary_fraction}}


def read_partial_rotary(theirs):
    return read_rotary(theirs) | {"rotary_fraction": theirs.rope_parameters.get("partial_rotary_factor", 1.0)}


def write_head_dim(model: ModelConfig):
    return {"head_dim": model.head_size}


def read_head_dim(theirs):
    """null where it says nothing, so that another n_head or n_embd changes it."""
    implied = theirs.hidden_size / theirs.num_attention_heads
    size = getattr(theirs, "head_dim", None)
    return {"head_dim": None if size in (None, implied) else size}


def chosen(layers, n_layer):
    """A list of layers as our keys have it: k for every k-th, a list for others, None for none of them."""
    every = layers[0] + 1 if layers else None
    if layers and layers == list(range(every - 1, n_layer, every)):
        return every
    return layers or None


def write_layer_windows(model: ModelConfig):
    windows = [model.window(layer) for layer in range(model.n_layer)]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    sliding = any(windows)
    return {"layer_types": kinds, "use_sliding_window": sliding, "sliding_window": model.sliding_window or None}


def read_layer_windows(theirs):
    window = theirs.sliding_window if theirs.use_sliding_window else None
    full = [layer for layer, kind in enumerate(theirs.layer_types) if kind == "full_attention"]
    if window is None or len(full) == theirs.num_hidden_layers:
        return {"sliding_window": None, "full_attention_layers": None}
    return {"sliding_window": window, "full_attention_layers": chosen(full, theirs.num_hidden_layers)}


def write_rotary_layers(model: ModelConfig):
    turns = [int(model.turns(layer)) for layer in range(model.n_layer)]
    return {"no_rope_layers": turns, "layer_types": ["full_attention"] * model.n_layer}


def read_rotary_layers(theirs):
    without = [layer for layer, turns in enumerate(theirs.no_rope_layers[: theirs.num_hidden_layers]) if not turns]
    return {"no_rotary_layers": chosen(without, theirs.num_hidden_layers)}


ROTARY = Translation(("rotary_theta", "rotary_scaling"), write_rotary, read_rotary)
PARTIAL_ROTARY = Translation((*ROTARY.keys, "rotary_fraction"), write_partial_rotary, read_partial_rotary)
HEAD_DIM = Translation(("head_dim",), write_head_dim, read_head_dim)
LAYER_WINDOWS = Translation(("sliding_window", "full_attention_layers"), write_layer_windows, read_layer_windows)
ROTARY_LAYERS = Translation(("no_rotary_layers",), write_rotary_layers, read_rotary_layers)
# biases of attention's and of the MLP's products are one key of ours
LINEAR_BIASES = Translation(("bias",), lambda model: {"mlp_bias": model.bias}, lambda theirs: {})


def old_rotary(theirs):
    """The rotary settings under the names of transformers 4."""
    rope = dict(theirs.rope_parameters)
    theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    found = {"rope_theta": theta, "rope_scaling": None if rope == {"rope_type": "default"} else rope}
    if part is not None:
        found |= {"rotary_pct": part, "partial_rotary_factor": part, "rotary_emb_base": theta}
    return found


def old_with_experts(theirs):
    return old_rotary(theirs) | {"num_experts": theirs.num_experts}


# -- the families ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """An architecture of transformers and how it names and stores what model.py has."""

    architecture: str
    required: dict  # key (or property) of ModelConfig: the value, or a tuple of those, that this family computes
    activations: dict  # our mlp: their activation
    prefix: str  # of the names of its weights
    modules: dict  # our module: theirs; where there are several, ours is their rows joined
    settings: dict  # key of our model section: theirs
    fixed: dict  # settings with the one value that model.py computes
    translations: tuple = ()
    old_settings: Callable = lambda theirs: {}  # (their configuration) -> settings under the names of transformers 4
    activation: str = "hidden_act"  # the name of the setting
    dropout: tuple = ()  # the names of the settings that are our dropout
    always_biased: bool = False  # has biases even where the model has none
    has_pad_token: bool = True
    has_experts: bool = False
    unused: tuple = ()  # settings that it has and never reads with the fixed ones
    linear_is_transposed: bool = False  # a linear weight is stored as (in, out)
    qkv_is_by_head: bool = False  # ours: all queries, all keys, all values; theirs: head by head
    head_in_files: str = HEAD  # the output layer's name in published files, which other libraries look for

    @property
    def is_rotary(self):
        return self.required["position"] == "rotary"

    @property
    def consumed(self):
        """The keys of our model section that this family takes into account."""
        translated = {key for translation in self.translations for key in translation.keys}
        return set(self.settings) | set(self.required) | translated | IN_EVERY_FAMILY

    def written(self, model: ModelConfig):
        """The settings of a model, under this family's names, without ids and rates of training."""
        settings = {theirs: getattr(explicit(model), ours) for ours, theirs in self.settings.items()}
        settings |= self.fixed | {self.activation: self.activations[model.mlp]}
        for translation in self.translations:
            settings |= translation.write(model)
        return settings

    def read(self, theirs):
        """The keys of our model section that transformers' configuration gives. Of what it says otherwise nothing is
        noticed here: compare it with `written`."""
        keys = {ours: getattr(theirs, name) for ours, name in self.settings.items()}
        keys |= {key: value for key, value in self.required.items() if key in FIELDS and not isinstance(value, tuple)}
        for translation in self.translations:
            keys |= translation.read(theirs)
        activation = ALIASES.get(getattr(theirs, self.activation), getattr(theirs, self.activation))
        ours = {name: mlp for mlp, name in self.activations.items()}
        return keys | {"mlp": ours.get(activation, next(iter(self.activations)))}


FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}
ALIASES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}  # names of the same function

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    required={"position": "learned", "norm": "layernorm"},
    activations={"gelu": "gelu_new", "gelu_exact": "gelu"},
    prefix="transformer.",
    modules={
        "token_embedding": ["wte"],
        "position_embedding": ["wpe"],
        "blocks.{}.attention_norm": ["h.{}.ln_1"],
        "blocks.{}.attention.qkv": ["h.{}.attn.c_attn"],
        "blocks.{}.attention.proj": ["h.{}.attn.c_proj"],
        "blocks.{}.mlp_norm": ["h.{}.ln_2"],
        "blocks.{}.mlp.up": ["h.{}.mlp.c_fc"],
        "blocks.{}.mlp.down": ["h.{}.mlp.c_proj"],
        "final_norm": ["ln_f"],
    },
    settings={
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "block_size": "n_positions",
        "vocab_size": "vocab_size",
        "mlp_hidden": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    old_settings=lambda theirs: {"n_ctx": theirs.n_positions},
    activation="activation_function",
    dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    always_biased=True,
    linear_is_transposed=True,
)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    required={"position": "rotary", "norm": "rmsnorm"},
    activations={"swiglu": "silu"},
    prefix="model.",
    modules={
        "token_embedding": ["embed_tokens"],
        "blocks.{}.attention_norm": ["layers.{}.input_layernorm"],
        "blocks.{}.attention.qkv": [
            "layers.{}.self_attn.q_proj",
            "layers.{}.self_attn.k_proj",
            "layers.{}.self_attn.v_proj",
        ],
        "blocks.{}.attention.proj": ["layers.{}.self_attn.o_proj"],
        "blocks.{}.mlp_norm": ["layers.{}.post_attention_layernorm"],
        "blocks.{}.mlp.up": ["layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"],
        "blocks.{}.mlp.down": ["layers.{}.mlp.down_proj"],
        "final_norm": ["norm"],
    },
    settings={
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "n_embd": "hidden_size",
        "block_size": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "mlp_hidden": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "bias": "attention_bias",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={},
    translations=(ROTARY, HEAD_DIM, LINEAR_BIASES),
    old_settings=old_rotary,
    has_pad_token=False,  # it would name a row of the embedding, which then gets no gradient
)
WITHOUT_BIAS = {ours: theirs for ours, theirs in LLAMA.settings.items() if ours != "bias"}
QK_NORMS = {
    "blocks.{}.attention.q_norm": ["layers.{}.self_attn.q_norm"],
    "blocks.{}.attention.k_norm": ["layers.{}.self_attn.k_norm"],
}
NO_BIASES = {"bias": False, "qkv_bias": (None, False)}

FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        required={"position": "rotary", "norm": "layernorm"},
        activations=GPT2.activations,
        prefix="gpt_neox.",
        modules={
            "token_embedding": ["embed_in"],
            "blocks.{}.attention_norm": ["layers.{}.input_layernorm"],
            "blocks.{}.attention.qkv": ["layers.{}.attention.query_key_value"],
            "blocks.{}.attention.proj": ["layers.{}.attention.dense"],
            "blocks.{}.mlp_norm": ["layers.{}.post_attention_layernorm"],
            "blocks.{}.mlp.up": ["layers.{}.mlp.dense_h_to_4h"],
            "blocks.{}.mlp.down": ["layers.{}.mlp.dense_4h_to_h"],
            "final_norm": ["final_layer_norm"],
        },
        settings={
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_embd": "hidden_size",
            "block_size": "max_position_embeddings",
            "vocab_size": "vocab_size",
            "mlp_hidden": "intermediate_size",
            "norm_eps": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
            "tie_embeddings": "tie_word_embeddings",
        },
        fixed={"attention_bias": True},
        translations=(PARTIAL_ROTARY,),
        old_settings=old_rotary,
        dropout=("hidden_dropout", "attention_dropout"),
        always_biased=True,
        qkv_is_by_head=True,
        head_in_files="embed_out.weight",
    ),
    "mistral": dataclasses.replace(
        LLAMA,
        architecture="MistralForCausalLM",
        required=LLAMA.required | NO_BIASES,
        settings=WITHOUT_BIAS | {"sliding_window": "sliding_window"},
        translations=(ROTARY, HEAD_DIM),
    ),
    "qwen2": dataclasses.replace(
        LLAMA,
        architecture="Qwen2ForCausalLM",
        required=LLAMA.required | {"bias": False, "qkv_bias": True},
        settings=WITHOUT_BIAS,
        translations=(ROTARY, LAYER_WINDOWS),
    ),
    "qwen3": dataclasses.replace(
        LLAMA,
        architecture="Qwen3ForCausalLM",
        required=LLAMA.required | NO_BIASES | {"qk_norm": "head"},
        modules=LLAMA.modules | QK_NORMS,
        settings=WITHOUT_BIAS,
        fixed={"attention_bias": False},
        translations=(ROTARY, HEAD_DIM, LAYER_WINDOWS),
    ),
    "olmo2": dataclasses.replace(
        LLAMA,
        architecture="Olmo2ForCausalLM",
        required=LLAMA.required | NO_BIASES | {"qk_norm": "all", "norm_position": "after"},
        modules=LLAMA.modules
        | QK_NORMS
        | {
            "blocks.{}.attention_norm": ["layers.{}.post_attention_layernorm"],
            "blocks.{}.mlp_norm": ["layers.{}.post_feedforward_layernorm"],
        },
        settings=WITHOUT_BIAS,
        fixed={"attention_bias": False},
        translations=(ROTARY,),
    ),
    "smollm3": dataclasses.replace(
        LLAMA,
        architecture="SmolLM3ForCausalLM",
        fixed={"use_sliding_window": False},
        translations=(ROTARY, LINEAR_BIASES, ROTARY_LAYERS),
    ),
}
# {} {} in the names of experts: the layer's number and the expert's
EXPERTS = {
    "blocks.{}.mlp.router": ["layers.{}.mlp.gate"],
    "blocks.{}.mlp.up": ["layers.{}.mlp.experts.{}.gate_proj", "layers.{}.mlp.experts.{}.up_proj"],
    "blocks.{}.mlp.down": ["layers.{}.mlp.experts.{}.down_proj"],
}
EXPERT_SETTINGS = {
    "n_expert": "num_experts",
    "n_expert_per_token": "num_experts_per_tok",
    "normalize_experts": "norm_topk_prob",
    "balance_loss": "router_aux_loss_coef",
}
FAMILIES |= {
    "mixtral": dataclasses.replace(
        FAMILIES["mistral"],
        architecture="MixtralForCausalLM",
        required=FAMILIES["mistral"].required | {"normalize_experts": True},
        modules=LLAMA.modules
        | {
            "blocks.{}.mlp.router": ["layers.{}.block_sparse_moe.gate"],
            "blocks.{}.mlp.up": [
                "layers.{}.block_sparse_moe.experts.{}.w1",
                "layers.{}.block_sparse_moe.experts.{}.w3",
            ],
            "blocks.{}.mlp.down": ["layers.{}.block_sparse_moe.experts.{}.w2"],
        },
        settings=FAMILIES["mistral"].settings
        | {
            "n_expert": "num_local_experts",
            "n_expert_per_token": "num_experts_per_tok",
            "balance_loss": "router_aux_loss_coef",
        },
        fixed={"router_jitter_noise": 0.0},
        has_experts=True,
    ),
    "qwen3_moe": dataclasses.replace(
        FAMILIES["qwen3"],
        architecture="Qwen3MoeForCausalLM",
        modules=FAMILIES["qwen3"].modules | EXPERTS,
        settings=FAMILIES["qwen3"].settings | EXPERT_SETTINGS | {"mlp_hidden": "moe_intermediate_size"},
        fixed={
            "attention_bias": False,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        translations=(ROTARY, HEAD_DIM),
        old_settings=old_with_experts,
        has_experts=True,
        unused=("intermediate_size", "sliding_window"),
    ),
    "olmoe": dataclasses.replace(
        LLAMA,
        architecture="OlmoeForCausalLM",
        required=LLAMA.required | NO_BIASES | {"qk_norm": "all"},
        modules=LLAMA.modules | QK_NORMS | EXPERTS,
        settings=WITHOUT_BIAS | EXPERT_SETTINGS,
        fixed={"attention_bias": False, "clip_qkv": None},
        translations=(ROTARY,),
        old_settings=old_with_experts,
        has_experts=True,
    ),
}
# The other keys of our model section that every family takes into account, in its row or in the functions below. A key
# that a family does not take into account must be switched off, or the model is none of that family.
IN_EVERY_FAMILY = {"n_kv_head", "bias", "qkv_bias", "dropout", "rotary_theta", "mlp", "init_std", "family"}
IN_EVERY_FAMILY |= {"balance_loss", "router_z_loss"}  # of training


def faults_of(family: Family, model: ModelConfig):
    """[(key, found, expected)] of a model that a family does not compute."""
    pairs = [(key, getattr(model, key), value) for key, value in family.required.items()]
    pairs.append(("mlp", model.mlp, tuple(family.activations)))
    if "n_kv_head" not in family.settings:
        pairs.append(("n_kv_head", model.kv_heads, model.n_head))
    if "qkv_bias" not in family.required:
        pairs.append(("qkv_bias", model.biased_qkv, model.bias))
    if "head_dim" not in family.consumed:
        pairs.append(("head_dim", model.head_size, model.n_embd / model.n_head))
    if family.has_experts and model.n_expert is None:
        pairs.append(("n_expert", None, "a number of experts"))
    allowed = {key: value if isinstance(value, tuple) else (value,) for key, _, value in pairs}
    wrong = [(key, found, " or ".join(map(str, allowed[key]))) for key, found, _ in pairs if found not in allowed[key]]
    return wrong + switched_on(model, family.consumed | {"head_dim"})


def family_of(model: ModelConfig):
    """The name of a family in FAMILIES that computes this model: model.family, or the first. Raises UserError, which
    names the keys, if the model is none of them."""
    if model.family is not None and model.family not in FAMILIES:
        raise UserError(f"model.family: found {model.family!r}, expected null or one of {', '.join(FAMILIES)}")
    names = [model.family] if model.family else list(FAMILIES)
    wrong = {name: faults_of(FAMILIES[name], model) for name in names}
    nearest = min(names, key=lambda name: len(wrong[name]))
    if wrong[nearest]:
        keys = "; ".join(f"model.{key}: found {found}, expected {value}" for key, found, value in wrong[nearest])
        reason = "is the nearest to this model" if model.family is None else "is what model.family asks for"
        raise UserError(
            f"{keys}: transformers' {FAMILIES[nearest].architecture} {reason}, and it computes nothing else"
        )
    return nearest


# -- weights -------------------------------------------------------------------------------------


def their_names(model: ModelConfig):
    """{name of our weight: transformers' names of the parts that its rows are cut into}, with the biases that
    some families have even where the model has none. A tied output layer is not listed."""
    family = FAMILIES[family_of(model)]
    names = {}
    for module, theirs in family.modules.items():
        in_block = module.startswith("blocks")
        is_norm = module.endswith("norm")
        has_bias = model.biased_qkv if module.endswith(".qkv") else model.bias
        has_bias = has_bias and in_block and not is_norm
        if family.always_biased:
            has_bias = in_block or is_norm
        for layer in range(model.n_layer if in_block else 1):
            experts = range(model.n_expert) if theirs[0].count("{}") == 2 else [None]
            parts = [family.prefix + name.format(layer, expert) for expert in experts for name in theirs]
            for kind in ("weight", "bias") if has_bias else ("weight",):
                names[f"{module.format(layer)}.{kind}"] = [f"{name}.{kind}" for name in parts]
    if not model.tie_embeddings:
        names["head.weight"] = [HEAD]
    return names


def has_in_ours(name, model: ModelConfig):
    """Whether our model has a weight of `their_names`: it has no biases where only the family has them."""
    biased = model.biased_qkv if ".qkv." in name else model.bias
    return biased or not name.endswith(".bias")


def is_of_experts(name, model: ModelConfig):
    """Whether a weight of ours holds the matrices of all experts."""
    return model.n_expert is not None and name.endswith((".mlp.up.weight", ".mlp.down.weight"))


def identity(weight):
    return weight


def rearrangements(ours, model: ModelConfig):
    """Two functions: from a weight or bias of ours to theirs, and back. Nothing is permuted for rotary positions:
    in all families channel i is paired with i + D/2."""
    family = FAMILIES[family_of(model)]
    is_linear = ours.startswith("blocks") and "norm" not in ours
    if family.linear_is_transposed and is_linear and ours.endswith("weight"):
        return torch.t, torch.t
    if is_of_experts(ours, model):  # (experts, outputs, inputs), and in theirs a matrix for each

        def stacked(weight):
            return weight.view(model.n_expert, -1, weight.shape[-1])

        return (lambda weight: weight.flatten(0, 1)), stacked
    if family.qkv_is_by_head and ".qkv." in ours:

        def swap(weight, first, second):
            parts = weight.view(first, second, model.head_size, *weight.shape[1:])
            return parts.transpose(0, 1).reshape(weight.shape)

        return (lambda weight: swap(weight, 3, model.n_head)), (lambda weight: swap(weight, model.n_head, 3))
    return identity, identity


def to_transformers(model: ModelConfig, read):
    """Yields pairs of transformers' name and tensor, made of what read(our name) gives, and zeros where a family
    has biases and the model has none. Keeps nothing: of our weights one at a time is in memory."""
    key_width = model.kv_heads * model.head_size
    for ours, theirs in their_names(model).items():
        if not has_in_ours(ours, model):
            weight = read(ours.removesuffix("bias") + "weight")
            weight = weight.new_zeros(len(weight))
        else:
            weight = read(ours)
        there, _ = rearrangements(ours, model)
        weight = there(weight)
        if len(theirs) == 1:
            yield theirs[0], weight
            continue
        attention = [model.n_head * model.head_size, key_width, key_width]
        rows = attention if ".qkv." in ours else len(weight) // len(theirs)
        yield from zip(theirs, weight.split(rows), strict=True)


def from_transformers(model: ModelConfig, read):
    """A function from the name of a weight of ours to the weight, made of what read(transformers' name) gives."""
    names = their_names(model)

    def make(ours):
        parts = [read(name) for name in names[ours]]
        _, back = rearrangements(ours, model)
        return back(torch.cat(parts) if len(parts) > 1 else parts[0])

    return make


# -- settings ------------------------------------------------------------------------------------


def explicit(model: ModelConfig):
    """The same model with its widths in place of null, and null for what changes nothing: models that compute the same
    by other words of these keys compare as equal."""
    layers = range(model.n_layer)
    full = [layer for layer in layers if not model.window(layer)]
    without = [layer for layer in layers if not model.turns(layer)] if model.no_rotary_layers else []
    is_full = len(full) == model.n_layer
    return dataclasses.replace(
        model,
        n_kv_head=model.kv_heads,
        mlp_hidden=model.mlp_width,
        head_dim=None if model.head_size * model.n_head == model.n_embd else model.head_size,
        qkv_bias=None if model.biased_qkv == model.bias else model.biased_qkv,
        no_rotary_layers=chosen(without, model.n_layer),
        sliding_window=None if is_full else model.sliding_window,
        full_attention_layers=None if is_full else chosen(full, model.n_layer),
    )


def transformers_config(model: ModelConfig, dtype="float32", end_of_text=None, start=None, pad=None):
    """transformers' configuration of the same model. end_of_text, start, pad: ids that end and begin a document, and
    for padding; the last two are by default end_of_text. Raises UserError if transformers has no such model."""
    from transformers import AutoConfig

    name = family_of(model)
    family = FAMILIES[name]
    settings = family.written(model) | dict.fromkeys(family.dropout, model.dropout)
    settings |= {"bos_token_id": end_of_text if start is None else start, "eos_token_id": end_of_text}
    settings |= {"initializer_range": model.init_std}
    padding = end_of_text if pad is None else pad
    settings["pad_token_id"] = padding if family.has_pad_token else None
    return AutoConfig.for_model(name, **settings, architectures=[family.architecture], dtype=dtype)


# -- is it the same function? --------------------------------------------------------------------


def weightless(model: ModelConfig):
    """model.py's model with shapes, but no memory for its weights."""
    with torch.device("meta"):
        return GPT(model)


def own_shapes(model: ModelConfig):
    """{name of a parameter: its shape as a list} of model.py's model."""
    return checkpoint.shapes_of(dict(weightless(model).named_parameters()))


@torch.no_grad()
def build_transformers(model: ModelConfig, read):
    """The model as transformers', in float32 in memory, of what read(our name) gives, one weight at a time unless there
    are experts, whose matrices transformers joins in a way of its own."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if model.n_expert is not None:
        return load_into_transformers(model, dict(to_transformers(model, read)))
    with no_init_weights():
        theirs = AutoModelForCausalLM.from_config(transformers_config(model))
    theirs.tie_weights()
    parameters = dict(theirs.named_parameters())
    for name, tensor in to_transformers(model, read):
        parameters.pop(name).copy_(tensor)
    assert not parameters, f"without a value: {parameters.keys()}"
    return theirs


def load_into_transformers(model: ModelConfig, tensors):
    """transformers' model of tensors under the names of its files."""
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        architecture = getattr(transformers, FAMILIES[family_of(model)].architecture)
        theirs = architecture.from_pretrained(None, config=transformers_config(model), state_dict=tensors)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return theirs


def as_in_files(theirs, tensors):
    """{name of a parameter of transformers' model: tensor}, in which each matrix of an expert is by itself, as in the
    files of such models."""
    from transformers.core_model_loading import revert_weight_conversion

    if not FAMILIES[theirs.config.model_type].has_experts:
        return tensors
    return revert_weight_conversion(theirs, tensors)


def check_parameters(model: ModelConfig):
    """Raises UserError, which names the parameters, unless the model's family has a place for each parameter of
    model.py's model and needs no other."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(transformers_config(model))
    make = from_transformers(model, as_in_files(theirs, dict(theirs.named_parameters())).get)
    expected = {}
    for name in their_names(model):
        if has_in_ours(name, model):  # else it is made of zeros
            expected[name] = list(make(name).shape)
    if wrong := checkpoint.differences(own_shapes(model), expected):
        raise UserError(
            f"model.py: its parameters are not those of transformers' {FAMILIES[family_of(model)].architecture}: "
            f"{wrong}; add them to the tables of minzero/hf/families.py if that has them"
        )


def smaller(model: ModelConfig):
    """The same settings with small sizes: at most two layers, but one of each kind, and heads in as many groups as fit,
    of 8 channels, or more where only a part of them turns."""
    kinds = {}
    for layer in range(model.n_layer):
        kinds.setdefault((model.turns(layer), bool(model.window(layer))), layer)
    layers = sorted({*kinds.values(), *range(min(2, model.n_layer))})
    groups = min(2, model.kv_heads)
    heads = groups * model.n_head // model.kv_heads
    size = 8 if model.rotary_fraction == 1 else model.head_size
    sizes = {"n_layer": len(layers), "n_head": heads, "n_kv_head": groups, "n_embd": size * heads}
    sizes |= {"block_size": 64, "vocab_size": 64, "mlp_hidden": 40 if model.mlp_hidden else None}
    if model.n_expert is not None:
        chosen_experts = min(2, model.n_expert_per_token)
        sizes |= {"n_expert": min(5, model.n_expert), "n_expert_per_token": chosen_experts}
    sizes |= {"head_dim": 2 * size if model.head_dim else None, "sliding_window": model.sliding_window and 8}
    for key in ("no_rotary_layers", "full_attention_layers"):
        number = [place for place, layer in enumerate(layers) if is_chosen(getattr(model, key), layer)]
        sizes[key] = number or None
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
    worst = (found - expected).abs().max().item()
    scale = expected.abs().max().item()
    if not worst <= 1e-4 * scale:
        raise UserError(
            f"model.py: with random weights in a small model of these settings its logits differ by {worst:.2g} of "
            f"{scale:.2g} from those of transformers' {FAMILIES[family_of(model)].architecture}; model.py was changed "
            "in a way that minzero/hf/families.py does not know"
        )
