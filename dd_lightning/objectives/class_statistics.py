"""Matching one class, compiled: statistics of real and of synthetic images, their distance, and its derivatives."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad

from dd_lightning.execution.compile import Backend, compiled, laid_out

Statistics = tuple[Tensor, ...]
"""What is compared: gradients of some layers, a mean feature, or both."""

Terms = dict[str, Tensor]
"""The parts of a loss, scalars, by name; the loss is their sum."""

ComputeStatistics = Callable[[Tensor, Tensor, Tensor, bool], Statistics]
"""(theta [P], images [B, ch, H, W], targets [B] or [B, C], whether to be differentiated by the images)."""

Compare = Callable[[Statistics, Statistics], Mapping[str, Tensor]]
"""(synthetic, real) -> the parts of the loss."""


class CompiledMatching:
    """The matching of one class, as torch.compile has compiled it, for each shape of batch at its first use.

    Whatever derivatives are wanted of the statistics are taken inside the compiled code, because a compiled function
    cannot be differentiated twice. What is not compared is not derived: the compiler leaves out all that nobody reads.

    Args:
        statistics: A pure function. If the statistics are derivatives, it takes them by
            :func:`~dd_lightning.functional.products.partial_gradients`, or by torch.func.
        terms: A pure function of the statistics.
        backend: Of torch.compile.

    Example:
        >>> def mean(theta, images, targets, graph):
        ...     return (theta * images.mean(0),)
        >>> def square(synthetic, real):
        ...     return {"distance": (synthetic[0] - real[0]).square().sum()}
        >>> matching = CompiledMatching(mean, square, backend="eager")
        >>> theta, images = torch.tensor([2.0]), torch.ones(4, 1, 1, 1)
        >>> real = matching.real(theta, 3 * images, torch.zeros(4))
        >>> terms, gradient = matching.matched(theta, images, torch.zeros(4), real)
        >>> terms["distance"].item(), gradient.flatten().tolist()
        (16.0, [-4.0, -4.0, -4.0, -4.0])
    """

    def __init__(self, statistics: ComputeStatistics, terms: Compare, backend: Backend = "inductor") -> None:
        def total(synthetic: Statistics, real: Statistics) -> tuple[Tensor, Terms]:
            parts = dict(terms(synthetic, real))
            return torch.stack(list(parts.values())).sum(), parts

        def real_statistics(theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
            return statistics(theta, images, targets, False)

        def matched(theta: Tensor, images: Tensor, targets: Tensor, real: Statistics) -> tuple[Tensor, Terms]:
            found: tuple[Tensor, Terms] = grad(
                lambda leaf: total(statistics(theta, leaf, targets, True), real), has_aux=True
            )(images)
            return found

        def compared(theta: Tensor, images: Tensor, targets: Tensor, real: Statistics) -> tuple[Statistics, Terms]:
            synthetic = statistics(theta, images, targets, False)
            found: tuple[Statistics, Terms] = grad(total, has_aux=True)(synthetic, real)
            return found

        def pulled_back(theta: Tensor, images: Tensor, targets: Tensor, cotangents: Statistics) -> Tensor:
            def along(leaf: Tensor) -> Tensor:
                synthetic = statistics(theta, leaf, targets, True)
                return torch.stack([(a * s).sum() for a, s in zip(cotangents, synthetic, strict=True)]).sum()

            derivative: Tensor = grad(along)(images)
            return derivative

        self._real, self._matched = compiled(real_statistics, backend), compiled(matched, backend)
        self._compared, self._pulled_back = compiled(compared, backend), compiled(pulled_back, backend)

    # Compiled code is bound to the properties of its arguments and to the gradient mode: the same in every call.

    @torch.no_grad()
    def real(self, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        """Return the statistics of real images, without a graph."""
        found: Statistics = self._real(theta.clone(), laid_out(images), targets.detach())
        return found

    @torch.no_grad()
    def matched(self, theta: Tensor, images: Tensor, targets: Tensor, real: Statistics) -> tuple[Terms, Tensor]:
        """Return the loss of synthetic images, and its gradient by them, shaped like them."""
        gradient, terms = self._matched(theta.clone(), laid_out(images), targets.detach(), real)
        return terms, gradient

    @torch.no_grad()
    def compared(self, theta: Tensor, images: Tensor, targets: Tensor, real: Statistics) -> tuple[Terms, Statistics]:
        """Return the loss of synthetic images, and its derivatives by their statistics."""
        cotangents, terms = self._compared(theta.clone(), laid_out(images), targets.detach(), real)
        return terms, cotangents

    @torch.no_grad()
    def pulled_back(self, theta: Tensor, images: Tensor, targets: Tensor, cotangents: Statistics) -> Tensor:
        """Return the gradient by synthetic images of (a . s), with s their statistics and a the cotangents."""
        gradient: Tensor = self._pulled_back(theta.clone(), laid_out(images), targets.detach(), cotangents)
        return gradient
