"""Any map-style dataset."""

import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.class_order import renumbered
from dd_lightning.datamodules.collect import collect, to_unit
from dd_lightning.functional.errors import InputError, check_range

READ_TWICE = 8
"""Items that are read a second time, to notice random transforms: a random flip goes unnoticed once in 256 times."""


class DatasetDataModule(DistillationDataModule):
    """Two datasets of your own, read once into memory.

    An item is ``(image, class number, ...)`` or ``{"image": ..., "label": ...}``. An image is a tensor ``[C, H, W]`` or
    ``[H, W]``, an array ``[H, W, C]`` or ``[H, W]``: bool, uint8, uint16, or floats in [0, 1]; or a PIL image, gray or
    color, whose transparency is composited on white. All have one shape. Where both datasets name their ``classes``,
    as torchvision's do, test labels are renumbered by name.

    Args:
        train_dataset: The data to distil: anything with a length and indices.
        test_dataset: The data to test on.
        num_classes: The number of classes; one more than the largest training label by default.
        name: What to call the data in files and logs.
        root: Folder for the cache; no data file is read from it.
        read_seed: Seed of torch's, NumPy's and Python's random state while an item is read, for datasets with random
            transforms: one fixed draw. By default it is whatever the process draws.
        **options: Those of :class:`DistillationDataModule`, but for ``download``.

    Raises:
        InputError: If a dataset is missing or none, or an option is out of range.
    """

    def __init__(
        self,
        train_dataset: Dataset[Any],
        test_dataset: Dataset[Any] | None = None,
        num_classes: int | None = None,
        name: str = "custom",
        root: str = "data",
        read_seed: int | None = None,
        **options: Any,  # noqa: ANN401  (inherited)
    ) -> None:
        super().__init__(root, download=False, **options)
        for which, dataset in (("train_dataset", train_dataset), ("test_dataset", test_dataset)):
            if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                raise InputError(
                    f"{which} is {'missing' if dataset is None else f'a {type(dataset).__name__}'}: pass a dataset "
                    "with a length and indices, such as the .dataset of a DataLoader"
                )
        check_range("num_classes", num_classes, 1)
        check_range("read_seed", read_seed, 0, 2**32 - 1)
        self.name = name
        self.read_seed = read_seed
        self._datasets: dict[bool, Any] = {True: train_dataset, False: test_dataset}
        self._num_classes = num_classes
        self._classes = 0

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read every item, in order: images ``[n, C, H, W]`` and labels ``[n]``."""
        dataset, title = self._datasets[train], f"{'train' if train else 'test'} data of {self.name}"
        with nullcontext() if self.read_seed is None else isolate_rng():
            images, labels = collect(self._items(dataset, len(dataset)), len(dataset), title)
            few = min(len(dataset), READ_TWICE)
            again, _ = collect(self._items(dataset, few), few, title)
        if not torch.equal(to_unit(again), to_unit(images[:few])):
            rank_zero_warn(
                f"items of the {title} differ each time they are read: one random draw of each is used, and the data's "
                "fingerprint changes with it; remove random transforms"
                + (" or set read_seed" if self.read_seed is None else ", which have a random state of their own")
            )
        names = class_names(dataset)
        if not train and names and (first := class_names(self._datasets[True])):
            labels = renumbered(labels, names, first, f"the test data of {self.name}", "the training data")
        if train:
            self._classes = int(labels.max()) + 1
        return images, labels

    def load_class_names(self) -> list[str] | None:
        """Return the dataset's own names, if they are as many as the classes; plain numbers if only these are known."""
        count = self._num_classes or self._classes
        names = class_names(self._datasets[True])
        return names if len(names) == count else [str(label) for label in range(count)]

    def _items(self, dataset: Any, count: int) -> Iterator[object]:  # noqa: ANN401  (anything with indices)
        for index in range(count):
            if self.read_seed is not None:
                seed = (self.read_seed + index) % 2**32
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002  (transforms draw from the global state)
                torch.manual_seed(seed)
            yield dataset[index]


def class_names(dataset: object) -> list[str]:
    """Return the names that a dataset, or what it is a subset of, has for its classes; none if it has none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else []
