"""README.md and every page of docs/: their commands as they are written there, shortened by flags where they need a
GPU, a network or hours, and their links, citations and map of the files.

Every line of their code blocks and every command in the table of docs/coming-from.md is either run here, is a selection
of tests that exist, or is named in ELSEWHERE.
"""

import ast
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
from pathlib import Path
from urllib.parse import unquote

import pytest

from minzero.config.load import load_config
from minzero.init_from import model_defaults
from minzero.sizes import count_parameters
from tests.helpers.data_sets import write_parquet
from tests.helpers.processes import ROOT, environment
from tests.helpers.token_files import write_ids, write_megatron
from tests.helpers.trained_runs import GPT2, LLAMA, write_data, write_run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [  # pages whose links are checked, but whose commands belong to other tests
    *PAGES,
    ROOT / "configs" / "README.md",
    ROOT / "benchmarks" / "readme.md",
    *sorted((ROOT / "data").glob("*/readme.md")),
]
ELSEWHERE = {  # command: what runs it, or why nothing can
    "make train": "by hand from a fresh clone: five minutes",
    "make setup && . .venv/bin/activate": "make test begins with it",
    "python eval.py out/tiny --tasks hellaswag,arc_easy --limit 100": "needs a network; test_eval runs a local task",
    "python eval.py out/70b --tasks hellaswag,piqa": "the same",
    "python eval.py out/talks --by_role": "test_eval_chat",
    "python eval.py out/talks --tasks my_task.yaml --chat": "test_eval_chat",
    "python eval.py out/tiny --tasks my_task.yaml": "test_eval",
    "deepspeed --num_gpus 8 eval.py out/70b": "test_launch, on two ranks",
    """deepspeed --num_gpus 8 train.py --train.eval_tasks '["hellaswag", "arc_easy"]' --train.eval_tasks_every 500""": (
        "needs a network; test_eval_tasks has local tasks"
    ),
    """deepspeed --num_gpus 2 train.py configs/tiny.json --train.eval_tasks '["my_task.yaml"]' \
--train.eval_tasks_every 50""": "test_eval_tasks",
    "python to_gguf.py hf/tiny tiny.gguf --llama_cpp llama_cpp_python-*/vendor/llama.cpp": "test_to_gguf",
    "python benchmark.py configs/1p7b.json": "test_benchmark, with a smaller model",
    "python benchmark.py configs/1p7b.json --gpus 8": "the same",
    "python benchmark.py configs/1p7b.json --rows zero3 checkpointing --train.micro_batch_size 4": "the same",
    "python benchmarks/gpu.py --out out/gpu --nanogpt nanoGPT/model.py --data data/openwebtext": "needs a GPU",
    "python benchmarks/gpu.py --out out/gpu --nanogpt nanoGPT/model.py --parts speed planner --minutes 20": "the same",
    "python benchmarks/gpu.py --out out/tiny_gpu --tiny --first 2": "test_gpu_benchmark, a row or two",
    "deepspeed --num_gpus 2 benchmarks/zero.py --out out/zero": "test_zero_benchmark, with a tiny model",
    "deepspeed --num_gpus 8 benchmarks/zero.py --out out/zero --precision bf16 --compile": "the same",
    "python tests/chaos.py": "test_chaos, a shorter form",
    "deepspeed --num_gpus 8 train.py configs/1p5b.json --train.copy_to s3://bucket/1p5b": "test_copies, on two ranks",
    "python sweep.py configs/tiny.json --lr_range": "test_sweep, with a small model",
    "python sweep.py configs/scaling-tiny.json --flops 1e12 3e12 1e13 --predict 4e13 8e13": "the same",
    "python sweep.py out/sweep-scaling-tiny --fit --count flops": "test_scaling, with losses of a known law",
    "python -m minzero.replay out/tiny 120": "test_replay",
    "deepspeed --num_gpus 2 --module minzero.replay out/tiny 120": "the same",
    "python data/recipes/datatrove_minhash.py --input raw --out clean --tasks 8": "by hand: needs datatrove",
    "deepspeed --num_gpus 8 train.py configs/gpt2-124m.json --train.init_from openai-community/gpt2": "needs a network",
    "deepspeed --num_gpus 8 train.py configs/mine.json --train.init_from hf/llama": "test_export, with a small Llama",
}
ELSEWHERE["python plan.py configs/1p5b.json --gpus 8 --measured out/1p5b"] = "test_speed, with a small model's run"
ELSEWHERE |= dict.fromkeys(
    (
        "deepspeed --num_gpus 2 train.py configs/dpo-tiny.json --train.init_from out/talks --data.path data/pairs "
        "--train.out_dir out/dpo",
        "python eval.py out/dpo",
    ),
    "test_preference, with a small model",
)
ELSEWHERE |= dict.fromkeys(
    (
        "deepspeed --num_gpus 2 train.py configs/tiny.json --train.init_from out/tiny --data.path data/talks "
        "--train.lr 1e-3 --train.max_tokens 300000 --train.out_dir out/talks",
        "deepspeed --num_gpus 2 train.py configs/lillm-39m.json --train.init_from out/lillm-39m --data.path data/chat "
        "--train.out_dir out/lillm-chat",
    ),
    "test_parity trains on conversations, test_export starts from weights",
)
ELSEWHERE["deepspeed --num_gpus 8 train.py configs/mine.json --train.init_from hf/llama --data.path data/mine"] = (
    "test_foreign_start, with a small Llama"
)
ELSEWHERE |= dict.fromkeys(
    (
        "python supervise.py deepspeed --num_gpus 8 train.py configs/1p5b.json",
        "python supervise.py --hostfile hosts --nodes 4 deepspeed train.py configs/70b.json",
    ),
    "test_supervised, with a small model",
)
ELSEWHERE |= dict.fromkeys(
    (
        "deepspeed --num_gpus 2 train.py configs/sft-tiny.json",
        "deepspeed --num_gpus 2 train.py configs/dpo-tiny.json",
    ),
    "by hand after make train: minutes; test_sft_trl and test_preference, with small models",
)
CONTINUE = "deepspeed --num_gpus 1 train.py smollm2.json"  # of docs/continue.md
ELSEWHERE |= {
    CONTINUE: "needs a network; test_hf continues small models",
    "python data/fineweb_edu/prepare.py --tokenizer HuggingFaceTB/SmolLM2-135M --out data/old": "needs a network",
    f"{CONTINUE} --train.lr 0 --train.warmup_tokens 0 --train.max_tokens 262144 --train.out_dir out/before": "the same "
    "as the run: test_hf has a rate of zero",
}
ELSEWHERE |= dict.fromkeys(
    (
        "deepspeed --num_gpus 2 train.py configs/tiny.json --train.init_from out/tiny --lora.rank 8 --train.lr 1e-3 "
        "--train.max_tokens 300000 --train.out_dir out/lora",
        "python eval.py out/lora",
        'python sample.py out/lora --prompt "def "',
        "python export.py out/lora out/adapter",
        "python export.py out/lora out/merged --merge",
    ),
    "test_lora, with a small Llama",
)
ELSEWHERE |= dict.fromkeys(
    (
        "deepspeed --num_gpus 8 train.py configs/gpt2-124m.json --train.out_dir out/long --train.schedule wsd "
        "--train.decay_tokens 0 --train.max_tokens 100e9 --train.keep_every 5000",
        "deepspeed --num_gpus 8 train.py configs/gpt2-124m.json --train.out_dir out/branch --train.schedule wsd "
        "--train.resume out/long/checkpoints/step_00020000 --train.max_tokens 12e9 --train.decay_tokens 2e9",
    ),
    "test_schedules, with a small model",
)
SHORT = {  # flags added to a command of train.py
    "train": {"max_tokens": 16 * 128, "global_batch_tokens": 128, "micro_batch_size": 2, "warmup_tokens": 0},
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_kv_head": "null", "block_size": 16, "vocab_size": 270},
    "data": {"path": "data/books"},
}
SHORT["train"] |= {"eval_tokens": 64, "eval_every": 0, "precision": "fp32"}
PUBLISHED = {  # config.json of the models that docs/continue.md continues, without what is not of the model
    "HuggingFaceTB/SmolLM2-135M": {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "Qwen/Qwen2.5-0.5B": {
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
FILES_OF_OTHERS = {"data/pretraining/process.py"}  # named in docs/coming-from.md
LOCAL = "--input books.jsonl --workers 1 --limit 100"  # flags added to a command of data/


# ---- what the pages hold


def blocks(text):
    """Its code blocks as (language, lines). Raises AssertionError if one is not closed."""
    found, language, lines = [], None, []
    for line in text.split("\n"):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, lines = line[3:], []
        else:
            found.append((language, lines))
            language, lines = None, []
    assert language is None, "a code block is not closed"
    return found


def prose(text):
    """The text without its code blocks and its code in lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands():
    """The commands of all pages, in their order, each once and without its comment."""
    lines = [line for page in PAGES for kind, block in blocks(page.read_text()) if not kind for line in block]
    for row in (ROOT / "docs" / "coming-from.md").read_text().split("\n"):
        if row.startswith("|"):
            lines += re.findall("`([^`]+)`", row.rpartition(" | ")[2])
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return list(dict.fromkeys(line for line in found if line.startswith(("make ", "python ", "deepspeed "))))


def is_tests(command):
    """Whether a command only runs tests."""
    return command.startswith("python -m pytest ")


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them: lower case, no punctuation, a dash for each space."""
    headings = re.findall(
        r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    """The relative links and pictures of a page that lead nowhere."""
    text, broken = page.read_text(), []
    links = re.findall(r"\]\(([^)\s]+)\)", prose(re.sub(r"\[`[^`\n]*`\]", "[]", text)))
    links += re.findall(r'<img [^>]*src="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        found = target.exists() and target.is_relative_to(ROOT)
        if found and anchor:
            found = target.suffix == ".md" and anchor in anchors(target.read_text())
        if not found:
            broken.append(link)
    return broken


def defined_in(file):
    """The names of a Python file that a page may cite: `function`, `Class`, `Class.method`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def configs_of_continue():
    """{file: content} of the configs in docs/continue.md."""
    text = (ROOT / "docs" / "continue.md").read_text()
    contents = ["\n".join(lines) for kind, lines in blocks(text) if kind == "json"]
    return dict(zip(("smollm2.json", "qwen2.5.json"), contents, strict=True))


def write_published(folder):
    """The configs of docs/continue.md, and the models that they name, of which nothing but config.json is there."""
    for name, content in configs_of_continue().items():
        (folder / name).write_text(content)
    for name, config in PUBLISHED.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))


# ---- the commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a reader has it: runs, data, books, prompts."""
    folder = tmp_path_factory.mktemp("readme")
    data = write_data(folder / "data/books")
    for name in ("new", "old"):
        shutil.copytree(data, folder / "data" / name)
    write_published(folder)
    for name, config in {
        "before": LLAMA,
        "smollm2": LLAMA,
        "tiny": GPT2,
        "other": LLAMA,
        "mine": GPT2,
        "gpt2-124m": GPT2,
        "70b": GPT2,
        "talks": GPT2,
        "dense": GPT2,
        "experts": GPT2,
        "experts_balanced_over_all": GPT2,
    }.items():
        write_run(folder / "out" / name, config, data, step=10000)
    (folder / "books").mkdir()
    text = "".join(f"Some words of a book, and {number} more of them.\n" for number in range(500))
    (folder / "books" / "one.txt").write_text(text)
    lines = [json.dumps({"text": text[start : start + 200], "title": str(start)}) for start in range(0, 20000, 200)]
    (folder / "books.jsonl").write_text("\n".join(lines))
    (folder / "clean" / "kept").mkdir(parents=True)
    write_parquet(folder / "clean" / "kept" / "000_00000.parquet", [json.loads(line)["text"] for line in lines])
    (folder / "questions.jsonl").write_text(json.dumps({"question": "What do these thirteen words say? " * 3}))
    talk = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Well."}]
    (folder / "talks.jsonl").write_text(json.dumps({"messages": talk, "conversation": talk}) + "\n")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "Red?", "chosen": "Yes.", "rejected": "No."}) + "\n")
    (folder / "prompts.txt").write_text("ab\nxyz\n")
    write_megatron(folder / "my_text_document", [list(b"a document")] * 50)
    for name in ("olmo/part-0.npy", "olmo/part-1.npy", "nanoGPT/data/owt/train.bin", "nanoGPT/data/owt/val.bin"):
        write_ids(folder / name, [*b"a document", 256] * 50)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "benchmarks" / "h100").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/h100/results.json", folder / "benchmarks/h100")
    return folder


def shortened(script, words):
    """The words of a command, with those that make it run here in a second."""
    if script == "train.py" and words != ["--help"]:
        ours = {f"--{section}.{key}": str(value) for section, keys in SHORT.items() for key, value in keys.items()}
        theirs = [word for before, word in pairwise(["", *words]) if not {before, word} & ours.keys()]
        return theirs + [word for pair in ours.items() for word in pair]
    if script == "data/train_tokenizer.py":
        return [*words, *shlex.split(LOCAL.replace("--workers 1 ", "")), "--vocab_size", "300"]
    if script == "data/text/prepare.py":
        return [*words, "--workers", "1", "--tokenizer", "bytes", "--out", f"prepared/{len(words)}_text"]
    if script == "data/chat/prepare.py":
        name = f"prepared/{len(words)}_chat"
        return [*words, "--input", "talks.jsonl", "--workers", "1", "--tokenizer", "bytes", "--out", name]
    if script == "data/preferences/prepare.py":
        name = f"prepared/{len(words)}_pairs"
        return [*words, "--input", "pairs.jsonl", "--workers", "1", "--tokenizer", "bytes", "--out", name]
    if script in ("data/stdlib_chat/prepare.py", "data/stdlib_preferences/prepare.py"):
        return [
            *words,
            "--limit",
            "100",
            "--workers",
            "1",
            "--tokenizer",
            "bytes",
            "--out",
            f"prepared/{len(words)}_{script.split('/')[1]}",
        ]
    if script == "data/convert.py":
        return ["bytes" if before == "--tokenizer" else word for before, word in pairwise(["", *words])]
    if script.startswith("data/"):
        tokenizer = [] if "--tokenizer" in words else ["--tokenizer", "bytes"]
        return [*words, *shlex.split(LOCAL), *tokenizer, "--out", f"prepared/{len(words)}_{script.split('/')[1]}"]
    return words


def takes_long(command):
    return "train.py" in command and "--help" not in command and command not in ELSEWHERE


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.slow) if takes_long(c) else c for c in commands() if not is_tests(c)],
)
def test_a_command_of_the_pages(command, place, monkeypatch):
    if command in ELSEWHERE:
        pytest.skip(ELSEWHERE[command])
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    words = shlex.split(command)
    words = words[words.index("train.py") if words[0] == "deepspeed" else 1 :]  # the launcher's flags are test_launch's
    script, words = words[0], shortened(words[0], words[1:])
    if script == "train.py":
        if words != ["--help"]:
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


