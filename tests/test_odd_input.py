"""What people bring that is odd: each works as they would expect, or is one line before anything long starts."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import dd_lightning as dd
from dd_lightning.datamodules import evaluation_data
from dd_lightning.functional.formation import Formation
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.synthetic_file import SyntheticFile
from tests import small


@dataclass(frozen=True)
class Refused:
    """One line that says so."""

    said: str


@dataclass(frozen=True)
class Warned:
    """A warning, and the value all the same."""

    said: str
    value: Any


Case = tuple[str, Callable[[Path], Any], Any]

# Items of a dataset: what is an image, what is a label

PIXELS = torch.randint(0, 256, (3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
UNIT = PIXELS / 255


def items(*given: Any, **options: Any) -> Callable[[Path], Any]:  # noqa: ANN401
    """Return the first image and all labels of a dataset of these items."""

    def read(folder: Path) -> Any:  # noqa: ANN401
        data = dd.DatasetDataModule(given, given, root=str(folder), **({"color_space": "pixel"} | options))
        return data.train.images[0], data.train.labels.tolist()

    return read


def labeled(*labels: Any) -> Callable[[Path], Any]:  # noqa: ANN401
    return items(*((PIXELS + i, label) for i, label in enumerate(labels)))


def image(given: Any) -> Callable[[Path], Any]:  # noqa: ANN401
    return items((given, 0))


READ = (UNIT, [0])
ITEMS: list[Case] = [
    ("triples", items((PIXELS, 0, "name")), READ),
    ("dictionaries", items({"image": PIXELS, "label": 0, "name": "a"}), READ),
    ("other keys", items({"img": PIXELS, "target": 0}), Refused("image 0 is a mapping of img, target: each item must")),
    ("an image alone", items(PIXELS), Refused(r"image 0 is a Tensor: each item must be \(image, class number\)")),
    ("images and labels", items(UNIT[None], torch.tensor([0])), Refused(r"such as those of TensorDataset\(images")),
    ("label of NumPy", labeled(np.int64(0), np.int64(1)), (UNIT, [0, 1])),
    ("label as a tensor", labeled(torch.tensor(0), torch.tensor([1])), (UNIT, [0, 1])),
    ("label as an array of one", labeled(np.array([0]), np.array([[1]])), (UNIT, [0, 1])),
    ("whole floats", labeled(0.0, 1.0), (UNIT, [0, 1])),
    ("booleans", labeled(False, True), (UNIT, [0, 1])),
    ("fractions", labeled(0.0, 0.7, 1.4), Refused("image 1 has the label '0.7': pass a class number")),
    ("names", labeled("cat", "dog"), Refused(r"image 0 has the label 'cat': .*names\.index\(name\)")),
    ("one-hot vectors", labeled([1, 0], [0, 1]), Refused(r"the label '\[1, 0\]': .*argmax")),
    ("soft labels", labeled(torch.tensor([0.3, 0.7])), Refused("the label .*: pass a class number")),
    ("no label", labeled(None), Refused("the label 'None'")),
    ("label that is no number", labeled(float("nan")), Refused("the label 'nan'")),
    ("negative labels", labeled(-1, 0), Refused(r"labels run from -1 to 0, outside 0 \.\. 0")),
    ("labels from 1", labeled(1, 2), Refused("class 0 of 3 has no image; .* renumber the classes")),
    ("bfloat16", image(UNIT.bfloat16()), (UNIT.bfloat16().float(), [0])),
    ("float16", image(UNIT.half()), (UNIT.half().float(), [0])),
    ("float64", image(UNIT.double()), READ),
    ("bool", image(PIXELS > 99), ((PIXELS > 99).float(), [0])),
    ("uint16", image((PIXELS.to(torch.int32) * 257).to(torch.uint16)), READ),
    ("uint16 array", image(np.asarray(PIXELS.permute(1, 2, 0)).astype(np.uint16) * 257), READ),
    ("int64", image(PIXELS.long()), Refused(r"has torch\.int64 pixels: pass uint8, or floats")),
    (
        "normalized floats",
        image(UNIT * 2 - 1),
        Refused("has pixels from -.* to 0.99.*; floats must lie in .*color_space"),
    ),
    ("not a number", image(UNIT * torch.nan), Refused("has pixels from nan to nan")),
    ("nested lists", image(UNIT.tolist()), Refused("image 0 is a list: it must be a tensor, an array or a PIL image")),
    ("tensor [H, W, C]", image(PIXELS.permute(1, 2, 0)), Refused(r"\[6, 5, 3\], hence 6 channels: a tensor is \[C, H")),
    ("tensor [28, 28, 1]", image(torch.zeros(28, 28, 1)), Refused("hence 28 channels")),
    ("array [C, H, W]", image(np.asarray(PIXELS)), Refused(r"hence 5 channels: an array is \[H, W, C\]; transpose")),
    ("signals [C, T, 1]", image(UNIT.reshape(6, 15, 1)), (UNIT.reshape(6, 15, 1), [0])),
    ("13 channels", image(UNIT.repeat(5, 1, 1)[:13]), (UNIT.repeat(5, 1, 1)[:13], [0])),
    ("a batch of one", image(UNIT[None]), Refused(r"has the shape \[1, 3, 6, 5\]: it must have 2 or 3 dimensions")),
    ("sizes that differ", items((PIXELS, 0), (PIXELS[:, 1:], 0)), Refused("image 1 is .*: resize and convert all")),
    ("uint8 and floats", items((PIXELS, 0), (UNIT, 0)), (UNIT, [0, 0])),
]

# Pictures: what their mode says

GRAY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
WANTED = torch.from_numpy(GRAY).float() / 255


def same_everywhere(picture: Image.Image, **options: Any) -> Callable[[Path], Path]:  # noqa: ANN401
    """Return what writes a picture as the only one of two sets."""

    def write(root: Path, suffix: str) -> Path:
        for split in ("train", "test"):
            (root / split / "a").mkdir(parents=True)
            picture.save(root / split / "a" / f"picture{suffix}", **options)
        return root

    return partial(write, suffix=options.pop("suffix", ".png"))


def folder(write: Callable[[Path], Path], **options: Any) -> Callable[[Path], Tensor]:  # noqa: ANN401
    def read(root: Path) -> Tensor:
        settings: dict[str, Any] = {"image_size": 8, "color_space": "pixel"}
        data = dd.ImageFolderDataModule(str(write(root)), **(settings | options))
        assert data.image_shape[0] == 1 if options.get("grayscale") else 3
        return data.train.images[0, 0]

    return read


def bands(mode: str, *values: Any) -> Image.Image:  # noqa: ANN401
    """Return a picture of these bands, each an array or a number for all pixels."""
    return Image.merge(mode, [Image.fromarray(np.broadcast_to(np.uint8(v), GRAY.shape).copy()) for v in values])


def palette(indices: Image.Image) -> Image.Image:
    """Return a picture of 64 grays, of which the first is red."""
    picture = Image.new("P", indices.size)
    picture.putdata(list(indices.tobytes()))
    picture.putpalette([value for index in range(64) for value in ([255, 0, 0] if index == 0 else [4 * index] * 3)])
    return picture


def turned() -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[0x112] = 6  # to be seen after a quarter turn to the right
    return Image.fromarray(GRAY).transpose(Image.Transpose.ROTATE_90), exif


def damaged(root: Path, content: bytes) -> Path:
    same_everywhere(Image.fromarray(GRAY))(root)
    (root / "train" / "a" / "picture.png").write_bytes(content)
    return root


FIRST_WHITE = WANTED.clone()
FIRST_WHITE[0, 0] = 1.0
FRAMES = [Image.fromarray(np.roll(GRAY, shift)) for shift in (0, 5)]
PICTURES: list[Case] = [
    ("gray", folder(same_everywhere(Image.fromarray(GRAY))), WANTED),
    ("gray as one channel", folder(same_everywhere(Image.fromarray(GRAY)), grayscale=True), WANTED),
    ("color as one channel", folder(same_everywhere(bands("RGB", GRAY, GRAY, GRAY)), grayscale=True), WANTED),
    ("16-bit gray", folder(same_everywhere(Image.fromarray(GRAY.astype(np.uint16) * 257))), WANTED),
    ("16-bit TIFF", folder(same_everywhere(Image.fromarray(GRAY.astype(np.uint16) * 257), suffix=".tif")), WANTED),
    ("12 of 16 bits", folder(same_everywhere(Image.fromarray(GRAY.astype(np.uint16) * 16))), WANTED * 255 * 16 / 65535),
    ("float TIFF", folder(same_everywhere(Image.fromarray(GRAY.astype(np.float32) / 255), suffix=".tif")), WANTED),
    (
        "float TIFF to 252",
        folder(same_everywhere(Image.fromarray(GRAY.astype(np.float32)), suffix=".tif")),
        Refused("pixels from 0 to 252; floats must lie in"),
    ),
    (
        "32-bit TIFF",
        folder(same_everywhere(Image.fromarray(GRAY.astype(np.int32)), suffix=".tif")),
        Refused(r"picture\.tif is a picture of mode 'I': save it with 8 or 16 bits"),
    ),
    ("1 bit", folder(same_everywhere(Image.fromarray(GRAY > 99))), (WANTED * 255 > 99).float()),
    ("shape in the alpha", folder(same_everywhere(bands("RGBA", 0, 0, 0, 255 - GRAY))), WANTED),
    ("gray with alpha", folder(same_everywhere(bands("LA", 0, 255 - GRAY))), WANTED),
    ("on black", folder(same_everywhere(bands("RGBA", 255, 255, 255, GRAY)), background="black"), WANTED),
    (
        "no such color",
        folder(same_everywhere(Image.fromarray(GRAY)), background="blurple"),
        Refused("background is 'bl"),
    ),
    ("palette", folder(same_everywhere(palette(Image.fromarray(GRAY // 4)))), FIRST_WHITE),
    (
        "transparent color of a palette",
        folder(same_everywhere(palette(Image.fromarray(GRAY // 4)), transparency=0)),
        FIRST_WHITE,
    ),
    ("CMYK", folder(same_everywhere(bands("CMYK", 0, 0, 0, 255 - GRAY), suffix=".tif")), WANTED),
    ("YCbCr", folder(same_everywhere(bands("YCbCr", GRAY, 128, 128), suffix=".tif")), WANTED),
    ("turned by EXIF", folder(same_everywhere(turned()[0], exif=turned()[1])), WANTED),
    ("WebP", folder(same_everywhere(Image.fromarray(GRAY), suffix=".webp", lossless=True)), WANTED),
    ("GIF", folder(same_everywhere(Image.fromarray(GRAY), suffix=".gif")), WANTED),
    (
        "animation",
        folder(same_everywhere(FRAMES[0], suffix=".gif", save_all=True, append_images=FRAMES[1:])),
        Warned("1 of 1 files in .* have several frames: the first is taken", WANTED),
    ),
    (
        "text",
        folder(partial(damaged, content=b"no picture")),
        Refused("train/a/picture.png cannot be read as an image"),
    ),
    ("PIL image with alpha", image(bands("RGBA", 0, 0, 0, 255 - GRAY)), (WANTED.expand(3, -1, -1), [0])),
    ("16-bit PIL image", image(Image.fromarray(GRAY.astype(np.uint16) * 257)), (WANTED[None], [0])),
]


def class_folders(root: Path, train: str, test: str, odd: str = "") -> Path:
    """Write a picture of its own for each class that is named by a letter."""
    for split, names in (("train", train), ("test", test)):
        for number, name in enumerate("abc"):
            if name in names:
                (root / split / name).mkdir(parents=True)
                for index in range(2):
                    Image.fromarray(np.roll(GRAY, 7 * number + index)).save(root / split / name / f"{index}.png")
    if odd:
        (root / odd).parent.mkdir(exist_ok=True)
        (root / odd).write_bytes(b"no picture")
    return root


def folder_labels(train: str, test: str, odd: str = "") -> Callable[[Path], tuple[list[int], list[int]]]:
    def read(root: Path) -> tuple[list[int], list[int]]:
        data = dd.ImageFolderDataModule(str(class_folders(root, train, test, odd)), image_size=8)
        return data.train.labels.tolist(), data.test.labels.tolist()

    return read


# Data sets: what fits together


def images(count: int, classes: int = 3, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> TensorDataset:
    labels = torch.arange(count) % classes
    noise = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    return TensorDataset((noise + labels[:, None, None, None] / classes) / 2, labels)


def named(dataset: Any, *classes: str) -> Any:  # noqa: ANN401
    dataset.classes = list(classes)
    return dataset


def datasets(train: Any, test: Any, **options: Any) -> Callable[[Path], Any]:  # noqa: ANN401
    def read(folder: Path) -> Any:  # noqa: ANN401
        data = dd.DatasetDataModule(train, test, root=str(folder), **options)
        return data.num_classes, data.test.labels.tolist()

    return read


class Flipped(Dataset[tuple[Tensor, int]]):
    """A dataset with a transform that draws from a random state."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = torch.full((1, 4, 4), index / 40)
        return pixels + self.draw() / 2, index % 2


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(())


