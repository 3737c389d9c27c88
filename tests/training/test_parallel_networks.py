from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import cross_entropy

from dd_lightning.execution.compile import compiles
from dd_lightning.execution.precision import Precision
from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.training import parallel_networks
from dd_lightning.training.parallel_networks import Passes, batching_pays, images_per_pass, piece_of

WIDTH, CLASSES = 3, 4
seen: list[int] = []


def plain(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Sequential:
    convolution = nn.Conv2d(channels, WIDTH, 3, padding=1, bias=False)
    head = nn.Linear(WIDTH * image_size[0] * image_size[1], num_classes)
    return nn.Sequential(convolution, nn.GroupNorm(WIDTH, WIDTH), nn.ReLU(), nn.Flatten(), head)


def watched(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Like ``plain``, and notes how many images pass."""
    module = plain(channels, num_classes, image_size)
    module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return module


network = FunctionalNetwork(plain, (2, 6, 6), CLASSES)


@pytest.fixture
def stacks() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    thetas = torch.randn(3, network.num_parameters, generator=generator, dtype=torch.float64)
    images = torch.randn(3, 5, 2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (3, 5), generator=generator)
    return thetas, images, labels


def test_both_modes_give_the_gradient_of_the_mean_cross_entropy(
    stacks: tuple[Tensor, Tensor, Tensor],
) -> None:
    thetas, images, labels = stacks
    at_once, logits_at_once, _ = Passes(network, vectorized=True).gradients(thetas, images, labels)
    in_turn, logits_in_turn, _ = Passes(network, vectorized=False).gradients(thetas, images, labels)
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
    hard, *_ = Passes(network, vectorized=vectorized).gradients(thetas, images, labels)
    soft, *_ = Passes(network, vectorized=vectorized).gradients(thetas, images, certain)
    torch.testing.assert_close(soft, hard, rtol=1e-12, atol=1e-12)
    logits = certain.sin()
    mixed, *_ = Passes(network, vectorized=vectorized).gradients(thetas, images, logits)
    leaf = thetas[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(network(leaf, images[0]), logits[0].softmax(1)), leaf)
    torch.testing.assert_close(mixed[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectorized", [True, False])
def test_gradients_come_without_a_graph_even_where_gradients_are_off(
    stacks: tuple[Tensor, Tensor, Tensor], vectorized: bool
) -> None:
    thetas, images, labels = stacks
    with torch.no_grad():
        off, *_ = Passes(network, vectorized=vectorized).gradients(thetas, images, labels)
    on, logits, _ = Passes(network, vectorized=vectorized).gradients(
        thetas.requires_grad_(), images.requires_grad_(), labels
    )
    assert torch.equal(on, off)
    assert not on.requires_grad
    assert not logits.requires_grad
    assert thetas.grad is None


def test_sequences_are_stacks(stacks: tuple[Tensor, Tensor, Tensor]) -> None:
    thetas, images, labels = stacks
    for vectorized in (True, False):
        whole, *_ = Passes(network, vectorized=vectorized).gradients(thetas, images, labels)
        parts, *_ = Passes(network, vectorized=vectorized).gradients(list(thetas), list(images), list(labels))
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_logits_of_all_networks_on_shared_images(stacks: tuple[Tensor, Tensor, Tensor]) -> None:
    thetas, images, _ = stacks
    at_once = Passes(network, vectorized=True).logits(thetas.requires_grad_(), images[0])
    in_turn = Passes(network, vectorized=False).logits(thetas, images[0])
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
    whole = Passes(network, vectorized=vectorized).gradients(thetas, images, targets)
    tested = FunctionalNetwork(watched, (2, 6, 6), CLASSES)
    seen.clear()  # its own check when it is made
    found = Passes(tested, vectorized=vectorized, piece=piece).gradients(thetas, images, targets)
    for value, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    lengths = [min(piece, 5 - start) for start in range(0, 5, piece)]
    assert seen == lengths * (1 if vectorized else 3)


def test_a_piece_of_the_whole_batch_changes_no_bit(stacks: tuple[Tensor, Tensor, Tensor]) -> None:
    thetas, images, labels = (part.float() if part.is_floating_point() else part for part in stacks)
    for vectorized in (True, False):
        whole = Passes(network, vectorized=vectorized).gradients(thetas, images, labels)
        found = Passes(network, vectorized=vectorized, piece=5).gradients(thetas, images, labels)
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("piece", [None, 3])
def test_compiled_gradients_are_the_eager_ones(
    stacks: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, vectorized: bool, piece: int | None
) -> None:
    compilations, calls = list[object](), 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compilations.append(graph)
        function = aot_autograd(fw_compiler=lambda module, _: module)(graph, inputs)

        def run(*args: Any) -> Any:  # noqa: ANN401
            nonlocal calls
            calls += 1
            return function(*args)

        return run

    monkeypatch.setattr(parallel_networks, "BACKEND", backend)
    thetas, images, labels = stacks
    passes = Passes(network, vectorized=vectorized, piece=piece)
    expected = passes.gradients(thetas, images, labels)
    passes.compile("off", 10**9, (images[0], labels[0]), 5, [3], "a test")
    assert not passes.is_compiled
    passes.compile("on", 1, (images[0], labels[0]), 5, [3], "a test")
    assert passes.is_compiled
    count = len(compilations)
    assert count == (1 if piece is None else 2)  # of every length of a piece, whatever the number of networks
    calls = 0
    found = passes.gradients(thetas, images, labels)
    assert calls == (1 if vectorized else 3) * count
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    # nothing that callers do differently makes it compile again, nor another number
    parameters = [nn.Parameter(theta) for theta in thetas]
    strided = images.transpose(3, 4).contiguous().transpose(3, 4)
    with torch.no_grad():
        again = passes.gradients(parameters, list(strided), list(labels))
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    # and what it was not compiled for is eager
    calls = 0
    short = passes.gradients(thetas, images[:, :1], labels[:, :1])
    assert calls == 0
    eager = Passes(network, vectorized=vectorized).gradients(thetas, images[:, :1], labels[:, :1])
    assert all(torch.equal(a, b) for a, b in zip(short, eager, strict=True))
    assert len(compilations) == count


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
    assert images_per_pass(convnet, 256, precision) == expected
    assert images_per_pass(convnet, 7, precision) == 7
    # without a gradient, a pass holds less
    assert images_per_pass(convnet, 512, precision, forward=True) >= min(512, 2 * expected)


def test_automatic_pieces_are_of_hosts_and_of_networks_without_batch_norm() -> None:
    convnet, batch_norm = (FunctionalNetwork(f"ConvNet-3{norm}", (3, 32, 32), 10) for norm in ("", "-BN"))
    assert piece_of(convnet, "auto", 256, "cpu") == 16
    assert piece_of(convnet, "auto", 256, "cuda") == 256
    assert piece_of(batch_norm, "auto", 256, "cpu") == 256
    assert piece_of(convnet, "auto", 256, "cpu", "bfloat16") == 32
    assert piece_of(convnet, None, 256, "cpu") == 256
    assert piece_of(convnet, 3, 256, "cuda") == 3
    assert piece_of(batch_norm, 256, 256, "cpu") == 256
    with pytest.raises(
        InputError, match=r"micro_batch is 255, .* needs all 256 images .*; set execution\.micro_batch: null"
    ):
        piece_of(batch_norm, 255, 256, "cpu")


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
