"""S_0: the synthetic set that distillation starts from."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.formation import Formation, pack
from dd_lightning.sets.class_batches import Features, class_representatives
from dd_lightning.sets.real import RealSet

Initialization = Literal["real", "kmeans", "noise"]


def class_labels(num_classes: int, ipc: int) -> Tensor:
    """Return the hard labels of a class-sorted set, [C*ipc]."""
    return torch.arange(num_classes).repeat_interleave(ipc)


def check_initial(real: RealSet, ipc: int, init: Initialization, formation: Formation) -> None:
    """Raise `InputError` if ipc is below 1, the factor exceeds the image, or the smallest class has too few images."""
    check_range("ipc", ipc, 1)
    formation.check_size(*real.image_shape[-2:])
    tiles, smallest = _tiles(ipc, init, formation), min(real.class_counts)
    if tiles > smallest:
        raise InputError(
            f"ipc {ipc} with factor {formation.factor} starts from {tiles} real images per class, but class "
            f"{real.class_counts.index(smallest)}, the smallest, has {smallest}; lower ipc or factor, or set "
            "init: noise"
        )


def initial_images(
    real: RealSet,
    ipc: int,
    init: Initialization,
    generator: torch.Generator,
    formation: Formation = Formation(),  # noqa: B008  (frozen)
    features: Callable[[], Features] | None = None,
) -> Tensor:
    """Draw S_0 from the paper's P_S, [C*ipc, ch, H, W], sorted by class, in the real set's color space.

    NOTE: IDC starts from the first images of each class in the order of the files; here they are drawn.

    Args:
        real: The training data.
        ipc: Images per class.
        init: ``real``, random real images of each class without replacement (the MTT reference's default); ``kmeans``,
            the real images nearest to the centroids of k-means (DREAM's); or ``noise``, standard normal numbers.
        generator: Source of the draw.
        formation: How images decode; with a factor f, f^2 real images are shrunk to the tiles of each image.
        features: For ``kmeans``: returns the features to cluster by.

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


def _tiles(ipc: int, init: Initialization, formation: Formation) -> int:
    return 1 if init == "noise" else ipc * formation.factor**2
