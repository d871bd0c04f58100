"""What plan.py advises: only batches that train.py takes, never more RAM than there is, more hardware never slower, and
commands that give the same numbers again."""

import argparse
import dataclasses
import itertools
import json
import re
import shlex

import pytest

import plan
from minzero.cards import CARDS, GiB, card_named
from minzero.config.build import build
from minzero.config.deepspeed import gradient_accumulation
from minzero.config.load import load_config
from minzero.errors import UserError
from minzero.files import ROOT
from minzero.planner.batches import is_legal, legal_batch, micro_batches, with_batch
from minzero.planner.fitting import Fitter
from minzero.planner.gpus import PROCESS, nodes_of, on_card
from minzero.planner.offers import MIDDLE, all_offers, answers, numbers_of_gpus
from minzero.planner.plan import plan_run
from minzero.planner.search import enough_gpus, overrides, with_overrides
from minzero.planner.speed import Assumptions

AS_USUAL = argparse.Namespace(nodes=None, cpu_memory=None, price=None)  # flags of hardware that are not given
SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 256, "block_size": 512, "vocab_size": 4096}
# Rates of which more is never worse, and effective FLOP/s.
RATES = ("memory", "hbm", "link", "pcie", "network", "tf32")


def usual(name, gpus, **changes):
    """The usual Hardware of so many cards, with some fields changed."""
    card = card_named(name)
    return dataclasses.replace(on_card(card, card.memory, gpus, AS_USUAL), **changes)


def config_of(name, *flags):
    return load_config([f"configs/{name}.json", *flags])


def speed(fitter, hardware):
    """Tokens/s of the fastest setting that fits, 0 where none does."""
    found, _ = fitter.fastest(hardware)
    return found["tokens_per_second"] if found else 0


def said(capsys, arguments):
    """(the text, what --json says)."""
    plan.main([*shlex.split(arguments), "--json"])
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


# ---- batches


@pytest.mark.parametrize(
    "gpus, micro_batch, tokens",
    [
        (8, 17, 2228224),
        (64, 17, 2228224),
        (512, 2, 2097152),
        (6, 17, 2297856),  # of 181 sequences each, a prime number, the micro-batch would be 1
    ],
)
def test_the_nearest_batch_that_train_py_takes(gpus, micro_batch, tokens):
    config = config_of("13b")
    legal = legal_batch(config, gpus)
    assert (legal.train.micro_batch_size, legal.train.global_batch_tokens) == (micro_batch, tokens)
    assert gradient_accumulation(legal, gpus) * micro_batch * gpus * 2048 == tokens
    assert (legal is config) == (tokens == config.train.global_batch_tokens)
    config.train.micro_batch_size = 5
    assert legal_batch(config, 8).train.micro_batch_size == 4, "of 1, 2, 4, 8, 17, ..."


def test_odd_batches():
    for tokens, gpus, block in itertools.product((4096, 5000, 6144), (1, 3, 7, 16, 100), (256, 1000)):
        train = {"global_batch_tokens": tokens, "max_tokens": 120_000, "micro_batch_size": 3}
        config = build({"model": SMALL | {"block_size": block}, "train": train}, "test")
        legal = legal_batch(config, gpus)
        assert is_legal(legal, gpus) and gradient_accumulation(legal, gpus)
        nearer = abs(legal.train.global_batch_tokens - tokens) - block * gpus
        assert legal.train.global_batch_tokens == block * gpus or nearer <= -block * gpus / 2
    with pytest.raises(UserError, match="--gpus: 1000 GPUs take a sequence of 1000 tokens each"):
        legal_batch(config, 1000)


def test_gpus_that_are_no_whole_nodes_are_refused_with_the_flag_that_was_given():
    with pytest.raises(
        UserError, match=r"^--gpus: found 9, which 2 nodes of up to 8 GPUs .* or --nodes 3 for 3 on each$"
    ):
        plan.main(["configs/13b.json", "--gpus", "9", "--gpu", "h100"])
    with pytest.raises(UserError, match=r"^--nodes: 2 does not divide --gpus 9"):
        plan.main(["configs/13b.json", "--gpus", "9", "--nodes", "2", "--gpu", "h100"])


