"""bf16, eager and compiled, against float32: losses and gradients of small models, one of each family. A row of gpu.py:
one process for all models of a list, because its start costs more than a model."""

import contextlib
import functools
import gc
import re
import time
import traceback
from unittest import mock

import torch
from torch.nn.attention import SDPBackend

import model as model_module
from benchmarks.kernels import median_seconds
from benchmarks.nanogpt import now, this_torch_device
from minzero import experts
from minzero.config.sections import ModelConfig
from minzero.document_attention import document_mask

ATTENTION = re.compile(
    r"(?:aten::_scaled_dot_product_(?:attention_)?|torch_attn::_)(math|flash|efficient|cudnn|fused|varlen)"
)
REPEATS = 5
NEVER = -32.0  # added to a logit


def parity(config, models, sequences, seconds):
    """Measure one model after the other. models: {title: {"options", "recompute"}}, see parity_models.py. seconds:
    after so many no further model is begun. Yields {"models": {title: result}} after each, with all so far."""
    began = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.config.suppress_errors = False  # what cannot be compiled is the result
    torch._dynamo.config.recompile_limit = 64  # as minzero.compiled
    results = {}
    for title, settings in models.items():
        results[title] = result = {}
        begun = time.monotonic()
        if begun - began > seconds:
            result["failed"] = "not begun: the time of this row is over"
        else:
            fill(result, settings, sequences)
            result["whole_seconds"] = time.monotonic() - begun
        yield {"models": results}


def fill(result, settings, sequences):
    """Put what is found into the result of one model; what raises is its `failed`, one line, and what was measured
    before stays."""
    phase = "the start"
    try:
        for done, found in measured(settings, sequences):
            result |= found
            phase = done
    except Exception as failure:
        lines = str(failure).strip().splitlines() or [""]
        line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # "backend='inductor' raised:"
        result["failed"] = f"after {phase}: {type(failure).__name__}: {line}"
        result["traceback"] = traceback.format_exc()[-4000:]  # for results.json
    torch.compiler.reset()  # or another model's sizes would be compiled as variable ones
    gc.collect()
    with contextlib.suppress(RuntimeError):  # after an illegal address nothing works, and what was found is kept
        torch.cuda.empty_cache()


def measured(settings, sequences):
    """Yields (the phase that is done, what it found), see the columns in gpu_report.py."""
    config = ModelConfig(**settings["options"])
    config.check()
    device = this_torch_device()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (sequences, config.block_size + 1), generator=generator).to(device)
    batch = tokens[:, :-1], tokens[:, 1:]
    if settings["documents"]:
        batch += (positions_of_documents(batch[0].shape, generator),)
    expected = reference(config, batch, device)
    yield "float32", {}

    gpt = make_model(config, batch[0].numel(), device, settings["recompute"])
    run = functools.partial(passes, gpt, batch)
    yield "eager", measured_passes("eager", run, expected, device)
    if config.n_expert:
        # one product for each expert in place of the grouped one, with the same rounding before it
        with mock.patch.object(experts, "has_grouped_product", lambda x, weight: False):
            found = measured_passes("loop", run, expected, device)
        yield "loop over experts", {name: found[name] for name in ("loop_gradients", "loop_ms")}
    graph_breaks = torch._dynamo.utils.counters["graph_break"].total()
    gpt.compile()
    began = now(device)
    run()
    found = {"compile_seconds": now(device) - began}
    found |= measured_passes("compiled", run, expected, device)
    found["graph_breaks"] = torch._dynamo.utils.counters["graph_break"].total() - graph_breaks
    yield "compiled", found


def positions_of_documents(shape, generator):
    """The position of each token in its document, int64 of this shape, (B, T), on the CPU as train.py has them; each
    token begins a document with a chance of one in 40."""
    places = torch.arange(shape[1]).expand(shape)
    begins = torch.rand(shape, generator=generator) < 1 / 40
    begins[:, 0] = True
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def make_model(config, n_tokens, device, recompute=False):
    """A GPT in bf16 for batches of n_tokens, always with the same weights; norms and biases are not all ones and zeros,
    which would hide a confusion of them."""
    with device:
        gpt = model_module.GPT(config, activation_checkpointing=recompute)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    if config.n_expert:
        for block in gpt.blocks:
            fix_choices(block.mlp, n_tokens, generator, device)
    return gpt.to(torch.bfloat16)


