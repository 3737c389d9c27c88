"""The synthetic set: what is learned."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation, decode, decode_targets
from dd_lightning.sets.color_spaces import ColorSpace, color_space_from_tensors, recipe, same_space

LabelKind = Literal["hard", "soft"]
ImageSpace = Literal["network", "pixels"]

PIXEL_PAD = 0.5  # gray that fills a tile where the factor does not divide a stored image of pixels (IDC)


class SyntheticSet(nn.Module):
    """Learnable images, their labels, and the learning rate of the student that trains on them.

    Stored images are sorted by class and unclamped. Networks are trained on the *decoded* set: each stored image is cut
    into tiles, which are enlarged (multi-formation) and brought to the real set's color space. The state dict says how;
    it describes a ZCA space without its matrices, see :meth:`use_space`.

    Args:
        images: [C*ipc, ch, H, W].
        targets: Class indices [C*ipc], or label logits [C*ipc, C].
        student_lr: Initial learning rate of the student.
        formation: How a stored image decodes.
        space: Networks' color space, if the images are stored as pixels; None if they are stored in that space.
    """

    targets: Tensor

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        student_lr: float,
        formation: Formation = Formation(),  # noqa: B008  (frozen)
        space: ColorSpace | None = None,
    ) -> None:
        super().__init__()
        self.images = nn.Parameter(images.clone())
        if targets.is_floating_point():
            self.targets = nn.Parameter(targets.clone())
        else:
            self.register_buffer("targets", targets.clone())
        self.student_lr = nn.Parameter(torch.tensor(float(student_lr)))
        self.formation, self.space = formation, space

    @classmethod
    def from_state(cls, state: Mapping[str, Any], prefix: str = "") -> "SyntheticSet":
        """Return the set whose state dict this is, among other entries if theirs have another prefix."""
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        extra = state["_extra_state"]
        kind = extra["color_space"]
        space = None if kind is None else color_space_from_tensors(kind, extra["color_space_tensors"])
        formation = Formation(extra["factor"], extra["formation"])
        return cls(state["images"], state["targets"], float(state["student_lr"]), formation, space)

    @property
    def label_kind(self) -> LabelKind:
        """``soft`` if the targets are logits."""
        return "soft" if self.targets.is_floating_point() else "hard"

    @property
    def image_space(self) -> ImageSpace:
        """How images are stored: as networks see them, or as pixels."""
        return "network" if self.space is None else "pixels"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def decoded_size(self) -> int:
        """Number of images that networks are trained on: C times the effective ipc."""
        return len(self.images) * self.formation.per_image

    def decoded(self) -> Tensor:
        """Return what networks are trained on, [decoded_size, ch, H, W], sorted by class, with its graph."""
        return decode_images(self.images, self.formation, self.space)

    def decoded_targets(self) -> Tensor:
        """Return the labels of :meth:`decoded`, [decoded_size] or [decoded_size, C]."""
        return decode_targets(self.targets, self.formation)

    def use_space(self, space: ColorSpace) -> None:
        """Decode stored pixels by the data's own color space, not one of a state; an `InputError` if it differs."""
        self._check_space(space)
        self.space = None if self.space is None else space

    def get_extra_state(self) -> dict[str, Any]:
        """Return how the set is stored and decodes, as plain values and tensors."""
        return {
            "images": list(self.images.shape),
            "labels": self.label_kind,
            "image_space": self.image_space,
            "factor": self.formation.factor,
            "formation": self.formation.kind,
            "color_space": None if self.space is None else self.space.kind,
            "color_space_tensors": {} if self.space is None else recipe(self.space),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Raise `InputError` if a state being loaded is that of a set which is stored or decodes in another way."""
        ours = self.get_extra_state()
        for name, value in ours.items():
            if name != "color_space_tensors" and state[name] != value:
                raise InputError(
                    f"{name} is {value!r} in the configuration, but {state[name]!r} in the checkpoint; resume with the "
                    "configuration that the run was started with"
                )
        if self.space is not None:
            self._check_space(color_space_from_tensors(state["color_space"], state["color_space_tensors"]))

    def _check_space(self, space: ColorSpace) -> None:
        if self.space is not None and not same_space(self.space, space):
            raise InputError(
                f"the set's {self.space.kind} color space and a {space.kind} one differ; use the data that it was "
                "distilled from"
            )

    def extra_repr(self) -> str:
        """Say what it is, for ``repr``."""
        stored = "as networks see them" if self.space is None else f"as pixels, for {self.space.kind} networks"
        decoding = f", decoded to {self.decoded_size} ({self.formation.kind}, factor {self.formation.factor})"
        images = f"{len(self)} images {tuple(self.images.shape[1:])}, {self.label_kind} labels, stored {stored}"
        return images + decoding * (self.formation.factor > 1)


def decode_images(images: Tensor, formation: Formation, space: ColorSpace | None) -> Tensor:
    """Turn stored images [n, ch, H, W] (pixels, if a space is given) into those that networks are trained on."""
    if space is None:
        return decode(images, formation)
    return space.encode(decode(images, formation, pad=PIXEL_PAD))
