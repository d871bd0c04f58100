"""The ZeRO stage of a run that leaves it to the planner, and advice to one that does not."""

import copy

from minzero.config.deepspeed import check_stage, zero_stage
from minzero.errors import UserError
from minzero.planner.gpus import GiB
from minzero.planner.memory import replayed
from minzero.planner.plan import plan_run
from minzero.planner.settings import settings_of
from minzero.planner.speed import communicated_bytes

WORTH_A_LINE = 1.02  # times as fast


def with_stage(config, stage):
    """A copy of a Config at another ZeRO stage."""
    config = copy.deepcopy(config)
    config.deepspeed.setdefault("zero_optimization", {})["stage"] = stage
    return config


def plans_by_stage(config, hardware, precision):
    """{stage: its plan} of the stages that go with the other keys of a Config and fit into the memory. precision: bf16,
    fp16, fp32 or auto. Raises UserError for a model that the planner does not know."""
    found = {}
    for stage in range(4):
        candidate = with_stage(config, stage)
        candidate.train.precision = precision
        try:
            check_stage(candidate.deepspeed, precision)
        except UserError:
            continue
        plan = plan_run(candidate, hardware)
        if plan["fits"]:
            found[stage] = plan
    return found


def fastest(plans):
    """The stage of the fastest of these plans, of equally fast ones the lowest; without speeds, the lowest."""
    return max(plans, key=lambda stage: (plans[stage]["tokens_per_second"] or 0, -stage))


def with_chosen_stage(config, hardware, precision=None):
    """A Config with a number in place of a stage "auto": the fastest that fits, and 3 if none does. Others are returned
    as they are. precision: that of the run; None: the Config's, which may be auto. Raises UserError."""
    if zero_stage(config.deepspeed) != "auto":
        return config
    precision = precision or config.train.precision
    plans = plans_by_stage(config, hardware, precision)
    chosen = with_stage(config, fastest(plans) if plans else 3)
    check_stage(chosen.deepspeed, precision)
    return chosen


def advice(config, hardware, precision):
    """A line on a lower stage that fits as well and is faster, or None. precision: that of the run."""
    if hardware.gpus == 1 or hardware.peak is None:
        return None
    try:
        plans = plans_by_stage(config, hardware, precision)
    except UserError:
        return None
    stage = zero_stage(config.deepspeed)
    if stage not in plans or fastest(plans) >= stage:
        return None
    best = fastest(plans)
    times = plans[best]["tokens_per_second"] / plans[stage]["tokens_per_second"]
    if times < WORTH_A_LINE:
        return None
    sent = {number: sent_in_a_step(with_stage(config, number), hardware) for number in (stage, best)}
    if sent[stage] < WORTH_A_LINE * sent[best]:
        return None  # what is left are milliseconds of the host, which differ from one to the other
    needs = f"{plans[best]['gpu_bytes'] / GiB:.1f} of {hardware.memory_bytes / GiB:.0f} GiB"
    several_in_16_bits = plans[best]["gradient_accumulation_steps"] > 1 and precision != "fp32"
    price = ", with gradients added up in 16 bits" if best < 2 and several_in_16_bits else ""
    return (
        f"ZeRO-{best} would fit too ({needs}) and send {sent[stage] / sent[best]:.1f} times less{price}; "
        f"by plan.py's estimate it is {times:.2f} times as fast; "
        "deepspeed.zero_optimization.stage auto takes the fastest stage that fits"
    )


def sent_in_a_step(config, hardware):
    """Bytes that a rank sends in a step."""
    settings = settings_of(config, hardware.gpus, hardware.memory_bytes, hardware.card)
    return communicated_bytes(settings, replayed(settings))
