"""MNIST and Fashion-MNIST."""

from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.published import read_published


class MNISTDataModule(DistillationDataModule):
    """MNIST: 60,000 training and 10,000 test handwritten digits, 28x28, gray, 10 classes.

    A download takes 11 MiB, into ``MNIST/raw`` below ``root``. Normalized with mean 0.1307 and std 0.3081.
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
            partial(self._published, self.root, train=train),
            self.download,
        )
        return data.data[:, None], data.targets

    def load_class_names(self) -> list[str]:
        """Return the names that torchvision gives the classes."""
        return list(self._published.classes)


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test pictures of clothes, 28x28, gray, 10 classes.

    A download takes 30 MiB, into ``FashionMNIST/raw`` below ``root``. Normalized with mean 0.2861 and std 0.3530.
    """

    name = "fashion_mnist"
    channel_stats = ((0.2861,), (0.3530,))
    _title = "Fashion-MNIST"
    _published = FashionMNIST
