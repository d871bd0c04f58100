"""Started by test_memory.py under the launcher on two ranks: what tensors the real engine holds, and the most there was
of them, beside what minzero/planner replays, for stages 0 to 3 and for settings drawn at random."""

import gc
import itertools
import json
import random
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minzero import dist, sizes
from minzero.config.auto import VALUES
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config
from minzero.engine import build_engine
from minzero.four_bit import FourBitLinear
from minzero.planner.settings import settings_of
from tests.helpers.other_engines import OtherSettings, simulate_other
from tests.helpers.ranks import collect_garbage, run_ranks

LINEAR = functional.linear
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 512}


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors' storages that operators made and that are still alive, and the most there was."""

    def __init__(self):
        super().__init__()
        self.known, self.total, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            # DeepSpeed takes notes of shapes on the meta device, which has no memory
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.total += storage.nbytes()
            self.most = max(self.most, self.total)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, number, size):
        self.known.discard(number)
        self.total -= size


def bytes_of(tensors, known):
    """Bytes of the storages that are not among `known` yet, to which they are added."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total += storage.nbytes()
    return total


def held_by(engine, stage):
    """{part: bytes} that the engine holds after the last backward pass of a step."""
    weights, optimizer, known = list(engine.module.parameters()), engine.optimizer, set()
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    if stage == 3:
        masters, gradients = optimizer.fp32_partitioned_groups_flat, [optimizer.grad_partitions_flat_buffer]
        weights = [weight.ds_tensor for weight in weights]
    elif stage:
        masters = optimizer.single_partition_of_fp32_groups
        gradients = [gradient for group in optimizer.averaged_gradients.values() for gradient in group or []]
    else:
        masters = [tensor for group in inner.param_groups for tensor in group["params"]]
        gradients = [tensor.grad for tensor in {*masters, *weights} if tensor.grad is not None]
        gradients += getattr(optimizer, "fp32_groups_gradients_flat", [])
    for module in engine.module.modules():
        if isinstance(module, FourBitLinear):
            for numbers, scales in module.packed:
                weights += [numbers, scales.absmax, scales.state2.absmax]
    parts = {"parameters": weights, "optimizer": [*masters, *states], "gradients": gradients}
    return {part: bytes_of(tensors, known) for part, tensors in parts.items()}


def measured_and_predicted(zero, batch, precision, shape, loss_tokens=2**20, accumulated=None, lora=None):
    """Of the third to sixth step of this setting, on this rank, [measured, predicted] bytes: of each part that is held
    after the backward pass, and at the peak. loss_tokens: how many tokens' logits the loss may hold on a CPU.
    accumulated: data_types.grad_accum_dtype. lora: the section lora."""
    sizes.LOGITS_AT_A_TIME = 4 * loss_tokens * SHAPE["vocab_size"]
    device, rank, ranks = dist.init_process()
    functional.linear = LINEAR  # for which an engine of stage 3 leaves its own, which keeps every input
    batch = {"global_batch_tokens": 64 * batch["micro_batch_size"] * ranks} | batch | {"compile": False}
    deepspeed = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": accumulated}}
    sections = {"model": SHAPE | shape, "train": batch, "deepspeed": deepspeed, "lora": lora or {}}
    config = build(sections, "")
    settings = OtherSettings(
        **vars(settings_of(config, ranks, None)) | {"precision": precision}, on_cpu=True, rank=rank, whole_blocks=True
    )
    memory, _ = simulate_other(settings)
    with LiveBytes() as live:
        engine = build_engine(config, deepspeed_config(config, ranks, precision, False), device)
        peaks = []
        for _ in range(6):
            gc.collect()
            live.most = live.total
            for _ in range(settings.gradient_accumulation_steps):
                tokens = torch.randint(512, (2, settings.micro_batch_size, 64))
                loss = engine(*tokens)
                engine.backward(loss)
                del loss
                held = held_by(engine, settings.stage)
                engine.step()
            peaks.append(live.most)
    engine.destroy()
    del engine
    collect_garbage()
    predicted = {part: memory.held[part] for part in held}
    # the first two steps are others; in the rest, what Python's collector or gloo's threads let go late is above it
    peak = [min(peaks[2:]), max(total for total, _ in memory.peaks.values())]
    return {
        "setting": {
            "zero": zero,
            "train": batch,
            "precision": precision,
            "model": shape,
            "loss": loss_tokens,
            "sums": accumulated,
            "lora": lora,
        },
        "held": {part: [held[part], predicted[part]] for part in held},
        "peak": peak,
    }


def one_reduction(which):
    """Settings with a bucket larger than all gradients: the only reduction comes after the last one's hook, while the
    embeddings are still gathered. The last gradient is an embedding's, which the head shares or not."""
    settings = []
    for stage, tied, recompute, precision in [
        (3, False, False, "bf16"),
        (3, True, True, "fp32"),
        (2, False, False, "bf16"),
        (1, True, "selective", "bf16"),
    ]:
        zero = {"stage": stage, "reduce_bucket_size": 10**6, "stage3_param_persistence_threshold": 300}
        batch = {"micro_batch_size": 2, "activation_checkpointing": recompute}
        shape = {"tie_embeddings": tied}
        settings.append((zero, batch, precision, shape))
        if which == "all":
            rotary = shape | {"position": "rotary", "mlp": "swiglu", "n_kv_head": 2}
            settings.append((zero, batch | {"global_batch_tokens": 512}, precision, rotary))
            settings.append((zero | {"contiguous_gradients": False}, batch, precision, shape))
            if stage > 1 and precision == "bf16":
                settings.append((zero, batch, precision, shape, 2**20, "fp32"))
    return settings


