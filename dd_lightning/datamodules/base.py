"""What all data modules share: reading once, holding out, color space, fingerprint, step loader."""

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dd_lightning.datamodules.collect import pixels, to_unit
from dd_lightning.datamodules.steps import StepLoader
from dd_lightning.datamodules.whitening_cache import cached_zca
from dd_lightning.execution.memory import readable
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.whitening import fit_zca
from dd_lightning.sets.color_spaces import ColorKind, ColorSpace, NormalizedSpace, PixelSpace, ZCASpace
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.splits import stratified_split

ZCA_EPS = 0.1
"""What is added to the eigenvalues before whitening, as in the trajectory-matching reference."""

_SMALLEST_STD = 1e-6
"""Below this a channel counts as constant; one gray level of 255 in one pixel of a million is 4e-6."""


@dataclass(frozen=True)
class _Ready:
    """All that is known once the data were read."""

    sets: dict[str, RealSet]
    space: ColorSpace
    class_names: tuple[str, ...]
    fingerprint: str


class DistillationDataModule(LightningDataModule, ABC):
    """Real data for distillation: a training set to compress and held-out sets to test on.

    A subclass says how to read the data (:meth:`load`). Each split is one tensor; the train loader yields step numbers
    only (:class:`~dd_lightning.datamodules.steps.StepLoader`). Properties read the data on first use, so the number of
    classes can be linked to other options before ``setup``.

    Args:
        root: Folder with the data files.
        download: Fetch the files if they are not under ``root``; files that are there are never overwritten.
        color_space: What networks see: ``normalized`` channels, ``zca``-whitened pixels (fitted on the training images
            alone, with eps 0.1, the trajectory-matching reference's value), or the ``pixel`` values in [0, 1].
        val_fraction: Share of every class that is held out of the training data, to choose settings on without looking
            at the test data.
        split_seed: Seed of every random split of the data, apart from the run's seed, so that runs compare.
        cache_dir: Folder for fitted ZCA matrices; ``<root>/.dd_lightning`` by default.

    Raises:
        InputError: If ``val_fraction`` is out of range or ``color_space`` is unknown.
    """

    name: str = "data"
    """Short name of the data set, as written into files, such as ``cifar10``."""

    channel_stats: ClassVar[tuple[tuple[float, ...], tuple[float, ...]] | None] = None
    """Published mean and standard deviation of each channel; ``None`` to compute them."""

    def __init__(
        self,
        root: str = "data",
        *,
        download: bool = True,
        color_space: ColorKind = "normalized",
        val_fraction: float = 0.0,
        split_seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_range("val_fraction", val_fraction, 0, 1, exclude_high=True)
        if color_space not in get_args(ColorKind):
            raise InputError(f"color_space is {color_space!r}; use one of {', '.join(get_args(ColorKind))}")
        self.root = Path(root)
        self.download = download
        self.color_space = color_space
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.cache_dir = Path(cache_dir) if cache_dir is not None else self.root / ".dd_lightning"
        self._ready: _Ready | None = None
        self._device: torch.device | str = "cpu"

    @abstractmethod
    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read all training or all test images.

        Returns:
            Images ``[n, C, H, W]``, uint8 or floats in [0, 1], and their class numbers ``[n]``.
        """

    def load_class_names(self) -> Sequence[str] | None:
        """Return the name of each class, or ``None`` for plain numbers; called after :meth:`load`."""
        return None

    def prepare_data(self) -> None:
        """Fetch files and fill the cache in one process, before the others look for them."""
        self._prepared()

    def setup(self, stage: str | None = None) -> None:
        """Read the data, once for all stages.

        Raises:
            InputError: If the data are missing or do not fit together.
        """
        del stage  # every stage needs every split
        self._prepared()

    def to(self, device: torch.device | str) -> Self:
        """Hold the sets on ``device`` from now on: each one moves there when it is next asked for, once."""
        self._device = device
        return self

    def refit(self, color_space: ColorKind, val_fraction: float, split_seed: int) -> None:
        """Use another color space and split, such as those of a stored set; the data are read again if they differ."""
        asked = (color_space, val_fraction, split_seed)
        if asked != (self.color_space, self.val_fraction, self.split_seed):
            self.color_space, self.val_fraction, self.split_seed = asked
            self._ready = None

    def train_dataloader(self) -> StepLoader:
        """Return the numbers of the steps that are left, for the trainer that this module is attached to.

        Raises:
            InputError: If there is no trainer or it has no ``max_steps``.
        """
        if self.trainer is None:
            raise InputError("there is no trainer to take steps from: pass the data module to Trainer.fit")
        return StepLoader(self.trainer)

    def held_out(self, split: Literal["test", "val"]) -> RealSet:
        """Return the images that evaluation may use.

        Raises:
            InputError: If ``val`` is asked for and nothing was held out.
        """
        held = self.test if split == "test" else self.val
        if held is None:
            raise InputError(
                f"split is {split!r}, but val_fraction is 0, so nothing is held out: set val_fraction above 0 or use "
                "'test'"
            )
        return held

    @property
    def train(self) -> RealSet:
        """Training images in the color space, without those of ``val``."""
        return self._on_device("train")

    @property
    def val(self) -> RealSet | None:
        """Images held out of the training data; ``None`` if ``val_fraction`` is 0."""
        return self._on_device("val") if self.val_fraction > 0 else None

    @property
    def test(self) -> RealSet:
        """Test images in the color space."""
        return self._on_device("test")

    @property
    def space(self) -> ColorSpace:
        """The color space of all sets."""
        return self._prepared().space

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self._prepared().sets["train"].num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape ``(C, H, W)`` of one image."""
        return self._prepared().sets["train"].image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class."""
        return self._prepared().class_names

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the training data and the color space.

        They change with the training pixels, their labels, the val split and the color space, not with the place of
        the files.
        """
        return self._prepared().fingerprint

    def _on_device(self, split: str) -> RealSet:
        sets = self._prepared().sets
        sets[split] = sets[split].to(self._device)
        return sets[split]

    def _prepared(self) -> _Ready:
        if self._ready is None:
            self._ready = self._prepare()
        return self._ready

    def _prepare(self) -> _Ready:
        splits = {"train": self._checked("train"), "test": self._checked("test")}
        names = self.load_class_names()
        images, labels = splits["train"]
        shapes = [list(each.shape[1:]) for each, _ in splits.values()]
        if shapes[0] != shapes[1]:
            raise InputError(f"{self.name} has train images {shapes[0]}, but test images {shapes[1]}: make them alike")
        _warn_of_lost_content(images, labels, self.name)
        num_classes = len(names) if names is not None else int(labels.max()) + 1
        if self.val_fraction > 0:
            kept, held = stratified_split(labels, self.val_fraction, self.split_seed, "val split")
            splits["val"] = images[held], labels[held]
            splits["train"] = images, labels = images[kept], labels[kept]
        fingerprint = self._fingerprint(images, labels)
        space = self._fit_space(images, fingerprint)
        sets = {}
        for split, (raw, of) in splits.items():
            try:
                sets[split] = RealSet(space.encode(to_unit(raw)), of, num_classes, complete=split == "train")
            except InputError as error:
                raise InputError(f"the {split} split of {self.name}: {error}") from None
        numbers = tuple(map(str, range(num_classes)))
        return _Ready(sets, space, numbers if names is None else tuple(names), fingerprint)

    def _checked(self, split: str) -> tuple[Tensor, Tensor]:
        images, labels = self.load(train=split == "train")
        what = f"the {split} split of {self.name}"
        if images.ndim != 4 or len(images) == 0 or labels.shape != (len(images),):
            raise InputError(
                f"{what} has images {list(images.shape)} and labels {list(labels.shape)}; "
                "[n, C, H, W] and [n] with n > 0 are needed: mend the data"
            )
        if not torch.equal(labels, labels.long()):
            raise InputError(f"{what} has labels such as {labels[labels != labels.long()][0]:g}: give class numbers")
        images = pixels(images)
        if images.is_floating_point():
            low, high = float(images.min()), float(images.max())
            if not 0 <= low <= high <= 1:
                raise InputError(
                    f"{what} has pixels from {low:g} to {high:g}; floats must lie in [0, 1]: "
                    "rescale them or pass uint8, and leave normalization to color_space"
                )
        elif images.dtype != torch.uint8:
            raise InputError(f"{what} has {images.dtype} pixels: pass uint8, or floats in [0, 1]")
        return images.contiguous(), labels.to(torch.int64)

    def _fit_space(self, images: Tensor, fingerprint: str) -> ColorSpace:
        if self.color_space == "pixel":
            return PixelSpace()
        if self.color_space == "zca":
            path = self.cache_dir / f"zca-{fingerprint}.safetensors"
            dimension = math.prod(images.shape[1:])
            _check_zca_memory(dimension, list(images.shape[1:]))
            zca = cached_zca(path, dimension, lambda: fit_zca(to_unit(images), eps=ZCA_EPS))
            return ZCASpace(zca, ZCA_EPS)
        if self.channel_stats is not None:
            mean, std = self.channel_stats
            return NormalizedSpace(torch.tensor(mean), torch.tensor(std))
        return NormalizedSpace(*channel_mean_std(images))

    def _fingerprint(self, images: Tensor, labels: Tensor) -> str:
        # Computed statistics and matrices follow from the pixels; describing them by rule keeps the fingerprint free
        # of rounding, which differs between machines.
        rule = {
            "pixel": "pixel",
            "zca": f"zca eps={ZCA_EPS}",
            "normalized": f"normalized {self.channel_stats or 'computed'}",
        }[self.color_space]
        digest = hashlib.blake2b(f"{images.dtype} {list(images.shape)} {rule}".encode(), digest_size=8)
        digest.update(images.numpy(force=True).data)
        digest.update(labels.contiguous().numpy(force=True).data)
        return digest.hexdigest()


def channel_mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over pixels in [0, 1], float32 ``[C]`` each.

    A constant channel gets the standard deviation 1, so that dividing by it is harmless.

    Args:
        images: uint8, or floats in [0, 1], ``[n, C, H, W]``.

    Example:
        >>> mean, std = channel_mean_std(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
        >>> mean.item(), std.item()
        (0.5, 0.5)
    """
    count = images.numel() / images.shape[1]
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    for chunk in torch.split(images, 4096):
        total += to_unit(chunk, torch.float64).sum(dim=(0, 2, 3)).cpu()
    mean = total / count
    spread = torch.zeros_like(mean)
    for chunk in torch.split(images, 4096):
        centered = to_unit(chunk, torch.float64).cpu() - mean[:, None, None]
        spread += centered.square().sum(dim=(0, 2, 3))
    std = (spread / count).sqrt()
    return mean.float(), torch.where(std < _SMALLEST_STD, 1.0, std).float()


def _check_zca_memory(dimension: int, shape: list[int]) -> None:
    """Refuse a whitening whose matrices cannot be computed here."""
    need = 6 * 8 * dimension**2  # measured at D = 2352: six matrices in float64 at the peak
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if need > have:
        raise InputError(
            f"color_space is 'zca', whose matrices for images {shape} are {dimension} x {dimension} and take "
            f"{readable(need)} to fit, but this machine has {readable(int(have))}: use 'normalized', or smaller images"
        )


def _warn_of_lost_content(images: Tensor, labels: Tensor, name: str) -> None:
    """Warn if all pixels are equal, or all images of two classes: were they read as they were meant?"""
    if bool((images == images[0, 0, 0, 0]).all()):
        rank_zero_warn(f"all pixels of {name} are {images[0, 0, 0, 0]:g}: look at what was read with datamodule.train")
        return
    digests = torch.tensor([hash(image.numpy().tobytes()) for image in images.cpu()])
    seen: dict[tuple[int, ...], int] = {}
    for label in labels.unique().tolist():
        other = seen.setdefault(tuple(digests[labels == label].unique().tolist()), label)
        if other != label:
            rank_zero_warn(f"classes {other} and {label} of {name} have the same images: look at what was read")
