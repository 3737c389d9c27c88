"""Which real images the baseline of random ones is."""

from pathlib import Path

import pytest

from dd_lightning.functional.random import step_generator
from dd_lightning.sets.initial import class_labels, initial_images
from dd_lightning.training.evaluation import Evaluation
from tests import small


@pytest.mark.parametrize("seed", [5, 6])
def test_random_real_images_are_drawn_by_the_runs_seed_from_their_own_stream(
    store: Path, tmp_path: Path, seed: int
) -> None:
    points = small.evaluation(compare_random=True, num_networks=2)
    distilled = small.module(store, seed=seed)
    small.fit(tmp_path, distilled, points, steps=1)

    def accuracies(drawn_by: int, stream: str) -> tuple[float, ...]:
        """Evaluate each draw as the callback does, by the network of its number: those of the run's seed."""
        labels, lr = class_labels(small.CLASSES, distilled.storage.ipc), distilled.distillation.student_lr
        one = Evaluation(distilled.problem.network, small.data().test, points.recipe)
        draws = [
            initial_images(distilled.problem.real, distilled.storage.ipc, "real", step_generator(drawn_by, k, stream))
            for k in range(5)
        ]
        return tuple(one(images, labels, lr, 1, seed, first=k).accuracies[0] for k, images in enumerate(draws))

    assert points.random_real is not None
    assert len(points.last().accuracies) == 2
    assert points.random_real.accuracies == accuracies(seed, "random-real")
    others = [(0, "random-real"), (seed + 1, "random-real"), (seed, "initial")]
    assert all(points.random_real.accuracies != accuracies(*other) for other in others)
