"""Pages and tables about runs: an HTML page that needs no other file, and tables in Markdown."""

import base64
import functools
import html
import io
import json
import math
from pathlib import Path

import numpy as np

from minzero import plot
from minzero.curves import number_of, panels_of, read_config_if_whole
from minzero.files import cannot_write
from minzero.metrics import duration, goodput_in_words

# Sizes of pictures on the page: (inches, font size in points). The text of a picture has at least 14 px where its
# column is 372 px wide (narrow: on a phone, or one of three) or 575 px wide (wide: one of two on a large screen).
NARROW = ((5, 3.4), 13.6)
WIDE = ((7, 4.2), 12.4)

STYLE = """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 0 auto;
       padding: 1rem }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem }
p { margin: .25rem 0 1rem; color: #555; font-size: 15px }
img { display: block; width: 100%; height: auto }
.two, .three { display: grid; gap: 1rem; max-width: 40rem; margin: 1rem auto }
@media (min-width: 900px) { .two, .three { max-width: none; grid-template-columns: 1fr 1fr } }
@media (min-width: 1200px) { .three { grid-template-columns: 1fr 1fr 1fr } }
.legend { list-style: none; margin: .5rem 0; padding: 0; display: grid; gap: .25rem 1.5rem; font-size: 15px;
          grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)) }
.legend li { display: flex; gap: .5rem; align-items: center; min-width: 0; overflow-wrap: anywhere }
.legend svg { flex: none }
section { min-width: 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 15px; line-height: 1.35 }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: top;
         font-weight: normal; min-width: 9rem; max-width: 24rem; overflow-wrap: anywhere }
tr > :first-child { position: sticky; left: 0; background: #fff; color: #555; min-width: 8.5rem; max-width: 17rem }
thead th { font-weight: bold }
"""

KINDS = {
    "smoothed": "thick lines: training, smoothed; thin and pale: each logged step",
    "validation": "hollow markers: validation",
    "bad step": "crosses at the bottom: bad steps",
}


# -- Markdown ------------------------------------------------------------------------------------


def table(heads, rows, right_from=None):
    """A table in Markdown, as text. heads, rows: their cells, of any type; right_from: the number of the first column
    whose cells are aligned to the right, as numbers are; by default none."""
    if right_from is None:
        right_from = len(heads)
    rules = ["---" if column < right_from else "--:" for column in range(len(heads))]
    lines = []
    for cells in (heads, rules, *rows):
        texts = [" ".join(str(cell).split()).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


# -- facts and settings of a run -----------------------------------------------------------------


def facts(run):
    """What a reader wants to know of a run besides its curves: {name: value as text}. run: a RunCurves."""
    rows = {"folder": str(run.folder)}
    rows |= facts_of_steps(run)
    evaluations = [line for line in run.lines if math.isfinite(number_of(line, "val_loss"))]
    if evaluations:
        best = min(evaluations, key=lambda line: line["val_loss"])
        rows["best validation loss"] = f"{best['val_loss']:.4f} at step {best['step']:,}"
    config = read_config_if_whole(run.folder)
    if config:
        versions = config.get("versions", {})
        ranks = f"{config.get('world_size', '?')} x {versions.get('device', 'unknown device')}"
        rows["ran on"] = f"{ranks}, {config.get('precision', 'unknown precision')}, ZeRO-{config.get('stage', '?')}"
        software = [f"{name} {version}" for name, version in versions.items() if name != "device"]
        if software:
            rows["versions"] = ", ".join(software)
    return rows


def facts_of_steps(run):
    """The rows of `facts` that come from the lines of steps; none if there is no such line."""
    steps = [line for line in run.lines if "step_seconds" in line]
    if not steps:
        return {}
    last = steps[-1]
    speeds = [number_of(line, "tokens_per_second", 0) for line in steps]
    memory = max(number_of(line, "peak_memory_bytes", 0) for line in steps)
    bad_steps = sum("bad_step" in line for line in run.lines)
    return {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}" if "tokens" in last else "unknown",
        "last training loss": number_text(last, "loss", ".4f", "none"),
        "time in steps": duration(run.seconds),
        "tokens per second (median)": f"{np.median(speeds):,.0f}",
        "MFU (last)": number_text(last, "mfu", ".1%", "unknown"),
        "peak memory": f"{memory / 2**30:.2f} GiB",
        "bad steps": str(bad_steps),
    } | facts_of_time(run.lines)


def facts_of_time(lines):
    """The row of `facts` about where the run's time went; none for a run that does not say."""
    totals = [line for line in lines if "run_down_seconds" in line]
    words = totals and goodput_in_words(totals[-1])
    return {"goodput": words} if words else {}


def number_text(line, key, form, missing):
    """A number of a line of metrics.jsonl as text in this format; `missing` where it is null or not there."""
    if line.get(key) is None:
        return missing
    return format(number_of(line, key), form)


