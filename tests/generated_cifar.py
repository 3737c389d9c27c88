"""Miniature stand-ins for CIFAR, in its own files: the same layout, a few generated images per class.

Each class has a smooth prototype of its own, and an image is the prototype plus noise, so a network can learn
to tell the classes apart. The data modules read the files with ``verify=False``.

    python tests/generated_cifar.py out/generated
"""

import argparse
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dd_lightning.functional.random import step_generator

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

CIFAR100_GROUPS = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
CIFAR100_NAMES = sorted(name for names in CIFAR100_GROUPS.values() for name in names.split())


def write_cifar10(root: Path, images_per_class: int, seed: int = 0) -> None:
    """Write ``cifar-10-batches-py`` below ``root``: ``images_per_class`` training and as many test images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, labels = _draw(10, images_per_class, seed, "train")
    parts = zip(torch.tensor_split(images, 5), torch.tensor_split(labels, 5), strict=True)
    for number, (some_images, some_labels) in enumerate(parts, start=1):
        _write_batch10(folder / f"data_batch_{number}", some_images, some_labels, f"training batch {number} of 5")
    _write_batch10(folder / "test_batch", *_draw(10, images_per_class, seed, "test"), "testing batch 1 of 1")
    meta = {"num_cases_per_batch": 2 * images_per_class, "label_names": CIFAR10_NAMES, "num_vis": 3072}
    _write_pickle(folder / "batches.meta", meta)


def write_cifar100(root: Path, images_per_class: int, seed: int = 0, num_classes: int = 100) -> None:
    """Write ``cifar-100-python`` below ``root``: ``images_per_class`` training and as many test images.

    With ``num_classes`` below 100, only the first ones are in the files.
    """
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    group_of = {name: group for group, names in enumerate(CIFAR100_GROUPS.values()) for name in names.split()}
    for split in ("train", "test"):
        images, labels = _draw(num_classes, images_per_class, seed, split)
        content = {
            "filenames": _filenames([CIFAR100_NAMES[label] for label in labels.tolist()]),
            "batch_label": f"{split}ing batch 1 of 1",
            "fine_labels": labels.tolist(),
            "coarse_labels": [group_of[CIFAR100_NAMES[label]] for label in labels.tolist()],
            "data": _rows(images),
        }
        _write_pickle(folder / split, content)
    meta = {"fine_label_names": CIFAR100_NAMES[:num_classes], "coarse_label_names": list(CIFAR100_GROUPS)}
    _write_pickle(folder / "meta", meta)


def _draw(num_classes: int, images_per_class: int, seed: int, split: str) -> tuple[Tensor, Tensor]:
    """Return uint8 images ``[n, 3, 32, 32]`` and their labels in random order."""
    coarse = torch.rand(num_classes, 3, 4, 4, generator=step_generator(seed, num_classes, "prototypes"))
    prototypes = 255 * interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    generator = step_generator(seed, num_classes, f"{split} images")
    count = num_classes * images_per_class
    labels = torch.arange(num_classes).repeat_interleave(images_per_class)
    labels = labels[torch.randperm(count, generator=generator)]
    noise = 30 * torch.randn(count, 3, 32, 32, generator=generator)
    return (prototypes[labels] + noise).round().clamp(0, 255).to(torch.uint8), labels


def _rows(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return images as CIFAR stores them: one row of 3,072 bytes each, red before green before blue."""
    rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = images.flatten(1).numpy()
    return rows


def _filenames(names: list[str]) -> list[str]:
    return [f"{name}_s_{number:06d}.png" for number, name in enumerate(names)]


def _write_batch10(path: Path, images: Tensor, labels: Tensor, batch_label: str) -> None:
    content = {
        "batch_label": batch_label,
        "labels": labels.tolist(),
        "data": _rows(images),
        "filenames": _filenames([CIFAR10_NAMES[label] for label in labels.tolist()]),
    }
    _write_pickle(path, content)


def _write_pickle(path: Path, content: Mapping[str, object]) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def main() -> None:
    """Write both data sets into the folder that is named on the command line."""
    parser = argparse.ArgumentParser(description="Write generated images in the formats of CIFAR-10 and CIFAR-100.")
    parser.add_argument("root", type=Path, help="Folder to write into; configs/smoke_cifar.yaml reads out/generated.")
    parser.add_argument("--images_per_class", type=int, default=8, help="Images per class, training and test each.")
    given = parser.parse_args()
    try:
        write_cifar10(given.root, given.images_per_class)
        write_cifar100(given.root, given.images_per_class)
    except FileExistsError as error:
        parser.error(f"{error.filename} is there already; delete it or name another folder")
    sys.stdout.write(f"{given.root.resolve()}\n")


if __name__ == "__main__":
    main()
