"""train.init_from gives the keys of the model section that a config leaves out."""

import dataclasses
import json
import shutil
import sys

import pytest

import benchmark
import plan
from minzero.benchmark import benchmark_config
from minzero.config.load import load_config
from minzero.config.sections import ModelConfig
from minzero.errors import UserError
from minzero.hf.families import family_of
from minzero.hf.settings import explicit
from minzero.init_from import model_defaults
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.trained_runs import FAMILIES, LLAMA, PYTHIA, make_folder, write_data, write_run

ALL = FAMILIES | {"pythia": PYTHIA}
GPU = ["--gpus", "1", "--gpu", "4090", "--json"]
FIVES = dataclasses.replace(LLAMA, n_head=5, n_kv_head=5, n_embd=40)  # which the default width does not divide by


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data/, the families' folders in transformers' format without their weights, fives/ and run/, a run of ours."""
    folder = tmp_path_factory.mktemp("init_from")
    data = write_data(folder / "data")
    for name, config in (ALL | {"fives": FIVES}).items():
        make_folder(folder / name, config)
        (folder / name / "model.safetensors").unlink()
    write_run(folder / "run", dataclasses.replace(LLAMA, dropout=0.1), data)
    return folder


def config_file(folder, source, model=None, **train):
    """A config that names the model to start from, and of the model the keys in `model`."""
    path = folder / "config.json"
    sections = {"model": model} if model is not None else {}
    sections["train"] = {
        "init_from": source and str(source),
        "out_dir": str(folder / "out"),
        "global_batch_tokens": 4096,
    } | train
    path.write_text(json.dumps(sections))
    return str(path)


# -- the keys that are left out ------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_config_without_a_model_has_the_published_one(place, tmp_path, name):
    for model in (None, {}, {"block_size": 8}):
        found = load_config([config_file(tmp_path, place / name, model)], model_defaults).model
        expected = dataclasses.replace(ALL[name], block_size=8 if model else 16, init_std=0.02)
        assert explicit(found) == dataclasses.replace(explicit(expected), family=found.family)
        assert family_of(found) == ("gpt_neox" if name == "pythia" else name), "the export's architecture"


def test_the_keys_are_said_in_one_line_by_rank_0(place, tmp_path, capsys, monkeypatch):
    path = config_file(tmp_path, place / "qwen2", {"block_size": 8, "n_layer": 2})
    load_config([path], model_defaults)
    line = capsys.readouterr().err
    source = place / "qwen2"
    assert line.endswith(
        f": model: the keys that the config leaves out are those of {source}: n_head 4, n_kv_head 2, n_embd 32, "
        "vocab_size 270, mlp_hidden 128, bias false, qkv_bias true, norm rmsnorm, position rotary, mlp swiglu\n"
    )
    monkeypatch.setenv("RANK", "1")
    load_config([path], model_defaults)
    assert capsys.readouterr().err == ""


def test_the_line_names_the_losses_of_a_router(place, tmp_path, capsys):
    """Two of them have our defaults, for no published config names them."""
    load_config([config_file(tmp_path, place / "mixtral")], model_defaults)
    balance = f"balance_loss {json.dumps(ALL['mixtral'].balance_loss)}, balance_over layer, router_z_loss 0.001"
    assert balance in capsys.readouterr().err
    path = config_file(tmp_path, place / "mixtral", {"balance_over": "model", "router_z_loss": 0.0})
    load_config([path], model_defaults)
    line = capsys.readouterr().err
    assert "balance_loss" in line and "balance_over" not in line and "router_z_loss" not in line
    load_config([config_file(tmp_path, place / "llama")], model_defaults)
    assert "_loss" not in capsys.readouterr().err


def test_keys_that_fit_only_the_published_model_may_be_given(place, tmp_path):
    """Also where the command line alone names that model."""
    path = config_file(tmp_path, place / "fives", {"n_head": 5, "bias": False})
    assert load_config([path], model_defaults).model.n_embd == 40
    path = config_file(tmp_path, None, {"n_head": 5})
    model = load_config([path, "--train.init_from", str(place / "fives"), "--model.n_embd", "40"], model_defaults).model
    assert (model.n_head, model.n_embd, model.n_layer) == (5, 40, 2)
    with pytest.raises(UserError, match=r"n_head: 5 does not divide model\.n_embd 768"):
        load_config([config_file(tmp_path, None, {"n_head": 5}), "--train.init_from", "null"], model_defaults)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"n_layer": 3}, "model.n_layer: 3, expected 2; set --model.n_layer 2"),
        ({"n_head": 7}, "model.n_head: 7, expected 4; "),
        ({"norm_eps": 1e-3}, "model.norm_eps: 0.001, expected 1e-05"),
        ({"tie_embeddings": False, "mlp": "gelu"}, "set --model.mlp swiglu --model.tie_embeddings true"),
        ({"block_size": 17}, "model.block_size: 17, expected 16"),
    ],
)
@pytest.mark.parametrize("source", ["llama", "run"])
def test_keys_that_are_given_must_agree(place, tmp_path, source, model, expected):
    path = config_file(tmp_path, place / source, model)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        load_config([path], model_defaults)
    assert expected in str(error.value) and str(place / source) in str(error.value)
    flags = [word for name, value in model.items() for word in (f"--model.{name}", json.dumps(value))]
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        plan.main([config_file(tmp_path, place / source), *flags, *GPU])
    assert expected in str(error.value)


def test_a_model_without_biases_may_start_from_a_gpt2(place, tmp_path):
    """Whose biases may all be zero: the weights tell."""
    assert load_config([config_file(tmp_path, place / "gpt2", {"bias": False})], model_defaults).model.bias is False


def test_settings_of_training_are_not_those_of_the_first_run(place, tmp_path):
    model = load_config([config_file(tmp_path, place / "run")], model_defaults).model
    assert model == dataclasses.replace(LLAMA, dropout=0.0, init_std=0.02)
    model = load_config([config_file(tmp_path, place / "run", {"dropout": 0.2, "init_std": 0.1})], model_defaults).model
    assert model == dataclasses.replace(LLAMA, dropout=0.2)


# -- a run that is continued ---------------------------------------------------------------------


def test_a_continued_run_has_its_own_model_and_needs_the_first_no_more(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "out")
    path = config_file(tmp_path, tmp_path / "gone")
    expected = dataclasses.replace(LLAMA, dropout=0.1)
    assert load_config([path], model_defaults).model == expected
    step = tmp_path / "out" / "checkpoints" / "step_00000005"
    assert f"are those of {step}: n_layer 2" in capsys.readouterr().err
    step.rename(step.with_suffix(".old.tmp"))  # a save that was killed as it replaced this checkpoint
    assert load_config([path], model_defaults).model == expected
    arguments = [path, "--train.out_dir", str(tmp_path / "new")]
    assert load_config([*arguments, "--train.resume", str(place / "run")], model_defaults).model == expected
    for refused in (arguments, [path, "--train.resume", "never"]):
        with pytest.raises(UserError, match=rf"^train.init_from: {tmp_path}/gone: no such folder here"):
            load_config(refused, model_defaults)


# -- the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "qwen3", "olmo2", "mistral", "smollm3"])
def test_plan_needs_no_weights(place, tmp_path, name, capsys):
    path = config_file(tmp_path, place / name, {"block_size": 8}, micro_batch_size=2)
    (tmp_path / "whole").mkdir()
    model = dataclasses.asdict(dataclasses.replace(ALL[name], block_size=8))
    whole = config_file(tmp_path / "whole", place / "nowhere", model, init_from=None, micro_batch_size=2)
    for flags in ([], ["--fit"], ["--train.micro_batch_size", "4"]):
        plans = []
        for config in (path, whole):
            plan.main([config, *GPU, *flags])
            plans.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        found, expected = plans
        found.pop("command", None), expected.pop("command", None)  # which names the file
        assert found == expected and found["fits"]


def test_plan_finds_the_deepest_of_the_published_width(place, tmp_path, capsys):
    tiny = ["--gpus", "1", "--gpu", "h100", "--gpu_memory", "0.01", "--max", "--json"]
    plan.main([config_file(tmp_path, place / "llama", {"block_size": 8}), *tiny])
    of_source = json.loads(capsys.readouterr().out.splitlines()[-1])
    own = dataclasses.asdict(dataclasses.replace(LLAMA, block_size=8))
    plan.main([config_file(tmp_path, "", own, init_from=None), *tiny])
    assert of_source["n_layer"] == json.loads(capsys.readouterr().out.splitlines()[-1])["n_layer"] > 2


def test_benchmark_measures_the_published_model(place, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(benchmark, "measure_rows", lambda config, *_: measured.append(config))
    path = config_file(tmp_path, place / "llama", {"block_size": 8}, global_batch_tokens=128)
    with pytest.raises(IndexError):  # of the first of no rows
        benchmark.main([path, "--gpus", "2", "--out", str(tmp_path / "benchmark")])
    (config,) = measured
    of_a_row = benchmark_config(config, tmp_path / "row")
    assert of_a_row.train.init_from is None
    assert explicit(of_a_row.model) == explicit(dataclasses.replace(LLAMA, block_size=8, init_std=0.02))


def test_without_init_from_nothing_heavy_is_imported(place, tmp_path):
    code = "import runpy, sys; sys.argv = ['plan.py', *sys.argv[1:]]\n"
    code += "try: runpy.run_path('plan.py', run_name='__main__')\n"
    code += "finally: print('heavy', sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    plain = run([sys.executable, "-c", code, "configs/tiny.json", *GPU])
    assert plain.returncode == 0 and plain.stdout.endswith("heavy []\n") and plain.stderr == ""
    with_source = run([sys.executable, "-c", code, config_file(tmp_path, place / "llama"), *GPU])
    assert with_source.returncode == 0 and "'transformers'" in with_source.stdout.splitlines()[-1], with_source.stderr
    assert len(with_source.stderr.splitlines()) == 1


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "bert"}, "config.json: model_type: found 'bert', expected one of gpt2, "),
        ({"hidden_act": "gelu"}, "config.json: hidden_act: found 'gelu', expected 'silu'"),
        ({"num_hidden_layers": "many"}, "config.json: not a configuration of llama"),
        ({"num_hidden_layers": 0}, "config.json: model.n_layer: found 0, expected at least 1"),
        ("{", "config.json: line 1"),
        (None, "found neither a config.json of transformers' nor a checkpoint"),
    ],
)
def test_a_folder_that_gives_no_model_is_one_line(place, tmp_path, change, expected):
    folder = shutil.copytree(place / "llama", tmp_path / "copy")
    content = json.loads((folder / "config.json").read_text())
    if change is None:
        (folder / "config.json").unlink()
    else:
        text = change if isinstance(change, str) else json.dumps(content | change)
        (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        load_config([config_file(tmp_path, folder)], model_defaults)
    assert expected in str(error.value) and str(folder) in str(error.value)


def test_faults_of_keys_are_named_together_before_a_model_is_looked_for(place, tmp_path):
    path = config_file(tmp_path, place / "nowhere", {"n_layers": 2, "n_embd": 0}, lr=-1)
    with pytest.raises(UserError) as error:
        load_config([path], model_defaults)
    for part in ("did you mean n_layer?", "model.n_embd: found 0", "train.lr: found -1"):
        assert part in str(error.value)


@pytest.mark.parametrize("fault", ["missing", "model_type"])
def test_all_ranks_end_with_one_line(place, tmp_path, fault):
    folder = tmp_path / "source"
    if fault == "model_type":
        shutil.copytree(place / "llama", folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"model_type": "bert"}))
    done = run(deepspeed_command("train.py", config_file(tmp_path, folder)), timeout=120, HF_HUB_OFFLINE="1")
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    expected = "no such folder here" if fault == "missing" else "model_type: found 'bert'"
    assert done.returncode == 2 and len(lines) == 1 and expected in lines[0], done.stderr[-2000:]
    assert not (tmp_path / "out").exists()


def test_defaults_are_unchanged_by_a_run_that_starts_elsewhere(place, tmp_path):
    load_config([config_file(tmp_path, place / "qwen3")], model_defaults)
    assert load_config([config_file(tmp_path, "", init_from=None)], model_defaults).model == ModelConfig()
