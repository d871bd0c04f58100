import dataclasses
import json
import sys
import typing

import pytest

from minzero import commands
from minzero.commands import run_command
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config, gradient_accumulation
from minzero.config.load import command_line_values, load_config
from minzero.config.sections import SECTIONS
from minzero.config.values import convert
from minzero.errors import UserError
from minzero.files import ROOT
from tests.helpers.processes import run


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_every_config_in_the_repository_loads():
    for path in (ROOT / "configs").glob("*.json"):
        loaded = load_config([str(path)])
        assert loaded.train.out_dir == f"out/{path.stem}"
        assert gradient_accumulation(loaded, 1) >= 1


def test_overrides_reach_every_section(tmp_path):
    path = write(tmp_path / "a.json", {"train": {"lr": 1e-3}, "deepspeed": {"zero_optimization": {"stage": 1}}})
    arguments = [path, "--train.lr", "1e-4", "--model.bias=false", "--train.max_tokens", "1e9", "--data.path", "2024"]
    arguments += ["--deepspeed.zero_optimization.offload_optimizer.device", "cpu", "--local_rank=1"]
    loaded = load_config(arguments)
    assert loaded.train.lr == 1e-4 and loaded.model.bias is False and loaded.data.path == "2024"
    assert loaded.train.max_tokens == 10**9 and isinstance(loaded.train.max_tokens, int)
    zero = loaded.deepspeed["zero_optimization"]
    assert zero["stage"] == 1 and zero["offload_optimizer"] == {"device": "cpu"}
    assert zero["contiguous_gradients"] == "auto", "ds_config.json lies underneath"
    assert loaded.train.out_dir == "out/a"


HUGE = "1" * 5000  # Python refuses to read a number of that many digits

