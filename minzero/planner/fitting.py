"""The fastest setting that fits, on many kinds and numbers of GPUs: replays are shared among them.

A replay takes 5 to 30 ms, the rest of a plan less than one. What is gathered in a micro-batch does not depend on its
size, and what blocks keep grows with it, so that one replay of a setting gives the speed of all its micro-batches. So
the speeds come first, and memory is replayed for the settings that may win.
"""

import dataclasses
from collections import Counter
from typing import NamedTuple

from minzero.adapters import BYTES
from minzero.config.build import build
from minzero.config.deepspeed import check_stage, offloads_optimizer, zero_stage
from minzero.errors import UserError
from minzero.planner.batches import legal_batch, micro_batches, with_batch
from minzero.planner.gpus import USABLE
from minzero.planner.memory import replayed
from minzero.planner.plan import plan_run, room_in
from minzero.planner.replay import Memory
from minzero.planner.search import CHOICES, RECOMPUTED, first_that_fits, smaller_buffers, with_choice
from minzero.planner.settings import settings_of
from minzero.planner.speed import Assumptions, step_time
from minzero.planner.stage import with_chosen_stage, with_stage
from minzero.sizes import count_parameters

# Of train.activation_checkpointing and train.activation_offload, beside RECOMPUTED.
MORE_RECOMPUTED = ((3, False), (2, False), (True, True))

# Of CHOICES, too: it sends less than stage 2 does.
STAGE_1_OFFLOADED = (1, "optimizer")

BUFFERS = ["buckets", "gathered"]  # parts that smaller buffers shrink
WORTH_A_LINE = 1.05  # times as fast


class Replayed(NamedTuple):
    """What a plan reads of a replayed engine."""

    memory: Memory
    size: int
    trained: int
    traffic: Counter
    kept_bytes: float


