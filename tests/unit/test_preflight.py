import shutil
import subprocess
import sys
from collections import namedtuple

from minzero import preflight
from tests.helpers.processes import ROOT


def test_this_machine_will_do():
    done = subprocess.run([sys.executable, ROOT / "minzero" / "preflight.py"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_what_is_missing_is_named_with_the_remedy(monkeypatch, capsys):
    full = namedtuple("usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert preflight.main() == 2
    assert "0.0 GiB of disk free" in capsys.readouterr().err
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert preflight.main() == 2
    assert capsys.readouterr().err == (
        "minZeRO: Python 3.9 found, 3.10 to 3.13 needed: install one and call make PYTHON=python3.12\n"
    )


def test_a_machine_without_a_compiler_is_good_enough(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert preflight.main() == 0
    assert "no C++ compiler" in capsys.readouterr().out
