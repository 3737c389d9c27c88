"""ZCA whitening of images: fit on the training set, apply to both sets, invert to look at the result.

With S and U the eigenvalues and eigenvectors of the covariance of the flattened images, the map is
``z = (x - mean) U diag((S + eps)^(-1/2)) U^T``. Trajectory matching whitens this way (kornia's `ZCAWhitening`
with ``eps=0.1``; https://github.com/GeorgeCazenavette/mtt-distillation/blob/50dccea/utils.py#L137-L165).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range

_CHUNK = 4096  # rows converted to float64 at a time: 100 MB at 32 x 32 x 3 pixels


class ZCA(NamedTuple):
    """A whitening map of D = C * H * W values: mean ``[D]``, symmetric matrix ``[D, D]`` and its inverse."""

    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor


def fit_zca(images: Tensor, eps: float = 0.1) -> ZCA:
    """Fit the map, in float32, on training images; all is computed in float64, with the unbiased covariance.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        eps: Added to every eigenvalue, so that directions without variance do not blow up; the reference's default.

    Raises:
        InputError: If there are fewer than two images, or ``eps`` is not positive.
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
    """Whiten images ``[N, C, H, W]`` in [0, 1]: float32, by products in float64, which never round to TF32.

    Raises:
        InputError: If the map was fitted on images with another number of values.
    """
    mean, whiten = _on(images, zca.mean, zca.whiten)
    chunks = [((rows.to(torch.float64) - mean) @ whiten).float() for rows in torch.split(images.flatten(1), _CHUNK)]
    return torch.cat(chunks).view(images.shape)


def invert_zca(images: Tensor, zca: ZCA) -> Tensor:
    """Undo `apply_zca`: float32 ``[N, C, H, W]``, not clamped, as a synthetic image is not; errors as there."""
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
