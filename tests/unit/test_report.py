import json
import re
from html.parser import HTMLParser

import plot as command
from minzero import curves, report
from tests.unit.test_plot import make_run


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
