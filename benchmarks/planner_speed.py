"""plan.py's speed against published and measured ones, source by source.

    python benchmarks/planner_speed.py ROWS.json [--refit] [--rows]
    python benchmarks/planner_speed.py --here [--ranks 2] [--data FOLDER]

ROWS.json: a list of rows with source, name, gpus, nodes, gpu, gpu_memory, tokens_per_second_per_gpu and overrides,
which change configs/gpt2-124m.json. The rows of benchmarks/h100 that are runs of train.py are a source of their own.
--refit: beside each source's error that with constants found without the source: from those of speed.py and cards.py,
larger and smaller ones are tried in turn. --rows: every row, with its parts.

--here: configs/tiny.json and changes of it on this machine, twice in turn; each is predicted from the first run of the
unchanged one, as plan.py --measured does.
"""

import dataclasses
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minzero import benchmark
from minzero.cards import EARLIER, FROM_HOPPER, card_named
from minzero.commands import run_command
from minzero.config.load import load_config
from minzero.errors import UserError
from minzero.files import ROOT
from minzero.flags import FlagParser, a_path, at_least
from minzero.planner.gpus import Hardware
from minzero.planner.measured import calibrated, seen_in_rows, seen_of
from minzero.planner.memory import replayed
from minzero.planner.settings import settings_of
from minzero.planner.speed import Assumptions, Code, StepTime, step_time
from minzero.report import table

OURS = "this code on one H100 (benchmarks/h100)"
# The constants that --refit changes; the others are a data sheet's, a kernel's definition or a host's, which these rows
# hardly show.
FITTED = ("moved_compiled", "hidden", "cpu_adam_bytes")


class Row(NamedTuple):
    source: str
    name: str
    settings: object
    hardware: Hardware
    engine: object  # the replayed one
    seconds: float  # of a measured step


def published(path):
    """The rows of a file of published speeds; those that train.py refuses are named, and left out."""
    for row in json.loads(Path(path).read_text()):
        words = []
        for key, value in row["overrides"].items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        card = card_named(row["gpu"], row["gpu_memory"])
        try:
            config = load_config([str(ROOT / "configs/gpt2-124m.json"), *words])
            settings = settings_of(config, row["gpus"], card.memory, card)
        except UserError as error:
            print(f"left out: {row['name']}: {error}", file=sys.stderr)
            continue
        tokens = settings.gradient_accumulation_steps * settings.tokens
        hardware = Hardware(row["gpus"], row["nodes"], card.memory, card)
        seconds = tokens / row["tokens_per_second_per_gpu"]
        yield Row(row["source"], row["name"], settings, hardware, replayed(settings), seconds)


def measured_here():
    """The rows of benchmarks/h100 that are runs of train.py."""
    for number, one in enumerate(seen_in_rows(ROOT / "benchmarks/h100/results.json")):
        yield Row(OURS, f"row {number}", one.settings, one.hardware, replayed(one.settings), one.seconds)


def predicted(row, constants) -> StepTime:
    """constants: {name: value} of Code, and (products, attention) shares by the names that cards.py has for them."""
    shares = "FROM_HOPPER" if row.hardware.card.products == FROM_HOPPER["products"] else "EARLIER"
    products, attention = constants[shares]
    card = dataclasses.replace(row.hardware.card, products=products, attention=attention)
    code = dataclasses.replace(Code(), **{name: constants[name] for name in FITTED})
    return step_time(row.settings, row.engine, dataclasses.replace(row.hardware, card=card), Assumptions(), code)


def error(row, constants):
    """How much faster the plan is than what was measured: 0.1 for 10%."""
    return row.seconds / predicted(row, constants).seconds - 1


def as_they_are():
    constants = {name: getattr(Code(), name) for name in FITTED}
    for name, shares in (("EARLIER", EARLIER), ("FROM_HOPPER", FROM_HOPPER)):
        constants[name] = shares["products"], shares["attention"]
    return constants


def refitted(rows):
    """Constants with which the mean size of a logarithm of the errors is the least that trying finds. A change that
    gains little is not made."""

    def badness(constants):
        return statistics.mean(abs(math.log1p(error(row, constants))) for row in rows)

    constants = as_they_are()
    least, factor = badness(constants), 1.25
    while factor > 1.01:
        tried = [changed for name in constants for changed in changes(constants, name, factor)]
        best = min(tried, key=badness)
        if badness(best) < least - 1e-4:
            constants, least = best, badness(best)
        else:
            factor = math.sqrt(factor)
    return constants


def changes(constants, name, factor):
    """Copies of the constants with one larger and smaller by this factor."""
    value = constants[name]
    for times in (factor, 1 / factor):
        if not isinstance(value, tuple):
            yield constants | {name: value * times}
            continue
        yield constants | {name: (min(1, value[0] * times), value[1])}
        yield constants | {name: (value[0], value[1] * times)}


