"""Clusters of items, by which the diversity of a list is measured.

Shapes: N items, Q clusters.
"""

from typing import Literal

import faiss
import numpy as np
import polars as pl
from scipy import sparse

from sagerec.actions.space import ActionSpace
from sagerec.catalogue.dataset import CATEGORIES, Dataset
from sagerec.errors import DatasetError

ClusterKind = Literal["category", "first-code", "coarse"]
COARSE_CLUSTERS = 32


def entropy_clusters(data: Dataset, space: ActionSpace) -> dict[str, sparse.csr_matrix]:
    """The clusters of the two entropies: categories where there are some, else first codes; and the coarse ones."""
    fine: ClusterKind = "category" if data.has_categories() else "first-code"
    return {"entropy": item_clusters(data, space, fine), "coarse_entropy": item_clusters(data, space, "coarse")}


def item_clusters(data: Dataset, space: ActionSpace, kind: ClusterKind) -> sparse.csr_matrix:
    """Membership of items in clusters, (N, Q) with rows that sum to 1.

    category: an item with n categories belongs to each by 1/n (one without any, to a cluster of its own kind);
    first-code: the first token of its sequence; coarse: the groups of `ActionSpace.centroids` (of Semantic IDs, the
    first codes) joined by k-means over their centroids into at most 32 clusters.

    Raises: DatasetError for `category` where no item has one.
    """
    if kind == "category":
        if not data.has_categories():
            raise DatasetError("the items have no categories; choose the clusters first-code or coarse")
        table = data.items.select(CATEGORIES).with_row_index("row").explode(CATEGORIES, empty_as_null=True)
        table = table.with_columns(pl.len().over("row").alias("n"), pl.col(CATEGORIES).fill_null("").rank("dense"))
        column = table[CATEGORIES].to_numpy().astype(np.int64) - 1
        weights = 1.0 / table["n"].to_numpy()
        shape = (data.n_items, int(column.max()) + 1)
        return sparse.csr_matrix((weights, (table["row"].to_numpy(), column)), shape=shape)
    cluster = space.first_tokens() if kind == "first-code" else coarse_clusters(space)
    ones = np.ones(data.n_items)
    return sparse.csr_matrix((ones, (np.arange(data.n_items), cluster)), shape=(data.n_items, int(cluster.max()) + 1))


def coarse_clusters(space: ActionSpace) -> np.ndarray:
    """(N,) the coarse cluster of each item."""
    centroids, cluster = space.centroids()
    if len(centroids) <= COARSE_CLUSTERS:
        return cluster
    points = np.ascontiguousarray(centroids)
    kmeans = faiss.Kmeans(
        points.shape[1], COARSE_CLUSTERS, niter=25, seed=0, min_points_per_centroid=1, spherical=False
    )
    kmeans.train(points)
    joined: np.ndarray = kmeans.index.search(points, 1)[1][:, 0][cluster]
    return joined
