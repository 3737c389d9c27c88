import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import ResNet, build_network, known_names
from tests.networks.zoo_checks import (
    check_builds_and_runs,
    check_canonical,
    check_features,
    check_mixed_product,
    check_one_line_error,
    conv_weights,
    count,
    halved,
    normalized,
    random_network,
)


@pytest.mark.parametrize("suffix", ["", "-AP", "-IN", "-IN-AP"])
@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("ResNet-10", 10, 1_228_970),
        ("ResNet-10", 100, 1_252_100),
        ("ResNet-18", 10, 2_797_610),
        ("ResNet-18", 100, 2_820_740),
        ("ResNet-18-W64", 10, 11_173_962),
        ("ResNet-18-W64", 100, 11_220_132),
    ],
)
def test_parameter_counts_of_the_references(name: str, suffix: str, classes: int, expected: int) -> None:
    with torch.device("meta"):
        assert count(build_network(name + suffix, 3, classes, (32, 32))) == expected


@pytest.mark.parametrize(("name", "tensors", "weights"), [("ResNet-10", 12, 1_223_520), ("ResNet-18", 20, 2_790_240)])
def test_convolutions_of_the_reference(name: str, tensors: int, weights: int) -> None:
    network = build_network(name, 3, 10, (32, 32))
    assert len(conv_weights(network)) == tensors
    assert sum(weight.numel() for weight in conv_weights(network)) == weights
    for weight in conv_weights(network):
        out, _, height, width = weight.shape
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (out * height * width)), rel=0.1)
        assert abs(weight.mean().item()) < 0.1 * weight.std().item()
    assert all(module.bias is None for module in network.modules() if isinstance(module, nn.Conv2d))


def reference_logits(parameters: list[Tensor], images: Tensor, blocks: int, batch: bool, average: bool) -> Tensor:
    weights = iter(parameters[:-2])
    x = normalized(F.conv2d(images, next(weights), padding=1), weights, batch).clamp(min=0)
    for stage in range(4):
        for block in range(blocks):
            halve = stage > 0 and block == 0
            stride = 2 if halve and not average else 1
            y = F.conv2d(x, next(weights), stride=stride, padding=1)
            y = normalized(y, weights, batch).clamp(min=0)
            if halve and average:
                y = halved(y)
            y = normalized(F.conv2d(y, next(weights), padding=1), weights, batch)
            if halve:
                x = F.conv2d(x, next(weights), stride=stride)
                x = normalized(halved(x) if average else x, weights, batch)
            x = (x + y).clamp(min=0)
    assert next(weights, None) is None
    return x.mean((2, 3)) @ parameters[-2].T + parameters[-1]


@pytest.mark.parametrize("depth", [10, 18])
@pytest.mark.parametrize("suffix", ["", "-IN", "-AP", "-IN-AP"])
def test_logits_equal_the_definition(depth: int, suffix: str) -> None:
    network = random_network(f"ResNet-{depth}-W4{suffix}", 2, (16, 24))
    images = torch.randn(3, 2, 16, 24, dtype=torch.float64)
    blocks = {10: 1, 18: 2}[depth]
    expected = reference_logits(list(network.parameters()), images, blocks, "IN" not in suffix, "AP" in suffix)
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (1, (28, 28)), (3, (64, 64)), (3, (9, 20)), (2, (3, 1))])
def test_any_image_size(channels: int, size: tuple[int, int]) -> None:
    check_builds_and_runs("ResNet-10-W4", channels, size)


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (1, (28, 28)), (3, (9, 20))])
def test_average_pooling_rounds_down(channels: int, size: tuple[int, int]) -> None:
    check_builds_and_runs("ResNet-18-W4-AP", channels, size)


@pytest.mark.parametrize(
    ("said", "canonical"),
    [
        ("ResNet-10", "ResNet-10"),
        ("ResNet-10-BN-W32", "ResNet-10"),
        ("ResNet-18-AP-IN-W064", "ResNet-18-W64-IN-AP"),
        ("ResNet-010-AP", "ResNet-10-AP"),
    ],
)
def test_names_are_canonical(said: str, canonical: str) -> None:
    check_canonical(said, canonical)


@pytest.mark.parametrize("suffix", ["", "-IN", "-AP"])
def test_mixed_product_equals_a_finite_difference(suffix: str) -> None:
    check_mixed_product(f"ResNet-10-W4{suffix}", (2, 9, 9))
    if suffix != "-IN":
        check_mixed_product(f"ResNet-10-W4{suffix}", (1, 8, 8))


@pytest.mark.parametrize("name", ["ResNet-10-W4", "ResNet-10-W4-IN-AP"])
def test_features_are_what_the_classifier_is_given(name: str) -> None:
    check_features(name, (2, 16, 24), 32)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("ResNet", 32, r"'ResNet' has no depth: the form is ResNet-10\|18\[-W"),
        ("ResNet-W4", 32, r"'ResNet-W4' has no depth"),
        ("ResNet-50", 32, r"'ResNet-50' has depth 50: use 10 or 18; the form is ResNet-10\|18"),
        ("ResNet-10-GN", 32, r"'ResNet-10-GN' has the unknown suffix 'GN': the form is ResNet-10\|18"),
        ("ResNet-10-IN-BN", 32, r"gives its norm twice: keep one of IN and BN"),
        ("ResNet-10-AP-AP", 32, r"gives its downsampling twice"),
        ("ResNet-10-", 32, r"has the unknown suffix ''"),
        ("ResNet-10-W0", 32, r"ResNet width=0 must be at least 1"),
        ("ResNet-10-AP", 7, r"ResNet leaves no pixel of 7 x 7 images: use images of at least 8 x 8"),
        ("ResNet-10-IN", 8, r"leaves one pixel of 8 x 8 images, which instance norm makes zero: use batch norm or"),
        ("ResNet-10-IN-AP", 15, r"leaves one pixel of 15 x 15 images, which instance norm makes zero"),
    ],
)
def test_errors(name: str, size: int, message: str) -> None:
    check_one_line_error(name, message, (size, size))


def test_unknown_depth_of_the_class() -> None:
    with pytest.raises(InputError, match="ResNet depth=34 is unknown: use 10 or 18"):
        ResNet(3, 10, (32, 32), depth=34)


def test_known_names_lists_the_family() -> None:
    assert any(name.startswith("ResNet-10|18") for name in known_names())
