"""A hundred malformed inputs: each command ends with code 2 and one line on stderr that names the culprit, without
a traceback, and leaves the disk as it was."""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import export
import plot
import sample
import to_gguf
import train
from data import train_tokenizer, verify
from data.text import prepare
from minzero.commands import run_command
from minzero.config.load import load_config
from minzero.errors import UserError
from minzero.files import ROOT, read_json, write_json
from minzero.hf.read import open_published
from tests.helpers.processes import run
from tests.helpers.trained_runs import GPT2, write_data, write_run

MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64}
TRAIN = {"micro_batch_size": 2, "global_batch_tokens": 64, "max_tokens": 64, "eval_tokens": 64, "save_every": 1}
ZERO = {"zero_optimization": {"stage": 1}}
NVME = {"device": "nvme"}
HALF = {"device": "cpu", "ratio": 0.5}
NO_VALUE = object()


def start_training(arguments):
    train.main(load_config(arguments))


@pytest.fixture(scope="module")
def made(small_data, tmp_path_factory):
    """A folder with data, a config, a run of one step with its checkpoint, and some text."""
    folder = tmp_path_factory.mktemp("malformed")
    shutil.copytree(small_data, folder / "data")
    settings = {"model": MODEL, "data": {"path": "data"}, "train": TRAIN, "deepspeed": ZERO}
    write_json(folder / "config.json", settings)
    (folder / "text.txt").write_text("some text\n" * 100)
    command = [sys.executable, ROOT / "train.py", folder / "config.json"]
    done = run([*command, "--train.out_dir", folder / "run", "--data.path", folder / "data"])
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of it to spoil, as the current folder; the process's environment is put back behind the test."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return tmp_path / "here"


