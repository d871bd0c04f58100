"""How long a step takes: what a GPU computes and moves, what its host launches, what ranks send, what the CPU does.

Each part is a function with its formula. What this code reaches on a card is in the constants below and in cards.py;
docs/planner-accuracy.md says how each was found, and how far published speeds are from the result. `Code` can be what
a run was seen to need (measured.py).
"""

import math
from dataclasses import asdict, dataclass, replace

from minzero.adapters import adapter_shapes
from minzero.config.sections import Recomputation
from minzero.planner.memory import checkpoint_bytes, offloaded_activations, offloaded_elements
from minzero.schedule import Steps
from minzero.sizes import (
    attention_flops_per_token,
    count_parameters,
    flops_per_token,
    parameter_sizes,
    recomputed_flops_per_token,
)

# A backward pass of flash attention computes the scores again: 2.5 times the FLOPs of the forward pass (Dao 2023,
# arXiv 2307.08691, section 4.1).
ATTENTION_PASSES = 3.5
FORWARD = 1 / 3  # of the FLOPs of a step, and of what it moves: evaluation has no backward pass


@dataclass(frozen=True)
class Code:
    """What the code needs of a card, its host and its links, found as docs/planner-accuracy.md says. A measured run
    replaces some of it (measured.py)."""

    # bytes of a GPU's memory read and written for each byte that a block keeps for its backward pass
    moved_compiled: float = 9
    moved_eager: float = 12.5
    logit_bytes: float = 20  # for each logit, of the same
    # for each parameter of a rank in a step: gradients are added up, widened and their norm is taken; Adam reads and
    # writes weights and moments; weights are narrowed again
    optimizer_bytes: float = 150
    cpu_adam_bytes: float = 30  # of a node's memory for each parameter: Adam reads 16 and writes 14
    # seconds of a host for the launches of a block, forward and backward; more for the hooks of stages 1 and 2, and
    # of stage 3; for a step
    host_compiled: float = 1.7e-3
    host_eager: float = 2.1e-3
    host_zero12: float = 0.6e-3
    host_zero3: float = 2.8e-3
    host_step: float = 10e-3
    nccl: float = 0.8  # share of a link's bytes/s that large messages reach
    latency: float = 30e-6  # seconds of a call at the least, for each doubling of the ranks
    hidden: float = 0.2  # share of the communication behind products that overlap_comm hides: both need the memory
    pace: float = 1.0  # how many times as long products, attention and memory traffic take
    source: str | None = None  # of a measured run


# On CPUs: gloo's calls, and no queue of kernels that a host could fall behind of. From seven settings of configs/tiny
# on two cores (docs/planner-accuracy.md).
ON_CPU = Code(
    moved_eager=10,
    logit_bytes=45,
    host_eager=2e-3,
    host_zero12=0.5e-3,
    host_zero3=6e-3,
    host_step=25e-3,
    latency=200e-6,
    hidden=0.0,
)


def code_on(card):
    """The Code of a card, where nothing was measured."""
    return ON_CPU if card.is_cpu else Code()


@dataclass
class Assumptions:
    """Rates that can be given on the command line; None: the card's. Bytes/s are of one direction."""

    utilisation: float | None = None  # of the peak, by the FLOPs done, recomputed ones too, in place of the roofline
    link: float | None = None  # bytes/s between two GPUs of a node
    network: float | None = None  # bytes/s of one GPU to other nodes
    pcie: float | None = None  # bytes/s between a GPU and its node's memory
    cpu: float = 33e9  # bytes/s of a node's memory in DeepSpeed's CPU Adam
    disk: float = 1e9  # bytes/s of one node to where checkpoints go
    nvme: float = 5e9  # bytes/s of one node's drives, for what is offloaded to them

    def on(self, card):
        """These, with the card's rates in place of None. card: a Card, or None, of which no rate is known."""
        rates = ("link", "network", "pcie")
        return replace(self, **{name: getattr(card, name) for name in rates if card and getattr(self, name) is None})


