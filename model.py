"""The GPT: a decoder-only transformer, GPT-2 by default, and Llama, Qwen, OLMo, Pythia and others by its options.

It knows no engine, no files and no loggers; its loss is in minzero/loss.py. Shapes in comments: B sequences, T tokens,
C = n_embd, H query heads and K key-value heads of D channels, V token ids.

GPT-2: Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
Llama: Touvron et al. 2023, arXiv 2302.13971.
"""

import contextlib
import functools
import math

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minzero.config.sections import ModelConfig, Recomputation
from minzero.document_attention import Documents, attention_within, window_mask
from minzero.experts import ExpertLinear, Experts, router_losses
from minzero.loss import LinearCrossEntropy, TokenLogProbabilities, cross_entropy
from minzero.mup import std_factors
from minzero.preference import answers_of
from minzero.recompute import recompute
from minzero.rotary import rotary_angles
from minzero.sizes import IGNORE_INDEX, loss_chunk_tokens


def make_norm(config: ModelConfig, kernels="torch", width=None):
    """A norm over `width` channels, by default n_embd: torch's, or with kernels "apex" NVIDIA Apex's, with the same
    parameters."""
    width = width or config.n_embd
    if kernels == "apex" and (config.bias or config.norm == "rmsnorm"):  # its layer norm always has a bias
        from apex.normalization import FusedLayerNorm, FusedRMSNorm

        return (FusedRMSNorm if config.norm == "rmsnorm" else FusedLayerNorm)(width, eps=config.norm_eps)
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def rotate(x, angles):
    """Rotate queries or keys, (B, heads, T, D), by their positions: the first R channels, of which i is paired with
    i + R/2, as in GPT-NeoX and in transformers' Llama. angles: see minzero/rotary.py."""
    cos, sin = angles
    x, rest = x.tensor_split((2 * cos.shape[-1],), dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(rest)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def attention_backends(device):
    """The implementations of scaled_dot_product_attention in the order to try them, where torch's own order
    is not the fastest, else None. torch skips one that does not support the inputs.

    On Hopper that is cuDNN's (transformers' pull request 48163: 1.7 to 2.3 times torch's default there, and
    slower elsewhere)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
        return [getattr(SDPBackend, name) for name in names]
    return None


class Attention(nn.Module):
    """Causal self-attention. With fewer key-value heads than query heads, groups of H / K queries share
    one (grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, kernels):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads
        self.head_size = config.head_size
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        width, kv_width = self.n_head * self.head_size, self.n_kv_head * self.head_size
        self.qkv = nn.Linear(config.n_embd, width + 2 * kv_width, bias=config.biased_qkv)
        if self.qk_norm != "none":
            by_head = self.qk_norm == "head"
            self.q_norm = make_norm(config, kernels, self.head_size if by_head else width)
            self.k_norm = make_norm(config, kernels, self.head_size if by_head else kv_width)
        self.proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.proj.writes_to_residual = True

    def forward(self, x, angles, mask):
        """angles: of rotary positions, where this layer has them. mask: of a sliding window or of documents, or
        Documents, or None."""
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_size)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm == "all":
            q, k = self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = self.attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self.proj(y.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(y, self.dropout, self.training)

    def attend(self, q, k, v, mask, dropout):
        if isinstance(mask, Documents):
            return mask.attend(q, k, v, dropout)
        preferred = attention_backends(q.device)
        with sdpa_kernel(preferred, set_priority=True) if preferred else contextlib.nullcontext():
            options = {"dropout_p": dropout, "enable_gqa": self.n_head != self.n_kv_head}
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)


def activate(x, kind):
    """Between an MLP's two products: GELU, exact or in its tanh form, as GPT-2's, or SwiGLU, silu(gate) * up, of the
    two halves of x (Shazeer 2020, arXiv 2002.05202)."""
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(x, approximate="none" if kind == "gelu_exact" else "tanh")


class MLP(nn.Module):
    """Two linear layers and the activation between them."""

    def __init__(self, config: ModelConfig, width):
        super().__init__()
        self.dropout = config.dropout
        self.kind = config.mlp
        self.up = nn.Linear(config.n_embd, 2 * width if config.gated else width, bias=config.bias)
        self.down = nn.Linear(width, config.n_embd, bias=config.bias)
        self.down.writes_to_residual = True

    def forward(self, x):
        """(B, T, C) -> (B, T, C), and None, where experts say how they were chosen."""
        return F.dropout(self.down(activate(self.up(x), self.kind)), self.dropout, self.training), None


