"""DeepSpeed's keys that are "auto", and the stage."""

import json

import pytest

from minzero.cards import card_named
from minzero.config.auto import AUTO
from minzero.config.build import build
from minzero.config.deepspeed import auto_values, deepspeed_config, zero_stage
from minzero.config.load import load_config
from minzero.deepspeed_keys import ACCEPTED
from minzero.errors import UserError
from minzero.files import ROOT
from minzero.planner.gpus import GiB, Hardware
from minzero.planner.stage import advice, with_chosen_stage

ZERO = "zero_optimization."
H100 = card_named("h100")


def values(name, world_size=64, precision="bf16", memory=80 * GiB, accumulation=4, **zero):
    config = load_config([f"configs/{name}.json"])
    config.deepspeed["zero_optimization"] |= zero
    return auto_values(config, world_size, precision, memory, accumulation)


def test_ds_config_leaves_all_to_it():
    content = json.loads((ROOT / "ds_config.json").read_text())
    written = {f"{section}.{name}" for section, keys in content.items() for name, value in keys.items()}
    assert written == set(AUTO) and set(AUTO) <= set(ACCEPTED)
    assert {value for keys in content.values() for value in keys.values()} == {"auto", 3}


def test_a_block_is_fetched_while_another_runs():
    found = values("llama-8b")
    block = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert found[f"{ZERO}stage3_prefetch_bucket_size"] == int(0.98 * (block - 2 * 4096)), "norms stay whole"
    assert found[f"{ZERO}stage3_max_live_parameters"] == 5 * block + 2 * 4096 * 128_256
    assert found[f"{ZERO}stage3_max_reuse_distance"] == 2 * block
    assert found[f"{ZERO}reduce_bucket_size"] == 50_000_000
    assert found[f"{ZERO}stage3_allgather_sequential"] is True and found[f"{ZERO}overlap_comm"] is True
    assert found[f"{ZERO}contiguous_gradients"] is False
    assert found["data_types.grad_accum_dtype"] == "fp32"


def test_less_is_held_where_memory_is_short():
    much, little = values("175b", memory=400 * GiB), values("175b")
    block = 12 * 12288**2 + 13 * 12288
    assert little[f"{ZERO}stage3_max_live_parameters"] == 2 * block
    assert little[f"{ZERO}stage3_max_reuse_distance"] == 0
    assert much[f"{ZERO}stage3_max_live_parameters"] > 5 * block
    assert values("175b", memory=None)[f"{ZERO}stage3_max_live_parameters"] == 2 * block


def test_weights_of_a_small_model_stay_whole():
    key = f"{ZERO}stage3_param_persistence_threshold"
    assert values("gpt2-124m")[key] == 50257 * 768
    assert values("gpt2-124m", memory=2 * GiB)[key] == 100_000
    assert values("gpt2-124m", offload_param={"device": "cpu"})[key] == 100_000
    assert values("175b")[key] == 10 * 12288, "biases and weights of norms"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3(stage):
    found = values("gpt2-124m", stage=stage)
    assert found[f"{ZERO}overlap_comm"] is False and found[f"{ZERO}contiguous_gradients"] is True
    assert found["data_types.grad_accum_dtype"] == ("fp32" if stage == 2 else None)


def test_gradients_are_added_up_in_fp32_where_several_in_16_bits_are():
    key = "data_types.grad_accum_dtype"
    assert values("gpt2-124m", accumulation=1)[key] is None
    assert values("gpt2-124m", precision="fp32")[key] is None
    assert values("gpt2-124m", precision="fp16")[key] == "fp32"


