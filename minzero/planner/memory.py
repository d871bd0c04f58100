"""How much memory a setting takes: on a GPU (`simulate`), in the node's CPU memory, and of a checkpoint on disk.

Nothing here is fitted, and a GPU's memory has no closed formula: the peak is the largest of five moments (forward,
loss, backward, reduction, step), and which one wins depends on the setting. So a step is replayed, allocation by
allocation: activations.py describes the model, replay.py and stage3.py the engine.
"""

import math

from minzero.planner.replay import Stage0, Stage12
from minzero.planner.stage3 import Stage3
from minzero.sizes import check_counted, parameter_sizes

# DeepSpeed's buffers between a drive and the GPU: as many sub-groups of float32, and elements (buffer_count times
# buffer_size), by default.
NVME_OPTIMIZER_BUFFERS, NVME_WEIGHT_BUFFERS = 4, 5 * 10**8
ENGINES = {0: Stage0, 1: Stage12, 2: Stage12, 3: Stage3}


def replayed(settings):
    """The engine that has replayed one step of these Settings: its memory has the peak of each phase, its traffic what
    was sent. Raises UserError for a key of the model section that the replay does not know."""
    check_counted(settings.model)
    engine = ENGINES[settings.stage](settings)
    engine.run()
    return engine


def simulate(settings):
    """(the Memory of one replayed step, the number of parameters)."""
    engine = replayed(settings)
    return engine.memory, engine.size


def peak_bytes(settings):
    """The most that one GPU's tensors take in a step of these Settings."""
    memory, _ = simulate(settings)
    return max(total for total, _ in memory.peaks.values())


def offloaded_activations(settings):
    """Bytes of one micro-batch's inputs of recomputed blocks in CPU memory (train.activation_offload)."""
    s = settings
    recomputed_blocks = len(s.recomputation.of_blocks(range(s.model.n_layer))) if s.activation_offload else 0
    return recomputed_blocks * s.tokens * s.model.n_embd * s.bytes


def background_copy(settings, parameters):
    """Bytes of CPU memory that a rank takes while a checkpoint is being written (train.save_in_background): a copy of
    its part of the float32 weights and of both moments (checkpoint.py), at any stage."""
    return checkpoint_bytes(settings, parameters) / settings.world_size if settings.save_in_background else 0


def offloaded_elements(settings, parameters):
    """Number of parameters whose optimizer one rank keeps in CPU memory, if it offloads any."""
    on_gpu = 0
    if settings.stage == 3 and settings.offload_ratio < 1:
        on_gpu = sum(Stage3(settings).sub_groups_on_gpu())
    return parameters / settings.world_size - on_gpu


def cpu_memory(settings, parameters, ranks):
    """(lowest, highest) bytes of CPU memory of a node with this many ranks, for tensors, the copy of a checkpoint that
    is being written included; each rank's Python, torch and CUDA libraries come on top. PyTorch may round each pinned
    block up to a power of two (2.13 does)."""
    s = settings
    pageable = background_copy(s, parameters)
    if s.offload_optimizer and not s.optimizer_on_nvme:
        pageable += (s.master_bytes + s.moment_bytes) * offloaded_elements(s, parameters)
    blocks = pinned_blocks(s, parameters)
    rounded = sum(1 << (math.ceil(block) - 1).bit_length() for block in blocks if block)
    return round((pageable + sum(blocks)) * ranks), round((pageable + rounded) * ranks)


def pinned_blocks(settings, parameters):
    """Bytes of each pinned block of one rank's CPU memory, as DeepSpeed 0.19.8 makes them (stage3.py,
    partition_parameters.py, stage_1_and_2.py). Of what is on NVMe only the buffers are in CPU memory."""
    s = settings
    shard = parameters / s.world_size
    recomputed = len(s.recomputation.of_blocks(range(s.model.n_layer)))
    blocks = [offloaded_activations(s) / recomputed] * recomputed if s.activation_offload and recomputed else []
    if s.offload_optimizer:
        # the sums of gradients (stage 3) or 16-bit weights (1, 2)
        blocks.append((s.accumulation_bytes or s.bytes if s.stage == 3 else s.bytes) * shard)
    if s.optimizer_on_nvme:
        blocks += [4 * min(shard, s.sub_group_size)] * NVME_OPTIMIZER_BUFFERS
    elif s.offload_optimizer:  # float32 gradients, by sub-groups at stage 3
        offloaded = offloaded_elements(s, parameters)
        whole, rest = divmod(offloaded, s.sub_group_size) if s.stage == 3 else (0, offloaded)
        blocks += [4 * s.sub_group_size] * int(whole) + [4 * rest]
    if s.param_on_nvme:
        blocks.append(NVME_WEIGHT_BUFFERS * s.bytes)
    elif s.offload_param:  # the flat weights, and zero.Init's pieces, which stay in the host cache
        sizes = parameter_sizes(s.model)
        pieces = s.model.n_layer * sizes.block + sizes.outside
        blocks += [s.bytes * shard] + [s.bytes * size / s.world_size for size in pieces]
    return blocks


def checkpoint_bytes(settings, parameters):
    """Bytes of one checkpoint, at any stage: master weights and moments (zero.py)."""
    return round(parameters * (settings.master_bytes + settings.moment_bytes))
