"""The commands of README and docs as a user types them, in processes of their own."""

import json
import math
import socket
import sys
import time

import numpy as np
import psutil
import pytest

import eval as evaluation
import sample
from minzero.config.build import build
from minzero.config.load import load_config
from minzero.data.mixture import Mixture
from minzero.files import write_json
from minzero.metrics import read_metrics
from tests.helpers.processes import ROOT, deepspeed_command, ranks_of, run, wait_for_step, write_small_data
from tests.helpers.trained_runs import NEOX, write_data, write_run

TINY = ["train.py", "configs/tiny.json"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A short run of the tiny config on the standard library, by the launcher on two CPU processes."""
    assert (ROOT / "data/stdlib/meta.json").exists(), "make test prepares it"
    out = tmp_path_factory.mktemp("launch") / "tiny"
    done = run(deepspeed_command(*TINY, "--train.max_tokens", "100000", "--train.out_dir", out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done


def test_a_run_leaves_what_it_promises(tiny_run):
    out, _ = tiny_run
    config = json.loads((out / "config.json").read_text())
    assert config["train"]["max_tokens"] == 100000 and config["world_size"] == 2
    assert config["versions"].keys() >= {"torch", "deepspeed", "git"}
    # its sections are those of the command, of which they make the same again
    sections = {name: config[name] for name in ("model", "data", "train", "lora", "deepspeed")}
    command = [str(word) for word in (*TINY[1:], "--train.max_tokens", 100000, "--train.out_dir", out)]
    assert sections == load_config(command).to_dict() == build(sections, "config.json").to_dict()
    assert config["data_found"].keys() == {config["data"]["path"]}
    steps = [line for line in read_metrics(out) if "loss" in line]
    wanted = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "tflops", "mfu"}
    assert all(line.keys() >= wanted | {"peak_memory_bytes"} for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1 and steps[-1]["mfu"] is None
    assert any("val_loss" in line for line in read_metrics(out))
    assert (out / "loss.png").stat().st_size > 5000
    checkpoints = out / "checkpoints"
    latest = (checkpoints / "latest").read_text()
    assert json.loads((checkpoints / latest / "state.json").read_text())["step"] == steps[-1]["step"]
    command = [sys.executable, "plan.py", "configs/tiny.json", "--gpus", 2, "--gpu_memory", 80, "--json"]
    planned = json.loads(run(command).stdout.splitlines()[-1])["checkpoint_bytes"]
    written = sum(file.stat().st_size for file in (checkpoints / latest).glob("rank_*"))
    assert planned == pytest.approx(written, rel=0.02)
    assert (checkpoints / "best").exists() and not list(checkpoints.glob("*.tmp"))


def test_the_console_is_quiet_but_for_the_run(tiny_run):
    _, done = tiny_run
    # the launcher says that it found no GPU, in front of anything of ours
    said = [line for line in (done.stdout + done.stderr).splitlines() if "real_accelerator.py" not in line]
    for noise in ("Warning", "WARNING", "INFO", "Traceback"):
        assert not [line for line in said if noise in line], said[:20]
    assert "| loss " in done.stdout and "ETA" in done.stdout and "validation loss" in done.stdout


def test_eval_and_sample_read_the_run(tiny_run, monkeypatch, capsys):
    out, _ = tiny_run
    monkeypatch.chdir(ROOT)

    def said(main, *words):
        main([str(out), *words])
        return capsys.readouterr().out

    result = json.loads(said(evaluation.main, "--gzip", "--json").splitlines()[-1])
    meta = json.loads((ROOT / "data/stdlib/meta.json").read_text())["splits"]["val"]
    assert result["tokens"] == meta["tokens"] - 1
    assert result["bits_per_byte"] == pytest.approx(
        result["val_loss"] * result["tokens"] / 0.6931471805599453 / meta["bytes"]
    )
    assert 1.5 < result["gzip_bits_per_byte"] < result["gzip_one_by_one_bits_per_byte"] < 3
    texts = [said(sample.main, "--prompt", "import ", "--tokens", "30") for _ in range(2)]
    assert texts[0].startswith("import ") and len(texts[0]) > 20
    assert texts[0] == texts[1], "the seed decides"


def test_a_finished_run_is_left_alone_and_never_refuses_it(tiny_run):
    out, _ = tiny_run
    before = (out / "metrics.jsonl").read_bytes()
    again = [sys.executable, *TINY, "--train.max_tokens", "100000", "--train.out_dir", out]
    done = run([*again])
    assert done.returncode == 0 and "is complete" in done.stdout
    done = run([*again, "--train.resume", "never"])
    assert done.returncode == 2 and "already holds a run" in done.stderr and "Traceback" not in done.stderr
    done = run([*again, "--train.max_tokens", "200000", "--train.seed", "7"])
    assert done.returncode == 2 and "train.seed 1337 -> 7" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_run_continues_with_fewer_ranks_at_another_stage_and_with_a_larger_batch_if_asked(tiny_run, tmp_path):
    out, _ = tiny_run
    steps = [line["step"] for line in read_metrics(out)]
    fewer = [
        sys.executable,
        *TINY,
        "--train.resume",
        out,
        "--train.out_dir",
        tmp_path / "fewer",
        "--train.log_every",
        1,
    ]
    fewer += ["--deepspeed.zero_optimization.stage", "1", "--train.global_batch_tokens", "4096"]
    fewer += ["--train.max_tokens", str(steps[-1] * 2048 + 5 * 4096)]
    done = run(fewer)
    assert done.returncode == 2 and "or name them in train.allow_changed" in done.stderr
    done = run([*fewer, "--train.allow_changed", '["train.global_batch_tokens"]'])
    assert done.returncode == 0, done.stderr
    assert "saved on 2 ranks at ZeRO stage 3 in fp32, now 1 rank at ZeRO stage 1 in fp32" in done.stdout
    found = [line for line in read_metrics(tmp_path / "fewer") if "loss" in line]
    assert [line["step"] for line in found] == [steps[-1] + more for more in range(1, 6)]
    assert [line["tokens"] for line in found] == [steps[-1] * 2048 + more * 4096 for more in range(1, 6)]
    assert found[0]["loss"] < 7
    done = run([*fewer, "--train.allow_changed", '["train.global_batch_tokens"]'])  # not from there once more
    assert done.returncode == 0 and "is complete" in done.stdout, done.stdout


def test_a_mistake_ends_all_ranks_with_one_line_and_code_2():
    done = run(deepspeed_command(*TINY, "--train.micro_batch_size", "7"))
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "micro_batch_size" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--data.path", "nowhere", "no folder nowhere; expected token shards"),
        ("--train.out_dir", "/proc/version/x", "train.out_dir: /proc/version/x: could not be written (Not a directory"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(flag, value, expected, tmp_path):
    done = run([sys.executable, *TINY, "--train.out_dir", tmp_path / "run", flag, value])
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert expected in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("killed", ["rank 0", "rank 1"])
def test_a_run_that_loses_a_rank_ends_within_30_seconds(killed, start, tmp_path):
    process = start(deepspeed_command(*TINY, "--train.out_dir", tmp_path / "run", "--train.log_every", 1))
    wait_for_step(process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    began = time.time()
    ranks[killed[-1]].kill()
    rest = process.communicate(timeout=60)[0]
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values()):
        assert time.time() - began < 30
        time.sleep(0.1)
    assert time.time() - began < 30 and process.returncode != 0
    said = [line for line in rest.splitlines() if line.startswith("train.py: rank")]
    expected = ("lost contact with another rank", "stopped by SIGTERM")
    assert said and all(any(word in line for word in expected) for line in said), rest


def test_a_port_that_is_taken_is_refused_in_one_line(tmp_path):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(deepspeed_command(*TINY, "--train.out_dir", tmp_path / "run", port=port))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and f":{port} " in lines[0] and "--master_port" in lines[0], done.stderr


def test_a_damaged_shard_ends_a_run_of_two_ranks_with_one_line_and_code_2(tmp_path):
    """A wrong id in the data of some step: the rank that reads it says so, and none is left waiting."""
    (tmp_path / "data").mkdir()
    folder = write_small_data(tmp_path / "data")
    settings = {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64},
        "data": {"path": str(folder)},
        "train": {"micro_batch_size": 2, "global_batch_tokens": 64, "max_tokens": 6400, "seed": 1},
    }
    write_json(tmp_path / "c.json", settings)
    data = Mixture(str(folder), "train", 16, 64, 1)
    sound = set(data.streams[0].validation_windows(64).tolist())
    windows = data.windows_of(np.arange(4 * 100)).reshape(100, 4)  # of each step
    # of rank 1, in no window that the start looks at, and in the second shard
    step = next(step for step in range(3, 100) if 1300 < windows[step, 2] < 3000 and windows[step, 2] not in sound)
    path, place = folder / "train_000001.bin", int(windows[step, 2]) * 16 + 8 - 20_000
    tokens = np.fromfile(path, "<u2")
    tokens[512 + place] = 64
    tokens.tofile(path)
    command = ["train.py", tmp_path / "c.json", "--train.out_dir", tmp_path / "run", "--train.log_every", 1]
    done = run(deepspeed_command(*command), timeout=110)
    said = [line for line in done.stderr.splitlines() if "error: " in line and "train.py" in line]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert f"rank 1: error: {path}: found token id 64, expected ids below" in said[0]
    assert f"(token {place} of this file)" in said[0] and f"step {step:>3}/100 |" in done.stdout


def test_ranks_do_not_change_the_result_of_an_evaluation(tmp_path, capsys):
    write_run(tmp_path / "run", NEOX, write_data(tmp_path / "data"))
    evaluation.main([str(tmp_path / "run"), "--json"])
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    # 2 x 100 windows a round: in the last one the second rank has none
    windows = math.ceil(one["tokens"] / 16)
    assert windows % 200 <= 100
    done = run(deepspeed_command("eval.py", tmp_path / "run", "--json", "--batch_size", 100))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(one, rel=1e-7)
    assert done.stdout.count("validation loss") == 1, "rank 0 alone prints"
