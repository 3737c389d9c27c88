"""The second-order primitive against double backward, finite differences and closed forms."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dd_lightning.execution import compiled_loss as compiling
from dd_lightning.execution.compile import compiled
from dd_lightning.execution.compiled_loss import compiled_loss, compiled_order
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.products import Order, differentiated, gradient, gradient_products
from dd_lightning.networks import FunctionalNetwork

ORDERS: tuple[Order, ...] = ("forward_over_reverse", "reverse_over_reverse")
NAMES = ["ConvNet-2-W4", "ConvNet-2-W4-LN", "ConvNet-2-W4-NN-MP", "ConvNet-2-W4-BN-SIGMOID"]
EXACT_FORWARD_FIRST = ["ConvNet-2-W4", "ConvNet-2-W4-GN", "ConvNet-2-W4-NN-MP"]
CASES = [
    *((name, order) for name in NAMES for order in ORDERS),
    *((name, "reverse_over_forward") for name in EXACT_FORWARD_FIRST),
]


def problem(name: str) -> tuple[FunctionalNetwork, Tensor, Tensor, Tensor, Tensor]:
    network = FunctionalNetwork(name, (2, 8, 8), 3)
    generator = torch.Generator().manual_seed(1)
    theta = network.initial(0).double()
    images = torch.randn(5, 2, 8, 8, generator=generator, dtype=torch.float64)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    tangent = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    return network, theta, images, logits, tangent


@pytest.mark.parametrize(("name", "order"), CASES)
def test_products_are_directional_derivatives_of_the_gradient(name: str, order: Order) -> None:
    network, theta, images, logits, tangent = problem(name)

    def loss(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return classification_loss(network(t, x), y)

    products = gradient_products(loss, theta, images, logits, tangent, wrt_targets=True, order=order)
    step = 1e-6
    plus = gradient(loss, theta + step * tangent, images, logits)
    minus = gradient(loss, theta - step * tangent, images, logits)
    torch.testing.assert_close(products.hessian, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(products.slope, tangent @ gradient(loss, theta, images, logits), rtol=1e-12, atol=1e-14)

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


@pytest.mark.parametrize(("name", "order"), [case for case in CASES if case[1] != "reverse_over_reverse"])
def test_the_orders_agree(name: str, order: Order) -> None:
    network, theta, images, logits, tangent = problem(name)

    def loss(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return classification_loss(network(t, x), y)

    forward, reverse = (
        gradient_products(loss, theta, images, logits, tangent, wrt_targets=True, order=each)
        for each in (order, "reverse_over_reverse")
    )
    for a, b in zip(forward, reverse, strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).norm() / b.norm()) < 1e-12


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *((name, "reverse_over_forward") for name in EXACT_FORWARD_FIRST),
        ("ConvNet-2-W4-BN", "forward_over_reverse"),
        ("ConvNet-2-W4-LN", "forward_over_reverse"),
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_a_wrong_order_is_found_out(name: str, order: Order, soft: bool) -> None:
    network, theta, images, logits, tangent = problem(name)

    def loss(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return classification_loss(network(t, x), y)

    targets = logits if soft else logits.argmax(1)
    few = (images.float()[:2], targets.float()[:2] if soft else targets[:2])
    assert compiled_order(loss, theta.float(), *few) == order
    exact = gradient_products(loss, theta, images, targets, tangent).images
    forward_first = gradient_products(loss, theta, images, targets, tangent, order="reverse_over_forward").images
    assert (torch.dist(exact, forward_first) < 1e-10 * exact.norm()) == (order == "reverse_over_forward")


def test_gradients_of_several_networks_on_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiled", partial(compiled, backend="aot_eager"))
    network, theta, images, logits, tangent = problem("ConvNet-2-W4")

    def loss(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return classification_loss(network(t, x), y)

    thetas = torch.stack([theta, theta + tangent, theta - tangent])
    for each in (differentiated(loss), compiled_loss(loss)):
        together = each.gradients(thetas, images, logits)
        for row, one in zip(together, thetas, strict=True):
            torch.testing.assert_close(row, gradient(loss, one, images, logits), rtol=1e-12, atol=1e-14)


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
