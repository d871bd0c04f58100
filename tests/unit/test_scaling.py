"""Scaling laws: the fits on points with a known law and on published points, shapes, plans, and the range test."""

import csv
import dataclasses
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest

import plan
import sweep as command
from minzero.config.build import build
from minzero.config.load import load_config
from minzero.config.sections import ModelConfig, TrainConfig
from minzero.config.values import as_flag
from minzero.errors import UserError
from minzero.files import read_json, write_json
from minzero.plot import pyplot
from minzero.scaling import answer, fits, picture, range_test, runs
from minzero.scaling.fits import Law, Points, fit_parabolas, fit_parametric
from minzero.scaling.plan import Options, Sweep
from minzero.scaling.shapes import Family, Grid, count, name_of
from minzero.schedule import Steps, learning_rate
from minzero.sizes import flops_per_token
from tests.helpers.processes import ROOT

TINY = Law(E=1.9, A=60.0, B=300.0, alpha=0.33, beta=0.36)  # as of models of some thousand parameters
TRUE = Law(E=1.7, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
MODEL = ModelConfig(
    n_layer=3, n_head=4, n_embd=64, block_size=128, vocab_size=1024, norm="rmsnorm", position="rotary", bias=False
)
CONTENT = {
    "model": {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 128, "vocab_size": 1024},
    "data": {"path": "data/python"},
    "train": {"micro_batch_size": 16, "global_batch_tokens": 2048, "max_tokens": 4000000, "lr": 8e-3},
}


def runs_of(law, noise=0.0, seed=0, sizes=7, budgets=(1e18, 3e18, 1e19, 3e19), reach=6.0):
    """Points of a law: sizes around the best one of each budget."""
    generator = np.random.default_rng(seed)
    parameters, tokens, budget = [], [], []
    for flops in budgets:
        for factor in np.geomspace(1 / reach, reach, sizes):
            size = law.optimum(flops)[0] * factor
            parameters.append(size)
            tokens.append(flops / 6 / size)
            budget.append(flops)
    parameters, tokens = np.array(parameters), np.array(tokens)
    loss = law.loss(parameters, tokens) * np.exp(generator.normal(0, noise, len(tokens)))
    return Points(parameters, tokens, loss, np.array(budget))


# ---- the parametric fit


def test_the_law_is_found_again_from_points_without_noise():
    found = fit_parametric(runs_of(TRUE), draws=0).law
    assert found == pytest.approx(TRUE, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_law_is_within_the_intervals_of_a_noisy_fit(seed):
    found = fit_parametric(runs_of(TRUE, noise=0.003, seed=seed), draws=100)
    for name in ("E", "alpha", "beta"):
        low, high = found.interval(lambda law, name=name: getattr(law, name))
        assert low - 0.2 * (high - low) <= getattr(TRUE, name) <= high + 0.2 * (high - low), name
        assert 0 < high - low < 0.5
    low, high = found.interval(lambda law: law.exponents[0])
    assert low < TRUE.exponents[0] < high and high - low < 0.1


def test_one_run_that_diverged_does_not_move_the_law():
    """What Huber's function is for."""
    points = runs_of(TRUE)
    points.loss[3] *= 1.5
    assert fit_parametric(points, draws=0).law == pytest.approx(TRUE, rel=0.02)


def test_the_best_size_is_where_the_law_has_its_lowest_loss():
    flops = 1e21
    sizes = np.geomspace(1e7, 1e12, 200_001)
    best = sizes[TRUE.loss(sizes, flops / 6 / sizes).argmin()]
    parameters, tokens = TRUE.optimum(flops)
    assert parameters == pytest.approx(best, rel=1e-3) and 6 * parameters * tokens == pytest.approx(flops)
    ten = TRUE.optimum(10 * flops)
    assert math.log10(ten[0] / parameters) == pytest.approx(TRUE.exponents[0])


def test_the_gradient_of_the_objective_is_that_of_its_value():
    objective = fits.Objective(runs_of(TRUE, noise=0.01))
    theta = np.array([1.0, 1.2, 0.4, 0.3, 0.5])
    for delta in (0.1, 1e-3):
        _, gradient = objective(theta, delta)
        for place, step in enumerate(np.eye(5) * 1e-6):
            slope = (objective(theta + step, delta)[0] - objective(theta - step, delta)[0]) / 2e-6
            assert gradient[place] == pytest.approx(slope, rel=1e-4)


def published():
    """The points of tests/data/chinchilla.csv."""
    lines = (ROOT / "tests/data/chinchilla.csv").read_text().splitlines()
    rows = [[float(cell) for cell in row] for row in csv.reader(line for line in lines if line[0] not in "#p")]
    parameters, flops, loss = np.array(rows).T
    return Points(parameters, flops / 6 / parameters, loss, flops)


def test_published_runs_give_the_published_law():
    """Besiroglu et al. 2024, table 1: without the five runs of the highest loss, E 1.82, A 482, B 2085, alpha 0.348,
    beta 0.366, where Hoffmann et al. have 1.69, 406, 411, 0.34, 0.28."""
    points = published()
    assert len(points.loss) == 245
    chosen = points.loss < np.sort(points.loss)[-5]
    points = Points(*(values[chosen] for values in points))
    law = fit_parametric(points, draws=0).law
    assert pytest.approx(1.8172, abs=0.003) == law.E
    assert law.alpha == pytest.approx(0.3478, abs=0.002) and law.beta == pytest.approx(0.3658, abs=0.003)
    assert pytest.approx(482, rel=0.02) == law.A and pytest.approx(2085, rel=0.04) == law.B
    objective = fits.Objective(points)

    def value(a, b, e, alpha, beta):
        by_size, by_data = objective.centres
        return objective(np.array([a - alpha * by_size, b - beta * by_data, e, alpha, beta]), fits.DELTA)[0]

    ours = value(math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta)
    theirs = value(6.17795598, 7.64273236, 0.59711196, 0.34781303, 0.36585412)  # of their notebook
    hoffmann = value(math.log(406.4), math.log(410.7), math.log(1.69), 0.34, 0.28)
    assert ours <= theirs < hoffmann


def test_a_missing_scipy_is_said_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    open_at(tmp_path, [1e12, 3e12])
    with pytest.raises(UserError, match=r"^scipy: not installed, and the fits need it; pip install scipy$"):
        command.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_too_few_runs_are_refused():
    points = Points(*(values[:5] for values in runs_of(TRUE)))
    with pytest.raises(UserError, match="found 5 runs, expected at least 6"):
        fit_parametric(points)


# ---- parabolas


def test_parabolas_find_the_minimum_and_the_exponent():
    points = runs_of(TRUE, reach=3.0)
    found = fit_parabolas(points, draws=50)
    assert len(found.parabolas) == 4 and not found.passed_over
    for parabola in found.parabolas:
        assert parabola.best == pytest.approx(TRUE.optimum(parabola.budget)[0], rel=0.05)
        assert parabola.height == pytest.approx(TRUE.loss(*TRUE.optimum(parabola.budget)), rel=1e-3)
    assert found.size.exponent == pytest.approx(TRUE.exponents[0], abs=0.01)
    assert found.size.at(1e21) == pytest.approx(TRUE.optimum(1e21)[0], rel=0.1)


def test_a_parabola_is_found_exactly():
    sizes = np.geomspace(1e5, 1e6, 5)
    found = fits.parabola_of(1e12, sizes, 3 + 0.1 * np.log(sizes / 6e5) ** 2)
    assert (found.best, found.height, found.curvature) == pytest.approx((6e5, 3, 0.1)) and found.inside
    assert fits.parabola_of(1e12, sizes, 3 - 0.1 * np.log(sizes / 6e5) ** 2) is None


def test_the_exponent_is_within_the_interval_of_a_noisy_fit():
    found = fit_parabolas(runs_of(TRUE, noise=0.002, reach=4.0), draws=300)
    low, high = fits.interval([size.exponent for size in found.sizes])
    assert low < TRUE.exponents[0] < high and high - low < 0.2


def test_a_minimum_outside_the_runs_is_passed_over():
    points = runs_of(TRUE, reach=3.0)
    keep = (points.budget > 1e18) | (points.parameters > 1.2 * TRUE.optimum(1e18)[0])
    found = fit_parabolas(Points(*(values[keep] for values in points)), draws=0)
    assert len(found.passed_over) == 1 and "smaller sizes are missing" in found.passed_over[0]
    assert [parabola.inside for parabola in found.parabolas] == [False, True, True, True]


# ---- shapes


@pytest.mark.parametrize("how", ["all", "blocks", "flops"])
def test_shapes_are_legal_and_near_the_size_that_was_asked(how):
    family = Family(MODEL, how)
    for target in (1e5, 3e5, 1e6, 3e6, 1e7):
        model = family.nearest(target)
        model.check()
        assert count(model, how) == pytest.approx(target, rel=0.4 if target < 1e6 else 0.1)
        assert model.head_size == MODEL.head_size
        assert 1 / 1.7 < model.n_embd / model.n_layer / family.aspect < 1.7


def test_groups_of_heads_and_the_width_of_the_mlp_scale():
    model = dataclasses.replace(MODEL, n_kv_head=2, mlp_hidden=160)
    found = Family(model).nearest(3e6)
    assert found.n_head % 2 == 0 and found.n_kv_head == found.n_head // 2
    assert found.mlp_hidden == round(2.5 * found.n_embd)


def test_a_model_whose_layers_are_chosen_by_number_is_refused():
    with pytest.raises(UserError, match=r"^model\.no_rotary_layers: found \[1\], which another depth would change"):
        Family(dataclasses.replace(MODEL, no_rotary_layers=[1]))


def test_the_counts_differ_by_the_embeddings():
    blocks, whole = count(MODEL, "blocks"), count(MODEL, "all")
    assert whole == blocks + 1024 * 64 + 64 and count(MODEL, "flops") == flops_per_token(MODEL) / 6


def test_a_larger_budget_finds_the_sizes_of_a_smaller_one():
    grid = Grid(Family(MODEL), 2.0)
    small, large = grid.around(1e12, 5, 20), grid.around(1e13, 5, 20)
    assert len(small) == len(large) == 5 and 2 <= len({*small} & {*large}) < 5
    for flops, powers in ((1e12, small), (1e13, large)):
        ratios = [grid.tokens_per_parameter(power, flops) for power in powers]
        assert max(ratios) > 40 > 20 > 10 > min(ratios)


# ---- the plan of a sweep


def planned(folder="out/x", flops=(1e12, 3e12, 1e13), sizes=5, content=CONTENT, **options):
    return Sweep(folder, json.loads(json.dumps(content)), Options(**options), list(flops), sizes)


def test_runs_have_the_flops_of_their_budget_in_whole_steps():
    sweep = planned()
    assert sum(len(size.budgets) for size in sweep.sizes) == 15
    for size in sweep.sizes:
        assert size.flops_per_token == flops_per_token(size.model)
        assert size.lr == pytest.approx(8e-3 * 64 / size.model.n_embd, rel=1e-3)
        for budget in size.budgets:
            assert budget.tokens % 2048 == 0 and budget.decay_tokens % 2048 == 0
            assert budget.tokens * size.flops_per_token == pytest.approx(budget.flops, rel=0.06)
            assert budget.decay_tokens == pytest.approx(0.2 * budget.tokens, abs=2048)
        assert size.warmup_tokens == round(min(count(size.model), 0.2 * size.budgets[0].tokens))


def value_of(job, name):
    return job.flags[job.flags.index(f"--train.{name}") + 1]


def test_budgets_of_a_size_are_branches_of_one_trunk():
    sweep = planned()
    size = next(size for size in sweep.sizes if len(size.budgets) == 3)
    jobs = sweep.jobs_of(size)
    assert [job.run for job in jobs] == ["trunk", "1e+12", "trunk", "3e+12", "trunk", "1e+13"]
    for trunk, branch in zip(jobs[::2], jobs[1::2], strict=True):
        assert branch.begins == trunk.tokens == branch.budget.stable_tokens
        assert int(value_of(trunk, "keep_checkpoints")) > len(size.budgets)
        step = trunk.tokens // size.global_batch_tokens
        assert value_of(branch, "resume") == f"out/x/{size.name}/trunk/checkpoints/step_{step:08d}"
    assert [job.begins for job in jobs[::2]] == [0, jobs[0].tokens, jobs[2].tokens]


def test_the_rate_of_trunk_and_branch_is_that_of_one_run():
    """In the rates of all steps; that losses are the same is test_sweep's."""
    sweep = planned()
    size = sweep.sizes[2]
    content = sweep.content_of_runs(size)
    trunk, branch = sweep.jobs_of(size)[:2]

    def rates(job, first, last):
        keys = {}
        for name, value in zip(job.flags[::2], job.flags[1::2], strict=True):
            if name.removeprefix("--train.") in ("schedule", "warmup_tokens", "max_tokens", "decay_tokens"):
                value = value if name.endswith("schedule") else int(value)
                keys[name.removeprefix("--train.")] = value
        train = TrainConfig(**{**content["train"], **keys})
        return [learning_rate(train, tokens) for tokens in range(first, last + 1, 2048)]

    early, late = rates(trunk, 2048, trunk.tokens), rates(branch, trunk.tokens, branch.tokens)
    assert early[-1] == pytest.approx(size.lr) and late[0] == pytest.approx(size.lr)
    assert late == sorted(late, reverse=True) and late[-1] == pytest.approx(0.1 * size.lr)
    train = TrainConfig(**{**content["train"], "max_tokens": branch.tokens, **sweep.schedule_keys(branch.budget)})
    whole = [learning_rate(train, tokens) for tokens in range(2048, branch.tokens + 1, 2048)]
    assert early + late[1:] == whole


def test_cosine_has_no_trunk_and_constant_no_branch():
    sweep = planned(schedule="cosine")
    jobs = [job for size in sweep.sizes for job in sweep.jobs_of(size)]
    assert len(jobs) == 15 and all(job.budget and job.begins == 0 for job in jobs)
    sweep = planned(schedule="constant")
    jobs = [job for size in sweep.sizes for job in sweep.jobs_of(size)]
    assert len(jobs) == 15 and all(job.budget and job.run == "trunk" for job in jobs)


def test_rate_and_batch_follow_their_rules():
    sweep = planned(lr_exponent=0.0, batch_exponent=0.5)
    batches = [size.global_batch_tokens for size in sweep.sizes]
    assert {size.lr for size in sweep.sizes} == {8e-3}
    assert batches == sorted(batches) and len({*batches}) > 1 and all(batch % (16 * 128) == 0 for batch in batches)


@pytest.mark.parametrize(
    "section, name, value",
    [("train", "init_from", "out/x"), ("train", "copy_to", "elsewhere"), ("train", "profile", "1:2")],
)
def test_a_config_that_no_run_obeys_is_refused(section, name, value):
    content = CONTENT | {section: CONTENT[section] | {name: value}}
    with pytest.raises(UserError, match=rf"^{section}\.{name}: found {value}, expected null"):
        planned(content=content)


def test_a_run_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"^--flops: 1e\+10: .* would have \d steps, expected at least 10"):
        planned(flops=[1e10, 1e12], tokens_per_parameter=1.0)


# ---- the folder of a sweep


def open_at(folder, flops, sizes=5, content=CONTENT, **options):
    sweep = runs.open_sweep(folder, json.loads(json.dumps(content)), Options(**options), flops, sizes)
    runs.write_record(sweep, sizes)
    return sweep


def test_a_sweep_is_continued_as_it_was_and_larger_budgets_may_be_added(tmp_path):
    open_at(tmp_path, [1e12, 3e12])
    assert open_at(tmp_path, [1e12, 3e12]).flops == [1e12, 3e12]
    assert open_at(tmp_path, [1e13]).flops == [1e12, 3e12, 1e13]
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(UserError, match=r"^--flops: found 5e\+11, less than the 1e\+13 of"):
        open_at(tmp_path, [5e11])
    with pytest.raises(UserError, match=r"^--decay: found 0\.3, but .*sweep\.json says 0\.2; `python sweep\.py"):
        open_at(tmp_path, [1e13], decay=0.3)
    with pytest.raises(UserError, match=r"^--sizes: differs from that in"):
        open_at(tmp_path, [1e13], sizes=7)
    with pytest.raises(UserError, match=r"^the config: differs from that in"):
        open_at(tmp_path, [1e13], content=CONTENT | {"train": CONTENT["train"] | {"lr": 1e-3}})
    assert (tmp_path / "sweep.json").read_bytes() == before


def write_runs(sweep, law=TINY, noise=0.002, spoil=None):
    """The metrics.jsonl that the runs of a sweep would leave if their losses followed a law. spoil: {(size's number,
    budget): the loss, or None for a run that is not there, or a number of bad steps as text}."""
    generator = np.random.default_rng(0)
    for number, size in enumerate(sweep.sizes):
        for job in sweep.jobs_of(size):
            if job.budget is None:
                continue
            loss = law.loss(count(size.model), job.tokens) * math.exp(generator.normal(0, noise))
            found = (spoil or {}).get((number, job.budget.flops), loss)
            folder, step = sweep.folder_of(size, job.run), job.tokens // size.global_batch_tokens
            folder.mkdir(parents=True, exist_ok=True)
            lines = []
            if isinstance(found, str):
                lines = [{"step": step - n, "tokens": 1, "bad_step": "NaN"} for n in range(int(found))]
                found = loss
            if found is not None:
                lines.append({"step": step, "tokens": job.tokens, "val_loss": found})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_that_diverged_are_no_points_and_said(tmp_path):
    sweep = open_at(tmp_path, [1e12, 3e12, 1e13])
    spoil = {(1, 1e12): 7.5, (2, 1e12): None, (3, 3e12): "400", (2, 3e12): "1", (3, 1e13): math.nan}
    write_runs(sweep, spoil=spoil)
    points = runs.Runs(sweep, None).write_points()
    out = {(point["size"], point["budget"]): point["left_out"] for point in points if point["left_out"]}
    names = [size.name for size in sweep.sizes]
    assert set(out) == {(names[1], 1e12), (names[2], 1e12), (names[3], 3e12), (names[3], 1e13)}
    assert "no better than a uniform guess, 6.931" in out[names[1], 1e12] and out[names[2], 1e12] == "not complete"
    assert "steps were bad" in out[names[3], 3e12]
    found = answer.fit(points, "all", draws=0)
    text = "\n".join(answer.fits_text(sweep, found))
    assert text.startswith("11 runs fitted") and text.count("left out: ") == 4
    assert "3e+12: 1 of its steps were bad" in text


def test_a_trunk_that_is_past_a_branch_is_said(tmp_path):
    sweep = open_at(tmp_path, [1e12, 3e12])
    size = next(size for size in sweep.sizes if len(size.budgets) == 2)
    trunk, branch = sweep.jobs_of(size)[:2]
    remedy = f"gone, and a run needs it; remove {tmp_path / size.name}, and the same command trains"
    with pytest.raises(UserError, match=remedy):
        runs.Runs(sweep, None).start(branch)
    later = sweep.folder_of(size, "trunk") / "checkpoints" / "step_00099999"
    later.mkdir(parents=True)
    (later / "state.json").write_text("{}")
    with pytest.raises(UserError, match=remedy):
        runs.Runs(sweep, None).start(trunk)


def test_data_that_the_longest_run_repeats_is_said(small_data):
    sweep = planned(content=CONTENT | {"data": {"path": str(small_data)}})
    (line,) = runs.repeated_data(sweep)
    assert re.match(rf"data\.path: {small_data} has 60,000 tokens, the longest run reads [\d,]+: prepare more", line)


def test_points_outlive_their_runs(tmp_path):
    sweep = open_at(tmp_path, [1e12, 3e12])
    write_runs(sweep)
    before = runs.Runs(sweep, None).write_points()
    for size in sweep.sizes:
        shutil.rmtree(tmp_path / size.name)
    assert runs.Runs(sweep, None).write_points() == before and all(point["loss"] for point in before)


def test_the_answer_is_a_config_that_plan_and_train_accept(tmp_path, capsys):
    law = TINY
    sweep = open_at(tmp_path, [1e12, 3e12, 1e13])
    write_runs(sweep, law)
    command.main([str(tmp_path), "--fit", "--predict", "8e13", "--draws", "100", "--json"])
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    (stated,) = result["predictions"]
    assert stated["low"] < law.loss(stated["parameters"], stated["tokens"]) < stated["high"]
    assert stated["high"] - stated["low"] < 0.05 * stated["loss"]
    config = load_config([stated["config"]])
    assert name_of(config.model) == stated["shape"] and config.train.lr == stated["lr"]
    assert config.train.max_tokens == stated["tokens"] and config.train.global_batch_tokens == 2048
    assert stated["tokens"] * flops_per_token(config.model) == pytest.approx(8e13, rel=0.01)
    others = [sweep.family.nearest(size) for size in np.geomspace(1e5, 1e7, 60)]
    best = min(law.loss(count(model), 8e13 / flops_per_token(model)) for model in others)
    assert law.loss(stated["parameters"], stated["tokens"]) < best * 1.002
    assert f"python plan.py {stated['config']} --gpus 1" in said
    plan.main([stated["config"], "--gpus", "1", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parameters"] == stated["parameters"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    # once its run has begun, a prediction stays what it was, and is compared with what came of it
    run = tmp_path / "predict-8e+13"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": stated["tokens"] // 2048, "val_loss": stated["high"] + 0.1}) + "\n"
    )
    before = read_json(tmp_path / "predictions.json")
    command.main([str(tmp_path), "--fit", "--predict", "8e13", "--draws", "20", "--count", "flops"])
    assert read_json(tmp_path / "predictions.json") == before
    assert "outside the interval" in capsys.readouterr().out


def test_a_prediction_that_train_would_refuse_leaves_no_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("train.lr: found 0")

    sweep = open_at(tmp_path, [1e12, 3e12, 1e13])
    write_runs(sweep, TINY)
    monkeypatch.setattr(answer, "build", refuse)
    with pytest.raises(UserError, match=r"^--predict: found 4e\+13: train.lr: found 0; choose another budget$"):
        command.main([str(tmp_path), "--fit", "--predict", "4e13", "--draws", "20"])
    assert not list(tmp_path.glob("predict-*"))


def test_the_picture_shows_runs_minima_and_predictions(tmp_path):
    sweep = open_at(tmp_path, [1e12, 3e12, 1e13])
    write_runs(sweep)
    found = answer.fit(runs.Runs(sweep, None).write_points(), "all", draws=20)
    figure = picture.figure_of(found, [answer.write_prediction(sweep, found, 4e13)])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["runs of equal FLOPs", "the best size at a budget", "loss over FLOPs", "errors of the fit"]
    shown = figure.axes[0].lines
    assert sum(len(line.get_xdata()) == 5 for line in shown) == 3
    assert len([text for text in figure.axes[2].get_legend().get_texts() if text.get_text() == "predicted"]) == 1
    pyplot().close(figure)


@pytest.mark.parametrize("how", ["blocks", "flops"])
def test_a_refit_is_that_of_a_sweep_begun_with_its_count(tmp_path, how):
    """The law's N is counted as the fit says, so the best shape must be too."""
    written = {}
    for count_of_sweep in ("all", how):
        sweep = open_at(tmp_path / count_of_sweep, [1e12, 3e12, 1e13], count=count_of_sweep)
        write_runs(sweep)
        written[count_of_sweep] = sweep, answer.fit(runs.Runs(sweep, None).write_points(), how, draws=20)
    (begun, _), (other, _) = written[how], written["all"]
    fit = written[how][1]
    assert answer.predict(other, fit, 4e13)[0] == answer.predict(begun, fit, 4e13)[0]
    assert answer.fits_text(other, fit) == answer.fits_text(begun, fit)


@pytest.mark.parametrize(
    "flops, sizes, message",
    [
        ([1e12], 5, "--flops: found 1 budget, with 5 sizes, expected at least 6 runs"),
        ([1e12, 3e12, 3.0000001e12], 5, r"--flops: found two budgets that are 3e\+12 in six digits"),
    ],
)
def test_sweeps_that_cannot_be_fitted_are_refused(tmp_path, flops, sizes, message):
    with pytest.raises(UserError, match=message):
        open_at(tmp_path, flops, sizes)
    assert not (tmp_path / "sweep.json").exists()


def test_a_growing_batch_is_refused_and_other_schedules_keys_are_left_out(tmp_path):
    train = CONTENT["train"] | {"first_batch_tokens": 1024, "batch_ramp_tokens": 10**6, "global_batch_tokens": 4096}
    with pytest.raises(UserError, match=r"train\.first_batch_tokens: found 1024, expected null"):
        open_at(tmp_path, [1e12, 3e12], content=CONTENT | {"train": train | {"micro_batch_size": 8}})
    more = {"schedule": "wsd", "decay_tokens": 200000, "decay_shape": "linear", "keep_every": 3, "sample_every": 5}
    content = CONTENT | {"train": CONTENT["train"] | more | {"eval_tasks": ["x"]}}
    sweep = open_at(tmp_path, [1e12, 3e12, 1e13], content=content, schedule="cosine")
    assert not {"decay_tokens", "decay_shape"} & sweep.content_of(sweep.sizes[0])["train"].keys()
    assert not {"keep_every", "sample_every", "eval_tasks"} & sweep.content_of_runs(sweep.sizes[0])["train"].keys()
    write_runs(sweep)
    answer.write_prediction(sweep, answer.fit(runs.Runs(sweep, None).write_points(), "all", draws=20), 4e13)


@pytest.mark.parametrize(
    "file, content",
    [
        ("sweep.json", {}),
        ("sweep.json", []),
        ("sweep.json", {"config": {}, "options": {}, "flops": ["x"], "sizes": 5}),
        ("sweep.json", {"config": {}, "options": {"x": 1}, "flops": [1e12], "sizes": 5}),
        ("points.json", []),
        ("points.json", {"points": [{}]}),
        ("predictions.json", []),
        ("predictions.json", {"predict-4e+13": {}}),
    ],
)
def test_a_damaged_file_of_a_sweep_is_one_line(tmp_path, file, content):
    write_runs(open_at(tmp_path, [1e12, 3e12, 1e13]))
    write_json(tmp_path / file, content)
    with pytest.raises(UserError, match=rf"{file}: damaged: .*; restore the file, or choose another --out$"):
        command.main([str(tmp_path), "--fit", "--draws", "20"])


def test_a_sweep_that_runs_elsewhere_keeps_its_record(tmp_path):
    open_at(tmp_path, [1e12, 3e12])
    before = (tmp_path / "sweep.json").read_bytes()
    with runs.held(tmp_path), pytest.raises(UserError, match="found a sweep that runs in it"):
        command.main([str(tmp_path), "--flops", "1e13"])
    with pytest.raises(UserError, match="--fit, which starts no run"):
        command.main([str(tmp_path), "--flops", "1e13", "--fit"])
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_a_range_test_has_nothing_of_a_longer_run():
    more = {"copy_to": "s3://bucket/run", "resume": "out/x", "profile": "1:2", "loggers": ["wandb"], "keep_every": 3}
    more |= {"spike_zscore": 3.0, "first_batch_tokens": 128, "batch_ramp_tokens": 10**4, "eval_tasks": ["x"]}
    more |= {"schedule": "wsd", "decay_tokens": 1000, "optimizer": "muon", "muon_lr": 0.02, "lr": 1e-3}
    config = build(
        {"train": more | {"micro_batch_size": 1, "global_batch_tokens": 1024}, "model": {"block_size": 128}}, ""
    )
    keys = range_test.train_keys(config, "out/test", 3e-2, 50)
    config = build({"train": vars(config.train) | keys, "model": {"block_size": 128}}, "")  # accepted
    train = config.train
    assert (train.copy_to, train.resume, train.loggers, train.eval_tasks, train.spike_zscore) == (
        None,
        "auto",
        [],
        [],
        0,
    )
    assert Steps(train).total == 50 and train.muon_lr / train.lr == pytest.approx(20)


def test_a_sweep_in_use_is_refused(tmp_path):
    with runs.held(tmp_path), pytest.raises(UserError, match="found a sweep that runs in it"), runs.held(tmp_path):
        pass
    with runs.held(tmp_path):
        pass


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["configs/scaling-tiny.json"], "--flops: none given"),
        (["configs/scaling-tiny.json", "--flops", "1e12", "--steps", "60"], "--steps: found without --lr_range"),
        (["configs/scaling-tiny.json", "--lr_range", "--predict", "1e12"], "--predict: found with --lr_range"),
        (["--flops", "1e12"], "CONFIG: none given"),
        (["configs/scaling-tiny.json", "--lr_range", "--warmup", "0"], "--warmup: found with --lr_range"),
        (["configs/scaling-tiny.json", "--lr_range", "--train.lr", "0"], "train.lr: found 0"),
        (["configs/scaling-tiny.json", "--flops", "1e12", "3e12", "--fit"], r"--flops: found 1e\+12 with --fit"),
        (["configs/scaling-tiny.json", "--flops", "1e12", "--print", "--predict", "1e13"], "--print: found with"),
        (
            ["configs/scaling-tiny.json", "--flops", "1e12", "3e12", "--schedule", "cosine", "--decay", "0.5"],
            "--decay: found with another --schedule",
        ),
        (["configs/scaling-tiny.json", "--flops", "1e12", "3e12", "--print", "--json"], "--json: found with --print"),
        (
            ["configs/scaling-tiny.json", "--flops", "1e12", "3e12", "--print", "--train.lr", "5"],
            "--flops: the runs of 1x16, of train.lr 20 by --lr_exponent: .* expected at most 10",
        ),
        (
            ["configs/scaling-tiny.json", "--lr_range", "--highest", "10"],
            "--highest: found 10: .* train.weight_decay: .*; lower it",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    with pytest.raises(UserError, match=message):
        command.main(arguments)
    assert not (tmp_path / "out").exists()


GIVEN = {"schedule": "cosine", "warmup_tokens": 5000, "max_tokens": 8192000, "out_dir": "x", "eval_every": 5}
GIVEN |= {"save_best": False, "keep_every": 7}


@pytest.mark.parametrize("name", [*GIVEN, "save_every", "sample_every"])
@pytest.mark.parametrize("how", [["--flops", "1e12", "3e12", "--print"], ["--lr_range"]])
def test_a_key_of_the_command_line_that_is_not_obeyed_is_refused(how, name, tmp_path, monkeypatch):
    """A config file may have it, for a run of its own."""
    monkeypatch.chdir(ROOT)
    arguments = ["configs/scaling-tiny.json", *how, "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=rf"^--train\.{name}: found .*, which .* sets.*; leave it out$"):
        command.main([*arguments, f"--train.{name}", as_flag(GIVEN.get(name, 9))])
    assert not (tmp_path / "out").exists()


def test_every_key_that_the_range_test_sets_is_refused():
    set_here = range_test.train_keys(load_config([str(ROOT / "configs/scaling-tiny.json")]), "x", 1.0, 50)
    assert set(set_here) - {"lr"} == set(range_test.SET_BY_TEST)


# ---- the range test


def test_the_schedule_range_rises_exponentially():
    train = TrainConfig(
        out_dir="x", schedule="range", lr=0.5, min_lr_ratio=1e-3, max_tokens=3000, global_batch_tokens=1
    )
    train.check()
    assert [learning_rate(train, tokens) for tokens in (0, 1000, 2000, 3000)] == pytest.approx([5e-4, 5e-3, 5e-2, 0.5])
    with pytest.raises(UserError, match=r"^train\.min_lr_ratio: found 0\.0 with train\.schedule range"):
        dataclasses.replace(train, min_lr_ratio=0.0).check()


def curve_of(lowest, steps=300, first=1e-4, last=1.0):
    """A loss that falls around a hundredth of `lowest` and rises beyond it, with noise."""
    rates = np.geomspace(first, last, steps)
    logs = np.log10(rates / lowest)
    losses = 6 - 3 / (1 + np.exp(-3 * (logs + 2))) + 0.4 * np.maximum(0, logs) ** 2 * 10
    return rates, losses + np.random.default_rng(0).normal(0, 0.03, steps)


def test_the_suggestion_is_a_tenth_of_where_the_loss_begins_to_rise():
    found = range_test.suggest(*curve_of(0.1))
    assert found.rises and 0.03 < found.lowest < 0.2 and found.suggested == pytest.approx(found.lowest / 10, rel=0.1)
    assert 3e-4 < found.steepest < 3e-3
    assert found.why.startswith("a tenth of ")


def test_where_the_loss_never_rises_the_steepest_rate_is_suggested():
    found = range_test.suggest(*curve_of(10.0, last=0.5))
    assert not found.rises and found.suggested == pytest.approx(found.steepest, rel=0.1)
    assert "a higher --highest would say more" in found.why


def test_a_curve_ends_at_the_first_loss_that_is_no_number(tmp_path):
    lines = [{"step": n, "loss": 4.0 if n < 60 else None, "lr": 0.01 * n, "tokens": n} for n in range(1, 100)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rates, losses = range_test.read_curve(tmp_path)
    assert len(rates) == len(losses) == 59
    write_json(tmp_path / "x.json", {})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:20]))
    with pytest.raises(UserError, match="found 20 steps with a loss, expected at least 30; lower --highest"):
        range_test.read_curve(tmp_path)
