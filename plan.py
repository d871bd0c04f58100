"""Will it fit, how fast, what does it cost: a plan of a run before anything is rented.

With --gpus N: the plan of this configuration on N GPUs. --gpu names the card, which brings its memory, speeds, usual
node, and price if one is known. If the configuration does not fit, the cheapest change that does is named. If train.py
would refuse the batch, the nearest that it takes is planned. --fit finds the fastest setting that fits, --max the
deepest model, and --plot draws memory, time and cost of every stage, offload and recomputation.

Without --gpus, or with --budget or --days: what to rent. Of all cards and numbers of GPUs (or those of --gpu and
--gpus) the cheapest, the fastest and a middle are named, each with its command.

Memory is replayed allocation by allocation; speed is computed from stated rates. Nothing is allocated, and no GPU is
needed. More: docs/planner.md
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import copy
import dataclasses
import json
import sys

from minzero.cards import card_named
from minzero.commands import run_command
from minzero.config.load import load_config
from minzero.errors import UserError
from minzero.files import check_can_write
from minzero.flags import FlagParser, a_number, a_path, at_least
from minzero.init_from import model_defaults
from minzero.planner.batches import changed_batch, legal_batch, refused_batch
from minzero.planner.fitting import Fitter
from minzero.planner.gpus import DEFAULT_GPU, MOST_GPUS, nodes_of, on_card, rented
from minzero.planner.measured import measured_code
from minzero.planner.offers import all_offers, answers, as_rows, lines_on_room, page
from minzero.planner.picture import draw
from minzero.planner.report import notes_on, plan_text, suggest_fix, train_command
from minzero.planner.search import deepest, with_choice
from minzero.planner.speed import Assumptions
from minzero.planner.stage import with_chosen_stage

USAGE = "plan.py CONFIG [--gpus N] [--gpu NAME] [--section.key value ...]"
EXAMPLES = """the configuration:
  CONFIG                a file of configs/, or another one that train.py takes
  --section.key VALUE   any of its keys in place of the file's value, as train.py takes them
                        (python train.py --help lists them): --train.micro_batch_size 8,
                        --model.n_layer 24, --deepspeed.zero_optimization.stage 3

examples:
  python plan.py configs/1p5b.json --gpus 8                      does it fit, how fast, at what cost
  python plan.py configs/1p5b.json --gpus 1 --gpu 4090 --fit     the fastest setting that fits
  python plan.py configs/13b.json --budget 100000                what to rent for this money
  python plan.py configs/13b.json --gpus 64 --gpu a100 --plot memory.png
  python plan.py configs/175b.json --gpus 128 --train.activation_checkpointing selective
"""
RATES = {  # the fields of Assumptions
    "utilisation": "share of the peak that is reached; default: modelled",
    "link": "bytes/s between the GPUs of a node; default: the card's",
    "network": "bytes/s of a GPU to other nodes; default: the card's",
    "pcie": "bytes/s from a GPU to CPU memory; default: the card's",
    "cpu": "bytes/s of Adam on a node's CPU; default: %(default)g",
    "disk": "bytes/s of a node's checkpoints; default: %(default)g",
    "nvme": "bytes/s of a node's drives in offload; default: %(default)g",
}


def all_flags():
    """The parser of plan.py's own flags."""
    parser = FlagParser(__doc__, USAGE, EXAMPLES)
    add = parser.add_argument_group("hardware").add_argument
    number = at_least(1, MOST_GPUS)
    add("--gpus", metavar="N", type=number, help="number of GPUs in all; without it: what to rent")
    add("--gpu", metavar="NAME", help=f"their card: h100, a100-40, 4090, ...; default: {DEFAULT_GPU}")
    memory = "memory of a GPU; default: the card's"
    add("--gpu_memory", metavar="GB", type=a_number(0, 1e6, above=True), help=memory)
    memory = "RAM of a node; default: that of the card's usual node"
    add("--cpu_memory", metavar="GiB", type=a_number(0, 1e9, above=True), help=memory)
    add("--nodes", metavar="N", type=number, help="over how many nodes; default: as few as usual")
    add("--price", metavar="DOLLARS", type=a_number(0, 1e6), help="per GPU hour; default: the card's, if known")
    add = parser.add_argument_group("questions").add_argument
    add("--fit", action="store_true", help="find the fastest setting that fits")
    add("--max", action="store_true", help="find the most layers that fit, all else as given")
    money = "the most that a run may cost: what to rent for it"
    add("--budget", metavar="DOLLARS", type=a_number(0, 1e12, above=True), help=money)
    days = "the longest that a run may take: what to rent for it"
    add("--days", metavar="DAYS", type=a_number(0, 1e6, above=True), help=days)
    add = parser.add_argument_group("output").add_argument
    add("--plot", metavar="PICTURE.png", type=a_path, help="draw memory, time and cost of each setting")
    add("--json", action="store_true", help="print the plan as JSON too, in the last line")
    add = parser.add_argument_group("rates").add_argument
    measured = "a run's folder or benchmark's JSON, to scale by"
    add("--measured", metavar="RUN", type=a_path, help=measured)
    for assumed in dataclasses.fields(Assumptions):
        share = assumed.name == "utilisation"
        values, metavar = (a_number(0, 1, above=True), "SHARE") if share else (a_number(1, 1e15), "RATE")
        meaning = RATES.get(assumed.name)
        add(f"--{assumed.name}", metavar=metavar, type=values, default=assumed.default, help=meaning)
    return parser


