"""Statistics of a report, against slow loops and numbers worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dd_lightning.cli.report.curves import (
    RESAMPLES,
    Curves,
    common_steps,
    compare,
    cost_at,
    first_reach,
    mean_std,
    ratio,
    threshold_of,
)
from dd_lightning.cli.report.results import spread
from dd_lightning.functional.random import step_generator

NAN = math.nan


def curves(accuracy: list[list[float]], per_step: float = 1.0, every: int = 20) -> Curves:
    """Return curves of the seeds 0, 1, ... that are evaluated every so many steps, each of which costs something."""
    values = np.array(accuracy)
    steps = np.broadcast_to(every * np.arange(values.shape[1], dtype=float), values.shape)
    costs = {"steps": steps, "seconds": steps / 2, "evaluations": steps * per_step}
    return Curves(list(range(len(accuracy))), values, costs)


def slow_first(accuracy: list[float], cost: list[float], threshold: float) -> float:
    for value, spent in zip(accuracy, cost, strict=True):
        if value >= threshold:
            return spent
    return NAN


def slow_mean_curve(rows: list[list[float]]) -> list[float]:
    columns = [[value for value in column if not math.isnan(value)] for column in zip(*rows, strict=True)]
    return [sum(column) / len(column) for column in columns]


def slow_ratio(base: NDArray[Any], other: NDArray[Any], rows: list[int]) -> float:
    """The ratio of steps to 95 % of the curves of some rows, written from its definition."""
    one, two = (slow_mean_curve([part[row].tolist() for row in rows]) for part in (base, other))
    threshold = 0.95 * max(one)
    first = [slow_first(mean, [20.0 * i for i in range(len(mean))], threshold) for mean in (one, two)]
    if first[0] == first[1]:
        return 1.0
    return 0.0 if math.isnan(first[1]) else math.inf if first[1] == 0 else first[0] / first[1]


def test_steps_of_seeds_with_other_intervals_and_of_one_that_was_stopped() -> None:
    assert common_steps([[0, 40, 80, 120], [0, 40], [0, 20, 40, 60, 80, 100, 120]]) == [0, 40, 80, 120]
    assert common_steps([[0, 10], [0, 15]]) == [0, 15]  # the first one ended at 10, which the second one never saw


def test_cost_is_interpolated_from_nothing_and_unknown_after_the_last() -> None:
    found = cost_at([0, 5, 10, 15, 20, 25], [10.0, 20.0], [4.0, 10.0])
    assert found[:-1].tolist() == [0, 2, 4, 7, 10]
    assert math.isnan(found[-1])
    assert np.isnan(cost_at([0, 5], [], [])).all()


def test_mean_and_deviation_are_of_what_is_measured() -> None:
    mean, std = mean_std(np.array([[0.5, 0.7, NAN], [0.7, NAN, NAN], [0.9, 0.8, NAN]]))
    assert mean[:2].tolist() == pytest.approx([0.7, 0.75])
    assert std[:2].tolist() == pytest.approx([math.sqrt(0.08 / 3), 0.05])
    assert np.isnan([mean[2], std[2]]).all()


def test_first_reach_is_the_slow_loop() -> None:
    draws = np.random.default_rng(0)
    accuracy, cost = draws.random((200, 7)), draws.random((200, 7)).cumsum(1)
    accuracy[draws.random((200, 7)) < 0.1] = NAN
    thresholds = draws.random((200, 1)) * 1.2
    found = first_reach(accuracy, cost, thresholds)
    slow = [slow_first(a.tolist(), c.tolist(), t[0]) for a, c, t in zip(accuracy, cost, thresholds, strict=True)]
    assert np.isnan(found).sum() > 10
    assert np.array_equal(found, slow, equal_nan=True)


def test_the_threshold_is_of_the_mean_curve_not_of_the_seeds() -> None:
    # mean curve .2 .6 .5: each seed's own peak is higher
    assert threshold_of(np.array([[0.2, 0.8, 0.3], [0.2, 0.4, 0.7]])).tolist() == pytest.approx([0.95 * 0.6])


def test_raw_seeds_below_five() -> None:
    base = curves([[0.1, 0.5, 0.8, 0.8], [0.1, 0.7, 0.8, 0.8]])  # mean .1 .6 .8 .8; threshold .76 at step 40
    other = curves([[0.1, 0.78, 0.78, 0.8], [0.1, 0.78, 0.7, 0.7]], per_step=3)
    steps, evaluations = compare(base, other, "steps"), compare(base, other, "evaluations")
    assert (steps["base"], steps["other"], steps["ratios"]) == ([40, 40], [20, 20], [2, 2])
    assert (steps["ratio"], steps["interval"], steps["seeds"]) == (2.0, None, [0, 1])
    assert (evaluations["base"], evaluations["other"]) == ([40, 40], [60, 60])
    assert evaluations["ratio"] == pytest.approx(2 / 3)


def test_a_threshold_that_is_not_reached_is_a_value() -> None:
    base, other = curves([[0.1, 0.8], [0.1, 0.8]]), curves([[0.1, 0.7], [0.1, 0.9]])
    found = compare(base, curves([[0.1, 0.7], [0.1, 0.8]]), "steps")
    assert found["other"][1] == 20
    assert math.isnan(found["other"][0])
    assert found["ratios"] == [0, 1]
    assert found["ratio"] == 0  # of the mean curves: .75 is below .76
    assert compare(base, other, "steps")["ratio"] == 1


def test_ratios_at_the_edges() -> None:
    base, other = np.array([60.0, 60.0, 0.0, 40.0, NAN, 0.0]), np.array([20.0, NAN, 0.0, 0.0, 20.0, NAN])
    assert ratio(base, other)[:4].tolist() == [3, 0, 1, math.inf]
    assert ratio(base, other)[4:].tolist() == pytest.approx([NAN, 0], nan_ok=True)


def test_interval_is_the_paired_bootstrap_of_the_slow_loop() -> None:
    draws = np.random.default_rng(1)
    base = np.sort(draws.random((6, 8)), axis=1)
    other = np.sort(draws.random((6, 8)), axis=1) ** 0.7
    found = compare(curves(base.tolist()), curves(other.tolist()), "steps")
    rows = torch.randint(6, (RESAMPLES, 6), generator=step_generator(0, 0, "report/bootstrap")).tolist()
    slow = sorted(slow_ratio(base, other, each) for each in rows)
    assert found["interval"] == pytest.approx([slow[RESAMPLES // 40], slow[-1 - RESAMPLES // 40]])
    assert found["interval"][0] < found["interval"][1]
    assert found["ratio"] == pytest.approx(slow_ratio(base, other, list(range(6))))
    assert found["interval"] == compare(curves(base.tolist()), curves(other.tolist()), "steps")["interval"]


def test_seeds_are_paired() -> None:
    """A seed that is harder for both moves both: the interval has no width, and would have one of unpaired seeds."""
    shift = [0, 1, 2, 3, 4]
    base = curves([[0.1] * (2 + i) + [0.9] * (8 - i) for i in shift])
    found = compare(base, base, "steps")
    assert (found["ratio"], found["interval"]) == (1, [1, 1])


def test_only_seeds_of_both_count() -> None:
    base = curves([[0.1, 0.8]] * 6)
    other = Curves([4, 5, 9], np.array([[0.1, 0.8]] * 3), {"steps": np.array([[0.0, 10.0]] * 3)})
    found = compare(base, other, "steps")
    assert (found["seeds"], found["ratio"], found["interval"]) == ([4, 5], 2, None)
    nothing = Curves([9], other.accuracy[:1], {"steps": other.costs["steps"][:1]})
    assert compare(base, nothing, "steps")["ratio"] is None


def test_unknown_costs_have_no_interval() -> None:
    base = curves([[0.1, 0.8]] * 5)
    unknown = Curves(base.seeds, base.accuracy, {"seconds": np.full((5, 2), NAN)})
    assert compare(unknown, base, "seconds")["interval"] is None


def test_deviations_over_seeds_and_over_networks_are_apart() -> None:
    found = spread([(0.5, 0.7), (0.6, 0.6), (0.8, 0.9, 1.0)])  # means .6 .6 .9
    assert found["mean"] == pytest.approx(0.7)
    assert found["std_seeds"] == pytest.approx(math.sqrt(0.06 / 3))
    assert found["std_networks"] == pytest.approx(math.sqrt((0.01 + 0 + 0.02 / 3) / 3))
    assert (found["seeds"], found["networks"]) == (3, 2)
    alone = spread([(0.5,)])
    assert (alone["mean"], alone["std_seeds"], alone["std_networks"]) == (0.5, None, None)
