"""A distilled set as the training data of any LightningModule."""

from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.by_name import datamodule_by_name
from dd_lightning.datamodules.held_out import evaluation_data
from dd_lightning.functional.errors import check_range
from dd_lightning.sets.synthetic_file import SyntheticFile, load_synthetic

Batches = DataLoader[tuple[Tensor, ...]]


class SyntheticDataModule(LightningDataModule):
    """Trains on a distilled set, and validates and tests on the real test images, both in the set's color space.

    Batches are ``(images, labels)``: decoded images ``[n, C, H, W]``, and class numbers ``[n]`` or logits
    ``[n, num_classes]``; test labels are class numbers. Nothing is augmented: a protocol's augmentation is the model's.

    Args:
        file: A ``synthetic.safetensors``, or the set itself.
        data: The real data; by default the file's dataset, read from ``root``.
        root: Folder of the real data.
        batch_size: Images per batch; 256 in MTT's evaluation.

    Raises:
        InputError: If ``batch_size`` is below 1; when set up, if the file or the data are missing or do not fit.
    """

    def __init__(
        self,
        file: Path | str | SyntheticFile,
        data: DistillationDataModule | None = None,
        root: str = "data",
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        check_range("batch_size", batch_size, low=1)
        self.synthetic = file if isinstance(file, SyntheticFile) else load_synthetic(file)
        self.data = data or datamodule_by_name(self.synthetic.dataset, root=root)
        self.batch_size = batch_size

    def setup(self, stage: str | None = None) -> None:
        """Read the real data, and bring them and the set into one color space."""
        del stage
        self.synthetic, self._held_out = evaluation_data(self.synthetic, self.data)

    def train_dataloader(self) -> Batches:
        """Return the distilled images, shuffled anew in each epoch."""
        return DataLoader(self.synthetic.training_dataset(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Batches:
        """Return the real test images."""
        return DataLoader(TensorDataset(self._held_out.images, self._held_out.labels), self.batch_size)

    test_dataloader = val_dataloader
