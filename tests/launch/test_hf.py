"""Folders in transformers' format: runs start from them, export.py writes them, and malformed ones are refused."""

import dataclasses
import json
import math
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import export
from minzero import checkpoint, checkpoint_folder, checkpoint_state
from minzero.config.sections import ModelConfig
from minzero.data.mixture import Mixture
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.files import write_json
from minzero.hf import families, weights
from minzero.hf import write as hf_write
from minzero.hf.comparison import as_in_files
from minzero.metrics import read_metrics
from minzero.trained import load_model, open_trained, open_weights
from model import GPT
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.trained_runs import (
    FAMILIES,
    LLAMA,
    NEOX,
    PYTHIA,
    make_folder,
    write_data,
    write_run,
)
from tests.helpers.trained_runs import GPT2 as SMALL

CONTINUED = {  # of start_from.py, with the block_size of the run
    "mistral": 16,
    "qwen2": 16,
    "qwen3": 16,
    "olmo2": 16,
    "smollm3": 16,
    "pythia": 8,
    "mixtral": 16,
    "qwen3_moe": 16,
    "olmoe": 16,
}

# -- from there: the start of a run --------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which start_from.py left its runs, beside a folder of transformers' for each family."""
    folder = tmp_path_factory.mktemp("start_from")
    write_data(folder / "data")
    others = {"llama": dataclasses.replace(LLAMA, tie_embeddings=False), "pythia": PYTHIA}
    for name, config in (FAMILIES | others).items():
        make_folder(folder / name, config, shards="40KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 1, "not sharded"
        (folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(config)))
    for name, block_size in CONTINUED.items():
        sections = {"model": {"block_size": block_size}, "data": {"path": str(folder / "data")}}
        if FAMILIES.get(name, LLAMA).n_expert:  # the comparison is with the loss of prediction alone
            sections["model"] |= {"balance_loss": 0.0, "router_z_loss": 0.0}
        sections |= {"train": {"init_from": str(folder / name)}}  # a whole config, of three keys
        (folder / f"continue_{name}.json").write_text(json.dumps(sections))
    script = Path(__file__).with_name("start_from.py")
    done = run(deepspeed_command(script, folder / "data", folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name, family in families.FAMILIES.items():
        assert f"weights from {folder}/{name} ({family.architecture})" in done.stdout
    return folder


def first_batch(folder, block_size=16):
    """Inputs and targets of all ranks' and micro-batches' samples of the first step."""
    data = Mixture(str(folder / "data"), "train", block_size, 270, 1337)
    batch = data.batch(data.windows_of(list(range(8 * 16 // block_size))))
    return [torch.from_numpy(part) for part in batch]


def test_every_stage_rank_and_precision_starts_from_the_published_weights(launched):
    for family in FAMILIES:
        config = ModelConfig(**json.loads((launched / f"{family}.json").read_text()))
        model = AutoModelForCausalLM.from_pretrained(launched / family)
        read = weights.from_transformers(config, as_in_files(model, model.state_dict()).get)
        for rank in (0, 1):
            for setting, found in torch.load(launched / f"weights_{rank}.pt").items():
                if setting.split()[0] == family:
                    assert len(found) > 10
                    for name, weight in found.items():
                        assert torch.equal(weight, read(name).to(weight.dtype)), f"{name}, {setting}, rank {rank}"


def test_the_first_loss_is_that_of_transformers(launched):
    """Also with a context shorter than the published one, which takes its first positions."""
    for name in ("gpt2_0", "llama_0", *(f"{family}_3" for family in FAMILIES), "short"):
        family, block_size = ("gpt2", 8) if name == "short" else (name[:-2], 16)
        model = AutoModelForCausalLM.from_pretrained(launched / family).eval()
        inputs, targets = first_batch(launched, block_size)
        with torch.no_grad():
            expected = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).item()
        assert abs(expected - math.log(270)) > 0.02, "random weights would look the same"
        assert read_metrics(launched / name)[0]["loss"] == pytest.approx(expected, rel=2e-6), name


def test_a_run_that_continues_and_one_that_starts_from_a_run(launched):
    lines = [line for line in read_metrics(launched / "llama_3") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    without_a_model = [line for line in read_metrics(launched / "qwen3_3") if "loss" in line]
    assert [line["step"] for line in without_a_model] == [1, 2], "its model is its checkpoint's"
    model = load_model(open_trained(launched / "llama_3"))
    inputs, targets = first_batch(launched)
    expected = model(inputs, targets).item()
    assert read_metrics(launched / "from_a_run")[0]["loss"] == pytest.approx(expected, rel=2e-6)
    assert expected != pytest.approx(lines[0]["loss"], rel=1e-3), "the second run must start where the first ended"


@pytest.mark.parametrize("family", CONTINUED)
def test_a_run_whose_config_names_no_model_continues_the_published_one(launched, tmp_path, family):
    """Its first loss and gradient norm are those of transformers' own model on the same batch; exported after a step at
    a learning rate of zero, the architecture is the same and the weights are bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(launched / family).eval()
    inputs, targets = first_batch(launched, CONTINUED[family])
    loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
    line = read_metrics(launched / f"{family}_3")[0]
    assert abs(loss.item() - math.log(270)) > 0.02, "random weights would look the same"
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    export.main([str(launched / f"{family}_3"), str(tmp_path / "hf"), "--checkpoint", "latest"])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(exported) is type(model)
    expected, found = model.state_dict(), exported.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():  # the comparison notices a single weight
        model.get_parameter(next(reversed(dict(model.named_parameters())))).view(-1)[0] += 0.5
    worse = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).item()
    assert line["loss"] != pytest.approx(worse, rel=1e-5)


# -- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of transformers' to spoil a copy of."""
    folder = tmp_path_factory.mktemp("published")
    make_folder(folder / "gpt2", SMALL, "40KB")
    make_folder(folder / "llama", LLAMA)
    make_folder(folder / "gpt_neox", NEOX)
    return folder


def refused(folder, config):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        open_weights(str(folder), config)
    return str(error.value)


def test_each_difference_from_the_published_model_is_named_with_the_flags_that_fix_it(published):
    config = dataclasses.replace(LLAMA, n_layer=3, rotary_theta=5e5, tie_embeddings=False, block_size=32)
    message = refused(published / "llama", config)
    assert "model.n_layer: 3, expected 2" in message and "model.rotary_theta: 500000.0, expected 10000.0" in message
    assert (
        "model.tie_embeddings: false, expected true; " in message
        and "model.block_size: 32, expected 16; set --model" in message
    )
    assert message.endswith("--model.rotary_theta 10000.0 --model.tie_embeddings true --model.block_size 16")
    message = refused(published / "gpt2", LLAMA)
    for part in ("norm: rmsnorm, expected layernorm", "position: rotary", "mlp: swiglu", "n_kv_head: 2, expected 4"):
        assert f"model.{part}" in message
    assert "mlp_hidden: 128, expected 128" not in message


@pytest.mark.parametrize(
    ("family", "change", "expected"),
    [
        ("gpt2", {"model_type": "gptj"}, "config.json: model_type: found 'gptj', expected one of gpt2, llama, "),
        ("gpt2", {"activation_function": "relu"}, "activation_function: found 'relu', expected 'gelu_new'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: found False, expected True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: found True"),
        ("gpt2", {"n_embd": "wide"}, "config.json: not a configuration of gpt2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        ("llama", {"head_dim": 16}, "model.head_dim: null, expected 16; set --model.head_dim 16"),
        ("llama", {"attention_bias": True}, "mlp_bias: found False, expected True"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "model.rotary_scaling: null, expected {"),
        ("llama", {"rope_scaling": None, "rope_theta": "x"}, "config.json: not a configuration of llama"),
        ("llama", {"rope_theta": 5e5}, "rope_theta: found 500000.0, expected 10000.0 as in rope_parameters"),
        (
            "gpt_neox",
            {"rotary_emb_base": 5e5},
            "rotary_emb_base: found 500000.0, expected 10000.0 as in rope_parameters",
        ),
        ("llama", {"model_type": ["llama"]}, "config.json: model_type: found ['llama'], expected one of gpt2, llama"),
        ("gpt_neox", {"hidden_act": "gelu"}, "model.mlp: gelu, expected gelu_exact; set --model.mlp gelu_exact"),
        ("gpt_neox", {"use_parallel_residual": True}, "model.parallel_residual: false, expected true"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias: found False, expected True"),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "model.rotary_fraction: 1.0, expected 0.25; set --model.rotary_fraction 0.25",
        ),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: found"),
    ],
)
def test_models_that_compute_something_else_than_the_run_are_refused(published, tmp_path, family, change, expected):
    folder = shutil.copytree(published / family, tmp_path / "copy")
    content = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in change:
        content.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(content | change))
    message = refused(folder, FAMILIES[family])
    assert message.startswith(f"{folder}") and expected in message


def spoil(folder, how):
    """Make one thing wrong with the one file of weights in `folder`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif how == "bin":
        file.rename(folder / "pytorch_model.bin")
    elif how == "none":
        file.unlink()
    elif how == "index":
        (folder / "model.safetensors.index.json").write_text('{"weights": {}}')
    elif how == "shard":
        index = {"weight_map": {name: "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        if how == "missing":
            del tensors[name]
        elif how == "unknown":
            tensors["model.layers.2.mlp.up_proj.weight"] = tensors[name].clone()
        elif how == "shape":
            tensors[name] = tensors[name].t().contiguous()
        elif how == "integers":
            tensors[name] = tensors[name].to(torch.int8)
        elif how == "untied":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("cut", "copy/model.safetensors: "),
        ("bin", "found no model.safetensors, nor an index of its parts; convert its .bin files"),
        ("none", "found no model.safetensors, nor an index of its parts; copy"),
        ("index", "copy/model.safetensors.index.json: no weight_map"),
        ("shard", "copy/model-00001-of-00001.safetensors: "),
        ("missing", "no tensor model.layers.1.mlp.up_proj.weight"),
        ("unknown", "copy/model.safetensors: found model.layers.2.mlp.up_proj.weight, which"),
        (
            "shape",
            "model.layers.1.mlp.up_proj.weight: found shape and type ((32, 128), 'F32'), expected (128, 32)",
        ),
        ("integers", "model.layers.1.mlp.up_proj.weight: found shape and type ((128, 32), 'I8'), expected"),
        ("untied", "tie_word_embeddings: found true, but lm_head.weight is not model.embed"),
    ],
)
def test_malformed_folders_are_one_line(published, tmp_path, how, expected):
    folder = shutil.copytree(published / "llama", tmp_path / "copy")
    open_weights(str(folder), LLAMA)  # nothing is wrong with it yet
    spoil(folder, how)
    assert expected in refused(folder, LLAMA)


def test_a_model_without_biases_starts_from_biases_of_zero_alone(published, tmp_path):
    config = dataclasses.replace(SMALL, bias=False)
    assert "model.bias: false, expected true, as transformer.h.0" in refused(published / "gpt2", config)
    model = make_folder(tmp_path, config)
    _, load = open_weights(str(tmp_path), config)
    ours, read = GPT(config).eval(), load()
    ours.load_state_dict({name: read(name) for name, _ in ours.named_parameters()}, strict=False)
    tokens = torch.arange(16)[None]
    assert torch.allclose(ours(tokens), model(tokens).logits, atol=1e-5)


def test_the_output_layer_of_gpt_neox_is_read_under_both_names(published, tmp_path):
    tensors = load_file(published / "gpt_neox" / "model.safetensors")
    stored = next(name for name in ("embed_out.weight", "lm_head.weight") if name in tensors)
    for name in ("embed_out.weight", "lm_head.weight"):
        folder = shutil.copytree(published / "gpt_neox", tmp_path / name)
        save_file(
            {name if key == stored else key: tensor for key, tensor in tensors.items()}, folder / "model.safetensors"
        )
        assert torch.equal(open_weights(str(folder), NEOX)[1]()("head.weight"), tensors[stored])


def test_names_without_the_prefix_and_old_buffers_are_read(published, tmp_path):
    """As GPT-2 itself is published: without the prefix `transformer.`, causal masks among the tensors."""
    tensors = {}
    for file in (published / "gpt2").glob("*.safetensors"):
        tensors |= {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16) for layer in (0, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(published / "gpt2" / "config.json", tmp_path)
    read, whole = (open_weights(str(folder), SMALL)[1]() for folder in (tmp_path, published / "gpt2"))
    for name, _ in GPT(SMALL).named_parameters():
        assert torch.equal(read(name), whole(name)), name


@pytest.mark.parametrize(
    ("source", "expected"),
    [("nobody/nothing", "no such folder here, and not to be had from the Hugging Face hub"), (".", "found neither")],
)
def test_a_start_from_nowhere_ends_with_code_2_and_one_line(launched, tmp_path, source, expected):
    command = [sys.executable, "train.py", "configs/tiny.json", "--data.path", launched / "data"]
    command += ["--train.out_dir", tmp_path / "run", "--train.init_from", source]
    done = run(command, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and not (tmp_path / "run").exists(), done.stderr
    assert f"train.init_from: {source}: {expected}" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


# -- there: the command --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_folder_loads_generates_and_comes_back(launched, tmp_path, family, monkeypatch, capsys):
    monkeypatch.setattr(hf_write, "MAX_SHARD", 40_000)
    export.main([str(launched / f"{family}_3"), str(tmp_path / "hf"), "--checkpoint", "latest"])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 + (family == "qwen2")
    if family == "qwen2":  # for which transformers 5 has a class that cuts text by a pattern of its own
        assert "warning: AutoTokenizer takes Qwen2Tokenizer, which gives other ids for " in said
        assert "tokenizer = PreTrainedTokenizerFast.from" in (tmp_path / "hf" / "README.md").read_text()
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() and not list(tmp_path.glob("*.tmp"))
    source = open_trained(launched / f"{family}_3", "latest")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == tokenizer.eos_token_id == 256
    assert theirs.config.max_position_embeddings == tokenizer.model_max_length == 16
    assert tokenizer.encode("abc") == load_tokenizer("bytes").encode_ordinary("abc")
    tokens, ours = torch.arange(16)[None], load_model(source)
    assert torch.allclose(theirs(tokens).logits, ours(tokens), atol=1e-5)
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == 256
    _, load = open_weights(str(tmp_path / "hf"), source.model)
    read, original = load(), source.load()
    assert all(torch.equal(read(name), original(name)) for name, _ in ours.named_parameters())


def test_the_model_card_states_the_facts_of_the_run(launched, tmp_path, capsys):
    run = shutil.copytree(launched / "llama_3", tmp_path / "a_run")
    (run / "loss.png").unlink()
    export.main([str(run), str(tmp_path / "hf"), "--dtype", "bfloat16"])
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    measured = {line["step"]: line["val_loss"] for line in read_metrics(run) if "val_loss" in line}
    step = checkpoint.read_state(checkpoint_folder.find(run, "best"))["step"]
    device = json.loads((run / "config.json").read_text())["versions"]["device"]
    for fact in (
        "# a_run",
        f"{sum(p.numel() for p in GPT(dataclasses.replace(LLAMA, tie_embeddings=False)).parameters()):,} parameters",
        "bfloat16",
        f"| tokens seen | {step * 128:,} in {step} step",
        f"| validation loss | {measured[step]:.4f} nats per token",
        "| data | data |",
        "| batch | 128 tokens, 8 sequences |",
        "| precision | fp32 |",
        f"| hardware | 2 x {device}, ZeRO stage 3 |",
        f"torch {torch.__version__}, deepspeed",
        "| n_kv_head | 2 |",
        "![training and validation loss](loss.png)",
    ):
        assert fact in card.text, fact
    assert (tmp_path / "hf" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", "drawn again from the metrics"
    code = card.text.split("```python\n")[1].split("```")[0].replace("PATH", str(tmp_path / "hf"))
    capsys.readouterr()
    exec(code.replace("max_new_tokens=50", "max_new_tokens=5"), {})
    assert capsys.readouterr().out.startswith("Once")
    export.main([str(checkpoint_folder.find(run, "best").rename(tmp_path / "alone")), str(tmp_path / "hf2")])
    text = (tmp_path / "hf2" / "README.md").read_text()
    assert "not measured at this step" in text and "loss.png" not in text


def test_other_types_and_no_tokenizer(launched, tmp_path, monkeypatch, capsys):
    source = launched / "gpt2_0"
    export.main([str(source), str(tmp_path / "half"), "--dtype", "bfloat16"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    read = checkpoint.open_weights(checkpoint_folder.find(source, "best"))[2]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.transformer.wte.weight, read("token_embedding.weight").bfloat16())
    (launched / "data" / "meta.json").rename(launched / "data" / "away")
    capsys.readouterr()
    try:
        export.main([str(source), str(tmp_path / "without")])
    finally:
        (launched / "data" / "away").rename(launched / "data" / "meta.json")
    assert f"without tokenizer files: {launched}/data has no meta.json" in capsys.readouterr().out
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "without")
    large = {name: 1e7 * tensor for name, tensor in GPT(SMALL).state_dict().items()}
    with pytest.raises(UserError, match=r"--dtype: transformer.wte.weight holds numbers too large for torch.float16"):
        hf_write.write_weights(tmp_path, SMALL, large.__getitem__, torch.float16)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_of_the_weights_two_at_most_are_in_memory_beside_the_file_being_made(config, tmp_path, monkeypatch):
    weights, alive, most = GPT(config).state_dict(), weakref.WeakSet(), 0

    def read(name):
        nonlocal most
        alive.add(weight := weights[name].clone())
        most = max(most, len(alive))
        return weight

    for size in ("5GB", 40_000):
        monkeypatch.setattr(hf_write, "MAX_SHARD", size)
        hf_write.write_weights(tmp_path, config, read, torch.float32)
    assert most == 2, "the one that is read and the one before it"


def test_nothing_is_overwritten(launched, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dead.tmp").mkdir()
    source = str(launched / "gpt2_0")
    for target, expected in (("full", "already there, expected a new or an empty folder"), ("dead", "dead.tmp: left")):
        done = run([sys.executable, "export.py", source, tmp_path / target])
        assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    with pytest.raises(UserError, match="no complete checkpoint"):
        export.main([str(tmp_path), str(tmp_path / "new")])
    with pytest.raises(UserError, match="could not be written"):
        export.main([source, "/proc/version/x"])
    export.main([source, str(tmp_path / "empty")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead.tmp", "empty", "full"]


def reseal(found, change):
    """Let change(state) alter the content of a checkpoint's state.json."""
    state = json.loads((found / "state.json").read_text())
    del state["crc32"]
    change(state)
    write_json(found / "state.json", state | {"crc32": checkpoint_state.state_checksum(state)})


OF_ANOTHER_VERSION = {  # of the train section: out of this code's ranges, of other types, or unknown
    "betas": [0.9, 0.999995],
    "spike_zscore": 0.5,
    "grad_clip": None,
    "weight_decay": 1e5,
    "eval_tokens": "all",
    "micro_batch_size": 0,
    "max_tokens": 10**19,
    "warmup_tokens": 2**60,
    "profile": "0:0",
    "bad_step": "ignore",
    "a_key_of_the_future": {"x": [1]},
}


def test_a_checkpoint_is_read_whatever_its_run_was_set_to(tmp_path, capsys):
    """Of the settings only the model's say how its weights are read."""
    trained = write_run(tmp_path / "run", LLAMA, write_data(tmp_path / "data"))
    found = checkpoint_folder.find(tmp_path / "run")
    reseal(found, lambda state: state["config"]["train"].update(OF_ANOTHER_VERSION))
    reseal(found, lambda state: state["config"]["data"].update(verify="perhaps", a_key_of_the_future=1))
    _, _, read = checkpoint.open_weights(found)
    assert torch.equal(read("final_norm.weight"), trained.final_norm.weight)
    assert open_trained(tmp_path / "run").model.n_embd == LLAMA.n_embd  # eval.py's and sample.py's
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "AdamW, betas [0.9, 0.999995], weight decay 100000, clipping null" in card
    assert "5.0000 nats per token, over " in card

    reseal(found, lambda state: state["config"]["model"].update(a_key_of_the_future=1))
    with pytest.raises(UserError, match=r"state\.json: unknown key model\.a_key_of_the_future"):
        checkpoint.open_weights(found)
