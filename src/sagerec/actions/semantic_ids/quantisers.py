"""Residual quantisation: each level clusters what the levels before left over; and the last code, which separates.

How a level clusters is a function: `kmeans` here, `balanced_kmeans` in `balanced`. The RQ-VAE (`rq_vae`) quantises
in the same way the vectors that it learns.

Shapes: N items, D dimensions, L levels, C codes per level.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import faiss
import numpy as np

ITERATIONS = 25
MOST_POINTS, LEAST_POINTS = 2**18, 64
"""Points that centroids are fitted to, drawn from all: at most, and for each centroid at least."""
Clustering = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
"""Points (N, D), number of clusters C and seed -> centroids (C, D) float32 and the cluster (N,) int32 of each."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Codes of all items and how good they are."""

    codes: np.ndarray
    """(N, L) int32, each in 0 … C-1."""
    codebooks: np.ndarray
    """(L, C, D) float32 centroids."""
    errors: list[float]
    """After each level, the mean squared length of the residual over that of the vectors."""
    perplexities: list[float]
    """exp of the entropy of each level's code use: C when all codes are used alike."""
    network: dict[str, np.ndarray] = field(default_factory=dict)
    """Weights of the network whose output was quantised, where there is one (RQ-VAE)."""


def perplexity(codes: np.ndarray) -> float:
    """exp(- sum_c p_c log p_c) of the use of codes (N,)."""
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(np.exp(-(share * np.log(share)).sum()))


def kmeans(points: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """k-means (faiss): centroids (C, D) and the nearest of them for each point. A `Clustering`."""
    model = faiss.Kmeans(
        points.shape[1],
        size,
        niter=ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(LEAST_POINTS, MOST_POINTS // size),
    )
    model.train(points)
    _, nearest = model.index.search(points, 1)
    return np.array(model.centroids), nearest[:, 0].astype(np.int32)


def residual_kmeans(
    vectors: np.ndarray, *, levels: int, codebook_size: int, seed: int, cluster: Clustering = kmeans
) -> Quantisation:
    """Quantise `vectors` (N, D) level by level.

    x ~ sum_l codebook_l[code_l]; level l is fitted to x - sum_{m<l} codebook_m[code_m]. Where the items are fewer
    than `codebook_size`, a level has as many codes as items.
    """
    residual = np.ascontiguousarray(vectors, dtype=np.float32).copy()
    size = min(codebook_size, len(vectors))
    scale = mean_square(residual)
    codes, codebooks, errors = [], [], []
    for level in range(levels):
        centroids, chosen = cluster(residual, size, seed + level)
        codes.append(chosen)
        codebooks.append(centroids)
        residual -= centroids[chosen]
        errors.append(float((residual**2).sum(1).mean()) / scale)
    return Quantisation(
        codes=np.stack(codes, axis=1),
        codebooks=np.stack(codebooks),
        errors=errors,
        perplexities=[perplexity(c) for c in codes],
    )


def mean_square(vectors: np.ndarray) -> float:
    """Mean squared length of vectors (N, D), at least 1e-12: what reconstruction errors are divided by."""
    return max(float((vectors**2).sum(1).mean()), 1e-12)


def nearest_codes(vectors: np.ndarray, codebooks: np.ndarray, used: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, L) int32 of vectors (n, D) from codebooks (L, C, D), and what is left over (n, D).

    Each level takes the nearest centroid among the codes `used` there ((C',) ascending): a code that no item had is
    one of which the policy learnt nothing.
    """
    residual = np.ascontiguousarray(vectors, dtype=np.float32).copy()
    codes = np.empty((len(residual), len(codebooks)), dtype=np.int32)
    for level, (centroids, known) in enumerate(zip(codebooks, used, strict=True)):
        index = faiss.IndexFlatL2(residual.shape[1])
        index.add(np.ascontiguousarray(centroids[known]))
        codes[:, level] = known[index.search(residual, 1)[1][:, 0]]
        residual -= centroids[codes[:, level]]
    return codes, residual


def codebooks_of(vectors: np.ndarray, codes: np.ndarray) -> Quantisation:
    """The codebooks that fit given codes (N, L): codebook_l[c] is the mean residual of the items with code c at l.

    A code that no item has gets a centroid of zeros.
    """
    residual = np.ascontiguousarray(vectors, dtype=np.float32).copy()
    scale = mean_square(residual)
    codebooks = np.zeros((codes.shape[1], int(codes.max()) + 1, residual.shape[1]), dtype=np.float32)
    errors = []
    for level, chosen in enumerate(codes.T):
        np.add.at(codebooks[level], chosen, residual)
        codebooks[level] /= np.maximum(np.bincount(chosen, minlength=codebooks.shape[1]), 1)[:, None]
        residual -= codebooks[level][chosen]
        errors.append(float((residual**2).sum(1).mean()) / scale)
    return Quantisation(codes, codebooks, errors, [perplexity(c) for c in codes.T])


def separate(codes: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """Append the code that separates items of equal codes: (N, L) -> (N, L + 1).

    Within a group of equal codes the last code is the rank by `priority` (N,), highest first, then by item index,
    so that a low last code means a popular item.
    """
    order = np.lexsort((np.arange(len(codes)), -priority, *codes.T[::-1]))
    ordered = codes[order]
    begins = np.ones(len(codes), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    place = np.arange(len(codes))
    rank = np.empty(len(codes), dtype=np.int32)
    rank[order] = place - np.maximum.accumulate(np.where(begins, place, 0))
    return np.concatenate([codes, rank[:, None]], axis=1).astype(np.int32)


def collision_rate(codes: np.ndarray) -> float:
    """Share of items whose codes (N, L) some other item has too."""
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return float((counts[inverse.reshape(-1)] > 1).mean())
