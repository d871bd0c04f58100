"""A run that commit e029d1a began continues with today's code, as that commit itself continued it."""

import json
import shutil
import sys

import pytest

from minzero import replay
from minzero.metrics import read_metrics
from tests.helpers.processes import ROOT, run

OLD_RUN = ROOT / "tests" / "data" / "run_of_e029d1a"


def test_a_run_of_older_code_continues_with_the_same_losses(tmp_path):
    """Saved on two ranks and resumed on one. The losses are equal to the last bit where the CPU rounds as the one that
    wrote them; another one may differ in the last digits of float32."""
    out = tmp_path / "run"
    shutil.copytree(OLD_RUN / "run", out)
    settings = OLD_RUN / "settings.json"  # data.path is relative to the repository's root, as in the checkpoint
    done = run(
        [sys.executable, "train.py", settings, "--train.out_dir", out], CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"continuing from {out}/checkpoints/step_00000006: step 6, 1,536 tokens" in done.stdout
    (changed,) = [line for line in done.stdout.splitlines() if line.startswith("changed since the checkpoint: ")]
    names = [part.split()[0] for part in changed.split(": ", 1)[1].split("; ")]
    # ds_config.json's values of then, which "auto" has replaced
    assert names and all(name.startswith("deepspeed.zero_optimization.") for name in names), changed

    expected = json.loads((OLD_RUN / "continued.json").read_text())
    lines = read_metrics(out)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(1, 13)), "each step once"
    for name in ("loss", "val_loss"):
        found = {str(line["step"]): line[name] for line in lines if name in line and line["step"] > 6}
        assert found == pytest.approx(expected[name], rel=1e-6), name
        print(name, "equal to the last bit:", found == expected[name])


def test_replay_reads_the_config_of_a_run_of_older_code():
    """Its config.json has what was found in the data in the place of the data section."""
    settings = replay.settings_of(OLD_RUN / "run", {"step": 0}, [])
    (folder,) = settings["data"]
    assert settings["config"]["data"] == {"path": folder}
