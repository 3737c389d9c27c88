"""MTT: after N steps on S, the student should be where the expert went on T."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dd_lightning.functional.augment import DSA, hungriest
from dd_lightning.functional.compilation import Compile, compile_choice
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import CompiledLoss, Loss
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.functional.trajectory import (
    InnerStep,
    permuted_batches,
    trajectory_loss,
    trajectory_loss_gradient,
    unroll,
    unroll_adjoint,
)
from dd_lightning.memory import GIB, MemoryEstimate, MemoryPart, memory_model
from dd_lightning.networks import FunctionalNetwork, training_loss
from dd_lightning.objectives.base import MatchingObjective, ScoredCandidate
from dd_lightning.pools import Candidate, TrajectoryPool, TrajectorySegment
from dd_lightning.real import RealSet
from dd_lightning.synthetic import SyntheticSet

SMALLEST_PIECE = 16
"""Images of the smallest piece that ``micro_batch: auto`` makes: smaller ones would cost time and free little."""

REPAYING_STEPS = 50_000
"""Student steps in a run from which ``compile: auto`` compiles, on CUDA: a minute is 1.2 ms for each of so many."""


class TrajectoryMatching(MatchingObjective):
    """Trajectory matching (MTT) with the exact gradient, in the memory of one student step.

    The loss is ||theta_N - target||^2 / ||start - target||^2 after ``syn_steps`` steps of plain SGD on the synthetic
    set from the expert's own start.

    Args:
        syn_steps: N, the student's steps. 50 is the published value for CIFAR-10 at ipc 1.
        batch_syn: Synthetic images per student step; null is the whole set, the published setting up to ipc 10.
        augmentation: DSA strategy of the student's batches, a fresh draw at every step; "none" switches it off.
        loss_threshold: Leave S unchanged in a step whose loss is above this (DATM uses 1.0); null never does.
        micro_batch: The most images that pass through the student at once. A batch is then computed in pieces, which is
            exact up to rounding, and not possible with batch norm. ``auto``: as few pieces as keep the estimate of the
            run's memory below ``memory_gb``, and one piece wherever that does; null: always one piece.
        memory_gb: What ``auto`` keeps below, in GiB. A fixed number, because what happens to be free on a device must
            not decide over bits of the images.
        compile: Compile the student's step and its derivatives. It takes up to minutes before the first step, and the
            rounding is another one, which grows over an unroll. ``auto`` does so on CUDA alone, in runs of at least
            50,000 student steps (``max_steps`` x ``syn_steps``), unless the Trainer is ``deterministic`` (the compiler
            may choose other kernels in another process); where it is impossible, the run goes on without. ``off`` is
            the default because the gain has been measured on a host alone.

    Raises:
        InputError: If a number is out of range, or the strategy or ``compile`` is unknown.

    References:
        Cazenavette et al., Dataset Distillation by Matching Training Trajectories, https://arxiv.org/abs/2203.11932.
    """

    candidates: ClassVar[type[Candidate]] = TrajectorySegment
    uses_student_lr: ClassVar[bool] = True
    learns_labels: ClassVar[bool] = True
    memory_remedy: ClassVar[str] = "set a smaller objective.micro_batch or objective.batch_syn"

    def __init__(
        self,
        syn_steps: int = 50,
        batch_syn: int | None = None,
        augmentation: str = "color_crop_cutout_flip_scale_rotate",
        loss_threshold: float | None = None,
        micro_batch: int | Literal["auto"] | None = "auto",
        memory_gb: float = 8.0,
        compile: Compile | bool = "off",
    ) -> None:
        if syn_steps < 1:
            raise InputError(f"syn_steps is {syn_steps}; the student needs at least 1 step")
        if batch_syn is not None and batch_syn < 1:
            raise InputError(f"batch_syn is {batch_syn}; use at least 1 image, or null for the whole synthetic set")
        if isinstance(micro_batch, int) and micro_batch < 1:
            raise InputError(f"micro_batch is {micro_batch}; use at least 1 image, auto, or null for whole batches")
        if memory_gb <= 0:
            raise InputError(f"memory_gb is {memory_gb:g}; give the GiB that a run may take, above 0")
        self.syn_steps = syn_steps
        self.batch_syn = batch_syn
        self.augmentation = DSA(augmentation)
        self.loss_threshold = loss_threshold
        self.micro_batch: int | Literal["auto"] | None = micro_batch
        self.memory_gb = memory_gb
        self._automatic: int | None = None
        self.compile = compile_choice(compile)
        self._compiled: tuple[FunctionalNetwork, CompiledLoss] | None = None

    @property
    def inner_steps(self) -> int:
        """The student's steps."""
        return self.syn_steps

    @staticmethod
    def default_pool() -> TrajectoryPool:
        """Return a trajectory pool with its defaults."""
        return TrajectoryPool()

    def plan_memory(
        self, network: FunctionalNetwork, size: int, soft: bool, candidates: int, resident: Sequence[MemoryPart]
    ) -> MemoryEstimate:
        """Estimate the peak of a step, and settle into how many pieces ``auto`` cuts a batch."""
        model = memory_model(lambda count: self._probe(network, count, soft))
        batch = min(self.batch_syn or size, size)
        # of a candidate there is the path, and the segment that it is compared with
        vectors = candidates * (self.syn_steps + 1 + 2)
        paths = MemoryPart("student paths", 4 * network.num_parameters * vectors, _counted(candidates, "candidate"))
        held = sum(part.size for part in (*resident, paths))

        def exceeds(piece: int) -> bool:
            return held + model.peak(piece) > self.memory_gb * GIB

        self._automatic = None
        if self.micro_batch == "auto" and exceeds(batch) and not network.uses_batch_statistics:
            count = next((n for n in range(2, batch // SMALLEST_PIECE + 1) if not exceeds(-(-batch // n))), None)
            self._automatic = min(batch, SMALLEST_PIECE) if count is None else -(-batch // count)
        piece = min(self._piece(network, batch) or batch, batch)
        note = f"batch {batch} in " + ("one piece" if piece == batch else f"{-(-batch // piece)} pieces of {piece}")
        if self.micro_batch == "auto" and exceeds(piece):
            note += f", above memory_gb {self.memory_gb:g}"
        return MemoryEstimate((*resident, paths, MemoryPart("one student step", model.peak(piece), note)))

    def _probe(self, network: FunctionalNetwork, count: int, soft: bool) -> None:
        """Pull back through one step with a few images, by the augmentation that needs most; scoring needs less."""
        images, theta = torch.zeros(count, *network.image_shape), torch.zeros(network.num_parameters)
        targets = torch.zeros(count, network.num_classes) if soft else torch.zeros(count, dtype=torch.int64)
        policy = replace(self.augmentation, strategy=hungriest(self.augmentation.operations))
        draw = policy.draw(step_generator(0, 0, "probe"), count, network.image_shape[1:])
        problem = (theta.new_tensor(0.01), images, targets, [InnerStep(torch.arange(count), draw)])
        unroll_adjoint(training_loss(network), [theta, theta], *problem, cotangent=theta, wrt_targets=soft)

    def _piece(self, network: FunctionalNetwork, batch: int) -> int | None:
        """Return the most images at once in a batch; None if it need not be cut."""
        if self.micro_batch == "auto":
            return self._automatic
        if self.micro_batch is not None and self.micro_batch < batch and network.uses_batch_statistics:
            raise InputError(
                f"micro_batch is {self.micro_batch}, but network {network.name!r} has batch norm, which needs all "
                f"{batch} images of a batch at once; set objective.micro_batch: null, or use another norm"
            )
        return self.micro_batch

    def prepare(
        self, network: FunctionalNetwork, synthetic: SyntheticSet, steps: int, say: Callable[[str], None]
    ) -> None:
        """Compile the student's step, if that was asked for or repays itself."""
        self._compiled = None
        if not self._compiles(synthetic.images.device, steps):
            return
        say("compiling the student's step: the first distillation step may be minutes away")
        try:
            student = CompiledLoss(training_loss(network))
            self._warm_up(student, network, synthetic)
        except Exception as error:
            cause = getattr(error, "inner_exception", error)  # the compiler's own, behind torch's
            line = (str(cause).strip().splitlines() or [""])[0]
            reason = f"torch.compile fails for the student's step ({type(cause).__name__}: {line})"
            if self.compile == "on":
                raise InputError(f"compile is 'on', but {reason}; set objective.compile: off") from error
            warnings.warn(f"{reason}: going on without; set objective.compile: off to try no more", stacklevel=2)
        else:
            self._compiled = network, student

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
        del sole
        return self.score_begun(synthetic, real, network, candidate, draw, len(draw))

    def score_begun(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidate: TrajectorySegment,
        draw: Sequence[InnerStep],
        steps: int,
    ) -> ScoredCandidate:
        """Run the student forward for its first steps: the loss is ||theta_n - target||^2 / ||start - target||^2."""
        del real
        path = self._path(synthetic, network, candidate.start, draw, 0, steps)
        return ScoredCandidate(candidate, trajectory_loss(path[-1], candidate.start, candidate.target), draw, path)

    def completed(
        self, synthetic: SyntheticSet, real: RealSet, network: FunctionalNetwork, begun: ScoredCandidate
    ) -> ScoredCandidate:
        """Run the student on from where it stopped."""
        del real
        candidate = cast(TrajectorySegment, begun.candidate)
        *path, last = begun.work
        path += self._path(synthetic, network, last, begun.draw, len(path), len(begun.draw))
        loss = trajectory_loss(path[-1], candidate.start, candidate.target)
        return ScoredCandidate(candidate, loss, begun.draw, path)

    def _path(
        self,
        synthetic: SyntheticSet,
        network: FunctionalNetwork,
        theta: Tensor,
        draw: Sequence[InnerStep],
        first: int,
        end: int,
    ) -> list[Tensor]:
        """Take the student's steps from ``first`` to before ``end``, from ``theta``."""
        with torch.no_grad():
            return unroll(
                self._student(network),
                theta,
                synthetic.student_lr.detach(),
                synthetic.decoded(),
                synthetic.decoded_targets(),
                draw[first:end],
                self._piece(network, max(len(step.indices) for step in draw)),
            )

    def loss(self, synthetic: SyntheticSet, network: FunctionalNetwork, scored: ScoredCandidate) -> Tensor:
        """Return the scored loss; its backward is the adjoint of the student's path."""
        value: Tensor = _AdjointOfUnroll.apply(
            synthetic.decoded(),
            synthetic.student_lr,
            synthetic.decoded_targets(),
            self._student(network),
            scored,
            self._piece(network, max(len(step.indices) for step in scored.draw)),
        )
        return value

    def skips(self, loss: Tensor) -> bool:
        """Tell whether the loss is above ``loss_threshold``."""
        return self.loss_threshold is not None and float(loss) > self.loss_threshold

    def _compiles(self, device: torch.device, steps: int) -> bool:
        if self.compile != "auto":
            return self.compile == "on"
        repaid = steps * self.syn_steps >= REPAYING_STEPS
        return device.type == "cuda" and repaid and not torch.are_deterministic_algorithms_enabled()

    def _warm_up(self, student: CompiledLoss, network: FunctionalNetwork, synthetic: SyntheticSet) -> None:
        """Take one student step of each batch size there and back, which compiles all that the run will need."""
        images, targets = synthetic.decoded().detach(), synthetic.decoded_targets().detach()
        lr, theta = synthetic.student_lr.detach(), network.initial(0).to(images)
        generator, plain, size = torch.Generator(), DSA("none"), (images.shape[-2], images.shape[-1])
        batches = permuted_batches(len(images), self.batch_syn, self.syn_steps, generator)
        steps = [
            InnerStep(batch.to(images.device), plain.draw(generator, len(batch), size))
            for batch in {len(batch): batch for batch in batches}.values()
        ]
        piece = self._piece(network, max(len(step.indices) for step in steps))
        path = unroll(student, theta, lr, images, targets, steps, piece)
        unroll_adjoint(
            student,
            path,
            lr,
            images,
            targets,
            steps,
            torch.zeros_like(theta),
            wrt_targets=synthetic.targets.requires_grad,
            micro_batch=piece,
        )

    def _student(self, network: FunctionalNetwork) -> Loss:
        if self._compiled is not None and self._compiled[0] is network:
            return self._compiled[1]
        return training_loss(network)


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
        micro_batch: int | None,
    ) -> Tensor:
        ctx.save_for_backward(images, lr, targets)
        ctx.student, ctx.scored, ctx.micro_batch = student, scored, micro_batch
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
            micro_batch=ctx.micro_batch,
        )
        return adjoint.images, adjoint.lr, adjoint.targets, None, None, None


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)
