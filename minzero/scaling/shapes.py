"""Families of model shapes for scaling laws: one width of a head, one ratio of width to depth, any size.

A size is N, the number of parameters, counted in one of three ways (COUNTS). They differ little in a large model and
much in a small one, whose embeddings may be half of it; the exponents that Kaplan et al. (2020, arXiv 2001.08361) and
Hoffmann et al. (2022, arXiv 2203.15556) found differ mostly by that (Pearce and Song 2024, arXiv 2406.12907; Porian et
al. 2024, arXiv 2406.19146). Needs no torch.
"""

import dataclasses
import functools
import math

from minzero.config.sections import ModelConfig
from minzero.config.values import in_short
from minzero.errors import UserError
from minzero.sizes import count_parameters, flops_per_token, parameter_sizes

LEAST_RUNS = 6  # of a fit: one more than the law has parameters
COUNTS = {
    "all": "all parameters, as Hoffmann et al. count",
    "blocks": "those of the blocks, without embeddings and output layer, as Kaplan et al. count",
    "flops": "model FLOPs per token / 6, with which C = 6 N D is exact",
}
MOST_LAYERS = 1000
LOOSE = 1.5  # how far width / depth may be from the config's, as a factor
LAYERS_BY_NUMBER = ("no_rotary_layers", "full_attention_layers")


def count(model: ModelConfig, how="all"):
    """N of a model, as COUNTS[how] says. Raises UserError for a key that the formulas do not know."""
    total, _ = count_parameters(model)
    if how == "all":
        return total
    if how == "blocks":
        return model.n_layer * sum(parameter_sizes(model).block)
    return flops_per_token(model) / 6


def name_of(model: ModelConfig):
    """A shape's name, as 4x96: depth x width."""
    return f"{model.n_layer}x{model.n_embd}"


class Family:
    """The shapes of a model at other sizes: heads as wide, with as many query heads to a key head, an MLP of the same
    multiple of the width where model.mlp_hidden names one; all else as in `model`. how: of COUNTS.

    Raises UserError for a model in which layers are chosen by their number, which another depth would change."""

    def __init__(self, model: ModelConfig, how="all"):
        for name in LAYERS_BY_NUMBER:
            if isinstance(value := getattr(model, name), list):
                raise UserError(
                    f"model.{name}: found {in_short(value)}, which another depth would change; expected every k-th, "
                    "as a number, or null"
                )
        self.model = model
        self.how = how
        self.aspect = model.n_embd / model.n_layer
        self.channels = model.n_embd / model.n_head  # of the width, for each head
        self.count = functools.cache(lambda shape: count(self.at(*shape), how))

    def at(self, n_layer, n_head):
        """The ModelConfig with this depth and number of heads."""
        model = self.model
        width = round(n_head * self.channels)
        changes = {"n_layer": n_layer, "n_head": n_head, "n_embd": width}
        if model.n_kv_head:
            changes["n_kv_head"] = n_head * model.n_kv_head // model.n_head
        if model.mlp_hidden:
            changes["mlp_hidden"] = max(1, round(model.mlp_hidden / model.n_embd * width))
        return dataclasses.replace(model, **changes)

    def is_legal(self, n_layer, n_head):
        """Whether the model section takes this shape, with key heads that are as many of the query heads."""
        model = self.model
        if n_head * (model.n_kv_head or model.n_head) % model.n_head or n_head * self.channels % 1:
            return False
        try:
            self.at(n_layer, n_head).check()
        except UserError:
            return False
        return True

    def shapes(self, least, most):
        """Yields the legal (n_layer, n_head) whose N is between `least` and `most`, and whose width / depth is near the
        config's."""
        for n_head in range(1, 2**20):
            ideal = n_head * self.channels / self.aspect
            depths = range(max(1, math.ceil(ideal / LOOSE)), max(1, round(ideal), math.floor(ideal * LOOSE)) + 1)
            inside = False
            for n_layer in depths:
                if n_layer > MOST_LAYERS or not self.is_legal(n_layer, n_head):
                    inside = True
                    continue
                size = self.count((n_layer, n_head))
                inside |= size <= most
                if least <= size <= most:
                    yield n_layer, n_head
            if not inside or n_head * self.channels > 2**20:
                return

    def nearest(self, target):
        """The ModelConfig whose N is nearest to a number; of several nearly as near, the one whose width / depth is
        nearest to the config's."""

        def distance(shape):
            n_layer, n_head = shape
            aspect = n_head * self.channels / n_layer
            return abs(math.log(self.count(shape) / target)) + 0.25 * abs(math.log(aspect / self.aspect))

        found = min(self.shapes(target / 2, 2 * target), key=distance, default=None)
        return self.at(*found) if found else None


class Grid:
    """Sizes spaced geometrically: those of `family` nearest to N of its own model times `spacing` to a whole power. The
    same grid for every budget, so that budgets share sizes, and a budget that is added later finds them."""

    def __init__(self, family, spacing):
        self.family = family
        self.spacing = spacing
        self.own = count(family.model, family.how)
        self.at = functools.cache(self.at)

    def at(self, power):
        """The ModelConfig at a power of the spacing, or None where no shape is so small or large."""
        return self.family.nearest(self.own * self.spacing**power)

    def tokens_per_parameter(self, power, flops):
        model = self.at(power)
        return flops / flops_per_token(model) / count(model, self.family.how)

    def around(self, flops, wanted, ratio):
        """The powers of the `wanted` sizes around the one whose run of this many FLOPs sees `ratio` tokens for each
        parameter. Fewer where no shape is so small. Raises UserError if fewer than three are left."""

        def distance(power):
            return abs(math.log(self.tokens_per_parameter(power, flops) / ratio))

        power = 0
        for step in (1, -1):
            while self.at(power + step) and distance(power + step) < distance(power):
                power += step
        first = power - wanted // 2
        if wanted % 2 == 0 and self.at(power + 1) and self.at(power - 1):
            first += distance(power + 1) < distance(power - 1)
        found, names = [], set()
        for other in range(first, first + wanted):
            model = self.at(other)
            if model and name_of(model) not in names:
                names.add(name_of(model))
                found.append(other)
        if len(found) < 3:
            raise UserError(
                f"--flops: {flops:g}: found {len(found)} sizes around {ratio:g} tokens a parameter, expected at least "
                "3; raise it, or give a config with a narrower head or a smaller vocabulary"
            )
        return found
