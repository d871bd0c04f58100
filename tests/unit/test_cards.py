"""The table of cards: what must hold of every row, and the names that find one."""

import re
import subprocess
import sys
from argparse import Namespace

import pytest

from minzero.cards import CARDS, GiB, as_markdown, card_named, card_of_device, plain
from minzero.errors import UserError
from minzero.files import ROOT
from minzero.planner.gpus import Hardware, rented
from minzero.planner.speed import Assumptions


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_row_is_sane(card):
    assert 0.85 * card.sold_gb * 1e9 < card.memory < 1.08 * card.sold_gb * 1e9
    assert card.memory <= card.sold_gb * GiB
    assert 5e12 < card.tf32 < card.bf16 < 3e15
    assert card.fp8 is None or card.fp8 == pytest.approx(2 * card.bf16, rel=0.02)
    assert card.has_bf16 == ("V100" not in card.name and card.name != "T4")
    assert 3e11 <= card.hbm < 1e13
    assert 12e9 <= card.pcie <= card.link <= 1e12
    assert 1e8 < card.network <= card.link, "no network is faster than what joins the GPUs of a node"
    assert 1 <= card.node_gpus <= 72
    assert card.node_memory / card.node_gpus >= 48 * GiB
    assert "data sheet" in card.source or "white paper" in card.source
    assert (card.price is None) == (card.priced is None)
    assert card.price is None or (0.1 < card.price < 20 and re.search(r"20\d\d", card.priced)), "the date belongs to it"
    assert card.names == tuple(name.lower().replace(" ", "-") for name in card.names)


def test_every_name_means_one_card():
    typed = [name for card in CARDS for name in {plain(name) for name in (card.name, *card.names)}]
    assert len(typed) == len(set(typed)), "a name is in two rows"
    for card in CARDS:
        for name in (card.name, *card.names):
            for spelled in (name, name.upper(), name.replace("-", " "), name.replace("-", "").replace(" ", "")):
                assert card_named(spelled) is card, spelled
        assert card_named(card.name, card.sold_gb) is card


