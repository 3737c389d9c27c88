"""Multi-formation: several training images decoded from each stored image.

The method is of Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization" (IDC, ICML 2022,
https://arxiv.org/abs/2205.14959). A stored image is a grid of tiles; every tile, enlarged to the size of an image, is
one training image. Enlarging is products with fixed matrices, and so is its backward, in the same order in every run;
torch's backward of a bilinear `interpolate` adds with atomics on CUDA.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from dd_lightning.functional.errors import InputError, check_choice, check_range

FormationKind = Literal["single", "multi"]


@dataclass(frozen=True)
class Formation:
    """How many training images a stored image holds, and of which sizes.

    Args:
        factor: Tiles along each axis of a stored image; 1 is none. IDC uses 2 at 32 x 32 pixels and 3 for ImageNet.
        kind: ``single`` cuts by ``factor`` alone, IDC's default; ``multi`` by 1, 2, ..., ``factor`` in turn.

    Raises:
        InputError: If the factor is below 1 or the kind is unknown.
    """

    factor: int = 1
    kind: FormationKind = "single"

    def __post_init__(self) -> None:
        check_range("factor", self.factor, 1, hint="1 stores images as they are")
        check_choice("formation", self.kind, get_args(FormationKind))

    @property
    def factors(self) -> tuple[int, ...]:
        """The factors that an image is cut by, in the order of the decoded images."""
        return (self.factor,) if self.kind == "single" else tuple(range(1, self.factor + 1))

    @property
    def per_image(self) -> int:
        """Decoded images for each stored one: f^2 for ``single``, 1 + 4 + ... + f^2 for ``multi``."""
        return sum(factor**2 for factor in self.factors)

    def check_size(self, height: int, width: int) -> None:
        """Raise `InputError` if the factor exceeds the height or the width of images."""
        check_range("factor", self.factor, 1, min(height, width), hint=f"a tile of {height} x {width} needs a pixel")


def decode(images: Tensor, formation: Formation, pad: float = 0.0) -> Tensor:
    """Cut stored images into tiles, and enlarge every tile to the size of an image: differentiable to any order.

    A tile has ceil(H / f) x ceil(W / f) pixels; where f does not divide H or W the image is first padded at the bottom
    and right. Enlarging is bilinear with ``align_corners=False``. The order is image by image, so a set sorted by class
    stays sorted: all tiles of image 0, row by row, for ``multi`` those of factor 1 first, then of 2, and so on; then
    those of image 1. (In the reference all first tiles come before all second ones.)

    Args:
        images: ``[n, ch, H, W]``, float32 or float64; the result is ``[n * per_image, ch, H, W]``.
        formation: The cut.
        pad: Value of the padding. 0 is the mean color of normalized images; IDC stores pixels and pads with 0.5.

    Raises:
        InputError: If the factor exceeds the height or the width.

    Example:
        >>> decode(torch.tensor([[[[0.0, 4.0], [8.0, 16.0]]]]), Formation(2))[:, 0, 0, 0]
        tensor([ 0.,  4.,  8., 16.])
    """
    formation.check_size(*images.shape[-2:])
    if formation.factor == 1:
        return images
    return torch.cat([_enlarged_tiles(images, factor, pad) for factor in formation.factors], dim=1).flatten(0, 1)


def decode_targets(targets: Tensor, formation: Formation) -> Tensor:
    """Return labels ``[n]`` or soft labels ``[n, C]`` for each image that `decode` makes: ``[n * per_image(, C)]``."""
    return targets.repeat_interleave(formation.per_image, dim=0)


def pack(images: Tensor, formation: Formation) -> Tensor:
    """Fill stored images with training images shrunk to their nearest pixels, as in IDC: the start of a distillation.

    f^2 consecutive images fill one stored image, row by row, so image k of them is tile k of `decode`. ``multi`` is
    packed like ``single``: only its smallest tiles are filled.

    NOTE: Where f does not divide H or W, tiles lie where `decode` cuts, and what exceeds the image is cropped. The
    reference's tiles differ in size by a pixel, and its own decoding cuts across them.

    Args:
        images: ``[n * f * f, ch, H, W]``; the result is ``[n, ch, H, W]``.
        formation: The same as for `decode`.

    Raises:
        InputError: If the factor exceeds the height or the width, or the last stored image would not be full.
    """
    formation.check_size(*images.shape[-2:])
    factor = formation.factor
    if factor == 1:
        return images
    if len(images) % factor**2 != 0:
        raise InputError(
            f"cannot pack {len(images)} images with factor {factor}: their number must be a multiple of {factor**2}"
        )
    channels, height, width = images.shape[1:]
    side_y, side_x = -(-height // factor), -(-width // factor)
    tiles = F.interpolate(images, size=(side_y, side_x), mode="nearest")
    grid = tiles.reshape(-1, factor, factor, channels, side_y, side_x).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, factor * side_y, factor * side_x)[..., :height, :width].contiguous()


def _enlarged_tiles(images: Tensor, factor: int, pad: float) -> Tensor:
    """Return ``[n, f * f, ch, H, W]`` of ``images [n, ch, H, W]``."""
    if factor == 1:
        return images[:, None]
    samples, channels, height, width = images.shape
    side_y, side_x = -(-height // factor), -(-width // factor)
    padded = F.pad(images, (0, factor * side_x - width, 0, factor * side_y - height), value=pad)
    tiles = padded.reshape(samples, channels, factor, side_y, factor, side_x)
    wide = tiles @ _enlarging(side_x, width, images).T  # [n, ch, f, side_y, f, W]
    return torch.einsum("hy,ncayvw->navchw", _enlarging(side_y, height, images), wide).flatten(1, 2)


def _enlarging(side: int, length: int, like: Tensor) -> Tensor:
    """Return the ``[length, side]`` matrix that enlarges one axis bilinearly, with ``align_corners=False``.

    Output pixel i samples the tile at ((2i + 1) side - length) / (2 length), held within it, where its pixel j has the
    weight 1 - |position - j|, or 0. In integers, in units of 1 / (2 length), so only the last division rounds.
    """
    unit = 2 * length
    position = (2 * torch.arange(length, device=like.device) + 1) * side - length
    position = position.clamp(0, unit * (side - 1))
    distance = (position[:, None] - unit * torch.arange(side, device=like.device)).abs()
    return (unit - distance).clamp(min=0).to(like.dtype) / unit
