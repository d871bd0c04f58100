"""The model and its optimizer, in DeepSpeed's hands: precision, kernels, compilation, parameter groups."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig

from minzero.config import UserError, check_together, offload_device, offload_ratio, offloads_optimizer, zero_stage
from minzero.data.shards import make_folder
from minzero.sizes import count_parameters
from minzero.zero import copy_into, stage_0_masters, torch_linear
from model import GPT, Block

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision, device):
    """bf16, fp16 or fp32. Raises UserError for one that this device cannot."""
    if precision == "auto":
        if device.type == "cpu":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    accelerator = deepspeed.accelerator.get_accelerator()
    able = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not able[precision]:
        names = ", ".join(name for name in able if able[name])
        raise UserError(f"train.precision: found {precision}, but this device ({device.type}) can: {names}")
    return precision


def check_nvme(key, folder):
    """Raises UserError if DeepSpeed could not keep something in files of this folder."""
    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            f"{key}.device: nvme needs a C++ compiler and libaio's headers (packages g++ and libaio-dev, or "
            "libaio-devel); install them, or set it to cpu"
        )
    make_folder(f"{key}.nvme_path", folder)


def check_deepspeed(ds_config):
    """Check a complete DeepSpeed configuration for what depends on this machine, and then as DeepSpeed will when the
    engine is built, but with one line for the user at the end. Raises UserError."""
    zero = ds_config.get("zero_optimization", {})
    check_together(ds_config, next((name for name in ("bf16", "fp16") if ds_config[name]["enabled"]), "fp32"))
    if offload_ratio(zero) != 1 and "torch_adam" in ds_config["optimizer"]["params"]:
        raise UserError(
            f"deepspeed.zero_optimization.offload_optimizer.ratio: found {offload_ratio(zero)}, expected 1 where there "
            "is no GPU to keep the rest"
        )
    for name in ("offload_optimizer", "offload_param"):
        if offload_device(zero, name) == "nvme":
            check_nvme(f"deepspeed.zero_optimization.{name}", zero[name]["nvme_path"])
    # DeepSpeed may not know the number of ranks yet, and would refuse a batch that does not fit to one rank
    without_batch = {name: value for name, value in ds_config.items() if name != "train_batch_size"}
    try:
        DeepSpeedConfig(without_batch)
    except Exception as error:  # config.py knows its keys, so this is a fault of ours, or of another DeepSpeed
        raise UserError(
            f"deepspeed: DeepSpeed {deepspeed.__version__} refuses this section ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); its keys: {', '.join(ds_config)}"
        ) from None


def memory_of(device):
    """Bytes of a GPU's memory, or of this machine's that are one rank's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks


def check_memory(config, ds_config, device, world_size):
    """Raises UserError for a model, micro-batch or buffer that is larger than the memory of a rank: one line in place
    of the allocator's traceback. A lower bound of what a rank needs; plan.py says what it takes."""
    model, train, zero = config.model, config.train, ds_config.get("zero_optimization", {})
    stage = zero_stage(ds_config)
    width = 2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else 4
    try:
        parameters, _ = count_parameters(model)
    except UserError:  # an option that no formula knows yet
        return
    here = ("none",) if device.type == "cuda" else ("none", "cpu")
    weights = moments = bucket = 0
    if offload_device(zero, "offload_param") in here:
        weights = parameters * width // (world_size if stage == 3 else 1)
    if offload_device(zero, "offload_optimizer") in here:
        moments = parameters * 8 // (world_size if stage else 1)  # Adam's two in float32
    if stage and zero.get("contiguous_gradients", True):
        bucket = zero.get("reduce_bucket_size", 5 * 10**8)
    tokens = train.micro_batch_size * model.block_size
    sequences = f"{train.micro_batch_size} sequences of {model.block_size} tokens"
    needs = {
        f"model: {parameters:,} parameters and their optimizer, at stage {stage} on {world_size} ranks,": weights
        + moments,
        # the ids, and the embeddings with their gradient
        f"train.micro_batch_size: {sequences}": tokens * (8 + 2 * model.n_embd * width),
        f"deepspeed.zero_optimization.reduce_bucket_size: {bucket:,} elements": bucket * width,
    }
    there, (what, need) = memory_of(device), max(needs.items(), key=lambda item: item[1])
    if sum(needs.values()) > there:
        raise UserError(
            f"{what} need {need / 2**30:,.1f} GiB of a rank's memory, which has {there / 2**30:,.1f} GiB in all; "
            "plan.py CONFIG --fit finds a setting that fits"
        )


