"""Each recipe of clusters/ states tokens, hours and money of the run that it launches, as plan.py computes them."""

import os
import re
import subprocess

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


# In place of what a recipe calls: adds its command line to a file, for DeepSpeed's launcher with what that puts on the
# command lines of pdsh, mpirun and srun.
LAUNCHER = """#!/bin/bash
echo "$0 $*" >> "$LINES"
[ "${0##*/}" != deepspeed ] || env | grep ^MLFLOW >> "$LINES"
"""


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(("sh", "sbatch"))])
def test_no_key_is_on_a_command_line_or_in_a_file(name, tmp_path):
    binaries = tmp_path / ".venv/bin"  # first in the PATH of each recipe
    binaries.mkdir(parents=True)
    for launcher in ("deepspeed", "mpirun", "scontrol", "srun", "torchrun"):
        (binaries / launcher).write_text(LAUNCHER)
        (binaries / launcher).chmod(0o755)
    (tmp_path / "hosts").write_text("node1 slots=8\n")
    keys = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN")
    secrets = dict.fromkeys(keys, "topsecret")
    secrets["TIKTOKEN_CACHE_DIR"] = "/some/where"  # which is none
    more = {"LINES": str(tmp_path / "lines"), "WANDB_MODE": "offline", "SLURM_JOB_ID": "1", "PATH": os.environ["PATH"]}
    subprocess.run(["bash", ROOT / "clusters" / name, "node1"], cwd=tmp_path, env=secrets | more, check=False)
    assert "configs/13b.json" in (tmp_path / "lines").read_text()
    texts = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path, text in texts.items() if "topsecret" in text], texts
    passed_on = texts.get(tmp_path / ".deepspeed_env", "") + texts[tmp_path / "lines"]
    for variable in ("WANDB_MODE", "TIKTOKEN_CACHE_DIR"):
        assert variable in passed_on or "slurm" in name or "torchrun" in name
