"""state.json of a checkpoint: what it must hold, read and checked field by field.

The file may be damaged or crafted. `read_state` returns it only if every field has a type and value that the code can
use without further checks. Which settings of `config` are allowed is left to the code that trains: a checkpoint may be
of an older version that allowed others.
"""

import json
import math
import os
import re
import zlib
from pathlib import Path

from minzero.config.hints import rename_old_keys
from minzero.config.sections import LoraConfig, TrainConfig
from minzero.errors import UserError
from minzero.files import is_count, is_number, read_json
from minzero.schedule import SHAPES_THE_BATCH, SHAPES_THE_RATE
from minzero.tensor_files import check_size, damaged, fault_of_index, open_plain_file

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # the state of fp16's loss scaler
RANK_FILE = re.compile(r"rank_[0-9]{5,7}\.safetensors")
MOST_STATE_BYTES = 1 << 28  # state.json takes kilobytes
MAY_BE_NULL = ("decay_tokens", "first_batch_tokens")
MOST_NUMBER = 1e300  # a float, far from overflow
# the fields of every version, and their types
FIELDS = dict.fromkeys(("step", "tokens", "optimizer_steps", "world_size", "stage"), int) | {"precision": str}
FIELDS |= dict.fromkeys(("config", "data", "files", "parameters", "tied", "loss_scaler"), dict)


def state_checksum(state):
    """The checksum that state.json keeps of its other fields; it detects a corrupted file that is still JSON."""
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"


