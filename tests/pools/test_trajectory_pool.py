"""The pool of trajectory segments: what is drawn, from which window, and what a segment holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import PoolSetup, TrajectoryPool, trajectory_pool
from dd_lightning.training.experts import train_experts
from tests import small


def setup(**options: Any) -> PoolSetup:  # noqa: ANN401
    data = small.data()
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    return PoolSetup(network, data.train, data.name, data.fingerprint, data.test, **options)


def prepared(store: Path, **options: Any) -> TrajectoryPool:  # noqa: ANN401
    pool = small.pool(store, **options)
    pool.prepare(setup())
    assert pool.summary()["seconds_training_experts"] == 0
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
        pool.update(key, [key], StepContext(0, step + 1))
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
        pool.update((0, pool.cursors[0]), [], StepContext(0, step + 1))
    # ends at steps 1, 2, 3, ...: 2, 3, 3, ...
    assert seen == [0, 1, 2, 0, 1, 2]


def test_redraw_keeps_no_cursor(store: Path) -> None:
    pool = prepared(store)
    pool.update((0, 1), [(0, 1)], StepContext(0, 1))
    assert pool.cursors == [0] * small.EXPERTS


def test_cursors_of_a_fit_that_goes_on_and_of_one_that_starts_clean(store: Path) -> None:
    pool = small.pool(store, num_experts=2, refresh="advance")
    pool.prepare(setup())
    pool.update((1, 0), [], StepContext(0, 1))
    assert pool.cursors == [0, 1]
    pool.prepare(setup(size=4, continues=True))  # grown in between
    assert (len(pool), pool.cursors) == (4, [0, 1, 0, 0])
    pool.update((3, 0), [], StepContext(0, 2))
    assert sorted(pool.draw(4, StepContext(0, 3))) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    pool.prepare(setup())
    assert (len(pool), pool.cursors) == (2, [0, 0])


def test_networks_are_the_experts_last_epochs(store: Path) -> None:
    pool = prepared(store, num_experts=3, max_start_epoch=1)
    rows = [pool.store.rows(expert, [small.EPOCHS])[0] for expert in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(pool.networks(), rows, strict=True))


def test_summary_holds_the_stored_accuracies(store: Path) -> None:
    pool = prepared(store)
    stored = [pool.store.metadata(i).accuracies.held_out[-1] for i in range(small.EXPERTS)]
    assert pool.summary()["full_set"] == {"accuracies": stored, "trained": "4 experts after 3 epochs"}


@pytest.mark.parametrize("own", [None, Execution(micro_batch=3)])
def test_missing_experts_are_trained_as_the_run_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Execution | None
) -> None:
    seen: list[Execution] = []

    def noted(*arguments: Any, execution: Execution, **options: Any) -> None:  # noqa: ANN401
        seen.append(execution)
        train_experts(*arguments, execution=execution, **options)

    monkeypatch.setattr(trajectory_pool, "train_experts", noted)
    pool = small.pool(tmp_path / "new", num_experts=1, max_start_epoch=1, execution=own)
    run = Execution(micro_batch=7)
    for _ in range(2):  # the second fit finds them
        pool.prepare(setup(execution=run, continues=True))
        pool.prepare(setup(execution=run))
    assert seen == [own or run]
    assert pool.store.epochs(0) == 1
    assert pool.store.metadata(0).accuracies.held_out[0] is not None


def test_of_several_processes_the_first_one_trains_and_the_others_wait(tmp_path: Path) -> None:
    events: list[str] = []

    class Second:
        rank, size = 1, 2

        def broadcast(self, value: bool) -> bool:
            events.append("broadcast")
            return True  # whatever this process has seen of the store

        def barrier(self) -> None:
            events.append("barrier")
            first = small.pool(tmp_path / "new", num_experts=1)
            first.prepare(setup())

        def sum(self, value: Tensor) -> Tensor:
            events.append("sum")
            return value

    pool = small.pool(tmp_path / "new", num_experts=1)
    pool.prepare(setup(process=Second()))
    assert events == ["broadcast", "barrier", "sum"]
    assert pool.load((0, 0)).theta.shape == (setup().network.num_parameters,)


def test_what_the_run_cannot_have_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    pool = small.pool(tmp_path / "new", share_start_epoch=True)
    with pytest.raises(InputError, match=r"refresh_per_step .* share_start_epoch is true"):
        pool.prepare(setup(keeps_candidates=True))
    with pytest.raises(InputError, match=r"is too small \(0 experts\): the pool needs 4 experts of 3 epochs"):
        small.pool(tmp_path / "new", train_missing=False).prepare(setup())
    assert not (tmp_path / "new").exists()


def test_a_store_shorter_than_train_epochs_is_refused(store: Path) -> None:
    """Also where the window would do: soft labels are those of the last epoch."""
    with pytest.raises(InputError, match=r"\(expert 0 has 3 epochs\): the pool needs 4 experts of 5 epochs"):
        small.pool(store, max_start_epoch=2, train_epochs=5, train_missing=False).prepare(setup())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0; it must be at least 1"),
        ({"expert_epochs": 0}, "expert_epochs is 0"),
        ({"min_start_epoch": 2, "max_start_epoch": 2}, "max_start_epoch is 2; it must be at least 3"),
        ({"min_start_epoch": -1}, "min_start_epoch is -1; it must be at least 0"),
        ({"train_epochs": 3, "max_start_epoch": 3}, "train_epochs is 3; it must be at least 4"),
        ({"current_max_start_epoch": 1}, "expansion_steps is None; give both"),
        ({"refresh": "advance", "share_start_epoch": True}, "use refresh: redraw"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrajectoryPool(**options)
