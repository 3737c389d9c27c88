"""Coresets: a few real images of every class, to compare distilled ones with."""

from typing import Literal

import torch
from torch import Tensor

from dd_lightning.functional.herding import herding
from dd_lightning.functional.random import step_generator
from dd_lightning.sets.class_batches import class_representatives
from dd_lightning.sets.real import RealSet

Coreset = Literal["random", "kmeans", "herding"]


def coreset(real: RealSet, count: int, kind: Coreset, seed: int, draw: int = 0) -> Tensor:
    """Return the indices of images of every class, class by class: ``[num_classes * count]``, fewer of a smaller class.

    Both clustering and herding look at pixels, in the color space that networks see: no network has a say, and all
    architectures get the same images.

    Args:
        real: The training data.
        count: Images per class.
        kind: ``random``; ``kmeans``, the images nearest to the centroids of k-means in each class; or ``herding``,
            the images whose mean follows that of the class
            (:func:`~dd_lightning.functional.herding.herding`), which draws nothing.
        seed: Seed of the draw.
        draw: Number of the draw.

    Raises:
        InputError: If ``count`` is below 1.
    """
    if kind == "random":  # those that a run with this seed is compared with
        return real.sample_per_class(count, step_generator(seed, draw, "random-real"))
    if kind == "kmeans":
        generator = step_generator(seed, draw, "kmeans-coreset")
        return torch.cat(class_representatives(real, count, lambda images: images.flatten(1), generator))
    classes = [real.class_indices(label) for label in range(real.num_classes)]
    return torch.cat([own[herding(real.images[own].flatten(1), min(count, len(own)))] for own in classes])
