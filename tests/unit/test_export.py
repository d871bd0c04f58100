"""To and from transformers: the same function, the same weights, the same tokens, and refusals."""

import dataclasses
import json
import random
import re
import shutil

import pytest
import tiktoken
import torch
from huggingface_hub import ModelCard
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import export
import model
from minzero.config.load import load_config
from minzero.config.sections import ModelConfig, key
from minzero.data.meta import read_meta
from minzero.data.tokenizer import load_tokenizer
from minzero.data.tokenizer_files import END_OF_TEXT, save_for_transformers
from minzero.errors import UserError
from minzero.experts import router_losses
from minzero.files import ROOT, read_json, write_json
from minzero.hf import comparison, families, settings, weights
from minzero.hf import read as hf_read
from minzero.hf import write as hf_write
from minzero.sizes import count_parameters
from minzero.trained import open_trained, open_weights
from model import GPT
from tests.helpers.saved_checkpoints import write_state
from tests.helpers.trained_runs import (
    FAMILIES,
    LLAMA,
    NEOX,
    randomised,
    their_model,
    write_data,
    write_run,
    zero_biases,
)
from tests.helpers.trained_runs import GPT2 as SMALL
from tests.helpers.variants import VALUES, variants

LLAMA3_SCALING, YARN_SCALING = (
    next(value for value in VALUES["rotary_scaling"] if value["rope_type"] == kind) for kind in ("llama3", "yarn")
)
MODELS = [
    SMALL,
    dataclasses.replace(SMALL, tie_embeddings=False, mlp_hidden=37, norm_eps=1e-3),
    dataclasses.replace(SMALL, bias=False, n_kv_head=4, tie_embeddings=False),
    NEOX,
    dataclasses.replace(NEOX, tie_embeddings=True, bias=False, rotary_theta=500000.0, norm_eps=1e-3, mlp_hidden=37),
    LLAMA,
    dataclasses.replace(LLAMA, tie_embeddings=False, bias=True, rotary_theta=500000.0, norm_eps=1e-6),
    dataclasses.replace(LLAMA, n_kv_head=1, mlp_hidden=37, bias=True),
    dataclasses.replace(LLAMA, n_kv_head=None, tie_embeddings=False, norm_eps=1e-2),
    dataclasses.replace(LLAMA, head_dim=16, rotary_scaling=LLAMA3_SCALING),
    dataclasses.replace(LLAMA, rotary_scaling={"rope_type": "linear", "factor": 4.0}, family="mistral"),
    dataclasses.replace(NEOX, parallel_residual=True, rotary_fraction=0.25, mlp="gelu_exact"),
    dataclasses.replace(NEOX, parallel_residual=True, rotary_fraction=0.5, tie_embeddings=True, rotary_theta=5e5),
    FAMILIES["mistral"],
    dataclasses.replace(FAMILIES["mistral"], head_dim=16, tie_embeddings=False, n_kv_head=4),
    FAMILIES["qwen2"],
    dataclasses.replace(FAMILIES["qwen2"], n_layer=4, sliding_window=5, full_attention_layers=[0, 1], n_kv_head=1),
    dataclasses.replace(FAMILIES["qwen2"], tie_embeddings=False, rotary_scaling=YARN_SCALING, norm_eps=1e-6),
    FAMILIES["qwen3"],
    dataclasses.replace(FAMILIES["qwen3"], head_dim=None, tie_embeddings=False, rotary_theta=1e6),
    dataclasses.replace(FAMILIES["qwen3"], sliding_window=6, full_attention_layers=2, n_kv_head=1, mlp_hidden=37),
    FAMILIES["olmo2"],
    dataclasses.replace(FAMILIES["olmo2"], tie_embeddings=False, n_kv_head=None, rotary_theta=5e5, norm_eps=1e-6),
    FAMILIES["smollm3"],
    FAMILIES["mixtral"],
    dataclasses.replace(FAMILIES["mixtral"], n_expert_per_token=1, tie_embeddings=False, sliding_window=5),
    FAMILIES["qwen3_moe"],
    dataclasses.replace(FAMILIES["qwen3_moe"], normalize_experts=False, tie_embeddings=False, n_kv_head=1),
    FAMILIES["olmoe"],
    dataclasses.replace(FAMILIES["olmoe"], normalize_experts=True, n_expert_per_token=6, tie_embeddings=False),
    dataclasses.replace(FAMILIES["smollm3"], n_layer=3, no_rotary_layers=[0, 1], bias=True, tie_embeddings=False),
]