@pytest.mark.parametrize("command", [c for c in commands() if is_tests(c)])
def test_a_command_that_runs_tests_finds_some(command):
    words = shlex.split(command)[3:]
    (file,) = [ROOT / word for word in words if word.endswith(".py")]
    wanted = words[words.index("-k") + 1] if "-k" in words else ""
    assert set(words) <= {"-q", "-s", "-k", wanted, str(file.relative_to(ROOT))}
    names = [name for name in defined_in(file) if name.startswith("test_")]
    # the expression is in pytest's own grammar, which is Python's: a word is true of a name that contains it
    selected = [
        name for name in names if eval(re.sub(r"\b(?!and\b|or\b|not\b)(\w+)", rf"('\1' in '{name}')", wanted or "test"))
    ]
    assert selected


# ---- links, citations, claims


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_anchor_exists(page):
    assert not broken_links(page)


def test_the_check_of_links_finds_what_is_broken(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A heading: of `two` words\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](there.md) [b](there.md#a-heading-of-two-words) [c](#top) [d](https://example.org/x) `[e](code)` "
        "[f](gone.md) [g](there.md#no-heading) [h](#bottom) [`i`](gone.py) [j](../outside.md)\n"
        '<img src="gone.png" alt="">\n'
    )
    assert broken_links(page) == ["gone.md", "there.md#no-heading", "#bottom", "gone.py", "../outside.md", "gone.png"]


