"""The ConvNet of dataset distillation: blocks of convolution, norm, activation and pooling."""

from typing import Literal, get_args

from torch import nn

from dd_lightning.functional.errors import InputError, check_choice
from dd_lightning.networks.common import ImageClassifier, image_norm, margin
from dd_lightning.networks.registry import Suffix, register_names

Norm = Literal["instance", "group", "batch", "layer", "none"]
Pooling = Literal["avg", "max", "none"]
Activation = Literal["relu", "sigmoid", "leaky_relu"]


class ConvNet(ImageClassifier):
    """ConvNet, on which synthetic sets are usually learned.

    The architecture comes from Gidaris and Komodakis (CVPR 2018); defaults, parameter order and names are those of
    trajectory matching (https://github.com/GeorgeCazenavette/mtt-distillation/blob/50dccea/networks.py#L29-L98), so
    that its expert trajectories can be read. Initialization is torch's. With 3 x 32 x 32 images and 10 classes the
    default has 320,010 parameters.

    NOTE: Images of 28 x 28 pixels get a padding of 3 in the first convolution, which makes them 32 x 32.

    Args:
        channels: Of the images; errors are those of `ImageClassifier`.
        num_classes: Number of logits.
        image_size: ``(H, W)``; each block with pooling halves both, rounding down.
        depth: Number of blocks. The reference uses 3 at 32 pixels, 4 at 64 and 5 at 128.
        width: Channels of every convolution.
        norm: ``group`` has 4 groups, ``instance`` as many as channels; ``layer`` normalizes over channels and pixels
            with one weight for each.
        pooling: 2 x 2 pooling with stride 2, or none.
        activation: ReLU, sigmoid, or leaky ReLU with slope 0.01.
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
        super().__init__(image_size, channels=channels, num_classes=num_classes, depth=depth, width=width)
        check_choice("ConvNet norm", norm, get_args(Norm))
        check_choice("ConvNet pooling", pooling, get_args(Pooling))
        check_choice("ConvNet activation", activation, get_args(Activation))
        if norm == "group" and width % 4:
            raise InputError(f"ConvNet width={width} cannot be split into 4 groups: use a multiple of 4")
        extra = margin(image_size)
        height, columns = (side + 2 * extra for side in image_size)
        deepest = min(height, columns).bit_length() - 1
        if pooling != "none" and depth > deepest:
            raise InputError(
                f"ConvNet depth={depth} leaves no pixel of {image_size[0]} x {image_size[1]} images: use a depth of at "
                f"most {deepest}, or no pooling"
            )
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 1 + extra if block == 0 else 1
            layers.append(nn.Conv2d(channels if block == 0 else width, width, kernel_size=3, padding=padding))
            if norm == "layer":
                layers.append(nn.LayerNorm([width, height, columns]))
            elif norm == "group":
                layers.append(nn.GroupNorm(4, width))
            elif norm != "none":
                layers.append(image_norm(norm, width))
            # Not in place: function transforms and stored intermediate results need the input.
            if activation == "relu":
                layers.append(nn.ReLU())
            else:
                layers.append(nn.Sigmoid() if activation == "sigmoid" else nn.LeakyReLU(0.01))
            if pooling != "none":
                layers.append(nn.AvgPool2d(2, 2) if pooling == "avg" else nn.MaxPool2d(2, 2))
                height, columns = height // 2, columns // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * height * columns, num_classes)


register_names(
    ConvNet,
    "ConvNet-<depth>[-W<width>][-IN|GN|BN|LN|NN][-AP|MP|NP][-RELU|SIGMOID|LEAKY]",
    (
        Suffix("width", "W128"),
        Suffix("norm", "IN", {"IN": "instance", "GN": "group", "BN": "batch", "LN": "layer", "NN": "none"}),
        Suffix("pooling", "AP", {"AP": "avg", "MP": "max", "NP": "none"}),
        Suffix("activation", "RELU", {"RELU": "relu", "SIGMOID": "sigmoid", "LEAKY": "leaky_relu"}),
    ),
    depths=None,
)
