"""state.json: damaged, or crafted to do harm."""

import json
import os

import pytest

from minzero import checkpoint, resume
from minzero.checkpoint_folder import find
from minzero.checkpoint_state import read_state
from minzero.errors import UserError
from minzero.files import write_json
from minzero.tensor_files import check_sums
from tests.helpers.saved_checkpoints import (
    deep,
    make,
    no_reader_may_hang,  # noqa: F401, a fixture for every test here
    state_of,
    write_state,
)


@pytest.mark.parametrize("content", [{}, [], {"step": 5}, state_of(5, []), state_of("5", {})])
def test_a_damaged_state_is_named(tmp_path, content):
    folder = make(tmp_path, 5)
    write_json(folder / "state.json", content)
    with pytest.raises(UserError, match=r"state.json: no \w+ \(\w+\); the checkpoint is damaged"):
        read_state(folder)


def test_a_wrong_digit_in_the_state_is_detected(tmp_path):
    file = make(tmp_path, 5) / "state.json"
    file.write_text(file.read_text().replace('"step": 5', '"step": 7'))
    with pytest.raises(UserError, match=r"state.json: its checksum is wrong; the checkpoint is damaged"):
        read_state(file.parent)


CRAFTED = [  # key of state.json, value, or a function of the one that is there
    ("step", -1),
    ("step", 2**70),
    ("step", True),
    ("tokens", -5),
    ("optimizer_steps", 1.5),
    ("world_size", 0),
    ("world_size", 10**12),
    ("stage", 7),
    ("stage", False),
    ("precision", 3),
    ("best_val_loss", "low"),
    ("val_loss", [1]),
    ("save_number", -1),
    ("versions", "new"),
    ("suspect", 1),
    ("data", {"data": 3}),
    ("data", {"data": {"tokenizer": 5}}),
    ("loss_scaler", {"cur_scale": "x"}),
    ("loss_scaler", {"__class__": 1}),
    ("bad_steps", []),
    ("bad_steps", {"loss": ["x"], "gradient norm": [], "skipped": 0, "bad": []}),
    ("bad_steps", {"loss": [], "gradient norm": [], "skipped": 0, "bad": [[1]]}),
    ("tied", {"b.weight": "nowhere"}),
    ("tied", {"b.weight": ["a.weight"]}),
    ("parameters", {"a.weight": "2x5"}),
    ("parameters", {"a.weight": [2, -5]}),
    ("parameters", {"a.weight": [2**40, 2**40]}),
    ("parameters", {"a.weight": [2.0, 5]}),
    ("parameters", {"a.weight": None}),
    ("files", lambda files: {"../../../etc/passwd": files["rank_00000.safetensors"]}),
    ("files", lambda files: {"/etc/passwd": files["rank_00000.safetensors"]}),
    ("files", lambda files: {"/dev/zero": {"bytes": 0, "crc32": "00000000"}}),
    ("files", lambda files: {"state.json": files["rank_00000.safetensors"]}),
    ("files", lambda files: dict.fromkeys(files, 3)),
    ("files", lambda files: {name: {"bytes": "many", "crc32": "00000000"} for name in files}),
    ("files", lambda files: {name: {"bytes": -1, "crc32": "00000000"} for name in files}),
    ("files", lambda files: {name: entry | {"header_crc32": 5} for name, entry in files.items()}),
    ("files", lambda files: {name: {"bytes": entry["bytes"]} for name, entry in files.items()}),
    ("pieces", [1]),
    ("pieces", {"a.weight": 5}),
    ("pieces", {"a.weight": [[0, 0, 6]]}),
    ("pieces", {"a.weight": [[0, 0, 10, 10], [1, 6, 4, 4]]}),
    ("pieces", {"a.weight": [[9, 0, 10, 10]]}),
    ("pieces", {"a.weight": [[0, -4, 10, 10]]}),
    ("pieces", {"a.weight": [[0, 0, 1, 2**50]]}),
    ("pieces", {"a.weight": [[0, 0, 0, 10]]}),
    ("pieces", {"z.weight": [[0, 0, 10, 10]]}),
    ("config", {"model": [], "data": {}, "train": {}}),
    ("config", {"model": {}, "data": {"path": 5}, "train": {}}),
    ("config", {"model": {}, "data": {"path": {"a": "b"}}, "train": {}}),
    ("config", lambda config: config | {"train": config["train"] | {"lr": "1e-3"}}),
    ("config", lambda config: config | {"train": config["train"] | {"max_tokens": 10**400}}),
    ("config", lambda config: config | {"train": config["train"] | {"warmup_tokens": None}}),
    ("config", lambda config: config | {"train": config["train"] | {"global_batch_tokens": [1]}}),
    ("config", lambda config: config | {"train": config["train"] | {"schedule": ["cosine"]}}),
    ("config", deep(50)),
]


@pytest.mark.parametrize(("key", "value"), CRAFTED)
def test_every_field_of_the_state_is_checked_before_it_is_used(tmp_path, key, value):
    """With a right checksum of its own, as one who means harm would write it."""
    folder = make(tmp_path, 5)
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    state[key] = value(state[key]) if callable(value) else value
    write_state(folder, state)
    for read in (read_state, checkpoint.open_weights):
        with pytest.raises(UserError, match=rf"^{folder}/state.json: (no )?{key}") as error:
            read(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert find(folder) == folder and find(tmp_path) == folder
    with pytest.raises(UserError, match="no checkpoint of this run is whole"):
        resume.newest_usable(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"\xff\xfe", b'{"a": 1, "a": 2}']
)
def test_a_state_that_is_hard_to_read_is_named(tmp_path, content):
    folder = make(tmp_path, 5)
    (folder / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json: [^\n]+$"):
        checkpoint.open_weights(folder)


@pytest.mark.parametrize("what", ["pipe", "link", "link to a device", "folder", "huge"])
@pytest.mark.parametrize("file", ["rank_00001.safetensors", "state.json"])
def test_only_plain_files_of_the_checkpoint_are_opened(tmp_path, file, what):
    folder = make(tmp_path, 5)
    path = folder / file
    size = path.stat().st_size
    path.rename(tmp_path / "elsewhere")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to(tmp_path / "elsewhere" if what == "link" else "/dev/zero")
    for read in (read_state, checkpoint.open_weights):
        with pytest.raises(UserError, match=rf"{file}: [^\n]+$"):
            read(folder)
    if file != "state.json":
        with pytest.raises(UserError, match=rf"{file}: [^\n]+$"):
            check_sums(folder, {file: {"bytes": size, "header_crc32": "00000000"}})
