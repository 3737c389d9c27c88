"""The selection callback: one look at each candidate, the same for all, and the right frequencies."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dd_lightning.callbacks import TrajectorySelectionCallback
from dd_lightning.functional import products, trajectory
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import Loss
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.functional.selection import Favor, sample_index, selection_probabilities
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import MatchingObjective, ScoredCandidate, TrajectoryMatching
from dd_lightning.pools import TrajectoryPool
from tests import small


class Watch(TrajectoryMatching):
    """Counts what is asked of the objective."""

    def __init__(self) -> None:
        super().__init__(syn_steps=2)
        self.scored: list[ScoredCandidate] = []
        self.differentiated: list[ScoredCandidate] = []

    def score_all(self, *arguments: Any) -> list[ScoredCandidate]:  # noqa: ANN401
        scored = super().score_all(*arguments)
        self.scored += scored
        return scored

    def loss(self, synthetic: Any, network: Any, scored: ScoredCandidate) -> Tensor:  # noqa: ANN401
        self.differentiated.append(scored)
        return super().loss(synthetic, network, scored)


def test_the_winners_work_is_reused(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def counted(loss: Loss, thetas: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        passes.append(len(thetas))
        return products.gradients(loss, thetas, images, targets)

    monkeypatch.setattr(trajectory, "gradients", counted)
    watch, steps = Watch(), 4
    distilled = small.module(store, objective=watch)
    small.fit(tmp_path, distilled, small.selection(num_candidates=3), steps=steps)
    assert len(watch.scored) == distilled.candidate_evaluations == 3 * steps
    assert passes == [3] * steps * watch.syn_steps  # first-order passes of scoring, on all together; no others
    assert len(watch.differentiated) == steps
    for step, winner in enumerate(watch.differentiated):
        candidates = watch.scored[3 * step : 3 * step + 3]
        assert any(winner is candidate for candidate in candidates)
        assert all(candidate.draw is candidates[0].draw for candidate in candidates)
        assert len({candidate.candidate.key[0] for candidate in candidates}) == 3  # distinct experts
    assert len({id(scored.draw) for scored in watch.scored}) == steps


def test_scoring_touches_nothing(store: Path, tmp_path: Path) -> None:
    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            assert isinstance(pl_module, DistillationModule)
            synthetic = pl_module.synthetic_set
            before = [t.detach().clone() for t in (synthetic.images, synthetic.targets, synthetic.student_lr)]
            gradient = None if synthetic.images.grad is None else synthetic.images.grad.clone()
            first = pl_module.score(pl_module.draw_candidates(3))
            again = pl_module.score(pl_module.draw_candidates(3))
            after = (synthetic.images, synthetic.targets, synthetic.student_lr)
            equal.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
            equal.append(all(torch.equal(a.loss, b.loss) for a, b in zip(first, again, strict=True)))
            left = synthetic.images.grad  # the last step's, which the next backward replaces
            equal.append(left is gradient if left is None or gradient is None else torch.equal(left, gradient))

    equal: list[bool] = []
    small.fit(tmp_path, small.module(store, labels="soft"), Look(), steps=2)
    assert equal == [True] * 6


LOSSES = (0.2, 0.5, 0.9, 0.3)


class Stub(MatchingObjective):
    """A loss that depends on the expert alone, and leaves the images where they are."""

    def __init__(self) -> None:
        self.drawn: list[int] = []
        self.chosen: list[int] = []

    @staticmethod
    def default_pool() -> TrajectoryPool:
        return TrajectoryPool()

    def draw(self, synthetic: Any, real: Any, network: Any, reference: Any, context: StepContext) -> int:  # noqa: ANN401
        return context.step

    def score(
        self,
        synthetic: Any,  # noqa: ANN401
        real: Any,  # noqa: ANN401
        network: Any,  # noqa: ANN401
        candidate: Any,  # noqa: ANN401
        draw: int,
        sole: bool,
    ) -> ScoredCandidate:
        expert: int = candidate.key[0]
        self.drawn.append(expert)
        return ScoredCandidate(candidate, torch.tensor(LOSSES[expert]), draw, expert)

    def loss(self, synthetic: Any, network: Any, scored: ScoredCandidate) -> Tensor:  # noqa: ANN401
        self.chosen.append(scored.work)
        zero: Tensor = 0 * (synthetic.images.sum() + synthetic.student_lr)
        return zero


@pytest.mark.parametrize("favor", ["high_loss", "low_loss"])
def test_choices_follow_the_probabilities(store: Path, tmp_path: Path, favor: Favor) -> None:
    stub, steps = Stub(), 400
    choice = small.selection(num_candidates=4, temperature=0.5, favor=favor)
    small.fit(tmp_path, small.module(store, objective=stub), choice, steps=steps)
    weights = torch.tensor([(1 if favor == "high_loss" else -1) * loss / 0.5 for loss in LOSSES]).exp()
    expected = steps * weights / weights.sum()
    counts = torch.bincount(torch.tensor(stub.chosen), minlength=4)
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # 99.9 % quantile at 3 degrees of freedom
    assert choice.selections == steps
    effective = float(torch.special.entr(weights / weights.sum()).sum().exp())
    assert choice.state_dict()["effective_sum"] / steps == pytest.approx(effective, rel=1e-5)


def test_base_method_is_uniform_over_experts(store: Path, tmp_path: Path) -> None:
    stub, steps = Stub(), 400
    small.fit(tmp_path, small.module(store, objective=stub), steps=steps)
    assert stub.drawn == stub.chosen
    counts = torch.bincount(torch.tensor(stub.chosen), minlength=4)
    assert float(((counts - steps / 4) ** 2 / (steps / 4)).sum()) < 16.3


def test_choices_replay_from_the_streams(store: Path, tmp_path: Path) -> None:
    stub = Stub()
    small.fit(tmp_path, small.module(store, objective=stub), small.selection(temperature=0.2), steps=6)
    pool = small.pool(store)
    for step, chosen in enumerate(stub.chosen):
        experts = [key[0] for key in pool.draw(3, StepContext(5, step))]
        assert stub.drawn[3 * step : 3 * step + 3] == experts
        probabilities = selection_probabilities(torch.tensor([LOSSES[e] for e in experts]), 0.2)
        assert chosen == experts[sample_index(probabilities, step_generator(5, step, "selection"))]


def test_choice_is_kept_for_n_steps(store: Path, tmp_path: Path) -> None:
    watch = Watch()
    choice = small.selection(every_n_steps=3)
    small.fit(tmp_path, small.module(store, objective=watch), choice, steps=8)
    keys = [scored.candidate.key for scored in watch.differentiated]
    assert keys[0:3] == [keys[0]] * 3
    assert keys[3:6] == [keys[3]] * 3
    assert len(watch.scored) == 3 + 2 + 3 + 2 + 3 + 1
    assert choice.selections == 3
    # the draw is each step's own, also where the candidate is kept
    assert len({id(scored.draw) for scored in watch.differentiated}) == 8


@pytest.mark.parametrize("held", [None, (2, 1)])
def test_state_round_trip(held: tuple[int, int] | None) -> None:
    first, second = small.selection(), small.selection()
    first.load_state_dict({"selections": 7, "effective_sum": 2.5, "held": held})
    saved: dict[str, Any] = first.state_dict()
    assert saved == {"selections": 7, "effective_sum": 2.5, "held": held}
    second.load_state_dict(saved | {"held": list(held) if held else None})  # as a foreign reader would give it
    assert second.state_dict() == saved


def test_pool_size_asks_for_more_experts(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store, {"num_experts": 1})
    small.fit(tmp_path, distilled, small.selection(num_candidates=3, pool_size=4), steps=1)
    assert distilled.pool.size == 4
    with pytest.raises(InputError, match=r"num_candidates is 3, but the pool holds 1; .*pool_size"):
        small.fit(tmp_path, small.module(store, {"num_experts": 1}), small.selection(), steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates is 0; at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be above 0"),
        ({"every_n_steps": 0}, "every_n_steps is 0; it must be at least 1"),
        ({"num_candidates": 3, "pool_size": 2}, "pool_size is 2, but num_candidates is 3"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrajectorySelectionCallback(**options)


def test_advance_moves_only_the_winner(store: Path, tmp_path: Path) -> None:
    watch = Watch()
    distilled = small.module(store, {"refresh": "advance"}, objective=watch)
    small.fit(tmp_path, distilled, small.selection(), steps=9)
    used = Counter[int]()
    for step, winner in enumerate(watch.differentiated):
        candidates: Sequence[ScoredCandidate] = watch.scored[3 * step : 3 * step + 3]
        assert [s.candidate.key[1] for s in candidates] == [used[s.candidate.key[0]] % small.EPOCHS for s in candidates]
        used[winner.candidate.key[0]] += 1
    pool = distilled.pool
    assert isinstance(pool, TrajectoryPool)
    used[watch.differentiated[-1].candidate.key[0]] -= 1  # its refresh waits for the next step
    assert pool.cursors == [used[expert] % small.EPOCHS for expert in range(small.EXPERTS)]