@dataclass
class StepTime:
    """Seconds of one optimizer step. A GPU works while its host launches what comes next, and waits where that takes
    longer; the optimizer begins when the last micro-batch has ended, and its gradients' norm is known."""

    products: float  # matrix products, of all micro-batches as all others here
    attention: float
    traffic: float  # memory traffic between the products
    optimizer: float  # of the GPU: Adam and what goes with it
    host: float  # launches
    waiting: float  # of those, the seconds in which the GPU has nothing to do; on a CPU all
    communication: float
    hidden: float  # of the communication, behind compute or launches
    offload: float  # copies to and from the CPU, and Adam on it

    @property
    def forward_backward(self):
        """Of the GPU."""
        return self.products + self.attention + self.traffic

    @property
    def compute(self):
        """Of the GPU, with the optimizer's step."""
        return self.forward_backward + self.optimizer

    @property
    def seconds(self):
        exposed = self.communication - self.hidden
        return self.compute + self.waiting + exposed + self.offload

    @property
    def bound_by(self):
        """The largest part, in one word."""
        parts = {
            "compute": self.compute,
            "communication": self.communication - self.hidden,
            "offload": self.offload,
            "host": self.host if self.waiting else 0,
        }
        return max(parts, key=parts.get)


# ---- the parts of a micro-batch on one GPU, in seconds


def product_seconds(settings, card):
    """Matrix products of a micro-batch: 6 FLOPs a token for each weight that multiplies it, those recomputed on top, at
    the share of the peak that large products reach."""
    s = settings
    # frozen weights have no gradients of their own
    flops = (4 if s.adapters else 6) * count_parameters(s.model)[1] + 6 * s.adapters
    flops += recomputed_flops_per_token(s.model, s.activation_checkpointing)
    flops -= recomputed_blocks(s) * attention_flops_per_token(s.model)
    return flops * s.tokens / (peak_of(s, card) * card.products)


def attention_seconds(settings, card):
    """Attention's own two products of a micro-batch."""
    s = settings
    compared = sum(map(s.compared, range(s.model.n_layer)))
    flops = 4 * s.model.n_head * s.model.head_size * compared * (ATTENTION_PASSES + recomputed_blocks(s))
    return flops * s.tokens / (peak_of(s, card) * card.attention)


def traffic_seconds(settings, card, code, kept_bytes):
    """Reading and writing activations and logits of a micro-batch. kept_bytes: what all blocks would keep for their
    backward pass if none was recomputed."""
    s = settings
    moved = code.moved_compiled if s.compiled else code.moved_eager
    blocks = kept_bytes * moved * (1 + FORWARD * recomputed_blocks(s))
    logits = s.tokens * s.model.vocab_size * code.logit_bytes * s.bytes / 2
    return (blocks + logits) / card.hbm


def host_seconds(settings, code):
    """The launches of a micro-batch."""
    s = settings
    launches = (code.host_compiled if s.compiled else code.host_eager) * (1 + FORWARD * recomputed_blocks(s))
    hooks = {0: 0, 3: code.host_zero3}.get(s.stage, code.host_zero12)
    return s.model.n_layer * (launches + hooks)


