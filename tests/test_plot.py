import json
import math
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest

import plot
from minzero.config import Config, UserError
from minzero.loggers import MetricsLog
from minzero.sizes import flops_per_token


def make_run(folder, points, bad=(), every=10):
    """A run's files with made-up numbers: a step line every so many steps, an evaluation each tenth of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for point in range(1, points + 1):
        step = point * every
        line = {"step": step, "tokens": step * 100, "loss": 1 + 5 / point, "lr": 1e-3 / point, "grad_norm": 0.5}
        line |= {"skipped": 0, "step_seconds": 2.0, "tokens_per_second": 50.0, "mfu": None, "peak_memory_bytes": 2**30}
        if point in bad:
            lines.append({"step": step, "tokens": step * 100, "bad_step": "loss nan", "samples": [0, 1]})
            line |= {"loss": None, "grad_norm": None}
        lines.append(line)
        if point % max(1, points // 10) == 0:
            lines.append({"step": step, "tokens": step * 100, "val_loss": 1.1 + 5 / point, "eval_seconds": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = Config().to_dict() | {"world_size": 2, "stage": 3, "precision": "fp32"}
    (folder / "config.json").write_text(json.dumps(made | {"versions": {"torch": "2", "device": "cpu"}}))
    return folder


def test_smoothing_is_unbiased_and_survives_nan():
    assert plot.smooth([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0, 3.0, 3.0])
    values = plot.smooth([1.0, math.nan, 1.0], 0.5)
    assert all(math.isclose(value, 1.0) for value in values)


def test_thinning_keeps_spikes_order_and_a_bounded_number_of_points():
    x, y = np.arange(1e6), np.zeros(1_000_000)
    y[123_456], y[777_777], y[500_000:500_010] = 9, -9, np.nan
    kept_x, kept_y = plot.thin(x, y)
    assert len(kept_x) <= plot.MOST_POINTS and kept_y.max() == 9 and kept_y.min() == -9
    assert kept_x[kept_y.argmax()] == 123_456 and (np.diff(kept_x) > 0).all()
    assert plot.thin(x[:100], y[:100])[0] is not None and len(plot.thin(x[:100], y[:100])[0]) == 100
    nothing = np.full(10_000, np.nan)
    assert len(plot.thin(x[:10_000], nothing)[0]) == 0


def test_curves_stand_against_tokens_flops_or_time(tmp_path):
    run = make_run(tmp_path / "run", 4, bad=[3])
    tokens, flops, hours = (plot.read_run(run, x) for x in ("tokens", "flops", "time"))
    place, loss = tokens.curves["loss"]
    assert place.tolist() == [1000, 2000, 3000, 4000] and np.isnan(loss).tolist() == [False, False, True, False]
    assert tokens.bad.tolist() == [3000] and tokens.curves["val_loss"][0].tolist() == [1000, 2000, 3000, 4000]
    per_token = flops_per_token(Config().model)
    assert flops.curves["loss"][0].tolist() == [per_token * each for each in place]
    # ten steps of 2 seconds between two lines
    assert (hours.curves["loss"][0] * 3600).tolist() == pytest.approx([20, 40, 60, 80])
    assert (hours.curves["val_loss"][0] * 3600).tolist() == pytest.approx([20, 40, 60, 80])


@pytest.mark.parametrize("points", [0, 1, 3, 300, 10_000])
def test_any_number_of_points_is_drawn_and_the_picture_stays_small(points, tmp_path):
    run = make_run(tmp_path / "run", points, bad=range(2, points, 50))
    plot.plot_loss([run], run / "loss.png")
    assert 5000 < (run / "loss.png").stat().st_size < 200_000
    figure = plot.draw_panels([plot.read_run(run)], "tokens")
    drawn = [len(line.get_xdata()) for axes in figure.axes for line in axes.lines]
    assert max(drawn, default=0) == min(points, plot.MOST_POINTS) or points > 300
    assert max(drawn, default=0) <= plot.MOST_POINTS
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == (points > 2) and all(len(line.get_xdata()) <= 200 for line in crosses)
    plt.close(figure)


def test_a_spike_does_not_hide_the_curve(tmp_path):
    run = make_run(tmp_path / "run", 1000)
    spoilt = (run / "metrics.jsonl").read_text().replace('"loss": 1.01,', '"loss": 1e9,')
    assert spoilt.count("1e9") == 1
    (run / "metrics.jsonl").write_text(spoilt.replace("1e9", "30.0"))
    figure = plot.draw_panels([plot.read_run(run)], "tokens")
    low, high = figure.axes[0].get_ylim()
    assert low < 1.005 and 6 < high < 8
    plt.close(figure)


def test_nothing_overlaps_with_many_runs_of_long_names(tmp_path):
    folders = [make_run(tmp_path / f"{number}_{'long_name_' * 12}{number}", 20 * number) for number in range(1, 9)]
    names = plot.names_of(folders)
    assert len(set(names)) == 8 and all(len(name) <= 40 for name in names)
    runs = [plot.read_run(folder, "time", name) for folder, name in zip(folders, names, strict=True)]
    figure = plot.draw_panels(runs, "time")
    figure.canvas.draw()
    panels = [axes.get_tightbbox() for axes in figure.axes]
    boxes = [*panels, figure.legends[0].get_window_extent()]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    plt.close(figure)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    assert plot.names_of(["out/a/run", "out/b/run"]) == ["out/a/run", "out/b/run"]
    assert plot.names_of(["out/a", "out/b"]) == ["a", "b"]


def test_every_name_that_a_folder_may_have_can_be_read_in_the_picture(tmp_path):
    names = ["_hidden", r"a$\nonsense$", "2024"]
    runs = [plot.read_run(make_run(tmp_path / name, 3)) for name in names]
    figure = plot.draw_panels(runs, "tokens")
    figure.savefig(tmp_path / "picture.png")
    shown = [text.get_text().strip().replace(r"\$", "$") for text in figure.legends[0].get_texts()]
    assert all(any(text.startswith(name) for text in shown) for name in names), shown
    plt.close(figure)


class Page(HTMLParser):
    """What a browser would fetch, and the texts of the table's cells."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.cells, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.cells[-1] += text


