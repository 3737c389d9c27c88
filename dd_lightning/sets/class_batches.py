"""Which real images a step matches: batches of every class, shuffled or representative."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.kmeans import representatives, representatives_of_groups
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.sets.real import RealSet

Features = Callable[[Tensor], Tensor]
"""images [n, ch, H, W] -> features [n, F]."""

_FEATURE_BATCH = 1000
"""Images per forward pass when features are computed: memory, not the result, depends on it."""

_HELD_FEATURES = 2**29
"""Bytes of features from which no more classes are clustered together."""


def shuffled_class_batches(real: RealSet, size: int, context: StepContext) -> list[Tensor]:
    """Return one batch of every class, each [size], going through every class in epochs.

    A class is shuffled, cut into whole batches, and shuffled anew when they are used up, as in IDC; what is left over
    at the end of an epoch is dropped. The batches of a step are a function of the step alone.

    Args:
        real: The training data.
        size: Images per class.
        context: Where the run is.
    """
    batches = []
    for label, count in enumerate(real.class_counts):
        epoch, position = divmod(context.step, count // size)
        generator = step_generator(context.seed, epoch, f"real/{label}", context.rank)
        order = torch.randperm(count, generator=generator)[position * size : (position + 1) * size]
        batches.append(real.class_indices(label, order))
    return batches


def class_representatives(
    real: RealSet, count: int, features: Features, generator: torch.Generator, per_cluster: int = 1
) -> list[Tensor]:
    """Return ``count`` images of every class, the nearest to the centroids of k-means in feature space (DREAM).

    NOTE: The reference computes features of pixels that are not normalized, although its networks are trained on
    normalized ones. Here they are what the network is made for.

    Args:
        real: The training data.
        count: Images per class; clusters times ``per_cluster``.
        features: The space in which to cluster.
        generator: Source of the starting points.
        per_cluster: Images that each cluster gives.

    Returns:
        Indices [count] for each class.

    Raises:
        InputError: If a class has fewer images than ``count``.
    """
    rows = [real.class_indices(label) for label in range(real.num_classes)]
    for label, own in enumerate(rows):
        if count > len(own):
            raise InputError(
                f"k-means is asked for {count} representatives of class {label}, which has {len(own)} images; lower "
                "ipc, factor or batch_real"
            )

    def points(own: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([features(real.images[part]) for part in own.split(_FEATURE_BATCH)])

    clusters = count // per_cluster
    if not _clustered_together(real.images.device):
        chosen = [representatives(points(own), clusters, generator, per_cluster) for own in rows]
    else:
        chosen, held = list[Tensor](), list[Tensor]()
        for own in rows:
            held.append(points(own))
            if own is rows[-1] or sum(group.nbytes for group in held) >= _HELD_FEATURES:
                chosen += representatives_of_groups(held, clusters, generator, per_cluster)
                held = []
    return [own[indices] for own, indices in zip(rows, chosen, strict=True)]


def _clustered_together(device: torch.device) -> bool:
    """Tell whether the classes are clustered all at once; on a host, one class at a time keeps all cores busy."""
    return device.type != "cpu"


class RepresentativeBatches:
    """DREAM's choice of real images: representatives of every class, chosen anew every few steps.

    In between, the same images are matched, each time under another augmentation. The choice is part of a checkpoint,
    since the network that it was made with has moved on.

    Args:
        size: Images per class.
        interval: Steps between two choices.
        per_cluster: Images that each cluster gives.

    Raises:
        InputError: If a number is below 1, or ``per_cluster`` does not divide ``size``.
    """

    def __init__(self, size: int, interval: int, per_cluster: int) -> None:
        if interval < 1:
            raise InputError(f"interval is {interval}; representatives are chosen every n steps, with n at least 1")
        if per_cluster < 1 or size % per_cluster:
            raise InputError(f"per_cluster is {per_cluster}; it must be at least 1 and divide batch_real, {size}")
        self.size = size
        self.interval = interval
        self.per_cluster = per_cluster
        self._chosen: Tensor | None = None

    def batches(self, real: RealSet, features: Features, context: StepContext) -> list[Tensor]:
        """Return the indices [size] of every class at a step.

        Args:
            real: The training data.
            features: Of the network to choose with, if it is time to choose.
            context: Where the run is.
        """
        if self._chosen is None or context.step % self.interval == 0:
            generator = context.generator("representatives")
            self._chosen = torch.stack(class_representatives(real, self.size, features, generator, self.per_cluster))
        return list(self._chosen.to(real.images.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the present choice."""
        return {"chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._chosen = state["chosen"]
