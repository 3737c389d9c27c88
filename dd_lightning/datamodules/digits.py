"""The small handwritten digits that come with scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.sets.color_spaces import ColorKind
from dd_lightning.sets.splits import stratified_split

TEST_FRACTION = 0.2
_DARKEST = 16  # the stored values count the inked pixels of a 4x4 block


class DigitsDataModule(DistillationDataModule):
    """1,797 real handwritten digits, 8x8, gray, 10 classes: no download, for a first run and for tests.

    scikit-learn publishes no split of them; a stratified fifth is the test set.

    Args:
        root: Folder for the cache; no data file is read from it.
        color_space: What networks see: ``normalized`` (mean and std of the training images), ``zca``-whitened
            pixels (fitted on the training images alone, with eps 0.1) or the ``pixel`` values in [0, 1].
        val_fraction: Share of every class that is taken out of the training data, to choose settings on.
        split_seed: Seed of the test split and of that split.
        cache_dir: Folder for fitted ZCA matrices; ``<root>/.dd_lightning`` when left out.
    """

    name = "digits"

    def __init__(
        self,
        root: str = "data",
        color_space: ColorKind = "normalized",
        val_fraction: float = 0.0,
        split_seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            root,
            download=False,
            color_space=color_space,
            val_fraction=val_fraction,
            split_seed=split_seed,
            cache_dir=cache_dir,
        )

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
