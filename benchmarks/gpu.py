"""What only a GPU can show, all of it by one command, and as much of it as the time allows.

    python benchmarks/gpu.py --out FOLDER [--nanogpt PATH/TO/nanoGPT/model.py] [--data FOLDER]
                             [--parts speed kernels memory offload planner convergence]
                             [--first N] [--rows NAME ...] [--minutes 9] [--again] [--beside] [--tiny]

speed: 124M and 1.5B parameters, against nanoGPT's model and step, and what single choices cost. kernels: NVIDIA
Apex's and DeepSpeed's against torch's. memory: minGPT's table, and the deepest model that fits. offload: what its
settings cost. planner: plan.py's predicted memory against what was allocated. convergence: the losses of ZeRO's
stages and of nanoGPT's step on the same batches.

Each part is a list of measurements, the most important first (--first N: only so many of each; --rows: only these).
Every measurement is a process of its own: a run of train.py, as benchmark.py makes them, or of a function of this file.
The time that is left is shared out evenly among the parts to come, and what is not done by then is ended.
--beside: other measurements run on the GPU at the same time, so no times are kept.
FOLDER/results.json is written after every measurement, and the same command continues with what is missing (--again:
also with what failed). FOLDER/report.md has all tables and their conditions. --tiny shrinks models and steps, and
is for two CPU cores: it shows that everything runs, and its figures mean nothing.
"""

import copy
import dataclasses
import functools
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmark
import plan
from minzero.config import (
    ROOT,
    Config,
    UserError,
    build,
    git_commit,
    gradient_accumulation,
    load_config,
    merge,
    run_command,
)
from minzero.data.mixture import Mixture
from minzero.data.shards import write_shard
from minzero.files import make_folder, write_atomically, write_json
from minzero.flags import FlagParser, a_number, a_path, at_least
from minzero.sizes import flops_per_token, peak_flops
from plan import with_choice

ENDLESS = 10**9  # steps of a run that is ended from outside
LEAST_SECONDS = 15  # what no measurement is shorter than: with less time left, none is begun
PUBLISHED = {"1p7b": "5.1 GiB", "10b": "26 GiB"}  # "for 1 GPU": README of SeanNaren/minGPT
EXTENSIONS = Path(tempfile.gettempdir()) / f"minzero_extensions_{os.getuid()}"  # what DeepSpeed compiles
TIMES = {"step_seconds", "slowest_seconds", "all_step_seconds", "tokens_per_second", "tflops", "mfu"}
VOCABULARY = 50304  # nanoGPT's: GPT-2's 50,257 ids, up to a multiple of 64


@dataclasses.dataclass
class Row:
    """One measurement: a run of train.py (config), or of a function of this file in a process of its own
    (function, arguments), or the reason why there is neither."""

    name: str
    title: str
    config: Config | None = None
    steps: int = 8
    warmup: int = 3
    switch: str | None = None  # a name in SWITCHES
    environment: dict = dataclasses.field(default_factory=dict)
    function: str | None = None  # a name in FUNCTIONS
    arguments: dict = dataclasses.field(default_factory=dict)
    impossible: str | None = None
    facts: dict = dataclasses.field(default_factory=dict)  # goes into the result


@dataclasses.dataclass
class Bench:
    """This machine, what is wanted, and what was measured."""

    gpus: int
    gpu_bytes: int
    cpu_bytes: int
    tiny: bool = False
    nanogpt: Path | None = None
    data: Path | None = None
    temporary: Path | None = None  # for what is gone when the command ends
    rows: dict = dataclasses.field(default_factory=dict)  # results: {"part/name": ...}

    @property
    def precision(self):
        return "bf16" if self.gpus else "fp32"

    def config(self, name, micro_batch_size, accumulation=1, stage=0, model=None, zero=None, **train):
        """configs/<name>.json for a short run on one device; tiny if that is wanted."""
        sections = load_config([str(ROOT / "configs" / f"{name}.json")]).to_dict()
        model = dict(model or {})
        if self.tiny:
            micro_batch_size, accumulation = min(micro_batch_size, 2), min(accumulation, 2)
            small = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 512}
            model = {key: min(value, model.get(key, value)) for key, value in small.items()}
            model |= {"n_kv_head": None, "mlp_hidden": None}
        model = merge(sections["model"], model)
        tokens = micro_batch_size * accumulation * model["block_size"]
        train |= {"micro_batch_size": micro_batch_size, "global_batch_tokens": tokens, "max_tokens": ENDLESS * tokens}
        wanted = {"model": model, "train": train}
        wanted["deepspeed"] = {"zero_optimization": {"stage": stage} | (zero or {})}
        return build(merge(sections, wanted), "benchmarks/gpu.py")

    def planned(self, config):
        """plan.py's plan of a configuration on one GPU of this machine."""
        return plan.plan(config, 1, 1, self.gpu_bytes, None, None, plan.Assumptions())

    def why_not(self, config):
        """Why a configuration cannot run here, so that nothing has to be killed to find out; None if it can."""
        found = self.planned(config)
        for what, needed, there in (
            ("GPU", found["gpu_bytes"], self.gpu_bytes),
            ("CPU", found["cpu_bytes_range"][0], self.cpu_bytes),
        ):
            if needed > there:
                needed, there = plan.in_units(needed), plan.in_units(there)
                return f"not started: plan.py says {needed} of {what} memory at the least, and there are {there}"
        return None

    def deepest(self, config, certain_of_cpu=True):
        """The configuration with the most layers that fits into this machine's GPU and CPU memory. certain_of_cpu: even
        if every pinned block is rounded up to a power of two."""

        def planned(candidate):
            if self.tiny and candidate.model.n_layer > 3:
                return {"fits": False}
            found = self.planned(candidate)
            cpu_bytes = found["cpu_bytes_range"][certain_of_cpu]
            return {"fits": found["fits"] and cpu_bytes <= plan.USABLE * self.cpu_bytes}

        config = copy.deepcopy(config)
        config.model.n_layer = max(1, plan.deepest(config, planned))
        return config