def settings(run):
    """Every key of the run's config, and the data that it found, one deep: {"train.lr": "0.001"}."""
    config = read_config_if_whole(run.folder)
    rows = {}
    for section in ("model", "data", "train", "lora", "deepspeed", "data_found"):
        for key, value in config.get(section, {}).items():
            rows[f"{section}.{key}"] = json.dumps(value)
    return rows


def different_settings(runs):
    """The settings that are not the same in all runs, as `settings` of each run."""
    every = [settings(run) for run in runs]
    keys = dict.fromkeys(key for row in every for key in row)  # in order, unlike a set
    different = [key for key in keys if len({row.get(key) for row in every}) > 1]
    return [{key: row.get(key, "") for key in different} for row in every]


# -- the page ------------------------------------------------------------------------------------


def html_table(rows, names):
    """A table with a column for each run, which scrolls inside itself where it is too wide. rows: a dictionary of
    texts for each run; names: those of the runs."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = []
    for key in dict.fromkeys(key for row in rows for key in row):
        cells = "".join(f"<td>{html.escape(row.get(key, ''))}</td>" for row in rows)
        lines.append(f"<tr><th>{html.escape(key)}</th>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr><th></th>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def html_legend(runs):
    """A list of the runs, each with the line that it is drawn with and its last losses."""
    entries = []
    for run, style in zip(runs, plot.styles_of(len(runs)), strict=True):
        dashes = " ".join(f"{length * style.width:g}" for length in style.dashes)
        line = f'<line x1="0" y1="6" x2="44" y2="6" stroke="{plot.hex_color(style.color)}"'
        line += f' stroke-width="{style.width:.1f}" stroke-dasharray="{dashes}"/>'
        text = html.escape(plot.loss_label(run))
        entries.append(f'<li><svg width="44" height="12" aria-hidden="true">{line}</svg><span>{text}</span></li>')
    return '<ul class="legend">\n' + "\n".join(entries) + "\n</ul>"


def svg_address(draw, size):
    """A picture as an address that holds it. draw: a function that draws into given axes; size: NARROW or WIDE."""
    inches, font_size = size
    plt = plot.pyplot()
    with plt.rc_context({"font.size": font_size, "axes.labelsize": font_size}):
        figure, axes = plt.subplots(figsize=inches, layout="constrained")
        draw(axes)
        content = io.BytesIO()
        figure.savefig(content, format="svg")
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def html_picture(draw, title):
    """A picture in a narrow version, and a wide one for large screens. draw: as in `svg_address`."""
    return f"""<picture><source media="(min-width: 1200px)" srcset="{svg_address(draw, WIDE)}">
<img alt="{title}" src="{svg_address(draw, NARROW)}"></picture>"""


def html_pictures(runs, x):
    """The pictures of runs: two, of the loss and of its later part, a legend, and three; or where the later part would
    show nothing new all four in the place of the two."""
    kinds = set()

    def draw_loss(axes):
        kinds.update(plot.draw_loss(axes, runs, x))

    def draw_detail(axes):
        plot.draw_detail(axes, runs, x, begin)

    begin = plot.detail_begin(runs)
    drawings = {
        title: functools.partial(plot.draw_panel, runs=runs, x=x, key=key) for key, title in panels_of(runs).items()
    }
    first = [html_picture(draw_loss, "loss")]
    second = ""
    if begin is None:
        first += [html_picture(draw, title) for title, draw in drawings.items()]
    else:
        first.append(html_picture(draw_detail, "loss, later part"))
        images = [f'<img alt="{title}" src="{svg_address(draw, NARROW)}">' for title, draw in drawings.items()]
        second = f'<div class="three">\n{"".join(images)}\n</div>'
    explanation = "; ".join(text for kind, text in KINDS.items() if kind in kinds)
    return f"""<div class="two">
{"".join(first)}
</div>
{html_legend(runs)}
<p>{explanation[:1].upper()}{explanation[1:]}</p>
{second}"""


def write_page(runs, x, path):
    """Write one HTML file that needs nothing else: pictures, the facts of each run, and the settings in which they
    differ, or all of a single run. runs: RunCurves; x: what they are drawn against. Raises UserError."""
    names = [run.name for run in runs]
    title = html.escape(", ".join(names) if len(names) <= 3 else f"{len(names)} runs")
    if len(runs) == 1:
        heading = "Settings"
        rows = [settings(runs[0])]
        nothing = "There is no config.json that can be read."
    else:
        heading = "Settings that differ"
        rows = different_settings(runs)
        nothing = "None: all runs have the same settings."
    settings_part = html_table(rows, names) if any(rows) else f"<p>{nothing}</p>"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style></head><body>
<h1>{title}</h1>
{html_pictures(runs, x)}
<div{' class="two"' if len(runs) == 1 else ""}>
<section><h2>Facts</h2>
{html_table([facts(run) for run in runs], names)}
</section>
<section><h2>{heading}</h2>
{settings_part}
</section>
</div>
</body></html>
"""
    try:
        Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise cannot_write(path, error) from None
