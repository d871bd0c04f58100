"""DeepSpeed's keys: those that a run may set, and the reasons against the others. Names are those of DeepSpeed 0.19.8.

DeepSpeed ignores keys that it does not know. Some that it knows change where weights and Adam's moments lie in memory,
and zero.py reads them from there for a checkpoint. So a key is accepted only if tests/launch/keys.py shows that
DeepSpeed obeys it, and that a run with it saves the right weights and moments and resumes from those of another run.
Needs neither torch nor DeepSpeed; tests/unit/test_deepspeed_keys.py compares the names with DeepSpeed's own.
"""

import typing


class Key(typing.NamedTuple):
    """An accepted key: its JSON type, DeepSpeed's default, its meaning, and the values it may take."""

    kind: object
    default: object
    meaning: str
    choices: list | None = None
    minimum: float | None = None
    maximum: float | None = None


class Refused(typing.NamedTuple):
    """A key that DeepSpeed knows and a run may not set.

    why: the reason, or the key to set instead. unused: values that say that the key is not used. They are accepted, and
    the key is not passed to DeepSpeed."""

    why: str
    unused: tuple = ()


DTYPES = ["fp32", "bf16", "fp16"]
MOST = 10**12  # elements of a buffer; engine.py compares with the memory of the machine


def flag(default, meaning):
    return Key(bool, default, meaning)


def elements(default, meaning, minimum=0, maximum=MOST):
    return Key(int, default, meaning, minimum=minimum, maximum=maximum)


