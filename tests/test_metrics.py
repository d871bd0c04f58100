import gzip
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from minzero import loggers, metrics
from minzero.config import ModelConfig, build
from minzero.loggers import MetricsLog
from minzero.metrics import Stopwatch, console_line, duration, read_metrics
from minzero.profiler import Profiler
from minzero.sizes import count_parameters, flops_per_token, peak_flops


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


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing"])
def test_metrics_that_are_no_file_are_started_again(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    if kind == "folder":
        (path / "file").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    assert read_metrics(tmp_path) == []
    log = MetricsLog(tmp_path, 6)
    log.write({"step": 7, "loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 7, "loss": 2.0}]


def test_a_damaged_line_is_passed_over(tmp_path):
    lines = ["null", '{"step": 1, "loss": "x", "lr": 2, "note": "kept"}', '{"step": 2, "loss": NaN}', '{"step": 3']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "loss": 1.5}\u2028{']))
    assert [line["step"] for line in read_metrics(tmp_path)] == [2]
    line = {"step": 1, "loss": None, "lr": 2, "samples": [1], "x": float("nan")}
    assert metrics.finite_numbers(line) == {"lr": 2}


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


def test_tensorboard_has_what_a_run_wrote_before_it_was_killed(tmp_path):
    """Nothing is closed here, as by kill -9: what a checkpoint covers must not wait in a buffer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, ["tensorboard"])
    for step in (1, 2, 3):
        log.write(LINE | {"step": step})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(1, step + 1))
    log.close()


def wandb_rows(run):
    """The history rows in all offline files of a run, as W&B writes them: protobuf records in LevelDB's log format
    (https://github.com/google/leveldb/blob/main/doc/log_format.md), after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    forget_wandb_settings()  # as the end of a process does, this waits until the files are written
    rows = []
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        content, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:  # the rest of a block, too short for a header
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            parts += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = Record.FromString(parts)
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    rows.append({"/".join([i.key, *i.nested_key]).strip("/"): json.loads(i.value_json) for i in items})
                parts = b""
    return rows


def offline_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    forget_wandb_settings()


def forget_wandb_settings():
    """W&B reads the environment once in a process; a run is a process, a test is not."""
    import wandb

    wandb.teardown()


def test_wandb_offline_holds_each_step_of_an_interrupted_run_once(tmp_path, monkeypatch):
    """Interrupted at step 10, resumed at 6: the second folder of the same id holds everything and is the only one."""
    offline_wandb(monkeypatch)
    for resumed_at, last, loss in ((0, 10, 1.0), (6, 12, 2.0)):
        time.sleep(1.1 if resumed_at else 0)  # a folder's name says the second in which it began
        log = MetricsLog(tmp_path, resumed_at, ["wandb"], {"train": {"lr": 1}})
        for step in range(resumed_at + 1, last + 1):
            log.write(LINE | {"step": step, "loss": loss})
            if step % 3 == 0:
                log.write({"step": step, "tokens": step * 100, "val_loss": loss})
        log.write({"step": last - 2, "tokens": 0, "save_seconds": 1.0})  # of a save in the background
        run_id = (tmp_path / "wandb_id").read_text()
        assert [folder.name[-8:] for folder in (tmp_path / "wandb").glob("offline-run-*")] == [run_id]
        log.close()
    rows = wandb_rows(tmp_path)
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, 1.0 if step <= 6 else 2.0) for step in range(1, 13)]
    assert [row["_step"] for row in rows if "val_loss" in row] == [3, 6, 9, 12]
    assert "mfu" not in rows[0] and rows[0]["peak_memory_bytes"] == 2**30


def test_a_run_that_starts_again_leaves_no_wandb_files_of_the_abandoned_one(tmp_path, monkeypatch):
    offline_wandb(monkeypatch)
    ids = set()
    for wait in (0, 1.1):
        time.sleep(wait)
        log = MetricsLog(tmp_path, 0, ["wandb"])
        log.write(LINE | {"step": 1})
        log.close()
        ids.add((tmp_path / "wandb_id").read_text())
    assert len(ids) == 2 and [row["_step"] for row in wandb_rows(tmp_path)] == [1]


def test_wandb_without_a_key_is_left_out_and_never_asks(tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where W&B looks for a key
    forget_wandb_settings()
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1))
    log = MetricsLog(tmp_path, 0, ["wandb"])
    log.write(LINE)
    assert not log.loggers and not asked
    assert (
        "no API key; call `wandb login` first, or set WANDB_MODE=offline; the run continues" in capsys.readouterr().out
    )


class HalfAServer(BaseHTTPRequestHandler):
    """As much of W&B's server as its client needs to begin a run, or to resume one that has `history`."""

    history = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("file_stream"):
            rows = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history.extend(json.loads(row)["_step"] for row in rows)
        entity = {"id": "1", "name": "me"}
        bucket = {"id": "1", "name": "run", "displayName": "run", "config": "{}", "eventsLineCount": 0}
        bucket |= {"project": {"id": "1", "name": "minzero", "entity": entity}, "historyLineCount": len(self.history)}
        bucket |= {"logLineCount": 0, "eventsTail": "[]", "summaryMetrics": "{}", "wandbConfig": '{"t": 1}'}
        bucket["historyTail"] = json.dumps([json.dumps({"_step": step}) for step in self.history[-1:]])
        model = {"id": "1", "name": "minzero", "entity": entity, "bucket": bucket} if self.history else None
        data = {"upsertBucket": {"bucket": bucket, "inserted": not self.history}, "model": model, "project": None}
        data |= {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        data["createRunFiles"] = {"runID": "1", "uploadHeaders": [], "files": []}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Half a W&B server on this machine, which W&B's client is told to use."""
    started = ThreadingHTTPServer(("127.0.0.1", 0), HalfAServer)
    threading.Thread(target=started.serve_forever, daemon=True).start()
    monkeypatch.setattr(HalfAServer, "history", [])
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{started.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    forget_wandb_settings()
    yield started
    started.shutdown()
    started.server_close()


def test_wandb_online_gets_each_step_of_an_interrupted_run_once(server, tmp_path):
    """Interrupted at step 10 and resumed at 6, where the server has more than the checkpoint, or less."""
    for server_has in (10, 4):
        run = tmp_path / str(server_has)
        run.mkdir()
        HalfAServer.history.clear()
        for resumed_at, last in ((0, 10), (6, 12)):
            log = MetricsLog(run, resumed_at, ["wandb"])
            for step in range(resumed_at + 1, last + 1):
                log.write(LINE | {"step": step})
            assert "wandb" in log.loggers
            log.close()
            forget_wandb_settings()
            if not resumed_at:
                del HalfAServer.history[server_has:]
        assert HalfAServer.history == list(range(1, 13))


@pytest.mark.parametrize("dies", [pytest.param("before the run", marks=pytest.mark.slow), "during the run"])
def test_a_network_that_fails_neither_stops_nor_holds_up_a_run(dies, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "WANDB_TIMEOUTS", {"init_timeout": 3, "finish_timeout": 1})

    def die():
        server.shutdown()
        server.server_close()

    if dies == "before the run":
        die()
    log = MetricsLog(tmp_path, 0, ["wandb"])
    assert ("wandb" in log.loggers) == (dies == "during the run")
    if dies == "during the run":
        die()
    lines = [LINE | {"step": step} for step in range(1, 1001)]
    for line in lines:
        log.write(line)
    log.close()
    assert read_metrics(tmp_path) == lines
    said = capsys.readouterr().out
    assert ("wandb: CommError: " in said and "the run continues without it" in said) == (dies == "before the run")


def test_a_logger_that_fails_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    import wandb

    offline_wandb(monkeypatch)

    for message, said in (("no route to host\nand more", ": no route to host"), ("", "")):

        def fail(message=message, **_):
            raise ConnectionError(message)

        monkeypatch.setattr(wandb, "init", fail)
        log = MetricsLog(tmp_path, 0, ["wandb"])
        log.write(LINE)
        log.close()
        assert read_metrics(tmp_path) == [LINE]
        assert capsys.readouterr().out == f"wandb: ConnectionError{said}; the run continues without it\n"


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
    line = metrics.throughput(config, 2.0, 8, "NVIDIA H100 80GB HBM3")
    assert line["tokens_per_second"] == config.train.global_batch_tokens / 2
    per_device = flops_per_token(config.model) * line["tokens_per_second"] / 8
    assert line["tflops"] == pytest.approx(per_device / 1e12) and line["mfu"] == pytest.approx(per_device / 989e12)
    assert 1.2 < line["hfu"] / line["mfu"] < 1 + 1 / 3, "every block's forward pass again, but not the output layer's"
    line = metrics.throughput(config, 2.0, 8, "AMD EPYC")
    assert line["tflops"] == pytest.approx(per_device / 1e12) and line["mfu"] is line["hfu"] is None


def test_a_formula_that_is_not_the_models_gives_no_utilisation():
    config = build({}, "x")
    parameters, _ = count_parameters(config.model)
    arguments = config, 2.0, 8, "NVIDIA H100 80GB HBM3"
    assert metrics.throughput(*arguments, parameters) == metrics.throughput(*arguments)
    line = metrics.throughput(*arguments, parameters + 768)
    assert line == {"tokens_per_second": config.train.global_batch_tokens / 2, "tflops": None, "mfu": None, "hfu": None}
    assert metrics.formula_fault(config.model, parameters) is None
    fault = f"sizes.py counts {parameters:,} parameters, but the model has {parameters + 768:,}"
    assert metrics.formula_fault(config.model, parameters + 768) == fault


@pytest.mark.parametrize(
    ("resumed_at", "ended_at", "expected"),
    [(0, 9, "steps_3_to_5"), (3, 9, "steps_4_to_5"), (0, 4, "steps_3_to_4"), (5, 9, None), (0, 2, None)],
)
def test_a_profile_holds_those_of_its_steps_that_were_run(resumed_at, ended_at, expected, tmp_path):
    profiler, said, matrix = Profiler(tmp_path, (3, 5)), [], torch.ones(8, 8)
    for step in range(resumed_at + 1, ended_at + 1):
        profiler.start_step(step)
        matrix @ matrix
        said.append(profiler.end_step(step, ending=step == ended_at))
    said = [text for text in said if text]
    if expected is None:
        assert not said and not (tmp_path / "profile").exists()
        return
    first, last = int(expected[6]), int(expected[-1])
    assert len(said) == 1 and said[0].startswith(f"profile of steps {first} to {last} of rank 0 in {tmp_path}/profile/")
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {f"{expected}.json.gz", f"{expected}.txt"}
    with gzip.open(tmp_path / "profile" / f"{expected}.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == last - first + 1
    assert re.search(r"aten::mm +1\.0 +0\.\d+ +\d+\.\d%", said[0]), said[0]