def recomputed_blocks(settings):
    """The share of the blocks whose forward pass is computed twice, or the part of it that a budget leaves out."""
    every, selective, budget = Recomputation.of(settings.activation_checkpointing)
    if selective:
        return 0
    blocks = -(-settings.model.n_layer // every) / settings.model.n_layer if every else 0
    return blocks + 1 - budget


def peak_of(settings, card):
    """FLOP/s of the card in this precision; fp32 is computed in TF32 where there is one."""
    return card.tf32 if settings.bytes == 4 else card.bf16


# ---- what is sent


def collective_seconds(elements, calls, settings, hardware, rates, code):
    """Gathering or scattering so many elements in so many calls. A ring sends all but a rank's own part over each GPU's
    link; what other nodes need crosses the network once for each node, over the network cards of all its GPUs."""
    ranks, nodes = settings.world_size, hardware.nodes
    if ranks == 1 or not elements:
        return 0
    size = elements * settings.bytes
    inside = size * (ranks - 1) / ranks / rates.link
    outside = size * (nodes - 1) / nodes / (ranks / nodes * rates.network)
    return max(inside, outside) / code.nccl + calls * code.latency * math.log2(ranks)


def gathering_seconds(settings, traffic, hardware, rates, code):
    """Stage 3: gathering weights for one micro-batch, the mean of a step's. Where groups of ranks keep a second copy of
    them (zero_hpz_partition_size), a weight is gathered over all ranks once a step, and then within the group."""
    s = settings
    elements, calls = traffic["gathered"], traffic["gathers"]
    if s.second_copy <= 1:
        return collective_seconds(elements, calls, s, hardware, rates, code)
    first = traffic["gathered_first"] / s.gradient_accumulation_steps
    first_calls = traffic["gathers_first"] / s.gradient_accumulation_steps
    ranks = min(s.second_copy, s.world_size)
    nodes = -(-ranks * hardware.nodes // s.world_size)
    group, within = replace(s, world_size=ranks), replace(hardware, gpus=ranks, nodes=nodes)
    seconds = collective_seconds(first, first_calls, s, hardware, rates, code)
    return seconds + collective_seconds(elements - first, calls - first_calls, group, within, rates, code)


def communication_seconds(settings, engine, hardware, rates, code):
    """(of each micro-batch, once a step). Stage 3 gathers the weights of the blocks that it does not keep, as often as
    the replay does, and scatters the gradients, of each micro-batch; those that stay whole are gathered once a step,
    after the update. Stage 2 scatters the gradients of each micro-batch, stages 0 and 1 once a step; then all weights
    are gathered (stage 0 sums gradients, which sends as much)."""
    s, size = settings, engine.trained
    buckets = -(-size // s.reduce_bucket_size)

    def seconds(elements, calls):
        return collective_seconds(elements, calls, s, hardware, rates, code)

    if s.stage == 3:
        traffic = engine.traffic
        gathering = gathering_seconds(s, traffic, hardware, rates, code)
        each = gathering + seconds(size, traffic["reductions"])
        return each, seconds(persistent_elements(s), 1)
    if s.stage == 2:
        return seconds(size, buckets), seconds(size, buckets)
    return 0, 2 * seconds(size, buckets)


def communicated_bytes(settings, engine):
    """Bytes that a rank sends in a step."""
    s = settings
    elements = {
        3: s.gradient_accumulation_steps * (engine.traffic["gathered"] + engine.trained) + persistent_elements(s),
        2: (s.gradient_accumulation_steps + 1) * engine.trained,
    }.get(s.stage, 2 * engine.trained)
    return elements * s.bytes * (s.world_size - 1) / s.world_size


def persistent_elements(settings):
    """Stage 3: the weights that stay whole on every rank and are trained."""
    sizes = parameter_sizes(settings.model)
    everything = settings.model.n_layer * sizes.block + sizes.outside
    if settings.adapters:
        everything = map(math.prod, adapter_shapes(settings.model, settings.lora).values())
    return sum(size for size in everything if size <= settings.persistence_threshold)


def offload_seconds(settings, engine, hardware, rates, code):
    """Seconds of a step in which data is copied to and from CPU memory, or Adam runs there."""
    s = settings
    ranks = s.world_size / hardware.nodes  # of a node
    seconds = 2 * offloaded_activations(s) * s.gradient_accumulation_steps / rates.pcie
    if s.offload_param:
        copied = s.gradient_accumulation_steps * engine.traffic["gathered"] / s.world_size
        seconds += copied * s.bytes / rates.pcie
        if s.param_on_nvme:
            seconds += copied * s.bytes * ranks / rates.nvme
    if s.offload_optimizer:
        offloaded = offloaded_elements(s, engine.trained)
        # gradients to the CPU in float32, weights to the GPU
        copies = (4 + s.bytes + accumulated_bytes_copied(s)) * offloaded / rates.pcie
        seconds += copies + code.cpu_adam_bytes * offloaded * ranks / rates.cpu
        if s.optimizer_on_nvme:  # weights, moments and gradients are read, weights and moments written
            seconds += 28 * offloaded * ranks / rates.nvme
    return seconds


def accumulated_bytes_copied(settings):
    """Bytes of a step for each gradient that is added up in CPU memory, from and to which the GPU copies the sum: at
    stage 3 in each micro-batch (stage3.py's partition_grads), at stage 2 only if there are several, and if the sum is
    as wide as the weights; else it stays on the GPU (stage_1_and_2.py's copy_grads_in_partition)."""
    s = settings
    width = s.accumulation_bytes or s.bytes
    if s.stage == 3:
        return 2 * s.gradient_accumulation_steps * width
    if s.stage == 2 and width == s.bytes:
        return (2 * s.gradient_accumulation_steps - 1) * width if s.gradient_accumulation_steps > 1 else 0
    return 0


# ---- the step and the run


def step_time(settings, engine, hardware, assumptions, code=None):
    """The StepTime of one optimizer step. engine: the replayed one (memory.replayed). Hardware must have a card."""
    s, card = settings, hardware.card
    code = code or code_on(card)
    rates = assumptions.on(card)
    accumulation = s.gradient_accumulation_steps
    products, attention = product_seconds(s, card), attention_seconds(s, card)
    traffic = traffic_seconds(s, card, code, engine.kept_bytes)
    if assumptions.utilisation:
        flops = flops_per_token(s.model) + recomputed_flops_per_token(s.model, s.activation_checkpointing)
        products = flops * s.tokens / (peak_of(s, card) * assumptions.utilisation)
        attention = traffic = 0
    on_gpu = engine.trained / (s.world_size if s.stage else 1)
    if s.offload_optimizer:
        on_gpu -= offloaded_elements(s, engine.trained)
    each, once = communication_seconds(s, engine, hardware, rates, code)
    gpu, host = code.pace * (products + attention + traffic), host_seconds(s, code)
    waiting = host if card.is_cpu else max(0, host - gpu)
    busy = gpu + waiting
    hidden = code.hidden * min(each, busy) if s.overlap_comm else 0
    return StepTime(
        products=accumulation * code.pace * products,
        attention=accumulation * code.pace * attention,
        traffic=accumulation * code.pace * traffic,
        optimizer=code.optimizer_bytes * on_gpu / card.hbm,
        host=accumulation * host + code.host_step,
        waiting=accumulation * waiting + code.host_step,
        communication=accumulation * each + once,
        hidden=accumulation * hidden,
        offload=offload_seconds(s, engine, hardware, rates, code),
    )


def seconds_between_steps(config, settings, engine, step, hardware, assumptions):
    """(evaluating, saving) seconds of a whole run beside its steps, as the config asks for them. A checkpoint that is
    written in the background holds nothing up."""
    train, steps = config.train, steps_of(config)
    evaluations = steps // train.eval_every + 1 if train.eval_every else 1
    # only stage 3 gathers in a forward pass
    sent = (step.communication - step.hidden) * FORWARD if settings.stage == 3 else 0
    forward = ((step.forward_backward + step.waiting) * FORWARD + sent) / train.global_batch_tokens
    saves = steps // train.save_every + 1 if train.save_every else 1
    written = checkpoint_bytes(settings, engine.trained) / hardware.nodes / assumptions.disk
    saving = 0 if train.save_in_background else saves * written
    return evaluations * train.eval_tokens * forward, saving


def steps_of(config):
    """Optimizer steps of a run, the last of which may not be whole."""
    steps = Steps(config.train)
    return steps.total + (steps.tokens_at(steps.total) < config.train.max_tokens)


def seconds_of_steps(train, settings, whole, seconds_of):
    """Seconds of all steps of a run. Those of a smaller batch, where it grows, have fewer micro-batches; the time of a
    step is a straight line over their number. whole: seconds of a step of the full batch; seconds_of(Settings): of one
    with other settings."""
    at_once = settings.tokens * settings.world_size  # tokens of a micro-batch of all ranks
    each = settings.gradient_accumulation_steps * at_once
    growing = Steps(train).ends[1:]
    if not growing:
        return train.max_tokens / each * whole
    first, last = train.first_batch_tokens, train.global_batch_tokens
    smallest = seconds_of(replace(settings, gradient_accumulation_steps=max(1, first // at_once)))
    slope = (whole - smallest) / (last - first) if last > first else 0
    growing_seconds = len(growing) * smallest + (growing[-1] - len(growing) * first) * slope
    return growing_seconds + (train.max_tokens - growing[-1]) / each * whole


def speed_and_cost(config, settings, engine, hardware, assumptions, code=None):
    """Speed and cost of a run, as a part of the plan; None where there is no card (or no price)."""
    keys = "tokens_per_second step_seconds step_parts bound_by mfu hfu days gpu_hours cost"
    found = dict.fromkeys(keys.split())
    if not hardware.card:
        return found

    def time_of(settings):
        return step_time(settings, engine, hardware, assumptions, code)

    step = time_of(settings)
    tokens = settings.gradient_accumulation_steps * settings.tokens * settings.world_size
    found["step_seconds"] = step.seconds
    found["step_parts"] = asdict(step)
    found["bound_by"] = step.bound_by
    found["tokens_per_second"] = tokens / step.seconds
    if not hardware.card.is_cpu:  # as metrics.jsonl has them: of the 16-bit peak
        flops = flops_per_token(config.model)
        recomputed = recomputed_flops_per_token(config.model, config.train.activation_checkpointing)
        rate = found["tokens_per_second"] / settings.world_size / hardware.card.bf16
        found["mfu"], found["hfu"] = rate * flops, rate * (flops + recomputed)
    evaluating, saving = seconds_between_steps(config, settings, engine, step, hardware, assumptions)
    found["evaluation_days"], found["saving_days"] = evaluating / 86400, saving / 86400
    training = seconds_of_steps(config.train, settings, step.seconds, lambda settings: time_of(settings).seconds)
    found["days"] = (training + evaluating + saving) / 86400
    found["gpu_hours"] = found["days"] * 24 * settings.world_size
    if hardware.price is not None:
        found["cost"] = found["gpu_hours"] * hardware.price
    return found
