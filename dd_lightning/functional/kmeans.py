"""Lloyd's k-means on the device of the points, and the points that represent its clusters.

DREAM (Liu et al., ICCV 2023, https://arxiv.org/abs/2302.14416) matches gradients of those real images that lie nearest
to the centers of clusters in feature space. Its usual size is 5000 points of 2048 numbers in 128 clusters.

Sums over clusters add in the same order in every run. On accelerators they are a product with a one-hot matrix, because
`index_add` adds with atomics there; on a host it takes a cluster's points in their order, in a tenth of the time.
Everything is computed about the mean of the points: it changes no distance, and a common offset then costs no digits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError

_MAX_ITERATIONS = 100
_TOLERANCE = 1e-4
"""Those of DREAM's implementation: the most moves of the centroids, and when to stop."""


class Clustering(NamedTuple):
    """What k-means found.

    Attributes:
        centroids: ``[k, d]`` in the points' dtype, on their device.
        assignments: ``[n]`` int64, the nearest centroid of every point, the first one of several.
        iterations: How many times the centroids were moved.
    """

    centroids: Tensor
    assignments: Tensor
    iterations: int


def kmeans(
    points: Tensor,
    clusters: int,
    generator: torch.Generator,
    max_iterations: int = _MAX_ITERATIONS,
    tolerance: float = _TOLERANCE,
) -> Clustering:
    """Cluster points by Lloyd's algorithm, from k of them drawn uniformly.

    A cluster that loses all its points gets the point farthest from its own centroid, as in scikit-learn, but never
    the last one of another cluster. So with at least k distinct points, no cluster is empty in the end; with fewer,
    some centroids coincide or have no points. Distinct are points whose squared distance is above the rounding of
    their squared norms. Memory beyond a copy of the points is a few times n * k numbers.

    Note:
        DREAM's implementation (fast_pytorch_kmeans) draws the start with replacement, so that two clusters can begin
        at one point, and moves the centroid of an empty cluster to the origin.

    Args:
        points: ``[n, d]``, float32 or float64, finite.
        clusters: k, from 1 to n.
        generator: Source of the start: the first k of a permutation of the points, drawn on the generator's device.
            One on the host gives the same start whatever the points' device.
        max_iterations: Largest number of moves of the centroids. The default is that of DREAM's implementation.
        tolerance: Stop once the squared movements of the centroids, in units of the points squared, sum to no more
            than this: DREAM's rule and value. 0 goes on until nothing moves.

    Returns:
        The clustering. Where it stopped before nothing moved, the assignments are those to the returned centroids,
        which are then not exactly the means of their clusters.

    Raises:
        InputError: If there are more clusters than points, or an argument is out of range.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> found = kmeans(points, 2, torch.Generator().manual_seed(0))
        >>> sorted(found.centroids.flatten().tolist())
        [0.5, 10.5]
    """
    _check(points, clusters, 1)
    if max_iterations < 1:
        raise InputError(f"k-means with max_iterations={max_iterations}: it must be at least 1")
    if not tolerance >= 0:
        raise InputError(f"k-means with tolerance={tolerance}: it must be at least 0 (0 stops when nothing moves)")
    points, mean = _centered(points)
    found = _lloyd(points, clusters, generator, max_iterations, tolerance)
    return found._replace(centroids=found.centroids + mean)


def representatives(points: Tensor, clusters: int, generator: torch.Generator, per_cluster: int = 1) -> Tensor:
    """Cluster points with the defaults of `kmeans`, and return those nearest to the center of their own cluster.

    A cluster with too few members is completed, after all others have chosen theirs, with the points nearest to its
    centroid that nobody chose. So the indices are always distinct, and always as many as asked for.

    Note:
        DREAM takes the nearest of all points, member or not, so that one image can represent two clusters and the
        batch then holds it twice.

    Args:
        points: ``[n, d]``, float32 or float64, finite.
        clusters: k, at least 1.
        generator: As for `kmeans`.
        per_cluster: Points to take from each cluster. The default is DREAM's.

    Returns:
        ``[clusters * per_cluster]`` int64 indices of points, on their device: cluster by cluster, the nearest first.

    Raises:
        InputError: If that is more indices than there are points, or an argument is out of range.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [5.0], [100.0], [103.0], [104.0]])
        >>> sorted(representatives(points, 2, torch.Generator().manual_seed(0)).tolist())
        [1, 4]
    """
    _check(points, clusters, per_cluster)
    points, _ = _centered(points)
    return _nearest_members(points, _lloyd(points, clusters, generator, _MAX_ITERATIONS, _TOLERANCE), per_cluster)


