"""Preference tuning: pairs in windows, their losses, the reference, and what is refused."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import eval as evaluation
from minzero import reference
from minzero.config.load import load_config
from minzero.data.meta import read_meta
from minzero.data.mixture import Mixture
from minzero.data.packing import PackedStream, PairStream, open_stream
from minzero.data.shards import TokenStream, write_shard
from minzero.errors import UserError
from minzero.evaluate_pairs import answer_log_probabilities, evaluate_pairs, validation_of_pairs
from minzero.files import write_json
from minzero.loss import TokenLogProbabilities, equal_weights
from minzero.preference import LOSSES, Preference
from minzero.sizes import IGNORE_INDEX
from minzero.store import REFERENCE
from tests.helpers.pairs import rows, write_pairs
from tests.helpers.trained_runs import FAMILIES, LLAMA, random_model, write_run
from tests.unit.test_document_mask import documents_in
from train import open_data

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(LLAMA, block_size=160)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", rows(60))


def tuned(kind="dpo", beta=0.3, config=CONFIG, seed=2):
    model = random_model(config, seed)
    model.preference = Preference(kind, beta)
    return model


# ---- the log-probability of each token


@pytest.mark.parametrize("chunk", [3, 64])
def test_log_probabilities_and_their_gradients(chunk):
    torch.manual_seed(0)
    x, weight = torch.randn(23, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets, grad = torch.randint(0, 11, (23,)), torch.randn(23)
    targets[::3] = IGNORE_INDEX
    expected = -F.cross_entropy(x @ weight.t(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    gradients = torch.autograd.grad(expected, (x, weight), grad)
    found = TokenLogProbabilities.apply(x, weight, targets, chunk)
    assert torch.allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, (x, weight), grad), gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_gradients_in_fp16_take_the_loss_scale():
    """The gradient of a logit times 2^16 would be infinite; that of x is not."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 8, dtype=torch.float16), (0.01 * torch.randn(11, 8)).half()
    targets, scale = torch.randint(0, 11, (64,)), 2.0**17
    halves = x.requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad(TokenLogProbabilities.apply(*halves, targets, 16).sum() * scale / 64, halves)
    wholes = [half.detach().float().requires_grad_() for half in halves]
    loss = -F.cross_entropy(wholes[0] @ wholes[1].t(), targets, reduction="sum") * scale / 64
    for ours, theirs in zip(found, torch.autograd.grad(loss, wholes), strict=True):
        assert ours.isfinite().all() and torch.allclose(ours.float(), theirs, atol=0.005 * theirs.abs().max().item())


# ---- pairs in windows


def test_both_answers_of_a_pair_are_whole_in_one_window(data):
    plain, stream = TokenStream(data, "train", 160), open_stream(data, "train", 160)
    assert isinstance(stream, PairStream) and stream.has_pairs
    expected = [
        tuple(part.tolist() for part in plain.inputs_and_targets(tokens, None)) for tokens in documents_in(plain)
    ]
    stream.reference = np.arange(len(stream.lengths), dtype=np.float32)
    inputs, targets, positions, by_reference = stream.batch(range(stream.windows))
    found = {}
    for row in range(stream.windows):
        starts = np.flatnonzero(~np.isnan(by_reference[row]))
        assert len(starts) and len(starts) % 2 == 0 and (positions[row, starts] == 0).all()
        for start in starts:
            number = int(by_reference[row, start])
            of = slice(start, start + stream.lengths[number] - 1)
            found[number] = inputs[row, of].tolist(), targets[row, of].tolist()
        numbers = by_reference[row, starts].astype(int).reshape(-1, 2)
        assert (numbers[:, 1] == numbers[:, 0] + 1).all() and (numbers[:, 0] % 2 == 0).all()
    assert [found[number] for number in range(len(expected))] == expected and stream.left_out == 0
    assert f"{len(expected) // 2} pairs packed in {stream.windows} windows of 160 tokens" in stream.summary()
    assert read_meta(data)["splits"]["train"]["documents"] == len(expected) // 2


