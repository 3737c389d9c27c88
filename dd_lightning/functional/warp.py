"""Shifts and linear warps of images whose derivatives of every order are gathers, hence bit-reproducible anywhere.

torch's own backward of `grid_sample` adds with atomics on CUDA, in an order that changes from run to run.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

_Map = Callable[[Tensor, Tensor], Tensor]


def shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift images ``[B, C, H, W]`` by whole pixels, filling with 0: output pixel q is input pixel q + offset.

    Offsets are ``[n, 2]`` int64, rows and columns, with n either B or 1.
    """
    shifted: Tensor = _Linear.apply(images, offsets, _shifted, _shifted_back)
    return shifted


def warp(images: Tensor, matrices: Tensor, radius: tuple[int, int]) -> Tensor:
    """Sample images ``[B, C, H, W]`` bilinearly at a linear map of the pixel grid, 0 outside.

    Matrices are ``[n, 2, 2]`` with n either B or 1, acting on (x, y) in [-1, 1]. The backward gathers from a window of
    this radius in rows and columns, see `scale_radius` and `rotation_radius`.
    """
    warped: Tensor = _Linear.apply(images, matrices, _resample, partial(_gather_transposed, radius=radius))
    return warped


def scale_radius(largest: float) -> tuple[int, int]:
    """Return the gather radius that suffices for scaling the grid by up to ``largest``."""
    return _gather_radius(largest), _gather_radius(largest)


def rotation_radius(angle: float, size: tuple[int, int]) -> tuple[int, int]:
    """Return the gather radius that suffices for rotating the grid by up to ``angle`` radians at ``(H, W)`` pixels."""
    aspect = (size[1] - 1) / (size[0] - 1)
    return _gather_radius(_rotated_reach(1 / aspect, angle)), _gather_radius(_rotated_reach(aspect, angle))


def _gather_radius(reach: float) -> int:
    """Return the radius around round(c) of all integers q with |q - c| < reach: |q - round(c)| < reach + 1/2."""
    slack = 1e-3  # room for the rounding of the draw, far above it
    return math.ceil(reach + slack - 0.5)


def _rotated_reach(aspect: float, angle: float) -> float:
    """Return how far, along one axis, an output pixel that samples within 1 pixel of p can be from p's preimage.

    That is the half-width of a rotated 2 x 2 square, the maximum of |cos t| + aspect |sin t| over |t| <= angle.
    """
    if math.atan(aspect) <= angle:
        return math.hypot(1.0, aspect)
    return math.cos(angle) + aspect * math.sin(angle)


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read ``images [B, C, H, W]`` at integer positions ``[n, ...]``, n either B or 1: ``[B, C, ...]``, 0 outside."""
    batch, channels, height, width = images.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    index = index.flatten(1)[:, None].expand(batch, channels, -1)
    read = images.flatten(2).gather(2, index).reshape(batch, channels, *rows.shape[1:])
    return read.masked_fill(~inside[:, None], 0.0)


class _Linear(torch.autograd.Function):
    """A map that is linear in the images, given what it depends on, and its transpose: each is the other's backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, values: Tensor, forth: _Map, back: _Map) -> Tensor:
        return forth(images, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        _, values, ctx.forth, ctx.back = inputs
        ctx.save_for_backward(values)
        ctx.save_for_forward(values)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        return _Linear.apply(cotangent, *ctx.saved_tensors, ctx.back, ctx.forth), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # noqa: ANN401
        moved: Tensor = _Linear.apply(tangent, *ctx.saved_tensors, ctx.forth, ctx.back)
        return moved


def _shifted(images: Tensor, offsets: Tensor) -> Tensor:
    samples, (height, width) = offsets.shape[0], images.shape[-2:]
    rows = torch.arange(height, device=images.device)[:, None] + offsets[:, 0, None, None]
    columns = torch.arange(width, device=images.device) + offsets[:, 1, None, None]
    return _pixels(images, rows.expand(samples, height, width), columns.expand(samples, height, width))


def _shifted_back(images: Tensor, offsets: Tensor) -> Tensor:
    return _shifted(images, -offsets)


def _resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample ``images [B, C, H, W]`` bilinearly at ``matrices [n, 2, 2]`` times the pixel grid, 0 outside."""
    grid = F.affine_grid(F.pad(matrices, (0, 1)), [matrices.shape[0], *images.shape[1:]], align_corners=True)
    grid = grid.expand(images.shape[0], -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _gather_transposed(cotangent: Tensor, matrices: Tensor, radius: tuple[int, int]) -> Tensor:
    """Apply the transpose of `_resample` by reading, never by adding into shared memory.

    Input pixel p took part in the output pixels q whose sampling point Aq is within 1 pixel of p, with weight
    (1 - |Aq - p|) along each axis. They lie around A^-1 p, in the window that `radius` bounds.
    """
    height, width = cotangent.shape[-2:]
    device, dtype = cotangent.device, cotangent.dtype
    # The matrices act on coordinates that run over [-1, 1] on both axes; in pixels, off-diagonals feel the aspect.
    aspect = (width - 1) / (height - 1)
    xx, xy, yx, yy = (entry[:, None, None, None] for entry in matrices.flatten(1).unbind(1))
    xy, yx = xy * aspect, yx / aspect
    determinant = xx * yy - xy * yx
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    p_y = torch.arange(height, device=device, dtype=dtype)[:, None] - middle_y
    p_x = torch.arange(width, device=device, dtype=dtype) - middle_x
    near_y = ((xx * p_y - yx * p_x) / determinant + middle_y).round().to(torch.int64)  # [n, 1, H, W]
    near_x = ((yy * p_x - xy * p_y) / determinant + middle_x).round().to(torch.int64)
    steps_y = torch.arange(-radius[0], radius[0] + 1, device=device)
    steps_x = torch.arange(-radius[1], radius[1] + 1, device=device)
    steps_y, steps_x = (steps.flatten()[:, None, None] for steps in torch.meshgrid(steps_y, steps_x, indexing="ij"))
    rows, columns = near_y + steps_y, near_x + steps_x  # [n, K, H, W], K output pixels for each input pixel
    q_y, q_x = rows.to(dtype) - middle_y, columns.to(dtype) - middle_x
    weight_y = (1 - (yx * q_x + yy * q_y - p_y).abs()).clamp(min=0)
    weight_x = (1 - (xx * q_x + xy * q_y - p_x).abs()).clamp(min=0)
    return (_pixels(cotangent, rows, columns) * (weight_y * weight_x)[:, None]).sum(dim=2)
