"""benchmarks/gpu.py on a CPU, tiny: it measures, continues with what is missing, says what cannot be had; and what it
would measure on a GPU are settings that train.py takes."""

import dataclasses
import importlib
import itertools
import json
import re
import sys

import pytest
import torch

from benchmarks import gpu, gpu_parts, gpu_report, kernels, nanogpt, parity, parity_models
from benchmarks.switches import SWITCHES
from minzero import benchmark
from minzero.config.deepspeed import deepspeed_config
from minzero.config.sections import ModelConfig
from minzero.document_attention import Documents
from minzero.errors import UserError
from minzero.planner.gpus import USABLE
from minzero.planner.search import with_choice
from tests.helpers.processes import ROOT, run
from tests.slow.switch_checks import CHECKS

COMMAND = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny"]
H100 = gpu_parts.Bench(gpus=1, gpu_bytes=80 * 2**30, cpu_bytes=128 * 2**30)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What two calls leave, of which the second finds one measurement missing: the folder, and what the second said."""
    out = tmp_path_factory.mktemp("gpu") / "results"
    for flags in (["kernels", "--first", 1], ["kernels", "convergence", "--first", 1, "--again"]):
        ended = run([*COMMAND, "--out", out, "--parts", *flags], timeout=200, CUDA_VISIBLE_DEVICES="")
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return out, ended


@pytest.mark.slow
def test_results(measured):
    out, _ = measured
    results = json.loads((out / "results.json").read_text())
    assert list(results["rows"]) == ["kernels/layernorm_124M_apex", "convergence/stage3"]
    apex, trained = results["rows"].values()
    assert len(results["calls"]) == 2 and trained["call"] == 2
    assert "Apex" in apex["failed"] and trained["failed"] is None
    assert len(trained["losses"]) == 3 and all(0 < loss < 10 for loss in trained["losses"])
    assert trained["tokens_per_second"] > 0 and trained["predicted_bytes"] > 0


@pytest.mark.slow
def test_a_second_call_measures_what_is_missing(measured):
    _, ended = measured
    begun = re.findall(r"^(\w+): (.*) \.\.\.$", ended.stderr, re.MULTILINE)
    # --again: the one that failed, too
    assert [part for part, _ in begun] == ["kernels", "convergence"] and begun[0][1].endswith("apex")


@pytest.mark.slow
def test_report(measured):
    out, ended = measured
    report = (out / "report.md").read_text()
    assert report.strip() == ended.stdout.strip()
    for part in gpu_parts.PARTS:
        assert f"## {part}\n" in report
    assert "failed: NVIDIA Apex" in report and "Not measured yet: nanogpt, stage0, stage1, " in report
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"Call 2: .*torch \d.*deepspeed \d.*git ", report)


def test_rivals():
    """torch's other Adam goes where its fused one goes; a rival that goes elsewhere is seen."""
    tiny = gpu_parts.Bench(gpus=0, gpu_bytes=2**30, cpu_bytes=2**30, tiny=True)
    found = kernels.compare_adams(tiny.config("gpt2-124m", 1), "foreach")
    assert found["largest_difference"] < 1e-5
    assert found["times_as_fast"] == pytest.approx(found["torch_ms"] / found["rival_ms"])
    assert kernels.largest_difference([torch.tensor([1.0, 2.5])], [torch.tensor([1.0, 2.0])]) == pytest.approx(0.25)


def test_models_of_other_families():
    """Their own sizes, the largest micro-batch up to 16 that fits, compiled; none is compared with nanoGPT's 124M."""
    rows = {row.name: row.config for row in gpu_parts.families(H100)}
    stages = {name: config.deepspeed["zero_optimization"]["stage"] for name, config in rows.items()}
    assert stages == {"qwen3_0p6b": 3, "smollm2_135m": 3, "olmoe_0p4b": 3, "olmoe_0p4b_stage0": 0}
    for config in rows.values():
        assert config.model.block_size == 2048 and config.train.compile is True and config.train.kernels == "torch"
        assert config.train.micro_batch_size <= 16
    assert rows["qwen3_0p6b"].model.vocab_size == 151936 and rows["olmoe_0p4b"].model.n_expert == 32
    names = ["nanogpt_eager", *rows, "few_tokens_1p7b_stage1_eager"]
    results = {name: {"tokens_per_second": 1.0, "flops_per_token": 1.0} for name in names}
    found = gpu_report.with_ratios("speed", results, lambda result: None)
    assert ["of_nanogpt" in row for row in found] == [True] + 5 * [False]


