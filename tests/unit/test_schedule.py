"""Steps of a batch that grows, and what the config refuses of schedules."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minzero import resume
from minzero.cards import card_named
from minzero.config.build import build
from minzero.config.deepspeed import gradient_accumulation
from minzero.config.sections import TrainConfig
from minzero.errors import UserError
from minzero.planner.batches import is_legal, legal_batch
from minzero.planner.gpus import Hardware
from minzero.planner.plan import plan_run
from minzero.schedule import Steps, batch_tokens, learning_rate, possible_jumps, real_jumps

H100 = card_named("h100")
GPT3 = {"first_batch_tokens": 32768, "global_batch_tokens": 3211264, "batch_ramp_tokens": 4 * 10**9}
GPT3 |= {"max_tokens": 300 * 10**9, "micro_batch_size": 1}


@given(
    unit=st.integers(1, 7),
    first=st.integers(1, 9),
    more=st.integers(0, 40),
    ramp=st.integers(1, 5000),
    jumps=st.integers(0, 5),
    length=st.integers(60, 9000),
    share=st.floats(0, 1),
)
@settings(max_examples=300)
def test_a_run_that_stops_anywhere_has_the_same_steps(unit, first, more, ramp, jumps, length, share):
    train = SimpleNamespace(
        first_batch_tokens=unit * first,
        global_batch_tokens=unit * (first + more),
        batch_ramp_tokens=ramp,
        batch_ramp_jumps=jumps,
        max_tokens=unit * length,
    )
    whole = Steps(train)
    ends = [whole.tokens_at(step) for step in range(whole.total + 1)]
    sizes = [whole.tokens_of(step) for step in range(1, whole.total + 1)]
    assert ends[0] == 0 and ends[-1] <= train.max_tokens < ends[-1] + batch_tokens(train, ends[-1])
    assert sizes == sorted(sizes) and all(size % unit == 0 for size in sizes)
    assert not sizes or sizes[0] == train.first_batch_tokens
    assert all(size == batch_tokens(train, begin) for begin, size in zip(ends, sizes, strict=False))
    assert all(size == train.global_batch_tokens for begin, size in zip(ends, sizes, strict=False) if begin >= ramp)
    done = int(share * whole.total)
    rest = Steps(train, done, ends[done])
    assert rest.total == whole.total and [rest.tokens_at(step) for step in range(done, whole.total + 1)] == ends[done:]


def test_gpt_3s_batch():
    """32k to 3.2M tokens over the first 4 billion (Brown et al. 2020, section 2.3 and table 2.1)."""
    train = TrainConfig(**GPT3)
    assert [batch_tokens(train, place * 10**9) for place in (0, 1, 2, 4, 299)] == [
        32768,
        819200,
        1605632,
        3211264,
        3211264,
    ]
    jumps = dataclasses.replace(train, global_batch_tokens=2**20, batch_ramp_jumps=5)
    assert [batch_tokens(jumps, int(place * 0.8e9)) for place in range(6)] == [2**power for power in range(15, 21)]
    steps = Steps(train)
    mean = steps.ends[-1] / (len(steps.ends) - 1)
    assert 600_000 < mean < 1_000_000, "of a linear ramp in tokens most steps are small ones"


@pytest.mark.parametrize(
    "train, fault",
    [
        ({"decay_tokens": 5}, "train.decay_tokens: found 5 with train.schedule cosine, .* set train.schedule to wsd"),
        ({"decay_shape": "linear"}, 'train.decay_shape: found "?linear"? with train.schedule cosine'),
        ({"schedule": "wsd", "decay_tokens": 901, "warmup_tokens": 100}, "found 901 .* expected at most 900"),
        ({"schedule": "wsd", "warmup_tokens": 900}, "train.decay_tokens: found 200 .* expected at most 100"),
        ({"schedule": "wsd", "warmup_tokens": 9000}, "expected at most 0"),
        ({"batch_ramp_tokens": 5}, "train.batch_ramp_tokens: found 5 with train.first_batch_tokens null"),
        ({"batch_ramp_jumps": 5}, "train.batch_ramp_jumps: found 5 with train.first_batch_tokens null"),
        ({"first_batch_tokens": 50}, "train.batch_ramp_tokens: found 0 with train.first_batch_tokens 50"),
        ({"first_batch_tokens": 200, "batch_ramp_tokens": 5}, "found 200, which is more than .* 100"),
        (
            {"first_batch_tokens": 100, "batch_ramp_tokens": 5},
            "found 100, which is train.global_batch_tokens.* or null",
        ),
        ({"first_batch_tokens": 25, "batch_ramp_tokens": 5, "batch_ramp_jumps": 1000}, "of 25, .* expected at most 3"),
        ({"first_batch_tokens": 0, "batch_ramp_tokens": 5}, "train.first_batch_tokens: found 0"),
        ({"first_batch_tokens": 50, "batch_ramp_tokens": 500, "profile": "16:16"}, "of 1 to 15"),
    ],
)
def test_what_is_refused(train, fault):
    with pytest.raises(UserError, match=fault):
        build({"train": {"max_tokens": 1000, "global_batch_tokens": 100} | train}, "x")


def test_the_first_batch_divides_as_well():
    batch = {"global_batch_tokens": 64 * 32, "first_batch_tokens": 24 * 32, "batch_ramp_tokens": 10**4}
    config = build(
        {"model": {"block_size": 32, "n_embd": 64, "n_head": 2}, "train": batch | {"micro_batch_size": 4}}, "x"
    )
    assert gradient_accumulation(config, 2) == 8
    with pytest.raises(
        UserError, match=r"train.first_batch_tokens: 768 is not a multiple .* = 512; set .* to 512 or 1024"
    ):
        gradient_accumulation(config, 4)
    assert is_legal(config, 2) and not is_legal(config, 4)
    legal = legal_batch(config, 4)
    assert is_legal(legal, 4) and gradient_accumulation(legal, 4)
    assert legal.train.first_batch_tokens in (512, 1024) and legal.train.global_batch_tokens == 2048


def test_a_planned_ramp_is_one_that_train_takes():
    """On more ranks there are fewer sizes between the two, or none."""
    batch = {"global_batch_tokens": 64 * 32, "first_batch_tokens": 24 * 32, "batch_ramp_tokens": 10**4}
    batch |= {"batch_ramp_jumps": 3, "micro_batch_size": 4}
    config = build({"model": {"block_size": 32, "n_embd": 64, "n_head": 2}, "train": batch}, "x")
    for ranks in (2, 4, 8, 16):
        train = legal_batch(config, ranks).train
        train.check()
        assert train.batch_ramp_jumps == {2: 3, 4: 1, 8: 1, 16: 0}[ranks]


def test_the_jumps_of_a_run_are_counted():
    train = TrainConfig(**GPT3 | {"global_batch_tokens": 2**20, "batch_ramp_jumps": 5})
    assert real_jumps(train) == 5
    assert real_jumps(dataclasses.replace(train, batch_ramp_tokens=3 * 2**15)) == 2, "steps that are longer than jumps"
    assert possible_jumps(64, 256, 1000) == 3 and possible_jumps(64, 256, 2) == 2


def checkpoint_of(config, tokens):
    return {"config": json.loads(json.dumps(config.to_dict())), "step": 1, "tokens": tokens}


def test_a_ramp_is_changed_only_after_its_end_or_by_leave():
    saved = build({"train": GPT3}, "x")
    state = checkpoint_of(saved, 10**9)
    resume.check_same_run("step_1", state, saved)
    longer = build({"train": GPT3 | {"batch_ramp_tokens": 2 * 10**9}}, "x")
    with pytest.raises(UserError, match=r"train.batch_ramp_tokens 4000000000 -> 2000000000.* train.allow_changed"):
        resume.check_same_run("step_1", state, longer)
    none = {name: value for name, value in GPT3.items() if name not in ("first_batch_tokens", "batch_ramp_tokens")}
    with pytest.raises(UserError, match=r"train.first_batch_tokens 32768 -> null"):
        resume.check_same_run("step_1", state, build({"train": none}, "x"))
    resume.check_same_run("step_1", checkpoint_of(saved, 5 * 10**9), build({"train": none}, "x"))
    longer.train.allow_changed = ["train.global_batch_tokens"]
    resume.check_same_run("step_1", state, longer)


def test_the_rate_of_a_branch_is_that_of_the_planned_run():
    long = TrainConfig(schedule="wsd", decay_tokens=0, max_tokens=10**6, warmup_tokens=1000, global_batch_tokens=100)
    branch = dataclasses.replace(long, max_tokens=5 * 10**5, decay_tokens=10**5, min_lr_ratio=0.0)
    assert learning_rate(long, 10**6) == long.lr
    assert [learning_rate(branch, tokens) for tokens in (500, 4 * 10**5, 5 * 10**5)] == [long.lr / 2, long.lr, 0]
    fifth = dataclasses.replace(branch, decay_tokens=None)
    assert [learning_rate(fifth, tokens) for tokens in (400_000, 425_000)] == [long.lr, long.lr / 2]


def test_the_planner_counts_smaller_steps():
    """The steps of a growing batch are more, and each has a part that does not shrink."""
    sections = {"train": {"global_batch_tokens": 2**20, "max_tokens": 10**10, "micro_batch_size": 8, "eval_every": 0}}
    hardware = Hardware(8, 1, H100.memory, H100)
    plain = plan_run(build(sections, "x"), hardware)
    sections["train"] |= {"first_batch_tokens": 2**16, "batch_ramp_tokens": 5 * 10**9}
    grows = plan_run(build(sections, "x"), hardware)
    assert plain["days"] < grows["days"] < 1.5 * plain["days"] and plain["step_seconds"] == grows["step_seconds"]
