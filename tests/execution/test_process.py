"""What several processes tell each other, in threads that stand for them."""

from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread, local
from typing import TypeVar

import pytest
import torch
from torch import Tensor

import dd_lightning.trainer.run as run_module
from dd_lightning.execution.process import Process, SingleProcess, holds_anywhere
from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import PoolSetup
from tests import small

Value = TypeVar("Value")


class Together:
    """A process among threads."""

    def __init__(self, rank: int, size: int, barrier: Barrier, board: list[object]) -> None:
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def _shown(self, value: object) -> list[object]:
        self._board[self.rank] = value
        self._barrier.wait(30)
        seen = list(self._board)
        self._barrier.wait(30)
        return seen

    def barrier(self) -> None:
        self._shown(None)

    def broadcast(self, value: Value, source: int = 0) -> Value:
        return self._shown(value)[source]  # type: ignore[return-value]

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack([each for each in self._shown(value) if isinstance(each, Tensor)]).sum(0)


def together(size: int, work: Callable[[Process], object]) -> list[object]:
    """Return what each process makes of it: a value, or the error."""
    barrier = Barrier(size)
    board: list[object] = [None] * size
    results: list[object] = [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(Together(rank, size, barrier, board))
        except InputError as error:
            results[rank] = error

    threads = [Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return list(results)


def test_a_condition_that_holds_anywhere() -> None:
    assert not holds_anywhere(SingleProcess(), False)
    assert holds_anywhere(SingleProcess(), True)
    assert together(3, lambda process: holds_anywhere(process, process.rank == 2)) == [True] * 3
    assert together(3, lambda process: holds_anywhere(process, False)) == [False] * 3


def test_other_versions_are_refused_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    run_module.check_processes(SingleProcess())
    assert together(2, run_module.check_processes) == [None, None]
    here = local()

    class OfThisThread:
        def __format__(self, spec: str) -> str:
            return f"0.{here.rank}"

    def checked(process: Process) -> None:
        here.rank = process.rank
        run_module.check_processes(process)

    monkeypatch.setattr(run_module, "__version__", OfThisThread())
    for rank, error in enumerate(together(2, checked)):
        assert isinstance(error, InputError)
        assert f"process {rank} runs dd_lightning 0.{rank} with torch" in str(error)
        assert "process 0 dd_lightning 0.0 with" in str(error)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_store_that_not_all_see_is_refused_by_all(store: Path, tmp_path: Path, missing: int) -> None:
    def work(process: Process) -> None:
        pool = small.pool(store if process.rank != missing else tmp_path / "elsewhere", train_missing=False)
        data = small.data()
        network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
        pool.prepare(PoolSetup(network, data.train, data.name, data.fingerprint, size=2, process=process))

    errors = together(2, work)
    assert all(isinstance(error, InputError) for error in errors)