def representatives_of_groups(
    groups: Sequence[Tensor], clusters: int, generator: torch.Generator, per_cluster: int = 1
) -> list[Tensor]:
    """Return the :func:`representatives` of several groups of points, clustered at the same time.

    Every iteration is one pass over all groups with one synchronization, in place of several for each group. Starts are
    drawn as a loop over the groups would draw them; so up to rounding the result is that of the loop. Memory beyond a
    padded copy of all points is a few times their number times k.

    Args:
        groups: ``[n_i, d]`` each, of one dtype and device.
        clusters: k in each group, at least 1.
        generator: As for `kmeans`.
        per_cluster: Points to take from each cluster.

    Returns:
        For each group, ``[clusters * per_cluster]`` int64 indices of its points.

    Raises:
        InputError: If a group has fewer points than that, or an argument is out of range.

    Example:
        >>> groups = [torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[9.0], [4.0]])]
        >>> [sorted(chosen.tolist()) for chosen in representatives_of_groups(groups, 1, torch.Generator())]
        [[1], [0]]
    """
    for points in groups:
        _check(points, clusters, per_cluster)
    centered = [_centered(points)[0] for points in groups]
    found = _lloyd_of_groups(centered, clusters, generator, _MAX_ITERATIONS, _TOLERANCE)
    return [
        _nearest_members(points, clustering, per_cluster) for points, clustering in zip(centered, found, strict=True)
    ]


def _nearest_members(points: Tensor, found: Clustering, per_cluster: int) -> Tensor:
    centroids, assignments, _ = found
    clusters = len(centroids)
    # By cluster, and within it by distance; stable sorts leave equal distances in the order of the points.
    order = _squared_distances(points, centroids[assignments]).argsort(stable=True)
    order = order[assignments[order].argsort(stable=True)]
    counts = _one_hot(assignments, clusters).sum(0)[:, None]
    rank = torch.arange(per_cluster, device=points.device)
    chosen = order[(counts.cumsum(0) - counts + rank).clamp(max=len(points) - 1)]
    chosen = torch.where(rank < counts, chosen, -1)
    free = torch.ones(len(points), dtype=torch.bool, device=points.device)
    free[chosen[chosen >= 0]] = False
    for cluster, place in (chosen < 0).nonzero().tolist():
        distances = _squared_distances(points, centroids[cluster]).masked_fill(~free, math.inf)
        nearest = distances.argmin()
        chosen[cluster, place] = nearest
        free[nearest] = False
    return chosen.flatten()


def _check(points: Tensor, clusters: int, per_cluster: int) -> None:
    if points.ndim != 2 or points.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"k-means of a tensor of shape {tuple(points.shape)} and {points.dtype}: "
            "it takes points of [n, d] in float32 or float64"
        )
    if clusters < 1 or per_cluster < 1:
        raise InputError(f"k-means with clusters={clusters}, per_cluster={per_cluster}: each must be at least 1")
    if clusters * per_cluster > len(points):
        each = "" if per_cluster == 1 else f" times per_cluster={per_cluster}"
        raise InputError(
            f"k-means with more clusters than images: clusters={clusters}{each} needs at least "
            f"{clusters * per_cluster} images, got {len(points)}"
        )
    if not bool(points.isfinite().all()):
        raise InputError("k-means of points that are not all finite: look for infinite or nan features before it")


def _centered(points: Tensor) -> tuple[Tensor, Tensor]:
    points = points.detach()
    mean = points.mean(0)
    return points - mean, mean


def _lloyd(
    points: Tensor, clusters: int, generator: torch.Generator, max_iterations: int, tolerance: float
) -> Clustering:
    start = torch.randperm(len(points), generator=generator, device=generator.device)[:clusters]
    centroids = points[start.to(points.device)]
    assignments = _nearest(points, centroids)
    iterations, movement = 0, math.inf
    while iterations < max_iterations and movement > tolerance:
        empty, farthest = _repair(points, centroids, assignments)
        assignments[farthest] = empty
        sums, counts = _sums(points, assignments, clusters)
        # A cluster stays empty only where there are fewer distinct points than clusters.
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        movement = float((moved - centroids).square().sum())
        centroids = moved
        assignments = _nearest(points, centroids)
        iterations += 1
    return _without_empty(points, Clustering(centroids, assignments, iterations))


def _without_empty(points: Tensor, found: Clustering) -> Clustering:
    """Give points to the clusters that the last move has emptied."""
    centroids, assignments, iterations = found
    # A centroid put on a point away from all centroids keeps that point from then on, so no cluster needs it twice, and
    # k rounds are enough.
    for _ in range(len(centroids)):
        empty, farthest = _repair(points, centroids, assignments)
        if len(empty) == 0:
            break
        centroids[empty] = points[farthest]
        assignments = _nearest(points, centroids)
    return Clustering(centroids, assignments, iterations)


