"""Trajectory matching and its successors: ``images_best.pt``, ``labels_best.pt`` and, since DATM, ``lr_best.pt``.

MTT, FTD, TESLA and DATM write the images as networks see them, normalized or ZCA-whitened; which of the two is not in
the files. TESLA's soft labels are probabilities, DATM's logits.
"""

from pathlib import Path

from dd_lightning.functional.errors import InputError
from dd_lightning.sets.foreign.content import ForeignSet, Wanted, load_tensors, saved, tensors_of
from dd_lightning.sets.synthetic_file import SyntheticFile


def read(path: Path, wanted: Wanted) -> ForeignSet:
    """Read ``images_X.pt`` and its neighbors ``labels_X.pt`` and ``lr_X.pt``; of a folder, X is ``best``."""
    del wanted
    file = path / "images_best.pt" if path.is_dir() else path
    kind, _, name = file.name.partition("_")
    if kind != "images":
        raise InputError(f"{file} is not named images_*.pt, as MTT names its images; labels lie beside it")
    images, labels = tensors_of(file, load_tensors(file), load_tensors(file.with_name(f"labels_{name}")))
    lr_file = file.with_name(f"lr_{name}")
    lr = float(tensors_of(lr_file, load_tensors(lr_file))[0]) if lr_file.is_file() else None
    return ForeignSet(images, labels, None, lr)


def write(path: Path, synthetic: SyntheticFile) -> dict[Path, bytes]:
    """Return the files of a folder: decoded images as networks see them, labels and learning rate."""
    images, labels = synthetic.training_set()
    files = {
        "images_best.pt": images,
        "labels_best.pt": labels,
        "lr_best.pt": images.new_tensor(synthetic.evaluation_lr),
    }
    return {path / name: saved(tensor) for name, tensor in files.items()}