def with_adapters(which):
    """Settings of runs that train adapters."""
    rotary = {"position": "rotary", "mlp": "swiglu", "n_kv_head": 2, "bias": False}
    kinds = [
        (stage, precision, shape) for stage in range(4) for precision in ("bf16", "fp32") for shape in ({}, rotary)
    ]
    if which == "some":
        kinds = [(3, "bf16", rotary), (1, "bf16", {})]
    for number, (stage, precision, shape) in enumerate(kinds):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 300, "reduce_bucket_size": 30_000}
        batch = {"micro_batch_size": 2, "activation_checkpointing": number % 3 == 2, "global_batch_tokens": 512}
        lora = {"rank": 8, "dropout": 0.1 * (number % 2), "matrices": ["qkv", "proj", "up", "down"][number % 4 :]}
        for bits in [None, 4] if find_spec("bitsandbytes") else [None]:
            yield measured_and_predicted(zero, batch, precision, shape, lora=lora | {"base_bits": bits})


def main(folder, which):
    """which: "all" settings, or "some": each stage once, two of the random ones. A compiled block allocates past the
    dispatcher, where LiveBytes does not see it: test_plan.py counts what it keeps."""
    _, rank, _ = dist.start_process_group()
    found = []
    stages = [*itertools.product(range(4), ("fp32", "bf16"))]
    if which == "some":
        stages = [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")]
    for stage, precision in stages:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 300, "reduce_bucket_size": 30_000}
        found.append(measured_and_predicted(zero, {"micro_batch_size": 2}, precision, {}))
    batch = {"micro_batch_size": 2, "global_batch_tokens": 512, "activation_checkpointing": "selective"}
    zero = {key.removeprefix("zero_optimization."): "auto" for key in VALUES if key.startswith("zero_optimization.")}
    found.append(measured_and_predicted(zero | {"stage": 3}, batch, "bf16", {}, accumulated="auto"))
    experts = {"n_expert": 4, "mlp": "swiglu", "mlp_hidden": 48, "bias": False, "n_shared_expert": 1}
    for stage, precision, recompute in [(2, "bf16", True), (3, "fp32", "selective"), (3, "bf16", False)]:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 300, "reduce_bucket_size": 30_000}
        batch = {"micro_batch_size": 2, "activation_checkpointing": recompute}
        found.append(measured_and_predicted(zero, batch, precision, experts))
    found += with_adapters(which)
    found += [measured_and_predicted(*setting) for setting in one_reduction(which)]
    draw = random.Random(0)
    for _ in range(20 if which == "all" else 2):
        zero = {
            "stage": draw.choice([1, 2, 3, 3]),
            "overlap_comm": draw.choice([False, True]),
            "reduce_bucket_size": draw.choice([5_000, 30_000, 200_000]),
            "stage3_prefetch_bucket_size": draw.choice([0, 10_000, 60_000]),
            "stage3_param_persistence_threshold": draw.choice([0, 300, 5_000, 10**6]),
            "stage3_max_live_parameters": draw.choice([60_000, 150_000, 10**9]),
            "stage3_max_reuse_distance": draw.choice([0, 50_000, 1_000_000]),
            "sub_group_size": draw.choice([20_000, 1_000_000]),
            "contiguous_gradients": draw.choice([True, False]),
            "stage3_allgather_sequential": draw.choice([True, False]),
        }
        size = draw.choice([1, 2, 4])
        batch = {
            "micro_batch_size": size,
            "global_batch_tokens": 64 * size * 2 * draw.choice([1, 2]),
            "activation_checkpointing": draw.choice([False, True, 2, "selective", "selective"]),
        }
        shape = {"tie_embeddings": draw.choice([True, False]), "position": draw.choice(["learned", "rotary"])}
        shape |= {"mlp": draw.choice(["gelu", "swiglu"]), "n_kv_head": draw.choice([None, 2])}
        shape["bias"] = draw.choice([True, False])
        shape |= {"head_dim": draw.choice([None, 32]), "qk_norm": draw.choice(["none", "head", "all"])}
        shape |= {"norm_position": draw.choice(["before", "after"]), "sliding_window": draw.choice([None, 8])}
        shape |= {"parallel_residual": draw.choice([False, True]), "no_rotary_layers": draw.choice([None, [0]])}
        shape |= {"rotary_fraction": draw.choice([1.0, 0.5]), "qkv_bias": draw.choice([None, True])}
        if shape["position"] == "learned":
            shape |= {"no_rotary_layers": None, "rotary_fraction": 1.0}
        precision, loss_tokens = draw.choice(["fp32", "bf16"]), draw.choice([16, 2**20])
        accumulated = draw.choice([None, "fp32"]) if zero["stage"] > 1 else None
        found.append(measured_and_predicted(zero, batch, precision, shape, loss_tokens, accumulated))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main(*sys.argv[-2:]))
