"""nanoGPT's model and training step, from a copy of github.com/karpathy/nanoGPT, to compare with ours."""

import contextlib
import importlib.util
import io
import statistics
import sys
import time

import torch

import model
import train
from minzero import metrics
from minzero.benchmark import speeds
from minzero.config.deepspeed import gradient_accumulation
from minzero.data.mixture import Mixture

CPU = torch.device("cpu")


def this_torch_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now(device):
    """Seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_rate(dtype, device=CPU, width=1024, number=4):
    """FLOP/s of so many products of width x width matrices."""
    left, right = torch.randn(2, width, width, device=device).to(dtype)
    started = now(device)
    for _ in range(number):
        left @ right
    return number * 2 * width**3 / (now(device) - started)


# ---- its model and its step


def load_nanogpt(path, config, device=CPU):
    """nanoGPT's model of this shape. path: its model.py, which prints the number of parameters: that is dropped."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in names})).to(device)


def copy_weights(ours, theirs):
    """The weights of our GPT into nanoGPT's, whose shapes are the same."""
    modules = {
        "token_embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }
    of_a_block = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.proj": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for number in range(len(ours.blocks)):
        for name, their_name in of_a_block.items():
            modules[f"blocks.{number}.{name}"] = f"transformer.h.{number}.{their_name}"
    with torch.no_grad():
        for name, their_name in modules.items():
            theirs.get_submodule(their_name).load_state_dict(ours.get_submodule(name).state_dict())


def nanogpt_passes(run, micro_batches, precision):
    """Forward and backward pass of nanoGPT over the micro-batches of one step, pairs of inputs and targets, as its
    train.py does them. run: its model, or that compiled. Returns the mean loss, on its device."""
    total = 0
    for tokens, targets in micro_batches:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = run(tokens, targets)[1] / len(micro_batches)
        loss.backward()
        total += loss.detach()
    return total


def nanogpt_optimizer(gpt, train_config, device=CPU):
    """nanoGPT's own AdamW, and its update: clipping, step, gradients dropped."""
    betas = tuple(train_config.betas)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = gpt.configure_optimizers(train_config.weight_decay, train_config.lr, betas, device.type)

    def update():
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), train_config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return optimizer, update


def nanogpt_step(config, path, precision, compiled=False, tanh_gelu=False):
    """nanoGPT's model with our initial weights, and its step over the batches that train.py would take. tanh_gelu:
    GPT-2's tanh form of GELU in place of the exact one, so that it computes what ours does. Returns a function:
    number of the step -> its mean loss, on the device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as its train.py
    device, shape = this_torch_device(), config.model
    gpt = load_nanogpt(path, shape, device)
    with device:
        copy_weights(model.GPT(shape, config.train.seed), gpt)
    if tanh_gelu:
        for block in gpt.transformer.h:
            block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    optimizer, update = nanogpt_optimizer(gpt, config.train, device)
    run = torch.compile(gpt) if compiled else gpt
    data = Mixture(config.data.path, "train", shape.block_size, shape.vocab_size, config.train.seed)
    accumulation, size = gradient_accumulation(config, 1), config.train.micro_batch_size

    def step(number):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(config.train, number * config.train.global_batch_tokens)
        batches = data.batches((number - 1) * accumulation * size, 0, 1, size, accumulation)
        loss = nanogpt_passes(run, [train.to_device(batch, device) for batch in batches], precision)
        update()
        return loss

    return step


# ---- rows of gpu.py: each is called in a process of its own, and returns its result


def products(config, width, number):
    """How fast the device multiplies large bf16 matrices, the median of five times."""
    rates = [product_rate(torch.bfloat16, this_torch_device(), width, number) for _ in range(6)]
    return {"flops_per_second": statistics.median(rates[1:])}  # the first warms up


def nanogpt_speed(config, path, precision, compiled, steps, warmup):
    """Speed and memory of a step of nanoGPT, under the keys of benchmark.measure."""
    device = this_torch_device()
    step = nanogpt_step(config, path, precision, compiled)
    seconds = []
    for number in range(1, warmup + steps + 1):
        began = now(device)
        step(number)
        seconds.append(now(device) - began)
    result = speeds(seconds[warmup:], config.train.global_batch_tokens)
    device_name = "cpu"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name()
        result["allocated_bytes"] = torch.cuda.max_memory_allocated()
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
    rates = metrics.throughput(config, result["tokens_per_second"], 1, device_name)
    return result | {key: rates[key] for key in ("tflops", "mfu")}


def nanogpt_losses(config, path, precision, steps):
    """The mean loss of each of the first steps."""
    step = nanogpt_step(config, path, precision, tanh_gelu=True)
    return {"losses": [step(number).item() for number in range(1, steps + 1)]}
