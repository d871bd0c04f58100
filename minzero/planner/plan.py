"""The plan of one configuration on given hardware: memory, speed and cost, as one dictionary."""

import dataclasses

from minzero.planner.gpus import PROCESS, USABLE
from minzero.planner.memory import background_copy, checkpoint_bytes, cpu_memory, replayed
from minzero.planner.replay import PARTS
from minzero.planner.settings import settings_of
from minzero.planner.speed import Assumptions, speed_and_cost
from minzero.sizes import count_parameters


def room_in(settings, engine, hardware):
    """(whether a GPU's memory is enough, whether the node's RAM is). engine: the replayed one."""
    gpu_bytes = max(total for total, _ in engine.memory.peaks.values())
    ranks = hardware.gpus // hardware.nodes  # of a node
    _, cpu_bytes = cpu_memory(settings, engine.trained, ranks)
    fits_cpu = hardware.cpu_bytes is None or cpu_bytes + ranks * PROCESS <= hardware.cpu_bytes
    return gpu_bytes <= USABLE * hardware.memory_bytes, fits_cpu


def plan_run(config, hardware, assumptions=None, code=None, replay=replayed):
    """All there is to say about one setting, as `plan.py --json` prints it. Sizes are in bytes, of one GPU (gpu_) or
    one node (cpu_). replay: memory.replayed, or one that remembers. Raises UserError for a model that the replay does
    not know."""
    assumptions = (assumptions or Assumptions()).on(hardware.card)
    settings = settings_of(config, hardware.gpus, hardware.memory_bytes, hardware.card)
    engine = replay(settings)
    memory, trained = engine.memory, engine.trained
    parameters = engine.size + settings.packed - settings.adapters
    by_size = sorted(((total, phase) for phase, (total, _) in memory.peaks.items()), reverse=True)
    (gpu_bytes, peak_phase), (second_bytes, second_phase) = by_size[:2]
    held_at_peak = memory.peaks[peak_phase][1]
    ranks = hardware.gpus // hardware.nodes  # of a node
    cpu_bytes_range = cpu_memory(settings, trained, ranks)
    fits_gpu, fits_cpu = room_in(settings, engine, hardware)
    return {
        "gpus": hardware.gpus,
        "nodes": hardware.nodes,
        "parameters": parameters,
        "active_parameters": count_parameters(config.model)[1] if config.model.n_expert else parameters,
        "gpu_bytes": gpu_bytes,
        "gpu_parts": {part: held_at_peak.get(part, 0) for part in PARTS},
        "peak_phase": peak_phase,
        "runner_up": {"phase": second_phase, "gpu_bytes": second_bytes},
        "phases": {phase: total for phase, (total, _) in memory.peaks.items()},
        "gpu_fraction": gpu_bytes / hardware.memory_bytes,
        "fits": fits_gpu and fits_cpu,
        "fits_gpu": fits_gpu,
        "fits_cpu": fits_cpu,
        "cpu_bytes": cpu_bytes_range[1],
        "cpu_bytes_range": list(cpu_bytes_range),
        "trained_parameters": trained,
        "cpu_bytes_of_saving": round(background_copy(settings, trained) * ranks),
        "checkpoint_bytes": checkpoint_bytes(settings, trained),
        "micro_batch_size": config.train.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "stage": settings.stage,
        "offload_optimizer": settings.offload_optimizer,
        "offload_param": settings.offload_param,
        "activation_checkpointing": config.train.activation_checkpointing,
        **speed_and_cost(config, settings, engine, hardware, assumptions, code),
        "measured": code.source if code else None,
        "assumptions": dataclasses.asdict(assumptions),
    }