BAD = [
    ({"modle": {}}, "did you mean model?"),
    ({"model": {"n_layers": 2}}, "did you mean n_layer?"),
    ({"model": {"n_layer": "2"}}, 'found "2", expected int'),
    ({"model": {"n_layer": True}}, "found true, expected int"),
    ({"model": {"n_layer": 2.5}}, "found 2.5, expected int"),
    ({"model": {"n_layer": 0}}, "expected at least 1"),
    ({"model": {"bias": 1}}, "found 1, expected bool"),
    ({"model": {"norm": "batchnorm"}}, "expected one of layernorm, rmsnorm"),
    ({"model": {"n_embd": 100, "n_head": 12}}, "nearest that do: 5 or 10"),
    ({"model": {"n_head": 12, "n_kv_head": 5}}, "nearest that do: 4 or 6"),
    ({"model": {"n_expert_per_token": 4}}, "model.n_expert_per_token: found 4 with model.n_expert null"),
    ({"model": {"n_shared_expert": 1}}, "set model.n_expert, or this to 0"),
    ({"model": {"n_expert": 2, "n_expert_per_token": 4}}, "set --model.n_expert_per_token 2"),
    ({"model": {"full_attention_layers": 2}}, "set model.sliding_window, or this to null"),
    ({"model": {"sliding_window": 8, "full_attention_layers": [12]}}, "found layer 12, expected 0 to 11"),
    ({"model": {"position": "rotary", "no_rotary_layers": 13}}, "found layer 12, expected 0 to 11"),
    ({"model": {"rotary_scaling": {"rope_type": "linear", "factor": 2}}}, "set model.position rotary, or this to null"),
    ({"model": {"rotary_fraction": 0.5}}, "set model.position rotary, or this to 1.0"),
    (
        {"model": {"position": "rotary", "rotary_scaling": {"rope_type": "dynamic", "factor": 2}}},
        "expected rope_type linear, llama3, yarn, or null for none",
    ),
    ({"model": {"position": "rotary", "rotary_scaling": {"rope_type": "yarn"}}}, "expected also factor, original_max"),
    (
        {"model": {"position": "rotary", "rotary_scaling": {"rope_type": "linear", "factor": 2, "a\nb": 1}}},
        "linear has no a\\nb; expected factor",
    ),
    ({"model": {"position": "rotary", "rotary_scaling": {"rope_type": "linear", "factor": True}}}, "above 0"),
    ({"model": {"position": "rotary", "rotary_scaling": {"rope_type": "linear", "factor": float("nan")}}}, "above 0"),
    (
        {
            "model": {
                "position": "rotary",
                "rotary_theta": 1,
                "rotary_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8},
            }
        },
        "a model.rotary_theta above 1",
    ),
    ({"model": {"position": "rotary", "rotary_fraction": 0.01}}, "choose head_dim"),
    ({"model": {"family": "lama"}}, 'model.family: found "lama", expected null or one of gpt2'),
    ({"model": {"family": "qwen3"}}, "Qwen3ForCausalLM is what model.family asks for"),
    ({"train": {"init_from": ""}}, "train.init_from: found an empty name"),
    ({"model": {"n_embd": 9, "n_head": 3, "position": "rotary"}}, "is even"),
    ({"model": []}, "must be a JSON object"),
    ([], "expected a JSON object"),
    ({"train": {"betas": [0.9]}}, "expected two numbers"),
    ({"train": {"betas": [0.9, "x"]}}, "train.betas"),
    ({"train": {"lr": float("nan")}}, "train.lr"),
    ({"train": {"lr": -1}}, "expected at least 0"),
    ({"train": {"max_tokens": 5}}, "less than one step"),
    ({"train": {"loggers": ["wandb", "mlflow"]}}, "expected one of tensorboard, wandb"),
    ({"train": {"loggers": "wandb"}}, "train.loggers"),
    ({"train": {"precision": "fp8"}}, "expected one of auto, bf16, fp16, fp32"),
    ({"deepspeed": {"train_batch_size": 8}}, "follows from train.global_batch_tokens"),
    ({"deepspeed": {"bf16": {"enabled": True}}}, "follows from train.precision"),
    ({"deepspeed": {"bf16": True}}, "expected an object"),
    ({"deepspeed": {"zero_optimization": None}}, "expected an object"),
    ({"deepspeed": {"zero_optimisation": {"stage": 1}}}, "did you mean zero_optimization?"),
    ({"deepspeed": {"gradient_cliping": 1}}, "unknown key deepspeed.gradient_cliping"),
    ({"deepspeed": {"comms_logger": True}}, "comms_logger: found true, expected an object"),
    ({"lr": 1}, "unknown section 'lr'; lr is a key of the section train"),
    ({"train": {"n_layer": 2}}, "unknown key train.n_layer; n_layer is a key of the section model"),
    ({"train": {"lr": float("inf")}}, "train.lr: found Infinity, expected a finite number"),
    ({"train": {"betas": [0.9, float("nan")]}}, "found NaN, expected a finite number"),
    ({"train": {"loggers": [1]}}, "found [1], expected list[str]"),
    ({"train": {"seed": 2**63}}, "expected at most 4611686018427387904"),
    ({"train": {"timeout_seconds": 1e30}}, "expected at most 1000000000"),
    ({"train": {"min_lr_ratio": 1.5}}, "expected at most 1 (last learning rate over the peak)"),
    ({"train": {"profile": "10"}}, 'found "10", expected the first and last step to record, as 10:15, of 1 to 19073'),
    ({"train": {"profile": "15:10"}}, 'train.profile: found "15:10"'),
    ({"train": {"profile": "0:3"}}, "train.profile"),
    ({"train": {"profile": "3:19074"}}, "of 1 to 19073"),
    ({"train": {"profile": 3}}, "found 3, expected str or null"),
    ({"data": {"path": ""}}, "data.path: found no folder"),
    ({"model": {"n_embd": 2**20, "n_head": 7}}, "nearest that do: 4 or 8"),
    ("{", "line 1, column 2"),
    ('{"train": {\n  "lr": 1,\n}}', "line 3, column 1"),
    ('{"train": {"lr": 1, "lr": 2}}', 'the key "lr" stands twice in one object'),
    (100_000 * "[", "nested too deeply"),
    ('{"train": {"max_tokens": ' + HUGE + "}}", "holds a number of thousands of digits"),
    ('{"train": {"lr": 1' + "0" * 4000 + "}}", "train.lr: found 1000000000"),
    ('{"train": {"betas": [0.9, 1' + "0" * 4000 + "]}}", "expected a number that a float holds"),
    ('{"train": {"lr": 1e400}}', "train.lr: found Infinity, expected a finite number"),
    ('{"model": {"n_layer": 1e308}}', "model.n_layer: found 1e+308, expected at most 100000"),
    ('{"train": {"out_dir": ' + 900 * "[" + 900 * "]" + "}}", "train.out_dir: found "),
    ({"train": {"out_dir": "a\0b"}}, r'train.out_dir: found "a\u0000b", expected no control characters'),
    ('{"train": {"out_dir": "a\\ud800"}}', r'found "a\ud800", which is no text (half of a surrogate pair)'),
    ({"train": {"out_dir": "a" * 300}}, "train.out_dir: found "),
    ({"train": {"out_dir": "é" * 200}}, "longer than a path may be; expected at most 255 bytes a name"),
    ({"train": {"resume": "a/" * 3000}}, "train.resume: found "),
    ({"data": {"path": "a\nb"}}, r'data.path: found "a\nb", expected no control characters'),
    ({"data": {"path": {"b" * 256: 1}}}, "data.path: found "),
    ({"data": {"path": {"data": 1e300, "more": 1}}}, "expected a number above 0 (1e-9 to 1e9)"),
    ({"data": {"path": {"data": 1e-300}}}, "expected a number above 0 (1e-9 to 1e9)"),
    ({"a\nb": {}}, r"unknown section 'a\nb'"),
    ({"train": {"a\0\nb": 1}}, r"unknown key train.a\u0000\nb"),
    ({"train": {"lr": 1, "weight_decay": 1}}, "train.weight_decay: found 1.0 with train.lr 1.0"),
    ({"train": {"grad_clip": 1e-50}}, "train.grad_clip: found 1e-50, expected at least 1e-06, or 0"),
    ({"train": {"spike_zscore": 0.1}}, "train.spike_zscore: found 0.1, expected at least 1, or 0"),
    ({"train": {"betas": [0.9, 1 - 1e-20]}}, "expected two numbers from 0 to 0.99999"),
    ({"train": {"betas": [1 - 1e-9, 0.9]}}, "expected two numbers from 0 to 0.99999"),
]


