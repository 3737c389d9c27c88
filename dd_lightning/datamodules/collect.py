"""Items of a dataset or files of a folder as one tensor with class numbers: what an image and a label may be."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from dd_lightning.functional.errors import InputError

SHOW_PROGRESS_FROM = 2000
"""Items from which a progress bar is worth its line: about a second of decoding small images."""

_USUAL_CHANNELS = (1, 3, 4)


def collect(items: Iterable[object], count: int, title: str) -> tuple[Tensor, Tensor]:
    """Stack ``count`` items, with a progress bar when there are many.

    Args:
        items: Each an image and its class number, as ``(image, label, ...)`` or ``{"image": ..., "label": ...}``;
            see :func:`image_tensor` for what an image may be.
        count: How many there are.
        title: What is read, for the progress bar and for messages.

    Returns:
        Images ``[count, C, H, W]``, uint8 or float, and class numbers int64 ``[count]``.

    Raises:
        InputError: If there are none, if one is no image or has no class number, or if shapes differ.
    """
    images: list[Tensor] = []
    labels: list[int] = []
    for index, item in enumerate(track(items, title, total=count, transient=True, disable=count < SHOW_PROGRESS_FROM)):
        what = f"{title}, image {index}"
        image, label = image_and_label(item, what)
        images.append(image_tensor(image, what))
        labels.append(class_number(label, what))
        if images[-1].shape != images[0].shape:
            raise InputError(
                f"{what} is {list(images[-1].shape)}, but image 0 is {list(images[0].shape)}: resize and convert all "
                "images alike"
            )
    if not images:
        raise InputError(f"{title} has no image; at least 1 per class is needed: point to a data set with images")
    if len({image.dtype for image in images}) > 1:
        images = [to_unit(image) for image in images]
    return torch.stack(images), torch.tensor(labels)


def image_and_label(item: object, what: str) -> tuple[object, object]:
    """Return the two parts of an item that matter.

    Raises:
        InputError: If it has no such parts.
    """
    if isinstance(item, Mapping) and {"image", "label"} <= item.keys():
        return item["image"], item["label"]
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    kind = f"a mapping of {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
    raise InputError(
        f"{what} is {kind}: each item must be (image, class number) or {{'image': ..., 'label': ...}}, such as those "
        "of TensorDataset(images, labels)"
    )


def class_number(label: object, what: str) -> int:
    """Return a label as an integer: an int, a whole float, or a tensor or an array of one of them.

    Raises:
        InputError: If it is a name, a vector or a fraction.
    """
    value = label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float) and float(value).is_integer():
        return int(value)
    raise InputError(
        f"{what} has the label {str(value)[:60]!r}: pass a class number, such as names.index(name) of a name or the "
        "argmax of a vector"
    )


def image_tensor(image: object, what: str) -> Tensor:
    """Return one image as ``[C, H, W]``, as :func:`pixels` has them.

    Args:
        image: A tensor ``[C, H, W]`` or ``[H, W]``, an array ``[H, W, C]`` or ``[H, W]`` (torchvision's reading of the
            two), or a PIL image, as :func:`decoded` reads it.
        what: How to name it in a message.

    Raises:
        InputError: If it is none of these.
    """
    if isinstance(image, Image.Image):
        image = np.array(decoded(image, what))
    if not isinstance(image, Tensor | np.ndarray):
        raise InputError(f"{what} is a {type(image).__name__}: it must be a tensor, an array or a PIL image")
    if isinstance(image, np.ndarray):
        tensor, axes, other_end = torch.from_numpy(image), (2, 0, 1), 0
    else:
        tensor, axes, other_end = image.detach().cpu(), (0, 1, 2), 2
    if tensor.ndim == 2:
        return pixels(tensor)[None]
    if tensor.ndim != 3:
        raise InputError(f"{what} has the shape {list(tensor.shape)}: it must have 2 or 3 dimensions")
    channels, few = tensor.shape[axes[0]], tensor.shape[other_end]
    sides = [side for axis, side in enumerate(tensor.shape) if axis != other_end]
    if few in _USUAL_CHANNELS and few < min(sides) and (few > 1 or sides[0] == sides[1]):
        form = "a tensor is [C, H, W]" if other_end else "an array is [H, W, C]"
        raise InputError(f"{what} has the shape {list(tensor.shape)}, hence {channels} channels: {form}; transpose it")
    return pixels(tensor.permute(axes))


def decoded(image: Image.Image, what: str, background: str = "white") -> Image.Image:
    """Return a picture of any mode as gray (``L``), color (``RGB``) or gray floats in [0, 1] (``F``).

    It is turned as its EXIF data say. Transparency is composited on the background; 16-bit gray becomes floats.

    Raises:
        InputError: If the mode does not tell which number is white, or torch and PIL know no conversion.
    """
    mode, sixteen_bit = image.mode, image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
    gray = mode in ("1", "L", "LA", "La")
    try:
        image = ImageOps.exif_transpose(image)
        if sixteen_bit:
            return Image.fromarray(np.asarray(image).astype(np.float32) / 65535)
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, background)
            canvas.alpha_composite(image.convert("RGBA"))
            image = canvas
        if mode != "I":
            return image if mode == "F" else image.convert("L" if gray else "RGB")
    except ValueError:
        pass  # PIL knows no conversion
    raise InputError(f"{what} is a picture of mode {mode!r}: save it with 8 or 16 bits, gray or RGB")


def pixels(images: Tensor) -> Tensor:
    """Return images as uint8 or at least 32-bit floats, where the type alone says how; others stay as they are."""
    if images.dtype == torch.bool:
        return images.to(torch.uint8) * 255
    if images.dtype == torch.uint16:
        return images.to(torch.float32) / 65535
    return images.float() if images.is_floating_point() and images.itemsize < 4 else images


def to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return pixels in [0, 1] as ``dtype``, from uint8 or floats."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
