"""The selection callback: one look at each candidate, the same for all, and the right frequencies."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dd_lightning.callbacks import TrajectorySelectionCallback, selection
from dd_lightning.functional import products
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import DifferentiatedLoss, Loss
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.functional.selection import Favor, sample_index, selection_probabilities
from dd_lightning.functional.trajectory import trajectory_loss, unroll
from dd_lightning.module import DistillationModule
from dd_lightning.networks import training_loss
from dd_lightning.objectives import (
    GradientMatching,
    MatchingObjective,
    Problem,
    ScoredCandidate,
    TrajectoryMatching,
    student,
)
from dd_lightning.pools import Candidate, CandidateKey, TrajectoryPool, TrajectorySegment
from tests import small


class Watch(TrajectoryMatching):
    """Counts what is asked of the objective."""

    def __init__(self) -> None:
        super().__init__(syn_steps=2)
        self.scored: list[ScoredCandidate] = []
        self.differentiated: list[ScoredCandidate] = []

    def score(self, *arguments: Any, **options: Any) -> list[ScoredCandidate]:  # noqa: ANN401
        scored = super().score(*arguments, **options)
        self.scored += scored
        return scored

    def loss(self, problem: Problem, scored: ScoredCandidate) -> Tensor:
        self.differentiated.append(scored)
        return super().loss(problem, scored)


def test_the_winners_work_is_reused(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def counted(loss: Loss) -> DifferentiatedLoss:
        made = products.differentiated(loss)

        def gradients(thetas: Tensor, images: Tensor, targets: Tensor) -> Tensor:
            passes.append(len(thetas))
            return made.gradients(thetas, images, targets)

        return made._replace(gradients=gradients)

    monkeypatch.setattr(student, "differentiated", counted)
    watch, steps = Watch(), 4
    distilled = small.module(store, objective=watch)
    small.fit(tmp_path, distilled, small.selection(num_candidates=3), steps=steps)
    assert len(watch.scored) == distilled.distillation.candidate_evaluations == 3 * steps
    # first-order passes of scoring, on all together, and no others but the memory estimate's two
    assert passes == [3] * (2 + steps * watch.syn_steps)
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
            pl_module.distillation.begin(trainer.global_step)
            first = pl_module.distillation.score(pl_module.distillation.draw(3))
            again = pl_module.distillation.score(pl_module.distillation.draw(3))
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
        self.chosen: list[Any] = []

    @staticmethod
    def default_pool() -> TrajectoryPool:
        return TrajectoryPool()

    def draw(self, problem: Problem, reference: Any, context: StepContext) -> int:  # noqa: ANN401
        return context.step

    def score(self, problem: Problem, candidates: Any, draw: int, **_: Any) -> list[ScoredCandidate]:  # noqa: ANN401
        return [self.one(candidate, draw) for candidate in candidates]

    def one(self, candidate: Candidate, draw: int) -> ScoredCandidate:
        expert: int = candidate.key[0]
        self.drawn.append(expert)
        return ScoredCandidate(candidate, torch.tensor(LOSSES[expert]), draw, expert)

    def loss(self, problem: Problem, scored: ScoredCandidate) -> Tensor:
        self.chosen.append(scored.work)
        zero: Tensor = 0 * (problem.synthetic.images.sum() + problem.synthetic.student_lr)
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
    earlier = {"selections": 7, "nonfinite": 1, "effective_sum": 2.5, "held": held}
    first.load_state_dict(earlier | {"group": [((3, 1), 0.25), ((0, 2), 1.5)]})
    saved: dict[str, Any] = first.state_dict()
    assert saved == earlier | {"group": [((3, 1), 0.25), ((0, 2), 1.5)]}
    # as a foreign reader would give it
    second.load_state_dict(saved | {"held": list(held) if held else None, "group": [[[3, 1], 0.25], [[0, 2], 1.5]]})
    assert second.state_dict() == saved


class Moving(Stub):
    """A loss that depends on the step, too: a remembered one is not a fresh one."""

    inner_steps = 5

    def __init__(self, broken_at: int | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[int, CandidateKey]] = []
        self.broken_at = broken_at

    def of(self, step: int, key: CandidateKey) -> float:
        return LOSSES[key[0]] + 0.1 * math.sin(1.0 + step + sum(key))

    def one(self, candidate: Candidate, step: int) -> ScoredCandidate:
        self.calls.append((step, candidate.key))
        loss = math.nan if step == self.broken_at else self.of(step, candidate.key)
        return ScoredCandidate(candidate, torch.tensor(loss, dtype=torch.float64), step, candidate.key)


class Recorded(Callback):
    """Keeps what the selection logs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[Mapping[str, float]] = []

        monkeypatch.setattr(selection, "log_scalars", lambda _, values: self.values.append(values))


