import time

import pytest
import torch

from minzero import metrics
from minzero.cards import peak_flops
from minzero.config.build import build
from minzero.config.sections import ModelConfig
from minzero.metrics import Stopwatch, console_line, duration, read_metrics
from minzero.sizes import count_parameters, flops_per_token


def test_sizes_of_gpt2_are_the_published_ones():
    """124,439,808 parameters: transformers' count of GPT-2 small with its 50257 x 768 tied embedding."""
    gpt2 = ModelConfig()
    assert count_parameters(gpt2)[0] == 124_439_808
    assert count_parameters(ModelConfig(n_layer=48, n_head=25, n_embd=1600))[0] == 1_557_611_200
    assert flops_per_token(gpt2) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024


def test_an_unknown_device_has_no_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == peak_flops("NVIDIA H800 PCIe") == 756e12
    assert peak_flops("NVIDIA H800") == peak_flops("NVIDIA H800 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA GH200 480GB") == 989e12
    assert peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA A10") == 125e12
    assert peak_flops("NVIDIA A10G") == 70e12, "not that of the A10"
    for unknown in ("cpu", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 3090 Ti", "Tesla T4"):
        assert peak_flops(unknown) is None
    for part in ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_flops(part) is None, "a slice of a GPU has a part of its cores"


LINE = {
    "step": 40,
    "tokens": 4000,
    "loss": 2.34567,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "step_seconds": 2.0,
    "mfu": None,
    "peak_memory_bytes": 2**30,
}


def test_the_console_line_can_be_read():
    text = console_line(LINE, 1000, 960 * 24691.2)
    for part in ("40/1000", "loss 2.3457", "lr 1.00e-03", "grad norm 0.50", "12,346 tokens/s", "1.00 GiB", "ETA 32:00"):
        assert part in text
    assert "mfu" not in text and "mfu 41.5%" in console_line(LINE | {"mfu": 0.415}, 1000, 1)
    assert duration(3723.4) == "1:02:03"


def test_a_damaged_line_is_passed_over(tmp_path):
    lines = ["null", '{"step": 1, "loss": "x", "lr": 2, "note": "kept"}', '{"step": 2, "loss": NaN}', '{"step": 3']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "loss": 1.5}\u2028{']))
    assert [line["step"] for line in read_metrics(tmp_path)] == [2]
    line = {"step": 1, "loss": None, "lr": 2, "samples": [1], "x": float("nan")}
    assert metrics.finite_numbers(line) == {"lr": 2}


def test_the_stopwatch_gives_each_part_its_time_and_pauses_to_none(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        for seconds, what in ((100, clock.start_step), (1, "data"), (4, "forward_backward"), (0, "optimizer")):
            now[0] += seconds
            what() if callable(what) else clock.mark(what)
        for seconds, what in ((2, "data"), (6, "forward_backward"), (3, "optimizer")):
            now[0] += seconds
            clock.mark(what)
        now[0] += 0.5  # belongs to the step, and to none of its parts
        clock.pause()
    seconds = clock.read()
    assert seconds["step_seconds"] == 16.5
    assert (seconds["data_seconds"], seconds["forward_backward_seconds"], seconds["optimizer_seconds"]) == (3, 10, 3)
    clock.start_step()
    now[0] += 7
    clock.mark("data")
    assert clock.read() == {"step_seconds": 7} | {f"{part}_seconds": 7 * (part == "data") for part in clock.parts}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_stopwatch_never_waits_for_a_gpu_in_a_step():
    """The host queues seconds of matrix products and continues; their time is known when the stopwatch is read."""
    device = torch.device("cuda")
    matrix, clock = torch.randn(8192, 8192, device=device), Stopwatch(device)
    (matrix @ matrix).sum().item()
    began = time.perf_counter()
    for _ in range(3):
        clock.start_step()
        clock.mark("data")
        for _ in range(20):
            matrix @ matrix
        clock.mark("forward_backward")
        clock.mark("optimizer")
    queued = time.perf_counter() - began
    seconds = clock.read()
    assert 3 * seconds["forward_backward_seconds"] > 5 * queued
    assert seconds["forward_backward_seconds"] == pytest.approx(seconds["step_seconds"], rel=0.1)


def test_utilisation_is_of_one_device_and_only_where_its_peak_is_known():
    config = build({"train": {"activation_checkpointing": True}}, "x")
    line = metrics.throughput(config, 300000.0, 8, "NVIDIA H100 80GB HBM3")
    assert line["tokens_per_second"] == 300000
    per_device = flops_per_token(config.model) * line["tokens_per_second"] / 8
    assert line["tflops"] == pytest.approx(per_device / 1e12) and line["mfu"] == pytest.approx(per_device / 989e12)
    assert 1.2 < line["hfu"] / line["mfu"] < 1 + 1 / 3, "every block's forward pass again, but not the output layer's"
    line = metrics.throughput(config, 300000.0, 8, "AMD EPYC")
    assert line["tflops"] == pytest.approx(per_device / 1e12) and line["mfu"] is line["hfu"] is None


def test_a_formula_that_is_not_the_models_gives_no_utilisation():
    config = build({}, "x")
    parameters, _ = count_parameters(config.model)
    arguments = config, 300000.0, 8, "NVIDIA H100 80GB HBM3"
    assert metrics.throughput(*arguments, parameters) == metrics.throughput(*arguments)
    line = metrics.throughput(*arguments, parameters + 768)
    assert line == {"tokens_per_second": 300000.0, "tflops": None, "mfu": None, "hfu": None}
    assert metrics.formula_fault(config.model, parameters) is None
    fault = f"sizes.py counts {parameters:,} parameters, but the model has {parameters + 768:,}"
    assert metrics.formula_fault(config.model, parameters + 768) == fault