def _lloyd_of_groups(
    groups: Sequence[Tensor], clusters: int, generator: torch.Generator, max_iterations: int, tolerance: float
) -> list[Clustering]:
    """Do what `_lloyd` does for each group, all at once; a group that has converged stays as it is."""
    lengths = [len(points) for points in groups]
    points = torch.nn.utils.rnn.pad_sequence(list(groups), batch_first=True)
    device = points.device
    padding = torch.arange(points.shape[1], device=device) >= torch.tensor(lengths, device=device)[:, None]
    starts = [torch.randperm(n, generator=generator, device=generator.device)[:clusters] for n in lengths]
    centroids = torch.stack([own[start.to(device)] for own, start in zip(groups, starts, strict=True)])

    def nearest(centroids: Tensor) -> Tensor:
        table = torch.baddbmm(centroids.square().sum(2)[:, None], points, centroids.mT, alpha=-2)
        return table.argmin(2).masked_fill(padding, -1)  # padding is in no cluster

    def means(assignments: Tensor) -> tuple[Tensor, Tensor]:
        members = _one_hot(assignments, clusters).to(points.dtype)
        counts = members.sum(1)[..., None]
        moved = torch.where(counts > 0, members.mT @ points / counts.clamp(min=1), centroids)
        return moved, (counts == 0).sum((1, 2))

    assignments = nearest(centroids)
    iterations, moving = [0] * len(groups), list(range(len(groups)))
    for _ in range(max_iterations):
        moved, emptied = means(assignments)
        movement = (moved - centroids).square().sum((1, 2), dtype=torch.float64)
        told = torch.stack([emptied.to(movement), movement]).tolist()  # the one synchronization
        repaired = [group for group in moving if told[0][group] > 0]
        for group in repaired:
            own = assignments[group, : lengths[group]]
            empty, farthest = _repair(groups[group], centroids[group], own)
            own[farthest] = empty
        if repaired:
            moved, _ = means(assignments)
            told[1] = (moved - centroids).square().sum((1, 2), dtype=torch.float64).tolist()
        here = torch.tensor(moving, device=device)
        centroids[here] = moved[here]
        assignments[here] = nearest(centroids)[here]
        for group in moving:
            iterations[group] += 1
        moving = [group for group in moving if told[1][group] > tolerance]
        if not moving:
            break
    return [
        _without_empty(own, Clustering(centroids[group], assignments[group, : lengths[group]], iterations[group]))
        for group, own in enumerate(groups)
    ]


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    # |p - c|^2 without |p|^2, the same for all c: adding it would only round away what tells two centroids apart.
    return torch.addmm(centroids.square().sum(1), points, centroids.T, alpha=-2).argmin(1)


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    # Of few pairs, so by differences: exactly 0 where a centroid is a point.
    return (points - centroids).square().sum(1)


def _sums(points: Tensor, assignments: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Return the sums of the points of each cluster, ``[k, d]``, and how many they are, ``[k, 1]``."""
    members = _one_hot(assignments, clusters).to(points.dtype)
    counts = members.sum(0)[:, None]
    if points.device.type == "cpu":
        return points.new_zeros(clusters, points.shape[1]).index_add_(0, assignments, points), counts
    return members.T @ points, counts


def _one_hot(assignments: Tensor, clusters: int) -> Tensor:
    return assignments[..., None] == torch.arange(clusters, device=assignments.device)


def _repair(points: Tensor, centroids: Tensor, assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the empty clusters, and for each the point to give it: ``[e]`` and ``[e]`` int64.

    The points are the farthest from their own centroids, but never the last one of a cluster, nor one that is at its
    centroid. Where these are fewer than the empty clusters, only the first of the clusters are returned.
    """
    counts = _one_hot(assignments, len(centroids)).sum(0).tolist()
    empty = [cluster for cluster, count in enumerate(counts) if count == 0]
    given: list[int] = []
    if empty:
        distances = _squared_distances(points, centroids[assignments])
        order = distances.argsort(descending=True, stable=True)
        ranked = zip(order.tolist(), distances[order].tolist(), assignments[order].tolist(), strict=True)
        for point, distance, owner in ranked:
            if len(given) == len(empty) or distance == 0:
                break
            if counts[owner] > 1:
                counts[owner] -= 1
                given.append(point)
    pairs = assignments.new_tensor([empty[: len(given)], given])
    return pairs[0], pairs[1]
