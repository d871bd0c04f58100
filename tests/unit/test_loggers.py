import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minzero import loggers
from minzero.loggers import MetricsLog
from minzero.metrics import read_metrics
from tests.unit.test_metrics import LINE


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
