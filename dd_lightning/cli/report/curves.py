"""Statistics of accuracy curves: arrays in, numbers out. A row is a seed, a column a step, NaN what is not measured."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dd_lightning.functional.random import step_generator

Array = NDArray[np.float64]

SHARE = 0.95
"""Of the peak of the base's mean curve: where the DynaDistill paper's Figure 2 marks its curves."""
SEEDS = 5
"""The fewest seeds of which an interval says something."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Curves:
    """The curves of runs that differ in their seed.

    Attributes:
        seeds: The seed of each row.
        accuracy: Mean over the networks, in [0, 1], ``[seeds, steps]``.
        costs: What each seed had spent by each step, ``[seeds, steps]``: ``steps``, ``seconds``, ``evaluations``.
    """

    seeds: Sequence[int]
    accuracy: Array
    costs: Mapping[str, Array]


def common_steps(evaluated: Sequence[Collection[int]]) -> list[int]:
    """Return the steps that all seeds have evaluated that got so far.

    Example:
        >>> common_steps([[0, 10, 20, 30], [0, 20]])
        [0, 20, 30]
    """
    steps = sorted({step for each in evaluated for step in each})
    return [step for step in steps if all(step in each for each in evaluated if max(each) >= step)]


def cost_at(steps: Sequence[int], known_steps: Sequence[float], known: Sequence[float]) -> Array:
    """Interpolate what had been spent by each step, from nothing at step 0; NaN after the last known one."""
    if not len(known):
        return np.full(len(steps), np.nan)
    return np.interp(steps, [0, *known_steps], [0, *known], right=np.nan)


def mean_std(values: Array, axis: int = 0) -> tuple[Array, Array]:
    """Return mean and population standard deviation of what is measured; NaN where nothing is."""
    count = np.isfinite(values).sum(axis)
    total, nothing = np.maximum(count, 1), np.where(count > 0, 0.0, np.nan)
    mean = np.nansum(values, axis) / total + nothing
    return mean, np.sqrt(np.nansum((values - np.expand_dims(mean, axis)) ** 2, axis) / total) + nothing


def first_reach(accuracy: Array, cost: Array, threshold: Array | float) -> Array:
    """Return the cost at the first step whose accuracy is at least the threshold; NaN if it is not reached.

    Args:
        accuracy: ``[..., steps]``.
        cost: ``[..., steps]``.
        threshold: A number, or ``[..., 1]``.
    """
    reached = accuracy >= threshold
    first = np.take_along_axis(cost, reached.argmax(-1)[..., None], -1)[..., 0]
    return np.where(reached.any(-1), first, np.nan)


def threshold_of(base: Array) -> Array:
    """Return `SHARE` of the peak of the mean curve, ``[..., 1]``, of accuracies ``[..., seeds, steps]``."""
    peak: Array = np.nanmax(mean_std(base, -2)[0], -1, keepdims=True)
    return SHARE * peak


def ratio(base: Array, other: Array) -> Array:
    """Return how many times less the other one needs: 0 where it gets nowhere; 1 where both begin above the threshold.

    Example:
        >>> ratio(np.array([60.0, 60.0, 0.0, np.nan]), np.array([20.0, np.nan, 0.0, 20.0]))
        array([ 3.,  0.,  1., nan])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(base == other, 1.0, np.where(np.isnan(other), base * 0, base / other))


def compare(base: Curves, other: Curves, axis: str) -> dict[str, Any]:
    """Compare what the base and the other one cost to `SHARE` of the peak of the base's mean curve.

    From `SEEDS` seeds on that both have, there is a 95 % interval by paired bootstrap: both means are taken of the same
    redrawn seeds, and so is the threshold. The draws are the same each time.
    """
    seeds = sorted(set(base.seeds) & set(other.seeds))
    parts: list[Array] = []
    for curves in (base, other):
        rows = [curves.seeds.index(seed) for seed in seeds]
        parts += [curves.accuracy[rows], curves.costs[axis][rows]]
    result: dict[str, Any] = {"seeds": seeds, "base": [], "other": [], "ratios": [], "ratio": None, "interval": None}
    if not seeds:
        return result
    own = [first_reach(parts[i], parts[i + 1], threshold_of(base.accuracy)) for i in (0, 2)]
    result |= {"base": own[0].tolist(), "other": own[1].tolist(), "ratios": ratio(*own).tolist()}
    result["ratio"] = _ratios(parts, np.arange(len(seeds))[None])[0]
    if len(seeds) >= SEEDS:
        generator = step_generator(0, 0, "report/bootstrap")
        drawn = torch.randint(len(seeds), (RESAMPLES, len(seeds)), generator=generator).numpy()
        ratios, tail = np.sort(_ratios(parts, drawn)), RESAMPLES // 40
        result["interval"] = None if np.isnan(ratios).any() else [ratios[tail], ratios[-1 - tail]]
    return result


def _ratios(parts: Sequence[Array], rows: NDArray[np.int64]) -> Array:
    """Return the ratio of the mean curves of each selection of rows ``[selections, seeds]``."""
    accuracy, cost, other_accuracy, other_cost = (mean_std(part[rows], 1)[0] for part in parts)
    threshold = threshold_of(parts[0][rows])
    return ratio(first_reach(accuracy, cost, threshold), first_reach(other_accuracy, other_cost, threshold))
