import json
import math
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import plot as command
from minzero import curves, plot, report
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


@pytest.mark.parametrize(
    ("seconds", "unit"),
    [(0, "seconds"), (100, "seconds"), (600, "minutes"), (9000, "minutes"), (86_400, "hours"), (1e6, "days")],
)
def test_a_time_axis_has_a_unit_that_fits(seconds, unit, tmp_path):
    run = make_run(tmp_path / "run", 4)
    lines = (run / "metrics.jsonl").read_text().replace('"step_seconds": 2.0', f'"step_seconds": {seconds / 40}')
    (run / "metrics.jsonl").write_text(lines)
    figure = plot.draw_panels([curves.read_run(run, "time")], "time")
    assert figure.axes[0].get_xlabel() == f"training time ({unit})"
    length = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86_400}[unit]
    assert figure.axes[0].lines[0].get_xdata()[-1] == pytest.approx(seconds / length)
    plt.close(figure)


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


@pytest.mark.parametrize("points", [0, 1, 3, 300, 10_000])
def test_any_number_of_points_is_drawn_and_the_picture_stays_small(points, tmp_path):
    run = make_run(tmp_path / "run", points, bad=range(2, points, 50))
    plot.plot_loss([run], run / "loss.png")
    assert 5000 < (run / "loss.png").stat().st_size < 200_000
    figure = plot.draw_panels([curves.read_run(run)], "tokens")
    drawn = [len(line.get_xdata()) for axes in figure.axes for line in axes.lines]
    assert max(drawn, default=0) == min(points, curves.MOST_POINTS) or points > 300
    assert max(drawn, default=0) <= curves.MOST_POINTS
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == (points > 2) and all(len(line.get_xdata()) <= 200 for line in crosses)
    plt.close(figure)


def test_a_spike_does_not_hide_the_curve(tmp_path):
    run = make_run(tmp_path / "run", 1000)
    spoilt = (run / "metrics.jsonl").read_text().replace('"loss": 1.01,', '"loss": 1e9,')
    assert spoilt.count("1e9") == 1
    (run / "metrics.jsonl").write_text(spoilt.replace("1e9", "30.0"))
    figure = plot.draw_panels([curves.read_run(run)], "tokens")
    low, high = figure.axes[0].get_ylim()
    assert low < 1.005 and 6 < high < 8
    plt.close(figure)


def test_nothing_overlaps_with_many_runs_of_long_names(tmp_path):
    folders = [make_run(tmp_path / f"{number}_{'long_name_' * 12}{number}", 20 * number) for number in range(1, 9)]
    names = curves.names_of(folders)
    assert len(set(names)) == 8 and all(len(name) <= 40 for name in names)
    runs = [curves.read_run(folder, "time", name) for folder, name in zip(folders, names, strict=True)]
    figure = plot.draw_panels(runs, "time")
    figure.canvas.draw()
    panels = [axes.get_tightbbox() for axes in figure.axes]
    boxes = [*panels, figure.legends[0].get_window_extent()]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    plt.close(figure)


def pixels(figure, axes, color):
    """How many pixels of these axes have nearly this colour."""
    figure.canvas.draw()
    image = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3] / 255.0  # the first row of pixels is the lowest
    box = axes.get_window_extent()
    inside = image[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)]
    return int((np.abs(inside - to_rgb(color)).max(axis=2) < 0.1).sum())


@pytest.mark.parametrize("points", [3, 300])
def test_of_two_equal_runs_both_are_visible_in_every_panel(points, tmp_path):
    runs = [curves.read_run(make_run(tmp_path / name, points)) for name in ("first", "second")]
    figure = plot.draw_panels(runs, "tokens")
    for axes in figure.axes:
        counts = [pixels(figure, axes, style.color) for style in plot.styles_of(2)]
        assert min(counts) > 100, (axes.get_ylabel(), counts)
    plt.close(figure)


def test_many_runs_have_looks_of_their_own():
    styles = plot.styles_of(36)
    assert len({(style.color, style.dashes) for style in styles}) == 36
    assert all(style.raw_alpha < plot.styles_of(1)[0].raw_alpha for style in styles)
    widths = [style.width for style in plot.styles_of(12)]
    assert widths == sorted(set(widths), reverse=True), "a later run lies over an earlier one and is thinner"


def test_the_legend_has_the_last_values(tmp_path):
    runs = [curves.read_run(make_run(tmp_path / f"run{number}", 10 * number)) for number in (1, 2)]
    figure = plot.draw_panels(runs, "tokens")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    values = ["run1: training 1.500, validation 1.600", "run2: training 1.250, validation 1.350"]
    assert shown == [*values, "training", "validation"]
    plt.close(figure)


