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
        weight = with_padding(weight)
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


class TokenLogProbabilities(torch.autograd.Function):
    """The output layer and the log-probability of each target, chunk by chunk of tokens as LinearCrossEntropy.

    apply(x (N, C), weight (V, C), targets (N,), chunk) -> (N,) float32, 0 where a target is IGNORE_INDEX. How much a
    token counts is known only when all of its pair are, so the backward pass computes the logits again, in place of
    keeping them."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):
        found = torch.empty(len(x), dtype=torch.float32, device=x.device)
        log_sums = torch.empty_like(found)
        padded = with_padding(weight)
        for first in range(0, len(x), chunk):
            rows = slice(first, first + chunk)
            logits = (x[rows] @ padded.t())[:, : len(weight)]
            log_sums[rows] = logits.float().logsumexp(dim=-1)
            picked = logits.gather(1, targets[rows, None].clamp(min=0))[:, 0]
            found[rows] = picked.float() - log_sums[rows]
        # the parameter itself, and no copy: ZeRO-3 gathers it again before the backward pass
        ctx.save_for_backward(x, weight, targets, log_sums)
        ctx.chunk = chunk
        return found.masked_fill_(targets == IGNORE_INDEX, 0)

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets, log_sums = ctx.saved_tensors
        grad = grad.masked_fill(targets == IGNORE_INDEX, 0)[:, None]
        # with the loss scale of fp16 it may exceed that type, so the products are made without its size
        scale = grad.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        grad = grad / scale
        grad_x = torch.empty_like(x)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # not where it is frozen
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        padded = with_padding(weight)
        for first in range(0, len(x), ctx.chunk):
            rows = slice(first, first + ctx.chunk)
            logits = (x[rows] @ padded.t())[:, : len(weight)]
            of_logits = (logits.float() - log_sums[rows, None]).exp_().neg_()
            of_logits.scatter_add_(1, targets[rows, None].clamp(min=0), torch.ones_like(grad[rows]))
            of_logits = of_logits.mul_(grad[rows]).to(x.dtype)
            grad_x[rows] = (of_logits @ weight).float() * scale
            if grad_weight is not None:
                grad_weight += of_logits.t() @ x[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(weight.dtype)
        return grad_x, grad_weight, None, None


def with_padding(weight):
    """The output layer's weight (V, C) with rows of zeros, see padded_vocab_size."""
    padding = padded_vocab_size(len(weight), weight.is_cuda) - len(weight)
    return F.pad(weight, (0, 0, 0, padding)) if padding else weight


def equal_weights(batches, world_size, device):
    """The loss weight of each of this rank's micro-batches in one step, as a list: with them, every target of the
    global batch that is not IGNORE_INDEX counts the same, and so does every pair where there are pairs. Without them,
    one of a micro-batch with few others would count more. batches: as of a Mixture, the targets second, a PairStream's
    reference fourth. Every rank must call this."""
    counts = torch.tensor([what_counts(*batch) for batch in batches], dtype=torch.float64, device=device)
    total = counts.sum()
    distributed.all_reduce(total)
    return (counts * len(batches) * world_size / total.clamp(min=1)).tolist()


def what_counts(inputs, targets, positions=None, reference=None):
    """The number of targets that count in a batch, or of its pairs."""
    if reference is None:
        return (targets != IGNORE_INDEX).sum()
    return (reference == reference).sum() // 2  # others are NaN