def summary(errors):
    """[median, 90th percentile, largest of the sizes of these, with its sign] as text."""
    sizes = sorted(abs(one) for one in errors)
    largest = max(errors, key=abs)
    tenth = sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]
    return [f"{statistics.median(sizes):.1%}", f"{tenth:.1%}", f"{largest:+.0%}"]


def print_sources(rows, options):
    """The errors of these rows by their source. options: refit and rows, of the command line."""
    constants = as_they_are()
    lines = []
    for source in dict.fromkeys(row.source for row in rows):
        of_source = [row for row in rows if row.source == source]
        line = [source, str(len(of_source)), *summary([error(row, constants) for row in of_source])]
        if options.refit:
            without = refitted([row for row in rows if row.source != source])
            line += summary([error(row, without) for row in of_source])[:2]
            print(f"without {source}: {without}", file=sys.stderr)
        lines.append(line)
    outside = [error(row, constants) for row in rows if row.source != OURS]
    lines.append(["all but this code's", str(len(outside)), *summary(outside), *["", ""] * options.refit])
    head = ["source", "rows", "median", "90th percentile", "largest"]
    head += ["constants found without it: median", "90th percentile"] * options.refit
    print(table(head, lines, right_from=1))
    if options.rows:
        for row in rows:
            step = predicted(row, constants)
            parts = ", ".join(f"{name} {value:.3g}" for name, value in dataclasses.asdict(step).items() if value)
            print(f"{error(row, constants):+.0%} {row.source[-12:]} {row.name}: {row.seconds:.3g} s, planned {parts}")


# ---- on this machine

CHANGES = {  # of configs/tiny.json, as overrides
    "as it is": {},
    "micro-batch 4, not 8": {"train.micro_batch_size": 4},
    "twice the tokens of a step": {"train.micro_batch_size": 16, "train.global_batch_tokens": 4096},
    "8 layers, not 4": {"model.n_layer": 8},
    "width 192, not 96": {"model.n_embd": 192, "model.n_head": 6},
    "every block recomputed": {"train.activation_checkpointing": True},
    "ZeRO-1": {"deepspeed.zero_optimization.stage": 1},
    "a vocabulary of 16,384, not 4,096": {"model.vocab_size": 16384},
}


def measured_changes(ranks, data, rounds=2):
    """{name: the Seen of all rounds' steps} of CHANGES, measured in turn."""
    _, gpus = benchmark.this_device()
    found = {name: [] for name in CHANGES}
    for _ in range(rounds):
        for name, change in CHANGES.items():
            words = [word for key, value in change.items() for word in (f"--{key}", json.dumps(value))]
            config = load_config([str(ROOT / "configs/tiny.json"), f"--data.path={data}", *words])
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                row = benchmark.measure(config, ranks, 15, 4, Path(folder) / "run", bool(gpus))
            if row["failed"]:
                raise UserError(f"{name}: {row['failed']}")
            print(f"{name}: {statistics.median(row['all_step_seconds']):.3f} s", file=sys.stderr, flush=True)
            found[name].append(row)
    seen = {}
    for name, rows in found.items():
        seconds = [one for row in rows for one in row["all_step_seconds"]]
        seen[name] = seen_of(rows[0]["config"], statistics.median(seconds), None, name)
    return seen


def print_changes(ranks, data):
    """The steps of CHANGES, and what they are predicted to take by the first."""
    seen = measured_changes(ranks, data)
    code = calibrated([seen["as it is"]], Assumptions())
    lines = []
    for name, one in seen.items():
        planned = step_time(one.settings, replayed(one.settings), one.hardware, Assumptions(), code).seconds
        lines.append([name, f"{one.seconds:.3f}", f"{planned:.3f}", f"{one.seconds / planned - 1:+.0%}"])
    print(table(["setting", "measured, s", "planned, s", "the plan is faster by"], lines, right_from=1))


def main(arguments):
    parser = FlagParser(__doc__, "benchmarks/planner_speed.py ROWS.json [--refit] [--rows], or --here")
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--ranks", type=at_least(1), default=2)
    parser.add_argument("--data", type=a_path, default="data/stdlib")
    options, rest = parser.parse_known_args(arguments)
    if options.here:
        print_changes(options.ranks, options.data)
    elif len(rest) == 1 and Path(rest[0]).is_file():
        print_sources([*published(rest[0]), *measured_here()], options)
    else:
        raise UserError(f"benchmarks/planner_speed.py: found {' '.join(rest) or 'nothing'}, expected one file of rows")


if __name__ == "__main__":
    run_command(main)
