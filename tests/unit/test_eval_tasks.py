"""Benchmarks in training (train.eval_tasks): refusals, which answer is right, groups, and the model's part."""

import dataclasses
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from minzero.config.build import build
from minzero.errors import UserError
from minzero.evaluate_tasks import Harness, Requests, Tasks, answer
from minzero.preference import Preference
from model import GPT
from tests.helpers.local_tasks import LAST_LETTER, LETTERS, STORY, rows, write_task
from tests.helpers.trained_runs import GPT2, OF_NO_FAMILY, random_model, write_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("eval_tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "cache"))
        write_data(folder / "data")
        yield folder


def config_of(folder, *tasks, model=GPT2, data="data", **train):
    settings = {"eval_tasks": list(tasks), "eval_tasks_path": str(folder / "tasks")} | train
    parts = {"model": dataclasses.asdict(model), "data": {"path": str(folder / data)}, "train": settings}
    return build(parts, "a config")


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_tasks_every": 5}, "train.eval_tasks_every: found 5 without train.eval_tasks, which it is for; name"),
        ({"eval_tasks_limit": 5}, "train.eval_tasks_limit: found 5 without train.eval_tasks"),
        ({"eval_tasks_path": "x"}, "train.eval_tasks_path: found x without train.eval_tasks"),
        ({"eval_tasks": ["a", "a"]}, 'train.eval_tasks: found ["a", "a"], expected names of tasks, each once'),
        ({"eval_tasks": [""]}, 'train.eval_tasks: found [""], expected names of tasks, each once'),
    ],
)
def test_keys_that_say_nothing_are_refused(settings, expected):
    with pytest.raises(UserError) as error:
        build({"train": settings}, "a config")
    assert expected in str(error.value)


def refused(config):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        Harness(config)
    return str(error.value)


REMEDY = "leave it out of train.eval_tasks, or correct its file or data"
NO_SHOTS = LETTERS.replace("num_fewshot: 1", "num_fewshot: 0")


@pytest.mark.parametrize(
    ("settings", "example", "expected"),
    [
        (NO_SHOTS, {"label": 5}, "example 2: found label 5 with 2 choices, expected 0 to 1"),
        (NO_SHOTS, {"label": -1}, "example 2: found label -1 with 2 choices, expected 0 to 1"),
        (NO_SHOTS, {"choices": ["", "c"]}, "example 2: found an empty answer, choice 0, expected a text"),
        (LETTERS.replace("num_fewshot: 1", "num_fewshot: 9"), {}, "found num_fewshot 9 with 3 examples to show, "),
        (NO_SHOTS.replace("question", "nowhere"), {}, "lm-eval ended with UndefinedError: 'nowhere' is undefined"),
        (LAST_LETTER.replace("choices[0]", "nowhere"), {}, "lm-eval ended with UndefinedError: 'nowhere' is undefined"),
    ],
)
def test_a_fault_of_a_task_file_names_the_task(folder, settings, example, expected, request):
    name = f"fault_{abs(hash(request.node.name))}"
    last = {"question": "a", "choices": ["b", "c"], "label": 0} | example
    write_task(folder / "faults", "good", NO_SHOTS, rows(3))
    write_task(folder / "faults", name, settings, [*rows(2), last])
    found = refused(config_of(folder, "good", name, eval_tasks_path=str(folder / "faults")))
    assert found.startswith(f"train.eval_tasks: {name}: {expected}") and found.endswith(f"; {REMEDY}")


@pytest.mark.parametrize(
    ("text", "expected"), [("", "found nothing"), ("- a", "found a list"), ("a: [b\nc: : d", "ParserError: ")]
)
def test_a_yaml_file_that_cannot_be_read_is_named(folder, text, expected):
    (folder / "unread").mkdir(exist_ok=True)
    file = folder / "unread" / "broken.yaml"
    file.write_text(text)
    found = refused(config_of(folder, "broken", eval_tasks_path=str(folder / "unread")))
    assert found.startswith("train.eval_tasks_path: found no task 'broken'") and f"{file}: {expected}" in found
    found = refused(config_of(folder, str(file), eval_tasks_path=None))
    assert found.startswith(f"train.eval_tasks: {file}: {expected}")


