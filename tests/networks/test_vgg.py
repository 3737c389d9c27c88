import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dd_lightning.networks import build_network, known_names
from tests.networks.zoo_checks import (
    check_builds_and_runs,
    check_canonical,
    check_features,
    check_mixed_product,
    check_one_line_error,
    conv_weights,
    count,
    normalized,
    random_network,
)


@pytest.mark.parametrize("suffix", ["", "-BN"])
@pytest.mark.parametrize(("classes", "expected"), [(10, 9_231_114), (100, 9_277_284)])
def test_parameter_counts_of_the_reference(suffix: str, classes: int, expected: int) -> None:
    with torch.device("meta"):
        network = build_network(f"VGG-11{suffix}", 3, classes, (32, 32))
    assert count(network) == expected
    assert len(conv_weights(network)) == 8


def reference_logits(parameters: list[Tensor], images: Tensor, batch: bool, padding: int = 1) -> Tensor:
    weights = iter(parameters[:-2])
    x = images
    for layer in range(8):
        x = F.conv2d(x, next(weights), next(weights), padding=1 if layer else padding)
        x = normalized(x, weights, batch).clamp(min=0)
        if layer in {0, 1, 3, 5, 7}:
            x = F.max_pool2d(x, 2)
    assert next(weights, None) is None
    return x.flatten(1) @ parameters[-2].T + parameters[-1]


@pytest.mark.parametrize("suffix", ["", "-BN"])
@pytest.mark.parametrize(("size", "padding"), [((32, 32), 1), ((28, 28), 3), ((33, 64), 1)])
def test_logits_equal_the_definition(suffix: str, size: tuple[int, int], padding: int) -> None:
    network = random_network(f"VGG-11-W4{suffix}", 2, size)
    images = torch.randn(3, 2, *size, dtype=torch.float64)
    expected = reference_logits(list(network.parameters()), images, suffix == "-BN", padding)
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("VGG-11", 1, (28, 28)), ("VGG-11-W8-BN", 3, (64, 64)), ("VGG-11-W8", 5, (40, 70))],
)
def test_any_image_size_of_32_pixels_or_more(name: str, channels: int, size: tuple[int, int]) -> None:
    check_builds_and_runs(name, channels, size)


@pytest.mark.parametrize(
    ("said", "canonical"), [("VGG-11-IN-W64", "VGG-11"), ("VGG-011", "VGG-11"), ("VGG-11-BN-W08", "VGG-11-W8-BN")]
)
def test_names_are_canonical(said: str, canonical: str) -> None:
    check_canonical(said, canonical)


@pytest.mark.parametrize("suffix", ["", "-BN"])
def test_mixed_product_equals_a_finite_difference(suffix: str) -> None:
    check_mixed_product(f"VGG-11-W2{suffix}", (1, 32, 32))


def test_features_are_what_the_classifier_is_given() -> None:
    check_features("VGG-11-W4", (2, 32, 64), 64)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("VGG", 32, r"'VGG' has no depth: the form is VGG-11\[-W<width>\]"),
        ("VGG-16", 32, r"'VGG-16' has depth 16: use 11; the form is"),
        ("VGG-11-GN", 32, r"has the unknown suffix 'GN': the form is VGG-11"),
        ("VGG-11-IN-BN", 32, r"gives its norm twice: keep one of IN and BN"),
        ("VGG-11-W0", 32, r"VGG width=0 must be at least 1"),
        ("VGG-11", 8, r"VGG leaves no pixel of 8 x 8 images: use images of at least 32 x 32"),
    ],
)
def test_errors(name: str, size: int, message: str) -> None:
    check_one_line_error(name, message, (size, size))


def test_known_names_lists_the_family() -> None:
    assert any(name.startswith("VGG-11[") for name in known_names())