ACCEPTED = {
    "communication_data_type": Key(
        str | None, None, "type in which gradients are summed over ranks; null: the precision's", DTYPES
    ),
    "zero_allow_untested_optimizer": flag(
        False, "allow optimizers that DeepSpeed did not test with ZeRO; those that train.py chooses are tested"
    ),
    "data_types.grad_accum_dtype": Key(
        str | None,
        None,
        "type in which the micro-batches' gradients are added up; null: the precision's; another one only as fp32 at "
        "stage 2 or 3",
        DTYPES,
    ),
    "comms_logger.enabled": flag(False, "count all communication and print a table at the end of the run"),
    "comms_logger.verbose": flag(False, "with train.verbose, a line for each call"),
    "comms_logger.prof_all": flag(True, "count every operation"),
    "comms_logger.prof_ops": Key(list[str], [], "the operations to count where prof_all is false"),
    "comms_logger.debug": flag(False, "also print the names of the calling functions"),
    "fp16.loss_scale": Key(float, 0.0, "a fixed loss scale; 0: a dynamic one", minimum=0, maximum=2.0**24),
    "fp16.initial_scale_power": Key(int, 16, "the dynamic loss scale starts at 2 to this power", minimum=0, maximum=32),
    # at the step at which it doubles, DeepSpeed divides the gradient by the new scale: half a gradient (NOTES.md)
    "fp16.loss_scale_window": Key(
        int, 1000, "good steps after which the dynamic loss scale doubles", minimum=100, maximum=10**9
    ),
    "fp16.hysteresis": Key(int, 2, "overflows after which the dynamic loss scale halves", minimum=1, maximum=10**6),
    "fp16.consecutive_hysteresis": flag(False, "a good step resets the count of overflows"),
    "fp16.min_loss_scale": Key(int, 1, "the lowest dynamic loss scale", minimum=1, maximum=2**32),
    "zero_optimization.stage": Key(
        int,
        0,
        "sharded over ranks; 0: nothing; 1: the optimizer; 2: and the gradients; 3: and the weights",
        [0, 1, 2, 3],
    ),
    "zero_optimization.contiguous_gradients": flag(True, "gather gradients in one buffer before they are summed"),
    "zero_optimization.reduce_scatter": flag(True, "each rank gets only its own part of the summed gradients"),
    "zero_optimization.reduce_bucket_size": elements(5 * 10**8, "elements of gradients summed at a time", minimum=1),
    "zero_optimization.use_multi_rank_bucket_allreduce": flag(
        True, "stages 1, 2: sum the parts of several ranks in one call"
    ),
    "zero_optimization.allgather_bucket_size": elements(
        5 * 10**8, "stages 1, 2: elements of weights gathered at a time"
    ),
    "zero_optimization.overlap_comm": Key(
        bool | None, None, "communicate during the backward pass; null: at stage 3 only"
    ),
    "zero_optimization.round_robin_gradients": flag(
        False, "stages 1, 2: spread neighbouring parameters over different ranks"
    ),
    "zero_optimization.parameter_alignment": flag(False, "stages 1, 2: start each parameter at a multiple of 16 bytes"),
    "zero_optimization.ignore_unused_parameters": flag(True, "stages 1, 2: accept parameters that get no gradient"),
    "zero_optimization.sub_group_size": elements(10**9, "stage 3: elements of the optimizer updated at a time"),
    "zero_optimization.stage3_prefetch_bucket_size": elements(5 * 10**7, "elements of weights fetched ahead of use"),
    "zero_optimization.stage3_param_persistence_threshold": elements(
        10**5, "parameters of at most this many elements stay whole on each rank"
    ),
    "zero_optimization.stage3_model_persistence_threshold": elements(
        2**63 - 1, "elements of all parameters that stay whole together, at most", maximum=2**63 - 1
    ),
    "zero_optimization.stage3_max_live_parameters": elements(10**9, "elements of gathered weights a GPU may hold"),
    "zero_optimization.stage3_max_reuse_distance": elements(
        10**9, "gathered weights that are used again within this many elements are kept"
    ),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": flag(
        False, "for DeepSpeed's own save_16bit_model, which nothing here calls: export.py always gathers"
    ),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": flag(False, "gather weights by an all-reduce"),
    "zero_optimization.stage3_allgather_sequential": flag(False, "gather weights one by one, without a buffer"),
    "zero_optimization.zero_hpz_partition_size": Key(
        int,
        1,
        "stage 3: ranks that together keep a second copy of the weights, from which all but the first pass of a step "
        "gather; 1: no such copy; else the GPUs of a node",
        minimum=1,
        maximum=2**20,
    ),
    "zero_optimization.memory_efficient_linear": flag(True, "stage 3: linear layers keep no gathered weights"),
    "zero_optimization.log_trace_cache_warnings": flag(
        False, "with train.verbose, a line each time stage 3 records the order of its weights again"
    ),
    "zero_optimization.enable_sanity_checks": flag(False, "DeepSpeed's own checks of itself"),
    "zero_optimization.offload_optimizer.device": Key(
        str, "none", "where the optimizer's state is kept; none: on the GPU", ["none", "cpu", "nvme"]
    ),
    "zero_optimization.offload_optimizer.nvme_path": Key(str | None, None, "a folder on each node's own NVMe"),
    "zero_optimization.offload_optimizer.buffer_count": Key(
        int, 4, "NVMe: tensors of the optimizer in memory at a time", minimum=4, maximum=10**4
    ),
    "zero_optimization.offload_optimizer.pin_memory": flag(True, "in page-locked memory"),
    "zero_optimization.offload_optimizer.ratio": Key(
        float, 1.0, "part of the optimizer that leaves the GPU", minimum=0, maximum=1
    ),
    "zero_optimization.offload_param.device": Key(
        str, "none", "stage 3: where the weights are kept; none: on the GPU", ["none", "cpu", "nvme"]
    ),
    "zero_optimization.offload_param.nvme_path": Key(str | None, None, "a folder on each node's own NVMe"),
    "zero_optimization.offload_param.buffer_count": Key(
        int, 5, "NVMe: weights in memory at a time; a block's four and one more", minimum=5, maximum=10**4
    ),
    "zero_optimization.offload_param.buffer_size": elements(
        10**8, "NVMe: elements of the buffer of one weight", minimum=1
    ),
    "zero_optimization.offload_param.pin_memory": flag(True, "in page-locked memory"),
    "aio.block_size": Key(int, 2**20, "NVMe: bytes of one request", minimum=2**12, maximum=2**30),
    "aio.queue_depth": Key(int, 8, "NVMe: requests in flight", minimum=1, maximum=2**12),
    "aio.single_submit": flag(False, "NVMe: submit requests one by one"),
    "aio.overlap_events": flag(True, "NVMe: submit requests while others are in flight"),
}

# DeepSpeed's keys that follow from keys of other sections. Set in two places, they could disagree.
DERIVED_KEYS = {
    "train_batch_size": "train.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_tokens",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule",
    "steps_per_print": "train.log_every",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
}

