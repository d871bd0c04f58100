"""What parity.py and bad_steps.py run, and test_parity.py and test_bad_steps.py look at."""

SETTINGS = [(stage, precision, "none") for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
SETTINGS += [(2, "fp32", "cpu"), (3, "fp32", "cpu")]

# models with keys beyond GPT-2's, as Qwen3 and OLMoE; resumed at stage 3, and moved
QWEN3 = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False}
QWEN3 |= {"n_kv_head": 2, "head_dim": 24, "qk_norm": "head"}
OLMOE = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False, "qk_norm": "all"}
OLMOE |= {"n_expert": 6, "mlp_hidden": 24, "normalize_experts": False}
OTHERS = {"qwen3": QWEN3, "olmoe": OLMOE}
SETTINGS_OF_OTHERS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")]


def model_of(run):
    """The model section of a run, by its name."""
    return OTHERS.get(run.split("_")[0], {})


# run -> (the run it continues, from which step, its ZeRO stage, offload), by number of ranks and in this order.
# `moved`, `qwen3_moved` and `olmoe_moved` are the uninterrupted runs, and all of them end at their last step, 150.
MOVES = {
    "first": {
        "stage_3_2": ("moved", 50, 2, "none"),
        "stage_3_2_3": ("stage_3_2", 100, 3, "none"),
        "stage_3_1": ("moved", 50, 1, "none"),
        "stage_3_1_3": ("stage_3_1", 100, 3, "none"),
        "offload_off_on": ("moved", 50, 3, "cpu"),
        "offload_off_on_off": ("offload_off_on", 100, 3, "none"),
    },
    "second": {
        "ranks_2_1": ("moved", 50, 3, "none"),
        "all_at_once": ("moved", 50, 0, "none"),
        "qwen3_ranks_2_1": ("qwen3_moved", 50, 3, "none"),
        "olmoe_ranks_2_1": ("olmoe_moved", 50, 3, "none"),
    },
    "third": {
        "ranks_2_1_2": ("ranks_2_1", 100, 3, "none"),
        "all_at_once_and_back": ("all_at_once", 100, 2, "cpu"),
        "qwen3_ranks_2_1_2": ("qwen3_ranks_2_1", 100, 3, "none"),
        "olmoe_ranks_2_1_2": ("olmoe_ranks_2_1", 100, 3, "none"),
    },
}

# runs of bad_steps.py whose weights or moments an update spoils
SPOILT = [  # stage, precision, what an update spoils, settings
    (0, "fp32", "fp32", {}),
    (0, "bf16", "exp_avg", {"save_in_background": True}),
    (1, "fp32", "exp_avg_sq", {}),
    (2, "bf16", "fp32", {"save_in_background": True}),
    (3, "fp32", "exp_avg", {"bad_step": "rollback"}),
    (3, "bf16", "fp32", {"save_every": 4}),  # no save before the next step, which is bad
]
