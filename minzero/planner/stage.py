"""The ZeRO stage of a run that leaves it to the planner, and advice to one that does not."""

import copy

from minzero.config.deepspeed import check_stage, zero_stage
from minzero.errors import UserError
from minzero.planner.gpus import GiB
from minzero.planner.plan import plan_run

WORTH_A_LINE = 1.02  # times as fast


def with_stage(config, stage):
    """A copy of a Config at another ZeRO stage."""
    config = copy.deepcopy(config)
    config.deepspeed.setdefault("zero_optimization", {})["stage"] = stage
    return config


def plans_by_stage(config, hardware):
    """{stage: its plan} of the stages that go with the other keys of a Config and fit into the memory. Raises UserError
    for a model that the planner does not know."""
    found = {}
    for stage in range(4):
        candidate = with_stage(config, stage)
        try:
            check_stage(candidate.deepspeed, config.train.precision)
        except UserError:
            continue
        plan = plan_run(candidate, hardware)
        if plan["fits"]:
            found[stage] = plan
    return found


def fastest(plans):
    """The stage of the fastest of these plans, of equally fast ones the lowest; without speeds, the lowest."""
    return max(plans, key=lambda stage: (plans[stage]["tokens_per_second"] or 0, -stage))


def with_chosen_stage(config, hardware):
    """A Config with a number in place of a stage "auto": the fastest that fits, and 3 if none does. Others are returned
    as they are. Raises UserError."""
    if zero_stage(config.deepspeed) != "auto":
        return config
    plans = plans_by_stage(config, hardware)
    chosen = with_stage(config, fastest(plans) if plans else 3)
    check_stage(chosen.deepspeed, chosen.train.precision)
    return chosen


def advice(config, hardware):
    """A line on a stage that fits and is faster than that of the Config, or None."""
    try:
        plans = plans_by_stage(config, hardware)
    except UserError:
        return None
    stage = zero_stage(config.deepspeed)
    if hardware.peak is None or stage not in plans:
        return None
    best = fastest(plans)
    times = plans[best]["tokens_per_second"] / plans[stage]["tokens_per_second"]
    if times < WORTH_A_LINE:
        return None
    needs = plans[best]["gpu_bytes"] / GiB
    return (
        f"ZeRO-{best} would fit too ({needs:.1f} of {hardware.gibibytes} GiB), and by plan.py's estimate be "
        f"{times:.2f} times as fast; deepspeed.zero_optimization.stage auto takes the fastest stage that fits"
    )
