"""A mixture of experts in place of a block's MLP: a router sends each token to the n_expert_per_token MLPs that it
finds most probable, and their outputs are summed with its probabilities as weights (Shazeer et al. 2017, arXiv
1701.06538).

No token is dropped: an expert gets as many as were sent to it. Shapes: N tokens, k experts of each token, E experts,
C = n_embd, I = mlp_hidden.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from minzero.config.sections import ModelConfig

GROUPED_MULTIPLE = 8  # of a matrix's widths: torch's grouped product reads 16 bytes at once


class ExpertLinear(nn.Module):
    """One matrix for each expert, (E, outputs, inputs)."""

    def __init__(self, n_expert, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, outputs, inputs))

    def forward(self, x, ends):
        """x: rows (N k, inputs), sorted by expert; ends: (E,) int32, the number of the row after each expert's last
        one. Returns (N k, outputs)."""
        return expert_product(x, self.weight, ends)


def has_grouped_product(x, weight):
    """Whether torch computes the products of all experts in one kernel here: in bf16, on CPUs and on GPUs since
    NVIDIA's Ampere."""
    if x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    if any(width % GROUPED_MULTIPLE for width in weight.shape[1:]) or weight.data_ptr() % 16:
        return False
    return x.device.type == "cpu" or (x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 8)


def ranges(ends):
    """The slice of the rows of each expert."""
    ends = ends.tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


# An operator of its own: the compiler does not look into it (how many rows an expert has is not known then), selective
# recomputation sees one product whatever the loop does, and for the backward pass the parameter is kept, not a view of
# it, which would keep ZeRO-3's gathered weights alive.
@torch.library.custom_op("minzero::expert_product", mutates_args=())
def expert_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each row times its expert's matrix, see ExpertLinear."""
    if has_grouped_product(x, weight):
        return F.grouped_mm(x, weight.mT, offs=ends)
    y = x.new_empty(len(x), weight.shape[1])
    for rows, matrix in zip(ranges(ends), weight, strict=True):
        torch.mm(x[rows], matrix.T, out=y[rows])
    return y


@expert_product.register_fake
def _(x, weight, ends):
    return x.new_empty(len(x), weight.shape[1])


@torch.library.custom_op("minzero::expert_product_backward", mutates_args=())
def expert_product_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of rows and matrices. An expert without rows has a gradient of zeros."""
    gradient = gradient.contiguous()
    if has_grouped_product(x, weight):
        of_weight = F.grouped_mm(gradient.mT, x, offs=ends)
        # torch leaves what is not zero there on Blackwell GPUs (pytorch's issue 172439)
        without_rows = ends.diff(prepend=ends.new_zeros(1)) == 0
        return F.grouped_mm(gradient, weight, offs=ends), of_weight.masked_fill_(without_rows[:, None, None], 0)
    of_rows, of_weight = torch.empty_like(x), torch.empty_like(weight)
    for expert, rows in enumerate(ranges(ends)):
        torch.mm(gradient[rows], weight[expert], out=of_rows[rows])
        torch.mm(gradient[rows].T, x[rows], out=of_weight[expert])
    return of_rows, of_weight


@expert_product_backward.register_fake
def _(gradient, x, weight, ends):
    return torch.empty_like(x), torch.empty_like(weight)


def backward_of_product(ctx, gradient):
    return *expert_product_backward(gradient, *ctx.saved_tensors), None


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


expert_product.register_autograd(backward_of_product, setup_context=keep_inputs)


@register_flop_formula(torch.ops.minzero.expert_product)
def flops_of_product(x, weight, ends, *_, **__):
    """For torch's counter: each argument is a shape."""
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.minzero.expert_product_backward)
def flops_of_backward(gradient, x, weight, ends, *_, **__):
    return 4 * x[0] * weight[1] * weight[2]


# An operator of its own, for its gradient: that of an index adds to rows in any order, and rounds otherwise each time.
@torch.library.custom_op("minzero::take_rows", mutates_args=())
def take_rows(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    """Rows order // copies of x (N, C), as (N copies, C). order: (N copies,), a permutation; inverse: that back."""
    return x[order // copies]


@take_rows.register_fake
def _(x, order, inverse, copies):
    return x.new_empty(len(order), x.shape[1])


def keep_inverse(ctx, inputs, output):
    _, _, inverse, ctx.copies = inputs
    ctx.save_for_backward(inverse)


def backward_of_rows(ctx, gradient):
    (inverse,) = ctx.saved_tensors
    return gradient[inverse].unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None, None


take_rows.register_autograd(backward_of_rows, setup_context=keep_inverse)


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
        # before the router: minzero.recompute keeps every other product
        shared = None
        if self.shared is not None:
            shared, _ = self.shared(x)
        tokens = x.flatten(0, 1)
        k = self.n_expert_per_token
        logits = self.router(tokens).float()
        probabilities = logits.softmax(dim=-1)  # (N, E)
        weights, chosen = probabilities.topk(k)  # (N, k)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        # all N k pairs of a token and an expert, by expert, and where the pairs of each expert end
        experts, order = chosen.flatten().sort(stable=True)
        every_expert = torch.arange(logits.shape[-1], device=x.device)
        ends = torch.searchsorted(experts, every_expert, right=True, out_int32=True)
        inverse = order.argsort()
        rows = self.activate(self.up(take_rows(tokens, order, inverse, k), ends))
        # back in the tokens' order, and summed
        outputs = take_rows(self.down(rows, ends), inverse, order, 1).view(*weights.shape, -1)
        y = (outputs * weights[..., None].type_as(outputs)).sum(dim=1).view_as(x)
        y = F.dropout(y, self.dropout, self.training)
        if shared is not None:
            y = y + shared
        return y, routing_of(logits, probabilities, ends.diff(prepend=ends.new_zeros(1)))


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
