import gzip
import json
import re

import pytest
import torch

from minzero.profiler import Profiler


@pytest.mark.parametrize(
    ("resumed_at", "ended_at", "expected"),
    [(0, 9, "steps_3_to_5"), (3, 9, "steps_4_to_5"), (0, 4, "steps_3_to_4"), (5, 9, None), (0, 2, None)],
)
def test_a_profile_holds_those_of_its_steps_that_were_run(resumed_at, ended_at, expected, tmp_path):
    profiler = Profiler(tmp_path, (3, 5))
    said = []
    matrix = torch.ones(8, 8)
    matrix @ matrix  # the first product of a process takes longer than the rest
    for step in range(resumed_at + 1, ended_at + 1):
        profiler.start_step(step)
        matrix @ matrix
        said.append(profiler.end_step(step, ending=step == ended_at))
    said = [text for text in said if text]
    if expected is None:
        assert not said and not (tmp_path / "profile").exists()
        return
    first, last = int(expected[6]), int(expected[-1])
    assert len(said) == 1 and said[0].startswith(f"profile of steps {first} to {last} of rank 0 in {tmp_path}/profile/")
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {f"{expected}.json.gz", f"{expected}.txt"}
    with gzip.open(tmp_path / "profile" / f"{expected}.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == last - first + 1
    assert re.search(r"aten::mm +1\.0 +0\.\d+ +\d+\.\d%", said[0]), said[0]
