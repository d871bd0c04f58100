"""README's commands, as they are written there, shortened by flags where they need a GPU, a network or hours.

Every line of its code blocks and every command in its table "Coming from" is either run here or named in ELSEWHERE.
"""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest

from minzero.files import ROOT
from tests.conftest import environment
from tests.trained_runs import GPT2, LLAMA, write_data, write_run

ELSEWHERE = {  # command: what runs it, or why nothing can
    "make train": "by hand from a fresh clone: five minutes",
    "make setup && . .venv/bin/activate": "make test begins with it",
    "python eval.py out/tiny --tasks hellaswag,arc_easy --limit 100": "needs a network; test_eval runs a local task",
    "python eval.py out/70b --tasks hellaswag,piqa": "the same",
    "python eval.py out/tiny --tasks my_task.yaml": "test_eval",
    "deepspeed --num_gpus 8 eval.py out/70b": "test_eval, on two ranks",
    "python to_gguf.py hf/tiny tiny.gguf --llama_cpp llama_cpp_python-*/vendor/llama.cpp": "test_to_gguf",
    "python benchmark.py configs/1p7b.json": "test_benchmark, with a smaller model",
    "python benchmark.py configs/1p7b.json --gpus 8": "the same",
    "python benchmark.py configs/1p7b.json --rows zero3 checkpointing --train.micro_batch_size 4": "the same",
    "python benchmarks/gpu.py --out out/gpu --nanogpt nanoGPT/model.py --data data/openwebtext": "needs a GPU",
    "python benchmarks/gpu.py --out out/gpu --nanogpt nanoGPT/model.py --parts speed planner --minutes 20": "the same",
    "python benchmarks/gpu.py --out out/tiny_gpu --tiny --first 2": "test_gpu_benchmark, a row or two",
    "deepspeed --num_gpus 8 train.py configs/gpt2-124m.json --train.init_from openai-community/gpt2": "needs a network",
    "deepspeed --num_gpus 8 train.py configs/mine.json --train.init_from hf/llama": "test_export, with a small Llama",
}
ELSEWHERE |= dict.fromkeys(
    (
        "deepspeed --num_gpus 2 train.py configs/tiny.json --train.init_from out/tiny --data.path data/talks "
        "--train.lr 1e-3 --train.max_tokens 300000 --train.out_dir out/talks",
        "deepspeed --num_gpus 2 train.py configs/lillm-39m.json --train.init_from out/lillm-39m --data.path data/chat "
        "--train.out_dir out/lillm-chat",
    ),
    "test_parity trains on conversations, test_export starts from weights",
)
SHORT = {  # over what a command of train.py says
    "train": {"max_tokens": 16 * 128, "global_batch_tokens": 128, "micro_batch_size": 2, "warmup_tokens": 0},
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_kv_head": "null", "block_size": 16, "vocab_size": 270},
    "data": {"path": "data/books"},
}
SHORT["train"] |= {"eval_tokens": 64, "eval_every": 0, "precision": "fp32"}
LOCAL = "--input books.jsonl --workers 1 --limit 100"  # behind what a command of data/ says


def lines_of_code(text):
    """The lines of its code blocks in no language."""
    language = None
    for line in text.split("\n"):
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language == "":
            yield line


def commands():
    """README's commands, in its order, each once and without its comment."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("\n## Coming from") :]
    rows = table[: table.index("\n## ", 5)].split("\n")
    lines = [
        *lines_of_code(text),
        *(part for row in rows for part in re.findall("`([^`]+)`", row.rpartition(" | ")[2])),
    ]
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return list(dict.fromkeys(line for line in found if line.startswith(("make ", "python ", "deepspeed "))))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as README's reader has it: runs, data, books, prompts."""
    folder = tmp_path_factory.mktemp("readme")
    data = write_data(folder / "data/books")
    for name, config in {
        "tiny": GPT2,
        "other": LLAMA,
        "mine": GPT2,
        "gpt2-124m": GPT2,
        "70b": GPT2,
        "talks": GPT2,
    }.items():
        write_run(folder / "out" / name, config, data, step=10000)
    (folder / "books").mkdir()
    text = "".join(f"Some words of a book, and {number} more of them.\n" for number in range(500))
    (folder / "books" / "one.txt").write_text(text)
    lines = [json.dumps({"text": text[start : start + 200], "title": str(start)}) for start in range(0, 20000, 200)]
    (folder / "books.jsonl").write_text("\n".join(lines))
    talk = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Well."}]
    (folder / "talks.jsonl").write_text(json.dumps({"messages": talk, "conversation": talk}) + "\n")
    (folder / "prompts.txt").write_text("ab\nxyz\n")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def shortened(script, words):
    """The words of a command, with those that make it run here in a second."""
    if script == "train.py":
        ours = {f"--{section}.{key}": str(value) for section, keys in SHORT.items() for key, value in keys.items()}
        theirs = [word for before, word in pairwise(["", *words]) if not {before, word} & ours.keys()]
        return theirs + [word for pair in ours.items() for word in pair]
    if script == "data/train_tokenizer.py":
        return [*words, *shlex.split(LOCAL.replace("--workers 1 ", "")), "--vocab_size", "300"]
    if script == "data/text/prepare.py":
        return [*words, "--workers", "1", "--tokenizer", "bytes", "--out", "prepared/text"]
    if script == "data/chat/prepare.py":
        name = f"prepared/{len(words)}_chat"
        return [*words, "--input", "talks.jsonl", "--workers", "1", "--tokenizer", "bytes", "--out", name]
    if script.startswith("data/"):
        tokenizer = [] if "--tokenizer" in words else ["--tokenizer", "bytes"]
        return [*words, *shlex.split(LOCAL), *tokenizer, "--out", f"prepared/{len(words)}_{script.split('/')[1]}"]
    return words


def takes_long(command):
    return "train.py" in command and command not in ELSEWHERE


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow) if takes_long(c) else c for c in commands()]
)
def test_a_command_of_readme(command, place, monkeypatch):
    if command in ELSEWHERE:
        pytest.skip(ELSEWHERE[command])
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    words = shlex.split(command)
    words = words[words.index("train.py") if words[0] == "deepspeed" else 1 :]  # the launcher's flags are test_launch's
    script, words = words[0], shortened(words[0], words[1:])
    if script == "train.py":
        words += ["--train.out_dir", f"trained/{re.sub(r'[^a-z0-9]+', '_', command)}"]
        # in a process of its own: DeepSpeed changes torch for good
        done = subprocess.run(
            [sys.executable, ROOT / script, *words], env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))  # a prompt, for sample.py without one
    if script == "export.py":
        shutil.rmtree(words[1], ignore_errors=True)
    runpy.run_path(str(ROOT / script))["main"](words)


def test_nothing_is_excused_that_is_not_there():
    assert set(ELSEWHERE) <= set(commands())
