"""Started by test_offload.py: trains with the optimizer on the CPU, all of it and a part of it, and goes on from
checkpoints. On a CPU, DeepSpeed is told that some of its tensors are on a GPU, which have an optimizer of their own.

    partial_offload.py DATA FOLDER
"""

import train
from minzero import bad_steps, dist
from minzero.config.deepspeed import offload_ratio
from minzero.errors import UserError
from tests.launch import parity

deepspeed_config, build_engine = train.deepspeed_config, train.build_engine


def build_engine_in_parts(*arguments):
    engine = build_engine(*arguments)
    places = engine.optimizer.subgroup_to_device
    if offload_ratio(arguments[0].deepspeed["zero_optimization"]) < 1:
        assert len(places) > 3 and engine.optimizer.backup_optimizer, "nothing that stays on the GPU"
        places |= dict.fromkeys(list(places)[: len(places) // 2], "a GPU")
    return engine


def run(name, steps, ratio, **more):
    config = parity.config_of(name, 3, "cpu", steps=steps, train=more)
    zero = config.deepspeed["zero_optimization"]
    zero |= {"sub_group_size": 10_000, "offload_optimizer": {"device": "cpu", "ratio": ratio}}
    train.main(config)


def main():
    train.deepspeed_config = lambda config, world_size, precision, on_gpu, memory: deepspeed_config(
        config, world_size, precision, True, memory
    )
    train.build_engine = build_engine_in_parts
    dist.start_process_group()
    run("whole", 12, 1.0)
    run("part", 12, 0.5, save_every=5)
    parity.copy_until("part", 5, "part_resumed")
    run("part_resumed", 12, 0.5, save_every=5)
    parity.copy_until("part", 5, "part_to_whole")
    run("part_to_whole", 12, 1.0, save_every=5)

    check = bad_steps.BadSteps.check

    def check_as_bad(steps):
        check(steps)
        steps.fault = "said to be bad"

    bad_steps.BadSteps.check = check_as_bad
    try:
        run("bad", 4, 0.5, save_every=1)
    except UserError as error:
        assert "step 4, the last: said to be bad; bad steps in a row: 4" in str(error), error
    else:
        raise AssertionError("a run whose every step was bad ended as a good one")


if __name__ == "__main__":
    main()
