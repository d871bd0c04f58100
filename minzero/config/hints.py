"""Names that are not keys: old names of keys, and other tools' names for the same settings.

Old names are still accepted. For other tools' names (nanoGPT, litgpt, transformers' Trainer, Megatron-LM) the error
message says which key is meant.
"""

import difflib

from minzero.config.sections import SECTIONS
from minzero.config.values import did_you_mean
from minzero.errors import UserError

# Old name of a key -> its name now. Checkpoints and config files may hold either.
RENAMED = {"train.checkpoints_on_cpu": "train.activation_offload"}

# Other tools' names -> keys. Flags with dashes (Megatron-LM) are looked up with underscores.
OTHER_NAMES = {
    # model
    "num_layers": "model.n_layer",
    "num_hidden_layers": "model.n_layer",
    "depth": "model.n_layer",
    "num_heads": "model.n_head",
    "num_attention_heads": "model.n_head",
    "num_key_value_heads": "model.n_kv_head",
    "num_query_groups": "model.n_kv_head",
    "n_query_groups": "model.n_kv_head",
    "hidden_size": "model.n_embd",
    "d_model": "model.n_embd",
    "dim": "model.n_embd",
    "ffn_hidden_size": "model.mlp_hidden",
    "intermediate_size": "model.mlp_hidden",
    "seq_len": "model.block_size",
    "seq_length": "model.block_size",
    "sequence_length": "model.block_size",
    "max_seq_length": "model.block_size",
    "max_position_embeddings": "model.block_size",
    "context_length": "model.block_size",
    "padded_vocab_size": "model.vocab_size",
    "hidden_dropout": "model.dropout",
    "normalization": "model.norm",
    "layernorm_epsilon": "model.norm_eps",
    "norm_epsilon": "model.norm_eps",
    "rms_norm_eps": "model.norm_eps",
    "rope_theta": "model.rotary_theta",
    "rope_base": "model.rotary_theta",
    "rotary_base": "model.rotary_theta",
    "activation_function": "model.mlp",
    "hidden_act": "model.mlp",
    "swiglu": "model.mlp",
    "tie_word_embeddings": "model.tie_embeddings",
    "weight_tying": "model.tie_embeddings",
    "init_method_std": "model.init_std",
    "initializer_range": "model.init_std",
    # data
    "data_path": "data.path",
    "data_dir": "data.path",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "train_data_dir": "data.path",
    # batch and length
    "batch_size": "train.micro_batch_size",
    "device_batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_tokens",
    "gradient_accumulation_iters": "train.global_batch_tokens",
    "grad_accum_steps": "train.global_batch_tokens",
    "global_batch_size": "train.global_batch_tokens",
    "total_batch_size": "train.global_batch_tokens",
    "max_iters": "train.max_tokens",
    "max_steps": "train.max_tokens",
    "num_iterations": "train.max_tokens",
    "num_train_epochs": "train.max_tokens",
    "epochs": "train.max_tokens",
    "train_iters": "train.max_tokens",
    "train_samples": "train.max_tokens",
    "lr_decay_iters": "train.max_tokens",
    "warmup_iters": "train.warmup_tokens",
    "warmup_steps": "train.warmup_tokens",
    "warmup_ratio": "train.warmup_tokens",
    "lr_warmup_iters": "train.warmup_tokens",
    "lr_warmup_steps": "train.warmup_tokens",
    "lr_warmup_fraction": "train.warmup_tokens",
    "lr_wsd_decay_iters": "train.decay_tokens",
    "lr_wsd_decay_style": "train.decay_shape",
    "warmdown_iters": "train.decay_tokens",
    "warmdown_ratio": "train.decay_tokens",
    "cooldown_iters": "train.decay_tokens",
    "rampup_batch_size": "train.first_batch_tokens",
    "eval_iters": "train.eval_tokens",
    "eval_max_iters": "train.eval_tokens",
    # optimizer
    "matrix_lr": "train.muon_lr",
    "optimizer_name": "train.optimizer",
    "learning_rate": "train.lr",
    "max_lr": "train.lr",
    "min_lr": "train.min_lr_ratio",
    "lr_scheduler_type": "train.schedule",
    "lr_decay_style": "train.schedule",
    "decay_lr": "train.schedule",
    "beta1": "train.betas",
    "beta2": "train.betas",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "adam_epsilon": "train.eps",
    "adam_eps": "train.eps",
    "clip_grad": "train.grad_clip",
    "max_norm": "train.grad_clip",
    "max_grad_norm": "train.grad_clip",
    # how it runs
    "dtype": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "recompute_granularity": "train.activation_checkpointing",
    "recompute_activations": "train.activation_checkpointing",
    "cpu_offloading": "train.activation_offload",
    "torch_compile": "train.compile",
    "zero_stage": "deepspeed.zero_optimization.stage",
    # logging, evaluation and saving
    "output_dir": "train.out_dir",
    "save": "train.out_dir",
    "load": "train.resume",
    "resume_from_checkpoint": "train.resume",
    "model_name_or_path": "train.init_from",
    "checkpoint_dir": "train.init_from",
    "log_interval": "train.log_every",
    "logging_steps": "train.log_every",
    "eval_interval": "train.eval_every",
    "eval_steps": "train.eval_every",
    "save_interval": "train.save_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "wandb_log": "train.loggers",
    "wandb_project": "train.loggers",
    "report_to": "train.loggers",
    "logger_name": "train.loggers",
}

