"""IDC, DREAM and DREAM+: ``data.pt``, a list of stored pixels and class numbers. The factor is not in the file."""

from pathlib import Path

from dd_lightning.functional.errors import InputError
from dd_lightning.sets.foreign.content import ForeignSet, Wanted, load_tensors, saved, tensors_of
from dd_lightning.sets.synthetic_file import SyntheticFile


def read(path: Path, wanted: Wanted) -> ForeignSet:
    """Read ``data.pt``, or another name, or the one of that name in a folder."""
    del wanted
    file = path / "data.pt" if path.is_dir() else path
    pair = load_tensors(file)
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise InputError(f"{file} does not hold a list of images and labels, as IDC writes it; is --format right?")
    images, labels = tensors_of(file, *pair)
    return ForeignSet(images, labels, "pixels")


def write(path: Path, synthetic: SyntheticFile) -> dict[Path, bytes]:
    """Return the file: stored pixels, undecoded.

    Raises:
        InputError: If labels are soft, or the set has several formations.
    """
    if synthetic.label_kind == "soft":
        raise InputError("the set has soft labels, which IDC's format has no place for; export it as mtt or pt")
    if synthetic.formation.kind == "multi" and synthetic.formation.factor > 1:
        raise InputError("the set's formation is 'multi', which IDC's format has no place for; export it as mtt or pt")
    return {path: saved([synthetic.stored_pixels(), synthetic.labels])}