class Fitter:
    """Plans of one configuration on any GPUs. Replays are made once for all of them."""

    def __init__(self, config, assumptions=None, code=None):
        self.config = config
        self.assumptions = assumptions or Assumptions()
        self.code = code
        self.replays = {}
        self.known_settings = {}
        self.known_shrunk = {}
        self.too_few = {}  # (number of a variant, bytes of a GPU): GPUs on which it does not fit, nor on fewer
        self.all_variants = None

    # ---- plans

    def replayed(self, settings):
        """memory.replayed, from memory where only what the replay does not read differs."""
        steps = min(2, settings.gradient_accumulation_steps)  # later micro-batches are as the second
        ranks = settings.world_size if settings.stage else 1  # stage 0 has all of everything
        plain = dataclasses.replace(settings, gradient_accumulation_steps=steps, world_size=ranks)
        key = tuple(id(value) if name in ("model", "lora") else value for name, value in vars(plain).items())
        if key not in self.replays:
            engine = replayed(plain)
            found = Replayed(engine.memory, engine.size, engine.trained, engine.traffic, engine.kept_bytes)
            self.replays[key] = found, settings.model, settings.lora  # held, so that no others take their ids
        return self.replays[key][0]

    def plan(self, config, hardware):
        """The plan of a configuration, a copy of this one's with other keys. A stage "auto" is chosen."""
        config = with_chosen_stage(config, hardware, precision_on(hardware, config))
        return plan_run(config, hardware, self.assumptions, self.code, self.replayed)

    # ---- the candidates

    @property
    def variants(self):
        """[(number, Config)] of all settings beside the micro-batch that train.py takes: those of CHOICES, each with
        each kind of recomputation, and the given one, at all stages where it leaves that open. Of equally fast ones
        the first counts. Raises UserError if train.py takes none."""
        if self.all_variants is None:
            found = []
            for stage, offload in (*CHOICES, STAGE_1_OFFLOADED):
                for recompute, activation_offload in [*((value, False) for value in RECOMPUTED), *MORE_RECOMPUTED]:
                    variant = with_choice(self.config, stage, offload, recompute, 1)
                    variant.train.activation_offload = activation_offload
                    variant.model = self.config.model
                    found.append(variant)
            is_chosen = zero_stage(self.config.deepspeed) == "auto"
            found += [with_stage(self.config, stage) for stage in range(4)] if is_chosen else [self.config]
            self.all_variants = list(enumerate(variant for variant in found if is_accepted(variant)))
            if not self.all_variants:
                build(found[0].to_dict(), "configuration")  # says why
        return self.all_variants

    def shrunk(self, number):
        """A variant with smaller buffers."""
        if number not in self.known_shrunk:
            self.known_shrunk[number] = smaller_buffers(self.variants[number][1])
        return self.known_shrunk[number]

    def settings(self, number, config, hardware, size):
        """The Settings of a variant with a micro-batch of this size."""
        key = number, hardware.gpus, hardware.memory_bytes, precision_on(hardware, config), size
        if key not in self.known_settings:
            config = with_batch(config, size)
            self.known_settings[key] = settings_of(config, hardware.gpus, hardware.memory_bytes, hardware.card)
        return self.known_settings[key]

    # ---- the search

    def fastest(self, hardware):
        """(plan, Config) of the fastest setting that fits, over stages, offload, recomputation and micro-batches;
        (None, None) if none does. The largest micro-batch that fits is the fastest."""
        legal = legal_batch(self.config, hardware.gpus)
        tokens, sizes = legal.train.global_batch_tokens, micro_batches(legal, hardware.gpus)
        best, best_config = 0, None
        for most, number, variant in self.hopeful(hardware, tokens, sizes):
            if most <= best:
                break
            possible = self.possible(number, variant, hardware, sizes)
            reached = self.possible(number, variant, hardware, sizes, smaller=True)
            if not reached:
                self.too_few[number, hardware.memory_bytes] = hardware.gpus
            if not reached or self.speed(number, variant, hardware, reached[0], sizes[-1]) <= best:
                continue
            size = self.largest_that_fits(number, variant, hardware, possible)
            if size and (speed := self.speed(number, variant, hardware, size)) > best:
                best, best_config = speed, with_batch(variant, size)
            for larger in [other for other in reached if other > (size or 0)][-1:]:
                if self.speed(number, variant, hardware, larger, sizes[-1]) <= best:
                    continue
                number, variant = -1 - number, with_batch(self.shrunk(number), larger, tokens)
                fits = self.excess(number, variant, hardware, larger) <= 0
                if fits and (speed := self.speed(number, variant, hardware, larger)) > best:
                    best, best_config = speed, variant
        if best_config is None:
            return None, None
        return self.plan(best_config, hardware), best_config

    def larger_micro_batch(self, plan, hardware):
        """The plan with the largest micro-batch that fits, if that is larger and WORTH_A_LINE faster than `plan`, which
        is this configuration's; else None."""
        sizes = [size for size in micro_batches(self.config, hardware.gpus) if size > plan["micro_batch_size"]]
        candidates = [with_batch(self.config, size) for size in sizes]
        larger, _ = first_that_fits(candidates, lambda candidate: self.plan(candidate, hardware))
        is_faster = larger and larger["tokens_per_second"] >= WORTH_A_LINE * plan["tokens_per_second"]
        return larger if is_faster else None

    def hopeful(self, hardware, tokens, sizes):
        """[(tokens/s at the most, number, Config)] of the variants that train.py takes on this card, the fastest first.
        At the most: with the largest micro-batch, and at stage 3 as if nothing had to be gathered, for which nothing is
        replayed: what blocks keep is the same for all variants."""
        found = []
        precision = precision_on(hardware, self.config)
        number, variant = self.variants[0]
        first = self.replayed(self.settings(number, with_batch(variant, 1, tokens), hardware, sizes[-1]))
        kept_bytes = first.kept_bytes * sizes[0] / sizes[-1]
        free = first._replace(traffic=Counter(), kept_bytes=kept_bytes)
        for number, variant in self.variants:
            is_hopeless = hardware.gpus <= self.too_few.get((number, hardware.memory_bytes), 0)
            if not is_hopeless and goes_with(variant, precision) and has_sense(variant, hardware):
                variant = with_batch(variant, sizes[-1], tokens)
                settings = self.settings(number, variant, hardware, sizes[0])
                found.append((self.speed_of(settings, free, hardware), number, variant))
        return sorted(found, key=lambda one: -one[0])

    def possible(self, number, variant, hardware, sizes, smaller=False):
        """The micro-batches that may fit, the largest first. smaller: with smaller buffers. At each peak of the replay
        with the smallest one, activations grow with the micro-batch, and nothing shrinks, but for gradients: those of a
        step's only micro-batch are not added up, and may be narrower."""
        smallest = self.settings(number, variant, hardware, sizes[-1])
        if least_bytes(smallest) > USABLE * hardware.memory_bytes:
            return []
        peaks = self.replayed(smallest).memory.peaks.values()
        found = []
        for size in sizes:
            grown = size / sizes[-1] - 1
            shrinking = ["gradients"] if size == sizes[0] and len(sizes) > 1 else []
            shrinking += BUFFERS if smaller else []
            least = max(
                total + grown * held.get("activations", 0) - sum(held.get(part, 0) for part in shrinking)
                for total, held in peaks
            )
            if least <= USABLE * hardware.memory_bytes:
                found.append(size)
        return found

    def largest_that_fits(self, number, variant, hardware, sizes):
        """The largest micro-batch that fits, None if none does. The first is tried by itself: it is likely to fit, and
        it may be all of a rank's share."""

        def fits(size):
            return {"fits": self.excess(number, variant, hardware, size) <= 0}

        if not sizes or fits(sizes[0])["fits"]:
            return sizes[0] if sizes else None
        return first_that_fits(sizes[1:], fits)[1]

    def excess(self, number, variant, hardware, size):
        """Bytes that a GPU, or the node, lacks; at most 0 where the setting fits. Of what is sure not to fit, nothing
        is replayed."""
        settings = self.settings(number, variant, hardware, size)
        usable = USABLE * hardware.memory_bytes
        if (lacking := least_bytes(settings) - usable) > 0:
            return lacking
        engine = self.replayed(settings)
        fits_gpu, fits_cpu = room_in(settings, engine, hardware)
        if not fits_gpu:
            return max(total for total, _ in engine.memory.peaks.values()) - usable
        return 0 if fits_cpu else float("inf")

    def speed(self, number, variant, hardware, size, replayed_size=None):
        """Tokens/s of all GPUs. replayed_size: a micro-batch whose replay is there; None: this one's."""
        settings = self.settings(number, variant, hardware, size)
        if replayed_size is None:
            engine = self.replayed(settings)
        else:
            engine = self.replayed(self.settings(number, variant, hardware, replayed_size))
            engine = engine._replace(kept_bytes=engine.kept_bytes * size / replayed_size)
        return self.speed_of(settings, engine, hardware)

    def speed_of(self, settings, engine, hardware):
        """Tokens/s of all GPUs. engine: a Replayed."""
        step = step_time(settings, engine, hardware, self.assumptions, self.code)
        return settings.gradient_accumulation_steps * settings.tokens * settings.world_size / step.seconds


