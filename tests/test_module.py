"""The distillation module: what a step moves, by how much, and what it leaves alone."""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dd_lightning.callbacks import EvalCallback
from dd_lightning.distillation import NONFINITE_LIMIT
from dd_lightning.functional.augment import augment
from dd_lightning.functional.errors import DivergenceError, InputError
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.random import StepContext
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import GradientMatching, ScoredCandidate, TrajectoryMatching
from dd_lightning.pools import CandidateKey, TrajectoryPool, TrajectorySegment
from dd_lightning.sets.initial import class_labels
from dd_lightning.trainer.run import DEFAULT_STEPS
from tests import small


class Record(Callback):
    """Copies of what is learned before each step and after the last, and of each step's gradients."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor | None]] = []
        self.optimizer_steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.before.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.optimizer_steps += 1
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in pl_module.named_parameters()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module)

    def values(self, name: str) -> list[Tensor]:
        return [values[f"synthetic.{name}"] for values in self.before]


def recorded(store: Path, folder: Path, steps: int = 4, **options: Any) -> tuple[DistillationModule, Record, Trainer]:  # noqa: ANN401
    distilled, record = small.module(store, **options), Record()
    return distilled, record, small.fit(folder, distilled, record, steps=steps)


def test_one_batch_is_one_optimizer_step_is_one_step(store: Path, tmp_path: Path) -> None:
    distilled, record, trainer = recorded(store, tmp_path, steps=5)
    assert trainer.global_step == record.optimizer_steps == 5
    assert len(record.before) == 5 + 1
    assert distilled.distillation.candidate_evaluations == 5
    assert distilled.distillation.skipped_steps == 0


def test_images_and_rate_move_labels_and_real_data_do_not(store: Path, tmp_path: Path) -> None:
    distilled, record, _ = recorded(store, tmp_path)
    for earlier, later in zip(record.before, record.before[1:], strict=False):
        assert not torch.equal(earlier["synthetic.images"], later["synthetic.images"])
        assert not torch.equal(earlier["synthetic.student_lr"], later["synthetic.student_lr"])
    assert distilled.synthetic_set.targets.tolist() == [0, 0, 1, 1, 2, 2]
    untouched = small.data()
    assert torch.equal(distilled.problem.real.images, untouched.train.images)
    assert torch.equal(distilled.problem.real.labels, untouched.train.labels)


def test_initial_images_are_real_ones_of_their_class(store: Path, tmp_path: Path) -> None:
    _, record, _ = recorded(store, tmp_path, steps=1)
    real = small.data().train
    for image, label in zip(record.values("images")[0], class_labels(small.CLASSES, 2), strict=True):
        found = [i for i in real.class_indices(int(label)).tolist() if torch.equal(real.images[i], image)]
        assert len(found) == 1


def test_rate_zero_keeps_the_student_lr(store: Path, tmp_path: Path) -> None:
    _, record, _ = recorded(store, tmp_path, student_lr_lr=0.0)
    assert {float(value) for value in record.values("student_lr")} == {float(torch.tensor(0.05))}


def test_soft_labels_come_from_the_experts_that_are_right(store: Path, tmp_path: Path) -> None:
    distilled, record, _ = recorded(store, tmp_path, labels="soft", label_lr=0.0)
    targets, network = distilled.synthetic_set.targets, distilled.problem.network
    images, labels = record.values("images")[0], class_labels(small.CLASSES, 2)
    pool = distilled.pool
    assert isinstance(pool, TrajectoryPool)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        logits = [network(pool.store.rows(i, [small.EPOCHS])[0], image[None])[0] for i in range(small.EXPERTS)]
        right = [values for values in logits if int(values.argmax()) == int(label)]
        torch.testing.assert_close(targets[row], torch.stack(right or logits).mean(0), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, targets) for value in record.values("targets"))
    assert not targets.requires_grad


def test_soft_labels_move_with_a_rate(store: Path, tmp_path: Path) -> None:
    _, record, _ = recorded(store, tmp_path, labels="soft", label_lr=1.0)
    targets = record.values("targets")
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(targets))


def test_update_is_hand_written_momentum(store: Path, tmp_path: Path) -> None:
    rates = {"images": (7.0, 0.6), "student_lr": (1e-3, 0.6), "targets": (2.0, 0.8)}
    _, record, _ = recorded(
        store, tmp_path, 3, labels="soft", image_lr=7.0, momentum=0.6, label_lr=2.0, label_momentum=0.8
    )
    for name, (rate, momentum) in rates.items():
        values = record.values(name)
        velocity = torch.zeros_like(values[0])
        for step, (value, following) in enumerate(itertools.pairwise(values)):
            gradient = record.gradients[step][f"synthetic.{name}"]
            assert gradient is not None
            velocity = momentum * velocity + gradient  # torch's first velocity is the gradient as well
            torch.testing.assert_close(following, value - rate * velocity, rtol=1e-6, atol=1e-7)


def test_gradient_is_plain_backpropagation(store: Path, tmp_path: Path) -> None:
    distilled, record, _ = recorded(store, tmp_path, 1, labels="soft", label_lr=1.0, syn_steps=3)
    images, rate, targets = (record.values(n)[0].requires_grad_() for n in ("images", "student_lr", "targets"))
    context = StepContext(seed=5, step=0)
    segment = distilled.pool.load(distilled.pool.draw(1, context)[0])
    assert isinstance(segment, TrajectorySegment)
    objective = distilled.objective
    assert isinstance(objective, TrajectoryMatching)
    theta = segment.start.clone().requires_grad_()
    for indices, draw in objective.draw(distilled.problem, lambda: segment, context):
        loss = classification_loss(distilled.problem.network(theta, augment(images[indices], draw)), targets[indices])
        theta = theta - rate * torch.autograd.grad(loss, theta, create_graph=True)[0]
    matching = (theta - segment.target).square().sum() / (segment.start - segment.target).square().sum()
    expected = torch.autograd.grad(matching, (images, rate, targets))
    for name, gradient in zip(("images", "student_lr", "targets"), expected, strict=True):
        found = record.gradients[0][f"synthetic.{name}"]
        assert found is not None
        assert float((found - gradient).norm() / gradient.norm()) < 1e-4


def test_student_lr_floor(store: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            assert isinstance(pl_module, DistillationModule)
            gradient = pl_module.synthetic_set.student_lr.grad
            assert gradient is not None
            gradient.fill_(1.0)  # the rate falls by at least 0.1 at every step

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            assert isinstance(pl_module, DistillationModule)
            seen.append((float(pl_module.synthetic_set.student_lr.detach()), pl_module.distillation.student_lr))

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            assert isinstance(pl_module, DistillationModule)
            pl_module.distillation.begin(trainer.global_step)  # once per step, whoever is first
            starts.append(float(pl_module.synthetic_set.student_lr.detach()))

    starts: list[float] = []
    distilled = small.module(store, student_lr_floor=0.02, student_lr_lr=0.1, momentum=0.0)
    points = small.evaluation(every_n_steps=1)  # SGD with the negative raw rate would be refused
    small.fit(tmp_path, distilled, Look(), points, steps=3)
    assert [raw < 0 for raw, _ in seen] == [True] * 3
    assert [floored for _, floored in seen] == [0.02] * 3
    assert starts == pytest.approx([0.05, 0.02, 0.02])
    assert [point.step for point in points.points] == [0, 1, 2, 3]


def test_a_diverged_rate_without_a_floor_is_refused_by_the_evaluation(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store, student_lr_lr=1e6)
    with pytest.raises(InputError, match=r"learning rate is .*set model.student_lr_floor"):
        small.fit(tmp_path, distilled, small.evaluation(every_n_steps=1), steps=8)


def test_loss_threshold_skips(store: Path, tmp_path: Path) -> None:
    distilled, record, trainer = recorded(
        store, tmp_path, 3, objective=TrajectoryMatching(syn_steps=2, loss_threshold=1e-9)
    )
    assert distilled.distillation.skipped_steps == trainer.global_step == 3
    assert all(torch.equal(value, record.values("images")[0]) for value in record.values("images"))
    assert {float(value) for value in record.values("student_lr")} == {float(torch.tensor(0.05))}


class BrokenPool(TrajectoryPool):
    """A target of NaN at some draws."""

    broken: frozenset[int] = frozenset()
    loads = -1

    def load(self, key: CandidateKey) -> TrajectorySegment:
        segment = super().load(key)
        self.loads += 1
        if self.loads in self.broken:
            return TrajectorySegment(key, segment.start, segment.target * float("nan"))
        return segment


def broken_pool(store: Path, *loads: int) -> BrokenPool:
    pool = BrokenPool(str(store), small.EXPERTS, 1, small.EPOCHS, recipe=small.RECIPE)
    pool.broken = frozenset(loads)
    return pool


def test_nonfinite_loss_is_an_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"matching loss is not finite at step 2 .*lower image_lr"):
        small.fit(tmp_path, small.module(store, pool=broken_pool(store, 2)))


def test_nonfinite_loss_is_skipped(store: Path, tmp_path: Path) -> None:
    distilled, record, trainer = recorded(store, tmp_path, 4, pool=broken_pool(store, 1, 2), on_nonfinite="skip")
    images = record.values("images")
    assert [torch.equal(a, b) for a, b in itertools.pairwise(images)] == [False, True, True, False]
    assert distilled.distillation.skipped_steps == 2
    assert trainer.global_step == 4


def test_a_run_that_only_skips_has_diverged(store: Path, tmp_path: Path) -> None:
    pool = broken_pool(store, *range(3, 100))
    distilled = small.module(store, pool=pool, on_nonfinite="skip")
    with pytest.raises(DivergenceError, match="not finite at step 22, as at 19 steps before, "):
        small.fit(tmp_path, distilled, steps=40)
    assert distilled.distillation.skipped_steps == NONFINITE_LIMIT - 1
    pool = broken_pool(store, *(load for load in range(60) if load % 10))  # a finite one now and then
    small.fit(tmp_path, small.module(store, pool=pool, on_nonfinite="skip"), steps=40)


def test_a_rate_that_is_not_above_zero_is_an_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"student_lr is -[\d.e+]+ at step 2; it must be above 0: .*floor"):
        small.fit(tmp_path, small.module(store, student_lr_lr=1e4))
    small.fit(tmp_path, small.module(store, student_lr_lr=1e4, student_lr_floor=1e-3), steps=2)


def test_a_diverged_network_is_named(tmp_path: Path) -> None:
    pool = {"recipe": replace(small.LIVE_RECIPE, lr=1e30)}
    with pytest.raises(DivergenceError, match=r"candidate \(0, 0\) has diverged: lower pool\.recipe\.lr"):
        small.fit(tmp_path, small.network_module(pool))


def test_a_nonfinite_candidate_is_left_out(store: Path, tmp_path: Path) -> None:
    for broken in range(3, 6):  # each of the second step's three in turn
        distilled, choice = small.module(store, pool=broken_pool(store, broken)), small.selection()
        small.fit(tmp_path, distilled, choice, steps=3)
        assert distilled.distillation.skipped_steps == 0
        assert choice.nonfinite == 1


def test_only_nonfinite_candidates_are_an_error_or_skipped(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="not finite at step 1 "):
        small.fit(tmp_path, small.module(store, pool=broken_pool(store, 3, 4, 5)), small.selection())
    distilled = small.module(store, pool=broken_pool(store, 3, 4, 5), on_nonfinite="skip")
    choice = small.selection()
    small.fit(tmp_path, distilled, choice, steps=11)
    assert (distilled.distillation.skipped_steps, choice.nonfinite) == (1, 3)
    assert 1 <= choice.state_dict()["effective_sum"] / choice.selections <= 3


def test_a_second_fit_by_another_trainer_starts_anew(store: Path, tmp_path: Path) -> None:
    """The images stay; counters, curve and the pool's cursors are the new run's."""
    distilled, choice, points = small.module(store, {"refresh": "advance"}), small.selection(), small.evaluation()
    small.fit(tmp_path, distilled, choice, points, steps=4)
    images = small.learned(distilled)[0]
    small.fit(tmp_path, distilled, choice, points, steps=2)
    assert not torch.equal(small.learned(distilled)[0], images)
    assert [point.step for point in points.points] == [0, 2]
    assert choice.selections == 2
    assert distilled.distillation.candidate_evaluations == 6


class Counting(GradientMatching):
    """An objective with state of its own: the steps that it has drawn for."""

    drawn = 0

    def draw(self, *arguments: Any) -> Any:  # noqa: ANN401
        self.drawn += 1
        return super().draw(*arguments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.drawn = 0


def test_a_second_fit_by_another_trainer_resets_the_objective(tmp_path: Path) -> None:
    objective = Counting(batch_real=8, sampling="representative")
    distilled = small.network_module(objective=objective)
    trainer = small.fit(tmp_path, distilled, steps=2, max_epochs=1)
    trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = 3, 2
    trainer.fit(distilled, datamodule=small.data())
    assert objective.drawn == 3
    small.fit(tmp_path, distilled, steps=1)
    assert objective.drawn == 1
    objective.load_state_dict({})
    assert objective.state_dict() == {"chosen": None}


def test_a_second_fit_by_the_same_trainer_goes_on(store: Path, tmp_path: Path) -> None:
    # Lightning makes a new optimizer, and with it a new momentum
    once, twice = (small.module(store, {"refresh": "advance"}, momentum=0.0) for _ in range(2))
    small.fit(tmp_path, once, small.selection(temperature=0.1), steps=6)
    choice, points = small.selection(temperature=0.1), small.evaluation()
    trainer = small.fit(tmp_path, twice, choice, points, steps=4, max_epochs=1)
    assert trainer.global_step == 4
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit_loop.max_epochs = 2
    trainer.fit(twice, datamodule=small.data())
    assert trainer.global_step == 6
    assert [point.step for point in points.points] == [0, 2, 4, 6]
    assert choice.selections == 6
    assert small.same(small.learned(once), small.learned(twice))


class NanGradient(TrajectoryMatching):
    """A finite loss whose gradient is not, at one step."""

    def loss(self, *arguments: Any) -> Tensor:  # noqa: ANN401
        value = super().loss(*arguments)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            value.register_hook(lambda gradient: gradient * float("nan"))
        return value


def test_nonfinite_gradient(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="a gradient is not finite at step 1 "):
        small.fit(tmp_path, small.module(store, objective=NanGradient(syn_steps=2)))
    distilled, record, _ = recorded(store, tmp_path, 3, objective=NanGradient(syn_steps=2), on_nonfinite="skip")
    images = record.values("images")
    assert [torch.equal(a, b) for a, b in itertools.pairwise(images)] == [False, True, False]
    assert distilled.distillation.skipped_steps == 1


def test_global_random_states_stay(store: Path, tmp_path: Path) -> None:
    def states() -> tuple[Any, ...]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2]  # type: ignore[index]

    before = states()
    small.fit(tmp_path, small.module(store), small.selection(), small.evaluation(compare_random=True), steps=3)
    assert states() == before


def test_load_from_checkpoint(store: Path, tmp_path: Path) -> None:
    for labels in ("hard", "soft"):
        distilled = small.module(store, labels=labels)
        small.fit(tmp_path, distilled, small.checkpoints(tmp_path / labels), steps=2)
        # Another seed in the environment is no matter here: nothing is drawn.
        loaded = DistillationModule.load_from_checkpoint(tmp_path / labels / "step=2.ckpt", seed=99)
        assert small.same(small.learned(loaded), small.learned(distilled))
        assert torch.equal(loaded.synthetic_set.targets, distilled.synthetic_set.targets)
        assert loaded.synthetic_set.label_kind == labels


def test_another_seed_at_resumption_is_told(store: Path, tmp_path: Path) -> None:
    small.fit(tmp_path, small.module(store), small.checkpoints(tmp_path), steps=2)
    with pytest.warns(UserWarning, match="seed is 9, but the checkpoint's run has 5"):
        small.fit(
            tmp_path, small.module(store, seed=9), small.checkpoints(tmp_path), ckpt_path=tmp_path / "step=2.ckpt"
        )


def test_checkpoint_of_another_configuration_is_refused(store: Path, tmp_path: Path) -> None:
    small.fit(tmp_path, small.module(store), small.checkpoints(tmp_path), steps=2)
    for changed, message in (
        (small.module(store, ipc=1), r"model\.ipc is 1, but the checkpoint's run has 2"),
        (small.module(store, {"num_experts": 3}), r"model\.pool\.num_experts is 3, but the checkpoint's run has 4"),
        (small.module(store, labels="soft"), r"model\.labels is 'soft', but the checkpoint's run has 'hard'"),
    ):
        with pytest.raises(InputError, match=message):
            small.fit(tmp_path, changed, small.checkpoints(tmp_path), ckpt_path=tmp_path / "step=2.ckpt")


def test_default_number_of_steps(store: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append((trainer.max_steps, int(trainer.num_training_batches)))
            trainer.should_stop = True

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            trainer.should_stop = True

    seen: list[tuple[int, int]] = []
    trainer = small.fit(tmp_path, small.module(store), Stop(), steps=-1, max_epochs=1)
    assert seen == [(DEFAULT_STEPS, DEFAULT_STEPS)] == [(2000, 2000)]
    assert trainer.global_step <= 1


def test_no_steps_are_refused_before_experts_are_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_steps is 0; a run needs at least 1 step"):
        small.fit(tmp_path, small.module(tmp_path / "none"), steps=0)
    assert not (tmp_path / "none").exists()


def test_unset_pieces_say_so() -> None:
    fresh = DistillationModule()
    for name in ("synthetic_set", "problem"):
        with pytest.raises((InputError, RuntimeError), match="yet"):
            getattr(fresh, name)


def test_callbacks_need_a_distillation_module(tmp_path: Path) -> None:
    callback: Callback
    for callback in (EvalCallback(), small.selection()):
        with pytest.raises(InputError, match="attached to LightningModule; it needs a DistillationModule"):
            callback.setup(small.trainer(tmp_path), LightningModule(), "fit")


def test_scored_candidates_have_no_graph(store: Path, tmp_path: Path) -> None:
    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            assert isinstance(pl_module, DistillationModule)
            pl_module.distillation.begin(trainer.global_step)
            scored.extend(pl_module.distillation.score(pl_module.distillation.draw(2)))

    scored: list[ScoredCandidate] = []
    small.fit(tmp_path, small.module(store), Look(), steps=1)
    assert len(scored) == 2
    assert not any(s.loss.requires_grad or any(theta.requires_grad for theta in s.work) for s in scored)
