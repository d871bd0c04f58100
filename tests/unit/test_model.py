import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from minzero.config.build import build
from minzero.config.sections import ModelConfig
from minzero.files import ROOT, read_json
from minzero.loss import LinearCrossEntropy, cross_entropy
from minzero.rotary import rotary_angles
from minzero.sizes import IGNORE_INDEX, count_parameters, flops_per_token, loss_chunk_tokens, recomputed_flops_per_token
from model import GPT, attention_backends
from tests.helpers.variants import variants

SMALL = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=50, init_std=0.1)
LLAMA = dataclasses.replace(SMALL, norm="rmsnorm", position="rotary", mlp="swiglu", bias=False, n_kv_head=2)
VARIANTS = [
    SMALL,
    LLAMA,
    dataclasses.replace(SMALL, bias=False, tie_embeddings=False),
    dataclasses.replace(SMALL, position="rotary", mlp_hidden=40),
    dataclasses.replace(LLAMA, n_kv_head=1, bias=True),
    *(pytest.param(config, id=f"GPT-2 {name}") for name, config in variants(SMALL).items()),
    *(pytest.param(config, id=f"Llama {name}") for name, config in variants(LLAMA).items()),
]


def random_tokens(config, batch=3):
    return torch.randint(config.vocab_size, (batch, config.block_size), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", VARIANTS)
def test_no_token_sees_the_future(config):
    model, tokens = GPT(config).eval(), random_tokens(config)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    if config.n_expert:  # products of other numbers of rows, rounded otherwise
        assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    else:
        assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("config", VARIANTS)
def test_the_parameter_count_from_the_config_is_the_models(config):
    assert count_parameters(config)[0] == sum(parameter.numel() for parameter in GPT(config).parameters())


def counted_flops(config, activation_checkpointing=0):
    """FLOPs of one forward and backward pass a token, as torch counts them on the meta device: the products
    alone, and causal attention in full. torch counts also what a sliding window hides, which is subtracted here."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, tokens = (
            GPT(config, activation_checkpointing=activation_checkpointing),
            torch.zeros(1, config.block_size).long(),
        )
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens, tokens).backward()
    return counter.get_total_flops() / config.block_size - hidden_flops(config)


def hidden_flops(config):
    """FLOPs per token of attention's products with tokens that a sliding window leaves out: 12 for each channel of a
    query, 4 in the forward and 8 in the backward pass, counted layer by layer."""
    tokens = 0
    for layer in range(config.n_layer):
        every = config.full_attention_layers
        is_full = every and (layer in every if isinstance(every, list) else layer % every == every - 1)
        if config.sliding_window and not is_full:
            tokens += max(0, config.block_size - config.sliding_window)
    return 12 * config.n_head * config.head_size * tokens


@pytest.mark.parametrize("config", VARIANTS)
def test_flops_per_token_are_those_that_torch_counts(config):
    assert flops_per_token(config) == pytest.approx(counted_flops(config), rel=1e-9)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 16, "qk_norm": "head"}, {"norm_position": "after"}])
def test_recomputed_flops_are_those_that_torch_counts(changes, every):
    config = dataclasses.replace(LLAMA, n_layer=5, **changes)
    # non-reentrant checkpointing stops early: it does not repeat a block's last product, whose output nobody needs but
    # a norm after it
    stopped = config.norm_position == "before"
    last = -(-5 // every) * 2 * config.mlp_width * config.n_embd if stopped else 0
    counted = counted_flops(config, every) - counted_flops(config) + last
    assert recomputed_flops_per_token(config, every) == pytest.approx(counted, rel=1e-9)
    assert recomputed_flops_per_token(config, 0) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_config_counts_as_its_model_on_the_meta_device(path):
    config = build(read_json(path), path).model
    with torch.device("meta"):
        model = GPT(config)
    assert count_parameters(config)[0] == sum(parameter.numel() for parameter in model.parameters())
    # every block costs the same, so counting one and two of them is enough, and quick for 96 of width 12288
    assert config.sliding_window is None, "then some cost less"
    one, two = (counted_flops(dataclasses.replace(config, n_layer=n)) for n in (1, 2))
    assert flops_per_token(config) == pytest.approx(one + (config.n_layer - 1) * (two - one), rel=1e-9)


def test_loss_is_the_mean_cross_entropy_of_the_targets_that_count():
    model, tokens = GPT(SMALL).eval(), random_tokens(SMALL)
    targets = tokens.roll(-1, dims=1)
    targets[0, 5:] = IGNORE_INDEX
    logits = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    assert torch.allclose(model(tokens, targets), expected, rtol=1e-6)
    assert model(tokens, torch.full_like(tokens, IGNORE_INDEX)).item() == 0


@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
@pytest.mark.parametrize("width", [50, 64])
def test_the_chunked_loss_is_cross_entropy_with_its_gradients(chunk, width, monkeypatch):
    compare_losses(cross_entropy, chunk, width, monkeypatch)


@pytest.mark.parametrize("width", [50, 64])
def test_the_compiled_loss_is_the_same(width, monkeypatch):
    compare_losses(torch.compile(cross_entropy), 32, width, monkeypatch)


def compare_losses(function, chunk, width, monkeypatch):
    """LinearCrossEntropy by this function with torch's loss. width: of the logits of 50 ids, 64 as on a GPU."""
    monkeypatch.setattr("minzero.loss.padded_vocab_size", lambda vocab_size, on_gpu: width)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(48, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (48,), generator=generator)
    targets[[0, 20, 47]] = IGNORE_INDEX
    results = []
    for chunked in (False, True):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        if chunked:
            loss = LinearCrossEntropy.apply(*inputs, targets, chunk, True, function)
            without_gradients = LinearCrossEntropy.apply(x, weight, targets, chunk, False, function)
            assert without_gradients.item() == pytest.approx(loss.item(), rel=1e-6)
        else:
            loss = F.cross_entropy(F.linear(*inputs), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        (3 * loss).backward()
        results.append([loss.detach(), *(tensor.grad for tensor in inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width, chunk", [(50, 48), (64, 10)])
def test_the_loss_in_16_bits(dtype, width, chunk, monkeypatch):
    """Against float32 on the same rounded inputs: sums are float32, what is rounded are logits and gradients."""
    monkeypatch.setattr("minzero.loss.padded_vocab_size", lambda vocab_size, on_gpu: width)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 16, generator=generator).to(dtype) for n in (48, 50)]
    targets = torch.randint(50, (48,), generator=generator)
    targets[5] = IGNORE_INDEX
    results = []
    for kind in (dtype, torch.float32):
        x, weight = (tensor.detach().to(kind).requires_grad_() for tensor in inputs)
        if kind == dtype:
            loss = LinearCrossEntropy.apply(x, weight, targets, chunk, True, cross_entropy)
        else:
            loss = F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        loss.backward()
        assert x.grad.dtype == weight.grad.dtype == kind
        results.append((loss.item(), x.grad.float(), weight.grad.float()))
    (loss, *gradients), (expected, *theirs) = results
    assert loss == pytest.approx(expected, rel=2e-3)
    for ours, reference in zip(gradients, theirs, strict=True):
        assert (ours - reference).norm() < 2e-2 * reference.norm()


def test_chunks_of_the_loss_stay_small_enough_for_fp16():
    assert loss_chunk_tokens(65, True) == loss_chunk_tokens(50257, True) == 4096 > loss_chunk_tokens(128256, True)


def test_the_loss_survives_fp16_sums_that_exceed_it():
    """Gradients are sums over tokens until the loss scale and the mean have shrunk them."""
    x = torch.full((30_000, 4), 6.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(30_000, dtype=torch.long)
    loss = LinearCrossEntropy.apply(x, weight, targets, 4096, True, cross_entropy) / 30_000
    loss.backward()
    assert weight.grad[0].tolist() == pytest.approx([-5.25] * 4, rel=1e-3)
    assert weight.grad[1].tolist() == pytest.approx([0.75] * 4, rel=1e-3)


def test_no_step_holds_all_logits_at_once(monkeypatch):
    """Not in the forward pass, not in the backward pass, in training or evaluation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    config = dataclasses.replace(SMALL, vocab_size=4000, n_embd=8)
    model, tokens = GPT(config), random_tokens(config, batch=8)  # 128 tokens x 4000 ids
    monkeypatch.setattr("minzero.sizes.LOGITS_AT_A_TIME", 4 * 16 * 4000)
    with Largest() as largest:
        model(tokens, tokens).backward()
        with torch.no_grad():
            model(tokens, tokens)
    assert largest.elements == 16 * 4000


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = GPT(SMALL, seed=5).state_dict()
    torch.manual_seed(2)
    second, other = GPT(SMALL, seed=5).state_dict(), GPT(SMALL, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_residual_projections_start_smaller_and_biases_at_zero():
    config = dataclasses.replace(SMALL, n_embd=128, n_layer=8)
    model = GPT(config)
    for block in model.blocks:
        assert block.attention.qkv.weight.std().item() == pytest.approx(0.1, rel=0.05)
        for module in (block.attention.proj, block.mlp.down):
            assert module.weight.std().item() == pytest.approx(0.1 / math.sqrt(16), rel=0.05)
            assert not module.bias.any()
    assert model.head.weight is model.token_embedding.weight
    assert model.head.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_rotary_attention_depends_on_distances_only():
    """Shifting every position by the same amount leaves the scores of attention as they were."""
    from model import rotate

    q, k = torch.randn(2, 1, 1, 12, 8, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(dataclasses.replace(LLAMA, n_head=LLAMA.n_embd // 8), 20, "cpu")
    here, there = (cos[:12], sin[:12]), (cos[8:], sin[8:])
    scores = rotate(q, here) @ rotate(k, here).mT
    assert torch.allclose(scores, rotate(q, there) @ rotate(k, there).mT, atol=1e-5)
    assert not torch.allclose(scores, q @ k.mT, atol=1e-2)


def test_grouped_queries_equal_repeated_keys_and_values():
    """A model with 2 key-value heads is the model with 4 whose heads are pairwise the same."""
    grouped = GPT(LLAMA).eval()
    full = GPT(dataclasses.replace(LLAMA, n_kv_head=4)).eval()
    state = grouped.state_dict()
    for layer in range(LLAMA.n_layer):
        name = f"blocks.{layer}.attention.qkv.weight"
        q, k, v = state[name].split((32, 16, 16))
        k, v = (part.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for part in (k, v))
        state[name] = torch.cat((q, k, v))
    full.load_state_dict(state)
    tokens = random_tokens(LLAMA)
    assert torch.allclose(grouped(tokens), full(tokens), atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, LLAMA])
def test_activation_checkpointing_changes_nothing_but_memory(config):
    config = dataclasses.replace(config, dropout=0.1)
    tokens, gradients = random_tokens(config), []
    for checkpointing in (False, True):
        model = GPT(config, 1, checkpointing)
        torch.manual_seed(3)
        model(tokens, tokens).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="block_size 16"):
        GPT(SMALL)(torch.zeros(1, 17, dtype=torch.long))


def gradients(model, tokens):
    torch.manual_seed(3)
    model.zero_grad()
    model(tokens, tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": 1}, {"activation_checkpointing": 2, "activation_offload": True}]
)
def test_recomputed_blocks_give_the_same_gradients_and_keep_less(options):
    """Bit for bit, with dropout, which must fall on the same activations again."""
    config = dataclasses.replace(LLAMA, n_layer=4, dropout=0.3)
    plain, model, tokens = GPT(config), GPT(config, **options), random_tokens(config)
    expected, found = gradients(plain, tokens), gradients(model, tokens)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    def bytes_kept(model):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens, tokens)
        return sum(kept.values())

    assert bytes_kept(model) < 0.8 * bytes_kept(plain)


def test_attention_prefers_cudnn_on_hopper_alone(monkeypatch):
    from torch.nn.attention import SDPBackend

    order = []
    for major in (8, 9, 10):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, major=major: (major, 0))
        order.append(attention_backends(torch.device("cuda")))
    assert order[0] is order[2] is attention_backends(torch.device("cpu")) is None
    assert order[1][0] == SDPBackend.CUDNN_ATTENTION and order[1][-1] == SDPBackend.MATH


def test_a_preference_for_attention_is_a_preference_only(monkeypatch):
    """What this device has not is passed over, the values are the same, and a block stays one graph."""
    model, tokens = GPT(LLAMA).eval(), random_tokens(LLAMA)
    expected = model(tokens)
    x, angles = torch.randn(2, 16, LLAMA.n_embd), rotary_angles(LLAMA, 16, "cpu")
    block, _ = model.blocks[0](x, angles)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    hopper = attention_backends(torch.device("cuda"))
    monkeypatch.setattr("model.attention_backends", torch.compiler.assume_constant_result(lambda device: hopper))
    assert torch.allclose(model(tokens), expected, atol=1e-6)
    compiled = torch.compile(model.blocks[0].forward, fullgraph=True)
    assert torch.allclose(compiled(x, angles)[0], block, atol=1e-6)
