"""Fits of scaling laws to the losses of runs: N parameters, D tokens, C FLOPs, loss L in nats per token.

    parabolas    the minimum of L over ln N at each budget C, and power laws through the minima (approach 2 of Hoffmann
                 et al. 2022, arXiv 2203.15556, section 3.2)
    parametric   L(N, D) = E + A / N^alpha + B / D^beta over all runs (approach 3, section 3.3)

The parametric fit minimises the sum over runs of Huber(ln L - ln L(N, D)), delta 1e-3, in the form logsumexp(a - alpha
ln N, b - beta ln D, e) with L-BFGS from a grid of starts. Besiroglu et al. (2024, arXiv 2404.10102) found the published
values far from that minimum: the mean over runs in place of the sum is so small that L-BFGS' tolerances end it early.
Here the sum is divided by delta^2, which changes no minimum, and the tolerances are near those of float64.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from minzero.errors import UserError
from minzero.scaling.shapes import LEAST_RUNS

DELTA = 1e-3  # of ln L, where Huber's function turns from a square into a line
STARTS = 30  # of the grid, from which L-BFGS begins
LEVEL = 0.95  # of the intervals
# the grid of starts in section D.2 of Hoffmann et al.: a, b, e, alpha, beta
GRID = (np.arange(0, 26, 5.0), np.arange(0, 26, 5.0), np.arange(-1, 1.1, 0.5), np.arange(0, 2.1, 0.5))


def optimizer():
    """scipy.optimize.minimize. Raises UserError where scipy is not installed."""
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise UserError("scipy: not installed, and the fits need it; pip install scipy") from None
    return minimize


class Points(NamedTuple):
    """The runs that a law is fitted to, an array each. budget: the C that a run was meant to have; flops: what it had
    (whole steps)."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    budget: np.ndarray


