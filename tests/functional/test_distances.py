"""Distances against loops over single numbers, and one step per iteration against stepping once per class."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dd_lightning.functional.distances import (
    Metric,
    compared_layers,
    gradient_distance,
    step_per_iteration,
    tensor_distance,
)
from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork

METRICS: list[Metric] = ["mse", "l1", "l1_mean", "cos"]
SHAPES = [(5, 3, 3, 3), (4, 5, 1, 1), (4, 6), (7,), (3, 4, 2)]
EPS = 1e-6


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return first, second


def rows_of(tensor: Tensor) -> list[list[float]]:
    """Return the numbers of each output of a layer; a vector is one row."""
    if tensor.ndim == 1:
        return [tensor.tolist()]
    return [tensor[index].reshape(-1).tolist() for index in range(len(tensor))]


def slow_distance(first: Tensor, second: Tensor, metric: Metric) -> float:
    total = 0.0
    for a, b in zip(rows_of(first), rows_of(second), strict=True):
        pairs = list(zip(a, b, strict=True))
        if metric == "mse":
            total += sum((x - y) ** 2 for x, y in pairs)
        elif metric == "l1":
            total += sum(abs(x - y) for x, y in pairs)
        elif metric == "l1_mean":
            total += sum(abs(x - y) for x, y in pairs) / len(pairs)
        else:
            norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
            total += 1 - sum(x * y for x, y in pairs) / (norms + EPS)
    return total


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_distance_is_the_loop_over_filters(metric: Metric, shape: tuple[int, ...]) -> None:
    first, second = pair(shape)
    found = tensor_distance(first, second, metric)
    assert found.shape == ()
    assert float(found) == pytest.approx(slow_distance(first, second, metric), rel=1e-13)


@pytest.mark.parametrize("metric", METRICS)
def test_distance_of_gradients_is_the_sum_over_layers(metric: Metric) -> None:
    layers = [pair(shape, seed) for seed, shape in enumerate(SHAPES)]
    synthetic, real = [first for first, _ in layers], [second for _, second in layers]
    slow = sum(slow_distance(first, second, metric) for first, second in layers)
    assert float(gradient_distance(synthetic, real, metric)) == pytest.approx(slow, rel=1e-13)
    with pytest.raises(ValueError, match="shorter"):
        gradient_distance(synthetic, real[:-1], metric)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_distance_at_equality(metric: Metric, shape: tuple[int, ...]) -> None:
    point = pair(shape)[0]
    leaf = point.clone().requires_grad_()
    value = tensor_distance(leaf, point, metric)
    (slope,) = torch.autograd.grad(value, leaf)
    if metric != "cos":
        assert float(value.detach()) == 0
        assert float(slope.abs().max()) == 0
        return
    # n^2 / (n^2 + eps) for each row of norm n; its derivative is not quite 0 either.
    rows = point.flatten(1) if point.ndim > 1 else point[None]
    squares = rows.square().sum(1)
    assert float(value.detach()) == pytest.approx(float((EPS / (squares + EPS)).sum()), rel=1e-8)
    expected = -rows * (EPS / (squares + EPS) ** 2)[:, None]
    torch.testing.assert_close(slope.view_as(rows), expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaling_laws(shape: tuple[int, ...]) -> None:
    first, second = pair(shape)
    rows = len(rows_of(first))

    def value(metric: Metric, a: float, b: float) -> float:
        return float(tensor_distance(a * first, b * second, metric))

    for metric in METRICS:
        assert value(metric, 1, 1) == pytest.approx(float(tensor_distance(second, first, metric)), rel=1e-14)
    assert value("mse", -3, -3) == pytest.approx(9 * value("mse", 1, 1), rel=1e-14)
    assert value("l1", -3, -3) == pytest.approx(3 * value("l1", 1, 1), rel=1e-14)
    assert value("l1_mean", -3, -3) == pytest.approx(3 * value("l1_mean", 1, 1), rel=1e-14)
    # The cosine knows directions only: exactly where the product of norms is kept, else up to eps.
    assert value("cos", 8, 1 / 8) == pytest.approx(value("cos", 1, 1), rel=1e-14)
    assert value("cos", 5, 2) == pytest.approx(value("cos", 1, 1), abs=rows * 1e-4)
    assert value("cos", -1, 1) == pytest.approx(2 * rows - value("cos", 1, 1), rel=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_derivative_is_that_of_finite_differences(metric: Metric, shape: tuple[int, ...]) -> None:
    first, second = pair(shape)
    assert float((first - second).abs().min()) > 1e-4  # away from the kinks of l1
    assert torch.autograd.gradcheck(
        lambda a, b: tensor_distance(a, b, metric), (first.requires_grad_(), second.requires_grad_())
    )


def test_cosine_of_rows_that_are_zero() -> None:
    first, second = pair((4, 3, 2, 2))
    first[[0, 2]] = 0
    second[[1, 2]] = 0
    first.requires_grad_()
    second.requires_grad_()
    value = tensor_distance(first, second, "cos")
    alone = tensor_distance(first[3:], second[3:], "cos")
    assert float(value.detach()) == pytest.approx(3 + float(alone.detach()), rel=1e-14)
    assert float(value.detach()) == pytest.approx(slow_distance(first.detach(), second.detach(), "cos"), rel=1e-14)
    for slope, expected in zip(
        torch.autograd.grad(value, (first, second)), torch.autograd.grad(alone, (first, second)), strict=True
    ):
        assert torch.equal(slope[:3], torch.zeros_like(slope[:3]))  # also where the other row is not zero
        torch.testing.assert_close(slope[3], expected[3], rtol=1e-14, atol=0)
        assert float(slope[3].norm()) > 0
    nothing = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(tensor_distance(nothing, torch.ones(5).double(), "cos"), nothing)
    assert torch.equal(slope, torch.zeros(5).double())


def chosen(name: str, include_classifier: bool, include_bias: bool) -> tuple[list[str], int]:
    """Return the names of the parameters that are compared, and how many numbers these are."""
    network = FunctionalNetwork(name, (3, 32, 32), 10)
    layers = compared_layers(network.parameter_shapes, include_classifier, include_bias)
    numbers = sum(math.prod(network.parameter_shapes[index]) for index in layers)
    return [network.parameter_names[index] for index in layers], numbers


def test_layers_of_convnet_that_are_compared() -> None:
    convolutions = ["features.0.weight", "features.4.weight", "features.8.weight"]
    assert chosen("ConvNet-3", False, False) == (convolutions, 298_368)
    assert chosen("ConvNet-3", True, False) == ([*convolutions, "classifier.weight"], 298_368 + 20_480)
    names, numbers = chosen("ConvNet-3", False, True)
    assert len(names) == 13
    assert "classifier.weight" not in names
    assert "classifier.bias" in names
    assert numbers == 298_368 + 3 * 3 * 128 + 10
    assert chosen("ConvNet-3", True, True)[1] == 320_010  # all of it


def test_gains_of_layer_norm_are_compared_channel_by_channel() -> None:
    # [C, H, W], which DC and IDC compare too: they leave out vectors only
    assert "features.1.weight" in chosen("ConvNet-3-W8-LN", False, False)[0]


def test_nothing_to_compare() -> None:
    with pytest.raises(InputError, match="none of the network's 2 parameters is a convolution") as raised:
        compared_layers([(10, 20), (10,)], include_classifier=False, include_bias=False)
    assert "include_classifier: true" in str(raised.value)
    assert compared_layers([(10, 20), (10,)], include_classifier=True, include_bias=False) == (0,)


ITERATIONS, LR = 50, 0.004


def energies(classes: int) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
    """Return where images start, [C, n], and a loss of a class's own images, quartic in them."""
    generator = torch.Generator().manual_seed(1)
    start, targets = 2 * torch.randn(2, classes, 6, generator=generator, dtype=torch.float64)

    def energy(images: Tensor, label: int) -> Tensor:
        away = images[label] - targets[label]
        value: Tensor = (away**4).sum() / 4 + (away.sum() ** 2) * (away**2).sum() / 60 + (away[0] * away[1]) ** 2
        return value

    return start, energy


