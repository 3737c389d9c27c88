"""DD-Ranking's scores, from its formulas written out."""

import math

import pytest

from dd_lightning.training.scores import augmentation_robust_score, label_robust_score


def normalized(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


def test_label_robust_score() -> None:
    # CIFAR-10, 10 images per class: the full set, MTT's with hard labels, random images
    assert label_robust_score(0.848, 0.653, 0.653, 0.31) == pytest.approx(0.3016, abs=5e-5)
    assert label_robust_score(0.8, 0.5, 0.6, 0.3) == pytest.approx(normalized(0.5 * 0.3 - 0.5 * 0.3))
    assert label_robust_score(0.8, 0.5, 0.6, 0.3, weight=0.9) == pytest.approx(normalized(0.9 * 0.3 - 0.1 * 0.3))
    assert label_robust_score(0.0, 1.0, 1.0, 0.0) == pytest.approx(1)
    assert label_robust_score(1.0, 0.0, 0.0, 1.0) == pytest.approx(0)


def test_augmentation_robust_score() -> None:
    assert augmentation_robust_score(0.6, 0.3, 0.5, 0.4) == pytest.approx(normalized(0.2))
    assert augmentation_robust_score(0.6, 0.3, 0.5, 0.4, weight=1) == pytest.approx(normalized(0.3))
    assert augmentation_robust_score(0.3, 0.3, 0.3, 0.3) == pytest.approx(normalized(0))
