"""One picture of all images, as ``torchvision.utils.save_image`` lays them out: class by class, row by row."""

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.sets.foreign.content import ForeignSet, Wanted
from dd_lightning.sets.pictures import png_bytes
from dd_lightning.sets.synthetic_file import SyntheticFile


def read(path: Path, wanted: Wanted) -> ForeignSet:
    """Cut a picture into its images, the first ``ipc`` of which are of class 0, the next of class 1, and so on."""
    check_range("nrow", wanted.nrow, low=1)
    check_range("padding", wanted.padding, low=0)
    (channels, height, width), padding = wanted.image_shape, wanted.padding
    try:
        picture = pil_to_tensor(Image.open(path).convert("L" if channels == 1 else "RGB")).float() / 255
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"cannot read {path} as a picture; check the path") from error
    tall, wide = height + padding, width + padding
    rows, columns = (picture.shape[1] - padding) // tall, (picture.shape[2] - padding) // wide
    if list(picture.shape[1:]) != [rows * tall + padding, columns * wide + padding] or not 1 <= columns <= wanted.nrow:
        raise InputError(
            f"{path} is {picture.shape[1]} x {picture.shape[2]} pixels, which {height} x {width} images with padding "
            f"{padding} do not fill, {wanted.nrow} in a row; set nrow and padding as the grid was made with"
        )
    tiles = picture[:, padding:, padding:].reshape(channels, rows, tall, columns, wide)[:, :, :height, :, :width]
    images, classes = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1), len(wanted.class_names)
    ipc = len(images) // classes if wanted.ipc is None else wanted.ipc
    if not 1 <= ipc * classes <= len(images) or (wanted.ipc is None and len(images) % classes):
        raise InputError(
            f"{path} has {len(images)} tiles, which {classes} classes do not share evenly; give ipc, if some are empty"
        )
    return ForeignSet(images[: ipc * classes].contiguous(), torch.arange(classes).repeat_interleave(ipc), "pixels")


def write(path: Path, synthetic: SyntheticFile) -> dict[Path, bytes]:
    """Return a PNG of the decoded images, one class per row, with torchvision's padding of 2."""
    images = synthetic.decoded_pixels().clamp(0, 1)
    return {path: png_bytes(make_grid(images, nrow=synthetic.effective_ipc))}