def test_later_losses_are_drawn_on_a_scale_of_their_own_where_the_first_ones_hide_them(tmp_path):
    steep = curves.read_run(make_run(tmp_path / "steep", 100))
    figure = plot.draw_panels([steep], "tokens")
    [detail] = [axes for axes in figure.axes if axes.get_title() == "loss, later part"]
    assert detail.get_ylim()[1] < 1.3 < figure.axes[0].get_ylim()[1]
    assert 45_000 < detail.get_xlim()[0] < 50_000
    plt.close(figure)
    for few in (curves.read_run(make_run(tmp_path / "few", 10)), curves.read_run(make_run(tmp_path / "none", 0))):
        assert plot.detail_begin([few]) is None
    place, loss = steep.curves["loss"]
    steep.curves["loss"] = (place, np.linspace(5, 3, len(loss)))
    assert plot.detail_begin([steep]) is None


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


def test_every_name_that_a_folder_may_have_can_be_read_in_the_picture(tmp_path):
    names = ["_hidden", r"a$\nonsense$", "2024"]
    runs = [curves.read_run(make_run(tmp_path / name, 3)) for name in names]
    figure = plot.draw_panels(runs, "tokens")
    figure.savefig(tmp_path / "picture.png")
    shown = [text.get_text().strip().replace(r"\$", "$") for text in figure.legends[0].get_texts()]
    assert all(any(text.startswith(name) for text in shown) for name in names), shown
    plt.close(figure)


class Page(HTMLParser):
    """Reads a page: the addresses that a browser would fetch, and the texts of the tables' cells."""

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
    command.main([str(first), str(second), "--out", str(picture), "--html", str(page)])
    assert capsys.readouterr().out.split() == [str(picture), str(page)] and picture.stat().st_size > 20_000
    text = page.read_text()
    found = Page(text)
    assert len(found.fetched) == 7, "loss and its later part in two sizes, three panels"
    assert all(address.startswith("data:image/svg+xml;base64,") for address in found.fetched)
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert "<b>&first" in found.cells and "train.lr" in found.cells and "0.25" in found.cells
    assert "train.seed" not in found.cells, "the same in both"
    for cell in ("30,000", "12,000", "1.2667 at step 300", "bad steps", "2 x cpu, fp32, ZeRO-3", "10:00"):
        assert cell in found.cells, cell


def test_the_page_fits_any_screen_and_its_text_is_large_enough(tmp_path):
    run = make_run(tmp_path / "run", 30)
    command.main([str(run), "--html", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert text.count("<table>") == text.count('<div class="scroll"><table>') == 2
    assert "img { display: block; width: 100%" in text
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", text)]
    assert len(sizes) > 2 and min(sizes) >= 14
    for ((width, _), points), pixels_wide in ((report.NARROW, 372), (report.WIDE, 575)):
        assert points / 72 * pixels_wide / width >= 14


def test_settings_that_only_a_later_run_has_differ_too(tmp_path):
    folders = [make_run(tmp_path / name, 3) for name in ("first", "second")]
    runs = curves.read_runs(folders)
    assert report.different_settings(runs) == [{}, {}]
    report.write_page(runs, "tokens", tmp_path / "page.html")
    assert "None: all runs have the same settings." in (tmp_path / "page.html").read_text()
    config = json.loads((folders[1] / "config.json").read_text())
    config["deepspeed"]["zero_optimization"] = {"stage": 2}
    (folders[1] / "config.json").write_text(json.dumps(config))
    key = "deepspeed.zero_optimization"
    assert report.different_settings(runs) == [{key: ""}, {key: '{"stage": 2}'}]


def test_a_run_without_config_says_nothing_of_it(tmp_path):
    run = make_run(tmp_path / "run", 3)
    (run / "config.json").unlink()
    rows = report.facts(curves.read_run(run))
    assert "ran on" not in rows and "versions" not in rows and rows["steps"] == "30"
    report.write_page([curves.read_run(run)], "tokens", tmp_path / "page.html")
    assert "There is no config.json that can be read." in (tmp_path / "page.html").read_text()


def test_a_table_in_markdown():
    assert report.table(["a", "b"], [["x|y", 1], ["two\nlines", 2.5]]).split("\n") == [
        "| a | b |",
        "| --- | --- |",
        r"| x\|y | 1 |",
        "| two lines | 2.5 |",
    ]
    assert report.table(["a", "b"], [], right_from=1) == "| a | b |\n| --- | --: |"


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
        command.main(arguments)
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_a_resumed_run_is_one_curve(tmp_path):
    run = make_run(tmp_path / "run", 30)
    log = MetricsLog(run, 200)
    log.write({"step": 210, "tokens": 21_000, "loss": 9.0, "step_seconds": 1.0})
    place, loss = curves.read_run(run).curves["loss"]
    assert place.tolist() == [1000 * point for point in range(1, 22)] and loss[-1] == 9.0
