"""Frozen matrices in 4 bits, beside which adapters are trained (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).

NF4 in blocks of 64 numbers, whose scales are themselves in 8 bits in blocks of 256 (double quantisation), by the
package bitsandbytes: 0.516 bytes a parameter. Each rank holds all of them whole at every ZeRO stage, so a step gathers
adapters, embeddings and norms only. A product makes its matrix in train.precision for the moment.
"""

import importlib.util
import logging

import torch
from torch import distributed, nn

from minzero.adapters import BLOCK, MODULES, matrix_of, rows_of_parts
from minzero.config.sections import ModelConfig
from minzero.errors import UserError
from minzero.zero import DTYPES


def require():
    """The package bitsandbytes. Raises UserError where it is missing or does not work."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "lora.base_bits: found 4, which needs the package bitsandbytes, and that is not installed; pip install "
            "bitsandbytes, or set it to null"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels that it does without
    try:
        import bitsandbytes
        from bitsandbytes import functional

        if not hasattr(functional, "quantize_4bit"):
            raise ImportError(f"version {getattr(bitsandbytes, '__version__', 'unknown')} has no quantize_4bit")
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lora.base_bits: found 4, but bitsandbytes fails ({reason}); repair it, or set null") from None
    return bitsandbytes


def quantize(weight):
    """A matrix -> (its packed numbers, uint8, and bitsandbytes' QuantState)."""
    functional = require().functional
    return functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")


def as_quantized(model: ModelConfig, read, precision):
    """A function that reads weights as those of a 4-bit base are: quantised from their value in `precision`, and
    made float32 again. read(name): the weight itself."""
    functional = require().functional

    def read_again(name):
        weight = read(name)
        matrix = matrix_of(name)
        if matrix is None:
            return weight
        parts = weight.to(DTYPES[precision]).split(rows_of_parts(model, matrix))
        return torch.cat([functional.dequantize_4bit(*quantize(part)) for part in parts]).float()

    return read_again


class FourBitLinear(nn.Linear):
    """A linear layer whose weight is in 4 bits: `packed`, a list of (packed numbers, QuantState), one for each part of
    its outputs. It has no parameter for it."""

    def forward(self, x):
        biases = [None] * len(self.packed) if self.bias is None else self.bias.split(self.rows)
        parts = [
            self.product(x, numbers, state, bias=bias)
            for (numbers, state), bias in zip(self.packed, biases, strict=True)
        ]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


@torch.no_grad()
def quantize_blocks(model, precision, device):
    """Put every matrix of a GPT's blocks into 4 bits, on the device. Each of transformers' matrices is quantised by
    itself, as bitsandbytes does it there. Every rank must call this: under ZeRO-3 one matrix after the other is
    gathered, and in the other stages rank 0's is sent to all."""
    import deepspeed  # see zero.py's torch_linear

    product = require().matmul_4bit
    for block in model.blocks:
        for matrix, name in MODULES.items():
            linear = block.get_submodule(name)
            is_sharded = hasattr(linear.weight, "ds_id")
            rows = rows_of_parts(model.config, matrix)
            with deepspeed.zero.GatheredParameters([linear.weight]):
                weight = linear.weight.detach().to(device, DTYPES[precision])
                if not is_sharded:
                    distributed.broadcast(weight, src=0)
                linear.packed = [quantize(part) for part in weight.split(rows)]
            linear.rows, linear.product = rows, product
            linear.register_parameter("weight", None)
            linear.__class__ = FourBitLinear


def count_quantized(module):
    """The number of a model's parameters that are in 4 bits."""
    return sum(part.out_features * part.in_features for part in module.modules() if isinstance(part, FourBitLinear))