def to_transformers(config, model):
    return dict(weights.to_transformers(config, model.state_dict().__getitem__))


def filled(config, model):
    """transformers' model with the weights of ours. Asserts that each has its place."""
    theirs, tensors = their_model(config), to_transformers(config, model)
    if config.n_expert:  # whose matrices transformers joins when it loads them
        theirs = comparison.load_into_transformers(config, tensors).eval()
        theirs.set_experts_implementation("eager")  # the others take widths that are multiples of 8
        return theirs
    loaded = theirs.load_state_dict(tensors, strict=False)
    assert loaded.unexpected_keys == [] and loaded.missing_keys == ["lm_head.weight"] * config.tie_embeddings
    theirs.tie_weights()
    return theirs


# -- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("config", MODELS)
def test_logits_loss_and_gradients_are_those_of_transformers(config, seed):
    ours = randomised(GPT(config, seed), seed)
    theirs = filled(config, ours)
    tokens = torch.randint(config.vocab_size, (3, config.block_size), generator=torch.Generator().manual_seed(seed))
    logits = ours(tokens)
    assert logits.std() > 0.3, "a model that says nothing would show nothing"
    worst = (logits - theirs(tokens).logits).abs().max().item()
    assert worst < 1e-5
    our_loss, their_loss = ours(tokens[:, :-1], tokens[:, 1:]), theirs(tokens, labels=tokens).loss
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    our_loss.backward()
    their_loss.backward()
    compare_gradients(config, ours, theirs)


def compare_gradients(config, ours, theirs):
    gradients = comparison.as_in_files(theirs, {name: p.grad for name, p in theirs.named_parameters()})
    read = weights.from_transformers(config, gradients.get)
    for name, parameter in ours.named_parameters():
        scale = parameter.grad.abs().max().item()
        difference = (parameter.grad - read(name)).abs().max().item()
        assert scale > 0 and difference < 1e-5 * max(scale, 0.1), f"{name}: {difference:.1e} of {scale:.1e}"


VARIANTS = {f"{family} {name}": config for family, base in FAMILIES.items() for name, config in variants(base).items()}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_value_of_every_key_is_exported_right_or_refused(config, tmp_path):
    """The variants come from ModelConfig's own fields, so that a new key cannot be passed over."""
    try:
        comparison.check_expressible(config)
    except UserError as error:
        assert "is the nearest to this model" in str(error) or "is what model.family asks for" in str(error)
        with pytest.raises(UserError):
            to_transformers(config, GPT(config))
        return
    ours = randomised(GPT(config))
    theirs = filled(config, ours)
    tokens = torch.randint(config.vocab_size, (2, config.block_size), generator=torch.Generator().manual_seed(0))
    assert (ours(tokens) - theirs(tokens).logits).abs().max().item() < 1e-5
    write_json(tmp_path / "config.json", hf_write.config_json(families.transformers_config(config)))
    published = dataclasses.replace(hf_read.read_model_config(tmp_path), bias=config.bias)
    of_training = {
        "dropout": 0.0,
        "init_std": 0.02,
        "family": published.family,
        "router_z_loss": 0.001,
        "balance_over": "layer",
    }
    if config.n_expert is None:
        of_training |= {"balance_loss": published.balance_loss}
    of_training |= {"rotary_theta": 10000.0} if config.position == "learned" else {}
    assert published == settings.explicit(dataclasses.replace(config, **of_training))
    assert families.family_of(published) == families.family_of(config)


def with_key(base, default, value, **settings):
    """`base` with a key more, as somebody adds one to ModelConfig."""
    fields = [("new", type(default), key(default, "something new", **settings))]
    cls = dataclasses.make_dataclass("ModelConfig", fields, bases=(ModelConfig,))
    return cls(**vars(base), new=value)


@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("default", "value", "settings", "known"),
    [
        (False, False, {}, True),
        (False, True, {}, False),
        (True, True, {}, False),
        (0.0, 0.0, {}, True),
        (0.0, 30.0, {}, False),
        (1.0, 1.0, {}, False),  # nothing says that 1 changes nothing
        (1.0, 1.0, {"off": 1.0}, True),
        (1.0, 2.0, {"off": 1.0}, False),
        (True, False, {"off": False}, True),
        ("none", "none", {}, True),
        ("none", "alibi", {"choices": ["none", "alibi"]}, False),
    ],
)
def test_a_key_that_nobody_takes_into_account_must_be_off(base, default, value, settings, known):
    config = with_key(base, default, value, **settings)
    for refuse in (families.family_of, families.transformers_config, comparison.check_expressible, count_parameters):
        if known:
            refuse(config)
        else:
            with pytest.raises(UserError, match=r"^model\.new: found [^\n]+$"):
                refuse(config)
    off = with_key(base, default, default, **settings)
    if value != default:
        with pytest.raises(UserError, match=r"set --model\.new "):
            hf_read.refuse_differences("there", config, off)


