"""The parts of the loop that need no launcher."""

import dataclasses
import inspect
import json
import math

import pytest
import torch

from minzero import checkpoint, dist, engine, watchdog
from minzero.config.sections import Config, ModelConfig, TrainConfig
from minzero.data import order
from minzero.data.mixture import Mixture
from minzero.data.shards import TokenStream
from minzero.errors import UserError
from minzero.evaluate_loss import validation_loss
from minzero.run import Run
from minzero.run_folder import RunFolder
from minzero.schedule import learning_rate
from minzero.sizes import count_parameters
from minzero.summary import changed_settings, epochs, start_lines
from model import GPT
from tests.helpers.processes import write_small_data
from train import Setup

CPU = torch.device("cpu")


def test_learning_rate_warms_up_falls_and_ends_as_told():
    """Ancestors' fault 2: counted in micro-batches, the rate never fell as meant."""
    settings = TrainConfig(lr=1.0, min_lr_ratio=0.1, warmup_tokens=1000, max_tokens=11000)
    assert learning_rate(settings, 500) == 0.5
    assert learning_rate(settings, 1000) == 1.0
    assert learning_rate(settings, 6000) == pytest.approx(0.55)
    assert learning_rate(settings, 11000) == pytest.approx(0.1)
    assert learning_rate(settings, 99000) == pytest.approx(0.1)
    settings.schedule = "linear"
    assert learning_rate(settings, 3500) == pytest.approx(0.1 + 0.9 * 0.75)
    settings.schedule = "constant"
    assert learning_rate(settings, 11000) == 1.0


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_only_matrices_are_decayed(norm):
    """Ancestors' fault 2: norms were decayed because the filter named a parameter that does not exist."""
    config = Config(model=ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=16, norm=norm))
    model = GPT(config.model)
    decayed, spared = engine.parameter_groups(model, config)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in spared["params"])
    assert not any("norm" in names[id(p)] or "bias" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_ranks_read_disjoint_samples_that_together_are_one_ranks():
    """Ancestors' fault 1: every rank read the same stream."""
    for ranks, micro, accumulation in ((1, 4, 6), (2, 4, 3), (3, 2, 4), (4, 6, 1), (24, 1, 1)):
        for step in (0, 7):
            parts = [
                order.sample_numbers(step * 24, a, rank, ranks, micro)
                for a in range(accumulation)
                for rank in range(ranks)
            ]
            assert sorted(int(i) for part in parts for i in part) == list(range(step * 24, (step + 1) * 24))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_validation_is_the_same_whatever_the_micro_batch(small_data, micro_batch_size):
    """13 windows do not divide by any of these: the rest is filled up and must not count."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=64, init_std=0.2))
    stream = TokenStream(small_data, "val", 32)
    windows = order.validation_windows(stream.windows, 13)
    tokens, targets = (torch.from_numpy(array) for array in stream.batch(windows))
    expected = model.eval()(tokens, targets).item()
    assert len(set(windows.tolist())) == 13
    loss = validation_loss(model, stream, 13 * 32, micro_batch_size, torch.device("cpu"))
    assert loss == pytest.approx(expected, rel=1e-6) and model.training


def test_validation_over_several_ranks_adds_up_to_one(small_data, monkeypatch):
    """Each rank's part, computed one after the other; the sum over ranks is what all_reduce gives."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=64, init_std=0.2))
    stream, parts = TokenStream(small_data, "val", 32), []
    alone = validation_loss(model, stream, 13 * 32, 2, torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: parts.append(tensor.clone()))
    for rank in range(5):  # with 2 sequences each, rank 4 has nothing in the second round
        validation_loss(model, stream, 13 * 32, 2, torch.device("cpu"), rank, 5)
    losses, counts = sum(parts[::2]), sum(parts[1::2])  # of the windows, and how many targets
    assert counts.item() == 13 * 32 and losses.sum().item() / counts.item() == pytest.approx(alone, rel=1e-6)


def test_precision_auto_is_fp32_on_cpu():
    assert engine.resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert engine.resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_perplexity_of_the_untrained_model_is_about_the_vocabulary(small_data):
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=64))
    loss = validation_loss(model, TokenStream(small_data, "val", 32), 1000, 4, torch.device("cpu"))
    assert loss == pytest.approx(math.log(64), abs=0.1)


def test_evaluating_saving_and_loading_are_progress(small_data):
    """Longer than train.timeout_seconds in all, they are no hang."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=64))
    beats = []
    validation_loss(model, TokenStream(small_data, "val", 32), 13 * 32, 2, CPU, progress=lambda: beats.append("batch"))
    assert len(beats) == 7
    for function in (checkpoint.Saving.__init__, checkpoint.load):
        assert "progress" in inspect.signature(function).parameters


class Store:
    """The ranks' common store, with what the others have written into it."""

    def __init__(self, beats):
        self.beats = beats

    def multi_get(self, keys):
        known = self.beats | {"place/2": json.dumps([json.dumps(["node2"]), 1])}
        return [str(known[key]).encode() for key in keys]

    def add(self, key, number):
        assert (key, number) == ("beats", 0)
        return sum(self.beats.values())

    def check(self, keys):
        return False

    def set(self, key, value):
        assert key == "hangs"


