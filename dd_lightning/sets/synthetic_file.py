"""A distilled set as one safetensors file that says how to evaluate it."""

import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dd_lightning.functional.errors import InputError, check_choice, check_range
from dd_lightning.functional.formation import Formation, decode_targets
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.sets.color_spaces import ColorSpace, PixelSpace, ZCASpace, color_space_from_tensors, recipe
from dd_lightning.sets.synthetic import ImageSpace, LabelKind, decode_images
from dd_lightning.version import __version__

FORMAT = "synthetic"
FORMAT_VERSION = 3
"""2 added ``formation`` and ``stored_as``. 3 added ``evaluation_lr`` and ``evaluation_recipe``, calls logits ``soft``,
and describes a whitening by its training data (``fingerprint``, ``val_fraction``, ``split_seed``), not its matrices."""
METADATA_KEY = "dd_lightning"
DEFAULT_EVALUATION_LR = 0.01  # where an old file and its configuration have none

_COLOR_PREFIX = "color_space."


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SyntheticFile:
    """What the file of a distilled set holds.

    Args:
        images: Stored images, float32 ``[num_classes * ipc, channels, height, width]``.
        labels: Class indices, int64 ``[num_classes * ipc]``, or logits, floats ``[num_classes * ipc, num_classes]``.
        num_classes: Number of classes.
        space: The color space that networks see.
        stored_as: ``network``: the images live in the color space; ``pixels``: they are encoded to it after decoding.
        pixels: The images as pixels, if the space leads there by matrices that the file does not hold; else None.
        formation: How a stored image decodes.
        lr: The learned learning rate of a network trained on the images; None if the objective learns none.
        evaluation_lr: The learning rate at which the run evaluated the set, unless its recipe had one.
        evaluation_recipe: Fields of the run's EvaluationRecipe; empty if it evaluated nothing.
        dataset: Name of the real data.
        fingerprint: What tells its training data and color space from others; empty if unknown, as in old files.
        val_fraction: Share of the training data that was held out.
        split_seed: Seed of that split.
        class_names: Names of the classes, in label order; may be empty.
        objective: Name of the matching objective.
        network: Name of the network it was distilled with.
        step: Distillation step at which it was saved.
        config: The resolved configuration of the run, JSON values only.
        package_version: Version of dd_lightning that wrote it.

    Raises:
        InputError: If a shape or a type disagrees with the others.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    space: ColorSpace
    stored_as: ImageSpace = "network"
    pixels: Tensor | None = None
    formation: Formation = field(default_factory=Formation)
    lr: float | None
    evaluation_lr: float
    evaluation_recipe: dict[str, Any] = field(default_factory=dict)
    dataset: str
    fingerprint: str = ""
    val_fraction: float = 0.0
    split_seed: int = 0
    class_names: list[str] = field(default_factory=list)
    objective: str
    network: str
    step: int
    config: dict[str, Any] = field(default_factory=dict)
    package_version: str = __version__

    def __post_init__(self) -> None:
        check_range("num_classes", self.num_classes, 1)
        count = self.num_classes * max(self.ipc, 1)
        if self.images.ndim != 4 or len(self.images) != count or self.images.dtype != torch.float32:
            raise InputError(
                f"synthetic images are {self.images.dtype} {list(self.images.shape)}; {self.num_classes} classes need "
                "torch.float32 [num_classes * ipc, channels, height, width]"
            )
        hard = self.label_kind == "hard"
        shape = (count,) if hard else (count, self.num_classes)
        if self.labels.shape != shape or (hard and self.labels.dtype != torch.int64):
            raise InputError(
                f"{self.label_kind} labels are {self.labels.dtype} {list(self.labels.shape)}; they must be "
                f"{'int64' if hard else 'floating-point'} {list(shape)}"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InputError(
                f"{len(self.class_names)} class names for {self.num_classes} classes; give one per class or none"
            )
        check_choice("stored_as", self.stored_as, get_args(ImageSpace))
        check_range("evaluation_lr", self.evaluation_lr, 0, exclude_low=True)
        if hard and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            raise InputError(
                f"labels run from {self.labels.min()} to {self.labels.max()}, outside 0 .. {self.num_classes - 1}"
            )
        for name, tensor in (("images", self.images), ("labels", self.labels)):
            if not bool(tensor.isfinite().all()):
                raise InputError(f"synthetic {name} are not all finite")
        self.formation.check_size(*self.images.shape[-2:])
        wanted = {"pixel": 0, "normalized": self.images.shape[1], "zca": self.images[0].numel()}[self.space.kind]
        if len(means := recipe(self.space).get("mean", self.images[:0])) != wanted:
            raise InputError(f"the color space {self.space.kind} has {len(means)} means, the images need {wanted}")

    @property
    def label_kind(self) -> LabelKind:
        """``soft`` if the labels are logits."""
        return "soft" if self.labels.is_floating_point() else "hard"

    @property
    def ipc(self) -> int:
        """Stored images per class."""
        return len(self.images) // self.num_classes

    @property
    def effective_ipc(self) -> int:
        """Training images per class, after decoding."""
        return self.ipc * self.formation.per_image

    def training_set(self) -> tuple[Tensor, Tensor]:
        """Return what networks are trained on: decoded images [n, ch, H, W] in the color space, and their labels.

        An `InputError` if the file lacks the matrices: see :func:`~dd_lightning.datamodules.held_out.evaluation_data`.
        """
        images = decode_images(self.images, self.formation, self.space if self.stored_as == "pixels" else None)
        return images, decode_targets(self.labels, self.formation)

    def training_dataset(self) -> TensorDataset:
        """Return :meth:`training_set` as a dataset of plain PyTorch, whose items are (image, label)."""
        return TensorDataset(*self.training_set())

    def __repr__(self) -> str:
        """Say what it is, in a line."""
        decoding = f", decoded to {self.effective_ipc}" * (self.effective_ipc != self.ipc)
        return (
            f"SyntheticFile({self.dataset}: {self.num_classes} classes of {self.ipc} images{decoding}, "
            f"{list(self.images.shape[1:])}, {self.space.kind}, {self.label_kind} labels, lr {self.evaluation_lr:.3g}, "
            f"{self.objective} with {self.network}, step {self.step})"
        )

    def stored_pixels(self) -> Tensor:
        """Return the stored images as pixels, [num_classes * ipc, ch, H, W], not clamped to [0, 1]."""
        if self.pixels is not None:
            return self.pixels
        return self.images if self.stored_as == "pixels" else self.space.decode(self.images)

    def decoded_pixels(self) -> Tensor:
        """Return the images of :meth:`training_set` as pixels, [n, ch, H, W], not clamped to [0, 1]."""
        if self.stored_as == "pixels":
            return decode_images(self.images, self.formation, PixelSpace())
        return self.stored_pixels() if self.formation.factor == 1 else self.space.decode(self.training_set()[0])


_PLAIN = (
    "label_kind", "ipc", "effective_ipc", "num_classes", "stored_as", "lr", "evaluation_lr", "evaluation_recipe",
    "dataset", "fingerprint", "val_fraction", "split_seed", "class_names", "objective", "network", "step", "config",
    "package_version",
)  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("num_classes", "factor", "split_seed", "step"), (int,)),
    **dict.fromkeys(("evaluation_lr", "val_fraction"), (float, int)),
    **dict.fromkeys(("evaluation_recipe", "config"), (dict,)),
    **dict.fromkeys(("dataset", "fingerprint", "objective", "network", "package_version"), (str,)),
    **dict.fromkeys(("formation", "stored_as", "color_space"), (str,)),
    "lr": (float, int, type(None)),
    "class_names": (list,),
}
"""Of what a file says; it may be anybody's."""
_DERIVED = ("label_kind", "ipc", "effective_ipc")
"""Written for other readers; tensors and ``formation`` say the same."""
_KEYS = {*_PLAIN, "format", "format_version", "color_space", "factor", "formation", "checksums"}
_TEXT = "metadata"  # its checksum's name among those of tensors


