"""plan.py and minzero/planner: measured rows replayed, our model's activations counted, and what must hold of any plan.

`python tests/unit/test_plan.py FOLDER` prints the error of every row of FOLDER/published_memory.json, beside those of
DeepSpeed's own estimator and of EleutherAI's calculator."""

import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch._functorch import config as functorch_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import plan
from minzero.cards import card_named
from minzero.config.load import load_config
from minzero.config.sections import ModelConfig
from minzero.files import ROOT
from minzero.planner.activations import calls_of, trace, weights_of
from minzero.planner.batches import is_legal
from minzero.planner.gpus import USABLE, GiB, Hardware
from minzero.planner.memory import replayed
from minzero.planner.plan import plan_run
from minzero.planner.report import in_flags, notes_on
from minzero.planner.search import first_number, first_that_fits
from minzero.planner.settings import Settings
from minzero.planner.speed import communicated_bytes
from model import GPT
from tests.helpers.other_engines import OtherSettings, OtherTrace, simulate_other

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.json"))
H100 = card_named("h100")
WHO = ("ours", "DeepSpeed", "EleutherAI")
MEMORY = {"a100_40gb": 40, "a100_80gb": 80, "h100_80gb": 80, "8xA100-40GB": 40, "A100-40GB": 40}  # GiB


def settings_of_row(row):
    """A row of published_memory.json as OtherSettings, or None if it ran on another library than DeepSpeed or DDP."""
    engine, stage = row["engine"], {"DDP": 0}.get(row["zero_stage"], row["zero_stage"])
    model = ModelConfig(
        n_layer=row["n_layer"],
        n_head=row["n_head"],
        n_embd=row["n_embd"],
        block_size=row["seq"],
        vocab_size=row["vocab"],
        tie_embeddings=False,
    )
    given = {
        "model": model,
        "stage": stage,
        "world_size": row["gpus"],
        "micro_batch_size": row["micro_batch"],
        "activation_checkpointing": int(row["activation_checkpointing"]),
        "offload_optimizer": bool(row["offload_optimizer"]),
        "offload_param": bool(row["offload_param"]),
    }
    loss = "plain" if engine.get("ce_fp32") else "half"
    min_gpt = {"attention": "plain", "loss": loss, "separate_qkv": True, "masks": True}
    if row["id"].startswith("cpu-"):
        return OtherSettings(
            **given | min_gpt,
            reduce_bucket_size=int(engine["bucket"]),
            prefetch_bucket_size=int(engine["prefetch"]),
            persistence_threshold=int(engine["persist"]),
            max_live_parameters=int(engine["max_live"]),
            max_reuse_distance=int(engine["reuse"]),
            sub_group_size=int(engine["sub"]),
            accumulation_bytes=4 if engine.get("gacc") == "fp32" else None,
            gradient_accumulation_steps=engine.get("gas", 1),
            on_cpu=True,
            one_group=True,
            rank=0,
        )
    if row["id"].startswith("sn-") and stage in (0, 2, 3):
        model.dropout = 0.1
        return OtherSettings(
            **given | min_gpt,
            precision="fp16" if stage else "amp",
            overlap_comm=True,
            reduce_bucket_size=200_000_000,
            sub_group_size=10**12,
            coalesced=False,
            prefetches=bool(engine.get("trace_valid")),
            keeps_weights=bool(engine.get("leak_linear")),
            bucket_factor=4.5 if stage == 2 else 1,
            stale_bucket=stage == 2,
        )
    if row["id"] == "dse-bf16-full":
        sizes = {"reduce_bucket_size": 50_000_000, "persistence_threshold": 0, "master_bytes": 2, "moment_bytes": 4}
        return OtherSettings(**given, **sizes, loss="plain")
    if row["id"].startswith("dschat-"):  # OPT: a clamp's input, a float32 softmax and its cast for each score; ReLU
        model.tie_embeddings, model.block_size, model.dropout = True, 2050, 0.1
        details = {"attention": "plain", "score_bytes": 8, "relu": True, "loss": "plain", "separate_qkv": True}
        return OtherSettings(**given, **details, sequence=row["seq"], precision="fp16")
    if row["kind"] == "fits":  # FSDP, as ZeRO-3 with small buckets
        model.tie_embeddings = True
        return OtherSettings(**given | {"stage": 3}, loss="fused", reduce_bucket_size=50_000_000)
    return None


