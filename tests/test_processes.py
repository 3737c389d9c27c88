"""Several processes: the same steps as one, each a share of the work; or steps of their own, averaged."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.several_processes import CASES, STEPS

pytestmark = pytest.mark.slow

Results = dict[tuple[str, int, int], dict[str, Any]]
SHARED = [name for name in CASES if name not in ("average", "broken")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank of each number of processes says of each case."""
    found = {}
    for size in (1, 2, 3):
        names, out = SHARED if size != 2 else list(CASES), tmp_path_factory.mktemp("processes")
        done = command(size, out, *names)
        assert done.returncode == 0, done.stderr[-3000:]
        for name in names:
            for rank in range(size):
                found[name, size, rank] = torch.load(out / f"{name}-{size}-{rank}.pt")
    return found


def command(size: int, out: Path, *names: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | variables
    words = [sys.executable, "-m", "tests.several_processes", str(size), str(out), *names]
    return subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, timeout=580, check=False)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SHARED)
def test_each_step_is_that_of_one_process(results: Results, name: str, size: int) -> None:
    alone = results[name, 1, 0]
    assert len(alone["steps"]) == STEPS
    assert not torch.equal(alone["steps"][0], alone["steps"][-1])
    for rank in range(size):
        shared = results[name, size, rank]
        if name == "mtt, batched":  # three students' passes at once round otherwise than those of one or two
            torch.testing.assert_close(shared["steps"], alone["steps"], rtol=1e-4, atol=1e-5)
            assert torch.equal(shared["steps"], results[name, size, 0]["steps"])
            continue
        assert torch.equal(shared["steps"], alone["steps"])
        assert shared["accuracies"] == alone["accuracies"]
        assert all(map(torch.equal, shared["pool"], alone["pool"]))
        assert shared["skipped"] == alone["skipped"]


@pytest.mark.parametrize("size", [2, 3])
def test_each_process_has_a_share(results: Results, size: int) -> None:
    def done(name: str, what: str) -> list[int]:
        return [results[name, size, rank]["done"].get(what, 0) for rank in range(size)]

    candidates = {2: [2 * STEPS, STEPS], 3: [STEPS] * 3}[size]
    assert done("mtt, selection", "students") == candidates
    assert done("mtt", "students") == [STEPS] + [0] * (size - 1)
    assert done("alone", "students") == [2 * STEPS] * size
    classes = {2: [2, 1], 3: [1, 1, 1]}[size]  # of three
    assert done("idc", "classes") == [STEPS * each for each in classes]
    assert done("idc, selection", "classes") == [2 * STEPS * each for each in classes]
    # three evaluations of five networks, and five draws of random images
    networks = {2: [2, 3], 3: [1, 2, 2]}[size]
    assert done("mtt", "evaluated") == [3 * each for each in networks]
    assert sum(done("idc", "updates")) == results["idc", 1, 0]["done"]["updates"]
    assert max(done("idc", "updates")) - min(done("idc", "updates")) <= STEPS - 1
    trained = done(SHARED[0], "experts")
    assert sum(trained) >= results[SHARED[0], 1, 0]["done"]["experts"]


def test_averaged_processes_stay_equal_and_take_candidates_of_their_own(results: Results) -> None:
    first, second = (results["average", 2, rank] for rank in range(2))
    assert torch.equal(first["steps"], second["steps"])
    assert not torch.equal(first["steps"], results["mtt, selection", 1, 0]["steps"])
    assert [each["done"]["students"] for each in (first, second)] == [2 * STEPS] * 2


def test_a_step_that_one_process_must_skip_is_skipped_by_both(results: Results) -> None:
    first, second = (results["broken", 2, rank] for rank in range(2))
    assert torch.equal(first["steps"], second["steps"])
    assert first["skipped"] == second["skipped"] == 1
    assert {"synthetic.safetensors", "evaluation.csv", "metrics.csv"} <= set(first["files"])


@pytest.mark.parametrize(("rank", "resumed_on"), [(1, 3), (0, 1)])
def test_a_run_survives_a_rank_that_dies(results: Results, tmp_path: Path, rank: int, resumed_on: int) -> None:
    """It ends at once, and goes on from the last checkpoint, on any number of processes."""
    name = "idc, selection"
    killed = command(2, tmp_path, name, KILL=f"{rank}:3")
    assert killed.returncode != 0
    newest = max(path.name for path in (tmp_path / name).iterdir())
    assert newest == ("step=3.ckpt" if rank == 1 else "step=2.ckpt")  # rank 0 is the one that writes
    done = command(resumed_on, tmp_path, name)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = results[name, 1, 0]
    for each in range(resumed_on):
        found = torch.load(tmp_path / f"{name}-{resumed_on}-{each}.pt")
        assert torch.equal(found["steps"][-1], alone["steps"][-1])
        assert all(map(torch.equal, found["pool"], alone["pool"]))
