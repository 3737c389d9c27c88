import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.whitening import fit_zca
from dd_lightning.sets.color_spaces import NormalizedSpace, PixelSpace, ZCARecipe, ZCASpace, same_space
from dd_lightning.sets.synthetic import ImageSpace
from dd_lightning.sets.synthetic_file import METADATA_KEY, SyntheticFile, load_synthetic, save_synthetic
from dd_lightning.version import __version__


def example() -> SyntheticFile:
    generator = torch.Generator().manual_seed(0)
    both = torch.rand(2, 3, generator=generator)
    return SyntheticFile(
        images=torch.randn(6, 3, 4, 5, generator=generator),
        labels=torch.tensor([0, 0, 1, 1, 2, 2]),
        num_classes=3,
        space=NormalizedSpace(both[0], both[1]),
        formation=Formation(2),
        lr=0.1 + 0.2,
        evaluation_lr=0.3,
        evaluation_recipe={"epochs": 20, "lr": None, "milestones": [0.5]},
        dataset="digits",
        fingerprint="0123456789abcdef",
        val_fraction=0.1,
        split_seed=3,
        class_names=["zero", "eins", "två"],
        objective="TrajectoryMatching",
        network="ConvNet-2",
        step=700,
        config={"model": {"lr": 0.1, "steps": [1, 2]}, "none": None},
    )


def assert_same(one: SyntheticFile, other: SyntheticFile) -> None:
    for field in dataclasses.fields(SyntheticFile):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        elif field.name == "space":
            ours, theirs = left.tensors(), right.tensors()
            assert (left.kind, ours.keys()) == (right.kind, theirs.keys())
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        else:
            assert left == right


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lr": None, "space": PixelSpace(), "stored_as": "pixels", "class_names": [], "evaluation_recipe": {}},
        {"labels": torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), "formation": Formation(3, "multi")},
        {"space": ZCARecipe(torch.rand(60), 0.2), "pixels": torch.rand(6, 3, 4, 5)},
        {"images": torch.zeros(6, 5, 4, 3).permute(0, 3, 2, 1)},
    ],
)
def test_round_trip_is_exact(tmp_path: Path, change: dict[str, Any]) -> None:
    synthetic = dataclasses.replace(example(), **change)
    path = tmp_path / "runs" / "synthetic.safetensors"
    save_synthetic(path, synthetic)
    loaded = load_synthetic(path)
    assert_same(loaded, synthetic)
    assert loaded.package_version == __version__
    before = path.read_bytes()
    save_synthetic(path, loaded)
    assert path.read_bytes() == before