# ---- L(N, D)


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters, tokens):
        """L, in nats per token."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    @property
    def exponents(self):
        """(a, b): the best N grows as C^a and the best D as C^b, where C = 6 N D (equation 4 of Hoffmann et al.)."""
        whole = self.alpha + self.beta or math.nan
        return self.beta / whole, self.alpha / whole

    def optimum(self, flops):
        """(N, D) of the lowest loss where 6 N D is `flops` (equation 4 of Hoffmann et al.). NaN where a term is all but
        gone, as where all sizes were too large."""
        if min(self.alpha, self.beta) < 1e-3 or min(self.A, self.B) < 1e-9:
            return math.nan, math.nan
        a, b = self.exponents
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return scale * (flops / 6) ** a, (flops / 6) ** b / scale


class Objective:
    """The sum of Huber(ln L - ln L(N, D)) / delta^2 and its gradient, over (a, b, e, alpha, beta). a and b are those at
    the mean of ln N and of ln D: far from there they and the exponents all but determine each other, which L-BFGS takes
    thousands of steps to find."""

    def __init__(self, points):
        self.log_loss = np.log(points.loss)
        self.centres = np.log(points.parameters).mean(), np.log(points.tokens).mean()
        self.places = np.log(points.parameters) - self.centres[0], np.log(points.tokens) - self.centres[1]

    def terms(self, theta):
        """ln of each of the three terms of the law, (3, runs)."""
        a, b, e, alpha, beta = theta
        by_size, by_data = self.places
        return np.stack([a - alpha * by_size, b - beta * by_data, np.full(len(by_size), e)])

    def residuals(self, theta):
        """(ln L(N, D) - ln L, the share of each term in L(N, D))."""
        terms = self.terms(theta)
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        whole = shares.sum(axis=0)
        return top + np.log(whole) - self.log_loss, shares / whole

    def __call__(self, theta, delta):
        """(value, gradient)."""
        residuals, shares = self.residuals(theta)
        scaled = residuals / delta
        sizes = np.abs(scaled)
        value = np.where(sizes <= 1, 0.5 * scaled**2, sizes - 0.5).sum()
        slopes = np.clip(scaled, -1, 1) / delta * shares
        by_size, by_data = self.places
        gradient = [*slopes.sum(axis=1), -(slopes[0] * by_size).sum(), -(slopes[1] * by_data).sum()]
        return value, np.array(gradient)

    def starts(self):
        """The points of GRID with the lowest values, the best first, (STARTS, 5)."""
        a, b, e, exponents = GRID
        grid = np.array(list(itertools.product(a, b, e, exponents, exponents)))
        grid[:, 0] -= grid[:, 3] * self.centres[0]
        grid[:, 1] -= grid[:, 4] * self.centres[1]
        values = np.concatenate([self.values(part) for part in np.array_split(grid, 1 + len(grid) // 500)])
        return grid[np.argsort(values, kind="stable")[:STARTS]]

    def values(self, many):
        """The value without gradient of many thetas, (many, 5) -> (many,)."""
        by_size, by_data = self.places
        terms = np.stack(
            [
                many[:, :1] - many[:, 3:4] * by_size,
                many[:, 1:2] - many[:, 4:5] * by_data,
                np.repeat(many[:, 2:3], len(by_size), axis=1),
            ]
        )
        return np.abs(np.logaddexp.reduce(terms, axis=0) - self.log_loss).sum(axis=1)

    def minimum(self, starts, deltas=(1e-1, 1e-2, DELTA, DELTA)):
        """The best theta that L-BFGS finds from these starts: for each with a large delta first, whose function is
        smooth, then with smaller ones; with the last once more, because L-BFGS then forgets a poor estimate of the
        curvature."""
        minimize = optimizer()
        bounds = [(None, None), (None, None), (-20, None), (0, 10), (0, 10)]
        best, least = None, math.inf
        for start in starts:
            theta = start
            for delta in deltas:
                options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20}
                found = minimize(
                    self, theta, args=(delta,), jac=True, method="L-BFGS-B", bounds=bounds, options=options
                )
                theta = found.x
            if found.fun < least:
                best, least = theta, found.fun
        return best

    def law(self, theta):
        a, b, e, alpha, beta = map(float, theta)
        by_size, by_data = self.centres
        return Law(math.exp(e), math.exp(a + alpha * by_size), math.exp(b + beta * by_data), alpha, beta)


class ParametricFit(NamedTuple):
    """The law, and what the bootstrap says of it."""

    law: Law
    residuals: np.ndarray  # ln of the measured loss - ln of the law's, of each run
    laws: list  # one for each draw of the bootstrap
    noise: np.ndarray  # residuals widened by the parameters that were fitted to them

    def interval(self, value):
        """The interval of value(law) over the draws."""
        return interval([value(law) for law in self.laws])

    def predicted(self, parameters, tokens, seed=0):
        """(loss, interval of the loss) of a run of that many parameters and tokens. The interval is of a run that is
        measured: it has the law's uncertainty and a run's own noise."""
        generator = np.random.default_rng(seed)
        losses = np.array([law.loss(parameters, tokens) for law in self.laws])
        losses *= np.exp(generator.choice([*self.noise, *-self.noise], len(losses)))
        return self.law.loss(parameters, tokens), interval(losses)


def interval(values):
    """The middle LEVEL of some numbers, as (low, high); (NaN, NaN) of none."""
    if not len(values):
        return math.nan, math.nan
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def widened(residuals, fitted):
    """Residuals of a fit, centred and as wide as the noise that they come from: a fit of `fitted` parameters to n runs
    takes up fitted / n of its variance."""
    runs = len(residuals)
    return (residuals - residuals.mean()) * math.sqrt(runs / max(1, runs - fitted))


def flipped(noise, generator):
    """Numbers, each with its own or the other sign."""
    return noise * generator.choice([-1, 1], len(noise))


def fit_parametric(points, draws=500, seed=0):
    """The ParametricFit of some runs. draws: of the wild bootstrap (Wu 1986, The Annals of Statistics 14:4): the law's
    losses times exp(plus or minus each run's own residual), fitted again from the best fit. (The papers draw runs; of
    15 runs that leaves draws in which a budget is missing.) Raises UserError for fewer than LEAST_RUNS runs."""
    if len(points.loss) < LEAST_RUNS:
        raise UserError(
            f"found {len(points.loss)} runs, expected at least {LEAST_RUNS} for the five parameters of the law"
        )
    objective = Objective(points)
    theta = objective.minimum(objective.starts())
    residuals = -objective.residuals(theta)[0]
    noise = widened(residuals, 5)
    generator = np.random.default_rng(seed)
    fitted = np.log(points.loss) - residuals
    laws = []
    for _ in range(draws):
        drawn = Objective(points._replace(loss=np.exp(fitted + flipped(noise, generator))))
        laws.append(drawn.law(drawn.minimum([theta], (1e-2, DELTA))))
    return ParametricFit(objective.law(theta), residuals, laws, noise)


# ---- parabolas


class Parabola(NamedTuple):
    """L = height + curvature (ln N - ln best)^2 of the runs of one budget."""

    budget: float
    best: float  # N of the minimum
    height: float  # L there
    curvature: float
    inside: bool  # whether there are runs on both sides of the minimum

    def loss(self, parameters):
        return self.height + self.curvature * np.log(parameters / self.best) ** 2


class PowerLaw(NamedTuple):
    """N = scale C^exponent."""

    scale: float
    exponent: float

    def at(self, flops):
        return self.scale * flops**self.exponent


class ParabolaFit(NamedTuple):
    parabolas: list
    size: PowerLaw | None  # of the best N over C; None with fewer than two minima inside their runs
    sizes: list  # a PowerLaw for each draw of the bootstrap
    passed_over: list  # a line for each budget that has no minimum


def parabola_of(budget, parameters, loss):
    """The Parabola through the runs of a budget by least squares, or None where it has no minimum."""
    places = np.log(parameters)
    centre = places.mean()
    curvature, slope, height = np.polyfit(places - centre, loss, 2)
    if not curvature > 0:
        return None
    best = -slope / (2 * curvature)
    if abs(best) > 20:
        return None
    inside = places.min() < centre + best < places.max()
    lowest = height - slope**2 / (4 * curvature)
    return Parabola(float(budget), math.exp(centre + best), float(lowest), float(curvature), bool(inside))


def power_law(x, y):
    """The PowerLaw through some points, by least squares of the logarithms."""
    exponent, offset = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(math.exp(offset), float(exponent))


def through_minima(parabolas):
    """The PowerLaw through the minima that lie between runs; None with fewer than two."""
    inside = [parabola for parabola in parabolas if parabola and parabola.inside]
    if len(inside) < 2:
        return None
    return power_law([parabola.budget for parabola in inside], [parabola.best for parabola in inside])


def fit_parabolas(points, draws=500, seed=0):
    """The ParabolaFit of some runs. The bootstrap is that of `fit_parametric`."""
    groups, passed_over, residuals = [], [], []
    for budget in np.unique(points.budget):
        chosen = points.budget == budget
        parameters, loss = points.parameters[chosen], points.loss[chosen]
        if len(np.unique(parameters)) < 3:
            passed_over.append(f"{budget:g} FLOPs: {len(loss)} runs, a parabola needs 3 sizes")
            continue
        found = parabola_of(budget, parameters, loss)
        if found is None:
            passed_over.append(f"{budget:g} FLOPs: the losses have no minimum over the sizes")
            continue
        if not found.inside:
            side = "smaller" if found.best < parameters.min() else "larger"
            passed_over.append(
                f"{budget:g} FLOPs: the minimum, N {found.best:.3g}, lies outside: {side} sizes are missing"
            )
        groups.append((found, parameters))
        residuals.append(loss - found.loss(parameters))
    parabolas = [found for found, _ in groups]
    size = through_minima(parabolas)
    sizes = []
    if size:
        noise = widened(np.concatenate(residuals), 3 * len(groups))
        ends = np.cumsum([len(parameters) for _, parameters in groups])[:-1]
        generator = np.random.default_rng(seed)
        for _ in range(draws):
            parts = np.split(flipped(noise, generator), ends)
            drawn = [
                parabola_of(found.budget, parameters, found.loss(parameters) + part)
                for (found, parameters), part in zip(groups, parts, strict=True)
                if found.inside
            ]
            drawn = [parabola._replace(inside=True) for parabola in drawn if parabola]
            if again := through_minima(drawn):
                sizes.append(again)
    return ParabolaFit(parabolas, size, sizes, passed_over)
