"""Attention within documents: each is computed as if it were alone, whatever stands beside it in its row."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

import plan
from minzero.config.sections import Config
from minzero.data import pipeline
from minzero.data.conversations import Conversations
from minzero.data.mixture import Mixture, check_same_data
from minzero.data.packing import DocumentStream, PackedStream, best_fit, mean_attended, open_stream, positions_of
from minzero.data.shards import NO_LOSS, STARTS, TokenStream
from minzero.data.tokenizer import load_tokenizer
from minzero.document_attention import Documents, attention_within
from minzero.errors import UserError
from minzero.evaluate import evaluate
from minzero.evaluate_loss import validation_loss, window_losses
from minzero.metrics import throughput
from minzero.sizes import IGNORE_INDEX, flops_per_token
from model import GPT
from tests.helpers.foreign_tokenizers import KINDS, write_all
from tests.helpers.trained_runs import LLAMA
from tests.unit.test_model import VARIANTS, random_tokens

LENGTHS = [[5, 11], [1, 8, 7], [16]]  # of the documents in three rows of 16 tokens


def positions_in(lengths, block_size):
    rows = [np.concatenate([np.arange(length) for length in [*row, block_size - sum(row)]]) for row in lengths]
    return torch.from_numpy(np.stack(rows))


def pieces(tokens, lengths):
    """Each document's tokens, (1, n), with its row and place."""
    for row, found in enumerate(lengths):
        start = 0
        for length in found:
            yield row, slice(start, start + length), tokens[row : row + 1, start : start + length]
            start += length


def gradients(model):
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


def made(config, implementation="loop", **options):
    torch.manual_seed(0)
    model = GPT(config, **options).eval()
    model.is_compiled = implementation == "mask"  # what a compiled model takes
    return model


@pytest.mark.parametrize("implementation", ["loop", "mask"])
@pytest.mark.parametrize("config", VARIANTS)
def test_logits_and_gradients_are_those_of_each_document_alone(config, implementation):
    config = dataclasses.replace(config, block_size=16)
    model, tokens, positions = made(config, implementation), random_tokens(config), positions_in(LENGTHS, 16)
    logits = model(tokens, positions=positions)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    together = gradients(model)
    for row, of, alone in pieces(tokens, LENGTHS):
        found = model(alone)[0]
        assert torch.allclose(found, logits[row, of], atol=1e-5 * logits.abs().max().item())
        (found * weights[row, of]).sum().backward()
    for found, expected in zip(together, gradients(model), strict=True):
        assert torch.allclose(found, expected, atol=1e-5 * max(1.0, expected.abs().max().item()))
    without = model(tokens)
    assert not torch.allclose(without, logits, atol=1e-3), "the test would see a mask that is not there"


@pytest.mark.parametrize("implementation", ["loop", "mask"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"n_expert": 4, "n_expert_per_token": 4}])
def test_other_documents_have_no_influence_at_all(changes, implementation):
    config = dataclasses.replace(LLAMA, **changes)
    model, tokens, positions = made(config, implementation), random_tokens(config), positions_in(LENGTHS, 16)
    changed = tokens.clone()
    changed[0, :5] = (changed[0, :5] + 1) % config.vocab_size
    assert torch.equal(model(tokens, positions=positions)[0, 5:], model(changed, positions=positions)[0, 5:])
    x = model.token_embedding(tokens).detach().requires_grad_()
    model.token_embedding.forward = lambda _: x
    model(tokens, positions=positions)[0, 5:].square().sum().backward()
    assert x.grad[0, :5].count_nonzero() == x.grad[1:].count_nonzero() == 0 < x.grad[0, 5:].count_nonzero()


def one_step(model, tokens, positions):
    loss = model(tokens, tokens.roll(-1, dims=1), positions)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("options", [{"activation_checkpointing": 1}, {"activation_checkpointing": "selective"}])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4, "full_attention_layers": 2}])
def test_recomputation_changes_nothing(changes, options):
    config = dataclasses.replace(LLAMA, **changes)
    tokens, positions = random_tokens(config), positions_in(LENGTHS, 16)
    loss, expected = one_step(made(config).train(), tokens, positions)
    again, found = one_step(made(config, **options).train(), tokens, positions)
    assert loss == again and all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_compiled_it_is_the_same():
    config = dataclasses.replace(LLAMA, n_layer=1, sliding_window=4)
    tokens, positions = random_tokens(config), positions_in(LENGTHS, 16)
    loss, expected = one_step(made(config).train(), tokens, positions)
    model = made(config).train()
    model.compile()
    for _ in range(2):
        again, found = one_step(model, tokens, positions)
        assert again == pytest.approx(loss, rel=1e-5)
        for pair in zip(found, expected, strict=True):
            assert torch.allclose(*pair, atol=1e-5)


