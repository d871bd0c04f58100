"""Evaluation: the same number however it is computed, transformers' own, and lm-eval's tasks."""

import json
import math
import sys

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import eval
import export
from minzero.data.shards import TokenStream
from minzero.data.tokenizer_files import END_OF_TEXT, PATTERN, byte_ranks, save_tokenizer
from minzero.errors import UserError
from tests.helpers.processes import run
from tests.helpers.trained_runs import FAMILIES, LLAMA, write_data, write_run, write_runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("trained"), FAMILIES)


def evaluated(capsys, *arguments):
    """The JSON object that eval.py prints last."""
    capsys.readouterr()
    eval.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@torch.no_grad()
def loss_of_transformers(folder, stream):
    """Mean cross-entropy of all tokens but the first, window by window, by transformers' model alone."""
    model, nats = AutoModelForCausalLM.from_pretrained(folder).eval(), 0.0
    for start in range(0, stream.tokens - 1, stream.block_size):
        tokens = torch.from_numpy(stream.read(start, min(stream.block_size + 1, stream.tokens - start)))[None]
        nats += F.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:], reduction="sum").item()
    return nats / (stream.tokens - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_transformers_on_the_exported_model(trained, family, capsys):
    result = evaluated(capsys, trained / family)
    stream = TokenStream(trained / "data", "val", 16)
    assert result["val_loss"] == pytest.approx(loss_of_transformers(trained / f"hf_{family}", stream), rel=1e-6)
    assert abs(result["val_loss"] - math.log(270)) > 0.05, "random weights would look the same"
    assert result["tokens"] == stream.tokens - 1 and result["perplexity"] == pytest.approx(math.exp(result["val_loss"]))
    size = stream.meta["splits"]["val"]["bytes"]
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] * result["tokens"] / math.log(2) / size)
    exported = evaluated(capsys, trained / f"hf_{family}", "--data", trained / "data")
    assert exported == pytest.approx(result, rel=1e-6)


def test_the_batch_does_not_change_the_result(trained, capsys):
    one = evaluated(capsys, trained / "gpt_neox")
    for batch_size in (1, 7, 10_000):
        assert evaluated(capsys, trained / "gpt_neox", "--batch_size", batch_size) == pytest.approx(one, rel=1e-7)


def other_tokenizer(folder):
    """A tokenizer of the 256 bytes and one pair."""
    save_tokenizer(folder, byte_ranks() | {b"ab": 256}, {END_OF_TEXT: 257}, PATTERN)
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["hf_llama"], "does not say on what it was trained; give the folder of shards"),
        (["llama", "--data", "other"], "other: found tokenizer "),
        (["llama", "--checkpoint", "7"], "no checkpoint '7'; expected latest, best or one of the steps: 5"),
        (["llama", "--batch_size", "0"], "--batch_size: found 0, expected 1 or more"),
        (["data"], "no complete checkpoint"),
        (["hf_renumbered", "--data", "data"], "of which 2 of 256 tokens differ from"),
        (["hf_broken", "--data", "data"], "hf_broken/tokenizer.json: broken tokenizer ("),
        pytest.param(
            ["llama", "--tasks", "nothing_like_it"],
            "--tasks: 'nothing_like_it' is neither one of lm-eval's nor",
            marks=pytest.mark.slow,
        ),
        (["llama", "--tasks", "x", "--task_path", "gone"], "--task_path: "),
    ],
)
def test_a_model_or_data_that_cannot_be_evaluated_is_one_line(trained, arguments, expected):
    if "nothing_like_it" in arguments or "x" in arguments:
        pytest.importorskip("lm_eval")
    if "other" in arguments and not (trained / "other").exists():
        write_data(trained / "other", other_tokenizer(trained / "tokenizer"))
    if "hf_renumbered" in arguments:
        export.main([str(trained / "llama"), str(trained / "hf_renumbered")])
        tokenizer = json.loads((trained / "hf_renumbered" / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (trained / "hf_renumbered" / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert Tokenizer.from_str(json.dumps(tokenizer)).token_to_id("a") == ord("b")
    if "hf_broken" in arguments:
        export.main([str(trained / "llama"), str(trained / "hf_broken")])
        (trained / "hf_broken" / "tokenizer.json").write_text("{")
    folders = ("llama", "data", "other", "hf_llama", "hf_renumbered", "hf_broken", "gone")
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        eval.main([str(trained / part) if part in folders else part for part in arguments])
    assert expected in str(error.value)


# -- benchmarks ----------------------------------------------------------------------------------

QUESTIONS = [("abc", ["xyz", "a"]), ("x", ["yy", "zz"]), ("cab ", ["c", "abc"]), ("b", ["a", "x"]), ("z", ["x", "c"])]
TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@torch.no_grad()
def most_likely(model, question, choices):
    """Which of the choices the model finds most likely after the question; tokens are bytes."""
    scores = []
    for choice in choices:
        tokens = torch.tensor([list((question + choice).encode())])
        log_probabilities = model(tokens[:, :-1])[0].log_softmax(-1).gather(1, tokens[0, 1:, None])
        scores.append(log_probabilities[len(question) - 1 :].sum().item())
    return scores.index(max(scores))


@pytest.mark.parametrize("how", ["file", "folder"])
def test_tasks_of_lm_eval_run_on_the_model_without_a_network(trained, tmp_path, capsys, monkeypatch, how):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model = write_run(tmp_path / "run", LLAMA, str(trained / "data"))
    best = [most_likely(model, *question) for question in QUESTIONS]
    labels = [best[0], best[1], 1 - best[2], best[3], best[4]]  # 2 of the first 3 are right, 4 of all
    rows = [
        json.dumps({"question": question, "choices": choices, "label": label})
        for (question, choices), label in zip(QUESTIONS, labels, strict=True)
    ]
    (tmp_path / "letters.jsonl").write_text("\n".join(rows))
    (tmp_path / "letters.yaml").write_text(TASK.format(file=tmp_path / "letters.jsonl"))
    if how == "file":
        result = evaluated(capsys, tmp_path / "run", "--tasks", tmp_path / "letters.yaml", "--limit", 3)
        assert result["val_loss"] > 0
    else:
        export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
        result = evaluated(capsys, tmp_path / "hf", "--tasks", "letters", "--task_path", tmp_path)
        assert result["val_loss"] is None, "no data was named"
    assert result["tasks"]["letters"]["acc,none"] == pytest.approx(2 / 3 if how == "file" else 4 / 5)


def test_a_missing_lm_eval_is_one_line(trained):
    """In a process of its own that cannot import it."""
    code = "import sys; sys.modules['lm_eval'] = None; import eval; eval.run_command(eval.main)"
    done = run([sys.executable, "-c", code, trained / "llama", "--tasks", "hellaswag"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert 'lm_eval not installed, expected lm-eval; pip install "lm-eval[hf]"' in done.stderr
