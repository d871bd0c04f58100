"""configs/README.md states what the configs compute to, and each recipe divides where it is meant to run."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from minzero.cards import card_named
from minzero.config.deepspeed import gradient_accumulation
from minzero.config.load import load_config
from minzero.errors import UserError
from minzero.files import ROOT, read_json
from minzero.hf.families import transformers_config
from minzero.planner.gpus import GiB, Hardware
from minzero.planner.plan import plan_run
from minzero.sizes import count_parameters, flops_per_token

CONFIGS = {path.stem: read_json(path) for path in sorted((ROOT / "configs").glob("*.json"))}
NAMES = [name for name, config in CONFIGS.items() if "init_from" not in config["train"]]
TUNED = sorted({*CONFIGS} - {*NAMES})  # take their model from elsewhere

PUBLISHED = {  # parameters of the published models with these configs' shapes
    "llama-1b": 1_100_048_384,
    "llama-8b": 8_030_261_248,
    "olmo2-1b": 1_484_916_736,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
}


def rows():
    """{config: the other cells of its row} of the tables in configs/README.md."""
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {name.strip("`"): rest for name, *rest in cells}


def short(number, units=(("T", 1e12), ("B", 1e9), ("M", 1e6))):
    """1234567890 -> "1.23 B": three digits, as the table writes FLOPs and tokens."""
    unit, size = next(((unit, size) for unit, size in units if float(f"{number:.3g}") >= size), units[-1])
    return f"{number / size:.3g} {unit}"


def rounded_hours(hours):
    return "under 0.1" if hours < 0.1 else f"{float(f'{hours:.2g}'):,.{0 if hours >= 10 else 1}f}"


def test_every_config_has_its_row_and_every_row_its_config():
    assert sorted(rows()) == sorted(CONFIGS)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_states_what_its_config_computes_to(name):
    parameters, flops, tokens, gpus, hours, source = rows()[name]
    config = load_config([str(ROOT / "configs" / f"{name}.json")])
    assert parameters == f"{count_parameters(config.model)[0]:,}"
    assert flops == short(flops_per_token(config.model), (("T", 1e12), ("G", 1e9), ("M", 1e6)))
    assert tokens == short(config.train.max_tokens)
    gpus = int(gpus)
    assert gradient_accumulation(config, gpus) >= 1
    found = plan_run(config, Hardware(gpus, -(-gpus // 8), 80 * GiB, card_named("h100")))
    assert found["fits"] and hours == rounded_hours(found["gpu_hours"])
    assert source


@pytest.mark.parametrize("name", TUNED)
def test_a_row_states_what_its_config_tunes(name):
    base, data, trained, tokens = rows()[name]
    config = load_config([str(ROOT / "configs" / f"{name}.json")])
    assert (base, data) == (config.train.init_from, config.data.path)
    assert tokens == short(config.train.max_tokens, (("M", 1e6), ("K", 1e3)))
    rank = config.lora.rank
    assert trained.startswith(f"adapters of rank {rank}" if rank else "all weights")
    assert ("by DPO" in trained) == (config.train.loss == "dpo")
    assert not set(CONFIGS[name].get("model", {})) - {"block_size"}, "the rest is the base's"
    if base.startswith("out/"):  # of another config
        assert base.removeprefix("out/") in CONFIGS


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_those_of_the_published_model(name):
    model = load_config([str(ROOT / "configs" / f"{name}.json")]).model
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(transformers_config(model)).num_parameters()
    assert count_parameters(model)[0] == parameters == PUBLISHED[name]
    assert f"published {parameters:,}" in " ".join((ROOT / "configs" / "README.md").read_text().split())


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"tiny", "scaling-tiny"}))
def test_the_batch_divides_on_8_gpus_and_of_a_large_model_on_64(name):
    config = load_config([str(ROOT / "configs" / f"{name}.json")])
    for gpus in (1, 2, 4, 8, *((64,) if count_parameters(config.model)[0] > 10e9 else ())):
        try:
            assert gradient_accumulation(config, gpus) >= 1
        except UserError as error:
            pytest.fail(f"{gpus} GPUs: {error}")
