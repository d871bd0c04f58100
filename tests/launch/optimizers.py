"""Started by test_optimizers.py under the launcher, on two ranks, and on one: Muon at every ZeRO stage, resumed, moved
and with bad steps, and width transfer.

    optimizers.py DATA FOLDER first|second|third
"""

import torch

import train
from minzero import checkpoint, checkpoint_state, dist
from minzero.zero import fragments_in_memory, local_fragments
from tests.helpers.ranks import run_ranks
from tests.launch import bad_steps, parity
from tests.launch.optimizer_settings import MODELS, MOVES, MUON, MUP, SETTINGS, SETTINGS_OF_MODELS, STEPS

FOLDER = parity.FOLDER
BUILD = train.build_engine


def config_of(name, stage, precision="fp32", offload="none", model=(), **settings):
    settings = MUON | {"precision": precision, "save_every": STEPS // 2, "save_best": False} | settings
    return parity.config_of(name, stage, offload, steps=STEPS, train=settings, model=dict(model))


def run_and_resume(name, *arguments, **more):
    """A run to its end, and once more from its checkpoint in the middle."""
    for path in (name, f"resumed_{name}"):
        train.main(config_of(path, *arguments, **more))
        if path == name:
            parity.copy_until(name, STEPS // 2, f"resumed_{name}")


def load_and_save_again(origin, stage, offload):
    """A checkpoint of two ranks at stage 3 loaded into another setting, and saved from there without a step."""
    config = config_of("unused", stage, "fp32", offload)
    device, _, ranks = dist.init_process()
    engine = train.build_engine(config, train.deepspeed_config(config, ranks, "fp32", False), device)
    path = FOLDER / origin / "checkpoints" / f"step_{STEPS // 2:08d}"
    state = checkpoint_state.read_state(path)
    checkpoint.load(engine, path, state, 0)
    folder = FOLDER / f"again_stage{stage}_{offload}_ranks{ranks}"
    checkpoint.save(engine, folder, state | {"world_size": ranks, "stage": stage}, False, 1)


def contents(engine):
    """A copy of every element that this rank updates: weights, moments and counts of steps."""
    found = {}
    for fragment, parts, state in fragments_in_memory(engine, local_fragments(engine)):
        tensors = {kind: part.clone() for kind, part in parts.items()}
        found[fragment.parameter] = tensors | {"step": torch.as_tensor(state["step"]).clone()}
    return found


def bad_steps_change_nothing(stage, precision, kind, world_size):
    """Step 3 is bad: a NaN in the gradient, or a loss of infinity with a good gradient, on the last rank alone."""
    before = {}
    train.build_engine = BUILD
    if kind == "nan":
        bad_steps.poison_gradient([3], accumulation=4 // world_size)
    else:
        bad_steps.infinite_loss(3, accumulation=4 // world_size)

    def compare(engine, made):
        if not made:
            before.clear()
            before.update(contents(engine))
            return
        after = contents(engine)
        bad = engine.global_steps == 3
        for name, tensors in before.items():
            same = {kind: torch.equal(tensor, after[name][kind]) for kind, tensor in tensors.items()}
            assert all(same.values()) if bad else not any(same.values()), (stage, precision, kind, name, same, bad)

    bad_steps.wrap_step(compare)
    train.main(config_of(f"{kind}_{precision}_stage{stage}_ranks{world_size}", stage, precision, max_tokens=5 * 8 * 32))
    train.build_engine = BUILD


def all_stages(world_size):
    for stage, precision, offload in SETTINGS:
        run_and_resume(f"{precision}_stage{stage}_{offload}_ranks{world_size}", stage, precision, offload)
        if offload == "none":
            for kind in ("nan", "infinite"):
                bad_steps_change_nothing(stage, precision, kind, world_size)
    for model, stage in SETTINGS_OF_MODELS:
        run_and_resume(f"{model}_stage{stage}_ranks{world_size}", stage, model=MODELS[model])
    for stage in (0, 1, 2):
        train.main(config_of(f"mup_stage{stage}_ranks{world_size}", stage, **MUP))
    run_and_resume(f"mup_stage3_ranks{world_size}", 3, **MUP)
    for stage, offload in ((0, "none"), (1, "none"), (2, "cpu"), (3, "none")):
        load_and_save_again("fp32_stage3_none_ranks2", stage, offload)


def main():
    _, rank, world_size = dist.start_process_group()
    if parity.PART != "third":
        all_stages(world_size)
    for name, (origin, stage) in MOVES[parity.PART].items():
        parity.copy_until(origin, STEPS // 2, name)
        model = MODELS.get(origin.split("_")[0], {})
        train.main(config_of(name, stage, model=model))
    if rank == 0:
        (FOLDER / f"done_{parity.PART}").touch()
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main())
