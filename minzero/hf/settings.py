"""Settings of transformers' configurations that are not one key of our model section for one of theirs."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from minzero.config.sections import ModelConfig


class Translation(NamedTuple):
    """Keys of our model section and the settings that say the same."""

    keys: tuple  # of ours
    write: Callable  # (ModelConfig) -> {their setting: value}
    read: Callable  # (their configuration) -> {key: value}


def write_rotary(model: ModelConfig):
    """rope_parameters from rotary_theta and rotary_scaling."""
    scaling = model.rotary_scaling or {"rope_type": "default"}
    return {"rope_parameters": scaling | {"rope_theta": model.rotary_theta}}


def read_rotary(theirs):
    """rotary_theta and rotary_scaling from rope_parameters, without a partial_rotary_factor."""
    rope = dict(theirs.rope_parameters)
    keys = {"rotary_theta": float(rope.pop("rope_theta"))}
    rope.pop("partial_rotary_factor", None)
    rope.pop("type", None)  # an older name of rope_type
    keys["rotary_scaling"] = None if rope == {"rope_type": "default"} else rope
    return keys


def write_partial_rotary(model: ModelConfig):
    """rope_parameters with partial_rotary_factor, from rotary_fraction."""
    rope = write_rotary(model)["rope_parameters"]
    return {"rope_parameters": rope | {"partial_rotary_factor": model.rotary_fraction}}


def read_partial_rotary(theirs):
    """rotary_theta, rotary_scaling and rotary_fraction from rope_parameters."""
    return read_rotary(theirs) | {"rotary_fraction": theirs.rope_parameters.get("partial_rotary_factor", 1.0)}


def write_head_dim(model: ModelConfig):
    """head_dim, as a number."""
    return {"head_dim": model.head_size}


def read_head_dim(theirs):
    """head_dim; null where it is hidden_size / num_attention_heads, so that another n_head or n_embd changes it."""
    implied = theirs.hidden_size / theirs.num_attention_heads
    size = getattr(theirs, "head_dim", None)
    return {"head_dim": None if size in (None, implied) else size}


def as_layer_key(layers, n_layer):
    """A list of layers, numbered from 0, as our keys have it: k for every k-th, a list for others, None for none."""
    every = layers[0] + 1 if layers else None
    if layers and layers == list(range(every - 1, n_layer, every)):
        return every
    return layers or None


def write_layer_windows(model: ModelConfig):
    """sliding_window, use_sliding_window, and layer_types, which has an entry for each layer."""
    windows = [model.window_of(layer) for layer in range(model.n_layer)]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    sliding = any(windows)
    return {"layer_types": kinds, "use_sliding_window": sliding, "sliding_window": model.sliding_window or None}


def read_layer_windows(theirs):
    """sliding_window, and full_attention_layers, numbered from 0, from layer_types."""
    window = theirs.sliding_window if theirs.use_sliding_window else None
    full = [layer for layer, kind in enumerate(theirs.layer_types) if kind == "full_attention"]
    if window is None or len(full) == theirs.num_hidden_layers:
        return {"sliding_window": None, "full_attention_layers": None}
    return {"sliding_window": window, "full_attention_layers": as_layer_key(full, theirs.num_hidden_layers)}


def write_rotary_layers(model: ModelConfig):
    """no_rope_layers, which despite its name has 1 for each layer with rotary positions and 0 for others."""
    turns = [int(model.has_rotary(layer)) for layer in range(model.n_layer)]
    return {"no_rope_layers": turns, "layer_types": ["full_attention"] * model.n_layer}


def read_rotary_layers(theirs):
    """no_rotary_layers, numbered from 0, from no_rope_layers."""
    without = [layer for layer, turns in enumerate(theirs.no_rope_layers[: theirs.num_hidden_layers]) if not turns]
    return {"no_rotary_layers": as_layer_key(without, theirs.num_hidden_layers)}


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


def explicit(model: ModelConfig):
    """The same model with its widths in place of null, and null for what changes nothing: models that compute the same
    by other words of these keys compare as equal."""
    layers = range(model.n_layer)
    full = [layer for layer in layers if not model.window_of(layer)]
    without = [layer for layer in layers if not model.has_rotary(layer)] if model.no_rotary_layers else []
    is_full = len(full) == model.n_layer
    return dataclasses.replace(
        model,
        n_kv_head=model.kv_heads,
        mlp_hidden=model.mlp_width,
        head_dim=None if model.head_size * model.n_head == model.n_embd else model.head_size,
        qkv_bias=None if model.biased_qkv == model.bias else model.biased_qkv,
        no_rotary_layers=as_layer_key(without, model.n_layer),
        sliding_window=None if is_full else model.sliding_window,
        full_attention_layers=None if is_full else as_layer_key(full, model.n_layer),
    )
