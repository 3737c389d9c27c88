"""Matching on live networks: what must not change the images, bit for bit, and what must."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from dd_lightning.callbacks import SyntheticSetWriter
from dd_lightning.objectives import BidirectionalMatching, GradientMatching
from dd_lightning.pools import NetworkPool
from dd_lightning.sets import class_batches as sampling
from dd_lightning.sets import initial
from dd_lightning.sets.real import RealSet
from tests import small

Learned = tuple[Tensor, ...]

STEPS, INNER_LOOP, AGE_LIMIT, INTERVAL = 7, 3, 3, 2

METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "shuffled": lambda: {"objective": GradientMatching(batch_real=8)},
    "representative": lambda: {
        "objective": GradientMatching(batch_real=8, sampling="representative", interval=INTERVAL),
    },
    "bidirectional": lambda: {
        "objective": BidirectionalMatching(batch_real=8, interval=INTERVAL),
        "pool": small.network_pool(pretrain_epochs=1, age_limit=AGE_LIMIT),
        "init": "kmeans",
        "factor": 2,
        "image_space": "pixels",
        "image_lr": 0.02,
        "image_steps": "per_class",
        "inner_loop": INNER_LOOP,
        "clamp": True,
    },
}
CHOICES: dict[str, dict[str, Any] | None] = {
    "base": None,
    "selection": {"pool_size": 4, "temperature": 0.1, "normalize": "mean"},
    "every 3": {"pool_size": 4, "temperature": 0.1, "normalize": "mean", "every_n_steps": 3},
    "reuse": {"pool_size": 4, "temperature": 0.1, "normalize": "mean", "refresh_per_step": 1},
}
VARIANTS = [f"{method}, {choice}" for method in METHODS for choice in CHOICES]


def run(
    folder: Path,
    variant: str,
    *extra: Callback,
    ckpt_path: Path | None = None,
    **options: Any,  # noqa: ANN401
) -> Learned:
    method, _, choice = variant.partition(", ")
    distilled = small.network_module(**(METHODS[method]() | options))
    chosen = CHOICES[choice]
    callbacks = [] if chosen is None else [small.selection(**chosen)]
    small.fit(folder, distilled, *callbacks, *extra, steps=STEPS, ckpt_path=ckpt_path)
    pool = distilled.pool
    assert isinstance(pool, NetworkPool)
    assert pool.scalars()["pool/reinitialized"] >= 1  # or the kill points at their ends would show nothing
    return *small.learned(distilled), *pool.state_dict()["thetas"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learned]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {variant: run(folder, variant) for variant in VARIANTS}


def test_variants_differ(uninterrupted: dict[str, Learned]) -> None:
    # Otherwise the equalities below would show nothing.
    images = [learned[0] for learned in uninterrupted.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


# Checkpoints are of the step before. 3: an outer iteration is about to begin, with a clamp and with a sole network's
# second life, between two choices of representatives; 4: all that has happened, and it is time to choose.
KILLS = [(variant, killed_at) for variant in VARIANTS for killed_at in (4, 5)]
KILLS += [("bidirectional, every 3", 2), ("bidirectional, selection", 7)]


@pytest.mark.parametrize(("variant", "killed_at"), KILLS)
def test_killed_and_resumed_is_uninterrupted(
    tmp_path: Path, uninterrupted: dict[str, Learned], variant: str, killed_at: int
) -> None:
    with pytest.raises(small.KilledError):
        run(tmp_path, variant, small.checkpoints(tmp_path), small.Kill(killed_at))
    last = tmp_path / f"step={killed_at - 1}.ckpt"
    assert not (tmp_path / f"step={killed_at}.ckpt").exists()
    resumed = run(tmp_path, variant, small.checkpoints(tmp_path), ckpt_path=last)
    assert small.same(resumed, uninterrupted[variant])


@pytest.mark.parametrize("method", METHODS)
def test_one_candidate_is_the_base_method(tmp_path: Path, uninterrupted: dict[str, Learned], method: str) -> None:
    one = run(tmp_path, f"{method}, base", small.selection(num_candidates=1, temperature=0.1))
    assert small.same(one, uninterrupted[f"{method}, base"])


@pytest.mark.parametrize("variant", ["shuffled, selection", "bidirectional, base"])
def test_evaluation_and_files_change_nothing(tmp_path: Path, uninterrupted: dict[str, Learned], variant: str) -> None:
    for callback in (
        small.evaluation(every_n_steps=1, epochs=1, num_networks=1),
        small.evaluation(every_n_steps=4, compare_random=True, recipe="idc", num_networks=1),
        SyntheticSetWriter(every_n_steps=1),
    ):
        assert small.same(run(tmp_path, variant, callback), uninterrupted[variant])


@pytest.mark.parametrize("variant", ["shuffled, every 3", "bidirectional, selection"])
def test_seed_decides(tmp_path: Path, uninterrupted: dict[str, Learned], variant: str) -> None:
    torch.manual_seed(1234)  # the global random state plays no part
    state = torch.get_rng_state()
    assert small.same(run(tmp_path, variant), uninterrupted[variant])
    assert torch.equal(torch.get_rng_state(), state)
    other = run(tmp_path, variant, seed=6)
    for index in (0, *range(2, len(other))):  # all but the student's learning rate
        assert not torch.equal(other[index], uninterrupted[variant][index])


def test_pretraining_and_clustering_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[tuple[int, int]] = []
    clustered: list[int] = []
    born, class_representatives = NetworkPool._born, sampling.class_representatives

    def noted_born(pool: NetworkPool, index: int, seed: int, births: int, *given: Any) -> Any:  # noqa: ANN401
        networks.append((index, births))
        return born(pool, index, seed, births, *given)

    def noted_representatives(real: RealSet, count: int, *given: Any) -> list[Tensor]:  # noqa: ANN401
        clustered.append(count)
        return class_representatives(real, count, *given)

    monkeypatch.setattr(NetworkPool, "_born", noted_born)
    monkeypatch.setattr(initial, "class_representatives", noted_representatives)
    variant, saved = "bidirectional, selection", small.checkpoints(tmp_path)
    run(tmp_path, variant)
    whole = networks.copy()
    assert whole[:4] == [(place, 0) for place in range(4)]
    assert clustered == [2 * 4]
    with pytest.raises(small.KilledError):
        run(tmp_path, variant, saved, small.Kill(4))
    networks.clear()
    clustered.clear()
    run(tmp_path, variant, small.checkpoints(tmp_path), ckpt_path=tmp_path / "step=3.ckpt")
    assert networks == whole[len(whole) - len(networks) :]
    assert all(births > 0 for _, births in networks)
    assert clustered == []
