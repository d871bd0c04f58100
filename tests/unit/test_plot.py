import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import plot as command
from minzero import curves, plot
from minzero.config.sections import Config
from minzero.errors import UserError


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


def test_scores_of_tasks_have_panels(tmp_path):
    """Of one run a colour a task, of two a marker a task; of a task with both accuracies the normalised one."""
    folders = [make_run(tmp_path / name, 40) for name in ("a", "b")]
    for folder in folders:
        with open(folder / "metrics.jsonl", "a") as file:
            for step in (100, 200, 300, 400):
                line = {"step": step, "tokens": step * 100, "eval_tasks_seconds": 1.0, "task_one_acc": 0.2}
                line |= {"task_one_acc_norm": 0.3, "task_one_bits_per_byte": 100 / step, "task_two_acc": 0.5}
                file.write(json.dumps(line | {"task_two_perplexity": 9.0}) + "\n")
    runs = [curves.read_run(folder) for folder in folders]
    assert "accuracy" in curves.panels_of(runs) and "accuracy" not in curves.panels_of([])
    for shown, colors in ((runs[:1], 2), (runs, 2)):
        figure = plot.draw_panels(shown, "tokens")
        panels = {axes.get_ylabel(): axes for axes in figure.axes}
        lines = [line for line in panels["task accuracy"].lines if len(line.get_xdata())]
        assert [line.get_ydata()[0] for line in lines] == [0.3, 0.5] * len(shown)
        assert len({line.get_color() for line in lines}) == colors and len({line.get_marker() for line in lines}) == 2
        assert [text.get_text() for text in panels["task accuracy"].get_legend().get_texts()] == ["one", "two"]
        bits = [line for line in panels["task bits per byte"].lines if len(line.get_xdata())]
        assert [line.get_ydata().tolist() for line in bits] == [[1, 0.5, 1 / 3, 0.25]] * len(shown)
        plt.close(figure)
    plot.plot_loss(folders[:1], tmp_path / "with.png")
    plain = make_run(tmp_path / "plain", 40)
    plot.plot_loss([plain], tmp_path / "without.png")
    heights = [plt.imread(tmp_path / name).shape[0] for name in ("with.png", "without.png")]
    assert heights[0] > heights[1] + 200


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


def test_every_name_that_a_folder_may_have_can_be_read_in_the_picture(tmp_path):
    names = ["_hidden", r"a$\nonsense$", "2024"]
    runs = [curves.read_run(make_run(tmp_path / name, 3)) for name in names]
    figure = plot.draw_panels(runs, "tokens")
    figure.savefig(tmp_path / "picture.png")
    shown = [text.get_text().strip().replace(r"\$", "$") for text in figure.legends[0].get_texts()]
    assert all(any(text.startswith(name) for text in shown) for name in names), shown
    plt.close(figure)


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
