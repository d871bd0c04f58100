"""Will it fit, how fast, what does it cost: a plan of a run before anything is rented.

    python plan.py configs/1p5b.json --gpus 8 [--gpu h100] [--gpu_memory GB] [--cpu_memory GiB] [--nodes 1]
                   [--price 2.5] [--section.key value ...] [--fit | --max] [--plot PICTURE.png] [--json]
    python plan.py configs/13b.json [--budget DOLLARS] [--days DAYS] [--gpu NAME] [--gpus N] [--json]

--gpu names the card (h100, a100-40, 4090, ...; docs/planner.md lists them), and with it memory, speeds, the usual node
and a price where one is known; --gpu_memory, --cpu_memory (RAM of one node) and --price override those.

Without --gpus, or with --budget or --days, it says what to rent: over all cards and numbers of GPUs (or those of --gpu,
--gpus) the cheapest, the fastest and the sensible middle, within the budget and the days, each as a command.

--fit finds the fastest setting that fits, --max the deepest model; --plot draws the memory of every candidate. Where
nothing fits, the cheapest change that would is named. Of a batch that train.py refuses, the nearest that it takes is
planned. Memory is replayed allocation by allocation (minzero/planner), speed is arithmetic on stated assumptions.
Nothing is allocated, and no GPU is looked for.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import dataclasses
import json

from minzero.commands import run_command
from minzero.config.load import load_config
from minzero.errors import UserError
from minzero.files import check_can_write
from minzero.flags import FlagParser, a_number, a_path, at_least
from minzero.init_from import model_defaults
from minzero.planner.batches import changed_batch, legal_batch, refused_batch
from minzero.planner.fitting import Fitter
from minzero.planner.gpus import MOST_GPUS, nodes_of, on_card, rented
from minzero.planner.offers import all_offers, answers, as_rows, line_on_room, page
from minzero.planner.report import draw, notes_on, plan_text, suggest_fix, train_command
from minzero.planner.search import deepest, with_choice
from minzero.planner.speed import Assumptions
from minzero.planner.stage import with_chosen_stage


def read_options(arguments):
    """plan.py's own flags, and the rest: the config file and its overrides. Raises UserError."""
    parser = FlagParser(__doc__, "plan.py CONFIG [--gpus N] [--gpu NAME] [--section.key value ...]")
    parser.add_argument("--gpus", type=at_least(1, MOST_GPUS))
    parser.add_argument("--gpu")
    parser.add_argument("--gpu_memory", type=a_number(0, 1e6, above=True))
    parser.add_argument("--cpu_memory", type=a_number(0, 1e9, above=True))
    parser.add_argument("--nodes", type=at_least(1, MOST_GPUS))
    parser.add_argument("--price", type=a_number(0, 1e6))
    parser.add_argument("--budget", type=a_number(0, 1e12, above=True))
    parser.add_argument("--days", type=a_number(0, 1e6, above=True))
    parser.add_argument("--plot", type=a_path)
    for flag in ("--fit", "--max", "--json"):
        parser.add_argument(flag, action="store_true")
    for assumed in dataclasses.fields(Assumptions):
        values = a_number(0, 1, above=True) if assumed.name == "utilisation" else a_number(1, 1e15)
        parser.add_argument(f"--{assumed.name}", type=values, default=assumed.default)
    options, rest = parser.parse_known_args(arguments)
    fields = dataclasses.fields(Assumptions)
    options.rates = [field.name for field in fields if getattr(options, field.name) != field.default]
    options.assumptions = Assumptions(**{field.name: getattr(options, field.name) for field in fields})
    options.compares = options.gpus is None or options.budget is not None or options.days is not None
    for flag in ("max", "plot", *(() if options.gpus else ("nodes",))):
        if options.compares and getattr(options, flag):
            raise UserError(f"--{flag}: found with a search for what to rent; expected --gpus N, no --budget or --days")
    return options, rest


def what_to_rent(options, arguments, config):
    """Print the answers over cards and numbers of GPUs."""
    offers = all_offers(Fitter(config, options.assumptions), options)
    found, notes = answers(offers, options.budget, options.days)
    rows = as_rows(found, options, arguments, config)
    print(page(offers, found, notes, rows, config))
    if options.json:
        print(json.dumps({"offers": rows, "notes": notes}))


def main(arguments):
    options, rest = read_options(arguments)
    config = load_config(rest, model_defaults)
    if options.compares:
        what_to_rent(options, rest, config)
    else:
        plan_one(options, rest, config)


def plan_one(options, rest, given):
    """Print the plan of a configuration on given GPUs."""
    hardware = rented(options)
    config = legal_batch(given, hardware.gpus)
    more = {}  # answers beside the plan
    if config is not given:
        print(refused_batch(given, config, hardware.gpus))
        more["changed_batch"] = changed_batch(given, config)
    fitter = Fitter(config, options.assumptions)

    def planned(config, gpus=hardware.gpus):
        if gpus % nodes_of(hardware.card, gpus, options):
            return None  # such nodes are not rented
        return fitter.plan(config, on_card(hardware.card, hardware.memory_bytes, gpus, options))

    if options.plot:
        check_can_write("--plot", options.plot)
        try:
            draw(config, planned, hardware, options.plot)
        except (OSError, ValueError) as error:  # a folder that is not there, an unknown format
            raise UserError(f"--plot: {options.plot}: {error}; expected a PICTURE.png that can be written") from None
        more["picture"] = str(options.plot)
    if options.fit:
        found, chosen = fitter.fastest(hardware)
        if found is None:
            smallest = with_choice(config, 3, "param", True, 1)
            raise UserError(
                f"--fit: nothing fits in {hardware.gibibytes} GiB, not even stage 3 with all offload, recomputation "
                f"and a micro-batch of 1; from there, {suggest_fix(smallest, hardware.gpus, planned)[0]}"
            )
        more["command"] = train_command(rest, given, chosen, hardware)
        config = chosen
    if options.max:
        depth = deepest(config, planned)
        if not depth:
            raise UserError(f"--max: not even one block of this width fits in {hardware.gibibytes} GiB; try --fit")
        config.model.n_layer = more["n_layer"] = depth
    config = with_chosen_stage(config, hardware)
    plan = planned(config) | more
    print(plan_text(plan, config, hardware, notes_on(config, hardware.gpus)))
    if not plan["fits"]:
        fix, plan["cheapest_change"], plan["enough_gpus"] = suggest_fix(config, hardware.gpus, planned)
        print(fix)
    if options.fit:
        print(f"the fastest that fits; run: {plan['command']}")
    elif plan["fits"] and not options.max and (larger := fitter.larger_micro_batch(plan, hardware)):
        print(line_on_room(plan, larger))
    if options.max:
        print(f"the deepest of this width that fits: n_layer {plan['n_layer']}")
    if options.plot:
        print(f"drawn: {options.plot}")
    if options.json:
        print(json.dumps(plan))


if __name__ == "__main__":
    run_command(main)
