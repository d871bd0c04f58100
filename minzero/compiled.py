"""torch.compile: whether it works here, whether it computes the same, and what of a run is not compiled after all."""

import dataclasses
import logging

import torch
from deepspeed import comm

from minzero.zero import DTYPES, torch_linear
from model import GPT

# -- before the run --------------------------------------------------------------------------------


def run_once(model):
    """One forward and backward pass of a small model, on tokens that are always the same. Returns its loss and
    {parameter's name: gradient in float32}."""
    length = model.config.block_size
    device = model.head.weight.device
    tokens = torch.arange(2 * length, device=device).view(2, length) * 7 % model.config.vocab_size
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = model(tokens, tokens.roll(1, dims=1))
    loss.backward()
    return loss.item(), {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def fault_of_compiled(model):
    """Compile a small model and compare it with itself before. Returns the difference in words, or None if it computes
    the same. A compiler that computes something else would spoil the run, and nobody would see why."""
    loss, gradients = run_once(model)
    model.compile()
    compiled_loss, compiled_gradients = run_once(model)
    tolerance = 0.01 if model.head.weight.dtype == torch.float32 else 0.2  # far above rounding, far below a fault
    if not abs(compiled_loss - loss) <= 0.1 * tolerance * abs(loss):
        return f"compiled, a small model's loss is {compiled_loss:.4f}, and else {loss:.4f}"
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, expected in gradients.items():
        difference = (compiled_gradients[name] - expected).norm() / torch.maximum(expected.norm(), 1e-3 * largest)
        if not difference <= tolerance:
            return f"compiled, a small model's gradient of {name} is {difference:.2g} of its size off"
    return None


def why_not_compiled(wanted, config, device, kernels, precision="fp32", zero=None, recomputation=0, offload=False):
    """Try torch.compile on a small model. Returns None if it works on every rank and computes the same as
    the model that is not compiled, else the reason to run eagerly. It takes seconds, where a failure in the middle of
    a step would cost the run.

    wanted: train.compile. config: a ModelConfig. zero: the config's section zero_optimization. recomputation, offload:
    train.activation_checkpointing and train.activation_offload. Every rank must call this; where one fails, all get a
    reason."""
    if wanted is False:
        return "not asked for"
    if wanted == "auto" and device.type != "cuda":
        return "on CPU it gains little"
    if (zero or {}).get("memory_efficient_linear") is True:
        return "deepspeed.zero_optimization.memory_efficient_linear is true, and torch 2.11 compiles it wrongly"
    if (zero or {}).get("stage") and (odd := odd_width(config)):
        return f"{odd} is no multiple of 8, and a weight would begin at an address that the compiler does not expect"
    torch_linear()
    torch._dynamo.config.suppress_errors = False  # an engine of this process may have set it
    error = None
    try:
        with device:
            error = fault_of_small_model(config, DTYPES[precision], kernels, recomputation, offload)
    except Exception as failure:
        error = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
    torch.compiler.reset()  # or the true sizes would count as a change, and be compiled as variable ones
    failed = torch.tensor(float(error is not None), device=device)
    comm.all_reduce(failed, op=comm.ReduceOp.MAX)
    return error or ("it failed on another rank" if failed.item() else None)


def odd_width(config):
    """The first of the widths of a model's matrices that is no multiple of 8, in words, or None. ZeRO's stages put
    weights one after the other into a common buffer; 8 of them in 16 bits are the 16 bytes that compiled code reads
    at once, and the compiler looks at the address of the first block's weights only."""
    widths = {"model.n_embd": config.n_embd, "the MLP's width": config.mlp_width}
    widths["the width of queries,"] = config.n_head * config.head_size
    widths["the width of keys and values,"] = config.kv_heads * config.head_size
    if config.qk_norm == "head":
        widths["the width of a head,"] = config.head_size
    return next((f"{name} {width}" for name, width in widths.items() if width % 8), None)


def small_config(config):
    """A ModelConfig with the same options and small sizes. It has one layer, or where the layers are of several kinds
    two: one with rotary positions and a sliding window, and one without."""
    small = {"n_layer": 1, "n_embd": 16 * config.n_head, "mlp_hidden": None, "block_size": 32, "vocab_size": 64}
    small["sliding_window"] = config.sliding_window and 8
    if config.n_expert:  # all experts of each token: which ones it goes to would depend on a rounding error
        small["n_expert"] = small["n_expert_per_token"] = min(config.n_expert, 4)
    if config.rotary_fraction < 1:
        small["head_dim"] = config.head_size  # or too few channels would be rotated
    for name in ("no_rotary_layers", "full_attention_layers"):
        if getattr(config, name):
            small |= {"n_layer": 2, name: [1]}
    return dataclasses.replace(config, **small)


def fault_of_small_model(config, dtype, kernels, recomputation, offload):
    """`fault_of_compiled` of a small model with the same options. Raises whatever the compiler raises."""
    config = small_config(config)
    options = {"activation_checkpointing": recomputation, "activation_offload": offload, "kernels": kernels}
    error = fault_of_compiled(GPT(dataclasses.replace(config, dropout=0.0), **options).to(dtype))
    if config.dropout:  # compiled, it drops other activations, so nothing can be compared
        model = GPT(config, **options).to(dtype)
        model.compile()
        run_once(model)
    return error


# -- in the run ------------------------------------------------------------------------------------


class Failures(logging.Filter):
    """Takes out of the compiler's log the records of parts that run uncompiled, with tracebacks of many lines, until
    they are reported; later ones are left in the log."""

    def __init__(self):
        super().__init__()
        self.collects = False
        self.reasons = []  # of each such part, in one line

    def filter(self, record):
        if record.levelno < logging.WARNING or not self.collects:
            return True
        error = record.exc_info[1] if record.exc_info else None
        lines = str(error or record.getMessage()).strip().splitlines() or [""]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # "backend='inductor' raised:"
        self.reasons.append(f"{type(error).__name__}: {reason}" if error else reason)
        return False


failures = Failures()
logging.getLogger("torch._dynamo.convert_frame").addFilter(failures)
# of selective recomputation it says what to look out for; fault_of_compiled looks
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


def compile_model(model):
    """Compile a GPT in place. What cannot be compiled runs eagerly, and `failure_in_words` tells."""
    torch._dynamo.config.suppress_errors = True
    # a block has a graph for each kind of layer (rotary or not, window or not), recomputed or not, training or not, and
    # with several lengths some more; above the limit, 8 by default, it would run uncompiled
    torch._dynamo.config.recompile_limit = 64
    failures.reasons.clear()
    failures.collects = True
    model.compile()


def failure_in_words():
    """Which parts of the model run uncompiled so far, though the small model of `why_not_compiled` was compiled, in one
    line, or None. What fails later is left to the compiler's own log."""
    failures.collects = False
    if not failures.reasons:
        return None
    return f"{len(failures.reasons)} parts could not be compiled and run without; the first: {failures.reasons[0]}"
