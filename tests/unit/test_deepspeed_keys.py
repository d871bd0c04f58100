"""deepspeed_keys.py against DeepSpeed itself, and what train.py and plan.py say to each key."""

import json
import typing

import pytest
from deepspeed.runtime import config as theirs
from deepspeed.runtime import precision_config
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.constants import BUFFER_DTYPE, GRAD_ACCUM_DTYPE, KEEP_IN_FP32_MODULES, PARAM_DTYPE
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero import config as zero_config
from deepspeed.runtime.zero import offload_config

from minzero.config.auto import AUTO
from minzero.config.build import build
from minzero.config.load import load_config
from minzero.config.nested import merge
from minzero.deepspeed_keys import ACCEPTED, DERIVED_KEYS, REFUSED, SECTIONS
from minzero.errors import UserError
from minzero.files import ROOT
from minzero.planner.gpus import Hardware
from minzero.planner.settings import settings_of
from minzero.planner.stage import with_chosen_stage

EVERY_KEY = {**ACCEPTED, **REFUSED, **dict.fromkeys(DERIVED_KEYS)}


def nested(key, value):
    """a.b.c -> {a: {b: {c: value}}}"""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def build_with(deepspeed, **train):
    return build({"train": train, "deepspeed": deepspeed}, "x.json")


class Recorder(dict):
    """A dictionary that remembers what was looked up in it."""

    def __init__(self, content, asked):
        super().__init__(content)
        self.asked = asked

    def __copy__(self):
        return Recorder(self, self.asked)

    def __contains__(self, name):
        self.asked.add(name)
        return super().__contains__(name)

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.asked.add(name)
        return super().get(name, default)

    def keys(self):
        return self


def names_of(model, prefix):
    """The keys of one of DeepSpeed's pydantic models, under both names where a field has an alias."""
    names = set(model.model_fields)
    names |= {field.alias for field in model.model_fields.values() if field.alias}
    return {f"{prefix}.{name}" for name in names} - SECTIONS


def test_the_names_are_those_that_deepspeed_knows():
    """A DeepSpeed with another key, or without one of these, fails here: look whether the new one keeps the layout."""
    asked = set()
    DeepSpeedConfig(Recorder({"train_micro_batch_size_per_gpu": 1}, asked))
    top = {key for key in EVERY_KEY if "." not in key} | {section for section in SECTIONS if "." not in section}
    # of these initialize asks before it makes a DeepSpeedConfig
    assert top == asked | {"sequence_parallel_size", "data_parallel_size"}
    assert set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED)
    removed = {f"zero_optimization.{name}" for name in theirs._REMOVED_ZERO_CONFIG_KEYS}
    found = names_of(zero_config.DeepSpeedZeroConfig, "zero_optimization") | removed
    found |= names_of(offload_config.DeepSpeedZeroOffloadOptimizerConfig, "zero_optimization.offload_optimizer")
    found |= names_of(offload_config.DeepSpeedZeroOffloadParamConfig, "zero_optimization.offload_param")
    found |= names_of(precision_config.DeepSpeedFP16Config, "fp16")
    found |= names_of(precision_config.DeepSpeedBF16Config, "bf16")
    found |= names_of(theirs.DeepSpeedCommsConfig.__init__.__globals__["CommsLoggerConfig"], "comms_logger")
    found |= {f"aio.{name}" for name in AIO_DEFAULT_DICT}
    found |= {f"data_types.{name}" for name in (GRAD_ACCUM_DTYPE, PARAM_DTYPE, BUFFER_DTYPE, KEEP_IN_FP32_MODULES)}
    assert {key for key in EVERY_KEY if "." in key} == found


def deepspeeds_default(key):
    section, _, name = key.rpartition(".")
    models = {
        "fp16": precision_config.DeepSpeedFP16Config,
        "bf16": precision_config.DeepSpeedBF16Config,
        "zero_optimization": zero_config.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
    }
    if section not in models:
        return None
    fields = models[section].model_fields
    return next(field for own, field in fields.items() if name in (own, field.alias)).default


@pytest.mark.parametrize("key", [key for key in ACCEPTED if key.split(".")[0] in ("fp16", "zero_optimization")])
def test_defaults_are_deepspeeds(key):
    assert ACCEPTED[key].default == deepspeeds_default(key)


