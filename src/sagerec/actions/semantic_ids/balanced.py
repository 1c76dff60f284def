"""Balanced k-means: clusters whose sizes differ by at most one, so that every code is used alike.

Lloyd's iterations with a balanced assignment. The assignment is an auction (Bertsekas, "The auction algorithm", 1988,
with clusters of more than one place): items without a cluster bid for the one whose distance plus price is least, a
cluster keeps its highest bids, and its lowest kept bid is its price once it is full. The last items would bid for long,
so they are placed exactly (the Hungarian method) in the places left. OneRec (arXiv 2502.18965, algorithm 1) lets each
cluster in turn take the nearest items that are left, which leaves the last clusters with what no other wanted.

Shapes: N points, C clusters, D dimensions, F items without a cluster.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ITERATIONS = 5
LEFT_OVER = 256
"""Items that are placed exactly at the end of the auction; a catalogue of no more is placed exactly as a whole."""
BID_STEP, ROUNDING = 0.01, 1e-5
"""What a bid adds at least: a share of the mean squared distance from the points' mean, and, so that float32 does not
lose it, one of the largest."""
BLOCK = 2**25
"""Distances computed at once."""


def balanced_kmeans(points: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (C, D) and the cluster (N,) int32 of each point; sizes are floor(N / C) or one more. A `Clustering`.

    Begins at points drawn without replacement; the larger clusters are those that most points are nearest to.
    """
    x = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))
    begin = np.random.default_rng(seed).permutation(len(x))[:size]
    centroids, owner = x[torch.from_numpy(begin)], torch.full((len(x),), -1)
    for _ in range(ITERATIONS):
        before, (owner, places) = owner, balanced_assignment(x, centroids)
        if torch.equal(owner, before):
            break
        centroids = torch.zeros_like(centroids).index_add_(0, owner, x) / places[:, None]
    return centroids.numpy(), owner.numpy().astype(np.int32)


def balanced_assignment(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The cluster (N,) of points x (N, D), and the places (C,) of each cluster, all of them taken."""
    n, size = len(x), len(centroids)
    spread = ((x - x.mean(0)) ** 2).sum(1)
    step = max(float(BID_STEP * spread.mean() + ROUNDING * (spread.max() + (x**2).sum(1).max())), 1e-12)
    prices = torch.zeros(size)
    owner, bids = torch.full((n,), -1), torch.zeros(n)
    best, value, second = _cheapest_two(x, centroids, prices)
    places = torch.full((size,), n // size)
    wanted = torch.bincount(best, minlength=size)
    places[wanted.argsort(descending=True, stable=True)[: n % size]] += 1
    while True:
        free = (owner < 0).nonzero()[:, 0]
        if len(free) <= LEFT_OVER:
            break
        if len(free) < n:
            best, value, second = _cheapest_two(x[free], centroids, prices)
        owner[free] = best
        bids[free] = prices[best] + (second - value) + step
        contested = torch.zeros(size + 1, dtype=torch.bool)
        contested[best] = True
        bidders = contested[owner].nonzero()[:, 0]  # owner -1 reads the last entry, which is never set
        bidders = bidders[bids[bidders].argsort(descending=True, stable=True)]
        bidders = bidders[owner[bidders].argsort(stable=True)]
        cluster = owner[bidders]
        rank = torch.arange(len(cluster)) - torch.searchsorted(cluster, cluster)
        lowest = rank == places[cluster] - 1
        prices[cluster[lowest]] = bids[bidders[lowest]]
        owner[bidders[rank >= places[cluster]]] = -1
    taken = torch.bincount(owner[owner >= 0], minlength=size)
    left = (places - taken).nonzero()[:, 0].repeat_interleave((places - taken)[places > taken])
    distances = _square_distances(x[free], centroids[left])
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(distances.numpy()))
    owner[free[rows]] = left[columns]
    return owner, places


def _cheapest_two(x: Tensor, centroids: Tensor, prices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of x (F, D) the cluster of least distance plus price, that sum, and the next one (inf where C is 1)."""
    block = max(1, BLOCK // len(centroids))
    best, value, second = [], [], []
    for part in torch.split(x, block):
        costs = _square_distances(part, centroids) + prices
        least, at = costs.min(dim=1)
        costs.scatter_(1, at[:, None], torch.inf)
        best.append(at)
        value.append(least)
        second.append(costs.amin(dim=1))
    return torch.cat(best), torch.cat(value), torch.cat(second)


def _square_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """(F, C) squared Euclidean distances."""
    products = x @ centroids.T
    return ((x**2).sum(1)[:, None] - 2 * products + (centroids**2).sum(1)).clamp(min=0)