def test_the_page_needs_nothing_else_and_says_what_differs(tmp_path, capsys):
    first, second = make_run(tmp_path / "<b>&first", 30, bad=[5]), make_run(tmp_path / "second", 12)
    config = json.loads((second / "config.json").read_text())
    config["train"]["lr"] = 0.25
    (second / "config.json").write_text(json.dumps(config))
    page, picture = tmp_path / "page.html", tmp_path / "both.png"
    plot.main([str(first), str(second), "--out", str(picture), "--html", str(page)])
    assert capsys.readouterr().out.split() == [str(picture), str(page)] and picture.stat().st_size > 20_000
    text = page.read_text()
    found = Page(text)
    assert len(found.fetched) == 1 and found.fetched[0].startswith("data:image/svg+xml;base64,")
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert "<b>&first" in found.cells and "train.lr" in found.cells and "0.25" in found.cells
    assert "train.seed" not in found.cells, "the same in both"
    for cell in ("30,000", "12,000", "1.2667 at step 300", "bad steps", "2 x cpu, fp32, ZeRO-3", "10:00"):
        assert cell in found.cells, cell


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere: no metrics.jsonl with lines"),
        (["run", "--out", "picture.xyz"], "--out: picture.xyz: expected a name that ends in one of ."),
        (["run", "--out", "no/such/folder.png"], "no/such/folder.png: could not be written (No such file"),
        (["run", "--html", "no/page.html"], "no/page.html: could not be written (No such file or directory)"),
        (["bare", "--x", "flops"], "bare/config.json: no such file; expected the config.json that train.py writes"),
        (["broken", "--x", "flops"], "broken/config.json: line 1, column 1: Expecting value; expected JSON; expected"),
        (["strange", "--x", "flops"], "strange/config.json: no section model; expected the config.json"),
    ],
)
def test_bad_input_gets_one_line(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("run", None), ("bare", None), ("broken", "x"), ("strange", "[]")):
        run = make_run(tmp_path / name, 2)
        if content:
            (run / "config.json").write_text(content)
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(UserError) as error:
        plot.main(arguments)
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_a_resumed_run_is_one_curve(tmp_path):
    run = make_run(tmp_path / "run", 30)
    log = MetricsLog(run, 200)
    log.write({"step": 210, "tokens": 21_000, "loss": 9.0, "step_seconds": 1.0})
    place, loss = plot.read_run(run).curves["loss"]
    assert place.tolist() == [1000 * point for point in range(1, 22)] and loss[-1] == 9.0