def peak(settings):
    return max(total for total, _ in simulate_other(settings)[0].peaks.values())


def deepspeed_says(settings):
    """Bytes by DeepSpeed's own estimators, which know the model's states alone; None where there is none."""
    layers = [sum(weight.size for weight in call.weights) for call in calls_of(OtherTrace(settings).model())]
    parameters, gpus = simulate_other(settings)[1], settings.world_size
    if settings.stage == 2:
        return estimate_zero2_model_states_mem_needs(parameters, gpus, cpu_offload=settings.offload_optimizer)[1]
    if settings.stage == 3:
        offload = {"cpu_offload": settings.offload_optimizer, "cpu_offload_params": settings.offload_param}
        return estimate_zero3_model_states_mem_needs(parameters, max(layers), gpus, **offload)[1]
    return None


def eleuther_ai_says(settings):
    """Bytes by the formulas of EleutherAI's calculator, which knows no offload: calc/calc_transformer_mem.py of
    github.com/EleutherAI/cookbook at 827ee3b, told the row's own buckets and width of gradients, and that no more
    parameters are alive at a time than there are."""
    s, model = settings, settings.model
    width, length, gpus = model.n_embd, s.sequence or model.block_size, s.world_size
    parameters = width * (2 * model.vocab_size + length + 8 * model.n_layer + 2 + 12 * model.n_layer * width)
    states = parameters * 2 / (gpus if s.stage == 3 else 1)
    states += parameters * (s.accumulation_bytes or s.bytes) / (gpus if s.stage >= 2 else 1)
    states += parameters * 12 / (gpus if s.stage >= 1 else 1)
    buffers = s.reduce_bucket_size * 2 if s.stage >= 1 and gpus > 1 else 0
    buffers += min(s.max_live_parameters, parameters) * 2 if s.stage == 3 and gpus > 1 else 0
    scores = 0 if s.activation_checkpointing else 5 * model.n_head * length / width
    return states + buffers + length * s.micro_batch_size * width * model.n_layer * (34 + scores)


def replay(rows):
    """[(id, measured MiB, {who: predicted MiB})] of the measured rows that can be expressed."""
    found = []
    for row in rows:
        if row["kind"].startswith("measured") and (settings := settings_of_row(row)):
            said = {"ours": peak(settings), "DeepSpeed": deepspeed_says(settings)}
            said["EleutherAI"] = eleuther_ai_says(settings)
            said = {who: size / 2**20 for who, size in said.items() if size is not None}
            found.append((row["id"], row["measured_peak_mib"], said))
    return found


def errors_of(table, who, where="ours"):
    """|predicted / measured - 1| of one of them, over the rows of which `where` says something."""
    return [abs(said[who] / measured - 1) for _, measured, said in table if where in said]


def in_words(table):
    """The table of replay(), and for each of the three its errors beside ours on the same rows."""
    lines = []
    for name, measured, said in table:
        cells = "".join(f"{said[w]:10.1f} {said[w] / measured - 1:+8.2%}" if w in said else " " * 19 for w in WHO)
        lines.append(f"{name:50s}{measured:10.1f} {cells}")
    lines.insert(0, f"{'MiB':50s}{'measured':>10s} {''.join(f'{who:>10s} {chr(32):8s}' for who in WHO)}")
    for who in WHO:
        theirs, ours = errors_of(table, who, who), errors_of(table, "ours", who)
        lines.append(
            f"{who}, {len(theirs)} rows: median {statistics.median(theirs):.2%}, mean {statistics.mean(theirs):.2%}, "
            f"worst {max(theirs):.2%}; ours on "
            f"these: {statistics.median(ours):.2%}, {statistics.mean(ours):.2%}, {max(ours):.2%}"
        )
    return "\n".join(lines)