@pytest.mark.parametrize(
    "typed, name",
    [
        ("4090", "RTX 4090"),
        ("rtx 4090", "RTX 4090"),
        ("GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100 SXM"),
        ("H100 80GB", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("A100", "A100 SXM 80 GB"),
        ("a100-40", "A100 SXM 40 GB"),
        ("a100 40gb", "A100 SXM 40 GB"),
        ("a100_40GiB", "A100 SXM 40 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB"),
        ("Tesla T4", "T4"),
        ("rtx pro 6000", "RTX Pro 6000"),
        ("AMD Instinct MI300X", "MI300X"),
        # words in another order, with the memory beside a name that needs none, with the generation of the connector
        ("A100 40GB PCIe", "A100 PCIe 40 GB"),
        ("A100 SXM4 40GB", "A100 SXM 40 GB"),
        ("a100-sxm4-40", "A100 SXM 40 GB"),
        ("h100 80gb pcie", "H100 PCIe"),
        ("H100-PCIe-80GB", "H100 PCIe"),
        ("H100-NVL-94GB", "H100 NVL"),
        ("h100-sxm5-80gb", "H100 SXM"),
        ("H200-NVL-141GB", "H200 NVL"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("l4 24gb", "L4"),
        ("v100-sxm2", "V100 32 GB"),
        ("B200 192GB", "B200"),
        ("GB200 NVL72", "GB200"),
    ],
)
def test_a_card_is_found_as_people_type_it(typed, name):
    assert card_named(typed).name == name


def test_the_memory_chooses_among_cards_of_one_name():
    assert card_named("a100", 40).name == "A100 SXM 40 GB"
    assert card_named("a100-pcie", 40.0).name == "A100 PCIe 40 GB"
    assert card_named("V100", 16).name == "V100 16 GB" and card_named("v100").sold_gb == 32
    assert card_named("h100", 24).name == "H100 SXM", "no H100 is sold by it"


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40 GB"),
        ("A100-SXM-80GB", "A100 SXM 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB"),
        ("NVIDIA A800-SXM4-80GB", "A800 SXM"),
        ("NVIDIA A800 80GB PCIe", "A800 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H800", "H800 SXM"),
        ("NVIDIA H800 PCIe", "H800 PCIe"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200 96 GB"),
        ("NVIDIA GH200 120GB", "GH200 96 GB"),
        ("NVIDIA GH200 144G HBM3e", "GH200 144 GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16 GB"),
        ("Tesla V100-SXM3-32GB", "V100 32 GB"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX Pro 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX Pro 6000 Server"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_the_drivers_name_of_a_card(device, name):
    assert card_of_device(device).name == name


@pytest.mark.parametrize(
    "device",
    [
        "",
        "cpu",
        "NVIDIA L40",
        "NVIDIA RTX A1000",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "GRID A100-10C",
        "NVIDIA L40S-48Q",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A800 40GB Active",
        "NVIDIA H100 SXM5 96GB",
        "NVIDIA H800 NVL",
        "Quadro RTX 6000",
    ],
)
def test_other_devices_are_not_taken_for_one(device):
    assert card_of_device(device) is None


@pytest.mark.parametrize(
    "name",
    ["toaster", "", "gpu", "nvidia", "h1000", "x" * 5000, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100 mig", "a100 64gb"],
)
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(UserError) as raised:
        card_named(name)
    text = str(raised.value)
    assert text.startswith("--gpu: found ") and "\n" not in text and len(text) < 600
    assert all(card.names[0] in text for card in CARDS) and "\\" not in text


def test_the_nearest_names_are_said():
    with pytest.raises(UserError, match=r"did you mean 4090"):
        card_named("4091")
    with pytest.raises(UserError, match=r"did you mean h100"):
        card_named("h10")


# ---- plan.py's flags


def flags(gpus=8, gpu=None, gpu_memory=None, cpu_memory=None, nodes=None, price=None):
    return Namespace(gpus=gpus, gpu=gpu, gpu_memory=gpu_memory, cpu_memory=cpu_memory, nodes=nodes, price=price)


def test_the_card_says_the_rest():
    h100, rtx = card_named("h100"), card_named("4090")
    assert rented(flags()) == Hardware(8, 1, h100.memory, h100, h100.price, h100.node_memory)
    assert rented(flags(gpu_memory=80)) == rented(flags(gpu="h100", gpu_memory=80)) == rented(flags())
    assert rented(flags(16, "4090")) == Hardware(16, 2, rtx.memory, rtx, rtx.price, rtx.node_memory)
    assert rented(flags(gpu="a100", gpu_memory=40)).card is card_named("a100-40")
    assert rented(flags(gpu="a100", gpu_memory=24)).memory_bytes == 24 * GiB, "so much of an A100"
    assert rented(flags(price=0)).price == 0 and rented(flags(gpu="l4")).price is None
    assert rented(flags(2, "gh200")).nodes == 2 and rented(flags(16, "a10")).nodes == 4


def test_a_part_of_a_node_has_a_part_of_its_memory():
    whole = card_named("h100").node_memory
    assert rented(flags(1)).cpu_bytes == whole / 8 and rented(flags(16)).cpu_bytes == whole
    assert rented(flags(16, nodes=8)).cpu_bytes == whole / 4
    assert rented(flags(16, nodes=1)).cpu_bytes == whole, "at most that of a node"
    assert rented(flags(1, cpu_memory=100)).cpu_bytes == 100 * GiB


def test_a_memory_alone_names_no_card():
    with pytest.raises(UserError, match=r"--gpu_memory 24 without --gpu: name the card, for example --gpu 4090; cards"):
        rented(flags(gpu_memory=24))
    with pytest.raises(UserError, match=r"--gpu_memory 25 without --gpu: name the card, for example --gpu h100$"):
        rented(flags(gpu_memory=25))


def test_rates_are_the_cards_unless_they_are_given():
    card = card_named("l4")
    on_card = Assumptions(network=1e9).on(card)
    assert (on_card.link, on_card.pcie, on_card.network) == (card.link, card.pcie, 1e9)
    assert Assumptions().on(None) == Assumptions()


# ---- docs


def test_the_page_shows_the_tables():
    section = (ROOT / "docs" / "planner.md").read_text().split("\n## Cards\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == as_markdown().replace(
        "\n\n", "\n"
    ).splitlines()


def test_no_torch_is_loaded():
    code = "import sys, minzero.cards; assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
