"""GPUs and the nodes that they are usually rented in: memory, speeds, prices, each with its source. Needs no torch."""

import re
from dataclasses import dataclass, replace

from minzero.errors import UserError

GiB, TiB = 2**30, 2**40


@dataclass(frozen=True)
class Card:
    """One GPU. FLOP/s are dense (without sparsity), with sums in fp32. Bytes/s are of one direction."""

    name: str  # as it is shown
    names: tuple  # as people type it: lower case, words joined by dashes
    device: str  # regular expression for the name that the driver gives it
    sold_gb: int  # the memory that it is sold by
    memory: float  # bytes: total_memory of torch.cuda.get_device_properties
    bf16: float  # FLOP/s; of a card without bf16 those of fp16
    tf32: float  # FLOP/s in which fp32 products run: TF32, or fp32 where there is no TF32
    fp8: float | None  # FLOP/s
    hbm: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of its node: NVLink, or PCIe where there is none
    pcie: float  # bytes/s to the node's memory
    network: float  # bytes/s of one GPU to other nodes
    node_gpus: int  # of the node that it is usually rented in
    node_memory: float  # bytes of that node's RAM
    source: str  # of the figures
    has_bf16: bool = True
    products: float = 0.84  # share of its peak that large matrix products reach
    attention: float = 0.31  # the same of flash attention, of the FLOPs of the half that is not masked
    price: float | None = None  # dollars for one GPU and hour, on demand
    priced: str | None = None  # where and when the price was published


# Usable bytes/s of 16 lanes of PCIe, one direction: about 80% of the bare rate (15.75, 31.5 and 63 GB/s).
PCIE_3, PCIE_4, PCIE_5 = 12e9, 25e9, 50e9

# Nodes. HGX and DGX give each GPU a network card of its own: 200 Gbit/s beside A100, 400 Gbit/s beside H100.
DGX_A100 = {"pcie": PCIE_4, "network": 25e9, "node_gpus": 8, "node_memory": 1 * TiB}
DGX_H100 = {"pcie": PCIE_5, "network": 50e9, "node_gpus": 8, "node_memory": 2 * TiB}

AMPERE = {"bf16": 312e12, "tf32": 156e12, "fp8": None}
HOPPER = {"bf16": 989e12, "tf32": 494e12, "fp8": 1979e12, "products": 0.73, "attention": 0.2}

A100_40 = Card(
    "A100 SXM 40 GB",
    ("a100-40", "a100-sxm-40", "a100-sxm4-40"),
    r"A100-SXM\S*-40GB",
    sold_gb=40,
    memory=39.39 * GiB,
    hbm=1555e9,
    link=300e9,
    source="NVIDIA A100 data sheet",
    **AMPERE,
    **DGX_A100,
)
A100_80 = replace(
    A100_40,
    name="A100 SXM 80 GB",
    names=("a100", "a100-80", "a100-sxm", "a100-sxm-80", "a100-sxm4-80"),
    device=r"A100\b",
    sold_gb=80,
    memory=79.15 * GiB,
    hbm=2039e9,
    node_memory=2 * TiB,
)
H100 = Card(
    "H100 SXM",
    ("h100", "h100-80", "h100-sxm", "h100-sxm5"),
    r"H100\b",
    sold_gb=80,
    memory=79.1 * GiB,
    hbm=3350e9,
    link=450e9,
    source="NVIDIA H100 data sheet",
    **HOPPER,
    **DGX_H100,
)

CARDS = (A100_40, A100_80, H100)  # the first whose `device` matches counts


def plain(name):
    """A name without case, spaces and dashes."""
    return re.sub(r"[\W_]+", "", name.lower())


def card_named(name, sold_gb=None):
    """The Card that people mean by `name`: h100, a100-40, "RTX 4090", or a driver's full name. sold_gb: of several
    cards of one name, the one sold by this memory. Raises UserError."""
    for card in CARDS:
        if plain(name) in map(plain, card.names):
            return card
    raise UserError(f"--gpu: found {name}, expected one of {', '.join(card.names[0] for card in CARDS)}")


def card_of_device(device_name):
    """The Card that the driver calls `device_name` (torch.cuda.get_device_name), or None for one that is not in the
    table, or a slice of one (MIG), which has a part of its cores."""
    if re.search(r"\bMIG\b", device_name):
        return None
    for card in CARDS:
        if re.search(rf"\b{card.device}", device_name):
            return card
    return None
