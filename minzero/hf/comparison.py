"""Whether transformers' model computes the same as model.py's: tried on a small model with random weights."""

import dataclasses

import torch

from minzero import checkpoint
from minzero.config.model_section import ModelConfig, is_chosen
from minzero.errors import UserError
from minzero.hf.families import FAMILIES, family_of, transformers_config
from minzero.hf.weights import from_transformers, has_in_ours, own_shapes, their_names, to_transformers
from model import GPT


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
    of 8 channels, or more where only a part of them is rotated."""
    kinds = {}
    for layer in range(model.n_layer):
        kinds.setdefault((model.has_rotary(layer), bool(model.window_of(layer))), layer)
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
