from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import SVHN

from dd_lightning.datamodules import SVHNDataModule
from dd_lightning.functional.errors import InputError


def write_svhn(root: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": np.arange(1, 11, dtype=np.uint8)[:, None]})
    return images


def test_generated_files_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_svhn(tmp_path)
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    data = SVHNDataModule(str(tmp_path), download=False)
    # the files call the digit 0 "10"
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    pixels = torch.from_numpy(images).permute(3, 2, 0, 1) / 255
    torch.testing.assert_close(data.space.decode(data.train.images), pixels)
    torch.testing.assert_close(data.space.tensors()["mean"], torch.tensor([0.4377, 0.4438, 0.4728]))
    torch.testing.assert_close(data.space.tensors()["std"], torch.tensor([0.1201, 0.1231, 0.1052]))


def test_missing_and_differing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SVHN is not in .*train_32x32.mat and download is off"):
        SVHNDataModule(str(tmp_path), download=False).setup()
    write_svhn(tmp_path)
    with pytest.raises(InputError, match=r"train_32x32.mat is incomplete or differs .*: delete it to fetch it again$"):
        SVHNDataModule(str(tmp_path)).setup()
