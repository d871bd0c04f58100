"""benchmarks/zero.py on two CPU ranks with a tiny model: every row reports, and all compute the same."""

import json
import time

import pytest
import torch

from benchmarks import turns, zero
from minzero.errors import UserError
from tests.helpers.processes import deepspeed_command, run

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[pytest.param("tiny", marks=pytest.mark.slow)])
def out(request, tmp_path_factory):
    """The folder that one round over all rows wrote."""
    folder = tmp_path_factory.mktemp("zero")
    flags = ["--sizes", request.param, "--rounds", "1", "--accumulation", "2", "--precision", "fp32", "--out", folder]
    done = run(deepspeed_command("benchmarks/zero.py", *flags), timeout=280, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_every_row_reports(out):
    results = json.loads((out / "zero.json").read_text())
    found = results["sizes"]["tiny"]
    assert [row["row"] for row in found["rows"]] == list(zero.ROWS)
    assert [row["failed"] for row in found["rows"]] == [None] * len(zero.ROWS)
    for row in found["rows"]:
        assert row["step_seconds"] == row["fastest_seconds"] == row["all_step_seconds"][0]
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["step_seconds"])
        assert (row["micro_batches"], row["tokens_per_step"]) == (2, 2 * 2 * 4 * 32)
        # weights, gradients and moments in float32, halved by two ranks at the least
        assert row["peak_memory_bytes"] > 0.9 * 16 * found["parameters"] / 2
        assert row["ratio"] > 0 and row["ratio_to"] in ("fsdp2_gathered", "fsdp2_whole")
    conditions = results["conditions"]
    assert conditions["ranks"] == 2 and "--sizes tiny" in conditions["command"]
    assert {"torch", "deepspeed", "git", "transformers", "accelerate"} <= set(conditions["versions"])
    assert {"device", "date", "memory", "recompute", "compile"} <= set(conditions)


def test_every_row_computes_the_same(out):
    rows = json.loads((out / "zero.json").read_text())["sizes"]["tiny"]["rows"]
    for row in rows:
        assert len(row["losses"]) == turns.WARMUP + 1
        assert row["losses"] == pytest.approx(rows[0]["losses"], rel=1e-5), row["row"]
        assert row["losses"][-1] < row["losses"][0]
        assert row["losses_agree"]


def test_the_page_has_both_tables(out):
    page = (out / "zero.md").read_text()
    for heading, names in zero.TABLES.items():
        table = page.split(f"## tiny, {heading}\n\n")[1].split("\n\n")[0]
        assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == [
            zero.ROWS[name][0] for name in names
        ]
    assert sorted(name for names in zero.TABLES.values() for name in names) == sorted(zero.ROWS)
    assert "DIFFER" not in page and "fp32" in page


def test_a_row_that_computes_something_else_is_marked():
    results = [
        {"title": "first", "failed": None, "losses": [5.0, 4.0]},
        {"title": "same", "failed": None, "losses": [5.0, 4.0001]},
        {"title": "other", "failed": None, "losses": [5.0, 4.1]},
        {"title": "none", "failed": None, "losses": [5.0, float("nan")]},
        {"title": "failed", "failed": "a reason"},
    ]
    zero.compare_losses(results, 1e-3)
    assert [result.get("losses_agree") for result in results] == [True, True, False, False, None]
    assert ["DIFFER" in result["title"] for result in results] == [False, False, True, True, False]


def test_memory_is_that_of_tensors_alive_and_its_peak():
    meter = turns.Meter(CPU).start()
    kept = torch.ones(2_000_000)
    passing = torch.ones(10_000_000)
    passing += 1
    time.sleep(0.1)  # for the thread that reads
    del passing
    more, most = meter.stop()
    assert more == pytest.approx(kept.nbytes, rel=0.1)
    assert most == pytest.approx(48_000_000, rel=0.1)


def test_a_row_that_fails_keeps_its_reason():
    row = turns.Row("one", CPU)

    def make_step():
        raise UserError("no such thing\nand more")

    row.build(make_step)
    assert row.failed == "UserError: no such thing" and row.step is None
    row.take(1)  # does nothing
    assert row.losses == []
