"""MTT: after N steps on S, the student should be where the expert went on T."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dd_lightning.functional.augment import DSA
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import Loss
from dd_lightning.functional.random import StepContext
from dd_lightning.functional.trajectory import (
    InnerStep,
    permuted_batches,
    trajectory_loss,
    trajectory_loss_gradient,
    unroll,
    unroll_adjoint,
)
from dd_lightning.networks import FunctionalNetwork, training_loss
from dd_lightning.objectives.base import MatchingObjective, ScoredCandidate
from dd_lightning.pools import Candidate, TrajectoryPool, TrajectorySegment
from dd_lightning.real import RealSet
from dd_lightning.synthetic import SyntheticSet


class TrajectoryMatching(MatchingObjective):
    """Trajectory matching (MTT) with the exact gradient, in the memory of one student step.

    The loss is ||theta_N - target||^2 / ||start - target||^2 after ``syn_steps`` steps of plain SGD on the synthetic
    set from the expert's own start.

    Args:
        syn_steps: N, the student's steps. 50 is the published value for CIFAR-10 at ipc 1.
        batch_syn: Synthetic images per student step; null is the whole set, the published setting up to ipc 10.
        augmentation: DSA strategy of the student's batches, a fresh draw at every step; "none" switches it off.
        loss_threshold: Leave S unchanged in a step whose loss is above this (DATM uses 1.0); null never does.

    Raises:
        InputError: If a number is below 1, or the strategy is unknown.

    References:
        Cazenavette et al., Dataset Distillation by Matching Training Trajectories, https://arxiv.org/abs/2203.11932.
    """

    candidates: ClassVar[type[Candidate]] = TrajectorySegment
    uses_student_lr: ClassVar[bool] = True
    learns_labels: ClassVar[bool] = True

    def __init__(
        self,
        syn_steps: int = 50,
        batch_syn: int | None = None,
        augmentation: str = "color_crop_cutout_flip_scale_rotate",
        loss_threshold: float | None = None,
    ) -> None:
        if syn_steps < 1:
            raise InputError(f"syn_steps is {syn_steps}; the student needs at least 1 step")
        if batch_syn is not None and batch_syn < 1:
            raise InputError(f"batch_syn is {batch_syn}; use at least 1 image, or null for the whole synthetic set")
        self.syn_steps = syn_steps
        self.batch_syn = batch_syn
        self.augmentation = DSA(augmentation)
        self.loss_threshold = loss_threshold

    @staticmethod
    def default_pool() -> TrajectoryPool:
        """Return a trajectory pool with its defaults."""
        return TrajectoryPool()

    def draw(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        reference: Callable[[], Candidate],
        context: StepContext,
    ) -> list[InnerStep]:
        """Draw the student's batches and their augmentations."""
        del real, network, reference  # trajectories hold all that is needed of T
        augment = context.generator("augment")
        height, width = synthetic.images.shape[-2:]
        batches = permuted_batches(synthetic.decoded_size, self.batch_syn, self.syn_steps, context.generator("batch"))
        return [
            InnerStep(batch.to(synthetic.images.device), self.augmentation.draw(augment, len(batch), (height, width)))
            for batch in batches
        ]

    def score(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidate: TrajectorySegment,
        draw: Sequence[InnerStep],
        sole: bool,
    ) -> ScoredCandidate:
        """Run the student forward; its path serves the adjoint if this candidate is chosen."""
        del real, sole
        with torch.no_grad():
            path = unroll(
                training_loss(network),
                candidate.start,
                synthetic.student_lr.detach(),
                synthetic.decoded(),
                synthetic.decoded_targets(),
                draw,
            )
            loss = trajectory_loss(path[-1], candidate.start, candidate.target)
        return ScoredCandidate(candidate, loss, draw, path)

    def loss(self, synthetic: SyntheticSet, network: FunctionalNetwork, scored: ScoredCandidate) -> Tensor:
        """Return the scored loss; its backward is the adjoint of the student's path."""
        value: Tensor = _AdjointOfUnroll.apply(
            synthetic.decoded(), synthetic.student_lr, synthetic.decoded_targets(), training_loss(network), scored
        )
        return value

    def skips(self, loss: Tensor) -> bool:
        """Tell whether the loss is above ``loss_threshold``."""
        return self.loss_threshold is not None and float(loss) > self.loss_threshold


class _AdjointOfUnroll(torch.autograd.Function):
    """The matching loss as an ordinary node of the graph: its value is known, its backward is the adjoint."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (torch's own signature)
        images: Tensor,
        lr: Tensor,
        targets: Tensor,
        student: Loss,
        scored: ScoredCandidate,
    ) -> Tensor:
        ctx.save_for_backward(images, lr, targets)
        ctx.student, ctx.scored = student, scored
        return scored.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        images, lr, targets = ctx.saved_tensors
        candidate: TrajectorySegment = ctx.scored.candidate
        path: list[Tensor] = ctx.scored.work
        cotangent = grad * trajectory_loss_gradient(path[-1], candidate.start, candidate.target)
        adjoint = unroll_adjoint(
            ctx.student,
            path,
            lr,
            images,
            targets,
            ctx.scored.draw,
            cotangent,
            wrt_targets=ctx.needs_input_grad[2],
        )
        return adjoint.images, adjoint.lr, adjoint.targets, None, None
