import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dd_lightning.datamodules.base as base
from dd_lightning.datamodules import DigitsDataModule, DistillationDataModule
from dd_lightning.datamodules.base import channel_mean_std
from dd_lightning.functional.errors import InputError
from dd_lightning.sets.color_spaces import NormalizedSpace, PixelSpace, ZCASpace


class FixedDataModule(DistillationDataModule):
    """Whatever tensors a test hands it."""

    name = "fixed"

    def __init__(self, images: Tensor, labels: Tensor, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # passed on as they come
        self.data = (images, labels)
        self.loads = 0

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        self.loads += 1
        return self.data


def small_images(count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)


def small(root: Path, **options: object) -> FixedDataModule:
    return FixedDataModule(small_images(), torch.arange(40) % 4, root=str(root), **options)


def test_setup_reads_once_and_properties_need_no_setup(tmp_path: Path) -> None:
    data = small(tmp_path)
    assert (data.num_classes, data.image_shape, data.class_names) == (4, (3, 4, 4), ("0", "1", "2", "3"))
    train = data.train
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.train is train
    assert data.loads == 2  # train and test, once each


def test_the_sets_move_to_a_device_once(tmp_path: Path) -> None:
    data = small(tmp_path, val_fraction=0.3)
    assert data.train.images.device.type == "cpu"
    assert data.to("meta") is data
    held = [data.train, data.test, data.held_out("val")]
    assert all(real.images.device.type == "meta" for real in held)
    assert data.to("meta").train is held[0]
    assert (data.test, data.val, data.held_out("test")) == (held[1], held[2], held[1])
    assert data.loads == 2


def test_refit_reads_again_only_what_changes(tmp_path: Path) -> None:
    data = small(tmp_path)
    first = data.fingerprint
    data.refit("normalized", 0.0, 0)
    assert (data.fingerprint, data.loads) == (first, 2)
    data.refit("zca", 0.3, 4)
    assert data.fingerprint == small(tmp_path, color_space="zca", val_fraction=0.3, split_seed=4).fingerprint != first


def test_val_is_stratified_and_never_overlaps_train(tmp_path: Path) -> None:
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    data = FixedDataModule(images, torch.arange(40) % 4, root=str(tmp_path), val_fraction=0.3, color_space="pixel")
    assert data.val is not None
    assert data.val.class_counts == (3, 3, 3, 3)
    assert data.train.class_counts == (7, 7, 7, 7)
    seen = [(255 * real.images[:, 0, 0, 0]).round().int().tolist() for real in (data.train, data.val)]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == list(range(40))
    assert data.val.labels.tolist() == [value % 4 for value in seen[1]]
    assert data.held_out("val") is data.val
    assert data.held_out("test") is data.test


def test_nothing_is_held_out_unasked(tmp_path: Path) -> None:
    data = small(tmp_path)
    assert data.val is None
    assert len(data.train) == 40
    with pytest.raises(InputError, match="split is 'val', but val_fraction is 0"):
        data.held_out("val")


def test_fingerprint_changes_with_what_matters_only(tmp_path: Path) -> None:
    same = [small(tmp_path / name).fingerprint for name in ("a", "b")]
    assert same[0] == same[1]
    assert re.fullmatch("[0-9a-f]{16}", same[0])
    flipped = small_images()
    flipped[3, 1, 2, 0] ^= 1
    relabeled = torch.arange(40).roll(1) % 4
    different = {
        same[0],
        small(tmp_path, val_fraction=0.3).fingerprint,
        small(tmp_path, val_fraction=0.3, split_seed=1).fingerprint,
        small(tmp_path, color_space="zca").fingerprint,
        small(tmp_path, color_space="pixel").fingerprint,
        FixedDataModule(flipped, torch.arange(40) % 4, root=str(tmp_path)).fingerprint,
        FixedDataModule(small_images(), relabeled, root=str(tmp_path)).fingerprint,
    }
    assert len(different) == 7


def test_normalized_space_is_fitted_on_train_alone(tmp_path: Path) -> None:
    data = small(tmp_path, val_fraction=0.3)
    assert isinstance(data.space, NormalizedSpace)
    torch.testing.assert_close(data.train.images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.train.images.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert data.val is not None
    assert data.val.images.mean(dim=(0, 2, 3)).abs().max() > 1e-3


def test_channel_mean_std_against_torch_and_a_constant_channel() -> None:
    images = small_images()
    images[:, 1] = 77
    mean, std = channel_mean_std(images)
    unit = images.double() / 255
    torch.testing.assert_close(mean, unit.mean(dim=(0, 2, 3)).float())
    torch.testing.assert_close(std[[0, 2]], unit.std(dim=(0, 2, 3), correction=0)[[0, 2]].float())
    assert std[1] == 1
    encoded = NormalizedSpace(mean, std).encode(unit.float())
    torch.testing.assert_close(encoded[:, 1], torch.zeros(40, 4, 4), atol=1e-6, rtol=0)


def test_pixel_space_keeps_the_values(tmp_path: Path) -> None:
    data = small(tmp_path, color_space="pixel")
    assert isinstance(data.space, PixelSpace)
    assert torch.equal(data.train.images, small_images().float() / 255)


def test_zca_round_trip_and_decorrelation(tmp_path: Path) -> None:
    data = DigitsDataModule(root=str(tmp_path), color_space="zca")
    pixels = DigitsDataModule(root=str(tmp_path), color_space="pixel").train.images
    assert isinstance(data.space, ZCASpace)
    torch.testing.assert_close(data.space.decode(data.train.images), pixels, atol=1e-4, rtol=0)
    covariance = torch.cov(data.train.images.flatten(1).T.double())
    before = torch.cov(pixels.flatten(1).T.double())
    eigenvalues = torch.linalg.eigvalsh(covariance)
    expected = torch.linalg.eigvalsh(before)
    # whitening with eps turns an eigenvalue v into v / (v + eps); both lists ascend, so they match in order
    torch.testing.assert_close(eigenvalues, expected / (expected + base.ZCA_EPS), atol=1e-3, rtol=0)


def test_second_setup_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small(tmp_path, color_space="zca")
    first.setup()
    files = list((tmp_path / ".dd_lightning").iterdir())
    assert [file.name for file in files] == [f"zca-{first.fingerprint}.safetensors"]

    def never(*_: object, **__: object) -> None:
        pytest.fail("fitted again although the cache holds the matrices")

    monkeypatch.setattr(base, "fit_zca", never)
    second = small(tmp_path, color_space="zca")
    assert torch.equal(second.train.images, first.train.images)
    for name, values in first.space.tensors().items():
        assert torch.equal(values, second.space.tensors()[name])


def test_a_cache_folder_can_be_named(tmp_path: Path) -> None:
    small(tmp_path / "data", color_space="zca", cache_dir=str(tmp_path / "cache")).setup()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["truncate", "garbage", "wrong size", "nan", "one bit", "a word", "other data"])
def test_a_damaged_cache_is_fitted_anew(tmp_path: Path, damage: str) -> None:
    first = small(tmp_path, color_space="zca")
    first.setup()
    (file,) = (tmp_path / ".dd_lightning").iterdir()
    content = {name: values.clone() for name, values in load_file(file).items()}
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "garbage":
        file.write_bytes(b"not a safetensors file")
    elif damage == "a word":
        file.write_bytes(file.read_bytes().replace(b"checksums", b"checksumz"))
    elif damage == "one bit":
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 1
        file.write_bytes(raw)
    else:
        if damage == "nan":
            content["whiten"][0, 0] = torch.nan
        elif damage == "other data":
            content["mean"] += 0.1
        else:
            content["mean"] = content["mean"][:-1].clone()
        save_file(content, file)
    second = small(tmp_path, color_space="zca")
    with pytest.warns(UserWarning, match=r"zca-.*\.safetensors is damaged .* fitted anew"):
        second.setup()
    torch.testing.assert_close(second.train.images, first.train.images)
    assert torch.equal(load_file(file)["whiten"], second.space.tensors()["whiten"])


def test_an_unwritable_cache_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    data = small(tmp_path, color_space="zca", cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"could not be stored \(cannot write .*zca-.*set cache_dir"):
        data.setup()
    assert len(data.train) == 40


def test_the_global_rng_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    small(tmp_path, color_space="zca", val_fraction=0.3).setup()
    assert torch.equal(before, torch.get_rng_state())


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="val_fraction is 1; it must be at least 0 and below 1"):
        small(tmp_path, val_fraction=1)
    with pytest.raises(InputError, match="color_space is 'hsv'; use one of"):
        small(tmp_path, color_space="hsv")
    with pytest.raises(InputError, match=r"the train split of fixed has pixels from 0 to 2; .*rescale"):
        FixedDataModule(torch.tensor([0.0, 2.0]).view(2, 1, 1, 1), torch.tensor([0, 1])).setup()
    with pytest.raises(InputError, match=r"the train split of fixed has torch.int32 pixels"):
        FixedDataModule(torch.zeros(2, 1, 1, 1, dtype=torch.int32), torch.tensor([0, 1])).setup()
    with pytest.raises(InputError, match=r"the train split of fixed: class 1 of 3 has no image") as caught:
        FixedDataModule(torch.rand(2, 1, 1, 1), torch.tensor([0, 2])).setup()
    assert "\n" not in str(caught.value)
