import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dd_lightning.networks import FunctionalNetwork, ZooNetwork, build_network, known_names, network_name
from tests.networks.checks import (
    check_builds_and_runs,
    check_canonical,
    check_features,
    check_mixed_product,
    check_one_line_error,
    conv_weights,
    count,
)

LIGHT = "torchvision/shufflenet_v2_x0_5"


def seeded(name: str, channels: int = 3, size: int = 32) -> ZooNetwork:
    torch.manual_seed(3)
    network = build_network(name, channels, 10, (size, size))
    assert isinstance(network, ZooNetwork)
    return network


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "efficientnet_b0"])
def test_logits_and_initialization_are_torchvision_s(name: str) -> None:
    network = seeded(f"torchvision/{name}")
    torch.manual_seed(3)
    expected = torchvision.models.get_model(name, weights=None, num_classes=10)
    assert network.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(images), expected.eval()(images))


def test_torchvision_googlenet_returns_logits_in_training_too() -> None:
    assert seeded("torchvision/googlenet")(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_small_stem() -> None:
    network = seeded("torchvision/resnet18/small")
    expected = torchvision.models.resnet18(num_classes=10)
    expected.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    expected.maxpool = nn.Identity()
    state = {name.removeprefix("body."): value for name, value in network.state_dict().items()}
    state |= {f"fc.{part}": state.pop(f"classifier.{part}") for part in ("weight", "bias")}
    expected.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(images), expected.eval()(images))
    # torchvision draws with variance 2 / (k² out), so that the rule for new weights gives what it would draw.
    deviation = conv_weights(network)[0].std().item()
    assert deviation == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)


@pytest.mark.parametrize("channels", [1, 5])
def test_first_convolution_reads_any_number_of_channels(channels: int) -> None:
    network = seeded("torchvision/resnet18", channels)
    weight = conv_weights(network)[0]
    assert weight.shape == (64, channels, 7, 7)
    # The variance of the output is that of three channels.
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (49 * 64) * 3 / channels), rel=0.05)
    assert count(network) == count(seeded("torchvision/resnet18")) + 64 * (channels - 3) * 49


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [(LIGHT, 1, 8), ("torchvision/resnet18/small", 1, 28), ("torchvision/resnet18", 3, 64)],
)
def test_any_image_size(name: str, channels: int, size: int) -> None:
    check_builds_and_runs(name, channels, (size, size))


def test_features_are_what_the_classifier_is_given() -> None:
    check_features(LIGHT, (1, 16, 16), 1024)


@pytest.mark.parametrize("name", [LIGHT, "torchvision/resnet18/small"])
def test_names_stay_as_they_are(name: str) -> None:
    check_canonical(name, name)
    assert FunctionalNetwork(name, (1, 32, 32), 10).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet51", r"names the unknown model 'resnet51': did you mean resnet50 or resnet18 or"),
        ("torchvision/fcn_resnet50", r"unknown model 'fcn_resnet50': did you mean resnet50"),
        ("torchvision/zzz", r"unknown model 'zzz': see torchvision\.models\.list_models\(\)"),
        ("torchvision/", r"unknown model ''"),
        ("torchvision", r"unknown network 'torchvision': use one of .*torchvision/<model>\[/small\]"),
        ("torchvision/resnet18/big", r"is not understood: the form is torchvision/<model>\[/small\]"),
        ("torchvision/resnet18/small/small", r"is not understood"),
        ("torchvision/squeezenet1_1", r"ends in a Conv2d, not in a linear layer of 10 logits: use a model that does"),
        (LIGHT + "/small", r"does not start with a 7 x 7 convolution of stride 2 and a max pooling: leave out /small"),
        ("torchvision/alexnet", r"does not take images of 32 x 32 \(Given input size.*\): use larger images or"),
        ("ConvNet/3", r"unknown network 'ConvNet/3': use one of"),
        ("ConvNet-3/small", r"unknown network 'ConvNet-3/small': use one of"),
    ],
)
def test_errors(name: str, message: str) -> None:
    check_one_line_error(name, message)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((33, 33), r"does not take images of 33 x 33 \(Input shape indivisible by patch size!\): use"),
        ((32, 64), r"does not take images of 32 x 64 \(its images must be square\): use"),
    ],
)
def test_image_sizes_of_transformers(size: tuple[int, int], message: str) -> None:
    check_one_line_error("torchvision/vit_b_16", message, size)


class Attending(nn.Module):
    """A transformer of one layer with a stem like that of residual networks."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 4, 7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).mT
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        logits: Tensor = self.head((tokens + attended).mean(1))
        return logits


class Positioned(Attending):
    """Needs the image size, as the transformers of timm do."""

    def __init__(self, in_chans: int, num_classes: int, img_size: tuple[int, int]) -> None:
        super().__init__(in_chans, num_classes)
        self.positions = nn.Parameter(torch.ones(in_chans, *img_size))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + self.positions)


class Doubled(Attending):
    """Does more with its logits."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class Linear(nn.Module):
    """Has no convolution."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_chans, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


class Paired(Attending):
    """Returns more than logits."""

    def forward(self, images: Tensor) -> Any:  # noqa: ANN401
        return super().forward(images), images


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    models: dict[str, Callable[..., nn.Module]] = {
        "attending": Attending, "positioned": Positioned, "doubled": Doubled, "linear": Linear, "paired": Paired,
    }  # fmt: skip

    def create_model(name: str, *, pretrained: bool, **options: Any) -> nn.Module:  # noqa: ANN401
        assert not pretrained
        return models[name](**options)

    module = ModuleType("timm")
    vars(module).update(list_models=lambda: list(models), create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("suffix", ["", "/small"])
@pytest.mark.parametrize("model", ["attending", "positioned"])
def test_timm(model: str, suffix: str) -> None:
    name = f"timm/{model}{suffix}"
    check_canonical(name, name)
    check_builds_and_runs(name, 2, (16, 8))
    check_features(name, (1, 8, 8), 4)
    check_mixed_product(name, (1, 8, 8))
    assert conv_weights(build_network(name, 1, 10, (8, 8)))[0].shape[-1] == (3 if suffix else 7)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/attendig", r"unknown model 'attendig': did you mean attending\?"),
        ("timm/attending.in1k", r"unknown model 'attending\.in1k': did you mean attending\?"),
        ("timm/doubled", r"'timm/doubled' computes more after its last linear layer: use a model that does not"),
        ("timm/linear", r"'timm/linear' does not start with a plain convolution: use a model that does"),
        ("timm/linear/small", r"'timm/linear/small' does not start with a 7 x 7 convolution"),
        ("timm/paired", r"does not take images of 32 x 32 \(it returns a tuple, not logits\)"),
    ],
)
def test_timm_errors(name: str, message: str) -> None:
    check_one_line_error(name, message)


def test_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    check_one_line_error("timm/resnet18", r"needs a package that is not installed: pip install timm")


def test_known_names_lists_both_packages() -> None:
    assert {"torchvision/<model>[/small]", "timm/<model>[/small]"} <= set(known_names())
    assert network_name("torchvision/resnet50") == "torchvision/resnet50"
