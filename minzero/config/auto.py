"""DeepSpeed's keys that are "auto": their values, from the model's shape, the ranks and a rank's memory.

Sizes of buffers and limits are in elements. What each value is worth was measured by benchmarks/zero.py, and what is
gathered when by tests/launch/test_gathers.py. Needs neither torch nor DeepSpeed.
"""

from typing import NamedTuple

from minzero.config.sections import ModelConfig
from minzero.sizes import parameter_sizes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a weight
WHOLE = 1 / 16  # of a rank's memory: weights that take at most this are kept whole on every rank
LIVE = 1 / 8  # of a rank's memory: gathered blocks that take at most this are kept for a while
BUCKET = 50_000_000  # gradients summed in one call: 100 MB in 16 bits, enough for a network's full bandwidth
LARGE = 2**22  # a matrix from which on a call of its own costs less than a copy out of a common buffer


class Facts(NamedTuple):
    """What the values follow from."""

    model: ModelConfig
    stage: int  # of ZeRO
    world_size: int  # ranks
    precision: str  # bf16, fp16 or fp32
    accumulation: int  # micro-batches of a rank in one step
    memory: float | None  # bytes of a rank's device; None: not known
    offloads_weights: bool
    selective: bool = False  # of train.activation_checkpointing
    reduce_scatter: bool = True
    persistence: int | None = None  # stage3_param_persistence_threshold, where the config has a number

    @property
    def block(self):
        """Weights of a block."""
        return sum(parameter_sizes(self.model).block)

    @property
    def largest_outside(self):
        """Weights of the largest parameter outside of the blocks: the embedding."""
        return max(parameter_sizes(self.model).outside)

    def is_within(self, elements, share):
        """Whether so many weights take at most this share of the memory."""
        return self.memory is not None and elements * BYTES[self.precision] <= share * self.memory

    @property
    def keeps_whole(self):
        """Stage 3: whether every weight stays on every rank. Then they are gathered once a step, after the update."""
        sizes = parameter_sizes(self.model)
        if self.persistence is not None:
            return self.persistence >= max(sizes.block + sizes.outside)
        everything = self.model.n_layer * sum(sizes.block) + sum(sizes.outside)
        return not self.offloads_weights and self.is_within(everything, WHOLE)

    @property
    def much_live(self):
        """Gathered weights with which the blocks at the turn from forward to backward need no second gather."""
        return 5 * self.block + 2 * self.largest_outside

    @property
    def has_room(self):
        return self.is_within(self.much_live, LIVE)

    @property
    def every_rank_has_parts(self):
        """Stage 3: whether each rank has a part of every parameter, which is cut into equal parts but for the last."""
        sizes = parameter_sizes(self.model)
        return all((self.world_size - 1) * -(-size // self.world_size) < size for size in sizes.block + sizes.outside)


def live(facts):
    # the block that runs and the one that is fetched must have room, or nothing is fetched ahead
    return facts.much_live if facts.has_room else 2 * facts.block


def prefetch(facts):
    # DeepSpeed fetches weights until this many are reached: the next block to its end, and no part of another. Beside
    # experts, the block's last weight may be less than a fiftieth of it
    sizes = [size for size in parameter_sizes(facts.model).block if size > persistence(facts)]
    return max(int(0.98 * sum(sizes)), sum(sizes) - min(sizes, default=0) // 2)


def reuse_distance(facts):
    return 2 * facts.block if facts.has_room else 0


def persistence(facts):
    if facts.persistence is not None:
        return facts.persistence
    if facts.keeps_whole:
        sizes = parameter_sizes(facts.model)
        return max(sizes.block + sizes.outside)
    # biases and weights of norms, and routers: one more gather for little
    return max(100_000, 10 * facts.model.n_embd, (facts.model.n_expert or 0) * facts.model.n_embd)


def bucket(facts):
    if facts.stage == 3:  # several sums within a backward pass, so that they overlap with it
        return min(BUCKET, max(facts.block, 1_000_000))
    return BUCKET


def overlap(facts):
    return facts.stage == 3  # at stages 1 and 2 it is not shown to be right (DeepSpeed's issue 8061)


def contiguous(facts):
    # At stage 3 only an all-reduce reads the buffer into which gradients would be copied. A copy is needed too where a
    # rank has no part of some parameter: it frees that gradient while an overlapping sum may still read it
    # (partition_grads in DeepSpeed 0.19.8).
    return facts.stage != 3 or not facts.reduce_scatter or not facts.every_rank_has_parts


def deepspeeds_linear(facts):
    # Torch's own is faster, but keeps the gathered weights that it computed with. Selective recomputation needs it:
    # DeepSpeed's adds the bias in place, to a product that was kept, and would add it again.
    return not facts.keeps_whole and not facts.selective


def accumulated_type(facts):
    # The sum of 64 gradients in bf16 is 1% off (docs/benchmarks.md). At stages 0 and 1 DeepSpeed has no other way.
    several_in_16_bits = facts.accumulation > 1 and facts.precision != "fp32"
    return "fp32" if several_in_16_bits and facts.stage >= 2 else None


def one_by_one(facts):
    matrices = [size for size in parameter_sizes(facts.model).block if size > persistence(facts)]
    return bool(matrices) and min(matrices) >= LARGE


VALUES = {
    "data_types.grad_accum_dtype": accumulated_type,
    "zero_optimization.overlap_comm": overlap,
    "zero_optimization.contiguous_gradients": contiguous,
    "zero_optimization.reduce_bucket_size": bucket,
    "zero_optimization.stage3_prefetch_bucket_size": prefetch,
    "zero_optimization.stage3_max_live_parameters": live,
    "zero_optimization.stage3_max_reuse_distance": reuse_distance,
    "zero_optimization.stage3_param_persistence_threshold": persistence,
    "zero_optimization.stage3_allgather_sequential": one_by_one,
    "zero_optimization.memory_efficient_linear": deepspeeds_linear,
}
AUTO = (*VALUES, "zero_optimization.stage")  # the stage is chosen by planner/stage.py


def resolve(deepspeed, facts):
    """{key, as "zero_optimization.reduce_bucket_size": its value} of those keys of a DeepSpeed configuration that are
    "auto" beside the stage."""
    found = {}
    for key, value in VALUES.items():
        section, _, name = key.rpartition(".")
        if deepspeed.get(section, {}).get(name) == "auto":
            found[key] = value(facts)
    return found