def missing_apex():
    """Why NVIDIA Apex cannot be used, or None if it can. Looks without importing anything."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "NVIDIA Apex is not installed; it is built from source, github.com/NVIDIA/apex"
    if not any((Path(folder) / "normalization").is_dir() for folder in found.submodule_search_locations or []):
        return "the installed package apex is not NVIDIA's but an unrelated one of that name; pip uninstall apex"
    extensions = [name for name in ("amp_C", "fused_layer_norm_cuda") if importlib.util.find_spec(name) is None]
    if extensions:
        return f"NVIDIA Apex is installed without its CUDA extensions {' and '.join(extensions)}; build it with them"
    return None


def choose_kernels(wanted, device):
    """train.kernels -> ("apex" or "torch", why so). Raises UserError if Apex is asked for and cannot be had."""
    reason = missing_apex()
    if device.type != "cuda":
        reason = f"Apex needs a GPU, and this device is {device.type}" + (f"; {reason}" if reason else "")
    if wanted == "apex" and reason:
        raise UserError(f"train.kernels: found apex, but {reason}; or set train.kernels to auto or torch")
    if wanted == "torch" or reason:
        return "torch", reason or "asked for"
    return "apex", "NVIDIA Apex is installed"


def count_real_parameters(module):
    """How many parameters a model has, each counted once and whole: under ZeRO-3 a rank holds a stand-in with
    ds_numel, the number of elements."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def parameter_groups(model, weight_decay):
    """Decay matrices and embeddings; spare biases and the weights of norms, which are vectors. Under
    ZeRO-3 a parameter here is an empty stand-in whose true shape is ds_shape."""
    decayed, spared = [], []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) >= 2 else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def apex_adam(groups, train):
    """NVIDIA Apex's AdamW, made fit for ZeRO-3."""
    from apex.optimizers import FusedAdam

    optimizer = FusedAdam(groups, lr=train.lr, betas=tuple(train.betas), eps=train.eps, adam_w_mode=True)
    return step_piece_by_piece(optimizer)


