"""The order of the samples: a permutation that looks random, mixtures in exact proportion, and nothing
that depends on ranks, micro-batches or where a run was interrupted."""

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minzero.config.build import build
from minzero.data.mixture import Mixture
from minzero.data.order import Schedule, sample_numbers, validation_windows, windows_of
from minzero.errors import UserError
from tests.unit.test_data_shards import make

TRILLION = 10**12 // 1024  # windows


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
def test_each_epoch_is_a_permutation(n, seed, epoch):
    order = windows_of(np.arange(epoch * n, (epoch + 1) * n), n, seed)
    assert sorted(order.tolist()) == list(range(n))


def test_each_epoch_and_seed_is_another():
    orders = [tuple(windows_of(np.arange(e * 50, e * 50 + 50), 50, seed)) for e in range(20) for seed in range(20)]
    assert len(set(orders)) == 400


@given(samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=50), n=st.integers(1, 10**9))
def test_a_sample_does_not_depend_on_its_neighbours(samples, n):
    together = windows_of(samples, n, 3).tolist()
    assert together == [windows_of([sample], n, 3)[0] for sample in samples]


@pytest.mark.parametrize("n", [TRILLION, TRILLION + 1, 10**6 + 3, 2**32])
def test_large_orders_are_one_to_one(n):
    """No window twice in 300,000 samples of one epoch, from its beginning, middle and end."""
    samples = np.concatenate([np.arange(100_000) + start for start in (0, n // 2, n - 100_000)])
    windows = windows_of(samples, n, 11)
    assert windows.min() >= 0 and windows.max() < n
    assert len(set(windows.tolist())) == len(samples)


def chi_square_is_usual(counts):
    """Are these counts of equally likely events within 5 standard deviations of what chance gives?"""
    counts = np.asarray(counts, dtype=float).ravel()
    expected, free = counts.mean(), len(counts) - 1
    return abs(((counts - expected) ** 2 / expected).sum() - free) < 5 * np.sqrt(2 * free)


@pytest.mark.parametrize("n", [1000, 65_537, 10**6, TRILLION])
def test_large_orders_look_uniform(n):
    """The windows of consecutive samples fill all parts of the data equally, and so do pairs of neighbours,
    steps between neighbours and the lowest digit."""
    windows = np.concatenate([windows_of(np.arange(e * n, e * n + min(n, 20_000)), n, 5) for e in range(10)])
    if n > 20_000:  # of a whole small epoch the counts are more even than chance
        assert chi_square_is_usual(np.histogram(windows, bins=100, range=(0, n))[0])
        assert chi_square_is_usual(np.bincount(windows % 7, minlength=7))
    pairs = np.histogram2d(windows[:-1], windows[1:], bins=16, range=((0, n), (0, n)))[0]
    assert chi_square_is_usual(pairs)
    assert chi_square_is_usual(np.histogram(np.diff(windows) % n, bins=64, range=(0, n))[0])


def test_small_orders_look_uniform():
    """Over many seeds each window of 12 comes equally often at each place, and before each other one."""
    n, orders = 12, np.array([windows_of(np.arange(12), 12, seed) for seed in range(12_000)])
    assert all(chi_square_is_usual(np.bincount(orders[:, place], minlength=n)) for place in range(n))
    places = orders.argsort(axis=1)
    for a, b in ((0, 1), (3, 9), (10, 11)):
        first = (places[:, a] < places[:, b]).mean()
        assert abs(first - 0.5) < 5 * 0.5 / np.sqrt(len(orders))


# -- mixtures ------------------------------------------------------------------------------------

weight = st.one_of(st.integers(1, 60), st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.5, 0.01, 1e-3]))


@given(st.lists(weight, min_size=1, max_size=8))
@settings(deadline=None)
def test_proportions_hold_in_every_prefix(weights):
    """Less than one sample off, for each data set, after every single sample, and exactly so: as fractions."""
    try:
        schedule = Schedule(weights)
    except UserError:
        return
    shares = [Fraction(str(w)) for w in weights]
    shares = [share / sum(shares) for share in shares]
    sets, draws = schedule.draws(np.arange(min(2 * schedule.period + 3, 3000)))
    counts = [0] * len(weights)
    for sample, (number, draw) in enumerate(zip(sets.tolist(), draws.tolist(), strict=True), 1):
        assert draw == counts[number]  # each data set's samples come one after the other
        counts[number] += 1
        assert all(abs(count - share * sample) < 1 for count, share in zip(counts, shares, strict=True))


def test_proportions_of_a_large_period():
    weights = [0.5, 0.31234, 0.1, 0.05, 0.03766]
    schedule = Schedule(weights)
    sets, draws = schedule.draws(np.arange(3 * schedule.period + 17))
    for number, share in enumerate(weights):
        counts = np.cumsum(sets == number)
        assert np.abs(counts - share * np.arange(1, len(sets) + 1)).max() < 1
        assert (draws[sets == number] == np.arange(counts[-1])).all()


def test_far_samples_of_a_mixture():
    """Sample 10^15 is as near as the first."""
    schedule = Schedule([0.7, 0.2, 0.1])
    sets, draws = schedule.draws([10**15, 10**15 + 1])
    near, first = schedule.draws([0, 1])
    assert sets.tolist() == near.tolist()
    assert draws.tolist() == [10**14 * schedule.counts[number] + k for number, k in zip(near, first, strict=True)]


def test_weights_without_a_short_period_are_refused():
    with pytest.raises(UserError, match=r"repeat only after 100001 samples, expected at most 100000; round them, as"):
        Schedule([1, 100_000])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three data sets whose tokens say where they are from: 1000 * data set + place modulo 1000."""
    base = tmp_path_factory.mktemp("mixture")
    for number, size in enumerate((5000, 900, 133)):
        parts = [[1000 * number + place % 1000 for place in range(size)]]
        make(base / f"set{number}", parts, "train", vocab_size=4000)
    return base


def mixed(folders, weights, seed=1):
    path = {str(folders / f"set{number}"): weight for number, weight in weights.items()}
    return Mixture(path, "train", 8, 4000, seed)


def test_mixture_reads_each_set_in_epochs_of_its_own(folders):
    data = mixed(folders, {0: 0.7, 1: 0.2, 2: 0.1})
    inputs, targets = data.batch(data.windows_of(np.arange(2000)))
    assert (targets[:, :-1] == inputs[:, 1:]).all()
    sets = inputs[:, 0] // 1000
    assert np.bincount(sets).tolist() == [1400, 400, 200]
    for number, stream in enumerate(data.streams):
        firsts = inputs[sets == number][:, 0] % 1000
        for epoch in range(len(firsts) // stream.windows):  # every window once in each epoch
            seen = firsts[epoch * stream.windows : (epoch + 1) * stream.windows]
            expected = [window * 8 % 1000 for window in range(stream.windows)]
            assert sorted(seen.tolist()) == sorted(expected)


def test_mixture_does_not_depend_on_how_it_is_written(folders):
    a = mixed(folders, {0: 0.5, 1: 0.3, 2: 0.2}).windows_of(np.arange(100))
    assert (a == mixed(folders, {2: 2, 1: 3, 0: 5}).windows_of(np.arange(100))).all()


def test_one_folder_is_a_mixture_of_one(folders):
    alone = Mixture(str(folders / "set0"), "train", 8, 4000, 1)
    samples = np.arange(3000)
    assert (alone.windows_of(samples) == windows_of(samples, alone.windows, 1)).all()
    assert (alone.windows_of(samples) == mixed(folders, {0: 3}).windows_of(samples)).all()


@given(
    ranks=st.sampled_from([1, 2, 3, 8]),
    micro=st.sampled_from([1, 2, 5]),
    other=st.sampled_from([(1, 1), (2, 3), (4, 1), (1, 24)]),
    stop=st.integers(0, 6),
)
@settings(max_examples=30)
def test_independent_of_ranks_micro_batch_and_resume(folders, ranks, micro, other, stop):
    """Any division of the global batch, interrupted anywhere and gone on with another one, reads the same."""
    batch = 240
    data = mixed(folders, {0: 0.7, 1: 0.2, 2: 0.1})

    def step_rows(step, ranks, micro):
        accumulation = batch // (ranks * micro)
        parts = [sample_numbers(step * batch, a, r, ranks, micro) for a in range(accumulation) for r in range(ranks)]
        assert {len(part) for part in parts} == {micro}  # no rank ever waits for another
        return [data.batch(data.windows_of(part))[0] for part in parts]

    whole = [np.concatenate(step_rows(step, 1, batch)) for step in range(4)]
    for step in range(4):
        division = (ranks, micro) if step < stop else other
        assert (np.concatenate(step_rows(step, *division)) == whole[step]).all()


def test_validation_windows_of_a_mixture(folders):
    data = mixed(folders, {0: 0.7, 1: 0.2, 2: 0.1})
    windows = data.validation_windows(100)
    assert len(set(windows.tolist())) == len(windows) == 100
    assert np.bincount(data.batch(windows)[0][:, 0] // 1000).tolist() == [70, 20, 10]
    everything = data.validation_windows(10**9)  # set 2 has 16 windows, a tenth of 160
    assert np.bincount(data.batch(everything)[0][:, 0] // 1000)[2] == 16
    assert len(set(everything.tolist())) == len(everything)


@given(total=st.integers(1, 10**12), wanted=st.integers(-5, 500))
def test_validation_windows(total, wanted):
    windows = validation_windows(total, wanted)
    assert len(windows) == min(total, max(1, wanted))
    assert len(set(windows.tolist())) == len(windows)
    assert windows.min() >= 0 and windows.max() < total


def test_mixtures_in_the_configuration():
    assert build({"data": {"path": {"a": 1, "b": 0.5}}}, "x").data.path == {"a": 1, "b": 0.5}
    for path, words in (
        ({}, "found no folder"),
        ({"a": 0}, "a: found weight 0"),
        ({"a": -1}, "found weight -1"),
        ({"a": "much"}, 'found weight "much"'),
        ({"a": True}, "found weight true"),
        ({"a": float("nan")}, "found weight NaN"),
        (3, "data.path: found 3"),
    ):
        with pytest.raises(UserError, match=words):
            build({"data": {"path": path}}, "x")


def test_a_mixture_on_the_command_line_replaces_the_files():
    from minzero.config.load import command_line_values
    from minzero.config.nested import merge

    values, _ = command_line_values(["--data.path", '{"b": 2}'])
    assert merge({"data": {"path": {"a": 1}}}, values)["data"]["path"] == {"b": 2}
    values, _ = command_line_values(["--data.path", "2024"])
    assert values["data"]["path"] == "2024"


def test_quota_against_brute_force():
    """The schedule's counts at each prefix are floor or ceiling of the exact share, for odd weights as well."""
    generator = random.Random(1)
    for _ in range(40):
        weights = [generator.randint(1, 30) for _ in range(generator.randint(2, 12))]
        schedule, total = Schedule(weights), sum(weights)
        counts = np.zeros(len(weights), dtype=int)
        for sample in range(schedule.period):
            counts[schedule.sets[sample]] += 1
            exact = np.array(weights) * (sample + 1)
            assert (counts >= exact // total).all() and (counts <= -(-exact // total)).all()
