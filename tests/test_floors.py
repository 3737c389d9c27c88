"""Imports only go down, and Lightning stays at the top."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from dd_lightning.objectives import MatchingObjective
from dd_lightning.pools import CandidatePool

PACKAGE = Path(__file__).parents[1] / "dd_lightning"
ROOMS = (
    "__main__", "cli", "__init__", "callbacks", "module", "trainer", "distillation", "objectives", "pools",
    "training", "datamodules", "sets", "networks", "execution", "functional", "version",
)  # fmt: skip
"""From top to bottom: a room imports from itself and from rooms further down."""
WITH_LIGHTNING = {"cli", "callbacks", "module", "trainer", "datamodules"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = room(path)
    for module in imports(path):
        package, _, inside = module.partition(".")
        if package == "dd_lightning":
            target = inside.split(".")[0] or "__init__"
            assert ROOMS.index(target) >= ROOMS.index(own), f"{own} imports {module} from above"
        if package in {"lightning", "pytorch_lightning"}:
            assert own in WITH_LIGHTNING, f"{own} imports {module}"
        if own == "functional":
            allowed = {
                "dd_lightning",
                "torch",
                "collections",
                "contextlib",
                "dataclasses",
                "functools",
                "typing",
                "math",
                "hashlib",
            }
            assert package in allowed, f"functional imports {module}"


def test_the_package_root_is_small() -> None:
    entries = [entry for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert {room(path) for path in FILES} <= set(ROOMS)
    assert len(entries) <= 17
    assert sum(entry.is_file() for entry in entries) <= 6


def test_a_pool_has_few_members() -> None:
    members = {name for name in vars(CandidatePool) if not name.startswith("_")}
    assert len(members | set(CandidatePool.__annotations__)) <= 10


def test_interfaces_are_small() -> None:
    options = {field.name for field in fields(MatchingObjective)}
    members = {name for name in dir(MatchingObjective) if not name.startswith("_")} - options
    assert len(members) <= 12
    assert options == {"execution"}