def test_what_attention_takes_on_which_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    positions = positions_in(LENGTHS, 16)
    x = torch.zeros(3, 16, 8)
    masks = attention_within(positions, {None, 4}, x, 8, 0.0, is_compiled=False)
    assert masks[None].starts.tolist() == [0, 5, 16, 17, 25, 32, 48] and masks[4].window == 4
    assert attention_within(positions, {16}, x, 8, 0.0, False)[16].window is None
    masks = attention_within(positions, {None}, x, 8, 0.0, is_compiled=True)
    assert masks[None].shape == (3, 1, 16, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):  # torch's own operators, their shapes alone
        q, k = torch.empty(3, 4, 16, 8, device="cuda", dtype=torch.bfloat16), torch.empty(3, 2, 16, 8, device="cuda")
        starts = torch.zeros(7, dtype=torch.int32, device="cuda")
        y = Documents(starts, 4).attend(q, k.bfloat16(), k.bfloat16())
        assert y.shape == q.shape and y.dtype == q.dtype


# ---- data


def test_positions_begin_anew_with_each_document():
    first = np.array([[False, False, True, False], [True, True, False, True]])
    assert positions_of(first).tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_puts_each_item_once_and_no_bin_overflows(seed):
    sizes = np.random.default_rng(seed).integers(1, 65, 500)
    bins, count = best_fit(sizes, 64)
    filled = np.bincount(bins, weights=sizes, minlength=count)
    assert len(filled) == count and filled.min() > 0 and filled.max() <= 64
    # 11/9 of the least and one more (Johnson 1973), of which the sum is a lower bound
    assert count <= 11 / 9 * np.ceil(sizes.sum() / 64) + 1
    assert best_fit(np.array([7, 5, 3, 1]), 8)[0].tolist() == [0, 1, 1, 0]


def prepared(folder, documents, tokenizer="bytes", loss_mask=False, **settings):
    flags = ["--out", str(folder), "--val_fraction", "0.3"]
    args = pipeline.options("", ".").parse_args(flags)
    pipeline.prepare(documents, tokenizer, args, loss_mask=loss_mask)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | settings))
    return folder


class Talks(list):
    """A source of conversations."""

    description = "talks"


def talks(count=120, turns=(1, 4)):
    generator = np.random.default_rng(3)
    found = Talks()
    for number in range(count):
        messages = []
        for _ in range(int(generator.integers(*turns))):
            messages.append({"role": "user", "content": f"{number}?"})
            messages.append({"role": "assistant", "content": "yes " * int(generator.integers(1, 9))})
        found.append((f"talk {number}", messages))
    return Conversations(found)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("talks") / "data", talks(), loss_mask=True)


def documents_in(stream):
    """Each conversation of a TokenStream, as its stored tokens."""
    stored = np.empty(stream.tokens, stream.dtype)
    stream.fill(0, stored)
    return np.split(stored, np.flatnonzero(stored & STARTS)[1:])


def test_every_conversation_is_packed_once_and_whole(data):
    plain, stream = TokenStream(data, "train", 96), open_stream(data, "train", 96)
    assert isinstance(stream, PackedStream) and "conversations packed in" in stream.summary()
    expected = []
    for tokens in documents_in(plain):
        inputs, targets = plain.inputs_and_targets(tokens[:97], None)
        expected.append((inputs.tolist(), targets.tolist()))
    inputs, targets, positions = stream.batch(range(stream.windows))
    found = []
    for row in range(stream.windows):
        starts = [*np.flatnonzero(positions[row] == 0), 96]
        for start, end in itertools.pairwise(starts):
            assert positions[row, start:end].tolist() == list(range(end - start))
            if inputs[row, start]:  # else what is left of a window
                found.append((inputs[row, start:end].tolist(), targets[row, start:end].tolist()))
            else:
                assert (targets[row, start:end] == IGNORE_INDEX).all()
    assert sorted(found) == sorted(expected)
    assert stream.left_out == 0 and stream.cut == sum(len(tokens) > 97 for tokens in documents_in(plain)) > 0
    assert stream.tokens_lost == sum(max(0, len(tokens) - 97) for tokens in documents_in(plain))
    filled = sum(len(inputs) for inputs, _ in expected) / (96 * stream.windows)
    assert filled > 0.9 and f"{filled:.1%} full; {stream.cut} longer" in stream.summary()