def make_experts(config: ModelConfig):
    """Experts in place of an MLP, and where some are shared, one MLP that is as wide as all of these."""
    shared = MLP(config, config.n_shared_expert * config.mlp_width) if config.n_shared_expert else None
    return Experts(config, functools.partial(activate, kind=config.mlp), shared)


class Block(nn.Module):
    """Attention and MLP, each with a norm before or after it and added to the residual stream: one after the other, or
    both to the same stream."""

    def __init__(self, config: ModelConfig, kernels):
        super().__init__()
        self.norms_follow = config.norm_position == "after"
        self.parallel = config.parallel_residual
        self.attention_norm = make_norm(config, kernels)
        self.attention = Attention(config, kernels)
        self.mlp_norm = make_norm(config, kernels)
        self.mlp = MLP(config, config.mlp_width) if config.n_expert is None else make_experts(config)
        self.recomputation = None  # or a dictionary: how minzero.recompute is to keep less of this block

    def forward(self, x, angles=None, mask=None):
        if self.recomputation is not None and torch.is_grad_enabled():
            return recompute(self.compute, x, angles, mask, **self.recomputation)
        return self.compute(x, angles, mask)

    def compute(self, x, angles, mask):
        """(B, T, C) -> (B, T, C), and how the experts were chosen, or None (see minzero/experts.py)."""
        normed = x if self.norms_follow else self.attention_norm(x)
        y = self.attention(normed, angles, mask)
        attended = x + (self.attention_norm(y) if self.norms_follow else y)

        x = x if self.parallel else attended
        normed = x if self.norms_follow else self.mlp_norm(x)
        y, routing = self.mlp(normed)
        return attended + (self.mlp_norm(y) if self.norms_follow else y), routing


class Head(nn.Linear):
    """The output layer: (B, T, C) -> logits (B, T, V), or with targets (B, T) their summed cross-entropy, or with
    for_each the log-probability of each, (B T,) float32."""

    cross_entropy = staticmethod(cross_entropy)

    def forward(self, x, targets=None, for_each=False):
        if targets is None:
            return super().forward(x)
        chunk = loss_chunk_tokens(self.out_features, x.is_cuda)
        x, targets = x.flatten(0, 1), targets.flatten()
        if for_each:
            return TokenLogProbabilities.apply(x, self.weight, targets, chunk)
        return LinearCrossEntropy.apply(x, self.weight, targets, chunk, torch.is_grad_enabled(), self.cross_entropy)


