"""Which matrices Muon updates, how its rounds are dealt out, and what is refused."""

import dataclasses
import itertools
import math

import pytest
import torch

from minzero import muon
from minzero.config.build import build
from minzero.config.sections import ModelConfig
from minzero.engine import parameter_groups
from minzero.errors import UserError
from minzero.muon import Matrices, matrices_of, orthogonal, rounds_of
from minzero.planner.memory import checkpoint_bytes, simulate
from minzero.planner.settings import settings_of
from minzero.sizes import count_parameters, largest_of_muon, moment_bytes, parameter_sizes
from model import GPT
from tests.helpers.variants import variants

SMALL = ModelConfig(n_layer=2, n_head=4, n_embd=48, block_size=16, vocab_size=40)
LLAMA = dataclasses.replace(SMALL, n_kv_head=2, mlp="swiglu", mlp_hidden=40, bias=False, position="rotary")


def matrices(model):
    """{name: its Matrices} of those that Muon updates."""
    named = GPT(model).named_parameters()
    return {name: parts for name, weight in named if (parts := matrices_of(model, name, weight.shape))}


def test_matrices_of_a_model():
    of_gpt2, of_llama = matrices(SMALL), matrices(LLAMA)
    assert [name for name in of_gpt2 if name.startswith("blocks.0")] == [
        f"blocks.0.{part}.weight" for part in ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")
    ]
    assert len(of_gpt2) == len(of_llama) == 8
    qkv = "blocks.1.attention.qkv.weight"
    assert of_gpt2[qkv] == [Matrices(qkv, 0, (3, 48, 48))]
    assert of_llama[qkv] == [Matrices(qkv, 0, (1, 48, 48)), Matrices(qkv, 48 * 48, (2, 24, 48))]
    up = "blocks.1.mlp.up.weight"
    assert of_gpt2[up] == [Matrices(up, 0, (1, 192, 48))] and of_llama[up] == [Matrices(up, 0, (2, 40, 48))]


def test_matrices_of_experts():
    model = dataclasses.replace(LLAMA, n_expert=4, n_shared_expert=2)
    found = matrices(model)
    assert "blocks.0.mlp.router.weight" not in found
    assert found["blocks.0.mlp.up.weight"][0].shape == (8, 40, 48)
    assert found["blocks.0.mlp.down.weight"][0].shape == (4, 48, 40)
    assert found["blocks.0.mlp.shared.up.weight"][0].shape == (2, 80, 48)


def test_many_matrices_are_made_orthogonal_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(muon, "MUON_AT_A_TIME", 2 * 40 * 48)
    model = dataclasses.replace(LLAMA, n_expert=3)
    parts = matrices(model)["blocks.0.mlp.up.weight"]
    assert [(part.start, part.shape[0]) for part in parts] == [(0, 2), (2 * 40 * 48, 2), (4 * 40 * 48, 2)]
    assert all(part.shape[0] == 1 for part in matrices(model)["blocks.0.attention.qkv.weight"][:1])


@pytest.mark.parametrize("model", variants(LLAMA).values(), ids=variants(LLAMA))
def test_every_element_of_the_blocks_matrices_is_in_one_and_sizes_are_those_of_the_model(model):
    named = dict(GPT(model).named_parameters())
    found = matrices(model)
    for name, parts in found.items():
        covered = torch.zeros(named[name].numel(), dtype=torch.int)
        for part in parts:
            covered[part.start : part.start + part.elements] += 1
        assert (covered == 1).all(), name
    of_blocks = {n for n, weight in named.items() if n.startswith("blocks.") and weight.ndim > 1 and "router" not in n}
    assert of_blocks == found.keys()
    elements = sum(named[name].numel() for name in found)
    assert elements == model.n_layer * sum(parameter_sizes(model).hidden)
    total, _ = count_parameters(model)
    assert moment_bytes(model, "muon") * total == pytest.approx(8 * total - 4 * elements)
    assert moment_bytes(model, "adamw") == 8
    assert largest_of_muon(model) >= max(part.elements for parts in found.values() for part in parts)


