"""Each recipe of clusters/ states tokens, hours and money of the run that it launches, as plan.py computes them."""

import re

import pytest

import plan
from minzero.files import ROOT

RECIPES = sorted(path.name for path in (ROOT / "clusters").iterdir() if path.suffix != ".dockerignore")
GPUS = (  # how a recipe says what it takes: nodes and GPUs of each
    r"--nodes (\d+) --ntasks-per-node (\d+)",
    r"--nnodes (\d+) --nproc_per_node (\d+)",
    r"num_nodes: (\d+)\n(?:.*\n)*?.*accelerators: H100:(\d+)",
)


@pytest.fixture(scope="module")
def planned():
    """plan.py's line on time and money, by its arguments; several recipes launch the same run."""
    return {}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_what_its_run_takes(name, planned, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "clusters" / name).read_text()
    command, stated = re.search(r"^# python plan.py (.*): (.* days for .*)$", text, re.M).groups()
    if command not in planned:
        plan.main(command.split())
        planned[command] = next(line for line in capsys.readouterr().out.splitlines() if "GPU hours" in line)
    parts = stated.split(", ")
    assert len(parts) == 3 and "tokens" in parts[0] and "GPU hours" in parts[1] and parts[2].startswith("$")
    for part in parts:
        assert re.search(rf"(^|, ){re.escape(part)}(, | at |$)", planned[command]), planned[command]
    config, gpus = re.fullmatch(r"(configs/\S+) --gpus (\d+) --gpu h100", command).groups()
    launched = text.replace(command, "")
    assert set(re.findall(r"configs/\w+\.json", launched)) == {config}
    for pattern in GPUS:
        for nodes, of_each in re.findall(pattern, launched):
            assert int(nodes) * int(of_each) == int(gpus)


def test_recipes_are_short_and_named_in_the_docs():
    page = (ROOT / "docs" / "clusters.md").read_text()
    for name in RECIPES:
        assert f"clusters/{name}" in page
        assert len((ROOT / "clusters" / name).read_text().splitlines()) <= 60
