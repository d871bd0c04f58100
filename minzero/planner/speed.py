"""How fast a setting is and what it costs: arithmetic on stated assumptions; nothing here is measured."""

from dataclasses import dataclass, replace

from minzero.planner.memory import offloaded_activations, offloaded_elements
from minzero.sizes import flops_per_token, parameter_sizes, recomputed_flops_per_token


@dataclass
class Assumptions:
    """The rates that the speed rests on. Each can be given on the command line. Bytes/s are of one direction; None: the
    card's."""

    utilisation: float = 0.4  # of the peak, by the FLOPs that the device does (recomputed ones too), within a step
    link: float | None = None  # bytes/s between two GPUs of a node
    network: float | None = None  # bytes/s of one GPU to other nodes
    pcie: float | None = None  # bytes/s between a GPU and its node's memory
    cpu: float = 150e9  # bytes/s of a node's memory, which bounds Adam on the CPU

    def on(self, card):
        """These, with the card's rates in place of None. card: a Card, or None, of which no rate is known."""
        rates = ("link", "network", "pcie")
        return replace(self, **{name: getattr(card, name) for name in rates if card and getattr(self, name) is None})


def seconds_per_step(settings, parameters, tokens, hardware, assumptions):
    """One optimizer step over `tokens` tokens: products and communication overlap, offload's copies and Adam do not."""
    s, a = settings, assumptions
    flops = flops_per_token(s.model) + recomputed_flops_per_token(s.model, s.activation_checkpointing)
    peak = hardware.peak / 2 if s.bytes == 4 else hardware.peak  # fp32 is computed in TF32
    compute = flops * tokens / (s.world_size * peak * a.utilisation)
    bandwidth = a.network if hardware.nodes > 1 else a.link
    communication = communicated_bytes(s, parameters) / bandwidth
    return max(compute, communication) + offload_seconds(s, parameters, hardware.nodes, a)


def communicated_bytes(settings, parameters):
    """Bytes that a rank sends in a step. Stages 0 and 1 sum the gradients, or scatter them and gather the weights, once
    a step. Stage 2 scatters the gradients of each micro-batch; stage 3 also gathers the weights for the forward and for
    the backward pass, in which blocks are recomputed; those that stay whole once a step, after the update."""
    s = settings
    if s.stage == 3:
        gathered = 1 - persistent_elements(s) / parameters
        passes = s.gradient_accumulation_steps * (1 + 2 * gathered) + 1 - gathered
    elif s.stage == 2:
        passes = s.gradient_accumulation_steps + 1
    else:
        passes = 2
    model = parameters * s.bytes * (s.world_size - 1) / s.world_size  # a ring sends all but a rank's own part
    return passes * model


def persistent_elements(settings):
    """Stage 3: the weights that stay whole on every rank."""
    sizes = parameter_sizes(settings.model)
    everything = settings.model.n_layer * sizes.block + sizes.outside
    return sum(size for size in everything if size <= settings.persistence_threshold)


def offload_seconds(settings, parameters, nodes, assumptions):
    """Seconds of a step in which data is copied to and from CPU memory, or Adam runs there."""
    s, a = settings, assumptions
    shard = parameters / s.world_size
    seconds = 2 * offloaded_activations(s) * s.gradient_accumulation_steps / a.pcie
    if s.offload_param:
        passes = 2 * s.gradient_accumulation_steps
        seconds += passes * shard * s.bytes / a.pcie
    if s.offload_optimizer:
        offloaded = offloaded_elements(s, parameters)
        copies = (4 + s.bytes) * offloaded / a.pcie  # gradients to the CPU, weights to the GPU
        adam = 30 * offloaded * s.world_size / nodes / a.cpu  # it reads 16 bytes a parameter and writes 14
        seconds += copies + adam
    return seconds


def speed_and_cost(settings, parameters, max_tokens, hardware, assumptions):
    """Speed and cost of a run of max_tokens, as a part of the plan; None where no peak (or no price) is given."""
    tokens = settings.gradient_accumulation_steps * settings.tokens * settings.world_size
    found = {"tokens_per_second": None, "days": None, "gpu_hours": None, "cost": None}
    if hardware.peak:
        seconds = seconds_per_step(settings, parameters, tokens, hardware, assumptions)
        found["tokens_per_second"] = tokens / seconds
        found["days"] = max_tokens / found["tokens_per_second"] / 86400
        found["gpu_hours"] = found["days"] * 24 * settings.world_size
        if hardware.price is not None:
            found["cost"] = found["gpu_hours"] * hardware.price
    return found
