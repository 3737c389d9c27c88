"""MTT: after N steps on S, the student should be where the expert went on T."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dd_lightning.execution.compile import Compile, compile_choice, compiles, try_compile
from dd_lightning.execution.compiled_loss import CompiledLoss, compiled_order
from dd_lightning.execution.memory import GIB, PROBE_SIZE, MemoryEstimate, MemoryPart, memory_model
from dd_lightning.execution.precision import Precision, precision_choice, tensor_float
from dd_lightning.functional.augment import DSA, AugmentationDraw, augment, most_memory_intensive
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import Loss, gradients
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.functional.trajectory import (
    InnerStep,
    images_augmented_together,
    permuted_batches,
    trajectory_loss,
    trajectory_loss_gradient,
    unroll_adjoint,
    unroll_together,
)
from dd_lightning.networks import FunctionalNetwork, training_loss
from dd_lightning.objectives.base import MatchingObjective, ScoredCandidate
from dd_lightning.pools import Candidate, TrajectoryPool, TrajectorySegment
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet
from dd_lightning.training.parallel_networks import batching_pays

SMALLEST_PIECE = 16
"""Images of the smallest piece that ``micro_batch: auto`` makes: smaller ones would cost time and free little."""


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
        precision: What the student's layers compute in: ``float32``; ``tf32``, on CUDA alone; or ``bfloat16``. Its
            parameters, their updates and the matching loss are in float32. In bfloat16 the image gradient was 5 to 8 %
            off on CIFAR-10 (``benchmarks/precision.py``).

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
        precision: Precision = "float32",
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
        self.precision = precision_choice(precision)
        self._together = 1  # students that are advanced as one batch
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
        self,
        network: FunctionalNetwork,
        size: int,
        soft: bool,
        candidates: int,
        resident: Sequence[MemoryPart],
        device_type: str,
    ) -> MemoryEstimate:
        """Estimate the peak of a step, and settle into how many pieces ``auto`` cuts a batch."""
        model = memory_model(lambda count: self._probe(network, count, soft))
        batch = min(self.batch_syn or size, size)
        # of a candidate there is the path, and the segment that it is compared with
        vectors = candidates * (self.syn_steps + 1 + 2)
        paths = MemoryPart("student paths", 4 * network.num_parameters * vectors, _counted(candidates, "candidate"))
        held = sum(part.size for part in (*resident, paths))
        image = torch.zeros(network.image_shape).nbytes
        block = images_augmented_together(batch, self.syn_steps, image)
        augmentation = memory_model(lambda count: self._probe_augmentation(network, count))

        def peak(piece: int) -> int:
            if piece < batch or block == batch:
                return model.peak(piece)
            # before and after augmentation, and the gradients that wait for the way back
            return max(model.peak(piece) + 3 * (block - batch) * image, augmentation.peak(block))

        def exceeds(piece: int) -> bool:
            return held + peak(piece) > self.memory_gb * GIB

        self._automatic = None
        if self.micro_batch == "auto" and exceeds(batch) and not network.uses_batch_statistics:
            count = next((n for n in range(2, batch // SMALLEST_PIECE + 1) if not exceeds(-(-batch // n))), None)
            self._automatic = min(batch, SMALLEST_PIECE) if count is None else -(-batch // count)
        piece = min(self._piece(network, batch) or batch, batch)
        note = f"batch {batch} in " + ("one piece" if piece == batch else f"{-(-batch // piece)} pieces of {piece}")
        if self.micro_batch == "auto" and exceeds(piece):
            note += f", above memory_gb {self.memory_gb:g}"
        needed, self._together = peak(piece), 1
        height, width = network.image_shape[1:]
        if candidates > 1 and network.vmappable and batching_pays(device_type, piece * height * width):
            scoring = memory_model(lambda count: self._probe_scoring(network, count, candidates, soft)).peak(piece)
            if held + scoring <= self.memory_gb * GIB:
                needed, self._together = max(needed, scoring), candidates
        return MemoryEstimate((*resident, paths, MemoryPart("one student step", needed, note)))

    def _probe(self, network: FunctionalNetwork, count: int, soft: bool) -> None:
        """Pull back through one step with a few images, by the augmentation that needs most; scoring needs less."""
        images, theta = torch.zeros(count, *network.image_shape), torch.zeros(network.num_parameters)
        targets = torch.zeros(count, network.num_classes) if soft else torch.zeros(count, dtype=torch.int64)
        step = InnerStep(torch.arange(count), self._most_memory_intensive_draw(network, count))
        problem = (theta.new_tensor(0.01), images, targets, [step])
        student = training_loss(network, self.precision)
        unroll_adjoint(student, [theta, theta], *problem, cotangent=theta, wrt_targets=soft)

    def _most_memory_intensive_draw(self, network: FunctionalNetwork, count: int) -> AugmentationDraw:
        policy = replace(self.augmentation, strategy=most_memory_intensive(self.augmentation.operations))
        return policy.draw(step_generator(0, 0, "probe"), count, network.image_shape[1:])

    def _probe_augmentation(self, network: FunctionalNetwork, count: int) -> None:
        """Augment images there and back, with the gradients that wait for it."""
        images = torch.zeros(count, *network.image_shape, requires_grad=True)
        augmented = augment(images, self._most_memory_intensive_draw(network, count))
        waiting = torch.zeros_like(augmented)
        torch.autograd.grad(augmented, images, torch.cat([waiting]))

    def _probe_scoring(self, network: FunctionalNetwork, count: int, students: int, soft: bool) -> None:
        """Take a step with several students at once."""
        thetas = torch.zeros(students, network.num_parameters)
        targets = torch.zeros(count, network.num_classes) if soft else torch.zeros(count, dtype=torch.int64)
        gradients(training_loss(network, self.precision), thetas, torch.zeros(count, *network.image_shape), targets)

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
        device = synthetic.images.device
        if not compiles(self.compile, device, steps * self.syn_steps):
            return
        say("compiling the student's step: the first distillation step may be minutes away")
        with tensor_float(self.precision, device):
            student = try_compile(
                lambda: self._warmed_up(network, synthetic), self.compile, "the student's step", "objective.compile"
            )
        self._compiled = None if student is None else (network, student)

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
        return self.score_begun(synthetic, real, network, [candidate], draw, len(draw))[0]

    def score_all(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidates: Sequence[TrajectorySegment],
        draw: Sequence[InnerStep],
        sole: bool,
    ) -> list[ScoredCandidate]:
        """Run all students forward, on the same augmented batches; together, where that is the faster way."""
        del sole
        return self.score_begun(synthetic, real, network, candidates, draw, len(draw))

    def score_begun(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        network: FunctionalNetwork,
        candidates: Sequence[TrajectorySegment],
        draw: Sequence[InnerStep],
        steps: int,
    ) -> list[ScoredCandidate]:
        """Run students forward for their first steps: the loss is ||theta_n - target||^2 / ||start - target||^2."""
        del real
        paths = self._paths(synthetic, network, [candidate.start for candidate in candidates], draw, 0, steps)
        return [
            ScoredCandidate(candidate, trajectory_loss(path[-1], candidate.start, candidate.target), draw, path)
            for candidate, path in zip(candidates, paths, strict=True)
        ]

    def completed(
        self, synthetic: SyntheticSet, real: RealSet, network: FunctionalNetwork, begun: ScoredCandidate
    ) -> ScoredCandidate:
        """Run the student on from where it stopped."""
        del real
        candidate = cast(TrajectorySegment, begun.candidate)
        *path, last = begun.work
        path += self._paths(synthetic, network, [last], begun.draw, len(path), len(begun.draw))[0]
        loss = trajectory_loss(path[-1], candidate.start, candidate.target)
        return ScoredCandidate(candidate, loss, begun.draw, path)

    def _paths(
        self,
        synthetic: SyntheticSet,
        network: FunctionalNetwork,
        thetas: Sequence[Tensor],
        draw: Sequence[InnerStep],
        first: int,
        end: int,
    ) -> list[list[Tensor]]:
        """Take students' steps from ``first`` to before ``end``."""
        with torch.no_grad(), tensor_float(self.precision, synthetic.images.device):
            return unroll_together(
                self._student(network),
                thetas,
                synthetic.student_lr.detach(),
                synthetic.decoded(),
                synthetic.decoded_targets(),
                draw[first:end],
                micro_batch=self._piece(network, max(len(step.indices) for step in draw)),
                vectorized=1 < len(thetas) == self._together,
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
            self.precision,
        )
        return value

    def skips(self, loss: Tensor) -> bool:
        """Tell whether the loss is above ``loss_threshold``."""
        return self.loss_threshold is not None and float(loss) > self.loss_threshold

    def _warmed_up(self, network: FunctionalNetwork, synthetic: SyntheticSet) -> CompiledLoss:
        """Take one student step of each batch size there and back, which compiles all that the run will need."""
        images, targets = synthetic.decoded().detach(), synthetic.decoded_targets().detach()
        lr, theta = synthetic.student_lr.detach(), network.initial(0).to(images)
        order = compiled_order(training_loss(network), theta, images[:PROBE_SIZE], targets[:PROBE_SIZE])
        student = CompiledLoss(training_loss(network, self.precision), order)
        generator, plain, size = torch.Generator(), DSA("none"), (images.shape[-2], images.shape[-1])
        batches = permuted_batches(len(images), self.batch_syn, self.syn_steps, generator)
        steps = [
            InnerStep(batch.to(images.device), plain.draw(generator, len(batch), size))
            for batch in {len(batch): batch for batch in batches}.values()
        ]
        piece = self._piece(network, max(len(step.indices) for step in steps))
        problem, students = (lr, images, targets, steps), [theta] * self._together
        path = unroll_together(student, students, *problem, micro_batch=piece, vectorized=self._together > 1)[0]
        learned = synthetic.targets.requires_grad
        unroll_adjoint(student, path, *problem, torch.zeros_like(theta), wrt_targets=learned, micro_batch=piece)
        return student

    def _student(self, network: FunctionalNetwork) -> Loss:
        if self._compiled is not None and self._compiled[0] is network:
            return self._compiled[1]
        return training_loss(network, self.precision)


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
        precision: Precision,
    ) -> Tensor:
        ctx.save_for_backward(images, lr, targets)
        ctx.student, ctx.scored, ctx.micro_batch, ctx.precision = student, scored, micro_batch, precision
        return scored.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        images, lr, targets = ctx.saved_tensors
        candidate: TrajectorySegment = ctx.scored.candidate
        path: list[Tensor] = ctx.scored.work
        cotangent = grad * trajectory_loss_gradient(path[-1], candidate.start, candidate.target)
        with tensor_float(ctx.precision, images.device):
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
        return adjoint.images, adjoint.lr, adjoint.targets, None, None, None, None


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)