def read_options(arguments):
    """plan.py's own flags, and the rest: the config file and its overrides. Raises UserError."""
    options, rest = all_flags().parse_known_args(arguments)
    fields = dataclasses.fields(Assumptions)
    options.rates = [field.name for field in fields if getattr(options, field.name) != field.default]
    options.assumptions = Assumptions(**{field.name: getattr(options, field.name) for field in fields})
    options.code = None
    if options.measured:
        options.code, card = measured_code(options.measured, options.assumptions)
        options.gpu = options.gpu or card.names[0]
    elif options.gpu and card_named(options.gpu).is_cpu:
        raise UserError(f"--gpu: found {options.gpu}, of which no speed is known; expected --measured RUN beside it")
    options.compares = options.gpus is None or options.budget is not None or options.days is not None
    for flag in ("max", "plot", *(() if options.gpus else ("nodes",))):
        if options.compares and getattr(options, flag):
            raise UserError(
                f"--{flag}: found with a search for what to rent; expected --gpus N without --budget and --days"
            )
    return options, rest


def what_to_rent(options, arguments, config):
    """Print the answers over cards and numbers of GPUs."""
    if not options.gpu:
        print("comparing all cards; a large model takes about a minute", file=sys.stderr)
    offers = all_offers(Fitter(config, options.assumptions, options.code), options)
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
    fitter = Fitter(config, options.assumptions, options.code)

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
            lines, _, _ = suggest_fix(smallest, hardware.gpus, planned)
            raise UserError(
                f"--fit: nothing fits in {hardware.gibibytes} GiB, not even stage 3 with all offload, recomputation "
                f"and a micro-batch of 1; from there, {'; '.join(map(str.strip, lines))}"
            )
        config = chosen
    if options.max:
        config = copy.deepcopy(config)
        depth = deepest(config, planned)
        if not depth:
            raise UserError(f"--max: not even one block of this width fits in {hardware.gibibytes} GiB; try --fit")
        config.model.n_layer = more["n_layer"] = depth
    if options.fit:
        more["command"] = train_command(rest, given, config, hardware)
    config = with_chosen_stage(config, hardware)
    plan = planned(config) | more
    print(plan_text(plan, config, hardware, notes_on(config)))
    if not plan["fits"]:
        lines, plan["cheapest_change"], plan["enough_gpus"] = suggest_fix(config, hardware.gpus, planned)
        print("\n".join(["", *lines]))
    if options.fit:
        print(f"\nthe fastest that fits; run:\n  {plan['command']}")
    elif plan["fits"] and not options.max:
        lines = list(lines_on_room(plan, config, fitter, hardware))
        if lines:
            print("\n".join(["", "faster on the same GPUs:", *(f"  {line}" for line in lines)]))
    if options.max:
        print(f"\nthe most layers that fit, all else as given: --model.n_layer {plan['n_layer']}")
    if options.plot:
        print(f"drawn: {options.plot}")
    if options.json:
        print(json.dumps(plan))


if __name__ == "__main__":
    run_command(main)