@pytest.fixture(scope="module")
def rows(shared):
    path = shared / "published_memory.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())


def test_measured_rows(rows):
    table = replay(rows)
    print(in_words(table))
    errors = errors_of(table, "ours")
    assert statistics.median(errors) <= 0.05
    assert max(errors) <= 0.15
    for who in WHO[1:]:
        assert statistics.median(errors_of(table, "ours", who)) < statistics.median(errors_of(table, who, who))


def test_what_ran_fits_and_what_did_not_does_not(rows):
    for row in rows:
        settings = settings_of_row(row) if row["kind"] in ("fits", "oom", "fits_max") else None
        if settings:
            fraction = peak(settings) / (MEMORY[row["gpu"]] * GiB)
            assert (fraction <= USABLE) == (row["kind"] != "oom"), (row["id"], fraction)


# Of the families' small models, what changes what is kept. Norms are layer norms, which torch fuses on a CPU as well;
# an RMSNorm is fused on a GPU alone, and keeps a number less for each row.
LLAMA = {"position": "rotary", "mlp": "swiglu", "bias": False, "n_kv_head": 2}
MIXTRAL = LLAMA | {"n_expert": 4, "mlp_hidden": 40}
OPTIONS = {
    "gpt2": {},
    "llama": LLAMA,
    "narrow heads": {"head_dim": 8},
    "mistral": LLAMA | {"sliding_window": 100},
    "qwen2": LLAMA | {"qkv_bias": True},
    "qwen3": LLAMA | {"qk_norm": "head", "head_dim": 32},
    "olmo2": LLAMA | {"qk_norm": "all", "norm_position": "after"},
    "olmo3": LLAMA | {"qk_norm": "all", "norm_position": "after", "sliding_window": 100, "full_attention_layers": 2},
    "smollm3": LLAMA | {"no_rotary_layers": 2},
    "pythia": {"position": "rotary", "rotary_fraction": 0.25, "parallel_residual": True, "mlp": "gelu_exact"},
    "mixtral": MIXTRAL,
    "qwen3 moe": MIXTRAL | {"n_expert_per_token": 3, "qk_norm": "head", "head_dim": 16},
    "olmoe": LLAMA | {"n_expert": 6, "mlp_hidden": 24, "qk_norm": "all", "normalize_experts": False},
    "a shared expert": MIXTRAL | {"n_shared_expert": 2, "bias": True},
    "experts after which a norm follows": MIXTRAL | {"norm_position": "after", "mlp": "gelu", "n_expert_per_token": 1},
    "norms of queries and keys, learned positions": {"qk_norm": "head"},
    "all over all heads, learned positions": {"qk_norm": "all", "n_kv_head": 1},
    "mixed": LLAMA
    | {
        "head_dim": 32,
        "qk_norm": "all",
        "norm_position": "after",
        "parallel_residual": True,
        "sliding_window": 9,
        "full_attention_layers": [0],
        "no_rotary_layers": [1],
        "rotary_fraction": 0.5,
    },
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype, precision", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_kept_activations_are_those_of_the_model(changes, dtype, precision):
    """Bytes that autograd keeps for the backward pass of model.py, against the sum over the trace."""
    config = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=512, vocab_size=128, **changes)
    settings = Settings(config, micro_batch_size=2, precision=precision)
    predicted = sum(call.kept for call in calls_of(trace(settings)))
    assert predicted == pytest.approx(bytes_kept(GPT(config).to(dtype)), rel=0.02)


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_weights_are_those_of_the_model_in_the_order_in_which_they_are_made(changes):
    config = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=128, **changes)
    with torch.device("meta"):
        parameters = list(GPT(config).parameters())
    weights = weights_of(trace(Settings(config)))
    assert [weight.size for weight in weights] == [parameter.numel() for parameter in parameters]
    assert [weight.decayed for weight in weights] == [parameter.dim() > 1 for parameter in parameters]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3", "pythia", "mixed", "mixtral", "olmoe"])
