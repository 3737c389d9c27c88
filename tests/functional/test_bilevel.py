"""The adjoint of a student trained by SGD or Adam, against autograd through the whole unroll in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.bilevel import pull_back, train
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.inner_optimizers import InnerAdam, InnerOptimizer, InnerSGD, State
from dd_lightning.functional.products import differentiated
from dd_lightning.functional.trajectory import InnerStep, unroll, unroll_adjoint
from tests.functional.test_trajectory import relative_error

SIDE, CLASSES, COUNT, HIDDEN = 4, 3, 6, 5
P = HIDDEN * SIDE * SIDE + HIDDEN + CLASSES * HIDDEN

OPTIMIZERS: dict[str, InnerOptimizer] = {
    "SGD": InnerSGD(),
    "momentum": InnerSGD(momentum=0.9),
    "momentum, L2": InnerSGD(momentum=0.8, weight_decay=0.05),
    "Nesterov": InnerSGD(momentum=0.9, weight_decay=0.05, nesterov=True),
    "Adam": InnerAdam(),
    "Adam, L2": InnerAdam(weight_decay=0.05),
    "Adam, other": InnerAdam(beta1=0.7, beta2=0.95, eps=1e-3),
    "AdamW": InnerAdam(weight_decay=0.05, decoupled=True),
}


def loss(theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    """A smooth network of two layers, whose last hidden unit is dead: its gradients are exactly 0."""
    first, bias, second = theta.split([HIDDEN * SIDE * SIDE, HIDDEN, CLASSES * HIDDEN])
    hidden = F.softplus(images.flatten(1) @ first.view(HIDDEN, -1).T + bias)
    alive = torch.ones(HIDDEN, dtype=theta.dtype)
    alive[-1] = 0
    return F.cross_entropy(hidden * alive @ second.view(CLASSES, HIDDEN).T, targets)


def problem(soft: bool, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, list[InnerStep]]:
    theta = torch.randn(P, generator=draw, dtype=torch.float64) / 4
    images = torch.randn(COUNT, 1, SIDE, SIDE, generator=draw, dtype=torch.float64)
    labels = torch.arange(COUNT) % CLASSES
    targets = F.one_hot(labels, CLASSES).double() + 0.1 if soft else labels
    policy = DSA("color_crop_cutout_flip_scale_rotate")
    rows = [torch.randperm(COUNT, generator=draw)[:4] for _ in range(count)]
    return theta, images, targets, [InnerStep(each, policy.draw(draw, 4, (SIDE, SIDE))) for each in rows]


def step(optimizer: InnerOptimizer, state: State, gradient: Tensor, lr: Tensor, number: int) -> State:
    """Take torch's step, with a graph: where a second moment is 0, so is its root, and its derivative has no effect."""
    if isinstance(optimizer, InnerSGD):
        return optimizer.step(state, gradient, lr, number)
    if not optimizer.decoupled:
        gradient = gradient + optimizer.weight_decay * state.theta
    m = optimizer.beta1 * state.m + (1 - optimizer.beta1) * gradient
    v = optimizer.beta2 * state.v + (1 - optimizer.beta2) * gradient**2
    corrected = v / (1 - optimizer.beta2**number)
    root = torch.where(v == 0, 0.0, torch.where(v == 0, 1.0, corrected).sqrt())
    moved = lr * m / (1 - optimizer.beta1**number) / (root + optimizer.eps)
    kept = state.theta * (1 - lr * optimizer.weight_decay) if optimizer.decoupled else state.theta
    return State(kept - moved, m, v)


