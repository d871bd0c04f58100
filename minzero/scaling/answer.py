"""What a sweep says: the fits of its points; for a larger budget the best model, and its loss before it is run."""

import math
from typing import NamedTuple

import numpy as np

from minzero.config.build import build
from minzero.config.nested import merge
from minzero.data.meta import damaged
from minzero.errors import UserError
from minzero.files import ROOT, read_json, write_json
from minzero.planner.units import in_count, in_digits
from minzero.scaling.fits import LEVEL, Points, fit_parabolas, fit_parametric, interval
from minzero.scaling.runs import REMEDY, loss_at
from minzero.scaling.shapes import COUNTS, Family, count, name_of
from minzero.sizes import flops_per_token


class Fits(NamedTuple):
    """The fits of a sweep's points."""

    how: str  # N is counted: of shapes.COUNTS
    used: list  # the points of the fits, as points.json has them
    left_out: list  # the others
    points: Points
    parabolas: object  # ParabolaFit
    parametric: object  # ParametricFit


def fit(points, how, draws=500):
    """The Fits of points as points.json has them. Raises UserError where they are too few."""
    used = [point for point in points if not point["left_out"]]
    left_out = [point for point in points if point["left_out"]]
    arrays = Points(
        np.array([point["parameters"][how] for point in used], dtype=float),
        np.array([point["tokens"] for point in used], dtype=float),
        np.array([point["loss"] for point in used], dtype=float),
        np.array([point["budget"] for point in used], dtype=float),
    )
    try:
        parametric = fit_parametric(arrays, draws)
    except UserError as error:
        reasons = "; ".join(f"{point['run']}: {point['left_out']}" for point in left_out[:3])
        raise UserError(f"--fit: {error}{f' ({reasons})' if reasons else ''}") from None
    return Fits(how, used, left_out, arrays, fit_parabolas(arrays, draws), parametric)


# ---- the best model at a budget


def tokens_at(family, flops, parameters):
    """The tokens of a run of this many FLOPs with a model of N = parameters, between those of the nearest shapes: FLOPs
    are not 6 N D in a small model."""
    model = family.nearest(parameters)
    if model is None:
        return math.nan
    per_parameter = flops_per_token(model) / count(model, family.how)
    return flops / (per_parameter * parameters)


def best_shape(family, law, flops):
    """The ModelConfig of the family with the lowest loss of the law at a budget. Raises UserError where the law has no
    optimum near any shape."""
    near = law.optimum(flops)[0]

    def loss(shape):
        model = family.at(*shape)
        return law.loss(family.count(shape), flops / flops_per_token(model))

    if not math.isfinite(near):
        raise UserError(
            f"--predict: {flops:g}: the runs do not show how the loss depends on size and tokens; add sizes or "
            "budgets, or change --tokens_per_parameter"
        )
    best = min(family.shapes(near / 10, near * 10), key=loss, default=None)
    if best is None:
        raise UserError(
            f"--predict: {flops:g}: the law has its lowest loss at N {near:.3g}, where this family has no shape; add "
            "sizes or budgets, or change --tokens_per_parameter"
        )
    return family.at(*best)


def predict(sweep, fits, flops):
    """What the fits say of the best run at a budget, as predictions.json has it. Raises UserError."""
    family = Family(sweep.config.model, fits.how)  # the law's N is counted as the fit says
    model = best_shape(family, fits.parametric.law, flops)
    size = sweep.size_of(model, [flops], "--predict")
    (budget,) = size.budgets
    parameters = count(model, fits.how)
    loss, (low, high) = fits.parametric.predicted(parameters, budget.tokens)
    by_parabolas = fits.parabolas.size.at(flops) if fits.parabolas.size else None
    return {
        "budget": flops,
        "shape": name_of(model),
        "parameters": parameters,
        "count": fits.how,
        "tokens": budget.tokens,
        "flops": budget.tokens * size.flops_per_token,
        "global_batch_tokens": size.global_batch_tokens,
        "lr": size.lr,
        "loss": float(loss),
        "low": low,
        "high": high,
        "parameters_by_parabolas": by_parabolas,
        "points": len(fits.used),
    }, size


class Prediction(NamedTuple):
    """A prediction, and what its run came to."""

    stated: dict
    config_file: object  # Path
    run: object  # Path
    measured: float | None


def write_prediction(sweep, fits, flops):
    """Write predict-<C>.json, the config of the best run at a budget, and what is expected of it into predictions.json.
    Once the run has begun, the prediction stays what it was. Returns a Prediction. Raises UserError."""
    name = f"predict-{flops:g}"
    run, file = sweep.folder / name, sweep.folder / f"{name}.json"
    book = sweep.folder / "predictions.json"
    stated = read_predictions(book)
    if name not in stated or not run.exists():
        stated[name], size = predict(sweep, fits, flops)
        content = merge(sweep.content_of(size), {"train": {"out_dir": str(run)}})
        try:
            build(merge({"deepspeed": read_json(ROOT / "ds_config.json")}, content), "its config")
        except UserError as error:  # train.py and plan.py would refuse it
            raise UserError(f"--predict: found {flops:g}: {error}; choose another budget") from None
        write_json(file, content)
        write_json(book, stated)
    return read_prediction(sweep, name, stated[name])


