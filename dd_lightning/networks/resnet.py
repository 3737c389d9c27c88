"""Residual networks for small images, in the narrow form on which synthetic sets are evaluated."""

from typing import Literal, get_args

from torch import Tensor, nn

from dd_lightning.functional.errors import InputError, check_choice
from dd_lightning.networks.common import IMAGE_NORMS, ImageClassifier, ImageNorm, image_norm
from dd_lightning.networks.registry import Suffix, register_names

Downsampling = Literal["stride", "avg"]

_BLOCKS = {10: 1, 18: 2}


class ResNet(ImageClassifier):
    """ResNet of basic blocks for images of about 32 x 32 pixels.

    A 3 x 3 convolution without stride or pooling, four stages of basic blocks, global average pooling and one
    linear layer. The stages have ``width`` times 1, 2, 4 and 8 channels, and all but the first halve the maps.
    Widths, norm and initialization are those of the evaluation in IDC
    (https://github.com/snu-mllab/Efficient-Dataset-Condensation/blob/086273c/models/resnet.py and
    ``resnet_ap.py``): convolutions without bias, drawn from a normal distribution of variance 2 / (k² out). With
    3 x 32 x 32 images and 10 classes, depth 10 has 1,228,970 parameters and depth 18 has 2,797,610.

    NOTE: These are not the networks of the same names for ImageNet, which have twice the channels. Trajectory
        matching's ResNet18 is depth 18 with width 64 and instance norm (11,173,962 parameters), but for its
        initialization, which is torch's own. Its ResNet18_AP also leaves out the global pooling and is not here.

    Args:
        channels: Of the images; errors are those of `ImageClassifier`.
        num_classes: Number of logits.
        image_size: ``(H, W)``.
        depth: 10 has one block in each stage, 18 has two.
        width: Channels of the first stage.
        norm: ``batch`` or ``instance``.
        downsampling: How a stage halves its maps: ``stride`` in its first convolutions, rounding up, or ``avg``,
            2 x 2 average pooling behind them, rounding down.
    """

    global_pooling = True

    def __init__(
        self,
        channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        depth: int = 10,
        width: int = 32,
        norm: ImageNorm = "batch",
        downsampling: Downsampling = "stride",
    ) -> None:
        super().__init__(image_size, channels=channels, num_classes=num_classes, width=width)
        check_choice("ResNet downsampling", downsampling, get_args(Downsampling))
        if depth not in _BLOCKS:
            raise InputError(f"ResNet depth={depth} is unknown: use {' or '.join(map(str, _BLOCKS))}")
        height, columns = (side // 8 if downsampling == "avg" else -(-side // 8) for side in image_size)
        self.check_pixels(image_size, (height, columns), 8, norm)
        layers: list[nn.Module] = [_conv(channels, width, 3), image_norm(norm, width), nn.ReLU()]
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            for block in range(_BLOCKS[depth]):
                halve = downsampling if stage > 0 and block == 0 else None
                layers.append(_BasicBlock(inputs, outputs, norm, halve))
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the block halves the maps."""

    def __init__(self, inputs: int, outputs: int, norm: ImageNorm, halve: Downsampling | None) -> None:
        super().__init__()
        stride = 2 if halve == "stride" else 1
        pooling = [nn.AvgPool2d(2)] if halve == "avg" else []
        first = [_conv(inputs, outputs, 3, stride), image_norm(norm, outputs), nn.ReLU()]
        self.residual = nn.Sequential(*first, *pooling, _conv(outputs, outputs, 3), image_norm(norm, outputs))
        self.shortcut = nn.Sequential()
        if halve is not None:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), *pooling, image_norm(norm, outputs))
        self.activation = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.residual(maps) + self.shortcut(maps))
        return activated


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


_SUFFIXES = (
    Suffix("width", "W32"),
    Suffix("norm", "BN", IMAGE_NORMS),
    Suffix("downsampling", "", {"": "stride", "AP": "avg"}),
)
register_names(ResNet, "ResNet-10|18[-W<width>][-BN|IN][-AP]", _SUFFIXES, depths=_BLOCKS)