def test_conversations_whose_answer_does_not_fit_are_left_out(data):
    plain = TokenStream(data, "train", 31)
    reads = [int(np.flatnonzero(tokens < NO_LOSS)[0]) for tokens in documents_in(plain)]
    assert min(reads) == 30 < max(reads), "30 tokens tell the first one that is learned"
    stream = open_stream(data, "train", 30)
    assert stream.left_out == sum(read > 30 for read in reads)
    assert f"{stream.left_out} without an answer in so many tokens were left out" in stream.summary()
    assert len(stream.lengths) == len(reads) - stream.left_out
    targets = stream.batch(range(stream.windows))[1]
    assert (targets != IGNORE_INDEX).any(axis=1).all()
    with pytest.raises(
        UserError, match=r"none of its \d+ conversations has an answer within model.block_size 8 tokens"
    ):
        open_stream(data, "train", 8)


def test_a_conversation_of_several_turns_is_one_document(data):
    stream = TokenStream(data, "train", 96)
    end = load_tokenizer("bytes").end_of_text
    turns = [int((tokens & ~STARTS == end).sum()) for tokens in documents_in(stream)]
    assert len(turns) == json.loads((data / "meta.json").read_text())["splits"]["train"]["documents"]
    assert set(turns) == {1, 2, 3}, "ends of text that are learned"


def test_a_split_of_fewer_tokens_than_a_window(tmp_path):
    folder = prepared(tmp_path / "few", talks(8), loss_mask=True)
    mixture = Mixture(str(folder), "val", 4096, 270, 1)
    assert mixture.windows == 1 and mixture.streams[0].tokens < 4096


def test_the_order_of_packed_conversations_is_that_of_any_other_data(data):
    mixture = Mixture(str(data), "train", 96, 270, 1)
    whole = list(mixture.batches(0, 0, 1, 6, 2))
    halves = [list(mixture.batches(0, rank, 2, 3, 2)) for rank in range(2)]
    for micro_step in range(2):
        for number in range(3):  # inputs, targets, positions
            joined = np.concatenate([half[micro_step][number] for half in halves])
            assert np.array_equal(whole[micro_step][number], joined)


def test_the_loss_of_packed_conversations_is_that_of_each_alone(data):
    model = made(dataclasses.replace(LLAMA, block_size=96, vocab_size=270))
    plain, stream = TokenStream(data, "val", 96), open_stream(data, "val", 96)
    total = count = 0
    for tokens in documents_in(plain):
        inputs, targets = (torch.from_numpy(part)[None] for part in plain.inputs_and_targets(tokens[:97], None))
        learned = int((targets != IGNORE_INDEX).sum())
        total += model(inputs, targets).item() * learned
        count += learned
    losses, counted = window_losses(model, stream, batch_size=3)
    assert counted == count and losses.sum().item() == pytest.approx(total, rel=1e-6)
    mixture = Mixture(str(data), "val", 96, 270, 1)
    during = validation_loss(model, mixture, 10**9, 2, torch.device("cpu"))
    assert during == pytest.approx(total / count, rel=1e-6)


def test_a_mixture_with_text_has_whole_windows_of_it(data, tmp_path):
    text = prepared(tmp_path / "text", [(f"{n}", f"text {n} " * 30) for n in range(60)])
    mixture = Mixture({str(data): 1, str(text): 1}, "train", 96, 270, 1)
    _, _, positions = mixture.batch(range(mixture.windows))
    whole = (positions == np.arange(96)).all(axis=1)
    assert whole.sum() >= TokenStream(text, "train", 96).windows and not whole.all()
    both = Mixture({str(data): 1, str(text): 1}, "train", 96, 270, 1, document_mask=True)
    assert (both.batch(range(both.windows))[2] == np.arange(96)).all(axis=1).sum() < whole.sum()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_all(folder)
    return folder


@pytest.mark.parametrize("tokenizer", ["bytes", *KINDS])
def test_plain_documents_are_told_by_their_ids(tokenizer, tokenizers, tmp_path):
    if tokenizer != "bytes":
        tokenizer = str(tokenizers / tokenizer)
    texts = [f"text {n} " * (1 + n % 7) for n in range(200)]
    folder = prepared(tmp_path / "data", [(f"{n}", text) for n, text in enumerate(texts)], tokenizer)
    loaded = load_tokenizer(tokenizer)
    stream = open_stream(folder, "train", 64, document_mask=True)
    assert isinstance(stream, DocumentStream) and not isinstance(open_stream(folder, "train", 64), DocumentStream)
    inputs, targets, positions = stream.batch(range(stream.windows))
    tokens = stream.read(0, stream.windows * 64)
    assert np.array_equal(inputs.ravel(), tokens)
    documents = json.loads((folder / "meta.json").read_text())["splits"]["train"]["documents"]
    begins = np.flatnonzero((positions.ravel() == 0) & (np.arange(len(tokens)) % 64 > 0))
    assert documents * 0.8 < len(begins) <= documents
    ends = [*loaded.end, *loaded.begin]
    for place in begins:
        before = tokens[place : place + 1] if loaded.begin else tokens[place - 1 : place]
        assert before[0] in ends
        if loaded.end:  # what follows the end of a document is another's beginning
            assert targets.ravel()[place - 1] == IGNORE_INDEX
        else:
            assert targets.ravel()[place - 1] == loaded.end_of_text
    assert stream.is_uneven == bool(loaded.end)