OWN_STATE = np.random.default_rng()
DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "Python": random.random,
    "NumPy": lambda: float(np.random.rand()),  # noqa: NPY002  (as transforms do)
}


def read_twice(draw: Callable[[], float], seed: int | None) -> Callable[[Path], Any]:
    def read(folder: Path) -> bool:
        first, second = (
            dd.DatasetDataModule(Flipped(draw), Flipped(draw), root=str(folder), read_seed=seed) for _ in range(2)
        )
        return first.fingerprint == second.fingerprint

    return read


def equal_pixels(folder: Path) -> int:
    gray = TensorDataset(torch.full((6, 1, 4, 4), 0.5), torch.arange(6) % 2)
    return dd.DatasetDataModule(gray, gray, root=str(folder)).num_classes


def equal_classes(folder: Path) -> int:
    pixels = images(6, 2).tensors[0]
    doubled = TensorDataset(torch.cat([pixels, pixels.flip(0)]), torch.arange(12) // 6)
    return dd.DatasetDataModule(doubled, doubled, root=str(folder)).num_classes


def evaluated(stored: list[str], *classes: str) -> Callable[[Path], list[int]]:
    """Return the labels on which a set is evaluated, whose classes have the names ``stored``."""

    def read(folder: Path) -> list[int]:
        data = dd.DatasetDataModule(named(images(6), *classes), images(6), root=str(folder))
        file = SyntheticFile(
            images=torch.zeros(3, 1, 8, 8), labels=torch.arange(3), num_classes=3, space=data.space, lr=None,
            evaluation_lr=0.1, dataset="mine", objective="TrajectoryMatching", network="ConvNet-1", step=1,
            class_names=stored, formation=Formation(),
        )  # fmt: skip
        return evaluation_data(file, data)[1].labels.tolist()

    return read


ORDER = [0, 1, 2, 0, 1, 2]
SETS: list[Case] = [
    (
        "other sizes to test on",
        datasets(images(6), images(6, shape=(1, 8, 9))),
        Refused(r"\[1, 8, 8\], but test images"),
    ),
    (
        "other channels to test on",
        datasets(images(6), images(6, shape=(3, 8, 8))),
        Refused("test images .*: make them"),
    ),
    ("a class that is not tested", datasets(images(6), Subset(images(6), [0, 1, 3])), (3, [0, 1, 0])),
    (
        "a class that is only tested",
        datasets(images(6, 2), images(6)),
        Refused(r"labels run from 0 to 2, outside 0 \.\."),
    ),
    ("an empty set", datasets(images(0), images(6)), Refused("train data of custom has no image")),
    ("no classes", datasets(images(6), images(6), num_classes=0), Refused("num_classes is 0; it must be at least 1")),
    ("test names in another order", datasets(named(images(6), *"abc"), named(images(6), *"cab")), (3, [2, 0, 1] * 2)),
    ("unknown test name", datasets(named(images(6), *"abc"), named(images(6), *"cax")), Refused("class 2 .* is 'x'")),
    (
        "negative test labels",
        datasets(named(images(6), *"abc"), named(TensorDataset(torch.rand(1, 1, 8, 8), torch.tensor([-1])), *"abc")),
        Refused("from -1 to"),
    ),
    ("names of other data", datasets(named(images(6), *"abcd"), images(6)), (3, ORDER)),
    ("equal pixels", equal_pixels, Warned("all pixels of custom are 0.5: look at", 2)),
    ("equal classes", equal_classes, Warned("classes 0 and 1 of custom have the same images", 2)),
    (
        "a loader",
        datasets(DataLoader(images(6)), images(6)),
        Refused(r"train_dataset is a DataLoader: .*\.dataset of a"),
    ),
    ("a stream", datasets(images(6), Stream()), Refused("test_dataset is a Stream: pass a dataset with a length")),
    ("no test data", lambda _: dd.DatasetDataModule(images(6)), Refused("test_dataset is missing: pass")),
    *(
        (
            f"random transform of {name}",
            read_twice(draw, None),
            Warned("items of .* differ each time .*read_seed", False),
        )
        for name, draw in DRAWS.items()
    ),
    *((f"fixed draw of {name}", read_twice(draw, 3), True) for name, draw in DRAWS.items()),
    ("random state of its own", read_twice(lambda: float(OWN_STATE.random()), 3), Warned("of their own", False)),
    ("evaluated on the same names", evaluated(["a", "b", "c"], *"abc"), ORDER),
    ("evaluated on another order", evaluated(["a", "b", "c"], *"cab"), [2, 0, 1] * 2),
    ("evaluated on numbers", evaluated(["a", "b", "c"]), ORDER),
    ("evaluated without names", evaluated([], *"abc"), ORDER),
    ("evaluated on a renamed class", evaluated(["a", "b", "c"], *"axc"), Warned("class 1 of .* 'x', but 'b'", ORDER)),
    (
        "evaluated on other classes",
        evaluated(["a", "b", "c"], *"cxa"),
        Refused("class 1 of custom is 'x', but 'b' of the"),
    ),
    ("folders that are not tested", folder_labels("abc", "ac"), ([0, 0, 1, 1, 2, 2], [0, 0, 2, 2])),
    ("empty test folder", folder_labels("abc", "ac", odd="test/b/.keep"), ([0, 0, 1, 1, 2, 2], [0, 0, 2, 2])),
    (
        "folders that are only tested",
        folder_labels("ab", "abc"),
        Refused("test has classes that train lacks, c: add or"),
    ),
    ("hidden files", folder_labels("ab", "ab", odd="train/a/._0.png"), ([0, 0, 1, 1], [0, 0, 1, 1])),
    ("other files", folder_labels("ab", "ab", odd="train/a/notes.txt"), ([0, 0, 1, 1], [0, 0, 1, 1])),
    (
        "an empty class",
        folder_labels("ab", "ab", odd="train/c/.keep"),
        Refused("no classes in .*train .*for the classes c"),
    ),
]


def whitened(folder: Path) -> int:
    large = images(2, 2, shape=(3, 224, 224))
    return dd.DatasetDataModule(large, large, root=str(folder), color_space="zca").num_classes


SETS.append(
    ("ZCA of large images", whitened, Refused(r"150528 x 150528 and take 10\d\d\.\d GiB to fit, but this machine"))
)

# Runs, and what Python is given


class Good(nn.Module):
    """A network of one's own."""

    def __init__(self, channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        del image_size
        self.conv = nn.Conv2d(channels, 4, 3)
        self.classifier = nn.Linear(4, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.conv(pixels).mean((2, 3)))
        return logits


class TenClasses(Good):
    """One that does not ask what it is for."""

    def __init__(self, *_: object) -> None:
        super().__init__(1, 10, (8, 8))


def counts(*per_class: int) -> TensorDataset:
    """Return so many images of each class."""
    every = images(30)
    return TensorDataset(*every[[3 * i + label for label, count in enumerate(per_class) for i in range(count)]])


def run(
    train: Any = None,  # noqa: ANN401
    test: Any = None,  # noqa: ANN401
    callbacks: Iterable[Any] = (),
    **options: Any,  # noqa: ANN401
) -> Callable[[Path], int]:
    """Return the number of steps of a run with an evaluation, which must have its last point and its comparison."""

    def fit(folder: Path) -> int:
        points = small.evaluation(compare_random=True, epochs=1)
        distilled = small.network_module(**options)
        data = dd.DatasetDataModule(train or images(30), test or images(9, seed=1), root=str(folder))
        trainer = small.fit(folder, distilled, points, *callbacks, datamodule=data, steps=2)
        assert points.last().step == 2
        assert points.random_real is not None
        assert len(points.random_real.accuracies) == 5
        return trainer.global_step

    return fit


def fitted(*arguments: Any, **named: Any) -> Callable[[Path], None]:  # noqa: ANN401
    return lambda folder: small.trainer(folder).fit(small.network_module(), *arguments, **named)


def objective_of(given: Any, **options: Any) -> Callable[[Path], str]:  # noqa: ANN401
    return lambda _: type(dd.DistillationModule(given, **options).objective).__name__


def accuracies(network: Any = small.NETWORK, **options: Any) -> Callable[[Path], int]:  # noqa: ANN401
    def evaluate(folder: Path) -> int:
        del folder
        data = small.data()
        given = data.train.images[:6], data.train.labels[:6], 0.01, data.test, network
        return len(
            dd.evaluate_synthetic_set(*given, **({"recipe": dd.EvaluationRecipe(epochs=1)} | options)).accuracies
        )

    return evaluate


BATCH_8 = dd.GradientMatching(batch_real=8)
PYTHON: list[Case] = [
    ("more ipc than a class has", run(counts(9, 9, 3), ipc=5, init="noise"), 2),
    ("more real ipc than a class has", run(counts(9, 9, 3), ipc=5), Refused("class 2, the smallest, has 3; .*noise")),
    ("one class", run(images(9, 1), images(9, 1)), Refused("number of classes is 1; it must be at least 2")),
    ("one image of a class", run(counts(9, 9, 1), ipc=1), 2),
    (
        "one image of a class for k-means",
        run(
            counts(9, 9, 1),
            ipc=1,
            objective=dd.GradientMatching(batch_real=8, sampling="representative", per_cluster=2),
        ),
        2,
    ),
    ("a batch beyond all classes", run(counts(5, 5, 5), objective=dd.GradientMatching(batch_real=64)), 2),
    ("test data without a class", run(test=counts(3, 3, 0)), 2),
    (
        "pictures of 13 channels",
        run(images(30, shape=(13, 8, 8)), images(9, shape=(13, 8, 8)), [dd.SyntheticSetWriter()]),
        2,
    ),
    (
        "pictures of 2 channels",
        run(images(30, shape=(2, 8, 8)), images(9, shape=(2, 8, 8)), [dd.SyntheticSetWriter()]),
        2,
    ),
    ("negative seed", run(seed=-5), Refused("seed is -5; it must be at least 0")),
    ("network as a class", run(network=Good), 2),
    ("network as a function", run(network=lambda *given: Good(*given)), 2),
    (
        "network of torchvision",
        lambda _: FunctionalNetwork(torchvision.models.resnet18, (1, 8, 8), 3).name,
        "torchvision/resnet18",
    ),
    (
        "network that was built",
        run(network=Good(1, 3, (8, 8))),
        Refused("network is a .*Good that was built already; give"),
    ),
    (
        "network of other arguments",
        run(network=nn.Flatten),
        Refused(r"fails with TypeError \(.*\): a factory is called with"),
    ),
    (
        "network of ten classes",
        run(network=TenClasses),
        Refused(r"gives \[2, 10\] for 2 images: logits \[2, 3\] are needed"),
    ),
    ("no network", run(network="os.path:join"), Refused("network 'os.path:join' fails with TypeError")),
    (
        "one image where batch norm needs two",
        run(ipc=1, network="torchvision/resnet18"),
        Refused("1 synthetic image, .*; raise"),
    ),
    (
        "fit a loader",
        fitted(DataLoader(images(6))),
        Refused(r"no data module; pass datamodule=DatasetDataModule\(train_dat"),
    ),
    ("fit a dataset", fitted(datamodule=images(6)), Refused("the data module is a TensorDataset; pass")),
    *(
        (f"objective {name}", objective_of(name), wanted)
        for name, wanted in {
            "mtt": "TrajectoryMatching",
            "idc": "GradientMatching",
            "dream_plus": "BidirectionalMatching",
            "dm": "DistributionMatching",
            "MTT": Refused("objective is 'MTT'; use one of mtt, idc"),
        }.items()
    ),
    (
        "objective as a class",
        objective_of(dd.GradientMatching),
        Refused(r"class GradientMatching; .*: GradientMatching\(\)"),
    ),
    ("pool as a class", objective_of("idc", pool=dd.NetworkPool), Refused("pool is <class .*; give a NetworkPool")),
    ("ipc in words", objective_of("mtt", ipc="10"), Refused("ipc is '10'; it must be a number")),
    ("selection of several live networks", run(callbacks=[dd.TrajectorySelectionCallback(3)]), 2),
    ("network by name", accuracies(num_networks=2), 2),
    (
        "recipe by name",
        accuracies(recipe="ncc"),
        Refused("unknown evaluation recipe 'ncc'; choose one of ddranking, dm,"),
    ),
    ("no networks", accuracies(num_networks=0), Refused("num_networks is 0; it must be at least 1")),
]
CASES = ITEMS + PICTURES + SETS + PYTHON


@pytest.mark.parametrize(("act", "outcome"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_odd_input(tmp_path: Path, act: Callable[[Path], Any], outcome: Any) -> None:  # noqa: ANN401
    if isinstance(outcome, Refused):
        with pytest.raises(dd.InputError, match=outcome.said) as refused:
            act(tmp_path)
        assert "\n" not in str(refused.value)
        return
    if isinstance(outcome, Warned):
        with pytest.warns(UserWarning, match=outcome.said):
            found = act(tmp_path)
        outcome = outcome.value
    else:
        found = act(tmp_path)
    if isinstance(outcome, str):
        assert found == outcome
    else:
        torch.testing.assert_close(found, outcome, rtol=0, atol=2e-3)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 120
    assert len({name for name, *_ in CASES}) == len(CASES)