class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean cross-entropy in nats over
    the targets that are not IGNORE_INDEX, as a float32 scalar (0 if none counts).

    positions: (B, T) int64, of each token in its document, where rows hold several: a document begins where a position
    is 0, and no token attends to another document's. reference: (B, T), of rows that hold pairs of answers, as
    PairStream has it; the loss is then the mean that `preference` gives. Both preferably on the CPU, also for a model
    on a GPU."""

    def __init__(
        self, config, seed=1337, activation_checkpointing=0, activation_offload=False, kernels="torch", base_width=None
    ):
        """config: a ModelConfig. activation_checkpointing, activation_offload: as the keys of the train section.
        kernels: torch, or apex for its norms. base_width: train.mup_base_width."""
        super().__init__()
        self.config = config
        self.recomputation = Recomputation.of(activation_checkpointing)
        self.activation_offload = activation_offload
        self.is_compiled = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layer))
        for block in self.recomputation.of_blocks(self.blocks):
            block.recomputation = {"selective": self.recomputation.selective, "offload": activation_offload}
        self.final_norm = make_norm(config, kernels)
        self.routing_sum = None  # of experts, over the forward passes of training
        self.routing_passes = 0
        self.preference = None  # of pairs: a preference.Preference
        self.head = Head(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        # Seeded here, after torch's own initial values, which are not used: how many random numbers they take depends
        # on the precision. In the constructor and module by module through `apply`: where the weights are sharded as
        # they are made (ZeRO-3), only this reaches whole matrices.
        torch.manual_seed(seed)
        self.apply(functools.partial(self.init_weights, std_factors(self, config, base_width)))

    @torch.no_grad()
    def init_weights(self, factors, module):
        """Normal weights and zero biases; matrices that write to the residual stream start smaller by
        sqrt(2 n_layer), the number of terms of that sum (GPT-2, section 2.3)."""
        if not isinstance(module, nn.Linear | nn.Embedding | ExpertLinear):
            return
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        if module is self.head and self.config.tie_embeddings:
            return  # set as the embedding's
        std = self.config.init_std * factors[module]
        if getattr(module, "writes_to_residual", False):
            std /= math.sqrt(2 * self.config.n_layer)
        # drawn in float32 whatever the weight's type: bf16 starts from the same values, rounded
        module.weight.copy_(module.weight.float().normal_(std=std))

    def compile(self):
        """Compile in place the parts that repeat: the blocks, and the loss of one chunk. All blocks that keep the same
        share a graph, in which their recomputation is. DeepSpeed's hooks stay outside of the graphs, and so does the
        loop over chunks, which would be unrolled."""
        # the part of the activations that a graph keeps, of those that its backward pass would read; 1: all
        functorch_config.activation_memory_budget = self.recomputation.budget
        self.is_compiled = True
        for block in self.blocks:
            if self.activation_offload:  # the inputs that wait in CPU memory, and no weights, are kept by checkpoint
                block.compute = torch.compile(block.compute)
            else:
                block.forward = torch.compile(block.forward)
        self.head.cross_entropy = torch.compile(cross_entropy)
        torch.compiler.assume_constant_result(attention_backends)  # the compiler calls it, and does not trace it

    def forward(self, tokens, targets=None, positions=None, reference=None):
        config = self.config
        T = tokens.shape[1]
        if config.block_size < T:
            raise ValueError(f"{T} tokens are more than the model's block_size {config.block_size}")
        x = self.token_embedding(tokens)  # (B, T, C)
        places = torch.arange(T, device=x.device) if positions is None else positions.to(x.device, non_blocking=True)
        angles = None
        if config.position == "learned":
            x = x + self.position_embedding(places)
        else:
            angles = rotary_angles(config, T, x.device)
            if positions is not None:
                angles = tuple(part[places][:, None] for part in angles)  # (B, 1, T, R / 2)
        masks = self.masks(x, positions)
        x = F.dropout(x, config.dropout, self.training)
        routings = []  # of each block
        for layer, block in enumerate(self.blocks):
            layer_angles = angles if config.has_rotary(layer) else None
            x, routing = block(x, layer_angles, masks[config.window_of(layer)])
            routings.append(routing)
        x = self.final_norm(x)
        if targets is None:
            return self.head(x)
        if reference is None:
            loss = self.head(x, targets) / (targets != IGNORE_INDEX).sum().clamp(min=1)
        else:
            loss = self.loss_of_pairs(x, targets, reference)
        if config.n_expert and self.training:
            loss = self.with_router_losses(loss, torch.stack(routings))
        return loss

    def loss_of_pairs(self, x, targets, reference):
        """x: of the last norm, (B, T, C)."""
        numbers, by_reference = answers_of(reference, targets)
        of_tokens = torch.stack((self.head(x, targets, for_each=True), targets.flatten() != IGNORE_INDEX), dim=1)
        # in float64, where the order of additions, which a GPU leaves open, is not seen in the float32 of the loss
        sums = of_tokens.new_zeros(max(1, len(by_reference)), 2, dtype=torch.float64)
        sums = sums.index_add(0, numbers, of_tokens.double())[: len(by_reference)]
        return self.preference(sums[:, 0], by_reference, sums[:, 1])

    def masks(self, x, positions):
        """{sliding window of a layer: the mask that its attention takes}. x: embeddings, (B, T, C)."""
        config = self.config
        windows = {config.window_of(layer) for layer in range(config.n_layer)}
        if positions is not None:
            dropout = config.dropout if self.training else 0.0
            return attention_within(positions, windows, x, config.head_size, dropout, self.is_compiled)
        T = x.shape[1]
        return {window: window_mask(T, window, x.device) if window and window < T else None for window in windows}

    def with_router_losses(self, loss, routing):
        """The same value with the gradient of the router's losses added to it: what is reported stays the loss of
        prediction. Notes the routing, for `take_routing`."""
        self.routing_sum = routing.detach() + (0 if self.routing_sum is None else self.routing_sum)
        self.routing_passes += 1
        balance, square = router_losses(routing, self.config.balance_over == "layer")
        extra = self.config.balance_loss * balance + self.config.router_z_loss * square
        return loss + (extra - extra.detach())

    def take_routing(self):
        """The mean routing, (L, 3, E), of the forward passes in training since the last call; None without any."""
        mean = self.routing_sum / self.routing_passes if self.routing_passes else None
        self.routing_sum = None
        self.routing_passes = 0
        return mean
