"""A distilled set as one safetensors file that says by itself how to be evaluated."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation, FormationKind, decode_targets
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.sets.color_spaces import color_space_from_tensors
from dd_lightning.sets.synthetic import decode_images
from dd_lightning.version import __version__

FORMAT = "synthetic"
FORMAT_VERSION = 2
"""2 has added ``formation`` and ``stored_as``; a file of version 1 has the defaults of both."""
METADATA_KEY = "dd_lightning"

LabelKind = Literal["hard", "logits"]
ColorSpaceKind = Literal["pixel", "normalized", "zca"]
_COLOR_PREFIX = "color_space."


@dataclass(frozen=True, eq=False)
class SyntheticFile:
    """What the file of a distilled set holds.

    Args:
        images: Stored images, float32 ``[num_classes * ipc, channels, height, width]``, in the color space
            named below, or as pixels to be brought to it.
        labels: ``[n]`` int64 class indices, or ``[n, num_classes]`` floating-point logits.
        label_kind: Which of the two the labels are.
        lr: The learned learning rate of a network trained on the images, None if the objective learns none.
        color_space: The space that networks see: pixels in [0, 1], normalized per channel, or whitened.
        color_space_tensors: What leads from there back to pixels, such as ``mean`` and ``std``, or the
            whitening matrices.
        factor: Multi-formation factor: each stored image is cut into ``factor ** 2`` tiles, which are enlarged to
            training images; 1 is no decoding.
        formation: ``single`` or ``multi``, see :class:`~dd_lightning.functional.formation.Formation`.
        stored_as: ``network``: the images live in the color space; ``pixels``: they are encoded to it after decoding.
        ipc: Stored images per class.
        effective_ipc: Training images per class after decoding.
        num_classes: Number of classes.
        dataset: Name of the real data.
        class_names: Names of the classes, in label order; may be empty.
        objective: Name of the matching objective.
        network: Name of the network it was distilled with.
        step: Distillation step at which it was saved.
        config: The resolved configuration of the run, JSON values only.
        package_version: Version of dd_lightning that wrote it.

    Raises:
        InputError: If a shape, a type or a count disagrees with the others.
    """

    images: Tensor
    labels: Tensor
    label_kind: LabelKind
    lr: float | None
    color_space: ColorSpaceKind
    color_space_tensors: dict[str, Tensor]
    ipc: int
    effective_ipc: int
    num_classes: int
    dataset: str
    class_names: list[str]
    objective: str
    network: str
    step: int
    factor: int = 1
    formation: FormationKind = "single"
    stored_as: Literal["network", "pixels"] = "network"
    config: dict[str, Any] = field(default_factory=dict)
    package_version: str = __version__

    def __post_init__(self) -> None:
        count = self.num_classes * self.ipc
        if self.images.ndim != 4 or len(self.images) != count or self.images.dtype != torch.float32:
            raise InputError(
                f"synthetic images are {self.images.dtype} {list(self.images.shape)}, {self.num_classes} "
                "classes at ipc "
                f"{self.ipc} need torch.float32 [{count}, channels, height, width]; give that many images"
            )
        if self.label_kind not in get_args(LabelKind):
            raise InputError(f"label kind is {self.label_kind!r}; use one of {', '.join(get_args(LabelKind))}")
        if self.color_space not in get_args(ColorSpaceKind):
            raise InputError(f"color space is {self.color_space!r}; use one of {', '.join(get_args(ColorSpaceKind))}")
        hard = self.label_kind == "hard"
        shape = (count,) if hard else (count, self.num_classes)
        if self.labels.shape != shape or (
            self.labels.dtype != torch.int64 if hard else not self.labels.is_floating_point()
        ):
            raise InputError(
                f"{self.label_kind} labels are {self.labels.dtype} {list(self.labels.shape)}, they must be "
                f"{'int64' if hard else 'floating-point'} {list(shape)}; give one label per image"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InputError(
                f"{len(self.class_names)} class names for {self.num_classes} classes; give one per class or none"
            )
        effective = self.ipc * Formation(self.factor, self.formation).per_image
        if self.effective_ipc != effective:
            raise InputError(
                f"effective ipc is {self.effective_ipc}, but ipc {self.ipc} with formation factor {self.factor} "
                f"({self.formation}) decodes to {effective}; give that number"
            )
        if self.stored_as not in ("network", "pixels"):
            raise InputError(f"stored_as is {self.stored_as!r}; use network or pixels")

    def training_set(self) -> tuple[Tensor, Tensor]:
        """Return what networks are trained on: decoded images [n, ch, H, W] in the color space, and their labels."""
        formation = Formation(self.factor, self.formation)
        space = color_space_from_tensors(self.color_space, self.color_space_tensors)
        images = decode_images(self.images, formation, space if self.stored_as == "pixels" else None)
        return images, decode_targets(self.labels, formation)


_TEXT_FIELDS = [
    "label_kind",
    "lr",
    "color_space",
    "factor",
    "formation",
    "stored_as",
    "ipc",
    "effective_ipc",
    "num_classes",
    "dataset",
    "class_names",
    "objective",
    "network",
    "step",
    "config",
    "package_version",
]
_SINCE_VERSION_2 = ("formation", "stored_as")


def save_synthetic(path: Path | str, synthetic: SyntheticFile) -> None:
    """Write a distilled set, atomically. Equal content gives equal bytes.

    Args:
        path: Where to; missing directories are made.
        synthetic: What to write. Tensors may be on any device.

    Raises:
        InputError: If the configuration is not made of JSON values, or the place cannot be written.
    """
    try:
        text = json.dumps(
            {"format": FORMAT, "format_version": FORMAT_VERSION}
            | {name: getattr(synthetic, name) for name in _TEXT_FIELDS},
            sort_keys=True,
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"cannot write {path}: a value of its configuration is not plain JSON ({error}); give numbers, "
            "text, lists and "
            "mappings only"
        ) from error
    tensors = {"images": synthetic.images, "labels": synthetic.labels}
    tensors |= {f"{_COLOR_PREFIX}{name}": tensor for name, tensor in synthetic.color_space_tensors.items()}
    # Cloned: safetensors refuses tensors that share memory, as a mean and a deviation cut from one tensor
    # would.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, safetensors.torch.save(plain, {METADATA_KEY: text}))


def load_synthetic(path: Path | str) -> SyntheticFile:
    """Read a distilled set.

    Args:
        path: A file that :func:`save_synthetic` wrote.

    Returns:
        Its content, tensors on the host, equal to what was saved to the last bit.

    Raises:
        InputError: If there is no such file, if it is damaged or foreign, or if a newer version wrote it.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"there is no synthetic set at {path}; check the path or distil one first") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"cannot read {path}: it is damaged or not a safetensors file; copy it again or distil it again"
        ) from error
    foreign = f"cannot read {path}: it is not a synthetic set of dd_lightning; give a file that `fit` wrote"
    try:
        values = json.loads(metadata[METADATA_KEY])
        kind, version = values["format"], values["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(foreign) from error
    if kind != FORMAT:
        raise InputError(foreign)
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has synthetic-set format {version}, this dd_lightning {__version__} reads up to "
            f"{FORMAT_VERSION}; "
            "upgrade dd_lightning"
        )
    try:
        return SyntheticFile(
            images=tensors.pop("images"),
            labels=tensors.pop("labels"),
            color_space_tensors={name.removeprefix(_COLOR_PREFIX): tensor for name, tensor in tensors.items()},
            **{name: values[name] for name in _TEXT_FIELDS if version > 1 or name not in _SINCE_VERSION_2},
        )
    except KeyError as error:
        raise InputError(f"cannot read {path}: it lacks {error}; copy it again or distil it again") from error