def save_synthetic(path: Path | str, synthetic: SyntheticFile, embed_matrices: bool = False) -> None:
    """Write a distilled set, atomically. Equal content gives equal bytes.

    Args:
        path: Where to; missing directories are made.
        synthetic: What to write.
        embed_matrices: Keep the matrices of a ZCA space, 75 MB at 3 x 32 x 32 pixels. Without them the file holds the
            images as pixels too, and evaluating it takes the training data, on which the matrices are fitted again.

    Raises:
        InputError: If the configuration is not made of JSON values, or the place cannot be written.
    """
    space = synthetic.space
    if isinstance(space, ZCASpace) and not embed_matrices and synthetic.stored_as == "network":
        synthetic = replace(synthetic, pixels=synthetic.stored_pixels())
    values = {name: getattr(synthetic, name) for name in _PLAIN} | {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "color_space": space.kind,
        "factor": synthetic.formation.factor,
        "formation": synthetic.formation.kind,
    }
    tensors = {"images": synthetic.images, "labels": synthetic.labels}
    if synthetic.pixels is not None:
        tensors["pixels"] = synthetic.pixels
    colors = space.tensors() if embed_matrices else recipe(space)
    tensors |= {f"{_COLOR_PREFIX}{name}": tensor for name, tensor in colors.items()}
    # Cloned: safetensors refuses tensors that share memory, as a mean and a deviation cut from one tensor would.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        values["checksums"] = {name: checksum(tensor) for name, tensor in plain.items()} | _checksum_of_text(values)
        text = json.dumps(values, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"cannot write {path}: a value of its configuration is not plain JSON ({error}); give numbers, text, lists "
            "and mappings only"
        ) from error
    write_atomically(path, safetensors.torch.save(plain, {METADATA_KEY: text}))