def test_ratios():
    """Against nanoGPT's best, against the products of the same call, and against ZeRO-3's losses."""
    speeds = {"nanogpt_eager": 50.0, "nanogpt_compiled": 80.0, "stage0_eager": 100.0}
    results = {name: {"tokens_per_second": speed, "flops_per_token": 3.0} for name, speed in speeds.items()}
    found = list(gpu_report.with_ratios("speed", results, lambda result: 600.0))
    assert [row["of_nanogpt"] for row in found] == [0.625, 1.0, 1.25]
    assert [row["of_products"] for row in found] == [0.25, 0.4, 0.5]
    losses = {"stage3": {"losses": [4.0, 2.0]}, "nanogpt": {"losses": [4.0, 2.5]}}
    found = list(gpu_report.with_ratios("convergence", losses, None))
    assert [row["from_stage3"] for row in found] == [0.0, 0.25] and found[1]["last_loss"] == 2.5


@pytest.mark.slow
def test_compiled_norm():
    found = kernels.compare_norms(None, "layernorm", "compiled", 64, 32)
    assert found["largest_difference"] < 1e-5 and found["rival_ms"] > 0
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it was compiled indeed


LLAMA, MIXTRAL = next(iter(parity_models.DENSE)), next(iter(parity_models.EXPERTS))


def test_every_model_of_parity_is_one_that_model_py_computes():
    """Also tiny, where each keeps its options."""
    models = parity_models.DENSE | parity_models.EXPERTS | parity_models.DOCUMENTS
    for tiny in (False, True):
        for title, settings in parity_models.sized(models, tiny).items():
            assert set(settings) == {"options", "recompute", "documents"}
            assert models[title].keys() - {"recompute", "documents"} <= settings["options"].keys()
            ModelConfig(**settings["options"]).check()


@pytest.mark.parametrize("title", [LLAMA, MIXTRAL])
def test_parity_of_bf16_and_float32(title, monkeypatch):
    """Rounding is seen, and no more; what raises stays one model's, with what was measured before it."""

    def compile_(gpt):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr("model.GPT.compile", compile_)
    models = parity_models.sized({"wrong": {"n_kv_head": 3}} | parity_models.DENSE | parity_models.EXPERTS, tiny=True)
    *_, results = parity.parity(None, {name: models[name] for name in ("wrong", title)}, 2, 60)
    wrong, found = results["models"].values()
    assert "does not divide" in wrong["failed"] and "eager_loss" not in wrong
    assert found["failed"].endswith("RuntimeError: no compiler") and "compiled_loss" not in found
    assert found["eager_loss"] < 1e-3 and 1e-3 < found["eager_gradients"] < 0.02
    assert found["eager_repeated_otherwise"] == [] and found["eager_ms"] > 0
    assert found["eager_attention"] == "flash"
    assert ("loop_gradients" in found) == (title == MIXTRAL)
    rows = gpu_report.each_model({"row": results | {"title": "row", "failed": benchmark.OUT_OF_TIME}})
    assert [bool(row["failed"]) for row in rows] == [True, False, True]
    assert rows[1]["raised"] == found["failed"] and rows[1]["eager_again"] == "same bits"
    models = {"of an earlier call": {"call": 1}, "of this one": {}}
    rows = gpu_report.each_model({"row": {"models": models, "failed": None, "call": 2}})
    assert [row["call"] for row in rows] == [1, 2]


def test_parity_sees_attention_beyond_a_document(monkeypatch):
    (_, settings), *_ = parity_models.sized(parity_models.DOCUMENTS, tiny=True).items()

    def gradients():
        return dict(itertools.islice(parity.measured(settings, 2), 2))["eager"]["eager_gradients"]

    assert gradients() < 0.02
    one_by_one = Documents.one_by_one

    def in_pairs(documents, *arguments):
        return one_by_one(dataclasses.replace(documents, starts=documents.starts[::2]), *arguments)

    monkeypatch.setattr(Documents, "one_by_one", in_pairs)
    positions = torch.arange(16).repeat(2, 4)  # an even number of documents
    monkeypatch.setattr(parity, "positions_of_documents", lambda *_: positions)
    assert gradients() > 0.05


def test_experts_of_a_token_are_the_same_in_every_precision():
    """And one expert gets none, which the grouped product must bear."""
    settings = parity_models.sized({MIXTRAL: parity_models.EXPERTS[MIXTRAL]}, tiny=True)[MIXTRAL]
    config = ModelConfig(**settings["options"])
    tokens = torch.arange(128).view(2, 64)
    routings = []
    for dtype in (torch.float32, torch.bfloat16):
        gpt = parity.make_model(config, tokens.numel(), torch.device("cpu")).to(dtype)
        gpt(tokens, tokens)
        routings.append(gpt.take_routing()[:, 0])
    assert torch.equal(*routings) and not routings[0][:, 0].any() and (routings[0][:, 1:] > 0).all()


