"""A rank that is slower than the others is named in the log."""

import re

from minzero.metrics import read_metrics
from tests.helpers.processes import deepspeed_command
from tests.launch.test_stopping import RUN


def test_a_slow_rank_is_named_with_its_host(start, tmp_path):
    command = deepspeed_command("tests/launch/slow_rank.py", *RUN[1:], "--train.out_dir", tmp_path / "run")
    process = start([*command, "--train.max_tokens", str(5 * 2048)])
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert "slowest" not in lines[0], "it may have been disturbed once"
    words = r"rank 1 on \S+ is \d+% slower than the median"
    assert all(re.fullmatch(words, line["slowest"]) for line in lines[1:]) and len(lines) == 5, lines
    assert len(re.findall(rf"\| {words}$", said, re.MULTILINE)) == 4
