"""GPUs and the nodes that they are usually rented in: memory, speeds, prices, each with its source. Needs no torch.

`python -m minzero.cards` prints the tables of docs/planner.md. Memory is total_memory of
torch.cuda.get_device_properties, as torch's messages "GPU 0 has a total capacity of ..." give it in public logs; where
drivers differ by up to 0.3 GiB (error correction, reserved pages), the smaller value that is common."""

import difflib
import os
import re
from dataclasses import dataclass

from minzero.errors import UserError

GiB = 2**30


@dataclass(frozen=True)
class Card:
    """One GPU. FLOP/s are dense (without sparsity), with sums in fp32. Bytes/s are of one direction."""

    name: str  # as it is shown
    names: tuple  # as people type it: lower case, words joined by dashes
    device: str  # regular expression for the name that the driver gives it
    sold_gb: int  # the memory that it is sold by
    memory: float  # bytes that torch reports
    bf16: float  # FLOP/s; of a card without bf16 those of fp16
    tf32: float  # FLOP/s in which fp32 products run: TF32, or fp32 where there is no TF32
    fp8: float | None  # FLOP/s
    hbm: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of its node: NVLink, or PCIe where there is none
    pcie: float  # bytes/s to the node's memory
    network: float  # bytes/s of one GPU to other nodes: the node's network over its GPUs
    node_gpus: int  # of the node that it is usually rented in
    node_memory: float  # bytes of that node's RAM
    products: float  # share of its peak that large matrix products reach
    attention: float  # the same of flash attention
    source: str  # of the figures
    has_bf16: bool = True
    price: float | None = None  # dollars for one GPU and hour, on demand
    priced: str | None = None  # where and when the price was published

    @property
    def is_cpu(self):
        return self.name == "CPU"

    @property
    def is_nvidia(self):
        """Whether this code can be expected to run there: it has run on NVIDIA's cards and on CPUs only."""
        return self.source.startswith("NVIDIA")

    @property
    def precision(self):
        """Which one "auto" is here."""
        if self.is_cpu:
            return "fp32"
        return "bf16" if self.has_bf16 else "fp16"


# ---- what several rows share


# Shares of a chip's peak that this code's kernels reach: `products` large matrix products, `attention` flash attention,
# by the FLOPs of the half that is not masked. From Hopper on the peak is higher than the power that a card may take
# allows for long, and what attention does between its products did not become faster as they did:
# docs/planner-accuracy.md.
EARLIER, FROM_HOPPER = {"products": 0.80, "attention": 0.31}, {"products": 0.70, "attention": 0.19}
# MI300X: 45% in products (aiweekly.co, "AMD MI300X hits only 45% of peak FLOPs in practice"); attention in proportion.
ROCM = {"products": 0.45, "attention": 0.12}


def chip(bf16, tf32, fp8, source, has_bf16=True, reached=EARLIER):
    """The fields of a Card that its chip decides. bf16, tf32, fp8: TFLOP/s, or None. reached: shares of the peak."""
    flops = {"bf16": bf16 * 1e12, "tf32": tf32 * 1e12, "fp8": fp8 and fp8 * 1e12, "has_bf16": has_bf16}
    maker = "AMD" if source.startswith("MI") else "NVIDIA"
    return flops | reached | {"source": f"{maker} {source}"}