def read_prediction(sweep, name, stated):
    run = sweep.folder / name
    return Prediction(
        stated, sweep.folder / f"{name}.json", run, loss_at(run, stated["tokens"] // stated["global_batch_tokens"])
    )


def all_predictions(sweep):
    """The Predictions that a sweep has made, with what their runs came to."""
    stated = read_predictions(sweep.folder / "predictions.json")
    return [read_prediction(sweep, name, found) for name, found in stated.items()]


def read_predictions(path):
    """The content of predictions.json; {} if there is none. Raises UserError."""
    if not path.exists():
        return {}
    stated = read_json(path)
    names = ("budget", "shape", "parameters", "tokens", "global_batch_tokens", "lr", "loss", "low", "high")
    for name, found in stated.items() if isinstance(stated, dict) else [("its content", stated)]:
        if not isinstance(found, dict) or not {*names, "parameters_by_parabolas"} <= found.keys():
            raise damaged(path, name, found, "what was predicted", REMEDY)
    return stated


# ---- in words


def in_interval(value, interval, digits=3):
    """A value and its interval as text: 0.512 (0.49 to 0.53)."""
    low, high = interval
    return f"{value:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def fits_text(sweep, fits):
    """The fits as lines."""
    family = Family(sweep.config.model, fits.how)
    lines = [f"{len(fits.used)} runs fitted; N is {COUNTS[fits.how]}; intervals: {LEVEL:.0%} of the draws"]
    lines += [f"left out: {point['run']}: {point['left_out']}" for point in fits.left_out]
    few = [point for point in fits.used if point["bad_steps"]]
    lines += [f"{point['run']}: {point['bad_steps']} of its steps were bad and not taken" for point in few]
    lines += ["", "parabolas: the lowest loss over N at each budget"]
    for parabola in fits.parabolas.parabolas:
        if not parabola.inside:
            continue
        tokens = tokens_at(family, parabola.budget, parabola.best)
        lines.append(
            f"  {parabola.budget:g} FLOPs: N {in_count(round(parabola.best))}, {in_count(round(tokens))} tokens, "
            f"{in_digits(tokens / parabola.best)} a parameter, loss {parabola.height:.4f}"
        )
    lines += [f"  {line}" for line in fits.parabolas.passed_over]
    if fits.parabolas.size:
        size, sizes = fits.parabolas.size, fits.parabolas.sizes
        lines.append(f"  N grows as C^{in_interval(size.exponent, interval([size.exponent for size in sizes]))}")
    law, found = fits.parametric.law, fits.parametric
    lines += ["", "parametric: L = E + A / N^alpha + B / D^beta"]
    for name in ("E", "alpha", "beta", "A", "B"):
        value, ends = getattr(law, name), found.interval(lambda law, name=name: getattr(law, name))
        lines.append(f"  {name:<5} {in_interval(value, ends)}")
    a, b = law.exponents
    lines.append(f"  N grows as C^{in_interval(a, found.interval(lambda law: law.exponents[0]))}, D as C^{b:.3g}")
    lines.append(f"  error of a run's loss: {math.sqrt((found.residuals**2).mean()):.2%} (root mean square)")
    return lines


def prediction_text(prediction):
    """A prediction as lines, and the commands that plan and run it."""
    found = prediction.stated
    lines = [
        f"{found['budget']:g} FLOPs: {found['shape']}, N {in_count(round(found['parameters']))}, "
        f"{in_count(found['tokens'])} tokens ({in_digits(found['tokens'] / found['parameters'])} a parameter), "
        f"batch {found['global_batch_tokens']:,} tokens, rate {found['lr']:g}",
        f"  predicted loss {found['loss']:.4f} ({found['low']:.4f} to {found['high']:.4f})",
    ]
    if found["parameters_by_parabolas"]:
        lines.append(f"  by the parabolas N would be {in_count(round(found['parameters_by_parabolas']))}")
    if prediction.measured is not None:
        inside = "inside" if found["low"] <= prediction.measured <= found["high"] else "outside"
        error = prediction.measured / found["loss"] - 1
        lines.append(f"  measured loss {prediction.measured:.4f}, {inside} the interval, {error:+.2%}")
        return lines
    lines += [f"  python plan.py {prediction.config_file} --gpus 1", f"  python train.py {prediction.config_file}"]
    return lines


def as_json(fits, predictions):
    """The fits and predictions as one JSON object."""
    law, found = fits.parametric.law, fits.parametric
    return {
        "count": fits.how,
        "points": len(fits.used),
        "left_out": [{"run": point["run"], "reason": point["left_out"]} for point in fits.left_out],
        "parametric": {
            name: {"value": getattr(law, name), "interval": found.interval(lambda law, name=name: getattr(law, name))}
            for name in law._fields
        },
        "parabolas": [
            {"budget": p.budget, "parameters": p.best, "loss": p.height, "inside": p.inside}
            for p in fits.parabolas.parabolas
        ],
        "exponents": {
            "parametric": law.exponents[0],
            "parabolas": fits.parabolas.size.exponent if fits.parabolas.size else None,
        },
        "predictions": [p.stated | {"config": str(p.config_file), "measured": p.measured} for p in predictions],
    }
