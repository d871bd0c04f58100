"""A run continued from a model whose tokenizer came from tokenizer.json: prepared, trained, sampled, exported."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from minzero.data.pipeline import tokenizer_of
from minzero.metrics import read_metrics
from tests.helpers.data_sets import run as prepare_command
from tests.helpers.foreign_tokenizers import odd_strings, texts, write_all
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.trained_runs import LLAMA, make_folder


@pytest.mark.slow
def test_a_run_continues_a_model_with_its_own_tokenizer(tmp_path):
    write_all(tmp_path / "tokenizers")
    make_folder(tmp_path / "model", dataclasses.replace(LLAMA, block_size=64, vocab_size=1536))
    for path in (tmp_path / "tokenizers" / "llama3").iterdir():
        shutil.copy(path, tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts()):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    for tokenizer, out in (("model", "data"), ("tokenizers/llama2", "other_data")):
        flags = ["--input", tmp_path / "texts" / "*.txt", "--tokenizer", tmp_path / tokenizer, "--out", tmp_path / out]
        done = prepare_command("text", *flags, "--workers", "1", "--val_fraction", "0.2")
        assert done.returncode == 0, done.stderr

    done = run(deepspeed_command(Path(__file__).with_name("start_foreign.py"), tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    warnings = [line for line in done.stdout.splitlines() if "warning: " in line]
    assert len(warnings) == 1 and f"warning: {tmp_path}/other_data: found a tokenizer of which" in warnings[0]
    lines = read_metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] and sum("sample" in line for line in lines) == 2

    for flags in (["--prompt", "def main"], ["--prompt", ""]):
        written = run([sys.executable, "sample.py", tmp_path / "run", *flags, "--tokens", 8])
        assert written.returncode == 0 and written.stdout.startswith(flags[1]) and written.stdout.strip()
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size == 1536
    tokenizer, original = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "model"))
    ours = tokenizer_of(tmp_path / "data")
    for text in odd_strings(200, seed=4):
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
        assert ours.decode(ours.encode_ordinary(text)) == text
