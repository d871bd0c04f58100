"""Norms and steps of Adam: NVIDIA Apex's, DeepSpeed's and compiled ones against torch's. Rows of gpu.py: each function
is called in a process of its own, and returns its result."""

import functools
import statistics

import torch

from benchmarks.nanogpt import now, this_torch_device
from minzero.config.sections import ModelConfig
from minzero.engine import missing_apex, parameter_groups
from minzero.errors import UserError
from model import GPT, make_norm


def median_seconds(function, device, repeats=20):
    """Of one call, over so many after three that warm up."""
    seconds = []
    for _ in range(repeats + 3):
        began = now(device)
        function()
        seconds.append(now(device) - began)
    return statistics.median(seconds[3:])


def largest_difference(found, expected):
    """The largest difference between two lists of tensors, relative to each expected tensor's largest element."""
    differences = []
    for one, other in zip(found, expected, strict=True):
        differences.append((one.float() - other.float()).abs().max() / other.float().abs().max())
    return max(differences).item()


def check_apex(device):
    """Raises UserError if NVIDIA Apex cannot be used."""
    if reason := missing_apex():
        raise UserError(reason)
    if device.type != "cuda":
        raise UserError("Apex needs a GPU")


def comparison(torch_seconds, seconds, found, expected):
    """The result of a row: seconds of one call, and the tensors that both computed."""
    return {
        "torch_ms": torch_seconds * 1000,
        "rival_ms": seconds * 1000,
        "times_as_fast": torch_seconds / seconds,
        "largest_difference": largest_difference(found, expected),
    }


def compare_norms(config, norm, rival, tokens, width):
    """Forward and backward pass of torch's norm and of a rival, apex or compiled, on the same activations."""
    device = this_torch_device()
    if rival == "apex":
        check_apex(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = ModelConfig(n_embd=width, n_head=1, norm=norm)
    x, upstream = torch.randn(2, tokens, width, device=device, dtype=dtype).unbind()
    x.requires_grad_()

    def passes(run, weight):
        x.grad = weight.grad = None
        y = run(x)
        y.backward(upstream)
        return y.detach(), x.grad, weight.grad

    results = {}
    for kernels in ("torch", rival):
        module = make_norm(shape, "apex" if kernels == "apex" else "torch").to(device, dtype)
        # not module.compile(), which leaves torch's own modules as they are, without a word
        run = torch.compile(module) if kernels == "compiled" else module
        seconds = median_seconds(functools.partial(passes, run, module.weight), device)
        results[kernels] = seconds, passes(run, module.weight)
    (torch_seconds, expected), (seconds, found) = results["torch"], results[rival]
    return comparison(torch_seconds, seconds, found, expected)


def make_adam(name, groups, train):
    """An AdamW: apex's, deepspeed's, or a form of torch's (fused, foreach)."""
    settings = {"lr": train.lr, "betas": tuple(train.betas), "eps": train.eps}
    if name == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    if name == "deepspeed":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, **{name: True}, **settings)


def compare_adams(config, rival):
    """A step of torch's fused AdamW and of another over float32 weights of a model's shapes, and how far apart their
    weights are after ten steps with the same gradients."""
    device = this_torch_device()
    if rival == "apex":
        check_apex(device)
    elif rival == "deepspeed" and device.type != "cuda":
        raise UserError("DeepSpeed's FusedAdam for GPUs needs a GPU")
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in GPT(config.model).parameters()]

    def ten_steps(name):
        generator = torch.Generator(device).manual_seed(0)
        draw = functools.partial(torch.randn, device=device, generator=generator)
        weights = torch.nn.ParameterList(torch.nn.Parameter(0.02 * draw(shape)) for shape in shapes)
        optimizer = make_adam(name, parameter_groups(weights, config), config.train)
        for _ in range(10):
            for weight in weights:
                weight.grad = draw(weight.shape)
            optimizer.step()
        found = [weight.detach().clone() for weight in weights]
        return median_seconds(optimizer.step, device, 10), found

    torch_seconds, expected = ten_steps("fused")
    seconds, found = ten_steps(rival)
    return comparison(torch_seconds, seconds, found, expected)
