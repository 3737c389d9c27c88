"""Distilled sets of other projects, made ours with the real data that they stand for."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.functional.errors import InputError, check_choice, check_range
from dd_lightning.functional.formation import Formation
from dd_lightning.sets.color_spaces import ColorSpace
from dd_lightning.sets.foreign import READERS, ForeignSpace, Wanted
from dd_lightning.sets.foreign.content import sorted_by_class
from dd_lightning.sets.synthetic_file import DEFAULT_EVALUATION_LR, SyntheticFile

_NO_RATE = ("mtt", "ddranking")  # formats of sets that come with a learned rate of their own


def import_set(
    paths: Sequence[Path | str] | Path | str,
    format: str,
    data: DistillationDataModule,
    *,
    space: ForeignSpace | None = None,
    lr: float | None = None,
    factor: int | None = None,
    network: str = "ConvNet-3",
    recipe: dict[str, Any] | None = None,
    nrow: int = 8,
    padding: int = 2,
    ipc: int | None = None,
) -> SyntheticFile:
    """Return a set of another project as one of ours. What its files do not say is asked for, never guessed.

    Args:
        paths: Files or folders; several are parts of one set.
        format: ``mtt`` (also FTD, TESLA, DATM), ``idc`` (also DREAM), ``dc`` (also DSA, DM), ``ddranking``, ``folder``,
            ``grid`` or ``pt``.
        data: The real data, for classes, shape and color space.
        space: How the images are stored, if the format does not say: ``pixels``, ``normalized`` or ``zca``.
        lr: The learned learning rate, if the files have none.
        factor: Tiles along each axis of an image; ``idc`` asks for it (2 at 32 x 32 pixels, 3 for ImageNet).
        network: The network that it was distilled with.
        recipe: Fields of the EvaluationRecipe it is evaluated by, unless another is asked for.
        nrow: Images in a row of a ``grid``.
        padding: Pixels between the images of a ``grid``.
        ipc: Images per class of a ``grid`` with empty tiles.

    Raises:
        InputError: If a file cannot be read, does not fit the data, or does not say something that was not given.
    """
    check_choice("format", format, READERS)
    if format == "idc" and factor is None:
        raise InputError("factor is not in IDC's files; give it: 2 at 32 x 32 pixels, 3 for ImageNet, 1 for none")
    wanted = Wanted(data.image_shape, data.class_names, nrow, padding, ipc)
    given = [paths] if isinstance(paths, str | Path) else paths
    parts = [READERS[format](Path(path), wanted) for path in given]
    if {part.labels.ndim for part in parts} != {parts[0].labels.ndim}:
        raise InputError("some parts have class numbers and others soft labels; give parts of one set")
    images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    stored, known_lr = parts[0].space, parts[0].lr
    for option, ours, theirs in (("space", space, stored), ("lr", lr, known_lr)):
        if ours is not None and theirs is not None and ours != theirs:
            raise InputError(f"{option} is {ours!r}, but the files of format {format} have {theirs!r}; leave it out")
    stored, known_lr = stored or space, known_lr if lr is None else lr
    if stored is None:
        raise InputError(f"space is not in the files of format {format}; give pixels, normalized or zca")
    if known_lr is None and format in _NO_RATE:
        raise InputError(f"lr is not in the files of format {format}; give the learned rate (MTT's start at 0.01)")
    check_range("lr", known_lr, low=0, exclude_low=True)
    if tuple(images.shape[1:]) != data.image_shape:
        raise InputError(f"the set has images {list(images.shape[1:])}, but {data.name} has {list(data.image_shape)}")
    images, labels = sorted_by_class(images, labels, data.num_classes)
    if stored != "pixels":
        data.refit(stored, data.val_fraction, data.split_seed)
    _warn_of_space(images, stored, data.space)
    return SyntheticFile(
        images=images,
        labels=labels,
        num_classes=data.num_classes,
        space=data.space,
        stored_as="pixels" if stored == "pixels" else "network",
        formation=Formation(factor or 1),
        lr=known_lr,
        evaluation_lr=known_lr or DEFAULT_EVALUATION_LR,
        evaluation_recipe=recipe or {},
        dataset=data.name,
        fingerprint=data.fingerprint,
        val_fraction=data.val_fraction,
        split_seed=data.split_seed,
        class_names=list(data.class_names),
        objective=format,
        network=network,
        step=0,
    )


def _warn_of_space(images: Tensor, stored: ForeignSpace, space: ColorSpace) -> None:
    """Warn if pixels cannot be what the images are said to be."""
    low, high = float(images.min()), float(images.max())
    if stored != "pixels" and low >= 0 and high <= 1:
        warnings.warn(f"space is {stored!r}, but all values lie in [0, 1], as those of pixels do", stacklevel=3)
    decoded = images if stored == "pixels" else space.decode(images)
    outside = float(((decoded < -0.5) | (decoded > 1.5)).float().mean())
    if outside > 0.05:
        warnings.warn(
            f"space is {stored!r}, but {outside:.0%} of the pixels then lie far outside [0, 1]; is it another one?",
            stacklevel=3,
        )