def test_a_yaml_file_of_a_group_is_named(folder):
    """lm-eval takes it by the group's name alone."""
    (folder / "group").mkdir()
    write_task(folder / "group", "story", LETTERS, rows(2))
    file = folder / "group" / "both.yaml"
    file.write_text("group: both\ntask: [story]\n")
    found = refused(config_of(folder, str(file), eval_tasks_path=None))
    assert found.startswith(f"train.eval_tasks: {file}: found a group of tasks, expected one task")
    found = refused(config_of(folder, "none", eval_tasks_path=str(folder / "group")))
    assert found.startswith("train.eval_tasks: 'none' is neither") and "both.yaml" not in found


def test_tasks_that_cannot_be_scored_are_one_line(folder, monkeypatch):
    write_task(folder / "tasks", "story", STORY, rows(2))
    long = [{"question": "a", "choices": ["b", "abc " * 20], "label": 0}]
    write_task(folder / "tasks", "long", LETTERS.replace("num_fewshot: 1", "num_fewshot: 0"), long)
    write_task(folder / "tasks", "gone", LETTERS, rows(2))
    (folder / "tasks" / "gone.jsonl").unlink()
    found = refused(config_of(folder, "story"))
    assert found == (
        "train.eval_tasks: story: found output_type generate_until, expected multiple_choice or loglikelihood; "
        "leave it out, and evaluate it by eval.py --tasks"
    )
    found = refused(config_of(folder, "long"))
    assert found.startswith("train.eval_tasks: long: found an answer of 81 tokens, ' abc abc")
    assert found.endswith(f"expected 1 to 16 (model.block_size); {REMEDY}")
    assert refused(config_of(folder, "gone")).startswith("train.eval_tasks: gone: lm-eval ended with ")
    assert refused(config_of(folder, "long", eval_tasks_path="nowhere")).startswith("train.eval_tasks_path: nowhere: ")
    (folder / "bare").mkdir()
    assert "bare: no meta.json, so the tokenizer" in refused(config_of(folder, "long", data="bare"))
    assert refused(config_of(folder, "long", model=OF_NO_FAMILY)).endswith("; or set it to []")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    expected = 'train.eval_tasks: lm_eval not installed, expected lm-eval; pip install "lm-eval[hf]"'
    assert refused(config_of(folder, "long")) == expected


# -- the scores ----------------------------------------------------------------------------------

PLAIN = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: TARGET
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
# as winogrande: the answers stand in the contexts, and doc_to_text says which is right
INPUTS = """\
output_type: multiple_choice
doc_to_text: "{{label}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{question}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GROUP = """\
group: both
task: [by_number, by_text]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def test_two_tasks_of_one_name_are_refused(folder):
    """lm-eval takes one of them without a word."""
    files = [write_task(folder / place, "same", LETTERS, rows(2)) for place in ("here", "there")]
    assert "found 1 tasks by 2 names" in refused(config_of(folder, *map(str, files), eval_tasks_path=None))


