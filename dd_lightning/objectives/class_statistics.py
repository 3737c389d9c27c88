"""How the statistics of one class are computed and compared: eagerly or compiled, whole or in pieces."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from dd_lightning.execution.compile import compile_for_run, compiled
from dd_lightning.execution.memory import PROBE_SIZE, MemoryEstimate, MemoryPart, memory_model
from dd_lightning.execution.options import Execution
from dd_lightning.execution.precision import tensor_float
from dd_lightning.functional.augment import AugmentationDraw
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.policies import AugmentationPolicy, augment_in_turn
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives.base import Workload
from dd_lightning.sets.synthetic import SyntheticSet

Statistics = tuple[Tensor, ...]
"""What is compared: gradients of some layers, a mean feature, or both."""

Terms = Mapping[str, Tensor]
"""The parts of a loss, scalars, by name; the loss is their sum."""

Compute = Callable[[Tensor, Tensor, Tensor], Statistics]  # (theta, images, targets)
Compare = Callable[[Statistics, Statistics], Terms]  # (synthetic, real)


class ClassBatch(NamedTuple):
    """What one class contributes to a step.

    Attributes:
        real: Augmented real images, [B, ch, H, W].
        real_targets: Their labels, [B].
        rows: Which images of the decoded synthetic set are matched, [b], each at most once.
        targets: Their labels [b], or label logits [b, C].
        augmentation: Its draw, the same for real and synthetic images.
    """

    real: Tensor
    real_targets: Tensor
    rows: Tensor
    targets: Tensor
    augmentation: tuple[AugmentationDraw, ...] = ()


class ClassMatching:
    """Computes a class's loss and its gradient by the synthetic images, d(a . s)/dx.

    s are the synthetic statistics and a is the derivative of the loss by them. A batch above an explicit
    ``execution.micro_batch`` passes through the network in pieces; ``auto`` never cuts a class.

    Args:
        network: The architecture.
        execution: How it is computed.
        statistics: The objective's: (network, theta, images, targets) -> statistics.
        terms: The objective's: (synthetic, real) -> terms.
        batch_real: Real images of a class.
        batch_syn: The most synthetic images of a class.
    """

    def __init__(
        self,
        network: FunctionalNetwork,
        execution: Execution,
        statistics: Callable[[FunctionalNetwork, Tensor, Tensor, Tensor], Statistics],
        terms: Compare,
        batch_real: int,
        batch_syn: int,
    ) -> None:
        precise = network.in_precision(execution.precision)

        def compute(theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
            return statistics(precise, theta, images, targets)

        self.network = network
        self.execution = execution
        self.batch_real = batch_real
        self.batch_syn = batch_syn
        self._piece = None if execution.micro_batch == "auto" else execution.micro_batch
        self._several = False  # candidates are scored in each step
        self._compute, self._terms = compute, terms
        self._functions = self._eager = _in_pieces(_eager(compute, terms), terms, self._piece)

    # Augmentation is differentiated here: eagerly, and never in pieces

    def compared(self, theta: Tensor, images: Tensor, batch: ClassBatch) -> tuple[Statistics, Terms]:
        """Return a and the loss's terms at parameters theta [P]; ``images`` are the decoded synthetic set."""
        with tensor_float(self.execution.precision, theta.device):
            real = self._of_real(theta, batch)
            augmented = augment_in_turn(images[batch.rows], batch.augmentation)
            return _compared(self._terms, self._functions.statistics(theta, augmented, batch.targets), real)

    def matched(self, theta: Tensor, images: Tensor, batch: ClassBatch) -> tuple[Tensor, Terms]:
        """Return the gradient by the class's images, and the loss's terms."""
        with tensor_float(self.execution.precision, theta.device), torch.enable_grad():
            real = self._of_real(theta, batch)
            own = images[batch.rows].requires_grad_()
            augmented = augment_in_turn(own, batch.augmentation)
            gradient, terms = self._functions.matched(theta, augmented.detach(), batch.targets, real)
            return torch.autograd.grad(augmented, own, gradient)[0], terms

    def pulled_back(self, theta: Tensor, images: Tensor, batch: ClassBatch, a: Statistics) -> Tensor:
        """Return the gradient by the class's images, from the a that :meth:`compared` returned."""
        with tensor_float(self.execution.precision, theta.device), torch.enable_grad():
            own = images[batch.rows].requires_grad_()
            augmented = augment_in_turn(own, batch.augmentation)
            gradient = self._functions.pulled_back(theta, augmented.detach(), batch.targets, a)
            return torch.autograd.grad(augmented, own, gradient)[0]

    def _of_real(self, theta: Tensor, batch: ClassBatch) -> Statistics:
        # code is compiled for full batches; that of a small class is another shape
        functions = self._functions if len(batch.real) == self.batch_real else self._eager
        return functions.statistics(theta, batch.real, batch.real_targets)

    def features(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the network's features [n, F], in float32 or TF32."""
        with tensor_float(self.execution.precision, theta.device):
            return self.network.features(theta, images)

    def plan_memory(self, work: Workload, augmentation: AugmentationPolicy) -> MemoryEstimate:
        """Estimate the peak of a step in eager mode, without the pool's update and the choice of representatives."""
        network, shape = self.network, self.network.image_shape
        counts = [self.batch_real, min(self.batch_syn, work.images // network.num_classes)]
        for count in counts:
            network.check_pieces(self._piece, count)
        check_class(network, counts[1], "synthetic", "raise ipc")
        theta, self._several = torch.zeros(network.num_parameters), work.candidates > 1

        def probe(real: int, synthetic: int) -> None:
            generator, images = step_generator(0, 0, "probe"), torch.zeros(synthetic, *shape)
            draw = augmentation.most_memory_intensive().draw(generator, real, shape[1:], siamese=True)
            self.matched(theta, images, _blank(images, work.targets(synthetic), real, draw))

        real_bytes = network.num_classes * torch.zeros(self.batch_real, *shape).nbytes
        parts = [*work.resident, MemoryPart("augmented real images", real_bytes, "of all classes")]
        if self._several:
            kept = self._functions.statistics(theta, torch.zeros(PROBE_SIZE, *shape), work.targets(PROBE_SIZE))
            size = work.candidates * network.num_classes * sum(each.nbytes for each in kept)
            parts.append(MemoryPart("statistics of all classes", size, f"{work.candidates} candidates"))
        pieces = [min(count, self._piece or count) for count in counts]
        note = f"{counts[0]} real and {counts[1]} synthetic images"
        note += f", at most {self._piece} at once" if pieces != counts else ""
        parts.append(MemoryPart("one class", memory_model(probe, kinds=2).peak(*pieces), note))
        return MemoryEstimate(tuple(parts), "set a smaller objective.batch_real or objective.batch_syn")

    def compile(self, synthetic: SyntheticSet, steps: int, say: Callable[[str], None]) -> None:
        """Compile the matching of a class if that was asked for, or pays off over ``steps`` distillation steps."""

        def make() -> _Functions:
            twin, count = copy(self), min(self.batch_syn, synthetic.decoded_size // self.network.num_classes)
            twin._functions = _in_pieces(_compiled(self._compute, self._terms), self._terms, self._piece)
            images, targets = synthetic.decoded()[:count].detach(), synthetic.decoded_targets()[:count].detach()
            theta, batch = self.network.initial(0).to(images), _blank(images, targets, self.batch_real)
            twin.matched(theta, images, batch)
            if self._several:
                a, _ = twin.compared(theta, images, batch)
                twin.pulled_back(theta, images, batch, a)
            return twin._functions

        choice, calls = self.execution.compile, steps * self.network.num_classes
        made = compile_for_run(make, choice, synthetic.images.device, calls, "the matching of a class", say)
        self._functions = made or self._functions


def check_class(network: FunctionalNetwork, images: int, which: str, remedy: str) -> None:
    """Refuse a class of one image in a network that cannot normalize one.

    Raises:
        InputError: It says so.
    """
    if not network.takes(images):
        raise InputError(
            f"a class has {images} {which} image, but batch norm in {network.name!r} needs more than one value per "
            f"channel; {remedy}, or use another norm"
        )


def _blank(
    images: Tensor, targets: Tensor, batch_real: int, augmentation: tuple[AugmentationDraw, ...] = ()
) -> ClassBatch:
    """Return the batch of a class that consists of these synthetic images, with blank real ones."""
    real = images.new_zeros(batch_real, *images.shape[1:])
    labels = torch.zeros(batch_real, dtype=torch.int64, device=images.device)
    return ClassBatch(real, labels, torch.arange(len(images), device=images.device), targets, augmentation)


# Pure functions of one batch


class _Functions(NamedTuple):
    """What is computed of (theta, images, targets), eagerly or by compiled code; results have no graph.

    Attributes:
        statistics: The statistics s.
        matched: (..., real statistics) -> the loss's gradient by the images, and its terms.
        pulled_back: (..., a) -> d(a . s)/dx.
    """

    statistics: Compute
    matched: Callable[[Tensor, Tensor, Tensor, Statistics], tuple[Tensor, Terms]]
    pulled_back: Callable[[Tensor, Tensor, Tensor, Statistics], Tensor]


def _total(terms: Compare, synthetic: Statistics, real: Statistics) -> tuple[Tensor, Terms]:
    parts = terms(synthetic, real)
    return torch.stack(list(parts.values())).sum(), parts


def _compared(terms: Compare, synthetic: Statistics, real: Statistics) -> tuple[Statistics, Terms]:
    """Return a, the derivatives of the sum of terms by the synthetic statistics, and the terms."""
    with torch.enable_grad():
        leaves = tuple(statistic.detach().requires_grad_() for statistic in synthetic)
        value, parts = _total(terms, leaves, real)
        a = torch.autograd.grad(value, leaves)
    return a, {name: part.detach() for name, part in parts.items()}


def _eager(compute: Compute, terms: Compare) -> _Functions:
    def statistics(theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        with torch.no_grad():
            return compute(theta, images, targets)

    def matched(theta: Tensor, images: Tensor, targets: Tensor, real: Statistics) -> tuple[Tensor, Terms]:
        own = images.requires_grad_()
        found = compute(theta, own, targets)
        a, parts = _compared(terms, found, real)
        return torch.autograd.grad(found, own, a)[0], parts

    def pulled_back(theta: Tensor, images: Tensor, targets: Tensor, a: Statistics) -> Tensor:
        own = images.requires_grad_()
        return torch.autograd.grad(compute(theta, own, targets), own, a)[0]

    return _Functions(statistics, matched, pulled_back)


def _compiled(compute: Compute, terms: Compare) -> _Functions:
    # Derivatives are taken inside of what is compiled: a compiled function cannot be differentiated twice.

    def statistics(theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        return compute(theta, images, targets)

    def matched(theta: Tensor, images: Tensor, targets: Tensor, real: Statistics) -> tuple[Tensor, Terms]:
        found: tuple[Tensor, Terms] = grad(lambda own: _total(terms, compute(theta, own, targets), real), has_aux=True)(
            images
        )
        return found

    def pulled_back(theta: Tensor, images: Tensor, targets: Tensor, a: Statistics) -> Tensor:
        def along(own: Tensor) -> Tensor:
            return torch.stack([(x * s).sum() for x, s in zip(a, compute(theta, own, targets), strict=True)]).sum()

        derivative: Tensor = grad(along)(images)
        return derivative

    return _Functions(compiled(statistics), compiled(matched), compiled(pulled_back))


def _in_pieces(functions: _Functions, terms: Compare, size: int | None) -> _Functions:
    """Return functions that pass at most ``size`` images through the network at once; None: the functions themselves.

    The statistics of a batch are the mean of those of its pieces, weighted by their lengths.
    """
    if size is None:
        return functions

    def pieces(images: Tensor, targets: Tensor) -> list[tuple[float, Tensor, Tensor]]:
        parts = zip(images.split(size), targets.split(size), strict=True)
        return [(len(part) / len(images), part.detach(), labels) for part, labels in parts]

    def statistics(theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        parts = [
            [share * statistic for statistic in functions.statistics(theta, part, labels)]
            for share, part, labels in pieces(images, targets)
        ]
        return tuple(torch.stack(each).sum(0) for each in zip(*parts, strict=True))

    def matched(theta: Tensor, images: Tensor, targets: Tensor, real: Statistics) -> tuple[Tensor, Terms]:
        if len(images) <= size:
            return functions.matched(theta, images, targets, real)
        a, parts = _compared(terms, statistics(theta, images, targets), real)
        return pulled_back(theta, images, targets, a), parts

    def pulled_back(theta: Tensor, images: Tensor, targets: Tensor, a: Statistics) -> Tensor:
        return torch.cat(
            [
                functions.pulled_back(theta, part, labels, tuple(share * each for each in a))
                for share, part, labels in pieces(images, targets)
            ]
        )

    return _Functions(statistics, matched, pulled_back)
