"""Soft labels as DATM takes them: the mean logits of the experts that are right, or of all where none is."""

from pathlib import Path

import torch
from torch import Tensor

from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import teacher_logits
from dd_lightning.training.expert_store import ExpertStore
from tests import small


def experts_logits(store: Path, images: Tensor) -> Tensor:
    """Return the logits [E, n, C] of every expert at its last epoch."""
    network, experts = FunctionalNetwork(small.NETWORK, small.SHAPE, small.CLASSES), ExpertStore(store)
    thetas = [experts.rows(i, [small.EPOCHS])[0] for i in range(small.EXPERTS)]
    return torch.stack([network(theta, images) for theta in thetas]).detach()


def slow_teacher(logits: Tensor, labels: Tensor) -> Tensor:
    """Average image by image and expert by expert."""
    rows = []
    for image, label in enumerate(labels.tolist()):
        each = [logits[expert, image] for expert in range(len(logits))]
        right = [own for own in each if int(own.argmax()) == label]
        rows.append(torch.stack(right or each).mean(0))
    return torch.stack(rows)


def test_soft_labels_are_of_the_experts_that_are_right_or_of_all(store: Path, tmp_path: Path) -> None:
    distilled = small.module(store, labels="soft")
    small.fit(tmp_path, distilled, steps=1)
    images, labels = small.data().train.images, small.data().train.labels
    logits = experts_logits(store, images)
    votes = torch.stack([(logits.argmax(2) == label).sum(0) for label in range(small.CLASSES)])  # [C, n]
    wrong = votes.argmin(0)  # of each image, the class that the fewest experts see in it
    for asked in (labels, wrong):
        found = teacher_logits(distilled.problem.network, distilled.pool.networks(), images, asked)
        torch.testing.assert_close(found, slow_teacher(logits, asked), rtol=1e-5, atol=1e-6)

    right = votes.gather(0, wrong[None])[0]
    assert int((right == 0).sum()) > 10  # images that no expert gets right
    right = votes.gather(0, labels[None])[0]
    assert int(((right > 0) & (right < small.EXPERTS)).sum()) > 3  # images over which the experts disagree
