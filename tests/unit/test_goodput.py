"""Where a run's seconds went, over its starts, and the slowest rank."""

import json
import time

import pytest

from minzero import goodput, report
from minzero.goodput import KINDS, OwnTime, TimeUse, slowest
from minzero.metrics import NUMBERS, goodput_in_words, is_line


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""

    class Clock:
        now = 1000.0

        def time(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(goodput.time, "time", clock.time)
    return clock


def spend(time_use, clock, **seconds):
    for kind, number in seconds.items():
        clock.now += number
        time_use.mark(kind)


def test_the_seconds_add_up_over_restarts_and_lost_steps_are_no_longer_productive(clock):
    first = TimeUse(began=1000.0)
    spend(first, clock, start=20, productive=60, save=5)
    kept = [{"step": 6, "tokens": 6} | first.totals()]
    spend(first, clock, productive=30, evaluation=2)
    status = json.loads(json.dumps({"state": "running"} | first.for_status()))
    assert status["goodput"] == pytest.approx(90 / 117)

    clock.now += 8  # it was killed, perhaps some time after its last line
    second = TimeUse(began=clock.now)
    spend(second, clock, start=15, resume=3)
    second.continue_from(status, kept, 6)
    spend(second, clock, compile=10, productive=50)
    expected = {"productive": 110, "start": 35, "compile": 10, "resume": 3, "evaluation": 2, "save": 5, "lost": 30}
    assert second.seconds == pytest.approx(expected | {"down": 8})
    assert sum(second.seconds.values()) == pytest.approx(clock.now - 1000)
    assert second.goodput() == pytest.approx(110 / 203)

    third = TimeUse(began=clock.now + 7)
    third.continue_from(second.for_status(), [], 0)
    assert third.seconds["productive"] == 0 and third.seconds["lost"] == 140, "nothing was saved"
    assert third.seconds["down"] == 15


def test_what_a_rollback_undoes_was_not_productive(clock):
    found = TimeUse(began=1000.0)
    spend(found, clock, start=20, productive=60)
    found.begin_save()
    spend(found, clock, save=5, productive=30)
    found.roll_back()
    spend(found, clock, lost=2)
    found.roll_back()  # nothing was done since
    assert (found.seconds["productive"], found.seconds["lost"]) == (60, 32)
    later = TimeUse(began=clock.now)
    later.continue_from(found.for_status(), [], 6)
    spend(later, clock, productive=10)
    later.roll_back()
    assert (later.seconds["productive"], later.seconds["lost"]) == (60, 42)


def test_without_status_json_the_log_says_where_the_time_went(clock):
    """As on an empty machine that fetched a copy. How long the run was down is not known."""
    first = TimeUse(began=1000.0)
    spend(first, clock, start=20, productive=60, save=5)
    kept = [{"step": 6, "tokens": 6} | first.totals(), {"step": 7, "tokens": 7} | first.for_step()]
    clock.now += 500
    second = TimeUse(began=clock.now)
    for status in ({}, {"seconds": {"began": 3}}, {"seconds": []}):
        second = TimeUse(began=clock.now)
        second.continue_from(status, json.loads(json.dumps(kept)), 6)
        assert second.seconds == pytest.approx(first.seconds) and second.seconds["down"] == 0
    spend(second, clock, productive=10)
    assert sum(second.seconds.values()) == pytest.approx(95) and second.goodput() == pytest.approx(70 / 95)


def test_a_complete_run_that_is_trained_longer_was_not_down(clock):
    first = TimeUse(began=1000.0)
    spend(first, clock, start=10, productive=90)
    clock.now += 1e6
    second = TimeUse(began=clock.now)
    second.continue_from({"state": "complete"} | first.for_status(), [], 9)
    assert second.seconds["down"] == 0 and second.goodput() == pytest.approx(0.9)
    third = TimeUse(began=clock.now + 5)
    third.continue_from({"state": "running"} | second.for_status(), [], 9)
    assert third.seconds["down"] == pytest.approx(5)


@pytest.mark.parametrize(
    "status",
    [{}, {"seconds": None}, {"seconds": {"began": 5}}, {"seconds": dict.fromkeys(["began", *KINDS], "x")}]
    + [{"seconds": dict.fromkeys(["began", *KINDS], value)} for value in (None, float("nan"), 1e300, True)],
)
def test_a_status_of_older_code_or_a_damaged_one_begins_anew(clock, status):
    found = TimeUse(began=990.0)
    found.continue_from(status, [{"step": 1, "run_productive_seconds": "x"}], 1)
    found.mark("start")
    assert found.seconds == dict.fromkeys(KINDS, 0.0) | {"start": 10.0}


def test_a_clock_that_is_set_back_takes_nothing_away(clock):
    found = TimeUse(began=1000.0)
    spend(found, clock, start=5)
    clock.now -= 100
    found.mark("productive")
    spend(found, clock, productive=7)
    assert found.seconds["start"] == 5 and found.seconds["productive"] == 7


def test_the_line_of_a_checkpoint_says_where_the_time_went(clock):
    found = TimeUse(began=1000.0)
    spend(found, clock, start=100, productive=3600, down=0.2)
    line = {"step": 3, "tokens": 3} | found.totals()
    assert is_line(line) and line.keys() - {"step", "tokens"} <= NUMBERS
    assert goodput_in_words(line) == "97.3% of 1:01:40 (start 1:40)"
    assert report.facts_of_time([{"step": 1}, line, {"step": 4}]) == {"goodput": "97.3% of 1:01:40 (start 1:40)"}
    assert report.facts_of_time([{"step": 1}]) == {}
    assert goodput_in_words({"step": 3}) is None and goodput_in_words({"run_seconds": 5}) == "0.0% of 0:05"


# -- the slowest rank ------------------------------------------------------------------------------


def test_a_rank_is_named_only_if_it_is_clearly_slower_than_the_median():
    usual = [(0.0, 1.0, "node1"), (0.0, 1.05, "node1"), (0.0, 0.95, "node2")]
    nobody = (None, None)
    assert slowest([*usual, (0.0, 1.08, "node2")], 2.0) == nobody
    assert slowest([*usual, (0.0, 1.3, "node2")], 2.0) == (3, "rank 3 on node2 is 30% slower than the median")
    assert slowest([(0.0, 1.5, "a"), (0.0, 1.0, "b")], 1.0) == (0, "rank 0 on a is 50% slower than the median")
    assert slowest([(0.0, 5.0, "a")], 1.0) == nobody and slowest([(0.0, 0.0, "a")] * 2, 1.0) == nobody
    waits_for_data = [(0.1, 1.0, "a"), (0.1, 1.0, "b"), (0.6, 1.0, "c")]
    assert slowest(waits_for_data, 1.1) == (2, "rank 2 on c is 45% slower than the median")


def test_waiting_is_not_a_ranks_own_time():
    import torch

    own = OwnTime(torch.device("cpu"))
    own.start_step()
    time.sleep(0.3)
    _, waited = own.read(0.0)
    own.start_step()
    until = time.perf_counter() + 0.3
    while time.perf_counter() < until:
        pass
    own.end_step()
    until = time.perf_counter() + 0.3
    while time.perf_counter() < until:  # as in an evaluation
        pass
    own.end_step()
    _, worked = own.read(0.0)
    assert waited < 0.1 < 0.25 < worked < 0.5
