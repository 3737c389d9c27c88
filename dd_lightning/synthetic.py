"""The synthetic set: what is learned."""

from typing import Literal

import torch
from torch import Tensor, nn

from dd_lightning.functional.errors import InputError
from dd_lightning.real import RealSet

Initialisation = Literal["real", "noise"]
LabelKind = Literal["hard", "soft"]


class SyntheticSet(nn.Module):
    """Learnable images, their labels, and the learning rate of the student that trains on them.

    Images are sorted by class, ``ipc`` of each, and live in the colour space of the real set, unclamped.

    Args:
        images: [C*ipc, ch, H, W].
        targets: Class indices [C*ipc], or label logits [C*ipc, C].
        student_lr: Initial learning rate of the student.
    """

    targets: Tensor

    def __init__(self, images: Tensor, targets: Tensor, student_lr: float) -> None:
        super().__init__()
        self.images = nn.Parameter(images.clone())
        if targets.is_floating_point():
            self.targets = nn.Parameter(targets.clone())
        else:
            self.register_buffer("targets", targets.clone())
        self.student_lr = nn.Parameter(torch.tensor(float(student_lr)))

    @property
    def label_kind(self) -> LabelKind:
        """``"soft"`` when the targets are logits."""
        return "soft" if self.targets.is_floating_point() else "hard"

    def __len__(self) -> int:
        return len(self.images)


def class_labels(num_classes: int, ipc: int) -> Tensor:
    """Return the hard labels of a class-sorted set, [C*ipc].

    Example:
        >>> class_labels(3, 2).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    return torch.arange(num_classes).repeat_interleave(ipc)


def initial_images(real: RealSet, ipc: int, init: Initialisation, generator: torch.Generator) -> Tensor:
    """Draw S_0 from the paper's P_S, [C*ipc, ch, H, W], sorted by class.

    Args:
        real: The training data.
        ipc: Images per class.
        init: ``"real"``, ``ipc`` random real images of each class without replacement (the MTT reference's default);
            or ``"noise"``, standard normal numbers.
        generator: Source of the draw.

    Raises:
        InputError: If ``ipc`` is below 1 or above the size of the smallest class.
    """
    if ipc < 1:
        raise InputError(f"ipc is {ipc}; it must be at least 1 image per class")
    indices = real.sample_per_class(ipc, generator)
    if init == "real":
        return real.images[indices.to(real.images.device)].clone()
    shape = (real.num_classes * ipc, *real.image_shape)
    return torch.randn(shape, generator=generator, device=generator.device).to(real.images.device)
