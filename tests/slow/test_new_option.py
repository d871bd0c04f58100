"""docs/model.md, "Add an option to the model", done in a copy of the repository by its words: a key and the few lines
that compute it, and nothing else. What counts or converts models does not know it, and says so."""

import json
import shutil
import subprocess
import sys

import pytest

from minzero.files import ROOT
from minzero.metrics import read_metrics
from tests.helpers.processes import environment
from tests.helpers.trained_runs import write_data

pytestmark = pytest.mark.slow
CHANGES = {
    "minzero/config/model_section.py": [
        (
            "    init_std: float = key(",
            '    input_norm: bool = key(False, "a norm of the embeddings")\n    init_std: float = key(',
        )
    ],
    "model.py": [
        (
            "        self.final_norm = make_norm(config, kernels)\n",
            "        self.final_norm = make_norm(config, kernels)\n"
            "        if config.input_norm:\n"
            "            self.input_norm = make_norm(config, kernels)\n",
        ),
        (
            "        x = F.dropout(x, config.dropout, self.training)\n        routings",
            "        if config.input_norm:\n"
            "            x = self.input_norm(x)\n"
            "        x = F.dropout(x, config.dropout, self.training)\n        routings",
        ),
    ],
}
SETTINGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 270, "bias": False}
SETTINGS |= {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu"}
TRAIN = {"micro_batch_size": 2, "global_batch_tokens": 128, "max_tokens": 512, "eval_tokens": 64, "precision": "fp32"}
NAMED = "model.input_norm: found "


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The changed copy, with data/books and configs plain.json (the option off) and new.json (on)."""
    folder = tmp_path_factory.mktemp("copy") / "repository"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "out", "*.bin", "__pycache__"))
    for name, pairs in CHANGES.items():
        text = (folder / name).read_text()
        for before, after in pairs:
            assert text.count(before) == 1
            text = text.replace(before, after)
        (folder / name).write_text(text)
    write_data(folder / "data" / "books")
    for name, value in (("plain", False), ("new", True)):
        sections = {"model": SETTINGS | {"input_norm": value}, "data": {"path": "data/books"}, "train": TRAIN}
        (folder / f"{name}.json").write_text(json.dumps(sections))
    return folder


def run(copy, code, *command):
    """Run a command in the copy. Returns its output, which is one line where a command of ours is refused."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=copy,
        env=environment(PYTHONPATH=str(copy)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    if code == 2 and command[0] != "-m":
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr
    return done.stdout


def test_an_option_that_only_the_model_knows(copy):
    plain, new = (run(copy, 0, "train.py", f"{name}.json") for name in ("plain", "new"))
    counts = [int(text.split(" parameters, ")[0].split()[-1].replace(",", "")) for text in (plain, new)]
    assert counts[1] == counts[0] + 32, "a norm over 32 channels"
    assert "MFU are null: " + NAMED + "true" in new and "MFU" not in plain
    for line in read_metrics(copy / "out" / "new"):
        assert line.get("tflops") is line.get("mfu") is line.get("hfu") is None
    assert read_metrics(copy / "out" / "plain")[0]["tflops"] > 0
    assert "bits_per_byte" in run(copy, 0, "eval.py", "out/new", "--json")
    asked = ["--prompt", "abc", "--tokens", "5", "--temperature", "0"]
    assert run(copy, 0, "sample.py", "out/new", *asked).startswith("abc")
    # off, the model is a Llama as before
    run(copy, 0, "export.py", "out/plain", "hf/plain")
    assert run(copy, 0, "sample.py", "out/plain", *asked) == run(copy, 0, "sample.py", "hf/plain", *asked)
    # on, it is refused by what does not know it
    assert NAMED + "true, expected false" in run(copy, 2, "export.py", "out/new", "hf/new")
    assert not (copy / "hf" / "new").exists()
    assert NAMED + "true" in run(copy, 2, "plan.py", "new.json", "--gpus", "1", "--gpu_memory", "80")
    assert NAMED + "true" in run(copy, 2, "benchmark.py", "new.json", "--gpus", "1")
    start = ["train.py", "new.json", "--train.out_dir", "out/start", "--train.init_from"]
    for source in ("hf/plain", "out/plain"):
        assert "set --model.input_norm false" in run(copy, 2, *start, source)
    # and without a key of the section, by its parameters
    text = (copy / "model.py").read_text()
    (copy / "model.py").write_text(text.replace("if config.input_norm:", "if True:"))
    try:
        for command in (("export.py", "out/plain", "hf/new"), ("eval.py", "out/plain"), ("sample.py", "out/plain")):
            assert "input_norm.weight: found none, expected [32]" in run(copy, 2, *command)
        output = run(copy, 2, "eval.py", "hf/plain", "--data", "data/books")
        assert "input_norm.weight: found [32], expected none" in output
    finally:
        (copy / "model.py").write_text(text)


def test_the_tests_try_it(copy):
    """In tests of the copy, which nobody has changed: they take the values from the key."""
    for file, names in (("test_model.py", "input_norm and count"), ("test_export.py", "input_norm and every_value")):
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/unit/{file}", "-k", names]
        output = run(copy, 1 if file == "test_model.py" else 0, *command)
        if file == "test_model.py":
            assert "input_norm=True" in output, output
        else:
            assert int(output.split(" passed")[0].split()[-1]) >= 3, "with GPT-2, Llama and others as the base"
    # a number has no values that could be guessed
    config = (copy / "minzero" / "config" / "model_section.py").read_text()
    number = config.replace("    input_norm: bool = key(False,", "    input_norm: float = key(1.5,")
    assert number != config
    (copy / "minzero" / "config" / "model_section.py").write_text(number)
    try:
        output = run(copy, 2, "-m", "pytest", "-q", "tests/unit/test_model.py", "-k", "count")
    finally:
        (copy / "minzero" / "config" / "model_section.py").write_text(config)
    assert "model.input_norm is tested with no value but its default: add others to variants.py" in output
