"""torch.compile: not tried where it is of no use, not taken where it computes something else."""

import pytest
import torch

import model
from minzero import compiled
from minzero.config.sections import ModelConfig
from minzero.loss import cross_entropy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_compilation_is_not_tried_where_it_is_not_asked_for():
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16)
    assert compiled.why_not_compiled(False, config, CUDA, "torch") == "not asked for"
    assert "CPU" in compiled.why_not_compiled("auto", config, CPU, "torch")


def wrong_loss(*arguments):
    return cross_entropy(*arguments) * (1.01 if torch.compiler.is_compiling() else 1)


def without_gradient(mlp, x):
    return right_mlp(mlp, x.detach() if torch.compiler.is_compiling() else x)


def weight_without_gradient(mlp, x):
    up = mlp.up.weight.detach() if torch.compiler.is_compiling() else mlp.up.weight
    return mlp.down(torch.nn.functional.gelu(torch.nn.functional.linear(x, up, mlp.up.bias), approximate="tanh"))


right_mlp = model.MLP.forward


@pytest.mark.parametrize(
    ("part", "name", "wrong", "expected"),
    [
        (model, "cross_entropy", wrong_loss, "loss is"),
        (model.MLP, "forward", without_gradient, "gradient of"),
        (model.MLP, "forward", weight_without_gradient, "gradient of blocks.0.mlp.up.weight is"),
    ],
)
def test_a_compiler_that_computes_something_else_is_not_taken(monkeypatch, part, name, wrong, expected):
    """As torch 2.11's did: another loss on CPUs, and no gradient where a custom linear function added a bias."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=64)
    torch.compiler.reset()
    assert compiled.fault_of_compiled(model.GPT(config)) is None
    monkeypatch.setattr(part, name, wrong)
    torch.compiler.reset()
    assert expected in (compiled.fault_of_compiled(model.GPT(config)) or "")
    torch.compiler.reset()


def test_a_linear_function_of_deepspeeds_own_is_not_compiled():
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=64)
    zero = {"stage": 3, "memory_efficient_linear": True}
    assert "memory_efficient_linear is true" in compiled.why_not_compiled(True, config, CPU, "torch", zero=zero)
