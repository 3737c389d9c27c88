"""MNIST and Fashion-MNIST."""

from typing import Any, ClassVar

from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.published import read_published


class MNISTDataModule(DistillationDataModule):
    """MNIST: 60,000 training and 10,000 test handwritten digits, 28x28, gray, 10 classes.

    Args:
        root: Folder that holds, or will hold, ``MNIST/raw``.
        download: Fetch the files (11 MiB) when they are not under ``root``.
        color_space: What networks see: ``normalized`` (mean 0.1307, std 0.3081), ``zca``-whitened pixels
            (fitted on the training images alone, with eps 0.1) or the ``pixel`` values in [0, 1].
        val_fraction: Share of every class that is taken out of the training data, to choose settings on.
        split_seed: Seed of that split.
        cache_dir: Folder for fitted ZCA matrices; ``<root>/.dd_lightning`` when left out.
    """

    name = "mnist"
    channel_stats = ((0.1307,), (0.3081,))
    _title: ClassVar[str] = "MNIST"
    _published: ClassVar[Any] = MNIST

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images uint8 ``[n, 1, 28, 28]`` and labels ``[n]`` in the order of the files."""
        data = read_published(
            self._title,
            self.root,
            f"{self._published.__name__}/raw",
            read=lambda: self._published(self.root, train=train),
            fetch=(lambda: self._published(self.root, train=train, download=True)) if self.download else None,
            remedy=None,
        )
        return data.data[:, None], data.targets

    def load_class_names(self) -> list[str]:
        """Return the names that torchvision gives the classes."""
        return list(self._published.classes)


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test pictures of clothes, 28x28, gray, 10 classes.

    Args:
        root: Folder that holds, or will hold, ``FashionMNIST/raw``.
        download: Fetch the files (30 MiB) when they are not under ``root``.
        color_space: What networks see: ``normalized`` (mean 0.2861, std 0.3530), ``zca``-whitened pixels
            (fitted on the training images alone, with eps 0.1) or the ``pixel`` values in [0, 1].
        val_fraction: Share of every class that is taken out of the training data, to choose settings on.
        split_seed: Seed of that split.
        cache_dir: Folder for fitted ZCA matrices; ``<root>/.dd_lightning`` when left out.
    """

    name = "fashion_mnist"
    channel_stats = ((0.2861,), (0.3530,))
    _title = "Fashion-MNIST"
    _published = FashionMNIST
