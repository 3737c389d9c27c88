from pathlib import Path

import pytest
import torch
import torchvision.datasets.mnist

from dd_lightning.datamodules import FashionMNISTDataModule, MNISTDataModule
from dd_lightning.functional.errors import InputError
from tests.datamodules.real_data import real_root
from tests.generated_mnist import write_mnist


@pytest.mark.parametrize(
    ("kind", "folder", "name", "mean", "std"),
    [
        (MNISTDataModule, "MNIST", "mnist", 0.1307, 0.3081),
        (FashionMNISTDataModule, "FashionMNIST", "fashion_mnist", 0.2861, 0.3530),
    ],
)
def test_generated_files_are_read_as_written(
    tmp_path: Path, kind: type[MNISTDataModule], folder: str, name: str, mean: float, std: float
) -> None:
    written = write_mnist(tmp_path, folder, images_per_class=3)
    data = kind(str(tmp_path), download=False)
    assert (data.name, data.image_shape, data.num_classes) == (name, (1, 28, 28), 10)
    assert data.train.labels.tolist() == list(range(10)) * 3
    for real, split in ((data.train, "train"), (data.test, "t10k")):
        torch.testing.assert_close(real.images[:, 0], (written[split] / 255 - mean) / std)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Fashion-MNIST is not in .*FashionMNIST/raw and download is off"):
        FashionMNISTDataModule(str(tmp_path), download=False).setup()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_no_download_overwrites_files_that_are_there(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path, "MNIST", images_per_class=1)
    raw = tmp_path / "MNIST" / "raw"
    labels = raw / "train-labels-idx1-ubyte"
    if damage == "missing":
        labels.unlink()
    else:
        labels.write_bytes(labels.read_bytes()[:-1])  # a reader's error

    def download(*_: object, **__: object) -> None:
        pytest.fail("a download was started")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", download)
    with pytest.raises(InputError, match=r"MNIST in .*MNIST/raw .*: delete it to fetch it again$"):
        MNISTDataModule(str(tmp_path)).setup()


def test_archives_alone_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"")
    calls = []
    monkeypatch.setattr(
        torchvision.datasets.mnist, "download_and_extract_archive", lambda *_, **__: calls.append(write_mnist)
    )
    with pytest.raises(InputError, match="could not be fetched"):
        MNISTDataModule(str(tmp_path)).setup()
    assert calls


def test_real_fashion_mnist() -> None:
    data = FashionMNISTDataModule(real_root("FashionMNIST"), download=False)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.train.class_counts == (6000,) * 10
    assert data.train.labels[:4].tolist() == [9, 0, 0, 3]
    assert data.class_names[9] == "Ankle boot"
    assert abs(data.train.images.mean().item()) < 1e-3
    assert abs(data.train.images.std().item() - 1) < 1e-3