# Keys whose unit is another one than in those tools.
UNITS = {
    "train.global_batch_tokens": "it is counted in tokens over all ranks; the accumulation steps follow from it",
    "train.max_tokens": "lengths are counted in tokens, train.global_batch_tokens for each step",
    "train.warmup_tokens": "lengths are counted in tokens, train.global_batch_tokens for each step",
    "train.decay_tokens": "lengths are counted in tokens, train.global_batch_tokens for each step",
    "train.first_batch_tokens": "batches are counted in tokens; train.batch_ramp_tokens says over how many it grows",
    "train.eval_tokens": "lengths are counted in tokens",
    "train.min_lr_ratio": "it is a fraction of train.lr",
}


def rename_old_keys(values, source):
    """Sections with old names of keys -> (the same with the names of now, the old names that were found).

    Anything in `values` that is not a section passes unchanged. source: the file or command line, for messages.
    Raises UserError where a key is given under both names."""
    renamed = values
    found = []
    for old, new in RENAMED.items():
        section, old_name = old.split(".")
        new_name = new.split(".")[1]
        content = renamed.get(section) if isinstance(renamed, dict) else None
        if not isinstance(content, dict) or old_name not in content:
            continue
        if new_name in content:
            raise UserError(f"{source}: {old} is the old name of {new}, and both are given; remove {old}")
        content = {new_name if name == old_name else name: value for name, value in content.items()}
        renamed = renamed | {section: content}
        found.append(old)
    return renamed, found


def meant_by(name):
    """The key that another tool's name stands for, with the difference in its unit: "train.max_tokens? lengths ...".
    None for a name that no table here knows."""
    name = name.replace("-", "_")
    key = OTHER_NAMES.get(name)
    if key is None:  # the former name of a key, or one like it
        former = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
        close = difflib.get_close_matches(name, former, n=1, cutoff=0.8)
        key = former[close[0]] if close else None
    if key is None:
        return None
    return f"{key}? {UNITS[key]}" if key in UNITS else f"{key}?"


def suggest_key(name, section=None):
    """The remedy for a key that `section`, or the top of the file, does not know: another tool's name for a key,
    another section's key, or the nearest name."""
    if meant := meant_by(name):
        return f"did you mean {meant}"
    for other, cls in SECTIONS.items():
        if other != section and name in cls.__dataclass_fields__:
            return f"{name} is a key of the section {other}"
    return did_you_mean(name, SECTIONS[section].__dataclass_fields__ if section else [*SECTIONS, "deepspeed"])


def suggest_flag(name):
    """The remedy for a flag without a section, up to the next sentence: "did you mean --train.lr? ", or ""."""
    if name.replace("-", "_") in ("deepspeed", "deepspeed_config", "ds_config"):
        return "DeepSpeed's keys belong in the section deepspeed of the config file; "
    if meant := meant_by(name):
        return f"did you mean --{meant} " if meant.endswith("?") else f"did you mean --{meant}; "
    sections = {key: section for section, cls in SECTIONS.items() for key in cls.__dataclass_fields__}
    close = difflib.get_close_matches(name.replace("-", "_"), sections, n=1, cutoff=0.8)
    return f"did you mean --{sections[close[0]]}.{close[0]}? " if close else ""
