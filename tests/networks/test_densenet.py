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
    halved,
    normalized,
    random_network,
)


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("DenseNet-121", 10, 1_000_618),
        ("DenseNet-121", 100, 1_035_268),
        ("DenseNet-121-IN", 10, 1_000_618),
        ("DenseNet-121-G32", 10, 6_956_298),
        ("DenseNet-121-G32", 100, 7_048_548),
    ],
)
def test_parameter_counts_of_the_reference(name: str, classes: int, expected: int) -> None:
    with torch.device("meta"):
        assert count(build_network(name, 3, classes, (32, 32))) == expected


def test_convolutions_of_the_reference() -> None:
    with torch.device("meta"):
        weights = conv_weights(build_network("DenseNet-121", 3, 10, (32, 32)))
    assert len(weights) == 120
    assert sum(weight.numel() for weight in weights) == 965_448
    assert weights[0].shape == (24, 3, 3, 3)


def reference_logits(parameters: list[Tensor], images: Tensor, batch: bool) -> Tensor:
    weights = iter(parameters[:-2])

    def convolved(x: Tensor, padding: int) -> Tensor:
        return F.conv2d(normalized(x, weights, batch).clamp(min=0), next(weights), padding=padding)

    x = F.conv2d(images, next(weights), padding=1)
    for block, layers in enumerate((6, 12, 24, 16)):
        if block > 0:
            x = halved(convolved(x, 0))
        for _ in range(layers):
            x = torch.cat([convolved(convolved(x, 0), 1), x], 1)
    x = normalized(x, weights, batch).clamp(min=0)
    assert next(weights, None) is None
    return x.mean((2, 3)) @ parameters[-2].T + parameters[-1]


@pytest.mark.parametrize("suffix", ["", "-IN"])
def test_logits_equal_the_definition(suffix: str) -> None:
    network = random_network(f"DenseNet-121-G3{suffix}", 2, (16, 8))
    images = torch.randn(3, 2, 16, 8, dtype=torch.float64)
    expected = reference_logits(list(network.parameters()), images, suffix == "")
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("DenseNet-121", 1, (8, 8)),
        ("DenseNet-121", 1, (28, 28)),
        ("DenseNet-121-G1", 3, (64, 64)),
        ("DenseNet-121-G2-IN", 3, (9, 20)),
    ],
)
def test_any_image_size(name: str, channels: int, size: tuple[int, int]) -> None:
    check_builds_and_runs(name, channels, size)


@pytest.mark.parametrize(
    ("said", "canonical"),
    [
        ("DenseNet-121", "DenseNet-121"),
        ("DenseNet-121-BN-G12", "DenseNet-121"),
        ("DenseNet-121-IN-G032", "DenseNet-121-G32-IN"),
    ],
)
def test_names_are_canonical(said: str, canonical: str) -> None:
    check_canonical(said, canonical)


def test_mixed_product_equals_a_finite_difference() -> None:
    check_mixed_product("DenseNet-121-G2", (2, 8, 8), batch=8)


@pytest.mark.parametrize(("growth", "length"), [(2, 64), (12, 384)])
def test_features_are_what_the_classifier_is_given(growth: int, length: int) -> None:
    check_features(f"DenseNet-121-G{growth}", (1, 8, 8), length)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("DenseNet", 32, r"'DenseNet' has no depth: the form is DenseNet-121\[-G<growth>\]"),
        ("DenseNet-169", 32, r"'DenseNet-169' has depth 169: use 121; the form is"),
        ("DenseNet-121-W8", 32, r"has the unknown suffix 'W8': the form is DenseNet-121\[-G"),
        ("DenseNet-121-G2-G3", 32, r"gives its growth twice: keep one of G2 and G3"),
        ("DenseNet-121-G0", 32, r"DenseNet growth=0 must be at least 1"),
        ("DenseNet-121", 7, r"DenseNet leaves no pixel of 7 x 7 images: use images of at least 8 x 8"),
        ("DenseNet-121-IN", 8, r"leaves one pixel of 8 x 8 images, which instance norm makes zero"),
    ],
)
def test_errors(name: str, size: int, message: str) -> None:
    check_one_line_error(name, message, (size, size))


def test_known_names_lists_the_family() -> None:
    assert any(name.startswith("DenseNet-121[") for name in known_names())
