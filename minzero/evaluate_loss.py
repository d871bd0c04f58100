"""The validation loss during a run: over some windows, with any number of ranks."""

import torch
from torch import distributed

from minzero.sizes import IGNORE_INDEX


def to_device(arrays, device):
    """NumPy batches -> tensors on the device; the copy to a GPU overlaps with its work."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


@torch.no_grad()
def evaluate(model, stream, wanted_tokens, micro_batch_size, device, rank=0, world_size=1, progress=lambda: None):
    """Mean cross-entropy in nats per token, over validation windows that are the same at every call and on
    any number of ranks. All ranks run the same number of forward passes (ZeRO-3's gathers are collective): a rank
    with too few windows is padded with windows that do not count.

    stream: the validation Mixture or TokenStream. wanted_tokens: about as many are evaluated, in whole windows.
    progress: called before each forward pass. Every rank must call this."""
    windows = stream.validation_windows(wanted_tokens // stream.block_size)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of targets
    model.eval()
    for first in range(0, len(windows), micro_batch_size * world_size):
        progress()
        start = first + rank * micro_batch_size
        mine = windows[start : start + micro_batch_size]
        padded = list(mine) + [windows[0]] * (micro_batch_size - len(mine))
        tokens, targets = to_device(stream.batch(padded), device)
        targets[len(mine) :] = IGNORE_INDEX
        count = (targets != IGNORE_INDEX).sum()
        totals[0] += model(tokens, targets).double() * count
        totals[1] += count
    model.train()
    if world_size > 1:
        distributed.all_reduce(totals)
    return (totals[0] / totals[1]).item()
