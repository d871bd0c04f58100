"""What rank 0 and another rank do at 8, 64 and 512 ranks, counted by benchmarks/many_ranks.py: nothing grows faster
than the ranks on rank 0, and nothing but a few bytes elsewhere."""

import dataclasses

import pytest

from benchmarks.many_ranks import PARTS, measured
from minzero import checkpoint, dist
from minzero.config.load import load_config

RANKS = 8, 64, 512
NAMES = [f"blocks.{number}.weight" for number in range(10)]
COUNTED = "opens", "stats", "fsyncs", "messages", "received_bytes", "requests", "request_bytes"
FILE = 80  # bytes of a file's name, size and checksum in a message
NUMBERS = 16  # bytes of a rank's two numbers in a line of the log


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{number of ranks: `measured`}."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.setenv(name, "0")
        config = load_config(["configs/tiny.json"])
        return {ranks: measured(ranks, config, NAMES, tmp_path_factory.mktemp("run"), patch.setattr) for ranks in RANKS}


def counts_of(found, part, place):
    """{name of a count: its values at 8, 64 and 512 ranks}."""
    every = [dataclasses.asdict(found[ranks][part][place]) for ranks in RANKS]
    return {name: [counts[name] for counts in every] for name in COUNTED}


@pytest.mark.parametrize("part", [*PARTS, "all weights"])
def test_nothing_grows_faster_than_the_ranks_on_rank_0(found, part):
    for name, (few, more, most) in counts_of(found, part, 0).items():
        grew = (RANKS[2] - RANKS[1]) / (RANKS[1] - RANKS[0])
        digits = 20 if name.endswith("bytes") else 0  # of longer numbers in messages; names of ranks are longer as well
        assert most - more <= 1.25 * grew * max(0, more - few) + digits, (name, few, more, most)


@pytest.mark.parametrize("part", PARTS)
def test_another_rank_opens_and_asks_for_the_same_at_any_number_of_ranks(found, part):
    counts = counts_of(found, part, 1)
    for name in ("opens", "stats", "fsyncs"):
        assert len(set(counts[name])) == 1, (name, counts[name])
    assert counts["requests"][0] >= counts["requests"][2] - 1
    few, more, most = counts["messages"]
    merging = 3 if part == "a save" else 0  # messages for each doubling of the ranks
    assert few == more == most or (merging and most - more <= 3 * merging), counts["messages"]
    assert counts["opens"][0] <= 2, "its own file: to verify it, and to load it"


@pytest.mark.parametrize("part", PARTS)
def test_another_rank_receives_a_few_bytes_a_rank_at_most(found, part):
    _, more, most = counts_of(found, part, 1)["received_bytes"]
    index = 3 * 60 * len(NAMES)  # of the parameters, in each message of a merge; three doublings
    a_rank = {"a save": FILE, "a resume": FILE, "a line of the log": NUMBERS}.get(part, 0)
    assert most - more <= a_rank * (RANKS[2] - RANKS[1]) + 20 + (3 * index if part == "a save" else 0)


def test_what_each_rank_gathers_from_all_is_seen(found, tmp_path, monkeypatch):
    """The counts can fail: a verdict for which every rank received the words of all."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(checkpoint, "fault_of", lambda *_: dist.gather(None)[0])
    config = load_config(["configs/tiny.json"])
    worse = measured(512, config, NAMES, tmp_path, monkeypatch.setattr)["a resume"][1]
    usual = found[512]["a resume"][1]
    assert worse.received_bytes > usual.received_bytes + 4 * 512
