"""A step of a run again: recomputed from the newest checkpoint before it, and compared bit for bit with the log. Of a
branch that is the checkpoint at which it began, where it has none of its own before the step.

    python -m minzero.replay out/tiny 120                              # a run of one rank
    deepspeed --num_gpus 8 --module minzero.replay out/1p5b 20000      # as many ranks as the run had

All steps between are computed again too. Loss and gradient norm of each that the run recorded are compared: of every
step that metrics.jsonl has (train.log_every), and of the last 128 good steps before each later checkpoint. Exit code 0:
all equal; 1: a difference, or STEP is not recorded. Writes nothing into the run.

On CPUs equal is what to expect. On GPUs only with kernels that add in a fixed order: cuDNN's and flash attention's
backward passes do not.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from pathlib import Path

import train
from minzero import checkpoint, dist, reference
from minzero.bad_steps import BadSteps
from minzero.checkpoint_folder import Saved, find, is_within
from minzero.checkpoint_state import state_if_whole
from minzero.commands import end_rank, run_command
from minzero.config.build import build
from minzero.config.nested import flat
from minzero.errors import SharedError, UserError
from minzero.files import read_json
from minzero.flags import SUPPRESS, FlagParser, a_path, at_least
from minzero.metrics import null_if_not_finite, read_metrics
from minzero.planner.stage import with_stage
from minzero.resume import check_same_data, for_data, state_at_step_0
from minzero.run import Run
from minzero.run_folder import RunFolder
from minzero.schedule import learning_rate
from minzero.watchdog import Watchdog

DIFFERENT = 1  # the exit code
NEEDED = ("model", "data", "train", "deepspeed")
SECTIONS = (*NEEDED, "lora")  # the last is younger
COMPARED = ("versions", "precision", "stage", "kernels", "compiled", "deepspeed_auto")  # what else may move a bit


def parse(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("run", type=a_path, help="a run's folder")
    parser.add_argument("step", type=at_least(1), help="the optimizer step, counted from 1")
    parser.add_argument("--local_rank", help=SUPPRESS)  # the launcher's
    return parser.parse_args(arguments)


# -- what the run recorded -------------------------------------------------------------------------


def recorded(run, before, later):
    """{step: (loss, gradient norm)} of the steps after a checkpoint; None for a NaN or an infinity, as metrics.jsonl
    has it.

    before: state of the checkpoint; later: states of those after it. Each has the numbers of the last good steps, which
    are those just before it where none was passed over since `before`."""
    found = {}
    for state in later:
        seen = state.get("bad_steps", {})
        if seen.get("skipped") == before.get("bad_steps", {}).get("skipped", 0):
            pairs = list(zip(seen["loss"], seen["gradient norm"], strict=True))
            first = state["step"] + 1 - len(pairs)
            found |= {first + place: pair for place, pair in enumerate(pairs)}
    for line in read_metrics(run):
        if "loss" in line and "grad_norm" in line:
            found[line["step"]] = line["loss"], line["grad_norm"]
    return {step: numbers for step, numbers in found.items() if step > before["step"]}


def settings_of(run, before, later):
    """What the run recorded of its settings and its machine when it computed the steps after a checkpoint: in the next
    checkpoint, or in config.json. before: state of the checkpoint; later: states of those after it. Raises
    UserError."""
    if later:
        return later[0]
    found = read_json(run / "config.json")
    if not isinstance(found, dict) or not {*NEEDED, "stage", "precision", "world_size"} <= found.keys():
        raise UserError(f"{run}/config.json: expected what a run writes there; steps after the last checkpoint need it")
    config = {name: found[name] for name in SECTIONS if name in found}
    if "data_found" in found:
        return found | {"config": config, "data": found["data_found"]}
    # a run of older code: its "data" is what was found in the folders, and does not say how they were mixed
    config["data"] = before.get("config", {}).get("data")
    if config["data"] is None and len(found["data"]) == 1:
        config["data"] = {"path": next(iter(found["data"]))}
    if config["data"] is None:
        raise UserError(f"{run}: has no checkpoint that says how its data are mixed; choose a step with one around it")
    return found | {"config": config}


def find_start(run, step):
    """(path of the newest checkpoint before a step, its state, settings then, what the run recorded after it). The
    checkpoint is the run's own, or the one that it is a branch of; the path is None for step 0. Raises UserError."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: found no config.json in it; expected the folder of a run, as out/tiny")
    states = [(entry.path, state_if_whole(entry.path)) for entry in Saved(run / "checkpoints").own]
    before = [(path, state) for path, state in states if state and state["step"] < step]
    later = [state for _, state in states if state and state["step"] >= step]
    settings = settings_of(run, before[-1][1] if before else {}, later)
    path, state = before[-1] if before else beginning(run, settings, step)
    return path, state, settings, recorded(run, state, later)


def beginning(run, settings, step):
    """(path, state) of where a run began: of another run's checkpoint, of which it is a branch, or None and the state
    of step 0. Raises UserError if that checkpoint is gone, or not before `step`."""
    # older runs have it only in their key, which another start may have changed
    source = settings.get("branch_of") or settings["config"]["train"].get("resume", "auto")
    if source in ("auto", "never"):
        return None, state_at_step_0()
    path = find(source)
    state = state_if_whole(path) if path else None
    if not state and is_within(source, run):
        raise UserError(
            f"step {step}: {run} was continued from {source}, which is deleted since; expected a step after its oldest "
            "checkpoint (train.keep_checkpoints, train.keep_every)"
        )
    if not state:
        raise UserError(
            f"train.resume: {run} began at {source}, and found no complete checkpoint there; restore it, or choose a "
            f"step after the first checkpoint of {run}"
        )
    if state["step"] >= step:
        raise UserError(
            f"step {step}: {run} is a branch of {path}, step {state['step']}; expected a later step, or the run that "
            "it is a branch of"
        )
    return path, state