def fix_choices(mixture, n_tokens, generator, device):
    """Have the router of a minzero.experts.Experts send each token to experts drawn here, with the weights that it
    finds: rounding would send a few tokens to others, and hide with that whatever else differs. The first expert gets
    no token where there are enough others."""
    router, k = mixture.router, mixture.n_expert_per_token
    scores = torch.rand(n_tokens, router.out_features, generator=generator)
    if k < router.out_features:
        scores[:, 0] = 0
    penalty = torch.full_like(scores, NEVER).scatter_(1, scores.topk(k).indices, 0.0)
    router.register_buffer("penalty", penalty.to(device))
    router.register_forward_hook(add_penalty)


def add_penalty(router, inputs, logits):
    return logits + router.penalty  # 0 where a token is to go: nothing is rounded there


def passes(gpt, batch):
    """Forward and backward pass; returns the loss, on its device."""
    gpt.zero_grad(set_to_none=True)
    loss = gpt(*batch)
    loss.backward()
    return loss.detach()


def outcome(run):
    """The loss of a pass, and {name: gradient}, on the CPU in float32."""
    loss = run().item()
    gradients = {name: parameter.grad.float().cpu() for name, parameter in run.args[0].named_parameters()}
    return loss, gradients


def reference(config, batch, device):
    """`outcome` in float32 from the weights as bf16 holds them, eager, with attention as plain products, between
    documents by a mask."""
    gpt = make_model(config, batch[0].numel(), device).float()
    with (
        mock.patch.object(model_module, "attention_backends", lambda device: [SDPBackend.MATH]),
        mock.patch.object(model_module, "attention_within", masked),
    ):
        return outcome(functools.partial(passes, gpt, batch))


def masked(positions, windows, x, *_):
    """In place of minzero.document_attention.attention_within: masks alone."""
    return {window: document_mask(positions.to(x.device), window) for window in windows}


def measured_passes(mode, run, expected, device):
    """The differences from the expected outcome, whether a second pass gives the same bits, attention's kernel, the
    median time and the peak memory, under keys that begin with the mode's name."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss, gradients = outcome(run)
    found = {"loss": abs(loss - expected[0]) / abs(expected[0])}
    found["gradients"], found["worst"], found["worst_name"] = apart(gradients, expected[1])
    _, again = outcome(run)
    found["repeated"] = apart(again, gradients)[0]
    found["repeated_otherwise"] = [name for name, one in again.items() if not torch.equal(one, gradients[name])]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {match[1] for event in profile.key_averages() if (match := ATTENTION.match(event.key))}
    found["attention"] = "+".join(sorted(names)) or "plain products"
    found["ms"] = 1000 * median_seconds(run, device, REPEATS)
    if device.type == "cuda":
        found["allocated_bytes"] = torch.cuda.max_memory_allocated()
    return {f"{mode}_{name}": value for name, value in found.items()}


def apart(found, expected):
    """How far gradients are from others: the norm of all differences relative to the norm of all, and the same of the
    parameter that is furthest off, with its name. One that is nearly zero is compared with a thousandth of the
    largest. Raises ValueError for a gradient that is not finite."""
    sizes = {name: gradient.norm() for name, gradient in expected.items()}
    differences = {name: (found[name] - gradient).norm() for name, gradient in expected.items()}
    if wrong := next((name for name, size in differences.items() if not size.isfinite()), None):
        raise ValueError(f"the gradient of {wrong} is not finite")
    least = 1e-3 * max(sizes.values())
    relative = {name: (size / torch.maximum(sizes[name], least)).item() for name, size in differences.items()}
    worst = max(relative, key=relative.get)
    whole = torch.stack(list(differences.values())).norm() / torch.stack(list(sizes.values())).norm()
    return whole.item(), relative[worst], worst
