"""ZCA whitening of images: fit on the training set, apply to both sets, invert to look at the result.

With S and U the eigenvalues and eigenvectors of the covariance of the flattened images, the map is
``z = (x - mean) U diag((S + eps)^(-1/2)) U^T``. Trajectory matching whitens this way (kornia's `ZCAWhitening`
with ``eps=0.1``; https://github.com/GeorgeCazenavette/mtt-distillation/blob/50dccea/utils.py#L137-L165).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range

# Rows converted to float64 at a time: 100 MB at 32 x 32 x 3 pixels.
_CHUNK = 4096


class ZCA(NamedTuple):
    """A fitted whitening map, for images with D = C * H * W values.

    Attributes:
        mean: ``[D]`` mean of the training images.
        whiten: ``[D, D]``, symmetric; multiplies a centered image.
        unwhiten: ``[D, D]``, its inverse.
    """

    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor


def fit_zca(images: Tensor, eps: float = 0.1) -> ZCA:
    """Fit the whitening map on training images.

    Mean, covariance (unbiased) and eigenvectors are computed in float64, a chunk of images at a time: besides the
    images it takes a few D x D matrices.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        eps: Added to every eigenvalue, inside the root, so that directions without variance do not blow up. The
            default is the reference's.

    Returns:
        The map in float32, on the images' device.

    Raises:
        InputError: If there are fewer than two images, or ``eps`` is not positive.

    Example:
        >>> zca = fit_zca(torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
        >>> bool(torch.allclose(zca.whiten @ zca.unwhiten, torch.eye(4), atol=1e-6))
        True
    """
    check_range("number of ZCA images", len(images), 2)
    check_range("ZCA eps", eps, 0, exclude_low=True)
    flat = images.flatten(1)
    count, length = flat.shape
    mean = torch.zeros(length, dtype=torch.float64, device=images.device)
    for rows in torch.split(flat, _CHUNK):
        mean += rows.to(torch.float64).sum(dim=0)
    mean /= count
    covariance = torch.zeros(length, length, dtype=torch.float64, device=images.device)
    for rows in torch.split(flat, _CHUNK):
        centered = rows.to(torch.float64) - mean
        covariance.addmm_(centered.T, centered)
    covariance /= count - 1
    values, vectors = torch.linalg.eigh(covariance)
    roots = (values.clamp(min=0) + eps).sqrt()  # rounding can make a zero eigenvalue negative
    whiten = (vectors / roots) @ vectors.T
    unwhiten = (vectors * roots) @ vectors.T
    return ZCA(mean.to(torch.float32), whiten.to(torch.float32), unwhiten.to(torch.float32))


def apply_zca(images: Tensor, zca: ZCA) -> Tensor:
    """Whiten images.

    Products are taken in float64, so they do not depend on whether float32 products may round to TF32.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        zca: From `fit_zca`; moved to the images' device.

    Returns:
        ``[N, C, H, W]``, float32.

    Raises:
        InputError: If the map was fitted on images with another number of values.
    """
    mean, whiten = _on(images, zca.mean, zca.whiten)
    chunks = [((rows.to(torch.float64) - mean) @ whiten).float() for rows in torch.split(images.flatten(1), _CHUNK)]
    return torch.cat(chunks).view(images.shape)


def invert_zca(images: Tensor, zca: ZCA) -> Tensor:
    """Undo `apply_zca`.

    Args:
        images: ``[N, C, H, W]``, whitened.
        zca: The map that whitened them; moved to the images' device.

    Returns:
        ``[N, C, H, W]``, float32, not clamped: a synthetic image can lie outside [0, 1].

    Raises:
        InputError: If the map was fitted on images with another number of values.
    """
    mean, unwhiten = _on(images, zca.mean, zca.unwhiten)
    chunks = [(rows.to(torch.float64) @ unwhiten + mean).float() for rows in torch.split(images.flatten(1), _CHUNK)]
    return torch.cat(chunks).view(images.shape)


def _on(images: Tensor, mean: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64 on the images' device."""
    length = images.shape[1:].numel()
    if length != len(mean):
        raise InputError(
            f"images of shape {tuple(images.shape)} have {length} values each, this ZCA was fitted on {len(mean)}: use "
            "the map that was fitted on this data set"
        )
    return mean.to(images.device, torch.float64), matrix.to(images.device, torch.float64)