def test_every_page_of_docs_is_linked_from_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_function_that_a_page_cites_exists(page):
    """Citations are written as `folder/file.py:Class.method`."""
    missing = []
    for name, function in re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text()):
        file = ROOT / name
        if not file.exists() or function not in defined_in(file):
            missing.append(f"{name}:{function}")
    assert not missing


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page):
    names = set(re.findall(r"\b((?:minzero|tests|benchmarks|data)/[\w/]+\.py)\b", page.read_text())) - FILES_OF_OTHERS
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_config_of_readme_is_a_config(tmp_path, capsys):
    (config,) = ["\n".join(lines) for kind, lines in blocks((ROOT / "README.md").read_text()) if kind == "json"]
    path = tmp_path / "config.json"
    path.write_text(config)
    runpy.run_path(str(ROOT / "plan.py"))["main"]([str(path), "--gpus", "1", "--gpu", "h100"])
    assert "fits" in capsys.readouterr().out


def planned(arguments, capsys):
    """What plan.py --json says."""
    runpy.run_path(str(ROOT / "plan.py"))["main"]([*arguments, "--gpus", "1", "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_page_on_continuing_says_what_the_planner_says(tmp_path, monkeypatch, capsys):
    """Its configs, with no weights of the models that they name; and the numbers of these models."""
    write_published(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "continue.md").read_text()
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if ".json` |" in line
    ]
    assert [row[:2] for row in rows] == [[file, card] for file in configs_of_continue() for card in ("4090", "h100")]
    for file, card, allocated, fits, micro_batch in rows:
        arguments = [file, "--gpu", card]
        found = planned(arguments, capsys)
        assert f"{found['gpu_bytes'] / 2**30:.2f} GiB" == allocated and ("yes" if found["fits"] else "no") == fits
        fitting = planned([*arguments, "--fit"], capsys)
        assert fitting["stage"] == 0 and str(fitting["micro_batch_size"]) == micro_batch
    for file, parameters, block_size in (("smollm2", 134_515_008, 8192), ("qwen2.5", 494_032_768, 32768)):
        model = load_config([f"{file}.json"], model_defaults).model
        assert count_parameters(model)[0] == parameters and model.block_size == 2048
        whole = json.loads(configs_of_continue()[f"{file}.json"]) | {"model": {}}
        (tmp_path / "whole.json").write_text(json.dumps(whole))
        assert load_config(["whole.json"], model_defaults).model.block_size == block_size
        assert f"{block_size:,}" in text


def test_the_map_of_the_files_is_complete():
    """The block after "The files" names every command of the root and every file of minzero/, and no other."""
    text = (ROOT / "README.md").read_text()
    lines = blocks(text[text.index("\n## The files") :])[0][1]
    top = set(re.findall(r"\b(\w+\.py)\b", "\n".join(lines)))
    assert top - {"convert.py", "verify.py", "train_tokenizer.py"} == {path.name for path in ROOT.glob("*.py")}
    library = set()
    for line in lines:
        if not line.startswith("  "):
            continue
        names = re.split(r"\s{2,}|:", line.strip())
        folder = names[0].rstrip("/") if names[0].endswith("/") else None
        words = names[1] if folder else names[0]
        library |= {Path(folder or "", word) for word in words.split()}
    files = {path.relative_to(ROOT / "minzero").with_suffix("") for path in (ROOT / "minzero").rglob("*.py")}
    assert library == {file for file in files if file.name != "__init__"}


def test_model_and_loop_are_as_short_as_readme_says():
    limit = int(re.search(r"under (\d+) lines together", (ROOT / "README.md").read_text())[1])
    assert sum(len((ROOT / name).read_text().split("\n")) for name in ("train.py", "model.py")) < limit


def test_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().split("\n")) <= 120