@pytest.mark.parametrize("config", [config for config in MODELS if config.n_expert])
def test_the_routers_losses_are_those_of_transformers(config):
    """Their value, and the gradient that they add in training."""
    config = dataclasses.replace(config, balance_loss=0.7, balance_over="model", router_z_loss=0.0)
    ours = randomised(GPT(config)).train()
    theirs = filled(config, ours)
    tokens = torch.randint(config.vocab_size, (3, config.block_size), generator=torch.Generator().manual_seed(0))
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    # their loss is of all tokens but the last, and their routers see that one too
    found = theirs(tokens[:, :-1], output_router_logits=True)
    expected = F.cross_entropy(found.logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6), "what is reported is the loss of prediction"
    routing = ours.take_routing()
    balance, square = router_losses(routing, by_layer=False)
    by_layer = torch.stack([router_losses(one[None], by_layer=False)[0] for one in routing])
    assert router_losses(routing)[0].item() == pytest.approx(by_layer.mean().item(), rel=1e-6)
    assert balance.item() == pytest.approx(found.aux_loss.item(), rel=1e-6)
    logits = torch.stack(found.router_logits)
    assert square.item() == pytest.approx(logits.logsumexp(dim=-1).square().mean().item(), rel=1e-5)
    loss.backward()
    (expected + 0.7 * found.aux_loss).backward()
    compare_gradients(config, ours, theirs)
    before = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    without = randomised(GPT(dataclasses.replace(config, balance_loss=0.0))).train()
    without(tokens[:, :-1], tokens[:, 1:]).backward()
    differing = [name for name, one in without.named_parameters() if not torch.allclose(one.grad, before[name])]
    if config.n_expert_per_token < config.n_expert:  # else every token goes to all, and there is nothing to balance
        assert any("router" in name for name in differing)


def test_the_z_loss_pulls_the_routers_logits_to_zero():
    config = dataclasses.replace(FAMILIES["olmoe"], balance_loss=0.0, router_z_loss=0.3)
    ours = randomised(GPT(config)).train()
    tokens = torch.randint(config.vocab_size, (3, config.block_size), generator=torch.Generator().manual_seed(0))
    ours(tokens, tokens).backward()
    found = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    logits = []
    for block in ours.blocks:
        block.mlp.router.register_forward_hook(lambda module, inputs, output: logits.append(output))
    ours.config = dataclasses.replace(config, router_z_loss=0.0)
    loss = ours(tokens, tokens)
    (loss + 0.3 * torch.stack(logits).logsumexp(dim=-1).square().mean()).backward()
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, found[name], atol=1e-6), name


class MoreParameters(GPT):
    def __init__(self, config, *arguments, **more):
        super().__init__(config, *arguments, **more)
        self.blocks[0].attention.extra = nn.RMSNorm(config.n_embd // config.n_head)


class OtherShapes(GPT):
    def __init__(self, config, *arguments, **more):
        super().__init__(config, *arguments, **more)
        self.final_norm.weight = nn.Parameter(torch.ones(1, device=self.final_norm.weight.device))


class FewerParameters(GPT):
    def __init__(self, config, *arguments, **more):
        super().__init__(config, *arguments, **more)
        self.blocks[-1].mlp.down = self.blocks[0].mlp.down


def exact_gelu(self, x):
    return self.down(F.gelu(self.up(x)))


def capped(self, x, targets=None):
    return 5 * torch.tanh(F.linear(x, self.weight) / 5)


@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("where", "name", "value", "expected"),
    [
        ("", "GPT", MoreParameters, "blocks.0.attention.extra.weight: found [8], expected none"),
        ("", "GPT", OtherShapes, "final_norm.weight: found [1], expected [32]"),
        ("", "GPT", FewerParameters, "blocks.1.mlp.down.weight: found none, expected ["),
        (model.Head, "forward", capped, "its logits differ by"),
        (model.MLP, "forward", exact_gelu, "its logits differ by"),
    ],
)
def test_a_model_py_that_was_changed_without_a_key_is_refused(base, where, name, value, expected, monkeypatch):
    if value is exact_gelu and base.mlp == "swiglu":
        pytest.skip("has no gelu")
    comparison.check_expressible(base)
    for place in [where] if where else (weights, comparison):
        monkeypatch.setattr(place, name, value)
    with pytest.raises(UserError, match=r"^model\.py: [^\n]+$") as error:
        comparison.check_expressible(base)
    assert expected in str(error.value)


