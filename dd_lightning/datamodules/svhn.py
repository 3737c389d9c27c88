"""Street View House Numbers."""

import torch
from torch import Tensor
from torchvision.datasets import SVHN

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.published import read_published


class SVHNDataModule(DistillationDataModule):
    """SVHN, cropped digits: 73,257 training and 26,032 test photographs, 32x32, 10 classes.

    Normalization uses the constants of the reference condensation code.

    Args:
        root: Folder that holds, or will hold, ``train_32x32.mat`` and ``test_32x32.mat``.
        download: Fetch the files (235 MiB) when they are not under ``root``.
        color_space: What networks see: ``normalized`` channels, ``zca``-whitened pixels (fitted on the
            training images alone, with eps 0.1) or the ``pixel`` values in [0, 1].
        val_fraction: Share of every class that is taken out of the training data, to choose settings on.
        split_seed: Seed of that split.
        cache_dir: Folder for fitted ZCA matrices; ``<root>/.dd_lightning`` when left out.
    """

    name = "svhn"
    channel_stats = ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052))

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read images uint8 ``[n, 3, 32, 32]`` and labels ``[n]`` in the order of the files."""
        split = "train" if train else "test"
        data = read_published(
            "SVHN",
            self.root,
            SVHN.split_list[split][1],
            read=lambda: SVHN(self.root, split=split),
            fetch=(lambda: SVHN(self.root, split=split, download=True)) if self.download else None,
            remedy="delete it to fetch it again",
        )
        return torch.from_numpy(data.data), torch.from_numpy(data.labels)

    def load_class_names(self) -> list[str]:
        """Return the ten digits."""
        return [str(digit) for digit in range(10)]
