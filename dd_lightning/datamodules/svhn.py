"""Street View House Numbers."""

from functools import partial

import torch
from torch import Tensor
from torchvision.datasets import SVHN

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.published import read_published


class SVHNDataModule(DistillationDataModule):
    """SVHN, cropped digits: 73,257 training and 26,032 test photographs, 32x32, 10 classes.

    A download takes 235 MiB: ``train_32x32.mat`` and ``test_32x32.mat`` in ``root``. Normalization uses the reference
    condensation code's constants.
    """

    name = "svhn"
    channel_stats = ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052))

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images uint8 ``[n, 3, 32, 32]`` and labels ``[n]`` in the order of the files."""
        split = "train" if train else "test"
        dataset = partial(SVHN, self.root, split=split)
        data = read_published("SVHN", self.root, SVHN.split_list[split][1], dataset, self.download)
        return torch.from_numpy(data.data), torch.from_numpy(data.labels)

    def load_class_names(self) -> list[str]:
        """Return the ten digits."""
        return [str(digit) for digit in range(10)]
