"""Names that are not keys: each entry of the tables leads to a key, and a user of another tool is told which."""

import json

import pytest

from minzero import checkpoint_folder, checkpoint_state
from minzero.config.build import build
from minzero.config.hints import OTHER_NAMES, RENAMED, UNITS, rename_old_keys
from minzero.config.load import load_config
from minzero.config.sections import SECTIONS, Config
from minzero.deepspeed_keys import ACCEPTED
from minzero.errors import UserError

KEYS = {f"{section}.{name}" for section, cls in SECTIONS.items() for name in cls.__dataclass_fields__}
KEYS |= {f"deepspeed.{name}" for name in ACCEPTED}
DEFAULTS = Config().to_dict()


def test_the_tables_name_keys_that_exist():
    assert {*RENAMED.values(), *OTHER_NAMES.values(), *UNITS} <= KEYS
    assert not RENAMED.keys() & KEYS
    assert not OTHER_NAMES.keys() & {key.rpartition(".")[2] for key in KEYS if not key.startswith("deepspeed")}


@pytest.mark.parametrize("name, key", OTHER_NAMES.items())
def test_another_tools_name_is_answered_with_the_key(name, key, tmp_path):
    dashed = name.replace("_", "-")
    for arguments, found in (([f"--{name}", "4"], name), ([f"--{dashed}=4"], dashed)):
        with pytest.raises(UserError) as error:
            load_config(arguments)
        assert str(error.value).startswith(f"--{found}: unknown flag; did you mean --{key}?")
    for section in ("model", "train"):
        with pytest.raises(UserError) as error:
            build({section: {name: 4}}, "x.json")
        assert str(error.value).startswith(f"x.json: unknown key {section}.{name}; did you mean {key}?")
    with pytest.raises(UserError, match=f"^x.json: unknown section '{name}'; did you mean {key}\\?"):
        build({name: 4}, "x.json")


@pytest.mark.parametrize("name", ["max_iters", "warmup-iters", "num_train_epochs", "eval_iters"])
def test_lengths_in_steps_are_answered_with_the_unit(name):
    with pytest.raises(UserError, match="lengths are counted in tokens"):
        load_config([f"--{name}", "4"])


@pytest.mark.parametrize(
    ("flag", "key"),
    [("n_layer", "model.n_layer"), ("n-layer", "model.n_layer"), ("lr", "train.lr"), ("warmup_token", "train.warm")],
)
def test_a_key_without_its_section_is_answered_with_the_section(flag, key):
    with pytest.raises(UserError, match=f"^--{flag}: unknown flag; did you mean --{key}"):
        load_config([f"--{flag}", "4"])


@pytest.mark.parametrize("flag", ["deepspeed", "deepspeed_config", "deepspeed-config"])
def test_a_file_of_deepspeeds_keys_is_answered_with_the_section(flag):
    with pytest.raises(UserError, match=f"^--{flag}: unknown flag; DeepSpeed's keys belong in the section deepspeed"):
        load_config([f"--{flag}", "ds_config.json"])


def test_a_name_that_is_like_none_is_answered_with_how_keys_are_written():
    with pytest.raises(UserError, match=r"^--qqq: unknown flag; keys are written --section\.key value"):
        load_config(["--qqq", "4"])


# -- keys that were renamed ----------------------------------------------------------------------


def other_value(key):
    """A value of a key that is not its default."""
    section, name = key.split(".")
    default = DEFAULTS[section][name]
    return (not default) if isinstance(default, bool) else default + 1


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_an_old_name_of_a_key_still_works_and_says_the_new_one(old, new, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    section, old_name = old.split(".")
    new_name = new.split(".")[1]
    value = other_value(new)
    file = tmp_path / "a.json"
    file.write_text(json.dumps({section: {old_name: value}}))
    for arguments in ([str(file)], [f"--{old}", json.dumps(value)], [str(file), f"--{new}", json.dumps(value)]):
        assert load_config(arguments).to_dict()[section][new_name] == value
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"{old} is now called {new}" in lines[0]
    monkeypatch.setenv("RANK", "1")
    load_config([str(file)])
    assert capsys.readouterr().err == "", "of several ranks the first says it"


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_key_under_both_names_is_refused(old, new, tmp_path):
    section, old_name = old.split(".")
    both = {old_name: other_value(new), new.split(".")[1]: other_value(new)}
    (tmp_path / "a.json").write_text(json.dumps({section: both}))
    fault = f"{old} is the old name of {new}, and both are given; remove {old}"
    with pytest.raises(UserError, match=f"^{tmp_path / 'a.json'}: {fault}$"):
        load_config([str(tmp_path / "a.json")])
    value = json.dumps(other_value(new))
    with pytest.raises(UserError, match=f"^command line: {fault}$"):
        load_config([f"--{old}", value, f"--{new}", value])


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_saved_run_with_an_old_name_is_read_with_the_new_one(old, new, tmp_path, monkeypatch):
    from minzero import curves
    from tests.helpers.trained_runs import GPT2, write_data, write_run

    section, old_name = old.split(".")
    new_name = new.split(".")[1]
    as_it_is_now = Config.to_dict

    def as_it_was(config):
        saved = as_it_is_now(config)
        del saved[section][new_name]
        saved[section][old_name] = other_value(new)
        return saved

    monkeypatch.setattr(Config, "to_dict", as_it_was)
    write_run(tmp_path / "run", GPT2, write_data(tmp_path / "data"))
    assert old_name in json.loads((tmp_path / "run" / "config.json").read_text())[section]
    saved = checkpoint_state.read_state(checkpoint_folder.find(tmp_path / "run"))["config"]
    for config in (saved, curves.read_config(tmp_path / "run")):
        assert config[section][new_name] == other_value(new) and old_name not in config[section]


def test_values_without_sections_pass_unchanged():
    for values in ({}, [], None, {"train": None}, {"train": {"lr": 1}, "versions": 3}):
        assert rename_old_keys(values, "x") == (values, [])


@pytest.mark.parametrize("old", ["checkpoints_on_cpu", "checkpoints-on-cpu", "checkpoint_on_cpu"])
def test_a_former_name_and_one_like_it_are_told_the_new_one(old):
    with pytest.raises(UserError, match=r"did you mean --train\.activation_offload\?"):
        load_config([f"--{old}", "true"])
    with pytest.raises(UserError, match=r"did you mean train\.activation_offload\?"):
        build({"train": {f"{old}_": True}}, "x.json")
