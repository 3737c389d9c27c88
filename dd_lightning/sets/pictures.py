"""Pictures of a synthetic set."""

import io

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

SMALLEST_TILE = 64  # tiles are enlarged, by whole factors, to at least this many pixels


def image_grid(pixels: Tensor, num_classes: int, max_per_class: int = 10) -> Tensor:
    """Lay class-sorted images out as a grid, [ch, rows, columns] in [0, 1].

    With several images per class, each class is a row; with one, rows hold ten classes. Pixels are [C*ipc, ch, H, W];
    values outside [0, 1], which learned images have, are clipped.
    """
    per_class = len(pixels) // num_classes
    shown = pixels.detach().cpu().unflatten(0, (num_classes, per_class))[:, :max_per_class].flatten(0, 1).clamp(0, 1)
    factor = -(-SMALLEST_TILE // shown.shape[-1])
    large = shown.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    columns = 10 if per_class == 1 else min(per_class, max_per_class)
    grid: Tensor = make_grid(large, nrow=columns, padding=2, pad_value=1.0)
    return grid


def png_bytes(image: Tensor) -> bytes:
    """Encode an image [ch, H, W] in [0, 1] as PNG."""
    buffer = io.BytesIO()
    to_pil_image(image.mul(255).round().to(torch.uint8)).save(buffer, format="png")
    return buffer.getvalue()