def test_a_set_that_is_being_learned_can_be_saved(tmp_path: Path) -> None:
    synthetic = dataclasses.replace(example(), images=example().images.requires_grad_())
    save_synthetic(tmp_path / "a", synthetic)
    loaded = load_synthetic(tmp_path / "a")
    assert torch.equal(loaded.images, synthetic.images)
    assert not loaded.images.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(5, 3, 4, 5)},
            r"float32 \[5, 3, 4, 5\]; 3 classes need .* \[num_classes \* ipc",
        ),
        ({"images": torch.zeros(0, 3, 4, 5)}, r"float32 \[0, 3, 4, 5\]"),
        ({"images": torch.zeros(6, 3, 4, 5, dtype=torch.float64)}, "float64"),
        ({"num_classes": 0}, "num_classes is 0; it must be at least 1"),
        ({"labels": torch.zeros(6)}, r"soft labels are torch.float32 \[6\]; they must be floating-point \[6, 3\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"hard labels are torch.int64 \[5\]; they must be int64 \[6\]"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, r"hard labels are torch.int32 \[6\]"),
        ({"class_names": ["a"]}, "1 class names for 3 classes"),
        ({"stored_as": "jpeg"}, "stored_as is 'jpeg'; use one of network, pixels"),
        ({"stored_as": "x" * 5000}, r"^stored_as is 'x{99}; use one of network, pixels$"),
        ({"space": NormalizedSpace(torch.zeros(1), torch.ones(1))}, "normalized has 1 means, the images need 3"),
        ({"space": ZCARecipe(torch.rand(59), 0.2)}, "zca has 59 means, the images need 60"),
    ],
)
def test_content_that_disagrees_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(example(), **change)


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="configuration is not plain JSON"):
        save_synthetic(tmp_path / "a", dataclasses.replace(example(), config={"path": tmp_path}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "set.safetensors"
    save_synthetic(path, example())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"^cannot read .*set\.safetensors: it is damaged[^\n]*$"):
        load_synthetic(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^there is no synthetic set at .*nothing; check the path[^\n]*$"):
        load_synthetic(tmp_path / "nothing")


@pytest.mark.parametrize(
    "metadata", [None, {"dd_lightning": "{"}, {"dd_lightning": '{"format": "expert", "format_version": 1}'}]
)
def test_a_foreign_file_is_named(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"images": torch.zeros(1)}, tmp_path / "a", metadata)
    with pytest.raises(InputError, match=r"^cannot read .*a: it is not a synthetic set of dd_lightning[^\n]*$"):
        load_synthetic(tmp_path / "a")


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    text = json.dumps({"format": "synthetic", "format_version": 4})
    safetensors.torch.save_file({"images": torch.zeros(1)}, tmp_path / "a", {"dd_lightning": text})
    with pytest.raises(InputError, match=r"format 4, this dd_lightning .* reads up to 3; upgrade[^\n]*$"):
        load_synthetic(tmp_path / "a")


def test_a_file_that_lacks_something_is_named(tmp_path: Path) -> None:
    text = json.dumps({"format": "synthetic", "format_version": 3})
    safetensors.torch.save_file({"images": torch.zeros(1)}, tmp_path / "a", {"dd_lightning": text})
    with pytest.raises(InputError, match="it lacks 'labels'; copy it again"):
        load_synthetic(tmp_path / "a")


FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save_synthetic(tmp_path / "a", example())
    raw = bytearray((tmp_path / "a").read_bytes())
    for place in (-1, -60):  # of the last tensor, and of one before
        raw[place] ^= 1
        (tmp_path / "a").write_bytes(raw)
        with pytest.raises(InputError, match=r"cannot read .*/a: the checksum of .* differs"):
            load_synthetic(tmp_path / "a")
        raw[place] ^= 1


def test_a_changed_word_is_noticed(tmp_path: Path) -> None:
    save_synthetic(tmp_path / "a", dataclasses.replace(example(), config={"seeds": {2: "b", 10: "a"}}))
    assert load_synthetic(tmp_path / "a").config == {"seeds": {"2": "b", "10": "a"}}
    whole = (tmp_path / "a").read_bytes()
    for before, after, said in (
        (b'evaluation_lr\\": 0.3', b'evaluation_lr\\": 0.7', "the checksum of metadata differs"),
        (b"checksums", b"checksumz", "'checksumz' and no checksums"),
    ):
        assert whole.count(before) == 1
        (tmp_path / "a").write_bytes(whole.replace(before, after))
        with pytest.raises(InputError, match=f"cannot read .*/a: .*{said}"):
            load_synthetic(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format_version", "x"),
        ("format_version", 1e400),
        ("factor", "a"),
        ("factor", 10**9),
        ("lr", "x"),
        ("evaluation_lr", -1.0),
        ("config", []),
        ("num_classes", 10**12),
        ("num_classes", True),
        ("class_names", 3),
        ("network", ["ConvNet-2"]),
        ("stored_as", "elsewhere"),
        ("color_space", "purple"),
        ("checksums", [1]),
    ],
)
def test_what_a_file_says_is_checked(tmp_path: Path, name: str, value: object) -> None:
    save_synthetic(tmp_path / "a", example())
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        said = json.loads(file.metadata()[METADATA_KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    said |= {"checksums": {}, name: value}  # without any, as files were at first
    safetensors.torch.save_file(tensors, tmp_path / "a", {METADATA_KEY: json.dumps(said)})
    with pytest.raises(InputError, match=r"cannot read .*/a") as refused:
        load_synthetic(tmp_path / "a")
    assert "\n" not in str(refused.value)


def test_labels_out_of_range_and_numbers_that_are_not_finite() -> None:
    with pytest.raises(InputError, match=r"labels run from 0 to 3, outside 0 \.\. 2"):
        dataclasses.replace(example(), labels=torch.tensor([0, 0, 1, 1, 2, 3]))
    with pytest.raises(InputError, match="images are not all finite"):
        dataclasses.replace(example(), images=torch.full((6, 3, 4, 5), torch.inf))


def test_files_of_versions_1_and_2_are_read() -> None:
    first, whitened, pixels = (
        load_synthetic(FIXTURES / f"synthetic_{name}.safetensors") for name in ("v1", "v2_zca", "v2_pixels")
    )
    stored = torch.arange(16).view(4, 1, 2, 2) / 16 - 0.25
    for file in (first, whitened, pixels):
        assert torch.equal(file.images, stored)
        assert (file.num_classes, file.ipc, file.dataset, file.network) == (2, 2, "digits", "ConvNet-1-W4")
        assert (file.class_names, file.objective, file.step) == (["zero", "one"], "TrajectoryMatching", 7)
        assert (file.fingerprint, file.val_fraction, file.split_seed, file.pixels) == ("", 0.0, 0, None)
        assert (file.config, file.evaluation_recipe) == ({"model": {"student_lr": 0.02}}, {})
    assert (first.label_kind, first.stored_as, first.formation) == ("hard", "network", Formation())
    assert (first.lr, first.evaluation_lr) == (0.03125, 0.03125)
    assert isinstance(first.space, NormalizedSpace)
    assert torch.equal(first.stored_pixels(), stored * 0.25 + 0.5)
    assert torch.equal(first.training_set()[0], stored)

    assert (whitened.label_kind, whitened.stored_as) == ("soft", "network")
    assert torch.equal(whitened.labels, torch.arange(8).view(4, 2) / 8)
    assert isinstance(whitened.space, ZCASpace)
    mean, whiten, unwhiten = whitened.space.zca
    assert mean.tolist() == [0.25, 0.5, 0.5, 0.25]
    torch.testing.assert_close(whiten @ unwhiten, torch.eye(4))
    torch.testing.assert_close(whitened.space.encode(whitened.stored_pixels()), stored)

    # no rate was learned: the run's own is the next best
    assert (pixels.lr, pixels.evaluation_lr, pixels.effective_ipc) == (None, 0.02, 8)
    assert (pixels.stored_as, pixels.formation) == ("pixels", Formation(2))
    assert pixels.training_set()[0].shape == (16, 1, 2, 2)
    assert torch.equal(pixels.training_set()[0][:, 0, 0, 0], (stored.flatten() - 0.5) / 0.25)
    assert pixels.training_set()[1].tolist() == [0] * 8 + [1] * 8


def whitened(stored_as: ImageSpace, shape: tuple[int, ...] = (3, 4, 5)) -> SyntheticFile:
    real = torch.rand(200, *shape, generator=torch.Generator().manual_seed(5))
    space = ZCASpace(fit_zca(real, eps=0.2), 0.2)
    images = real[:6] if stored_as == "pixels" else space.encode(real[:6])
    return dataclasses.replace(example(), images=images, space=space, stored_as=stored_as)


@pytest.mark.parametrize("stored_as", ["network", "pixels"])
def test_whitening_matrices_are_stored_only_on_request(tmp_path: Path, stored_as: ImageSpace) -> None:
    file = whitened(stored_as)
    save_synthetic(tmp_path / "small", file)
    save_synthetic(tmp_path / "large", file, embed_matrices=True)
    small, large = load_synthetic(tmp_path / "small"), load_synthetic(tmp_path / "large")
    assert (tmp_path / "large").stat().st_size - (tmp_path / "small").stat().st_size > 1.8 * 60 * 60 * 4
    assert_same(large, file)
    assert isinstance(small.space, ZCARecipe)
    assert same_space(small.space, file.space)
    assert (small.fingerprint, small.val_fraction, small.split_seed) == ("0123456789abcdef", 0.1, 3)
    assert torch.equal(small.stored_pixels(), file.stored_pixels())  # for pictures, without any matrix
    if stored_as == "pixels":
        with pytest.raises(InputError, match="stored without its whitening matrices"):
            small.training_set()
        fitted = dataclasses.replace(small, space=file.space)
    else:
        fitted = small
    assert all(torch.equal(*pair) for pair in zip(fitted.training_set(), file.training_set(), strict=True))


def test_ten_whitened_images_of_cifar_s_size_are_below_a_megabyte(tmp_path: Path) -> None:
    matrix = torch.eye(3072)
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    space = ZCASpace(fit_zca(torch.zeros(2, 1, 1, 1))._replace(mean=torch.zeros(3072), whiten=matrix, unwhiten=matrix))
    file = dataclasses.replace(
        example(), images=images, labels=torch.arange(10), num_classes=10, class_names=[], space=space
    )
    save_synthetic(tmp_path / "a", file)
    assert (tmp_path / "a").stat().st_size < 300_000  # the images twice are 246 KB
