"""Sets in other projects' formats: files laid out as those projects lay them out, and ours there and back."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.utils import save_image

from dd_lightning import InputError, export_set, import_set
from dd_lightning.datamodules import DatasetDataModule, DistillationDataModule
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.whitening import ZCA
from dd_lightning.sets.color_spaces import ColorKind, ZCASpace
from dd_lightning.sets.foreign.ddranking import SPACE
from dd_lightning.sets.synthetic import ImageSpace
from dd_lightning.sets.synthetic_file import SyntheticFile, load_synthetic, save_synthetic

SIDE, CLASSES, IPC = 8, 3, 2
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def real(tmp_path: Path, channels: int = 3, color_space: ColorKind = "normalized") -> DistillationDataModule:
    images = torch.rand(40, channels, SIDE, SIDE, generator=generator())
    data = TensorDataset(images, torch.arange(40) % CLASSES)
    return DatasetDataModule(data, data, name="custom", root=str(tmp_path / "data"), color_space=color_space)


def distilled(data: DistillationDataModule, **changes: object) -> SyntheticFile:
    values: dict[str, Any] = {
        "images": torch.randn(CLASSES * IPC, *data.image_shape, generator=generator()),
        "labels": LABELS,
        "num_classes": data.num_classes,
        "space": data.space,
        "lr": 0.02,
        "evaluation_lr": 0.02,
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "class_names": list(data.class_names),
        "objective": "TrajectoryMatching",
        "network": "ConvNet-3",
        "step": 7,
    }
    return SyntheticFile(**values | changes)


LOGITS = torch.randn(CLASSES * IPC, CLASSES, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format", ["mtt", "pt", "ddranking"])
@pytest.mark.parametrize("color_space", ["normalized", "zca"])
@pytest.mark.parametrize(
    "changes", [{}, {"labels": LOGITS}, {"formation": Formation(2)}], ids=["hard", "soft", "factor"]
)
def test_what_networks_are_trained_on_comes_back_bit_for_bit(
    tmp_path: Path, format: str, color_space: Literal["normalized", "zca"], changes: dict[str, Any]
) -> None:
    data = real(tmp_path, color_space=color_space)
    synthetic = distilled(data, **changes)
    path = tmp_path / ("set.pt" if format == "pt" else "set")
    export_set(synthetic, format, path)
    back = import_set(path, format, data, space=color_space if format == "mtt" else None)
    images, labels = synthetic.training_set()
    found, found_labels = back.training_set()
    if format == "ddranking" and color_space == "normalized":  # they have constants of their own
        torch.testing.assert_close(found, images, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.load(path / "images.pt"), SPACE.encode(data.space.decode(images)))
    else:
        assert torch.equal(found, images)
    assert torch.equal(found_labels, labels)
    assert back.evaluation_lr == pytest.approx(0.02, rel=1e-7)
    assert back.fingerprint == data.fingerprint


def test_idc_keeps_stored_pixels(tmp_path: Path) -> None:
    data = real(tmp_path)
    pixels = torch.rand(CLASSES * IPC, *data.image_shape, generator=generator())
    synthetic = distilled(data, images=pixels, stored_as="pixels", formation=Formation(2), lr=None)
    export_set(synthetic, "idc", tmp_path / "data.pt")
    with pytest.raises(InputError, match="factor is not in IDC's files"):
        import_set(tmp_path / "data.pt", "idc", data)
    back = import_set(tmp_path, "idc", data, factor=2)
    assert torch.equal(back.images, synthetic.images)
    assert all(map(torch.equal, back.training_set(), synthetic.training_set()))
    assert (back.lr, back.stored_as) == (None, "pixels")


@pytest.mark.parametrize("format", ["folder", "grid"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stored", ["pixels", "network"])
def test_pictures_come_back_within_half_a_level(tmp_path: Path, format: str, channels: int, stored: ImageSpace) -> None:
    data = real(tmp_path, channels)
    pixels = torch.rand(CLASSES * IPC, *data.image_shape, generator=generator())
    images = pixels if stored == "pixels" else data.space.encode(pixels)
    path = tmp_path / ("set.png" if format == "grid" else "set")
    export_set(distilled(data, images=images, stored_as=stored), format, path)
    back = import_set(path, format, data, nrow=IPC)
    assert float((back.images - pixels).abs().max()) <= 0.5 / 255 + 1e-6
    assert torch.equal(back.labels, LABELS)


def test_a_folder_has_logits_and_a_card(tmp_path: Path) -> None:
    data = real(tmp_path)
    export_set(distilled(data, labels=LOGITS), "folder", tmp_path / "set")
    back = import_set(tmp_path / "set", "folder", data)
    torch.testing.assert_close(back.labels, LOGITS)
    entries = [json.loads(line) for line in (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()]
    assert [entry["label"] for entry in entries] == LABELS.tolist()
    assert "| learning rate to train with | 0.02 |" in (tmp_path / "set" / "README.md").read_text()


def test_folders_are_classes_by_name_or_else_by_the_alphabet(tmp_path: Path) -> None:
    class Named(DatasetDataModule):
        def load_class_names(self) -> list[str]:
            return ["cat", "ant", "bee"]

    images = torch.rand(40, 3, SIDE, SIDE, generator=generator())
    items = TensorDataset(images, torch.arange(40) % CLASSES)
    data = Named(items, items, root=str(tmp_path / "data"))
    for index, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / "set" / name).mkdir(parents=True)
        save_image(torch.full((3, SIDE, SIDE), index / 4), tmp_path / "set" / name / "0.png")
    back = import_set(tmp_path / "set", "folder", data)
    expected = torch.tensor([128, 0, 64]).float() / 255  # cat, ant, bee
    torch.testing.assert_close(back.images[:, 0, 0, 0], expected)
    for name in ["ant", "bee", "cat"]:
        (tmp_path / "set" / name).rename(tmp_path / "set" / f"new{name}")
    with pytest.warns(UserWarning, match=r"\(newant, ...\) are not named like .* \(cat, ...\); .* alphabetic"):
        back = import_set(tmp_path / "set", "folder", data)
    torch.testing.assert_close(back.images[:, 0, 0, 0], expected.sort().values)


def test_a_grid_of_torchvision(tmp_path: Path) -> None:
    """Ten in a row with empty tiles at the end."""
    data = real(tmp_path)
    pixels = torch.rand(CLASSES * 5, *data.image_shape, generator=generator())
    save_image(pixels, tmp_path / "grid.png", nrow=10, padding=2)
    with pytest.raises(InputError, match="20 tiles, which 3 classes do not share evenly; give ipc"):
        import_set(tmp_path / "grid.png", "grid", data, nrow=10)
    back = import_set(tmp_path / "grid.png", "grid", data, nrow=10, ipc=5)
    assert float((back.images - pixels).abs().max()) <= 0.5 / 255 + 1e-6
    assert torch.equal(back.labels, torch.arange(3).repeat_interleave(5))


def test_hugging_face_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = real(tmp_path)
    pixels = torch.rand(CLASSES * IPC, *data.image_shape, generator=generator())
    synthetic = distilled(data, images=pixels, stored_as="pixels", labels=LOGITS, class_names=["a", "b", "c"])
    export_set(synthetic, "hf", tmp_path / "set")
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    found = torch.stack([torch.from_numpy(np.array(item["image"])).permute(2, 0, 1) for item in loaded])
    assert torch.equal(found, pixels.mul(255).round().byte())
    assert loaded["label"][:] == LABELS.tolist()
    assert loaded.features["label"].names == ["a", "b", "c"]
    torch.testing.assert_close(torch.tensor(loaded["logits"][:]), LOGITS)


def written(folder: Path, **tensors: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in tensors.items():
        torch.save(value, folder / f"{name}.pt")


SHUFFLED = torch.tensor([2, 0, 1, 1, 0, 2])
ORDER = [1, 4, 2, 3, 0, 5]
IMAGES = torch.randn(CLASSES * IPC, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def test_trajectory_matching_and_its_successors(tmp_path: Path) -> None:
    data = real(tmp_path)
    written(tmp_path / "mtt", images_1000=IMAGES, labels_1000=SHUFFLED)
    read = import_set(tmp_path / "mtt" / "images_1000.pt", "mtt", data, space="normalized", lr=0.03)
    assert torch.equal(read.images, IMAGES[ORDER])
    assert torch.equal(read.labels, LABELS)
    assert (read.lr, read.stored_as, read.space.kind) == (0.03, "network", "normalized")
    written(tmp_path / "tesla", images_best=IMAGES, labels_best=LOGITS.softmax(1))
    read = import_set(tmp_path / "tesla", "mtt", data, space="zca", lr=0.03)
    torch.testing.assert_close(read.labels.softmax(1), LOGITS.softmax(1))
    assert read.space.kind == "zca"
    written(tmp_path / "datm", images_best=IMAGES, labels_best=LOGITS, lr_best=torch.tensor(0.25))
    read = import_set(tmp_path / "datm", "mtt", data, space="zca")
    assert torch.equal(read.labels, LOGITS)
    assert read.lr == 0.25
    parts = [tmp_path / "parts" / f"images_best_{part}.pt" for part in range(3)]  # as the Tiny ImageNet release
    for part in range(3):
        rows = slice(2 * part, 2 * part + 2)
        written(tmp_path / "parts", **{f"images_best_{part}": IMAGES[rows], f"labels_best_{part}": LABELS[rows]})
    read = import_set(parts, "mtt", data, space="normalized", lr=0.01)
    assert torch.equal(read.images, IMAGES)


def test_gradient_matching_of_idc_in_phases(tmp_path: Path) -> None:
    data = real(tmp_path)
    for phase in range(3):
        rows = slice(2 * phase, 2 * phase + 2)
        written(tmp_path / f"phase{phase}", data=[IMAGES[rows], LABELS[rows]])
    with pytest.warns(UserWarning, match="space is 'pixels', but .* far outside"):
        read = import_set([tmp_path / f"phase{phase}" for phase in range(3)], "idc", data, factor=1)
    assert torch.equal(read.images, IMAGES)


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_dataset_condensation_with_its_numpy_scalars(tmp_path: Path, module: str) -> None:
    data = real(tmp_path)
    accuracies = {"ConvNet": [np.float64(0.5)]}
    content = {"data": [[IMAGES * 0, LABELS], [IMAGES, LABELS.float()]], "accs_all_exps": accuracies}
    torch.save(content, tmp_path / "res_DM.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "res_DM.pt").read_bytes()
    ours = b"numpy._core.multiarray" if b"numpy._core.multiarray" in raw else b"numpy.core.multiarray"
    (tmp_path / "res_DM.pt").write_bytes(raw.replace(b"c" + ours + b"\n", b"c" + module.encode() + b"\n"))
    read = import_set(tmp_path / "res_DM.pt", "dc", data)
    assert torch.equal(read.images, IMAGES)
    assert read.labels.dtype == torch.int64
    assert read.evaluation_lr == 0.01


class Evil:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def files(folder: Path) -> None:
    """All files of the table below."""
    written(folder, images_a=IMAGES, labels_a=LABELS, images_b=IMAGES, labels_b=LABELS + 1)
    written(folder, images_c=IMAGES[:5], labels_c=LABELS[:5], images_d=IMAGES[:, :, 1:], labels_d=LABELS)
    written(folder, images_e=IMAGES, labels_e=LABELS[:4], images_f=[IMAGES], labels_f=LABELS)
    written(folder, images_g=Evil(), labels_g=LABELS, labels=LABELS, data=IMAGES, res=[1], dict={"a": IMAGES})
    written(folder, images_h=IMAGES, labels_h=LABELS + 0.5, images_i=IMAGES * torch.nan, labels_i=LABELS)
    written(folder / "dd", images=IMAGES, labels=LABELS)
    (folder / "dd" / "config.yaml").write_text("[")
    (folder / "images_j.pt").write_bytes(pickle.dumps({"a": 1})[:-3])
    save_image(IMAGES[:, :, :5], folder / "grid.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty").mkdir()
    (folder / "bad" / "0").mkdir(parents=True)
    (folder / "bad" / "0" / "a.png").write_text("no picture")
    (folder / "wide" / "0").mkdir(parents=True)
    save_image(torch.zeros(3, SIDE, SIDE + 1), folder / "wide" / "0" / "a.png")
    (folder / "out").mkdir()
    (folder / "out" / "metadata.jsonl").write_text('{"file_name": "../text.png", "label": 0}\n')
    (folder / "json").mkdir()
    (folder / "json" / "metadata.jsonl").write_text("[1, 2]\n")


BAD = [
    ("images_a.pt", "mtt", {"lr": 0.01}, "space is not in the files of format mtt"),
    ("images_a.pt", "mtt", {"space": "normalized"}, "lr is not in the files of format mtt"),
    ("images_a.pt", "mtt", {"space": "normalized", "lr": -1}, "lr is -1"),
    ("images_a.pt", "tar", {}, "format is 'tar'; use one of mtt, idc"),
    ("images_b.pt", "mtt", {"space": "normalized", "lr": 0.01}, "labels run from 1 to 3; the data have classes 0 to 2"),
    ("images_c.pt", "mtt", {"space": "normalized", "lr": 0.01}, "classes have from 1 to 2 images"),
    ("images_d.pt", "mtt", {"space": "normalized", "lr": 0.01}, r"images \[3, 7, 8\], but custom has \[3, 8, 8\]"),
    ("images_e.pt", "mtt", {"space": "normalized", "lr": 0.01}, r"\[4\] for 6 images of 3 classes"),
    ("images_f.pt", "mtt", {"space": "normalized", "lr": 0.01}, "holds a list where a tensor should be"),
    ("images_g.pt", "mtt", {"space": "normalized", "lr": 0.01}, "only tensors are loaded"),
    ("images_h.pt", "mtt", {"space": "normalized", "lr": 0.01}, "class numbers"),
    ("images_i.pt", "mtt", {"space": "normalized", "lr": 0.01}, "not all finite"),
    ("images_j.pt", "mtt", {"space": "normalized", "lr": 0.01}, "only tensors are loaded"),
    ("none.pt", "pt", {}, "there is no file"),
    ("labels.pt", "mtt", {"space": "normalized", "lr": 0.01}, "not named images_"),
    ("data.pt", "idc", {"factor": 2}, "does not hold a list of images and labels"),
    ("res.pt", "dc", {}, "has no 'data' with images and labels"),
    ("dict.pt", "pt", {}, "no dictionary of images, labels, color_space, lr"),
    ("dd", "ddranking", {"lr": 0.01}, "config.yaml is no YAML mapping"),
    ("grid.png", "grid", {}, "do not fill, 8 in a row; set nrow and padding"),
    ("text.png", "grid", {}, "cannot read .* as a picture"),
    ("grid.png", "grid", {"nrow": 0}, "nrow is 0"),
    ("empty", "folder", {}, "has no class folders with pictures"),
    ("bad", "folder", {}, "cannot read .* as a picture"),
    ("wide", "folder", {}, r"\[3, 8, 9\]; the data have images \[3, 8, 8\]"),
    ("out", "folder", {}, "leads out of the folder"),
    ("json", "folder", {}, "metadata.jsonl is not understood"),
]


@pytest.mark.parametrize(("name", "format", "options", "message"), BAD)
def test_bad_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        import_set(tmp_path / name, format, real(tmp_path), **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_pixels_that_are_declared_as_normalized_are_warned_of(tmp_path: Path) -> None:
    data = real(tmp_path)
    written(tmp_path, images_best=data.space.decode(data.train.images[:6]), labels_best=LABELS)
    with pytest.warns(UserWarning, match=r"space is 'normalized', but all values lie in \[0, 1\]"):
        import_set(tmp_path, "mtt", data, space="normalized", lr=0.01)


def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    data, gray = real(tmp_path), real(tmp_path, channels=1)
    for synthetic, format, message in [
        (distilled(data, labels=LOGITS), "idc", "soft labels"),
        (distilled(data, formation=Formation(2, "multi")), "idc", "'multi'"),
        (distilled(gray), "ddranking", "1 channels"),
        (distilled(data), "zip", "format is 'zip'"),
    ]:
        with pytest.raises(InputError, match=message):
            export_set(synthetic, format, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    export_set(distilled(data), "mtt", tmp_path / "out")
    with pytest.raises(InputError, match="exists; give a new path"):
        export_set(distilled(data), "mtt", tmp_path / "out")


@pytest.mark.parametrize("format", ["folder", "hf", "pt", "grid", "mtt", "idc", "ddranking"])
def test_ten_images_take_less_than_a_megabyte(tmp_path: Path, format: str) -> None:
    if format == "hf":
        pytest.importorskip("datasets")
    images = torch.rand(10, 3, 32, 32, generator=generator())
    items = TensorDataset(images, torch.arange(10))
    data = DatasetDataModule(items, items, root=str(tmp_path / "data"))
    space = ZCASpace(ZCA(torch.zeros(3072), torch.eye(3072), torch.eye(3072)))
    synthetic = distilled(data, images=images, labels=torch.arange(10), space=space)
    save_synthetic(tmp_path / "set.safetensors", synthetic)
    read = load_synthetic(tmp_path / "set.safetensors")  # without matrices
    written = export_set(read, format, tmp_path / "out")
    assert sum(file.stat().st_size for file in written) < 1_000_000
