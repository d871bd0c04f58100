"""The page of plan.py as a person reads it: its units, what does not fit and why, --help, the picture."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import plan
from minzero.config.load import load_config
from minzero.files import ROOT
from minzero.planner.gpus import GiB, nodes_of, on_card
from minzero.planner.picture import candidates, figure_of
from minzero.planner.plan import plan_run
from minzero.planner.report import between_steps, in_price, needed_of_node, plan_text
from minzero.planner.units import in_count, in_digits, in_money, in_round_units, in_time, in_units
from minzero.plot import pyplot

EXAMPLES = ["1p5b 8", "13b 64", "70b 64", "175b 128", "175b 1", "tiny 1"]  # a config and a number of GPUs


def page_of(capsys, arguments):
    plan.main(arguments.split())
    return capsys.readouterr().out


# ---- units


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0"),
        (0.00018, "0.18 ms"),
        (0.033, "33 ms"),
        (0.25, "0.25 s"),
        (2.12, "2.1 s"),
        (9.96, "10 s"),
        (90, "90 s"),
        (119.9, "2.0 minutes"),
        (3590, "1.0 hours"),
        (7100, "2.0 hours"),
        (9.13 * 86400, "9.1 days"),
        (364 * 86400, "1.0 years"),
        (339 * 86400, "339 days"),
        (52417.27 * 86400, "144 years"),
        (1e13, "317,098 years"),
    ],
)
def test_times(seconds, text):
    assert in_time(seconds) == text


@pytest.mark.parametrize(
    "text, expected",
    [
        (in_units(0), "0"),
        (in_units(500), "500 bytes"),
        (in_units(45.64 * 2**20), "45.6 MiB"),
        (in_units(13.9 * GiB), "13.90 GiB"),
        (in_units(1951.35 * GiB), "1,951 GiB"),
        (in_round_units(3 * GiB), "3 GiB"),
        (in_round_units(71.19 * GiB), "71.2 GiB"),
        (in_round_units(2048 * GiB), "2,048 GiB"),
        (in_count(836_448), "836,448"),
        (in_count(1_761_131_520), "1.76 billion"),
        (in_count(1_999_998_156_800), "2 trillion"),
        (in_digits(1_258_014), "1,260,000"),
        (in_digits(0.01794), "0.0179"),
        (in_money(0), "$0"),
        (in_money(0.004), "under a cent"),
        (in_money(5.2), "$5.20"),
        (in_money(912.4), "$912"),
        (in_money(55_960), "$56,000"),
        (in_money(5_434_814), "$5.43 million"),
        (in_money(999_999), "$1.00 million"),
    ],
)
def test_sizes_counts_and_money(text, expected):
    assert text == expected


def test_times_grow_with_their_seconds():
    """Read back, no time is more than a digit away, whatever the unit."""
    lengths = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "s": 1, "ms": 0.001}
    for exponent in range(-60, 200):
        seconds = 10 ** (exponent / 20)
        value, unit = in_time(seconds).split()
        assert float(value.replace(",", "")) * lengths[unit] == pytest.approx(seconds, rel=0.05)


# ---- the page


@pytest.mark.parametrize("example", EXAMPLES)
def test_no_number_says_nothing(capsys, example):
    name, gpus = example.split()
    page = page_of(capsys, f"configs/{name}.json --gpus {gpus}")
    assert not re.search(r"(?<![\d.,])0(\.0+)? ([MG]iB|days|hours|GPU)|e[+-]\d\d", page)
    days = re.findall(r"([\d,.]+) days", page)
    assert all(float(number.replace(",", "")) <= 365 for number in days)
    assert "micro-batch of" in page and "rests on H100 SXM: 989 TFLOP/s" in page and "bound by" in page


def test_the_largest_model_on_one_gpu(capsys):
    page = page_of(capsys, "configs/175b.json --gpus 1")
    assert re.search(r"DOES NOT FIT: a GPU lacks [\d,]+ GiB; [\d,]+ GiB are needed, and at most 71.2 of 79.1", page)
    assert re.search(r"if it did fit: \d+ years for 2 trillion tokens", page) and "a step of 2.0 hours" in page
    assert re.search(r"or unchanged on \d+ GPUs on \d+ nodes:\n  .* GiB of a GPU, .* years, \$[\d.]+ million", page)


def test_ram_is_a_limit_with_a_number(capsys):
    """Adam's 12 bytes and gradients' 4 of each parameter do not fit into a small node."""
    offload = "--deepspeed.zero_optimization.offload_optimizer.device cpu --cpu_memory 16"
    page = page_of(capsys, f"configs/1p5b.json --gpus 1 --gpu 4090 {offload} --json")
    found = json.loads(page.splitlines()[-1])
    assert found["fits_gpu"] and not found["fits_cpu"] and not found["fits"]
    lacks, needed = map(
        float, re.search(r"RAM lacks ([\d.]+) GiB; ([\d.]+) GiB are needed, and it has 16", page).groups()
    )
    assert needed == pytest.approx(needed_of_node(found) / GiB, rel=0.01) and lacks == pytest.approx(
        needed - 16, abs=0.1
    )
    assert "a GPU lacks" not in page


def test_the_advice_says_what_it_costs(capsys):
    page = page_of(capsys, "configs/1p5b.json --gpus 1 --gpu 4090 --price 2")
    effect = r"\n  [\d.]+ GiB of a GPU, [\d.]+ GiB of a node's RAM, [\d,]+ tokens/s, \d+ days, \$[\d,]+"
    assert re.search(rf"the cheapest change that fits: --.*{effect}\nor unchanged on \d GPUs:{effect}", page)


def test_money_or_gpu_hours(capsys):
    page = page_of(capsys, "configs/gpt2-124m.json --gpus 8")
    assert "at $3.99 per GPU hour (lambda.ai/instances" in page
    page = page_of(capsys, "configs/gpt2-124m.json --gpus 8 --price 2")
    assert "at $2 per GPU hour\n" in page
    assert "$" not in page_of(capsys, "configs/gpt2-124m.json --gpus 8 --gpu l4")
    assert in_price({"cost": None, "gpu_hours": 14_025}) == "14,000 GPU hours"


def test_evaluation_and_saves_where_they_matter():
    days = {"days": 10, "evaluation_days": 0.12, "saving_days": 0.04}
    assert between_steps(days) == "of the time: evaluation 1.2% and saving checkpoints 0.4%"
    assert between_steps(days | {"evaluation_days": 0.001}) == "of the time: saving checkpoints 0.4%"
    assert between_steps({"days": 10, "evaluation_days": 0, "saving_days": 0}) is None


def test_the_page_says_what_it_rests_on():
    config = load_config(["configs/1p5b.json", "--deepspeed.zero_optimization.stage", "3"])
    hardware = plan.all_flags().parse_args(["--gpus", "8"])
    hardware = plan.rented(hardware)
    found = plan_run(config, hardware)
    text = plan_text(found, config, hardware, [])
    assert "memory 3,350, link 450, network 50, PCIe 50, CPU Adam" in text
    assert "what this code reaches of it is assumed" in text
    found["measured"] = "out/run"
    assert "what this code reaches of it is measured (out/run)" in plan_text(found, config, hardware, [])
    assert f"MFU {in_digits(100 * found['mfu'], 2)}%, HFU {in_digits(100 * found['hfu'], 2)}%" in text
    assert 0.1 < found["mfu"] < found["hfu"] < 0.8


def test_the_page_names_where_the_offload_is_and_the_precision(capsys):
    flags = "--deepspeed.zero_optimization.offload_optimizer.device"
    nvme = f"{flags} nvme {flags.replace('device', 'nvme_path')} /nvme"
    page = page_of(capsys, f"configs/1p5b.json --gpus 1 --gpu v100 {nvme}")
    assert "ZeRO stage 3, optimizer on NVMe; " in page and "125 TFLOP/s for fp16; GB/s" in page
    page = page_of(capsys, f"configs/1p5b.json --gpus 1 --gpu a100 {flags} cpu --train.precision fp32")
    assert "ZeRO stage 3, optimizer on CPU; " in page and "156 TFLOP/s for fp32; GB/s" in page


def test_more_gpus_are_of_nodes_as_full():
    parser = plan.all_flags()
    for flags, gpus, nodes in (("1", 3, 1), ("1", 16, 2), ("8", 64, 8), ("2 --nodes 2", 4, 4), ("8 --nodes 4", 6, 3)):
        options = parser.parse_args(f"--gpus {flags}".split())
        hardware = plan.rented(options)
        more = on_card(hardware.card, hardware.memory_bytes, gpus, options)
        assert (more.gpus, more.nodes) == (gpus, nodes)
        assert on_card(hardware.card, hardware.memory_bytes, hardware.gpus, options) == hardware
    assert 9 % nodes_of(hardware.card, 9, parser.parse_args(["--gpus", "1"])), "not on two nodes that are alike"
    options = parser.parse_args("--gpus 1 --cpu_memory 100".split())
    assert on_card(hardware.card, hardware.memory_bytes, 8, options).cpu_bytes == 100 * GiB


# ---- --help


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith("usage: plan.py CONFIG [--gpus N]")
    flags = [action for action in plan.all_flags()._actions if action.dest != "help"]
    assert len(flags) >= 16
    for action in flags:
        [line] = re.findall(rf"^  {action.option_strings[0]}\b.*", text, re.MULTILINE)
        meaning = action.help % {"default": action.default}
        assert len(line) <= 80 and line.endswith(f"  {meaning}")
    assert "--section.key VALUE" in text and "examples:" in text


def test_the_examples_of_help_run(capsys, tmp_path):
    lines = [line for line in plan.EXAMPLES.splitlines() if line.startswith("  python plan.py ")]
    assert len(lines) >= 4
    for line in lines:
        arguments = re.split(r"\s{3,}", line.strip())[0].split()[2:]
        page_of(capsys, " ".join(arguments).replace("memory.png", str(tmp_path / "memory.png")))


# ---- the picture


def test_picture(capsys, tmp_path):
    picture = tmp_path / "memory.png"
    plan.main(f"configs/1p5b.json --gpus 8 --gpu a100-40 --plot {picture}".split())
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out
    for bad in (tmp_path / "nowhere" / "memory.png", tmp_path / "memory.toast"):
        with pytest.raises(plan.UserError, match="--plot"):
            plan.main(f"configs/1p5b.json --gpus 8 --gpu a100-40 --plot {bad}".split())


@pytest.mark.parametrize("example", ["1p5b 8", "175b 1", "tiny 1", "gpt2-124m 8 --gpu l4"])
def test_nothing_in_the_picture_overlaps_or_is_cut(example):
    name, gpus, *flags = example.split()
    options = plan.all_flags().parse_args(["--gpus", gpus, *flags])
    hardware = plan.rented(options)
    config = load_config([f"configs/{name}.json", "--deepspeed.zero_optimization.stage", "3"])
    figure = figure_of(config, lambda candidate: plan_run(candidate, hardware), hardware)
    figure.canvas.draw()
    memory, _, time, _ = figure.axes
    texts = [figure._suptitle, memory.title, time.title, *memory.get_yticklabels(), *figure.legends[0].get_texts()]
    texts += [text for axes in figure.axes for text in axes.texts]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = figure.canvas.get_width_height()
    for said, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, said
    for (said, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (said, other)
    plans = [plan_run(candidate, hardware) for _, candidate in candidates(config)]
    written = [said for said, _ in boxes]
    for found in plans:
        for text in (in_units(found["gpu_bytes"]), in_time(86400 * found["days"]), in_price(found)):
            assert text in written
    for axes in (memory, time):  # a bar that leaves the axes has an arrow
        end = axes.get_xlim()[1]
        ends = {}
        for bar in axes.patches:
            if bar.get_width():
                ends[round(bar.get_y(), 3)] = max(ends.get(round(bar.get_y(), 3), 0), bar.get_x() + bar.get_width())
        arrows = next(line for line in axes.lines if line.get_marker() == ">").get_xdata()
        assert len(arrows) == sum(width > end for width in ends.values())
    pyplot().close(figure)


def test_only_what_train_takes_is_drawn():
    every = candidates(load_config(["configs/1p5b.json"]))
    assert len(every) == 21 and len({name for name, _ in every}) == 21
    of_fp16 = candidates(load_config(["configs/1p5b.json", "--train.precision", "fp16"]))
    refused = {name for name, _ in every} - {name for name, _ in of_fp16}
    assert refused == {"stage 0", "stage 0, selective", "stage 0, recomputed"}


def test_the_guide_shows_what_is_printed(capsys):
    """Lines of the example in docs/planner.md, which were printed by the command above them."""
    text = (ROOT / "docs" / "planner.md").read_text()
    command, shown = re.search(r"\$ python plan.py (.*)\n((?:.+\n|\n)*?)```", text).groups()
    page = page_of(capsys, command).splitlines()
    assert [line for line in shown.splitlines() if line not in page] == []
