"""Adapters trained by train.py: as PEFT trains them, resumed bit for bit, and moved to other ranks and stages."""

import json
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig as TheirConfig
from peft import get_peft_model
from torch.nn import functional as F

from minzero import checkpoint_folder, checkpoint_state
from minzero.config.sections import LoraConfig
from minzero.data.mixture import Mixture
from minzero.files import write_json
from minzero.hf import peft
from minzero.metrics import read_metrics
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.trained_runs import LLAMA, make_folder, write_data

STEPS, SAVED = 20, 8
LORA = LoraConfig(rank=3, alpha=6.0)


def command(folder, out, *more, stage=3, processes=2):
    config = {
        "data": {"path": str(folder / "data")},
        "lora": {"rank": 3, "alpha": 6.0, "init_from": str(folder / "adapter")},
        "train": {
            "init_from": str(folder / "hf"),
            "out_dir": str(out),
            "micro_batch_size": 2,
            "global_batch_tokens": 4 * 16,
            "max_tokens": STEPS * 4 * 16,
            "lr": 1e-2,
            "min_lr_ratio": 1.0,
            "schedule": "constant",
            "betas": [0.9, 0.999],
            "weight_decay": 0.01,
            "grad_clip": 0,
            "log_every": 1,
            "save_every": SAVED,
            "keep_checkpoints": 9,
            "eval_every": 0,
            "eval_tokens": 64,
        },
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    path = folder / f"{out.name}.json"
    write_json(path, config)
    if processes == 1:
        return [sys.executable, "train.py", path, *more]
    return deepspeed_command("train.py", path, *more, processes=processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and an adapter of transformers' and PEFT's, data, and the run from both on two ranks at stage 3."""
    folder = tmp_path_factory.mktemp("lora")
    write_data(folder / "data")
    model = make_folder(folder / "hf", LLAMA)
    torch.manual_seed(5)
    settings = TheirConfig(r=3, lora_alpha=6, target_modules=peft.target_modules(LLAMA, LORA), init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(folder / "adapter")
    done = run(command(folder, folder / "whole"), timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "frozen, and" in done.stdout and "in adapters of rank 3 beside qkv, proj, up, down" in done.stdout
    return folder


def losses(run_folder):
    return {line["step"]: line["loss"] for line in read_metrics(run_folder) if "loss" in line}


def test_losses_of_20_steps_are_pefts(folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "hf")
    theirs = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    data = Mixture(str(folder / "data"), "train", 16, 270, 1337)
    found = losses(folder / "whole")
    for step in range(STEPS):
        inputs, targets = (torch.from_numpy(part) for part in data.batch(data.windows_of(4 * step + np.arange(4))))
        loss = F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
        assert found[step + 1] == pytest.approx(loss.item(), rel=1e-5), step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[STEPS] < 0.9 * found[1], "it has learned"


def test_a_checkpoint_holds_the_adapters_alone(folder):
    found = checkpoint_folder.find(folder / "whole")
    state = checkpoint_state.read_state(found)
    assert state["parameters"] and all(".adapter." in name for name in state["parameters"])
    assert state["base"]["path"] == str((folder / "hf").resolve())
    elements = sum(np.prod(shape) for shape in state["parameters"].values())
    assert sum(entry["bytes"] for entry in state["files"].values()) < 13 * elements + 40_000


@pytest.mark.parametrize(
    "name, stage, processes, tolerance",
    [("again", 3, 2, 0), ("moved", 0, 1, 5e-6), ("stage_2", 2, 2, 5e-6)],
)
def test_a_run_that_is_resumed_is_the_same(folder, name, stage, processes, tolerance):
    saved = folder / "whole/checkpoints" / checkpoint_folder.name_of(SAVED)
    done = run(command(folder, folder / name, "--train.resume", saved, stage=stage, processes=processes), timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    expected, found = losses(folder / "whole"), losses(folder / name)
    assert sorted(found) == list(range(SAVED + 1, STEPS + 1))
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=tolerance, abs=0)
    states = [checkpoint_state.read_state(checkpoint_folder.find(folder / run)) for run in ("whole", name)]
    same = {key: states[0]["files"][key] == states[1]["files"].get(key) for key in states[0]["files"]}
    assert tolerance or all(same.values()), "weights, moments and random state, by checksum"


def test_a_resumed_run_with_another_rank_is_refused(folder):
    saved = folder / "whole/checkpoints" / checkpoint_folder.name_of(SAVED)
    path = folder / "other.json"
    command(folder, folder / "other")
    config = json.loads(path.read_text())
    config["lora"] = {"rank": 4}
    path.write_text(json.dumps(config))
    done = run([sys.executable, "train.py", path, "--train.resume", saved])
    assert done.returncode == 2 and "lora.rank 3 -> 4" in done.stderr and "Traceback" not in done.stderr
