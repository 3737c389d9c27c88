"""Coresets of a real set whose classes have different sizes."""

import pytest
import torch

from dd_lightning.functional.herding import herding
from dd_lightning.functional.kmeans import representatives
from dd_lightning.functional.random import step_generator
from dd_lightning.sets.coresets import Coreset, coreset
from tests.sets.test_class_batches import COUNTS, real_set

KINDS: list[Coreset] = ["random", "kmeans", "herding"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_gives_as_many_images_as_it_has(kind: Coreset) -> None:
    real = real_set()
    for count in (1, 4, 8, 20):
        rows = coreset(real, count, kind, seed=3)
        assert len(rows.unique()) == len(rows)
        assert real.labels[rows].bincount().tolist() == [min(count, own) for own in COUNTS]
        assert real.labels[rows].tolist() == sorted(real.labels[rows].tolist())


def test_random_images_depend_on_seed_and_draw() -> None:
    real = real_set()
    draws = [coreset(real, 4, "random", *each) for each in ((3, 0), (3, 1), (4, 0), (3, 0))]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], real.sample_per_class(4, step_generator(3, 1, "random-real")))


def test_the_others_look_at_pixels_class_by_class() -> None:
    real, generator = real_set(), step_generator(3, 0, "kmeans-coreset")
    points = [(own := real.class_indices(label), real.images[own].flatten(1)) for label in range(3)]
    means = torch.cat([own[representatives(each, 4, generator)] for own, each in points])
    assert torch.equal(coreset(real, 4, "kmeans", seed=3), means)
    herds = torch.cat([own[herding(each, 4)] for own, each in points])
    assert torch.equal(coreset(real, 4, "herding", seed=3), herds)
    assert torch.equal(coreset(real, 4, "herding", seed=4), herds)
