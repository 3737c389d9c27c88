"""Multi-formation: several training images decoded from each stored image.

The method is of Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization" (IDC, ICML 2022,
https://arxiv.org/abs/2205.14959). A stored image is a grid of tiles, and every tile, enlarged to the size of an image,
is one training image: the same number of stored values, and more to learn from.

Enlarging is two products with fixed matrices, one for rows and one for columns, so its backward is matrix products too,
in the same order in every run; torch's backward of a bilinear `interpolate` adds with atomics on CUDA.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from dd_lightning.functional.errors import InputError, check_range

FormationKind = Literal["single", "multi"]


@dataclass(frozen=True)
class Formation:
    """How many training images a stored image holds, and of which sizes.

    Args:
        factor: Tiles along each axis of a stored image; 1 stores training images as they are. IDC uses 2 for 32 x 32
            images and 3 for ImageNet.
        kind: ``single`` cuts by ``factor`` alone, IDC's default; ``multi`` by 1, 2, ..., ``factor`` in turn, so that
            the whole image is a training image too.

    Raises:
        InputError: If the factor is below 1 or the kind is unknown.

    Example:
        >>> Formation(3).per_image, Formation(3, "multi").per_image
        (9, 14)
    """

    factor: int = 1
    kind: FormationKind = "single"

    def __post_init__(self) -> None:
        check_range("factor", self.factor, 1, hint="1 stores images as they are")
        if self.kind not in get_args(FormationKind):
            raise InputError(f"formation is {self.kind!r}; use one of {', '.join(get_args(FormationKind))}")

    @property
    def factors(self) -> tuple[int, ...]:
        """The factors that an image is cut by, in the order of the decoded images."""
        return (self.factor,) if self.kind == "single" else tuple(range(1, self.factor + 1))

    @property
    def per_image(self) -> int:
        """Decoded images for each stored one: f^2 for ``single``, 1 + 4 + ... + f^2 for ``multi``."""
        return sum(factor**2 for factor in self.factors)

    def check_size(self, height: int, width: int) -> None:
        """Check that images of this size can be cut.

        Raises:
            InputError: If the factor exceeds the height or the width.
        """
        check_range("factor", self.factor, 1, min(height, width), hint=f"a tile of {height} x {width} needs a pixel")


def decode(images: Tensor, formation: Formation, pad: float = 0.0) -> Tensor:
    """Cut stored images into tiles, and enlarge every tile to the size of an image.

    A tile has ceil(H / f) x ceil(W / f) pixels. Where f does not divide H or W the image is first padded at the
    bottom and right; with f near the image size the last tiles can be padding alone. Enlarging is bilinear with
    ``align_corners=False``. The map is affine in the images (linear for ``pad`` 0), differentiable to any order, and
    works under ``vmap``.

    The order is image by image, so a set sorted by class stays sorted: all tiles of image 0, row by row, then those of
    image 1; for ``multi`` all tiles of factor 1, then of factor 2, and so on, within each image. (In the reference all
    first tiles come before all second ones.)

    Args:
        images: ``[n, ch, H, W]``, float32 or float64.
        formation: The cut.
        pad: Value of the padding, in the images' space. The default is the mean color of normalized images; IDC stores
            pixels in [0, 1] and pads with 0.5.

    Returns:
        ``[n * per_image, ch, H, W]``, dtype and device unchanged; ``images`` itself for factor 1.

    Raises:
        InputError: If the factor exceeds the height or the width.

    Example:
        >>> decode(torch.tensor([[[[0.0, 4.0], [8.0, 16.0]]]]), Formation(2))[:, 0, 0, 0]
        tensor([ 0.,  4.,  8., 16.])
    """
    _check_size(images, formation)
    if formation.factor == 1:
        return images
    return torch.cat([_enlarged_tiles(images, factor, pad) for factor in formation.factors], dim=1).flatten(0, 1)


def decode_targets(targets: Tensor, formation: Formation) -> Tensor:
    """Give every decoded image the target of the stored image that it comes from.

    Args:
        targets: ``[n]`` labels, or ``[n, C]`` soft labels.
        formation: The same as for `decode`.

    Returns:
        ``[n * per_image]`` or ``[n * per_image, C]``, in the order of `decode`.

    Example:
        >>> decode_targets(torch.tensor([7, 3]), Formation(2))
        tensor([7, 7, 7, 7, 3, 3, 3, 3])
    """
    return targets.repeat_interleave(formation.per_image, dim=0)


def pack(images: Tensor, formation: Formation) -> Tensor:
    """Fill stored images with shrunk training images: the start of a distillation.

    Images are shrunk by picking nearest pixels, as in IDC. f^2 consecutive images fill one stored image, row by row,
    so image k of them is tile k of `decode`. ``multi`` is packed like ``single``: only its smallest tiles are filled.

    Note:
        Where f does not divide H or W, tiles lie where `decode` cuts, and what exceeds the image is cropped. The
        reference's tiles differ in size by a pixel, and its own decoding cuts across them.

    Args:
        images: ``[n * f * f, ch, H, W]``.
        formation: The same as for `decode`.

    Returns:
        ``[n, ch, H, W]`` in the images' dtype: ``images`` itself for factor 1.

    Raises:
        InputError: If the factor exceeds the height or the width, or the last stored image would not be full.

    Example:
        >>> images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
        >>> pack(images, Formation(2))
        tensor([[[[0., 1.],
                  [2., 3.]]]])
    """
    _check_size(images, formation)
    factor = formation.factor
    if factor == 1:
        return images
    if len(images) % factor**2 != 0:
        raise InputError(
            f"cannot pack {len(images)} images with factor {factor}: their number must be a multiple of {factor**2}"
        )
    channels, height, width = images.shape[1:]
    side_y, side_x = _tile_size(height, width, factor)
    tiles = F.interpolate(images, size=(side_y, side_x), mode="nearest")
    grid = tiles.reshape(-1, factor, factor, channels, side_y, side_x).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, factor * side_y, factor * side_x)[..., :height, :width].contiguous()


def _check_size(images: Tensor, formation: Formation) -> None:
    formation.check_size(*images.shape[-2:])


def _tile_size(height: int, width: int, factor: int) -> tuple[int, int]:
    return -(-height // factor), -(-width // factor)


def _enlarged_tiles(images: Tensor, factor: int, pad: float) -> Tensor:
    """Return ``[n, f * f, ch, H, W]`` of ``images [n, ch, H, W]``."""
    if factor == 1:
        return images[:, None]
    samples, channels, height, width = images.shape
    side_y, side_x = _tile_size(height, width, factor)
    padded = F.pad(images, (0, factor * side_x - width, 0, factor * side_y - height), value=pad)
    tiles = padded.reshape(samples, channels, factor, side_y, factor, side_x)
    wide = tiles @ _enlarging(side_x, width, images).T  # [n, ch, f, side_y, f, W]
    return torch.einsum("hy,ncayvw->navchw", _enlarging(side_y, height, images), wide).flatten(1, 2)


def _enlarging(side: int, length: int, like: Tensor) -> Tensor:
    """Return the ``[length, side]`` matrix that enlarges one axis bilinearly, with ``align_corners=False``.

    Output pixel i samples the tile at ((2i + 1) side - length) / (2 length), held within the tile; pixel j of the
    tile has the weight 1 - |position - j| there, or 0. All of it is in integers, in units of 1 / (2 length), so the
    one rounding is that of the last division.
    """
    unit = 2 * length
    position = (2 * torch.arange(length, device=like.device) + 1) * side - length
    position = position.clamp(0, unit * (side - 1))
    distance = (position[:, None] - unit * torch.arange(side, device=like.device)).abs()
    return (unit - distance).clamp(min=0).to(like.dtype) / unit
