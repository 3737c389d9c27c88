"""Differentiable Siamese augmentation (DSA): a random draw, and a pure function that replays it on images.

The method is of Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation" (ICML 2021,
https://arxiv.org/abs/2102.08259); operations and ranges are those of trajectory matching
(`ParamDiffAug` in https://github.com/GeorgeCazenavette/mtt-distillation/blob/50dccea/utils.py#L499-L676).

One draw serves every candidate of a step, and the student's way back. All backward passes are bit-reproducible on every
device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.warp import rotation_radius, scale_radius, shift, warp

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
IDENTITY = "none"

BRIGHTNESS = 1.0  # width of the interval, centered at 0, of what is added to an image
SATURATION = 2.0  # largest factor on the deviation from the pixel's mean over channels; the smallest is 0
CONTRAST = 0.5  # smallest factor on the deviation from the image's mean; the largest is 1 more
CROP = 0.125  # largest shift along each axis, as a part of that axis, filled with zeros
CUTOUT = 0.5  # side of the rectangle set to zero, as a part of the axis
FLIP = 0.5  # probability of a horizontal flip
SCALE = 1.2  # largest factor of the sampling grid along each axis, independently; the smallest is its inverse
ROTATE = 15.0  # largest rotation of the sampling grid, either way, in degrees


class AugmentationDraw(NamedTuple):
    """Everything random about one augmentation.

    Attributes:
        operation: One of `OPERATIONS`, or ``none``.
        values: ``[n, k]`` float32, with n the batch size, or 1 if all samples share them. The columns are, by
            operation: brightness shift, saturation and contrast factor; row and column shift; row and column of the
            hole's center; 1 to flip, else 0; width and height factor; angle in radians.
        size: ``(H, W)`` of the images.
        extent: (rows, columns) that the host must know: the hole of ``cutout``, the radius of the backward's gather
            window for ``scale`` and ``rotate``, (0, 0) for the others.
    """

    operation: str
    values: Tensor
    size: tuple[int, int]
    extent: tuple[int, int]

    def part(self, first: int, last: int) -> "AugmentationDraw":
        """Return the draw of the samples ``first`` up to ``last``, exclusive."""
        return self if len(self.values) == 1 else self._replace(values=self.values[first:last])


@dataclass(frozen=True)
class DSA:
    """Which operations there are; their ranges are the module's constants.

    Args:
        strategy: Operations to choose among, joined by underscores; ``none`` leaves images alone.

    Raises:
        InputError: If the strategy names an unknown operation or one twice.
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"

    def __post_init__(self) -> None:
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise InputError(
                    f"augmentation strategy {self.strategy!r} names {operation!r}, which is none of "
                    f"{', '.join(OPERATIONS)}: join some of these with underscores, or use 'none'"
                )
        if len(set(self.operations)) != len(self.operations):
            raise InputError(
                f"augmentation strategy {self.strategy!r} names an operation twice: name each at most once"
            )

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that the strategy names, in its order; empty for ``none``."""
        return () if self.strategy == IDENTITY else tuple(self.strategy.split("_"))

    def draw(
        self, generator: torch.Generator, batch: int, size: tuple[int, int], siamese: bool = False
    ) -> AugmentationDraw:
        """Draw one operation, uniformly, and its parameters, independently for each sample.

        Args:
            generator: Draws on its own device (an accelerator synchronizes once, for the host must know the
                operation); advanced unless the strategy is ``none``.
            batch: Number of samples.
            size: ``(H, W)`` of the images.
            siamese: Draw one set of parameters for all samples: gradient matching does, between real and synthetic
                images; trajectory matching does not (the reference's seed of -1).

        Raises:
            InputError: If the batch is empty or an axis is shorter than 2 pixels.
        """
        operation = IDENTITY
        if self.operations:
            choice = torch.randint(len(self.operations), (1,), generator=generator, device=generator.device)
            operation = self.operations[int(choice)]
        return self.draw_operation(operation, generator, batch, size, siamese)

    def draw_operation(
        self, operation: str, generator: torch.Generator, batch: int, size: tuple[int, int], siamese: bool = False
    ) -> AugmentationDraw:
        """Draw the parameters of one operation, whether or not the strategy names it, as :meth:`draw` does."""
        check_range("augmentation batch", batch, 1)
        check_range("augmentation size", min(size), 2, hint="pixels along each axis")
        samples, device = 1 if siamese else batch, generator.device

        def uniform(columns: int) -> Tensor:
            # float32 whatever the images are: both precisions then see the very same numbers.
            return torch.rand(samples, columns, generator=generator, device=device, dtype=torch.float32)

        def integers(limits: Sequence[tuple[int, int]]) -> Tensor:
            columns = [
                torch.randint(low, high + 1, (samples,), generator=generator, device=device) for low, high in limits
            ]
            return torch.stack(columns, dim=1).to(torch.float32)

        extent = (0, 0)
        if operation == "color":
            brightness, saturation, contrast = uniform(3).unbind(1)
            brightness = (brightness - 0.5) * BRIGHTNESS
            values = torch.stack([brightness, saturation * SATURATION, contrast + CONTRAST], dim=1)
        elif operation == "crop":
            limits = [_part(length, CROP) for length in size]
            values = integers([(-limit, limit) for limit in limits])
        elif operation == "cutout":
            extent = (_part(size[0], CUTOUT), _part(size[1], CUTOUT))
            # An even hole has no central pixel, so its center may also be one past the last: the reference's rule.
            values = integers([(0, length - side % 2) for length, side in zip(size, extent, strict=True)])
        elif operation == "flip":
            values = (uniform(1) < FLIP).to(torch.float32)
        elif operation == "scale":
            values = 1 / SCALE + uniform(2) * (SCALE - 1 / SCALE)
            extent = scale_radius(SCALE)
        elif operation == "rotate":
            largest = math.radians(ROTATE)
            values = (uniform(1) * 2 - 1) * largest
            extent = rotation_radius(largest, size)
        elif operation == IDENTITY:
            values = torch.empty(samples, 0, dtype=torch.float32, device=device)
        else:
            raise ValueError(f"{operation!r} is no augmentation operation")
        return AugmentationDraw(operation, values, size, extent)


def augment(images: Tensor, draw: AugmentationDraw) -> Tensor:
    """Apply a draw to images: a pure function of its arguments, with exact derivatives of any order, forward mode too.

    The empty part of a shifted, cut, scaled or rotated image is 0 in the images' own space.

    Args:
        images: ``[B, C, H, W]``, float32 or float64; so is the result.
        draw: For the same size and number of samples (or siamese).

    Raises:
        InputError: If the draw was made for another image size or another number of samples.

    Example:
        >>> draw = AugmentationDraw("crop", torch.tensor([[0.0, 1.0]]), size=(1, 3), extent=(0, 0))
        >>> augment(torch.tensor([[[[1.0, 2.0, 3.0]]]]), draw)
        tensor([[[[2., 3., 0.]]]])
    """
    operation, extent = draw.operation, draw.extent
    if operation == IDENTITY:
        return images
    size, samples = tuple(images.shape[-2:]), len(draw.values)
    if size != tuple(draw.size) or samples not in (1, len(images)):
        raise InputError(
            f"augmentation drawn for {samples} samples of size {tuple(draw.size)}, got {len(images)} of size {size}: "
            "draw again"
        )
    values = draw.values.to(device=images.device, dtype=images.dtype)
    if operation == "color":
        return _color(images, values)
    if operation == "crop":
        return shift(images, values.to(torch.int64))
    if operation == "cutout":
        return images.masked_fill(_hole(images, values.to(torch.int64), extent), 0.0)
    if operation == "flip":
        return torch.where(values[:, :, None, None] > 0.5, images.flip(-1), images)
    if operation == "scale":
        return warp(images, torch.diag_embed(values), extent)
    cosine, sine = values.cos(), values.sin()
    return warp(images, torch.cat([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2), extent)


def join_draws(
    draws: Sequence[AugmentationDraw], batches: Sequence[int]
) -> list[tuple[tuple[int, ...], AugmentationDraw]]:
    """Join the draws of batches of these sizes by operation, so that few calls of `augment` do them all.

    All are of one policy and image size. Returns positions of batches that belong together, and the draw for their
    images, one batch after another.

    Example:
        >>> draws = [AugmentationDraw("flip", torch.ones(n, 1), (2, 2), (0, 0)) for n in (2, 1)]
        >>> draws.insert(1, AugmentationDraw("none", torch.ones(1, 0), (2, 2), (0, 0)))
        >>> [(members, joined.operation, len(joined.values)) for members, joined in join_draws(draws, [2, 2, 3])]
        [((0, 2), 'flip', 5), ((1,), 'none', 2)]
    """
    groups: dict[str, list[int]] = {}
    for position, draw in enumerate(draws):
        groups.setdefault(draw.operation, []).append(position)
    joined = []
    for members in groups.values():
        values = torch.cat([draws[i].values.expand(batches[i], -1) for i in members])
        joined.append((tuple(members), draws[members[0]]._replace(values=values)))
    return joined


def most_memory_intensive(operations: Sequence[str]) -> str:
    """Return the operation that needs the most memory, forward and backward; ``none`` of no operation.

    A transposed warp reads several pixels for each one that it writes, a shift one with its indices.

    Example:
        >>> most_memory_intensive(["color", "crop", "rotate"]), most_memory_intensive([])
        ('rotate', 'none')
    """
    order = ("scale", "rotate", "crop", "color", "flip", "cutout", IDENTITY)
    return next(operation for operation in order if operation in (*operations, IDENTITY))


def _part(length: int, ratio: float) -> int:
    """Return the given part of an axis in whole pixels, halves rounded up as in the reference."""
    return int(length * ratio + 0.5)


def _color(images: Tensor, values: Tensor) -> Tensor:
    brightness, saturation, contrast = values[:, :, None, None, None].unbind(1)
    images = images + brightness
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * saturation + gray
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - level) * contrast + level


def _hole(images: Tensor, centers: Tensor, sides: tuple[int, int]) -> Tensor:
    inside = []
    for axis, side in enumerate(sides):
        position = torch.arange(images.shape[2 + axis], device=images.device)
        first = centers[:, axis : axis + 1] - side // 2
        inside.append((position >= first) & (position < first + side))
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]
