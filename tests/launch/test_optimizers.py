"""Muon at every ZeRO stage against a plain loop in one process, resumed, moved to other ranks, with bad steps; and
width transfer: three launches in all."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import train
from minzero import checkpoint_state
from minzero.config.build import build
from minzero.metrics import read_metrics
from minzero.schedule import learning_rate
from minzero.tensor_files import SavedPieces
from model import GPT
from tests.helpers.processes import deepspeed_command, run
from tests.launch.optimizer_settings import MOVES, SETTINGS, SETTINGS_OF_MODELS, STEPS

pytestmark = pytest.mark.slow  # some sixty runs of 50 steps
SCRIPT = Path(__file__).with_name("optimizers.py")
RUNS = [f"{precision}_stage{stage}_{offload}" for stage, precision, offload in SETTINGS]
OF_MODELS = [f"{model}_stage{stage}" for model, stage in SETTINGS_OF_MODELS]
OF_MUP = [f"mup_stage{stage}" for stage in (0, 1, 2, 3)]
RESUMED = [f"{name}_ranks{ranks}" for name in (*RUNS, *OF_MODELS, OF_MUP[3]) for ranks in (1, 2)]
MOVED = {name: origin for moves in MOVES.values() for name, (origin, _) in moves.items()}


@pytest.fixture(scope="module")
def folder(small_data, tmp_path_factory):
    """What optimizers.py left after running on two ranks, on one, and on two again."""
    out = tmp_path_factory.mktemp("optimizers")
    for part, ranks in (("first", 2), ("second", 1), ("third", 2)):
        command = [SCRIPT, small_data, out, part]
        done = run(deepspeed_command(*command) if ranks > 1 else [sys.executable, *command], timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert (out / f"done_{part}").exists()
    return out


def steps_of(run_folder):
    return [line for line in read_metrics(run_folder) if "loss" in line]


def losses(run_folder):
    return [line["loss"] for line in steps_of(run_folder)]


def config_of(run_folder):
    """The Config of a run that was made."""
    saved = json.loads((run_folder / "config.json").read_text())
    return build({name: saved[name] for name in ("model", "data", "train", "deepspeed")}, "")


# -- the reference: the post of Jordan et al. 2024, written out for one process ---------------------


def rows_of_matrices(model, name, shape):
    """The rows of each matrix that Muon updates in a parameter; none of AdamW's."""
    if len(shape) < 2 or not name.startswith("blocks.") or "router" in name:
        return []
    if "qkv" in name:
        key_rows = model.kv_heads * model.head_size
        return [shape[-2] - 2 * key_rows, key_rows, key_rows]
    return [shape[-2] // 2] * 2 if ".up." in name and model.mlp == "swiglu" else [shape[-2]]


def newton_schulz(matrix):
    """DeepSpeed's function, in float32 here, times sqrt(max(1, rows / columns))."""
    from deepspeed.runtime.zero.muon import original_muon

    assert original_muon.ns_compute_dtype("gram") == torch.float32, "another processor: compare with a wider tolerance"
    function = original_muon.zeropower_via_gram_newtonschulz.__wrapped__  # what it compiles
    return function(matrix, steps=5) * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))


def muon_update(weight, direction, rows, rate, decay):
    """Update a parameter: of experts each one, and of each the matrices with these numbers of rows."""
    weight.mul_(1 - rate * decay)
    experts = zip(weight, direction, strict=True) if weight.ndim == 3 else [(weight, direction)]
    for matrix, of_matrix in experts:
        for part, of_part in zip(matrix.split(rows), of_matrix.split(rows), strict=True):
            part.sub_(newton_schulz(of_part), alpha=rate)


