"""Small runs that tell what a large one will do: scaling laws, and the learning-rate range test.

With --flops: models of several sizes at each budget, trained one after the other, or listed by --print. Their losses
are fitted, and --predict says the size, tokens, batch, rate and loss of the best run at a larger budget, and writes its
config. The same command continues a sweep that was killed; larger budgets can be added. `sweep.py FOLDER` continues a
sweep with the config and options that it has, and `sweep.py FOLDER --fit` only fits what is there.

With --lr_range: one short run whose learning rate rises from a thousandth of --highest to it, the loss over the rate as
a picture, and a peak rate. More: docs/scaling.md
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import dataclasses
import json
import signal
import sys
from pathlib import Path

from minzero.commands import run_command
from minzero.config.build import build
from minzero.config.deepspeed import gradient_accumulation
from minzero.config.hints import rename_old_keys
from minzero.config.load import command_line_values, load_config
from minzero.config.nested import merge
from minzero.config.values import as_flag
from minzero.errors import UserError
from minzero.files import check_can_write, make_folder, read_json, write_json
from minzero.flags import FlagParser, a_number, a_path, at_least
from minzero.init_from import model_defaults
from minzero.scaling.plan import SCHEDULES, SET_BY_SWEEP, Options
from minzero.scaling.shapes import COUNTS

USAGE = "sweep.py CONFIG|FOLDER [--flops C ...] [--predict C ...] [--lr_range] [--section.key value ...]"
EXAMPLES = """the configuration:
  CONFIG                a file of configs/: its shape is that of all sizes, its rate and batch hold at its own size
  --section.key VALUE   any of its keys in place of the file's value, as train.py takes them

examples:
  python sweep.py configs/scaling-tiny.json --flops 1e12 3e12 1e13 --predict 4e13
  python sweep.py out/sweep-scaling-tiny --fit --count flops     fit again, with another count of N
  python sweep.py configs/gpt2-124m.json --flops 1e17 3e17 1e18 --ranks 8 --print > jobs
  python sweep.py configs/tiny.json --lr_range
"""
DEFAULTS = Options()
SIZES = 5


def all_flags():
    """The parser of sweep.py's own flags."""
    parser = FlagParser(__doc__, USAGE, EXAMPLES)
    parser.add_argument("--out", metavar="FOLDER", type=a_path, help="default: out/sweep-CONFIG or out/lr_range-CONFIG")
    parser.add_argument("--json", action="store_true", help="print the result as JSON too, in the last line")
    ranks = "processes of each run, by deepspeed's launcher if several; default 1"
    parser.add_argument("--ranks", metavar="N", type=at_least(1, 10**6), help=ranks)
    add = parser.add_argument_group("scaling laws").add_argument
    flops = a_number(1, 1e40)
    add("--flops", metavar="C", type=flops, nargs="+", help="budgets: model FLOPs of a run")
    add("--sizes", metavar="N", type=at_least(3, 100), help=f"sizes at each budget; default {SIZES}")
    add("--predict", metavar="C", type=flops, nargs="+", help="the best run at these budgets, and its config")
    add("--print", action="store_true", dest="only_print", help="print the runs, one line a size, and start none")
    add("--fit", action="store_true", help="start no run; fit those that are there")
    spacing = f"of the sizes, as a factor of N; default {DEFAULTS.spacing:g}"
    add("--spacing", metavar="X", type=a_number(1.05, 100), help=spacing)
    ratio = f"where the middle of a budget's sizes is; default {DEFAULTS.tokens_per_parameter:g}"
    add("--tokens_per_parameter", metavar="X", type=a_number(0, 1e6, above=True), help=ratio)
    add("--count", choices=COUNTS, help="how N is counted: all parameters (default), blocks', or FLOPs per token / 6")
    lr = "rate = config's x (its width / width)^X; default 1, or 0 with train.mup_base_width"
    add("--lr_exponent", metavar="X", type=a_number(0, 4), help=lr)
    batch = f"batch = config's x (N / its N)^X; default {DEFAULTS.batch_exponent:g}"
    add("--batch_exponent", metavar="X", type=a_number(0, 2), help=batch)
    add("--schedule", choices=SCHEDULES, help="wsd (default), constant: budgets share a trunk; cosine, linear: none")
    warmup = f"tokens for each parameter, at most a fifth of a size's shortest run; default {DEFAULTS.warmup:g}"
    add("--warmup", metavar="X", type=a_number(0, 1000), help=warmup)
    decay = f"of each run, with wsd; default {DEFAULTS.decay:g}"
    add("--decay", metavar="SHARE", type=a_number(0, 0.9, above=True), help=decay)
    add("--draws", metavar="N", type=at_least(20, 10**6), default=500, help="of the bootstrap; default 500")
    add = parser.add_argument_group("learning rate").add_argument
    add("--lr_range", action="store_true", help="the range test")
    add("--highest", metavar="RATE", type=a_number(0, 10, above=True), help="the last rate; default: 30 x train.lr")
    add("--steps", metavar="N", type=at_least(50, 10**9), help="of the test; default 200")
    return parser


