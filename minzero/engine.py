"""The DeepSpeed engine: the model with its optimizer, precision, kernels and compilation, and the checks before."""

import importlib.util
import os
from pathlib import Path

import deepspeed
import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig

from minzero import adapters, four_bit, lora
from minzero.compiled import compile_model
from minzero.config.deepspeed import check_together, offload_device, offload_ratio, offloads_optimizer, zero_stage
from minzero.config.sections import Recomputation
from minzero.errors import UserError
from minzero.files import make_folder
from minzero.muon import Muon, matrices_of
from minzero.mup import rate_factor, role_of, width_ratio
from minzero.sizes import count_parameters, moment_bytes
from minzero.zero import copy_into, set_prefetch, torch_linear, undo_trial_step
from model import GPT, Block


def resolve_precision(precision, device):
    """train.precision -> bf16, fp16 or fp32. Raises UserError for one that this device does not support."""
    if precision == "auto":
        if device.type == "cpu":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    accelerator = deepspeed.accelerator.get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not supported[precision]:
        names = ", ".join(name for name in supported if supported[name])
        raise UserError(f"train.precision: found {precision}, but this device ({device.type}) can: {names}")
    return precision


def prepare_nvme(key, folder):
    """Make the folder of files into which DeepSpeed offloads. Raises UserError if it could not write them."""
    from torch.utils.cpp_extension import CUDA_HOME  # here: it looks for compilers

    if torch.cuda.is_available() and CUDA_HOME is None and not installed_ops.get("async_io"):
        raise UserError(
            f"{key}.device: nvme needs the CUDA toolkit (nvcc), with which DeepSpeed compiles its reader of files; set "
            "CUDA_HOME to its folder, or set it to cpu"
        )
    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            f"{key}.device: nvme needs a C++ compiler and libaio's headers (packages g++ and libaio-dev, or "
            "libaio-devel); install them, or set it to cpu"
        )
    make_folder(f"{key}.nvme_path", folder)


def check_deepspeed(ds_config):
    """Check a complete DeepSpeed configuration: first what depends on this machine, making the folders of nvme offload,
    then by DeepSpeed's own checks, which it would make when the engine is built. Raises UserError of one line."""
    zero = ds_config.get("zero_optimization", {})
    check_together(ds_config, next((name for name in ("bf16", "fp16") if ds_config[name]["enabled"]), "fp32"))
    if offload_ratio(zero) != 1 and "torch_adam" in ds_config["optimizer"]["params"]:
        raise UserError(
            f"deepspeed.zero_optimization.offload_optimizer.ratio: found {offload_ratio(zero)}, expected 1 where there "
            "is no GPU to keep the rest"
        )
    for name in ("offload_optimizer", "offload_param"):
        if offload_device(zero, name) == "nvme":
            prepare_nvme(f"deepspeed.zero_optimization.{name}", zero[name]["nvme_path"])
    # DeepSpeed may not know the number of ranks yet, and would refuse a batch that does not fit to one rank
    without_batch = {name: value for name, value in ds_config.items() if name != "train_batch_size"}
    try:
        DeepSpeedConfig(without_batch)
    except Exception as error:  # deepspeed_keys.py knows its keys, so this is a fault of ours, or of another DeepSpeed
        raise UserError(
            f"deepspeed: DeepSpeed {deepspeed.__version__} refuses this section ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); its keys: {', '.join(ds_config)}"
        ) from None


