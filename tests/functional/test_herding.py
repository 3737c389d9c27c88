"""Herding against a slow loop."""

import pytest
import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.herding import herding


def slow_herding(points: Tensor, count: int) -> list[int]:
    """Choose by the formula: the k-th is argmin_i || mu - (x_i + the sum of those chosen) / k ||."""
    mean, chosen = points.mean(0), list[int]()
    for k in range(1, count + 1):
        distances = {
            i: float((mean - (points[i] + sum(points[j] for j in chosen)) / k).norm())
            for i in range(len(points))
            if i not in chosen
        }
        chosen.append(min(distances, key=lambda i: distances[i]))
    return chosen


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_herding_is_the_formula(count: int, offset: float) -> None:
    points = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + offset
    assert herding(points, count).tolist() == slow_herding(points, count)


def test_all_points_are_chosen_once_and_the_means_approach() -> None:
    points = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    assert sorted(herding(points, 200).tolist()) == list(range(200))
    random = torch.randperm(200, generator=torch.Generator().manual_seed(2))[:20]
    errors = [(points[rows].mean(0) - points.mean(0)).norm() for rows in (herding(points, 20), random)]
    assert errors[0] < 0.1 * errors[1]


def test_equal_points_are_taken_in_their_order() -> None:
    assert herding(torch.ones(3, 2), 3).tolist() == [0, 1, 2]


def test_bad_points_are_refused() -> None:
    points = torch.zeros(3, 2)
    for count in (0, 4):
        with pytest.raises(InputError, match=f"herding count is {count}"):
            herding(points, count)
    with pytest.raises(InputError, match="not finite"):
        herding(points.fill_(torch.nan), 1)