@pytest.mark.parametrize("key", [key for key in REFUSED if REFUSED[key].unused and "." in key])
def test_what_is_accepted_of_a_refused_key_is_deepspeeds_default(key):
    if (default := deepspeeds_default(key)) is not None:
        assert default in REFUSED[key].unused or key.endswith("leaf_module")


def values_for(key):
    """Values that such a key may take, and some that it may not."""
    kind, default, _, choices, minimum, maximum = ACCEPTED[key]
    good, bad = [default], [{"a": 1}, [[1]], 10**400, float("nan"), "no such word"]
    if choices:
        good += choices
    elif bool in (kind, *typing.get_args(kind)):
        good, bad = [default, True, False], [*bad, 1, "true", 0.5]
    elif kind in (int, float):
        good += [minimum, maximum, float(minimum)]
        bad += [minimum - 1, maximum * 2 + 1, -1, True, "1", None] + ([minimum + 0.5] if kind is int else [])
    elif kind == list[str]:
        good, bad = [*good, ["all_reduce"]], [*bad, "all_reduce", 3]
    else:  # a path
        good, bad = [*good, "/local/nvme"], [{"a": 1}, 3, True, "a\0b", "\ud800", "n" * 300]
    if "stage" not in key:  # what it is good for depends on the stage
        bad = [value for value in bad if value is not None or default is not None]
    return good, bad


@pytest.mark.parametrize("key", ACCEPTED)
def test_values_of_accepted_keys_have_the_right_type_and_range(key):
    good, bad = values_for(key)
    stage = {"zero_optimization": {"stage": 3, "offload_optimizer": {"nvme_path": "x"}}}
    stage["zero_optimization"]["offload_param"] = {"nvme_path": "x"}
    stage["zero_optimization"]["offload_optimizer"]["device"] = "cpu"
    for value in good:
        precision = value if key == "data_types.grad_accum_dtype" and value else "bf16"
        if key == "zero_optimization.stage" and value < 3:
            stage = {}
        if key == "fp16.min_loss_scale" and value == 2**32:
            stage = {"fp16": {"initial_scale_power": 32}}
        if key == "fp16.initial_scale_power" or key.endswith("offload_optimizer.device"):
            stage["zero_optimization"]["offload_optimizer"].pop("device", None)
        built = build_with(merge(stage, nested(key, value)), precision=precision)
        for name in key.split("."):
            built = built.deepspeed[name] if hasattr(built, "deepspeed") else built[name]
        assert built == value and (built is value or type(built) is not bool)
        assert isinstance(built, int) if ACCEPTED[key].kind is int else True
    for value in bad:
        with pytest.raises(UserError, match=rf"^x\.json: deepspeed\.{key}: ") as error:
            build_with(nested(key, value))
        message = str(error.value)
        assert "\n" not in message and len(message) < 500 and ("expected" in message or "longer than" in message)


@pytest.mark.parametrize("key", REFUSED)
def test_refused_keys_name_the_key_what_was_found_why_and_the_remedy(key):
    for value in (True, 7, "x", {"enabled": True}, {"enabled": False, "more": 1}, [1]):
        if json.dumps(value) in map(json.dumps, REFUSED[key].unused):
            continue
        with pytest.raises(UserError) as error:
            build_with(nested(key, value))
        start = f"x.json: deepspeed.{key}: found {json.dumps(value)}, not supported: {REFUSED[key].why}; remove it"
        assert str(error.value).startswith(start)
    for value in REFUSED[key].unused:  # accepted, and not handed to DeepSpeed
        assert key.rpartition(".")[2] not in json.dumps(build_with(nested(key, value)).deepspeed)


def test_mics_is_said_to_be_removed():
    with pytest.raises(UserError, match=r"mics_shard_size: found 8, not supported: DeepSpeed removed it \(MiCS\)"):
        build_with({"zero_optimization": {"stage": 3, "mics_shard_size": 8}})