@pytest.mark.parametrize(("ranks", "copied"), [(8, False), (40, True), (48, False), (512, True), (1024, True)])
def test_gradients_are_copied_where_a_rank_has_no_part_of_a_parameter(ranks, copied):
    """768 elements on 40 ranks: parts of 20, and none for the last. Its gradient is freed while a sum may read it."""
    assert values("gpt2-124m", world_size=ranks)[f"{ZERO}contiguous_gradients"] is copied
    assert any((ranks - 1) * -(-size // ranks) >= size for size in (768, 2304, 3072)) is copied


def test_an_all_reduce_reads_the_buffer():
    assert values("gpt2-124m", reduce_scatter=False)[f"{ZERO}contiguous_gradients"] is True


def test_selective_recomputation_takes_torchs_linear_function():
    key = f"{ZERO}memory_efficient_linear"
    config = load_config(["configs/llama-8b.json"])
    found = [auto_values(config, 64, "bf16", 80 * GiB)[key]]
    config.train.activation_checkpointing = "selective"
    found.append(auto_values(config, 64, "bf16", 80 * GiB)[key])
    assert found == [True, False] and values("gpt2-124m")[key] is False, "kept whole"
    with pytest.raises(UserError, match=r"selective.* with deepspeed\.zero_optimization\.memory_efficient_linear true"):
        zero = {"zero_optimization": {"memory_efficient_linear": True}}
        build({"train": {"activation_checkpointing": "selective"}, "deepspeed": zero}, "x")


def test_what_is_written_counts():
    config = build({"deepspeed": {"zero_optimization": {"stage": 3, "overlap_comm": False}}}, "x")
    assert auto_values(config, 8, "bf16", None) == {}
    made = deepspeed_config(config, 8, "bf16", on_gpu=True)
    assert made["zero_optimization"] == {"stage": 3, "overlap_comm": False}


# -- the stage -----------------------------------------------------------------------------------


def chosen(name, gpus, memory, *flags, card=H100):
    config = load_config([f"configs/{name}.json", "--deepspeed.zero_optimization.stage", '"auto"', *flags])
    return with_chosen_stage(config, Hardware(gpus, -(-gpus // 8), memory * GiB, card)).deepspeed["zero_optimization"]


def test_the_fastest_stage_that_fits():
    assert chosen("gpt2-124m", 8, 80)["stage"] in (0, 1)
    assert chosen("175b", 256, 80)["stage"] == 3
    assert chosen("llama-8b", 8, 80)["stage"] == 1
    assert chosen("175b", 8, 80)["stage"] == 3, "nothing fits"
    assert chosen("gpt2-124m", 2, 12, card=None)["stage"] == 0, "no speed is known of this device"


def test_only_stages_that_go_with_the_other_keys():
    offload = ["--deepspeed.zero_optimization.offload_param.device", "cpu"]
    offload += ["--deepspeed.zero_optimization.offload_optimizer.device", "cpu"]
    assert chosen("gpt2-124m", 8, 80, *offload)["stage"] == 3
    assert chosen("gpt2-124m", 8, 80, "--train.precision", "fp16")["stage"] >= 1


def test_a_stage_that_nothing_goes_with_is_refused():
    with pytest.raises(UserError, match=r"offload_param\.nvme_path: found none"):
        chosen("1p5b", 8, 80, "--deepspeed.zero_optimization.offload_param.device", "nvme")


def test_advice():
    """Where the network is the bound: small micro-batches between nodes."""
    flags = [
        "--train.micro_batch_size",
        "1",
        "--deepspeed.zero_optimization.stage3_param_persistence_threshold",
        "1000",
    ]
    config = load_config(["configs/1p5b.json", *flags])
    nodes = Hardware(16, 2, 80 * GiB, H100)
    line = advice(config, nodes, "bf16")
    assert line.startswith("ZeRO-1 would fit too (") and line.endswith("auto takes the fastest stage that fits"), line
    assert "times less, with gradients added up in 16 bits;" in line
    times = float(line.split("send ")[1].split()[0])
    accumulation = config.train.global_batch_tokens // config.model.block_size // 16
    # two gatherings and a reduction of each micro-batch against two a step, but the last blocks are gathered once
    assert 0.93 * 3 * accumulation / 2 < times < 3 * accumulation / 2
    assert "16 bits" not in (advice(config, nodes, "fp32") or "")
    assert advice(config, Hardware(16, 2, 80 * GiB), "bf16") is None, "no speed is known"
    assert advice(config, Hardware(1, 1, 800 * GiB, H100), "bf16") is None, "there is nobody to send to"
    config.deepspeed["zero_optimization"]["stage"] = 1
    assert advice(config, nodes, "bf16") is None
    assert advice(load_config(["configs/175b.json"]), Hardware(256, 32, 80 * GiB, H100), "bf16") is None


def test_the_stage_goes_with_the_precision_of_the_device():
    """fp16, on a GPU without bf16: DeepSpeed scales no loss at stage 0."""
    config = load_config(["configs/gpt2-124m.json", "--deepspeed.zero_optimization.stage", '"auto"'])
    assert zero_stage(with_chosen_stage(config, Hardware(8, 1, 16 * GiB), "fp16").deepspeed) == 1
    assert config.train.precision == "auto", "a copy"
