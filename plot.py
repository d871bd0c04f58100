"""Pictures of runs, from their metrics.jsonl alone: python plot.py out/a [out/b ...] [--out picture.png]"""

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from config import UserError, run_command
from metrics import read_metrics


def smooth(values, weight):
    """Exponential moving average that ignores what is not finite, corrected for its start."""
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        averages.append(total / norm if norm else math.nan)
    return averages


def plot_loss(runs, picture):
    """Training loss (raw and smoothed) and validation loss against tokens, of one or several runs."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, run in enumerate(runs):
        lines, color = read_metrics(run), f"C{number}"
        train = [(line["tokens"], line["loss"]) for line in lines if line.get("loss") is not None]
        val = [(line["tokens"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
        name = Path(run).name
        if train:
            tokens, losses = zip(*train, strict=True)
            axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
            weight = min(0.95, 1 - 1 / max(1, len(train) / 40))
            marker = "." if len(train) < 5 else None
            axes.plot(tokens, smooth(losses, weight), color=color, label=f"{name}: train, smoothed", marker=marker)
        if val:
            tokens, losses = zip(*val, strict=True)
            label = f"{name}: validation, last {losses[-1]:.3f}"
            axes.plot(tokens, losses, color=color, linestyle="--", marker="o", markersize=4, label=label)
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats per token)", title=", ".join(Path(r).name for r in runs))
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, as out/tiny")
    parser.add_argument("--out", help="the picture; default: loss.png in the first run's folder")
    args = parser.parse_args(arguments)
    for run in args.runs:
        if not read_metrics(run):
            raise UserError(f"{run}: no metrics.jsonl with lines; expected the folder of a run, as out/tiny")
    picture = args.out or Path(args.runs[0]) / "loss.png"
    plot_loss(args.runs, picture)
    print(picture)


if __name__ == "__main__":
    run_command(main)
