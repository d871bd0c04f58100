"""The products of experts: one operator, with the results and gradients of one product after the other."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from minzero import experts
from model import GPT
from tests.helpers.trained_runs import FAMILIES

ROWS, INPUTS, OUTPUTS = 24, 16, 40


def tensors(dtype, counts):
    """Rows, matrices and a gradient, and where the rows of each expert end."""
    generator = torch.Generator().manual_seed(1)
    shapes = (ROWS, INPUTS), (len(counts), OUTPUTS, INPUTS), (ROWS, OUTPUTS)
    x, weight, gradient = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    return x.requires_grad_(), torch.nn.Parameter(weight), gradient, ends


@pytest.mark.parametrize("counts", [(9, 0, 4, 11), (0, 0, 0, 24), (24, 0, 0, 0), (6, 6, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_and_gradients_are_those_of_each_expert_by_itself(dtype, counts):
    """In bf16 of one kernel, else of a loop. An expert without rows has a gradient of zeros."""
    x, weight, gradient, ends = tensors(dtype, counts)
    assert experts.has_grouped_product(x, weight) == (dtype == torch.bfloat16)
    y = experts.expert_product(x, weight, ends)
    found = torch.autograd.grad(y, (x, weight), gradient)
    plain = torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(counts), weight.unbind(), strict=True)])
    expected = torch.autograd.grad(plain, (x, weight), gradient)
    for ours, theirs in zip((y, *found), (plain, *expected), strict=True):
        assert ours.is_contiguous() and torch.allclose(ours, theirs, rtol=1e-2 if dtype != torch.float32 else 1e-5)
    for number, count in enumerate(counts):
        assert found[1][number].any() == bool(count)


def test_what_is_empty_for_the_kernel_is_zero(monkeypatch):
    """Whatever torch's kernel leaves in the gradient of an expert without rows."""
    grouped = F.grouped_mm

    def leaves_numbers(left, right, offs):
        y = grouped(left, right, offs=offs)
        if y.dim() == 3:
            y[1] = torch.nan
        return y

    monkeypatch.setattr(F, "grouped_mm", leaves_numbers)
    x, weight, gradient, ends = tensors(torch.bfloat16, (9, 0, 4, 11))
    experts.expert_product(x, weight, ends).backward(gradient)
    assert torch.isfinite(weight.grad).all() and not weight.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parameter_itself_is_kept_for_the_backward_pass(dtype):
    """A view of it would keep ZeRO-3's gathered weights alive."""
    x, weight, _, ends = tensors(dtype, (9, 0, 4, 11))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        experts.expert_product(x, weight, ends)
    assert any(tensor is weight for tensor in kept)
    assert sum(tensor.untyped_storage().data_ptr() == weight.data_ptr() for tensor in kept) == 1


def test_the_operator_is_as_the_compiler_expects_it():
    x, weight, _, ends = tensors(torch.float32, (9, 0, 4, 11))
    torch.library.opcheck(torch.ops.minzero.expert_product.default, (x, weight, ends))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_is_the_same_each_time(compiled):
    """With several threads, and more experts a token than two: an index's own gradient adds in any order."""
    config = dataclasses.replace(FAMILIES["olmoe"], n_embd=64, n_expert_per_token=3, block_size=256)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = GPT(config).train()
        if compiled:
            model.compile()
        tokens = torch.randint(config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
        gradients = []
        for _ in range(4):
            model.zero_grad()
            model(tokens, tokens).backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    finally:
        torch.set_num_threads(threads)
    for again in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], again, strict=True))


def test_rows_are_copied_and_their_gradients_added_up():
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    taken = experts.take_rows(x, order, order.argsort(), 3)
    assert torch.equal(taken, x[order // 3])
    upstream = torch.randn(15, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad(taken, x, upstream)
    (expected,) = torch.autograd.grad(x[order // 3], x, upstream)
    assert torch.allclose(found, expected)
    torch.library.opcheck(experts.take_rows, (x, order, order.argsort(), 3))