def by_autograd(
    optimizer: InnerOptimizer,
    free: int,
    theta: Tensor,
    lr: Tensor,
    images: Tensor,
    targets: Tensor,
    steps: list[InnerStep],
    end: Tensor,
) -> tuple[Tensor, ...]:
    """Train with a graph through the last steps, and differentiate that."""
    leaves = [images.clone().requires_grad_(), lr.clone().requires_grad_()]
    soft = targets.is_floating_point()
    wanted = targets.clone().requires_grad_(soft)
    state = optimizer.initial(theta)
    for number, taken in enumerate(steps, start=1):
        graph = number > free
        batch = augment(leaves[0][taken.indices], taken.augmentation)
        at = state.theta if state.theta.requires_grad else state.theta.detach().requires_grad_()
        gradient = torch.autograd.grad(loss(at, batch, wanted[taken.indices]), at, create_graph=graph)[0]
        state = step(optimizer, state._replace(theta=at), gradient, leaves[1], number)
        if not graph:
            state = State(*(part.detach() for part in state))
    return torch.autograd.grad(state.theta @ end, leaves + [wanted] * soft)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("free", [0, 3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("piece", [None, 3])
def test_the_adjoint_is_autograds(name: str, free: int, soft: bool, piece: int | None) -> None:
    optimizer, draw = OPTIMIZERS[name], torch.Generator().manual_seed(0)
    theta, images, targets, steps = problem(soft, free + 4, draw)
    lr, end = torch.tensor(0.05, dtype=torch.float64), torch.randn(P, generator=draw, dtype=torch.float64)
    derivatives = differentiated(loss)
    begun = train(derivatives, optimizer, optimizer.initial(theta), lr, images, targets, steps[:free])[-1]
    window = steps[free:]
    options: dict[str, Any] = {"first": free, "micro_batch": piece}
    states = train(derivatives, optimizer, begun, lr, images, targets, window, **options)
    found = pull_back(derivatives, optimizer, states, lr, images, targets, window, end, wrt_targets=soft, **options)
    expected = by_autograd(optimizer, free, theta, lr, images, targets, steps, end)
    assert relative_error(found.images, expected[0]) < 1e-10
    assert relative_error(found.lr, expected[1]) < 1e-10
    if soft:
        assert found.targets is not None
        assert relative_error(found.targets, expected[2]) < 1e-10


def test_plain_sgd_is_the_unroll_of_trajectory_matching() -> None:
    draw = torch.Generator().manual_seed(1)
    theta, images, targets, steps = problem(True, 5, draw)
    lr, end = torch.tensor(0.05, dtype=torch.float64), torch.randn(P, generator=draw, dtype=torch.float64)
    derivatives, sgd = differentiated(loss), InnerSGD()
    states = train(derivatives, sgd, sgd.initial(theta), lr, images, targets, steps)
    (path,) = unroll(derivatives, [theta], lr, images, targets, steps)
    assert all(relative_error(state.theta, point) < 1e-14 for state, point in zip(states, path, strict=True))
    ours = pull_back(derivatives, sgd, states, lr, images, targets, steps, end, wrt_targets=True)
    theirs = unroll_adjoint(derivatives, path, lr, images, targets, steps, end, wrt_targets=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None
        assert other is not None
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_torchs(name: str) -> None:
    optimizer, draw = OPTIMIZERS[name], torch.Generator().manual_seed(2)
    theta = torch.randn(7, generator=draw, dtype=torch.float64)
    leaf = torch.nn.Parameter(theta.clone())
    theirs: torch.optim.Optimizer
    if isinstance(optimizer, InnerSGD):
        theirs = torch.optim.SGD(
            [leaf], 0.1, optimizer.momentum, weight_decay=optimizer.weight_decay, nesterov=optimizer.nesterov
        )
    else:
        kind = torch.optim.AdamW if optimizer.decoupled else torch.optim.Adam
        betas = (optimizer.beta1, optimizer.beta2)
        theirs = kind([leaf], 0.1, betas, optimizer.eps, optimizer.weight_decay)
    state = optimizer.initial(theta)
    for number in range(1, 6):
        gradient = torch.randn(7, generator=draw, dtype=torch.float64)
        leaf.grad = gradient.clone()
        theirs.step()
        state = optimizer.step(state, gradient, torch.tensor(0.1, dtype=torch.float64), number)
        torch.testing.assert_close(state.theta, leaf.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InnerAdam(eps=0), "eps is 0; it must be above 0"),
        (lambda: InnerAdam(beta1=1.0), "beta1 is 1;"),
        (lambda: InnerAdam(weight_decay=-1), "weight_decay is -1"),
        (lambda: InnerSGD(momentum=1.5), "momentum is 1.5"),
    ],
)
def test_bad_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
