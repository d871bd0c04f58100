"""Arithmetic on a model's configuration: parameters, FLOPs, sizes of the loss. Needs no torch."""

import json
from typing import NamedTuple

from minzero.config.sections import ModelConfig, Recomputation, switched_on
from minzero.errors import UserError

IGNORE_INDEX = -1  # a target that does not count in the loss

# Logits of one chunk of the loss on a GPU, at most: 512 MiB in 16 bits. Larger chunks make larger matrix products
# and fewer partial gradients to add up.
LOGITS_AT_A_TIME = 2**28

MUON_AT_A_TIME = 2**25  # elements of small matrices that Muon makes orthogonal in one call: 128 MiB in float32

MOST_HEAD_SIZE = 256  # channels of a head that flash attention and cuDNN take

# Keys of the model section that the formulas here and planner/activations.py take into account.
COUNTED = set(
    "n_layer n_head n_kv_head n_embd head_dim block_size vocab_size mlp_hidden dropout bias qkv_bias norm "
    "norm_position norm_eps position rotary_theta rotary_fraction rotary_scaling no_rotary_layers qk_norm "
    "sliding_window full_attention_layers parallel_residual mlp n_expert n_expert_per_token "
    "n_shared_expert normalize_experts balance_loss balance_over router_z_loss tie_embeddings init_std family".split()
)


