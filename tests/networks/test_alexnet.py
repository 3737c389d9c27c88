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
    random_network,
)


@pytest.mark.parametrize(("size", "channels"), [(32, 3), (28, 3)])
@pytest.mark.parametrize(("classes", "expected"), [(10, 1_872_202), (100, 2_148_772)])
def test_parameter_counts_of_the_reference(size: int, channels: int, classes: int, expected: int) -> None:
    with torch.device("meta"):
        network = build_network("AlexNet", channels, classes, (size, size))
    assert count(network) == expected
    assert len(conv_weights(network)) == 5


def reference_logits(parameters: list[Tensor], images: Tensor, padding: int = 2) -> Tensor:
    first, second, third, fourth, fifth = zip(parameters[:10:2], parameters[1:10:2], strict=True)
    x = F.max_pool2d(F.conv2d(images, *first, padding=padding).clamp(min=0), 2)
    x = F.max_pool2d(F.conv2d(x, *second, padding=2).clamp(min=0), 2)
    for kernel, bias in (third, fourth, fifth):
        x = F.conv2d(x, kernel, bias, padding=1).clamp(min=0)
    return F.max_pool2d(x, 2).flatten(1) @ parameters[-2].T + parameters[-1]


@pytest.mark.parametrize(("channels", "size", "padding"), [(1, (8, 8), 2), (1, (28, 28), 4), (3, (9, 17), 2)])
def test_logits_equal_the_definition(channels: int, size: tuple[int, int], padding: int) -> None:
    network = random_network("AlexNet", channels, size)
    images = torch.randn(2, channels, *size, dtype=torch.float64)
    expected = reference_logits(list(network.parameters()), images, padding)
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (1, (28, 28)), (3, (64, 64)), (5, (9, 20))])
def test_any_image_size(channels: int, size: tuple[int, int]) -> None:
    check_builds_and_runs("AlexNet", channels, size)


def test_name_is_canonical() -> None:
    check_canonical("AlexNet", "AlexNet")


def test_mixed_product_equals_a_finite_difference() -> None:
    check_mixed_product("AlexNet", (1, 8, 8), batch=2)


def test_features_are_what_the_classifier_is_given() -> None:
    check_features("AlexNet", (2, 8, 16), 192 * 2)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("AlexNet-BN", 32, r"'AlexNet-BN' has the unknown suffix 'BN': the form is AlexNet$"),
        ("AlexNet", 7, r"AlexNet leaves no pixel of 7 x 7 images: use images of at least 8 x 8"),
    ],
)
def test_errors(name: str, size: int, message: str) -> None:
    check_one_line_error(name, message, (size, size))


def test_known_names_lists_the_family() -> None:
    assert "AlexNet" in known_names()
