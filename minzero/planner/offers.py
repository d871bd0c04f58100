"""What to rent for a run: over cards and numbers of GPUs the cheapest, the fastest and the sensible middle.

Each number of each card gets its fastest setting that fits (fitting.py). `Offer` is one of them.
"""

import shlex
from typing import NamedTuple

from minzero.cards import CARDS
from minzero.config.sections import Config
from minzero.config.values import divisors
from minzero.errors import UserError
from minzero.planner.batches import changed_batch, sequences_of_rank
from minzero.planner.fitting import WORTH_A_LINE
from minzero.planner.gpus import Hardware, chosen_card, nodes_of, on_card
from minzero.planner.report import chosen, in_flags, train_command, without
from minzero.planner.units import in_count, in_digits, in_money, in_percent, in_time, in_units

MOST_TO_RENT = 1024  # GPUs, unless --gpus says how many
MIDDLE = 1.2  # times the cost of the cheapest that the sensible middle may cost
LONGEST_DAYS = 365  # of a run that is offered, unless --days says how long
FLAGS_OF_HARDWARE = ("gpu_memory", "cpu_memory", "nodes", "price")


class Offer(NamedTuple):
    """The fastest setting that fits on some GPUs."""

    hardware: Hardware
    plan: dict
    config: Config

    @property
    def days(self):
        return self.plan["days"]

    @property
    def gpu_hours(self):
        return self.plan["gpu_hours"]

    @property
    def cost(self):
        """Dollars, None where the card has no price."""
        return self.plan["cost"]


def lines_on_room(plan, config, fitter, hardware):
    """Lines on what is faster on the same GPUs: a larger micro-batch alone, and all that --fit finds. plan: of this
    configuration, which fits."""
    reached = plan["tokens_per_second"]
    if larger := fitter.larger_micro_batch(plan, hardware):
        size, times = larger["micro_batch_size"], larger["tokens_per_second"] / reached
        reached = larger["tokens_per_second"]
        yield (
            f"{times - 1:.0%} faster, at {in_percent(larger['gpu_fraction'])} of the memory: "
            f"--train.micro_batch_size {size}"
        )
    fastest, fastest_config = fitter.fastest(hardware)
    if fastest and fastest["tokens_per_second"] >= WORTH_A_LINE * reached:
        times = fastest["tokens_per_second"] / plan["tokens_per_second"]
        yield (
            f"{times - 1:.0%} faster, at {in_percent(fastest['gpu_fraction'])} of the memory (of --fit): "
            f"{in_flags(chosen(config, fastest_config))}"
        )


# ---- the candidates


def cards_of(options, precision):
    """[(Card, bytes of one)] that --gpu and --gpu_memory allow, all of NVIDIA's in the table without them that can
    compute in this precision. Raises UserError."""
    if options.gpu:
        return [chosen_card(options.gpu, options.gpu_memory)]
    if options.price is not None:
        raise UserError("--price: found without --gpu; name the card that it is the price of")
    nvidias = [card for card in CARDS if card.is_nvidia and (card.has_bf16 or precision != "bf16")]
    if options.gpu_memory is None:
        return [(card, card.memory) for card in nvidias]
    found = [(card, card.memory) for card in nvidias if card.sold_gb == options.gpu_memory]
    if not found:
        sizes = ", ".join(str(size) for size in sorted({card.sold_gb for card in nvidias}))
        raise UserError(f"--gpu_memory: found {options.gpu_memory:g} without --gpu, expected a size of a card: {sizes}")
    return found


