"""The AlexNet for small images of dataset distillation, for evaluation across architectures."""

from torch import nn

from dd_lightning.networks.common import ImageClassifier, margin
from dd_lightning.networks.registry import register_names

# (channels, side of the kernel, whether pooling follows)
_CONVOLUTIONS = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))


class AlexNet(ImageClassifier):
    """Five convolutions with ReLU and without norm, three 2 x 2 max poolings and one linear layer.

    The layers are those of trajectory matching
    (https://github.com/GeorgeCazenavette/mtt-distillation/blob/0c42493/networks.py), the initialization is
    torch's. With 3 x 32 x 32 images and 10 classes it has 1,872,202 parameters.

    NOTE: Images of 28 x 28 pixels get a padding of 4 in the first convolution, which makes them 32 x 32.

    Args:
        channels: Of the images; errors are those of `ImageClassifier`.
        num_classes: Number of logits.
        image_size: ``(H, W)``; each of the three poolings halves both, rounding down.
    """

    def __init__(self, channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__(image_size, channels=channels, num_classes=num_classes)
        extra = margin(image_size)
        height, columns = ((side + 2 * extra) // 8 for side in image_size)
        self.check_pixels(image_size, (height, columns), 8)
        layers: list[nn.Module] = []
        inputs = channels
        for outputs, kernel, pooled in _CONVOLUTIONS:
            padding = kernel // 2 if layers else kernel // 2 + extra
            layers += [nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.ReLU()]
            if pooled:
                layers.append(nn.MaxPool2d(2))
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs * height * columns, num_classes)


register_names(AlexNet, "AlexNet")
