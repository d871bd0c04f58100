"""The GPUs of a plan: how many, their memory and peak, and how much of the memory can be allocated."""

from dataclasses import dataclass

from minzero.errors import UserError
from minzero.sizes import PEAK_FLOPS, peak_flops

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
    peak: float | None = None  # FLOP/s of one GPU in bf16; None: no speed is planned
    gpu: str = ""  # the name
    price: float | None = None  # dollars for one GPU and hour

    @property
    def gibibytes(self):
        """Memory of one GPU as text: 80."""
        return f"{self.memory_bytes / GiB:g}"


def peak_of(name):
    """Peak bf16 FLOP/s of a GPU as a user names it: h100, a100-40. Raises UserError for an unknown one."""
    peak = peak_flops(name) or peak_flops(name.upper())
    if peak is None:
        names = ", ".join(pattern.replace("\\b", "").strip("$") for pattern in PEAK_FLOPS)
        raise UserError(f"--gpu: peak of {name} unknown; known names (regular expressions): {names}")
    return peak


def in_units(size):
    """Bytes as text: 1,234.56 GiB or 45.6 MiB."""
    if size >= GiB:
        return f"{size / GiB:,.2f} GiB"
    return f"{size / 2**20:.1f} MiB"
