"""The planner's speed: each part by its formula, published rows, and measured runs in place of assumptions."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from benchmarks import planner_speed
from minzero.cards import CPU, card_named
from minzero.config.load import load_config
from minzero.errors import UserError
from minzero.planner.gpus import Hardware
from minzero.planner.measured import calibrated, measured_code, seen_in_run
from minzero.planner.memory import replayed
from minzero.planner.plan import plan_run
from minzero.planner.settings import settings_of
from minzero.planner.speed import Assumptions, Code, collective_seconds, communicated_bytes, step_time

H100 = card_named("h100")
SMALL = ["configs/gpt2-124m.json", "--model.n_layer", "4"]
FACTS = "published_speed.json"
# Rows that the plan misses by more than half of the truth, each with its reason.
NAMED = {
    "z3 ckFalse off-none mbs2": "its own figures are unclear: samples/s of an unknown length, 38% MFU at most",
    "z3 ckTrue off-none mbs2": "the same",
    "z3 ckTrue off-optimizer mbs2": "0.4 billion parameters/s in the CPU's Adam, a third of what others reach",
    "z3 ckTrue off-param mbs4": "the same",
    "DSE bf16_master_weight 6.86B 4xH100 T512 mbs1 ck 0.6016s": "a model of many modules, each with hooks of its own",
}


def step_of(words, hardware, code=None, assumptions=None, card=None):
    """The StepTime of a configuration, and its settings and engine."""
    config = load_config(words)
    settings = settings_of(config, hardware.gpus, hardware.memory_bytes, card or hardware.card)
    engine = replayed(settings)
    return step_time(settings, engine, hardware, assumptions or Assumptions(), code), settings, engine


def on_h100(gpus=8, nodes=1):
    return Hardware(gpus, nodes, H100.memory, H100)


# ---- against measurements of others


def test_published_rows():
    """Half of them within 12%, nine tenths within 35%, and none off by a factor of 2."""
    folder = os.environ.get("MINZERO_SHARED")
    if not folder or not (Path(folder) / FACTS).exists():
        pytest.skip("needs MINZERO_SHARED, a folder with published measurements")
    rows = list(planner_speed.published(Path(folder) / FACTS))
    constants = planner_speed.as_they_are()
    errors = {row.name: planner_speed.error(row, constants) for row in rows}
    sizes = sorted(map(abs, errors.values()))
    assert len(rows) >= 140
    assert sizes[len(sizes) // 2] <= 0.12 and sizes[int(0.9 * len(sizes))] <= 0.35
    assert all(0.5 < 1 + error < 2 for error in errors.values())
    assert {name for name, error in errors.items() if abs(error) > 0.5} <= set(NAMED)


def test_rows_of_this_code():
    """Where the defaults stand against this code's own runs on an H100."""
    errors = [planner_speed.error(row, planner_speed.as_they_are()) for row in planner_speed.measured_here()]
    assert len(errors) > 30
    assert sorted(map(abs, errors))[len(errors) // 2] <= 0.15


# ---- the parts


def test_a_collective_crosses_the_network_over_all_cards_of_a_node():
    _, settings, _ = step_of(SMALL, on_h100())
    code = Code(nccl=1, latency=0)
    rates = Assumptions(link=400e9, network=50e9)
    size = 10**9 * settings.bytes
    one_node = collective_seconds(10**9, 1, dataclasses.replace(settings, world_size=8), on_h100(8), rates, code)
    assert one_node == pytest.approx(size * 7 / 8 / 400e9)
    slow = dataclasses.replace(rates, network=1e9)
    two_nodes = collective_seconds(10**9, 1, dataclasses.replace(settings, world_size=16), on_h100(16, 2), slow, code)
    assert two_nodes == pytest.approx(size / 2 / (8 * 1e9))
    alone = collective_seconds(10**9, 1, dataclasses.replace(settings, world_size=1), on_h100(1), rates, code)
    assert alone == 0


def test_13b_on_64_gpus_is_not_bound_by_the_network():
    """Measured: 4,800 tokens/s a GPU with micro-batches of 2 sequences of 2,048 (llm-foundry's table)."""
    words = ["configs/13b.json", "--train.micro_batch_size", "2", "--train.activation_checkpointing", "false"]
    step, settings, _ = step_of(words, on_h100(64, 8))
    assert step.bound_by == "compute"
    rate = settings.gradient_accumulation_steps * settings.tokens / step.seconds
    assert rate == pytest.approx(4800, rel=0.3)


def test_a_second_copy_of_the_weights_within_the_nodes():
    """It takes its memory, and only the first forward pass of a step still crosses a slow network."""
    words = ["configs/13b.json", "--deepspeed.zero_optimization.stage3_max_reuse_distance", "0"]
    key, slow = "--deepspeed.zero_optimization.zero_hpz_partition_size", Assumptions(network=1e8)
    found = [step_of([*words, key, size], on_h100(64, 8), assumptions=slow) for size in ("1", "8")]
    (plain, settings, first), (less, _, second) = found
    assert settings.gradient_accumulation_steps == 1
    assert second.memory.held["parameters"] - first.memory.held["parameters"] == pytest.approx(2 * first.size / 8)
    # a forward and a backward pass and the gradients, in place of which a backward pass stays within the nodes
    assert less.communication / plain.communication == pytest.approx(2 / 3, rel=0.03)


def test_the_step_is_the_sum_of_what_is_not_hidden():
    step, _, _ = step_of(SMALL, on_h100())
    shown = step.products + step.attention + step.traffic + step.optimizer + step.waiting + step.offload
    assert step.seconds == pytest.approx(shown + step.communication - step.hidden)
    assert 0 < step.hidden < step.communication


def test_nothing_is_hidden_where_overlap_comm_is_off():
    step, _, _ = step_of([*SMALL, "--deepspeed.zero_optimization.overlap_comm", "false"], on_h100())
    assert step.hidden == 0


@pytest.mark.parametrize("stage", range(4))
def test_bytes_sent(stage):
    """Per micro-batch, of the model's bytes: stages 0 and 1 send two a step, stage 2 one and one a step, stage 3 one,
    and what it gathers."""
    words = [*SMALL, "--deepspeed.zero_optimization.stage", str(stage), "--train.micro_batch_size", "4"]
    words += ["--deepspeed.zero_optimization.stage3_param_persistence_threshold", "1000"]
    words += ["--deepspeed.zero_optimization.stage3_max_reuse_distance", "0"]
    _, settings, engine = step_of(words, on_h100())
    sent = communicated_bytes(settings, engine) / (engine.size * settings.bytes * 7 / 8)
    accumulation = settings.gradient_accumulation_steps
    assert accumulation == 16
    if stage == 3:
        assert 2.5 * accumulation < sent < 3 * accumulation + 1, "the embedding is used at both ends"
    else:
        assert sent == pytest.approx({0: 2, 1: 2, 2: accumulation + 1}[stage])


def test_few_tokens_wait_for_the_host():
    few = ["--model.block_size", "128", "--train.micro_batch_size", "1", "--train.global_batch_tokens", "1024"]
    step, _, _ = step_of([*SMALL, *few], on_h100())
    assert step.bound_by == "host" and step.waiting > 5 * step.forward_backward
    eager, _, _ = step_of([*SMALL, *few, "--train.compile", "false"], on_h100())
    assert eager.host > step.host
    whole, _, _ = step_of([*SMALL, *few, "--deepspeed.zero_optimization.stage", "0"], on_h100())
    assert whole.host < step.host, "no hooks around the blocks"


def test_adam_on_the_cpu():
    """About a billion parameters a second and node: 33 GB/s of its memory, 30 bytes a parameter."""
    words = ["configs/1p7b.json", "--deepspeed.zero_optimization.offload_optimizer.device", "cpu"]
    step, _, engine = step_of(words, on_h100())
    assert step.offload > engine.size * 30 / 33e9
    assert step.optimizer == 0
    twice, _, _ = step_of(words, on_h100(), assumptions=Assumptions(cpu=66e9))
    assert twice.offload < step.offload


@pytest.mark.parametrize("stage, width, copied", [(2, "bf16", 4), (2, "fp32", 0), (3, "bf16", 4), (3, "fp32", 8)])
def test_sums_of_offloaded_gradients_are_copied_in_each_micro_batch(stage, width, copied):
    """There and back over PCIe, but at stage 2 with sums in float32, which stay on the GPU."""
    words = ["configs/1p7b.json", "--deepspeed.zero_optimization.offload_optimizer.device", "cpu"]
    words += ["--deepspeed.zero_optimization.stage", str(stage), "--train.precision", "bf16"]
    words += ["--deepspeed.data_types.grad_accum_dtype", width]
    words += ["--train.global_batch_tokens", "524288", "--train.micro_batch_size"]
    few, settings, engine = step_of([*words, "16"], on_h100())
    many, more, _ = step_of([*words, "1"], on_h100())
    passes = more.gradient_accumulation_steps - settings.gradient_accumulation_steps
    assert passes >= 14
    copies = passes * copied * engine.size / 8 / H100.pcie
    assert many.offload - few.offload == pytest.approx(copies, rel=0.05, abs=1e-9)


def test_a_mask_skips_nothing():
    """The code computes all products under a sliding window's mask, and a half of them without one."""
    whole, _, _ = step_of(SMALL, on_h100())
    short, _, _ = step_of([*SMALL, "--model.sliding_window", "64"], on_h100())
    assert short.attention == pytest.approx(2 * whole.attention)


def test_utilisation_takes_the_place_of_the_roofline():
    step, _, _ = step_of(SMALL, on_h100(), assumptions=Assumptions(utilisation=0.5))
    assert step.attention == step.traffic == 0
    slower, _, _ = step_of(SMALL, on_h100(), assumptions=Assumptions(utilisation=0.25))
    assert slower.products == pytest.approx(2 * step.products)


def test_evaluation_and_saves_take_time():
    """Days are those of the steps, the evaluations and the saves that the config asks for."""
    hardware = on_h100()
    plain = load_config([*SMALL, "--train.eval_every", "0", "--train.save_every", "0"])
    often = load_config([*SMALL, "--train.eval_every", "10", "--train.save_every", "10"])
    background = load_config([*SMALL, "--train.eval_every", "0", "--train.save_in_background", "true"])
    plans = [plan_run(config, hardware) for config in (plain, often, background)]
    steps = plain.train.max_tokens / plans[0]["tokens_per_second"] / 86400
    assert plans[0]["days"] == pytest.approx(steps, rel=0.01)
    assert plans[1]["days"] == pytest.approx(steps + plans[1]["evaluation_days"] + plans[1]["saving_days"])
    assert plans[1]["evaluation_days"] > 50 * plans[0]["evaluation_days"]
    assert plans[1]["saving_days"] > 50 * plans[0]["saving_days"]
    assert plans[2]["saving_days"] == 0


def test_only_stage_3_gathers_in_evaluation():
    words = [*SMALL, "--train.eval_every", "10", "--deepspeed.zero_optimization.stage"]
    for stage, is_slower in (("1", False), ("3", True)):
        config, found = load_config([*words, stage]), []
        for link in (1e9, 1e11):
            plan = plan_run(config, on_h100(), Assumptions(link=link))
            found.append(plan["evaluation_days"])
        assert (found[0] > 1.01 * found[1]) == is_slower


# ---- measured runs


def write_run(folder, words, seconds, gpus=1, device="NVIDIA H100 80GB HBM3", optimizer=None, lines=12):
    """A run's folder as train.py leaves it, whose first steps took three times as long."""
    config = load_config(words).to_dict()
    folder.mkdir()
    made = config | {"versions": {"device": device}, "world_size": gpus, "stage": 3, "precision": "bf16"}
    made |= {"compiled": True, "deepspeed_auto": {}}
    zero = made["deepspeed"]["zero_optimization"]
    made["deepspeed"]["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    made["deepspeed"].pop("data_types", None)
    (folder / "config.json").write_text(json.dumps(made))
    with open(folder / "metrics.jsonl", "w") as file:
        for number in range(lines):
            slow = 3 if number < 3 else 1
            line = {"step": number + 1, "tokens": 1, "step_seconds": slow * seconds}
            if optimizer:
                line["optimizer_seconds"] = slow * optimizer
            file.write(json.dumps(line) + "\n")
    return folder


def changed_run(folder, **values):
    """A run whose config.json has other values."""
    path = write_run(folder, SMALL, 1.0) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("words", [SMALL, [*SMALL, "--model.block_size", "128", "--train.micro_batch_size", "1"]])
def test_a_measured_run_is_met(tmp_path, words):
    """Bound by compute and by the host: with what was seen, the plan of the same settings takes as long."""
    run = write_run(tmp_path / "run", words, 1.0)
    code, card = measured_code(run)
    assert card is H100 and code.source == str(run)
    (seen,) = seen_in_run(run)
    assert step_time(seen.settings, replayed(seen.settings), seen.hardware, Assumptions(), code).seconds == (
        pytest.approx(1.0, rel=0.1)
    )


def test_what_was_measured_holds_for_other_settings(tmp_path):
    """A code that is 1.5 times as slow is found by one run, and predicts twice the depth."""
    truth = Code(pace=1.5)
    step, _, _ = step_of(SMALL, on_h100(1), truth)
    run = write_run(tmp_path / "run", SMALL, step.seconds)
    code, _ = measured_code(run)
    deeper = ["configs/gpt2-124m.json", "--model.n_layer", "8"]
    expected, _, _ = step_of(deeper, on_h100(1), truth)
    found, _, _ = step_of(deeper, on_h100(1), code)
    assert found.seconds == pytest.approx(expected.seconds, rel=0.06)


def test_several_measured_rows_tell_the_parts_apart(tmp_path):
    truth = dataclasses.replace(Code(), pace=0.8, host_compiled=6e-3, host_zero3=8e-3, optimizer_bytes=400)
    few = ["--model.block_size", "128", "--train.micro_batch_size", "1", "--train.global_batch_tokens", "256"]
    measured = []
    wide = [*SMALL, "--train.micro_batch_size", "64"]
    for place, words in enumerate((wide, ["configs/1p7b.json", *few])):
        step, _, _ = step_of(words, on_h100(1), truth)
        measured += seen_in_run(write_run(tmp_path / str(place), words, step.seconds, optimizer=step.optimizer))
    code = calibrated(measured, Assumptions())
    assert code.pace == pytest.approx(0.8, rel=0.05)
    assert code.optimizer_bytes == pytest.approx(400, rel=0.25)
    assert code.host_zero3 / Code().host_zero3 > 2
    assert code.host_zero3 / code.host_compiled == pytest.approx(Code().host_zero3 / Code().host_compiled)


def test_a_run_on_a_cpu(tmp_path):
    run = write_run(tmp_path / "run", ["configs/tiny.json"], 0.1, gpus=2, device="cpu")
    code, card = measured_code(run)
    assert card is CPU
    plan = plan_run(load_config(["configs/tiny.json"]), Hardware(2, 1, CPU.memory / 2, CPU), code=code)
    assert plan["step_seconds"] == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "expected the folder of a run"),
        (lambda path: path.mkdir(), "config.json"),
        (lambda path: path.write_text("[]"), "JSON of benchmark.py"),
        (lambda path: path.write_text('{"rows": [{"step_seconds": 1}]}'), "no row with a measured step"),
        (lambda path: write_run(path, SMALL, 1.0, lines=0), "let the run log some steps"),
        (lambda path: write_run(path, SMALL, 1.0, device="Voodoo 2"), "Voodoo 2"),
        (lambda path: (write_run(path, SMALL, 1.0) / "config.json").write_text("{}"), "not the config.json of a run"),
        (lambda path: path.write_text('{"rows": 3}'), "JSON of benchmark.py"),
        (lambda path: path.write_text('{"rows": [3]}'), "JSON of benchmark.py"),
        (lambda path: path.write_text('{"rows": [{"config": 1, "step_seconds": 1}]}'), "JSON of benchmark.py"),
        (lambda path: write_run(path, SMALL, -1.0), "found a step of -1.0 seconds"),
        (lambda path: write_run(path, SMALL, 1.0, gpus=0), "world_size 0"),
        (lambda path: write_run(path, SMALL, 1.0, device=None), "versions.device None"),
        (lambda path: changed_run(path, stage="auto"), "stage 'auto'"),
        (lambda path: changed_run(path, precision="auto"), "precision 'auto'"),
        (lambda path: changed_run(path, train={"forgotten": 1}), "unknown key train.forgotten"),
    ],
)
def test_what_is_no_measurement_is_one_line(tmp_path, make, words):
    path = tmp_path / "run"
    make(path)
    with pytest.raises(UserError, match="--measured") as raised:
        measured_code(path)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_no_part_is_negative_or_endless():
    for words in (["configs/tiny.json"], ["configs/olmoe-0.4b.json"], ["configs/175b.json"]):
        step, _, _ = step_of(words, on_h100(64, 8))
        assert all(0 <= part < math.inf for part in dataclasses.asdict(step).values())
