"""torch.compile: not tried where it is of no use, not taken where it computes something else."""

import dataclasses

import pytest
import torch
from torch._inductor import compile_fx

import model
from minzero import compiled
from minzero.config.sections import ModelConfig
from minzero.loss import cross_entropy
from tests.helpers.variants import all_changed

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


def test_a_width_that_leaves_weights_at_odd_addresses_is_not_compiled():
    """From stage 1 on, weights lie one after the other in a common buffer."""
    odd = ModelConfig(n_layer=1, n_head=5, n_embd=100, block_size=32, vocab_size=64)
    reason = compiled.why_not_compiled(True, odd, CPU, "torch", zero={"stage": 3})
    assert reason.startswith("model.n_embd 100 is no multiple of 8")
    keys = ModelConfig(n_layer=1, n_head=16, n_kv_head=1, n_embd=64, block_size=32, vocab_size=64)
    assert compiled.odd_width(keys) == "the width of keys and values, 4"
    assert compiled.odd_width(ModelConfig(n_head=12, n_embd=768)) is None
    of_heads = ModelConfig(n_layer=1, n_head=4, n_embd=64, head_dim=10, block_size=32, vocab_size=64)
    assert compiled.odd_width(of_heads) is None
    assert compiled.odd_width(dataclasses.replace(of_heads, qk_norm="head")) == "the width of a head, 10"


def test_the_small_model_has_every_kind_of_layer():
    """And what the options need: a window within its sequence, and channels that are rotated."""
    config = all_changed(
        n_layer=9, n_head=2, n_embd=160, head_dim=80, block_size=512, vocab_size=64, rotary_fraction=0.05
    )
    config = dataclasses.replace(config, no_rotary_layers=[7], sliding_window=100, full_attention_layers=4)
    small = compiled.small_config(config)
    small.check()
    kinds = [(small.has_rotary(layer), small.window_of(layer)) for layer in range(small.n_layer)]
    assert kinds == [(True, 8), (False, None)] and small.block_size > 8
    assert compiled.small_config(ModelConfig()).n_layer == 1
    experts = compiled.small_config(dataclasses.replace(config, n_expert=128, n_expert_per_token=8))
    assert experts.n_expert == experts.n_expert_per_token == 4
    torch.compiler.reset()
    assert compiled.fault_of_small_model(config, torch.float32, "torch", 0, False) is None
    torch.compiler.reset()


def test_parts_that_fail_with_their_true_sizes_are_told(monkeypatch, capfd):
    """The small model was compiled, and only then the compiler fails, as for want of a GPU's shared memory."""

    def fails(*_, **__):
        raise RuntimeError("No valid triton configs. OutOfResources: shared memory\nand a second line")

    torch.compiler.reset()
    gpt = model.GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64))
    compiled.compile_model(gpt)
    compiled.run_once(gpt)
    assert compiled.failure_in_words() is None
    gpt = model.GPT(ModelConfig(n_layer=2, n_head=2, n_embd=48, block_size=32, vocab_size=64))
    torch.compiler.reset()
    compiled.compile_model(gpt)
    monkeypatch.setattr(compile_fx, "compile_fx_inner", fails)
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", fails)
    loss, _ = compiled.run_once(gpt)
    words = compiled.failure_in_words()
    torch.compiler.reset()
    assert loss > 0 and "parts could not be compiled and run without; the first: " in words, words
    assert "No valid triton configs. OutOfResources: shared memory" in words and "\n" not in words
    assert "Traceback" not in capfd.readouterr().err, "the compiler's own log of it"
