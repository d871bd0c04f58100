"""What optimizers.py runs, and test_optimizers.py looks at."""

from tests.launch.parity_settings import OLMOE, QWEN3

STEPS = 50
MUON = {"optimizer": "muon", "muon_lr": 0.02, "lr": 3e-3}
MUP = {"optimizer": "adamw", "muon_lr": 0.02, "lr": 1e-2, "mup_base_width": 32, "model": {"tie_embeddings": False}}
SETTINGS = [(stage, "fp32", "none") for stage in (0, 1, 2, 3)] + [(stage, "bf16", "none") for stage in (0, 2, 3)]
SETTINGS += [(2, "fp32", "cpu"), (3, "fp32", "cpu")]
SHARED = OLMOE | {"n_expert": 4, "n_shared_expert": 2}
MODELS = {"qwen3": QWEN3, "olmoe": OLMOE, "shared": SHARED}  # grouped queries and SwiGLU; experts
SETTINGS_OF_MODELS = [("qwen3", 1), ("qwen3", 3), ("olmoe", 0), ("olmoe", 3), ("shared", 2)]

# run -> (the run that it continues from the middle, its stage), by number of ranks and in this order
MOVES = {
    "first": {"stage_3_1": ("fp32_stage3_none_ranks2", 1), "stage_0_2": ("fp32_stage0_none_ranks2", 2)},
    "second": {"ranks_2_1": ("fp32_stage3_none_ranks2", 0), "qwen3_ranks_2_1": ("qwen3_stage1_ranks2", 3)},
    "third": {"ranks_1_2": ("fp32_stage0_none_ranks1", 3), "olmoe_ranks_1_2": ("olmoe_stage3_ranks1", 1)},
}
