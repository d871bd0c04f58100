"""The GPUs of a plan: how many, their memory and peak, and how much of the memory can be allocated."""

from dataclasses import dataclass

from minzero.cards import Card

GiB = 2**30
MOST_GPUS = 2**17  # of which a plan is made
# How much of a GPU may be allocated: the rest is what the allocator cannot reuse, the CUDA context and NCCL. Of the
# published largest models and batches that ran, none is predicted above USABLE, and few above COMFORTABLE.
USABLE = 0.9
COMFORTABLE = 0.8


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
        """Memory of one GPU as text: 80."""
        return f"{self.memory_bytes / GiB:g}"


def in_units(size):
    """Bytes as text: 1,234.56 GiB or 45.6 MiB."""
    if size >= GiB:
        return f"{size / GiB:,.2f} GiB"
    return f"{size / 2**20:.1f} MiB"
