"""What pyproject.toml declares is what the package imports."""

import re
import sys
import tomllib
from pathlib import Path

import yaml

from dd_lightning.version import __version__
from tests.test_floors import FILES, imports

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Where a package's name on the index is not the one it is imported by."""
INDIRECT = {"tensorboard", "scipy"}
"""Imported by Lightning's logger and by torchvision's reader of SVHN, neither of which declares it."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!]", requirement)[0] for requirement in requirements}


def test_dependencies_are_what_is_imported() -> None:
    packages = {module.split(".")[0] for path in FILES for module in imports(path)}
    third_party = packages - set(sys.stdlib_module_names) - {"dd_lightning"}
    assert names(PROJECT["dependencies"]) == {NAMES.get(name, name) for name in third_party} | INDIRECT
    extras = {name for extra in PROJECT["optional-dependencies"].values() for name in names(extra)}
    assert {"matplotlib", "timm"} <= extras  # benchmarks and the notebook; networks that are asked for by name


def test_malicious_releases_of_lightning_are_excluded() -> None:
    (lightning,) = [line for line in PROJECT["dependencies"] if line.startswith("lightning")]
    assert {"!=2.6.2", "!=2.6.3"} <= set(lightning.split(","))


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
