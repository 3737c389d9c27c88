"""Processes that share a store: each expert is made once, and what a dead one left is taken over."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.real import RealSet
from dd_lightning.training import claims as claims_module
from dd_lightning.training import experts as experts_module
from dd_lightning.training.claims import STALE_SECONDS, Claims
from dd_lightning.training.expert_store import ExpertIdentity, ExpertState, ExpertStore
from dd_lightning.training.experts import train_experts
from dd_lightning.training.recipes import ExpertRecipe
from tests import small


def claim(folder: Path, id: int) -> Path:
    return folder / f".expert_{id:05d}.claim"


def test_each_is_claimed_once(tmp_path: Path) -> None:
    with Claims(tmp_path / "store") as first, Claims(tmp_path / "store") as second:
        assert first.take(range(5), 2) == [0, 1]
        assert second.take(range(5), 2) == [2, 3]
        assert first.take([2, 3, 4], 2) == [4]
        second.release()
        assert first.take([2, 3], 1) == [2]
    assert list((tmp_path / "store").iterdir()) == []


def test_a_dead_processs_claim_is_free(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with Claims(tmp_path) as own:
        claim(tmp_path, 0).write_text(f"{socket.gethostname()} {int(done.stdout)}")  # of this machine, and gone
        claim(tmp_path, 1).write_text("another-machine 1")
        claim(tmp_path, 2).write_text("another-machine 1")
        past = claim(tmp_path, 2).stat().st_mtime - STALE_SECONDS - 1
        os.utime(claim(tmp_path, 2), (past, past))
        assert own.take(range(3), 3) == [0, 2]


def test_a_living_claim_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "_HEARTBEAT_SECONDS", 0.01)
    with Claims(tmp_path) as own:
        own.take([0], 1)
        os.utime(claim(tmp_path, 0), (0, 0))
        waited = threading.Event()
        for _ in range(200):
            if claim(tmp_path, 0).stat().st_mtime > 0:
                break
            waited.wait(0.02)
        assert claim(tmp_path, 0).stat().st_mtime > 0


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/store cannot be written"), Claims(tmp_path / "file" / "store"):
        pass


Job = tuple[FunctionalNetwork, RealSet, ExpertStore, ExpertIdentity, ExpertRecipe]


def job(path: Path) -> Job:
    data = small.data()
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    identity = ExpertIdentity.of(network, small.RECIPE, 2, fingerprint=data.fingerprint, dataset=data.name)
    return network, data.train, ExpertStore(path), identity, small.RECIPE


def test_two_builders_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(experts_module._Group):
        def __init__(self, job: Any, ids: list[int]) -> None:  # noqa: ANN401
            made.append((threading.current_thread().name, ids))
            super().__init__(job, ids)

    made: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(experts_module, "_Group", Counted)
    monkeypatch.setattr(experts_module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    errors: list[BaseException] = []

    def build() -> None:
        try:
            train_experts(*job(tmp_path / "shared"), num_experts=8, epochs=2, progress_bar=False, together=1)
        except BaseException as error:
            errors.append(error)

    builders = [threading.Thread(target=build, name=name) for name in "ab"]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert errors == []
    assert sorted(id for _, ids in made for id in ids) == list(range(8))  # each once
    assert {name for name, _ in made} == {"a", "b"}
    train_experts(*job(tmp_path / "alone"), num_experts=8, epochs=2, progress_bar=False, together=1)
    for id in range(8):
        name = f"expert_{id:05d}.safetensors"
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_longer_file_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _, store, identity, recipe = made = job(tmp_path)

    def overtaken(*arguments: Any, **options: Any) -> None:  # noqa: ANN401
        # another process, which did not see the claim, finishes while this one has an epoch to go
        if not store.file(0).exists():
            whole = torch.zeros(4, network.num_parameters)
            store.write({0: ExpertState(whole)}, identity, recipe.seed)
        flush(*arguments, **options)

    flush = experts_module._Group.flush
    monkeypatch.setattr(experts_module._Group, "flush", overtaken)
    train_experts(*made, num_experts=1, epochs=2, progress_bar=False)
    assert store.epochs(0) == 3
