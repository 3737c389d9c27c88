"""Lloyd's k-means on the points' device, and the points that represent its clusters.

DREAM (Liu et al., ICCV 2023, https://arxiv.org/abs/2302.14416) matches gradients of the real images nearest to the
centers of clusters in feature space; its usual size is 5000 points of 2048 features in 128 clusters.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range

# Both as in DREAM's implementation.
MAX_ITERATIONS = 100  # moves of the centroids
TOLERANCE = 1e-4  # stop once their squared movements, in squared units of the points, sum to no more than this


class Clustering(NamedTuple):
    """Centroids ``[k, d]``, each point's nearest, the first of several (``[n]`` int64), and how often they moved."""

    centroids: Tensor
    assignments: Tensor
    iterations: int


def kmeans(points: Tensor, clusters: int, generator: torch.Generator) -> Clustering:
    """Cluster points by Lloyd's algorithm, starting at k of them drawn uniformly.

    A cluster that loses all its points gets the point farthest from its own centroid, as in scikit-learn, but never
    the last point of another cluster: with at least k distinct points no cluster ends up empty; with fewer, some
    centroids coincide or have no points. Points are distinct if their squared distance exceeds the rounding of their
    squared norms: center them first. Memory beyond the points is a few times n * k numbers.

    NOTE: DREAM's implementation (fast_pytorch_kmeans) draws the start with replacement, so two clusters can begin at
    one point, and moves the centroid of an empty cluster to the origin.

    Args:
        points: ``[n, d]``, float32 or float64, without a graph.
        clusters: k, from 1 to n.
        generator: Draws the start, the first k of a permutation of the points: a host generator the same everywhere.

    Raises:
        InputError: If there are more clusters than points, or points that are not finite.
    """
    check_range("k-means clusters", clusters, 1, len(points), hint="there must be a point for each")
    if not bool(points.isfinite().all()):
        raise InputError("k-means got points that are not finite; look for infinite or NaN features")
    start = torch.randperm(len(points), generator=generator, device=generator.device)[:clusters]
    centroids = points[start.to(points.device)]
    assignments = _nearest(points, centroids)
    iterations, movement = 0, math.inf
    while iterations < MAX_ITERATIONS and movement > TOLERANCE:
        empty, farthest = _repair(points, centroids, assignments)
        assignments[farthest] = empty
        sums, counts = _sums(points, assignments, clusters)
        # A cluster stays empty only if there are fewer distinct points than clusters.
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        movement = float((moved - centroids).square().sum())
        centroids = moved
        assignments = _nearest(points, centroids)
        iterations += 1
    # The last move may have emptied clusters. A centroid put on a point keeps that point from then on, so no cluster
    # needs it twice, and k rounds are enough.
    for _ in range(clusters):
        empty, farthest = _repair(points, centroids, assignments)
        if len(empty) == 0:
            break
        centroids[empty] = points[farthest]
        assignments = _nearest(points, centroids)
    return Clustering(centroids, assignments, iterations)


def representatives(points: Tensor, clusters: int, generator: torch.Generator, per_cluster: int = 1) -> Tensor:
    """Cluster points about their mean, and return those nearest to the center of their own cluster.

    A cluster with too few members is filled, after all others have chosen theirs, with the nearest points that nobody
    chose, so the indices are distinct.

    NOTE: DREAM takes the nearest of all points, member or not, so one image can appear twice in a batch.

    Args:
        points: ``[n, d]``, float32 or float64.
        clusters: k, at least 1.
        generator: Draws the start, see `kmeans`.
        per_cluster: Points to take from each cluster; 1 in DREAM.

    Returns:
        ``[clusters * per_cluster]`` int64 indices on the points' device: cluster by cluster, the nearest first.

    Raises:
        InputError: If that is more indices than there are points, or points are not finite.
    """
    check_range("k-means per_cluster", per_cluster, 1)
    check_range("k-means clusters times per_cluster", clusters * per_cluster, 1, len(points), hint="images to take")
    points = points.detach()
    points = points - points.mean(0)  # changes no distance, and a common offset then costs no digits
    centroids, assignments, _ = kmeans(points, clusters, generator)
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


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    # |p - c|^2 without |p|^2, the same for all c: adding it would only round away what tells two centroids apart.
    return torch.addmm(centroids.square().sum(1), points, centroids.T, alpha=-2).argmin(1)


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    # Of few pairs, so by differences: exactly 0 where a centroid is a point.
    return (points - centroids).square().sum(1)


def _sums(points: Tensor, assignments: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Return the sums of the points of each cluster, ``[k, d]``, and how many there are, ``[k, 1]``."""
    members = _one_hot(assignments, clusters).to(points.dtype)
    counts = members.sum(0)[:, None]
    if points.device.type == "cpu":  # in order, in a tenth of the time; accelerators would add with atomics
        return points.new_zeros(clusters, points.shape[1]).index_add_(0, assignments, points), counts
    return members.T @ points, counts


def _one_hot(assignments: Tensor, clusters: int) -> Tensor:
    return assignments[:, None] == torch.arange(clusters, device=assignments.device)


def _repair(points: Tensor, centroids: Tensor, assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the empty clusters and a point for each: ``[e]`` and ``[e]`` int64.

    The points are the farthest from their own centroids, but never the last one of a cluster, nor one at its centroid;
    if they are fewer than the empty clusters, only the first clusters are returned.
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
