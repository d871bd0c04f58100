import json
import math

from config import ModelConfig
from metrics import MetricsLog, console_line, count_parameters, duration, flops_per_token, peak_flops, read_metrics
from plot import plot_loss, smooth


def test_sizes_of_gpt2_are_the_published_ones():
    """124,439,808 parameters: transformers' count of GPT-2 small with its 50257 x 768 tied embedding."""
    gpt2 = ModelConfig()
    assert count_parameters(gpt2)[0] == 124_439_808
    assert count_parameters(ModelConfig(n_layer=48, n_head=25, n_embd=1600))[0] == 1_557_611_200
    assert flops_per_token(gpt2) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024


def test_an_unknown_device_has_no_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA GH200 480GB") == 989e12
    assert peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA A10") == 125e12
    for unknown in ("cpu", "NVIDIA L40", "NVIDIA A10G", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 3090 Ti", "Tesla T4"):
        assert peak_flops(unknown) is None


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
    text = console_line(LINE, 1000)
    for part in ("40/1000", "loss 2.3457", "lr 1.00e-03", "grad norm 0.50", "12,346 tokens/s", "1.00 GiB", "ETA 32:00"):
        assert part in text
    assert "mfu" not in text and "mfu 41.5%" in console_line(LINE | {"mfu": 0.415}, 1000)
    assert duration(3723.4) == "1:02:03"


def test_a_resumed_log_holds_each_step_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 11):
        log.write({"step": step, "loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # cut by a crash
    log = MetricsLog(tmp_path, 6)
    for step in range(7, 13):
        log.write({"step": step, "loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == [1.0] * 6 + [2.0] * 6
    assert MetricsLog(tmp_path, 0) and read_metrics(tmp_path) == []


def test_smoothing_is_unbiased_and_survives_nan():
    assert smooth([3.0, 3.0, 3.0], 0.9) == [3.0, 3.0, 3.0] or math.isclose(smooth([3.0] * 3, 0.9)[2], 3.0)
    values = smooth([1.0, math.nan, 1.0], 0.5)
    assert all(math.isclose(value, 1.0) for value in values)


def test_a_picture_is_drawn_from_any_number_of_points(tmp_path):
    for number in (0, 1, 3, 300):
        run = tmp_path / str(number)
        run.mkdir()
        log = MetricsLog(run, 0)
        for step in range(1, number + 1):
            log.write(LINE | {"step": step, "tokens": step * 100, "loss": math.nan if step == 2 else 5 / step})
            if step % 100 == 0:
                log.write({"step": step, "tokens": step * 100, "val_loss": 5 / step})
        plot_loss([run], run / "loss.png")
        assert (run / "loss.png").stat().st_size > 5000


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, ["tensorboard"])
    for step in range(1, 11):
        log.write(LINE | {"step": step, "loss": 1.0})
    log.close()
    log = MetricsLog(tmp_path, 6, ["tensorboard"])
    for step in range(7, 13):
        log.write(LINE | {"step": step, "loss": 2.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, 1.0 if step <= 6 else 2.0) for step in range(1, 13)
    ]
    assert "mfu" not in events.Tags()["scalars"], "null is no number"


def test_wandb_runs_offline_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resumed_at in (0, 6):
        log = MetricsLog(tmp_path, resumed_at, ["wandb"], {"train": {"lr": 1}})
        assert "wandb" in log.loggers
        log.write(LINE | {"step": resumed_at + 1})
        log.close()
    run_id = (tmp_path / "wandb_id").read_text()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) >= 1 and all(file.name == f"run-{run_id}.wandb" for file in files)


def test_a_logger_that_fails_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    import wandb

    def fail(**_):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(wandb, "init", fail)
    log = MetricsLog(tmp_path, 0, ["wandb"])
    log.write(LINE)
    log.close()
    assert read_metrics(tmp_path) == [LINE]
    assert capsys.readouterr().out == "wandb: ConnectionError: no route to host; the run goes on without it\n"
