"""The families of networks for small images, against definitions of their own and the references' numbers."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import ConvNet, ResNet, build_network, known_names
from tests.networks.checks import (
    check_builds_and_runs,
    check_canonical,
    check_features,
    check_mixed_product,
    check_one_line_error,
    conv_weights,
    count,
)

Definition = Callable[[Iterator[Tensor], Tensor, "Norm"], Tensor]
"""(parameters before the last layer, images, norm) -> what the last layer is given."""
Norm = Callable[[Tensor, Iterator[Tensor]], Tensor]


def test_every_family_is_tested() -> None:
    families = {re.split("[-/]", form)[0] for form in known_names()} - {"torchvision", "timm"}
    assert families == {"ConvNet", "AlexNet", "VGG", "ResNet", "DenseNet"}
    for cases in (COUNTS, RUNS, NAMES, PRODUCTS, FEATURES, ERRORS, LOGITS):
        assert {str(case[0]).partition("-")[0] for case in cases} == families


COUNTS = [
    ("ConvNet-3", 32, 10, 320_010),
    ("ConvNet-3", 32, 100, 504_420),
    ("ConvNet-1", 32, 10, 331_530),
    ("ConvNet-2", 32, 10, 233_610),
    ("ConvNet-4", 32, 10, 452_490),
    ("ConvNet-4", 32, 100, 498_660),
    ("ConvNet-4", 64, 200, 857_160),
    ("ConvNet-3", 64, 200, 1_938_120),
    ("ConvNet-5", 128, 10, 615_690),
    ("ConvNet-3-W32", 32, 10, 24_714),
    ("ConvNet-3-W64", 32, 10, 86_282),
    ("ConvNet-3-W256", 32, 10, 1_229_834),
    *(("AlexNet", size, classes, n) for size in (28, 32) for classes, n in ((10, 1_872_202), (100, 2_148_772))),
    *((f"VGG-11{bn}", 32, classes, n) for bn in ("", "-BN") for classes, n in ((10, 9_231_114), (100, 9_277_284))),
    *(
        (name + suffix, 32, classes, n)
        for suffix in ("", "-AP", "-IN", "-IN-AP")
        for name, classes, n in (
            ("ResNet-10", 10, 1_228_970),
            ("ResNet-10", 100, 1_252_100),
            ("ResNet-18", 10, 2_797_610),
            ("ResNet-18", 100, 2_820_740),
            ("ResNet-18-W64", 10, 11_173_962),
            ("ResNet-18-W64", 100, 11_220_132),
        )
    ),
    ("DenseNet-121", 32, 10, 1_000_618),
    ("DenseNet-121", 32, 100, 1_035_268),
    ("DenseNet-121-IN", 32, 10, 1_000_618),
    ("DenseNet-121-G32", 32, 10, 6_956_298),
    ("DenseNet-121-G32", 32, 100, 7_048_548),
]


@pytest.mark.parametrize(("name", "size", "classes", "expected"), COUNTS)
def test_parameter_counts_of_the_references(name: str, size: int, classes: int, expected: int) -> None:
    with torch.device("meta"):
        assert count(build_network(name, 3, classes, (size, size))) == expected


@pytest.mark.parametrize(
    ("name", "tensors", "weights"),
    [
        ("AlexNet", 5, None),
        ("VGG-11", 8, None),
        ("VGG-11-BN", 8, None),
        ("ResNet-10", 12, 1_223_520),
        ("ResNet-18", 20, 2_790_240),
        ("DenseNet-121", 120, 965_448),
    ],
)
def test_convolutions_of_the_references(name: str, tensors: int, weights: int | None) -> None:
    with torch.device("meta"):
        convolutions = conv_weights(build_network(name, 3, 10, (32, 32)))
    assert len(convolutions) == tensors
    assert weights in (None, sum(weight.numel() for weight in convolutions))
    if name == "DenseNet-121":
        assert convolutions[0].shape == (24, 3, 3, 3)


# Logits


def batch_norm(maps: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return affine((maps - maps.mean((0, 2, 3), keepdim=True)), maps.var((0, 2, 3), False, keepdim=True), weights)


def instance_norm(maps: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return affine((maps - maps.mean((2, 3), keepdim=True)), maps.var((2, 3), False, keepdim=True), weights)


def affine(centered: Tensor, variance: Tensor, weights: Iterator[Tensor]) -> Tensor:
    gain, shift = next(weights), next(weights)
    return centered / (variance + 1e-5).sqrt() * gain[:, None, None] + shift[:, None, None]


def halved(maps: Tensor) -> Tensor:
    """2 x 2 average pooling of maps with even sides."""
    return (maps[:, :, ::2, ::2] + maps[:, :, 1::2, ::2] + maps[:, :, ::2, 1::2] + maps[:, :, 1::2, 1::2]) / 4


def convnet(weights: Iterator[Tensor], x: Tensor, norm: Norm) -> Tensor:
    for block in range(3):
        padding = 3 if block == 0 and x.shape[-1] == 28 else 1
        x = halved(norm(F.conv2d(x, next(weights), next(weights), padding=padding), weights).clamp(min=0))
    return x.flatten(1)


def alexnet(weights: Iterator[Tensor], x: Tensor, norm: Norm) -> Tensor:
    for layer, padding in enumerate((4 if x.shape[-1] == 28 else 2, 2, 1, 1, 1)):
        x = F.conv2d(x, next(weights), next(weights), padding=padding).clamp(min=0)
        x = F.max_pool2d(x, 2) if layer in {0, 1, 4} else x
    return x.flatten(1)


def vgg(weights: Iterator[Tensor], x: Tensor, norm: Norm) -> Tensor:
    for layer in range(8):
        padding = 3 if layer == 0 and x.shape[-1] == 28 else 1
        x = norm(F.conv2d(x, next(weights), next(weights), padding=padding), weights).clamp(min=0)
        x = F.max_pool2d(x, 2) if layer in {0, 1, 3, 5, 7} else x
    return x.flatten(1)


def resnet(blocks: int, average: bool) -> Definition:
    def definition(weights: Iterator[Tensor], x: Tensor, norm: Norm) -> Tensor:
        x = norm(F.conv2d(x, next(weights), padding=1), weights).clamp(min=0)
        for stage in range(4):
            for block in range(blocks):
                halve = stage > 0 and block == 0
                stride = 2 if halve and not average else 1
                y = norm(F.conv2d(x, next(weights), stride=stride, padding=1), weights).clamp(min=0)
                y = halved(y) if halve and average else y
                y = norm(F.conv2d(y, next(weights), padding=1), weights)
                if halve:
                    x = F.conv2d(x, next(weights), stride=stride)
                    x = norm(halved(x) if average else x, weights)
                x = (x + y).clamp(min=0)
        return x.mean((2, 3))

    return definition


def densenet(weights: Iterator[Tensor], x: Tensor, norm: Norm) -> Tensor:
    def convolved(x: Tensor, padding: int) -> Tensor:
        return F.conv2d(norm(x, weights).clamp(min=0), next(weights), padding=padding)

    x = F.conv2d(x, next(weights), padding=1)
    for block, layers in enumerate((6, 12, 24, 16)):
        x = halved(convolved(x, 0)) if block > 0 else x
        for _ in range(layers):
            x = torch.cat([convolved(convolved(x, 0), 1), x], 1)
    return norm(x, weights).clamp(min=0).mean((2, 3))


LOGITS: list[tuple[str, Definition, int, tuple[int, int]]] = [
    ("ConvNet-3-W8", convnet, 3, (32, 32)),
    ("ConvNet-3-W8", convnet, 1, (28, 28)),
    ("ConvNet-3-W8", convnet, 3, (28, 28)),
    ("ConvNet-3-W8", convnet, 1, (8, 8)),
    ("AlexNet", alexnet, 1, (8, 8)),
    ("AlexNet", alexnet, 1, (28, 28)),
    ("AlexNet", alexnet, 3, (9, 17)),
    *((f"VGG-11-W4{bn}", vgg, 2, size) for bn in ("-IN", "-BN") for size in ((32, 32), (28, 28), (33, 64))),
    *(
        (f"ResNet-{depth}-W4{norm}{pooling}", resnet(blocks, bool(pooling)), 2, (16, 24))
        for depth, blocks in ((10, 1), (18, 2))
        for norm in ("-BN", "-IN")
        for pooling in ("", "-AP")
    ),
    *((f"DenseNet-121-G3{norm}", densenet, 2, (16, 8)) for norm in ("-BN", "-IN")),
]


@pytest.mark.parametrize(("name", "definition", "channels", "size"), LOGITS)
def test_logits_equal_the_definition(name: str, definition: Definition, channels: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = build_network(name, channels, 5, size).double()
    for parameter in network.parameters():  # norms start as the identity, which would hide a mistake
        nn.init.normal_(parameter, std=parameter.numel() ** -0.25)
    images = torch.randn(3, channels, *size, dtype=torch.float64)
    *before, weight, bias = network.parameters()
    weights = iter(before)
    expected = definition(weights, images, batch_norm if "-BN" in name else instance_norm) @ weight.T + bias
    assert next(weights, None) is None
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


def test_28_pixels_are_treated_as_32() -> None:
    for channels in (1, 3):
        small, large = (build_network("ConvNet-3", channels, 10, (size, size)) for size in (28, 32))
        assert count(small) == count(large)
        images = torch.randn(2, channels, 28, 28)
        large.load_state_dict(small.state_dict())
        torch.testing.assert_close(small(images), large(F.pad(images, (2, 2, 2, 2))))


RUNS: list[tuple[str, int, tuple[int, int]]] = [
    *(
        (f"ConvNet-3-W8{suffix}", 5, size)
        for suffix in ("", "-LN", "-NP-LN", "-MP-GN", "-BN-SIGMOID", "-NN-LEAKY")
        for size in ((8, 8), (9, 20), (16, 11), (33, 31))
    ),
    ("ConvNet-4-NP", 1, (4, 4)),
    ("ConvNet-5", 1, (28, 28)),
    *(("AlexNet", channels, size) for channels, size in ((1, (8, 8)), (1, (28, 28)), (3, (64, 64)), (5, (9, 20)))),
    ("VGG-11", 1, (28, 28)),
    ("VGG-11-W8-BN", 3, (64, 64)),
    ("VGG-11-W8", 5, (40, 70)),
    *(("ResNet-10-W4", channels, size) for channels, size in ((3, (64, 64)), (2, (3, 1)))),
    *(
        (name, channels, size)
        for name in ("ResNet-10-W4", "ResNet-18-W4-AP")
        for channels, size in ((1, (8, 8)), (1, (28, 28)), (3, (9, 20)))
    ),
    ("DenseNet-121", 1, (8, 8)),
    ("DenseNet-121", 1, (28, 28)),
    ("DenseNet-121-G1", 3, (64, 64)),
    ("DenseNet-121-G2-IN", 3, (9, 20)),
]


@pytest.mark.parametrize(("name", "channels", "size"), RUNS)
def test_image_sizes_and_channels(name: str, channels: int, size: tuple[int, int]) -> None:
    check_builds_and_runs(name, channels, size)


NAMES = [
    ("ConvNet-3", "ConvNet-3"),
    ("ConvNet-3-RELU-AP-IN-W128", "ConvNet-3"),
    ("ConvNet-04-LEAKY-NP-W064-GN", "ConvNet-4-W64-GN-NP-LEAKY"),
    ("ConvNet-2-W16-BN-MP-SIGMOID", "ConvNet-2-W16-BN-MP-SIGMOID"),
    ("ConvNet-2-W16-LN", "ConvNet-2-W16-LN"),
    ("AlexNet", "AlexNet"),
    ("VGG-11-IN-W64", "VGG-11"),
    ("VGG-011", "VGG-11"),
    ("VGG-11-BN-W08", "VGG-11-W8-BN"),
    ("ResNet-10", "ResNet-10"),
    ("ResNet-10-BN-W32", "ResNet-10"),
    ("ResNet-18-AP-IN-W064", "ResNet-18-W64-IN-AP"),
    ("ResNet-010-AP", "ResNet-10-AP"),
    ("DenseNet-121", "DenseNet-121"),
    ("DenseNet-121-BN-G12", "DenseNet-121"),
    ("DenseNet-121-IN-G032", "DenseNet-121-G32-IN"),
]


@pytest.mark.parametrize(("said", "canonical"), NAMES)
def test_names_are_canonical(said: str, canonical: str) -> None:
    check_canonical(said, canonical)


PRODUCTS: list[tuple[str, tuple[int, int, int], int]] = [
    ("ConvNet-3-W4", (2, 8, 8), 4),
    ("AlexNet", (1, 8, 8), 2),
    ("VGG-11-W2", (1, 32, 32), 4),
    ("VGG-11-W2-BN", (1, 32, 32), 4),
    ("ResNet-10-W4", (2, 9, 9), 4),
    ("ResNet-10-W4", (1, 8, 8), 4),
    ("ResNet-10-W4-IN", (2, 9, 9), 4),
    ("ResNet-10-W4-AP", (2, 9, 9), 4),
    ("ResNet-10-W4-AP", (1, 8, 8), 4),
    ("DenseNet-121-G2", (2, 8, 8), 8),
]


@pytest.mark.parametrize(("name", "shape", "batch"), PRODUCTS)
def test_mixed_product_equals_a_finite_difference(name: str, shape: tuple[int, int, int], batch: int) -> None:
    check_mixed_product(name, shape, batch)


FEATURES: list[tuple[str, tuple[int, int, int], int]] = [
    ("ConvNet-3-W4", (2, 8, 16), 8),
    ("AlexNet", (2, 8, 16), 192 * 2),
    ("VGG-11-W4", (2, 32, 64), 64),
    ("ResNet-10-W4", (2, 16, 24), 32),
    ("ResNet-10-W4-IN-AP", (2, 16, 24), 32),
    ("DenseNet-121-G2", (1, 8, 8), 64),
    ("DenseNet-121-G12", (1, 8, 8), 384),
]


@pytest.mark.parametrize(("name", "shape", "length"), FEATURES)
def test_features_are_what_the_classifier_is_given(name: str, shape: tuple[int, int, int], length: int) -> None:
    check_features(name, shape, length)


ERRORS = [
    ("ConvNet", (32, 32), r"'ConvNet' has no depth: the form is ConvNet-<depth>"),
    ("ConvNet-W64", (32, 32), r"'ConvNet-W64' has no depth"),
    ("ConvNet-3-XX", (32, 32), r"'ConvNet-3-XX' has the unknown suffix 'XX': the form is ConvNet-<depth>"),
    ("ConvNet-3-BN-GN", (32, 32), r"gives its norm twice: keep one of BN and GN"),
    ("ConvNet-3-W0", (32, 32), r"ConvNet width is 0; it must be at least 1"),
    ("ConvNet-3-W6-GN", (32, 32), r"width=6 cannot be split into 4 groups: use a multiple of 4"),
    ("ConvNet-6", (32, 32), r"depth=6 leaves no pixel of 32 x 32 images: use a depth of at most 5, or no pooling"),
    ("ConvNet-4", (40, 8), r"depth=4 leaves no pixel of 40 x 8 images: use a depth of at most 3"),
    ("AlexNet-BN", (32, 32), r"'AlexNet-BN' has the unknown suffix 'BN': the form is AlexNet$"),
    ("AlexNet", (7, 7), r"AlexNet leaves no pixel of 7 x 7 images: use images of at least 8 x 8"),
    ("VGG", (32, 32), r"'VGG' has no depth: the form is VGG-11\[-W<width>\]"),
    ("VGG-16", (32, 32), r"'VGG-16' has depth 16: use 11; the form is"),
    ("VGG-11-GN", (32, 32), r"has the unknown suffix 'GN': the form is VGG-11"),
    ("VGG-11-IN-BN", (32, 32), r"gives its norm twice: keep one of IN and BN"),
    ("VGG-11-W0", (32, 32), r"VGG width is 0; it must be at least 1"),
    ("VGG-11", (8, 8), r"VGG leaves no pixel of 8 x 8 images: use images of at least 32 x 32"),
    ("ResNet", (32, 32), r"'ResNet' has no depth: the form is ResNet-10\|18\[-W"),
    ("ResNet-W4", (32, 32), r"'ResNet-W4' has no depth"),
    ("ResNet-50", (32, 32), r"'ResNet-50' has depth 50: use 10 or 18; the form is ResNet-10\|18"),
    ("ResNet-10-GN", (32, 32), r"'ResNet-10-GN' has the unknown suffix 'GN': the form is ResNet-10\|18"),
    ("ResNet-10-IN-BN", (32, 32), r"gives its norm twice: keep one of IN and BN"),
    ("ResNet-10-AP-AP", (32, 32), r"gives its downsampling twice"),
    ("ResNet-10-", (32, 32), r"has the unknown suffix ''"),
    ("ResNet-10-W0", (32, 32), r"ResNet width is 0; it must be at least 1"),
    ("ResNet-10-AP", (7, 7), r"ResNet leaves no pixel of 7 x 7 images: use images of at least 8 x 8"),
    ("ResNet-10-IN", (8, 8), r"leaves one pixel of 8 x 8 images, which instance norm makes zero: use batch norm or"),
    ("ResNet-10-IN-AP", (15, 15), r"leaves one pixel of 15 x 15 images, which instance norm makes zero"),
    ("DenseNet", (32, 32), r"'DenseNet' has no depth: the form is DenseNet-121\[-G<growth>\]"),
    ("DenseNet-169", (32, 32), r"'DenseNet-169' has depth 169: use 121; the form is"),
    ("DenseNet-121-W8", (32, 32), r"has the unknown suffix 'W8': the form is DenseNet-121\[-G"),
    ("DenseNet-121-G2-G3", (32, 32), r"gives its growth twice: keep one of G2 and G3"),
    ("DenseNet-121-G0", (32, 32), r"DenseNet growth is 0; it must be at least 1"),
    ("DenseNet-121", (7, 7), r"DenseNet leaves no pixel of 7 x 7 images: use images of at least 8 x 8"),
    ("DenseNet-121-IN", (8, 8), r"leaves one pixel of 8 x 8 images, which instance norm makes zero"),
]


@pytest.mark.parametrize(("name", "size", "message"), ERRORS)
def test_errors(name: str, size: tuple[int, int], message: str) -> None:
    check_one_line_error(name, message, size)


@pytest.mark.parametrize("options", [{"norm": "spectral"}, {"pooling": "sum"}, {"activation": "gelu"}])
def test_unknown_options_of_a_class(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"ConvNet {name} is '{value}'; use one of"):
        ConvNet(3, 10, (32, 32), **options)
    with pytest.raises(InputError, match="ResNet depth=34 is unknown: use 10 or 18"):
        ResNet(3, 10, (32, 32), depth=34)


# What is specific to one family


def test_parameter_names_and_order_of_the_reference_convnet() -> None:
    names = [name for name, _ in build_network("ConvNet-3", 3, 10, (32, 32)).named_parameters()]
    layers = [*(f"features.{index}" for index in (0, 1, 4, 5, 8, 9)), "classifier"]
    assert names == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


@pytest.mark.parametrize(
    ("suffix", "kinds"),
    [
        ("", [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.AvgPool2d]),
        ("-BN-MP", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]),
        ("-LN-NP-SIGMOID", [nn.Conv2d, nn.LayerNorm, nn.Sigmoid]),
        ("-NN-LEAKY", [nn.Conv2d, nn.LeakyReLU, nn.AvgPool2d]),
    ],
)
def test_suffixes_choose_the_layers_of_a_convnet(suffix: str, kinds: list[type[nn.Module]]) -> None:
    features = build_network(f"ConvNet-2{suffix}", 3, 10, (32, 32)).get_submodule("features")
    assert [type(layer) for layer in features.children()] == kinds * 2
    for layer in features.children():
        if isinstance(layer, nn.GroupNorm):
            assert (layer.num_groups, layer.num_channels, layer.eps) == (128, 128, 1e-5)
    layer = build_network("ConvNet-1-GN", 3, 10, (32, 32)).get_submodule("features.1")
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == 4


def test_initialization_of_a_convnet_is_torch_s_own() -> None:
    torch.manual_seed(5)
    network = ConvNet(3, 10, (32, 32))
    torch.manual_seed(5)
    expected = [nn.Conv2d(3, 128, 3), nn.Conv2d(128, 128, 3), nn.Conv2d(128, 128, 3), nn.Linear(2048, 10)]
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    for weight, layer in zip(weights, expected, strict=True):
        assert torch.equal(weight, next(layer.parameters()))


@pytest.mark.parametrize("name", ["ResNet-10", "ResNet-18"])
def test_initialization_of_a_resnet_is_the_reference_s(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, 3, 10, (32, 32))
    for weight in conv_weights(network):
        out, _, height, width = weight.shape
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (out * height * width)), rel=0.1)
        assert abs(weight.mean().item()) < 0.1 * weight.std().item()
    assert all(module.bias is None for module in network.modules() if isinstance(module, nn.Conv2d))
