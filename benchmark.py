"""What a setting costs, measured: DDP, ZeRO's stages, offload and recomputation, each as a short run of train.py.

    python benchmark.py configs/1p7b.json [--gpus N] [--steps 10] [--warmup 3] [--rows ddp zero3 ...] [--out FOLDER]
                        [--json] [--section.key value ...]

Every row is a process group of its own, under DeepSpeed's launcher where there are several ranks, and ended as soon
as its steps are in metrics.jsonl: nothing is evaluated or saved, and the runs live in a temporary folder. A row that
fails shows why, and the others continue. Writes FOLDER/<config>.md, .json and .png (default out/benchmark) after each
row.
Without a GPU the ranks are CPU processes.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import json
import shlex
import signal
import sys
from datetime import date
from pathlib import Path

from minzero.benchmark import ROWS, SET_BY_ROWS, markdown, measure_rows, this_device
from minzero.commands import run_command
from minzero.config.deepspeed import gradient_accumulation
from minzero.config.load import load_config
from minzero.errors import UserError
from minzero.files import make_folder
from minzero.flags import FlagParser, a_path, at_least
from minzero.init_from import model_defaults
from minzero.sizes import check_counted


def read_options(arguments):
    """benchmark.py's own flags, and the rest: the config file and its overrides. Raises UserError."""
    parser = FlagParser(
        __doc__, "benchmark.py CONFIG [--gpus N] [--steps N] [--rows NAME ...] [--section.key value ...]"
    )
    parser.add_argument("--gpus", type=at_least(1))
    parser.add_argument("--steps", type=at_least(1), default=10)
    parser.add_argument("--warmup", type=at_least(0), default=3)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=a_path, default=Path("out/benchmark"))
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if unknown := [row for row in options.rows if row not in ROWS]:
        raise UserError(f"--rows: found {unknown[0]}, expected some of: {' '.join(ROWS)}")
    for argument in rest:
        name = argument.removeprefix("--").partition("=")[0]
        if any(name == key or name.startswith(key + ".") for key in SET_BY_ROWS):
            raise UserError(f"--{name}: every row sets this itself; choose the rows instead: --rows {' '.join(ROWS)}")
    return options, rest


def main(arguments):
    options, rest = read_options(arguments)
    config = load_config(rest, model_defaults)
    check_counted(config.model)
    device, gpus_found = this_device()
    gpus = options.gpus or gpus_found or 2
    if gpus_found and gpus > gpus_found:
        raise UserError(f"--gpus: found {gpus}, but this machine has {gpus_found}")
    gradient_accumulation(config, gpus)  # refuses a batch that does not divide
    make_folder("--out", options.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs are ended with this

    conditions = {
        "config": next((argument for argument in rest if argument.endswith(".json")), "configs/1p5b.json"),
        "gpus": gpus,
        "gpus_found": gpus_found,
        "device": device,
        "steps": options.steps,
        "warmup": options.warmup,
        "date": date.today().isoformat(),
        "command": f"python benchmark.py {shlex.join(arguments)}",
    }
    results = []
    interrupted = False
    try:
        measure_rows(config, options.rows, conditions, options.out, results)
    except KeyboardInterrupt:
        interrupted = True
    if results:
        print(markdown(results, conditions))
        print(f"written: {options.out / Path(conditions['config']).stem}.md, .json, .png")
    if options.json and results:
        print(json.dumps({"conditions": conditions, "rows": results}))
    if interrupted:
        print(f"interrupted: {len(results)} of {len(options.rows)} rows measured", file=sys.stderr)
        raise SystemExit(130)
    if all(result["failed"] for result in results):
        raise UserError(f"{conditions['config']}: no row ran; the first: {results[0]['failed']}")


if __name__ == "__main__":
    run_command(main)