def test_orthogonal():
    """Singular values near 1 (the iteration leaves 0.7 to 1.2), times sqrt(rows / columns) of a tall matrix; each of a
    batch by itself; zeros stay zeros."""
    batch = torch.randn(3, 96, 24, generator=torch.Generator().manual_seed(0))
    batch[2] = 0
    found = orthogonal(batch.clone())
    values = torch.linalg.svdvals(found[:2]) / 2
    assert found.dtype == torch.float32 and values.min() > 0.6 and values.max() < 1.3
    assert not found[2].any()
    assert torch.allclose(found[0], orthogonal(batch[:1].clone())[0], atol=1e-5)
    assert torch.linalg.svdvals(orthogonal(batch[:1].mT.clone())).max() < 1.3, "a wide one is not made larger"


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rounds_send_every_element_to_one_rank_and_back(ranks):
    """Every rank's sends are what the others receive, over a flat tensor that is cut anywhere."""
    found = matrices(LLAMA)
    sizes = {name: math.prod(GPT(LLAMA).get_parameter(name).shape) for name in found}
    total = sum(sizes.values())
    cut = -(-total // ranks)
    of_ranks = [{} for _ in range(ranks)]
    begin = 0
    for name, size in sizes.items():
        for rank, places in enumerate(of_ranks):
            first, end = max(begin, rank * cut), min(begin + size, (rank + 1) * cut)
            if end > first:
                places[name] = (0, first - begin, end - first, first - rank * cut)
        begin += size
    parts = list(itertools.chain(*found.values()))
    rounds = [rounds_of(parts, of_ranks, rank) for rank in range(ranks)]
    assert len({len(of_rank) for of_rank in rounds}) == 1
    sent = [torch.zeros(min(cut, total - rank * cut), dtype=torch.int) for rank in range(ranks)]
    for of_round in zip(*rounds, strict=True):
        for rank, one in enumerate(of_round):
            for owner, (offset, length) in enumerate(one.sent):
                sent[rank][offset : offset + length] += 1
                assert of_round[owner].received[rank][1] == length
            arrived = sum(length for _, length in one.received)
            assert arrived == (math.prod(one.shape) if one.shape else 0)
    assert all((counts == 1).all() for counts in sent)


def test_groups_have_rates_of_their_own():
    config = build({"train": {"optimizer": "muon", "lr": 1e-3, "muon_lr": 0.03}, "model": {"n_layer": 1}}, "")
    config.model = SMALL
    model = GPT(SMALL)
    of_muon, of_adamw, vectors = sorted(parameter_groups(model, config, matrices(SMALL)), key=lambda g: -len(g))
    assert len(of_muon["params"]) == 8 and of_muon["momentum"] == 0.95 and of_muon["weight_decay"] == 0.1
    assert of_muon["relative_rate"] == pytest.approx(30)
    assert len(of_adamw["params"]) == 2 and of_adamw.keys() == {"params", "weight_decay"}
    assert vectors["weight_decay"] == 0 and all(weight.ndim == 1 for weight in vectors["params"])


def test_the_planner_counts_one_moment_of_muons_weights():
    values = {"model": dataclasses.asdict(SMALL), "deepspeed": {"zero_optimization": {"stage": 2}}}
    total, _ = count_parameters(SMALL)
    of_muon = SMALL.n_layer * sum(parameter_sizes(SMALL).hidden)
    found = {}
    for optimizer in ("adamw", "muon"):
        settings = settings_of(build(values | {"train": {"optimizer": optimizer}}, ""), 2, 2**34)
        memory, _ = simulate(settings)
        found[optimizer] = checkpoint_bytes(settings, total), memory.peaks["step"][1]["optimizer"]
    assert found["adamw"][0] == 12 * total and found["muon"][0] == pytest.approx(12 * total - 4 * of_muon)
    assert found["adamw"][1] - found["muon"][1] == pytest.approx(4 * of_muon / 2, rel=1e-3)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"train": {"muon_lr": 0.1}}, r"train\.muon_lr: found 0\.1 with train\.optimizer adamw, .* or this to 0\.02"),
        ({"train": {"muon_momentum": 0.9}}, r"train\.muon_momentum: found 0\.9 with train\.optimizer adamw"),
        ({"train": {"optimizer": "muon", "lr": 0}}, r"train\.lr: found 0.* with train\.optimizer muon"),
        ({"train": {"optimizer": "muon", "muon_lr": 2, "weight_decay": 0.6}}, r"train\.weight_decay: found 0\.6 with"),
        ({"train": {"optimizer": "lion"}}, r"train\.optimizer: found \"?lion.*adamw, muon"),
        (
            {"train": {"optimizer": "muon", "init_from": "x"}, "lora": {"rank": 4}},
            r"train\.optimizer: found muon with lora\.rank 4: .* expected adamw",
        ),
        (
            {
                "train": {"optimizer": "muon"},
                "deepspeed": {
                    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}
                },
            },
            r"train\.optimizer: found muon with .*offload_optimizer\.device nvme",
        ),
        (
            {
                "train": {"optimizer": "muon"},
                "deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            },
            r"train\.optimizer: found muon with .*offload_optimizer\.ratio 0\.5",
        ),
    ],
)
def test_refused(values, expected):
    with pytest.raises(UserError, match=expected):
        build(values, "")
