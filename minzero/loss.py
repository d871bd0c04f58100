"""The loss: a cross-entropy that is computed together with the output layer, one chunk of tokens at a time.

Shapes in comments: N tokens, C = n_embd, V token ids."""

import math

import torch
from torch import distributed
from torch.nn import functional as F

from minzero.sizes import IGNORE_INDEX, padded_vocab_size


def cross_entropy(logits, targets, picked, vocab_size, with_gradient=True):
    """logits (N, >= V), targets (N, 1), picked (N, 1), the targets' logits -> sum of the cross-entropies in nats over
    the targets that are not IGNORE_INDEX. Columns from V = vocab_size on do not count. All sums in float32.

    with_gradient: `logits` becomes the gradient, softmax(logits) - onehot(target), of all rows."""
    counts = targets != IGNORE_INDEX
    targets = targets.clamp(min=0)
    if logits.shape[1] > vocab_size:
        logits[:, vocab_size:] = -math.inf
    if torch.compiler.is_compiling():
        # No gather: torch 2.11's compiler for CPUs moves it after the last line, where the logits are gone. No scatter:
        # compiled, it is several passes, and a comparison none.
        log_sum = logits.float().logsumexp(dim=-1, keepdim=True)
        loss = ((log_sum - picked.float()) * counts).sum()
        is_target = torch.arange(logits.shape[1], device=logits.device) == targets
        gradient = (logits.float() - log_sum).exp() - is_target.float() if with_gradient else None
    else:  # one float32 copy of the logits at a time
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        loss = -(log_probabilities.gather(1, targets) * counts).sum()
        minus_one = torch.full_like(loss, -1.0).expand(targets.shape)
        gradient = log_probabilities.exp_().scatter_add_(1, targets, minus_one) if with_gradient else None
    if with_gradient:
        logits.copy_(gradient)
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """The output layer and its loss, chunk by chunk of tokens, so that no more than `chunk` rows of logits
    exist at a time, where all of them in float32 would often be the largest tensor of the run.

    apply(x (N, C), weight (V, C), targets (N,), chunk, with_gradient, cross_entropy) -> sum of the
    cross-entropies in nats over the targets that are not IGNORE_INDEX, float32. cross_entropy: as the function above.
    The gradient of a chunk's logits follows from the same softmax as its loss, so the forward pass turns it into
    the gradients of x and weight, and nothing is computed twice (the idea of Liger Kernel's fused linear
    cross-entropy: Hsu et al. 2024, arXiv 2410.10989, section 3.2)."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, with_gradient, cross_entropy):
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        vocab_size = len(weight)
        if padding := padded_vocab_size(vocab_size, x.is_cuda) - vocab_size:
            weight = F.pad(weight, (0, 0, 0, padding))
        all_logits = x.new_empty(min(chunk, len(x)), len(weight))
        grad_x = torch.empty_like(x) if with_gradient else None
        of_weight = with_gradient and ctx.needs_input_grad[1]  # not where it is frozen
        grad_weight = None
        for first in range(0, len(x), chunk):
            rows = slice(first, first + chunk)
            logits = torch.mm(x[rows], weight.t(), out=all_logits[: len(x) - first])
            wanted = targets[rows, None]
            picked = logits.gather(1, wanted.clamp(min=0))
            total += cross_entropy(logits, wanted, picked, vocab_size, with_gradient)
            if with_gradient:
                grad = logits  # what cross_entropy has made of them
                counts = wanted != IGNORE_INDEX
                torch.mm(grad, weight, out=grad_x[rows]).mul_(counts)  # rows that do not count
                if not of_weight:
                    continue
                counted = x[rows] * counts
                if first == 0:
                    grad_weight = grad.t() @ counted
                    continue
                # summed in float32; the product has no name, so it is freed before the next is made
                grad_weight = grad_weight.float().add_(grad.t() @ counted)
        if with_gradient:
            ctx.save_for_backward(grad_x, grad_weight[:vocab_size] if of_weight else None)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_x, grad_weight = ctx.saved_tensors
        # sums over all tokens may exceed fp16 before they are scaled, so the types are narrowed last
        grad_x = (grad_x * grad_total).to(grad_x.dtype)
        if grad_weight is not None:
            grad_weight = torch.mul(grad_weight, grad_total, out=torch.empty_like(grad_weight, dtype=ctx.weight_dtype))
        return grad_x, grad_weight, None, None, None, None


def equal_weights(batches, world_size, device):
    """The loss weight of each of this rank's micro-batches in one step, as a list: with them, every target of the
    global batch that is not IGNORE_INDEX counts the same. Without them, a target of a micro-batch with few others would
    count more. batches: tuples, the targets second. Every rank must call this."""
    counts = torch.tensor(
        [(targets != IGNORE_INDEX).sum() for _, targets, *_ in batches], dtype=torch.float64, device=device
    )
    total = counts.sum()
    distributed.all_reduce(total)
    return (counts * len(batches) * world_size / total.clamp(min=1)).tolist()
