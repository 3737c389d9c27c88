"""The synthetic set: what is learned."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from dd_lightning.colors import ColorSpace
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation, decode, decode_targets, pack
from dd_lightning.real import RealSet
from dd_lightning.sampling import Features, class_representatives

Initialisation = Literal["real", "kmeans", "noise"]
LabelKind = Literal["hard", "soft"]

PIXEL_PAD = 0.5
"""Grey that fills a tile where the factor does not divide a stored image of pixels (IDC)."""


class SyntheticSet(nn.Module):
    """Learnable images, their labels, and the learning rate of the student that trains on them.

    Stored images are sorted by class, ``ipc`` of each, and unclamped. Networks are trained on the *decoded* set: every
    stored image cut into tiles that are enlarged (multi-formation), in the colour space of the real set. Without
    multi-formation, and stored in that colour space, the stored images are the decoded ones.

    Args:
        images: [C*ipc, ch, H, W].
        targets: Class indices [C*ipc], or label logits [C*ipc, C].
        student_lr: Initial learning rate of the student.
        formation: How a stored image decodes.
        space: If given, the images are pixels, and this is the colour space that they are brought to for networks;
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
        images: Pixels, if ``space`` is given; else in the networks' colour space.
        formation: How a stored image decodes.
        space: The networks' colour space.
    """
    if space is None:
        return decode(images, formation)
    return space.encode(decode(images, formation, pad=PIXEL_PAD))


def class_labels(num_classes: int, ipc: int) -> Tensor:
    """Return the hard labels of a class-sorted set, [C*ipc].

    Example:
        >>> class_labels(3, 2).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    return torch.arange(num_classes).repeat_interleave(ipc)


def check_initial(real: RealSet, ipc: int, init: Initialisation, formation: Formation) -> None:
    """Check that images can be cut as the formation says, and that there are real ones enough for S_0.

    Raises:
        InputError: If ``ipc`` is below 1, the factor exceeds the image, or the smallest class has too few images.
    """
    if ipc < 1:
        raise InputError(f"ipc is {ipc}; it must be at least 1 image per class")
    formation.check_size(*real.image_shape[-2:])
    tiles, smallest = _tiles(ipc, init, formation), min(real.class_counts)
    if tiles > smallest:
        what = f"ipc {ipc} with factor {formation.factor} starts from {tiles} real images per class"
        raise InputError(
            f"{what}, but class {real.class_counts.index(smallest)}, the smallest, has {smallest}; "
            "lower ipc or factor, or set init: noise"
        )


def initial_images(
    real: RealSet,
    ipc: int,
    init: Initialisation,
    generator: torch.Generator,
    formation: Formation = Formation(),  # noqa: B008  (frozen)
    features: Callable[[], Features] | None = None,
) -> Tensor:
    """Draw S_0 from the paper's P_S, [C*ipc, ch, H, W], sorted by class, in the real set's colour space.

    NOTE: IDC starts from the first images of each class in the order of the files; here they are drawn.

    Args:
        real: The training data.
        ipc: Images per class.
        init: ``"real"``, random real images of each class without replacement (the MTT reference's default);
            ``"kmeans"``, the real images nearest to the centroids of k-means (DREAM's); or ``"noise"``, standard normal
            numbers. With a factor f, f^2 real images are shrunk to the tiles of each image.
        generator: Source of the draw.
        formation: How images decode.
        features: For ``"kmeans"``: gives the features to cluster by.

    Raises:
        InputError: If ``ipc`` is below 1, the factor exceeds the image, or the smallest class has too few images.
    """
    check_initial(real, ipc, init, formation)
    if init == "noise":
        shape = (real.num_classes * ipc, *real.image_shape)
        return torch.randn(shape, generator=generator, device=generator.device).to(real.images.device)
    tiles = _tiles(ipc, init, formation)
    if init == "real" or features is None:
        indices = real.sample_per_class(tiles, generator).to(real.images.device)
    else:
        indices = torch.cat(class_representatives(real, tiles, features(), generator))
    return pack(real.images[indices], formation)


def _tiles(ipc: int, init: Initialisation, formation: Formation) -> int:
    return 1 if init == "noise" else ipc * formation.factor**2
