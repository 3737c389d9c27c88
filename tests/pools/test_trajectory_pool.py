"""The pool of trajectory segments: what is drawn, from which window, and what a segment holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import PoolSetup, TrajectoryPool
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.recipes import ExpertRecipe
from tests import small


def prepared(store: Path, **options: Any) -> TrajectoryPool:  # noqa: ANN401
    def no_training(
        store: ExpertStore, identity: ExpertIdentity, recipe: ExpertRecipe, num_experts: int, epochs: int
    ) -> None:
        raise AssertionError(f"{num_experts} experts of {epochs} epochs were to be trained")

    data = small.data()
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    pool = small.pool(store, **options)
    pool.prepare(PoolSetup(network, data.train, data.name, data.fingerprint, torch.device("cpu"), no_training))
    return pool


def test_segments_are_rows_of_the_store(store: Path) -> None:
    pool = prepared(store, expert_epochs=2, max_start_epoch=2)
    segment = pool.load((3, 1))
    assert segment.key == (3, 1)
    assert torch.equal(segment.start, pool.store.rows(3, [1])[0])
    assert torch.equal(segment.target, pool.store.rows(3, [3])[0])


def test_draws_are_distinct_and_uniform() -> None:
    pool, steps = TrajectoryPool("nowhere", num_experts=4, max_start_epoch=5, min_start_epoch=2), 600
    experts, starts = torch.zeros(4), torch.zeros(5)
    for step in range(steps):
        keys = pool.draw(3, StepContext(0, step))
        assert len({expert for expert, _ in keys}) == 3
        for expert, start in keys:
            experts[expert] += 1
            starts[start] += 1
    assert starts[:2].tolist() == [0, 0]
    expected = 3 * steps / 3
    assert float(((starts[2:] - expected) ** 2 / expected).sum()) < 13.8  # 99.9 % quantile, 2 degrees of freedom
    # Each of the four is left out of a step with probability 1/4: Binomial(600, 1/4), deviation 10.6.
    assert all(abs(steps - float(count) - steps / 4) < 4 * 10.6 for count in experts)


def test_draws_depend_on_seed_step_and_rank_alone() -> None:
    pool = TrajectoryPool("nowhere", num_experts=50, max_start_epoch=50)
    first = pool.draw(5, StepContext(0, 3))
    assert pool.draw(5, StepContext(0, 3)) == first
    others = [StepContext(1, 3), StepContext(0, 4), StepContext(0, 3, rank=1)]
    assert all(pool.draw(5, context) != first for context in others)


def test_share_start_epoch() -> None:
    pool = TrajectoryPool("nowhere", num_experts=9, max_start_epoch=50, share_start_epoch=True)
    shared = [{start for _, start in pool.draw(4, StepContext(0, step))} for step in range(20)]
    assert all(len(starts) == 1 for starts in shared)
    assert len(set.union(*shared)) > 5


def test_growing_window_by_hand() -> None:
    # from 10 to 20 over 100 steps: one more start epoch every 10 steps
    pool = TrajectoryPool("x", max_start_epoch=20, current_max_start_epoch=10, expansion_steps=100)
    ends = {0: 10, 9: 10, 10: 11, 55: 15, 99: 19, 100: 20, 5000: 20}
    assert {step: pool.start_window_end(step) for step in ends} == ends
    early = {start for step in range(9) for _, start in pool.draw(50, StepContext(0, step))}
    assert early == set(range(10))
    late = {start for step in range(100, 110) for _, start in pool.draw(50, StepContext(0, step))}
    assert late == set(range(20))
    assert TrajectoryPool("x", max_start_epoch=20).start_window_end(0) == 20


def test_cursors_by_hand(store: Path) -> None:
    pool = prepared(store, refresh="advance", min_start_epoch=1, max_start_epoch=3)
    assert pool.cursors == [1, 1, 1, 1]
    seen = []
    for step in range(5):
        key = next(key for key in pool.draw(4, StepContext(0, step)) if key[0] == 2)
        seen.append(key[1])
        pool.refresh(key, [key], StepContext(0, step + 1))
    assert seen == [1, 2, 1, 2, 1]  # the window is {1, 2}
    assert pool.cursors == [1, 1, 2, 1]
    other = prepared(store, refresh="advance")
    other.load_state_dict(pool.state_dict())
    assert other.cursors == [1, 1, 2, 1]


def test_cursor_follows_the_growing_window(store: Path) -> None:
    pool = prepared(store, refresh="advance", current_max_start_epoch=1, expansion_steps=2)
    seen = []
    for step in range(6):
        seen.append(pool.cursors[0])
        pool.refresh((0, pool.cursors[0]), [], StepContext(0, step + 1))
    # ends at steps 1, 2, 3, ...: 2, 3, 3, ...
    assert seen == [0, 1, 2, 0, 1, 2]


def test_redraw_keeps_no_cursor(store: Path) -> None:
    pool = prepared(store)
    pool.refresh((0, 1), [(0, 1)], StepContext(0, 1))
    assert pool.cursors == [0] * small.EXPERTS


def test_full_set_accuracies_are_the_stored_ones(store: Path) -> None:
    pool = prepared(store)
    known = pool.full_set_accuracies()
    assert known is not None
    stored = [pool.store.metadata(i).accuracies.held_out[-1] for i in range(small.EXPERTS)]
    assert list(known.accuracies) == stored
    assert known.description == "4 experts after 3 epochs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "pool holds 0 candidates; it needs at least 1"),
        ({"expert_epochs": 0}, "expert_epochs is 0"),
        ({"min_start_epoch": 2, "max_start_epoch": 2}, r"start window \[2, 2\) is empty"),
        ({"train_epochs": 3, "max_start_epoch": 3}, "train_epochs is 3, .* reads epoch 4; raise train_epochs"),
        ({"current_max_start_epoch": 1}, "expansion_steps is None; give both"),
        ({"refresh": "advance", "share_start_epoch": True}, "use refresh: redraw"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrajectoryPool(**options)