def content_of(folder):
    """{path: hash} of every file, and the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(place, capsys, command, arguments, *expected):
    before = content_of(place)
    with pytest.raises(SystemExit) as ended:
        run_command(command, [str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    lines = [line for line in error.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in error, error
    for part in expected:
        assert part in lines[0], lines[0]
    assert content_of(place) == before


CONFIGS = [  # section, key, value or NO_VALUE, what the line names
    ("model", "n_layer", 0, "model.n_layer"),
    ("model", "n_layer", -3, "model.n_layer"),
    ("model", "n_layer", "two", "model.n_layer"),
    ("model", "n_layer", 1.5, "model.n_layer"),
    ("model", "n_layer", None, "model.n_layer"),
    ("model", "n_layers", 2, "did you mean n_layer?"),
    ("model", "n_head", 3, "nearest that do: 2 or 4"),
    ("model", "n_head", True, "model.n_head"),
    ("model", "n_kv_head", 3, "model.n_kv_head"),
    ("model", "n_embd", [16], "model.n_embd"),
    ("model", "block_size", 0, "model.block_size"),
    ("model", "block_size", 48, "train.global_batch_tokens"),
    ("model", "block_size", 1e9, "data.path: the train split of data has 60000 tokens"),
    ("model", "vocab_size", 10, "vocab_size"),
    ("model", "vocab_size", "gpt2", "model.vocab_size"),
    ("model", "dropout", 1.0, "model.dropout"),
    ("model", "dropout", -0.1, "model.dropout"),
    ("model", "dropout", float("nan"), "model.dropout"),
    ("model", "bias", "yes", "model.bias"),
    ("model", "bias", 1, "model.bias"),
    ("model", "norm", "batchnorm", "layernorm, rmsnorm"),
    ("model", "position", "alibi", "learned, rotary"),
    ("model", "mlp", "relu", "gelu, gelu_exact, swiglu"),
    ("model", "mlp_hidden", 0, "model.mlp_hidden"),
    ("model", "rotary_theta", 0, "model.rotary_theta"),
    ("model", "init_std", -1, "model.init_std"),
    ("model", "tie_embeddings", "true", "model.tie_embeddings"),
    ("data", "path", "nowhere", "nowhere"),
    ("data", "path", {}, "data.path"),
    ("data", "path", {"data": -1}, "data.path"),
    ("data", "path", {"data": "half"}, "data.path"),
    ("data", "path", {"data": 1, "nowhere": 1}, "nowhere"),
    ("data", "path", 5, "data.path"),
    ("data", "paths", "data", "did you mean path?"),
    ("train", "precision", "fp8", "auto, bf16, fp16, fp32"),
    ("train", "precision", "fp16", "fp16"),
    ("train", "micro_batch_size", 0, "train.micro_batch_size"),
    ("train", "micro_batch_size", 3, "train.global_batch_tokens"),
    ("train", "global_batch_tokens", 50, "train.global_batch_tokens"),
    ("train", "global_batch_tokens", 128, "train.max_tokens"),
    ("train", "max_tokens", 0, "train.max_tokens"),
    ("train", "warmup_tokens", -1, "train.warmup_tokens"),
    ("train", "lr", "fast", "train.lr"),
    ("train", "lr", -1e-3, "train.lr"),
    ("train", "lr", float("nan"), "train.lr"),
    ("train", "min_lr_ratio", 2, "train.min_lr_ratio"),
    ("train", "schedule", "exponential", "cosine, linear, constant"),
    ("train", "betas", [0.9], "train.betas"),
    ("train", "betas", [0.9, 1.0], "train.betas"),
    ("train", "betas", 0.9, "train.betas"),
    ("train", "grad_clip", -1, "train.grad_clip"),
    ("train", "activation_checkpointing", -1, "train.activation_checkpointing"),
    ("train", "kernels", "triton", "auto, apex, torch"),
    ("train", "kernels", "apex", "train.kernels"),
    ("train", "compile", "max", "true, false, auto"),
    ("train", "log_every", 0, "train.log_every"),
    ("train", "keep_checkpoints", 0, "train.keep_checkpoints"),
    ("train", "loggers", ["mlflow"], "tensorboard, wandb"),
    ("train", "loggers", "wandb", "train.loggers"),
    ("train", "resume", "nowhere", "train.resume"),
    ("train", "init_from", "nowhere/at/all", "train.init_from"),
    ("train", "bad_step", "ignore", "skip, stop, rollback"),
    ("train", "seed", -1, "train.seed"),
    ("train", "learning_rate", 1, "unknown key train.learning_rate"),
    ("train", "lr", float("inf"), "train.lr: found Infinity, expected a finite number"),
    ("train", "seed", 2**64, "train.seed: found 18446744073709551616, expected at most"),
    ("train", "n_layer", 1, "n_layer is a key of the section model"),
    ("train", "profile", "2", "train.profile"),
    ("train", "profile", "1:2", "of 1 to 1"),
    ("deepspeed", "optimizer", {"type": "SGD"}, "deepspeed.optimizer follows from train.lr"),
    ("deepspeed", "gradient_clipping", 1.0, "deepspeed.gradient_clipping follows from train.grad_clip"),
    ("deepspeed", "zero_optimisation", {}, "did you mean zero_optimization?"),
    ("deepspeed", "zero_optimization", 3, "deepspeed.zero_optimization"),
    ("deepspeed", "zero_optimization", {"stage": 7}, "deepspeed.zero_optimization.stage"),
    ("deepspeed", "zero_optimization", {"stages": 3}, "did you mean stage?"),
    ("deepspeed", "zero_optimization", {"stage": 2, "offload_optimizer": NVME}, "nvme at stage 2, expected stage 3"),
    ("deepspeed", "zero_optimization", {"stage": 3, "offload_param": NVME}, "offload_param.nvme_path: found none"),
    ("deepspeed", "zero_optimization", {"offload_param": "cpu"}, 'offload_param: found "cpu", expected an object'),
    ("deepspeed", "zero_optimization", {"stage": 3, "offload_optimizer": HALF}, "ratio: found 0.5, expected 1 where"),
    (
        "deepspeed",
        "zero_optimization",
        {"stage": 2, "offload_optimizer": HALF},
        "ratio: found 0.5 with stage 2 and device",
    ),
    (
        "deepspeed",
        "zero_optimization",
        {"stage": 3, "offload_optimizer": NVME | {"ratio": 0.5, "nvme_path": "swap"}},
        "expected 1, or stage 3",
    ),
    ("deepspeed", "bf16", {"enabled": True}, "train.precision"),
    ("deepspeed", "comms_logger", {"enabld": True}, "unknown key deepspeed.comms_logger.enabld; did you mean enabled?"),
    ("deepspeed", "comms_logger", {"prof_ops": 3}, "deepspeed.comms_logger.prof_ops: found 3"),
    ("deepspeed", "aio", 3, "deepspeed.aio: found 3, expected an object"),
    ("deepspeed", "aio", {"thread_count": 1}, "unknown key deepspeed.aio.thread_count"),
    ("deepspeed", "data_types", {"grad_accum_dtype": "foo"}, 'grad_accum_dtype: found "foo", expected one of fp32,'),
    ("deepspeed", "communication_data_type", "int8", "communication_data_type: found"),
    ("deepspeed", "fp16", {"initial_scale_power": 1000}, "fp16.initial_scale_power: found 1000, expected at most 32"),
    ("deepspeed", "fp16", {"loss_scale": -1}, "fp16.loss_scale: found -1, expected at least 0"),
    ("deepspeed", "amp", {"enabled": False}, "deepspeed.amp: found"),
    ("deepspeed", "elasticity", {"enabled": True}, "DeepSpeed removed it"),
    ("deepspeed", "sequence_parallel_size", 2, "deepspeed.sequence_parallel_size: found 2, not supported"),
    ("deepspeed", "torch_autocast", {"enabled": True}, "set train.precision"),
    ("deepspeed", "tensorboard", {"enabled": True}, "set train.loggers"),
    ("deepspeed", "gradient_predivide_factor", 2.0, "deepspeed.gradient_predivide_factor: found 2.0, not supported"),
    ("deepspeed", "zero_optimization", {"stage": 3, "mics_shard_size": 2}, "DeepSpeed removed it (MiCS)"),
    (
        "deepspeed",
        "zero_optimization",
        {"stage": 3, "zero_quantized_weights": True},
        "zero_quantized_weights: found true",
    ),
    ("deepspeed", "zero_optimization", {"stage": 3, "leaf_module": {"names": ["x"]}}, "leaf_module: found"),
    (
        "deepspeed",
        "zero_optimization",
        {"stage": 3, "sub_group_size": "auto"},
        'sub_group_size: found "auto", expected',
    ),
    ("deepspeed", "zero_optimization", {"stage": 3, "reduce_bucket_size": 1e30}, "expected at most 1000000000000"),
    ("deepspeed", "zero_optimization", {"stage": 2, "offload_param": {"device": "cpu"}}, "expected stage 3"),
    ("train", "eps", 0, "train.eps: found 0, expected at least 1e-16"),
    ("train", "eps", 1e-50, "train.eps: found 1e-50, expected at least 1e-16"),
    ("train", "lr", 1e38, "train.lr: found 1e+38, expected at most 10"),
    ("train", "betas", [0.9, 1 - 1e-12], "expected two numbers from 0 to 0.99999"),
    ("train", "out_dir", "a" * 300, "train.out_dir: found"),
    ("train", "out_dir", "a\0b", "train.out_dir: found"),
    ("train", "out_dir", "\ud800", "train.out_dir: found"),
    ("data", "path", "d" * 300, "data.path: found"),
    ("model", "n_layer", 1e12, "model.n_layer: found 1000000000000.0, expected at most"),
    ("model", "vocab_size", 2**40, "model.vocab_size: found 1099511627776, expected at most"),
    ("model", "rotary_theta", 1e300, "model.rotary_theta: found 1e+300, expected at most"),
    ("optimizer", NO_VALUE, {}, "unknown section 'optimizer'"),
    ("model", NO_VALUE, [], "section 'model' must be a JSON object"),
]


@pytest.mark.parametrize("section, key, value, expected", CONFIGS)
def test_a_config_file(place, capsys, section, key, value, expected):
    settings = json.loads((place / "config.json").read_text())
    if key is NO_VALUE:
        settings[section] = value
    else:
        settings[section] = settings[section] | {key: value}
    (place / "broken.json").write_text(json.dumps(settings))
    refused(place, capsys, start_training, ["broken.json"], expected)


FILES = [  # the file's whole content, what the line names
    ("", "broken.json"),
    ("{", "broken.json"),
    ("[]", "broken.json"),
    ("null", "broken.json"),
    ('{"model": {"n_layer": 2,}}', "broken.json"),
    ("model:\n  n_layer: 2\n", "broken.json"),
    ('{"train": {"lr": 1, "lr": 2}}', "stands twice"),
    (100_000 * "[", "nested too deeply"),
    ('{"train": {"max_tokens": ' + 5000 * "1" + "}}", "number of thousands of digits"),
]


@pytest.mark.parametrize("content, expected", FILES)
def test_a_file_that_is_no_config(place, capsys, content, expected):
    (place / "broken.json").write_text(content)
    refused(place, capsys, start_training, ["broken.json"], expected)


FLAGS = [
    (start_training, ["nowhere.json"], "nowhere.json: no such file"),
    (start_training, ["config.json", "other.json"], "other.json: expected one config file"),
    (start_training, ["data"], "data: "),
    (start_training, ["config.json", "--lr", "1"], "--lr: unknown flag"),
    (start_training, ["config.json", "--train.lr"], "--train.lr: no value given"),
    (start_training, ["config.json", "--trian.lr", "1"], "unknown section 'trian'"),
    (start_training, ["config.json", "--train.", "1"], "--train."),
    (start_training, ["config.json", "--train.lr", "1e-4x"], "train.lr"),
    (start_training, ["config.json", "--train.out_dir", "text.txt"], "train.out_dir: text.txt"),
    (start_training, ["config.json", "--train.out_dir", "run", "--train.resume", "never"], "already holds a run"),
    (start_training, ["config.json", "--train.out_dir", "run", "--model.n_layer", "2"], "model.n_layer 1 -> 2"),
    (start_training, ["config.json", "--train.out_dir", "run", "--train.seed", "2"], "train.seed 1337 -> 2"),
    (evaluation.main, ["nowhere"], "nowhere: no such folder, so no complete checkpoint"),
    (evaluation.main, ["run", "--checkpoint", "77"], "no checkpoint '77'"),
    (evaluation.main, ["run", "--data", "nowhere"], "nowhere"),
    (sample.main, ["nowhere"], "nowhere: no such folder, so no complete checkpoint"),
    (sample.main, ["run", "--temperature", "-1"], "--temperature"),
    (export.main, ["nowhere", "hf"], "nowhere: no such folder, so no complete checkpoint"),
    (export.main, ["run", "data"], "data: already there"),
    (prepare.main, ["--input", "nowhere/*.txt", "--tokenizer", "bytes", "--out", "out"], "nowhere/*.txt"),
    (prepare.main, ["--input", "text.txt", "--tokenizer", "gpt3", "--out", "out"], "gpt3"),
    (prepare.main, ["--input", "text.txt", "--workers", "0", "--tokenizer", "bytes", "--out", "out"], "--workers"),
    (prepare.main, ["--input", "text.txt", "--val_fraction", "2", "--tokenizer", "bytes", "--out", "out"], "--val_f"),
    (prepare.main, ["--input", "text.txt", "--tokenizer", "bytes", "--out", "text.txt"], "--out: text.txt"),
    (prepare.main, ["--input", "data", "--tokenizer", "bytes", "--out", "out"], "matches no file of a known kind"),
    (prepare.main, ["--input", "data/*.bin", "--tokenizer", "bytes", "--out", "out"], "is no text"),
    (prepare.main, ["--input", "config.json", "--limit", "0", "--tokenizer", "bytes", "--out", "out"], "--limit"),
    (verify.main, ["nowhere"], "nowhere"),
    (verify.main, ["run"], "run"),
    (start_training, ["config.json", "--data.verify", "maybe"], "data.verify"),
    (train_tokenizer.main, ["--source", "text", "--input", "text.txt", "--vocab_size", "9000", "--out", "t"], "tokens"),
    (train_tokenizer.main, ["--input", "text.txt", "--vocab_size", "260", "--out", "text.txt"], "--out: text.txt"),
    (plot.main, ["nowhere"], "nowhere"),
    (plot.main, ["run", "--out", "picture.xyz"], "--out: picture.xyz"),
    (plot.main, ["run", "--x", "steps"], "invalid choice"),
    (start_training, ["config.json", "--train.lr", "1", "--train.lr.x", "2"], "lr was given the value 1 before"),
]


@pytest.mark.parametrize("command, arguments, expected", FLAGS)
def test_flags(place, capsys, command, arguments, expected):
    refused(place, capsys, command, arguments, expected)


def spoil(path, how):
    """Cut a file short, overwrite its beginning, or replace its content."""
    path = next(Path().glob(path))
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "ids":
        tokens = np.fromfile(path, dtype="<u2")
        tokens[512:] = 999
        tokens.tofile(path)
    else:
        path.write_bytes(how.encode() + path.read_bytes()[len(how) :] if how == "XXXX" else how.encode())


SPOILT = [  # file, what is done to it, command, arguments, what the line names
    ("data/train_000001.bin", "cut", start_training, ["config.json"], "train_000001.bin"),
    ("data/train_000001.bin", "XXXX", start_training, ["config.json"], "train_000001.bin"),
    ("data/train_000001.bin", "", start_training, ["config.json"], "train_000001.bin"),
    ("data/train_000000.bin", "ids", start_training, ["config.json"], "train_000000.bin"),
    ("data/train_000002.bin", "flipped", start_training, ["config.json", "--data.verify", "true"], "found SHA-256"),
    ("data/train_000002.bin", "flipped", verify.main, ["data"], "found faults in data"),
    ("data/val_000000.bin", "missing", start_training, ["config.json"], "val"),
    ("data/val_000000.bin", "cut", start_training, ["config.json"], "val_000000.bin"),
    ("data/meta.json", "{", start_training, ["config.json"], "meta.json"),
    ("data/meta.json", "[]", start_training, ["config.json"], "meta.json"),
    ("data/meta.json", "{}", start_training, ["config.json"], "meta.json"),
    ("data/meta.json", '{"vocab_size": "many"}', start_training, ["config.json"], "meta.json"),
    ("run/checkpoints/step_*/state.json", "cut", start_training, ["config.json", "--train.out_dir", "run"], "state"),
    ("run/checkpoints/step_*/state.json", "{}", start_training, ["config.json", "--train.out_dir", "run"], "state"),
    ("run/checkpoints/step_*/state.json", "flipped", evaluation.main, ["run"], "state.json"),
    ("run/checkpoints/step_*/rank_00000.safetensors", "cut", evaluation.main, ["run"], "rank_00000.safetensors"),
    ("run/checkpoints/step_*/rank_00000.safetensors", "flipped", evaluation.main, ["run"], "rank_00000.safetensors"),
    ("run/checkpoints/step_*/rank_00000.safetensors", "missing", export.main, ["run", "hf"], "rank_00000.safetensors"),
    ("run/checkpoints/step_*/rank_00000.safetensors", "XXXX", sample.main, ["run"], "rank_00000.safetensors"),
]


@pytest.mark.parametrize("file, how, command, arguments, expected", SPOILT)
def test_a_spoilt_file(place, capsys, file, how, command, arguments, expected):
    spoil(file, how)
    refused(place, capsys, command, arguments, expected)


ODD_LINES = [  # of metrics.jsonl
    b"null",
    b"[]",
    b"3",
    b'"step"',
    b"{}",
    b'{"step": NaN, "loss": 1}',
    b'{"step": "7", "loss": 1}',
    b'{"step": true}',
    b'{"step": -1, "loss": 1}',
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 1e999}',
    b'{"step": 1, "tokens": "many", "loss": [], "val_loss": "low", "step_seconds": {}, "mfu": "x"}',
    b'{"step": 1, "tokens": 64, "step_seconds": null, "lr": 1e400, "grad_norm": NaN, "bad_step": 7}',
    b'{"step": 1, "step_seconds": 0.1}',
    b"\x00\xff\xfe binary \x80",
    b"[" * 100_000,
    b'{"step": 1, "lo',
]


def damage_what_can_be_rebuilt(run):
    """All of it at once: the marks, metrics.jsonl, config.json, status.json, the picture, and folders under the names
    that files have while they are written."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    metrics.write_bytes(b"\n".join([*ODD_LINES, *lines, *ODD_LINES]))
    (run / "config.json").write_bytes(b'{"model": \xff')
    (run / "checkpoints" / "best").write_bytes(b"step_\xb5")
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").mkdir()
    (run / "checkpoints" / "latest" / "file").touch()
    (run / "loss.png").unlink(missing_ok=True)
    (run / "loss.png").mkdir()
    (run / "status.json").unlink(missing_ok=True)
    (run / "status.json").mkdir()
    for name in ("status.json", "config.json", "metrics.jsonl", "loss.png", "checkpoints/latest", "checkpoints/best"):
        (run / f"{name}.tmp").mkdir()
        (run / f"{name}.tmp" / "file").touch()


