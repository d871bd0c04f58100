"""Adapters beside frozen weights (lora.py), by a model's configuration alone: their shapes and number, and the size of
a base in 4 bits (four_bit.py). Needs no torch."""

import math

from minzero.config.sections import LoraConfig, ModelConfig
from minzero.errors import UserError
from minzero.hf.families import FAMILIES, family_of

# of a base in 4 bits: numbers that share a scale, and scales that share one of theirs
BLOCK, BLOCK_OF_SCALES = 64, 256
BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * BLOCK_OF_SCALES)  # of a parameter
MODULES = {"qkv": "attention.qkv", "proj": "attention.proj", "up": "mlp.up", "down": "mlp.down"}
CONFIG = "adapter_config.json"  # of PEFT's
MARK = ".adapter."  # in the names of what is trained


def rows_of_parts(model: ModelConfig, matrix):
    """The rows of each part of a matrix: one for each of transformers' matrices that it is. matrix: qkv, proj, up or
    down."""
    key_width = model.kv_heads * model.head_size
    rows = {
        "qkv": [model.n_head * model.head_size, key_width, key_width],
        "proj": [model.n_embd],
        "up": [model.mlp_width] * (2 if model.gated else 1),
        "down": [model.n_embd],
    }[matrix]
    try:
        theirs = FAMILIES[family_of(model)].modules[f"blocks.{{}}.{MODULES[matrix]}"]
    except UserError:  # a model that transformers does not have
        return rows
    return rows if len(theirs) == len(rows) else [sum(rows)]


def inputs_of(model: ModelConfig, matrix):
    """The columns of a matrix."""
    return {"proj": model.n_head * model.head_size, "down": model.mlp_width}.get(matrix, model.n_embd)


def shapes_in_block(model: ModelConfig, lora: LoraConfig):
    """{name of an adapter's parameter within its block: its shape as a list}"""
    found = {}
    for matrix in lora.matrices:
        name = f"{MODULES[matrix]}{MARK}"
        for part, rows in enumerate(rows_of_parts(model, matrix)):
            found[f"{name}a.{part}.weight"] = [lora.rank, inputs_of(model, matrix)]
            found[f"{name}b.{part}.weight"] = [rows, lora.rank]
    return found


def adapter_shapes(model: ModelConfig, lora: LoraConfig):
    """{name of an adapter's parameter: its shape as a list}"""
    of_block = shapes_in_block(model, lora).items()
    return {f"blocks.{layer}.{name}": shape for layer in range(model.n_layer) for name, shape in of_block}


def count_adapters(model: ModelConfig, lora: LoraConfig):
    """The number of parameters that are trained."""
    if not lora.rank:
        return 0
    return model.n_layer * sum(map(math.prod, shapes_in_block(model, lora).values()))


def matrix_of(name):
    """Which matrix of a block the weight of this name is: qkv, proj, up or down; None for any other parameter."""
    of_block = name.split(".", 2)[2] if name.startswith("blocks.") else None
    return next((matrix for matrix, module in MODULES.items() if of_block == f"{module}.weight"), None)


def is_adapter(name):
    """Whether the parameter of this name is an adapter's."""
    return MARK in name


def count_of(model: ModelConfig):
    """The number of weights that a base in 4 bits holds so: of all matrices of its blocks."""
    return model.n_layer * sum(inputs_of(model, matrix) * sum(rows_of_parts(model, matrix)) for matrix in MODULES)
