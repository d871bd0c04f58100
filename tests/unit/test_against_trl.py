"""Preference tuning against the installed TRL: the same small model, data and batch; its own trainer computes."""

import numpy as np
import pytest
import torch

from minzero import reference
from minzero.config.sections import ModelConfig
from minzero.data.conversations import chat_template
from minzero.data.packing import PairStream
from minzero.data.shards import MARKS, NO_LOSS, STARTS
from minzero.data.tokenizer import load_tokenizer
from minzero.hf.comparison import build_transformers
from minzero.hf.weights import to_transformers
from minzero.preference import LOSSES, Preference
from minzero.sizes import IGNORE_INDEX
from tests.helpers.pairs import rows, write_pairs
from tests.helpers.trained_runs import LLAMA, one_number_changed, random_model

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install --no-deps trl==1.16.0")
BETA = 0.3
KINDS = {"dpo": "sigmoid", "ipo": "ipo", "dpo_norm": "sigmoid_norm"}  # ours and TRL's
CONFIG = ModelConfig(**vars(LLAMA) | {"block_size": 256})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_pairs(tmp_path_factory.mktemp("pairs") / "data", val_fraction=0))


def models():
    """The reference and the model that is tuned, which differ."""
    return random_model(CONFIG, seed=1), random_model(CONFIG, seed=2)


def ours(data, kind, change=lambda arrays: arrays, wrong_weight=False):
    """Loss, METRICS' sums and gradients of all pairs at once. change: of the arrays of the batch. wrong_weight: change
    one number of a weight of the model."""
    base, model = models()
    if wrong_weight:
        next(one_number_changed(model, 0.1))
    stream = PairStream(data, "train", CONFIG.block_size)
    base.preference, model.preference = Preference(kind, BETA), Preference(kind, BETA)
    reference.compute(base, [stream], 4, CPU)
    arrays = change([torch.from_numpy(part) for part in stream.batch(range(stream.windows))])
    loss = model.train()(*arrays)
    loss.backward()
    return loss.item(), model.preference.take(), {name: p.grad for name, p in model.named_parameters()}


def theirs(kind, folder):
    """The same of TRL's DPOTrainer."""
    from datasets import Dataset

    tokenizer = load_tokenizer("bytes")
    config = trl.DPOConfig(
        str(folder),
        loss_type=KINDS[kind],
        beta=BETA,
        use_cpu=True,
        bf16=False,
        max_length=None,
        report_to=[],
        per_device_train_batch_size=len(rows()),
        disable_dropout=True,
        gradient_checkpointing=False,
    )
    base, model = (build_transformers(CONFIG, dict(m.named_parameters()).__getitem__) for m in models())
    template = chat_template(tokenizer)
    trainer = trl.DPOTrainer(
        model,
        base,
        config,
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer.as_transformers(template),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    return loss.item(), found, {name: p.grad for name, p in model.named_parameters()}, list(trainer.train_dataset)


def compare(mine, other):
    """The largest difference of loss, rewards and gradients, each relative to its size."""
    loss, sums, gradients = mine
    loss_of_trl, metrics, gradients_of_trl, _ = other
    found = {"loss": abs(loss - loss_of_trl) / abs(loss_of_trl)}
    pairs = sums[-1].item()
    names = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    for place, name in enumerate(names, start=1):
        found[name] = abs(sums[place].item() / pairs - metrics[name]) / max(1, abs(metrics[name]))
    for name, gradient in to_transformers(CONFIG, gradients.__getitem__):
        expected = gradients_of_trl[name]
        found[name] = ((gradient - expected).abs().max() / expected.abs().max()).item()
    assert len(found) == 5 + len(gradients_of_trl)
    return found


@pytest.fixture(scope="module", params=LOSSES)
def expected(request, tmp_path_factory):
    """(name of a loss, what TRL's trainer finds)."""
    return request.param, theirs(request.param, tmp_path_factory.mktemp("trl"))


def test_loss_rewards_and_gradients_are_those_of_trl(expected, data):
    kind, of_trl = expected
    found = compare(ours(data, kind), of_trl)
    assert max(found.values()) < 1e-5, found


def test_the_tokens_and_what_is_learned_of_them_are_those_of_trl(expected, data):
    _, (*_, dataset) = expected
    stream = PairStream(data, "train", CONFIG.block_size)
    stored = np.empty(stream.tokens, stream.dtype)
    stream.fill(0, stored)
    found = iter(np.split(stored, np.flatnonzero(stored & STARTS)[1:]))
    for row in dataset:
        for name in ("chosen_ids", "rejected_ids"):
            tokens = next(found)
            assert (tokens & ~MARKS).tolist() == row["prompt_ids"] + row[name]
            assert (tokens < NO_LOSS).tolist() == [False] * len(row["prompt_ids"]) + [True] * len(row[name])
    assert next(found, None) is None


def without_a_target(arrays):
    inputs, targets, *others = arrays
    row, place = (targets != IGNORE_INDEX).nonzero()[0]
    targets[row, place] = IGNORE_INDEX
    return inputs, targets, *others


def with_a_prompt_learned(arrays):
    inputs, targets, *others = arrays
    targets[0, 0] = inputs[0, 1]
    return inputs, targets, *others


def without_positions(arrays):
    """Answers that see the one before."""
    inputs, targets, positions, by_reference = arrays
    return inputs, targets, torch.arange(positions.shape[1]).expand_as(positions), by_reference


def with_another_reference(arrays):
    inputs, targets, positions, by_reference = arrays
    by_reference[0, 0] += 0.1
    return inputs, targets, positions, by_reference


CHANGES = [without_a_target, with_a_prompt_learned, without_positions, with_another_reference]


@pytest.mark.parametrize("change", CHANGES)
def test_a_mask_or_a_number_that_is_wrong_is_seen(change, expected, data):
    kind, of_trl = expected
    assert max(compare(ours(data, kind, change), of_trl).values()) > 1e-4


def test_one_weight_that_is_wrong_is_seen(expected, data):
    kind, of_trl = expected
    assert max(compare(ours(data, kind, wrong_weight=True), of_trl).values()) > 1e-4