def test_the_right_answer_is_found_in_each_kind_of_task(folder):
    """Each request gets another log-probability, and what follows from these is computed by hand."""
    tasks = folder / "tasks"
    two = [
        {"question": "a", "choices": ["bb", "c"], "label": 1},
        {"question": "b", "choices": ["\u00e9", "x"], "label": 0},
    ]
    write_task(tasks, "by_number", PLAIN.replace("TARGET", '"{{label}}"'), two)
    write_task(tasks, "by_text", PLAIN.replace("TARGET", '"{{choices[label]}}"'), two)
    several = [{"question": "a", "choices": ["bb", "c", "d"], "labels": [0, 2]}]
    write_task(tasks, "several", PLAIN.replace("TARGET", '"{{labels}}"'), several)
    write_task(tasks, "inputs", INPUTS, [{"question": "xyz", "choices": ["a", "b"], "label": 1}])
    write_task(tasks, "last_letter", LAST_LETTER, two)
    (tasks / "both.yaml").write_text(GROUP)
    names = ["by_number", "by_text", "several", "inputs", "last_letter"]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    harness = Harness(config_of(folder, *names))
    counts = [len(task.instances) for task in harness.manager.loaded["tasks"].values()]
    assert counts == [4, 4, 3, 2, 2] and len(harness.requests.lengths) == 15
    for sign in (1, 2):  # a second scoring knows nothing of the first
        answers = [(-sign * (1.0 + number), number % 2 == 0) for number in range(15)]
        found = harness.scores(answers)
        bits = {name: found[name]["bits_per_byte"] * math.log(2) / sign for name in names}
        # " c" and " \u00e9" are right: requests 2 and 3 of each of the first two tasks, with 2 and 3 bytes
        assert bits["by_number"] == pytest.approx((2 + 3) / (2 + 3))
        assert bits["by_text"] == pytest.approx((6 + 7) / (2 + 3))
        assert bits["several"] == pytest.approx(9 / 3), "the likelier of the two right ones, ' bb'"
        assert bits["inputs"] == pytest.approx(13 / 4)
        assert bits["last_letter"] == pytest.approx((14 + 15) / (2 + 2)), "whose answers have no delimiter"
        assert found["by_number"]["acc"] == 0.5 and found["last_letter"]["acc"] == 0.5
        assert set(found["last_letter"]) == {"acc", "perplexity", "bits_per_byte"}
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states

    grouped = Harness(config_of(folder, "both", "inputs", eval_tasks_limit=1))
    assert len(grouped.requests.lengths) == 2 + 2 + 2 and "by_number (1 examples)" in grouped.description()
    found = grouped.scores([(-1.0 - number, False) for number in range(6)])
    assert found.keys() == {"both", "inputs"} and found["both"]["acc"] == 0
    assert found["both"]["bits_per_byte"] * math.log(2) == pytest.approx((2 + 4) / (2 + 2))


def test_scores_that_lm_eval_cannot_make_end_no_run(folder, capsys):
    write_task(folder / "tasks", "words", LAST_LETTER, rows(3))
    harness = Harness(config_of(folder, "words"))
    assert math.isnan(harness.scores([(math.nan, False)] * 3)["words"]["bits_per_byte"])
    engine = Engine(random_model(GPT2))
    assert Tasks(harness.requests, harness).scores(engine, 2, (CPU, 0, 1), lambda: None)["words"]
    with torch.no_grad():
        engine.module.token_embedding.weight *= 1e4
        engine.module.final_norm.weight *= 1e4
    assert Tasks(harness.requests, harness).scores(engine, 2, (CPU, 0, 1), lambda: None) == {}
    assert "train.eval_tasks: no scores: lm-eval ended with OverflowError" in capsys.readouterr().out


# -- the model's part ----------------------------------------------------------------------------


class Engine(nn.Module):
    """As DeepSpeed's: the model is its `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments):
        return self.module(*arguments)


@torch.no_grad()
def test_answers_are_those_of_one_request_at_a_time():
    model = GPT(dataclasses.replace(GPT2, dropout=0.5, init_std=0.5))
    generator = np.random.default_rng(1)
    sizes = [(1, 1), (5, 3), (12, 4), (13, 4), (40, 16), (3, 1), (9, 2)]  # tokens of context and answer
    pairs = [tuple(generator.integers(0, 270, size).tolist() for size in both) for both in sizes]
    likely = model.eval()(torch.tensor([pairs[5][0]]))[0, -1].argmax().item()
    pairs[5] = pairs[5][0], [likely]  # the answer that it would give
    beats = []
    model.train()
    model.preference = Preference("dpo", 0.1)  # as in preference tuning, where answers are scored all the same
    found = answer(Engine(model), Requests.of(pairs, 16), 3, CPU, progress=lambda: beats.append(1))
    assert len(beats) == 3 and model.training and model.preference.take() is None
    model.eval()
    for (context, wanted), (log_probability, hit) in zip(pairs, found, strict=True):
        tokens = torch.tensor([*context, *wanted])[-17:]
        scores = model(tokens[None, :-1])[0, -len(wanted) :].log_softmax(dim=-1)
        expected = scores.gather(1, torch.tensor(wanted)[:, None]).sum().item()
        assert log_probability == pytest.approx(expected, rel=1e-5)
        assert hit == (scores.argmax(dim=-1).tolist() == wanted)
    assert found[5][1] and not found[1][1]