def step_piece_by_piece(optimizer):
    """For an optimizer that counts steps in its groups and expects all of them to hold parameters: ZeRO-3 hands
    it one piece of one group at a time and empties the others. Here a piece's own count stands in its
    group while it is updated, so that none runs ahead, and empty groups are out of the way."""
    everything = []

    def before(optimizer, *_):
        everything[:] = optimizer.param_groups
        optimizer.param_groups = [group for group in everything if group["params"]]
        for group in optimizer.param_groups:
            group["step"] = optimizer.state[group["params"][0]].get("step", 0)

    def after(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if optimizer.state[parameter]:  # it makes no moments where there is no gradient
                    optimizer.state[parameter]["step"] = group["step"]
        optimizer.param_groups = list(everything)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def pass_through(model):
    """The loss of a small model on tokens that are always the same, and its gradients by their parameters' names."""
    length, device = model.config.block_size, model.head.weight.device
    tokens = torch.arange(2 * length, device=device).view(2, length) * 7 % model.config.vocab_size
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = model(tokens, tokens.roll(1, dims=1))
    loss.backward()
    return loss.item(), {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def fault_of_compiled(model):
    """Compile a small model. How it then differs from itself before, in words; None if it computes the same. A
    compiler that computes something else would spoil the run, and nobody would see why."""
    loss, gradients = pass_through(model)
    model.compile()
    compiled_loss, compiled_gradients = pass_through(model)
    tolerance = 0.01 if model.head.weight.dtype == torch.float32 else 0.2  # far above rounding, far below a fault
    if not abs(compiled_loss - loss) <= 0.1 * tolerance * abs(loss):
        return f"compiled, a small model's loss is {compiled_loss:.4f}, and else {loss:.4f}"
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, expected in gradients.items():
        difference = (compiled_gradients[name] - expected).norm() / torch.maximum(expected.norm(), 1e-3 * largest)
        if not difference <= tolerance:
            return f"compiled, a small model's gradient of {name} is {difference:.2g} of its size off"
    return None


def why_not_compiled(wanted, config, device, kernels, precision="fp32", zero=None):
    """None if the model is to be compiled, else the reason: that it was not asked for, or how a small model of the same
    parts failed, or came to compute something else, on this or another rank. zero: DeepSpeed's section
    zero_optimization. Every rank must call this, and all get an answer of the same kind. Costs seconds, where a failure
    in the middle of a step would cost the run."""
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return "not asked for" if wanted is False else "on CPU it gains little"
    if (zero or {}).get("memory_efficient_linear"):
        return "deepspeed.zero_optimization.memory_efficient_linear is true, and torch 2.11 compiles it wrongly"
    torch_linear()
    small = {"n_layer": 1, "n_embd": 16 * config.n_head, "mlp_hidden": None, "block_size": 32, "vocab_size": 64}
    config = dataclasses.replace(config, **small)
    error = None
    try:
        with device:
            error = fault_of_compiled(
                GPT(dataclasses.replace(config, dropout=0.0), kernels=kernels).to(DTYPES[precision])
            )
            if config.dropout:  # which draws other numbers when compiled, so nothing can be compared
                model = GPT(config, kernels=kernels).to(DTYPES[precision])
                model.compile()
                pass_through(model)
    except Exception as failure:
        error = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
    torch.compiler.reset()  # or the true sizes would count as a change, and be compiled as variable ones
    failed = torch.tensor(float(error is not None), device=device)
    comm.all_reduce(failed, op=comm.ReduceOp.MAX)
    return error or ("it failed on another rank" if failed.item() else None)


def build_engine(config, ds_config, device, kernels="torch", compiled=False, load_weights=None):
    """The model and its optimizer, in DeepSpeed's hands. Under ZeRO-3 each matrix is sharded as soon as it
    is made, so that no rank ever holds the whole model. The weights are the same bit for bit whatever the
    stage and the number of ranks; load_weights: what trained.open_weights gives, if they are not random."""
    train, sharded = config.train, zero_stage(ds_config) == 3
    if compiled:  # the graphs keep no gathered weights either way, and torch 2.11 compiles DeepSpeed's linear wrongly
        zero = ds_config.get("zero_optimization", {}) | {"memory_efficient_linear": False}
        ds_config = ds_config | {"zero_optimization": zero}
        torch_linear()
    with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=sharded), device:
        model = GPT(config.model, train.seed, int(train.activation_checkpointing), train.checkpoints_on_cpu, kernels)
    if load_weights:
        copy_into(model, load_weights)
    if compiled:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled after all runs as it is
        if sharded:  # a block's weights are gathered at once, before its graph, which no hook then breaks
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        model.compile()
    groups, optimizer = parameter_groups(model, train.weight_decay), None
    # at stage 0 in 16 bits DeepSpeed wraps Apex's in another way, which zero.py does not know
    if kernels == "apex" and zero_stage(ds_config) and not offloads_optimizer(ds_config):
        optimizer = apex_adam(groups, train)
        ds_config = {name: section for name, section in ds_config.items() if name != "optimizer"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=groups, config=ds_config)
    if hasattr(engine.optimizer, "fp32_groups"):
        # at stage 0 in 16 bits DeepSpeed has tried the optimizer: the step is counted and the weights have decayed
        engine.basic_optimizer.state.clear()
        masters = stage_0_masters(engine)
        for parameter in engine.module.parameters():
            masters[id(parameter)].data.copy_(parameter.data)
    return engine