def test_a_batch_that_train_py_refuses_is_not_planned(capsys):
    """512 GPUs were twice as fast without --fit as with it: 1,088 sequences were counted as 8,704."""
    text, found = said(capsys, "configs/13b.json --gpus 512")
    line = text.splitlines()[0]
    assert line.startswith(
        "train.py refuses this batch: 2,228,224 tokens a step are not a multiple of 512 GPUs x micro"
    )
    assert line.endswith("--train.global_batch_tokens 2097152 (5.9% less in a step) --train.micro_batch_size 2")
    assert found["changed_batch"] == {"train.global_batch_tokens": 2097152, "train.micro_batch_size": 2}
    _, fitting = said(capsys, "configs/13b.json --gpus 512 --fit")
    assert fitting["tokens_per_second"] >= found["tokens_per_second"]
    flags = fitting["command"].split(" train.py ")[1]
    assert gradient_accumulation(load_config(shlex.split(flags)), 512) == fitting["gradient_accumulation_steps"]
    assert "changed_batch" not in said(capsys, "configs/13b.json --gpus 64")[1]


def test_a_larger_micro_batch_is_named(capsys):
    text, found = said(capsys, "configs/gpt2-124m.json --gpus 8")
    line, *_ = [line for line in text.splitlines() if "of the memory: --train.micro_batch_size" in line]
    size = int(line.split("--train.micro_batch_size ")[1])
    text, larger = said(capsys, f"configs/gpt2-124m.json --gpus 8 --train.micro_batch_size {size}")
    percent = int(line.split("% faster")[0].split()[-1])
    assert size > 16 and larger["tokens_per_second"] / found["tokens_per_second"] - 1 == pytest.approx(
        percent / 100, abs=0.006
    )
    assert "of the memory: --train.micro_batch_size" not in text, "it is the largest"


def test_what_fit_finds_is_named(capsys):
    """1.5B on 8 H100 fits with much room, and is recomputed."""
    text, found = said(capsys, "configs/1p5b.json --gpus 8")
    [line] = [line for line in text.splitlines() if "of --fit" in line]
    flags = line.split("(of --fit): ")[1]
    _, faster = said(capsys, f"configs/1p5b.json --gpus 8 {flags}")
    percent = int(line.split("% faster")[0].split()[-1])
    assert faster["tokens_per_second"] / found["tokens_per_second"] - 1 == pytest.approx(percent / 100, abs=0.006)
    assert "% faster" not in said(capsys, f"configs/1p5b.json --gpus 8 {flags}")[0]


# ---- the fastest setting


@pytest.mark.parametrize("gpus, card, gibibytes", [(1, "4090", 0.2), (4, "h100", 0.15), (8, "t4", 0.1)])
def test_the_search_finds_what_trying_all_finds(gpus, card, gibibytes):
    """Of every variant and micro-batch."""
    train = {"global_batch_tokens": 64 * 512, "activation_checkpointing": 2}
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"}
    config = build({"model": SMALL, "train": train, "deepspeed": {"zero_optimization": zero}}, "test")
    hardware, fitter = usual(card, gpus, memory_bytes=gibibytes * GiB), Fitter(config)
    found, chosen = fitter.fastest(hardware)
    speeds, sizes = {}, micro_batches(config, gpus)
    for number, variant in fitter.variants:
        if card == "t4" and variant.deepspeed["zero_optimization"]["stage"] == 0:
            continue  # DeepSpeed scales no loss there, and there is no bf16
        for size in sizes:
            tried = plan_run(with_batch(variant, size), hardware)
            if tried["fits"]:
                speeds[number, size] = tried["tokens_per_second"]
    assert 5 < len(speeds) < 0.7 * len(fitter.variants) * len(sizes), "the memory is a limit"
    assert found["tokens_per_second"] >= max(speeds.values()) * (1 - 1e-9)
    assert found == plan_run(chosen, hardware) and found["fits"]
    assert is_legal(chosen, gpus) and build(chosen.to_dict(), "chosen")


@pytest.mark.parametrize(
    "name, flags, gpus, card",
    [
        ("gpt2-124m", "", 8, "h100"),
        ("1p5b", "", 16, "a100-40"),
        ("1p5b", "--train.activation_checkpointing 5 --train.micro_batch_size 2", 8, "h100"),
        ("gpt2-350m", "--deepspeed.zero_optimization.overlap_comm false", 8, "l40s"),
        ("13b", "", 64, "h100"),
        # the stage is left open, and its offload goes with stage 1, which no other candidate has
        (
            "llama-8b",
            "--train.activation_checkpointing 2 --train.activation_offload true --deepspeed.zero_optimization.stage "
            "auto --deepspeed.zero_optimization.offload_optimizer.device cpu",
            3,
            "a100-pcie",
        ),
    ],
)
def test_fit_is_at_least_as_fast_as_what_was_given(name, flags, gpus, card):
    config = config_of(name, *flags.split())
    hardware = usual(card, gpus)
    config = legal_batch(config, gpus)
    given = Fitter(config).plan(config, hardware)
    assert given["fits"] and speed(Fitter(config), hardware) >= given["tokens_per_second"] * (1 - 1e-9)


