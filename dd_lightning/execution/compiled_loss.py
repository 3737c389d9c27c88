"""A training loss with compiled derivatives, of first and second order."""

import torch
from torch import Tensor
from torch.func import grad, vmap

from dd_lightning.execution.compile import Backend, compiled, laid_out
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import SECOND_ORDER, Loss, Order, Products, gradient_products


class CompiledLoss:
    """A training loss with derivatives that torch.compile has compiled, for each shape of batch at its first use.

    :func:`gradient`, :func:`gradients` and :func:`gradient_products`, and so the student's unroll and its adjoint, take
    it in place of the loss, and then differ from the eager ones by rounding. Called itself, it is the loss.

    Args:
        loss: The loss; a pure function.
        order: Of :func:`gradient_products`; any but ``"reverse_over_reverse"``.
        backend: Of torch.compile.

    Example:
        >>> from dd_lightning.functional.products import gradient
        >>> loss = CompiledLoss(lambda t, x, y: (t**2 * x).sum(), backend="eager")
        >>> gradient(loss, torch.tensor([3.0]), torch.tensor([2.0]), torch.zeros(1))
        tensor([12.])
    """

    def __init__(self, loss: Loss, order: Order = "forward_over_reverse", backend: Backend = "inductor") -> None:
        second = SECOND_ORDER[order]

        def by_theta(theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
            derivative: Tensor = grad(loss)(theta, images, targets)
            return derivative

        def by_thetas(thetas: Tensor, images: Tensor, targets: Tensor) -> Tensor:
            derivatives: Tensor = vmap(grad(loss), (0, None, None))(thetas, images, targets)
            return derivatives

        def products(theta: Tensor, images: Tensor, targets: Tensor, tangent: Tensor) -> Products:
            return second(loss, theta, images, targets, tangent, False)

        def products_with_targets(theta: Tensor, images: Tensor, targets: Tensor, tangent: Tensor) -> Products:
            return second(loss, theta, images, targets, tangent, True)

        self._loss = loss
        self._gradient, self._gradients = compiled(by_theta, backend), compiled(by_thetas, backend)
        self._products = {False: compiled(products, backend), True: compiled(products_with_targets, backend)}

    def __call__(self, theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Return the loss."""
        return self._loss(theta, images, targets)

    # The properties of arguments are made the same in every call, for compiled code is bound to them. A state of the
    # student must be copied, for it is a row of a larger storage, which forward mode under torch.compile refuses.

    def gradient(self, theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Return what :func:`gradient` does."""
        with torch.no_grad():
            derivative: Tensor = self._gradient(theta.clone(), laid_out(images), targets.detach())
        return derivative

    def gradients(self, thetas: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Return what :func:`gradients` does."""
        with torch.no_grad():
            derivatives: Tensor = self._gradients(thetas.detach(), laid_out(images), targets.detach())
        return derivatives

    def products(
        self, theta: Tensor, images: Tensor, targets: Tensor, tangent: Tensor, wrt_targets: bool = False
    ) -> Products:
        """Return what :func:`gradient_products` does."""
        with torch.no_grad():
            found: Products = self._products[wrt_targets](
                theta.clone(), laid_out(images), targets.detach(), tangent.detach()
            )
        return found


def compiled_order(loss: Loss, theta: Tensor, images: Tensor, targets: Tensor) -> Order:
    """Return the fastest order for a :class:`CompiledLoss` of those that are right for a network.

    That is found out by comparison with double backward in float64, at this point and with a random tangent.

    Args:
        loss: The training loss, of any precision.
        theta: Parameters, [P].
        images: A few images, [B, ...].
        targets: Their labels, [B], or label logits, [B, C].

    Raises:
        InputError: If none is right.
    """
    generator = torch.Generator().manual_seed(0)
    theta, images = theta.detach().double(), images.detach().double()
    targets = targets.detach().double() if targets.is_floating_point() else targets
    theta = theta + 0.01 * torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
    tangent = torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
    exact = gradient_products(loss, theta, images, targets, tangent)
    for order, second in reversed(SECOND_ORDER.items()):
        found = second(loss, theta, images, targets, tangent, False)
        if all(torch.dist(a, b) <= 1e-8 * b.norm() for a, b in zip(found[:3], exact[:3], strict=True)):
            return order
    raise InputError("the network's second derivatives in forward mode are not those of double backward")