def least_bytes(settings):
    """Bytes of a GPU that the weights, their optimizer and no activations take at the least."""
    s, (size, _) = settings, count_parameters(settings.model)
    states = s.moment_bytes + (s.master_bytes if s.bytes < 4 else 0)
    weights = 0 if s.offload_param else (size - s.packed) * s.bytes / (s.world_size if s.stage == 3 else 1)
    weights += s.packed * BYTES
    trained = s.adapters or size
    return weights + (0 if s.offload_optimizer else trained * states / (s.world_size if s.stage else 1))


def precision_on(hardware, config):
    """train.precision on this card: what "auto" stands for there. Raises UserError for one that it has not."""
    given, card = config.train.precision, hardware.card
    if given == "bf16" and card and not card.has_bf16:
        raise UserError(f"train.precision: found bf16, which {card.name} has not; expected fp16, fp32 or auto")
    return card.precision if given == "auto" and card else given


def goes_with(config, precision):
    """Whether train.py takes the stage and the offload with this precision."""
    try:
        check_stage(config.deepspeed, precision)
    except UserError:
        return False
    return True


def has_sense(config, hardware):
    """Whether a setting may be worth its offload: a CPU has nowhere else to put anything."""
    return not (hardware.card and hardware.card.is_cpu and offloads_optimizer(config.deepspeed))


def is_accepted(config):
    """Whether train.py takes this configuration."""
    try:
        build(config.to_dict(), "candidate")
    except UserError:
        return False
    return True