CHIPS = {
    "V100": chip(125, 15.7, None, "V100 data sheet (SXM2)", has_bf16=False),
    "T4": chip(65, 8.1, None, "T4 data sheet", has_bf16=False),
    "A100": chip(312, 156, None, "A100 data sheet"),
    "A800": chip(312, 156, None, "A100 data sheet; NVLink of 400 GB/s instead of 600"),
    "A10": chip(125, 62.5, None, "A10 data sheet; memory as A10G"),
    "A10G": chip(70, 35, None, "A10G data sheet for AWS"),
    "A6000": chip(154.8, 77.4, None, "RTX A6000 data sheet"),
    "3090": chip(71, 35.6, None, "GA102 white paper"),
    "H100": chip(989, 494, 1979, "H100 data sheet", reached=FROM_HOPPER),
    "H100 PCIe": chip(756, 378, 1513, "H100 data sheet", reached=FROM_HOPPER),
    "H100 NVL": chip(835, 418, 1671, "H100 NVL data sheet; NVLink joins pairs only", reached=FROM_HOPPER),
    "H800": chip(989, 494, 1979, "H100 data sheet; NVLink of 400 GB/s instead of 900", reached=FROM_HOPPER),
    "H200": chip(989, 494, 1979, "H200 data sheet", reached=FROM_HOPPER),
    "H200 NVL": chip(
        835, 418, 1671, "H200 data sheet; memory as SXM; NVLink joins up to four only", reached=FROM_HOPPER
    ),
    "GH200": chip(989, 494, 1979, "GH200 data sheet", reached=FROM_HOPPER),
    "GH200 144": chip(
        989, 494, 1979, "GH200 data sheet; memory: 98.5% of 144 GiB, as of the 96 GB card", reached=FROM_HOPPER
    ),
    "B200": chip(2250, 1125, 4500, "HGX B200 data sheet", reached=FROM_HOPPER),
    "B300": chip(2250, 1125, 4500, "HGX B300 data sheet", reached=FROM_HOPPER),
    "GB200": chip(2500, 1250, 5000, "GB200 NVL72 data sheet", reached=FROM_HOPPER),
    "L4": chip(121, 60, 242, "L4 data sheet"),
    "L40S": chip(362, 183, 733, "L40S data sheet"),
    "4090": chip(165, 82.6, 330, "Ada white paper"),
    "6000 Ada": chip(364, 182, 728, "RTX 6000 Ada data sheet"),
    "5090": chip(209.5, 104.8, 419, "RTX Blackwell white paper"),
    "Pro": chip(504, 252, 1008, "RTX Blackwell PRO white paper (Workstation Edition)"),
    # the data sheet has fp32 alone: products are 4, 2 and 8 times that, as those of the Workstation Edition
    "Server": chip(480, 240, 960, "RTX PRO 6000 Server data sheet: 4, 2 and 8 times its fp32"),
    "MI300X": chip(1307, 654, 2615, "MI300X data sheet; 7 Infinity Fabric links of 64 GB/s", reached=ROCM),
}

# Usable bytes/s of 16 lanes of PCIe in one direction: about 80% of the bare 15.75, 31.5 and 63 GB/s.
PCIE_3, PCIE_4, PCIE_5 = 12e9, 25e9, 50e9
# NVLink-C2C of GH200: 450 GB/s bare, 375 to the GPU and 297 back measured (Schieffer et al. 2024, arXiv 2407.07850).
# Two GPUs of GB200 share one.
C2C = 297e9


def node(gpus, ram, gigabits, pcie, link=None):
    """The fields of a Card that its node decides. ram: GiB. gigabits: Gbit/s of the whole node's network. link: bytes/s
    of NVLink, of one GPU in one direction; None where GPUs talk over PCIe."""
    network = gigabits * 1e9 / 8 / gpus
    return {"node_gpus": gpus, "node_memory": ram * GiB, "network": network, "pcie": pcie, "link": link or pcie}


NODES = {  # by the names that `source` has
    "DGX-1": node(8, 512, 4 * 100, PCIE_3, 150e9),
    "DGX A100 40GB": node(8, 1024, 8 * 200, PCIE_4, 300e9),
    "DGX A100": node(8, 2048, 8 * 200, PCIE_4, 300e9),
    "HGX A800": node(8, 2048, 8 * 200, PCIE_4, 200e9),
    "HGX H100 or H200": node(8, 2048, 8 * 400, PCIE_5, 450e9),
    "HGX H800": node(8, 2048, 8 * 400, PCIE_5, 200e9),
    "8 MI300X, 400 Gbit/s each": node(8, 2048, 8 * 400, PCIE_5, 7 * 64e9),
    "HGX B200": node(8, 2048, 8 * 400, PCIE_5, 900e9),
    "HGX B300": node(8, 2048, 8 * 800, PCIE_5, 900e9),
    "1 Superchip, 400 Gbit/s": node(1, 480, 400, C2C, 450e9),
    "the rack that NVLink joins, 18 trays of 4 GPUs": node(72, 36 * 480, 72 * 400, C2C / 2, 900e9),
    "8 cards, PCIe 4, 200 Gbit/s": node(8, 1024, 200, PCIE_4),
    "8 cards, PCIe 5, 400 Gbit/s": node(8, 1024, 400, PCIE_5),
    "8 cards, PCIe 4, 25 Gbit/s Ethernet": node(8, 512, 25, PCIE_4),
    "8 cards, PCIe 5, 25 Gbit/s Ethernet": node(8, 512, 25, PCIE_5),
    "AWS g4dn.metal": node(8, 384, 100, PCIE_3),
    "AWS g5.48xlarge": node(8, 768, 100, PCIE_4),
    "AWS g6.48xlarge": node(8, 768, 100, PCIE_4),
    "AWS g6e.48xlarge": node(8, 1536, 400, PCIE_4),
    "Oracle BM.GPU.A10.4": node(4, 1024, 100, PCIE_4),
}
P4, P5 = "8 cards, PCIe 4, 200 Gbit/s", "8 cards, PCIe 5, 400 Gbit/s"  # servers
W4, W5 = "8 cards, PCIe 4, 25 Gbit/s Ethernet", "8 cards, PCIe 5, 25 Gbit/s Ethernet"  # workstations
MI300X = "8 MI300X, 400 Gbit/s each"
DGX_40, HGX = "DGX A100 40GB", "HGX H100 or H200"
GRACE, RACK = "1 Superchip, 400 Gbit/s", "the rack that NVLink joins, 18 trays of 4 GPUs"

