"""DD-Ranking: a folder of ``images.pt``, ``labels.pt`` and ``lr.pt``, and the configuration that evaluates them.

Images are sorted by class and decoded, either ZCA-whitened, or normalized by one pair of constants for every data set.
Soft labels are logits.
"""

from pathlib import Path

import torch
import yaml

from dd_lightning.functional.errors import InputError
from dd_lightning.sets.color_spaces import NormalizedSpace
from dd_lightning.sets.foreign.content import ForeignSet, Wanted, load_tensors, saved, tensors_of
from dd_lightning.sets.synthetic_file import SyntheticFile

SPACE = NormalizedSpace(torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010]))
"""CIFAR-10's constants, by which DD-Ranking 0.2.0 normalizes CIFAR-100 too."""

_AUGMENTATION = {
    "crop": 0.125, "cutout": 0.5, "flip": 0.5, "scale": 1.2, "rotate": 15.0, "brightness": 1.0, "saturation": 2.0,
    "contrast": 0.5,
}  # fmt: skip


def read(path: Path, wanted: Wanted) -> ForeignSet:
    """Read a folder; its configuration, if there is one, says whether the images are whitened.

    Normalized images come back as pixels.
    """
    del wanted
    images, labels = tensors_of(path, load_tensors(path / "images.pt"), load_tensors(path / "labels.pt"))
    lr = float(tensors_of(path, load_tensors(path / "lr.pt"))[0]) if (path / "lr.pt").is_file() else None
    try:
        config = yaml.safe_load((path / "config.yaml").read_text()) if (path / "config.yaml").is_file() else {}
        whitened = config.get("use_zca")
    except (yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{path / 'config.yaml'} is no YAML mapping; mend it, or remove it") from error
    if whitened is False:
        return ForeignSet(SPACE.decode(images), labels, "pixels", lr)
    return ForeignSet(images, labels, "zca" if whitened else None, lr)


def write(path: Path, synthetic: SyntheticFile) -> dict[Path, bytes]:
    """Return the files of a folder.

    Raises:
        InputError: If the images do not have three channels.
    """
    images, labels = synthetic.training_set()
    if images.shape[1] != 3:
        raise InputError(f"the images have {images.shape[1]} channels; DD-Ranking reads color images of 3")
    whitened = synthetic.space.kind == "zca"
    if not whitened:
        images = SPACE.encode(synthetic.space.decode(images))
    config = {
        "dataset": synthetic.dataset.upper(),
        "ipc": len(images) // synthetic.num_classes,
        "model_name": synthetic.network,
        "im_size": list(images.shape[-2:]),
        "use_zca": whitened,
        "data_aug_func": "dsa",
        "aug_params": _AUGMENTATION,
        "optimizer": "sgd",
        "lr_scheduler": "step",
        "num_epochs": 1000,
        "step_size": 500,
        "syn_batch_size": 256,
        "weight_decay": 5e-4,
        "momentum": 0.9,
        "num_eval": 5,
        "eval_full_data": True,
        "random_data_format": "image",
    }
    if synthetic.label_kind == "soft":
        config |= {"soft_label_mode": "S", "soft_label_criterion": "sce", "loss_fn_kwargs": {"temperature": 1.0}}
    return {
        path / "images.pt": saved(images),
        path / "labels.pt": saved(labels),
        path / "lr.pt": saved(images.new_tensor(synthetic.evaluation_lr)),
        path / "config.yaml": yaml.safe_dump(config, sort_keys=False).encode(),
    }
