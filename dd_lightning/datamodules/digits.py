"""The small handwritten digits that come with scikit-learn."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.sets.splits import stratified_split

TEST_FRACTION = 0.2
_DARKEST = 16  # the stored values count the inked pixels of a 4x4 block


class DigitsDataModule(DistillationDataModule):
    """1,797 real handwritten digits, 8x8, gray, 10 classes: no download, for a first run and for tests.

    scikit-learn publishes no split of them; a stratified fifth, drawn by ``split_seed``, is the test set.

    Args:
        root: Folder for the cache; no data file is read from it.
        **options: Those of :class:`DistillationDataModule`, but for ``download``.
    """

    name = "digits"

    def __init__(self, root: str = "data", **options: Any) -> None:  # noqa: ANN401  (inherited)
        super().__init__(root, download=False, **options)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return images float ``[n, 1, 8, 8]`` in [0, 1] and labels ``[n]``."""
        data = load_digits()
        images = torch.from_numpy(data.images).float()[:, None] / _DARKEST
        labels = torch.from_numpy(data.target).long()
        kept, held = stratified_split(labels, TEST_FRACTION, self.split_seed, "test split")
        chosen = kept if train else held
        return images[chosen], labels[chosen]

    def load_class_names(self) -> list[str]:
        """Return the ten digits."""
        return [str(digit) for digit in range(10)]