def test_pairs_that_do_not_fit_are_left_out(data):
    sizes = [len(tokens) - 1 for tokens in documents_in(TokenStream(data, "train", 160))]
    pairs = [sum(two) for two in zip(sizes[::2], sizes[1::2], strict=True)]
    room = sorted(pairs)[len(pairs) // 2]
    stream = open_stream(data, "train", room)
    assert stream.left_out == sum(pair > room for pair in pairs) > 0
    assert f"{stream.left_out} that are longer were left out" in stream.summary()
    with pytest.raises(UserError, match=rf"none of its {len(pairs)} pairs fits .* raise it to at least {min(pairs)}"):
        open_stream(data, "train", min(pairs) - 1)


def test_a_mixture_of_two_folders_of_pairs(data, tmp_path):
    other = write_pairs(tmp_path / "other", rows(20))
    mixture = Mixture({str(data): 1, str(other): 1}, "train", 160, 270, 1)
    assert mixture.has_pairs
    batch = mixture.batch(np.arange(mixture.windows))
    alone = [stream.batch(range(stream.windows)) for stream in mixture.streams]
    for part, *parts in zip(batch, *alone, strict=True):
        assert np.array_equal(part, np.concatenate(parts), equal_nan=part.dtype == np.float32)
    model = tuned()
    found = validation_of_pairs(model, Mixture({str(data): 1, str(other): 1}, "val", 160, 270, 1), 160 * 6, 2, CPU)
    assert found["pairs"] > 6 and model.training


# ---- the loss


def test_losses_where_nothing_has_changed_and_where_much_has():
    tokens = torch.tensor([3.0, 6.0])
    same = torch.tensor([-4.0, -9.0], dtype=torch.float64)
    at_first = {kind: Preference(kind, 0.1)(same, same, tokens).item() for kind in LOSSES}
    assert at_first == pytest.approx({"dpo": math.log(2), "ipo": 25.0, "dpo_norm": math.log(2)})
    better = same + torch.tensor([3.0, -6.0])
    found = {kind: Preference(kind, 0.1)(better, same, tokens).item() for kind in LOSSES}
    log_sigmoid = {share: math.log1p(math.exp(-share)) for share in (0.9, 0.2)}
    assert found == pytest.approx({"dpo": log_sigmoid[0.9], "ipo": (2 - 5) ** 2, "dpo_norm": log_sigmoid[0.2]})
    preference = Preference("dpo", 0.1)
    preference(torch.cat((better, same)), torch.cat((same, better)), tokens.repeat(2))
    assert preference.take().tolist()[1:] == pytest.approx([1, 0, 0, 0, 2]) and preference.take() is None


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_loss_of_packed_pairs_is_that_of_each_alone(data, family, kind):
    model = tuned(kind, config=dataclasses.replace(FAMILIES[family], block_size=160))
    stream = open_stream(data, "val", 160)
    stream.reference = np.random.default_rng(1).normal(-60, 5, len(stream.lengths)).astype(np.float32)
    packed = model(*map(torch.from_numpy, stream.batch(range(stream.windows)))).item()
    losses = []
    for first in range(0, len(stream.lengths), 2):
        pair = [first, first + 1]
        sums, counts = [], []
        for number in pair:
            inputs, targets, _ = stream.example(int(stream.document_starts[number]), int(stream.lengths[number]) - 1)
            logits = model(torch.from_numpy(inputs)[None])[0]
            targets = torch.from_numpy(targets)
            sums.append(-F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum"))
            counts.append((targets != IGNORE_INDEX).sum())
        by_reference = torch.from_numpy(stream.reference[pair])
        losses.append(model.preference(torch.stack(sums).double(), by_reference, torch.stack(counts)).item())
    assert packed == pytest.approx(np.mean(losses), rel=1e-5)


def one_batch_at_a_time(data, micro_batch_size, ranks):
    """Gradient and loss of a global batch of 12 windows, summed as train.py does."""
    mixture, model = Mixture(str(data), "train", 160, 270, 1), tuned()
    accumulation, total = 12 // micro_batch_size // ranks, 0
    everyone = [list(mixture.batches(0, rank, ranks, micro_batch_size, accumulation)) for rank in range(ranks)]
    pairs = sum((~np.isnan(batch[3])).sum() / 2 for batches in everyone for batch in batches)
    for batches in everyone:
        with pytest.MonkeyPatch.context() as patch:  # the other ranks' part of the sum
            patch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.fill_(pairs))
            weights = equal_weights(batches, ranks, CPU)
        for batch, weight in zip(batches, weights, strict=True):
            loss = model(*map(torch.from_numpy, batch)) * weight / accumulation / ranks
            loss.backward()
            total += loss.item()
    return total, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("micro_batch_size, ranks", [(1, 1), (2, 3), (6, 2)])
def test_every_pair_counts_the_same_in_any_split_of_the_batch(data, micro_batch_size, ranks):
    expected, gradients = one_batch_at_a_time(data, 12, 1)
    loss, found = one_batch_at_a_time(data, micro_batch_size, ranks)
    assert loss == pytest.approx(expected, rel=1e-6)
    for pair in zip(found, gradients, strict=True):
        assert torch.allclose(*pair, atol=1e-5 * pair[1].abs().max().item())


# ---- the reference


def test_the_model_itself_is_its_reference_at_first(data):
    streams = [open_stream(data, split, 160) for split in ("train", "val")]
    model = tuned()
    reference.compute(model, streams, 3, CPU)
    for stream in streams:
        assert (stream.reference < 0).all()
        found = evaluate_pairs(model, [(stream, list(range(stream.windows)))], model.preference, 3, CPU)
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(found["margin"]) < 1e-5
    beats = []
    found, tokens = answer_log_probabilities(model, streams[0], [1], 2, CPU, progress=lambda: beats.append(1))
    inside = streams[0].documents_in(1)
    assert len(beats) == 1 and np.flatnonzero(tokens).tolist() == sorted(inside.tolist())
    assert torch.allclose(found[inside], torch.from_numpy(streams[0].reference[inside]).double(), rtol=1e-6)


def test_the_file_is_for_these_answers_alone(data, tmp_path):
    streams = [open_stream(data, split, 160) for split in ("train", "val")]
    for stream in streams:
        stream.reference[:] = np.arange(len(stream.reference))
    content = reference.as_file(streams)
    fresh = open_stream(data, "val", 160)
    reference.attach(content, [fresh])
    assert np.array_equal(fresh.reference, streams[1].reference)
    other = write_pairs(tmp_path / "other", rows(20))
    for stream in (open_stream(data, "val", 150), open_stream(other, "val", 160)):
        with pytest.raises(UserError, match=r"holds nothing of the val split of .* as it is now"):
            reference.attach(content, [stream])
    with pytest.raises(UserError, match=r"reference.safetensors: damaged"):
        reference.attach(b"nothing", [fresh])


def test_the_first_folder_that_has_it_whole_is_taken(tmp_path):
    content = b"what the reference says"
    digest = reference.digest_of(content)
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    with pytest.raises(UserError, match=r"here/reference.safetensors: missing or damaged"):
        reference.read([here, there], digest)
    (there / REFERENCE).write_bytes(content)
    (here / REFERENCE).write_bytes(content[:-1])
    assert reference.read([here, there], digest) == content
    with pytest.raises(UserError, match=r"train.loss: .*there is a run without a reference"):
        reference.read([here, there], None)


# ---- what is refused


def config_with(tmp_path, **train):
    write_json(tmp_path / "config.json", {"model": vars(CONFIG), "train": train})
    return [str(tmp_path / "config.json")]


def test_a_loss_needs_a_model_to_start_from(tmp_path):
    with pytest.raises(UserError, match=r"train.loss: dpo compares with the model that it starts from"):
        load_config(config_with(tmp_path, loss="dpo"))
    with pytest.raises(UserError, match=r"train.loss: found .*kto"):
        load_config(config_with(tmp_path, loss="kto", init_from="base"))


def test_pairs_and_losses_belong_together(data, small_data, tmp_path):
    config = load_config(config_with(tmp_path, micro_batch_size=1))
    config.data.path = str(data)
    with pytest.raises(UserError, match=r"holds pairs of answers, and train.loss is next_token; set train.loss to dpo"):
        open_data(config)
    config.train.loss = "dpo"
    assert all(split.has_pairs for split in open_data(config))
    config.data.document_mask = False
    with pytest.raises(UserError, match=r"data.document_mask: found false, but .* holds pairs of answers"):
        open_data(config)
    config.data.path, config.data.document_mask = str(small_data), "auto"
    with pytest.raises(UserError, match=r"train.loss: found dpo, which compares pairs of answers, but .* holds none"):
        open_data(config)


@pytest.mark.parametrize("change", [{"loss_mask": False}, {"document_starts": False}, {"pairs": 1}])
def test_a_damaged_meta_is_found(data, tmp_path, change):
    folder = shutil.copytree(data, tmp_path / "data")
    write_json(folder / "meta.json", json.loads((folder / "meta.json").read_text()) | change)
    with pytest.raises(UserError, match=r"meta.json: damaged: pairs"):
        open_stream(folder, "train", 160)


def test_an_odd_number_of_answers_is_found(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    write_json(folder / "meta.json", meta | {"pairs": False})
    assert isinstance(open_stream(folder, "train", 160), PackedStream)
    stream = TokenStream(folder, "val", 160)
    whole = np.concatenate(documents_in(stream)[:-1])
    meta["splits"]["val"]["shards"] = [write_shard(folder / "val_000000.bin", whole)]
    write_json(folder / "meta.json", meta)
    with pytest.raises(UserError, match="expected two for each pair; prepare the data again"):
        open_stream(folder, "val", 160)


# ---- eval.py


def test_eval_compares_with_a_model(data, tmp_path, capsys):
    write_run(tmp_path / "base", CONFIG, str(data))
    with pytest.raises(UserError, match=r"--reference: none given, and .* is of no preference tuning"):
        evaluation.main([str(tmp_path / "base")])
    evaluation.main([str(tmp_path / "base"), "--reference", str(tmp_path / "base"), "--json"])
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert found["val_loss"] == pytest.approx(math.log(2), abs=1e-6) and "(dpo, beta 0.1), accuracy" in said
    assert found["pairs"] == read_meta(data)["splits"]["val"]["documents"]
