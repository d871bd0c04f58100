"""The architectures of transformers that a model of ours can be: one table a family, and conversions made of them.

GPT-2's settings are its GPT2LMHeadModel, Llama's its LlamaForCausalLM, and GPT-2's with rotary positions, as min-LLM's,
its GPTNeoXForCausalLM. A new family is an entry of FAMILIES; `check_expressible` then tries it on a small model.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minzero import checkpoint
from minzero.config.sections import ModelConfig, switched_on
from minzero.errors import UserError
from model import GPT

HEAD = "lm_head.weight"


def llama_settings(model: ModelConfig):
    rope = {"rope_type": "default", "rope_theta": model.rotary_theta}
    return {"mlp_bias": model.bias, "head_dim": model.n_embd // model.n_head, "rope_parameters": rope}


def gpt_neox_settings(model: ModelConfig):
    rope = {"rope_type": "default", "rope_theta": model.rotary_theta, "partial_rotary_factor": 1.0}
    return {"rope_parameters": rope}


def llama_old_settings(theirs):
    return {"rope_theta": theirs.rope_parameters["rope_theta"], "rope_scaling": None}


def gpt_neox_old_settings(theirs):
    theta, part = theirs.rope_parameters["rope_theta"], theirs.rope_parameters["partial_rotary_factor"]
    rotary = {"rotary_pct": part, "partial_rotary_factor": part, "rotary_emb_base": theta}
    return {"rope_theta": theta, "rope_scaling": None} | rotary


@dataclass(frozen=True)
class Family:
    """An architecture of transformers and how it names and stores what model.py has."""

    architecture: str
    required: dict  # ModelConfig values that this family supports
    prefix: str  # of the names of its weights
    modules: dict  # our module: theirs; where there are several, ours is their rows joined
    settings: dict  # key of our model section: theirs
    fixed: dict  # settings with the one value that model.py computes
    derived: Callable = lambda model: {}  # (ModelConfig) -> settings that follow from several of our keys
    old_settings: Callable = lambda theirs: {}  # (their configuration) -> settings under the names of transformers 4
    activation: str = "hidden_act"  # the name of the setting
    dropout: tuple = ()  # the names of the settings that are our dropout
    always_biased: bool = False  # has biases even where the model has none
    has_pad_token: bool = True
    linear_is_transposed: bool = False  # a linear weight is stored as (in, out)
    qkv_is_by_head: bool = False  # ours: all queries, all keys, all values; theirs: head by head
    head_in_files: str = HEAD  # the output layer's name in published files, which other libraries look for

    @property
    def is_rotary(self):
        return self.required["position"] == "rotary"

    @property
    def consumed(self):
        """The keys of our model section that this family takes into account."""
        return set(self.settings) | set(self.required) | IN_EVERY_FAMILY


FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        required={"position": "learned", "norm": "layernorm", "mlp": "gelu"},
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
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "activation_function": "gelu_new",
        },
        old_settings=lambda theirs: {"n_ctx": theirs.n_positions},
        activation="activation_function",
        dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        always_biased=True,
        linear_is_transposed=True,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        required={"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu"},
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
        fixed={"hidden_act": "silu"},
        derived=llama_settings,
        old_settings=llama_old_settings,
        has_pad_token=False,  # it would name a row of the embedding, which then gets no gradient
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        required={"position": "rotary", "norm": "layernorm", "mlp": "gelu"},
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
            "tie_embeddings": "tie_word_embeddings",
        },
        fixed={"use_parallel_residual": False, "attention_bias": True, "hidden_act": "gelu_new"},
        derived=gpt_neox_settings,
        old_settings=gpt_neox_old_settings,
        dropout=("hidden_dropout", "attention_dropout"),
        always_biased=True,
        qkv_is_by_head=True,
        head_in_files="embed_out.weight",
    ),
}
# The other keys of our model section that every family takes into account, in its table or in the functions below. A
# key that a family does not take into account must be switched off, or the model is none of that family.
IN_EVERY_FAMILY = {"n_kv_head", "bias", "dropout", "rotary_theta", "init_std"}


def family_of(model: ModelConfig):
    """`gpt2`, `llama` or `gpt_neox`. Raises UserError, which names the keys, if the model is none of them."""
    wrong = {}  # family: [(key, found, expected)]
    for name, family in FAMILIES.items():
        pairs = [(key, getattr(model, key), value) for key, value in family.required.items()]
        if "n_kv_head" not in family.settings:
            pairs.append(("n_kv_head", model.kv_heads, model.n_head))
        wrong[name] = [(key, found, value) for key, found, value in pairs if found != value]
        wrong[name] += switched_on(model, family.consumed)
    nearest = min(FAMILIES, key=lambda name: len(wrong[name]))
    if wrong[nearest]:
        keys = "; ".join(f"model.{key}: found {found}, expected {value}" for key, found, value in wrong[nearest])
        raise UserError(
            f"{keys}: transformers' {FAMILIES[nearest].architecture} is the nearest to this model, "
            "and it computes nothing else"
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
        has_bias = in_block and not is_norm and model.bias
        if family.always_biased:
            has_bias = in_block or is_norm
        for layer in range(model.n_layer if in_block else 1):
            parts = [family.prefix + name.format(layer) for name in theirs]
            for kind in ("weight", "bias") if has_bias else ("weight",):
                names[f"{module.format(layer)}.{kind}"] = [f"{name}.{kind}" for name in parts]
    if not model.tie_embeddings:
        names["head.weight"] = [HEAD]
    return names


def identity(weight):
    return weight


def rearrangements(ours, model: ModelConfig):
    """Two functions: from a weight or bias of ours to theirs, and back. Nothing is permuted for rotary positions:
    in all families channel i is paired with i + D/2."""
    family = FAMILIES[family_of(model)]
    is_linear = ours.startswith("blocks") and "norm" not in ours
    if family.linear_is_transposed and is_linear and ours.endswith("weight"):
        return torch.t, torch.t
    if family.qkv_is_by_head and ".qkv." in ours:
        head_size = model.n_embd // model.n_head

        def swap(weight, first, second):
            parts = weight.view(first, second, head_size, *weight.shape[1:])
            return parts.transpose(0, 1).reshape(weight.shape)

        return (lambda weight: swap(weight, 3, model.n_head)), (lambda weight: swap(weight, model.n_head, 3))
    return identity, identity


def to_transformers(model: ModelConfig, read):
    """Yields pairs of transformers' name and tensor, made of what read(our name) gives, and zeros where a family
    has biases and the model has none. Keeps nothing: of our weights one at a time is in memory."""
    key_width = model.kv_heads * model.n_embd // model.n_head
    for ours, theirs in their_names(model).items():
        if ours.endswith(".bias") and not model.bias:
            weight = read(ours.removesuffix("bias") + "weight")
            weight = weight.new_zeros(len(weight))
        else:
            weight = read(ours)
        there, _ = rearrangements(ours, model)
        weight = there(weight)
        if len(theirs) == 1:
            yield theirs[0], weight
            continue
        rows = [model.n_embd, key_width, key_width] if len(theirs) == 3 else len(weight) // len(theirs)
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
    """The same model with its widths in place of null."""
    return dataclasses.replace(model, n_kv_head=model.kv_heads, mlp_hidden=model.mlp_width)


def transformers_config(model: ModelConfig, dtype="float32", end_of_text=None, start=None, pad=None):
    """transformers' configuration of the same model. end_of_text, start, pad: ids that end and begin a document, and
    for padding; the last two are by default end_of_text. Raises UserError if transformers has no such model."""
    from transformers import AutoConfig

    name = family_of(model)
    family = FAMILIES[name]
    settings = {theirs: getattr(explicit(model), ours) for ours, theirs in family.settings.items()}
    settings |= family.fixed | family.derived(model) | dict.fromkeys(family.dropout, model.dropout)
    settings |= {"bos_token_id": end_of_text if start is None else start, "eos_token_id": end_of_text}
    settings |= {"initializer_range": model.init_std}
    if family.has_pad_token:
        settings["pad_token_id"] = end_of_text if pad is None else pad
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


def check_parameters(model: ModelConfig):
    """Raises UserError, which names the parameters, unless the model's family has a place for each parameter of
    model.py's model and needs no other."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        theirs = dict(AutoModelForCausalLM.from_config(transformers_config(model)).named_parameters())
    make = from_transformers(model, theirs.get)
    expected = {}
    for name in their_names(model):
        if model.bias or not name.endswith(".bias"):  # else it is made of zeros
            expected[name] = list(make(name).shape)
    if wrong := checkpoint.differences(own_shapes(model), expected):
        raise UserError(
            f"model.py: its parameters are not those of transformers' {FAMILIES[family_of(model)].architecture}: "
            f"{wrong}; add them to the tables of minzero/hf/families.py if that has them"
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
    worst = (found - expected).abs().max().item()
    scale = expected.abs().max().item()
    if not worst <= 1e-4 * scale:
        raise UserError(
            f"model.py: with random weights in a small model of these settings its logits differ by {worst:.2g} of "
            f"{scale:.2g} from those of transformers' {FAMILIES[family_of(model)].architecture}; model.py was changed "
            "in a way that minzero/hf/families.py does not know"
        )
