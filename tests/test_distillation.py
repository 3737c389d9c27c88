"""A run's steps without a Trainer: the same bits, and what moves the images."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dd_lightning.distillation import CHECKPOINT_FORMAT, Distillation
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.selection import sample_index, selection_probabilities
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives import GradientMatching, MatchingObjective, TrajectoryMatching, check_method
from dd_lightning.pools import CandidatePool, NetworkPool, PoolSetup, TrajectoryPool
from dd_lightning.sets.optimizer import ImageGradient, SyntheticOptimizer
from dd_lightning.sets.storage import Storage
from tests import small

STEPS, TEMPERATURE = 5, 0.1


def ready(
    objective: MatchingObjective,
    pool: CandidatePool,
    image_lr: float,
    candidates: int,
    **options: Any,  # noqa: ANN401
) -> Distillation:
    """Set a run up as the small modules do."""
    data = small.data()
    optimizer = SyntheticOptimizer(image_lr=image_lr, **options)
    run = Distillation(objective, pool, Storage(ipc=2), optimizer, seed=5)
    network = FunctionalNetwork(small.NETWORK, small.SHAPE, small.CLASSES)
    setup = PoolSetup(network, data.train, data.name, data.fingerprint, seed=5, steps=STEPS, size=candidates)
    run.setup(setup, data.space, candidates)
    run.draw_initial()
    return run


def distill(run: Distillation, candidates: int = 1, favor: Any = "high_loss") -> list[Tensor]:  # noqa: ANN401
    """Run Algorithm 1 by hand; return the images before each step and after the last."""
    synthetic = run.problem.synthetic
    optimizer = run.optimizer.build(synthetic, run.objective.learnable, small.CLASSES)
    run.objective.prepare(run.problem, STEPS, lambda _: None)
    images = [synthetic.images.detach().clone()]
    for step in range(STEPS):
        run.begin(step)
        if candidates > 1:
            keys = run.draw(candidates)
            scored = run.score(keys)
            losses = torch.stack([candidate.loss for candidate in scored])
            probabilities = selection_probabilities(losses, TEMPERATURE, favor, progress=step / STEPS)
            run.select(scored[sample_index(probabilities, run.context.generator("selection"))], keys)
        optimizer.zero_grad()
        run.loss(run.take()).backward()
        assert run.adjust_gradients()
        optimizer.step()
        images.append(synthetic.images.detach().clone())
    return images


def trajectories(store: Path, candidates: int = 1, **options: Any) -> Distillation:  # noqa: ANN401
    settings: dict[str, Any] = {"student_lr": 0.05, "student_lr_lr": 1e-3}
    pool = small.pool(store, refresh="advance")
    return ready(TrajectoryMatching(syn_steps=2), pool, 10.0, candidates, **(settings | options))


@pytest.mark.parametrize("favor", [None, "high_loss", "low_loss", "scheduled"])
def test_a_loop_in_plain_torch_gives_the_trainers_bits(store: Path, tmp_path: Path, favor: str | None) -> None:
    distilled = small.module(store, {"refresh": "advance"})
    selection = [] if favor is None else [small.selection(temperature=TEMPERATURE, favor=favor)]
    small.fit(tmp_path, distilled, *selection, steps=STEPS)
    run = trajectories(store, 1 if favor is None else 3)
    images = distill(run, 1 if favor is None else 3, favor)
    assert torch.equal(images[-1], small.learned(distilled)[0])
    assert torch.equal(run.problem.synthetic.student_lr, distilled.synthetic_set.student_lr)
    assert run.candidate_evaluations == STEPS * (1 if favor is None else 3)


def test_live_networks_in_plain_torch(tmp_path: Path) -> None:
    distilled = small.network_module()
    small.fit(tmp_path, distilled, small.selection(temperature=TEMPERATURE, pool_size=3), steps=STEPS)
    run = ready(small.network_module().objective, small.network_pool(), 0.1, 3)
    assert torch.equal(distill(run, 3)[-1], small.learned(distilled)[0])


def test_equal_norm_scales_to_the_running_mean() -> None:
    """Gradients of norms 2, 4 and 12 have running means 2, 3 and 6."""
    adjust = ImageGradient(SyntheticOptimizer(equal_norm=True)).adjust
    for length, mean in ((2.0, 2.0), (4.0, 3.0), (12.0, 6.0)):
        gradient = torch.tensor([0.6, 0.8]) * length
        adjust(gradient)
        torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8]) * mean)
    zero = torch.zeros(2)
    adjust(zero)
    assert not zero.any()


def test_equal_norm_in_a_run(store: Path) -> None:
    """Without momentum every step is as long as the running mean of the gradients' norms says."""
    images = distill(trajectories(store, momentum=0.0, equal_norm=True, student_lr_lr=0.0))
    lengths = [float((b - a).norm()) / 10.0 for a, b in itertools.pairwise(images)]
    plain = distill(trajectories(store, momentum=0.0, student_lr_lr=0.0))
    assert lengths[0] == pytest.approx(float((plain[1] - plain[0]).norm()) / 10.0)
    norms = [lengths[0]]
    for count, length in enumerate(lengths[1:], 2):  # the norm that makes the running mean this long
        norms.append(count * length - sum(norms))
    assert all(norm > 0 for norm in norms)
    assert max(norms) > 1.2 * min(norms)


