"""Every DeepSpeed key that a run may set: its checkpoint holds the weights and moments of the plain run, and a run
with it resumes from the plain run's checkpoint of another ZeRO stage."""

import json
from pathlib import Path

import pytest

from minzero.deepspeed_keys import ACCEPTED
from tests.helpers.processes import deepspeed_command, run
from tests.launch.key_settings import ALL, FEW, HPZ, ON_NVME

SCRIPT = Path(__file__).with_name("keys.py")


def keys_of(section, path=""):
    for name, value in section.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{path}{name}.")
        else:
            yield path + name


def test_every_accepted_key_is_tried():
    tried = {key for _, _, section, _ in ALL + HPZ for key in keys_of(section)} | {"zero_optimization.stage"}
    assert tried | ON_NVME == set(ACCEPTED)


@pytest.mark.parametrize(
    "name, settings, ranks",
    [
        ("FEW", FEW, 2),
        pytest.param("ALL", ALL, 2, marks=pytest.mark.slow),
        pytest.param("HPZ", HPZ, 4, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_that_of_the_plain_run(tmp_path, name, settings, ranks):
    done = run(deepspeed_command(SCRIPT, tmp_path, name, processes=ranks), timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == sum(len(stages) for stages, *_ in settings)
    for stage, precision, keys, changes, found in results:
        what = f"stage {stage} in {precision} with {keys}: {found}"
        print(what)
        assert found["right"] == [True, True], what
        bound = 1e-5 if precision == "fp32" and not changes else 0.05
        assert max(apart for step in found["apart"] for apart in step.values()) < bound, what
        if changes:
            assert max(found["apart"][0].values()) > 1e-6, f"not obeyed: {what}"
