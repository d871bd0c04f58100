"""The measurements of gpu.py: for each part a list of rows, the most important first.

A row is a run of train.py with a configuration, or a call of a function of kernels.py, nanogpt.py or parity.py in
a process of its own, or the reason why there is neither.
"""

import copy
import dataclasses
import functools
import os
import tempfile
import zlib
from pathlib import Path

from benchmarks import parity_models
from minzero.config.build import build
from minzero.config.load import load_config
from minzero.config.nested import merge
from minzero.config.sections import Config
from minzero.files import ROOT
from minzero.planner import search
from minzero.planner.gpus import USABLE, Hardware
from minzero.planner.plan import plan_run
from minzero.planner.search import with_choice
from minzero.planner.units import in_units

ENDLESS = 10**9  # steps of a run that is ended from outside
PUBLISHED = {"1p7b": "5.1 GiB", "10b": "26 GiB"}  # "for 1 GPU": README of SeanNaren/minGPT
VOCABULARY = 50304  # nanoGPT's: GPT-2's 50,257 ids, up to a multiple of 64


UNPREDICTED = {
    "whole_loss",
    "large_chunks",
    "small_chunks",
    "unpadded",
    "whole_model",
}  # change memory unknown to plan.py


def extensions_folder(out=None):
    """The folder of the extensions that DeepSpeed compiles at first use: of this command, or of this --out alone."""
    name = f"minzero_extensions_{os.getuid()}"
    if out:
        name += f"_{zlib.crc32(os.fsencode(Path(out).resolve())):08x}"
    return Path(tempfile.gettempdir()) / name


@dataclasses.dataclass
class Row:
    """One measurement: a run of train.py (config), or of a function (function, arguments, config), or the reason why
    there is neither (impossible)."""

    name: str
    title: str
    config: Config | None = None
    steps: int = 8
    warmup: int = 3
    switch: str | None = None  # a name in switches.SWITCHES
    environment: dict = dataclasses.field(default_factory=dict)
    function: str | None = None  # a name in gpu.FUNCTIONS
    arguments: dict = dataclasses.field(default_factory=dict)
    on_base: bool = False  # train.init_from gets a model of random weights
    impossible: str | None = None
    facts: dict = dataclasses.field(default_factory=dict)  # goes into the result


@dataclasses.dataclass
class Bench:
    """This machine, the options that change what is measured, and the results so far."""

    gpus: int
    gpu_bytes: int
    cpu_bytes: int
    tiny: bool = False
    nanogpt: Path | None = None
    data: Path | None = None
    temporary: Path | None = None  # a folder that is removed when the command ends
    extensions: Path = dataclasses.field(default_factory=extensions_folder)
    rows: dict = dataclasses.field(default_factory=dict)  # results: {"part/name": ...}

    @property
    def precision(self):
        return "bf16" if self.gpus else "fp32"

    def config(self, name, micro_batch_size, accumulation=1, stage=0, model=None, zero=None, **train):
        """configs/<name>.json for a short run on one device. accumulation: micro-batches of a step; model, zero, train:
        keys to change. With --tiny the model and the batch shrink."""
        sections = load_config([str(ROOT / "configs" / f"{name}.json")]).to_dict()
        model = dict(model or {})
        if self.tiny:
            micro_batch_size = min(micro_batch_size, 2)
            accumulation = min(accumulation, 2)
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
        return plan_run(config, Hardware(1, 1, self.gpu_bytes))

    def why_not(self, config):
        """Why a configuration cannot run here, so that nothing has to be killed to find out; None if it can."""
        plan = self.planned(config)
        for kind, needed, available in (
            ("GPU", plan["gpu_bytes"], self.gpu_bytes),
            ("CPU", plan["cpu_bytes_range"][0], self.cpu_bytes),
        ):
            if needed > available:
                return (
                    f"not started: plan.py says {in_units(needed)} of {kind} memory at the least, and there are "
                    f"{in_units(available)}"
                )
        return None

    def deepest(self, config, certain_of_cpu=True):
        """The configuration with the most layers that fits into this machine's GPU and CPU memory. certain_of_cpu: even
        if every pinned block is rounded up to a power of two."""

        def planned(candidate):
            if self.tiny and candidate.model.n_layer > 3:
                return {"fits": False}
            plan = self.planned(candidate)
            cpu_bytes = plan["cpu_bytes_range"][certain_of_cpu]
            return {"fits": plan["fits"] and cpu_bytes <= USABLE * self.cpu_bytes}

        config = copy.deepcopy(config)
        config.model.n_layer = max(1, search.deepest(config, planned))
        return config


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
    yield from families(bench)
    yield from few_tokens(bench)
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
        sizes = search.micro_batches(config, 1)
        candidates = [with_choice(config, stage, "none", recompute, size) for size in sizes]
        _, config = search.first_that_fits(candidates, bench.planned)
        if config:
            yield Row(name, title, config, steps=4, warmup=2)


