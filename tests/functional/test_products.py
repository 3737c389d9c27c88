"""The second-order primitive against double backward, finite differences and closed forms."""

import pytest
import torch
from torch import Tensor

from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.products import Order, gradient, gradient_products
from dd_lightning.networks import FunctionalNetwork

ORDERS: tuple[Order, ...] = ("forward_over_reverse", "reverse_over_reverse")
NAMES = ["ConvNet-2-W4", "ConvNet-2-W4-LN", "ConvNet-2-W4-NN-MP", "ConvNet-2-W4-BN-SIGMOID"]


def problem(name: str) -> tuple[FunctionalNetwork, Tensor, Tensor, Tensor, Tensor]:
    network = FunctionalNetwork(name, (2, 8, 8), 3)
    generator = torch.Generator().manual_seed(1)
    theta = network.initial(0).double()
    images = torch.randn(5, 2, 8, 8, generator=generator, dtype=torch.float64)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    tangent = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    return network, theta, images, logits, tangent


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_directional_derivatives_of_the_gradient(name: str, order: Order) -> None:
    network, theta, images, logits, tangent = problem(name)

    def loss(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return classification_loss(network(t, x), y)

    products = gradient_products(loss, theta, images, logits, tangent, wrt_targets=True, order=order)
    step = 1e-6
    plus = gradient(loss, theta + step * tangent, images, logits)
    minus = gradient(loss, theta - step * tangent, images, logits)
    torch.testing.assert_close(products.hessian, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(products.gradient, gradient(loss, theta, images, logits), rtol=1e-12, atol=1e-14)

    # (a . g) is itself the derivative of the loss along a: its images' derivative by finite differences of dL/dx
    def by_inputs(t: Tensor) -> tuple[Tensor, ...]:
        x, y = images.clone().requires_grad_(), logits.clone().requires_grad_()
        return torch.autograd.grad(loss(t, x, y), (x, y))

    for product, up, down in zip(
        (products.images, products.targets),
        by_inputs(theta + step * tangent),
        by_inputs(theta - step * tangent),
        strict=True,
    ):
        torch.testing.assert_close(product, (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_both_orders_agree(name: str) -> None:
    network, theta, images, logits, tangent = problem(name)

    def loss(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return classification_loss(network(t, x), y)

    forward, reverse = (
        gradient_products(loss, theta, images, logits, tangent, wrt_targets=True, order=order) for order in ORDERS
    )
    for a, b in zip(forward, reverse, strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).norm() / b.norm()) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
def test_arguments_are_left_alone(order: Order) -> None:
    network, theta, images, logits, tangent = problem("ConvNet-2-W4")
    labels = logits.argmax(1)
    before = [t.clone() for t in (theta, images, tangent)]
    products = gradient_products(
        lambda t, x, y: torch.nn.functional.cross_entropy(network(t, x), y), theta, images, labels, tangent, order=order
    )
    assert products.targets is None
    for tensor, old in zip((theta, images, tangent), before, strict=True):
        assert torch.equal(tensor, old)
        assert not tensor.requires_grad
    assert not any(p.requires_grad for p in products[:3])
