"""Started by test_bad_steps.py under the launcher on two ranks: runs in which a number goes wrong on purpose.

bad_steps.py DATA FOLDER
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from deepspeed import comm

import train
from minzero import dist
from minzero.data.mixture import Mixture
from minzero.errors import UserError
from minzero.zero import fragments_in_memory, local_fragments
from tests.helpers.ranks import run_ranks
from tests.launch import parity
from tests.launch.parity_settings import SPOILT

FOLDER = Path(sys.argv[-2])
BUILD, BATCH = train.build_engine, Mixture.batch


def config_of(name, stage, steps, **settings):
    settings = {"eval_every": 0, "save_best": False, **settings}
    return parity.config_of(name, stage, steps=steps, train=settings)


def is_last_rank():
    return comm.get_rank() == comm.get_world_size() - 1


def poison_gradient(bad_steps, accumulation):
    """One NaN in the gradient of one activation, on the last rank alone, in the last micro-batch of those steps."""

    def build_engine(*arguments):
        engine, calls = BUILD(*arguments), []

        def poison(gradient):
            gradient = gradient.clone()
            gradient[0, 0, 0] = math.nan
            return gradient

        def count(module, inputs, output):
            if module.training:
                calls.append(None)
                if is_last_rank() and len(calls) % accumulation == 0 and len(calls) // accumulation in bad_steps:
                    stream, _ = output
                    stream.register_hook(poison)

        engine.module.blocks[0].register_forward_hook(count)
        return engine

    train.build_engine = build_engine


def infinite_loss(bad_step, accumulation):
    """A loss of infinity with a good gradient, on the last rank alone."""

    def build_engine(*arguments):
        engine, calls = BUILD(*arguments), []

        def add(module, inputs, loss):
            calls.append(None)
            return loss + (math.inf if is_last_rank() and len(calls) == bad_step * accumulation else 0)

        engine.module.register_forward_hook(add)
        return engine

    train.build_engine = build_engine


def wrap_step(action):
    """action(engine, whether it is already made) before and after each optimizer step."""

    make = train.build_engine

    def build_engine(*arguments):
        engine = make(*arguments)
        step = engine.step

        def wrapped():
            before = engine.global_steps
            action(engine, False)
            step()
            if engine.global_steps > before:
                action(engine, True)

        engine.step = wrapped
        return engine

    train.build_engine = build_engine


def spoil_weights(kind, at_step):
    """An update that leaves a NaN or infinity in the weights or a moment: on rank 1 alone where ranks have parts."""

    def spoil(engine, made):
        if made and engine.global_steps == at_step and (comm.get_rank() or not engine.zero_optimization_stage()):
            for _, parts, _ in fragments_in_memory(engine, local_fragments(engine), changed=True):
                parts[kind][-1] = math.inf if kind == "exp_avg_sq" else math.nan

    wrap_step(spoil)


def damage(name, step, before_step):
    """Flip a bit of a checkpoint's second file right before another step."""
    file, done = FOLDER / name / "checkpoints" / f"step_{step:08d}" / "rank_00001.safetensors", []

    def spoil(engine, made):
        if not made and engine.global_steps == before_step - 1 and comm.get_rank() == 0 and not done:
            content = bytearray(file.read_bytes())
            content[-1000] ^= 0x40
            file.write_bytes(content)
            done.append(None)

    wrap_step(spoil)


def spike(first_sample, last_sample, mixture):
    """Tokens that follow no rule, in the place of those samples."""
    spoilt = set(mixture.windows_of(np.arange(first_sample, last_sample + 1)).tolist())

    def batch(self, windows):
        inputs, targets = BATCH(self, windows)
        for row in [row for row, window in enumerate(windows) if int(window) in spoilt]:
            targets[row] = np.random.default_rng(row).integers(0, 64, targets.shape[1])
        return inputs, targets

    Mixture.batch = batch


def rolled_back_from_step_5():
    """A run of 10 steps whose step 7 is bad, and the same from its checkpoint of step 5: by a branch, which has saved
    nothing yet, and in a copy of its folder, where step 10 is of a continuation that is given up."""
    settings = {"save_every": 5, "keep_checkpoints": 9, "bad_step": "rollback"}
    poison_gradient({7}, accumulation=2)
    train.main(config_of("rolled_back", 3, 10, **settings))
    parity.copy_until("rolled_back", 10, "rolled_back_again")
    for name, origin in (("branch", "rolled_back"), ("again", "rolled_back_again")):
        poison_gradient({2}, accumulation=2)  # the second of this start
        start = str(FOLDER / origin / "checkpoints/step_00000005")
        train.main(config_of(f"rolled_back_{name}", 3, 10, resume=start, **settings))


def refused(config):
    try:
        train.main(config)
    except UserError as error:
        return str(error)
    raise AssertionError("the run should have been stopped")


def main():
    dist.start_process_group()
    said = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            poison_gradient({5}, accumulation=2)
            name = f"nan_{precision}_stage{stage}"
            train.main(config_of(name, stage, 7, save_every=1, precision=precision))
    for stage in (0, 3):
        infinite_loss(5, accumulation=2)
        train.main(config_of(f"inf_stage{stage}", stage, 7, save_every=1))
    poison_gradient({7}, accumulation=2)
    said["rollback"] = refused(config_of("rollback", 3, 7, save_every=5, bad_step="rollback"))
    poison_gradient({7}, accumulation=2)
    damage("rollback_damaged", 6, before_step=7)
    train.main(config_of("rollback_damaged", 3, 8, save_every=2, keep_checkpoints=9, bad_step="rollback"))
    rolled_back_from_step_5()
    for stage, precision, kind, settings in SPOILT:
        train.build_engine = BUILD
        spoil_weights(kind, at_step=5)
        name = f"spoilt_stage{stage}_{precision}_{kind}"
        said[name] = refused(config_of(name, stage, 7, precision=precision, **{"save_every": 1} | settings))
    poison_gradient({7}, accumulation=2)
    said["stop"] = refused(config_of("stop", 3, 20, save_every=5, bad_step="stop"))
    poison_gradient(set(range(6, 20)), accumulation=2)
    said["in_a_row"] = refused(config_of("in_a_row", 3, 20, save_every=5, max_bad_steps=3))

    # a spike in the samples of step 190, and the same run resumed in front of it
    train.build_engine = BUILD
    settings = {"spike_zscore": 8, "save_every": 180}
    config = config_of("spike", 3, 200, **settings)
    spike(189 * 8, 190 * 8 - 1, Mixture(config.data.path, "train", 32, 64, config.train.seed))
    train.main(config)
    parity.copy_until("spike", 180, "spike_resumed")
    train.main(config_of("spike_resumed", 3, 200, **settings))
    if comm.get_rank() == 0:
        (FOLDER / "said.json").write_text(json.dumps(said))
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main())
