"""The GPUs of a plan: how many, of which card, and how much of their memory can be allocated."""

import math
from dataclasses import dataclass

from minzero.cards import Card, GiB, card_named, names_of
from minzero.errors import UserError

DEFAULT_GPU = "h100"
MOST_GPUS = 2**17  # of which a plan is made
# How much of a GPU may be allocated: the rest is what the allocator cannot reuse, the CUDA context and NCCL. Of the
# published largest models and batches that ran, none is predicted above USABLE, and few above COMFORTABLE.
USABLE = 0.9
COMFORTABLE = 0.8
# Bytes of CPU memory that a rank's process takes beside what the plan counts: Python, torch, CUDA's libraries. A run on
# an H100 that offloads nothing took 1.7 to 3.2 GiB (benchmarks/h100).
PROCESS = 3 * GiB


@dataclass
class Hardware:
    """The GPUs that a run is planned for."""

    gpus: int
    nodes: int
    memory_bytes: float  # of one GPU
    card: Card | None = None  # None: no speed is planned
    price: float | None = None  # dollars for one GPU and hour
    cpu_bytes: float | None = None  # RAM of one node; None: not known

    @property
    def peak(self):
        """FLOP/s of one GPU in bf16, or None."""
        return self.card and self.card.bf16

    @property
    def gpu(self):
        """The card's name."""
        return self.card.name if self.card else ""

    @property
    def gibibytes(self):
        """Memory of one GPU as text: 79.1."""
        return f"{round(self.memory_bytes / GiB, 2):g}"


def chosen_card(name, memory):
    """(Card, bytes of one) by --gpu and --gpu_memory, each of which may be None. A memory by which a card of this name
    is sold means that card, with what it really has; another is taken as so many GiB of the card. Raises UserError."""
    card = card_named(name or DEFAULT_GPU, memory)
    if memory is None or memory == card.sold_gb:
        return card, card.memory
    if name is None:  # which card it is, decides the speed
        names = names_of(memory)
        all_names = f"; cards of {memory:g} GB: {', '.join(names)}" if names else ""
        example = names[-1] if names else DEFAULT_GPU
        raise UserError(f"--gpu_memory {memory:g} without --gpu: name the card, for example --gpu {example}{all_names}")
    return card, memory * GiB


def rented(options):
    """The Hardware of a command's flags: gpus, gpu, gpu_memory, cpu_memory, nodes, price; all but gpus may be None.
    Raises UserError."""
    return on_card(*chosen_card(options.gpu, options.gpu_memory), options.gpus, options)


def nodes_of(card, gpus, options):
    """Nodes that hold so many GPUs: each has as many as --nodes says for --gpus, or as is usual."""
    each = options.gpus / options.nodes if options.nodes else card.node_gpus
    return math.ceil(gpus / each)


def on_card(card, memory, gpus, options):
    """The Hardware of so many GPUs of this card and memory, by the other flags of `rented`. Raises UserError."""
    nodes = nodes_of(card, gpus, options)
    if gpus % nodes and options.nodes:
        raise UserError(f"--nodes: {nodes} does not divide --gpus {gpus}; give nodes of as many GPUs each")
    if gpus % nodes:
        whole = next(count for count in range(nodes, gpus + 1) if gpus % count == 0)
        raise UserError(
            f"--gpus: found {gpus}, which {nodes} nodes of up to {card.node_gpus} GPUs do not have as many each; give "
            f"another number, or --nodes {whole} for {gpus // whole} on each"
        )
    if card.is_cpu:  # its processes share the RAM, which is all that they have
        return Hardware(gpus, nodes, memory / (gpus / nodes), card, options.price)
    share = min(1, gpus / nodes / card.node_gpus)  # a part of a node is rented with a part of its RAM
    cpu_bytes = share * card.node_memory if options.cpu_memory is None else options.cpu_memory * GiB
    price = card.price if options.price is None else options.price
    return Hardware(gpus, nodes, memory, card, price, cpu_bytes)
