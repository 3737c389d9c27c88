"""A folder that ``datasets.load_dataset`` reads: one Parquet file of pictures and labels, and a card."""

import importlib
import io
from pathlib import Path
from typing import Any

from torchvision.transforms.functional import to_pil_image

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import decode_targets
from dd_lightning.sets.foreign.card import card
from dd_lightning.sets.synthetic_file import SyntheticFile

FILE = "data/train-00000-of-00001.parquet"


def write(path: Path, synthetic: SyntheticFile) -> dict[Path, bytes]:
    """Return the files: columns ``image`` (8 bits), ``label`` and, of a set with soft labels, ``logits``.

    Raises:
        InputError: If the library ``datasets`` is not installed.
    """
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError('--format hf needs the library datasets: pip install "dd_lightning[hf]"') from error
    images = synthetic.decoded_pixels().clamp(0, 1).mul(255).round().byte()
    labels = decode_targets(synthetic.labels, synthetic.formation)
    names = synthetic.class_names or [str(number) for number in range(synthetic.num_classes)]
    numbers = [index * synthetic.num_classes // len(images) for index in range(len(images))]
    columns = {"image": [to_pil_image(image) for image in images], "label": numbers}
    features = {"image": library.Image(), "label": library.ClassLabel(names=names)}
    if synthetic.label_kind == "soft":
        columns["logits"] = labels.tolist()
        features["logits"] = library.Sequence(library.Value("float32"))
    else:
        columns["label"] = labels.tolist()
    dataset = library.Dataset.from_dict(columns, features=library.Features(features))
    dataset.to_parquet(buffer := io.BytesIO())
    header = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n\n"
    return {path / FILE: buffer.getvalue(), path / "README.md": (header + card(synthetic)).encode()}
