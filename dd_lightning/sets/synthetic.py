"""The synthetic set: what is learned."""

from typing import Literal

import torch
from torch import Tensor, nn

from dd_lightning.functional.formation import Formation, decode, decode_targets
from dd_lightning.sets.color_spaces import ColorSpace

LabelKind = Literal["hard", "soft"]

PIXEL_PAD = 0.5
"""Gray that fills a tile where the factor does not divide a stored image of pixels (IDC)."""


class SyntheticSet(nn.Module):
    """Learnable images, their labels, and the learning rate of the student that trains on them.

    Stored images are sorted by class, ``ipc`` of each, and unclamped. Networks are trained on the *decoded* set: every
    stored image cut into tiles that are enlarged (multi-formation), in the color space of the real set. Without
    multi-formation, and stored in that color space, the stored images are the decoded ones.

    Args:
        images: [C*ipc, ch, H, W].
        targets: Class indices [C*ipc], or label logits [C*ipc, C].
        student_lr: Initial learning rate of the student.
        formation: How a stored image decodes.
        space: If given, the images are pixels, and this is the color space that they are brought to for networks;
            if None they live in that space.
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
        self.formation = formation
        self.space = space

    @property
    def label_kind(self) -> LabelKind:
        """``"soft"`` when the targets are logits."""
        return "soft" if self.targets.is_floating_point() else "hard"

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


def decode_images(images: Tensor, formation: Formation, space: ColorSpace | None) -> Tensor:
    """Turn stored images [n, ch, H, W] into those that networks are trained on.

    Args:
        images: Pixels, if ``space`` is given; else in the networks' color space.
        formation: How a stored image decodes.
        space: The networks' color space.
    """
    if space is None:
        return decode(images, formation)
    return space.encode(decode(images, formation, pad=PIXEL_PAD))
