"""A folder of pictures: ``<class>/<number>.png``, ``metadata.jsonl`` and a card ``README.md``. Pixels have 8 bits.

SRe2L, EDC and RDED write such folders too, without the metadata.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import decode_targets
from dd_lightning.sets.foreign.card import card
from dd_lightning.sets.foreign.content import ForeignSet, Wanted
from dd_lightning.sets.pictures import png_bytes
from dd_lightning.sets.synthetic_file import SyntheticFile

METADATA = "metadata.jsonl"


def read(path: Path, wanted: Wanted) -> ForeignSet:
    """Read the pictures, with the labels of ``metadata.jsonl``; without it, those of the folders.

    Folders are classes by their names if these are the data's, else in alphabetic order, which is warned of.
    """
    if (path / METADATA).is_file():
        entries = [(path / entry["file_name"], entry.get("logits", entry["label"])) for entry in _entries(path)]
    else:
        try:
            found = ImageFolder(path)
        except OSError as error:
            raise InputError(f"{path} has no class folders with pictures ({str(error).splitlines()[0]})") from error
        names, numbers = list(wanted.class_names), list(range(len(found.classes)))
        if set(found.classes) <= set(names):
            numbers = [names.index(name) for name in found.classes]
        else:
            warnings.warn(
                f"the folders of {path} ({found.classes[0]}, ...) are not named like the classes of the data "
                f"({names[0]}, ...); they are taken in alphabetic order",
                stacklevel=3,
            )
        entries = [(Path(file), numbers[label]) for file, label in found.samples]
    return ForeignSet(
        torch.stack([_picture(file, wanted.image_shape) for file, _ in entries]),
        torch.tensor([label for _, label in entries]),
        "pixels",
    )


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = [json.loads(line) for line in (path / METADATA).read_text().splitlines()]
        if not entries or any(not {"file_name", "label"} <= entry.keys() for entry in entries):
            raise ValueError("entries need a file_name and a label")
        if any(Path(entry["file_name"]).is_absolute() or ".." in Path(entry["file_name"]).parts for entry in entries):
            raise ValueError("a file_name leads out of the folder")
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path / METADATA} is not understood ({str(error)[:100]}); mend it, or remove it") from error
    return entries


def _picture(file: Path, shape: tuple[int, int, int]) -> Tensor:
    try:
        picture = Image.open(file).convert("L" if shape[0] == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"cannot read {file} as a picture; remove it") from error
    image: Tensor = pil_to_tensor(picture)
    if image.shape != shape:
        raise InputError(f"{file} is a picture {list(image.shape)}; the data have images {list(shape)}")
    return image.float() / 255


def write(path: Path, synthetic: SyntheticFile) -> dict[Path, bytes]:
    """Return the files: decoded images, clamped to [0, 1] and rounded to 8 bits."""
    images = synthetic.decoded_pixels()
    labels = decode_targets(synthetic.labels, synthetic.formation)
    names = synthetic.class_names or [str(number) for number in range(synthetic.num_classes)]
    files, lines = {}, []
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        number = index * synthetic.num_classes // len(images) if label.ndim else int(label)
        name = f"{names[number].replace('/', '_')}/{index:05d}.png"
        files[path / name] = png_bytes(image.clamp(0, 1))
        logits = {"logits": label.tolist()} if label.ndim else {}
        lines.append(json.dumps({"file_name": name, "label": number, **logits}))
    files[path / METADATA] = "\n".join([*lines, ""]).encode()
    files[path / "README.md"] = card(synthetic).encode()
    return files
