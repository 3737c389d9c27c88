"""Data modules by the name that is written into files."""

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from dd_lightning.datamodules.digits import DigitsDataModule
from dd_lightning.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
from dd_lightning.datamodules.svhn import SVHNDataModule
from dd_lightning.functional.errors import InputError

_NAMED: dict[str, type[DistillationDataModule]] = {
    module.name: module
    for module in (
        CIFAR10DataModule,
        CIFAR100DataModule,
        DigitsDataModule,
        FashionMNISTDataModule,
        MNISTDataModule,
        SVHNDataModule,
    )
}


def datamodule_by_name(name: str, root: str = "data") -> DistillationDataModule:
    """Return the data module of a published data set.

    Args:
        name: Its short name, such as ``cifar10``.
        root: Folder with the data files.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in _NAMED:
        raise InputError(
            f"the dataset {name!r} is none of {', '.join(sorted(_NAMED))}; name its data module with --data"
        )
    return _NAMED[name](root=root)
