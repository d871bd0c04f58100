"""LoRA: adapters beside frozen weights compute what PEFT's compute, and are written and read in its format."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig as TheirConfig
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import eval
import export
from minzero import adapters, checkpoint, checkpoint_folder, load, lora
from minzero.config.build import build
from minzero.config.sections import Config, DataConfig, LoraConfig, TrainConfig
from minzero.curves import read_run
from minzero.errors import UserError
from minzero.hf import peft
from minzero.sizes import flops_per_token
from minzero.trained import find_base, folder_to_start_from, identity_of, open_checkpoint
from model import GPT
from tests.helpers.trained_runs import (
    FAMILIES,
    GPT2,
    LLAMA,
    OF_NO_FAMILY,
    make_folder,
    random_model,
    write_data,
    write_file,
    write_run,
)
from tests.unit.test_model import random_tokens

SOME = LoraConfig(rank=3, alpha=5.0)
DENSE = {name: config for name, config in FAMILIES.items() if not config.n_expert}


def of(config):
    """The LoraConfig for a model: experts have no adapters."""
    return dataclasses.replace(SOME, matrices=["qkv", "proj"]) if config.n_expert else SOME


def adapted(config, model=None, seed=7):
    """A GPT with random adapters, of which B is not zero."""
    return with_random_adapters(copy.deepcopy(model or random_model(config)), of(config), seed)


def with_random_adapters(model, config, seed):
    """The same model, with adapters of which B is not zero. config: a LoraConfig."""
    lora.add_adapters(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapters.is_adapter(name):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if adapters.is_adapter(name)}


def write_lora_run(run, model, base, data, **more):
    """A run's folder with one checkpoint of a model's adapters. base: the path of the weights beside them. more:
    other values of the section lora."""
    adapters, config = adapters_of(model), model.config
    folder, name = run / "checkpoints", checkpoint_folder.name_of(5)
    (folder / f"{name}.tmp").mkdir(parents=True)
    file = "rank_00000.safetensors"
    tensors = {f"fp32/{key}/0": value.float().flatten().contiguous() for key, value in adapters.items()}
    state = {"files": {file: write_file(folder / f"{name}.tmp" / file, tensors)}, "loss_scaler": {}, "tied": {}}
    state |= {"step": 5, "tokens": 5120, "optimizer_steps": 5, "world_size": 1, "stage": 0, "precision": "fp32"}
    whole = Config(
        model=config,
        data=DataConfig(data),
        train=TrainConfig(init_from=str(base)),
        lora=dataclasses.replace(of(config), **more),
    )
    state |= {"config": whole.to_dict(), "parameters": {key: list(value.shape) for key, value in adapters.items()}}
    state |= {"data": {data: {"tokenizer": None, "vocab_size": 270}}, "best_val_loss": 5.0}
    state |= {"versions": {"torch": torch.__version__, "device": "cpu"}, "base": identity_of(str(base))}
    checkpoint.commit(folder, name, state, best=True)
    return run


def open_state(run):
    return checkpoint.read_state(checkpoint_folder.find(run))


def test_it_begins_as_the_model_was_and_trains_adapters_alone():
    model, tokens = random_model(LLAMA), random_tokens(LLAMA)
    expected = model(tokens)
    lora.add_adapters(model, SOME, 1)
    assert torch.equal(model(tokens), expected)
    model(tokens, tokens).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == adapters.is_adapter(name)
    found = {name: list(value.shape) for name, value in adapters_of(model).items()}
    assert found == adapters.adapter_shapes(LLAMA, SOME)
    assert adapters.count_adapters(LLAMA, SOME) == sum(math.prod(shape) for shape in found.values())
    a = next(value for name, value in adapters_of(model).items() if ".a." in name)
    assert a.abs().max() <= 1 / math.sqrt(a.shape[1]) and a.std() > 0.4 / math.sqrt(a.shape[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_is_exported_and_computes_the_same(name, tmp_path):
    config = FAMILIES[name]
    data = write_data(tmp_path / "data")
    base = write_run(tmp_path / "base", config, data)
    export.main([str(tmp_path / "base"), str(tmp_path / "hf")])
    model = adapted(config, base)
    write_lora_run(tmp_path / "lora", model, tmp_path / "base", data)
    export.main([str(tmp_path / "lora"), str(tmp_path / "adapter")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = random_tokens(config)
    expected = model.eval()(tokens)
    found = PeftModel.from_pretrained(theirs, tmp_path / "adapter")(tokens).logits
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(base(tokens), expected, atol=1e-2)
    # merged, by export.py and by every command that reads the run
    export.main([str(tmp_path / "lora"), str(tmp_path / "merged"), "--merge"])
    for merged in (AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), load(tmp_path / "lora")[0]):
        found = merged(tokens)
        found = found if torch.is_tensor(found) else found.logits
        assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", DENSE)
def test_an_adapter_of_pefts_continues_here_step_by_step_as_there(name, tmp_path):
    """20 steps of AdamW from the same adapter: losses within 1e-5."""
    config = DENSE[name]
    theirs = make_folder(tmp_path / "hf", config)
    settings = TheirConfig(r=3, lora_alpha=5, target_modules=peft.target_modules(config, SOME), init_lora_weights=False)
    torch.manual_seed(5)
    theirs = get_peft_model(theirs, settings)
    theirs.save_pretrained(tmp_path / "adapter")
    taken = dataclasses.replace(SOME, init_from=str(tmp_path / "adapter"))
    from minzero.trained import open_weights

    model = GPT(config)
    read = open_weights(str(tmp_path / "hf"), config)[1]()
    for key, parameter in model.named_parameters():
        parameter.data.copy_(read(key))
    lora.add_adapters(model, taken, 1)
    read = peft.open_adapter(taken, config)()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if adapters.is_adapter(key):
                parameter.copy_(read(key))
    ours = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_theirs = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, ours)) == sum(map(torch.numel, of_theirs))
    optimizers = [torch.optim.AdamW(found, lr=1e-2) for found in (ours, of_theirs)]
    for step in range(20):
        tokens = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(step))
        targets = tokens.roll(-1, dims=1)
        logits = theirs(tokens).logits
        losses = [model(tokens, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten())]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5), step
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # a comparison that does not notice one number shows nothing
    with torch.no_grad():
        ours[0].view(-1)[0] += 0.1
        assert model(tokens, targets).item() != pytest.approx(losses[1].item(), rel=1e-5)


def test_a_shorter_context_than_the_bases_is_read_as_it_was_trained(tmp_path):
    """Learned positions past block_size are left out, also where adapters are added to them."""
    data = write_data(tmp_path / "data")
    base = write_run(tmp_path / "base", dataclasses.replace(GPT2, block_size=24), data)
    short = GPT(GPT2)
    for name, parameter in short.named_parameters():
        parameter.data.copy_(dict(base.named_parameters())[name][: len(parameter)])
    model = adapted(GPT2, short)
    run = write_lora_run(tmp_path / "lora", model, tmp_path / "base", data)
    tokens = random_tokens(GPT2)
    assert torch.allclose(load(run)[0](tokens), model.eval()(tokens), atol=1e-5)
    export.main([str(run), str(tmp_path / "merged"), "--merge"])


def test_dropout_is_of_the_adapters_input():
    config = dataclasses.replace(SOME, dropout=0.5)
    model = random_model(LLAMA)
    lora.add_adapters(model, config, 1)
    linear = model.blocks[0].attention.proj
    with torch.no_grad():
        linear.adapter.b[0].weight.fill_(1.0)
    x = torch.ones(4, LLAMA.n_embd)
    torch.manual_seed(0)
    found = linear.train()(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    small = dropped @ linear.adapter.a[0].weight.T
    assert torch.allclose(found, F.linear(x, linear.weight) + config.scale * small.sum(-1, keepdim=True), atol=1e-6)
    assert not torch.allclose(linear.eval()(x), found)


def test_other_weights_in_place_of_the_base_are_refused(tmp_path):
    data = write_data(tmp_path / "data")
    base = write_run(tmp_path / "base", LLAMA, data)
    run = write_lora_run(tmp_path / "lora", adapted(LLAMA, base), tmp_path / "base", data)
    eval.main([str(run)])
    changed = {name: parameter.detach() + 0.1 for name, parameter in base.named_parameters()}
    write_run(tmp_path / "other", LLAMA, data, step=6, read=changed.__getitem__)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"adapters belong to the weights in .*base.*expected"):
        eval.main([str(run)])
    (tmp_path / "other/checkpoints/step_00000006").rename(tmp_path / "other/checkpoints/step_00000005")
    (tmp_path / "other").rename(tmp_path / "base")
    # the same weights in another place
    found = find_base(str(tmp_path / "moved"), open_state(run)["base"], run)
    assert found["path"].startswith(str(tmp_path / "moved"))
    with pytest.raises(UserError, match=r"there are others now \(found [0-9a-f]+, expected [0-9a-f]+\); put them back"):
        eval.main([str(run)])


def test_the_digest_of_a_published_base_sees_one_changed_byte(tmp_path):
    make_folder(tmp_path / "hf", GPT2)
    before = identity_of(str(tmp_path / "hf"))
    file = tmp_path / "hf/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert identity_of(str(tmp_path / "hf"))["digest"] != before["digest"]


@pytest.mark.parametrize(
    "lora_section, more, message",
    [
        ({"init_from": "a"}, {}, "lora.init_from: found a, but lora.rank is null"),
        ({"alpha": 8}, {}, "lora.alpha: found 8.*, but lora.rank is null"),
        ({"matrices": ["qkv"]}, {}, "lora.matrices: .* but lora.rank is null"),
        ({}, {"dpo_beta": 0.5}, "train.dpo_beta: found 0.5 with train.loss next_token"),
        ({"rank": 4, "matrices": []}, {"init_from": "x"}, r"lora.matrices: found \[\]"),
        ({"rank": 4, "matrices": ["qkv", "qkv"]}, {"init_from": "x"}, "each once"),
        ({"rank": 4, "matrices": ["head"]}, {"init_from": "x"}, "expected one of qkv, proj, up, down"),
        ({"rank": 0}, {}, "expected at least 1"),
    ],
)
def test_settings_that_are_refused(lora_section, more, message):
    with pytest.raises(UserError, match=message):
        build({"lora": lora_section, "train": more}, "test.json")


def test_experts_have_no_adapters():
    model = {"n_expert": 4}
    with pytest.raises(
        UserError, match=r"lora.matrices: found up, down with model.n_expert 4.*set lora.matrices to qkv"
    ):
        build({"lora": {"rank": 4}, "train": {"init_from": "x"}, "model": model}, "test.json")


def exported_adapter(folder):
    """The folder of an adapter with the settings SOME for a run of LLAMA, as export.py writes it."""
    data = write_data(folder / "data")
    base = write_run(folder / "base", LLAMA, data)
    write_lora_run(folder / "lora", adapted(LLAMA, base), folder / "base", data)
    export.main([str(folder / "lora"), str(folder / "adapter")])
    return folder / "adapter"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 4}, "r: found 4, expected 3; set lora.rank to 4"),
        ({"lora_alpha": 8}, "lora_alpha: found 8, expected 5.0; set lora.alpha to 8"),
        ({"use_dora": True}, "use_dora: found true"),
        ({"peft_type": "IA3"}, 'peft_type: found "IA3"'),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights: found "pissa", expected one of true'),
        ({"a_key_of_tomorrow": {"on": True}}, "a_key_of_tomorrow: found .*, expected it to be off"),
    ],
)
def test_adapters_that_are_refused(changes, message, tmp_path):
    path = exported_adapter(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        peft.open_adapter(dataclasses.replace(SOME, init_from=str(tmp_path / "adapter")), LLAMA)


ON = {  # values of PEFT's settings with which they are on, where true is none
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa_niter_4",
    "layers_to_transform": [0],
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1],
    "target_parameters": ["a"],
    "layer_replication": [[0, 1]],
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TheirConfig)])
def test_every_setting_of_pefts_is_known_or_must_be_off(name, tmp_path):
    """Those that are let through are named here again, so that a new one of PEFT's cannot slip in."""
    path = exported_adapter(tmp_path) / "adapter_config.json"
    settings = json.loads(path.read_text())
    theirs = json.loads(json.dumps(TheirConfig(target_modules=["q_proj"]).to_dict(), default=list)) | settings
    path.write_text(json.dumps(theirs | {name: ON.get(name, True)}))
    given = dataclasses.replace(SOME, init_from=str(tmp_path / "adapter"))
    harmless = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
        exclude_modules layers_pattern fan_in_fan_out lora_dropout megatron_core qalora_group_size runtime_config
        ensure_weight_tying loftq_config eva_config corda_config lora_ga_config""".split()
    if name in harmless:
        peft.open_adapter(given, LLAMA)
    else:
        with pytest.raises(UserError, match=f"adapter_config.json: {name}: found "):
            peft.open_adapter(given, LLAMA)


def test_what_an_adapter_leaves_out_is_pefts_default(tmp_path):
    path = exported_adapter(tmp_path) / "adapter_config.json"
    settings = json.loads(path.read_text())
    given = dataclasses.replace(SOME, init_from=str(tmp_path / "adapter"))
    for name, key in (("r", "rank"), ("lora_alpha", "alpha")):
        default = getattr(TheirConfig(), name)
        path.write_text(json.dumps({one: value for one, value in settings.items() if one != name}))
        with pytest.raises(UserError, match=f"{name}: found {default}, expected .*; set lora.{key} to {default}"):
            peft.open_adapter(given, LLAMA)


@pytest.mark.parametrize("begun", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_of_an_adapter_that_is_taken_the_logits_are_pefts(begun, tmp_path):
    """Trained here by noise, saved and loaded by PEFT: those that change the base when they are loaded are refused."""
    theirs = make_folder(tmp_path / "hf", LLAMA)
    tokens = random_tokens(LLAMA)
    even = LoraConfig(rank=4, alpha=5.0, init_from=str(tmp_path / "adapter"))
    targets = peft.target_modules(LLAMA, even)
    torch.manual_seed(5)
    theirs = get_peft_model(theirs, TheirConfig(r=4, lora_alpha=5, target_modules=targets, init_lora_weights=begun))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter")(tokens).logits
    if begun in ("pissa", "olora"):
        with pytest.raises(UserError, match="init_lora_weights: found"):
            peft.open_adapter(even, LLAMA)
        return
    from minzero.trained import open_weights

    read = lora.merged(LLAMA, even, open_weights(str(tmp_path / "hf"), LLAMA)[1](), peft.open_adapter(even, LLAMA)())
    model = GPT(LLAMA).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
        assert torch.allclose(model(tokens), expected, atol=1e-5 * expected.abs().max().item())


def test_an_adapter_for_other_matrices_is_refused(tmp_path):
    exported_adapter(tmp_path)
    wanted = dataclasses.replace(SOME, init_from=str(tmp_path / "adapter"), matrices=["qkv"])
    with pytest.raises(UserError, match=r"down_proj.lora_A.weight: found \[3, 128\], expected none"):
        peft.open_adapter(wanted, LLAMA)
    with pytest.raises(UserError, match="expected the folder of an adapter"):
        peft.open_adapter(dataclasses.replace(SOME, init_from=str(tmp_path / "none")), LLAMA)


def test_an_adapter_in_the_wrong_place(tmp_path):
    """In the place of the model, and beside another than its own."""
    exported_adapter(tmp_path)
    with pytest.raises(UserError, match=r"train.init_from: .*adapter holds an adapter.* as lora.init_from"):
        folder_to_start_from(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"train.init_from: .*none"):
        folder_to_start_from(str(tmp_path / "none"))
    trained = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert peft.other_base(tmp_path / "adapter", trained) is None
    assert f'was trained beside "{trained}"; train.init_from is other' in peft.other_base(tmp_path / "adapter", "other")


def test_a_model_that_transformers_does_not_have(tmp_path):
    data = write_data(tmp_path / "data")
    base = write_run(tmp_path / "base", OF_NO_FAMILY, data)
    run = write_lora_run(tmp_path / "lora", adapted(OF_NO_FAMILY, base), tmp_path / "base", data)
    eval.main([str(run)])
    with pytest.raises(UserError, match=r"model.norm: found rmsnorm"):
        export.main([str(run), str(tmp_path / "adapter")])
    with pytest.raises(UserError, match="--merge"):
        export.main([str(tmp_path / "base"), str(tmp_path / "hf"), "--merge"])


def test_flops_count_no_gradients_of_frozen_weights(tmp_path):
    trained = adapters.count_adapters(LLAMA, SOME)
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, tokens = GPT(LLAMA), torch.zeros(1, 16).long()
        lora.add_adapters(model, SOME, 1)
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens, tokens).backward()
    assert flops_per_token(LLAMA, None, trained) == pytest.approx(counter.get_total_flops() / 16, rel=1e-9)
    data = write_data(tmp_path / "data")
    base = write_run(tmp_path / "base", LLAMA, data)
    run = write_lora_run(tmp_path / "lora", adapted(LLAMA, base), tmp_path / "base", data)
    state = open_checkpoint(next((run / "checkpoints").glob("step_*"))).state
    (run / "config.json").write_text(json.dumps(state["config"]))
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 1024, "loss": 5.0}\n')
    points = read_run(run, "flops").curves["loss"]
    assert points[0][0] == 1024 * flops_per_token(LLAMA, None, trained)
