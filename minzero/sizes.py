"""What a model costs by arithmetic alone: parameters, FLOPs, and what devices can do. Needs no torch."""

import json
import re

from minzero.commands import UserError
from minzero.config import ModelConfig, switched_on

# Dense peak of the tensor cores in bf16 with float32 sums, without sparsity, in FLOP/s, from NVIDIA's data
# sheets. A pattern is searched in the device's name, and the first that is found counts. A device that is
# not here gets no MFU: a wrong peak is worse than none.
PEAK_FLOPS = {
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"(GH200|H200|H100|H800)\b": 989e12,
    r"B200\b": 2250e12,
    r"A[18]00\b": 312e12,
    r"L40S\b": 362e12,
    r"L4\b": 121e12,
    r"A10$": 125e12,
    r"GeForce RTX 4090$": 165e12,
    r"GeForce RTX 3090$": 71e12,
}


# The keys of the model section that the formulas here and memory.py's replay take into account.
COUNTED = set(
    "n_layer n_head n_kv_head n_embd block_size vocab_size mlp_hidden dropout bias norm norm_eps position rotary_theta "
    "mlp tie_embeddings init_std".split()
)


def peak_flops(device_name):
    """Peak bf16 FLOP/s of one device, or None for one that is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}", device_name)), None)


def check_counted(config: ModelConfig):
    """Raises UserError for a key of the model section that the formulas do not take into account."""
    for name, value, _ in switched_on(config, COUNTED):
        raise UserError(
            f"model.{name}: found {json.dumps(value)}, which the formulas for parameters, FLOPs and memory do not "
            "know; add it to sizes.py and memory.py, and its name to sizes.COUNTED"
        )


def count_parameters(config: ModelConfig):
    """Parameters of a GPT, from its configuration alone: (all, those that multiply activations). Raises UserError
    for a key that is not in these formulas."""
    check_counted(config)
    c, kv = config.n_embd, config.kv_heads * (config.n_embd // config.n_head)
    width, up = config.mlp_width, config.mlp_width * (2 if config.mlp == "swiglu" else 1)
    matrices = c * (c + 2 * kv) + c * c + c * up + width * c
    norm = c * (2 if config.norm == "layernorm" and config.bias else 1)
    biases = (c + 2 * kv) + c + up + c if config.bias else 0
    embeddings = config.vocab_size * c * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        embeddings += config.block_size * c
    total = config.n_layer * (matrices + 2 * norm + biases) + norm + embeddings
    return total, config.n_layer * matrices + config.vocab_size * c


def flops_per_token(config: ModelConfig):
    """Model FLOPs per training token: 6 for each parameter that multiplies an activation (2 forward, 4
    backward), and 12 n_layer n_embd block_size for attention's two products, causality not
    discounted (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
    return 6 * count_parameters(config)[1] + 12 * config.n_layer * config.n_embd * config.block_size


def recomputed_flops_per_token(config: ModelConfig, recompute_every):
    """FLOPs per training token that activation checkpointing adds: another forward pass of blocks 0, k, 2k,
    ... Hardware FLOPs are model FLOPs and these (Korthikanti et al. 2022, arXiv 2205.05198, section 6.3)."""
    if not recompute_every:
        return 0
    blocks = -(-config.n_layer // recompute_every)
    matrices = count_parameters(config)[1] - config.vocab_size * config.n_embd
    return blocks / config.n_layer * (2 * matrices + 4 * config.n_layer * config.n_embd * config.block_size)