def test_a_checkpoint_of_another_model_py_is_refused(tmp_path, monkeypatch):
    """Its parameters would be passed over: by export, eval, sample and the start of a run."""
    write_run(tmp_path / "run", LLAMA, write_data(tmp_path / "data"))
    for changed, expected in ((MoreParameters, "expected [8]"), (OtherShapes, "found [32], expected [1]")):
        with monkeypatch.context() as patch:
            patch.setattr(weights, "GPT", changed)
            for refuse in (open_trained, lambda path: open_weights(str(path), LLAMA)):
                with pytest.raises(UserError, match=r"^[^\n]*use the model.py that it was trained with") as error:
                    refuse(tmp_path / "run")
                assert expected in str(error.value)
    open_trained(tmp_path / "run")


def card_of(folder, config, data, **train):
    """(the front matter, the text) of the model card of a run with these settings of its train section."""
    run = folder / "run"
    write_run(run, config, data)
    (path,) = run.glob("checkpoints/*/state.json")
    state = read_json(path)
    state["config"]["train"] |= train
    del state["crc32"]
    write_state(path.parent, state)
    export.main([str(run), str(folder / "hf")])
    card = ModelCard.load(folder / "hf" / "README.md")
    shutil.rmtree(run)
    shutil.rmtree(folder / "hf")
    return card.data, card.text


def test_the_model_card_names_the_model_that_was_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data")
    for name in ("openai-community/gpt2", "gpt2"):
        front, text = card_of(tmp_path, SMALL, data, init_from=name)
        assert front.base_model == name and f"trained from [{name}](https://huggingface.co/{name}) with" in text
    (tmp_path / "out" / "base" / "checkpoints" / "step_00000005").mkdir(parents=True)
    for name in ("out/base", f"{tmp_path}/out/base", "out/base/checkpoints/step_00000005"):
        front, text = card_of(tmp_path, SMALL, data, init_from=name)
        assert front.base_model is None and "trained from base with" in text and str(tmp_path) not in text
    front, text = card_of(tmp_path, SMALL, data)
    assert front.base_model is None and "trained from scratch with" in text


def test_the_model_card_says_over_how_many_tokens_the_loss_was_measured(tmp_path):
    data = write_data(tmp_path / "data")
    tokens = read_meta(data)["splits"]["val"]["tokens"]
    whole = (tokens - 1) // SMALL.block_size * SMALL.block_size
    for wanted, expected in ((1_048_576, whole), (64, 64), (whole + 1, whole)):
        assert f"nats per token, over {expected:,} tokens |" in card_of(tmp_path, SMALL, data, eval_tokens=wanted)[1]
    write_run(tmp_path / "run", SMALL, data)
    shutil.rmtree(data)
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    assert "over at most 1,048,576 tokens |" in (tmp_path / "hf" / "README.md").read_text()


def test_the_model_card_names_the_ramp_the_decay_and_mup(tmp_path):
    data = write_data(tmp_path / "data")
    text = card_of(tmp_path, SMALL, data)[1]
    assert "grew" not in text and "decay (" not in text and "muP" not in text
    ramp = {"first_batch_tokens": 64, "global_batch_tokens": 128, "batch_ramp_tokens": 4096, "batch_ramp_jumps": 1}
    more = {"schedule": "wsd", "decay_tokens": 2048, "decay_shape": "linear", "mup_base_width": 16}
    text = card_of(tmp_path, SMALL, data, **ramp | more)[1]
    assert "; from 64 tokens on it grew in 1 jump over the first 4,096 tokens of the run |" in text
    assert ", the decay (linear) over the last 2,048 tokens; muP from width 16 |" in text


def test_the_model_card_lists_the_settings_that_count(tmp_path):
    data = write_data(tmp_path / "data")
    text = card_of(tmp_path, SMALL, data)[1]
    found = set(re.findall(r"^\| (\w+) \| .* \|$", text.split("## Model settings")[1], re.MULTILINE))
    assert {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "mlp", "norm", "position"} <= found
    assert not found & {"n_expert", "n_expert_per_token", "balance_loss", "sliding_window", "family", "norm_position"}
    text = card_of(tmp_path, FAMILIES["mixtral"], data)[1]
    for name in ("n_expert", "n_expert_per_token", "normalize_experts", "balance_loss", "router_z_loss"):
        assert f"| {name} | {json.dumps(getattr(FAMILIES['mixtral'], name))} |" in text


