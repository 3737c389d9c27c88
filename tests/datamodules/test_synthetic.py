"""Training on a distilled set, in plain PyTorch and with Lightning."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from dd_lightning import DigitsDataModule, InputError, SyntheticDataModule, load_synthetic, save_synthetic
from dd_lightning.functional.formation import Formation
from dd_lightning.sets.synthetic_file import SyntheticFile


@pytest.fixture(params=["normalized", "zca"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of real digits, which train a linear classifier well."""
    data = DigitsDataModule(color_space=request.param, cache_dir=str(tmp_path / "cache"))
    rows = torch.cat([(data.train.labels == label).nonzero()[:20, 0] for label in range(10)])
    synthetic = SyntheticFile(
        images=data.train.images[rows],
        labels=data.train.labels[rows],
        num_classes=10,
        space=data.space,
        lr=0.1,
        evaluation_lr=0.1,
        dataset="digits",
        fingerprint=data.fingerprint,
        class_names=list(data.class_names),
        objective="none",
        network="none",
        step=0,
    )
    save_synthetic(tmp_path / "synthetic.safetensors", synthetic)
    return tmp_path / "synthetic.safetensors"


class Linear(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.right: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.right.append(self.layer(batch[0].flatten(1)).argmax(1) == batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_lightning_module_trains_on_it(path: Path, tmp_path: Path) -> None:
    data, model = (
        SyntheticDataModule(path, DigitsDataModule(cache_dir=str(tmp_path / "cache")), batch_size=50),
        Linear(),
    )
    trainer = Trainer(
        max_epochs=40, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, data)
    assert trainer.global_step == 40 * 4
    trainer.test(model, data, verbose=False)
    right = torch.cat(model.right)
    assert len(right) == len(DigitsDataModule().test)
    assert float(right.float().mean()) > 0.75


def test_a_dataset_of_decoded_images(path: Path) -> None:
    file = load_synthetic(path)
    items = file.training_dataset()
    assert torch.equal(torch.stack([items[row][0] for row in range(len(items))]), file.training_set()[0])
    (batch,) = DataLoader(items, batch_size=200)
    assert torch.equal(batch[1], file.labels)


def test_repr() -> None:
    file = SyntheticFile(
        images=torch.zeros(4, 1, 8, 8), labels=torch.tensor([0, 0, 1, 1]), num_classes=2, formation=Formation(2),
        space=DigitsDataModule(color_space="pixel").space, lr=None, evaluation_lr=0.01, dataset="digits",
        objective="GradientMatching", network="ConvNet-3", step=12,
    )  # fmt: skip
    assert repr(file) == (
        "SyntheticFile(digits: 2 classes of 2 images, decoded to 8, [1, 8, 8], pixel, hard labels, lr 0.01, "
        "GradientMatching with ConvNet-3, step 12)"
    )


def test_bad_input(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        SyntheticDataModule(path, batch_size=0)
    with pytest.raises(InputError, match="no synthetic set at"):
        SyntheticDataModule(tmp_path / "none.safetensors")