OFF = ({}, {"enabled": False})
LAYOUT = "it is not shown to keep weights and moments where checkpoints are read from"
UNREAD = "nothing here or in DeepSpeed reads it, so it would not be obeyed"
HIDDEN = "its lines would not be seen; see metrics.jsonl and train.profile"
REMOVED = "DeepSpeed removed it"

REFUSED = {
    "activation_checkpointing": Refused("set train.activation_checkpointing and train.activation_offload", OFF),
    "autotuning": Refused("plan.py --fit finds a setting", OFF),
    "bf16.bf16_master_weights_and_grads": Refused(LAYOUT, (False,)),
    "bf16.bf16_optimizer_states": Refused(LAYOUT, (False,)),
    "bf16.check_grad_overflow": Refused("a NaN must not reach the weights", (True,)),
    "bf16.immediate_grad_update": Refused(UNREAD, (False,)),
    "bfloat16": Refused("it is the old name of bf16, which follows from train.precision", OFF),
    "checkpoint": Refused("checkpoints are train.py's own; set train.save_every", OFF),
    "comet": Refused("set train.loggers, or read metrics.jsonl", OFF),
    "compile": Refused("set train.compile", OFF),
    "csv_monitor": Refused("set train.loggers, or read metrics.jsonl", OFF),
    "data_efficiency": Refused("the data's order is train.py's own", OFF),
    "data_parallel_size": Refused("all ranks are data-parallel"),
    "data_types.buffer_dtype": Refused(LAYOUT, (None,)),
    "data_types.keep_in_fp32_modules": Refused(LAYOUT, ("auto",)),
    "data_types.param_dtype": Refused("set train.precision", (None,)),
    "dataloader_drop_last": Refused("the data's order is train.py's own", (False,)),
    "datastates_ckpt": Refused("checkpoints are train.py's own; set train.save_in_background", OFF),
    "disable_allgather": Refused(UNREAD, (False,)),
    "disable_python_gc": Refused("nothing here would collect in its place", (False,)),
    "dump_state": Refused(HIDDEN, (False,)),
    "expert_parallel": Refused("the models have no experts", OFF),
    "flops_profiler": Refused("metrics.jsonl has tflops and mfu, and train.profile shows operators", OFF),
    "fp16.auto_cast": Refused("the model takes token ids, so it would change nothing", (False,)),
    "fp16.fp16_master_weights_and_grads": Refused(LAYOUT, (False,)),
    "gradient_allreduce_op": Refused("train.lr means a mean over ranks", ("mean",)),
    "gradient_predivide_factor": Refused("DeepSpeed obeys it at some stages only", (1, 1.0)),
    "hybrid_engine": Refused("it serves reinforcement learning", OFF),
    "log_level": Refused("set train.verbose", (None,)),
    "managed_gradient_accumulation": Refused("accumulation follows from train.global_batch_tokens", (True,)),
    "memory_breakdown": Refused(HIDDEN, (False,)),
    "pipeline": Refused("layers are not spread over ranks", OFF),
    "prescale_gradients": Refused("DeepSpeed obeys it at some stages only", (False,)),
    "seq_parallel_communication_data_type": Refused("sequences are not spread over ranks", ("fp32",)),
    "sequence_parallel_size": Refused("sequences are not spread over ranks", (1,)),
    "tensor_parallel": Refused("matrices are not spread over ranks but by ZeRO-3", OFF),
    "tensorboard": Refused("set train.loggers", OFF),
    "timers": Refused(HIDDEN, ({}, {"throughput": {"enabled": False}})),
    "torch_autocast": Refused("set train.precision", OFF),
    "use_data_before_expert_parallelism": Refused("the models have no experts", (False,)),
    "vocabulary_size": Refused("set model.vocab_size", (None,)),
    "wall_clock_breakdown": Refused(HIDDEN, (False,)),
    "wandb": Refused("set train.loggers", OFF),
    "weight_quantization": Refused(LAYOUT, OFF),
    "zero_force_ds_cpu_optimizer": Refused("train.py chooses the optimizer", (False,)),
    "aio.intra_op_parallelism": Refused(LAYOUT, (1,)),
    "aio.use_gds": Refused(LAYOUT, (False,)),
    "zero_optimization.allgather_partitions": Refused(UNREAD, (True,)),
    "zero_optimization.compute_grad_norm": Refused("bad steps are found by the norm", (True,)),
    "zero_optimization.cpu_offload": Refused("set offload_optimizer.device", (None, False)),
    "zero_optimization.cpu_offload_param": Refused("set offload_param.device", (None, False)),
    "zero_optimization.cpu_offload_use_pin_memory": Refused("set offload_optimizer.pin_memory", (None,)),
    "zero_optimization.elastic_checkpoint": Refused("checkpoints are train.py's own, and resume anywhere", (False,)),
    "zero_optimization.leaf_module": Refused(LAYOUT, ({}, None)),
    "zero_optimization.legacy_stage1": Refused(REMOVED, (False,)),
    "zero_optimization.load_from_fp32_weights": Refused("it is for DeepSpeed's own checkpoints", (True,)),
    "zero_optimization.override_module_apply": Refused("without it the initial weights are others", (True,)),
    "zero_optimization.pipeline_loading_checkpoint": Refused("it is for DeepSpeed's own checkpoints", (False,)),
    "zero_optimization.save_muon_momentum_buffer_in_memory": Refused(
        "it is of DeepSpeed's own Muon, and train.optimizer muon is another", (False,)
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": Refused(
        "its name is stage3_gather_16bit_weights_on_model_save", (False,)
    ),
    "zero_optimization.stage3_module_granularity_threshold": Refused(
        "the backward pass of a model with tied embeddings fails with it", (0,)
    ),
    "zero_optimization.zenflow": Refused(LAYOUT, (None,)),
    "zero_optimization.zero_quantized_gradients": Refused(LAYOUT, (False,)),
    "zero_optimization.zero_quantized_nontrainable_weights": Refused(LAYOUT, (False,)),
    "zero_optimization.zero_quantized_weights": Refused(LAYOUT, (False,)),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": Refused("it belongs to super_offload", (0.8,)),
    "zero_optimization.offload_optimizer.fast_init": Refused(LAYOUT, (False,)),
    "zero_optimization.offload_optimizer.pipeline_read": Refused(LAYOUT, (False,)),
    "zero_optimization.offload_optimizer.pipeline_write": Refused(LAYOUT, (False,)),
    "zero_optimization.offload_optimizer.super_offload": Refused(LAYOUT, (False,)),
    "zero_optimization.offload_param.max_in_cpu": Refused(LAYOUT, (10**9,)),
    # aliases that DeepSpeed accepts; its documentation writes them with stage3_
    **{
        f"zero_optimization.{name}": Refused(f"write stage3_{name}")
        for name in (
            "allgather_sequential gather_16bit_weights_on_model_save max_live_parameters max_reuse_distance "
            "model_persistence_threshold module_granularity_threshold param_persistence_threshold "
            "prefetch_bucket_size use_all_reduce_for_fetch_params"
        ).split()
    },
    # keys that DeepSpeed 0.19.8 refuses itself, with a traceback
    "amp": Refused(f"{REMOVED} (NVIDIA Apex's AMP); set train.precision"),
    "compression_training": Refused(f"{REMOVED} (the compression library)"),
    "curriculum_learning": Refused(f"{REMOVED}, and the data's order is train.py's own"),
    "eigenvalue": Refused(f"{REMOVED} (quantization while training)"),
    "elasticity": Refused(f"{REMOVED}; a run resumes on any number of ranks without it"),
    "graph_harvesting": Refused(REMOVED),
    "nebula": Refused(f"{REMOVED}; checkpoints are train.py's own"),
    "progressive_layer_drop": Refused(REMOVED),
    "quantize_training": Refused(f"{REMOVED} (quantization while training)"),
    "sparse_attention": Refused(REMOVED),
    "sparse_gradients": Refused(f"{REMOVED}; gradients of embeddings are dense"),
    "zero_optimization.mics_hierarchical_params_gather": Refused(f"{REMOVED} (MiCS); stage 3 shards over all ranks"),
    "zero_optimization.mics_shard_size": Refused(f"{REMOVED} (MiCS); stage 3 shards over all ranks"),
    "zero_optimization.zeropp_loco_param": Refused(f"{REMOVED} (LoCo-Zero++)"),
}
# Sections that hold accepted keys. An offload section may be null.
SECTIONS = {key.rpartition(".")[0] for key in ACCEPTED if "." in key} | {"bf16", "zero_optimization"}
