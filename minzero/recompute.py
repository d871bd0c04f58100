"""Recomputation in the backward pass, to keep less in the forward pass (activation checkpointing: Chen et al. 2016,
arXiv 1604.06174)."""

from collections import Counter

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minzero import experts  # noqa: F401, the next line's operator of its own

EXPERTS = torch.ops.minzero.expert_product.default  # all experts' products with one matrix each
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
# every implementation of attention that is one operator
ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
VARLEN = "torch_attn._varlen_attn.default"  # another, which is there only where it was imported


def recompute(function, *inputs, selective=False, offload=False):
    """function(*inputs), keeping only the inputs for the backward pass, which computes the rest again, with the same
    dropout.

    selective: keep the outputs of attention and of every other matrix product too; that leaves less to compute again.
    offload: keep the first input in CPU memory; the others, which all blocks share, stay where they are."""
    context = {"context_fn": selective_contexts} if selective else {}
    if not offload:  # the compiler traces this, and not the lines below
        return checkpoint(function, *inputs, use_reentrant=False, **context)
    x, *rest = inputs
    with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda):
        return checkpoint(lambda x: function(x, *rest), x, use_reentrant=False, **context)


def selective_contexts():
    """The contexts in which torch runs the forward pass and the recomputation: they keep attention's output and the
    first, third, ... matrix product, and find them again (torchtitan's policy: arXiv 2410.06511, section 2.1.2). The
    products of experts are counted by themselves: of each expert's two the first is kept."""
    products = Counter()  # seen so far: in the forward pass, and in the recomputation

    def policy(context, operator, *_, **__):
        if operator in ATTENTION or str(operator) == VARLEN:
            return CheckpointPolicy.MUST_SAVE
        if operator in PRODUCTS or operator == EXPERTS:
            kind = context.is_recompute, operator == EXPERTS
            products[kind] += 1
            if products[kind] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
