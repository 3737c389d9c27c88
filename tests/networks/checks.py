"""What every network is tested for, by name."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.products import gradient_products
from dd_lightning.networks import FunctionalNetwork, NetworkSpec, build_network, network_name


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def conv_weights(network: nn.Module) -> list[Tensor]:
    return [parameter for parameter in network.parameters() if parameter.dim() == 4]


def check_builds_and_runs(name: str, channels: int, size: tuple[int, int]) -> None:
    """Logits are finite, images are left alone, no module works in place."""
    network = build_network(name, channels, 7, size)
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    logits = network(images)
    assert logits.shape == (2, 7)
    assert bool(logits.isfinite().all())
    assert torch.equal(images, before)
    assert not any(getattr(module, "inplace", False) for module in network.modules())


def check_features(name: str, shape: tuple[int, int, int], length: int) -> None:
    network = FunctionalNetwork(name, shape, 5)
    theta = network.initial(0).double()
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = network.features(theta, images)
    assert features.shape == (3, length)
    assert network.parameter_names[-2:] == ("classifier.weight", "classifier.bias")
    weight, bias = theta[-5 * length - 5 : -5].view(5, length), theta[-5:]
    torch.testing.assert_close(features @ weight.T + bias, network(theta, images), rtol=0, atol=1e-12)


def check_mixed_product(name: str, shape: tuple[int, int, int], batch: int = 4) -> None:
    """The mixed product is the change of the images' gradient along the tangent."""
    step = 1e-7  # with a longer one, some of a deep network's many ReLUs change sides
    network = FunctionalNetwork(name, shape, 5)
    generator = torch.Generator().manual_seed(1)
    theta = network.initial(0).double()
    images = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (batch,), generator=generator)
    tangent = torch.randn(len(theta), generator=generator, dtype=torch.float64) * theta.std()

    def loss(theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(network(theta, images), targets)

    def in_images(theta: Tensor) -> Tensor:
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(theta, leaf, labels), leaf)
        return gradient

    difference = (in_images(theta + step * tangent) - in_images(theta - step * tangent)) / (2 * step)
    product = gradient_products(loss, theta, images, labels, tangent).images
    scale = float(product.abs().max())
    assert scale > 1e-4
    torch.testing.assert_close(product, difference, rtol=0, atol=1e-6 * scale)


def check_one_line_error(name: NetworkSpec, message: str, size: tuple[int, int] = (32, 32)) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_network(name, 3, 10, size)
    assert "\n" not in str(caught.value)


def check_canonical(said: str, canonical: str) -> None:
    assert network_name(said) == canonical
    assert network_name(canonical) == canonical
