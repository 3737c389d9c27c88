"""What the families share: the classifier's shape, norm layers, the margin of 28 x 28 images, checks."""

from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from dd_lightning.functional.errors import InputError, check_choice, check_range

ImageNorm = Literal["batch", "instance"]
IMAGE_NORMS: dict[str, ImageNorm] = {"IN": "instance", "BN": "batch"}


class ImageClassifier(nn.Module):
    """``features`` of images, then one linear layer, ``classifier``: ``[B, channels, H, W]`` to ``[B, num_classes]``.

    A norm ``instance`` is group normalization with as many groups as channels, affine, without running statistics.

    Args:
        image_size: ``(H, W)`` of the images.
        numbers: The other numbers, by name.

    Raises:
        InputError: If a number is below 1; in a family also if an option is unknown, if the images leave its last maps
            no pixel, or a single one under instance norm.
    """

    features: nn.Sequential
    classifier: nn.Linear
    global_pooling: ClassVar[bool] = False
    """Average the maps over their pixels, instead of handing every pixel to the classifier."""

    def __init__(self, image_size: tuple[int, int], **numbers: int) -> None:
        super().__init__()
        for name, number in (numbers | {"image_size": min(image_size)}).items():
            check_range(f"{type(self).__name__} {name}", number, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``images [B, channels, H, W]`` to logits ``[B, num_classes]``."""
        maps = self.features(images)
        logits: Tensor = self.classifier(maps.mean((2, 3)) if self.global_pooling else maps.flatten(1))
        return logits

    def check_pixels(
        self, image_size: tuple[int, int], last: tuple[int, int], smallest: int, norm: str = "none"
    ) -> None:
        """Refuse images of which the last stage has nothing left to look at.

        That is no pixel, or a single one under instance norm, which makes it zero: all images get the same logits.

        Args:
            image_size: ``(H, W)`` of the images.
            last: ``(H, W)`` of the last stage's maps.
            smallest: The side of the smallest square that leaves one pixel.
            norm: The norm that sees these maps.

        Raises:
            InputError: If nothing is left.
        """
        network, said = type(self).__name__, f"{image_size[0]} x {image_size[1]} images"
        if min(last) < 1:
            raise InputError(f"{network} leaves no pixel of {said}: use images of at least {smallest} x {smallest}")
        if last == (1, 1) and norm == "instance":
            raise InputError(
                f"{network} leaves one pixel of {said}, which instance norm makes zero: use batch norm or larger images"
            )


def margin(image_size: tuple[int, int]) -> int:
    """Return how many zeros the first convolution puts around images beyond its own padding.

    Images of 28 x 28 pixels become 32 x 32, as in the reference networks of the field, which pad all images of one
    channel: here small ones, such as 8 x 8 digits, are not drowned in zeros.
    """
    return 2 if tuple(image_size) == (28, 28) else 0


def image_norm(norm: ImageNorm, channels: int) -> nn.Module:
    """Return an affine norm, ``instance`` as one group per channel; an `InputError` if it is unknown."""
    check_choice("norm", norm, get_args(ImageNorm))
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(channels, channels)
