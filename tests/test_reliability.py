"""Killed runs learn the same bits, and damaged files are refused: a short form of benchmarks/reliability.py."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import small

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def run(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / "reliability.py"), *options, "--results", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    assert (folder / "reliability.md").read_text().startswith("# Reliability")
    figures: dict[str, Any] = json.loads((folder / "reliability.json").read_text())[options[0]]["figures"]
    return figures


def program(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Return a program as a module."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # it sets this
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_damaged_files_are_read_or_refused(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.fit(tmp_path, small.module(store), small.selection(), small.checkpoints(tmp_path), steps=1)
    checkpoint = (tmp_path / "step=1.ckpt").read_bytes()
    reported: list[dict[str, Any]] = []
    figures = program(monkeypatch, "damaged_files").fuzz(1300, 1, tmp_path, checkpoint, reported.append)
    assert figures["faults"] == []
    assert figures["read"] + figures["refused"] == figures["inputs"] >= 1300
    assert figures["distinct"] > 0.9 * figures["inputs"]
    assert figures["read"] > 0.1 * figures["inputs"]  # damage that gets past the first check
    assert figures["slowest_seconds"] < 1.0
    assert figures["more_memory_mib"] < 100
    assert len(reported) == len(figures["parts"]) == 13


@pytest.mark.slow
@needs_fork
def test_runs_of_which_a_rank_is_killed_end_and_learn_the_same(tmp_path: Path) -> None:
    figures = run(tmp_path, "ranks", "--kills", "3")
    assert figures["kills"] >= 3
    assert figures["equal"] == figures["runs"] >= len(figures["configuration"]) == 3


@pytest.mark.slow
@needs_fork
def test_killed_runs_learn_the_same(tmp_path: Path) -> None:
    figures = run(tmp_path, "kills", "--kills", "18")
    assert sum(figures["killed in"].values()) == figures["kills"] >= 18
    assert figures["equal"] == figures["runs"] >= len(figures["configuration"]) == 9


@pytest.mark.slow
@needs_fork
@needs_proc
def test_a_long_run_keeps_its_memory_and_its_files(tmp_path: Path) -> None:
    figures = run(tmp_path, "soak", "--steps", "120", "--kills", "3")
    assert figures["kills"] == 3
    assert figures["growth"] < 0.05
    assert figures["open files at step 30"] == figures["open files at the end"]


@pytest.mark.slow
def test_losses_are_the_stored_ones() -> None:
    subprocess.run([sys.executable, str(BENCHMARKS / "reliability.py"), "compare"], check=True)


def test_losses_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reliability, golden = program(monkeypatch, "reliability"), {"MTT": [1.0, 2.0]}
    assert reliability.compare({"MTT": [1.0, 2.0]}, golden) == 0
    assert reliability.compare({"MTT": [1.0, 2.5]}, golden) == 0.25
    for losses in ([1.0, float("nan")], [float("nan"), 2.0]):
        assert not reliability.compare({"MTT": losses}, golden) < reliability.LARGEST_DIFFERENCE
