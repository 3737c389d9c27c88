import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, group_norm, linear

from dd_lightning.ensemble import ensemble_gradients, ensemble_logits, ensemble_pays

WIDTH, CLASSES = 3, 4
SIZES = [WIDTH * 2 * 9, WIDTH, WIDTH, CLASSES * WIDTH * 36]


def network(theta: Tensor, images: Tensor) -> Tensor:
    kernel, scale, shift, head = torch.split(theta, SIZES)
    hidden = conv2d(images, kernel.reshape(WIDTH, 2, 3, 3), padding=1)
    hidden = group_norm(hidden, WIDTH, scale, shift).relu()
    return linear(hidden.flatten(1), head.reshape(CLASSES, -1))


@pytest.fixture
def stacks() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    thetas = torch.randn(3, sum(SIZES), generator=generator, dtype=torch.float64)
    images = torch.randn(3, 5, 2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (3, 5), generator=generator)
    return thetas, images, labels


def test_both_modes_give_the_gradient_of_the_mean_cross_entropy(
    stacks: tuple[Tensor, Tensor, Tensor],
) -> None:
    thetas, images, labels = stacks
    at_once, logits_at_once = ensemble_gradients(network, thetas, images, labels, vectorised=True)
    in_turn, logits_in_turn = ensemble_gradients(network, thetas, images, labels, vectorised=False)
    torch.testing.assert_close(at_once, in_turn, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits_at_once, logits_in_turn, rtol=1e-12, atol=1e-12)
    leaf = thetas[1].clone().requires_grad_()
    logits = network(leaf, images[1])
    picked = logits.log_softmax(1)[torch.arange(5), labels[1]]
    (expected,) = torch.autograd.grad(-picked.sum() / 5, leaf)
    torch.testing.assert_close(in_turn[1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits_in_turn[1], logits.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("vectorised", [True, False])
def test_soft_labels_are_logits(stacks: tuple[Tensor, Tensor, Tensor], vectorised: bool) -> None:
    thetas, images, labels = stacks
    certain = 1000 * torch.nn.functional.one_hot(labels, CLASSES).double()  # exp(-1000) is 0 in float64
    hard, _ = ensemble_gradients(network, thetas, images, labels, vectorised)
    soft, _ = ensemble_gradients(network, thetas, images, certain, vectorised)
    torch.testing.assert_close(soft, hard, rtol=1e-12, atol=1e-12)
    logits = torch.randn(certain.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    mixed, _ = ensemble_gradients(network, thetas, images, logits, vectorised)
    leaf = thetas[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(network(leaf, images[0]), logits[0].softmax(1)), leaf)
    torch.testing.assert_close(mixed[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectorised", [True, False])
def test_gradients_come_without_a_graph_even_where_gradients_are_off(
    stacks: tuple[Tensor, Tensor, Tensor], vectorised: bool
) -> None:
    thetas, images, labels = stacks
    with torch.no_grad():
        off, _ = ensemble_gradients(network, thetas, images, labels, vectorised)
    on, logits = ensemble_gradients(network, thetas.requires_grad_(), images.requires_grad_(), labels, vectorised)
    assert torch.equal(on, off)
    assert not on.requires_grad
    assert not logits.requires_grad
    assert thetas.grad is None


def test_sequences_are_stacks(stacks: tuple[Tensor, Tensor, Tensor]) -> None:
    thetas, images, labels = stacks
    for vectorised in (True, False):
        whole, _ = ensemble_gradients(network, thetas, images, labels, vectorised)
        parts, _ = ensemble_gradients(network, list(thetas), list(images), list(labels), vectorised)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_logits_of_all_networks_on_shared_images(stacks: tuple[Tensor, Tensor, Tensor]) -> None:
    thetas, images, _ = stacks
    at_once = ensemble_logits(network, thetas.requires_grad_(), images[0], vectorised=True)
    in_turn = ensemble_logits(network, thetas, images[0], vectorised=False)
    torch.testing.assert_close(at_once, in_turn, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_turn[2], network(thetas[2], images[0]).detach(), rtol=0, atol=0)
    assert not at_once.requires_grad
    assert not in_turn.requires_grad


def test_a_host_batches_small_work_only() -> None:
    assert ensemble_pays("cpu", 4096)
    assert not ensemble_pays("cpu", 4097)
    assert ensemble_pays("cuda", 10**9)