LAMBDA = "lambda.ai/instances, 2026-09-20"
RUNPOD = "runpod.io/pricing (Secure Cloud), 2026-09-25"
RUNPOD_OCTOBER = "runpod.io/pricing (Secure Cloud), 2026-10-07"
AKASH = "akash.network/pricing/gpus (from), 2026-09-20"
HYPER = "hyperstack.cloud/gpu-pricing, 2026-08-26"
VULTR = "Vultr, by cliffcenter.com/research/amd-inference-economics, 2026-05-18"
AWS = "aws.amazon.com/ec2/pricing/on-demand, us-east-1, April 2026"


def row(name, names, device, sold_gb, gib, hbm, of_chip, of_node, price=None, priced=None):
    """One row. names: what people type, with spaces between. gib: memory in GiB. hbm: GB/s. of_chip, of_node: names in
    CHIPS and NODES. price, priced: dollars, where and when."""
    fields = CHIPS[of_chip] | NODES[of_node] | {"price": price, "priced": priced}
    fields["source"] += f"; node: {of_node}"
    return Card(name, tuple(names.split()), device, sold_gb, gib * GiB, hbm=hbm * 1e9, **fields)


# One process on a CPU, for runs on a laptop. Its rates are those of a thread of an ordinary server, and mean nothing
# without --measured, which scales them; node and memory are this machine's.
CPU = Card(
    name="CPU",
    names=("cpu",),
    device=r"^cpu$",
    sold_gb=0,
    memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    bf16=70e9,
    tf32=70e9,
    fp8=None,
    hbm=7e9,
    link=1e9,
    pcie=10e9,
    network=1e9,
    node_gpus=len(os.sched_getaffinity(0)),
    node_memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    products=1.0,
    attention=0.3,
    source="one thread of a server",
)

