"""Texts during training (train.sample_every): what is written, that it changes no number of the run, and refusals."""

import json

import pytest
import torch
from torch import nn

from minzero import sampling
from minzero.config.sections import Config, DataConfig, ModelConfig, TrainConfig
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from model import GPT
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.trained_runs import write_data

CPU = torch.device("cpu")
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=300, init_std=0.5)


class Engine(nn.Module):
    """As DeepSpeed's: the model is its `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, tokens):
        return self.module(tokens)


def test_the_likeliest_token_follows_even_beyond_the_context(monkeypatch):
    """At a temperature near 0, 20 tokens with a context of 8 are those of the whole context, without padding."""
    monkeypatch.setattr(sampling, "TEMPERATURE", 1e-6)
    engine = Engine(GPT(MODEL))
    beats = []
    found = sampling.write_tokens(engine, 256, 20, CPU, seed=1, progress=lambda: beats.append(1))
    expected = [256]
    with torch.no_grad():
        for _ in range(20):
            expected.append(int(engine.module.eval()(torch.tensor([expected[-8:]]))[0, -1].argmax()))
    assert found == expected[1:] and len(beats) == 20


def test_logits_that_are_not_finite_end_no_run(monkeypatch):
    engine = Engine(GPT(MODEL))
    monkeypatch.setattr(engine.module.head, "forward", lambda x: torch.full((1, 1, 300), float("nan")))
    assert sampling.write_tokens(engine, 256, 3, CPU, seed=1) == [0, 0, 0]


def test_the_seed_chooses_and_no_other_random_number_is_used():
    engine = Engine(GPT(MODEL))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (sampling.write_tokens(engine, 256, 12, CPU, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state()) and engine.training


def test_ids_that_the_tokenizer_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(sampling, "write_tokens", lambda *_: [72, 299, 105, 256, 33])
    assert sampling.write_text(None, load_tokenizer("bytes"), CPU, 1) == "Hi"  # 256 ends the document


def test_text_needs_the_tokenizer_of_the_data(tmp_path):
    config = Config(data=DataConfig(path=str(tmp_path)), train=TrainConfig(sample_every=5))
    with pytest.raises(UserError, match=r"train\.sample_every: .*no meta\.json.*; or set it to 0"):
        sampling.open_tokenizer(config)
    assert sampling.open_tokenizer(Config(data=DataConfig(path=str(tmp_path)))) is None


@pytest.mark.slow
def test_a_run_that_writes_has_the_same_losses(tmp_path):
    """Two ranks at ZeRO-3, compiled, with a text before the first evaluation."""
    write_data(tmp_path / "data")
    lines = {}
    for name, every in (("with", 2), ("without", 0)):
        command = [
            "train.py",
            "configs/tiny.json",
            "--data.path",
            tmp_path / "data",
            "--train.out_dir",
            tmp_path / name,
        ]
        command += ["--model.vocab_size", 300, "--model.dropout", 0.1, "--train.compile", "true"]
        command += ["--train.sample_every", every, "--train.eval_every", 3]
        command += ["--train.max_tokens", 5 * 2048, "--train.log_every", 1]
        done = run(deepspeed_command(*command), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert ("the model writes" in done.stdout) == (every > 0) and "compiled: yes" in done.stdout
        lines[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    losses = {}
    for name, found in lines.items():
        losses[name] = [line.get("loss", line.get("val_loss")) for line in found if {"loss", "val_loss"} & line.keys()]
    assert losses["with"] == losses["without"] and len(losses["with"]) == 5 + 2
    assert [line["step"] for line in lines["with"] if isinstance(line.get("sample"), str)] == [2, 4, 5]
