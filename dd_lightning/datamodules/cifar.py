"""CIFAR-10 and CIFAR-100."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.published import read_published
from dd_lightning.sets.color_spaces import ColorKind

_MEAN = (0.4914, 0.4822, 0.4465)
_STD = (0.2023, 0.1994, 0.2010)


class _AnyCIFAR10(CIFAR10):  # type: ignore[misc]  # torchvision ships no types
    """CIFAR-10 files that need only be there, whatever their checksum."""

    train_list: ClassVar = [[name, None] for name, _ in CIFAR10.train_list]
    test_list: ClassVar = [[name, None] for name, _ in CIFAR10.test_list]
    meta: ClassVar = {**CIFAR10.meta, "md5": None}


class _AnyCIFAR100(CIFAR100):  # type: ignore[misc]
    """CIFAR-100 files that need only be there, whatever their checksum."""

    train_list: ClassVar = [[name, None] for name, _ in CIFAR100.train_list]
    test_list: ClassVar = [[name, None] for name, _ in CIFAR100.test_list]
    meta: ClassVar = {**CIFAR100.meta, "md5": None}


class CIFAR10DataModule(DistillationDataModule):
    """CIFAR-10: 50,000 training and 10,000 test photographs, 32x32, 10 classes.

    Normalization uses the trajectory-matching reference's constants.

    Args:
        root: Folder that holds, or will hold, ``cifar-10-batches-py``.
        download: Fetch the files (163 MiB) when they are not under ``root``.
        color_space: What networks see: ``normalized`` channels, ``zca``-whitened pixels (fitted on the
            training images alone, with eps 0.1) or the ``pixel`` values in [0, 1].
        val_fraction: Share of every class that is taken out of the training data, to choose settings on.
        split_seed: Seed of that split.
        cache_dir: Folder for fitted ZCA matrices; ``<root>/.dd_lightning`` when left out.
        verify: Compare checksums with the published files. Switch it off to read other images that are stored
            in the same format; it is a pickle, which can run code, so only for files from a source you trust.
    """

    name = "cifar10"
    channel_stats = (_MEAN, _STD)
    _title: ClassVar[str] = "CIFAR-10"
    _published: ClassVar[Any] = CIFAR10
    _unverified: ClassVar[Any] = _AnyCIFAR10

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        color_space: ColorKind = "normalized",
        val_fraction: float = 0.0,
        split_seed: int = 0,
        cache_dir: str | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__(root, download, color_space, val_fraction, split_seed, cache_dir)
        self.verify = verify
        self._class_names: list[str] = []

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images uint8 ``[n, 3, 32, 32]`` and labels ``[n]`` in the order of the files."""
        read = self._published if self.verify else self._unverified
        data = read_published(
            self._title,
            self.root,
            self._published.base_folder,
            read=lambda: read(self.root, train=train),
            fetch=(lambda: self._published(self.root, train=train, download=True)) if self.download else None,
            remedy="delete it to fetch it again, or set verify to false to use it as it is"
            if self.verify
            else "add what is missing or delete it",
        )
        self._class_names = list(data.classes)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)

    def load_class_names(self) -> list[str]:
        """Return the names in the files."""
        return self._class_names


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test photographs, 32x32, 100 fine classes.

    Normalization uses CIFAR-10's constants, as the trajectory-matching reference does.

    Args:
        root: Folder that holds, or will hold, ``cifar-100-python``.
        download: Fetch the files (161 MiB) when they are not under ``root``.
        color_space: What networks see: ``normalized`` channels, ``zca``-whitened pixels (fitted on the
            training images alone, with eps 0.1) or the ``pixel`` values in [0, 1].
        val_fraction: Share of every class that is taken out of the training data, to choose settings on.
        split_seed: Seed of that split.
        cache_dir: Folder for fitted ZCA matrices; ``<root>/.dd_lightning`` when left out.
        verify: Compare checksums with the published files. Switch it off to read other images that are stored
            in the same format; it is a pickle, which can run code, so only for files from a source you trust.
    """

    name = "cifar100"
    _title = "CIFAR-100"
    _published = CIFAR100
    _unverified = _AnyCIFAR100