# name, names, device, GB sold, GiB, memory's GB/s, chip, node, price, its source; the first whose device matches counts
CARDS = (
    row("A100 SXM 40 GB", "a100-40 a100-sxm-40", r"A100-SXM\S*-40GB", 40, 39.39, 1555, "A100", DGX_40, 1.99, LAMBDA),
    row("A100 PCIe 40 GB", "a100-pcie-40", r"A100-PCIE-40GB", 40, 39.39, 1555, "A100", P4),
    row("A100 PCIe 80 GB", "a100-pcie a100-pcie-80", r"A100 80GB PCIe", 80, 79.15, 1935, "A100", P4, 1.59, RUNPOD),
    row("A100 SXM 80 GB", "a100 a100-80 a100-sxm", r"A100\b", 80, 79.15, 2039, "A100", "DGX A100", 2.79, LAMBDA),
    row("A800 PCIe", "a800-pcie", r"A800 80GB PCIe", 80, 79.15, 1935, "A100", P4),
    row("A800 SXM", "a800 a800-80 a800-sxm", r"A800\b", 80, 79.15, 2039, "A800", "HGX A800"),
    row("H100 PCIe", "h100-pcie", r"H100 PCIe", 80, 79.1, 2000, "H100 PCIe", P5, 3.29, LAMBDA),
    row("H100 NVL", "h100-nvl h100-94", r"H100 NVL", 94, 93.09, 3900, "H100 NVL", P5, 3.19, RUNPOD),
    row("H100 SXM", "h100 h100-80 h100-sxm h100-sxm5", r"H100\b", 80, 79.1, 3350, "H100", HGX, 3.99, LAMBDA),
    row("H800 PCIe", "h800-pcie", r"H800 PCIe", 80, 79.1, 2000, "H100 PCIe", P5),
    row("H800 SXM", "h800 h800-80 h800-sxm", r"H800\b", 80, 79.1, 3350, "H800", "HGX H800"),
    row("H200 NVL", "h200-nvl", r"H200 NVL", 141, 139.8, 4800, "H200 NVL", P5),
    row("H200 SXM", "h200 h200-141 h200-sxm", r"H200\b", 141, 139.8, 4800, "H200", HGX, 4.59, RUNPOD_OCTOBER),
    row("GH200 144 GB", "gh200-144", r"GH200 144G", 144, 141.8, 4900, "GH200 144", GRACE),
    row("GH200 96 GB", "gh200 gh200-96", r"GH200( (120|480)GB)?\b", 96, 94.5, 4000, "GH200", GRACE, 2.29, LAMBDA),
    row("B200", "b200 b200-180 b200-192 b200-sxm", r"B200\b", 180, 178.35, 7700, "B200", "HGX B200", 6.69, LAMBDA),
    row("B300", "b300 b300-288 b300-sxm", r"B300\b", 288, 267.69, 8000, "B300", "HGX B300", 7.89, RUNPOD_OCTOBER),
    row("GB200", "gb200 gb200-186", r"GB200\b", 186, 184.31, 8000, "GB200", RACK),
    row("L4", "l4", r"L4$", 24, 22.03, 300, "L4", "AWS g6.48xlarge"),
    row("L40S", "l40s", r"L40S\b", 48, 44.39, 864, "L40S", "AWS g6e.48xlarge", 1.09, RUNPOD),
    row("A10", "a10", r"A10$", 24, 22.05, 600, "A10", "Oracle BM.GPU.A10.4", 1.29, LAMBDA),
    row("A10G", "a10g", r"A10G$", 24, 22.05, 600, "A10G", "AWS g5.48xlarge", 2.036, AWS),
    row("T4", "t4", r"T4$", 16, 14.56, 320, "T4", "AWS g4dn.metal", 0.978, AWS),
    row("V100 16 GB", "v100-16 v100-sxm2-16", r"V100-SXM2-16GB", 16, 15.77, 900, "V100", "DGX-1", 0.79, LAMBDA),
    row("V100 32 GB", "v100 v100-32 v100-sxm2 v100-sxm2-32", r"V100-SXM\d-32GB", 32, 31.73, 900, "V100", "DGX-1"),
    row("RTX 3090", "3090 rtx-3090", r"GeForce RTX 3090$", 24, 23.56, 936, "3090", W4, 0.16, AKASH),
    row("RTX 4090", "4090 rtx-4090", r"GeForce RTX 4090$", 24, 23.52, 1008, "4090", W4, 0.74, RUNPOD),
    row("RTX 5090", "5090 rtx-5090", r"GeForce RTX 5090$", 32, 31.36, 1792, "5090", W5, 0.67, AKASH),
    row("RTX 6000 Ada", "6000-ada rtx-6000-ada", r"RTX 6000 Ada Generation", 48, 47.5, 960, "6000 Ada", W4),
    row("RTX Pro 6000", "pro-6000 6000-pro", r"RTX PRO 6000 Blackwell W", 96, 94.97, 1792, "Pro", W5, 1.45, AKASH),
    row("RTX Pro 6000 Server", "pro-6000-server", r"RTX PRO 6000 \w+ S", 96, 94.97, 1597, "Server", P5, 1.85, HYPER),
    row("RTX A6000", "a6000 rtx-a6000", r"RTX A6000$", 48, 47.4, 768, "A6000", W4, 1.09, LAMBDA),
    row("MI300X", "mi300x mi300", r"MI300X\b", 192, 191.69, 5300, "MI300X", MI300X, 1.85, VULTR),
)


# ---- names


MAKERS = ("nvidia", "amd", "geforce", "tesla", "instinct", "gpu")


def words_of(name):
    """The words of a name in lower case, without makers, and of a memory the number: a100, sxm4, 40."""
    text = re.sub(r"(\d)\s*gi?b\b", r"\1", name.lower())
    return [word for word in re.findall(r"[a-z0-9]+", text) if word not in MAKERS]


def plain(name):
    """A name without case, spaces, dashes and makers, for comparison: "GeForce RTX 4090" and "rtx-4090" are rtx4090,
    "A100 40GB" is a10040."""
    return "".join(words_of(name))


def in_any_order(name, *more):
    """The words of a name, and `more`, as a set: "A100 SXM4 40GB" and "a100-40 sxm" are the same."""
    words = [re.sub(r"^sxm\d$", "sxm", word) for word in words_of(name)]
    return frozenset([word for word in words if not word.startswith("hbm")] + list(more))