def test_damage_to_files_that_can_be_rebuilt_stops_no_reader(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", GPT2, write_data(tmp_path / "data"))
    damage_what_can_be_rebuilt(tmp_path / "run")
    for command, *arguments in (
        (evaluation.main, "run"),
        (sample.main, "run", "--prompt", "abc", "--tokens", "3", "--checkpoint", "latest"),
        (export.main, "run", "hf"),
        (plot.main, "run", "--html", "page.html"),
        (plot.main, "run", "--x", "time"),
        (plot.main, "run", "--x", "flops"),
    ):
        command(arguments)
    assert "validation loss" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| validation loss | 5.0000 nats per token" in card and (tmp_path / "hf" / "loss.png").is_file()
    page = (tmp_path / "page.html").read_text()
    assert "5.0000 at step 5" in page and "train.lr" in page, "the settings are those of the checkpoint"


def test_damage_to_files_that_can_be_rebuilt_stops_no_run(place):
    damage_what_can_be_rebuilt(place / "run")
    command = [sys.executable, ROOT / "train.py", place / "config.json", "--train.out_dir", place / "run"]
    more = ["--data.path", place / "data", "--train.allow_changed", '["data.path"]']
    more += ["--train.max_tokens", "128", "--train.loggers", '["tensorboard"]']
    done = run([*command, *more])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "continuing from" in done.stdout and "step_00000001: step 1, " in done.stdout
    assert (place / "run/checkpoints/best").read_text() in ("step_00000001", "step_00000002")
    assert (place / "run/loss.png").is_file()
    assert (place / "run/checkpoints/latest").read_text() == "step_00000002"
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {line["step"] for line in lines if "loss" in line} == {1, 2}
    assert json.loads((place / "run/config.json").read_text())["model"]["n_layer"] == 1
    assert json.loads((place / "run/status.json").read_text())["state"] == "complete"


@pytest.mark.parametrize("file", ["../data/model.safetensors", "/etc/passwd", "data/x.safetensors", "pipe.safetensors"])
def test_the_index_of_a_published_model_names_files_of_its_folder_alone(place, capsys, file):
    write_run(place / "ours", GPT2, write_data(place / "text"))
    export.main(["ours", "hf"])
    tensors = place / "hf" / "model.safetensors"
    shutil.copy(tensors, place / "data" / "model.safetensors")
    os.mkfifo(place / "hf" / "pipe.safetensors")
    write_json(place / "hf" / "model.safetensors.index.json", {"weight_map": {"transformer.wte.weight": file}})
    capsys.readouterr()
    with pytest.raises(UserError, match=r"safetensors[^\n]*(found the file name|not a plain one)"):
        open_published("hf")


FOR_A_PIPE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", FOR_A_PIPE)
def test_a_pipe_in_a_published_folder_stops_no_reader(tmp_path, capsys, monkeypatch, name):
    """It is refused, where a reader that opens it would wait for ever."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", GPT2, write_data(tmp_path / "data"))
    export.main(["run", "hf"])
    (tmp_path / "hf" / name).unlink()
    os.mkfifo(tmp_path / "hf" / name)
    signal.alarm(60)
    for command, *arguments in (
        (sample.main, "hf", "--prompt", "abc", "--tokens", "3"),
        (evaluation.main, "hf", "--data", "data"),
        (to_gguf.main, "hf", "hf.gguf", "--llama_cpp", "."),
    ):
        expected = ("hf",) if name == "config.json" else (f"hf/{name}: found a pipe, socket or device, expected",)
        refused(tmp_path, capsys, command, arguments, *expected)
    signal.alarm(0)


def test_a_pipe_stops_no_reader_of_a_run(tmp_path, capsys, monkeypatch):
    """plot.py shows the settings that the checkpoint recorded. A config on the command line may be a pipe."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", GPT2, write_data(tmp_path / "data"))
    (tmp_path / "run/config.json").unlink()
    signal.alarm(60)
    for name in ("run/config.json", "run/loss.png", "run/status.json"):
        os.mkfifo(tmp_path / name)
    plot.main(["run", "--x", "flops", "--html", "page.html"])
    assert "train.lr" in (tmp_path / "page.html").read_text()
    export.main(["run", "hf"])
    with pytest.raises(UserError, match=r"^run/config\.json: found a pipe, socket or device, expected a plain file"):
        read_json(Path("run/config.json"))

    def feed():
        Path("run/config.json").write_text(json.dumps({"train": {"lr": 0.25}}))

    writer = threading.Thread(target=feed)
    writer.start()
    assert load_config(["run/config.json"]).train.lr == 0.25
    writer.join()
    signal.alarm(0)


def test_there_are_a_hundred():
    assert len(CONFIGS) + len(FILES) + len(FLAGS) + len(SPOILT) >= 100
