"""Started by test_options.py under the launcher on two ranks: 50 steps with each option of the model on and
off, in one process group. Leaves {setting: [loss of each step]} in FOLDER/losses.json.

    options.py FOLDER
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from deepspeed import comm
from torch import nn
from torch.nn import functional as F

import model
from minzero import dist, sizes
from minzero.compiled import why_not_compiled
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config
from minzero.engine import build_engine
from minzero.experts import Experts, routing_of
from tests.helpers.ranks import collect_garbage, run_ranks
from tests.helpers.variants import all_changed

FOLDER, STEPS, IDS, BLOCK = Path(sys.argv[-1]), 50, 64, 32
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": BLOCK, "vocab_size": IDS, "init_std": 0.05}
LLAMA = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False, "n_kv_head": 2}
QWEN3 = LLAMA | {"head_dim": 24, "qk_norm": "head"}
OLMOE = LLAMA | {"qk_norm": "all", "n_expert": 6, "mlp_hidden": 40, "normalize_experts": False}
# every key changed, but for dropout: two ways of computing drop other activations; a token goes through all experts:
# once in a while a rounding error chooses another one
CHANGED = dataclasses.asdict(all_changed(**SHAPE, dropout=0.0, n_kv_head=2, head_dim=24, n_expert_per_token=4))


class PlainNorm(nn.Module):
    """Layer norm or RMSNorm by their formulas."""

    def __init__(self, config, kernels=None, width=None):
        super().__init__()
        self.centred, self.eps = config.norm == "layernorm", config.norm_eps
        self.weight = nn.Parameter(torch.ones(width or config.n_embd))
        if self.centred and config.bias:
            self.bias = nn.Parameter(torch.zeros(width or config.n_embd))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        x = self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)
        return x + self.bias if hasattr(self, "bias") else x


def plain_attention(q, k, v, attn_mask, is_causal, dropout_p, enable_gqa):
    """softmax(q k' / sqrt(D)) v with a mask, each product by itself. No dropout."""
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1) if is_causal else ~attn_mask
    return ((q @ k.mT) / math.sqrt(q.shape[3])).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def plain_head(self, x, targets=None):
    """All logits at once."""
    logits = F.linear(x, self.weight)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def plain_experts(self, x):
    """All tokens through all experts, one after the other, with weights of zero where they are not chosen."""
    logits = self.router(x)
    probabilities = logits.softmax(-1)
    lowest = probabilities.topk(self.n_expert_per_token).values[..., -1:]
    chosen = probabilities >= lowest
    weights = probabilities * chosen
    if self.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    y = 0 if self.shared is None else self.shared(x)[0]
    for number, (up, down) in enumerate(zip(self.up.weight, self.down.weight, strict=True)):
        y = y + weights[..., number, None] * (self.activate(x @ up.T) @ down.T)
    return y, routing_of(logits.flatten(0, 1), probabilities.flatten(0, 1), chosen.flatten(0, 1).sum(0))


PLAIN = [(model, "make_norm", PlainNorm), (F, "scaled_dot_product_attention", plain_attention)]
PLAIN += [(model.Head, "forward", plain_head), (Experts, "forward", plain_experts)]


def losses(stage, architecture, settings, adam=None, replaced=()):
    """50 losses, each the mean over both ranks, with (object, name, value) replaced meanwhile."""
    device, rank, world_size = dist.init_process()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 4096}
    zero |= {"stage3_prefetch_bucket_size": 4096}
    batch = {"micro_batch_size": 4, "global_batch_tokens": 4 * BLOCK * world_size, "lr": 3e-3}
    sections = {"model": SHAPE | architecture, "train": batch | settings, "deepspeed": {"zero_optimization": zero}}
    config = build(sections, "")
    before = [(where, name, getattr(where, name)) for where, name, _ in replaced]
    for where, name, value in replaced:
        setattr(where, name, value)
    ds_config = deepspeed_config(config, world_size, "fp32", False)
    ds_config["optimizer"]["params"] |= adam or {}
    compiled = False
    if settings.get("compile"):
        reason = why_not_compiled(True, config.model, device, "torch")
        assert reason is None, reason
        compiled = True
    collect_garbage()
    engine = build_engine(config, ds_config, device, compiled=compiled)
    torch.manual_seed(rank)
    generator, found = torch.Generator().manual_seed(100 + rank), []
    for _ in range(STEPS):
        steps = torch.randint(1, 4, (4, BLOCK + 1), generator=generator)
        tokens = steps.cumsum(1) % IDS
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        comm.all_reduce(loss := loss.detach())
        found.append(loss.item() / world_size)
    if compiled:
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"], counters
        torch.compiler.reset()
        counters.clear()
    for where, name, value in before:
        setattr(where, name, value)
    return found


def main():
    _, rank, _ = dist.start_process_group()
    few_logits = [(sizes, "LOGITS_AT_A_TIME", 4 * 32 * IDS)]
    unfused = {"fused": False, "foreach": False}
    found = {}
    for name, architecture in (
        ("gpt2", {}),
        ("llama", LLAMA),
        ("qwen3", QWEN3),
        ("olmoe", OLMOE),
        ("changed", CHANGED),
    ):
        found[f"{name} plain"] = losses(3, architecture, {}, unfused, PLAIN)
        found[f"{name} default"] = losses(3, architecture, {})
    found["llama chunked loss"] = losses(3, LLAMA, {}, None, few_logits)
    found["llama unfused Adam"] = losses(3, LLAMA, {}, unfused)
    found["selective"] = losses(3, {}, {"activation_checkpointing": "selective"})
    found["llama recomputed"] = losses(3, LLAMA, {"activation_checkpointing": True})
    on_cpu = {"activation_checkpointing": 2, "activation_offload": True}
    found["llama every second recomputed, inputs on CPU"] = losses(3, LLAMA, on_cpu)
    compiled = {"compile": True}
    found["qwen3 recomputed"] = losses(3, QWEN3, {"activation_checkpointing": True})
    for stage in range(3):
        found[f"olmoe stage {stage}"] = losses(stage, OLMOE, {})
        found[f"changed stage {stage}"] = losses(stage, CHANGED, {})
    found["olmoe recomputed"] = losses(3, OLMOE, {"activation_checkpointing": True})
    found["olmoe every second recomputed, inputs on CPU"] = losses(3, OLMOE, on_cpu)
    found["olmoe selective"] = losses(3, OLMOE, {"activation_checkpointing": "selective"})
    found["olmoe compiled, selective"] = losses(3, OLMOE, compiled | {"activation_checkpointing": "selective"})
    found["changed every second recomputed, inputs on CPU"] = losses(3, CHANGED, on_cpu)
    found["changed selective"] = losses(3, CHANGED, {"activation_checkpointing": "selective"})
    found["changed compiled, recomputed"] = losses(3, CHANGED, {"compile": True, "activation_checkpointing": 2})
    found["llama compiled, recomputed"] = losses(3, LLAMA, compiled | {"activation_checkpointing": True})
    found["llama compiled, stage 2"] = losses(2, LLAMA, compiled)
    dropped = LLAMA | {"dropout": 0.2}
    found["dropout"] = losses(3, dropped, {})
    found["dropout, recomputed"] = losses(3, dropped, {"activation_checkpointing": True})
    found["dropout, compiled"] = losses(3, dropped, compiled)
    found["dropout, compiled, recomputed"] = losses(3, dropped, compiled | {"activation_checkpointing": 2})
    if rank == 0:
        (FOLDER / "losses.json").write_text(json.dumps(found))
    dist.stop_process_group()


if __name__ == "__main__":
    run_ranks(lambda _: main())
