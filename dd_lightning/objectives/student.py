"""How a student runs its steps on the synthetic set: in pieces, several at once, compiled; and the memory it needs."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from dd_lightning.execution.compile import compile_for_run
from dd_lightning.execution.compiled_loss import compiled_loss, compiled_order
from dd_lightning.execution.memory import GIB, PROBE_SIZE, MemoryEstimate, MemoryPart, memory_model
from dd_lightning.execution.options import Execution
from dd_lightning.execution.precision import tensor_float
from dd_lightning.functional.augment import DSA, AugmentationDraw, augment, most_memory_intensive
from dd_lightning.functional.products import DifferentiatedLoss, differentiated
from dd_lightning.functional.random import step_generator
from dd_lightning.functional.trajectory import (
    Adjoint,
    InnerStep,
    images_augmented_together,
    permuted_batches,
    unroll,
    unroll_adjoint,
)
from dd_lightning.networks import FunctionalNetwork, training_loss
from dd_lightning.objectives.base import Workload
from dd_lightning.sets.synthetic import SyntheticSet
from dd_lightning.training.parallel_networks import batching_pays

SMALLEST_PIECE = 16
"""Images of the smallest piece that ``micro_batch: auto`` makes: smaller ones would cost time and free little."""


class Student:
    """Trains copies of a network on the synthetic set by plain SGD, and pulls gradients back through that.

    Args:
        network: The architecture.
        execution: How it is computed.
        syn_steps: Steps of a student.
        batch_syn: Images of a step; None is the whole set.
    """

    def __init__(self, network: FunctionalNetwork, execution: Execution, syn_steps: int, batch_syn: int | None) -> None:
        self.network = network
        self.execution = execution
        self.syn_steps = syn_steps
        self.batch_syn = batch_syn
        self.piece = execution.micro_batch if execution.micro_batch != "auto" else None
        self._vectorized = 1  # students that take their steps as one batch
        self.loss = differentiated(training_loss(network, execution.precision))

    def unroll(
        self, synthetic: SyntheticSet, thetas: Sequence[Tensor], steps: Sequence[InnerStep]
    ) -> list[list[Tensor]]:
        """Return the path of a student from each of ``thetas``: :func:`~dd_lightning.functional.trajectory.unroll`."""
        self.network.check_pieces(self.piece, max((len(step.indices) for step in steps), default=0))
        with torch.no_grad(), tensor_float(self.execution.precision, synthetic.images.device):
            return unroll(
                self.loss,
                thetas,
                synthetic.student_lr.detach(),
                synthetic.decoded(),
                synthetic.decoded_targets(),
                steps,
                micro_batch=self.piece,
                vectorized=1 < len(thetas) == self._vectorized,
            )

    def pull_back(
        self, synthetic: SyntheticSet, path: Sequence[Tensor], steps: Sequence[InnerStep], cotangent: Tensor
    ) -> Adjoint:
        """Return the gradients by S that belong to one by the end of a path, [P]."""
        with torch.no_grad(), tensor_float(self.execution.precision, synthetic.images.device):
            return unroll_adjoint(
                self.loss,
                path,
                synthetic.student_lr.detach(),
                synthetic.decoded(),
                synthetic.decoded_targets(),
                steps,
                cotangent,
                wrt_targets=synthetic.targets.requires_grad,
                micro_batch=self.piece,
            )

    def plan_memory(self, work: Workload, augmentation: DSA) -> MemoryEstimate:
        """Settle how many pieces a batch is cut into and how many students run at once; estimate the peak of a step."""
        network, execution, batch = self.network, self.execution, min(self.batch_syn or work.images, work.images)
        network.check_pieces(self.piece, batch)
        # of a candidate there is the path, and the segment that it is compared with
        vectors = work.candidates * (self.syn_steps + 1 + 2)
        note = f"{work.candidates} candidate" + "s" * (work.candidates != 1)
        paths = MemoryPart("student paths", 4 * network.num_parameters * vectors, note)
        held = sum(part.size for part in (*work.resident, paths))
        image = torch.zeros(network.image_shape).nbytes
        block = images_augmented_together(batch, self.syn_steps, image)
        step = memory_model(lambda count: self._probe_step(work, augmentation, count))
        augmenting = memory_model(lambda count: self._probe_augmentation(augmentation, count))

        def peak(piece: int) -> int:
            if piece < batch or block == batch:
                return step.peak(piece)
            # before and after augmentation, and the gradients that wait for the way back
            return max(step.peak(piece) + 3 * (block - batch) * image, augmenting.peak(block))

        def exceeds(piece: int) -> bool:
            return held + peak(piece) > execution.memory_gb * GIB

        if execution.micro_batch == "auto" and exceeds(batch) and not network.uses_batch_statistics:
            fitting = (-(-batch // n) for n in range(2, batch // SMALLEST_PIECE + 1) if not exceeds(-(-batch // n)))
            self.piece = next(fitting, min(batch, SMALLEST_PIECE))
        piece = min(self.piece or batch, batch)
        note = f"batch {batch} in " + ("one piece" if piece == batch else f"{-(-batch // piece)} pieces of {piece}")
        if execution.micro_batch == "auto" and exceeds(piece):
            note += f", above memory_gb {execution.memory_gb:g}"
        needed = peak(piece)
        height, width = network.image_shape[1:]
        if work.candidates > 1 and network.vmappable and batching_pays(work.device_type, piece * height * width):
            together = memory_model(lambda count: self._probe_students(work, count)).peak(piece)
            if held + together <= execution.memory_gb * GIB:
                needed, self._vectorized = max(needed, together), work.candidates
        return MemoryEstimate(
            (*work.resident, paths, MemoryPart("one student step", needed, note)),
            "set a smaller execution.micro_batch or objective.batch_syn",
        )

    def compile(self, synthetic: SyntheticSet, steps: int, say: Callable[[str], None]) -> None:
        """Compile a student's step if that was asked for, or pays off over ``steps`` distillation steps."""
        choice, device, calls = self.execution.compile, synthetic.images.device, steps * self.syn_steps
        made = compile_for_run(lambda: self._compiled(synthetic), choice, device, calls, "the student's step", say)
        self.loss = made or self.loss

    def _compiled(self, synthetic: SyntheticSet) -> DifferentiatedLoss:
        """Take one step of each batch size there and back, which compiles all that the run will need."""
        network, images, targets = self.network, synthetic.decoded().detach(), synthetic.decoded_targets().detach()
        theta = network.initial(0).to(images)
        order = compiled_order(training_loss(network), theta, images[:PROBE_SIZE], targets[:PROBE_SIZE])
        student = copy(self)
        student.loss = compiled_loss(training_loss(network, self.execution.precision), order)
        generator, plain, size = torch.Generator(), DSA("none"), (images.shape[-2], images.shape[-1])
        batches = permuted_batches(len(images), self.batch_syn, self.syn_steps, generator)
        steps = [
            InnerStep(batch.to(images.device), plain.draw(generator, len(batch), size))
            for batch in {len(batch): batch for batch in batches}.values()
        ]
        path = student.unroll(synthetic, [theta] * self._vectorized, steps)[0]
        student.pull_back(synthetic, path, steps, torch.zeros_like(theta))
        return student.loss

    # What is run on a few images of zeros, to find out how much memory it takes

    def _probe_step(self, work: Workload, augmentation: DSA, count: int) -> None:
        """Pull back through one step, with the augmentation that needs most; the way there needs less."""
        images, theta = torch.zeros(count, *self.network.image_shape), torch.zeros(self.network.num_parameters)
        step = InnerStep(torch.arange(count), self._largest_draw(augmentation, count))
        problem = (theta.new_tensor(0.01), images, work.targets(count), [step])
        unroll_adjoint(self.loss, [theta, theta], *problem, cotangent=theta, wrt_targets=work.soft_labels)

    def _probe_augmentation(self, augmentation: DSA, count: int) -> None:
        """Augment there and back, with the gradients that wait for it."""
        images = torch.zeros(count, *self.network.image_shape, requires_grad=True)
        augmented = augment(images, self._largest_draw(augmentation, count))
        waiting = torch.zeros_like(augmented)
        torch.autograd.grad(augmented, images, torch.cat([waiting]))

    def _probe_students(self, work: Workload, count: int) -> None:
        """Take a step with all candidates' students at once."""
        thetas = torch.zeros(work.candidates, self.network.num_parameters)
        self.loss.gradients(thetas, torch.zeros(count, *self.network.image_shape), work.targets(count))

    def _largest_draw(self, augmentation: DSA, count: int) -> AugmentationDraw:
        policy = replace(augmentation, strategy=most_memory_intensive(augmentation.operations))
        return policy.draw(step_generator(0, 0, "probe"), count, self.network.image_shape[1:])
