"""The derivatives of a training loss, compiled."""

import torch
from torch import Tensor
from torch.func import grad, vmap

from dd_lightning.execution.compile import compiled
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import SECOND_ORDER, DifferentiatedLoss, Loss, Order, Products, gradient_products


def compiled_loss(loss: Loss, order: Order = "forward_over_reverse") -> DifferentiatedLoss:
    """Return :func:`~dd_lightning.functional.products.differentiated` compiled, equal up to rounding.

    Args:
        loss: The loss; a pure function.
        order: See :func:`compiled_order`.
    """
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

    without, with_targets = compiled(products), compiled(products_with_targets)

    def either(theta: Tensor, images: Tensor, targets: Tensor, tangent: Tensor, wrt_targets: bool) -> Products:
        found: Products = (with_targets if wrt_targets else without)(theta, images, targets, tangent)
        return found

    return DifferentiatedLoss(compiled(by_theta), compiled(by_thetas), either)


def compiled_order(loss: Loss, theta: Tensor, images: Tensor, targets: Tensor) -> Order:
    """Return the fastest order for :func:`compiled_loss` that agrees with double backward in float64.

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
    point = (loss, theta, images, targets, tangent)
    exact = gradient_products(*point)
    order: Order
    for order in ("reverse_over_forward", "forward_over_reverse"):  # the fastest one first
        found = gradient_products(*point, order=order)
        if all(torch.dist(a, b) <= 1e-8 * b.norm() for a, b in zip(found[:3], exact[:3], strict=True)):
            return order
    raise InputError("the network's second derivatives in forward mode are not those of double backward")
