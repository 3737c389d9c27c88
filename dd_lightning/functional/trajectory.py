"""Trajectory matching: the student's unroll, the matching loss, and its exact adjoint in the memory of one step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.augment import AugmentationDraw, augment
from dd_lightning.functional.products import Loss, Order, gradient, gradient_products


class InnerStep(NamedTuple):
    """What one student step was drawn to do, kept so that the adjoint can replay it.

    Attributes:
        indices: Rows of the synthetic set that form the batch, [b], each at most once.
        augmentation: The batch's augmentation.
    """

    indices: Tensor
    augmentation: AugmentationDraw

    def pieces(self, micro_batch: int | None) -> "list[tuple[float, InnerStep]]":
        """Return the batch in pieces of at most ``micro_batch`` images (null: in one), each with its share of it.

        The batch's mean loss, hence any derivative of it, is the sum of the pieces' own, weighted by their shares.
        """
        size = len(self.indices)
        if micro_batch is None or micro_batch >= size:
            return [(1.0, self)]
        return [
            (len(rows) / size, InnerStep(rows, self.augmentation.part(first, first + len(rows))))
            for first, rows in zip(range(0, size, micro_batch), self.indices.split(micro_batch), strict=True)
        ]


class Adjoint(NamedTuple):
    """Gradients of a function of the last parameters by what the unroll was made from.

    Attributes:
        images: Shaped like the images.
        lr: Scalar.
        targets: Shaped like the targets; None unless asked for.
    """

    images: Tensor
    lr: Tensor
    targets: Tensor | None


def permuted_batches(size: int, batch: int | None, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Return the index batches of ``steps`` student steps, each [<= batch].

    A permutation of the whole set is cut into batches which are used from the last to the first, then a new one is
    drawn: with a remainder, the short batch comes first, as in the MTT reference.

    Args:
        size: Number of synthetic images.
        batch: ``batch_syn``; None or anything above ``size`` is the whole set.
        steps: Number of batches.
        generator: Source of the permutations.
    """
    batches: list[Tensor] = []
    waiting: list[Tensor] = []
    for _ in range(steps):
        if not waiting:
            order = torch.randperm(size, generator=generator, device=generator.device)
            waiting = list(order.split(min(batch or size, size)))
        batches.append(waiting.pop())
    return batches


def unroll(
    loss: Loss,
    theta: Tensor,
    lr: Tensor,
    images: Tensor,
    targets: Tensor,
    steps: Sequence[InnerStep],
    micro_batch: int | None = None,
) -> list[Tensor]:
    """Train a student by plain SGD and keep where it went: [theta_0, ..., theta_N], each [P], without a graph.

    With ``micro_batch`` a step passes through the network piece by piece, in the memory of one piece. That is exact
    where an image's loss does not depend on the others of its batch, so not for batch norm.

    Args:
        loss: The student's training loss.
        theta: theta_0, [P].
        lr: The student's learning rate, a scalar tensor.
        images: The synthetic images, [n, ch, H, W].
        targets: Their labels [n] or label logits [n, C].
        steps: The N steps to take.
        micro_batch: The most images of a batch that pass through the network at once; null is all of them.
    """
    with torch.no_grad():
        # One block for the whole path: kept vectors strewn among each step's temporaries would fragment the heap.
        path = list(theta.new_empty(len(steps) + 1, len(theta)).unbind())
        path[0].copy_(theta)
        for here, following, step in zip(path, path[1:], steps, strict=False):
            following.copy_(here)
            for share, piece in step.pieces(micro_batch):
                batch = augment(images[piece.indices], piece.augmentation)
                following -= lr * share * gradient(loss, here, batch, targets[piece.indices])
    return path


def unroll_adjoint(
    loss: Loss,
    path: Sequence[Tensor],
    lr: Tensor,
    images: Tensor,
    targets: Tensor,
    steps: Sequence[InnerStep],
    cotangent: Tensor,
    *,
    wrt_targets: bool = False,
    order: Order = "reverse_over_reverse",
    micro_batch: int | None = None,
) -> Adjoint:
    """Pull a cotangent of theta_N back through the unroll, exactly, holding one inner step in memory at a time.

    With a_N = ``cotangent`` and g_i the gradient at theta_i, for i = N-1 .. 0::

        dL/dlr  -= a . g_i
        dL/dx_i += -lr d(a . g_i)/dx_i
        a       <- a - lr H_i a

    All three are sums over images, so that pieces of a batch add up to the whole, as in :func:`unroll`.

    Args:
        loss: The student's training loss.
        path: What :func:`unroll` returned, N + 1 tensors [P].
        lr: The learning rate it ran with.
        images: The synthetic images, [n, ch, H, W].
        targets: Their labels or label logits.
        steps: The same N steps.
        cotangent: dL/dtheta_N, [P].
        wrt_targets: Also return the gradient by ``targets`` (logits).
        order: Evaluation order of the second-order products, see :func:`gradient_products`.
        micro_batch: What :func:`unroll` had.
    """
    by_images = torch.zeros_like(images)
    by_targets = torch.zeros_like(targets) if wrt_targets else None
    by_lr = torch.zeros_like(lr)
    a = cotangent
    for theta, step in zip(reversed(path[:-1]), reversed(steps), strict=True):
        following = a
        for share, piece in step.pieces(micro_batch):
            rate = lr * share
            with torch.enable_grad():
                leaf = images[piece.indices].detach().requires_grad_()
                batch = augment(leaf, piece.augmentation)
            labels = targets[piece.indices]
            products = gradient_products(loss, theta, batch, labels, a, wrt_targets=wrt_targets, order=order)
            by_lr -= share * (a @ products.gradient)
            # The indices of a batch are distinct, so this is a plain assignment: deterministic on every device.
            by_images[piece.indices] += torch.autograd.grad(batch, leaf, -rate * products.images)[0]
            if by_targets is not None and products.targets is not None:
                by_targets[piece.indices] -= rate * products.targets
            following = following - rate * products.hessian
            del leaf, batch, products  # before those of the next piece are made
        a = following
    return Adjoint(by_images, by_lr, by_targets)


def trajectory_loss(theta: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return ||theta - target||^2 / ||start - target||^2, a scalar; all arguments are [P].

    Example:
        >>> start, target = torch.zeros(2), torch.ones(2)
        >>> trajectory_loss(start, start, target).item(), trajectory_loss(target, start, target).item()
        (1.0, 0.0)
    """
    return (theta - target).square().sum() / (start - target).square().sum()


def trajectory_loss_gradient(theta: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return the derivative of :func:`trajectory_loss` by theta, [P]: the adjoint's first cotangent."""
    return 2 * (theta - target) / (start - target).square().sum()
