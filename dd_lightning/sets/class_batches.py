"""Which real images a step matches: a batch of each class, shuffled or representative."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dd_lightning.execution.process import Process, SingleProcess
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.kmeans import representatives
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.sets.real import RealSet

Features = Callable[[Tensor], Tensor]
"""images [n, ch, H, W] -> features [n, F]."""

_ALONE = SingleProcess()
_FEATURE_BATCH = 1000  # images per forward pass when features are computed: bounds memory, leaves the result alone


def shuffled_class_batches(real: RealSet, size: int, context: StepContext) -> list[Tensor]:
    """Return the indices of a batch of every class, each [size] or all of a smaller class: a function of the step.

    A class is shuffled, cut into whole batches, and shuffled anew when they are used up, as in IDC; an epoch's
    remainder is dropped.
    """
    batches = []
    for label, count in enumerate(real.class_counts):
        epoch, position = divmod(context.step, max(count // size, 1))
        generator = step_generator(context.seed, epoch, f"real/{label}", context.rank)
        order = torch.randperm(count, generator=generator)[position * size : (position + 1) * size]
        batches.append(real.class_indices(label, order))
    return batches


def class_representatives(
    real: RealSet,
    count: int,
    features: Features,
    generator: torch.Generator,
    per_cluster: int = 1,
    process: Process = _ALONE,
) -> list[Tensor]:
    """Return the indices [count] of images of every class, the nearest to the centroids of k-means (DREAM).

    A smaller class gives as many as whole clusters of it have.

    NOTE: The reference computes features of pixels that are not normalized, although its networks are trained on
    normalized ones. Here the network gets what it is trained on.

    Args:
        real: The training data.
        count: Images per class; clusters times ``per_cluster``.
        features: The space in which to cluster.
        generator: Draws the start.
        per_cluster: Images taken from each cluster.
        process: One of several that share the classes.
    """
    chosen = []
    for label in range(real.num_classes):
        own = real.class_indices(label)
        each = min(per_cluster, len(own))
        clusters = min(count, len(own)) // each
        if label % process.size != process.rank:
            torch.randperm(len(own), generator=generator)  # k-means draws no more: the next class draws the same
            chosen.append(own.new_zeros(clusters * each))
            continue
        with torch.no_grad():
            points = torch.cat([features(real.images[part]) for part in own.split(_FEATURE_BATCH)])
        chosen.append(own[representatives(points, clusters, generator, each)])
    return list(process.sum(torch.cat(chosen)).split([len(rows) for rows in chosen]))


class RepresentativeBatches:
    """DREAM's choice of real images: representatives of every class, chosen anew every few steps.

    The choice is part of a checkpoint, since the network it was made with has moved on.

    Args:
        size: Images per class.
        interval: Steps between two choices.
        per_cluster: Images taken from each cluster.

    Raises:
        InputError: If a number is below 1, or ``per_cluster`` does not divide ``size``.
    """

    def __init__(self, size: int, interval: int, per_cluster: int) -> None:
        check_range("interval", interval, low=1, hint="steps between two choices of representatives")
        check_range("per_cluster", per_cluster, low=1)
        if size % per_cluster:
            raise InputError(f"per_cluster is {per_cluster}; it must divide batch_real, {size}")
        self.size, self.interval, self.per_cluster = size, interval, per_cluster
        self._chosen: list[Tensor] | None = None

    def batches(
        self, real: RealSet, features: Features, context: StepContext, process: Process = _ALONE
    ) -> list[Tensor]:
        """Return each class's indices [size], or fewer, for a step; features are called when it is time to choose."""
        if self._chosen is None or context.step % self.interval == 0:
            generator = context.generator("representatives")
            self._chosen = class_representatives(real, self.size, features, generator, self.per_cluster, process)
        return [rows.to(real.images.device) for rows in self._chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return the present choice."""
        return {"chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._chosen = None if state["chosen"] is None else list(state["chosen"])
