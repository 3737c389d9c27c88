"""Trajectory matching: the student's unroll, the matching loss, and its exact adjoint in the memory of one step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.augment import AugmentationDraw, augment, join_draws
from dd_lightning.functional.products import DifferentiatedLoss

# Most bytes of several batches that are augmented together. The way back needs up to thirty times as much.
AUGMENTED_TOGETHER = 2 * 2**20


class InnerStep(NamedTuple):
    """One student step: the rows of the synthetic set in its batch, [b], each at most once, and their augmentation."""

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
    """Gradients of a function of theta_N by what the unroll depends on, each in its shape; targets if asked for."""

    images: Tensor
    lr: Tensor
    targets: Tensor | None


def permuted_batches(size: int, batch: int | None, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Return the index batches of ``steps`` student steps, each [<= batch], from ``size`` images.

    A permutation of the whole set is cut into batches which are used from the last to the first, then a new one is
    drawn: with a remainder, the short batch comes first, as in the MTT reference. None, or a batch above ``size``, is
    the whole set.
    """
    batches: list[Tensor] = []
    waiting: list[Tensor] = []
    for _ in range(steps):
        if not waiting:
            order = torch.randperm(size, generator=generator, device=generator.device)
            waiting = list(order.split(min(batch or size, size)))
        batches.append(waiting.pop())
    return batches


