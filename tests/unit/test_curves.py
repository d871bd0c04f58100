import math

import numpy as np
import pytest

import plot as command
from minzero import curves
from minzero.config.sections import Config
from minzero.errors import UserError
from minzero.loggers import MetricsLog
from minzero.sizes import flops_per_token
from tests.unit.test_plot import make_run


def test_smoothing_is_unbiased_and_survives_nan():
    assert curves.smooth([3.0, 3.0, 3.0], 2) == pytest.approx([3.0, 3.0, 3.0])
    values = curves.smooth([1.0, math.nan, 1.0], 1)
    assert all(math.isclose(value, 1.0) for value in values)
    assert np.isnan(curves.smooth([math.nan, math.nan], 1)).all()
    ends = curves.smooth([math.nan, 1.0, 1.0, math.inf], 1)
    assert np.isnan(ends).tolist() == [True, False, False, True], "nothing is made up outside of the finite values"


@pytest.mark.parametrize("points", [100, 10_000])
def test_the_smoothed_curve_follows_a_known_one_without_lag(points):
    """A moving average that trails lies above a falling loss at its start and below a rising one."""
    number = np.arange(points)
    x = np.arange(points) / points
    straight = 5 - 3 * x
    assert curves.smoothed_curve(x, straight)[1] == pytest.approx(
        5 - 3 * curves.smoothed_curve(x, straight)[0], abs=1e-9
    )
    falling = 3 + 8 * np.exp(-60 * x)
    place, smoothed = curves.smoothed_curve(x, falling)
    assert smoothed == pytest.approx(3 + 8 * np.exp(-60 * place), abs=0.01 * 8)
    assert smoothed[0] == falling[0]
    steep = 1 + 5 / (1 + number)
    place, smoothed = curves.smoothed_curve(number, steep)
    assert (np.abs(smoothed - 1 - 5 / (1 + place)) < 0.02 * 5).all()


def test_the_smoothed_curve_is_smoother():
    noise = np.random.default_rng(0).normal(size=4000)
    _, smoothed = curves.smoothed_curve(np.arange(4000), noise)
    assert len(smoothed) == curves.SMOOTHED_POINTS and np.abs(smoothed[50:]).max() < 0.5 < noise.std()
    few = np.arange(30.0)
    assert curves.smoothed_curve(few, few)[1] is few


def test_thinning_keeps_spikes_order_and_a_bounded_number_of_points():
    x, y = np.arange(1e6), np.zeros(1_000_000)
    y[123_456], y[777_777], y[500_000:500_010] = 9, -9, np.nan
    kept_x, kept_y = curves.thin(x, y)
    assert len(kept_x) <= curves.MOST_POINTS and kept_y.max() == 9 and kept_y.min() == -9
    assert kept_x[kept_y.argmax()] == 123_456 and (np.diff(kept_x) > 0).all()
    assert curves.thin(x[:100], y[:100])[0] is not None and len(curves.thin(x[:100], y[:100])[0]) == 100
    nothing = np.full(10_000, np.nan)
    assert len(curves.thin(x[:10_000], nothing)[0]) == 0


def test_curves_stand_against_tokens_flops_or_time(tmp_path):
    run = make_run(tmp_path / "run", 4, bad=[3])
    tokens, flops, seconds = (curves.read_run(run, x) for x in ("tokens", "flops", "time"))
    place, loss = tokens.curves["loss"]
    assert place.tolist() == [1000, 2000, 3000, 4000] and np.isnan(loss).tolist() == [False, False, True, False]
    assert tokens.bad_steps.tolist() == [3000] and tokens.curves["val_loss"][0].tolist() == [1000, 2000, 3000, 4000]
    per_token = flops_per_token(Config().model)
    assert flops.curves["loss"][0].tolist() == [per_token * each for each in place]
    # ten steps of 2 seconds between two lines
    assert seconds.curves["loss"][0].tolist() == pytest.approx([20, 40, 60, 80])
    assert seconds.curves["val_loss"][0].tolist() == pytest.approx([20, 40, 60, 80])


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("tiy", "out/tiny"),
        ("out/tinny", "out/tiny"),
        ("out/tiny/metrics.jsonl", "out/tiny"),
        ("out/tiny/checkpoints/step_1", "out/tiny"),
        ("elsewhere/othr", "elsewhere/other"),
    ],
)
def test_a_path_that_is_no_run_names_the_nearest(path, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/tiny", "elsewhere/other"):
        make_run(tmp_path / name, 2)
    (tmp_path / "out/tinny_without_metrics").mkdir()
    with pytest.raises(UserError, match=rf"^{path}: no metrics.jsonl with lines; .*; did you mean {nearest}\?$"):
        command.main([path])


def test_a_path_unlike_any_run_names_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "out/tiny", 2)
    for path in ("zzz", "n" * 300, "metrics.jsonl/x"):
        with pytest.raises(UserError, match=r"; expected the folder of a run, as out/tiny$"):
            command.main([path])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    assert curves.names_of(["out/a/run", "out/b/run"]) == ["out/a/run", "out/b/run"]
    assert curves.names_of(["out/a", "out/b"]) == ["a", "b"]


def test_a_resumed_run_is_one_curve(tmp_path):
    run = make_run(tmp_path / "run", 30)
    log = MetricsLog(run, 200)
    log.write({"step": 210, "tokens": 21_000, "loss": 9.0, "step_seconds": 1.0})
    place, loss = curves.read_run(run).curves["loss"]
    assert place.tolist() == [1000 * point for point in range(1, 22)] and loss[-1] == 9.0