def test_parity_sees_a_wrong_gradient():
    expected = {"large": torch.tensor([3.0, 4.0]), "small": torch.tensor([0.0, 0.1])}
    assert parity.apart(expected, expected)[:2] == (0, 0)
    whole, worst, name = parity.apart(expected | {"small": torch.tensor([0.0, 0.2])}, expected)
    assert whole == pytest.approx(0.1 / 5, rel=1e-3) and worst == pytest.approx(1) and name == "small"
    with pytest.raises(ValueError, match="small is not finite"):
        parity.apart(expected | {"small": torch.tensor([0.0, torch.nan])}, expected)


def test_no_model_of_parity_is_begun_when_its_time_is_over():
    (result,) = parity.parity(None, parity_models.sized({LLAMA: {}}, tiny=True), 2, -1)
    assert "not begun" in result["models"][LLAMA]["failed"]


@pytest.mark.slow
def test_parity_of_compiled():
    models = parity_models.sized({name: parity_models.EXPERTS[name] for name in [MIXTRAL]}, tiny=True)
    *_, results = parity.parity(None, models, 2, 60)
    found = results["models"][MIXTRAL]
    assert "failed" not in found and found["graph_breaks"] == 0
    assert found["compiled_loss"] < 1e-3 and found["compiled_gradients"] < 0.02
    assert found["compiled_repeated_otherwise"] == []


def test_a_process_that_is_ended_leaves_what_it_had(tmp_path, monkeypatch):
    """The result of a generator is written after each value."""

    def counting(config, until):
        for number in range(until):
            yield {"number": number}
        raise RuntimeError("here")

    monkeypatch.setattr(kernels, "compare_norms", counting)
    call = {"function": "compare_norms", "arguments": {"until": 3}, "config": None}
    (tmp_path / "call.json").write_text(json.dumps(call))
    with pytest.raises(RuntimeError, match="here"):
        gpu.answer_call(tmp_path / "call.json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {"number": 2}


def test_what_is_cut_off_is_measured_by_a_later_call():
    left_out = {"failed": benchmark.OUT_OF_TIME, "seconds_given": 60}
    assert not gpu.is_wanted(left_out, 60, again=True) and gpu.is_wanted(left_out, 100, again=False)
    assert gpu.is_wanted(None, 1, again=False) and not gpu.is_wanted({"failed": None}, 1, again=True)
    assert gpu.is_wanted({"failed": "x"}, 1, again=True) and not gpu.is_wanted({"failed": "x"}, 1, again=False)


def test_a_process_is_ended_when_its_time_is_over(tmp_path):
    code = benchmark.run_until(lambda: False, [sys.executable, "-c", "while True: pass"], tmp_path / "log", seconds=0.5)
    assert code is None and benchmark.why_it_ended("", code) == benchmark.OUT_OF_TIME


def test_locks_of_ended_compilations_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "elsewhere")
    (tmp_path / "cpu_adam").mkdir()
    for name in ("lock", "cpu_adam.o"):
        (tmp_path / "cpu_adam" / name).write_text("")
    bench = dataclasses.replace(H100, extensions=tmp_path)
    impossible = gpu.measure_row(bench, gpu_parts.Row("name", "title", impossible="no"), 1, tmp_path / "run")
    assert impossible == {"title": "title", "failed": "no"}
    assert [path.name for path in tmp_path.rglob("*.*")] == ["cpu_adam.o"] and not list(tmp_path.rglob("lock"))


def test_processes_beside_each_other_keep_their_own_extensions(tmp_path, monkeypatch):
    """Or one would remove the lock of another that is compiling."""
    monkeypatch.setattr(benchmark, "this_device", lambda: ("a CPU", 0))

    def folder(*flags):
        bench, _ = gpu.this_machine(gpu.read_options(["--tiny", *map(str, flags)]))
        return bench.extensions

    one, other = tmp_path / "one", tmp_path / "other"
    alone = folder("--out", one)
    assert alone == folder("--out", other) == H100.extensions
    assert len({alone, folder("--out", one, "--beside"), folder("--out", other, "--beside")}) == 3
    assert folder("--out", one, "--beside") == folder("--out", tmp_path / "other" / ".." / "one", "--beside")


