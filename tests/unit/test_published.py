"""Settings as models are published on the hub: each is read, computes what transformers computes, and is exported as
the same architecture; others are refused with the key that stands for another function.

The settings are in tests/helpers/published_configs.json, a model a line, in the form in which the hub has them."""

import dataclasses
import functools
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import export
from minzero.errors import UserError
from minzero.files import ROOT, write_json
from minzero.generate import Writer, generate
from minzero.hf import comparison, families
from minzero.hf import read as hf_read
from minzero.sizes import count_parameters
from minzero.trained import load_model, open_trained, open_weights
from tests.helpers.trained_runs import FAMILIES, make_folder, one_number_changed, randomised, write_data, write_run

PUBLISHED = json.loads((ROOT / "tests" / "helpers" / "published_configs.json").read_text())
YARN = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
CONFIGS = {name: entry["config"] for name, entry in PUBLISHED.items()}
CONFIGS |= {
    "Qwen2.5-7B with YaRN, as its card advises": CONFIGS["Qwen/Qwen2.5-7B"] | YARN,
    "Qwen3-8B with YaRN, as its card advises": CONFIGS["Qwen/Qwen3-8B"] | YARN,
    "Llama with linear scaling": CONFIGS["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]
    | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "Qwen2.5 with windows in its upper layers": CONFIGS["Qwen/Qwen2.5-0.5B"] | {"use_sliding_window": True},
}
LAYERS = 4
SMALL = {
    **dict.fromkeys(("n_embd", "hidden_size"), 32),
    **dict.fromkeys(("n_head", "num_attention_heads"), 4),
    **dict.fromkeys(("n_layer", "num_hidden_layers"), LAYERS),
    **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings"), 64),
    "vocab_size": 280,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "max_window_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def scaled_down(config):
    """The same keys with small sizes, so that scaling, windows and layers without rotary positions still count."""
    small = {key: SMALL.get(key, value) if value is not None else None for key, value in config.items()}
    if config.get("num_key_value_heads"):
        grouped = config["num_key_value_heads"] < config["num_attention_heads"]
        small["num_key_value_heads"] = 2 if grouped else 4
    if config.get("head_dim"):
        implied = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
        small["head_dim"] = 8 if implied else 16
    if config.get("sliding_window"):
        small["sliding_window"] = 8
    for key in ("num_experts", "num_local_experts"):
        if key in config:
            small |= {key: 5, "num_experts_per_tok": 2}
    for key in ("layer_types", "no_rope_layers"):
        if key in config:
            small[key] = config[key][:LAYERS]
    scaling = config.get("rope_scaling")
    if scaling and "original_max_position_embeddings" in scaling:
        small["rope_scaling"] = scaling | {"original_max_position_embeddings": 16}
    return small | {"initializer_range": 0.2}


def write_published(folder, config):
    """A random model of transformers' with these settings, in float32, and config.json as given. Returns the model."""
    write_json(folder / "config.json", config)
    torch.manual_seed(1)
    settings = AutoConfig.from_pretrained(folder)
    theirs = randomised(AutoModelForCausalLM.from_config(settings, dtype=torch.float32))
    theirs.save_pretrained(folder)
    write_json(folder / "config.json", config)
    return theirs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More of them only wait for each other at models of this size."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function from a name in CONFIGS to (the folder of that model scaled down, transformers' model of it)."""

    @functools.cache
    def write(name):
        folder = tmp_path_factory.mktemp("published")
        return folder, write_published(folder, scaled_down(CONFIGS[name]))

    return write


TOKENS = torch.randint(280, (2, 64), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def worst_difference(ours, theirs):
    return (ours(TOKENS) - theirs(TOKENS).logits).abs().max().item()


# -- in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_read_with_the_published_number_of_parameters(name, tmp_path):
    write_json(tmp_path / "config.json", CONFIGS[name])
    model = hf_read.read_model_config(tmp_path)
    assert families.family_of(model) == CONFIGS[name]["model_type"]
    assert count_parameters(model)[0] == PUBLISHED[name]["parameters"]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == PUBLISHED[name]["parameters"]


def test_every_family_has_a_published_model():
    assert {config["model_type"] for config in CONFIGS.values()} == set(families.FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_model_scaled_down_gives_transformers_logits(name, published):
    folder, theirs = published(name)
    ours = load_model(open_trained(folder))
    with torch.no_grad():
        scale = theirs(TOKENS).logits.abs().max().item()
    assert scale > 0.3, "a model that says nothing would show nothing"
    assert worst_difference(ours, theirs) < 1e-5 * max(1, scale)
    if CONFIGS[name].get("rope_scaling") or ours.config.sliding_window or ours.config.no_rotary_layers:
        ours.config.rotary_scaling = ours.config.sliding_window = ours.config.no_rotary_layers = None
        assert worst_difference(ours, theirs) > 1e-3, "the option would not be noticed"
        return
    for weight in one_number_changed(ours, by=0.1):
        assert worst_difference(ours, theirs) > 1e-4, f"one number of {weight} would not be noticed"


# -- and out -------------------------------------------------------------------------------------

SAID_OTHERWISE = {  # settings of training, names of ids and of programs, old names beside new ones
    *("architectures", "dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("initializer_range", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"),
    *("n_inner", "n_ctx", "hidden_act", "max_window_layers", "task_specific_params", "use_cache", "pretraining_tp"),
    *("torch_dtype", "is_llama_config", "rope_interleaved", "rope_theta", "rope_scaling", "rotary_pct", "use_mrope"),
    *("rotary_emb_base", "partial_rotary_factor", "attention_probs_dropout_prob", "hidden_dropout_prob"),
}


def settings_of(folder):
    """What a configuration says of the function, as transformers reads it."""
    found = AutoConfig.from_pretrained(folder).to_dict()
    rope = found.get("rope_parameters")
    if rope:
        found["rope_parameters"] = {key: value for key, value in rope.items() if key != "type"}
    if "head_dim" in found and found["head_dim"] is None:  # as Mixtral has it
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    ignored = SAID_OTHERWISE.union(families.FAMILIES[found["model_type"]].unused)
    return {key: value for key, value in found.items() if key not in ignored and not key.startswith("summary_")}


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_model_comes_back_as_it_went_in(name, published, data, tmp_path):
    """Through a checkpoint of ours with a shorter context: weights bit for bit, the same architecture and settings;
    and both write the same greedy text, as model.py does."""
    block_size = 48
    exported = tmp_path / "exported"
    folder, theirs = published(name)
    config = dataclasses.replace(hf_read.read_model_config(folder), block_size=block_size)
    _, load = open_weights(str(folder), config)
    write_run(tmp_path / "run", config, data, read=load())
    export.main([str(tmp_path / "run"), str(exported)])
    before, after = stored(folder), stored(exported)
    if config.position == "learned":
        key = "transformer.wpe.weight"
        before[key] = before[key][:block_size]
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, before[stored_name]) for stored_name, tensor in after.items())
    first, second = settings_of(folder), settings_of(exported)
    for key in ("max_position_embeddings", "n_positions"):
        assert second.pop(key, block_size) == block_size and first.pop(key, 64) == 64
    assert first == second
    assert json.loads((exported / "config.json").read_text())["architectures"] == CONFIGS[name]["architectures"]
    card = (exported / "README.md").read_text()
    assert f"| block_size | {block_size} |" in card and "AutoModelForCausalLM" in card

    prompt, count = list(b"abc x"), 12
    ours, again = load_model(open_trained(tmp_path / "run")), AutoModelForCausalLM.from_pretrained(exported).eval()
    greedy = {"do_sample": False, "eos_token_id": None}
    written = generate(Writer(open_trained(tmp_path / "run")).model, prompt, count, block_size, None, **greedy)
    assert len(written) == count
    for model in (theirs, again):
        inputs = torch.tensor([prompt])
        options = greedy | {"max_new_tokens": count, "pad_token_id": 0}
        found = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)[0, len(prompt) :].tolist()
        assert found == written
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(ours(torch.tensor([tokens]))[0, -1].argmax().item())
    assert tokens[len(prompt) :] == found
    ours.head.weight.data[found[3]] *= -1
    with torch.no_grad():
        assert ours(torch.tensor([tokens[: len(prompt) + 3]]))[0, -1].argmax().item() != found[3]


# -- refused -------------------------------------------------------------------------------------

LLAMA, QWEN2 = "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Qwen/Qwen2.5-0.5B"
MIXTRAL, QWEN3_MOE, OLMOE = "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B", "allenai/OLMoE-1B-7B-0924"
LONG = {"rope_type": "longrope", "long_factor": [1.0] * 32, "short_factor": [1.0] * 32, "factor": 4.0}
REFUSED = [
    (LLAMA, {"model_type": "gemma2"}, "model_type: found 'gemma2', expected one of"),
    (LLAMA, {"model_type": "gemma3_text"}, "model_type: found 'gemma3_text', expected one of"),
    (LLAMA, {"model_type": "phi3"}, "model_type: found 'phi3', expected one of"),
    (LLAMA, {"model_type": "olmo"}, "model_type: found 'olmo', expected one of"),
    (LLAMA, {"model_type": "granite"}, "model_type: found 'granite', expected one of"),
    ("openai-community/gpt2", {"model_type": "gptj"}, "model_type: found 'gptj', expected one of"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary_scaling: found"),
    (LLAMA, {"rope_scaling": LONG | {"original_max_position_embeddings": 512}}, "rotary_scaling: found"),
    (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True}}, "which yarn has no finetuned"),
    (LLAMA, {"attention_bias": True}, "mlp_bias: found False, expected True"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias: found True, expected False"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "rope_parameters: found"),
    (LLAMA, {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map: found"),
    (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: found"),
    (LLAMA, {"sliding_window": 4096}, "sliding_window: found 4096, a setting that is not known"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved: found true, a setting that is not known"),
    (LLAMA, {"logit_scale": 0.0625}, "logit_scale: found 0.0625, a setting that is not known"),
    (LLAMA, {"logits_scaling": 8.0}, "logits_scaling: found 8.0, a setting that is not known"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping: found 30.0, a setting that is not known"),
    (LLAMA, {"embedding_multiplier": 12.0}, "embedding_multiplier: found 12.0, a setting that is not known"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts: found 8, a setting that is not known"),
    (LLAMA, {"some_new_setting": "on"}, 'some_new_setting: found "on", a setting that is not known'),
    (QWEN2, {"use_mrope": True}, "use_mrope: found true, a setting that is not known"),
    (QWEN2, {"head_dim": 128}, "head_dim: found 128, a setting that is not known"),
    (QWEN2, {"use_qk_norm": True}, "use_qk_norm: found true, a setting that is not known"),
    ("Qwen/Qwen3-0.6B", {"attention_bias": True}, "attention_bias: found True, expected False"),
    ("allenai/OLMo-2-0425-1B", {"attention_bias": True}, "attention_bias: found True, expected False"),
    ("allenai/OLMo-2-0425-1B", {"clip_qkv": 8.0}, "clip_qkv: found 8.0, a setting that is not known"),
    ("HuggingFaceTB/SmolLM3-3B", {"use_sliding_window": True}, "use_sliding_window: found True, expected False"),
    ("EleutherAI/pythia-160m", {"attention_bias": False}, "attention_bias: found False, expected True"),
    ("EleutherAI/pythia-160m", {"hidden_act": "relu"}, "hidden_act: found 'relu', expected 'gelu_new'"),
    ("openai-community/gpt2", {"scale_attn_weights": False}, "scale_attn_weights: found False, expected True"),
    (
        "openai-community/gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx: found True, expected False",
    ),
    ("openai-community/gpt2", {"activation_function": "relu"}, "activation_function: found 'relu', expected"),
    (QWEN3_MOE, {"model_type": "qwen2_moe"}, "model_type: found 'qwen2_moe', expected one of"),
    (QWEN3_MOE, {"model_type": "qwen3_next"}, "model_type: found 'qwen3_next', expected one of"),
    (QWEN3_MOE, {"model_type": "deepseek_v2"}, "model_type: found 'deepseek_v2', expected one of"),
    (QWEN3_MOE, {"model_type": "deepseek_v3"}, "model_type: found 'deepseek_v3', expected one of"),
    (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step: found 2, expected 1"),
    (QWEN3_MOE, {"mlp_only_layers": [0]}, "mlp_only_layers: found [0], expected []"),
    (QWEN3_MOE, {"num_local_experts": 64}, "num_experts: found 128, expected 64 as in num_local_experts"),
    (QWEN3_MOE, {"use_sliding_window": True}, "use_sliding_window: found True, expected False"),
    (QWEN3_MOE, {"shared_expert_intermediate_size": 768}, "shared_expert_intermediate_size: found 768, a setting that"),
    (OLMOE, {"clip_qkv": 8.0}, "clip_qkv: found 8.0, expected None"),
    (OLMOE, {"num_local_experts": 32}, "num_local_experts: found 32, expected 64 as in num_experts"),
    (OLMOE, {"num_experts_per_tok": 65}, "model.n_expert_per_token: found 65"),
    (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise: found 0.1, expected 0.0"),
    (MIXTRAL, {"num_experts": 16}, "num_experts: found 16, expected 8 as in num_local_experts"),
]


@pytest.mark.parametrize(("name", "change", "expected"), REFUSED, ids=[str(row[1])[1:60] for row in REFUSED])
def test_what_is_another_function_is_refused_by_the_name_of_its_key(name, change, expected, tmp_path):
    write_json(tmp_path / "config.json", CONFIGS[name] | change)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        hf_read.read_model_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: ") and expected in str(error.value)


def spoilt(tensors, how, name):
    """(the tensors with one thing wrong, the name of one in files that the message must have)."""
    if how == "missing":
        return {key: tensor for key, tensor in tensors.items() if key != name}
    if how == "unknown":
        extra = name.replace(".1.", ".7.")
        return tensors | {extra: tensors[name].clone()}
    return tensors | {name: torch.cat((tensors[name], tensors[name]))}


@pytest.mark.parametrize("how", ["missing", "unknown", "shape"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_too_many_too_few_or_of_another_shape_is_named(family, how, tmp_path):
    make_folder(tmp_path / "whole", FAMILIES[family])
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    # of experts, those of one
    names = [key for key in tensors if ".1." in key and (".experts." not in key or ".experts.1." in key)]
    for name in names:
        folder = shutil.copytree(tmp_path / "whole", tmp_path / name)
        save_file(spoilt(tensors, how, name), folder / "model.safetensors")
        with pytest.raises(UserError, match=r"^[^\n]+$") as error:
            open_trained(folder)
        assert (name.replace(".1.", ".7.") if how == "unknown" else name) in str(error.value)
        shutil.rmtree(folder)


@pytest.mark.parametrize("wanted", FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_family_that_computes_something_else_is_refused(family, wanted):
    config = dataclasses.replace(FAMILIES[family], family=wanted)
    try:
        comparison.check_expressible(config)
    except UserError as error:
        assert family != wanted and "\n" not in str(error)
        assert str(error).startswith("model.") and "is what model.family asks for" in str(error)
        return
    same_function = {("llama", "mistral"), ("llama", "smollm3")}
    assert family == wanted or (family, wanted) in same_function


# -- the tables in docs --------------------------------------------------------------------------


def rows_of(heading):
    """The rows of the table in docs/transformers.md whose first column has this heading."""
    lines = (ROOT / "docs" / "transformers.md").read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_families_has_those_that_are_tested():
    from tests.slow import test_transformers_versions as versions
    from tests.slow import test_vllm as vllm
    from tests.unit.test_to_gguf import VARIANTS

    rows = {row[0].strip("`"): row[1:] for row in rows_of("`model_type`")}
    assert rows.keys() == families.FAMILIES.keys() == FAMILIES.keys()
    in_old = [name for name in versions.EXPORTS if name not in versions.NOT_IN["4.46.3"]]
    tested = {
        "old": {families.family_of(versions.MODELS[name]) for name in in_old if name in versions.MODELS},
        "new": {families.family_of(model) for model in versions.MODELS.values()},
        "vllm": {families.family_of(model) for model in vllm.MODELS.values()},
        "llama_cpp": {families.family_of(model) for model in VARIANTS.values()},
    }
    for name, (_, _, ours, *programs) in rows.items():
        assert ours == "yes"
        for (program, known), cell in zip(tested.items(), programs, strict=True):
            assert (name in known) == cell.startswith("yes"), f"{name}, {program}"


def test_the_table_of_refused_settings_has_those_that_are_tested():
    said = "\n".join(row[0] for row in rows_of("setting"))
    for _, change, _ in REFUSED:
        for key, value in change.items():
            assert f"`{key}`" in said, key
            if key == "model_type":
                assert f"`{value}`" in said