OF_A_RANGE = ("highest", "steps")
OF_A_SWEEP = ("flops", "sizes", "predict", "only_print", "fit", "count", "schedule", "spacing", "tokens_per_parameter")
OF_A_SWEEP += ("lr_exponent", "batch_exponent", "warmup", "decay")


def read_options(arguments):
    """sweep.py's own flags, and the rest: the config file or folder, and its overrides. Raises UserError."""
    options, rest = all_flags().parse_known_args(arguments)
    wrong = OF_A_SWEEP if options.lr_range else OF_A_RANGE
    for name in wrong:
        value = getattr(options, name)
        if value is not None and value is not False:  # zero is a value
            flag = "print" if name == "only_print" else name
            raise UserError(
                f"--{flag}: found {'with' if options.lr_range else 'without'} --lr_range; leave one of them out"
            )
    return options, rest


def content_of(rest, replaced):
    """(the sections of the config that the command line names, as nested dictionaries; the Config; the file's stem).
    replaced: {key of the train section: what sets it here}. A config file may have such keys for its own run. Raises
    UserError for one on the command line, which would not be obeyed."""
    config = load_config(rest, model_defaults)
    overrides, files = command_line_values(rest)
    if not files:
        raise UserError(f"CONFIG: none given; expected: {USAGE}")
    for name, value in overrides.get("train", {}).items():
        if name in replaced:
            raise UserError(f"--train.{name}: found {as_flag(value)}, which {replaced[name]}; leave it out")
    content, _ = rename_old_keys(read_json(files[0]), files[0])
    return merge(content, overrides), config, Path(files[0]).stem


def main(arguments):
    options, rest = read_options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its run is ended with it
    if options.lr_range:
        range_test(options, rest)
    else:
        scaling(options, rest)


# ---- scaling laws


def given_options(options, before):
    """The Options of the command line, those of an earlier start where it names none."""
    values = dataclasses.asdict(DEFAULTS) | before
    given = {name: getattr(options, name) for name in values if getattr(options, name, None) is not None}
    return Options(**values | given)


def opened(options, rest):
    """(the Sweep of the command line, how many sizes it has at each budget, how the fit counts N). Writes nothing.
    Raises UserError."""
    from minzero.scaling.runs import open_sweep, read_record

    folder = next(
        (Path(word) for word in rest if not word.startswith("--") and Path(word, "sweep.json").is_file()), None
    )
    if folder:
        if len(rest) > 1 or options.out:
            raise UserError(
                f"{folder}: found with a config's keys or --out; a sweep keeps the config that it began with"
            )
        before = read_record(folder)
        content, flops = before["config"], before["flops"]
        sizes = options.sizes or before["sizes"]
    else:
        content, config, stem = content_of(rest, SET_BY_SWEEP)
        if not options.flops:
            raise UserError(
                "--flops: none given; expected the budgets, as --flops 1e17 3e17 1e18, or the folder of a sweep"
            )
        folder, flops, sizes = options.out or Path(f"out/sweep-{stem}"), [], options.sizes or SIZES
        check_can_write("--out", folder, folder=True)
        gradient_accumulation(config, options.ranks or 1)  # refuses a batch that does not divide
    has_begun = (folder / "sweep.json").exists()
    before = read_record(folder) or {"options": {}, "flops": []}
    if options.fit and (new := [budget for budget in options.flops or [] if budget not in before["flops"]]):
        raise UserError(f"--flops: found {new[0]:g} with --fit, which starts no run; leave one of them out")
    if options.only_print and (options.fit or options.predict):
        raise UserError("--print: found with --fit or --predict; it lists the runs alone: leave one of them out")
    if options.only_print and options.json:
        raise UserError("--json: found with --print, whose lines are commands; leave one of them out")
    chosen = given_options(options, before["options"])
    if chosen.schedule != "wsd":
        if options.decay is not None:
            raise UserError("--decay: found with another --schedule than wsd, which alone decays so; leave it out")
        if "decay_shape" in command_line_values(rest)[0].get("train", {}):
            raise UserError(
                f"--train.decay_shape: found with --schedule {chosen.schedule}; wsd alone decays so; leave it out"
            )
    how = chosen.count
    if has_begun and options.fit:
        chosen.count = before["options"]["count"]  # the fit alone may count in another way
    return open_sweep(folder, content, chosen, [*flops, *(options.flops or [])], sizes), sizes, how