def memory_per_rank(device):
    """Bytes of a GPU's memory, or without GPUs one rank's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks


def check_memory(config, ds_config, available, on_gpu, world_size):
    """Raises UserError, in place of the allocator's traceback, for a model, micro-batch or buffer that is larger than
    the memory of a rank. A lower bound of what a rank needs; plan.py computes the whole. available: the memory of a
    rank in bytes."""
    needs = least_memory(config, ds_config, on_gpu, world_size)
    if sum(needs.values()) > available:
        largest = max(needs, key=needs.get)
        raise UserError(
            f"{largest} need {needs[largest] / 2**30:,.1f} GiB of a rank's memory, which has {available / 2**30:,.1f} "
            "GiB in all; plan.py CONFIG --fit finds a setting that fits"
        )


def least_memory(config, ds_config, on_gpu, world_size):
    """{what, in words: bytes} that a rank needs in the memory of its device, at least. Empty for a model with an option
    that no formula knows."""
    model, train = config.model, config.train
    zero = ds_config.get("zero_optimization", {})
    stage = zero_stage(ds_config)
    width = 4 if precision_of(ds_config) == "fp32" else 2  # bytes of a weight
    try:
        parameters, _ = count_parameters(model)
    except UserError:
        return {}

    in_device_memory = ("none",) if on_gpu else ("none", "cpu")
    weights = moments = bucket = 0
    if offload_device(zero, "offload_param") in in_device_memory:
        packed = adapters.count_of(model) if config.lora.base_bits else 0
        weights = (parameters - packed) * width // (world_size if stage == 3 else 1) + int(packed * adapters.BYTES)
    if offload_device(zero, "offload_optimizer") in in_device_memory:
        trained = adapters.count_adapters(model, config.lora) or parameters
        moments = int(trained * moment_bytes(model, train.optimizer)) // (world_size if stage else 1)
    if stage and zero.get("contiguous_gradients", True):
        bucket = zero.get("reduce_bucket_size", 5 * 10**8)  # elements

    # of each token its id, and its embedding with the gradient
    tokens = train.micro_batch_size * model.block_size
    batch = tokens * (8 + 2 * model.n_embd * width)
    of_model = f"model: {parameters:,} parameters and their optimizer, at stage {stage} on {world_size} ranks,"
    of_batch = f"train.micro_batch_size: {train.micro_batch_size} sequences of {model.block_size} tokens"
    of_bucket = f"deepspeed.zero_optimization.reduce_bucket_size: {bucket:,} elements"
    return {of_model: weights + moments, of_batch: batch, of_bucket: bucket * width}


def missing_apex():
    """Why NVIDIA Apex cannot be used, or None if it can. Imports nothing."""
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
    """train.kernels -> ("apex" or "torch", the reason). Raises UserError if Apex is asked for and cannot be used."""
    faults = []
    if device.type != "cuda":
        faults.append(f"Apex needs a GPU, and this device is {device.type}")
    if missing := missing_apex():
        faults.append(missing)
    if wanted == "apex" and faults:
        raise UserError(f"train.kernels: found apex, but {'; '.join(faults)}; or set train.kernels to auto or torch")
    if wanted == "torch":
        return "torch", "asked for"
    if faults:
        return "torch", faults[0]
    return "apex", "NVIDIA Apex is installed"


def count_real_parameters(module):
    """The number of a model's own parameters, each counted once and whole, without adapters: under ZeRO-3 a rank holds
    a placeholder whose ds_numel is the number of elements."""
    own = (parameter for name, parameter in module.named_parameters() if not adapters.is_adapter(name))
    unpacked = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in own)
    return unpacked + four_bit.count_quantized(module)


def whole_shape(parameter):
    """Under ZeRO-3 a parameter is an empty placeholder, whose true shape is ds_shape."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_groups(model, config, matrices=()):
    """The optimizer's groups, each with its weight decay, and with its peak rate over train.lr as "relative_rate" if
    that is not 1: biases and the weights of norms, which are vectors and do not decay, are the last; the others are
    matrices and embeddings. Frozen weights are in none. matrices: names of the parameters that are Muon's."""
    train = config.train
    ratio = width_ratio(config.model, train.mup_base_width)
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        settings = {"weight_decay": train.weight_decay}
        is_vector = len(whole_shape(parameter)) < 2
        if is_vector:
            settings = {"weight_decay": 0.0}
        elif name in matrices:
            settings |= {"momentum": train.muon_momentum, "relative_rate": train.muon_lr / train.lr}
        elif ratio != 1 and role_of(name) != "input":
            # AdamW takes away rate x decay of a weight; that product stays the same at every width
            factor = rate_factor(role_of(name), ratio)
            settings = {"weight_decay": train.weight_decay / factor, "relative_rate": factor}
        group = groups.setdefault((is_vector, *settings.items()), {"params": [], **settings})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]  # stable


def muon(model, config):
    """Muon's optimizer for these weights, with torch's AdamW for those that are not its own."""
    train = config.train
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: matrices_of(config.model, name, whole_shape(parameter)) for name, parameter in parameters.items()}
    matrices = {name: parts for name, parts in found.items() if parts}
    groups = parameter_groups(model, config, matrices)
    return Muon(groups, matrices, lr=train.lr, betas=tuple(train.betas), eps=train.eps, fused=True)