SPELLED = [(typed, card) for card in (*CARDS, CPU) for typed in (*card.names, card.name)]
BY_NAME = {plain(typed): card for typed, card in SPELLED}
# with and without the memory
BY_WORDS = {in_any_order(typed, str(card.sold_gb)): card for typed, card in SPELLED}
BY_WORDS |= {in_any_order(typed): card for typed, card in SPELLED}


def card_named(name, sold_gb=None):
    """The Card that people mean by `name`: h100, a100-40, "RTX 4090", or a driver's full name. sold_gb: where a name
    fits several sizes, as a100 and v100, that one; a size that there is none of is passed over. Raises UserError."""
    found = BY_NAME.get(plain(name)) or BY_WORDS.get(in_any_order(name)) or card_of_device(name)
    if found is None:
        raise UserError(f"--gpu: found {shortened(name)}, expected the name of a card; {nearest_names(name)}")
    if sold_gb is None or found.sold_gb == sold_gb:
        return found
    return BY_NAME.get(f"{plain(name)}{sold_gb:g}", found)


def shortened(text, most=60):
    """Text for an error message, cut where it is long."""
    return text if len(text) <= most else f"{text[:most]}..."


def nearest_names(name):
    """The names of cards that are spelled like `name`, and all that there are, as a part of an error message."""
    close = difflib.get_close_matches(plain(name), BY_NAME, n=3, cutoff=0.6)
    typed = list(dict.fromkeys(BY_NAME[key].names[0] for key in close))
    meant = f"did you mean {' or '.join(typed)}? " if typed else ""
    return f"{meant}known: {', '.join(card.names[0] for card in CARDS)}"


def card_of_device(device_name):
    """The Card that the driver calls `device_name` (torch.cuda.get_device_name), or None for one that is not in the
    table, or a slice of one (MIG, or a virtual GPU as A100-40C), which has a part of its cores or memory."""
    if re.search(r"\bMIG\b|-\d+[ABCQ]$", device_name, re.IGNORECASE):
        return None
    for card in CARDS:
        if found := re.search(rf"\b{card.device}", device_name, re.IGNORECASE):
            rest = device_name[: found.start()] + device_name[found.end() :]
            return None if is_of_another(rest, card) else card
    return None


def is_of_another(rest, card):
    """Whether the rest of a driver's name says another card: of another memory (A100-SXM-64GB, A800 40GB Active), or
    with another connector."""
    sizes = re.findall(r"(\d+) ?GB\b", rest, re.IGNORECASE)
    return any(int(size) != card.sold_gb for size in sizes) or bool(re.search(r"PCIe|NVL\b", rest, re.IGNORECASE))


def peak_flops(device_name):
    """Peak bf16 FLOP/s of one device, or None for one that is not in the table, has no bf16, or is a slice (MIG): a
    wrong peak is worse than none."""
    found = card_of_device(device_name)
    return found.bf16 if found and found.has_bf16 else None


def names_of(sold_gb):
    """The names of the cards that are sold by this memory: ["l4", "a10", ...]."""
    return [card.names[0] for card in CARDS if card.sold_gb == sold_gb]


# ---- the tables of docs/planner.md


def as_markdown():
    """Two tables as docs/planner.md shows them: the figures, and their sources."""
    heads = "card|`--gpu`|GB|GiB|bf16|TF32|fp8|memory|link|PCIe|network|node|RAM, GiB|$/hour".split("|")
    figures = [heads, ["---", "---", *["--:"] * 12]]
    sources = [["`--gpu`", "source of the figures; the usual node; source of the price"], ["---", "---"]]
    for card in CARDS:
        speeds = [f"{card.bf16 / 1e12:g}{'' if card.has_bf16 else ' (fp16)'}", f"{card.tf32 / 1e12:g}"]
        speeds.append(f"{card.fp8 / 1e12:g}" if card.fp8 else "-")
        rates = [f"{rate / 1e9:,.4g}" for rate in (card.hbm, card.link, card.pcie, card.network)]
        host = [str(card.node_gpus), f"{card.node_memory / GiB:,.0f}"]
        price = f"{card.price:g}" if card.price else "-"
        source = card.source + (f"; price: {card.priced}" if card.priced else "")
        memory = [str(card.sold_gb), f"{card.memory / GiB:g}"]
        figures.append([card.name, f"`{card.names[0]}`", *memory, *speeds, *rates, *host, price])
        sources.append([f"`{card.names[0]}`", source])
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in table) for table in (figures, sources))


if __name__ == "__main__":
    print(as_markdown())
