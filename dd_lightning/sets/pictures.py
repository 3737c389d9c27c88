"""Pictures of a synthetic set."""

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

SMALLEST_TILE = 64  # tiles are enlarged, by whole factors, to at least this many pixels
CAPTION_HEIGHT = 18  # pixels of a class name above a tile


def image_grid(pixels: Tensor, num_classes: int, max_per_class: int = 10, names: Sequence[str] = ()) -> Tensor:
    """Lay class-sorted images out as a grid, [ch, rows, columns] in [0, 1].

    With several images per class, each class is a row; with one, rows hold five classes. Pixels are [C*ipc, ch, H, W];
    values outside [0, 1], which learned images have, are clipped. ``names``, if given, stand above the first image of
    each class.
    """
    per_class = len(pixels) // num_classes
    shown = pixels.detach().cpu().unflatten(0, (num_classes, per_class))[:, :max_per_class].clamp(0, 1)
    factor = -(-SMALLEST_TILE // shown.shape[-1])
    large = shown.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    if names:
        captions = torch.ones(*large.shape[:3], CAPTION_HEIGHT, large.shape[-1])
        captions[:, 0] = torch.stack([_caption(name, large.shape[-1]) for name in names])[:, None]
        large = torch.cat([captions, large], -2)
    columns = 5 if per_class == 1 else min(per_class, max_per_class)
    grid: Tensor = make_grid(large.flatten(0, 1), nrow=columns, padding=2, pad_value=1.0)
    return grid


def _caption(text: str, width: int) -> Tensor:
    """Draw black text on white, [CAPTION_HEIGHT, width] in [0, 1]; what does not fit is cut off."""
    image = Image.new("L", (width, CAPTION_HEIGHT), 255)
    ImageDraw.Draw(image).text((0, 0), text, fill=0, font=ImageFont.load_default(CAPTION_HEIGHT - 4))
    drawn: Tensor = pil_to_tensor(image)
    return drawn[0] / 255


def png_bytes(image: Tensor) -> bytes:
    """Encode an image [ch, H, W] in [0, 1] as PNG."""
    buffer = io.BytesIO()
    to_pil_image(image.mul(255).round().to(torch.uint8)).save(buffer, format="png")
    return buffer.getvalue()
