from pathlib import Path

import pytest
import torch
from PIL import Image

from dd_lightning.datamodules import ImageFolderDataModule
from dd_lightning.functional.errors import InputError

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def write_images(root: Path, splits: tuple[str, ...] = ("train", "test"), size: tuple[int, int] = (12, 8)) -> None:
    for split in splits:
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", size, color).save(root / split / name / f"{number}.png")


def test_folders_become_classes(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = ImageFolderDataModule(str(tmp_path), image_size=6, color_space="pixel", val_fraction=0.25)
    assert data.class_names == ("blue", "red")
    assert data.image_shape == (3, 6, 6)
    assert data.val is not None
    assert (data.train.class_counts, data.val.class_counts, data.test.class_counts) == (
        (3, 3),
        (1, 1),
        (4, 4),
    )
    for label, color in enumerate(((0.0, 0.0, 1.0), (1.0, 0.0, 0.0))):
        images = data.train.images[data.train.class_indices(label)]
        assert torch.equal(images, torch.tensor(color)[:, None, None].expand_as(images))


def test_shorter_side_fits_and_the_middle_is_kept(tmp_path: Path) -> None:
    write_images(tmp_path)
    picture = Image.new("L", (8, 4), 0)
    picture.paste(255, (2, 0, 6, 4))  # white in the middle 4x4, which is all that should be left
    picture.save(tmp_path / "train" / "red" / "0.png")
    data = ImageFolderDataModule(str(tmp_path), image_size=4, grayscale=True, color_space="pixel")
    first_red = data.train.images[data.train.class_indices(1)[0]]
    assert torch.equal(first_red, torch.ones(1, 4, 4))


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*/train: put images into .*/train/<class>/"):
        ImageFolderDataModule(str(tmp_path), image_size=4).setup()
    write_images(tmp_path, splits=("train",))
    with pytest.raises(InputError, match=r"there is no folder .*/test: .*a test set is needed"):
        ImageFolderDataModule(str(tmp_path), image_size=4).setup()
    write_images(tmp_path, splits=("test",))
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "green")
    with pytest.raises(InputError, match=r"/test has classes that train lacks, green: add or"):
        ImageFolderDataModule(str(tmp_path), image_size=4).setup()
    (tmp_path / "train" / "red" / "2.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"red/2.png cannot be read as an image"):
        ImageFolderDataModule(str(tmp_path), image_size=4).setup()
    with pytest.raises(InputError, match=r"image_size is 0"):
        ImageFolderDataModule(str(tmp_path), image_size=0)
