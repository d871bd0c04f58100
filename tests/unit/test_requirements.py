"""pyproject.toml, which pip and uv read, and the requirements files, which `make` reads, ask for the same packages."""

import importlib
import sys

from minzero import preflight
from tests.helpers.processes import ROOT

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def lines_of(name):
    return sorted((ROOT / name).read_text().split())


def test_the_requirements_of_a_run_are_those_of_the_project():
    assert sorted(PROJECT["dependencies"] + EXTRAS["loggers"]) == lines_of("requirements.txt")


def test_the_requirements_of_the_tests_are_those_of_the_extra_dev():
    assert "minzero[eval,four_bit,loggers]" in EXTRAS["dev"]
    others = [name for name in EXTRAS["dev"] if not name.startswith("minzero")]
    assert sorted(others + EXTRAS["eval"] + EXTRAS["four_bit"]) == lines_of("requirements-dev.txt")


def test_make_takes_the_same_pythons(monkeypatch):
    assert PROJECT["requires-python"] == ">=3.10,<3.14"
    for version, is_right in (((3, 9, 0), False), ((3, 10, 0), True), ((3, 13, 9), True), ((3, 14, 0), False)):
        monkeypatch.setattr(sys, "version_info", version)
        assert is_right != any("3.10 to 3.13 needed" in line for line in preflight.problems())
