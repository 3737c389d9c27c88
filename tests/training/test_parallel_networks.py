import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import conv2d, cross_entropy, group_norm, linear

from dd_lightning.execution.compile import compiles
from dd_lightning.execution.precision import Precision, in_precision
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.training.parallel_networks import (
    CompiledNetwork,
    batching_pays,
    images_per_pass,
    parallel_gradients,
    parallel_logits,
)

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
    at_once, logits_at_once = parallel_gradients(network, thetas, images, labels, vectorized=True)
    in_turn, logits_in_turn = parallel_gradients(network, thetas, images, labels, vectorized=False)
    torch.testing.assert_close(at_once, in_turn, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits_at_once, logits_in_turn, rtol=1e-12, atol=1e-12)
    leaf = thetas[1].clone().requires_grad_()
    logits = network(leaf, images[1])
    picked = logits.log_softmax(1)[torch.arange(5), labels[1]]
    (expected,) = torch.autograd.grad(-picked.sum() / 5, leaf)
    torch.testing.assert_close(in_turn[1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits_in_turn[1], logits.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("vectorized", [True, False])
def test_soft_labels_are_logits(stacks: tuple[Tensor, Tensor, Tensor], vectorized: bool) -> None:
    thetas, images, labels = stacks
    certain = 1e4 * torch.nn.functional.one_hot(labels, CLASSES).double()  # its softmax is 0 and 1
    hard, _ = parallel_gradients(network, thetas, images, labels, vectorized)
    soft, _ = parallel_gradients(network, thetas, images, certain, vectorized)
    torch.testing.assert_close(soft, hard, rtol=1e-12, atol=1e-12)
    logits = certain.sin()
    mixed, _ = parallel_gradients(network, thetas, images, logits, vectorized)
    leaf = thetas[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(network(leaf, images[0]), logits[0].softmax(1)), leaf)
    torch.testing.assert_close(mixed[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectorized", [True, False])
def test_gradients_come_without_a_graph_even_where_gradients_are_off(
    stacks: tuple[Tensor, Tensor, Tensor], vectorized: bool
) -> None:
    thetas, images, labels = stacks
    with torch.no_grad():
        off, _ = parallel_gradients(network, thetas, images, labels, vectorized)
    on, logits = parallel_gradients(network, thetas.requires_grad_(), images.requires_grad_(), labels, vectorized)
    assert torch.equal(on, off)
    assert not on.requires_grad
    assert not logits.requires_grad
    assert thetas.grad is None


def test_sequences_are_stacks(stacks: tuple[Tensor, Tensor, Tensor]) -> None:
    thetas, images, labels = stacks
    for vectorized in (True, False):
        whole, _ = parallel_gradients(network, thetas, images, labels, vectorized)
        parts, _ = parallel_gradients(network, list(thetas), list(images), list(labels), vectorized)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_logits_of_all_networks_on_shared_images(stacks: tuple[Tensor, Tensor, Tensor]) -> None:
    thetas, images, _ = stacks
    at_once = parallel_logits(network, thetas.requires_grad_(), images[0], vectorized=True)
    in_turn = parallel_logits(network, thetas, images[0], vectorized=False)
    torch.testing.assert_close(at_once, in_turn, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_turn[2], network(thetas[2], images[0]).detach(), rtol=0, atol=0)
    assert not at_once.requires_grad
    assert not in_turn.requires_grad


def test_a_host_batches_small_work_only() -> None:
    assert batching_pays("cpu", 4096)
    assert not batching_pays("cpu", 4097)
    assert batching_pays("cuda", 10**9)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("piece", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("soft", [True, False])
def test_pieces_add_up_to_the_batch(
    stacks: tuple[Tensor, Tensor, Tensor], vectorized: bool, piece: int, soft: bool
) -> None:
    thetas, images, labels = stacks
    targets = torch.nn.functional.one_hot(labels, CLASSES).double().cos() if soft else labels
    seen: list[int] = []

    def watched(theta: Tensor, batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return network(theta, batch)

    whole = parallel_gradients(network, thetas, images, targets, vectorized)
    found = parallel_gradients(watched, thetas, images, targets, vectorized, piece)
    for value, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    lengths = [min(piece, 5 - start) for start in range(0, 5, piece)]
    assert seen == lengths * (1 if vectorized else 3)


def test_a_piece_of_the_whole_batch_changes_no_bit(stacks: tuple[Tensor, Tensor, Tensor]) -> None:
    thetas, images, labels = (part.float() if part.is_floating_point() else part for part in stacks)
    for vectorized in (True, False):
        whole = parallel_gradients(network, thetas, images, labels, vectorized)
        found = parallel_gradients(network, thetas, images, labels, vectorized, 5)
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("piece", [None, 3])
def test_compiled_gradients_are_the_eager_ones(
    stacks: tuple[Tensor, Tensor, Tensor], vectorized: bool, piece: int | None
) -> None:
    compilations: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compilations.append(graph)
        return aot_autograd(fw_compiler=lambda module, _: module)(graph, inputs)

    ensemble = CompiledNetwork(network, backend)
    thetas, images, labels = stacks
    expected = parallel_gradients(network, thetas, images, labels, vectorized)
    found = parallel_gradients(ensemble, thetas, images, labels, vectorized, piece)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    count = len(compilations)
    assert count == (1 if piece is None else 2)  # of every length of a piece, whatever the number of networks
    # nothing that callers do differently makes it compile again, nor another number
    parameters = [torch.nn.Parameter(theta) for theta in thetas]
    strided = images.transpose(3, 4).contiguous().transpose(3, 4)
    with torch.no_grad():
        again = parallel_gradients(ensemble, parameters, list(strided), list(labels), vectorized, piece)
    assert len(compilations) == count
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert torch.equal(ensemble(thetas[0], images[0]), network(thetas[0], images[0]))


@pytest.mark.parametrize(
    ("name", "shape", "precision", "expected"),
    [
        ("ConvNet-3", (3, 32, 32), "float32", 16),
        ("ConvNet-3", (3, 32, 32), "bfloat16", 32),
        ("ConvNet-3-W32", (3, 32, 32), "float32", 64),
        ("ConvNet-3-W32", (1, 8, 8), "float32", 256),
        ("VGG-11", (3, 32, 32), "float32", 256),  # its weights alone are 35 MiB
    ],
)
def test_images_of_a_pass_follow_from_shapes(
    name: str, shape: tuple[int, int, int], precision: Precision, expected: int
) -> None:
    convnet = FunctionalNetwork(name, shape, 10)
    logits = in_precision(convnet, precision)
    assert images_per_pass(logits, convnet.num_parameters, shape, 256) == expected
    assert images_per_pass(logits, convnet.num_parameters, shape, 7) == 7
    # without a gradient, a pass holds less
    assert images_per_pass(logits, convnet.num_parameters, shape, 512, forward=True) >= min(512, 2 * expected)


def test_auto_compiles_long_work_on_cuda_alone() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [compiles("auto", cuda, steps) for steps in (49_999, 50_000)] == [False, True]
    assert not compiles("auto", cpu, 10**9)
    assert compiles("on", cpu, 1)
    assert not compiles("off", cuda, 10**9)
    torch.use_deterministic_algorithms(True)
    try:
        assert not compiles("auto", cuda, 10**9)
    finally:
        torch.use_deterministic_algorithms(False)