def test_kept_activations_are_those_of_compiled_blocks(name):
    """The same of compiled blocks: without recomputation, selective, and by budgets, of which this is an estimate."""
    config = ModelConfig(n_layer=2, n_head=4, n_embd=256, block_size=512, vocab_size=512, **OPTIONS[name])
    ranges = [(0, 0.98, 1.02), ("selective", 0.98, 1.02)]
    if name in ("gpt2", "llama"):
        ranges += [(0.5, 0.9, 1.4), (0.25, 0.9, 1.4)]
    for recompute, lowest, highest in ranges:
        torch._dynamo.reset()
        model = GPT(config, activation_checkpointing=recompute).bfloat16()
        model.compile()
        given = {"activation_checkpointing": recompute, "compiled": True}
        settings = Settings(config, micro_batch_size=2, **given)
        # recomputation reads what all blocks share once more: the mask, and the cosines and sines of rotary positions
        angles = 4 * config.block_size * config.rotary_channels if config.position == "rotary" else 0
        predicted = settings.mask_bytes + angles if recompute else 0
        for module in trace(settings).inside:
            if module.recomputed:
                predicted += module.output + sum(call.cached for call in calls_of(module))
            else:
                predicted += sum(call.kept for call in calls_of(module))
        assert lowest <= predicted / bytes_kept(model) <= highest, recompute
    functorch_config.activation_memory_budget = 1.0


def bytes_kept(model):
    """Bytes of what autograd keeps for the backward pass, of two sequences; what is shared counts once."""
    tokens = torch.zeros(2, model.config.block_size, dtype=torch.long)
    model(tokens, tokens)  # is compiled
    others = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), tokens]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in kept.values())