def test_data_that_does_not_tell_where_its_documents_begin(data, tmp_path):
    (tmp_path / "plain").mkdir()
    for split in ("train", "val"):
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / "plain" / f"{split}.bin")
    with pytest.raises(UserError, match=r"document_mask.*no meta.json"):
        open_stream(tmp_path / "plain", "train", 16, document_mask=True)
    # conversations of an earlier version, whose tokenizer puts nothing before them
    older = tmp_path / "older"
    older.mkdir()
    for file in data.glob("*.bin"):
        (older / file.name).write_bytes(file.read_bytes())
    meta = json.loads((data / "meta.json").read_text())
    del meta["document_starts"]
    (older / "meta.json").write_text(json.dumps(meta | {"document": {"begin": [], "end": [256]}}))
    assert not open_stream(older, "train", 16).has_documents
    with pytest.raises(UserError, match="earlier version"):
        open_stream(older, "train", 16, document_mask=True)


def test_conversations_of_an_earlier_version_are_told_by_their_first_id(data, tmp_path):
    older = tmp_path / "older"
    older.mkdir()
    for split in ("train", "val"):
        stream = TokenStream(data, split, 16)
        stored = np.empty(stream.tokens, stream.dtype)
        stream.fill(0, stored)
        header = (data / f"{split}_000000.bin").read_bytes()[:1024]
        (older / f"{split}_000000.bin").write_bytes(header + (stored & ~STARTS).tobytes())
    meta = json.loads((data / "meta.json").read_text())
    del meta["document_starts"]
    for split in meta["splits"].values():
        for shard in split["shards"]:
            shard.pop("sha256")
    (older / "meta.json").write_text(json.dumps(meta))
    now, before = open_stream(data, "train", 96), open_stream(older, "train", 96)
    for pair in zip(now.batch(range(now.windows)), before.batch(range(before.windows)), strict=True):
        assert np.array_equal(*pair)


@pytest.mark.parametrize(
    "now, before, words", [("auto", False, "are packed now, .*false"), (False, "auto", "not packed")]
)
def test_a_run_that_is_resumed_with_another_packing_is_refused(now, before, words, data):
    then = Mixture(str(data), "train", 96, 270, 1, document_mask=before).fingerprint()
    mixture = Mixture(str(data), "train", 96, 270, 1, document_mask=now)
    with pytest.raises(UserError, match=f"data.document_mask: .*{words}"):
        check_same_data(then, mixture, "a checkpoint")
    check_same_data(mixture.fingerprint(), mixture, "a checkpoint")


def test_bits_per_byte_of_conversations_that_are_cut_are_not_known(data):
    model = made(dataclasses.replace(LLAMA, block_size=96, vocab_size=270))
    known = evaluate(model, [open_stream(data, "val", 96)])
    assert open_stream(data, "val", 96).cut and known["bits_per_byte"] is None and known["val_loss"] > 0
    model = made(dataclasses.replace(LLAMA, block_size=512, vocab_size=270))
    assert evaluate(model, [open_stream(data, "val", 512)])["bits_per_byte"] > 0


def test_speed_counts_what_is_computed(data, capsys):
    config = dataclasses.replace(LLAMA, block_size=96, vocab_size=270)
    stream = open_stream(data, "train", 96)
    attended = stream.attended()
    positions = stream.batch(range(stream.windows))[2]
    ends = np.flatnonzero(positions == 0)
    assert attended == pytest.approx(mean_attended(np.diff([*ends, positions.size]))) and 10 < attended < 96
    less = flops_per_token(config) - flops_per_token(config, attended)
    assert less == pytest.approx(12 * config.n_layer * config.n_embd * (96 - attended))
    whole = Config(model=config)
    speeds = [throughput(whole, 1.0, 1, "NVIDIA H100 80GB HBM3", None, found)["tflops"] for found in (None, attended)]
    assert speeds[1] < speeds[0]
    flags = [
        "configs/tiny.json",
        "--gpus",
        "1",
        "--model.block_size",
        "96",
        "--train.global_batch_tokens",
        "960",
        "--json",
    ]
    computed = []
    for document_mask in ("false", "auto"):
        plan.main([*flags, "--data.path", str(data), "--data.document_mask", document_mask])
        computed.append(json.loads(capsys.readouterr().out.splitlines()[-1])["step_parts"]["attention"])
    assert computed[1] < computed[0]
