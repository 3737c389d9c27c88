"""What the families share: the classifier's shape, norm layers, the margin of 28 x 28 images, checks."""

from collections.abc import Collection
from typing import ClassVar, Literal

from torch import Tensor, nn

from dd_lightning.functional.errors import InputError, check_range

ImageNorm = Literal["batch", "instance"]
IMAGE_NORMS: dict[str, ImageNorm] = {"IN": "instance", "BN": "batch"}


class ImageClassifier(nn.Module):
    """``features`` of images, then one linear layer, ``classifier``."""

    features: nn.Sequential
    classifier: nn.Linear
    global_pooling: ClassVar[bool] = False
    """Average the maps over their pixels, instead of handing every pixel to the classifier."""

    def forward(self, images: Tensor) -> Tensor:
        """Map ``images [B, channels, H, W]`` to logits ``[B, num_classes]``."""
        maps = self.features(images)
        logits: Tensor = self.classifier(maps.mean((2, 3)) if self.global_pooling else maps.flatten(1))
        return logits


def check_numbers(network: str, image_size: tuple[int, int], **numbers: int) -> None:
    """Refuse numbers and image sides below 1.

    Raises:
        InputError: If one is below 1.
    """
    for name, number in (numbers | {"image_size": min(image_size)}).items():
        check_range(f"{network} {name}", number, 1)


def check_choice(network: str, option: str, value: str, allowed: Collection[str]) -> None:
    """Refuse an unknown word.

    Raises:
        InputError: If ``value`` is not in ``allowed``.
    """
    if value not in allowed:
        raise InputError(f"{network} {option} is {value!r}; use one of {', '.join(allowed)}")


def check_pixels(
    network: str, image_size: tuple[int, int], last: tuple[int, int], smallest: int, norm: str = "none"
) -> None:
    """Refuse images of which a network's last stage has nothing left to look at.

    That is no pixel, or a single one under instance norm: its deviation from the mean of one pixel is zero, so all
    images would get the same logits.

    Args:
        network: Its name in the message.
        image_size: ``(H, W)`` of the images.
        last: ``(H, W)`` of the maps in the last stage.
        smallest: The side of the smallest square that leaves one pixel.
        norm: The norm that sees these maps.

    Raises:
        InputError: If nothing is left.
    """
    said = f"{image_size[0]} x {image_size[1]} images"
    if min(last) < 1:
        raise InputError(f"{network} leaves no pixel of {said}: use images of at least {smallest} x {smallest}")
    if last == (1, 1) and norm == "instance":
        raise InputError(
            f"{network} leaves one pixel of {said}, which instance norm makes zero: use batch norm or larger images"
        )


def margin(image_size: tuple[int, int]) -> int:
    """Return how many zeros the first convolution puts around images beyond its own padding.

    Images of 28 x 28 pixels become 32 x 32, as in the reference networks of the field, which do so for one channel,
    whatever the size. Here it depends on the size alone, so that small images of one channel (such as 8 x 8 digits)
    are not drowned in zeros.
    """
    return 2 if tuple(image_size) == (28, 28) else 0


def image_norm(norm: ImageNorm, channels: int) -> nn.Module:
    """Return batch normalization, or group normalization with as many groups as channels, both affine."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(channels, channels)