def test_smaller_buffers_where_they_make_it_fit():
    """A bucket of 100 MB, on GPUs of 54 MB."""
    zero = {"stage": 3, "reduce_bucket_size": 50_000_000}
    config = build(
        {"model": SMALL, "train": {"global_batch_tokens": 64 * 512}, "deepspeed": {"zero_optimization": zero}}, "test"
    )
    fitter, hardware = Fitter(config), usual("h100", 8, memory_bytes=0.05 * GiB)
    for _, variant in fitter.variants:
        assert not any(plan_run(with_batch(variant, size), hardware)["fits"] for size in micro_batches(config, 8))
    found, chosen = fitter.fastest(hardware)
    assert found["fits"] and chosen.deepspeed["zero_optimization"]["reduce_bucket_size"] < 50_000_000


def test_what_only_the_given_one_has_is_taken_back():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}, "offload_param": {"device": "cpu"}}
    given = build({"model": SMALL, "deepspeed": {"zero_optimization": zero}}, "given")
    chosen = build({"model": SMALL, "deepspeed": {"zero_optimization": {"stage": 1}}}, "chosen")
    made = with_overrides(given, overrides(given, chosen))
    assert plan_run(made, usual("h100", 2)) == plan_run(chosen, usual("h100", 2))


# ---- more is never worse


@pytest.mark.parametrize("name, cards", [("gpt2-124m", ("h100", "4090")), ("1p5b", ("h100", "a100-40", "h100-pcie"))])
def test_more_gpus_are_never_slower(name, cards):
    """In total, for the same batch. One thing is physical: where a GPU waits for its host, which has as many launches
    for one sequence as for ten, more GPUs are not faster, and a call that joins more ranks takes longer."""
    fitter = Fitter(config_of(name))
    for card in cards:
        before = 0
        for gpus in numbers_of_gpus(fitter.config):
            if gpus > 128:
                continue
            found, _ = fitter.fastest(usual(card, gpus))
            if found is None:
                assert not before
                continue
            least = 0.97 if found["bound_by"] == "host" and found["gradient_accumulation_steps"] == 1 else 1
            assert found["tokens_per_second"] >= least * before, (card, gpus)
            before = max(before, found["tokens_per_second"])
        assert before


@pytest.mark.parametrize("card, always", [("h100", True), ("mi300x", True), ("l40s", False), ("4090", False)])
def test_more_gpus_with_one_setting(card, always):
    """ZeRO-3 with one sequence at a time: all weights are gathered for 2,048 tokens. With NVLink more GPUs are never
    slower. Over PCIe, and over Ethernet between nodes, gathering takes longer than computing: the first step to several
    GPUs, or nodes, is slower, which is physical. --fit takes another setting there."""
    config, slower = config_of("13b", "--train.micro_batch_size", "1"), 0
    plans = [plan_run(config, usual(card, gpus)) for gpus in (1, 2, 4, 8, 16, 32, 64, 136)]
    for fewer, more in itertools.pairwise(plans):
        if more["tokens_per_second"] < fewer["tokens_per_second"]:
            slower += 1
            assert more["bound_by"] == "communication" and (fewer["gpus"] == 1 or more["nodes"] > fewer["nodes"])
    assert not slower if always else slower


@pytest.mark.parametrize("name", ["gpt2-124m", "1p5b"])
def test_faster_cards_are_never_slower(name):
    """Of each pair of cards of which one has no less of anything."""
    fitter, found, pairs = Fitter(config_of(name)), {}, 0
    for card in CARDS:
        if 8 % nodes_of(card, 8, AS_USUAL) == 0:
            hardware = on_card(card, card.memory, 8, AS_USUAL)
            rates = [getattr(card, rate) for rate in RATES] + [card.bf16 * card.products, card.bf16 * card.attention]
            rates += [hardware.cpu_bytes, -hardware.nodes, card.has_bf16]
            found[card.name] = rates, speed(fitter, hardware)
    for (better, fast), (worse, slow) in itertools.permutations(found.values(), 2):
        if all(x >= y for x, y in zip(better, worse, strict=True)):
            pairs += 1
            assert fast >= slow * (1 - 1e-9)
    assert pairs > 50