def test_losses_are_remembered_while_candidates_stay(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, steps, recorded = Moving(), 40, Recorded(monkeypatch)
    choice = small.selection(temperature=0.5, refresh_per_step=1)
    distilled = small.module(store, objective=stub)
    small.fit(tmp_path, distilled, choice, steps=steps)
    pool, group, calls, again = small.pool(store), dict[CandidateKey, float](), iter(stub.calls), 0
    for step, chosen in enumerate(stub.chosen):
        context = StepContext(5, step)
        stay = dict(list(group.items())[-2:])
        everyone = pool.draw(4, context)  # all experts, in a random order
        new = [key for key in everyone if key[0] not in {kept[0] for kept in stay}][: 3 - len(stay)]
        assert [key[0] for key in pool.draw(3 - len(stay), context, list(stay))] == [key[0] for key in new]
        new = pool.draw(3 - len(stay), context, list(stay))
        assert [next(calls) for _ in new] == [(step, key) for key in new]
        group = stay | {key: stub.of(step, key) for key in new}
        probabilities = selection_probabilities(torch.tensor(list(group.values()), dtype=torch.float64))
        winner = list(group)[sample_index(probabilities, step_generator(5, step, "selection"))]
        assert chosen == winner
        assert recorded.values[step]["selection/loss_chosen"] == pytest.approx(group[winner], abs=1e-12)
        assert recorded.values[step]["selection/loss_mean"] == pytest.approx(sum(group.values()) / 3, abs=1e-12)
        if winner in stay:  # its loss was an earlier step's
            assert next(calls) == (step, winner)
            group[winner] = stub.of(step, winner)
            again += 1
        assert recorded.values[step]["selection/scored"] == len(new) + (winner in stay)
    assert next(calls, None) is None
    assert 15 < again < 35  # two of three, or the replay has shown little
    assert distilled.distillation.candidate_evaluations == len(stub.calls) == 3 + (steps - 1) + again
    assert choice.state_dict()["group"] == list(group.items())


def test_how_long_a_candidate_stays_is_not_its_losses_affair(store: Path, tmp_path: Path) -> None:
    stub, steps = Moving(), 300
    small.fit(
        tmp_path,
        small.module(store, {"num_experts": 4}, objective=stub),
        small.selection(num_candidates=2, temperature=0.5, refresh_per_step=1),
        steps=steps,
    )
    entered = [key[0] for (step, key), before in zip(stub.calls[1:], stub.calls, strict=False) if step != before[0]]
    counts = torch.bincount(torch.tensor(entered), minlength=4)
    assert len(entered) == steps - 1
    assert float(((counts - steps / 4) ** 2 / (steps / 4)).sum()) < 16.3  # 99.9 %, 3 degrees of freedom


@pytest.mark.parametrize("steps", [3, 4])
def test_a_loss_that_is_not_finite_is_not_remembered(store: Path, tmp_path: Path, steps: int) -> None:
    stub = Moving(broken_at=2)
    choice = small.selection(refresh_per_step=1)
    distilled = small.module(store, objective=stub, on_nonfinite="skip")
    small.fit(tmp_path, distilled, choice, steps=steps)
    assert distilled.distillation.skipped_steps == 1
    assert [step for step, _ in stub.calls].count(2) == 2  # the new one, and the kept one that is chosen instead
    group = choice.state_dict()["group"]
    assert len(group) == {3: 1, 4: 3}[steps]  # two of the third step's were broken; the fourth draws two new ones
    assert all(math.isfinite(loss) for _, loss in group)


def test_a_new_network_has_not_its_predecessors_loss(tmp_path: Path) -> None:
    class Ages(GradientMatching):
        def score(self, *arguments: Any, **options: Any) -> list[ScoredCandidate]:  # noqa: ANN401
            scored = super().score(*arguments, **options)
            calls.extend(one.candidate.key for one in scored)
            return scored

    class Births(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            assert isinstance(pl_module, DistillationModule)
            now = [pl_module.pool.load((place,)).key for place in range(3)]
            if places:
                left.extend((key, key in calls) for key in now if key not in places[-1])
            places.append(now)
            assert sorted(known.key for known in choice._group) == now
            calls.clear()

    calls: list[CandidateKey] = []
    places: list[list[CandidateKey]] = []
    left: list[tuple[CandidateKey, bool]] = []
    # all three places are in the group always, and one that is reborn must be scored in the step that finds it so
    choice = small.selection(num_candidates=3, refresh_per_step=1, temperature=1e9)
    distilled = small.network_module({"num_networks": 3, "age_limit": 2}, objective=Ages(batch_real=8))
    small.fit(tmp_path, distilled, choice, Births(), steps=12)
    assert len(left) >= 4
    assert all(scored for _, scored in left)


def test_first_steps_rank_and_the_path_is_completed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Watch):
        def __init__(self) -> None:
            super().__init__()
            self.syn_steps = 5

        def score(self, problem: Problem, *arguments: Any, **options: Any) -> list[ScoredCandidate]:  # noqa: ANN401
            begun = super().score(problem, *arguments, **options)
            if "resume" in options:
                return begun
            first.extend(begun)
            synthetic, (candidates, draw) = problem.synthetic, arguments
            for candidate, scored in zip(candidates, begun, strict=True):
                (whole,) = unroll(
                    products.differentiated(training_loss(problem.network)),
                    [candidate.start],
                    synthetic.student_lr.detach(),
                    synthetic.images.detach(),
                    synthetic.targets,
                    draw,
                )
                reference = trajectory_loss(whole[2], candidate.start, candidate.target)
                assert torch.equal(scored.loss, reference)
                wholes[id(draw), candidate.key] = whole
            return begun

    gradients, recorded = 0, Recorded(monkeypatch)

    def counted(*arguments: Any) -> Tensor:  # noqa: ANN401
        nonlocal gradients
        gradients += 1
        return gradient(*arguments)

    first: list[ScoredCandidate] = []
    wholes: dict[tuple[int, CandidateKey], list[Tensor]] = {}
    watch, steps, gradient = Begun(), 4, products.gradient
    monkeypatch.setattr(products, "gradient", counted)
    monkeypatch.setattr(student, "batching_pays", lambda *_: False)  # one by one, to the last bit
    distilled = small.module(store, objective=watch, image_lr=0.1, student_lr_lr=1e-7)
    small.fit(tmp_path, distilled, small.selection(score_steps=2, temperature=0.01), steps=steps)
    references = 3 * 5 * steps  # of this test
    assert gradients - references == steps * (3 * 2 + 3)  # no step of the winner is taken twice
    assert distilled.distillation.candidate_evaluations == pytest.approx(steps * (3 * 0.4 + 0.6))
    assert len(first) == 3 * steps
    for step, winner in enumerate(watch.differentiated):
        whole = wholes[id(winner.draw), winner.candidate.key]
        assert len(winner.work) == 6
        assert all(torch.equal(a, b) for a, b in zip(winner.work, whole, strict=True))
        candidate = winner.candidate
        assert isinstance(candidate, TrajectorySegment)
        assert torch.equal(winner.loss, trajectory_loss(whole[-1], candidate.start, candidate.target))
        begun = {scored.candidate.key: float(scored.loss) for scored in first[3 * step : 3 * step + 3]}
        assert recorded.values[step]["selection/loss_chosen"] == begun[candidate.key]
        assert recorded.values[step]["selection/loss_chosen"] != float(winner.loss)
        assert recorded.values[step]["selection/scored"] == 3


@pytest.mark.parametrize(
    ("options", "pool_options", "message"),
    [
        ({"refresh_per_step": 1}, {"share_start_epoch": True}, "refresh_per_step .* but share_start_epoch is true"),
        ({"score_steps": 3}, {}, "score_steps is 3; it must be at most 2"),
    ],
)
def test_what_the_run_cannot_do(
    store: Path, tmp_path: Path, options: dict[str, Any], pool_options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        small.fit(tmp_path, small.module(store, pool_options), small.selection(**options), steps=1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("option", [{"refresh_per_step": 1}, {"every_n_steps": 2}])
def test_averaged_processes_would_each_keep_their_own(store: Path, option: dict[str, Any]) -> None:
    class Processes:
        def __init__(self, world_size: int) -> None:
            self.world_size = world_size

    choice, averaged = small.selection(**option), small.module(store, processes="average")
    choice.setup(cast(Trainer, Processes(2)), small.module(store), "fit")
    choice.setup(cast(Trainer, Processes(1)), averaged, "fit")
    with pytest.raises(InputError, match=r"(refresh_per_step is 1|every_n_steps is 2), but processes is 'average'"):
        choice.setup(cast(Trainer, Processes(2)), averaged, "fit")


def test_classes_are_no_inner_steps(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="score_steps is 1, but GradientMatching has no inner steps"):
        small.fit(tmp_path, small.network_module(), small.selection(pool_size=3, score_steps=1), steps=1)


def test_pool_size_asks_for_more_experts(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store, {"num_experts": 1})
    small.fit(tmp_path, distilled, small.selection(num_candidates=3, pool_size=4), steps=1)
    assert len(distilled.pool) == 4
    for given, asked, holds in ((1, None, 3), (4, None, 4), (1, 4, 4)):
        distilled = small.network_module({"num_networks": given})
        small.fit(tmp_path, distilled, small.selection(num_candidates=3, pool_size=asked), steps=1)
        assert len(distilled.pool) == holds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates is 0; it must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0; it must be above 0"),
        ({"temperature": -1.0}, "temperature is -1; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be above 0"),
        ({"every_n_steps": 0}, "every_n_steps is 0; it must be at least 1"),
        ({"num_candidates": 3, "pool_size": 2}, "pool_size is 2; it must be at least 3"),
        ({"refresh_per_step": 0}, "refresh_per_step is 0; it must be at least 1 and at most 3"),
        ({"refresh_per_step": 4}, "refresh_per_step is 4; it must be at least 1 and at most 3"),
        ({"score_steps": 0}, "score_steps is 0; it must be at least 1"),
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
