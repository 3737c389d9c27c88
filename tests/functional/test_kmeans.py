import math

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from dd_lightning.functional import kmeans as module
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.kmeans import Clustering, _repair, _sums, representatives


def kmeans(
    points: Tensor, clusters: int, generator: torch.Generator, max_iterations: int = 300, tolerance: float = 0.0
) -> Clustering:
    """Cluster about the mean, as `representatives` does, under other stopping rules than DREAM's."""
    mean = points.mean(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_ITERATIONS", max_iterations)
        patch.setattr(module, "TOLERANCE", tolerance)
        found = module.kmeans(points - mean, clusters, generator)
    return found._replace(centroids=found.centroids + mean)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def start_of(points: Tensor, clusters: int, seed: int) -> Tensor:
    return points[torch.randperm(len(points), generator=seeded(seed))[:clusters]]


def seed_starting_at(points: int, start: set[int]) -> int:
    """The first seed whose start is these points, in any order."""
    return next(
        s for s in range(10**5) if set(torch.randperm(points, generator=seeded(s))[: len(start)].tolist()) == start
    )


def sklearn_kmeans(points: Tensor, start: Tensor) -> tuple[Tensor, Tensor, float]:
    oracle = KMeans(n_clusters=len(start), init=start.numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=300)
    oracle.fit(points.numpy())
    return torch.from_numpy(oracle.cluster_centers_), torch.from_numpy(oracle.labels_).long(), float(oracle.inertia_)


def distances(points: Tensor, found: Clustering) -> Tensor:
    return (points[:, None] - found.centroids).square().sum(2)


def assert_sound(points: Tensor, found: Clustering) -> None:
    """Every point is with its nearest centroid, and no cluster is empty."""
    table = distances(points, found)
    own = table.gather(1, found.assignments[:, None])[:, 0]
    torch.testing.assert_close(own, table.amin(1), rtol=1e-9, atol=1e-9)
    assert found.assignments.dtype == torch.int64
    assert found.assignments.unique().tolist() == list(range(len(found.centroids)))


@pytest.mark.parametrize(("n", "d", "clusters"), [(60, 2, 4), (200, 5, 10), (300, 32, 20), (50, 3, 1), (20, 3, 20)])
@pytest.mark.parametrize("seed", range(4))
def test_equals_scikit_learn(n: int, d: int, clusters: int, seed: int) -> None:
    points = random_points(n, d, seed) + 3
    found = kmeans(points, clusters, seeded(seed))
    centroids, assignments, inertia = sklearn_kmeans(points, start_of(points, clusters, seed))
    torch.testing.assert_close(found.centroids, centroids, rtol=0, atol=1e-6)
    assert torch.equal(found.assignments, assignments)
    assert float(distances(points, found).amin(1).sum()) == pytest.approx(inertia, abs=1e-9)
    assert_sound(points, found)


def test_an_emptied_cluster_gets_the_farthest_point() -> None:
    # On a line; the clusters start at 0, 10 and 10, and the second one at 10 owns nothing.
    points = torch.tensor([[0.0], [1], [2], [10], [10], [17]], dtype=torch.float64)
    seed = seed_starting_at(6, {0, 3, 4})
    # Of {0, 1, 2} and {10, 10, 17}, 17 is the farthest from its own centroid and goes to the empty cluster. So they
    # are {0, 1, 2}, {10, 10} and {17}, and nothing moves any more.
    found = kmeans(points, 3, seeded(seed))
    assert sorted(found.centroids.flatten().tolist()) == [1, 10, 17]
    assert found.iterations == 2
    centroids, assignments, _ = sklearn_kmeans(points, start_of(points, 3, seed))
    torch.testing.assert_close(found.centroids, centroids, rtol=0, atol=1e-12)
    assert torch.equal(found.assignments, assignments)


@pytest.mark.parametrize("seed", range(6))
def test_several_emptied_clusters_equal_scikit_learn(seed: int) -> None:
    # Most points are one and the same, and only one of the clusters that start there keeps any.
    points = torch.cat([random_points(20, 3, seed), random_points(1, 3, 99).expand(60, 3)])
    start = start_of(points, 6, seed)
    assert len(start.unique(dim=0)) < 5
    found = kmeans(points, 6, seeded(seed))
    assert_sound(points, found)
    # Which of the empty clusters gets which point is left open there, hence the sorting.
    centroids, _, inertia = sklearn_kmeans(points, start)
    order, expected = found.centroids[:, 0].argsort(), centroids[:, 0].argsort()
    torch.testing.assert_close(found.centroids[order], centroids[expected], rtol=0, atol=1e-6)
    assert float(distances(points, found).amin(1).sum()) == pytest.approx(inertia, abs=1e-9)


def test_sums_on_a_host_are_those_of_a_loop_to_the_last_bit() -> None:
    points = random_points(500, 40).float()
    assignments = torch.randint(7, (500,), generator=seeded(1)) % 6  # the last cluster has none
    sums, counts = _sums(points, assignments, 7)
    expected = torch.zeros(7, 40)
    for point, cluster in zip(points, assignments.tolist(), strict=True):
        expected[cluster] += point
    assert torch.equal(sums, expected)
    assert counts.flatten().tolist() == [assignments.tolist().count(cluster) for cluster in range(7)]


def test_a_repair_never_empties_another_cluster() -> None:
    points = torch.tensor([[0.0], [1], [90], [110]])
    centroids = torch.tensor([[0.0], [100], [300], [400]])
    # 90 and 110 are the farthest from their centroid, but one of them must stay there: 1 is the next.
    empty, farthest = _repair(points, centroids, torch.tensor([0, 0, 1, 1]))
    assert (empty.tolist(), farthest.tolist()) == ([2, 3], [2, 1])
    # 0 is at its centroid; of two points that are one and the same, none makes a new cluster.
    empty, farthest = _repair(points[[0, 0]], centroids, torch.tensor([0, 0]))
    assert (empty.tolist(), farthest.tolist()) == ([], [])


def test_the_last_move_leaves_no_cluster_empty() -> None:
    # One iteration, over many draws: the assignments to the moved centroids must be repaired too.
    for seed in range(300):
        points = random_points(12, 2, seed).round(decimals=1)
        if len(points.unique(dim=0)) >= 8:
            assert_sound(points, kmeans(points, 8, seeded(seed), max_iterations=1))


@pytest.mark.parametrize("distinct", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_distinct_points_than_clusters(distinct: int, dtype: torch.dtype) -> None:
    values = random_points(distinct, 7).to(dtype)
    points = values.repeat(6, 1)
    found = kmeans(points, 6, seeded(0))
    nearest = (points[:, None] - found.centroids).abs().amax(2).amin(1)
    assert float(nearest.max()) < 1e-6
    assert len(set(representatives(points, 6, seeded(0)).tolist())) == 6


def test_separated_blobs_are_recovered() -> None:
    centers = 100 * torch.eye(5, 8, dtype=torch.float64)
    truth = torch.arange(5).repeat(40)
    points = centers[truth] + random_points(200, 8)
    for seed in range(200):
        start = truth[torch.randperm(200, generator=seeded(seed))[:5]]
        if len(start.unique()) == 5:
            break
    found = kmeans(points, 5, seeded(seed))
    assert torch.equal(start[found.assignments], truth)
    for cluster in range(5):
        expected = points[truth == start[cluster]].mean(0)
        torch.testing.assert_close(found.centroids[cluster], expected, rtol=0, atol=1e-12)


def test_the_two_stopping_rules() -> None:
    points, clusters, seed = random_points(300, 4), 12, 3
    centroids = start_of(points, clusters, seed)
    movements = []
    for _ in range(6):
        nearest = torch.cdist(points, centroids).argmin(1)
        moved = torch.stack([points[nearest == cluster].mean(0) for cluster in range(clusters)])
        movements.append(float((moved - centroids).square().sum()))
        centroids = moved
        found = kmeans(points, clusters, seeded(seed), max_iterations=len(movements))
        torch.testing.assert_close(found.centroids, centroids, rtol=0, atol=1e-12)
        assert found.iterations == len(movements)
    assert movements == sorted(movements, reverse=True)
    for index in (0, 2, 5):
        found = kmeans(points, clusters, seeded(seed), tolerance=movements[index] * (1 + 1e-9))
        assert found.iterations == index + 1
        found = kmeans(points, clusters, seeded(seed), tolerance=movements[index] * (1 - 1e-9))
        assert found.iterations > index + 1


def test_float32_with_an_offset_equals_float64() -> None:
    # Steps of 1/64 keep the points and their offset exact in float32; without centring, squares near 64 * 10^6 would
    # leave errors of about 4 in the squared distances.
    points = (random_points(400, 64) * 64).round() / 64
    for seed in range(3):
        exact = kmeans(points, 10, seeded(seed))
        shifted = kmeans((points + 1e3).float(), 10, seeded(seed))
        assert torch.equal(shifted.assignments, exact.assignments)
        torch.testing.assert_close(shifted.centroids.double() - 1e3, exact.centroids, rtol=0, atol=2e-4)
        assert torch.equal(
            representatives((points + 1e3).float(), 10, seeded(seed), 2), representatives(points, 10, seeded(seed), 2)
        )


def test_only_the_given_generator_is_used() -> None:
    points = random_points(80, 6)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again = (kmeans(points, 9, seeded(5)) for _ in range(2))
    assert torch.equal(representatives(points, 9, seeded(5)), representatives(points, 9, seeded(5)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.assignments, again.assignments)
    assert not torch.equal(first.centroids, kmeans(points, 9, seeded(6)).centroids)


@pytest.mark.gpu
def test_cuda_is_reproducible_and_equals_the_host() -> None:
    points = random_points(600, 32)
    host = kmeans(points, 20, seeded(0))
    first, again = (kmeans(points.cuda(), 20, seeded(0)) for _ in range(2))
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.assignments.cpu(), host.assignments)
    torch.testing.assert_close(first.centroids.cpu(), host.centroids, rtol=0, atol=1e-10)
    assert torch.equal(
        representatives(points.cuda(), 20, seeded(0), 3).cpu(), representatives(points, 20, seeded(0), 3)
    )


def test_points_and_graphs_are_left_alone() -> None:
    points = random_points(30, 4).requires_grad_()
    copy = points.detach().clone()
    chosen = representatives(points, 30, seeded(0))
    assert torch.equal(points.detach(), copy)
    assert torch.equal(chosen, torch.randperm(30, generator=seeded(0)))


@pytest.mark.parametrize("per_cluster", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_representatives_equal_the_slow_loop(per_cluster: int, seed: int) -> None:
    points, clusters = random_points(120, 5, seed), 15
    found = kmeans(points, clusters, seeded(seed))
    table = distances(points, found)
    chosen: list[list[int]] = []
    for cluster in range(clusters):
        members = [i for i in range(120) if int(found.assignments[i]) == cluster]
        chosen.append(sorted(members, key=lambda i, c=cluster: float(table[i, c]))[:per_cluster])  # type: ignore[misc]
    taken = {index for indices in chosen for index in indices}
    for cluster, indices in enumerate(chosen):
        while len(indices) < per_cluster:
            rest = [i for i in range(120) if i not in taken]
            indices.append(min(rest, key=lambda i, c=cluster: float(table[i, c])))  # type: ignore[misc]
            taken.add(indices[-1])
    result = representatives(points, clusters, seeded(seed), per_cluster)
    assert result.dtype == torch.int64
    assert result.view(clusters, per_cluster).tolist() == chosen


def test_too_small_clusters_are_filled_by_hand() -> None:
    # Clusters {0, 1, 2} and {60}, whose members come first: 1 and one of its neighbors at the same distance, the
    # first; then 60, and 2 as the nearest that is left.
    points = torch.tensor([[0.0], [1], [2], [60]], dtype=torch.float64)
    chosen = representatives(points, 2, seeded(seed_starting_at(4, {0, 3})), per_cluster=2).view(2, 2).tolist()
    assert sorted(chosen) == [[1, 0], [3, 2]]


@pytest.mark.parametrize(("clusters", "per_cluster"), [(40, 1), (20, 2), (10, 4), (1, 40), (7, 5), (39, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_representatives_are_distinct_and_in_bounds(clusters: int, per_cluster: int, dtype: torch.dtype) -> None:
    spread = random_points(40, 3).to(dtype)
    for points in (spread, spread.round(), torch.zeros_like(spread)):
        chosen = representatives(points, clusters, seeded(1), per_cluster)
        assert chosen.shape == (clusters * per_cluster,)
        assert len(set(chosen.tolist())) == clusters * per_cluster
        assert set(chosen.tolist()) <= set(range(40))


def test_errors() -> None:
    points = random_points(10, 2)
    broken = torch.cat([points, torch.full((1, 2), math.nan)])
    for function in (module.kmeans, representatives):
        for clusters, message in ((11, "is 11; .* at most 10"), (0, "is 0; .* at least 1")):
            with pytest.raises(InputError, match=message):
                function(points, clusters, seeded(0))
        with pytest.raises(InputError, match="not finite"):
            function(broken, 2, seeded(0))
    with pytest.raises(InputError, match=r"is 12; .* at most 10"):
        representatives(points, 4, seeded(0), per_cluster=3)
    with pytest.raises(InputError, match="per_cluster is 0; it must be at least 1"):
        representatives(points, 4, seeded(0), per_cluster=0)


def test_the_stopping_rule_is_dream_s() -> None:
    assert (module.MAX_ITERATIONS, module.TOLERANCE) == (100, 1e-4)
