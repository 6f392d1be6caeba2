"""Clusters of equal size: k-means in which each takes as many points as any other. Deterministic by its seed."""

import numpy as np

ROUNDS = 30
"""At most; what is assigned has come to rest long before."""


def equal_clusters(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Return clusters of equal size of which the points lie close to each other.

    Lloyd's iteration from k-means++ centres; points are given away by distance, the closest pair of a point and a
    cluster that has room first. That is no descent, so the best of all rounds is returned.

    Args:
        points: `[points, width]`.
        clusters: how many, dividing the number of points.
        seed: of the first centres.

    Returns:
        Numbers of points, rising within each cluster: int64 `[clusters, points / clusters]`.
    """
    centres = _first_centres(points, clusters, np.random.default_rng(seed))
    best, least = np.arange(len(points)), np.inf
    for _ in range(ROUNDS):
        distances = _squared_distances(points, centres)
        taken = _assigned(distances)
        far = distances[np.arange(len(points)), taken].sum()
        if not far < least:
            break
        best, least = taken, far
        centres = np.stack([points[taken == cluster].mean(0) for cluster in range(clusters)])
    return np.stack([np.flatnonzero(best == cluster) for cluster in range(clusters)])


def _first_centres(points: np.ndarray, clusters: int, random: np.random.Generator) -> np.ndarray:
    """Draw points far from each other: k-means++."""
    chosen = [int(random.integers(len(points)))]
    nearest = _squared_distances(points, points[chosen])[:, 0]
    while len(chosen) < clusters:
        free = np.setdiff1d(np.arange(len(points)), chosen)
        shares = nearest[free] if nearest[free].sum() > 0 else np.ones(len(free))  # All that is left lies on centres.
        chosen.append(int(random.choice(free, p=shares / shares.sum())))
        nearest = np.minimum(nearest, _squared_distances(points, points[chosen[-1:]])[:, 0])
    return points[chosen]


def _assigned(distances: np.ndarray) -> np.ndarray:
    """Return the cluster of each point, all of one size, by distances `[points, clusters]`."""
    points, clusters = distances.shape
    room, taken = np.full(clusters, points // clusters), np.full(points, -1)
    for place in np.argsort(distances, axis=None, kind="stable").tolist():
        point, cluster = divmod(place, clusters)
        if taken[point] < 0 and room[cluster]:
            taken[point] = cluster
            room[cluster] -= 1
    return taken


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the square of each point's distance to each centre, `[points, centres]`."""
    squares = np.square(points).sum(1)[:, None] + np.square(centres).sum(1) - 2 * points @ centres.T
    return np.maximum(squares, 0)
