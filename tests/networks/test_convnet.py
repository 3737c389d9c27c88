from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import ConvNet, build_network, known_names, network_name


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "size", "classes", "expected"),
    [
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
    ],
)
def test_parameter_counts_of_the_reference(name: str, size: int, classes: int, expected: int) -> None:
    assert count(build_network(name, 3, classes, (size, size))) == expected


def test_parameter_names_and_order_of_the_reference() -> None:
    names = [name for name, _ in build_network("ConvNet-3", 3, 10, (32, 32)).named_parameters()]
    layers = [*(f"features.{index}" for index in (0, 1, 4, 5, 8, 9)), "classifier"]
    assert names == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


def reference_logits(weights: list[Tensor], images: Tensor, padding: int = 1) -> Tensor:
    """Instance norm by its definition, the rest from torch's functions."""
    x = images
    for block in range(3):
        kernel, bias, gain, shift = weights[4 * block : 4 * block + 4]
        x = F.conv2d(x, kernel, bias, padding=padding if block == 0 else 1)
        mean = x.mean((2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((2, 3), keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt() * gain[:, None, None] + shift[:, None, None]
        x = x.clamp(min=0)
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    return x.flatten(1) @ weights[-2].T + weights[-1]


@pytest.mark.parametrize(("channels", "size", "padding"), [(3, 32, 1), (1, 28, 3), (3, 28, 3), (1, 8, 1)])
def test_logits_equal_the_definition(channels: int, size: int, padding: int) -> None:
    torch.manual_seed(0)
    network = ConvNet(channels, 10, (size, size), width=8).double()
    for parameter in network.parameters():  # norms start as the identity, which would hide a mistake
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(4, channels, size, size, dtype=torch.float64)
    expected = reference_logits(list(network.parameters()), images, padding)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-12)


def test_28_pixels_are_treated_as_32() -> None:
    for channels in (1, 3):
        small, large = (build_network("ConvNet-3", channels, 10, (size, size)) for size in (28, 32))
        assert count(small) == count(large)
        images = torch.randn(2, channels, 28, 28)
        large.load_state_dict(small.state_dict())
        torch.testing.assert_close(small(images), large(F.pad(images, (2, 2, 2, 2))))


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (16, 11), (33, 31)])
@pytest.mark.parametrize("suffix", ["", "-LN", "-NP-LN", "-MP-GN", "-BN-SIGMOID", "-NN-LEAKY"])
def test_any_image_size_and_number_of_channels(size: tuple[int, int], suffix: str) -> None:
    images = torch.randn(2, 5, *size)
    before = images.clone()
    logits = build_network(f"ConvNet-3-W8{suffix}", 5, 7, size)(images)
    assert logits.shape == (2, 7)
    assert bool(logits.isfinite().all())
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("suffix", "kinds"),
    [
        ("", [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.AvgPool2d]),
        ("-BN-MP", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]),
        ("-LN-NP-SIGMOID", [nn.Conv2d, nn.LayerNorm, nn.Sigmoid]),
        ("-NN-LEAKY", [nn.Conv2d, nn.LeakyReLU, nn.AvgPool2d]),
    ],
)
def test_suffixes_choose_the_layers(suffix: str, kinds: list[type[nn.Module]]) -> None:
    features = build_network(f"ConvNet-2{suffix}", 3, 10, (32, 32)).get_submodule("features")
    assert [type(layer) for layer in features.children()] == kinds * 2
    for layer in features.children():
        assert not getattr(layer, "inplace", False)
        if isinstance(layer, nn.GroupNorm):
            assert (layer.num_groups, layer.num_channels, layer.eps) == (128, 128, 1e-5)


def test_group_norm_has_four_groups() -> None:
    layer = build_network("ConvNet-1-GN", 3, 10, (32, 32)).get_submodule("features.1")
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == 4


def test_initialization_is_torch_s_own() -> None:
    torch.manual_seed(5)
    network = ConvNet(3, 10, (32, 32))
    torch.manual_seed(5)
    expected = [nn.Conv2d(3, 128, 3), nn.Conv2d(128, 128, 3), nn.Conv2d(128, 128, 3), nn.Linear(2048, 10)]
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    for weight, layer in zip(weights, expected, strict=True):
        assert torch.equal(weight, next(layer.parameters()))


