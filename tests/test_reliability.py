"""Killed runs learn the same bits, and damaged files are refused: a short form of benchmarks/reliability.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "reliability.py"


def run(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAM), *options, "--results", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    assert (folder / "reliability.md").read_text().startswith("# Reliability")
    figures: dict[str, Any] = json.loads((folder / "reliability.json").read_text())[options[0]]["figures"]
    return figures


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    figures = run(tmp_path, "fuzz", "--inputs", "1500")
    assert figures["faults"] == []
    assert figures["read"] + figures["refused"] == figures["inputs"] == 1500
    assert figures["slowest_seconds"] < 1.0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_learn_the_same(tmp_path: Path) -> None:
    figures = run(tmp_path, "kills", "--kills", "18")
    assert figures["kills"] >= 18
    assert figures["equal"] == figures["runs"] >= len(figures["configurations"]) == 9
