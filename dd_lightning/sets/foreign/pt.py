"""One ``torch.save`` file for plain PyTorch: decoded images as networks see them, labels, and what they are."""

from pathlib import Path

from dd_lightning.functional.errors import InputError, check_choice
from dd_lightning.sets.color_spaces import recipe
from dd_lightning.sets.foreign.content import ForeignSet, ForeignSpace, Wanted, load_tensors, saved, tensors_of
from dd_lightning.sets.synthetic_file import SyntheticFile

_SPACES: dict[str, ForeignSpace] = {"pixel": "pixels", "normalized": "normalized", "zca": "zca"}


def read(path: Path, wanted: Wanted) -> ForeignSet:
    """Read a file that :func:`write` made."""
    del wanted
    content = load_tensors(path)
    keys = ("images", "labels", "color_space", "lr")
    if not isinstance(content, dict) or not all(key in content for key in keys):
        raise InputError(f"{path} is no dictionary of {', '.join(keys)}; is --format right?")
    images, labels = tensors_of(path, content["images"], content["labels"])
    kind = content["color_space"]
    check_choice("color_space in the file", kind, _SPACES)
    return ForeignSet(images, labels, _SPACES[kind], float(content["lr"]))


def write(path: Path, synthetic: SyntheticFile) -> dict[Path, bytes]:
    """Return the file."""
    images, labels = synthetic.training_set()
    content = {
        "images": images,
        "labels": labels,
        "lr": synthetic.evaluation_lr,
        "dataset": synthetic.dataset,
        "class_names": list(synthetic.class_names),
        "color_space": synthetic.space.kind,
        "color_space_tensors": recipe(synthetic.space),
        "network": synthetic.network,
        "objective": synthetic.objective,
        "step": synthetic.step,
    }
    return {path: saved(content)}
