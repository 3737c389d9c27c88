"""VGG with one linear layer, for evaluation across architectures."""

from torch import nn

from dd_lightning.networks.common import IMAGE_NORMS, ImageClassifier, ImageNorm, image_norm, margin
from dd_lightning.networks.registry import Suffix, register_names

_CONVOLUTIONS = ((1,), (2,), (4, 4), (8, 8), (8, 8))  # channels before each pooling, in units of the width


class VGG(ImageClassifier):
    """VGG-11: eight 3 x 3 convolutions with norm and ReLU, five max poolings and one linear layer.

    Channels, norm and the single linear layer are those of trajectory matching
    (https://github.com/GeorgeCazenavette/mtt-distillation/blob/0c42493/networks.py); initialization is torch's.
    With 3 x 32 x 32 images and 10 classes it has 9,231,114 parameters.

    NOTE: Images of 28 x 28 pixels get a padding of 3 in the first convolution, which makes them 32 x 32.

    Args:
        channels: Of the images; errors are those of `ImageClassifier`.
        num_classes: Number of logits.
        image_size: ``(H, W)``; each of the five poolings halves both, rounding down.
        width: Channels of the first convolution; the others have 2, 4 and 8 times as many.
        norm: ``batch`` or ``instance``.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        width: int = 64,
        norm: ImageNorm = "instance",
    ) -> None:
        super().__init__(image_size, channels=channels, num_classes=num_classes, width=width)
        extra = margin(image_size)
        height, columns = ((side + 2 * extra) // 2 ** len(_CONVOLUTIONS) for side in image_size)
        self.check_pixels(image_size, (height, columns), 2 ** len(_CONVOLUTIONS))  # pooled last: no norm sees them
        layers: list[nn.Module] = []
        inputs = channels
        for multiples in _CONVOLUTIONS:
            for multiple in multiples:
                outputs = width * multiple
                padding = 1 if layers else 1 + extra
                layers += [nn.Conv2d(inputs, outputs, 3, padding=padding), image_norm(norm, outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs * height * columns, num_classes)


_SUFFIXES = (Suffix("width", "W64"), Suffix("norm", "IN", IMAGE_NORMS))
register_names(VGG, "VGG-11[-W<width>][-IN|BN]", _SUFFIXES, depths=(11,))
