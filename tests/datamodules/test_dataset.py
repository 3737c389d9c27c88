from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dd_lightning.datamodules import DatasetDataModule
from dd_lightning.functional.errors import InputError


class Pairs(Dataset[tuple[object, object]]):
    def __init__(self, pairs: Sequence[tuple[object, object]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[object, object]:
        return self.pairs[index]


PIXELS = torch.randint(0, 256, (4, 5, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = [1, 0, 1, 0]
EXPECTED = PIXELS.permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("kind", ["tensor", "float tensor", "array", "pil"])
def test_every_kind_of_image_gives_the_same_set(tmp_path: Path, kind: str) -> None:
    conversions: dict[str, Callable[[Tensor], object]] = {
        "tensor": lambda pixels: pixels.permute(2, 0, 1),
        "float tensor": lambda pixels: pixels.permute(2, 0, 1) / 255,
        "array": lambda pixels: pixels.numpy(),
        "pil": lambda pixels: Image.fromarray(pixels.numpy()),
    }
    convert = conversions[kind]
    pairs = Pairs([(convert(pixels), label) for pixels, label in zip(PIXELS, LABELS, strict=True)])
    data = DatasetDataModule(pairs, pairs, name="mine", root=str(tmp_path), color_space="pixel")
    assert torch.equal(data.train.images, EXPECTED)
    assert data.train.labels.tolist() == LABELS
    assert (data.name, data.num_classes, data.class_names) == ("mine", 2, ("0", "1"))


def test_gray_images_and_numpy_labels() -> None:
    gray = Pairs([(np.full((2, 3), 51 * i, dtype=np.uint8), np.int64(i)) for i in range(3)])
    data = DatasetDataModule(gray, gray, num_classes=3, color_space="pixel")
    torch.testing.assert_close(data.train.images[:, 0, 0, 0], torch.tensor([0.0, 0.2, 0.4]))
    assert data.image_shape == (1, 2, 3)


def test_two_modules_have_their_own_names() -> None:
    pairs = Pairs([(PIXELS[0].permute(2, 0, 1), 0)])
    assert [DatasetDataModule(pairs, pairs, name=name).name for name in ("a", "b")] == ["a", "b"]


@pytest.mark.parametrize(("threshold", "hidden"), [(4, False), (5, True)])
def test_many_images_show_progress(monkeypatch: pytest.MonkeyPatch, threshold: int, hidden: bool) -> None:
    bars: list[tuple[str, int, bool]] = []

    def note(items: Iterable[object], title: str, total: int, transient: bool, disable: bool) -> Iterable[object]:
        assert transient
        bars.append((title, total, disable))
        return items

    monkeypatch.setattr("dd_lightning.datamodules.collect.SHOW_PROGRESS_FROM", threshold)
    monkeypatch.setattr("dd_lightning.datamodules.collect.track", note)
    pairs = Pairs([(pixels.permute(2, 0, 1), 0) for pixels in PIXELS])
    data = DatasetDataModule(pairs, pairs, color_space="pixel")
    assert torch.equal(data.train.images, EXPECTED)
    assert bars[::2] == [("train data of custom", 4, hidden), ("test data of custom", 4, hidden)]


def test_errors() -> None:
    image = PIXELS[0].permute(2, 0, 1)
    uneven = Pairs([(image, 0), (image[:, :2], 1)])
    with pytest.raises(InputError, match=r"train data of custom, image 1 is \[3, 2, 6\], but image 0 is \[3, 5, 6\]"):
        DatasetDataModule(uneven, uneven).setup()
    words = Pairs([("word", 0)])
    with pytest.raises(InputError, match=r"image 0 is a str: it must be a tensor, an array or a PIL image"):
        DatasetDataModule(words, words).setup()
    flat = Pairs([(torch.zeros(3), 0)])
    with pytest.raises(InputError, match=r"image 0 has the shape \[3\]"):
        DatasetDataModule(flat, flat).setup()
    empty = Pairs([])
    with pytest.raises(InputError, match=r"train data of custom has no image"):
        DatasetDataModule(empty, empty).setup()

    class Stream(IterableDataset[tuple[object, object]]):
        def __iter__(self) -> Iterator[tuple[object, object]]:
            return iter(())

    with pytest.raises(InputError, match=r"a Stream, has no length: pass a map-style dataset"):
        DatasetDataModule(Stream(), Stream()).setup()
    two, three = (Pairs([(image, label) for label in range(count)]) for count in (2, 3))
    with pytest.raises(InputError, match=r"the test split of custom: labels run from 0 to 2, outside 0 \.\. 1"):
        DatasetDataModule(two, three).setup()
    with pytest.raises(InputError, match=r"the train split of custom: class 2 of 3 has no image"):
        DatasetDataModule(two, two, num_classes=3).setup()
