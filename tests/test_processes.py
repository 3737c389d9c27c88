"""Two processes: they skip a step together, and stay equal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_a_step_that_one_process_must_skip_is_skipped_by_both(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.two_processes", str(store), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert first["steps"] == second["steps"] == 4
    assert first["skipped"] == second["skipped"] == 1
    assert torch.equal(first["images"], second["images"])
    assert torch.equal(first["student_lr"], second["student_lr"])
    assert (tmp_path / "run" / "version_0" / "synthetic.safetensors").exists()
    assert (tmp_path / "run" / "version_0" / "evaluation.csv").exists()
