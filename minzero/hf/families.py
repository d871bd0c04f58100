"""The architectures of transformers that a model of ours can be, one row a family.

A row says which values of our model section a family computes, how it names its weights and settings, and which
settings have one value here. A new family is an entry of FAMILIES; comparison.py then tries it on a small model.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from minzero.config.sections import ModelConfig, switched_on
from minzero.config.values import as_flag, in_short
from minzero.errors import UserError
from minzero.hf.settings import (
    HEAD_DIM,
    LAYER_WINDOWS,
    LINEAR_BIASES,
    PARTIAL_ROTARY,
    ROTARY,
    ROTARY_LAYERS,
    explicit,
    old_rotary,
    old_with_experts,
)

HEAD = "lm_head.weight"


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
        widths = explicit(model)
        settings = {theirs: getattr(widths, ours) for ours, theirs in self.settings.items()}
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
IN_EVERY_FAMILY |= {"balance_loss", "balance_over", "router_z_loss"}  # of training


def faults_of(family: Family, model: ModelConfig):
    """[(key, found, expected)] of a model that a family does not compute. expected: a tuple of values, or words."""
    pairs = [(key, getattr(model, key), value) for key, value in family.required.items()]
    pairs.append(("mlp", model.mlp, tuple(family.activations)))
    if "n_kv_head" not in family.settings:
        pairs.append(("n_kv_head", model.kv_heads, model.n_head))
    if "qkv_bias" not in family.required:
        pairs.append(("qkv_bias", model.biased_qkv, model.bias))
    if "head_dim" not in family.consumed:
        whole = model.n_embd % model.n_head == 0
        pairs.append(("head_dim", model.head_size, model.n_embd // model.n_head if whole else None))
    pairs = [(key, found, value if isinstance(value, tuple) else (value,)) for key, found, value in pairs]
    wrong = [(key, found, values) for key, found, values in pairs if found not in values]
    if family.has_experts and model.n_expert is None:
        wrong.append(("n_expert", None, "a number of experts"))
    for key, found, off in switched_on(model, family.consumed | {"head_dim"}):
        has_off = off is not None or getattr(type(model), key, found) is None  # the default, None, is off
        wrong.append((key, found, (off,) if has_off else "a value that changes nothing"))
    return wrong


def in_words(expected):
    """What a key of `faults_of` should have been."""
    return expected if isinstance(expected, str) else " or ".join(map(as_flag, expected))


def flags_to_set(faults):
    """The remedy for `faults_of`: "; set" and the flags of those keys that may have one value alone."""
    single = [(key, good[0]) for key, _, good in faults if key in FIELDS and isinstance(good, tuple) and len(good) == 1]
    flags = [f"--model.{key} {as_flag(value)}" for key, value in single]
    return f"; set {' '.join(flags)}" if flags else ""


def family_of(model: ModelConfig):
    """The name of a family in FAMILIES that computes this model: model.family, or the first. Raises UserError, which
    names the keys, if the model is none of them."""
    if model.family is not None and model.family not in FAMILIES:
        raise UserError(f"model.family: found {in_short(model.family)}, expected null or one of {', '.join(FAMILIES)}")
    names = [model.family] if model.family else list(FAMILIES)
    wrong = {name: faults_of(FAMILIES[name], model) for name in names}
    nearest = min(names, key=lambda name: len(wrong[name]))
    if wrong[nearest]:
        faults = wrong[nearest]
        keys = "; ".join(
            f"model.{key}: found {as_flag(found)}, expected {in_words(good)}" for key, found, good in faults
        )
        reason = "is the nearest to this model" if model.family is None else "is what model.family asks for"
        raise UserError(
            f"{keys}: transformers' {FAMILIES[nearest].architecture} {reason}, and it computes nothing else"
            f"{flags_to_set(faults)}"
        )
    return nearest


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
