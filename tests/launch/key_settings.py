"""What keys.py runs and test_keys.py looks at: every key of deepspeed_keys.py that can run on two CPU ranks."""

# (ZeRO stages, precision, DeepSpeed's keys, whether they change the numbers: they then must, but only by rounding)
SAME, ROUNDED = False, True


def zero(**keys):
    return {"zero_optimization": keys}


IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
# as "auto" has it at stage 3, for large matrices
AUTO = zero(contiguous_gradients=False, overlap_comm=True, stage3_allgather_sequential=True)

# Stage 3 comes first: it replaces torch's linear function for the whole process, and the plain runs need the same one.
FEW = [
    ((2, 1), "fp32", zero(round_robin_gradients=True), SAME),
    ((2, 1), "bf16", zero(round_robin_gradients=True, parameter_alignment=True), SAME),
    ((2,), "fp32", zero(round_robin_gradients=True, offload_optimizer={"device": "cpu"}), SAME),
    ((3,), "fp32", zero(sub_group_size=1000, stage3_param_persistence_threshold=0), SAME),
    ((3,), "bf16", IN_FP32 | AUTO, ROUNDED),
    ((1,), "fp32", {"communication_data_type": "bf16"}, ROUNDED),
    ((1,), "fp16", {"fp16": {"loss_scale": 128}}, ROUNDED),
]
EVERY_STAGE = [
    zero(contiguous_gradients=False),
    zero(reduce_scatter=False),
    zero(reduce_bucket_size=1),
    zero(overlap_comm=True),
    zero(enable_sanity_checks=True),
    zero(offload_optimizer={"device": "cpu"}),
    zero(offload_optimizer={"device": "cpu", "pin_memory": False, "ratio": 1.0}),
]
STAGES_1_AND_2 = [
    zero(round_robin_gradients=True),
    zero(parameter_alignment=True),
    zero(round_robin_gradients=True, parameter_alignment=True),
    zero(round_robin_gradients=True, offload_optimizer={"device": "cpu"}),
    zero(parameter_alignment=True, offload_optimizer={"device": "cpu"}),
    zero(round_robin_gradients=True, overlap_comm=True, contiguous_gradients=False),
    zero(round_robin_gradients=True, reduce_scatter=False),
    zero(use_multi_rank_bucket_allreduce=False),
    zero(allgather_bucket_size=1000),
    zero(ignore_unused_parameters=False),
]
STAGE_3 = [
    zero(sub_group_size=1000),
    zero(sub_group_size=1000, offload_optimizer={"device": "cpu"}),
    zero(stage3_prefetch_bucket_size=0),
    zero(stage3_prefetch_bucket_size=10**9),
    zero(stage3_param_persistence_threshold=0),
    zero(stage3_param_persistence_threshold=10**9),
    zero(stage3_model_persistence_threshold=200),
    zero(stage3_max_live_parameters=0),
    zero(stage3_max_reuse_distance=0),
    zero(stage3_gather_16bit_weights_on_model_save=True),
    zero(stage3_use_all_reduce_for_fetch_params=True),
    zero(stage3_allgather_sequential=True),
    AUTO,
    zero(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}, **AUTO["zero_optimization"]),
    zero(memory_efficient_linear=False),
    zero(log_trace_cache_warnings=True),
    zero(offload_param={"device": "cpu"}),
    zero(offload_param={"device": "cpu", "pin_memory": False}, offload_optimizer={"device": "cpu"}),
    zero(round_robin_gradients=True, parameter_alignment=True),
]
FP16 = [
    ({"loss_scale": 128}, ROUNDED),
    ({"initial_scale_power": 4, "loss_scale_window": 100}, ROUNDED),
    ({"hysteresis": 1, "consecutive_hysteresis": True, "min_loss_scale": 2}, SAME),
]

ALL = [
    *[((3, 2, 1), "fp32", keys, SAME) for keys in EVERY_STAGE],
    *[((3,), "fp32", keys, SAME) for keys in STAGE_3],
    *[((2, 1), "fp32", keys, SAME) for keys in STAGES_1_AND_2],
    *[((3, 2, 1), "fp16", {"fp16": keys}, changes) for keys, changes in FP16],
    ((2, 1), "fp16", zero(round_robin_gradients=True, parameter_alignment=True), SAME),
    ((3, 2, 1), "bf16", zero(overlap_comm=True, round_robin_gradients=True, parameter_alignment=True), SAME),
    *[((3, 2), precision, IN_FP32, ROUNDED) for precision in ("bf16", "fp16")],
    ((3, 2), "bf16", IN_FP32 | zero(offload_optimizer={"device": "cpu"}), ROUNDED),
    *[((3, 2, 1), name, {"data_types": {"grad_accum_dtype": name}}, SAME) for name in ("fp32", "bf16", "fp16")],
    *[((3, 2, 1, 0), "fp32", {"communication_data_type": name}, ROUNDED) for name in ("bf16", "fp16")],
    ((3, 2, 1), "bf16", {"communication_data_type": "fp16"}, ROUNDED),
    ((3, 2, 1), "fp16", {"communication_data_type": "bf16"}, ROUNDED),
    ((3, 2, 1, 0), "fp32", {"communication_data_type": "fp32", "zero_allow_untested_optimizer": True}, SAME),
    ((3, 1), "fp32", {"comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]}}, SAME),
    ((2,), "fp32", {"comms_logger": {"enabled": True, "debug": True, "verbose": True}}, SAME),
]

# On four ranks: two halves, which gather apart from each other.
HPZ = [
    ((3,), "fp32", zero(zero_hpz_partition_size=2), SAME),
    ((3,), "fp32", zero(zero_hpz_partition_size=2, stage3_param_persistence_threshold=0), SAME),
    ((3,), "fp32", zero(zero_hpz_partition_size=2, stage3_param_persistence_threshold=10**9), SAME),
    ((3,), "fp32", zero(zero_hpz_partition_size=2, offload_optimizer={"device": "cpu"}), SAME),
    (
        (3,),
        "fp32",
        zero(zero_hpz_partition_size=2, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}),
        SAME,
    ),
    ((3,), "fp32", zero(zero_hpz_partition_size=2, sub_group_size=1000), SAME),
    ((3,), "bf16", zero(zero_hpz_partition_size=2, **AUTO["zero_optimization"]), SAME),
    ((3,), "fp16", zero(zero_hpz_partition_size=4), SAME),
]

# Of the rest, test_nvme.py runs the files, and partial_offload.py the ratio, which needs DeepSpeed's own Adam.
ON_NVME = {
    f"zero_optimization.{section}.{key}"
    for section in ("offload_optimizer", "offload_param")
    for key in ("nvme_path", "buffer_count")
}
ON_NVME |= {"zero_optimization.offload_param.buffer_size"}
ON_NVME |= {f"aio.{key}" for key in ("block_size", "queue_depth", "single_submit", "overlap_events")}