def test_config_json_speaks_the_words_of_transformers_4_and_5(tmp_path):
    """How the versions read them: tests/slow/test_transformers_versions.py."""
    expected = {
        "gpt2": {"n_ctx": 16, "n_inner": 128, "activation_function": "gelu_new", "scale_attn_weights": True},
        "llama": {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": False, "mlp_bias": False},
        "mistral": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
        "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
        "qwen3": {"head_dim": 16, "attention_bias": False, "layer_types": ["full_attention"] * 2},
        "olmo2": {"attention_bias": False},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True, "moe_intermediate_size": 40},
        "olmoe": {"num_experts": 6, "norm_topk_prob": False, "clip_qkv": None, "router_aux_loss_coef": 0.01},
        "smollm3": {"no_rope_layers": [1, 0], "attention_bias": False, "mlp_bias": False},
        "gpt_neox": {"rotary_pct": 1.0, "partial_rotary_factor": 1.0, "rotary_emb_base": 5e5, "attention_bias": True},
    }
    for family, base in FAMILIES.items():
        config = dataclasses.replace(base, rotary_theta=5e5)
        found = hf_write.config_json(families.transformers_config(config, "bfloat16", 256))
        same = expected[family] | {"dtype": "bfloat16", "torch_dtype": "bfloat16", "model_type": family}
        same |= {"bos_token_id": 256, "eos_token_id": 256, "tie_word_embeddings": base.tie_embeddings}
        # transformers' Llama learns nothing of the pad token's row, which is the end of text's
        same["pad_token_id"] = 256 if family in ("gpt2", "gpt_neox") else None
        if family != "gpt2":
            same |= {"rope_theta": 5e5, "rope_scaling": None}
            assert found["rope_parameters"]["rope_theta"] == 5e5
        assert {name: found[name] for name in same} == same
        write_json(tmp_path / "config.json", found)
        assert hf_read.read_model_config(tmp_path).rotary_theta == (10000.0 if family == "gpt2" else 5e5)
    of_4 = {name: value for name, value in found.items() if name != "rope_parameters"}
    write_json(tmp_path / "config.json", of_4)
    assert hf_read.read_model_config(tmp_path).rotary_theta == 5e5


@pytest.mark.parametrize("config", MODELS)
def test_weights_and_settings_come_back_bit_for_bit(config, tmp_path):
    ours = randomised(GPT(config))
    tensors = to_transformers(config, ours)
    read = weights.from_transformers(config, tensors.get)
    for name, parameter in ours.named_parameters():
        assert torch.equal(read(name), parameter), name
    their = randomised(their_model(config))
    theirs = comparison.as_in_files(their, their.state_dict())
    if zero_biases(config):
        theirs = {name: tensor * (not name.endswith("bias")) for name, tensor in theirs.items()}
    read = weights.from_transformers(config, theirs.get)
    back = dict(weights.to_transformers(config, read))
    assert back.keys() | {"lm_head.weight"} == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())
    families.transformers_config(config).save_pretrained(tmp_path)
    published = hf_read.read_model_config(tmp_path)
    if zero_biases(config):
        published = dataclasses.replace(published, bias=False)
    assert published == settings.explicit(dataclasses.replace(config, init_std=0.02))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"norm": "rmsnorm"}, "model.norm: found rmsnorm, expected layernorm"),
        ({"mlp": "swiglu"}, "model.mlp: found swiglu, expected gelu"),
        ({"n_kv_head": 2}, "model.n_kv_head: found 2, expected 4: transformers' GPT2LMHeadModel is the nearest"),
        ({"position": "rotary", "n_kv_head": 2}, "model.n_kv_head: found 2, expected 4: transformers' GPTNeoX"),
        ({"position": "rotary", "mlp": "swiglu"}, "model.norm: found layernorm, expected rmsnorm: transformers' Llama"),
        ({"position": "rotary", "norm": "rmsnorm"}, "model.mlp: found gelu, expected swiglu"),
    ],
)
def test_a_model_of_no_family_is_refused(more, expected):
    config = dataclasses.replace(SMALL, **more)
    for refuse in (families.transformers_config, weights.their_names):
        with pytest.raises(UserError, match=r"^[^\n]+$") as error:
            refuse(config)
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("base", "more", "expected"),
    [
        (SMALL, {"norm": "rmsnorm"}, "model.norm: found rmsnorm, expected layernorm: {}; set --model.norm layernorm"),
        (
            FAMILIES["qwen2"],
            {"qkv_bias": None, "family": "qwen2"},
            "model.qkv_bias: found null, expected true: {}; set --model.qkv_bias true",
        ),
        (SMALL, {"head_dim": 16}, "model.head_dim: found 16, expected 8: {}; set --model.head_dim 8"),
        (
            SMALL,
            {"sliding_window": 5, "parallel_residual": True},
            "model.sliding_window: found 5, expected null; model.parallel_residual: found true, expected false: {}; "
            "set --model.sliding_window null --model.parallel_residual false",
        ),
        (LLAMA, {"family": "mixtral"}, "model.n_expert: found null, expected a number of experts: {}"),
        (SMALL, {"family": "gpt"}, 'model.family: found "gpt", expected null or one of gpt2, '),
    ],
)
def test_the_refusal_of_a_model_has_the_flags_that_make_it_one_of_a_family(base, more, expected):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        families.family_of(dataclasses.replace(base, **more))
    said = re.sub(r": transformers' .* computes nothing else", ": {}", str(error.value))
    assert said.startswith(expected) if expected.endswith(", ") else said == expected, said


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_config_can_be_exported(path):
    families.family_of(load_config([str(path)]).model)


