"""Herding: points whose mean follows the mean of all of them (Welling, ICML 2009; Rebuffi et al., 2017)."""

import math

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range


def herding(points: Tensor, count: int) -> Tensor:
    """Choose points one by one, each so that the mean of those chosen comes as close to the mean of all as it can.

    The k-th is ``argmin_i || mu - (x_i + x_1 + ... + x_{k-1}) / k ||`` over the points that are left; of equal ones the
    first.

    Args:
        points: ``[n, d]``, float32 or float64, without a graph.
        count: How many, from 1 to n.

    Returns:
        ``[count]`` int64 indices on the points' device, in the order of the choice.

    Raises:
        InputError: If there are fewer points, or some are not finite.

    Example:
        >>> herding(torch.tensor([[0.0], [1.0], [2.5], [4.0]]), 3).tolist()  # the mean is 1.875
        [2, 1, 3]
    """
    check_range("herding count", count, 1, len(points), hint="there must be a point for each")
    if not bool(points.isfinite().all()):
        raise InputError("herding got points that are not finite; look for infinite or NaN features")
    centered = points - points.mean(0)  # the mean of all is 0: a common offset costs no digits
    norms, total = centered.square().sum(1), torch.zeros_like(centered[0])
    chosen = torch.empty(count, dtype=torch.int64, device=points.device)
    for k in range(count):
        distances = norms + 2 * (centered @ total)  # squared, times k^2, but for |total|^2: the same for all points
        distances[chosen[:k]] = math.inf
        chosen[k] = distances.argmin()
        total += centered[chosen[k]]
    return chosen
