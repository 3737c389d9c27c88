"""What the families share: the suffixes of names, checks of numbers, norm layers, the margin of 28 x 28 images."""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from torch import nn

from dd_lightning.functional.errors import InputError

ImageNorm = Literal["batch", "instance"]
IMAGE_NORMS: dict[str, ImageNorm] = {"IN": "instance", "BN": "batch"}


class Suffix(NamedTuple):
    """One thing that a name may say after its family and depth.

    Attributes:
        kind: What it chooses, such as ``norm``.
        default: What holds where a name says nothing, such as ``IN``.
        words: The words it may be; when empty, the default's first letter followed by a number.
    """

    kind: str
    default: str
    words: Collection[str] = ()

    def read(self, part: str) -> str | None:
        """Return the choice in its canonical form, or None where the part is about something else."""
        if part in self.words:
            return part
        if not self.words and part[:1] == self.default[0] and is_count(part[1:]):
            return f"{self.default[0]}{int(part[1:])}"
        return None


def read_suffixes(
    name: str, parts: Sequence[str], form: str, suffixes: Sequence[Suffix]
) -> tuple[dict[str, str], list[str]]:
    """Read suffixes given in any order.

    Args:
        name: The whole name, for messages.
        parts: The name's parts that are suffixes.
        form: What a full name looks like, for messages.
        suffixes: What may be said, in the canonical order.

    Returns:
        What was chosen of every kind, and the canonical suffixes: in the fixed order, defaults left out.

    Raises:
        InputError: If a part is not understood or says again what another one has said.

    Example:
        >>> read_suffixes("Net-BN-W064", ["BN", "W064"], "", [Suffix("width", "W8"), Suffix("norm", "IN", ("BN",))])
        ({'width': 'W64', 'norm': 'BN'}, ['W64', 'BN'])
    """
    said: dict[str, str] = {}
    for part in parts:
        choice = {suffix.kind: word for suffix in suffixes if (word := suffix.read(part)) is not None}
        if not choice:
            raise InputError(f"network {name!r} has the unknown suffix {part!r}: the form is {form}")
        ((kind, word),) = choice.items()
        if kind in said:
            raise InputError(f"network {name!r} gives its {kind} twice: keep one of {said[kind]} and {word}")
        said |= choice
    choices = {suffix.kind: said.get(suffix.kind, suffix.default) for suffix in suffixes}
    return choices, [choices[kind] for kind, default, _ in suffixes if choices[kind] != default]


def read_depth(name: str, parts: Sequence[str], form: str, depths: Sequence[int]) -> int:
    """Read the first part of a name of a family that has only some depths.

    Args:
        name: The whole name, for messages.
        parts: The name's parts after the family.
        form: What a full name looks like, for messages.
        depths: The depths that the family has.

    Raises:
        InputError: If the name has no depth or another one.
    """
    if not parts or not is_count(parts[0]):
        raise InputError(f"network {name!r} has no depth: the form is {form}")
    if int(parts[0]) not in depths:
        raise InputError(
            f"network {name!r} has depth {int(parts[0])}: use {' or '.join(map(str, depths))}; the form is {form}"
        )
    return int(parts[0])


def is_count(text: str) -> bool:
    """Tell whether a text is a number written in decimal digits only."""
    return text.isascii() and text.isdigit()


def check_numbers(network: str, image_size: tuple[int, int], **numbers: int) -> None:
    """Refuse numbers below 1.

    Args:
        network: Its name in the message.
        image_size: ``(H, W)``.
        **numbers: The others, by name.

    Raises:
        InputError: If one is below 1.
    """
    for name, number in (numbers | {"image_size": min(image_size)}).items():
        if number < 1:
            raise InputError(f"{network} {name}={number} must be at least 1")


def check_choice(network: str, name: str, value: str, allowed: Collection[str]) -> None:
    """Refuse an unknown word.

    Args:
        network: Its name in the message.
        name: The option's name.
        value: What was said.
        allowed: What may be said.

    Raises:
        InputError: If ``value`` is not in ``allowed``.
    """
    if value not in allowed:
        raise InputError(f"{network} {name}={value!r} is unknown: say one of {', '.join(allowed)}")


def check_pixels(
    network: str, image_size: tuple[int, int], last: tuple[int, int], smallest: int, norm: str = "none"
) -> None:
    """Refuse images of which a network's last stage has nothing left to look at.

    That is no pixel, or a single one under instance norm: its deviation from the mean of one pixel is zero, so
    that all images would get the same logits.

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

    Images of 28 x 28 pixels become 32 x 32, as in the reference networks of the field, which do so for one
    channel only, whatever the size. Here it goes by size only, whatever the number of channels, so that small
    images of one channel (such as 8 x 8 digits) are not drowned in zeros.
    """
    return 2 if tuple(image_size) == (28, 28) else 0


def image_norm(norm: ImageNorm, channels: int) -> nn.Module:
    """Return batch normalization, or group normalization with as many groups as channels, both affine."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(channels, channels)