class PerIteration:
    """SGD that takes one step of all classes together."""

    def __init__(self, classes: int, lr: float, momentum: float) -> None:
        start, energy = energies(classes)
        images = start.clone().requires_grad_()
        sgd = torch.optim.SGD([images], lr=lr, momentum=momentum)
        at_gradient, at_end, velocity = torch.empty(3, ITERATIONS, *start.shape, dtype=torch.float64)
        for iteration in range(ITERATIONS):
            at_gradient[iteration] = images.detach()
            sgd.zero_grad()
            torch.stack([energy(images, label) for label in range(classes)]).sum().backward()
            sgd.step()
            at_end[iteration] = images.detach()
            velocity[iteration] = sgd.state[images]["momentum_buffer"]
        self.at_gradient, self.at_end, self.velocity = at_gradient, at_end, velocity


class PerClass:
    """The references: SGD over the whole tensor is stepped after each class."""

    def __init__(self, classes: int, lr: float, momentum: float) -> None:
        start, energy = energies(classes)
        images = start.clone().requires_grad_()
        sgd = torch.optim.SGD([images], lr=lr, momentum=momentum)
        at_gradient, at_end = torch.empty(2, ITERATIONS, *start.shape, dtype=torch.float64)
        for iteration in range(ITERATIONS):
            for label in range(classes):
                at_gradient[iteration, label] = images.detach()[label]
                sgd.zero_grad()
                energy(images, label).backward()
                sgd.step()
            at_end[iteration] = images.detach()
        self.at_gradient, self.at_end = at_gradient, at_end


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("classes", [3, 10])
def test_one_step_per_iteration_equals_a_step_per_class(classes: int, momentum: float) -> None:
    reference = PerClass(classes, LR, momentum)
    joint = PerIteration(classes, *step_per_iteration(LR, momentum, classes))
    naive = PerIteration(classes, LR, momentum)
    assert float((joint.at_gradient - reference.at_gradient).abs().max()) < 1e-10
    assert float((naive.at_gradient - reference.at_gradient).abs().max()) > 1e-3
    assert float((reference.at_gradient[-1] - reference.at_gradient[0]).abs().min()) > 1e-3  # all of them moved
    # At the end of an iteration class c has coasted for C - c of the C turns that make up its step.
    difference = reference.at_end - joint.at_end
    speed = LR * joint.velocity
    turns = torch.arange(classes, 0, -1, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        difference, speed * (momentum**turns - momentum**classes) / (1 - momentum), rtol=0, atol=1e-10
    )
    assert bool((difference.abs() <= speed.abs() * momentum / (1 - momentum) + 1e-10).all())
    assert float(difference[:, 0].abs().max()) < 1e-10
    assert float(difference[0, 1:].abs().min()) > 1e-6


def test_step_per_iteration_without_momentum_or_with_one_class_is_the_same_step() -> None:
    assert step_per_iteration(0.3, 0.0, 10) == (0.3, 0.0)
    assert step_per_iteration(0.3, 0.75, 1) == (0.3, 0.75)
    lr, momentum = step_per_iteration(0.005, 0.5, 100)
    assert lr == pytest.approx(0.01, rel=1e-12)
    assert 0 < momentum < 1e-30
