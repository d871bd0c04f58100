"""Attention within documents: rows hold several, one after the other, and no token attends to another document's.

Shapes in comments: B rows of T tokens, H query heads and K key-value heads of D channels."""

import itertools
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from minzero.sizes import MOST_HEAD_SIZE

VARLEN_SHARES_HEADS = TorchVersion(torch.__version__) >= "2.12"  # whether varlen_attn has enable_gqa


def window_mask(T, window, device):
    """Which tokens each token attends to, (T, T): itself and those before it, at most `window` of them."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril_().triu_(1 - window)


def first_tokens(positions):
    """Which tokens begin a document, (B, T) bool: those at position 0, and the first of each row. positions: (B, T)."""
    first = positions == 0
    first[:, 0] = True
    return first


def document_mask(positions, window=None):
    """Which tokens each token attends to, (B, 1, T, T): those of its document that are not after it, at most `window`
    of them. positions: (B, T), of each token in its document."""
    numbers = first_tokens(positions).cumsum(dim=1)  # of a token's document in its row
    same = numbers[:, :, None] == numbers[:, None, :]
    T = positions.shape[1]
    return (same & window_mask(T, window or T, positions.device))[:, None]


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch are, for implementations of attention that take one after the other."""

    starts: torch.Tensor  # (N + 1,) int32: of N documents in the B * T tokens, and last B * T
    window: int | None  # tokens that a token attends to, itself included; None: all before it

    def attend(self, q, k, v, dropout=0.0):
        """Causal attention of queries (B, H, T, D) to keys and values (B, K, T, D). Returns (B, H, T, D)."""
        B, _, T, _ = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, heads, D)
        attend = self.by_varlen if q.is_cuda else self.one_by_one
        return attend(q, k, v, T, dropout).unflatten(0, (B, T)).transpose(1, 2)

    def by_varlen(self, q, k, v, T, dropout):
        """By torch's variable-length flash attention: 16 bits, on GPUs, without dropout."""
        from torch.nn.attention.varlen import varlen_attn  # here: it imports torch's compiler, which takes a second

        shared = q.shape[1] // k.shape[1]
        options = {"enable_gqa": shared > 1} if VARLEN_SHARES_HEADS else {}
        if shared > 1 and not VARLEN_SHARES_HEADS:
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        options["window_size"] = (self.window - 1 if self.window else -1, 0)
        return varlen_attn(q, k, v, self.starts, self.starts, T, T, **options)

    def one_by_one(self, q, k, v, T, dropout):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, B * T, D)
        shares_heads = q.shape[1] != k.shape[1]
        parts = []
        for start, end in itertools.pairwise(self.starts.tolist()):
            of = slice(start, end)
            is_short = self.window is None or end - start <= self.window
            mask = None if is_short else window_mask(end - start, self.window, q.device)
            options = {"attn_mask": mask, "is_causal": is_short, "dropout_p": dropout, "enable_gqa": shares_heads}
            parts.append(F.scaled_dot_product_attention(q[:, :, of], k[:, :, of], v[:, :, of], **options))
        return torch.cat(parts, dim=2)[0].transpose(0, 1)


def attention_within(positions, windows, x, head_size, dropout, is_compiled):
    """How tokens attend within their documents, for layers with each of these windows: {window: Documents, or a mask
    (B, 1, T, T)}. positions: (B, T) of tokens in their documents; on the CPU, so that a GPU is not waited for. windows:
    numbers of tokens, or None. x: a tensor of the attention's type, on its device. dropout: of attention's weights.

    torch 2.13 has variable-length attention for GPUs in 16 bits alone, and the loop over documents would be unrolled
    by the compiler; else all products of a row are computed, and masked."""
    T = positions.shape[1]
    on_gpu = x.is_cuda
    fits_varlen = x.dtype in (torch.float16, torch.bfloat16) and not dropout and head_size <= MOST_HEAD_SIZE
    one_after_the_other = fits_varlen if on_gpu else not is_compiled
    if not one_after_the_other:
        positions = positions.to(x.device, non_blocking=True)
        return {window: document_mask(positions, window) for window in windows}
    starts = first_tokens(positions).flatten().nonzero()[:, 0]
    starts = torch.cat((starts, starts.new_tensor([positions.numel()]))).int().to(x.device, non_blocking=True)
    if on_gpu:
        torch._dynamo.maybe_mark_dynamic(starts, 0)  # the number of documents is another one in each batch
    return {window: Documents(starts, window if window and window < T else None) for window in windows}