def scaling(options, rest):
    from minzero.scaling.answer import all_predictions, as_json, fit, fits_text, prediction_text, write_prediction
    from minzero.scaling.fits import optimizer
    from minzero.scaling.picture import draw
    from minzero.scaling.runs import Runs, held, write_record

    sweep, sizes, how = opened(options, rest)
    folder = sweep.folder
    if options.only_print:
        write_record(sweep, sizes)
        Runs(sweep, None).write_configs()
        print("\n".join(sweep.command_lines()))
        return
    optimizer()  # refuses before the runs where scipy is missing
    failures = {}
    if options.fit:
        points = Runs(sweep, None).write_points()
    else:
        with held(folder) as lock:
            write_record(sweep, sizes)
            runs = Runs(sweep, lock)
            runs.run()
            points, failures = runs.write_points(), runs.failures
    fits = fit(points, how, options.draws)
    print("\n".join(fits_text(sweep, fits)), flush=True)  # before a prediction may be refused
    for flops in options.predict or []:
        write_prediction(sweep, fits, flops)
    predictions = all_predictions(sweep)
    picture = folder / "scaling.png"
    draw(fits, predictions, picture)
    result = as_json(fits, predictions)
    write_json(folder / "fits.json", result)
    lines = [line for prediction in predictions for line in ["", *prediction_text(prediction)]]
    print("\n".join([*lines, "", f"drawn: {picture}"]))
    if options.json:
        print(json.dumps(result))
    if failures:
        names = ", ".join(f"{size} {run}" for size, run in failures)
        print(f"sweep.py: {len(failures)} runs failed: {names}; the same command tries them again", file=sys.stderr)
        raise SystemExit(1)


# ---- the range test


def range_test(options, rest):
    from minzero.scaling.range_test import SET_BY_TEST, draw, read_curve, suggest, train_keys
    from minzero.scaling.runs import RunFailed, held, run_job, say

    content, config, stem = content_of(rest, SET_BY_TEST)
    folder = options.out or Path(f"out/lr_range-{stem}")
    highest = min(10.0, 30 * config.train.lr) if options.highest is None else options.highest
    steps = options.steps or 200
    content = merge(content, {"train": train_keys(config, folder / "run", highest, steps)})
    path = folder / "config.json"
    if path.exists() and read_json(path) != content:
        raise UserError(f"{path}: found a range test with other settings; choose another --out, or remove {folder}")
    try:
        test = build(content, "its config", config.model)
    except UserError as error:  # of rates that the config alone would not have
        raise UserError(f"--highest: found {highest:g}: {error}; lower it") from None
    gradient_accumulation(test, options.ranks or 1)
    make_folder("--out", folder)
    write_json(path, content)
    with held(folder) as lock:
        log = folder / "run.log"
        say(f"{steps} steps, the rate from {highest / 1000:.3g} to {highest:.3g}; its output: {log}")
        try:
            run_job(["train.py", str(path)], options.ranks or 1, log, lock)
        except RunFailed as failure:  # as where the loss is no number at the end
            if not (folder / "run" / "metrics.jsonl").exists():
                raise UserError(f"{folder / 'run'}: {failure.args[0]}") from None
            say(f"the run ended early: {failure.args[0]}")
    found = suggest(*read_curve(folder / "run"))
    picture = folder / "lr_range.png"
    draw(found, picture)
    print(f"falls fastest at {found.steepest:.3g}, is lowest at {found.lowest:.3g}")
    muon = ""
    if config.train.optimizer == "muon":  # both rates rose together
        muon = f" --train.muon_lr {test.train.muon_lr * found.suggested / highest:.2g}"
    print(f"suggested peak rate: --train.lr {found.suggested:g}{muon} ({found.why})")
    print(f"drawn: {picture}")
    if options.json:
        values = {
            "suggested": found.suggested,
            "steepest": found.steepest,
            "lowest": found.lowest,
            "rises": found.rises,
        }
        print(json.dumps(values | {"picture": str(picture)}))


if __name__ == "__main__":
    run_command(main)
