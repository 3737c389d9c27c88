"""Stacking images that come one by one into one tensor."""

from collections.abc import Iterable

import numpy as np
import torch
from PIL.Image import Image
from rich.progress import track
from torch import Tensor

from dd_lightning.functional.errors import InputError

SHOW_PROGRESS_FROM = 2000
"""Items from which a progress bar is worth its line: about a second of decoding small images."""


def collect(items: Iterable[tuple[object, object]], count: int, title: str) -> tuple[Tensor, Tensor]:
    """Stack ``count`` pairs of image and class number, with a progress bar when there are many.

    Args:
        items: The pairs; see :func:`image_tensor` for what an image may be.
        count: How many there are.
        title: What is read, for the progress bar and for messages.

    Returns:
        Images ``[count, C, H, W]``, uint8 or float as they came, and class numbers int64 ``[count]``.

    Raises:
        InputError: If there are none, if one is no image, or if shapes or types differ.
    """
    images: list[Tensor] = []
    labels: list[int] = []
    shown = track(items, title, total=count, transient=True, disable=count < SHOW_PROGRESS_FROM)
    for index, (image, label) in enumerate(shown):
        tensor = image_tensor(image, f"{title}, image {index}")
        if images and (tensor.shape, tensor.dtype) != (images[0].shape, images[0].dtype):
            raise InputError(
                f"{title}, image {index} is {tensor.dtype} {list(tensor.shape)} but image 0 is "
                f"{images[0].dtype} {list(images[0].shape)}: resize and convert all images alike"
            )
        images.append(tensor)
        labels.append(int(label))  # type: ignore[call-overload]  # int, numpy integer or 0-d tensor
    if not images:
        raise InputError(f"{title} has no image; at least 1 per class is needed: point to a data set with images")
    return torch.stack(images), torch.tensor(labels)


def image_tensor(image: object, what: str) -> Tensor:
    """Return one image as ``[C, H, W]``.

    Args:
        image: A tensor ``[C, H, W]`` or ``[H, W]``, an array ``[H, W, C]`` or ``[H, W]`` (torchvision's
            reading of the two), or a PIL image.
        what: How to name it in a message.

    Raises:
        InputError: If it is none of these.
    """
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        channels_last = False
    elif isinstance(image, (Image, np.ndarray)):
        tensor = torch.from_numpy(np.array(image))
        channels_last = True
    else:
        raise InputError(f"{what} is a {type(image).__name__}: it must be a tensor, an array or a PIL image")
    if tensor.ndim == 2:
        return tensor[None]
    if tensor.ndim != 3:
        raise InputError(f"{what} has the shape {list(tensor.shape)}: it must have 2 or 3 dimensions")
    return tensor.permute(2, 0, 1) if channels_last else tensor
