"""Which real images the baseline of random ones is."""

from pathlib import Path

import pytest

from dd_lightning.functional.random import step_generator
from dd_lightning.sets.initial import class_labels, initial_images
from dd_lightning.training.evaluation import evaluate_synthetic_set
from tests import small


@pytest.mark.parametrize("seed", [5, 6])
def test_random_real_images_are_drawn_by_the_runs_seed_from_their_own_stream(
    store: Path, tmp_path: Path, seed: int
) -> None:
    points = small.evaluation(compare_random=True, num_networks=4)
    distilled = small.module(store, seed=seed)
    small.fit(tmp_path, distilled, points, steps=1)

    def accuracies(drawn_by: int, stream: str) -> tuple[float, ...]:
        """Evaluate random real images as the callback does; the networks are those of the run's seed."""
        images = initial_images(
            distilled.problem.real, distilled.storage.ipc, "real", step_generator(drawn_by, 0, stream)
        )
        labels = class_labels(small.CLASSES, distilled.storage.ipc)
        return evaluate_synthetic_set(
            images,
            labels,
            distilled.distillation.student_lr,
            small.data().test,
            distilled.problem.network,
            points.recipe,
            points.num_networks,
            seed=seed,
        ).accuracies

    assert points.random_real is not None
    assert points.random_real.accuracies == accuracies(seed, "random-real")
    others = [(0, "random-real"), (seed + 1, "random-real"), (seed, "initial")]
    assert all(points.random_real.accuracies != accuracies(*other) for other in others)