def train_in_one_process(config):
    """(the losses, {name: weight}) of a run by torch's AdamW, DeepSpeed's orthogonalisation and nothing else."""
    model, options = GPT(config.model, config.train.seed), config.train
    data, _ = train.open_data(config)
    named = dict(model.named_parameters())
    rows = {name: rows_of_matrices(config.model, name, weight.shape) for name, weight in named.items()}
    rest = [weight for name, weight in named.items() if not rows[name]]
    groups = [{"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": options.weight_decay}]
    groups += [{"params": [weight for weight in rest if weight.ndim == 1], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=tuple(options.betas), eps=options.eps)
    momentum = {name: torch.zeros_like(weight) for name, weight in named.items() if rows[name]}
    beta, found = options.muon_momentum, []
    for step in range(1, STEPS + 1):
        size = options.micro_batch_size
        batches = list(data.batches((step - 1) * 4 * size, 0, 1, size, 4))
        of_step = [model(*map(torch.from_numpy, batch[:2])) / 4 for batch in batches]
        sum(of_step).backward()
        found.append(float(sum(of_step).detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        rate = learning_rate(options, step * options.global_batch_tokens)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        with torch.no_grad():
            for name, mean in momentum.items():
                gradient = named[name].grad
                mean.copy_(beta * mean + (1 - beta) * gradient)
                direction = beta * mean + (1 - beta) * gradient  # Nesterov
                muon_update(
                    named[name], direction, rows[name], rate * options.muon_lr / options.lr, options.weight_decay
                )
        model.zero_grad()
    return found, named


def whole_tensors(path):
    """(the state of a checkpoint, everything that its pieces add up to: {(kind, parameter): flat tensor})."""
    state, whole = checkpoint_state.read_state(path), {}
    saved, model = SavedPieces(path, state, verify=True), build({"model": state["config"]["model"]}, "").model
    for name, shape in state["parameters"].items():
        by_muon = bool(rows_of_matrices(model, name, shape)) and state["config"]["train"]["optimizer"] == "muon"
        for kind in ("fp32", "exp_avg") if by_muon else ("fp32", "exp_avg", "exp_avg_sq"):
            whole[kind, name] = torch.full((math.prod(shape),), torch.nan)
            saved.copy_overlap(whole[kind, name], 0, kind, name)
    return state, whole


@pytest.fixture(scope="module")
def reference(folder):
    """The losses and weights of the same run in one process, each computed once."""
    found = {}

    def of(name):
        model = name.split("_")[0]
        if model not in found:
            found[model] = train_in_one_process(config_of(folder / name))
        return found[model]

    return of


@pytest.mark.parametrize(
    "name", [f"{name}_ranks{ranks}" for name in (*RUNS, *OF_MODELS) if "bf16" not in name for ranks in (1, 2)]
)
def test_50_steps_are_those_of_one_process(folder, reference, name):
    expected, weights = reference(name)
    found = losses(folder / name)
    assert len(found) == len(expected) == STEPS and expected[-1] < 0.5 * expected[0]
    difference = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    _, tensors = whole_tensors(folder / name / "checkpoints" / f"step_{STEPS:08d}")
    # without biases: that of keys has no gradient but rounding errors, which Adam makes as large as any
    matrices = {key: weight.detach().flatten() for key, weight in weights.items() if weight.ndim > 1}
    of_weights = max(float((tensors["fp32", key] - weight).abs().max()) for key, weight in matrices.items())
    print(f"{name}: losses {difference:.1e}, weights {of_weights:.1e}")
    assert difference < 1e-5 and of_weights < 1e-5


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_continues_bit_for_bit(folder, name):
    whole, resumed = folder / name, folder / f"resumed_{name}"
    for ours, theirs in zip(steps_of(resumed), steps_of(whole), strict=True):
        assert all(ours[key] == theirs[key] for key in ("step", "loss", "grad_norm", "lr"))
    states = [checkpoint_state.read_state(path / "checkpoints" / f"step_{STEPS:08d}") for path in (whole, resumed)]
    assert states[0]["files"] == states[1]["files"], "weights, moments and random state, by checksum"
    assert states[0]["optimizer_steps"] == STEPS


@pytest.mark.parametrize("name", MOVED)
def test_a_run_moved_to_other_ranks_or_another_stage_continues_the_same(folder, name):
    expected, found = losses(folder / MOVED[name]), losses(folder / name)
    assert len(found) == STEPS
    difference = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    print(f"{name}: {difference:.1e}")
    assert difference < 5e-6


@pytest.mark.parametrize("ranks", [1, 2])
def test_loading_and_saving_again_keeps_every_bit(folder, ranks):
    middle = f"step_{STEPS // 2:08d}"
    _, expected = whole_tensors(folder / "fp32_stage3_none_ranks2" / "checkpoints" / middle)
    assert ("exp_avg", "blocks.0.mlp.up.weight") in expected and all(t.isfinite().all() for t in expected.values())
    again = sorted(folder.glob(f"again_*_ranks{ranks}"))
    assert len(again) == 4
    for path in again:
        state, found = whole_tensors(path / middle)
        assert len(state["files"]) == ranks and state["optimizer_steps"] == STEPS // 2
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), path


def test_bad_steps_were_skipped(folder):
    """optimizers.py compares weights and moments before and after each step, bit for bit."""
    for (stage, precision, _), kind, ranks in itertools.product(SETTINGS[:7], ("nan", "infinite"), (1, 2)):
        run_folder = folder / f"{kind}_{precision}_stage{stage}_ranks{ranks}"
        bad = [line["step"] for line in read_metrics(run_folder) if "bad_step" in line]
        assert bad == [3] and steps_of(run_folder)[-1]["skipped"] == 1, run_folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_width_transfer_losses_agree_between_stages(folder, ranks):
    expected = losses(folder / "mup_stage0_ranks1")
    assert expected[-1] < 0.5 * expected[0]
    for name in OF_MUP:
        found = losses(folder / f"{name}_ranks{ranks}")
        assert found == pytest.approx(expected, rel=5e-6), name
