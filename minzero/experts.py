"""A mixture of experts in place of a block's MLP: a router sends each token to the n_expert_per_token MLPs that it
finds most probable, and their outputs are summed with its probabilities as weights (Shazeer et al. 2017, arXiv
1701.06538).

No token is dropped: an expert gets as many as were sent to it. Shapes: N tokens, k experts of each token, E experts,
C = n_embd, I = mlp_hidden.
"""

import torch
from torch import nn
from torch.nn import functional as F

from minzero.config.sections import ModelConfig

GROUPED_MULTIPLE = 8  # of a matrix's widths: torch's grouped product reads 16 bytes at once


class ExpertLinear(nn.Module):
    """One matrix for each expert, (E, outputs, inputs)."""

    def __init__(self, n_expert, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, outputs, inputs))

    def forward(self, x, counts):
        """x: rows (N k, inputs), sorted by expert; counts: (E,), how many belong to each. Returns (N k, outputs)."""
        if has_grouped_product(x, self.weight):
            return F.grouped_mm(x, self.weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
        return one_by_one(x, self.weight, counts)


def has_grouped_product(x, weight):
    """Whether torch computes the products of all experts in one kernel here: in bf16, on CPUs and on GPUs since
    NVIDIA's Ampere."""
    if x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    if any(width % GROUPED_MULTIPLE for width in weight.shape[1:]):
        return False
    return x.device.type == "cpu" or (x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 8)


@torch.compiler.disable  # how many rows an expert has is not known when it is compiled
def one_by_one(x, weight, counts):
    """The products of the experts, one after the other. An expert without rows has a gradient of zeros."""
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight.unbind(), strict=True)])


class Experts(nn.Module):
    """Router, experts, and MLPs that every token goes through (shared experts: Dai et al. 2024, arXiv 2401.06066)."""

    def __init__(self, config: ModelConfig, activate, shared=None):
        """activate: the function between an expert's two products. shared: an MLP for all tokens, or None."""
        super().__init__()
        self.n_expert_per_token = config.n_expert_per_token
        self.normalize = config.normalize_experts
        self.dropout = config.dropout
        self.activate = activate
        width = config.mlp_width
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.up = ExpertLinear(config.n_expert, config.n_embd, 2 * width if config.gated else width)
        self.down = ExpertLinear(config.n_expert, width, config.n_embd)
        self.down.writes_to_residual = True
        self.shared = shared

    def forward(self, x):
        """(B, T, C) -> (B, T, C), and the router's choices as `routing_of` has them."""
        tokens = x.flatten(0, 1)
        k = self.n_expert_per_token
        logits = self.router(tokens).float()
        probabilities = logits.softmax(dim=-1)  # (N, E)
        weights, chosen = probabilities.topk(k)  # (N, k)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        counts = F.one_hot(chosen.flatten(), probabilities.shape[-1]).sum(0)  # (E,)
        order = chosen.flatten().argsort(stable=True)  # of all N k pairs of a token and an expert, by expert
        rows = self.activate(self.up(tokens[order // k], counts))
        # back in the tokens' order, and summed: the same sum each time, as adding to an index would not be
        outputs = self.down(rows, counts)[order.argsort()].view(*weights.shape, -1)
        y = (outputs * weights[..., None].type_as(outputs)).sum(dim=1).view_as(x)
        y = F.dropout(y, self.dropout, self.training)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, routing_of(logits, probabilities, counts)


def routing_of(logits, probabilities, counts):
    """(3, E) float32, of one layer: the part of the tokens that each expert gets, its mean probability, and the mean
    square of the logits' log-sum-exp, the same for all. The last two have gradients."""
    part = counts / len(logits)
    square = logits.logsumexp(dim=-1).square().mean()
    return torch.stack([part, probabilities.mean(dim=0), square.expand(len(part))])


def router_losses(routing, by_layer=True):
    """The load-balancing loss and the z loss. routing: (L, 3, E) of `routing_of`. by_layer: the mean of the layers'
    load-balancing losses; else that of all layers' tokens together, as transformers has it, in which an expert that is
    busy in one layer and idle in another counts as balanced.

    Load balancing: E times the sum over experts of the part of the tokens times the mean probability;
    n_expert_per_token is a perfect balance (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6). z: Zoph et al.
    2022, arXiv 2202.08906, equation 5."""
    if not by_layer:
        routing = routing.mean(dim=0, keepdim=True)
    part, probability, square = routing.unbind(dim=1)  # (L, E)
    balance = part.shape[-1] * (part * probability).sum(dim=-1)
    return balance.mean(), square.mean()