@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_every_row_on_an_h100_is_a_setting_that_train_takes(part, tmp_path):
    bench = gpu_parts.Bench(**vars(H100) | {"nanogpt": tmp_path / "model.py", "data": tmp_path})
    rows = list(gpu_parts.PARTS[part](bench))
    assert len({row.name for row in rows}) == len(rows) >= (2 if part == "parity" else 4)
    for row in rows:
        if row.impossible:
            assert "memory at the least" in row.impossible
        elif row.config:
            made = deepspeed_config(row.config, 1, "bf16", on_gpu=True)
            assert made["gradient_accumulation_steps"] >= 1
            assert bench.planned(row.config)["gpu_bytes"] < bench.gpu_bytes
        else:
            assert callable(getattr(importlib.import_module(gpu.FUNCTIONS[row.function]), row.function))
        assert row.switch in {None, *SWITCHES}


def test_the_deepest_fits_and_one_layer_more_does_not():
    config = with_choice(H100.config("10b", 1, model={"block_size": 128}), 3, "param", True, 1)
    deepest = H100.deepest(config)
    assert 1 < deepest.model.n_layer < config.model.n_layer
    assert H100.why_not(deepest) is None and "CPU memory" in H100.why_not(config)
    deepest.model.n_layer += 1
    assert H100.planned(deepest)["cpu_bytes_range"][1] > USABLE * H100.cpu_bytes


def test_weights_copied_into_nanogpts_names():
    """Into modules of its names, which is all of it that is here: every weight arrives, none is left as it was."""
    from minzero.config.sections import ModelConfig
    from model import GPT

    shape = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=16)
    ours, theirs = GPT(shape, seed=1), torch.nn.Module()

    def block():
        made = torch.nn.ModuleDict({"ln_1": torch.nn.LayerNorm(8), "ln_2": torch.nn.LayerNorm(8)})
        made["attn"] = torch.nn.ModuleDict({"c_attn": torch.nn.Linear(8, 24), "c_proj": torch.nn.Linear(8, 8)})
        made["mlp"] = torch.nn.ModuleDict({"c_fc": torch.nn.Linear(8, 32), "c_proj": torch.nn.Linear(32, 8)})
        return made

    parts = {"wte": torch.nn.Embedding(16, 8), "wpe": torch.nn.Embedding(4, 8), "ln_f": torch.nn.LayerNorm(8)}
    theirs.transformer = torch.nn.ModuleDict(parts | {"h": torch.nn.ModuleList(block() for _ in range(2))})
    theirs.lm_head = torch.nn.Linear(8, 16, bias=False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.fill_(torch.nan)
    nanogpt.copy_weights(ours, theirs)
    assert sum(p.sum() for p in theirs.parameters()).isfinite()
    assert torch.equal(theirs.transformer.h[1].attn.c_attn.weight, ours.blocks[1].attention.qkv.weight)


@pytest.mark.parametrize("names", [[*CHECKS][1:], pytest.param([*CHECKS][:1], marks=pytest.mark.slow)])
def test_switches_change_what_they_say(names):
    """In a process of their own, because a switch changes modules."""
    ended = run([sys.executable, "-m", "tests.slow.switch_checks", *names])
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
def test_a_switch_under_the_launcher_trains_the_same_model(tmp_path):
    """Ways to compute the same: the losses of the steps are those of train.py as it is."""
    bench, losses = gpu_parts.Bench(gpus=0, gpu_bytes=2**40, cpu_bytes=2**40, tiny=True, temporary=tmp_path), []
    for switch in (None, "whole_loss", "torch_attention", "whole_model"):
        config = bench.config("gpt2-124m", 2, 1, 2, compile=True if switch == "whole_model" else "auto")
        row = gpu_parts.Row("row", "title", config, switch=switch)
        result = gpu.measure_row(bench, row, 300, tmp_path / f"run_{switch}")
        assert result["failed"] is None and len(result["losses"]) == 2
        assert result["compiled"] == (switch == "whole_model")
        losses.append(result["losses"])
    assert losses[2] == losses[0]
    for other in (losses[1], losses[3]):
        assert other == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--parts", "sped"], "sped"),
        (["--minutes", "0"], "--minutes"),
        (["--first", "0"], "--first"),
        (["--nanogpt", "nowhere.py"], "nowhere.py"),
        (["--fast"], "--fast"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, word):
    with pytest.raises(UserError, match=word):
        gpu.main(["--out", str(tmp_path / "results"), *flags])
    assert not (tmp_path / "results").exists()


def test_results_of_another_machine_are_kept(tmp_path):
    before = json.dumps({"device": "a GPU", "tiny": False, "calls": [], "rows": {}})
    (tmp_path / "results.json").write_text(before)
    with pytest.raises(UserError, match="choose another --out"):
        gpu.earlier_results(tmp_path, "another", False)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="not what this command writes"):
        gpu.earlier_results(tmp_path, "a GPU", False)
