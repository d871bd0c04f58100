"""The picture of a sweep: losses over sizes, the best size over budgets, the loss over budgets, errors of the fit."""

import numpy as np

from minzero.plot import COLORS, MARKERS, count_formatter, pyplot, save
from minzero.scaling.fits import interval

GREY = "0.45"
MOST_DRAWS = 200  # of the bootstrap, in a picture


def draw(fits, predictions, picture):
    """Draw a sweep's Fits and Predictions into a file."""
    save(figure_of(fits, predictions), picture)


def figure_of(fits, predictions):
    figure, axes = pyplot().subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    budgets = list(np.unique(fits.points.budget))
    colors = {budget: COLORS[number % len(COLORS)] for number, budget in enumerate(budgets)}
    marks = {budget: MARKERS[number % len(MARKERS)] for number, budget in enumerate(budgets)}
    draw_budgets(axes[0, 0], fits, colors, marks)
    draw_sizes(axes[0, 1], fits, predictions, colors, marks)
    draw_losses(axes[1, 0], fits, predictions, colors, marks)
    draw_errors(axes[1, 1], fits, colors, marks)
    for panel in axes.flat:
        panel.grid(alpha=0.3, which="major")
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_budgets(axes, fits, colors, marks):
    """Loss over N at each budget: the runs, their parabola, the law, and the parabola's minimum."""
    for budget, color in colors.items():
        chosen = fits.points.budget == budget
        sizes, losses = fits.points.parameters[chosen], fits.points.loss[chosen]
        axes.plot(sizes, losses, marks[budget], color=color, label=f"{budget:g} FLOPs")
        reach = np.geomspace(sizes.min() / 1.2, sizes.max() * 1.2, 80)
        tokens = budget / flops_over_parameters(fits, reach) / reach
        axes.plot(reach, fits.parametric.law.loss(reach, tokens), ":", color=color, linewidth=1.4)
        for parabola in fits.parabolas.parabolas:
            if parabola.budget == budget:
                axes.plot(reach, parabola.loss(reach), "-", color=color, linewidth=1)
                if parabola.inside:
                    axes.plot(parabola.best, parabola.height, "*", color=color, markersize=13, markeredgecolor="black")
    axes.plot([], [], "-", color=GREY, linewidth=1, label="parabola, * its minimum")
    axes.plot([], [], ":", color=GREY, linewidth=1.4, label="L(N, D)")
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss (nats per token)", title="runs of equal FLOPs")
    axes.legend(fontsize=8)


def reach_of(fits, predictions):
    """Budgets from the smallest of the sweep to the largest that is predicted."""
    largest = max([*fits.points.budget, *(prediction.stated["budget"] for prediction in predictions)])
    return np.geomspace(fits.points.budget.min() / 1.5, largest * 1.5, 60)


def band(axes, x, curves, color):
    """The interval of some curves over x, shaded."""
    low, high = np.array([interval(values) for values in np.array(curves).T]).T
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def draw_sizes(axes, fits, predictions, colors, marks):
    """The best N over C, by both fits."""
    x = reach_of(fits, predictions)
    axes.plot(x, optima(fits, fits.parametric.law, x)[0], ":", color="black", label="L(N, D)")
    if fits.parametric.laws:
        band(axes, x, [optima(fits, law, x)[0] for law in fits.parametric.laws[:MOST_DRAWS]], "black")
    if fits.parabolas.size:
        found = fits.parabolas.size
        axes.plot(x, found.at(x), "-", color="C0", label=f"parabolas: C^{found.exponent:.2f}")
        if fits.parabolas.sizes:
            band(axes, x, [size.at(x) for size in fits.parabolas.sizes], "C0")
    for parabola in fits.parabolas.parabolas:
        if parabola.inside:
            axes.plot(parabola.budget, parabola.best, "*", color=colors[parabola.budget], markersize=13, mec="black")
    for budget, color in colors.items():
        chosen = fits.points.budget == budget
        axes.plot(
            fits.points.budget[chosen],
            fits.points.parameters[chosen],
            marks[budget],
            color=color,
            markersize=3,
            alpha=0.5,
        )
    for number, prediction in enumerate(predictions):
        label = "predicted by L(N, D)" if number == 0 else None
        axes.plot(
            prediction.stated["budget"], prediction.stated["parameters"], "k^", markerfacecolor="none", label=label
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs C", ylabel="parameters N", title="the best size at a budget")
    axes.yaxis.set_major_formatter(count_formatter())
    axes.legend(fontsize=8)


def draw_losses(axes, fits, predictions, colors, marks):
    """Loss over C: the runs, the law's lowest loss with its interval, predictions and what came of them."""
    for budget, color in colors.items():
        chosen = fits.points.budget == budget
        axes.plot(
            fits.points.budget[chosen], fits.points.loss[chosen], marks[budget], color=color, markersize=4, alpha=0.7
        )
    x = reach_of(fits, predictions)
    axes.plot(x, optima(fits, fits.parametric.law, x)[1], ":", color="black", label="lowest loss of L(N, D)")
    if fits.parametric.laws:
        band(axes, x, [optima(fits, law, x)[1] for law in fits.parametric.laws[:MOST_DRAWS]], "black")
    for number, prediction in enumerate(predictions):
        stated = prediction.stated
        ends = [[stated["loss"] - stated["low"]], [stated["high"] - stated["loss"]]]
        look = {"fmt": "k^", "capsize": 4, "markerfacecolor": "none"}
        axes.errorbar(stated["budget"], stated["loss"], yerr=ends, label="predicted" if number == 0 else None, **look)
        if prediction.measured is not None:
            first = all(earlier.measured is None for earlier in predictions[:number])
            label = "measured afterwards" if first else None
            axes.plot(stated["budget"], prediction.measured, "x", color="C3", markersize=9, mew=2, label=label)
    axes.set(xscale="log", xlabel="FLOPs C", ylabel="loss (nats per token)", title="loss over FLOPs")
    axes.legend(fontsize=8)


def optima(fits, law, budgets):
    """(the best N, the lowest loss) of a law at some budgets, an array each."""
    sizes = np.geomspace(fits.points.parameters.min() / 10, fits.points.parameters.max() * 100, 600)
    per_parameter = flops_over_parameters(fits, sizes)
    losses = law.loss(sizes, np.asarray(budgets)[:, None] / (per_parameter * sizes))
    best = losses.argmin(axis=1)
    return sizes[best], losses.min(axis=1)


def flops_over_parameters(fits, sizes):
    """FLOPs per token and parameter over N: a smooth curve through those of the runs, and as at the ends beyond."""
    known = {point["parameters"][fits.how]: point["flops_per_token"] for point in fits.used}
    x = np.array(sorted(known))
    y = np.array([known[size] / size for size in x])
    curve = np.polyfit(np.log(x), np.log(y), 2 if len(x) > 3 else 1)
    return np.exp(np.polyval(curve, np.log(np.clip(sizes, x[0], x[-1]))))


def draw_errors(axes, fits, colors, marks):
    """The error of each run under the law, over its tokens per parameter."""
    ratio = fits.points.tokens / fits.points.parameters
    for budget, color in colors.items():
        chosen = fits.points.budget == budget
        axes.plot(ratio[chosen], 100 * fits.parametric.residuals[chosen], marks[budget], color=color)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens per parameter", ylabel="measured over L(N, D) (%)", title="errors of the fit")
