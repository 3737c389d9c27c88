"""CIFAR-10 and CIFAR-100."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.published import read_published


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

    A download takes 163 MiB. Normalization uses the trajectory-matching reference's constants.

    Args:
        root: Folder that holds, or will hold, ``cifar-10-batches-py``.
        verify: Compare checksums with the published files. Switch it off to read other images that are stored in the
            same format; it is a pickle, which can run code, so only for files from a source you trust.
        **options: Those of :class:`DistillationDataModule`.
    """

    name = "cifar10"
    channel_stats = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    _title: ClassVar[str] = "CIFAR-10"
    _published: ClassVar[Any] = CIFAR10
    _unverified: ClassVar[Any] = _AnyCIFAR10

    def __init__(self, root: str = "data", *, verify: bool = True, **options: Any) -> None:  # noqa: ANN401  (inherited)
        super().__init__(root, **options)
        self.verify = verify
        self._class_names: list[str] = []

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images uint8 ``[n, 3, 32, 32]`` and labels ``[n]`` in the order of the files."""
        data = read_published(
            self._title,
            self.root,
            self._published.base_folder,
            partial(self._published if self.verify else self._unverified, self.root, train=train),
            self.download,
            "delete it to fetch it again, or set verify to false to use it as it is"
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

    A download takes 161 MiB, into ``cifar-100-python`` below ``root``. Normalization uses CIFAR-10's constants, as the
    trajectory-matching reference does.
    """

    name = "cifar100"
    _title = "CIFAR-100"
    _published = CIFAR100
    _unverified = _AnyCIFAR100