def config_of(run, settings):
    """The Config with which the steps were computed, with the stage, the precision and the kernels that the run chose.
    Raises UserError."""
    config = with_stage(build(settings["config"], run), settings["stage"])
    if "document_mask" not in settings["config"]["data"]:  # of a run that is older than the key
        config.data.document_mask = False
    train_section = config.train
    train_section.out_dir, train_section.resume, train_section.profile = str(run), "auto", None
    train_section.save_every_seconds = 0.0
    train_section.precision = settings["precision"]
    train_section.kernels = settings.get("kernels", train_section.kernels)
    return config


# -- computing it again ----------------------------------------------------------------------------


def prepare(run_path, path, state, settings, group):
    """A Run with its engine at a checkpoint, and its training data, as train.py's main makes them. Writes nothing.
    Raises UserError."""
    memory = train.machine_of_all(group).memory_bytes
    with dist.all_or_none():
        config = config_of(run_path, settings)
        if settings["world_size"] != group.world_size:
            raise UserError(
                f"found {group.world_size} ranks, but {run_path} computed these steps on {settings['world_size']}: "
                f"deepspeed --num_gpus {settings['world_size']} --module minzero.replay ..."
            )
        data, _ = train.open_data(config)
        check_same_data(settings["data"], data, path or run_path)
        state = for_data(state, data, config.data.path) if path else state
        setup = train.choose_setup(config, group, settings["precision"], memory)
        start = train.Start(path, state)
        if config.train.init_from and not path and not config.lora.rank:
            start = train.Start(path, state, *train.trained.open_weights(config.train.init_from, config.model))
    with dist.all_or_none():  # begins with what rank 0 has found
        recorded = state | {"base": settings["base"]} if settings.get("base") else state
        start = train.with_base(config, start._replace(state=recorded), settings["precision"])._replace(state=state)
    if path and (fault := checkpoint.fault_of(path, state)):
        raise SharedError(fault)
    watchdog = Watchdog(config.train)  # never started: only its heartbeats are asked for
    run = Run(config, group, RunFolder(run_path, group.rank), watchdog, setup, state)
    run.engine, not_compiled = train.make_engine(config, group, setup, start)
    if path:
        checkpoint.load(run.engine, path, state, config.train.seed)
    if data.has_pairs:
        reference.attach(checkpoint.as_rank_0(lambda: reference.read([run_path], settings["reference"])), data.streams)
    run.bad_steps = BadSteps(run.engine, config.train.spike_zscore, state.get("bad_steps"))
    now = train.info_of(config, group, setup, data, compiled=not_compiled is None)
    now, then = ({key: of[key] for key in COMPARED if key in of and key in settings} for of in (now, settings))
    for line in dist.differences(flat(now), flat(then)):
        dist.print0(f"warning: {line}: differences may come from that")
    return run, data


def recompute(run, data, last):
    """Compute the steps up to `last` again. Yields (step, loss, gradient norm, fault). Raises UserError."""
    for step in range(run.steps_done + 1, last + 1):
        train.set_learning_rate(run.engine, learning_rate(run.config.train, run.tokens_at(step)))
        run.clock.start_step()
        result = train.train_step(run, run.engine, data, step)
        run.clock.pause()
        yield step, result.facts.loss, result.grad_norm, result.fault
        if result.fault and run.config.train.bad_step == "rollback" and step < last:
            raise SharedError(
                f"step {step}: {result.fault}; the run then went back to a checkpoint (train.bad_step rollback), so "
                "later steps cannot be computed from this one; choose a step up to this one"
            )


def difference(step, numbers, then):
    """Where the numbers of a step are not the recorded ones, in one line, or None. Both: (loss, gradient norm)."""
    found = []
    for name, now, was in zip(("loss", "gradient norm"), numbers, then, strict=True):
        if null_if_not_finite(now) != null_if_not_finite(was):
            found.append(f"{name} {now!r}, recorded {was!r}")
    return f"step {step}: {'; '.join(found)}" if found else None


def main(arguments):
    """Compute and compare. Returns the exit code. Raises UserError."""
    args = parse(arguments)
    run_path, step = Path(args.run), args.step
    group = dist.start_process_group(may_be_alone=True)
    path, state, settings, then = checkpoint.as_rank_0(lambda: find_start(run_path, step))
    run, data = prepare(run_path, path, state, settings, group)
    if step > run.total_steps:
        raise SharedError(f"step {step}: the run has {run.total_steps} steps; choose one of them")
    dist.print0(f"steps {run.steps_done + 1} to {step} of {run_path}, from {path or 'the beginning'}")
    compared, different = 0, []
    for number, *numbers, fault in recompute(run, data, step):
        if fault and number == step:
            dist.print0(f"step {step}: {fault}")
        if number in then:
            compared += 1
            different += filter(None, [difference(number, numbers, then[number])])
    for line in different[:10]:
        dist.print0(f"different: {line}")
    dist.print0(f"step {step}: loss {numbers[0]!r}, gradient norm {numbers[1]!r}")
    is_known = step in then
    if not is_known:
        near = [number for number in sorted(then) if number > step][:1] + [number for number in then if number < step]
        dist.print0(f"step {step} was not recorded; recorded are {', '.join(map(str, near[:4])) or 'none after this'}")
    elif not different:
        dist.print0(f"equal bit for bit: {compared} recorded of {step - run.steps_done} steps")
    return 0 if is_known and not different else DIFFERENT


def command(arguments):
    with dist.ending_together():
        code = main(arguments)
        dist.stop_process_group()
    if code:
        end_rank(code)
        raise SystemExit(code)


if __name__ == "__main__":
    run_command(command, may_be_many=True)
