"""Training a student by any optimizer, and the exact adjoint of its last steps in the memory of one of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dd_lightning.functional.augment import augment
from dd_lightning.functional.inner_optimizers import InnerOptimizer, State
from dd_lightning.functional.products import DifferentiatedLoss
from dd_lightning.functional.trajectory import Adjoint, InnerStep


def train(
    loss: DifferentiatedLoss,
    optimizer: InnerOptimizer,
    state: State,
    lr: Tensor,
    images: Tensor,
    targets: Tensor,
    steps: Sequence[InnerStep],
    *,
    first: int = 0,
    keep: bool = True,
    micro_batch: int | None = None,
) -> list[State]:
    """Take some steps, and return the states before the first and after each, without a graph.

    Args:
        loss: The student's training loss.
        optimizer: How it moves.
        state: Where it is.
        lr: The learning rate, a scalar tensor.
        images: The synthetic images, [n, ch, H, W].
        targets: Their labels [n] or label logits [n, C].
        steps: The steps to take.
        first: Steps taken before.
        keep: Keep all states; else the last one alone.
        micro_batch: The most images of a batch that pass at once.
    """
    states = [state]
    with torch.no_grad():
        for number, step in enumerate(steps, start=first + 1):
            gradient = torch.zeros_like(state.theta)
            for share, piece in step.pieces(micro_batch):
                batch = augment(images[piece.indices], piece.augmentation)
                gradient += share * loss.gradient(states[-1].theta, batch, targets[piece.indices])
            states.append(optimizer.step(states[-1], gradient, lr, number))
            if not keep:
                del states[0]
    return states


def pull_back(
    loss: DifferentiatedLoss,
    optimizer: InnerOptimizer,
    states: Sequence[State],
    lr: Tensor,
    images: Tensor,
    targets: Tensor,
    steps: Sequence[InnerStep],
    cotangent: Tensor,
    *,
    first: int = 0,
    wrt_targets: bool = False,
    micro_batch: int | None = None,
) -> Adjoint:
    """Pull a cotangent of the last parameters back to the synthetic set, with the state before the first step fixed.

    One Hessian-vector and one mixed product per step, and elementwise work: exact, for momentum and Adam too.

    Args:
        loss: The student's training loss.
        optimizer: How it moved.
        states: What :func:`train` returned.
        lr: As there.
        images: As there.
        targets: As there.
        steps: As there.
        cotangent: dL/dtheta at the end, [P].
        first: As there.
        wrt_targets: Also return the gradient by ``targets`` (logits).
        micro_batch: As there.
    """
    by_images = torch.zeros_like(images)
    by_targets = torch.zeros_like(targets) if wrt_targets else None
    by_lr = torch.zeros_like(lr)
    nothing = torch.zeros_like(cotangent)
    cotangents = State(cotangent, nothing, nothing)
    for index in range(len(steps) - 1, -1, -1):
        before, after = states[index], states[index + 1]
        u, cotangents, of_lr = optimizer.pull_back(before, after, cotangents, lr, first + index + 1)
        by_lr += of_lr
        through_gradient = torch.zeros_like(u)
        for share, piece in steps[index].pieces(micro_batch):
            with torch.enable_grad():
                leaf = images[piece.indices].detach().requires_grad_()
                batch = augment(leaf, piece.augmentation)
            products = loss.products(before.theta, batch.detach(), targets[piece.indices], u, wrt_targets)
            through_gradient += share * products.hessian
            by_images[piece.indices] += share * torch.autograd.grad(batch, leaf, products.images)[0]
            if by_targets is not None and products.targets is not None:
                by_targets[piece.indices] += share * products.targets
        cotangents = cotangents._replace(theta=cotangents.theta + through_gradient)
    return Adjoint(by_images, by_lr, by_targets)
