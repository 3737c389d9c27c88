"""The densely connected network for small images on which synthetic sets are evaluated."""

import torch
from torch import Tensor, nn

from dd_lightning.networks.common import IMAGE_NORMS, ImageClassifier, ImageNorm, image_norm
from dd_lightning.networks.registry import Suffix, register_names

_BLOCKS = (6, 12, 24, 16)


class DenseNet(ImageClassifier):
    """DenseNet of 121 layers for images of about 32 x 32 pixels.

    A 3 x 3 convolution to twice ``growth`` channels without stride or pooling, dense blocks of 6, 12, 24 and 16
    layers, between them transitions that halve the channels and the maps, global average pooling and one linear
    layer. A layer is norm, ReLU, 1 x 1 convolution to four times ``growth`` channels, norm, ReLU and 3 x 3
    convolution to ``growth``; its output goes in front of what it was given. Order and defaults are those of IDC
    (https://github.com/snu-mllab/Efficient-Dataset-Condensation/blob/086273c/models/densenet_cifar.py);
    initialization is torch's. With 3 x 32 x 32 images and 10 classes it has 1,000,618 parameters.

    NOTE: Papers on dataset distillation call this network with growth 12 "DenseNet-121". The true one has growth
        32 and about seven times the parameters.

    Args:
        channels: Of the images; errors are those of `ImageClassifier`.
        num_classes: Number of logits.
        image_size: ``(H, W)``; each of the three transitions halves both, rounding down.
        growth: Channels that a layer adds.
        norm: ``batch`` or ``instance``.
    """

    global_pooling = True

    def __init__(
        self, channels: int, num_classes: int, image_size: tuple[int, int], growth: int = 12, norm: ImageNorm = "batch"
    ) -> None:
        super().__init__(image_size, channels=channels, num_classes=num_classes, growth=growth)
        self.check_pixels(image_size, (image_size[0] // 8, image_size[1] // 8), 8, norm)
        width = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        for block, length in enumerate(_BLOCKS):
            if block > 0:
                layers += [*_norm_and_conv(width, width // 2, 1, norm), nn.AvgPool2d(2)]
                width //= 2
            for _ in range(length):
                layers.append(_DenseLayer(width, growth, norm))
                width += growth
        self.features = nn.Sequential(*layers, image_norm(norm, width), nn.ReLU())
        self.classifier = nn.Linear(width, num_classes)


class _DenseLayer(nn.Module):
    def __init__(self, width: int, growth: int, norm: ImageNorm) -> None:
        super().__init__()
        self.added = nn.Sequential(
            *_norm_and_conv(width, 4 * growth, 1, norm), *_norm_and_conv(4 * growth, growth, 3, norm)
        )

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([self.added(maps), maps], dim=1)


def _norm_and_conv(inputs: int, outputs: int, kernel: int, norm: ImageNorm) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [image_norm(norm, inputs), nn.ReLU(), conv]


_SUFFIXES = (Suffix("growth", "G12"), Suffix("norm", "BN", IMAGE_NORMS))
register_names(DenseNet, "DenseNet-121[-G<growth>][-BN|IN]", _SUFFIXES, depths=(121,))
