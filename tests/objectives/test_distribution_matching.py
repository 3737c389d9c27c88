"""Distribution matching against a loop over classes written from the equation, on ordinary modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.policies import augment_in_turn
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork, build_network
from dd_lightning.objectives import base
from dd_lightning.objectives.classwise import ClasswiseDraw
from dd_lightning.objectives.distribution_matching import DistributionMatching
from dd_lightning.pools import LiveNetwork, NetworkPool
from dd_lightning.sets.initial import class_labels
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet
from tests import small

CLASSES, SHAPE, NAME = 3, (2, 8, 8), "ConvNet-2-W4-SIGMOID"


class Problem:
    """Noise in float64."""

    def __init__(self, objective: DistributionMatching, factor: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.objective = objective
        self.network = FunctionalNetwork(NAME, SHAPE, CLASSES)
        images = torch.randn(12 * CLASSES, *SHAPE, generator=generator, dtype=torch.float64)
        self.real = RealSet(images, class_labels(CLASSES, 12), CLASSES)
        start = torch.randn(2 * CLASSES, *SHAPE, generator=generator, dtype=torch.float64)
        self.synthetic = SyntheticSet(start, class_labels(CLASSES, 2), 0.01, Formation(factor)).double()
        self.candidate = LiveNetwork((0,), self.network.initial(0).double())

    @property
    def given(self) -> base.Problem:
        return base.Problem(self.synthetic, self.real, self.network)

    def draw(self, step: int = 0) -> ClasswiseDraw:
        return self.objective.draw(self.given, lambda: self.candidate, StepContext(3, step))

    def loss_and_gradient(self, draw: ClasswiseDraw, with_gradient: bool) -> tuple[Tensor, Tensor]:
        self.synthetic.images.grad = None
        (scored,) = self.objective.score(self.given, [self.candidate], draw, with_gradient=with_gradient)
        loss = self.objective.loss(self.given, scored)
        loss.backward()
        assert self.synthetic.images.grad is not None
        return loss.detach(), self.synthetic.images.grad


def slow_loss(problem: Problem, draw: ClasswiseDraw) -> Tensor:
    """Sum over classes and features of (mean of S - mean of T)^2."""
    module = build_network(NAME, SHAPE[0], CLASSES, SHAPE[1:]).double()
    nn.utils.vector_to_parameters(problem.candidate.theta, module.parameters())
    embed = module.get_submodule("features")
    decoded, total = problem.synthetic.decoded(), torch.zeros((), dtype=torch.float64)
    for batch in draw.classes:
        own = [
            embed(augment_in_turn(decoded[batch.rows], batch.augmentation)[i : i + 1]) for i in range(len(batch.rows))
        ]
        real = [embed(image[None]) for image in batch.real]
        difference = torch.cat(own).mean(0) - torch.cat(real).mean(0)
        for value in difference.flatten():
            total = total + value**2
    return total


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("policy", ["dsa", "idc"])
def test_equals_a_slow_loop(policy: str, factor: int, with_gradient: bool) -> None:
    problem = Problem(DistributionMatching(batch_real=5, policy="dsa" if policy == "dsa" else "idc"), factor)
    for step in range(6):  # each with another operation
        draw = problem.draw(step)
        loss, gradient = problem.loss_and_gradient(draw, with_gradient)
        expected = slow_loss(problem, draw)
        (expected_gradient,) = torch.autograd.grad(expected, problem.synthetic.images)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-10


def test_nothing_is_left_to_match_in_the_real_images_themselves() -> None:
    problem = Problem(DistributionMatching(batch_real=12, augmentation="crop_flip"))
    problem.synthetic = SyntheticSet(problem.real.images, problem.real.labels, 0.01).double()
    loss, gradient = problem.loss_and_gradient(problem.draw(), with_gradient=True)
    assert float(loss) < 1e-25
    assert float(gradient.abs().max()) < 1e-13


def test_each_step_has_a_network_of_its_own(tmp_path: Path) -> None:
    module = small.module(tmp_path, objective=DistributionMatching(batch_real=8), pool=None)
    pool = module.pool
    assert isinstance(pool, NetworkPool)
    seen: list[Tensor] = []

    class Objective(DistributionMatching):
        def score(self, problem: Any, candidates: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            seen.extend(candidate.theta.clone() for candidate in candidates)
            return super().score(problem, candidates, *arguments, **options)

    module.objective = module.distillation.objective = Objective(batch_real=8)
    before = small.fit(tmp_path, module, steps=4)
    assert before.global_step == 4
    assert len(seen) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert pool.batches_drawn == 0  # none is trained


def test_a_network_without_features_is_refused() -> None:
    problem = Problem(DistributionMatching(batch_real=5))
    network = FunctionalNetwork(perceptron, SHAPE, CLASSES)
    with pytest.raises(InputError, match="has no features: name its last layer 'classifier'"):
        problem.objective.check(network, problem.real)


def perceptron(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], num_classes))
