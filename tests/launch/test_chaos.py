"""The short form of tests/chaos.py."""

import pytest

from tests import chaos


@pytest.mark.slow
def test_a_run_killed_with_9_continues_bit_for_bit(tmp_path, capfd):
    chaos.main(tmp_path, kills=2, inside_a_save=1, steps=80)
    assert "each once; last checkpoint equal bit for bit" in capfd.readouterr().out