@pytest.mark.parametrize(("content", "expected"), BAD)
def test_bad_config_gets_one_line_that_names_the_file(tmp_path, content, expected):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError) as error:
        load_config([path])
    message = str(error.value)
    assert expected in message and "bad.json" in message and "\n" not in message


NUMBERS = [
    (section, f)
    for section, cls in SECTIONS.items()
    for f in dataclasses.fields(cls)
    if {int, float} & {f.type, *typing.get_args(f.type)} and typing.get_origin(f.type) is not list
    if not f.metadata["choices"]  # which are the range
]


@pytest.mark.parametrize("section, f", NUMBERS, ids=[f.name for _, f in NUMBERS])
def test_every_number_has_a_range_in_which_a_run_can_work(section, f):
    """Nothing that is no number in float32, underflows to zero where it must not, or exceeds an int64."""
    low, high = f.metadata["minimum"], f.metadata["maximum"]
    assert 0 <= low < high < 2**63
    assert f.type is not float or high <= 1e12
    assert f.name not in ("eps", "norm_eps", "init_std") or low >= 1e-16
    kind = float if f.type is float else int
    for value in (low - 1, high * 2 + 1, -1e-50, 1e38, 1e300, 10**400, 2**64, float("nan"), "1" * 5000):
        with pytest.raises(UserError, match=rf"^x: {section}\.{f.name}: found .* expected ") as error:
            build({section: {f.name: value}}, "x")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    for value in (low, high):
        meta = dict(f.metadata)
        assert convert("x", value, f.type, meta) == value
        assert isinstance(convert("x", value, f.type, meta), kind)


