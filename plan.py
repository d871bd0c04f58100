"""Will it fit, how fast, what does it cost: a plan of a run before anything is rented.

    python plan.py configs/1p5b.json --gpus 8 [--gpu h100] [--gpu_memory GB] [--cpu_memory GiB] [--nodes 1]
                   [--price 2.5] [--section.key value ...] [--fit | --max] [--plot PICTURE.png] [--json]

--gpu names the card (h100, a100-40, 4090, ...; docs/planner.md lists them), and with it memory, speeds, the usual node
and a price where one is known; --gpu_memory, --cpu_memory (RAM of one node) and --price override those.

--fit finds the fastest setting that fits, --max the deepest model; --plot draws the memory of every candidate. Where
nothing fits, the cheapest change that would is named. Memory is replayed allocation by allocation (minzero/planner),
speed is arithmetic on stated assumptions. Nothing is allocated, and no GPU is looked for.
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
from minzero.planner.gpus import MOST_GPUS, rented
from minzero.planner.plan import plan_run
from minzero.planner.report import draw, notes_on, plan_text, suggest_fix, train_command
from minzero.planner.search import deepest, fastest, with_choice
from minzero.planner.speed import Assumptions
from minzero.planner.stage import with_chosen_stage


def read_options(arguments):
    """plan.py's own flags, and the rest: the config file and its overrides. Raises UserError."""
    parser = FlagParser(__doc__, "plan.py CONFIG --gpus N [--gpu NAME] [--section.key value ...]")
    parser.add_argument("--gpus", type=at_least(1, MOST_GPUS), required=True)
    parser.add_argument("--gpu")
    parser.add_argument("--gpu_memory", type=a_number(0, 1e6, above=True))
    parser.add_argument("--cpu_memory", type=a_number(0, 1e9, above=True))
    parser.add_argument("--nodes", type=at_least(1, MOST_GPUS))
    parser.add_argument("--price", type=a_number(0, 1e6))
    parser.add_argument("--plot", type=a_path)
    for flag in ("--fit", "--max", "--json"):
        parser.add_argument(flag, action="store_true")
    for assumed in dataclasses.fields(Assumptions):
        values = a_number(0, 1, above=True) if assumed.name == "utilisation" else a_number(1, 1e15)
        parser.add_argument(f"--{assumed.name}", type=values, default=assumed.default)
    options, rest = parser.parse_known_args(arguments)
    options.hardware = rented(options)
    options.assumptions = Assumptions(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Assumptions)})
    return options, rest


def main(arguments):
    options, rest = read_options(arguments)
    config = load_config(rest, model_defaults)
    hardware = options.hardware

    def planned(config, gpus=hardware.gpus):
        nodes = -(-gpus * hardware.nodes // hardware.gpus)
        those = dataclasses.replace(hardware, gpus=gpus, nodes=nodes)
        return plan_run(with_chosen_stage(config, those), those, options.assumptions)

    more = {}  # answers beside the plan
    if options.plot:
        check_can_write("--plot", options.plot)
        try:
            draw(config, planned, hardware, options.plot)
        except (OSError, ValueError) as error:  # a folder that is not there, an unknown format
            raise UserError(f"--plot: {options.plot}: {error}; expected a PICTURE.png that can be written") from None
        more["picture"] = str(options.plot)
    if options.fit:
        found, chosen = fastest(config, hardware.gpus, planned)
        if found is None:
            smallest = with_choice(config, 3, "param", True, 1)
            raise UserError(
                f"--fit: nothing fits in {hardware.gibibytes} GiB, not even stage 3 with all offload, recomputation "
                f"and a micro-batch of 1; from there, {suggest_fix(smallest, hardware.gpus, planned)[0]}"
            )
        more["command"] = train_command(rest, config, chosen, hardware)
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
    if options.max:
        print(f"the deepest of this width that fits: n_layer {plan['n_layer']}")
    if options.plot:
        print(f"drawn: {options.plot}")
    if options.json:
        print(json.dumps(plan))


if __name__ == "__main__":
    run_command(main)
