"""The small models of gpu.py's part `parity`: the options of each family of transformers that model.py computes, at a
size that a GPU likes. No torch here: the command itself reads this."""

SIZE = {"n_layer": 4, "n_head": 8, "n_embd": 512, "block_size": 512, "vocab_size": 2048, "init_std": 0.04}
TINY = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 256}
TINY_WIDTHS = {"head_dim": 32, "mlp_hidden": 32, "sliding_window": 16, "n_expert": 8}  # where a model has them
SEQUENCES = 4

LLAMA = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False, "n_kv_head": 2}
QWEN3 = LLAMA | {"qk_norm": "head", "head_dim": 128}
OLMO = LLAMA | {"qk_norm": "all"}
MIXTRAL = LLAMA | {"n_expert": 8, "mlp_hidden": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
CONTEXT = {"original_max_position_embeddings": 128}  # of the scalings: the model's own is longer

# Title: options, and "recompute", the value of train.activation_checkpointing, and "documents": whether rows hold
# several, between which there is no attention. The most important first.
DENSE = {
    "llama, grouped queries": LLAMA,
    "mistral, sliding window": LLAMA | {"sliding_window": 128},
    "qwen3": QWEN3,
    "olmo2": OLMO | {"norm_position": "after"},
    "gpt_neox, parallel, a quarter rotated": {
        "position": "rotary",
        "rotary_fraction": 0.25,
        "parallel_residual": True,
        "mlp": "gelu_exact",
        "tie_embeddings": False,
    },
    "llama, selective recomputation": LLAMA | {"recompute": "selective"},
    "smollm3, every 2nd layer without rotation": LLAMA | {"no_rotary_layers": 2},
    "llama, llama3 scaling": LLAMA | {"rotary_scaling": LLAMA3 | CONTEXT},
    "llama, yarn scaling": LLAMA | {"rotary_scaling": YARN | CONTEXT},
    "gpt2": {},
    "every 2nd layer with a window": LLAMA | {"sliding_window": 128, "full_attention_layers": 2},
    "qwen2, biases of queries, keys and values": LLAMA | {"qkv_bias": True},
    "gpt2, selective recomputation": {"recompute": "selective"},
}
EXPERTS = {
    "mixtral, 2 of 8 experts": MIXTRAL,
    "olmoe, 8 of 32": OLMO | {"n_expert": 32, "n_expert_per_token": 8, "mlp_hidden": 256, "normalize_experts": False},
    "qwen3_moe, 4 of 32": QWEN3 | {"n_expert": 32, "n_expert_per_token": 4, "mlp_hidden": 192},
    "all 4 of 4 experts": LLAMA | {"n_expert": 4, "n_expert_per_token": 4, "mlp_hidden": 512},
    "mixtral, selective recomputation": MIXTRAL | {"recompute": "selective"},
    "one shared and 2 of 8 experts": MIXTRAL | {"n_shared_expert": 1},
}
DOCUMENTS = {
    "llama, grouped queries, documents": LLAMA | {"documents": True},
    "mistral, sliding window, documents": LLAMA | {"sliding_window": 128, "documents": True},
    "gpt2, documents": {"documents": True},
    "every 2nd layer with a window, documents": LLAMA
    | {"sliding_window": 128, "full_attention_layers": 2, "documents": True},
    "qwen3, selective recomputation, documents": QWEN3 | {"recompute": "selective", "documents": True},
}


def sized(models, tiny):
    """These models with their sizes: {title: {"options": of ModelConfig, "recompute", "documents": their values}}."""
    made = {}
    for title, options in models.items():
        options = SIZE | options
        more = {name: options.pop(name, False) for name in ("recompute", "documents")}
        if tiny:
            options |= TINY | {name: min(options[name], most) for name, most in TINY_WIDTHS.items() if name in options}
            if options.get("rotary_scaling"):
                options["rotary_scaling"] = options["rotary_scaling"] | {"original_max_position_embeddings": 16}
        made[title] = {"options": options} | more
    return made
