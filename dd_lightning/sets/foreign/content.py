"""What a set of another project holds, and what all readers and writers of such sets share."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError

ForeignSpace = Literal["pixels", "normalized", "zca"]


@dataclass(frozen=True)
class Wanted:
    """What is known of a set before it is read.

    Attributes:
        image_shape: (channels, height, width) of the real data.
        class_names: Names of the classes, in label order.
        nrow: Images in a row of a grid.
        padding: Pixels between the images of a grid.
        ipc: Images per class of a grid; None if it has no empty tile.
    """

    image_shape: tuple[int, int, int]
    class_names: Sequence[str]
    nrow: int = 8
    padding: int = 2
    ipc: int | None = None


@dataclass(frozen=True, eq=False)
class ForeignSet:
    """Images and labels as a file has them.

    Attributes:
        images: Floats ``[n, channels, height, width]``.
        labels: Class numbers ``[n]``, probabilities or logits ``[n, num_classes]``.
        space: How the images are stored; None if neither the format nor the file says so.
        lr: The learning rate that the file names; None if it names none.
    """

    images: Tensor
    labels: Tensor
    space: ForeignSpace | None
    lr: float | None = None


def load_tensors(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    """Read a file of ``torch.save``, tensors and plain values only.

    Raises:
        InputError: If there is no such file, it is damaged, or it would run code.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage raises another one
        why = " ".join(str(error).split())[:120]
        raise InputError(f"cannot read {path}, of which only tensors are loaded, no other objects: {why}") from error


def tensors_of(path: Path, *values: object) -> tuple[Tensor, ...]:
    """Return values as tensors, floats in float32.

    Raises:
        InputError: If one is none.
    """
    for value in values:
        if not isinstance(value, Tensor):
            raise InputError(f"{path} holds a {type(value).__name__} where a tensor should be; is --format right?")
    return tuple(each.float() if each.is_floating_point() else each for each in values if isinstance(each, Tensor))


def saved(value: Tensor | Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Return the bytes of ``torch.save``."""
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def sorted_by_class(images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return images and labels in class order, and soft labels as logits.

    Args:
        images: ``[n, channels, height, width]``.
        labels: Class numbers ``[n]``, or probabilities or logits ``[n, num_classes]``.
        num_classes: Number of classes.

    Raises:
        InputError: If shapes disagree, a class number is out of range, or classes have different numbers of images.
    """
    if labels.ndim == 2 and labels.shape == (len(images), num_classes):
        logits = labels.float()
        if bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones(len(logits)), atol=1e-3):
            logits = logits.clamp(min=1e-12).log()
        return images, logits
    if labels.shape != (len(images),) or not torch.equal(labels, labels.long()):
        raise InputError(
            f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images of {num_classes} classes; they "
            "must be class numbers [n], or one row per image and one column per class"
        )
    labels = labels.long()
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        found = f"run from {labels.min()} to {labels.max()}" if len(labels) else "are none"
        raise InputError(f"labels {found}; the data have classes 0 to {num_classes - 1}")
    counts = labels.bincount(minlength=num_classes)
    if int(counts.min()) != int(counts.max()):
        raise InputError(f"classes have from {counts.min()} to {counts.max()} images; each must have as many")
    order = labels.argsort(stable=True)
    return images[order], labels[order]