def loss_chunk_tokens(vocab_size, on_gpu):
    """Tokens of one chunk of the loss: a power of two, so that most chunks have one size, and at most 4,096, so that
    sums over a chunk fit in fp16. On CPU a chunk has a quarter of the logits."""
    most_logits = LOGITS_AT_A_TIME if on_gpu else LOGITS_AT_A_TIME // 4
    most_tokens = max(1, most_logits // vocab_size)
    return min(4096, 1 << (most_tokens.bit_length() - 1))


def padded_vocab_size(vocab_size, on_gpu):
    """Columns of logits that the loss computes: on a GPU a multiple of 64, because GPT-2's 50,257 columns multiply more
    slowly than 50,304."""
    return -(-vocab_size // 64) * 64 if on_gpu else vocab_size


def wide_heads(config: ModelConfig):
    """A line on heads that are too wide for the fast implementations of attention, or None."""
    size = config.head_size
    if size <= MOST_HEAD_SIZE:
        return None
    return (
        f"model.n_head: heads of {size} channels, as in minGPT's larger shapes; flash attention and cuDNN take at most "
        f"{MOST_HEAD_SIZE}, so attention is slow (torch's memory-efficient or math kernel)"
    )


def check_counted(config: ModelConfig):
    """Raises UserError for a key of the model section that the formulas do not take into account."""
    for name, value, _ in switched_on(config, COUNTED):
        raise UserError(
            f"model.{name}: found {json.dumps(value)}, which the formulas for parameters, FLOPs and memory do not "
            "know; add it to sizes.py and planner/activations.py, and its name to sizes.COUNTED"
        )


class ParameterSizes(NamedTuple):
    """Elements of each parameter of a GPT."""

    block: list  # of one block
    outside: list  # of embeddings, final norm and output layer
    hidden: list  # of those of a block that are matrices, or one for each expert, without the router


def parameter_sizes(config: ModelConfig):
    """ParameterSizes of a GPT, from its configuration alone. Keys that are not in COUNTED are left out of account."""
    width = config.n_embd
    attention, key_width = config.n_head * config.head_size, config.kv_heads * config.head_size
    matrices = [  # of a block: (inputs, outputs, whether it has a bias)
        (width, attention + 2 * key_width, config.biased_qkv),
        (attention, width, config.bias),
    ]
    # of the MLP that every token goes through; 0: none
    dense_width = config.mlp_width if config.n_expert is None else config.n_shared_expert * config.mlp_width
    if dense_width:
        hidden = dense_width * (2 if config.gated else 1)  # SwiGLU has a gate and a value
        matrices += [(width, hidden, config.bias), (dense_width, width, config.bias)]
    hidden = [inputs * outputs for inputs, outputs, _ in matrices]
    block = hidden + [outputs for _, outputs, biased in matrices if biased]
    if config.n_expert:
        router, *experts = [size * config.n_expert for size in expert_sizes(config)]
        block += [router, *experts]
        hidden = hidden + experts
    norms = [width, width]
    if config.qk_norm != "none":
        by_head = config.qk_norm == "head"
        norms += [config.head_size, config.head_size] if by_head else [attention, key_width]
    weights_of_norm = 2 if config.norm == "layernorm" and config.bias else 1
    embeddings = [config.vocab_size * width] * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        embeddings.append(config.block_size * width)
    return ParameterSizes(block + weights_of_norm * norms, embeddings + weights_of_norm * [width], hidden)


def moment_bytes(config: ModelConfig, optimizer):
    """Bytes of the optimizer's float32 moments for the mean parameter: two of AdamW, and one of Muon for each of its
    own, which are the blocks' matrices (muon.py). optimizer: train.optimizer."""
    sizes = parameter_sizes(config)
    total = config.n_layer * sum(sizes.block) + sum(sizes.outside)
    of_muon = config.n_layer * sum(sizes.hidden) if optimizer == "muon" else 0
    return 8 - 4 * of_muon / total if of_muon else 8


def largest_of_muon(config: ModelConfig):
    """Elements of the matrices that Muon makes orthogonal in one call, at the most: several small ones of a parameter,
    or the largest single one."""
    attention, width = config.n_head * config.head_size, config.n_embd
    largest = max(attention * width, config.mlp_width * width * max(1, config.n_shared_expert))
    return max(largest, min(MUON_AT_A_TIME, max(parameter_sizes(config).hidden)))


def expert_sizes(config: ModelConfig):
    """Elements of one expert: its row of the router, and its matrices."""
    hidden = config.mlp_width * (2 if config.gated else 1)
    return [config.n_embd, config.n_embd * hidden, config.mlp_width * config.n_embd]


def count_parameters(config: ModelConfig):
    """Parameters of a GPT, from its configuration alone: (all, those that multiply a token's activations, of the
    experts its own). Raises UserError for a key that these formulas do not know."""
    check_counted(config)
    sizes = parameter_sizes(config)
    total = config.n_layer * sum(sizes.block) + sum(sizes.outside)
    width, attention = config.n_embd, config.n_head * config.head_size
    matrices = width * (2 * attention + 2 * config.kv_heads * config.head_size)
    router, up, down = expert_sizes(config)
    if config.n_expert:
        experts = config.n_shared_expert + config.n_expert_per_token
        matrices += config.n_expert * router + experts * (up + down)
    else:
        matrices += up + down
    return total, config.n_layer * matrices + config.vocab_size * config.n_embd


def attention_flops_per_token(config: ModelConfig, attended=None):
    """FLOPs of attention's two products in a forward pass, per token: 4 for each channel of a query and each token that
    it is compared with, with the masked half included. A sliding window shortens that, although the products that it
    masks are computed. attended: the mean number of tokens of a token's document, where attention is within documents;
    None: block_size."""
    most = attended or config.block_size
    tokens = sum(min(config.window_of(layer) or most, most) for layer in range(config.n_layer))
    return 4 * config.n_head * config.head_size * tokens


def flops_per_token(config: ModelConfig, attended=None, adapters=0):
    """Model FLOPs per training token: 6 for each parameter that multiplies an activation (2 forward, 4 backward), and
    attention's products, which are 12 n_layer n_embd block_size where nothing shortens them (PaLM: Chowdhery et al.
    2022, arXiv 2204.02311, appendix B). attended: as of `attention_flops_per_token`. adapters: the number of parameters
    that are trained in place of the model's own (lora.py); these then have no gradients, so 4 for each."""
    own = (4 if adapters else 6) * count_parameters(config)[1]
    return own + 6 * adapters + 3 * attention_flops_per_token(config, attended)


def recomputed_flops_per_token(config: ModelConfig, activation_checkpointing, attended=None):
    """FLOPs per training token that train.activation_checkpointing adds. A block that is recomputed: its forward pass
    once more. Selective: only the product after attention, and the experts' down product, whose output the gradient of
    the routing weights reads. A part b of the activations kept: 1 - b of the forward pass, though the compiler drops
    first what costs least. Hardware FLOPs are model FLOPs plus these (Korthikanti et al. 2022, arXiv 2205.05198,
    section 6.3)."""
    recomputation = Recomputation.of(activation_checkpointing)
    if recomputation.selective:
        product = config.n_embd * config.n_head * config.head_size
        if config.n_expert:
            product += config.n_expert_per_token * expert_sizes(config)[-1]
        return config.n_layer * 2 * product
    blocks = -(-config.n_layer // recomputation.every) if recomputation.every else 0
    share = blocks / config.n_layer + 1 - recomputation.budget
    matrices = count_parameters(config)[1] - config.vocab_size * config.n_embd
    return share * (2 * matrices + attention_flops_per_token(config, attended))
