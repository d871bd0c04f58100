"""Started by test_keys.py under the launcher on two or four ranks: for each setting of DeepSpeed's keys a run that
saves, and one that resumes from the plain run's checkpoint at another ZeRO stage, in one process group.

    keys.py FOLDER FEW|ALL|HPZ       leaves results.json: [stage, precision, keys, changes, result]
"""

import itertools
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from minzero import checkpoint, checkpoint_folder, checkpoint_state, dist
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config
from minzero.config.nested import merge
from minzero.config.sections import Config
from minzero.engine import build_engine
from minzero.tensor_files import SavedPieces
from minzero.zero import KINDS, loss_scaler
from tests.helpers.ranks import collect_garbage, run_ranks
from tests.launch import key_settings

FOLDER, LIST = Path(sys.argv[-2]), sys.argv[-1]
# of sizes that leave parameters at odd addresses, so that parameter_alignment has something to do
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 54, "block_size": 32, "vocab_size": 61, "init_std": 0.05}
# the large epsilon keeps gradients that are nothing but rounding, of the keys' biases, from counting
RANKS = int(os.environ["WORLD_SIZE"])
BATCH = {"micro_batch_size": 2, "global_batch_tokens": 4 * RANKS * 32, "lr": 1e-2, "eps": 1e-3}
BATCH["max_tokens"] = 6 * BATCH["global_batch_tokens"]


def engine_of(stage, precision, keys):
    device, _, world_size = dist.init_process()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 4096}
    zero |= {"stage3_prefetch_bucket_size": 4096}
    sections = {"model": MODEL, "train": BATCH | {"precision": precision}}
    config = build(sections | {"deepspeed": merge({"zero_optimization": zero}, keys)}, "")
    return build_engine(config, deepspeed_config(config, world_size, precision, False), device)


def take_steps(engine, first):
    """Three steps of two micro-batches, on data that the numbers of the steps decide."""
    for step in range(first, first + 3):
        generator = torch.Generator().manual_seed(100 * step + comm.get_rank())
        for _ in range(2):
            tokens = torch.randint(MODEL["vocab_size"], (2, MODEL["block_size"] + 1), generator=generator)
            loss = engine(tokens[:, :-1], tokens[:, 1:])
            engine.backward(loss)
            engine.step()


def saved(engine, name, step):
    """Save a checkpoint: (its path, {(kind, parameter): whole tensor, NaN where no rank saved it})."""
    state = {"step": step, "tokens": 0, "config": Config().to_dict(), "data": {}, "best_val_loss": None}
    state |= {"world_size": RANKS, "precision": "fp32", "stage": 0}
    checkpoint.save(engine, FOLDER / name, state, False, 2)
    comm.barrier()
    path, found = FOLDER / name / checkpoint_folder.name_of(step), {}
    state = checkpoint_state.read_state(path)
    saved = SavedPieces(path, state, verify=True)
    for kind, (parameter, shape) in itertools.product(KINDS, state["parameters"].items()):
        flat = torch.full((torch.Size(shape).numel(),), torch.nan)
        saved.copy_overlap(flat, 0, kind, parameter)
        found[kind, parameter] = flat.view(shape)
    return path, found


def weights_are(engine, found):
    """Whether the weights that the engine computes with are those of a checkpoint."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        named = dict(engine.module.named_parameters())
        return all(torch.equal(found["fp32", name].to(weight.dtype), weight) for name, weight in named.items())


def difference(ours, theirs):
    """{kind: largest difference of two checkpoints' tensors, as a part of the largest value}."""
    assert ours.keys() == theirs.keys()
    largest = {}
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        names = [key for key in theirs if key[0] == kind]
        apart = torch.stack([(ours[key] - theirs[key]).abs().max() for key in names]).max()
        largest[kind] = (apart / torch.stack([theirs[key].abs().max() for key in names]).max()).item()
    return largest


def run(stage, precision, keys, name, resumed_from=None):
    """Three steps from the beginning, and three from the checkpoint of that path: [(checkpoint, its tensors), ...],
    and whether each holds the engine's weights."""
    runs, right = [], []
    for first, path in ((0, None), (3, resumed_from)) if resumed_from else ((0, None),):
        engine = engine_of(stage, precision, keys)
        if path:
            checkpoint.load(engine, path, checkpoint_state.read_state(path), 0)
        if stays := keys.get("fp16", {}).get("loss_scale"):  # also where the checkpoint was saved with another
            assert loss_scaler(engine).loss_scale == stays
        take_steps(engine, first)
        runs.append(saved(engine, f"{name}_{first}", first + 3))
        right.append(weights_are(engine, runs[-1][1]))
        engine.destroy()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes it once a process
        collect_garbage()
    return runs, right


def main():
    get_accelerator().is_fp16_supported = lambda: True  # it says no on CPUs where it is slow
    _, rank, _ = dist.start_process_group()
    plain, results = {}, []

    def plain_run(stage, precision):
        if (stage, precision) not in plain:
            elsewhere, _ = run(2 if stage == 3 else 3, precision, {}, f"elsewhere_{stage}_{precision}")
            path = elsewhere[0][0]
            plain[stage, precision] = path, run(stage, precision, {}, f"plain_{stage}_{precision}", path)[0]
        return plain[stage, precision]

    settings = [(stage, *rest) for stages, *rest in getattr(key_settings, LIST) for stage in stages]
    engine_of(3, "fp32", {}).destroy()
    for number, (stage, precision, keys, changes) in enumerate(settings):
        path, reference = plain_run(stage, precision)
        runs, right = run(stage, precision, keys, f"run_{number}", path)
        pairs = zip(runs, reference, strict=True)
        apart = [difference(ours, theirs) for (_, ours), (_, theirs) in pairs]
        results.append([stage, precision, keys, changes, {"right": right, "apart": apart}])
    if rank == 0:
        (FOLDER / "results.json").write_text(json.dumps(results))
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main())