def planned(name, gpus, recompute=None, **zero):
    config = load_config([f"configs/{name}"])
    config.train.micro_batch_size = 1
    if recompute is not None:
        config.train.activation_checkpointing = recompute
    config.deepspeed["zero_optimization"] |= zero
    return plan_run(config, Hardware(gpus, -(-gpus // 8), 80 * GiB, H100, price=2.0))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stage", range(4))
def test_more_gpus_and_offload_never_need_more(name, stage):
    before = None
    for gpus in (1, 8, 64, 512):
        found = planned(name, gpus, stage=stage, contiguous_gradients=True)  # "auto" depends on the ranks
        assert math.isfinite(found["tokens_per_second"]) and math.isfinite(found["cost"])
        assert sum(found["gpu_parts"].values()) == found["gpu_bytes"]
        # adapters leave ZeRO-3 the weights alone to shard, and more than one GPU gathers copies of them
        may_grow = stage == 3 and name.startswith("lora-")
        assert before is None or may_grow or found["gpu_bytes"] <= before
        before = found["gpu_bytes"]
        if stage:
            offloaded = planned(name, gpus, stage=stage, offload_optimizer={"device": "cpu"})
            assert offloaded["gpu_bytes"] <= before and offloaded["cpu_bytes"] > 0


def test_partial_offload_moves_the_optimizer_by_sub_groups():
    """1.5B parameters in sub-groups of 100 million: 16 of matrices and one of vectors."""
    found = {}
    for ratio in (0, 0.25, 0.5, 1):
        offload = {"offload_optimizer": {"device": "cpu", "ratio": ratio}, "sub_group_size": 100_000_000}
        found[ratio] = planned("1p5b.json", 1, stage=3, **offload)
    whole = planned("1p5b.json", 1, stage=3)
    assert found[0]["gpu_parts"]["optimizer"] == whole["gpu_parts"]["optimizer"] == 12 * whole["parameters"]
    assert found[1]["gpu_parts"]["optimizer"] == 0 and whole["cpu_bytes"] == 0
    parts = [found[ratio]["gpu_parts"]["optimizer"] / whole["gpu_parts"]["optimizer"] for ratio in (0.25, 0.5)]
    assert parts == pytest.approx([12 / 16, 8 / 16], rel=0.1)
    for smaller, larger in itertools.pairwise(found):
        assert found[smaller]["gpu_bytes"] > found[larger]["gpu_bytes"]
        assert found[smaller]["cpu_bytes"] < found[larger]["cpu_bytes"]
        assert found[smaller]["tokens_per_second"] > found[larger]["tokens_per_second"]


def test_recomputing_less_is_faster_and_takes_more_memory():
    """Of a block's forward pass, selective recomputes one product of four; its gathers are the same for all."""
    found = {value: planned("13b.json", 8, stage=3, recompute=value) for value in (False, "selective", 2, True)}
    memory = [plan["gpu_bytes"] for plan in found.values()]
    assert sorted(memory, reverse=True) == memory and len(set(memory)) == 4
    speed = [plan["tokens_per_second"] for plan in found.values()]
    assert sorted(speed, reverse=True) == speed and speed[1] > 0.95 * speed[0] > speed[2]
    assert [plan["activation_checkpointing"] for plan in found.values()] == list(found)
    budgets = [planned("13b.json", 8, recompute=value)["gpu_bytes"] for value in (0.75, 0.5, 0.25)]
    assert memory[0] > budgets[0] > budgets[1] > budgets[2] > memory[3]
    sent = set()
    for value in (False, "selective", True):
        settings = Settings(ModelConfig(), world_size=8, activation_checkpointing=value, max_reuse_distance=0)
        sent.add(communicated_bytes(settings, replayed(settings)))
    assert len(sent) == 1


def test_gradients_without_a_buffer():
    """contiguous_gradients false: a bucket's room is saved, and a gradient stays until it is reduced."""
    buffered, free = (
        planned("1p3b.json", 8, stage=3, reduce_bucket_size=200_000_000, contiguous_gradients=value)
        for value in (True, False)
    )
    assert buffered["phases"]["forward"] - free["phases"]["forward"] == 2 * 200_000_000
    assert free["gpu_bytes"] < buffered["gpu_bytes"]


def test_a_checkpoint_written_in_the_background_is_copied():
    config = load_config(["configs/13b.json", "--train.save_in_background", "true"])
    for nodes in (1, 2):
        plan = plan_run(config, Hardware(16, nodes, 80 * GiB, H100))
        assert plan["cpu_bytes"] == plan["cpu_bytes_of_saving"] == 12 * plan["parameters"] // nodes
    zero = config.deepspeed["zero_optimization"] | {"stage": 3}
    config.deepspeed["zero_optimization"] = zero | {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}
    assert plan_run(config, Hardware(16, 2, 80 * GiB, H100))["cpu_bytes_of_saving"] == 0, "it is not copied"


@pytest.mark.parametrize("name, wide", [("10b.json", True), ("45b.json", True), ("13b.json", False)])
def test_heads_that_the_fast_kernels_do_not_take_are_noted(name, wide):
    notes = " ".join(notes_on(load_config([f"configs/{name}"])))
    assert ("heads of 512 channels" in notes) == wide


def test_of_experts_all_are_in_memory_and_some_are_active(capsys):
    """OLMoE-1B-7B's shape, of which its authors count 6.9 billion parameters (Muennighoff et al. 2024, 2409.02060)."""
    shape = (
        "n_layer 16,n_head 16,n_embd 2048,mlp_hidden 1024,n_expert 64,n_expert_per_token 8,vocab_size 50304,bias false"
    )
    shape += ",norm rmsnorm,position rotary,mlp swiglu,qk_norm all,normalize_experts false,tie_embeddings false"
    flags = " ".join(f"--model.{setting}" for setting in shape.split(","))
    olmoe = f"configs/gpt2-124m.json {flags} --model.block_size 4096 --train.micro_batch_size 1 --gpu_memory 80 --gpus"
    found = answer_of(capsys, f"{olmoe} 8 --deepspeed.zero_optimization.stage 3")
    assert found["parameters"] == pytest.approx(6.92e9, rel=1e-3)
    assert found["active_parameters"] == pytest.approx(1.18e9, rel=2e-2)
    one_block = 2 * 64 * 3 * 2048 * 1024
    assert found["gpu_parts"]["gathered"] > one_block and found["fits"]
    one_mlp = (
        "--model.n_expert null --model.n_expert_per_token 2 --model.normalize_experts true --model.mlp_hidden 8192"
    )
    dense = answer_of(capsys, f"{olmoe} 8 {one_mlp}")
    assert dense["active_parameters"] == dense["parameters"] == pytest.approx(found["active_parameters"], rel=0.1)
    assert answer_of(capsys, f"{olmoe} 8 --fit")["fits"]
    assert answer_of(capsys, f"{olmoe} 8 --max")["n_layer"] > 16
    plan.main(f"{olmoe} 64 --deepspeed.zero_optimization.stage 3 --train.activation_checkpointing true".split())
    said = capsys.readouterr().out
    assert "active per token) on 64" in said and "gathers all 64 experts of a block, 402,653,184 weights" in said


def test_halving_finds_what_trying_each_would():
    for length in range(10):
        for first in range(length + 1):
            tried = []

            def planned(number, first=first, tried=tried):
                tried.append(number)
                return {"fits": number >= first, "number": number}

            plan, candidate = first_that_fits(list(range(length)), planned)
            assert candidate == (first if first < length else None)
            assert plan == ({"fits": True, "number": first} if first < length else None)
            assert len(tried) <= length.bit_length() and len(set(tried)) == len(tried)
    for least in range(1, 70):
        expected = least if least <= 32 else None  # 32 is the last power of two that is tried
        assert first_number(lambda number, least=least: number >= least, 40) == expected


def test_no_torch_is_loaded():
    """It takes longer to load than a plan takes."""
    code = "import plan, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_command_line(capsys):
    plan.main("configs/gpt2-124m.json --gpus 8 --gpu_memory 80 --price 2 --json".split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = "parameters gpu_bytes gpu_parts cpu_bytes checkpoint_bytes fits micro_batch_size tokens_per_second"
    assert set(expected.split()) <= set(found) and found["parameters"] == 124_439_808
    plan.main("configs/gpt2-124m.json --gpus 8 --gpu_memory 80 --fit --json".split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fits"] and "train.py configs/gpt2-124m.json --train.micro_batch_size" in found["command"]
    plan.main(
        "configs/1p5b.json --gpus 4 --gpu h100 --gpu_memory 14 --train.activation_offload true --fit --json".split()
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["activation_checkpointing"] == "selective"
    flags = found["command"].split("train.py ")[1]
    assert "--train.activation_checkpointing selective --train.activation_offload false" in flags
    names = [word for word in flags.split() if word.startswith("--")]
    assert len(names) == len(set(names)), "a key that the plan chooses is not there as it was given too"
    assert load_config(flags.split()).train.activation_checkpointing == "selective"
    plan.main("configs/gpt2-124m.json --gpus 8 --gpu l4 --gpu_memory 24 --max --json".split())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_layer"] > 12


def answer_of(capsys, arguments):
    plan.main([*arguments.split(), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [
        "configs/1p5b.json --gpus 1 --gpu 4090",
        "configs/1p5b.json --gpus 8 --gpu 4090 --deepspeed.zero_optimization.stage 0",
        "configs/gpt2-124m.json --gpus 1 --gpu h100 --gpu_memory 2",  # takes two keys
        "configs/175b.json --gpus 8 --gpu_memory 80 --cpu_memory 8000",
        "configs/45b.json --gpus 8 --gpu a100 --gpu_memory 40 --cpu_memory 2000",
        # selective recomputation
        "configs/gpt2-124m.json --gpus 8 --gpu h100 --gpu_memory 5 --train.micro_batch_size 1 --model.block_size 16384",
    ],
)
def test_the_cheapest_change_is_enough(capsys, arguments):
    found = answer_of(capsys, arguments)
    assert not found["fits"] and 1 <= len(found["cheapest_change"]) <= 2
    assert answer_of(capsys, f"{arguments} {in_flags(found['cheapest_change'])}")["fits"]
    for key in found["cheapest_change"]:  # each of them is needed
        rest = {other: value for other, value in found["cheapest_change"].items() if other != key}
        pair = all("offload" in other for other in found["cheapest_change"])  # parameters take the optimizer along
        assert pair or not answer_of(capsys, f"{arguments} {in_flags(rest)}")["fits"]
    if found["enough_gpus"]:
        gpus = int(arguments.split("--gpus ")[1].split()[0])
        more = arguments.replace(f"--gpus {gpus} ", "--gpus {} ")
        fitting = answer_of(capsys, more.format(found["enough_gpus"]))
        assert fitting["fits"] and "changed_batch" not in fitting
        config = load_config([arguments.split()[0]])
        sizes = range(gpus, found["enough_gpus"], gpus)
        legal = [number for number in sizes if is_legal(config, number) and number % -(-number // 8) == 0]
        assert not legal or not answer_of(capsys, more.format(legal[-1]))["fits"]


@pytest.mark.parametrize(
    "arguments, word",
    [
        ("--gpus 0", "--gpus"),
        ("--gpus 8 --gpu_memory 24", "without --gpu: name the card.*4090"),
        ("--gpus 8 --gpu_memory 25", "without --gpu: name the card"),
        ("--gpus 0 --gpu_memory 80", "--gpus"),
        ("--gpus 8 --gpu_memory 80 --gpu toaster", "toaster"),
        ("--gpus 8 --gpu_memory 80 --nodes 3", "--nodes"),
        ("--gpus 8 --gpu_memory 80 --model.n_layers 3", "n_layer"),
        ("--gpus 8 --gpu_memory 80 --deepspeed.zero_optimization.stage 4", "stage"),
        ("--gpus 8 --gpu_memory 80 --deepspeed.zero_optimization.reduce_bucket_size big", "reduce_bucket_size"),
        ("--gpus 8 --gpu 4090 --gpu_memory 0.1 --fit", "nothing fits"),
    ],
)
def test_bad_input_is_one_line(arguments, word):
    with pytest.raises(plan.UserError, match=word):
        plan.main(["configs/gpt2-124m.json", *arguments.split()])


if __name__ == "__main__":
    print(in_words(replay(json.loads((Path(sys.argv[1]) / "published_memory.json").read_text()))))


def test_sums_of_offloaded_gradients_are_as_wide_as_they_are_added_up():
    """Stage 3 keeps them in CPU memory in data_types.grad_accum_dtype (stage3.py's grad_partitions_flat_buffer)."""
    words = ["configs/1p7b.json", "--deepspeed.zero_optimization.offload_optimizer.device", "cpu"]
    words += ["--deepspeed.zero_optimization.stage", "3", "--train.precision", "bf16"]
    low = {}
    for width in ("bf16", "fp32"):
        config = load_config([*words, "--deepspeed.data_types.grad_accum_dtype", width])
        plan_of_width = plan_run(config, Hardware(8, 1, H100.memory, H100))
        low[width] = plan_of_width["cpu_bytes_range"][0]
    assert low["fp32"] - low["bf16"] == pytest.approx(2 * plan_of_width["parameters"], rel=1e-6)
