"""Differentiable Siamese augmentation (DSA): a random draw, and a pure function that replays it on images.

The method is of Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation" (ICML 2021,
https://arxiv.org/abs/2102.08259); operations and ranges are those that trajectory matching uses
(`ParamDiffAug` in https://github.com/GeorgeCazenavette/mtt-distillation/blob/50dccea/utils.py#L499-L676).

The draw is kept apart from its application because one draw is used several times: on every candidate of a
step, and again when the unrolled student is walked backwards. All backward passes are gathers, hence
bit-reproducible on every device; the one that torch gives `grid_sample` adds with atomics on CUDA, in an
order that changes from run to run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from dd_lightning.functional.errors import InputError

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
IDENTITY = "none"


class AugmentationDraw(NamedTuple):
    """Everything random about one augmentation, so that it can be replayed.

    Attributes:
        operation: One of ``color``, ``crop``, ``cutout``, ``flip``, ``scale``, ``rotate``, or ``none``.
        values: ``[n, k]`` float32 parameters, with ``n`` the batch size, or 1 when all samples share them.
            The columns are, by operation: brightness shift, saturation factor and contrast factor; row and
            column shift; row and column of the hole's center; 1 to flip, else 0; width and height factor;
            angle in radians.
        size: ``(H, W)`` of the images that the draw was made for.
        extent: What must be known on the host, as (rows, columns): the hole's size for ``cutout``, the radius
            of the backward's gather window for ``scale`` and ``rotate``, and (0, 0) for the others.
    """

    operation: str
    values: Tensor
    size: tuple[int, int]
    extent: tuple[int, int]

    def part(self, first: int, last: int) -> "AugmentationDraw":
        """Return the draw of the samples ``first`` up to ``last``, exclusive; a shared one is that of any samples."""
        return self if len(self.values) == 1 else self._replace(values=self.values[first:last])


@dataclass(frozen=True)
class DSA:
    """The augmentation policy: which operations there are, and how far each one goes.

    Every default is the value that trajectory matching uses for all its data sets (link in the module's
    docstring). The number in parentheses is what the operation does at the default.

    Args:
        strategy: Operations to choose among, joined by underscores, each at most once; ``none`` leaves images
            alone.
        brightness: Width of the interval, centered at 0, of the value added to an image (-0.5 to 0.5).
        saturation: Largest factor on the deviation from the pixel's mean over channels (0 to 2).
        contrast: Smallest factor on the deviation from the image's mean; the largest is 1 more (0.5 to 1.5).
        crop: Largest shift along each axis, as a part of that axis (4 of 32 pixels), filled with zeros.
        cutout: Side of the rectangle set to zero, as a part of the axis (16 of 32 pixels).
        flip: Probability of a horizontal flip.
        scale: Largest factor of the sampling grid along each axis, independently; the smallest is its
            inverse.
        rotate: Largest rotation of the sampling grid, either way, in degrees.

    Raises:
        InputError: If the strategy names an unknown operation or one twice, or if a range makes no sense.

    Example:
        >>> policy = DSA(strategy="crop_flip")
        >>> draw = policy.draw(torch.Generator().manual_seed(0), batch=4, size=(8, 8))
        >>> draw.operation, tuple(draw.values.shape)
        ('crop', (4, 2))
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    cutout: float = 0.5
    flip: float = 0.5
    scale: float = 1.2
    rotate: float = 15.0

    def __post_init__(self) -> None:
        operations = self.operations
        for token in operations:
            if token not in OPERATIONS:
                raise InputError(
                    f"augmentation strategy {self.strategy!r} names {token!r}, which is none of "
                    f"{', '.join(OPERATIONS)}: join some of these with underscores, or say 'none'"
                )
        if len(set(operations)) != len(operations):
            raise InputError(
                f"augmentation strategy {self.strategy!r} names an operation twice: name each at most once"
            )
        limits = {
            "brightness": (0.0, math.inf),
            "saturation": (0.0, math.inf),
            "contrast": (0.0, math.inf),
            "crop": (0.0, 1.0),
            "cutout": (0.0, 1.0),
            "flip": (0.0, 1.0),
            "scale": (1.0, math.inf),
            "rotate": (0.0, 180.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                allowed = f"finite and at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise InputError(f"augmentation {name}={value} is out of range: it must be {allowed}")

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that the strategy names, in its order; empty for ``none``."""
        return () if self.strategy == IDENTITY else tuple(self.strategy.split("_"))

    def draw(
        self, generator: torch.Generator, batch: int, size: tuple[int, int], siamese: bool = False
    ) -> AugmentationDraw:
        """Draw one operation, uniformly, and its parameters, independently for each sample.

        The draws are made on the generator's device. Which operation it is must be known on the host, so a
        generator that lives on an accelerator costs one synchronization per call.

        Args:
            generator: Source of all randomness; it is advanced, unless the strategy is ``none``.
            batch: Number of samples.
            size: ``(H, W)`` of the images.
            siamese: Draw one set of parameters for all samples. Trajectory matching does not (in the
                reference the seed is -1, which switches sharing off); gradient matching shares between real
                and synthetic images.

        Returns:
            The draw, to be handed to `augment`.

        Raises:
            InputError: If the batch is empty or an axis is shorter than 2 pixels.
        """
        operations = self.operations
        operation = IDENTITY
        if operations:
            choice = torch.randint(len(operations), (1,), generator=generator, device=generator.device)
            operation = operations[int(choice)]
        return self.draw_operation(operation, generator, batch, size, siamese)

    def draw_operation(
        self, operation: str, generator: torch.Generator, batch: int, size: tuple[int, int], siamese: bool = False
    ) -> AugmentationDraw:
        """Draw the parameters of one operation, whether or not the strategy names it.

        Args:
            operation: One of ``color``, ``crop``, ``cutout``, ``flip``, ``scale``, ``rotate``, or ``none``.
            generator: Source of all randomness; it is advanced, unless the operation is ``none``.
            batch: Number of samples.
            size: ``(H, W)`` of the images.
            siamese: Draw one set of parameters for all samples.

        Returns:
            The draw, to be handed to `augment`.

        Raises:
            InputError: If there is no such operation, the batch is empty or an axis is shorter than 2 pixels.

        Example:
            >>> DSA().draw_operation("crop", torch.Generator().manual_seed(0), batch=4, size=(8, 8), siamese=True)
            AugmentationDraw(operation='crop', values=tensor([[ 1., -1.]]), size=(8, 8), extent=(0, 0))
        """
        if batch < 1:
            raise InputError(f"cannot draw an augmentation for batch={batch}: it needs at least 1 sample")
        if min(size) < 2:
            raise InputError(f"cannot augment images of size {size}: each axis needs at least 2 pixels")
        samples = 1 if siamese else batch

        def uniform(columns: int) -> Tensor:
            # float32 whatever the images are: both precisions then see the very same numbers.
            return torch.rand(samples, columns, generator=generator, device=generator.device, dtype=torch.float32)

        def integers(low: int, high: int) -> Tensor:
            drawn = torch.randint(low, high + 1, (samples,), generator=generator, device=generator.device)
            return drawn.to(torch.float32)

        extent = (0, 0)
        if operation == IDENTITY:
            values = torch.empty(samples, 0, dtype=torch.float32, device=generator.device)
        elif operation == "color":
            brightness, saturation, contrast = uniform(3).unbind(1)
            values = torch.stack(
                [
                    (brightness - 0.5) * self.brightness,
                    saturation * self.saturation,
                    contrast + self.contrast,
                ],
                dim=1,
            )
        elif operation == "crop":
            limits = [_part(length, self.crop) for length in size]
            values = torch.stack([integers(-limit, limit) for limit in limits], dim=1)
        elif operation == "cutout":
            extent = (_part(size[0], self.cutout), _part(size[1], self.cutout))
            # An even hole has no central pixel, so its center may also be one past the last: the reference's
            # rule.
            values = torch.stack(
                [integers(0, length - side % 2) for length, side in zip(size, extent, strict=True)], dim=1
            )
        elif operation == "flip":
            values = (uniform(1) < self.flip).to(torch.float32)
        elif operation == "scale":
            values = 1 / self.scale + uniform(2) * (self.scale - 1 / self.scale)
            extent = _gather_radius(self.scale, self.scale)
        elif operation == "rotate":
            limit_angle = math.radians(self.rotate)
            values = (uniform(1) * 2 - 1) * limit_angle
            aspect = (size[1] - 1) / (size[0] - 1)
            extent = _gather_radius(_rotated_reach(1 / aspect, limit_angle), _rotated_reach(aspect, limit_angle))
        else:
            raise InputError(
                f"augmentation operation {operation!r} is unknown: it must be one of {', '.join(OPERATIONS)} or 'none'"
            )
        return AugmentationDraw(operation, values, size, extent)


def augment(images: Tensor, draw: AugmentationDraw) -> Tensor:
    """Apply a draw to images: a pure function of its arguments, differentiable in the images.

    The empty part of a shifted, cut, scaled or rotated image is 0 in the space that the images are in
    (normalized or whitened, usually). The geometric operations are linear maps whose backward is written out
    as the transposed map, so derivatives of any order, and forward mode, are exact.

    Args:
        images: ``[B, C, H, W]``, float32 or float64.
        draw: From `DSA.draw`, for the same size and for the same number of samples (or siamese).

    Returns:
        ``[B, C, H, W]`` in the images' dtype, on their device.

    Raises:
        InputError: If the draw was made for another image size or another number of samples.

    Example:
        >>> draw = AugmentationDraw("crop", torch.tensor([[0.0, 1.0]]), size=(1, 3), extent=(0, 0))
        >>> augment(torch.tensor([[[[1.0, 2.0, 3.0]]]]), draw)
        tensor([[[[2., 3., 0.]]]])
    """
    if draw.operation == IDENTITY:
        return images
    if tuple(images.shape[-2:]) != tuple(draw.size):
        raise InputError(
            f"augmentation drawn for images of size {draw.size}, got {tuple(images.shape[-2:])}: "
            "draw again with the images' size"
        )
    if draw.values.shape[0] not in (1, images.shape[0]):
        raise InputError(
            f"augmentation drawn for {draw.values.shape[0]} samples, got {images.shape[0]}: "
            "draw again with the images' batch size, or with siamese=True"
        )
    values = draw.values.to(device=images.device, dtype=images.dtype)
    return _APPLY[draw.operation](images, values, draw.extent)


def join_draws(
    draws: Sequence[AugmentationDraw], batches: Sequence[int]
) -> list[tuple[tuple[int, ...], AugmentationDraw]]:
    """Join the draws of several batches, one for each operation, so that few calls of `augment` do them all.

    Args:
        draws: One for each batch, all of one policy.
        batches: Their sizes.

    Returns:
        Positions of the batches that belong together, and the draw for their images, one batch after another.

    Example:
        >>> draws = [AugmentationDraw("flip", torch.ones(n, 1), (2, 2), (0, 0)) for n in (2, 1)]
        >>> draws.insert(1, AugmentationDraw("none", torch.ones(1, 0), (2, 2), (0, 0)))
        >>> [(members, joined.operation, len(joined.values)) for members, joined in join_draws(draws, [2, 2, 3])]
        [((0, 2), 'flip', 5), ((1,), 'none', 2)]
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, draw in enumerate(draws):
        groups.setdefault((draw.operation, draw.size, draw.extent), []).append(position)
    return [
        (
            tuple(members),
            draws[members[0]]._replace(values=torch.cat([draws[i].values.expand(batches[i], -1) for i in members])),
        )
        for members in groups.values()
    ]


def most_memory_intensive(operations: Sequence[str]) -> str:
    """Return which of some operations needs the most memory on its way there and back; ``none`` of no operation.

    A transposed warp reads several pixels for each one that it gives, a shift one with its indices.

    Example:
        >>> most_memory_intensive(["color", "crop", "rotate"]), most_memory_intensive([])
        ('rotate', 'none')
    """
    order = ("scale", "rotate", "crop", "color", "flip", "cutout", IDENTITY)
    return next(operation for operation in order if operation in (*operations, IDENTITY))


def _part(length: int, ratio: float) -> int:
    """Return the given part of an axis in whole pixels, halves rounded up as in the reference."""
    return int(length * ratio + 0.5)


def _gather_radius(rows: float, columns: float) -> tuple[int, int]:
    """Return the radius of a window of output pixels, around a rounded center, that holds all within reach.

    An integer q with |q - c| < reach has |q - round(c)| < reach + 1/2.
    """
    slack = 1e-3  # room for the rounding of the draw, far above it
    return math.ceil(rows + slack - 0.5), math.ceil(columns + slack - 0.5)


def _rotated_reach(aspect: float, angle: float) -> float:
    """Return the maximum of |cos t| + aspect |sin t| over |t| <= angle.

    It is the half-width of a rotated 2 x 2 square, so it is how far, along one axis, an output pixel that
    samples within 1 pixel of p can be from p's preimage.
    """
    if math.atan(aspect) <= angle:
        return math.hypot(1.0, aspect)
    return math.cos(angle) + aspect * math.sin(angle)


def _color(images: Tensor, values: Tensor, extent: tuple[int, int]) -> Tensor:
    brightness, saturation, contrast = values[:, :, None, None, None].unbind(1)
    images = images + brightness
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * saturation + gray
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - level) * contrast + level


def _crop(images: Tensor, values: Tensor, extent: tuple[int, int]) -> Tensor:
    return _apply_shift(images, values.to(torch.int64))


def _cutout(images: Tensor, values: Tensor, extent: tuple[int, int]) -> Tensor:
    inside = []
    for axis, side in enumerate(extent):
        position = torch.arange(images.shape[2 + axis], device=images.device)
        first = values[:, axis : axis + 1].to(torch.int64) - side // 2
        inside.append((position >= first) & (position < first + side))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole, 0.0)


