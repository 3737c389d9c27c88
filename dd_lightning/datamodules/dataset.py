"""Any map-style dataset."""

from collections.abc import Sized
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.collect import collect
from dd_lightning.functional.errors import InputError


class DatasetDataModule(DistillationDataModule):
    """Two datasets of your own, each a sequence of (image, class number) pairs, read once into memory.

    An image is a tensor ``[C, H, W]`` or ``[H, W]``, an array ``[H, W, C]`` or ``[H, W]``, or a PIL image;
    uint8, or floats in [0, 1]. All have one shape, and no random transformation: each item is read once.

    Args:
        train_dataset: The data to distil.
        test_dataset: The data to test on.
        num_classes: The number of classes; one more than the largest training label by default.
        name: What to call the data in files and logs.
        root: Folder for the cache; no data file is read from it.
        **options: Those of :class:`DistillationDataModule`, but for ``download``.
    """

    def __init__(
        self,
        train_dataset: Dataset[Any],
        test_dataset: Dataset[Any],
        num_classes: int | None = None,
        name: str = "custom",
        root: str = "data",
        **options: Any,  # noqa: ANN401  (inherited)
    ) -> None:
        super().__init__(root, download=False, **options)
        self.name = name
        self._datasets = {True: train_dataset, False: test_dataset}
        self._num_classes = num_classes

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read every item, in order: images ``[n, C, H, W]`` and labels ``[n]``."""
        dataset = self._datasets[train]
        title = f"{'train' if train else 'test'} data of {self.name}"
        if not isinstance(dataset, Sized):
            raise InputError(f"the {title}, a {type(dataset).__name__}, has no length: pass a map-style dataset")
        return collect((dataset[index] for index in range(len(dataset))), len(dataset), title)

    def load_class_names(self) -> list[str] | None:
        """Return plain numbers when the number of classes was given."""
        return None if self._num_classes is None else [str(label) for label in range(self._num_classes)]
