"""Batches of every class, shuffled or representative."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.kmeans import kmeans, representatives
from dd_lightning.functional.random import StepContext
from dd_lightning.sets import class_batches as sampling
from dd_lightning.sets.class_batches import RepresentativeBatches, class_representatives, shuffled_class_batches
from dd_lightning.sets.real import RealSet

COUNTS = (7, 12, 9)


def real_set() -> RealSet:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return RealSet(torch.randn(len(labels), 1, 3, 2, generator=generator, dtype=torch.float64), labels, 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_lists(batches: list[Tensor]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


class Features:
    """A fixed map of images to features, which counts the images that it is given."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.images: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.images.append(len(images))
        flat = images.flatten(1)
        return torch.cat([self.scale * flat[:, :2], flat[:, 2:].square()], dim=1)


def refuse(images: Tensor) -> Tensor:
    raise AssertionError(f"features of {len(images)} images were asked for")


# Shuffled


def test_shuffled_batches_go_through_each_class_in_epochs_of_its_own() -> None:
    real, size = real_set(), 3
    steps = [shuffled_class_batches(real, size, StepContext(0, step)) for step in range(24)]
    for label, count in enumerate(COUNTS):
        own = set(real.class_indices(label).tolist())
        whole = count // size
        taken = [step[label].tolist() for step in steps]
        assert all(len(rows) == size and set(rows) <= own for rows in taken)
        epochs = [tuple(row for rows in taken[at : at + whole] for row in rows) for at in range(0, 24, whole)]
        assert all(len(set(epoch)) == whole * size for epoch in epochs)  # nothing twice, all but the remainder
        assert len(set(epochs)) == len(epochs)  # each epoch is shuffled anew
        assert {row for epoch in epochs for row in epoch} == own  # what is left over differs


def test_shuffled_batches_are_a_function_of_seed_step_and_rank() -> None:
    real = real_set()

    def drawn(*where: int) -> list[list[int]]:
        return as_lists(shuffled_class_batches(real, 3, StepContext(*where)))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert drawn(0, 5) == drawn(0, 5)
    assert torch.equal(torch.get_rng_state(), state)
    others = [drawn(0, 6), drawn(1, 5), drawn(0, 5, 1)]
    assert all(drawn(0, 5) != other for other in others)


def test_a_batch_of_a_whole_class() -> None:
    every = real_set()
    kept = torch.cat([every.class_indices(label)[:7] for label in range(3)])
    real = RealSet(every.images[kept], every.labels[kept], 3)
    for step in range(3):
        batches = shuffled_class_batches(real, 7, StepContext(0, step))
        assert [sorted(b.tolist()) for b in batches] == [real.class_indices(label).tolist() for label in range(3)]


def uneven() -> RealSet:
    """Five, three and one image of a class."""
    every = real_set()
    kept = torch.cat([every.class_indices(label)[:count] for label, count in enumerate((5, 3, 1))])
    return RealSet(every.images[kept], every.labels[kept], 3)


def test_a_small_class_gives_all_it_has_and_limits_no_other() -> None:
    real = uneven()
    for step in range(4):
        batches = shuffled_class_batches(real, 4, StepContext(0, step))
        assert [len(set(rows.tolist())) for rows in batches] == [4, 3, 1]
        assert [real.labels[rows].unique().tolist() for rows in batches] == [[0], [1], [2]]


# Representative


@pytest.mark.parametrize(("per_cluster", "sizes"), [(1, [4, 3, 1]), (2, [4, 2, 1])])
def test_small_classes_have_fewer_clusters(per_cluster: int, sizes: list[int]) -> None:
    real, batches = uneven(), RepresentativeBatches(4, 5, per_cluster)
    found = batches.batches(real, Features(), StepContext(0, 0))
    assert [len(set(rows.tolist())) for rows in found] == sizes
    assert [real.labels[rows].unique().tolist() for rows in found] == [[0], [1], [2]]
    restored = RepresentativeBatches(4, 5, per_cluster)
    restored.load_state_dict(batches.state_dict())
    assert as_lists(restored.batches(real, refuse, StepContext(0, 1))) == as_lists(found)