@pytest.mark.parametrize("name, gpus", [("gpt2-124m", 16), ("1p5b", 8)])
def test_less_link_is_never_faster(name, gpus):
    config, before = config_of(name), 0
    for link in (1e9, 1e10, 1e11, 1e12):
        found = speed(Fitter(config, Assumptions(link=link, network=link / 8)), usual("h100", gpus))
        assert found >= before
        before = found


@pytest.mark.parametrize("name, card", [("1p5b", "4090"), ("gpt2-350m", "t4")])
def test_more_memory_is_never_worse(name, card):
    fitter = Fitter(config_of(name))
    for gpus in (1, 8):
        speeds = [speed(fitter, usual(card, gpus, cpu_bytes=ram * GiB)) for ram in (4, 10, 50, 200, 1000, 10_000)]
        assert speeds == sorted(speeds) and speeds[-1]
        speeds = [speed(fitter, usual(card, gpus, memory_bytes=size * GiB)) for size in (2, 4, 8, 12, 16, 24, 32, 64)]
        assert speeds == sorted(speeds) and speeds[-1]


# ---- RAM


def test_no_plan_takes_more_ram_than_there_is(capsys):
    """175B on one GPU: its offload takes thousands of GiB."""
    text, found = said(capsys, "configs/175b.json --gpus 1")
    assert found["cheapest_change"] is None and "zero_optimization.offload" not in text
    with pytest.raises(UserError, match="--fit: nothing fits"):
        plan.main("configs/175b.json --gpus 1 --fit".split())
    _, found = said(capsys, "configs/175b.json --gpus 1 --cpu_memory 20000 --gpu b200")
    assert "offload" in str(found["cheapest_change"])
    fitter = Fitter(config_of("1p5b"))
    offloaded = 0
    for card, gpus, ram in itertools.product(("4090", "t4", "v100-16"), (1, 2, 4, 8), (8, 32, 64, 128)):
        hardware = usual(card, gpus, cpu_bytes=ram * GiB)
        found, _ = fitter.fastest(hardware)
        if found:
            assert found["cpu_bytes"] + gpus // hardware.nodes * PROCESS <= ram * GiB
            offloaded += found["offload_optimizer"]
    assert offloaded


def test_the_number_of_gpus_that_is_enough_is_one_that_train_py_takes(capsys):
    _, found = said(capsys, "configs/1p5b.json --gpus 1 --gpu 4090")
    assert found["enough_gpus"] == 4, "not 3: 256 sequences in micro-batches of 16"
    _, found = said(capsys, "configs/13b.json --gpus 4 --gpu a100-40 --train.micro_batch_size 8")
    assert found["enough_gpus"] % 4 == 0 and is_legal(
        config_of("13b", "--train.micro_batch_size", "8"), found["enough_gpus"]
    )


def test_numbers_of_gpus_that_cannot_be_rented_hide_no_smaller_one():
    """10 GPUs are two nodes of 5; 20 would be three that are not alike."""
    config = config_of("gpt2-124m", "--train.global_batch_tokens", str(80 * 1024), "--train.micro_batch_size", "1")
    asked = {5: False, 10: True, 20: None, 40: True, 80: True}

    def planned(_, number):
        return None if asked[number] is None else {"fits": asked[number]}

    assert enough_gpus(config, 5, planned) == 10


def test_a_configuration_that_train_py_takes_with_no_stage_is_one_line():
    words = "configs/1p7b.json --deepspeed.zero_optimization.stage auto --deepspeed.data_types.grad_accum_dtype bf16"
    for more in (["--gpus", "8", "--fit"], ["--gpu", "h100"]):
        with pytest.raises(UserError, match="grad_accum_dtype: found bf16"):
            plan.main([*words.split(), *more])


# ---- what to rent


@pytest.fixture(scope="module")
def offers():
    options = argparse.Namespace(gpus=None, gpu=None, gpu_memory=None, nodes=None, cpu_memory=None, price=None)
    return all_offers(Fitter(config_of("gpt2-124m")), options)


