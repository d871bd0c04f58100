"""Started by test_lora_robust.py under the launcher on two ranks, on one, and on two again: runs that train adapters,
each once more from a checkpoint, and moved to other ranks and stages. Like tests/launch/parity.py.

lora_runs.py FOLDER first|second|third|bad
"""

import importlib.util
from pathlib import Path

from deepspeed import comm
from deepspeed.accelerator import get_accelerator

import train
from minzero import checkpoint_folder, dist
from minzero.config.load import load_config
from minzero.files import write_json
from minzero.init_from import model_defaults
from tests.helpers.ranks import run_ranks

STEPS, SAVED, TOKENS = 16, 8, 4 * 16  # tokens a step
BITS = (None, 4) if importlib.util.find_spec("bitsandbytes") else (None,)  # lora.base_bits
MOVES = {  # name: (the run it continues, from which step, stage), of one part after the other
    "first": {"stage_1": ("moved", 4, 1), "stage_0": ("stage_1", 8, 0), "stage_3": ("stage_0", 12, 3)},
    "second": {"one_rank": ("moved", 4, 3), "one_rank_stage_2": ("moved", 4, 2)},
    "third": {"two_ranks": ("one_rank", 8, 3), "two_ranks_stage_1": ("one_rank_stage_2", 12, 1)},
}


def sections(folder, out, stage=3, lora=None, **train_section):
    """A run of 16 steps with adapters of rank 3. lora: more keys of this section."""
    settings = {"init_from": str(folder / "hf"), "out_dir": str(out), "micro_batch_size": 2, "lr": 1e-2}
    settings |= {"global_batch_tokens": TOKENS, "max_tokens": STEPS * TOKENS, "warmup_tokens": 0, "log_every": 1}
    settings |= {"save_every": 4, "keep_checkpoints": 99, "eval_every": 0, "eval_tokens": 64}
    return {
        "data": {"path": str(folder / "data")},
        "lora": {"rank": 3, "dropout": 0.1, **(lora or {})},
        "train": settings | train_section,
        "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}},
    }


def settings():
    """Yields (name, stage, precision, lora.base_bits) of the runs that are resumed as they were."""
    precisions = ("fp32", "bf16", "fp16") if get_accelerator().is_fp16_supported() else ("fp32", "bf16")
    for bits in BITS:
        for precision in precisions:
            for stage in range(4):
                yield f"{precision}_stage{stage}_{bits}", stage, precision, bits


def one_run(folder, name, stage, source=None, step=SAVED, **more):
    """source: the run from whose checkpoint of that step this one continues."""
    if source:
        more["resume"] = str(folder / source / "checkpoints" / checkpoint_folder.name_of(step))
    path = folder / f"{name}.json"
    if dist.local_place[0] == 0:
        write_json(path, sections(folder, folder / name, stage, **more))
    comm.barrier()
    train.main(load_config([str(path)], model_defaults))


def bad_runs(folder):
    """A NaN in the gradient of a block's output on rank 1, in step 7."""
    from tests.launch import bad_steps  # which reads the command's arguments

    for bits in BITS:
        for bad_step in ("skip", "rollback"):
            train.build_engine = bad_steps.BUILD
            bad_steps.poison_gradient({7}, accumulation=1)
            one_run(folder, f"{bad_step}_{bits}", 3, lora={"base_bits": bits}, bad_step=bad_step)


def main(arguments):
    folder, part = Path(arguments[-2]), arguments[-1]
    dist.start_process_group()
    if part == "first":
        for name, stage, precision, bits in settings():
            more = {"lora": {"base_bits": bits}, "precision": precision, "activation_checkpointing": stage == 3}
            one_run(folder, name, stage, **more)
            one_run(folder, f"{name}_again", stage, name, **more)
        for bits in BITS:
            one_run(folder, f"moved_{bits}", 3, lora={"base_bits": bits, "dropout": 0.0})
    if part == "bad":
        bad_runs(folder)
    for bits in BITS:
        for name, (source, step, stage) in MOVES.get(part, {}).items():
            more = {"lora": {"base_bits": bits, "dropout": 0.0}}  # dropout is another on other ranks
            one_run(folder, f"{name}_{bits}", stage, f"{source}_{bits}", step, **more)
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(main)