def test_adam_is_torchs(store: Path) -> None:
    images = distill(trajectories(store, image_optimizer="adam", student_lr_lr=0.0))
    run = trajectories(store, student_lr_lr=0.0)
    synthetic = run.problem.synthetic
    run.optimizer.build(synthetic, run.objective.learnable, small.CLASSES)
    adam = torch.optim.Adam([synthetic.images], lr=10.0)
    for step in range(STEPS):
        torch.testing.assert_close(synthetic.images.detach(), images[step], rtol=1e-4, atol=1e-4)
        run.begin(step)
        adam.zero_grad()
        run.loss(run.take()).backward()
        adam.step()


@pytest.mark.parametrize("options", [{"image_optimizer": "adam"}, {"equal_norm": True}])
def test_killed_and_resumed(store: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = small.module(store, image_lr=0.1, **options)
    small.fit(tmp_path, whole, small.checkpoints(tmp_path))
    resumed = small.module(store, image_lr=0.1, **options)
    small.fit(tmp_path, resumed, small.checkpoints(tmp_path), ckpt_path=tmp_path / "step=3.ckpt")
    assert small.same(small.learned(resumed), small.learned(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_lr": -1.0}, "image_lr is -1; it must be at least 0"),
        ({"image_lr": float("inf")}, "image_lr is inf; it must be at least 0"),
        ({"student_lr": 0.0}, "student_lr is 0; it must be above 0"),
        ({"student_lr_floor": -0.1}, "student_lr_floor is -0.1; it must be above 0"),
        ({"student_lr_lr": -1e-7}, "student_lr_lr is -1e-07; it must be at least 0"),
        ({"label_lr": -1.0}, "label_lr is -1; it must be at least 0"),
        ({"momentum": 1.5}, "momentum is 1.5; it must be at least 0 and below 1"),
        ({"label_momentum": 1.0}, "label_momentum is 1; it must be at least 0 and below 1"),
        ({"image_optimizer": "adam", "image_steps": "per_class"}, "image_steps is 'per_class'"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SyntheticOptimizer(**options)


def test_a_checkpoint_of_another_format_is_refused(store: Path, tmp_path: Path) -> None:
    small.fit(tmp_path, small.module(store), small.checkpoints(tmp_path), steps=1)
    saved = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    del saved["distillation"]["format_version"]  # as before there was a number
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(InputError, match=f"checkpoint has format 1, but .* reads format {CHECKPOINT_FORMAT}"):
        small.fit(tmp_path, small.module(store), ckpt_path=tmp_path / "old.ckpt")


def test_averaged_processes_have_no_pool_that_steps_change() -> None:
    optimizer = SyntheticOptimizer(processes="average")
    check_method(GradientMatching(), NetworkPool(refresh="none"), optimizer, "hard", averaged=2)
    check_method(GradientMatching(), NetworkPool(), optimizer, "hard", averaged=1)
    for objective, pool in (
        (GradientMatching(), NetworkPool()),
        (TrajectoryMatching(), TrajectoryPool(refresh="advance")),
    ):
        with pytest.raises(InputError, match=r"processes is 'average', but pool.refresh is '(winner|advance)'"):
            check_method(objective, pool, optimizer, "hard", averaged=2)