def load_synthetic(path: Path | str) -> SyntheticFile:
    """Read a distilled set, of this or an earlier format version: tensors on the host, to the last bit.

    Its space is a :class:`~dd_lightning.sets.color_spaces.ZCARecipe` if it is whitened and holds no matrices.

    Raises:
        InputError: If there is no such file, it is damaged or foreign, or a newer version wrote it.
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
    try:
        values = json.loads(metadata[METADATA_KEY])
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
        version = int(values["format_version"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"cannot read {path}: it is not a synthetic set of dd_lightning; give a file that `fit` wrote"
        ) from error
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has synthetic-set format {version}, this dd_lightning {__version__} reads up to {FORMAT_VERSION}; "
            "upgrade dd_lightning"
        )
    try:
        if version < 3:
            values = _upgraded(values)
        for name, kinds in _TYPES.items():
            if name in values and (not isinstance(values[name], kinds) or isinstance(values[name], bool)):
                raise InputError(f"its {name} is {str(values[name])[:40]!r}, a {type(values[name]).__name__}")
        sums: dict[str, int] = dict(values.get("checksums", {}))
        if not sums and version == FORMAT_VERSION and values.keys() - _KEYS:  # files of before have no other
            raise InputError(f"it holds {min(values.keys() - _KEYS)[:40]!r} and no checksums: it is damaged")
        found = {name: checksum(tensor) for name, tensor in tensors.items()} | _checksum_of_text(values)
        if sums and _TEXT not in sums:  # as files had them at first
            del found[_TEXT]
        if damaged := [name for name in found if sums and sums[name] != found[name]]:
            raise InputError(f"the checksum of {damaged[0]} differs: it is damaged")
        colors = {name.removeprefix(_COLOR_PREFIX): t for name, t in tensors.items() if name.startswith(_COLOR_PREFIX)}
        return SyntheticFile(
            images=tensors["images"],
            labels=tensors["labels"],
            pixels=tensors.get("pixels"),
            space=color_space_from_tensors(values["color_space"], colors),
            formation=Formation(values["factor"], values["formation"]),
            **{name: values[name] for name in _PLAIN if name not in _DERIVED},
        )
    except KeyError as error:
        raise InputError(f"cannot read {path}: it lacks {error}; copy it again or distil it again") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"cannot read {path}: {str(error)[:300]}; copy it again or distil it again") from error


def checksum(tensor: Tensor) -> int:
    """Return a CRC-32 of a tensor's bytes, on the host: what tells a damaged file."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _checksum_of_text(values: dict[str, Any]) -> dict[str, int]:
    """Return a checksum of all that a file says, but for the checksums."""
    text = json.dumps({key: value for key, value in values.items() if key != "checksums"}, sort_keys=True)
    text = json.dumps(json.loads(text), sort_keys=True)  # keys that were numbers sort as text from now on
    return {_TEXT: zlib.crc32(text.encode())}


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of format version 1 or 2 as those of version 3."""
    lr = values["lr"]
    if lr is None:
        lr = values["config"].get("model", {}).get("student_lr", DEFAULT_EVALUATION_LR)
    defaults = {"formation": "single", "stored_as": "network", "fingerprint": "", "val_fraction": 0.0, "split_seed": 0}
    return defaults | {"evaluation_lr": lr, "evaluation_recipe": {}} | values