@pytest.mark.parametrize("per_cluster", [1, 2])
def test_representatives_are_those_of_kmeans_on_the_features_of_each_class(per_cluster: int) -> None:
    real, features = real_set(), Features()
    found = class_representatives(real, 4, features, seeded(3), per_cluster)
    assert features.images == list(COUNTS)
    generator = seeded(3)  # one for all classes, in their order
    for label, chosen in enumerate(found):
        rows = real.class_indices(label)
        points = Features()(real.images[rows])
        expected = rows[representatives(points, 4 // per_cluster, generator, per_cluster)]
        assert chosen.tolist() == expected.tolist()
        assert len(set(chosen.tolist())) == 4
        assert real.labels[chosen].tolist() == [label] * 4


def test_each_centroid_has_its_nearest_image() -> None:
    real, features = real_set(), Features()
    found, generator = class_representatives(real, 3, features, seeded(4)), seeded(4)
    for label, chosen in enumerate(found):
        rows = real.class_indices(label)
        points = features(real.images[rows])
        points -= points.mean(0)
        clusters = kmeans(points, 3, generator)
        for cluster, row in enumerate(chosen.tolist()):
            members = [i for i in range(len(rows)) if int(clusters.assignments[i]) == cluster]
            nearest = min(members, key=lambda i: float((points[i] - clusters.centroids[cluster]).square().sum()))
            assert row == int(rows[nearest])


def test_as_many_representatives_as_images_are_all_of_them() -> None:
    real = real_set()
    chosen = class_representatives(real, 7, Features(), seeded(0))[0]
    assert sorted(chosen.tolist()) == real.class_indices(0).tolist()


def test_features_are_computed_in_parts_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    real, grad_modes = real_set(), []
    whole = class_representatives(real, 4, Features(), seeded(3))

    class Watched(Features):
        def __call__(self, images: Tensor) -> Tensor:
            grad_modes.append(torch.is_grad_enabled())
            return super().__call__(images)

    monkeypatch.setattr(sampling, "_FEATURE_BATCH", 5)
    features = Watched()
    assert as_lists(class_representatives(real, 4, features, seeded(3))) == as_lists(whole)
    assert features.images == [5, 2, 5, 5, 2, 5, 4]
    assert not any(grad_modes)


def test_representatives_are_chosen_anew_every_few_steps() -> None:
    real, batches, features = real_set(), RepresentativeBatches(4, interval=3, per_cluster=1), Features()
    seen = []
    for step in range(7):
        features.images.clear()
        features.scale = step + 1.0  # the network moves on
        seen.append(as_lists(batches.batches(real, features, StepContext(0, step))))
        assert features.images == (list(COUNTS) if step % 3 == 0 else [])
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert seen[3] == seen[4] == seen[5] != seen[6]
    for step in (0, 3, 6):
        generator = StepContext(0, step).generator("representatives")
        assert seen[step] == as_lists(class_representatives(real, 4, Features(step + 1.0), generator))


def test_the_first_choice_need_not_wait() -> None:
    batches, features = RepresentativeBatches(4, interval=10, per_cluster=2), Features()
    chosen = as_lists(batches.batches(real_set(), features, StepContext(0, 4)))
    generator = StepContext(0, 4).generator("representatives")
    assert chosen == as_lists(class_representatives(real_set(), 4, Features(), generator, per_cluster=2))


def test_restored_batches_go_on_without_features_until_the_next_choice() -> None:
    real, first = real_set(), RepresentativeBatches(4, interval=4, per_cluster=1)
    chosen = as_lists(first.batches(real, Features(), StepContext(0, 4)))
    restored = RepresentativeBatches(4, interval=4, per_cluster=1)
    restored.load_state_dict(first.state_dict())
    for step in (5, 6, 7):
        assert as_lists(restored.batches(real, refuse, StepContext(0, step))) == chosen
    with pytest.raises(AssertionError, match="features of 7 images"):
        restored.batches(real, refuse, StepContext(0, 8))
    expected = as_lists(first.batches(real, Features(2.0), StepContext(0, 8)))
    assert as_lists(restored.batches(real, Features(2.0), StepContext(0, 8))) == expected
    assert as_lists(restored.state_dict()["chosen"]) == expected
    restored.load_state_dict({"chosen": torch.tensor(chosen)})  # as an earlier version wrote it
    assert as_lists(restored.batches(real, refuse, StepContext(0, 5))) == chosen


def test_state_before_the_first_choice() -> None:
    restored = RepresentativeBatches(4, interval=4, per_cluster=1)
    restored.load_state_dict(RepresentativeBatches(4, interval=4, per_cluster=1).state_dict())
    features = Features()
    restored.batches(real_set(), features, StepContext(0, 2))
    assert features.images == list(COUNTS)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: RepresentativeBatches(4, 1, 3), "^per_cluster is 3; .* divide batch_real, 4$"),
    ],
)
def test_bad_input(act: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        act()