def test_progress_of_another_rank_is_no_hang_and_none_of_any_is(monkeypatch, tmp_path):
    monkeypatch.setattr(watchdog.distributed, "get_world_size", lambda: 3)
    watch = watchdog.Watchdog(TrainConfig(out_dir=str(tmp_path), timeout_seconds=10))
    store = Store({"turns/0": 5, "turns/1": 5, "turns/2": 4})
    monkeypatch.setattr(dist, "ask_store", lambda action: action(store))
    long_ago = watch.last_heartbeat - 9

    def look():
        watch.last_heartbeat, watch.last_look = long_ago, 0
        watch.count_progress_of_others()
        return watch.last_heartbeat > long_ago

    assert not look(), "the first look has nothing to compare with"
    assert not look() and watch.who_hangs() == "rank 2 hangs on node2"
    store.beats["turns/2"] = 5
    assert look(), "rank 2 moved"
    assert not look() and watch.who_hangs() == "no rank makes progress"


def test_the_start_of_a_run_is_summed_up_in_six_lines(tmp_path, small_data):
    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=64)
    settings = TrainConfig(micro_batch_size=2, global_batch_tokens=256, max_tokens=15_000, out_dir=str(tmp_path))
    group, parameters = dist.Group(CPU, 0, 2), count_parameters(model)[0]
    setup = Setup(2, "fp32", 3, {}, {"zero_optimization.overlap_comm": True}, "torch", "asked for", {"device": "cpu"})
    state = {"step": 10, "tokens": 2560, "best_val_loss": None}
    data = Mixture({str(small_data): 1}, "train", 32, 64, 1)

    def lines(**changed):
        config = Config(model=model, train=dataclasses.replace(settings, **changed))
        run = Run(config, group, RunFolder(tmp_path, 0), None, setup, state)
        run.parameters = parameters
        return start_lines(run, data, "on CPU it gains little")

    assert lines() == [
        "4,848 parameters, 1 layers of width 16, 2 heads, vocabulary 64, context 32 tokens",
        "fp32, ZeRO-3 on 2 x cpu; kernels: torch (asked for); compiled: no (on CPU it gains little)",
        "256 tokens a step = 2 (ranks) x 2 (micro-batches) x 2 (sequences) x 32 (tokens)",
        f"58 steps, 10 of them done; 14,848 tokens: 0.25 epochs of {small_data} (60,000 tokens)",
        f"run in {tmp_path}: all settings and versions in its config.json, numbers in metrics.jsonl",
        "to stop: Ctrl-C or SIGTERM saves and ends after the step; the same command continues",
    ]
    warned = lines(warmup_tokens=20_000)
    assert len(warned) == 7 and "train.warmup_tokens 20,000 exceeds train.max_tokens 15,000" in warned[-1]
    verbose = lines(verbose=True)
    assert [line.split(": {")[0] for line in verbose[:5]] == ["model", "data", "train", "lora", "deepspeed"]
    assert verbose[5] == '"auto" of deepspeed: zero_optimization.overlap_comm true'


def test_each_folder_of_a_mixture_has_epochs_of_its_own(small_data, tmp_path):
    other = write_small_data(tmp_path)
    mixture = Mixture({str(small_data): 3, str(other): 1}, "train", 32, 64, 1)
    expected = {small_data: f"1.50 epochs of {small_data} (60,000 tokens)"}
    expected[other] = f"0.50 epochs of {other} (60,000 tokens)"
    assert epochs(120_000, mixture) == ", ".join(expected[folder] for folder in sorted(expected, key=str))
    assert epochs(60, mixture).startswith("0.0")


def test_a_change_of_settings_is_said_whatever_the_checkpoint_was_set_to():
    """The folder is held by then: a key whose range was narrowed since must not end the run."""
    now = Config(train=TrainConfig(max_tokens=2 * 10**6, global_batch_tokens=1000, lr=1e-3))
    was = now.to_dict()
    was["train"] |= {"max_tokens": 10**6, "betas": [0.9, 0.999995], "spike_zscore": 0.5, "a_key_of_the_past": 1}
    state = {"config": was, "step": 500, "tokens": 500_000}
    line = changed_settings(state, now, {})
    assert "train.max_tokens 1000000 -> 2000000" in line and "train.betas [0.9, 0.999995] -> [0.9, 0.95]" in line
    half, quarter = (1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part))) for part in (0.5, 0.2505))
    assert f"from {half:.2e} at step 500 to {quarter:.2e} at step 501 and to 1.00e-04 at the end" in line
    was["train"]["schedule"] = "steps"
    with pytest.raises(UserError, match=r"^train\.schedule: the checkpoint was saved with 'steps', expected cosine"):
        changed_settings(state, now, {})