def apex_adam(groups, train):
    """NVIDIA Apex's AdamW, adapted to ZeRO-3."""
    from apex.optimizers import FusedAdam

    optimizer = FusedAdam(groups, lr=train.lr, betas=tuple(train.betas), eps=train.eps, adam_w_mode=True)
    return step_piece_by_piece(optimizer)


def step_piece_by_piece(optimizer):
    """Adapt an optimizer that counts steps once a group, and fails on a group without parameters: ZeRO-3 calls it with
    one tensor of one group at a time and empties the other groups. Before each call, the tensor's own step count is
    copied into its group, and empty groups are hidden. Returns the optimizer."""
    all_groups = []

    def before(optimizer, *_):
        all_groups[:] = optimizer.param_groups
        optimizer.param_groups = [group for group in all_groups if group["params"]]
        for group in optimizer.param_groups:
            group["step"] = optimizer.state[group["params"][0]].get("step", 0)

    def after(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if optimizer.state[parameter]:  # it makes no moments where there is no gradient
                    optimizer.state[parameter]["step"] = group["step"]
        optimizer.param_groups = list(all_groups)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def own_grad_norm(engine):
    """The norm of the gradient over all parameters that are trained, where this rank has all of it."""
    trained = (parameter.grad for parameter in engine.module.parameters() if parameter.requires_grad)
    return float(torch.nn.utils.get_total_norm(list(trained)))


def precision_of(ds_config):
    """bf16, fp16 or fp32."""
    return next((name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled")), "fp32")


def build_engine(config, ds_config, device, kernels="torch", compiled=False, load_weights=None, load_adapters=None):
    """Make the model and its optimizer, and hand both to DeepSpeed. Returns its engine. Under ZeRO-3 each matrix is
    sharded as soon as it is made, so that no rank ever holds the whole model. The initial weights are the same bit for
    bit whatever the stage and the number of ranks.

    kernels: apex or torch. load_weights: what trained.open_weights gives, if they are not random. load_adapters: the
    same of adapters, where config.lora says that they are trained."""
    train = config.train
    stage = zero_stage(ds_config)

    # ---- the model
    # compiled, no gathered weights are kept either way, and torch 2.11 compiles DeepSpeed's linear wrongly; selective
    # recomputation would add a bias again that it adds in place
    if compiled or Recomputation.of(train.activation_checkpointing).selective:
        zero = ds_config.get("zero_optimization", {}) | {"memory_efficient_linear": False}
        ds_config = ds_config | {"zero_optimization": zero}
        torch_linear()

    def sharded():
        return deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=stage == 3)

    quantized = config.lora.base_bits is not None
    # a whole model that is quantised is made in CPU memory, and reaches the device in 4 bits
    with sharded(), torch.device("cpu") if quantized and stage < 3 else device:
        how = train.activation_checkpointing, train.activation_offload, kernels, train.mup_base_width
        model = GPT(config.model, train.seed, *how)
    if load_weights:
        copy_into(model, load_weights)
    if quantized:
        four_bit.quantize_blocks(model, precision_of(ds_config), device)
    if config.lora.rank:
        with sharded(), device:
            lora.add_adapters(model, config.lora, train.seed)
        if load_adapters:
            copy_into(model, load_adapters, adapters.is_adapter)
    if compiled:
        compile_model(model)
    if stage == 3:  # a block's weights are gathered at once, by two hooks, and outside of its graph
        deepspeed.utils.set_z3_leaf_modules(model, [Block])

    # ---- the optimizer: DeepSpeed makes it by ds_config, or it is Muon, or Apex's
    groups = optimizer = None
    if train.optimizer == "muon":
        optimizer = muon(model, config)
    else:
        groups = parameter_groups(model, config)
        # at stage 0 in 16 bits DeepSpeed wraps Apex's in another way, which zero.py does not know
        if kernels == "apex" and stage and not offloads_optimizer(ds_config):
            optimizer = apex_adam(groups, train)
    if optimizer:
        ds_config = {name: section for name, section in ds_config.items() if name != "optimizer"}

    # ---- the engine
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=groups, config=ds_config)
    undo_trial_step(engine)
    if train.optimizer == "muon":
        optimizer.attach(engine)
    if stage == 3:
        set_prefetch(engine, ds_config["zero_optimization"].get("stage3_prefetch_bucket_size", 5e7))
    return engine