def families(bench):
    """Models of other families, compiled, at the largest micro-batch up to 16 that fits."""
    for name, model, stage, title in (
        ("qwen3_0p6b", "qwen3-0.6b", 3, "Qwen3 of 0.6B, ZeRO-3, compiled"),
        ("smollm2_135m", "smollm2-135m", 3, "SmolLM2 of 135M, ZeRO-3, compiled"),
        ("olmoe_0p4b", "olmoe-0.4b", 3, "OLMoE of 0.4B, ZeRO-3, compiled"),
        ("olmoe_0p4b_stage0", "olmoe-0.4b", 0, "OLMoE of 0.4B, ZeRO-0, compiled"),
    ):
        config = bench.config(model, 1, 32, stage, {"block_size": 2048}, compile=True, kernels="torch")
        sizes = [size for size in search.micro_batches(config, 1) if size <= 16]
        candidates = [with_choice(config, stage, "none", False, size) for size in sizes]
        _, config = search.first_that_fits(candidates, bench.planned)
        if config:
            yield Row(name, title, config, steps=4, warmup=2)


def few_tokens(bench):
    """Few tokens: the time that the host needs, whatever the GPU, and with 1.7B parameters the optimizer."""
    for stage, compiled in ((3, False), (0, False), (3, True), (0, True)):
        mode = "compiled" if compiled else "eager"
        model = {"vocab_size": VOCABULARY, "block_size": 256}
        config = bench.config("gpt2-124m", 1, 4, stage, model, compile=compiled, kernels="torch")
        yield Row(
            f"few_tokens_stage{stage}_{mode}", f"ours, ZeRO-{stage}, {mode}, 256 tokens a micro-batch", config, 30
        )
    for stage, compiled in ((3, False), (3, True), (1, False)):
        mode = "compiled" if compiled else "eager"
        config = bench.config("1p7b", 1, 1, stage, {"block_size": 128}, compile=compiled, kernels="torch")
        title = f"1p7b, ZeRO-{stage}, {mode}, 128 tokens a step"
        yield Row(f"few_tokens_1p7b_stage{stage}_{mode}", title, config, 20, 5)


# Choices that are compared one at a time, as keys of Row and of Bench.config: (name, title, stage, settings). `switch`
# and `kernels` are as in Row and train.kernels; `zero` and `model` change those sections.
CHOICES = [
    ("base2", "ZeRO-2, compiled, torch's norms and fused AdamW", 2, {}),
    ("apex", "ZeRO-2, compiled, Apex's norms and FusedAdam", 2, {"kernels": "apex"}),
    ("deepspeed_adam", "ZeRO-2, compiled, DeepSpeed's FusedAdam", 2, {"switch": "deepspeed_adam"}),
    ("torch_attention", "ZeRO-2, compiled, attention in torch's own order", 2, {"switch": "torch_attention"}),
    ("whole_loss", "ZeRO-2, compiled, all logits at once", 2, {"switch": "whole_loss"}),
    (
        "large_chunks",
        "ZeRO-2, compiled, logits of 16,384 tokens at a time, not of 4,096",
        2,
        {"switch": "large_chunks"},
    ),
    ("whole_model", "ZeRO-2, compiled, one graph for the whole model", 2, {"switch": "whole_model"}),
    ("collection_2", "ZeRO-2, compiled, garbage collected at any time", 2, {"switch": "collection_at_any_time"}),
    ("base3", "ZeRO-3, compiled, torch's norms and fused AdamW", 3, {}),
    ("no_overlap", "ZeRO-3, compiled, no overlap_comm", 3, {"zero": {"overlap_comm": False}}),
    (
        "contiguous",
        "ZeRO-3, compiled, gradients gathered in one buffer",
        3,
        {"zero": {"contiguous_gradients": True}},
    ),
    ("gathered", "ZeRO-3, compiled, matrices gathered", 3, {"zero": {"stage3_param_persistence_threshold": 10**5}}),
    ("bf16_sums", "ZeRO-3, compiled, gradients summed in bf16", 3, {"sums": "bf16"}),
    ("collection_3", "ZeRO-3, compiled, garbage collected at any time", 3, {"switch": "collection_at_any_time"}),
    (
        "blocks_in_parts",
        "ZeRO-3, eager, blocks gathered matrix by matrix",
        3,
        {"compile": False, "switch": "blocks_in_parts"},
    ),
    ("base3_eager", "ZeRO-3, eager, torch's norms and fused AdamW", 3, {"compile": False}),
    ("apex_eager", "ZeRO-3, eager, Apex's norms and FusedAdam", 3, {"compile": False, "kernels": "apex"}),
    ("ids_50257", f"ZeRO-2, compiled, 50,257 ids, computed as {VOCABULARY:,}", 2, {"model": {"vocab_size": 50257}}),
    (
        "unpadded",
        "ZeRO-2, compiled, 50,257 ids, computed as they are",
        2,
        {"model": {"vocab_size": 50257}, "switch": "unpadded"},
    ),
    (
        "small_chunks",
        "ZeRO-2, compiled, logits of 1,024 tokens at a time, not of 4,096",
        2,
        {"switch": "small_chunks"},
    ),
    ("tuned", "ZeRO-2, compiled, inductor's coordinate descent tuning", 2, {"switch": "tuned"}),
    ("base2_again", "ZeRO-2, compiled, as the first of these rows: what repeats", 2, {}),
]


