"""Recomputation: the same loss and gradients bit for bit, less kept, and no more computed again than it says."""

import contextlib
import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch.utils.flop_counter import FlopCounterMode

from minzero.config.build import build
from minzero.config.sections import ModelConfig, Recomputation
from minzero.errors import UserError
from minzero.sizes import recomputed_flops_per_token
from model import GPT
from tests.helpers.variants import all_changed

SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 96, "init_std": 0.1}
GPT2 = ModelConfig(**SHAPE)
CHANGED = all_changed(**SHAPE)
OLMOE = ModelConfig(**SHAPE | {"bias": False, "n_expert": 6, "mlp": "swiglu", "mlp_hidden": 24, "n_shared_expert": 1})
TOKENS = torch.arange(2 * 64).view(2, 64) * 7 % 96


def step(config, compiled=False, dropout=0.0, **options):
    """Loss, gradients, bytes kept for the backward pass, and FLOPs of both passes."""
    model = GPT(dataclasses.replace(config, dropout=dropout), **options)
    if compiled:
        torch.compiler.reset()
        model.compile()
    kept = []

    def pack(tensor):
        kept.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(TOKENS, TOKENS)
    torch.manual_seed(1)
    with contextlib.nullcontext() if compiled else FlopCounterMode(display=False) as counted:
        loss = model(TOKENS, TOKENS)
        loss.backward()
    flops = 0 if compiled else counted.get_total_flops()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss.item(), gradients, sum(kept), flops


def equal(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("config", [GPT2, CHANGED, OLMOE], ids=["GPT-2", "everything changed", "experts"])
@pytest.mark.parametrize("wanted", [True, 2, "selective"])
def test_nothing_but_memory_changes(config, dropout, wanted):
    plain = step(config, dropout=dropout)
    assert equal(step(config, dropout=dropout, activation_checkpointing=wanted), plain)


@pytest.mark.parametrize("wanted", [1, 2])
def test_inputs_may_wait_in_cpu_memory(wanted):
    assert equal(step(GPT2, activation_checkpointing=wanted, activation_offload=True), step(GPT2))


def test_what_is_computed_again():
    """In the FLOPs of matrix products; torch stops before `down`, whose output nothing needs."""
    plain, every, second, selective = (
        step(GPT2, activation_checkpointing=wanted)[3] for wanted in (0, 1, 2, "selective")
    )
    tokens, width = TOKENS.numel(), GPT2.n_embd
    before_down = tokens * 2 * (3 + 1 + 4) * width**2  # attention on CPU is not counted
    assert every - plain == 3 * before_down and second - plain == 2 * before_down
    assert selective - plain == 3 * tokens * 2 * width**2, "attention's own projection alone"
    assert recomputed_flops_per_token(GPT2, "selective") * tokens == selective - plain


@pytest.mark.parametrize("config", [GPT2, OLMOE], ids=["GPT-2", "experts"])
def test_compiled_in_one_graph_for_all_blocks(config):
    """And each keeps less than the one before."""
    plain = step(config, compiled=True)
    kept = [plain[2]]
    for wanted in (0.5, "selective", 0.1, True):
        counters.clear()
        found = step(config, compiled=True, activation_checkpointing=wanted)
        assert found[0] == pytest.approx(plain[0], rel=1e-6)
        for name, gradient in found[1].items():
            torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=1e-6)
        assert counters["frames"]["total"] == counters["frames"]["ok"] <= 4, dict(counters["frames"])
        assert not counters["graph_break"], counters["graph_break"]
        kept.append(found[2])
    functorch_config.activation_memory_budget = 1.0
    torch.compiler.reset()
    assert kept[-1] < kept[-2] < kept[0] and kept[2] < kept[0] and kept[1] < kept[0], kept


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (False, Recomputation()),
        (True, Recomputation(every=1)),
        (3, Recomputation(every=3)),
        (1.0, Recomputation(every=1)),
        ("selective", Recomputation(every=1, selective=True)),
        (0.25, Recomputation(budget=0.25)),
    ],
)
def test_what_a_value_means(value, expected):
    config = build({"train": {"activation_checkpointing": value}}, "x")
    assert Recomputation.of(config.train.activation_checkpointing) == expected


@pytest.mark.parametrize(
    ("train", "dropout", "expected"),
    [
        ({"activation_checkpointing": "full"}, 0, 'found "full", expected true, false, a number or selective'),
        ({"activation_checkpointing": "full"}, 0.1, 'found "full", expected true, false, a number or selective'),
        ({"activation_checkpointing": 1.5}, 0, "found 1.5, expected a whole number k"),
        ({"activation_checkpointing": 0.5, "compile": False}, 0, "the compiler chooses what to keep"),
        ({"activation_checkpointing": 0.5}, 0.1, "whose gradients would be wrong"),
        ({"activation_checkpointing": "selective", "activation_offload": True}, 0, "takes true or a number k"),
    ],
)
def test_values_that_cannot_be_obeyed_are_refused(train, dropout, expected):
    with pytest.raises(UserError, match=f"^x: train.activation_checkpointing: .*{expected}"):
        build({"model": {"dropout": dropout}, "train": train}, "x")