@pytest.mark.parametrize("key", DERIVED_KEYS)
def test_keys_that_follow_from_ours_are_refused_but_for_auto(key):
    for value in (1, True, {"type": "SGD"}, None):
        with pytest.raises(UserError) as error:
            build_with(nested(key, value))
        assert str(error.value) == f"x.json: deepspeed.{key} follows from {DERIVED_KEYS[key]}; set that and remove this"
    assert key.rpartition(".")[2] not in json.dumps(build_with(nested(key, "auto")).deepspeed)


@pytest.mark.parametrize(
    ("deepspeed", "expected"),
    [
        ({"zero_optimization": {"stag": 3}}, "unknown key deepspeed.zero_optimization.stag; did you mean stage?"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "did you mean device?"),
        ({"zero_optimization.stage": 3}, "unknown key deepspeed.zero_optimization.stage;"),
        ({"zero_optimization": {"offload_param": "cpu"}}, 'offload_param: found "cpu", expected an object'),
        ({"zero_optimization": True}, "deepspeed.zero_optimization: found true, expected an object"),
        ({"fp16": None}, "deepspeed.fp16: found null, expected an object"),
        ({"aio": {"thread_count": 1}}, "unknown key deepspeed.aio.thread_count"),
        ({"a\nb": 1}, "unknown key deepspeed.a\\nb"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "found cpu at stage 2, expected stage 3",
        ),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "expected stage 1 or 2 or 3"),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}},
            "grad_accum_dtype: found fp32 at stage 0 with train.precision auto",
        ),
        ({"fp16": {"initial_scale_power": 3, "min_loss_scale": 16}}, "found 16, expected at most the first scale, 8"),
    ],
)
def test_faults_of_the_section_are_one_line(deepspeed, expected):
    with pytest.raises(UserError) as error:
        build_with(deepspeed)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_all_faults_are_in_one_answer():
    with pytest.raises(UserError) as error:
        build(
            {"model": {"n_layer": 0, "n_heads": 2}, "train": {"eps": 0}, "deepspeed": {"amp": {}, "fp16": 1}}, "x.json"
        )
    message = str(error.value)
    for part in ("x.json: model.n_layer: found 0", "n_heads", "train.eps: found 0", "deepspeed.amp", "deepspeed.fp16"):
        assert part in message
    assert "\n" not in message


HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_a_config_of_hugging_faces_trainer_is_taken(tmp_path):
    (tmp_path / "hf.json").write_text(json.dumps({"deepspeed": HUGGING_FACE}))
    found = load_config([str(tmp_path / "hf.json"), "--model.n_embd", "1000", "--model.n_head", "10"])
    assert found.deepspeed["zero_optimization"]["reduce_bucket_size"] == "auto"
    assert "train_batch_size" not in found.deepspeed and "enabled" not in found.deepspeed["fp16"]
    settings = settings_of(found, 8, 80 * 2**30)
    block = 12 * 1000**2 + 13 * 1000
    assert settings.prefetch_bucket_size == int(0.98 * 12 * 1000**2) and settings.reduce_bucket_size == block


@pytest.mark.parametrize("key", [key for key in ACCEPTED if key not in AUTO])
def test_other_keys_may_not_be_auto(key):
    if ACCEPTED[key].kind in (str | None, list[str]) and not ACCEPTED[key].choices:
        return  # a folder may be called that
    with pytest.raises(UserError, match=r'found "auto", expected .*; only data_types\.grad_accum_dtype'):
        build_with(nested(key, "auto"))


@pytest.mark.parametrize("key", EVERY_KEY)
def test_the_planner_takes_the_same_keys_as_a_run(key, tmp_path):
    """Both read a configuration by load_config; the planner has no other opinion of what it lets through."""
    for value in (True, 0, 1, 5e7, "fp32", "cpu", "auto", {"enabled": False}):
        try:
            found = load_config([f"--deepspeed.{key}={json.dumps(value)}"])
        except UserError:
            continue
        found = with_chosen_stage(found, Hardware(8, 1, 80 * 2**30))
        assert settings_of(found, 8, None).stage in (0, 1, 2, 3)


def test_a_key_that_deepspeed_passes_over_reaches_it_from_nowhere():
    for path in (ROOT / "ds_config.json", *(ROOT / "configs").glob("*.json")):
        content = json.loads(path.read_text())
        section = content if path.name == "ds_config.json" else content.get("deepspeed", {})
        assert build_with(section).deepspeed == section