def numbers_of_gpus(config):
    """Numbers of GPUs that divide the sequences of a step: 1, 2, 4 and multiples of 8 up to MOST_TO_RENT. Where these
    are few, powers of two as well, for which global_batch_tokens is changed a little."""
    sequences = sequences_of_rank(config, 1)
    numbers = {n for n in divisors(sequences or 1) if n <= MOST_TO_RENT and (n in (1, 2, 4) or n % 8 == 0)}
    if len(numbers) < 4:
        most = min(MOST_TO_RENT, max(1, config.train.global_batch_tokens // config.model.block_size))
        numbers |= {2**power for power in range(most.bit_length())}
    return sorted(numbers)


def all_offers(fitter, options):
    """The Offer of each card and number of GPUs that `options` allow. Raises UserError if nothing fits on any."""
    numbers = [options.gpus] if options.gpus else numbers_of_gpus(fitter.config)
    found = []
    for gpus in reversed(numbers):  # what does not fit on many is not tried on fewer
        for card, memory in cards_of(options, fitter.config.train.precision):
            if gpus % (nodes_of(card, gpus, options)):
                continue  # the nodes would not be alike
            hardware = on_card(card, memory, gpus, options)
            plan, config = fitter.fastest(hardware)
            if plan:
                found.append(Offer(hardware, plan, config))
    if not found:
        what = f"{options.gpu or 'any card'}, {in_numbers(numbers)}"
        raise UserError(
            f"nothing fits on {what}; it takes more GPUs (--gpus), a shorter model.block_size or less model"
        )
    return found


def in_numbers(numbers):
    """Numbers of GPUs in words."""
    if len(numbers) > 1:
        return f"{numbers[0]} to {numbers[-1]:,} GPUs"
    return f"{numbers[0]} GPU{'s' if numbers[0] > 1 else ''}"


# ---- the answers


def answers(offers, budget=None, days=None):
    """({title: Offer}, notes): the cheapest, the sensible middle and the fastest of these, within a budget (dollars)
    and days where they are given. The middle is the fastest that costs at most MIDDLE times the cheapest. Cards without
    a price are compared by GPU hours, among themselves."""
    priced, notes = [offer for offer in offers if offer.cost is not None], []
    unpriced = [offer for offer in offers if offer.cost is None]
    if budget is not None and not priced:
        raise UserError("--budget: no price of this card is known; give --price")
    within = in_limits(priced or unpriced, budget, days or LONGEST_DAYS)
    if not within and days is None:
        within = in_limits(priced or unpriced, budget, None)
        notes += [f"no run takes less than {in_time(LONGEST_DAYS * 86400)}"] if within else []
    if not within:
        return nearest_to(priced or unpriced, budget, days)
    limits = [f"{in_money(budget)}"] if budget is not None else []
    limits += [in_days(days)] if days is not None else []
    limit = f" within {' and '.join(limits)}" if limits else ""
    found = {f"cheapest{limit}": cheapest(within)}
    most = MIDDLE * spent(cheapest(within))
    found["middle"] = fastest([offer for offer in within if spent(offer) <= most])
    found[f"fastest{limit}"] = fastest(within)
    if priced and unpriced and budget is None and (others := in_limits(unpriced, None, days or LONGEST_DAYS)):
        found["fewest GPU hours, no price known"] = min(others, key=lambda offer: offer.gpu_hours)
    elif not priced:
        notes.append("no price is known: ranked by GPU hours; --price gives one")
    return found, notes


def nearest_to(offers, budget, days):
    """The answer where nothing is within the limits."""
    limits = [f"costs at most {in_money(budget)}"] if budget is not None else []
    limits += [f"takes at most {in_days(days)}"] if days is not None else []
    note = f"no run {' and '.join(limits)}; this is the"
    if budget is not None:
        return {"cheapest": cheapest(in_limits(offers, None, days) or offers)}, [f"{note} cheapest"]
    return {"fastest": fastest(offers)}, [f"{note} fastest"]


def in_limits(offers, budget, days):
    """Those within a budget in dollars and a number of days; None: no limit."""
    return [
        offer for offer in offers if (budget is None or offer.cost <= budget) and (days is None or offer.days <= days)
    ]


def in_days(days):
    """A limit as it was given."""
    return f"{days:g} day{'' if days == 1 else 's'}"


def spent(offer):
    """Dollars, or GPU hours without a price."""
    return offer.gpu_hours if offer.cost is None else offer.cost


def cheapest(offers):
    """Of equally cheap ones the fastest."""
    return min(offers, key=lambda offer: (spent(offer), offer.days))


def fastest(offers):
    """Of equally fast ones the cheapest."""
    return min(offers, key=lambda offer: (offer.days, spent(offer)))


# ---- the page


def plan_command(arguments, given, offer, options):
    """The command line of plan.py that plans an offer by itself."""
    hardware, words = offer.hardware, []
    for name in (*FLAGS_OF_HARDWARE, *options.rates):
        value = getattr(options, name)
        if value is not None and not (name == "gpu_memory" and not options.gpu):
            words.append(f"--{name} {value:g}")
    if options.measured:
        words.append(f"--measured {shlex.quote(str(options.measured))}")
    flags = " ".join([f"--gpus {hardware.gpus} --gpu {hardware.card.names[0]}", *words])
    changes = chosen(given, offer.config)
    return f"python plan.py {without(arguments, changes)} {flags} {in_flags(changes)}"


def as_rows(found, options, arguments, given):
    """[dict] of the answers: what they are, the plan and the commands, for --json and the page."""
    return [
        {
            "answer": title,
            "gpus": offer.hardware.gpus,
            "nodes": offer.hardware.nodes,
            "gpu": offer.hardware.card.names[0],
            "plan_command": plan_command(arguments, given, offer, options),
            "command": train_command(arguments, given, offer.config, offer.hardware),
            "changed_batch": changed_batch(given, offer.config),
            **offer.plan,
        }
        for title, offer in found.items()
    ]


def page(offers, found, notes, rows, config):
    """The answers as lines of text: a table, and the commands."""
    cards = {offer.hardware.card.name for offer in offers}
    numbers = sorted({offer.hardware.gpus for offer in offers})
    tried = f"{len(cards)} cards" if len(cards) > 1 else min(cards)
    first = next(iter(found.values()))
    lines = [
        f"{in_count(first.plan['parameters'])} parameters, {in_count(config.train.max_tokens)} tokens; it fits "
        f"on {tried}, {in_numbers(numbers)} (each at its fastest setting)"
    ]
    lines += [f"note: {note}" for note in notes]
    table = [("", "GPUs", "memory of a GPU", "tokens/s", "time", "GPU hours", "cost")]
    for title, offer in found.items():
        table.append((title, *cells(offer)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["", *(aligned(line, widths) for line in table), "", *footnotes(found)]
    shown = {}
    for row in rows:
        shown.setdefault((row["plan_command"], row["command"]), []).append(row["answer"])
    for (plan, command), titles in shown.items():
        lines += ["", f"{', '.join(titles)}:", f"  {plan}", f"  {command}"]
    return "\n".join(lines)


def footnotes(found):
    """The rule of the middle, the sources of the prices, and what the speeds rest on, as lines."""
    lines = [f"middle: the fastest that costs at most {MIDDLE:g} times the cheapest"] if "middle" in found else []
    priced = {
        f"{card.name} ${card.price:g} ({card.priced})": None  # a dict keeps the order
        for card, price in ((offer.hardware.card, offer.hardware.price) for offer in found.values())
        if card.priced and price == card.price
    }
    lines += [f"prices per GPU hour: {', '.join(priced)}"] if priced else []
    if not any(offer.plan.get("measured") for offer in found.values()):
        lines.append("speeds are assumed: measure 20 steps before you pay (--measured)")
    return lines


def cells(offer):
    """The cells of an offer in the table."""
    hardware, plan = offer.hardware, offer.plan
    return (
        f"{hardware.gpus} x {hardware.gpu}",
        f"{in_units(plan['gpu_bytes'])}, {plan['gpu_fraction']:.0%}",
        in_digits(plan["tokens_per_second"]),
        in_time(86400 * plan["days"]),
        in_digits(plan["gpu_hours"]),
        "no price" if plan["cost"] is None else in_money(plan["cost"]),
    )


def aligned(cells, widths):
    """A line of the table: the first two cells to the left, numbers to the right."""
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths, strict=False)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(left + right).rstrip()
