"""Bilevel unrolling against a slow loop: torch's Adam with a graph, and the loss on real images at its end."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dd_lightning.execution.options import Execution
from dd_lightning.functional.augment import augment
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives import BilevelUnroll, Problem
from dd_lightning.pools import Candidate
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet
from tests import small

SHAPE, CLASSES, IPC = (1, 8, 8), 3, 2


def problem(soft: bool = False, factor: int = 1) -> Problem:
    draw = torch.Generator().manual_seed(0)
    network = FunctionalNetwork("ConvNet-1-W4", SHAPE, CLASSES)
    labels = torch.arange(CLASSES).repeat_interleave(IPC)
    targets = F.one_hot(labels, CLASSES).double() * 4 if soft else labels
    images = torch.randn(CLASSES * IPC, *SHAPE, generator=draw, dtype=torch.float64)
    synthetic = SyntheticSet(images, targets, 0.0, Formation(factor)).double()
    synthetic.student_lr.data.fill_(0.02)
    real = torch.randn(60, *SHAPE, generator=draw, dtype=torch.float64)
    return Problem(synthetic, RealSet(real, torch.arange(60) % CLASSES, CLASSES), network)


def slow(objective: BilevelUnroll, given: Problem, theta: Tensor, draw: Any) -> Tensor:  # noqa: ANN401
    """Return the loss, with a graph from the window to what is learned."""
    synthetic, real, network = given.synthetic, given.real, given.network
    m = v = torch.zeros_like(theta)
    for number, step in enumerate(draw.steps, start=1):
        inside = number > draw.free
        images, targets = synthetic.decoded()[step.indices], synthetic.decoded_targets()[step.indices]
        at = theta if theta.requires_grad else theta.detach().requires_grad_()
        loss = F.cross_entropy(network(at, augment(images, step.augmentation)), _labels(targets))
        (g,) = torch.autograd.grad(loss, at, create_graph=True)
        g = g + objective.inner_weight_decay * at
        lr = synthetic.student_lr
        if objective.inner_optimizer == "sgd":
            m = objective.inner_momentum * m + g
            theta = at - lr * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            root = torch.where(v == 0, 0.0, torch.where(v == 0, 1.0, v / (1 - 0.999**number)).sqrt())
            theta = at - lr * (m / (1 - 0.9**number)) / (root + objective.inner_eps)
        if not inside:
            theta, m, v = theta.detach(), m.detach(), v.detach()
    return F.cross_entropy(network(theta, real.images[draw.rows]), real.labels[draw.rows])


def _labels(targets: Tensor) -> Tensor:
    return targets.softmax(1) if targets.is_floating_point() else targets


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("options", "factor"), [({}, 1), ({"batch_syn": 4, "inner_weight_decay": 0.01}, 2)])
@pytest.mark.parametrize("piece", [None, 3])
def test_equals_a_slow_loop(
    optimizer: Literal["adam", "sgd"], soft: bool, options: dict[str, Any], factor: int, piece: int | None
) -> None:
    # the biases before instance norm have no gradient but rounding, which a small eps would blow up
    objective = BilevelUnroll(
        total_steps=6,
        window=3,
        batch_real=20,
        augmentation="flip_rotate",
        inner_optimizer=optimizer,
        inner_eps=1e-4,
        execution=Execution(micro_batch=piece),
        **options,
    )
    given = problem(soft, factor)
    synthetic = given.synthetic
    theta = given.network.initial(1).double()
    draw = objective.draw(given, lambda: Candidate((0,), theta), StepContext(3, 4))
    assert 0 <= draw.free <= 3
    assert len(draw.steps) == draw.free + 3
    (scored,) = objective.score(given, [Candidate((0,), theta)], draw)
    learned = [p for p in synthetic.parameters() if p.requires_grad]
    expected = slow(objective, given, theta, draw)
    assert abs(float(scored.loss - expected.detach())) < 1e-10
    found = torch.autograd.grad(objective.loss(given, scored), learned)
    wanted = torch.autograd.grad(expected, learned)
    assert len(found) == 2 + soft
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-8


def test_windows_lie_anywhere_and_belong_to_the_step() -> None:
    objective = BilevelUnroll(total_steps=6, window=2, batch_real=5)
    given = problem()

    def draw(step: int) -> Any:  # noqa: ANN401
        return objective.draw(given, lambda: Candidate((0,), torch.zeros(1)), StepContext(0, step))

    assert {draw(step).free for step in range(60)} == set(range(5))
    assert len({tuple(draw(step).rows.tolist()) for step in range(10)}) == 10
    one, same = draw(3), draw(3)
    assert torch.equal(one.rows, same.rows)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(one.steps, same.steps, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 5, "window": 6}, "window is 6; it must be at least 1 and at most 5"),
        ({"window": 0}, "window is 0"),
        ({"inner_eps": 0.0}, "inner_eps is 0; it must be above 0"),
        ({"inner_momentum": 1.0}, "inner_momentum is 1"),
        ({"inner_weight_decay": -0.1}, "inner_weight_decay is -0.1"),
        ({"inner_optimizer": "lion"}, "inner_optimizer is 'lion'; use one of adam, sgd"),
        ({"batch_real": 0}, "batch_real is 0"),
        ({"batch_syn": 0}, "batch_syn is 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BilevelUnroll(**options)


def test_more_real_images_than_there_are(tmp_path: Any) -> None:  # noqa: ANN401
    module = small.network_module(objective=BilevelUnroll(total_steps=2, window=1, batch_real=99999))
    with pytest.raises(InputError, match=r"objective.batch_real is 99999; it must be at most \d+"):
        small.fit(tmp_path, module, steps=1)
