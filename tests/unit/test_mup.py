"""Width transfer: the coordinate check of Yang et al. 2022 (arXiv 2203.03466, appendix D.1), and what it sets."""

import math

import pytest
import torch

import train
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config
from minzero.engine import build_engine, parameter_groups
from minzero.errors import UserError
from minzero.mup import role_of
from model import GPT

WIDTHS, STEPS, RATE = (32, 64, 128, 256), 4, 4e-3
VOCABULARY = 8  # embeddings of many tokens would not be orthogonal at the smallest width, and logits would fall
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_launched(one_rank, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")


def config_of(width, base, **more):
    """Heads of 16 channels at every width."""
    model = {"n_layer": 2, "n_head": width // 16, "n_embd": width, "block_size": 32, "vocab_size": VOCABULARY}
    model |= {"tie_embeddings": False, "init_std": 0.02, "norm": "rmsnorm", "bias": False, "position": "rotary"}
    settings = {"micro_batch_size": 8, "global_batch_tokens": 8 * 32, "mup_base_width": base, "lr": RATE}
    settings |= more.pop("train", {})
    return build({"model": model | more, "train": settings, "deepspeed": {"zero_optimization": {"stage": 0}}}, "")


def batches():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 4, (STEPS, 8, 33), generator=generator)
    return [(tokens[:, :-1], tokens[:, 1:]) for tokens in steps.cumsum(dim=-1) % VOCABULARY]


@torch.no_grad()
def coordinates(model, tokens):
    """The outputs of each block and the logits, by name."""
    found = {}

    def keep(name):
        return lambda module, inputs, output: found.update({name: output[0] if isinstance(output, tuple) else output})

    parts = {f"block {number}": block for number, block in enumerate(model.blocks)} | {"logits": model.head}
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return {name: output.clone() for name, output in found.items()}


def change_of(width, base, **more):
    """The mean absolute change of each coordinate over some steps of the real engine's optimizer."""
    config = config_of(width, base, **more)
    engine = build_engine(config, deepspeed_config(config, 1, "fp32", False), CPU)
    before = coordinates(engine.module, batches()[0][0])
    for inputs, targets in batches():
        train.set_learning_rate(engine, RATE)
        engine.backward(engine(inputs, targets))
        engine.step()
    after = coordinates(engine.module, batches()[0][0])
    return {name: float((after[name] - before[name]).abs().mean()) for name in before}


def slopes(base, **more):
    """{coordinate: the power of the width with which its change grows}, by least squares."""
    changes = [change_of(width, base, **more) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    x = x - x.mean()
    found = {}
    for name in changes[0]:
        y = torch.tensor([math.log(change[name]) for change in changes])
        found[name] = float((x * (y - y.mean())).sum() / (x * x).sum())
    print(base, {name: [round(change[name], 4) for change in changes] for name in found}, found)
    return found


def test_activations_change_as_much_at_every_width():
    with_mup, without = slopes(32), slopes(None)
    assert with_mup.keys() == without.keys() == {"block 0", "block 1", "logits"}
    assert all(abs(slope) < 0.1 for slope in with_mup.values()), with_mup
    assert all(slope > 0.5 for slope in without.values()), without


def test_with_muon_too():
    found = slopes(32, train={"optimizer": "muon"})
    assert all(abs(slope) < 0.1 for slope in found.values()), found


def test_at_its_base_width_nothing_changes():
    at_base, without = (config_of(64, base) for base in (64, None))
    models = [GPT(config.model, 1, base_width=config.train.mup_base_width) for config in (at_base, without)]
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    groups = [parameter_groups(models[0], config) for config in (at_base, without)]
    shared = [[{**group, "params": len(group["params"])} for group in found] for found in groups]
    assert shared[0] == shared[1] and "relative_rate" not in shared[0][0]


def test_rates_deviations_and_decay():
    """Table 3 of the paper, for Adam, at four times the base width."""
    more = {"n_expert": 4, "n_shared_expert": 1}
    config = config_of(128, 32, train={"weight_decay": 0.1}, **more)
    model = GPT(config.model, 1, base_width=32)
    groups = parameter_groups(model, config)
    found = {id(weight): group for group in groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        group = found[id(weight)]
        role = role_of(name) if weight.ndim > 1 else "vector"
        expected = {"hidden": 1 / 4, "output": 1 / 4, "input": 1, "vector": 1}[role]
        assert group.get("relative_rate", 1) == expected, name
        decay = 0.0 if role == "vector" else 0.1
        assert group["weight_decay"] * expected == pytest.approx(decay), name
        deviation = {"hidden": 0.01, "output": 0.005, "input": 0.02}.get(role)
        if deviation:
            residual = name.endswith(("proj.weight", "down.weight"))
            assert float(weight.detach().std()) == pytest.approx(deviation / (2 if residual else 1), rel=0.1), name
    roles = {role_of(name) for name, weight in model.named_parameters() if weight.ndim > 1}
    assert roles == {"hidden", "output", "input"}
    assert role_of("blocks.0.mlp.router.weight") == "output" and role_of("blocks.0.mlp.shared.up.weight") == "hidden"


def test_it_is_off_by_default():
    config = config_of(64, None)
    assert build({}, "").train.mup_base_width is None
    groups = parameter_groups(GPT(config.model), config)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "values, expected",
    [
        (
            {"train": {"mup_base_width": 32}},
            r"train\.mup_base_width: found 32 with model\.tie_embeddings true: .*false",
        ),
        (
            {
                "train": {"mup_base_width": 32, "init_from": "x"},
                "model": {"tie_embeddings": False},
                "lora": {"rank": 4},
            },
            r"train\.mup_base_width: found 32 with lora\.rank 4",
        ),
    ],
)
def test_refused(values, expected):
    with pytest.raises(UserError, match=expected):
        build(values, "")
