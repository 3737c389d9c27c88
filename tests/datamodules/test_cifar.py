import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar

from dd_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule
from dd_lightning.functional.errors import InputError
from tests.datamodules.real_data import real_root
from tests.generated_cifar import (
    CIFAR10_NAMES,
    CIFAR100_GROUPS,
    CIFAR100_NAMES,
    write_cifar10,
    write_cifar100,
)


def nearest_mean_accuracy(data: CIFAR10DataModule) -> float:
    """Accuracy of the simplest classifier: the nearest class mean."""
    means = torch.stack([data.train.images[data.train.class_indices(c)].mean(0) for c in range(data.num_classes)])
    guess = torch.cdist(data.test.images.flatten(1), means.flatten(1)).argmin(1)
    return (guess == data.test.labels).float().mean().item()


def test_generated_cifar10_is_read_as_written(tmp_path: Path) -> None:
    write_cifar10(tmp_path, images_per_class=7, seed=0)
    data = CIFAR10DataModule(str(tmp_path), download=False, verify=False, color_space="pixel")
    assert data.train.class_counts == data.test.class_counts == (7,) * 10
    assert data.class_names == tuple(CIFAR10_NAMES)
    assert (data.name, data.image_shape) == ("cifar10", (3, 32, 32))
    rows, labels = [], []
    for number in range(1, 6):
        content = pickle.loads((tmp_path / "cifar-10-batches-py" / f"data_batch_{number}").read_bytes())
        rows.append(content["data"])
        labels += content["labels"]
    stored = torch.from_numpy(np.vstack(rows)).view(70, 3, 32, 32)
    assert torch.equal(data.train.images, stored.float() / 255)
    assert data.train.labels.tolist() == labels


def test_generated_cifar100_is_read_as_written(tmp_path: Path) -> None:
    write_cifar100(tmp_path, images_per_class=2, seed=0)
    data = CIFAR100DataModule(str(tmp_path), download=False, verify=False)
    assert data.train.class_counts == data.test.class_counts == (2,) * 100
    assert data.class_names == tuple(CIFAR100_NAMES)
    assert (data.name, data.num_classes) == ("cifar100", 100)


def test_generated_classes_can_be_learned(tmp_path: Path) -> None:
    write_cifar10(tmp_path, images_per_class=5, seed=0)
    write_cifar100(tmp_path, images_per_class=5, seed=0)
    assert nearest_mean_accuracy(CIFAR10DataModule(str(tmp_path), verify=False)) > 0.9
    assert nearest_mean_accuracy(CIFAR100DataModule(str(tmp_path), verify=False)) > 0.9


def test_generated_files_follow_the_seed(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_cifar10(tmp_path / name, images_per_class=2, seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    prints = [CIFAR10DataModule(str(tmp_path / name), verify=False).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_files_that_differ_are_refused_and_not_overwritten(tmp_path: Path) -> None:
    write_cifar10(tmp_path, images_per_class=1, seed=0)
    before = (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()
    with pytest.raises(InputError, match=r"differs from the published files: .* set verify to false") as caught:
        CIFAR10DataModule(str(tmp_path)).setup()
    assert str((tmp_path / "cifar-10-batches-py").absolute()) in str(caught.value)
    assert (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes() == before


def test_incomplete_files_are_not_overwritten_either(tmp_path: Path) -> None:
    write_cifar10(tmp_path, images_per_class=1, seed=0)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(InputError, match=r"is incomplete .*: add what is missing or delete it"):
        CIFAR10DataModule(str(tmp_path), verify=False).setup()


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    write_cifar10(tmp_path, images_per_class=1, seed=0)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    with pytest.raises(InputError, match=r"CIFAR-10 in .*cifar-10-batches-py cannot be read \(.*\): delete it"):
        CIFAR10DataModule(str(tmp_path), verify=False).setup()


def test_missing_data_names_the_folder_and_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = tmp_path / "data" / "cifar-100-python"
    with pytest.raises(InputError, match=r"download is off: set root .* or download to true") as caught:
        CIFAR100DataModule(download=False).setup()
    assert str(expected) in str(caught.value)

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(InputError, match=r"could not be fetched \(.*no route to host.*\): copy it there") as caught:
        CIFAR100DataModule().setup()
    assert str(expected) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_root_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"root .*file is not a folder that can be read: change root"):
        CIFAR10DataModule(str(tmp_path / "file")).setup()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
def test_a_root_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    with pytest.raises(InputError, match=r"is not a folder that can be read: change root or its permissions"):
        CIFAR10DataModule(str(tmp_path / "closed")).setup()


def test_both_use_the_constants_of_the_reference(tmp_path: Path) -> None:
    write_cifar10(tmp_path, images_per_class=1, seed=0)
    write_cifar100(tmp_path, images_per_class=1, seed=0)
    for data in (
        CIFAR10DataModule(str(tmp_path), verify=False),
        CIFAR100DataModule(str(tmp_path), verify=False),
    ):
        tensors = data.space.tensors()
        torch.testing.assert_close(tensors["mean"], torch.tensor([0.4914, 0.4822, 0.4465]))
        torch.testing.assert_close(tensors["std"], torch.tensor([0.2023, 0.1994, 0.2010]))


def test_real_cifar10() -> None:
    data = CIFAR10DataModule(real_root("cifar-10-batches-py"), download=False)
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert data.train.class_counts == (5000,) * 10
    assert data.test.class_counts == (1000,) * 10
    assert data.train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert data.class_names == tuple(CIFAR10_NAMES)
    assert data.train.images.mean(dim=(0, 2, 3)).abs().max() < 1e-3


def test_real_cifar100() -> None:
    root = real_root("cifar-100-python")
    data = CIFAR100DataModule(root, download=False, val_fraction=0.1)
    assert (len(data.train), len(data.test)) == (45_000, 10_000)
    assert data.val is not None
    assert data.val.class_counts == (50,) * 100
    assert data.class_names == tuple(CIFAR100_NAMES)
    with (Path(root) / "cifar-100-python" / "train").open("rb") as file:
        content = pickle.load(file, encoding="latin1")
    groups = [names.split() for names in CIFAR100_GROUPS.values()]
    for fine, coarse in zip(content["fine_labels"][:2000], content["coarse_labels"][:2000], strict=True):
        assert CIFAR100_NAMES[fine] in groups[coarse]
