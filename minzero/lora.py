"""LoRA: a model's own weights stay as they are, and each chosen matrix gets a product of two small ones, which learns
(Hu et al. 2021, arXiv 2106.09685).

A matrix W of the model that is several of transformers', as queries, keys and values, has an adapter for each of them,
as PEFT has: y = W x + (alpha / rank) * (B_0 A_0 x, B_1 A_1 x, ...). A_0 is `adapter.a.0`, (rank, inputs), and B_0 is
`adapter.b.0`, (outputs, rank).
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from minzero.adapters import MARK, MODULES, inputs_of, matrix_of, rows_of_parts
from minzero.config.sections import LoraConfig, ModelConfig


class First(nn.Linear):
    """A: drawn as nn.Linear and PEFT draw it, uniform within 1 / sqrt(inputs), in float32 whatever its own type."""

    @torch.no_grad()
    def reset_parameters(self):
        drawn = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        self.weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))


class Second(nn.Linear):
    """B: zero, so that training begins with the model as it was."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)


class Adapter(nn.Module):
    """The products beside one matrix. rows: of each part; inputs: the matrix's columns."""

    def __init__(self, rows, inputs, lora: LoraConfig):
        super().__init__()
        self.scale = lora.scale
        self.dropout = lora.dropout
        self.a = nn.ModuleList(First(inputs, lora.rank, bias=False) for _ in rows)
        self.b = nn.ModuleList(Second(lora.rank, count, bias=False) for count in rows)

    def forward(self, x):
        """(..., inputs) -> (..., outputs of all parts)"""
        x = F.dropout(x, self.dropout, self.training)
        parts = [b(a(x)) for a, b in zip(self.a, self.b, strict=True)]
        return self.scale * (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])


class Adapted(nn.Module):
    """A linear layer that has got an Adapter. Its own parameters keep their names."""

    def forward(self, x):
        return super().forward(x) + self.adapter(x)


@functools.cache
def with_adapter(linear):
    """The class of linear layers of this class that have got an Adapter."""
    return type(f"Adapted{linear.__name__}", (Adapted, linear), {})


def add_adapters(model, lora: LoraConfig, seed):
    """Freeze all weights of a GPT, and give each block the adapters that `lora` chooses. Under ZeRO-3 to be called
    where new weights are sharded, like the model's own."""
    model.requires_grad_(False)
    # DeepSpeed's hooks release the weights of a block whose input has no gradient too early, before its backward pass
    model.token_embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    torch.manual_seed(seed)
    for block in model.blocks:
        for matrix in lora.matrices:
            linear = block.get_submodule(MODULES[matrix])
            linear.__class__ = with_adapter(type(linear))
            linear.adapter = Adapter(rows_of_parts(model.config, matrix), inputs_of(model.config, matrix), lora)


def merged(model: ModelConfig, lora: LoraConfig, read_base, read_adapter):
    """A function that reads a weight with its adapters added to it, in float32: from that of the base and those of the
    adapters, each read(name)."""

    def read(name):
        weight = read_base(name)
        matrix = matrix_of(name)
        if matrix not in lora.matrices:
            return weight
        adapter = name.removesuffix(".weight") + MARK
        parts = range(len(rows_of_parts(model, matrix)))
        pairs = [[read_adapter(f"{adapter}{kind}.{part}.weight") for kind in "ba"] for part in parts]
        return weight + lora.scale * torch.cat([b @ a for b, a in pairs])

    return read
