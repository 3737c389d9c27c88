import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.sets.synthetic_file import SyntheticFile, load_synthetic, save_synthetic
from dd_lightning.version import __version__


def example() -> SyntheticFile:
    generator = torch.Generator().manual_seed(0)
    both = torch.rand(2, 3, generator=generator)
    return SyntheticFile(
        images=torch.randn(6, 3, 4, 5, generator=generator),
        labels=torch.tensor([0, 0, 1, 1, 2, 2]),
        label_kind="hard",
        lr=0.1 + 0.2,
        color_space="normalized",
        color_space_tensors={"mean": both[0], "std": both[1]},
        ipc=2,
        effective_ipc=8,
        num_classes=3,
        dataset="digits",
        class_names=["zero", "eins", "två"],
        objective="TrajectoryMatching",
        network="ConvNet-2",
        step=700,
        factor=2,
        config={"model": {"lr": 0.1, "steps": [1, 2]}, "none": None},
    )


def assert_same(one: SyntheticFile, other: SyntheticFile) -> None:
    for field in dataclasses.fields(SyntheticFile):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        elif field.name == "color_space_tensors":
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)
        else:
            assert left == right


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lr": None, "color_space": "pixel", "color_space_tensors": {}, "class_names": []},
        {"labels": torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), "label_kind": "logits"},
        {"color_space": "zca", "color_space_tensors": {"whiten": torch.eye(60, dtype=torch.float64)}},
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
        ({"images": torch.zeros(5, 3, 4, 5)}, r"float32 \[5, 3, 4, 5\], 3 classes at ipc 2 need .*\[6,"),
        ({"images": torch.zeros(6, 3, 4, 5, dtype=torch.float64)}, "float64"),
        ({"labels": torch.zeros(6)}, r"hard labels are torch.float32 \[6\], they must be int64 \[6\]"),
        (
            {"label_kind": "logits"},
            r"logits labels are torch.int64 \[6\], they must be floating-point \[6, 3\]",
        ),
        ({"label_kind": "soft"}, "label kind is 'soft'; use one of hard, logits"),
        ({"color_space": "lab"}, "color space is 'lab'; use one of pixel, normalized, zca"),
        ({"class_names": ["a"]}, "1 class names for 3 classes"),
        ({"effective_ipc": 1}, "effective ipc is 1, but ipc 2 with formation factor 2 .single. decodes to 8"),
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
    text = json.dumps({"format": "synthetic", "format_version": 3})
    safetensors.torch.save_file({"images": torch.zeros(1)}, tmp_path / "a", {"dd_lightning": text})
    with pytest.raises(InputError, match=r"format 3, this dd_lightning .* reads up to 2; upgrade"):
        load_synthetic(tmp_path / "a")


def test_a_file_that_lacks_something_is_named(tmp_path: Path) -> None:
    text = json.dumps({"format": "synthetic", "format_version": 1})
    safetensors.torch.save_file({"images": torch.zeros(1)}, tmp_path / "a", {"dd_lightning": text})
    with pytest.raises(InputError, match="it lacks 'labels'; copy it again"):
        load_synthetic(tmp_path / "a")