@pytest.mark.parametrize("name, value", [("eps", 0), ("eps", 1e-50), ("lr", 1e38)])
def test_settings_that_gave_weights_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(UserError, match=rf"^x: train\.{name}: found .*, expected at (least|most) "):
        build({"train": {name: value}}, "x")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.max_tokens", HUGE], "train.max_tokens: found "),
        (["--train.out_dir", HUGE], "train.out_dir: found "),
        (["--train.lr", HUGE], "train.lr: found "),
        (["--train.lr", "[" * 100_000], "train.lr: found "),
        (["--train.out_dir", "\udcff"], r'found "\udcff", which is no text'),
        (["n" * 300], "config file: found "),
        (["a\0b"], "config file: found "),
        (["--train.lrr", "1"], "did you mean lr?"),
        (["--train.lr"], "no value given"),
        (["--train.lr", "--train.seed", "1"], "no value given"),
        (["--lr", "1"], "unknown flag"),
        (["--trian.lr", "1"], "unknown section"),
        (["--model.n_layer", "two"], 'found "two", expected int'),
        (["--train.lr", "1", "--train.lr.x", "2"], "lr was given the value 1 before"),
        (["--train.betas.x", "2"], 'train.betas: found {"x": 2}, expected list[float]'),
        (["--train.lr="], 'train.lr: found "", expected float'),
        (["--train.profile", "10:2000"], "of 1 to 1367"),
        (["nowhere.json"], "no such file; configs holds 10b.json, "),
        (["tiny"], "tiny: no such file; did you mean configs/tiny.json?"),
        (["configs/tinny.json"], "did you mean configs/tiny.json?"),
        (["configs/tiny.json", "-train.lr", "1"], "-train.lr: unknown flag"),
        (["configs/tiny.json", "train.lr=1"], "train.lr=1: unknown flag; keys are written --section.key value"),
        (["configs/tiny.json", "configs/tiny.json"], "was already given"),
    ],
)
def test_bad_command_line_gets_one_line(arguments, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        load_config(["configs/tiny.json", *arguments] if arguments[0].startswith("--") else arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_command_line_values_are_json_or_strings():
    values, rest = command_line_values(["--train.resume=never", "--model.n_kv_head", "null", "a.json"])
    assert values == {"train": {"resume": "never"}, "model": {"n_kv_head": None}} and rest == ["a.json"]
    for name in ("train.allow_changed", "train.eval_tasks", "train.loggers", "lora.matrices"):
        section, key = name.split(".")
        for text, expected in (
            ("data.path", ["data.path"]),
            ("2024", ["2024"]),
            ('["a", "b"]', ["a", "b"]),
            ("[]", []),
            ("a,b", "a,b"),  # no list, which is refused in a line
            ("[a]", "[a]"),
        ):
            assert command_line_values([f"--{name}", text])[0] == {section: {key: expected}}
    nested, _ = command_line_values(["--deepspeed.zero_optimization.offload_param.nvme_path", "2024"])
    assert nested == {"deepspeed": {"zero_optimization": {"offload_param": {"nvme_path": "2024"}}}}


def test_batch_arithmetic_is_exact_or_refused_with_what_would_divide():
    loaded = build({"model": {"block_size": 128}, "train": {"global_batch_tokens": 4096, "micro_batch_size": 4}}, "x")
    assert [gradient_accumulation(loaded, ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    for ranks in (1, 2, 4, 8):
        batch = deepspeed_config(loaded, ranks, "fp32", on_gpu=False)
        assert batch["train_batch_size"] * 128 == 4096
    with pytest.raises(UserError, match=r"set train.global_batch_tokens to 3072 or 6144$"):
        loaded.train.micro_batch_size = 8
        gradient_accumulation(loaded, 3)
    with pytest.raises(UserError, match=r"to 3584 or 5376, or train.micro_batch_size to 8 or 16"):
        loaded.train.micro_batch_size = 14
        gradient_accumulation(loaded, 1)


def test_bad_input_exits_with_2_and_one_line(capsys):
    def fail(_):
        raise UserError("x.json: found 1, expected 2")

    with pytest.raises(SystemExit) as stop:
        run_command(fail, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: x.json: found 1, expected 2\n")


def test_help_says_all_of_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(len(line) <= 120 for line in text.splitlines())
    flat = " ".join(text.split())
    for section, cls in SECTIONS.items():
        for f in dataclasses.fields(cls):
            assert f"--{section}.{f.name} {f.metadata['meaning']} (" in flat
    assert "(float, at least 0, at most 1; default 0.1)" in flat and "(list[float]; default [0.9, 0.95])" in flat
    assert (
        "(list of tensorboard | wandb; default [])" in flat
        and "(int or null, at least 1, at most 1048576; default null)" in flat
    )


def test_help_imports_neither_torch_nor_deepspeed():
    code = "import runpy, sys; sys.argv = ['train.py', '--help']\n"
    code += "try: runpy.run_path('train.py', run_name='__main__')\n"
    code += "finally: assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0 and done.stdout.startswith("usage: deepspeed"), done.stderr
    assert run([sys.executable, "train.py", "-h"], RANK="1").stdout == "", "of several ranks the first prints"


def test_a_rank_that_is_alone_with_its_fault_says_so(capsys, monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(commands.time, "sleep", waited.append)
    monkeypatch.setattr(commands.signal, "signal", lambda *_: None)

    def fail(_):
        raise UserError("x.bin: was cut short")

    with pytest.raises(SystemExit) as stop:
        run_command(fail, [])
    assert stop.value.code == 2 and waited == [10], "rank 0 has the first word"
    assert capsys.readouterr().err.endswith("rank 3: error: x.bin: was cut short\n")
