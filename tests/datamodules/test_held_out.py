"""Stored sets meet the data they are evaluated on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dd_lightning.datamodules import CIFAR10DataModule, DatasetDataModule, datamodule_by_name, evaluation_data
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation
from dd_lightning.sets.color_spaces import ColorKind, NormalizedSpace, ZCARecipe
from dd_lightning.sets.synthetic import ImageSpace
from dd_lightning.sets.synthetic_file import SyntheticFile, load_synthetic, save_synthetic

SPLIT: dict[str, Any] = {"val_fraction": 0.25, "split_seed": 3}


def pixels(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def data(folder: Path, seed: int = 0, **options: Any) -> DatasetDataModule:  # noqa: ANN401
    train, test = (TensorDataset(pixels(count, seed + i), torch.arange(count) % 2) for i, count in ((0, 80), (1, 20)))
    return DatasetDataModule(train, test, name="mine", root=str(folder), **options)


def stored(
    folder: Path, real: DatasetDataModule, stored_as: ImageSpace = "network", embed: bool = False
) -> SyntheticFile:
    images = pixels(4, 7)
    file = SyntheticFile(
        images=images if stored_as == "pixels" else real.space.encode(images),
        labels=torch.tensor([0, 0, 1, 1]),
        num_classes=2,
        space=real.space,
        stored_as=stored_as,
        formation=Formation(2),
        lr=None,
        evaluation_lr=0.1,
        dataset="mine",
        fingerprint=real.fingerprint,
        val_fraction=real.val_fraction,
        split_seed=real.split_seed,
        objective="TrajectoryMatching",
        network="ConvNet-1-W4",
        step=3,
    )
    save_synthetic(folder / "set", file, embed)
    return load_synthetic(folder / "set")


@pytest.mark.parametrize("stored_as", ["network", "pixels"])
@pytest.mark.parametrize("given", ["normalized", "zca"])
def test_a_whitened_set_is_evaluated_with_refitted_matrices(
    tmp_path: Path, stored_as: ImageSpace, given: ColorKind
) -> None:
    real = data(tmp_path, color_space="zca", **SPLIT)
    file = stored(tmp_path, real, stored_as)
    assert isinstance(file.space, ZCARecipe)
    # whatever the options of the data say, the set's color space and split are used
    fitted, held_out = evaluation_data(file, data(tmp_path / "elsewhere", color_space=given))
    torch.testing.assert_close(held_out.images, real.test.images)
    assert torch.equal(held_out.labels, real.test.labels)
    expected = replace(file, space=real.space).training_set()
    for ours, theirs in zip(fitted.training_set(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_cache_spares_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = stored(tmp_path, data(tmp_path, color_space="zca", **SPLIT))
    monkeypatch.setattr("dd_lightning.datamodules.base.fit_zca", None)
    evaluation_data(file, data(tmp_path))


def test_other_training_data_are_refused(tmp_path: Path) -> None:
    real = data(tmp_path, color_space="zca", **SPLIT)
    file = stored(tmp_path, real)
    with pytest.raises(InputError, match=f"fingerprint {real.fingerprint}, but mine has [0-9a-f]{{16}}; .*--data"):
        evaluation_data(file, data(tmp_path, seed=5))
    shifted = replace(file, space=ZCARecipe(file.space.tensors()["mean"] + 1e-3))
    with pytest.raises(InputError, match="was whitened with training data of fingerprint"):
        evaluation_data(shifted, data(tmp_path))


def test_missing_training_data_are_one_line(tmp_path: Path) -> None:
    file = replace(stored(tmp_path, data(tmp_path, color_space="zca")), dataset="cifar10")
    with pytest.raises(InputError, match=r"^the set was whitened.* training data of cifar10: CIFAR-10 is not in .*$"):
        evaluation_data(file, CIFAR10DataModule(str(tmp_path), download=False))
    plain = replace(file, space=NormalizedSpace(torch.zeros(1), torch.ones(1)))
    with pytest.raises(InputError, match=r"^CIFAR-10 is not in "):
        evaluation_data(plain, CIFAR10DataModule(str(tmp_path), download=False))


@pytest.mark.parametrize("kind", ["pixel", "normalized", "zca"])
def test_test_images_come_into_a_complete_space(tmp_path: Path, kind: ColorKind) -> None:
    real = data(tmp_path, color_space=kind)
    file = stored(tmp_path, real, embed=True)
    again, held_out = evaluation_data(file, data(tmp_path, color_space=kind))
    assert again is file
    assert torch.equal(held_out.images, real.test.images)  # no detour through pixels
    other: ColorKind = "pixel" if kind == "normalized" else "normalized"
    _, held_out = evaluation_data(file, data(tmp_path, color_space=other))
    torch.testing.assert_close(held_out.images, real.test.images, rtol=1e-4, atol=1e-4)


def test_data_of_another_shape_are_refused(tmp_path: Path) -> None:
    file = stored(tmp_path, data(tmp_path))
    with pytest.raises(InputError, match=r"2 classes of \(1, 4, 4\) images, but digits has 10 of \(1, 8, 8\)"):
        evaluation_data(file, datamodule_by_name("digits", str(tmp_path)))