def choices(small):
    """GPT-2 124M compiled: one choice at a time, ZeRO-2 and ZeRO-3, against `base2` and `base3` of the same batch."""
    for name, title, stage, settings in CHOICES:
        keys = {"compile": True, "kernels": "torch"} | settings
        switch = keys.pop("switch", None)
        sums = keys.pop("sums", None)
        config = small(32, 4, stage, **keys)
        if sums:
            config.deepspeed["data_types"] = {"grad_accum_dtype": sums}
        yield Row(name, title, config, switch=switch)


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
        yield Row(name, title, config, steps=4, warmup=2, impossible=bench.why_not(config))


def options(bench):
    """GPT-2 124M with other optimizers and with attention within documents, compiled, each beside the ordinary run of
    the same batch; a Llama of 1.1B trained whole, with LoRA, and with LoRA beside a base in 4 bits."""
    small = functools.partial(bench.config, "gpt2-124m", 32, 4, compile=True, kernels="torch")
    for stage in (1, 0, 3):
        for optimizer in ("adamw", "muon"):
            title = f"124M, ZeRO-{stage}, {'Muon' if optimizer == 'muon' else 'AdamW'}"
            yield Row(f"{optimizer}_stage{stage}", title, small(stage=stage, optimizer=optimizer))
    documents = small(stage=1)
    documents.data.document_mask = True
    why = None if bench.data else "needs --data, of whose meta.json the documents' end is known"
    yield Row("documents", "124M, ZeRO-1, AdamW, attention within documents", documents, impossible=why)
    for name, title, lora in (
        ("whole", "all weights trained", {}),
        ("lora", "LoRA of rank 16", {"rank": 16}),
        ("lora_4_bit", "LoRA of rank 16, base in 4 bits", {"rank": 16, "base_bits": 4}),
    ):
        config = bench.config("llama-1b", 1, 8, 0, {"block_size": 2048}, compile=False, kernels="torch")
        config.lora = dataclasses.replace(config.lora, **lora)
        yield Row(name, f"Llama of 1.1B, ZeRO-0, {title}", config, steps=4, warmup=2, on_base=bool(lora))


def convergence(bench):
    """GPT-2 124M from the same weights on the same batches; all losses are kept."""
    steps = 3 if bench.tiny else 40

    def row(name, title, stage, kernels="torch", compiled=False, optimizer="adamw", **sections):
        train = {"compile": compiled, "lr": 1e-4, "schedule": "constant", "kernels": kernels, "optimizer": optimizer}
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
    for stage in (3, 0, 1):
        yield row(f"muon_stage{stage}", f"ZeRO-{stage}, Muon", stage, optimizer="muon")


def parity(bench):
    """Small models, one of each family, with the same weights and batch: loss and gradients in bf16, eager and
    compiled, against float32 (eager, attention as plain products). In mixtures each token's experts are fixed, because
    rounding would send a few tokens to others; the loop has one product for each expert in place of the grouped."""
    for name, title, models, seconds in (
        ("parity_dense", "dense models", parity_models.DENSE, 80),
        ("parity_experts", "mixtures of experts", parity_models.EXPERTS, 45),
        ("parity_documents", "attention within documents", parity_models.DOCUMENTS, 45),
    ):
        arguments = {"models": parity_models.sized(models, bench.tiny)}
        arguments |= {"sequences": parity_models.SEQUENCES, "seconds": 3600 if bench.tiny else seconds}
        yield Row(name, title, function="parity", arguments=arguments)


PARTS = {
    "speed": speed,
    "kernels": kernels,
    "memory": memory,
    "offload": offload,
    "planner": planner,
    "options": options,
    "convergence": convergence,
    "parity": parity,
}