def _flip(images: Tensor, values: Tensor, extent: tuple[int, int]) -> Tensor:
    return torch.where(values[:, :, None, None] > 0.5, images.flip(-1), images)


def _scale(images: Tensor, values: Tensor, extent: tuple[int, int]) -> Tensor:
    return _apply_warp(images, torch.diag_embed(values), extent)


def _rotate(images: Tensor, values: Tensor, extent: tuple[int, int]) -> Tensor:
    cosine, sine = values.cos(), values.sin()
    return _apply_warp(images, torch.cat([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2), extent)


_APPLY: dict[str, Callable[[Tensor, Tensor, tuple[int, int]], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read images at integer positions, giving 0 outside.

    Args:
        images: ``[B, C, H, W]``.
        rows: ``[n, ...]`` with ``n`` either B or 1.
        columns: The same shape.

    Returns:
        ``[B, C, ...]``.
    """
    batch, channels, height, width = images.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    index = index.flatten(1)[:, None].expand(batch, channels, -1)
    read = images.flatten(2).gather(2, index).reshape(batch, channels, *rows.shape[1:])
    return read.masked_fill(~inside[:, None], 0.0)


class _Shift(torch.autograd.Function):
    """Zero-filled shift: output pixel q is input pixel q + offset. Its transpose is the shift by -offset."""

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, offsets: Tensor) -> Tensor:
        samples, (height, width) = offsets.shape[0], images.shape[-2:]
        rows = torch.arange(height, device=images.device)[:, None] + offsets[:, 0, None, None]
        columns = torch.arange(width, device=images.device) + offsets[:, 1, None, None]
        return _pixels(images, rows.expand(samples, height, width), columns.expand(samples, height, width))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (offsets,) = ctx.saved_tensors
        return _apply_shift(cotangent, -offsets), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # noqa: ANN401
        (offsets,) = ctx.saved_tensors
        return _apply_shift(tangent, offsets)


class _Warp(torch.autograd.Function):
    """Resampling under a linear map of the grid, or the transpose of that; each is the other's backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, matrices: Tensor, extent: tuple[int, int], transposed: bool) -> Tensor:
        return _gather_transposed(images, matrices, extent) if transposed else _resample(images, matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        _, matrices, ctx.extent, ctx.transposed = inputs
        ctx.save_for_backward(matrices)
        ctx.save_for_forward(matrices)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (matrices,) = ctx.saved_tensors
        return _apply_warp(cotangent, matrices, ctx.extent, not ctx.transposed), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # noqa: ANN401
        (matrices,) = ctx.saved_tensors
        return _apply_warp(tangent, matrices, ctx.extent, ctx.transposed)


def _apply_shift(images: Tensor, offsets: Tensor) -> Tensor:
    shifted: Tensor = _Shift.apply(images, offsets)
    return shifted


def _apply_warp(images: Tensor, matrices: Tensor, extent: tuple[int, int], transposed: bool = False) -> Tensor:
    warped: Tensor = _Warp.apply(images, matrices, extent, transposed)
    return warped


def _resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample ``images [B, C, H, W]`` bilinearly at ``matrices [n, 2, 2]`` times the pixel grid, 0 outside."""
    grid = F.affine_grid(F.pad(matrices, (0, 1)), [matrices.shape[0], *images.shape[1:]], align_corners=True)
    grid = grid.expand(images.shape[0], -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _gather_transposed(cotangent: Tensor, matrices: Tensor, extent: tuple[int, int]) -> Tensor:
    """Apply the transpose of `_resample` by reading, never by adding into shared memory.

    Input pixel p took part in the output pixels q whose sampling point Aq is within 1 pixel of p, with weight
    (1 - |Aq - p|) along each axis. They lie around A^-1 p, in the window that `extent` bounds.
    """
    height, width = cotangent.shape[-2:]
    device, dtype = cotangent.device, cotangent.dtype
    # The matrices act on coordinates that run over [-1, 1] on both axes; in pixels, off-diagonals feel the
    # aspect.
    aspect = (width - 1) / (height - 1)
    xx, xy, yx, yy = (entry[:, None, None, None] for entry in matrices.flatten(1).unbind(1))
    xy, yx = xy * aspect, yx / aspect
    determinant = xx * yy - xy * yx

    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    p_y = torch.arange(height, device=device, dtype=dtype)[:, None] - middle_y
    p_x = torch.arange(width, device=device, dtype=dtype) - middle_x
    near_y = ((xx * p_y - yx * p_x) / determinant + middle_y).round().to(torch.int64)  # [n, 1, H, W]
    near_x = ((yy * p_x - xy * p_y) / determinant + middle_x).round().to(torch.int64)

    steps_y = torch.arange(-extent[0], extent[0] + 1, device=device)
    steps_x = torch.arange(-extent[1], extent[1] + 1, device=device)
    steps_y, steps_x = (steps.flatten()[:, None, None] for steps in torch.meshgrid(steps_y, steps_x, indexing="ij"))
    rows, columns = near_y + steps_y, near_x + steps_x  # [n, K, H, W], K output pixels for each input pixel
    q_y, q_x = rows.to(dtype) - middle_y, columns.to(dtype) - middle_x
    weight_y = (1 - (yx * q_x + yy * q_y - p_y).abs()).clamp(min=0)
    weight_x = (1 - (xx * q_x + xy * q_y - p_x).abs()).clamp(min=0)

    return (_pixels(cotangent, rows, columns) * (weight_y * weight_x)[:, None]).sum(dim=2)