def read_state(path, look_at_files=True):
    """state.json of a checkpoint, without its checksum. Fields that are younger than the checkpoint are missing, except
    best_val_loss. look_at_files: also compare the sizes of the checkpoint's files. Raises UserError if something is
    missing, truncated or has an unexpected value."""
    file = Path(path) / "state.json"
    try:
        with open_plain_file(file) as opened:
            size = os.fstat(opened.fileno()).st_size
        if size > MOST_STATE_BYTES:
            raise damaged(file, f"found {size} bytes, expected at most {MOST_STATE_BYTES}")
        state = read_json(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise damaged(file, error.strerror) from None
    except MemoryError:
        raise damaged(file, f"found {size} bytes that no memory here holds as JSON") from None
    for name, kind in FIELDS.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{file}: no {name} ({kind.__name__}); the checkpoint is damaged, use another")
    try:
        right = state.pop("crc32", None) == state_checksum(state)
    except RecursionError:
        raise damaged(file, "nested too deeply") from None
    if not right:
        raise UserError(f"{file}: its checksum is wrong; the checkpoint is damaged, use another")
    if fault := fault_of_state(state):
        raise damaged(file, fault)
    state.setdefault("best_val_loss", None)
    state["config"], _ = rename_old_keys(state["config"], file)
    state["config"]["data"].setdefault("document_mask", False)  # a run that is older than this key had no masks
    if look_at_files:
        for name, entry in state["files"].items():
            check_size(Path(path) / name, entry["bytes"])
    return state


def state_if_whole(path):
    """`read_state` without looking at the checkpoint's files, or None where it raises UserError."""
    try:
        return read_state(path, look_at_files=False)
    except UserError:
        return None


def fault_of_state(state):
    """The first fault in the fields of state.json, whose types are those of FIELDS, in words, or None."""
    files, parameters = state["files"], state["parameters"]
    counts = ("step", "tokens", "optimizer_steps", "save_number")
    rules = [(name, is_count(state.get(name, 0)), "0 or more") for name in counts]
    rules += [  # field, whether it is right, what is expected
        ("world_size", 0 < state["world_size"] <= 10**7, "a number of ranks"),
        ("stage", type(state["stage"]) is int and state["stage"] in range(4), "0 to 3"),
        ("best_val_loss", is_loss(state.get("best_val_loss")), "a number or null"),
        ("val_loss", is_loss(state.get("val_loss")), "a number or null"),
        ("suspect", isinstance(state.get("suspect", False), bool), "true or false"),
        ("versions", isinstance(state.get("versions", {}), dict), "an object"),
        ("files", all(map(RANK_FILE.fullmatch, files)), "names as rank_00000.safetensors"),
        ("files", all(map(is_file_entry, files.values())), "the size and checksum (8 hexadecimal digits) of each"),
        ("parameters", all(map(is_shape, parameters.values())), "shapes"),
        ("tied", all(isinstance(name, str) and name in parameters for name in state["tied"].values()), "parameters"),
        ("loss_scaler", state["loss_scaler"].keys() <= set(SCALER), f"keys among {', '.join(SCALER)}"),
        ("loss_scaler", all(is_number(value, 2.0**100) for value in state["loss_scaler"].values()), "numbers"),
        ("bad_steps", "bad_steps" not in state or is_bad_steps(state["bad_steps"]), "what a run records of them"),
        ("data", is_data(state["data"]), "what a run records of its data"),
        ("config", is_config(state["config"]), "the sections of a run's config"),
        ("config", is_lora(state["config"].get("lora", {})), "a section lora"),
        ("base", not has_adapters(state) or is_base(state.get("base")), "the path and digest of a model"),
        ("branch_of", isinstance(state.get("branch_of", ""), str), "the path of a checkpoint"),
        ("pieces", isinstance(state.get("pieces", {}), dict), "an object"),
    ]
    for name, right, expected in rules:
        if not right:
            return f"{name}: found {str(state.get(name))[:100]}, expected {expected}"
    elements = {name: math.prod(shape) for name, shape in parameters.items()}
    size = sum(entry["bytes"] for entry in files.values())
    if 4 * sum(elements.values()) > size:
        return f"parameters: found {sum(elements.values())} elements, expected at most what {size} bytes of files hold"
    return fault_of_index(state.get("pieces", {}), elements, len(files))


def is_loss(value):
    return value is None or is_number(value, MOST_NUMBER)


def is_shape(value):
    return isinstance(value, list) and all(map(is_count, value))


def is_file_entry(entry):
    if not isinstance(entry, dict) or not is_count(entry.get("bytes")):
        return False
    checksum = entry.get("header_crc32", entry.get("crc32"))
    return isinstance(checksum, str) and re.fullmatch("[0-9a-f]{8}", checksum) is not None


def is_bad_steps(value):
    """Whether it has the form of BadSteps.state()."""
    if not isinstance(value, dict) or not isinstance(value.get("bad"), list):
        return False
    if not is_count(value.get("skipped")) or not is_count(value.get("skipped_in_a_row", 0)):
        return False
    lists = [value.get("loss"), value.get("gradient norm")]
    pairs = all(is_shape(pair) and len(pair) == 2 for pair in value["bad"])
    return pairs and all(isinstance(numbers, list) and all(map(is_number, numbers)) for numbers in lists)


def is_data(value):
    """Whether it has the form of Mixture.fingerprint()."""
    known = {"tokenizer": str | None, "vocab_size": int | None, "tokens": int, "shards": str}
    folders = [entry if isinstance(entry, dict) else {} for entry in value.values()]
    return all("tokenizer" in entry for entry in folders) and all(
        isinstance(entry[name], known[name]) for entry in folders for name in entry.keys() & known.keys()
    )


def is_config(config):
    """Whether it has the sections of a config, names its data, and has numbers where the learning rate needs them."""
    if not all(isinstance(config.get(section), dict) for section in ("model", "data", "train")):
        return False
    path = config["data"].get("path")
    train = config["train"]
    weights = isinstance(path, dict) and path and all(map(is_number, path.values()))
    texts = (train.get(name, "") for name in SHAPES_THE_RATE[:2])
    names = (*SHAPES_THE_RATE[2:], *SHAPES_THE_BATCH)
    numbers = [train[name] for name in names if name in train and not (train[name] is None and name in MAY_BE_NULL)]
    right = all(isinstance(text, str) for text in texts) and all(is_number(n, MOST_NUMBER) for n in numbers)
    return bool(right and (isinstance(path, str) or weights))


def lora_of(state):
    """The LoraConfig that a checkpoint recorded; of older code, that of a run without adapters."""
    return LoraConfig(**state["config"].get("lora", {}))


def is_lora(value):
    """Whether it has the form of a section lora, as far as a checkpoint's weights depend on it."""
    known = set(LoraConfig.__dataclass_fields__)
    if not isinstance(value, dict) or not value.keys() <= known:
        return False
    rank, matrices = value.get("rank"), value.get("matrices", [])
    choices = LoraConfig.__dataclass_fields__["matrices"].metadata["choices"]
    known_matrices = isinstance(matrices, list) and all(matrix in choices for matrix in matrices)
    known_bits = value.get("base_bits") in (None, 4)
    known_rank = rank is None or (is_count(rank) and rank > 0)
    return known_rank and is_number(value.get("alpha", 1)) and known_matrices and known_bits


def has_adapters(state):
    lora = state["config"].get("lora")
    return isinstance(lora, dict) and lora.get("rank") is not None


def is_base(value):
    """Whether it has the form of trained.identity_of."""
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("path", "digest"))


def as_saved(state, names):
    """A TrainConfig with the values that a checkpoint recorded for these keys, even if today's code refuses them. Keys
    that are not named, or are younger than the checkpoint, have their defaults."""
    saved = state["config"]["train"]
    return TrainConfig(**{name: saved[name] for name in names if name in saved})
