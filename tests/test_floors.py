"""Imports only go down: the floors of the architecture."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dd_lightning"
FLOORS = {
    3: ("cli", "__main__", "report"),
    2: ("__init__", "module", "scalars", "experts", "callbacks", "data"),
    1: (
        "objectives", "pools", "networks", "synthetic", "real", "sampling", "evaluation", "formats", "colors",
        "compiling", "ensemble", "recipes", "cost", "memory", "pictures", "progress", "runs",
    ),
    0: ("functional", "version"),
}  # fmt: skip
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """dd_lightning.pools.base -> pools; dd_lightning -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(str(node.module))
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own_room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    floor = FLOOR_OF[own_room]
    for module in imports(path):
        top = module.split(".")[0]
        if top == "dd_lightning":
            target = room(module)
            assert FLOOR_OF[target] <= floor, f"floor {floor} imports {module} of floor {FLOOR_OF[target]}"
        elif floor == 0:
            allowed = {"torch", "collections", "contextlib", "dataclasses", "typing", "math", "hashlib"}
            assert top in allowed, f"floor 0 imports {module}"
        elif floor == 1:
            assert top not in {"lightning", "pytorch_lightning"}, f"floor 1 imports {module}"