# ---- the parts: each yields its rows, the most important first


def speed(bench):
    """GPT-2 124M: the step of nanoGPT and ours; 1.5B and a Llama of 1B; one choice at a time; micro-batches."""
    small = functools.partial(bench.config, "gpt2-124m", model={"vocab_size": VOCABULARY})
    for compiled in (True, False):
        mode = "compiled" if compiled else "eager"
        config = small(32, 8)
        row = nanogpt_row(bench, f"nanogpt_{mode}", f"nanoGPT, {mode}", "nanogpt_speed", config, compiled=compiled)
        yield dataclasses.replace(row, steps=6)
        for stage in (0, 3, 2):
            title = f"ours, ZeRO-{stage}, {mode}"
            yield Row(f"stage{stage}_{mode}", title, small(32, 8, stage, compile=compiled, kernels="torch"), steps=6)
    yield from larger_models(bench)
    for name, stage in (("profile", 0), ("profile_stage3", 3)):
        profiled = small(32, 8, stage, compile=True, kernels="torch", profile="4:5")
        yield Row(name, f"ours, ZeRO-{stage}, compiled, profiled", profiled, steps=4)
    yield from choices(small)
    candidates = [small(size, 256 // size, compile=True) for size in (128, 64, 16, 8, 4)]
    fitting = [config for config in candidates if bench.planned(config)["fits"]]
    for place, config in enumerate(fitting[:3]):
        title = f"ours, ZeRO-0, compiled, micro-batch {'the largest by plan.py' if not place else 'smaller'}"
        yield Row(f"batch{place}", title, config, steps=4)


def larger_models(bench):
    """1.5B parameters, with dropout and without, and a Llama of 1.1B, at the largest micro-batch that fits."""
    for model, name, recompute, changes, title in (
        ("1p5b", "1p5b_0", False, {}, "1.5B, ZeRO-3, nothing recomputed"),
        ("1p5b", "1p5b_no_dropout", False, {"dropout": 0.0}, "1.5B, ZeRO-3, nothing recomputed, no dropout"),
        ("llama-1b", "llama_1b", False, {}, "Llama of 1.1B, ZeRO-3, nothing recomputed"),
        ("1p5b", "1p5b_1", True, {}, "1.5B, ZeRO-3, every block recomputed"),
        ("1p5b", "1p5b_stage1", False, {"dropout": 0.0}, "1.5B, ZeRO-1, nothing recomputed, no dropout"),
    ):
        stage = 1 if name.endswith("stage1") else 3
        config = bench.config(model, 1, 32, stage, changes, kernels="torch")
        sizes = plan.micro_batches(config, 1)
        candidates = [with_choice(config, stage, "none", recompute, size) for size in sizes]
        _, config = plan.first_that_fits(candidates, bench.planned)
        if config:
            yield Row(name, title, config, steps=4, warmup=2)


def choices(small):
    """GPT-2 124M compiled: one choice at a time, ZeRO-2 and ZeRO-3, against `base2` and `base3` of the same batch."""
    two = functools.partial(small, 32, 4, 2, compile=True, kernels="torch")
    three = functools.partial(small, 32, 4, 3, compile=True, kernels="torch")
    yield Row("base2", "ZeRO-2, compiled, torch's norms and fused AdamW", two())
    yield Row("apex", "ZeRO-2, compiled, Apex's norms and FusedAdam", small(32, 4, 2, compile=True, kernels="apex"))
    for switch, title in (
        ("deepspeed_adam", "DeepSpeed's FusedAdam"),
        ("torch_attention", "attention in torch's own order"),
        ("whole_loss", "all logits at once"),
        ("large_chunks", "logits of 16,384 tokens at a time, not of 4,096"),
        ("whole_model", "one graph for the whole model"),
        ("collection_held", "Python's garbage collection held"),
    ):
        yield Row(switch, f"ZeRO-2, compiled, {title}", two(), switch=switch)
    yield Row("base3", "ZeRO-3, compiled, torch's norms and fused AdamW", three())
    for name, title, zero in (
        ("overlap_comm", "overlap_comm", {"overlap_comm": True}),
        ("not_contiguous", "gradients not gathered in one buffer", {"contiguous_gradients": False}),
        ("kept", "weights kept whole", {"stage3_param_persistence_threshold": 10**9}),
    ):
        yield Row(name, f"ZeRO-3, compiled, {title}", three(zero=zero))
    accumulated = three()
    accumulated.deepspeed["data_types"] = {"grad_accum_dtype": "fp32"}
    yield Row("fp32_sums", "ZeRO-3, compiled, gradients summed in fp32", accumulated)
    yield Row(
        "collection_held3", "ZeRO-3, compiled, Python's garbage collection held", three(), switch="collection_held"
    )
    eager = small(32, 4, 3, compile=False, kernels="torch")
    yield Row("leaf_blocks", "ZeRO-3, eager, each block gathered at once", eager, switch="leaf_blocks")
    yield Row("base3_eager", "ZeRO-3, eager, torch's norms and fused AdamW", eager)
    apex = small(32, 4, 3, compile=False, kernels="apex")
    yield Row("apex_eager", "ZeRO-3, eager, Apex's norms and FusedAdam", apex)
    published = two(model={"vocab_size": 50257})
    yield Row("ids_50257", f"ZeRO-2, compiled, 50,257 ids, computed as {VOCABULARY:,}", published)
    yield Row("unpadded", "ZeRO-2, compiled, 50,257 ids, computed as they are", published, switch="unpadded")
    yield Row(
        "small_chunks", "ZeRO-2, compiled, logits of 1,024 tokens at a time, not of 4,096", two(), switch="small_chunks"
    )
    yield Row("tuned", "ZeRO-2, compiled, inductor's coordinate descent tuning", two(), switch="tuned")
    yield Row("base2_again", "ZeRO-2, compiled, as the first of these rows: what repeats", two())


def nanogpt_row(bench, name, title, function, config, **arguments):
    """A row by nanoGPT's model, if its file was given."""
    if not bench.nanogpt:
        return Row(name, title, impossible="needs --nanogpt, the model.py of a copy of github.com/karpathy/nanoGPT")
    arguments |= {"path": str(bench.nanogpt), "precision": bench.precision}
    return Row(name, title, config, function=function, arguments=arguments)


def kernels(bench):
    """Norms, forward and backward, and steps of Adam, at the shapes of two models."""
    shapes = {"124M": bench.config("gpt2-124m", 16), "1.5B": bench.config("1p5b", 8)}
    for norm in ("layernorm", "rmsnorm"):
        for size, config in shapes.items():
            tokens, width = config.train.global_batch_tokens, config.model.n_embd
            for rival in ("apex", "compiled"):
                title = f"{norm} of {tokens:,} x {width:,}: {rival}"
                arguments = {"norm": norm, "rival": rival, "tokens": tokens, "width": width}
                yield Row(f"{norm}_{size}_{rival}", title, function="compare_norms", arguments=arguments)
    for size, config in shapes.items():
        for rival in ("apex", "deepspeed", "foreach"):
            title = f"a step of AdamW over {size} parameters: {rival}"
            yield Row(f"adam_{size}_{rival}", title, config, function="compare_adams", arguments={"rival": rival})


def memory(bench):
    """minGPT's models at its settings, a sequence of 128 tokens at a time; then the deepest that this machine holds.
    Published: what its README requires "for 1 GPU", without saying which kind of offload (fp16, 65 token ids)."""
    choices = (
        ("zero3", "none", False),
        ("offload", "optimizer", False),
        ("offload_checkpointing", "optimizer", True),
        ("offload_all", "param", True),
    )
    titles = ("ZeRO-3", "optimizer on CPU", "optimizer on CPU, recomputed", "all on CPU, recomputed")
    for name, published in PUBLISHED.items():
        facts = {} if bench.tiny else {"published": published}
        config = bench.config(name, 1, model={"block_size": 128})
        for (choice, offload, recompute), title in zip(choices, titles, strict=True):
            chosen = with_choice(config, 3, offload, recompute, 1)
            more = {"impossible": bench.why_not(chosen), "facts": facts, "steps": 3, "warmup": 1}
            yield Row(f"{name}_{choice}", f"{name}, {title}", chosen, **more)
    config = bench.config("10b", 1, model={"block_size": 128})
    for name, offload, certain in (("gpu", "none", True), ("all", "param", True), ("all_bold", "param", False)):
        deep = bench.deepest(with_choice(config, 3, offload, True, 1), certain)
        title = f"the deepest of 10b's width, {'all on CPU' if offload == 'param' else 'on the GPU alone'}: "
        title += f"{deep.model.n_layer} layers" + ("" if certain else ", if no pinned block is rounded up")
        yield Row(f"deepest_{name}", title, deep, steps=2, warmup=1, impossible=bench.why_not(deep))


def offload(bench):
    """As many layers of 10b's width as CPU memory holds for certain, optimizer and parameters on the CPU."""
    deepest = bench.deepest(with_choice(bench.config("10b", 4), 3, "param", True, 4)).model.n_layer

    def row(name, title, accumulation=4, threads=None, optimizer=None, both=None, parameters=True):
        zero = {"offload_optimizer": {"device": "cpu"} | (optimizer or {}) | (both or {})}
        if parameters:
            zero["offload_param"] = {"device": "cpu"} | (both or {})
        config = bench.config("10b", 4, accumulation, 3, {"n_layer": deepest}, zero, activation_checkpointing=True)
        environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        title = f"{config.model.n_layer} layers, {accumulation} micro-batch{'es' * (accumulation > 1)}{title}"
        return Row(name, title, config, 3, 1, environment=environment, impossible=bench.why_not(config))

    yield row("base", "")
    yield row("accumulation_1", "", accumulation=1)
    yield row("pin_memory", ", pin_memory", both={"pin_memory": True})
    yield row("accumulation_16", "", accumulation=16)
    cores = len(os.sched_getaffinity(0))
    for threads in sorted({max(1, cores // 4), max(1, cores // 2)}):
        yield row(f"threads_{threads}", f", OMP_NUM_THREADS {threads} of {cores} cores", threads=threads)
    yield row("optimizer_alone", ", parameters on the GPU", parameters=False)
    for ratio in (0.5, 0.8):
        yield row(f"ratio_{ratio}", f", ratio {ratio} of the optimizer on CPU", optimizer={"ratio": ratio})


def planner(bench):
    """GPT-2 774M in 14 settings: stage, what is offloaded, blocks recomputed, micro-batch, compiled."""
    for stage, place, recompute, size, compiled in (
        (3, "none", 0, 4, False),
        (0, "none", 0, 4, False),
        (2, "none", 0, 4, False),
        (1, "none", 0, 4, False),
        (3, "none", 1, 32, False),
        (3, "none", 2, 16, False),
        (3, "none", 0, 16, False),
        (1, "none", 0, 8, False),
        (1, "none", 1, 32, False),
        (3, "none", 0, 4, True),
        (1, "none", 0, 4, True),
        (2, "optimizer", 0, 4, False),
        (3, "optimizer", 1, 4, False),
        (3, "param", 1, 4, False),
    ):
        config = bench.config("gpt2-774m", size, 2, compile=compiled)
        config = with_choice(config, stage, place, recompute, config.train.micro_batch_size)
        title = f"ZeRO-{stage}, micro-batch {size}"
        title += {"none": "", "optimizer": ", optimizer on CPU", "param": ", all on CPU"}[place]
        title += {0: "", 1: ", every block recomputed", 2: ", every 2nd recomputed"}[recompute]
        title += ", compiled" if compiled else ""
        name = f"stage{stage}_{place}_{recompute}_{size}_{'compiled' if compiled else 'eager'}"
        yield Row(name, title, config, steps=2, warmup=1, impossible=bench.why_not(config))


def convergence(bench):
    """GPT-2 124M from the same weights on the same batches; all losses are kept."""
    steps = 3 if bench.tiny else 40

    def row(name, title, stage, kernels="torch", compiled=False, **sections):
        train = {"compile": compiled, "lr": 1e-4, "schedule": "constant", "kernels": kernels}
        config = bench.config("gpt2-124m", 16, 2, stage, {"vocab_size": VOCABULARY}, sections.get("zero"), **train)
        config.train.warmup_tokens = 10 * config.train.global_batch_tokens
        config.deepspeed |= sections.get("more", {})
        return Row(name, title, config, steps=steps, warmup=0)

    first = row("stage3", "ZeRO-3", 3)
    title = "nanoGPT's step, with GELU's tanh form"
    yield first
    yield nanogpt_row(bench, "nanogpt", title, "nanogpt_losses", first.config, steps=steps)
    yield row("stage0", "ZeRO-0", 0)
    yield row("stage1", "ZeRO-1", 1)
    yield row("stage3_compiled", "ZeRO-3, compiled", 3, compiled=True)
    yield row("stage3_again", "ZeRO-3, once more: what repeats", 3)
    yield row("stage3_apex", "ZeRO-3, Apex's norms and FusedAdam", 3, kernels="apex")
    yield row("stage3_overlap", "ZeRO-3, overlap_comm", 3, zero={"overlap_comm": True})
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    yield row("stage3_sums", "ZeRO-3, gradients summed in fp32", 3, more=sums)


PARTS = {
    "speed": speed,
    "kernels": kernels,
    "memory": memory,
    "offload": offload,
    "planner": planner,
    "convergence": convergence,
}


# ---- measuring


def unlock_extensions():
    """Have what DeepSpeed compiles at first use kept in a folder of this command, and remove the locks there: a process
    that is ended while it compiles leaves its lock behind, and every later one would wait for it for ever."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(EXTENSIONS)
    for lock in EXTENSIONS.rglob("lock"):
        lock.unlink()


def measure_row(bench, row, seconds, folder):
    """The result of one row, within these seconds, as a dictionary; `failed` is why there is none."""
    unlock_extensions()
    result = {"title": row.title} | row.facts
    if row.impossible:
        return result | {"failed": row.impossible}
    if row.config:
        row.config.data.path = data_for(bench)
        result |= {"micro_batch_size": row.config.train.micro_batch_size, "n_layer": row.config.model.n_layer}
        result |= {"flops_per_token": flops_per_token(row.config.model)}
        result |= {"global_batch_tokens": row.config.train.global_batch_tokens}
    if row.function:
        return result | in_a_process(bench, row, seconds, folder)
    steps, warmup = (min(row.steps, 2), min(row.warmup, 1)) if bench.tiny and row.warmup else (row.steps, row.warmup)
    launching = {"seconds": seconds, "environment": row.environment}
    if row.switch:
        launching["program"] = ("benchmarks/gpu.py", "--switch", row.switch)
    if row.config.train.profile:
        config, last = benchmark.as_measured(row.config, folder), row.config.train.profile_steps[1]
        _, failed = benchmark.launch(config, 1, last + 2, folder, bool(bench.gpus), **launching)
        tables = sorted((folder / "profile").glob("*.txt"))
        return result | {"failed": failed, "profile": tables[0].read_text() if tables else None}
    return result | benchmark.measure(row.config, 1, steps, warmup, folder, bool(bench.gpus), **launching)


def in_a_process(bench, row, seconds, folder):
    """What the row's function returns, called in a process of its own."""
    folder.mkdir()
    steps, warmup = (2, 1) if bench.tiny and "steps" not in row.arguments else (row.steps, row.warmup)
    timing = {"steps": steps, "warmup": warmup} if row.function == "nanogpt_speed" else {}
    call = {"function": row.function, "arguments": timing | row.arguments}
    call["config"] = row.config.to_dict() if row.config else None
    write_json(folder / "call.json", call)
    command = [sys.executable, __file__, "--call", folder / "call.json", folder / "result.json"]
    code = benchmark.run_until(lambda: False, command, folder / "log", seconds, row.environment)
    if code == 0:
        return json.loads((folder / "result.json").read_text()) | {"failed": None}
    return {"failed": benchmark.why_it_ended((folder / "log").read_text(), code)}


def data_for(bench):
    """The folder of the data: the one that was given, else tokens that follow a rule, each 1 to 3 above the last, made
    when first asked for."""
    if bench.data:
        return str(bench.data)
    path = bench.temporary / "data"
    if not path.exists():
        path.mkdir()
        steps = np.random.default_rng(0).integers(1, 4, 2**23 if bench.gpus else 2**20)
        for split in ("train", "val"):
            write_shard(path / f"{split}_000000.bin", (np.cumsum(steps) % 512).astype(np.uint16))
    return str(path)


# ---- what a process of its own measures: called with the row's configuration and arguments, returns its result


def this_torch_device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def products(config, width, number):
    """How fast the device multiplies large bf16 matrices, the median of five times."""
    import torch

    from tests.bench_model import product_rate

    rates = [product_rate(torch.bfloat16, this_torch_device(), width, number) for _ in range(6)]
    return {"flops_per_second": statistics.median(rates[1:])}  # the first warms up


def nanogpt_step(config, path, precision, compiled=False, tanh_gelu=False):
    """nanoGPT's model with our initial weights, and its step over the batches that train.py would take. tanh_gelu:
    GPT-2's tanh form of GELU in place of the exact one, so that it computes what ours does. Returns a function:
    number of the step -> its mean loss, on the device."""
    import torch

    import model
    import train
    from tests.bench_model import load_nanogpt, nanogpt_optimizer, nanogpt_passes

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as its train.py
    device, shape = this_torch_device(), config.model
    gpt = load_nanogpt(path, shape, device)
    with device:
        copy_weights(model.GPT(shape, config.train.seed), gpt)
    for block in gpt.transformer.h if tanh_gelu else ():
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    optimizer, update = nanogpt_optimizer(gpt, config.train, device)
    run = torch.compile(gpt) if compiled else gpt
    data = Mixture(config.data.path, "train", shape.block_size, shape.vocab_size, config.train.seed)
    accumulation, size = gradient_accumulation(config, 1), config.train.micro_batch_size

    def step(number):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(config.train, number * config.train.global_batch_tokens)
        batches = data.batches(number - 1, 0, 1, size, accumulation)
        loss = nanogpt_passes(run, [train.to_device(batch, device) for batch in batches], precision)
        update()
        return loss

    return step


def copy_weights(ours, theirs):
    """The weights of our GPT into nanoGPT's, whose shapes are the same."""
    import torch

    names = {"attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj"}
    names |= {"mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    modules = {"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe"}
    modules |= {"final_norm": "transformer.ln_f", "head": "lm_head"}
    for number in range(len(ours.blocks)):
        modules |= {f"blocks.{number}.{name}": f"transformer.h.{number}.{their}" for name, their in names.items()}
    with torch.no_grad():
        for name, their in modules.items():
            theirs.get_submodule(their).load_state_dict(ours.get_submodule(name).state_dict())


def nanogpt_speed(config, path, precision, compiled, steps, warmup):
    """What a step of nanoGPT costs, in the words of benchmark.measure."""
    import torch

    from minzero import metrics
    from tests.bench_model import now

    device, step, seconds = this_torch_device(), nanogpt_step(config, path, precision, compiled), []
    for number in range(1, warmup + steps + 1):
        began = now(device)
        step(number)
        seconds.append(now(device) - began)
    mean, name = statistics.mean(seconds[warmup:]), "cpu"
    result = {"step_seconds": mean, "slowest_seconds": max(seconds[warmup:]), "all_step_seconds": seconds[warmup:]}
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        result |= {"allocated_bytes": torch.cuda.max_memory_allocated()}
        result |= {"reserved_bytes": torch.cuda.max_memory_reserved()}
    rates = metrics.throughput(config, mean, 1, name)
    return result | {key: rates[key] for key in ("tokens_per_second", "tflops", "mfu")}


def nanogpt_losses(config, path, precision, steps):
    step = nanogpt_step(config, path, precision, tanh_gelu=True)
    return {"losses": [step(number).item() for number in range(1, steps + 1)]}


def median_seconds(function, device, repeats=20):
    """Of one call, over so many after three that warm up."""
    from tests.bench_model import now

    seconds = []
    for _ in range(repeats + 3):
        began = now(device)
        function()
        seconds.append(now(device) - began)
    return statistics.median(seconds[3:])


def largest_difference(found, expected):
    """The largest difference between two lists of tensors, relative to each expected tensor's largest element."""
    return max(
        ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()
        for one, other in zip(found, expected, strict=True)
    )


def need_apex():
    from minzero.engine import missing_apex

    if reason := missing_apex():
        raise UserError(reason)
    if this_torch_device().type != "cuda":
        raise UserError("Apex needs a GPU")


def compare_norms(config, norm, rival, tokens, width):
    """Forward and backward pass of torch's norm and of Apex's, or of torch's compiled, on the same activations."""
    import torch

    from minzero.config import ModelConfig
    from model import make_norm

    if rival == "apex":
        need_apex()
    device = this_torch_device()
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
    return compared(torch_seconds, seconds, found, expected)


def compared(torch_seconds, seconds, found, expected):
    return {
        "torch_ms": torch_seconds * 1000,
        "rival_ms": seconds * 1000,
        "times_as_fast": torch_seconds / seconds,
        "largest_difference": largest_difference(found, expected),
    }


def compare_adams(config, rival):
    """A step of torch's fused AdamW and of another over float32 weights of a model's shapes, and how far apart ten
    steps with the same gradients lead them."""
    import torch

    from minzero.engine import parameter_groups
    from model import GPT

    device, train = this_torch_device(), config.train
    if rival == "apex":
        need_apex()
    elif rival == "deepspeed" and device.type != "cuda":
        raise UserError("DeepSpeed's FusedAdam for GPUs needs a GPU")
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in GPT(config.model).parameters()]

    def make(name, groups):
        settings = {"lr": train.lr, "betas": tuple(train.betas), "eps": train.eps}
        if name == "apex":
            from apex.optimizers import FusedAdam

            return FusedAdam(groups, adam_w_mode=True, **settings)
        if name == "deepspeed":
            from deepspeed.ops.adam import FusedAdam

            return FusedAdam(groups, adam_w_mode=True, **settings)
        return torch.optim.AdamW(groups, **{name: True}, **settings)

    def ten_steps(name):
        generator = torch.Generator(device).manual_seed(0)
        draw = functools.partial(torch.randn, device=device, generator=generator)
        weights = torch.nn.ParameterList(torch.nn.Parameter(0.02 * draw(shape)) for shape in shapes)
        optimizer = make(name, parameter_groups(weights, train.weight_decay))
        for _ in range(10):
            for weight in weights:
                weight.grad = draw(weight.shape)
            optimizer.step()
        found = [weight.detach().clone() for weight in weights]
        return median_seconds(optimizer.step, device, 10), found

    torch_seconds, expected = ten_steps("fused")
    seconds, found = ten_steps(rival)
    return compared(torch_seconds, seconds, found, expected)


FUNCTIONS = {
    function.__name__: function for function in (products, nanogpt_speed, nanogpt_losses, compare_norms, compare_adams)
}


def answer_call(call_path, result_path):
    """In a process of its own: call a function by its name, and write what it returns."""
    if this_torch_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    call = json.loads(Path(call_path).read_text())
    config = build(call["config"], call_path) if call["config"] else None
    write_json(Path(result_path), FUNCTIONS[call["function"]](config, **call["arguments"]))


# ---- choices that are no key of a configuration: each changes this process's train.py


def deepspeed_adam():
    """DeepSpeed's own Adam in place of torch's."""
    import train

    complete = train.deepspeed_config

    def changed(*arguments, **more):
        ds_config = complete(*arguments, **more)
        for key in ("torch_adam", "fused"):
            ds_config["optimizer"]["params"].pop(key, None)
        return ds_config

    train.deepspeed_config = changed


def torch_attention():
    import model

    model.attention_backends = lambda device: None


def whole_loss():
    """The loss from all logits at once, compiled, as nanoGPT's."""
    import torch

    import model

    @torch.compile
    def summed(logits, targets):
        return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=model.IGNORE, reduction="sum")

    def forward(head, x, targets=None):
        logits = torch.nn.Linear.forward(head, x)
        return logits if targets is None else summed(logits.flatten(0, 1), targets.flatten())

    model.Head.forward = forward


def large_chunks():
    import model

    model.tokens_at_a_time = lambda vocab_size, on_gpu: 2**14


def small_chunks():
    import model

    model.tokens_at_a_time = lambda vocab_size, on_gpu: 2**10


def unpadded():
    import model

    model.width_of_logits = lambda vocab_size, on_gpu: vocab_size


def whole_model():
    """One graph for everything, the chunks of the loss one after the other; for stages 0 to 2."""
    import torch

    import model

    def compile_all(gpt):
        gpt.forward = torch.compile(gpt.forward)

    model.GPT.compile = compile_all


def collection_held():
    """Python's garbage collection only between runs, never during a step."""
    import gc

    gc.disable()


def leaf_blocks():
    """Under ZeRO-3 a block's weights are gathered at once in eager too, as where the blocks are compiled."""
    import deepspeed

    import model
    from minzero import engine

    class Leaves(model.GPT):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            deepspeed.utils.set_z3_leaf_modules(self, [model.Block])

    engine.GPT = Leaves


def tuned():
    from torch._inductor import config

    config.coordinate_descent_tuning = True


SWITCHES = {
    function.__name__: function
    for function in (
        deepspeed_adam,
        torch_attention,
        whole_loss,
        large_chunks,
        small_chunks,
        unpadded,
        whole_model,
        collection_held,
        leaf_blocks,
        tuned,
    )
}


def train_with_switch(arguments):
    """train.py with one of SWITCHES. A launcher may put an argument of its own in front."""
    import train

    place = arguments.index("--switch")
    SWITCHES[arguments[place + 1]]()
    train.command(arguments[:place] + arguments[place + 2 :])


# ---- the report

SPEED = {
    "tokens/s": ("tokens_per_second", "{:,.0f}".format),
    "micro-batch": ("micro_batch_size", str),
    "of nanoGPT's best": ("of_nanogpt", "{:.2f}".format),
    "MFU": ("mfu", "{:.1%}".format),
    "of products": ("of_products", "{:.1%}".format),
}
SPEED |= {head: benchmark.COLUMNS[head] for head in ("step, s", "slowest, s", "allocated", "reserved", "predicted")}
SPEED["tokens a step"] = ("global_batch_tokens", "{:,}".format)
SPEED["mean of steps"] = ("all_step_seconds", lambda seconds: str(len(seconds)))
MEMORY = {head: benchmark.COLUMNS[head] for head in ("allocated", "reserved", "CPU memory", "predicted", "error")}
STEP = {head: benchmark.COLUMNS[head] for head in ("tokens/s", "step, s")}
STEP |= {head: SPEED[head] for head in ("micro-batch", "tokens a step", "mean of steps")}
COLUMNS = {
    "speed": SPEED,
    "kernels": {
        "torch, ms": ("torch_ms", "{:.3f}".format),
        "this, ms": ("rival_ms", "{:.3f}".format),
        "times as fast": ("times_as_fast", "{:.2f}".format),
        "largest relative difference": ("largest_difference", "{:.1e}".format),
    },
    "memory": {"published for 1 GPU": ("published", str)} | MEMORY | STEP,
    "offload": STEP | MEMORY,
    "planner": MEMORY | STEP,
    "convergence": {
        "last loss": ("last_loss", "{:.5f}".format),
        "steps": ("steps", str),
        "largest relative difference of a loss from ZeRO-3's": ("from_stage3", "{:.1e}".format),
    },
}


def losses_apart(found, expected):
    """The largest relative difference between two lists of losses."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=False))


def with_ratios(part, results, rate):
    """The part's results, {name: result}, with what follows from several of them. rate: FLOP/s of large products in the
    call that measured each, or None."""
    speeds = [result.get("tokens_per_second") or 0 for name, result in results.items() if name.startswith("nanogpt")]
    best, compared_with = max(speeds, default=0), results.get("stage3", {}).get("losses")
    for name, result in results.items():
        result = dict(result)
        if part == "speed" and (speed := result.get("tokens_per_second")):
            if best and not name.startswith("1p5b"):
                result["of_nanogpt"] = speed / best
            if rate(result):
                result["of_products"] = speed * result["flops_per_token"] / rate(result)
        if losses := part == "convergence" and result.get("losses"):
            result |= {"last_loss": losses[-1], "steps": len(losses)}
            result["from_stage3"] = losses_apart(losses, compared_with) if compared_with else None
        yield result


def draw_losses(results, picture):
    """The losses of `convergence`, and how far each is from ZeRO-3's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    expected = results.get("stage3", {}).get("losses")
    for number, result in enumerate(results.values()):
        losses = result.get("losses") or []
        above.plot(range(1, len(losses) + 1), losses, f"C{number}.-", label=result["title"])
        if expected and result is not results["stage3"]:
            pairs = enumerate(zip(losses, expected, strict=False), 1)
            apart = {step: abs(one - other) / other for step, (one, other) in pairs if one != other}
            below.plot(apart.keys(), apart.values(), f"C{number}.-", label=result["title"])
    above.set(ylabel="loss, nats per token")
    above.legend(fontsize=8)
    below.set(ylabel="relative difference from ZeRO-3's", xlabel="step, where they differ", yscale="log")
    below.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def write_report(bench, folder, calls):
    """FOLDER/report.md and its picture, of what is measured so far."""
    title = "What a GPU shows" if not bench.tiny else "--tiny: that everything runs; the figures mean nothing"
    lines = [f"# {title}", ""]
    for number, call in enumerate(calls, 1):
        versions = ", ".join(f"{name} {text}" for name, text in call["versions"].items())
        rate = call.get("product_flops")
        rate = f"; bf16 products of large matrices: {rate / 1e12:.4g} TFLOP/s" if rate else ""
        lines += [f"Call {number}: {call['device']}; {call['began']}; {versions}; data: {call['data']}{rate}"]
        lines += ["", f"`{call['command']}`", ""]

    def rate(result):
        return calls[result["call"] - 1].get("product_flops")

    for part, rows in PARTS.items():
        names = [row.name for row in rows(bench)]
        results = {name: bench.rows[f"{part}/{name}"] for name in names if f"{part}/{name}" in bench.rows}
        lines += [f"## {part}", "", " ".join(rows.__doc__.split()), ""]
        if results:
            columns = COLUMNS[part] | ({"call": ("call", str)} if len(calls) > 1 else {})
            numbers = [row for row in with_ratios(part, results, rate) if row["failed"] or "profile" not in row]
            lines += [*benchmark.table(numbers, columns), ""]
        errors = [abs(result["error"]) for result in results.values() if result.get("error") is not None]
        if part == "planner" and errors:
            lines += [f"Median error, without its sign: {statistics.median(errors):.1%} of {len(errors)} rows.", ""]
        runs = {f"{row['precision']}, kernels {row['kernels']}" for row in results.values() if row.get("kernels")}
        if runs:
            lines += [f"Runs of train.py: {'; '.join(sorted(runs))}.", ""]
        if part == "speed" and (peak := peak_flops(calls[-1]["device"])):
            lines += [f"MFU is of {peak / 1e12:g} TFLOP/s, the data sheet's dense bf16; products: see the call.", ""]
        if part == "planner" and results and not bench.gpus:
            lines += ["There is no error without a GPU: resident memory is no measure of tensors.", ""]
        for result in results.values():
            if result.get("profile"):
                lines += ["```", result["profile"].rstrip(), "```", ""]
        if part == "convergence" and any(result.get("losses") for result in results.values()):
            draw_losses(results, folder / "convergence.png")
            lines += ["![losses](convergence.png)", ""]
        if missing := [name for name in names if name not in results]:
            lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    write_atomically(folder / "report.md", "\n".join(lines).encode())


# ---- the command


def memory_of_this_machine():
    """Bytes of CPU memory that this process may use: the machine's, or less where its group has a limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def read_options(arguments):
    expected = "benchmarks/gpu.py --out FOLDER [--nanogpt FILE] [--data FOLDER] [--parts NAME ...] [--tiny]"
    parser = FlagParser(__doc__, expected)
    parser.add_argument("--out", type=a_path, required=True)
    parser.add_argument("--nanogpt", type=a_path)
    parser.add_argument("--data", type=a_path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    parser.add_argument("--first", type=at_least(1))
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--minutes", type=a_number(above=True), default=9)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if rest:
        parser.error(f"unknown argument {rest[0]}")
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise UserError(f"--parts: found {unknown[0]}, expected some of: {' '.join(PARTS)}")
    for name, there in (("nanogpt", "is_file"), ("data", "is_dir")):
        path = getattr(options, name)
        if path and not getattr(path, there)():
            raise UserError(f"--{name}: {path}: no such {there.removeprefix('is_')}")
    return options


def earlier_results(folder, device, tiny):
    """What FOLDER/results.json holds. Raises UserError if it is of another machine or size, or cannot be read."""
    path = folder / "results.json"
    if not path.exists():
        return {"device": device, "tiny": tiny, "calls": [], "rows": {}}
    try:
        found = json.loads(path.read_text())
        was = found["device"], found["tiny"]
        found["calls"], found["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not what this command writes; choose another --out") from None
    if was != (device, tiny):
        raise UserError(f"{path}: of {was[0]}, tiny {was[1]}, and this is {device}, tiny {tiny}; choose another --out")
    return found


def is_wanted(result, seconds, again):
    """Whether a row is to be measured, of which there is this result (None: none) and for which there are so many
    seconds: what was cut off is tried again with more time."""
    if result is None:
        return True
    if result["failed"] == benchmark.OUT_OF_TIME:
        return seconds > 1.2 * result["seconds_given"]
    return again and bool(result["failed"])


def measure_part(bench, part, options, until, keep):
    """Measure what is missing of a part. keep(key, result) stores a result. until: when its time is over."""
    begun = 0
    for place, row in enumerate(PARTS[part](bench)):
        key, left = f"{part}/{row.name}", until - time.monotonic()
        if options.first and place >= options.first:
            return
        if options.rows and row.name not in options.rows:
            continue
        if not is_wanted(bench.rows.get(key), left, options.again):
            continue
        if left < LEAST_SECONDS:
            print(f"{part}: its time is over", file=sys.stderr, flush=True)
            return
        print(f"{part}: {row.title} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=bench.temporary, ignore_cleanup_errors=True) as own:
            result = measure_row(bench, row, left, Path(own) / "run")
        begun += 1
        if result["failed"] == benchmark.OUT_OF_TIME:
            if begun > 1:  # it did not have the part's whole time
                return
            result["seconds_given"] = left
        if options.beside:
            result = {name: value for name, value in result.items() if name not in TIMES}
        keep(key, result)


def main(arguments):
    ends = time.monotonic()
    options = read_options(arguments)
    ends += 60 * options.minutes
    device, gpus = benchmark.this_device()
    if not gpus and not options.tiny:
        raise UserError("no GPU found; --tiny shrinks everything so that two CPU cores can run it")
    cpu_bytes = gpu_bytes = memory_of_this_machine()
    if gpus:
        import torch

        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    results = earlier_results(options.out, device, options.tiny)
    bench = Bench(gpus, gpu_bytes, cpu_bytes, options.tiny, options.nanogpt, options.data)
    bench.rows = results["rows"]
    make_folder("--out", options.out)
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "deepspeed")}
    versions["git"] = git_commit() or "none"
    call = {"command": f"python benchmarks/gpu.py {shlex.join(arguments)}", "device": device, "versions": versions}
    call |= {
        "data": str(options.data or "tokens that follow a rule"),
        "began": datetime.now().isoformat(" ", "minutes"),
    }
    results["calls"].append(call)

    def keep(key=None, result=None):
        if key:
            bench.rows[key] = result | {"call": len(results["calls"])}
        write_json(options.out / "results.json", results)
        write_report(bench, options.out, results["calls"])

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what runs is ended with this
    with tempfile.TemporaryDirectory(prefix="minzero_gpu_", ignore_cleanup_errors=True) as temporary:
        bench.temporary = Path(temporary)
        if "speed" in options.parts:
            size = {"width": 8192, "number": 20} if gpus else {"width": 512, "number": 4}
            row = Row("products", "products of large matrices", function="products", arguments=size)
            rate = measure_row(bench, row, ends - time.monotonic(), Path(temporary) / "products")
            results["calls"][-1]["product_flops"] = rate.get("flops_per_second")
        for number, part in enumerate(options.parts):
            now = time.monotonic()
            until = now + (ends - now) / (len(options.parts) - number)
            measure_part(bench, part, options, until, keep)
    keep()
    print((options.out / "report.md").read_text())


def main_that_says_so(arguments):
    """main, which a Ctrl-C ends with the word that nothing is lost."""
    try:
        main(arguments)
    except KeyboardInterrupt:
        print("interrupted: what was measured is in --out; the same command continues", file=sys.stderr)
        raise


if __name__ == "__main__":
    if "--switch" in sys.argv:
        run_command(train_with_switch)
    elif sys.argv[1:2] == ["--call"]:
        run_command(lambda arguments: answer_call(*arguments[1:]))
    else:
        run_command(main_that_says_so)
