"""Variants of a model's settings, derived from ModelConfig's own fields: a new key is tested without being written into
any test, or the suite fails and says where its values belong."""

import dataclasses

from minzero.config.sections import ModelConfig

# Values to try of keys that are neither booleans nor a choice, other than their defaults.
VALUES = {
    "n_layer": [3],
    "n_head": [2],
    "n_kv_head": [1, 2],
    "n_embd": [48],
    "block_size": [24],
    "vocab_size": [300],
    "mlp_hidden": [37],
    "head_dim": [16],
    "dropout": [0.1],
    "norm_eps": [1e-3],
    "rotary_theta": [500000.0],
    "rotary_fraction": [0.5],
    "rotary_scaling": [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    "no_rotary_layers": [2, [0]],
    "sliding_window": [5],
    "full_attention_layers": [[0], 2],
    "qkv_bias": [True, False],
    "family": ["gpt2"],
    "n_expert": [4],
    "n_expert_per_token": [1],
    "n_shared_expert": [1],
    "balance_loss": [0.1],
    "router_z_loss": [0.0],
    "init_std": [0.15],
}


def values_of(field):
    """The values to try of a key of the model section, its default aside. Raises AssertionError if none is known."""
    choices = field.metadata.get("choices") or ([True, False] if isinstance(field.default, bool) else [])
    values = [value for value in VALUES.get(field.name, choices) if value != field.default]
    assert values, f"model.{field.name} is tested with no value but its default: add others to variants.py"
    return values


def variants(base: ModelConfig):
    """{name: `base` with one key changed}, for each key and each of its values."""
    found = {}
    for field in dataclasses.fields(ModelConfig):
        default = [] if field.name in VALUES else [field.default]
        for value in values_of(field) + default:
            if value != getattr(base, field.name):
                found[f"{field.name}={value}"] = dataclasses.replace(base, **{field.name: value})
    return found


def all_changed(**settings):
    """The sizes in `settings`, and every other key at a value that is not its default."""
    changed = {field.name: values_of(field)[-1] for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**changed | settings)