def images_augmented_together(batch: int, steps: int, image_bytes: int) -> int:
    """Return how many images :func:`unroll` augments at once, with ``steps`` batches that are not cut into pieces."""
    return batch * max(1, min(steps, AUGMENTED_TOGETHER // (batch * image_bytes)))


def unroll(
    loss: DifferentiatedLoss,
    thetas: Sequence[Tensor],
    lr: Tensor,
    images: Tensor,
    targets: Tensor,
    steps: Sequence[InnerStep],
    *,
    micro_batch: int | None = None,
    vectorized: bool = False,
) -> list[list[Tensor]]:
    """Train students by plain SGD on the same batches and keep their paths [theta_0, ..., theta_N], without a graph.

    Args:
        loss: The students' training loss.
        thetas: Where they start, M vectors [P].
        lr: Their learning rate, a scalar tensor.
        images: The synthetic images, [n, ch, H, W].
        targets: Their labels [n] or label logits [n, C].
        steps: The N steps to take.
        micro_batch: The most images of a batch that pass through a network at once; None is all of them. Pieces need
            the memory of one piece and are exact where an image's loss does not depend on the others of its batch: not
            for batch norm.
        vectorized: Take each step with all students at once, by ``vmap``: equal up to rounding, in M times the memory.

    Returns:
        M paths of N + 1 vectors [P].
    """
    with torch.no_grad():
        # One block for a whole path: kept vectors strewn among each step's temporaries would fragment the heap. One for
        # each student, because the paths that are not chosen are given up.
        paths = [list(theta.new_empty(len(steps) + 1, len(theta)).unbind()) for theta in thetas]
        for path, theta in zip(paths, thetas, strict=True):
            path[0].copy_(theta)
        together = following = torch.stack(list(thetas)) if vectorized else torch.empty(0)
        for block in _blocks(steps, micro_batch, images):
            for piece, batch in zip(block, _AugmentedBlock(images, block, graph=False).batches(), strict=True):
                rate, labels = lr * piece.share, targets[piece.indices]
                if vectorized:
                    following = following - rate * loss.gradients(together, batch, labels)
                    if piece.last:
                        together = following
                        for path, theta in zip(paths, together.unbind(), strict=True):
                            path[piece.step + 1].copy_(theta)
                else:
                    for path in paths:
                        if piece.first:
                            path[piece.step + 1].copy_(path[piece.step])
                        path[piece.step + 1] -= rate * loss.gradient(path[piece.step], batch, labels)
    return paths


def unroll_adjoint(
    loss: DifferentiatedLoss,
    path: Sequence[Tensor],
    lr: Tensor,
    images: Tensor,
    targets: Tensor,
    steps: Sequence[InnerStep],
    cotangent: Tensor,
    *,
    wrt_targets: bool = False,
    micro_batch: int | None = None,
) -> Adjoint:
    """Pull a cotangent of theta_N back through the unroll, exactly, holding one inner step in memory at a time.

    With a_N = ``cotangent`` and g_i the gradient at theta_i, for i = N-1 .. 0::

        dL/dlr  -= a . g_i
        dL/dx_i += -lr d(a . g_i)/dx_i
        a       <- a - lr H_i a

    Args:
        loss: The student's training loss.
        path: One of the paths that :func:`unroll` returned, N + 1 tensors [P].
        lr: A scalar tensor.
        images: [n, ch, H, W].
        targets: [n] or [n, C].
        steps: The same N steps.
        cotangent: dL/dtheta_N, [P].
        wrt_targets: Also return the gradient by ``targets`` (logits).
        micro_batch: The most images of a batch that pass at once.
    """
    by_images = torch.zeros_like(images)
    by_targets = torch.zeros_like(targets) if wrt_targets else None
    by_lr = torch.zeros_like(lr)
    following = a = cotangent
    for block in reversed(_blocks(steps, micro_batch, images)):
        augmented = _AugmentedBlock(images, block, graph=True)
        cotangents: list[Tensor] = []
        for piece, batch in reversed(list(zip(block, augmented.batches(), strict=True))):
            if piece.last:
                a = following
            rate, labels = lr * piece.share, targets[piece.indices]
            products = loss.products(path[piece.step], batch, labels, a, wrt_targets)
            by_lr -= piece.share * products.slope
            cotangents.append(-rate * products.images)
            if by_targets is not None and products.targets is not None:
                by_targets[piece.indices] -= rate * products.targets
            following = following - rate * products.hessian
            del products  # before those of the next piece are made
        # The indices of a batch are distinct, so each of these is a plain assignment: deterministic on every device.
        for piece, by_batch in zip(block, augmented.pull_back(cotangents[::-1]), strict=True):
            by_images[piece.indices] += by_batch
    return Adjoint(by_images, by_lr, by_targets)


def trajectory_loss(theta: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return ||theta - target||^2 / ||start - target||^2, a scalar; all arguments are [P]."""
    return (theta - target).square().sum() / (start - target).square().sum()


def trajectory_loss_gradient(theta: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return the derivative of :func:`trajectory_loss` by theta, [P]: the adjoint's first cotangent."""
    return 2 * (theta - target) / (start - target).square().sum()


class _Piece(NamedTuple):
    """What passes through the network at once, of one student step."""

    step: int
    share: float
    indices: Tensor
    augmentation: AugmentationDraw
    first: bool
    last: bool


def _blocks(steps: Sequence[InnerStep], micro_batch: int | None, images: Tensor) -> list[list[_Piece]]:
    """Cut the steps into pieces, in their order, and collect whole batches in blocks that are augmented together."""
    blocks: list[list[_Piece]] = []
    room = 0
    for index, step in enumerate(steps):
        pieces = step.pieces(micro_batch)
        for position, (share, part) in enumerate(pieces):
            size = len(part.indices) * images[0].nbytes
            if size > room or len(pieces) > 1:  # whoever cuts batches has no memory to spare
                blocks.append([])
                room = AUGMENTED_TOGETHER if len(pieces) == 1 else 0
            room -= size
            blocks[-1].append(_Piece(index, share, *part, position == 0, position == len(pieces) - 1))
    return blocks


class _AugmentedBlock:
    """The augmented batches of a block of pieces, and the way back from them: a few calls for each operation."""

    def __init__(self, images: Tensor, block: Sequence[_Piece], graph: bool) -> None:
        self._sizes = [len(piece.indices) for piece in block]
        self._groups = []
        for members, draw in join_draws([piece.augmentation for piece in block], self._sizes):
            leaf = images[torch.cat([block[i].indices for i in members])].detach().requires_grad_(graph)
            with torch.set_grad_enabled(graph):
                self._groups.append((members, leaf, augment(leaf, draw)))

    def batches(self) -> list[Tensor]:
        """Return each piece's augmented images, without a graph."""
        return self._apart([augmented.detach() for _, _, augmented in self._groups])

    def pull_back(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients by each piece's images of functions with these gradients by its augmented images."""
        return self._apart(
            [
                torch.autograd.grad(out, leaf, torch.cat([cotangents[i] for i in at]))[0]
                for at, leaf, out in self._groups
            ]
        )

    def _apart(self, of_groups: Sequence[Tensor]) -> list[Tensor]:
        parts: dict[int, Tensor] = {}
        for (members, _, _), joined in zip(self._groups, of_groups, strict=True):
            parts |= zip(members, joined.split([self._sizes[i] for i in members]), strict=True)
        return [parts[i] for i in range(len(parts))]
