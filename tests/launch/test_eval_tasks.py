"""Benchmarks in training (train.eval_tasks) on two ranks: lm-eval's own numbers, and a run that is the same without."""

import json
import math
from pathlib import Path

import pytest

import eval
import export
from minzero.metrics import read_metrics
from tests.helpers.local_tasks import LAST_LETTER, LETTERS, rows, write_task
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.trained_runs import write_data

SCORES = {"letters": ("acc", "acc_norm", "bits_per_byte"), "last_letter": ("acc", "perplexity", "bits_per_byte")}


def scores_by_step(folder):
    """{step: {key: score}} of a run."""
    lines = [line for line in read_metrics(folder) if "eval_tasks_seconds" in line]
    return {line["step"]: {key: line[key] for key in line if key.startswith("task_")} for line in lines}


def losses(folder):
    lines = [line for line in read_metrics(folder) if {"loss", "val_loss"} & line.keys()]
    return [(line["step"], line.get("loss"), line.get("grad_norm"), line.get("val_loss")) for line in lines]


def scores_of_lm_eval(folder, tasks):
    """lm-eval's scores of transformers' model in a folder by its own `hf`, and the bits per byte of the right answers,
    from the log-probabilities that it records."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = {"task_manager": manager, "device": "cpu", "batch_size": 3, "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate("hf", {"pretrained": str(folder), "dtype": "float32"}, list(SCORES), **settings)
    scores = {}
    for task, metrics in found["results"].items():
        scores |= {f"task_{task}_{key.removesuffix(',none')}": value for key, value in metrics.items() if "," in key}
        nats = size = 0
        for sample in found["samples"][task]:
            right = sample["target"] if task == "letters" else 0
            nats += sample["filtered_resps"][right][0]
            size += len(sample["arguments"][right][1].encode())
        scores[f"task_{task}_bits_per_byte"] = -nats / math.log(2) / size
    return {key: value for key, value in scores.items() if "stderr" not in key}


def test_scores_in_training_are_those_of_lm_eval_and_change_nothing(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_data(tmp_path / "data")
    write_task(tmp_path / "tasks", "letters", LETTERS, rows(13))
    write_task(tmp_path / "tasks", "last_letter", LAST_LETTER, rows(6, seed=2))
    requests = sum(len(row["choices"]) for row in rows(13)) + 6
    assert requests % 4, "an uneven number over 2 ranks of 2 rows"
    assert sum(len(row["question"]) > 40 for row in rows(13)) > 2, "some do not fit into the context"
    done = run(deepspeed_command(Path(__file__).with_name("eval_tasks.py"), tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    # ---- the scores are lm-eval's, on what the run exports, and those of eval.py
    found = scores_by_step(tmp_path / "with")
    keys = {f"task_{task}_{metric}" for task, metrics in SCORES.items() for metric in metrics}
    assert list(found) == [2, 4, 6] and all(set(scores) == keys for scores in found.values())
    assert len({scores["task_letters_bits_per_byte"] for scores in found.values()}) == 3
    export.main([str(tmp_path / "with"), str(tmp_path / "hf")])
    assert found[6] == pytest.approx(scores_of_lm_eval(tmp_path / "hf", tmp_path / "tasks"), rel=1e-5)
    capsys.readouterr()
    flags = ["--tasks", ",".join(SCORES), "--task_path", str(tmp_path / "tasks"), "--checkpoint", "latest"]
    eval.main([str(tmp_path / "with"), *flags, "--json"])
    printed = capsys.readouterr().out
    tasks = json.loads(printed.splitlines()[-1])["tasks"]
    assert found[6] == pytest.approx(
        {key: tasks[task][f"{m},none"] for task, ms in SCORES.items() for m in ms for key in [f"task_{task}_{m}"]},
        rel=1e-5,
    )
    in_words = {line for line in printed.splitlines() if line.startswith("letters: ")}
    in_training = next(line for line in done.stdout.splitlines() if line.startswith("step 6: letters "))
    assert in_words == {in_training.removeprefix("step 6: ").split("; ")[0].replace("letters ", "letters: ")}

    # ---- the run is the same without them, and after a resume
    assert losses(tmp_path / "with") == losses(tmp_path / "without") and len(losses(tmp_path / "with")) == 6 + 3
    assert not scores_by_step(tmp_path / "without")
    assert scores_by_step(tmp_path / "resumed") == {step: found[step] for step in (4, 6)}

    # ---- the other stages, which score at the end alone
    assert "tasks in training: letters (13 examples), last_letter (6 examples)" in done.stdout
    for stage in (0, 1, 2):
        scores = scores_by_step(tmp_path / f"stage_{stage}")
        assert scores[2] == pytest.approx(found[2], rel=1e-4) and len(scores) == 1

    # ---- a fault ends every rank with the same line, before anything is written
    faults = [(tmp_path / f"fault_{rank}").read_text() for rank in (0, 1)]
    assert faults[0] == faults[1] and "train.eval_tasks: 'letter' is neither one of lm-eval's" in faults[0]
    assert "did you mean " in faults[0] and "letters" in faults[0] and not (tmp_path / "refused").exists()

    # ---- loggers
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "with" / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("task_letters_bits_per_byte")}
    assert logged == pytest.approx({step: scores["task_letters_bits_per_byte"] for step, scores in found.items()})