def test_the_cheapest_the_middle_and_the_fastest(offers):
    found, notes = answers(offers)
    cheapest, middle, fastest, unpriced = found.values()
    priced = [offer for offer in offers if offer.cost is not None and offer.days <= 365]
    assert cheapest.cost == min(offer.cost for offer in priced) and not notes
    assert fastest.days == min(offer.days for offer in priced)
    assert middle.cost <= MIDDLE * cheapest.cost and middle.days < cheapest.days
    assert all(offer.days >= middle.days for offer in priced if offer.cost <= MIDDLE * cheapest.cost)
    assert unpriced.cost is None
    assert unpriced.gpu_hours == min(offer.gpu_hours for offer in offers if offer.cost is None and offer.days <= 365)


def test_budget_and_days_are_kept(offers):
    priced = [offer for offer in offers if offer.cost is not None]
    found, _ = answers(offers, budget=15)
    assert list(found) == ["cheapest within $15", "middle", "fastest within $15"]
    assert max(offer.cost for offer in found.values()) <= 15
    assert found["fastest within $15"].days == min(offer.days for offer in priced if offer.cost <= 15)
    found, _ = answers(offers, days=0.02)
    assert max(offer.days for offer in found.values()) <= 0.02
    cheapest = next(iter(found.values()))
    assert cheapest.cost == min(offer.cost for offer in priced if offer.days <= 0.02)
    found, notes = answers(offers, budget=0.01)
    assert notes == ["no run costs at most $0.01; this is the cheapest"] and list(found) == ["cheapest"]
    assert found["cheapest"].cost == min(offer.cost for offer in priced)
    found, notes = answers(offers, days=1e-6)
    assert notes == ["no run takes at most 1e-06 days; this is the fastest"] and list(found) == ["fastest"]
    unpriced = [offer for offer in offers if offer.cost is None]
    found, notes = answers(unpriced)
    assert "ranked by GPU hours" in notes[0]
    assert next(iter(found.values())).gpu_hours == min(offer.gpu_hours for offer in unpriced)
    with pytest.raises(UserError, match="--budget: no price"):
        answers(unpriced, budget=10)


@pytest.mark.parametrize(
    "arguments",
    [
        "configs/1p5b.json --gpu 4090 --days 400",
        "configs/gpt2-124m.json --gpus 48 --budget 100 --cpu_memory 100 --train.micro_batch_size 3",
        "configs/gpt2-350m.json --gpu t4 --price 0.5 --network 1e9 --model.n_layer 6",
    ],
)
def test_printed_commands_give_the_same_numbers(capsys, arguments):
    text, found = said(capsys, arguments)
    assert found["offers"]
    for offer in {offer["plan_command"]: offer for offer in found["offers"]}.values():
        assert f"\n  {offer['plan_command']}\n  {offer['command']}\n" in text
        _, again = said(capsys, offer["plan_command"].removeprefix("python plan.py "))
        assert again["fits"] and "changed_batch" not in again
        for key in ("tokens_per_second", "gpu_bytes", "cost", "days", "stage", "micro_batch_size", "nodes"):
            assert again[key] == offer[key], key
        config = load_config(shlex.split(offer["command"].split(" train.py ")[1]))
        assert gradient_accumulation(config, offer["gpus"]) == offer["gradient_accumulation_steps"]


def test_the_guide_shows_what_is_printed(capsys):
    """The example of docs/planner.md."""
    text = (ROOT / "docs" / "planner.md").read_text()
    command, shown = re.search(r"\$ python plan.py (.* --days .*)\n((?:.+\n|\n)*?)```", text).groups()
    assert said(capsys, command)[0].startswith(shown)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--max", "--max: found with a search"),
        ("--plot out/x.png --budget 10 --gpus 8", "--plot: found"),
        ("--nodes 2", "--nodes: found with a search"),
        ("--price 2", "--price: found without --gpu"),
        ("--gpu_memory 25", "--gpu_memory: found 25 without --gpu, expected a size of a card: 16, 24, 32"),
        ("--budget 0", "--budget"),
        ("--days x", "--days"),
        (
            "--model.n_embd 98304 --model.block_size 65536 --gpu t4 --train.global_batch_tokens 65536",
            "nothing fits on t4",
        ),
    ],
)
def test_bad_searches_are_one_line(arguments, words):
    with pytest.raises(UserError, match=words):
        plan.main(["configs/gpt2-124m.json", *arguments.split()])
