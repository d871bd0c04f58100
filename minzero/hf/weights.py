"""Weights of ours under the names and in the layout of transformers' files, and back."""

import torch
from torch.overrides import TorchFunctionMode

from minzero import checkpoint
from minzero.config.sections import ModelConfig
from minzero.hf.families import FAMILIES, HEAD, family_of
from model import GPT


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


class WithoutRandomNumbers(TorchFunctionMode):
    """Leaves tensors as they are that would be filled with random numbers. Without memory there is nothing to fill, and
    for tensors on the meta device torch would import its compiler for it, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("normal_", "kaiming_uniform_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def weightless(model: ModelConfig):
    """model.py's model with shapes, but no memory for its weights."""
    with torch.device("meta"), WithoutRandomNumbers():
        return GPT(model)


def own_shapes(model: ModelConfig):
    """{name of a parameter: its shape as a list} of model.py's model."""
    return checkpoint.shapes_of(dict(weightless(model).named_parameters()))
