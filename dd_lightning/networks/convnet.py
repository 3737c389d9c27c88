"""The ConvNet of dataset distillation: blocks of convolution, norm, activation and pooling."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn

from dd_lightning.functional.errors import InputError
from dd_lightning.networks.common import (
    Suffix,
    check_choice,
    check_numbers,
    image_norm,
    is_count,
    margin,
    read_suffixes,
)
from dd_lightning.networks.registry import NetworkFactory, register_family

Norm = Literal["instance", "group", "batch", "layer", "none"]
Pooling = Literal["avg", "max", "none"]
Activation = Literal["relu", "sigmoid", "leaky_relu"]


class ConvNet(nn.Module):
    """ConvNet, the network on which synthetic sets are usually learnt.

    The architecture was brought into the field by Gidaris and Komodakis (CVPR 2018); defaults, parameter
    order and names are those of trajectory matching
    (https://github.com/GeorgeCazenavette/mtt-distillation/blob/50dccea/networks.py#L29-L98), so that its
    expert trajectories can be read. ``features`` holds the blocks, ``classifier`` the last linear layer;
    initialization is torch's. With 3 x 32 x 32 images and 10 classes the default has 320,010 parameters.

    NOTE: Images of 28 x 28 pixels get a padding of 3 in the first convolution, which makes them 32 x 32 (see
        `margin`).

    Args:
        channels: Channels of the images.
        num_classes: Number of logits.
        image_size: ``(H, W)`` of the images; each block with pooling halves both, rounding down.
        depth: Number of blocks. The reference uses 3 at 32 pixels, 4 at 64 and 5 at 128.
        width: Channels of every convolution.
        norm: ``instance`` is group normalization with as many groups as channels (no running statistics,
            affine); ``group`` has 4 groups; ``layer`` normalizes over channels and pixels with one weight for
            each.
        pooling: 2 x 2 pooling with stride 2, or none.
        activation: ReLU, sigmoid, or leaky ReLU with slope 0.01.

    Shape:
        ``[B, channels, H, W]`` to ``[B, num_classes]``.

    Raises:
        InputError: If an option is unknown, a number is below 1, pooling leaves no pixel, or 4 groups do not
            fit.

    Example:
        >>> ConvNet(channels=3, num_classes=10, image_size=(32, 32)).classifier
        Linear(in_features=2048, out_features=10, bias=True)
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        depth: int = 3,
        width: int = 128,
        norm: Norm = "instance",
        pooling: Pooling = "avg",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_numbers("ConvNet", image_size, channels=channels, num_classes=num_classes, depth=depth, width=width)
        check_choice("ConvNet", "norm", norm, get_args(Norm))
        check_choice("ConvNet", "pooling", pooling, get_args(Pooling))
        check_choice("ConvNet", "activation", activation, get_args(Activation))
        if norm == "group" and width % 4:
            raise InputError(f"ConvNet width={width} cannot be split into 4 groups: use a multiple of 4")

        extra = margin(image_size)
        height, columns = (side + 2 * extra for side in image_size)
        deepest = min(height, columns).bit_length() - 1
        if pooling != "none" and depth > deepest:
            raise InputError(
                f"ConvNet depth={depth} leaves no pixel of {image_size[0]} x {image_size[1]} images: "
                f"use a depth of at most {deepest}, or no pooling"
            )
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 1 + extra if block == 0 else 1
            layers.append(nn.Conv2d(channels if block == 0 else width, width, kernel_size=3, padding=padding))
            if norm != "none":
                layers.append(_norm_layer(norm, width, height, columns))
            layers.append(_activation_layer(activation))
            if pooling != "none":
                layers.append(nn.AvgPool2d(2, 2) if pooling == "avg" else nn.MaxPool2d(2, 2))
                height, columns = height // 2, columns // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * height * columns, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``images [B, channels, H, W]`` to logits ``[B, num_classes]``."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def _norm_layer(norm: Norm, width: int, height: int, columns: int) -> nn.Module:
    if norm == "layer":
        return nn.LayerNorm([width, height, columns])
    if norm == "group":
        return nn.GroupNorm(4, width)
    return image_norm("batch" if norm == "batch" else "instance", width)


def _activation_layer(activation: Activation) -> nn.Module:
    # Not in place: function transforms and stored intermediate results need the input.
    if activation == "relu":
        return nn.ReLU()
    return nn.Sigmoid() if activation == "sigmoid" else nn.LeakyReLU(0.01)


_NORMS: dict[str, Norm] = {"IN": "instance", "GN": "group", "BN": "batch", "LN": "layer", "NN": "none"}
_POOLINGS: dict[str, Pooling] = {"AP": "avg", "MP": "max", "NP": "none"}
_ACTIVATIONS: dict[str, Activation] = {"RELU": "relu", "SIGMOID": "sigmoid", "LEAKY": "leaky_relu"}
_SUFFIXES = (
    Suffix("width", "W128"),
    Suffix("norm", "IN", _NORMS),
    Suffix("pooling", "AP", _POOLINGS),
    Suffix("activation", "RELU", _ACTIVATIONS),
)
_FORM = "ConvNet-<depth>[-W<width>][-IN|GN|BN|LN|NN][-AP|MP|NP][-RELU|SIGMOID|LEAKY]"


@register_family("ConvNet", form=_FORM)
def parse_convnet(parts: Sequence[str]) -> tuple[str, NetworkFactory]:
    """Read the parts after ``ConvNet`` in a name: the depth, then suffixes in any order.

    Args:
        parts: Such as ``["3", "W64", "BN"]``.

    Returns:
        The canonical name and the factory.

    Raises:
        InputError: If a part is not understood or says again what another one has said.
    """
    name = "-".join(["ConvNet", *parts])
    if not parts or not is_count(parts[0]):
        raise InputError(f"network {name!r} has no depth: the form is {_FORM}, such as ConvNet-3")
    depth = int(parts[0])
    chosen, suffixes = read_suffixes(name, parts[1:], _FORM, _SUFFIXES)
    factory = partial(
        ConvNet,
        depth=depth,
        width=int(chosen["width"][1:]),
        norm=_NORMS[chosen["norm"]],
        pooling=_POOLINGS[chosen["pooling"]],
        activation=_ACTIVATIONS[chosen["activation"]],
    )
    return "-".join(["ConvNet", str(depth), *suffixes]), factory