# -- tokenizers ----------------------------------------------------------------------------------

NASTY = [
    "naïve café 東京都 привет мир 😀👩‍👩‍👧 שלום नमस्ते",
    "\r\n\t  x=1\n\n\n    y\u00a0z \u2028 \x00\x01\x7f",
    "1234567 12 ½ ² 3.14159",
    "don't DON'T we'LL it'\u017f  a \n b",
    "a" * 300 + " " * 300,
    "def f(x):\n\treturn x  # <|endoftext|\n",
]


def of_pattern(name, monkeypatch):
    """tiktoken's encoding with its pattern and special tokens, over GPT-2's vocabulary: its own may not be here."""
    from tiktoken_ext import openai_public

    ranks = load_tokenizer("gpt2")._mergeable_ranks
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    parts = getattr(openai_public, name)()
    return tiktoken.Encoding(
        name, pat_str=parts["pat_str"], mergeable_ranks=ranks, special_tokens=parts["special_tokens"]
    )


def with_missing(encoding):
    """The encoding as one that lacks no character, which tiktoken's do not say."""
    encoding.missing_characters = lambda text: []
    return encoding


@pytest.mark.parametrize("name", ["gpt2", "bytes", "cl100k_base", "o200k_base"])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_auto_tokenizer_gives_our_ids(name, config, tmp_path, monkeypatch, request):
    if name != "bytes":
        request.getfixturevalue("shared")  # where GPT-2's vocabulary is
    encoding = of_pattern(name, monkeypatch) if name.endswith("_base") else load_tokenizer(name)
    parts = encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str
    save_for_transformers(tmp_path, *parts, bos_token=END_OF_TEXT)
    families.transformers_config(config).save_pretrained(tmp_path)  # by which AutoTokenizer may choose another class
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    fault = hf_write.fault_of_auto_tokenizer(tmp_path, with_missing(encoding))
    # transformers 5 takes Qwen2's class for its family, which makes its own normalizer and pattern
    takes_another_class = families.family_of(config) == "qwen2"
    assert (type(theirs).__name__ == "Qwen2Tokenizer") == takes_another_class == (fault is not None)
    if takes_another_class:
        assert "Qwen2Tokenizer" in fault and "PreTrainedTokenizerFast" in fault and "\n" not in fault
        assert any(theirs.encode(text) != encoding.encode_ordinary(text) for text in [*NASTY, "e\u0301"])
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    generator = random.Random(0)
    pieces = [*"  \n\r\t'stLlvRe0123456789½²\u017fKabß.,/-é東\u0301\u00a0\u2028\u3000😀ǅ", "\n\n", "'LL", "'re"]
    texts = ["".join(generator.choices(pieces, k=generator.randrange(14))) for _ in range(2000)]
    for text in NASTY + texts:
        assert theirs.encode(text) == encoding.encode_ordinary(text), repr(text)
        assert theirs.decode(encoding.encode_ordinary(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == encoding._special_tokens[END_OF_TEXT]
    text = f"x = 1{END_OF_TEXT}y"
    assert theirs.encode(text) == encoding.encode(text, allowed_special="all")
