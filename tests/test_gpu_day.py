"""The program for a day with a GPU, in miniature on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {
    "tests": ["tests"],
    "mtt": ["mtt_base", "mtt_dynadistill"],
    "costs": ["step_cost", "expert_throughput", "evaluation_cost", "inner_step_cost"],
}


def run(part: str, out: Path) -> subprocess.CompletedProcess[str]:
    if part == "costs" and not os.environ.get("DD_LIGHTNING_LONG"):
        pytest.skip("compiles for minutes; set DD_LIGHTNING_LONG=1 to run it")
    environment = os.environ | {"MINIATURE": "1", "DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_day.sh"), part, "data", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_writes_its_results(part: str, tmp_path: Path) -> None:
    done = run(part, tmp_path)
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    lines = (tmp_path / "parts.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == PARTS[part]
    assert all(": exit 0, " in line for line in lines)
    if part == "costs":
        for name in PARTS[part]:
            assert json.loads((tmp_path / f"{name}.json").read_text())
    if part == "mtt":
        counts = [
            json.loads((tmp_path / "runs" / name / "version_0" / "summary.json").read_text())["candidate_evaluations"]
            for name in ("base", "dynadistill")
        ]
        assert counts == [3, 9]


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = run("everything", tmp_path)
    assert done.returncode == 2
    assert "PART is 'everything'; use tests, mtt, costs or all" in done.stderr