def test_names_are_canonical() -> None:
    assert network_name("ConvNet-3") == "ConvNet-3"
    assert network_name("ConvNet-3-RELU-AP-IN-W128") == "ConvNet-3"
    assert network_name("ConvNet-04-LEAKY-NP-W064-GN") == "ConvNet-4-W64-GN-NP-LEAKY"
    for name in ("ConvNet-2-W16-BN-MP-SIGMOID", "ConvNet-2-W16-LN"):
        assert network_name(name) == name


def tiny(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], num_classes))


def not_a_network(channels: int, num_classes: int, image_size: tuple[int, int]) -> Any:  # noqa: ANN401
    return channels


def test_factories_and_import_paths() -> None:
    path = "dd_lightning.networks.convnet:ConvNet"
    for spec in (path, "dd_lightning.networks.convnet.ConvNet", ConvNet):
        assert network_name(spec) == path
        assert count(build_network(spec, 3, 10, (32, 32))) == 320_010
    assert count(build_network(tiny, 1, 10, (8, 8))) == 650
    assert network_name(tiny).endswith("test_convnet:tiny")
    shallow, deep = partial(ConvNet, depth=1), partial(ConvNet, depth=2)
    assert network_name(shallow) == f"{path}(depth=1)"
    assert network_name(deep) == f"{path}(depth=2)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "ResNext-50",
            r"unknown network 'ResNext-50': say one of .*ConvNet-<depth>.*import path of a factory",
        ),
        ("ConvNet", r"'ConvNet' has no depth: the form is ConvNet-<depth>.*, such as ConvNet-3"),
        ("ConvNet-W64", r"'ConvNet-W64' has no depth"),
        ("ConvNet-3-XX", r"'ConvNet-3-XX' has the unknown suffix 'XX': the form is ConvNet-<depth>"),
        ("ConvNet-3-BN-GN", r"gives its norm twice: keep one of BN and GN"),
        ("ConvNet-3-W0", r"ConvNet width=0 must be at least 1"),
        ("ConvNet-3-W6-GN", r"width=6 cannot be split into 4 groups: use a multiple of 4"),
        ("ConvNet-6", r"depth=6 leaves no pixel of 32 x 32 images: use a depth of at most 5, or no pooling"),
        (
            "no_such_package.models:net",
            r"cannot import network 'no_such_package\.models:net' \(No module named",
        ),
        (
            "torch.nn:NoSuchThing",
            r"cannot import network 'torch\.nn:NoSuchThing' \(module .* has no attribute",
        ),
        (":net", r"cannot import network ':net' \(Empty module name\)"),
        ("math:pi", r"network 'math:pi' is a float: it must be a function of"),
        (not_a_network, r"gave a int: its factory must return a torch\.nn\.Module"),
    ],
)
def test_errors(spec: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(InputError, match=message) as caught:
        build_network(spec, 3, 10, (32, 32))
    assert "\n" not in str(caught.value)


def test_depth_limit_is_that_of_the_shorter_side() -> None:
    assert build_network("ConvNet-3", 1, 10, (8, 8))(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    with pytest.raises(InputError, match="depth=4 leaves no pixel of 40 x 8 images: use a depth of at most 3"):
        build_network("ConvNet-4", 1, 10, (40, 8))
    assert build_network("ConvNet-4-NP", 1, 10, (4, 4))(torch.zeros(1, 1, 4, 4)).shape == (1, 10)
    assert build_network("ConvNet-5", 1, 10, (28, 28))(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("options", [{"norm": "spectral"}, {"pooling": "sum"}, {"activation": "gelu"}])
def test_unknown_options(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"ConvNet {name}='{value}' is unknown: say one of"):
        ConvNet(3, 10, (32, 32), **options)


def test_known_names_lists_the_family() -> None:
    assert any(name.startswith("ConvNet-<depth>") for name in known_names())
