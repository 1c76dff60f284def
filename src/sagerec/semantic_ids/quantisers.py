"""Residual k-means: each level clusters what the levels before left over.

Shapes: N items, D dimensions, L levels, C codes per level.
"""

from dataclasses import dataclass

import faiss
import numpy as np

ITERATIONS = 25


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


def perplexity(codes: np.ndarray) -> float:
    """exp(- sum_c p_c log p_c) of the use of codes (N,)."""
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(np.exp(-(share * np.log(share)).sum()))


def residual_kmeans(vectors: np.ndarray, *, levels: int, codebook_size: int, seed: int) -> Quantisation:
    """Quantise `vectors` (N, D) level by level with k-means (faiss).

    x ~ sum_l codebook_l[code_l]; level l is fitted to x - sum_{m<l} codebook_m[code_m]. Where the items are fewer
    than `codebook_size`, a level has as many codes as items.
    """
    residual = np.ascontiguousarray(vectors, dtype=np.float32).copy()
    size = min(codebook_size, len(vectors))
    scale = max(float((residual**2).sum(1).mean()), 1e-12)
    codes, codebooks, errors = [], [], []
    for level in range(levels):
        kmeans = faiss.Kmeans(
            residual.shape[1],
            size,
            niter=ITERATIONS,
            seed=seed + level,
            min_points_per_centroid=1,
            max_points_per_centroid=1024,
        )
        kmeans.train(residual)
        _, nearest = kmeans.index.search(residual, 1)
        codes.append(nearest[:, 0].astype(np.int32))
        codebooks.append(np.array(kmeans.centroids))
        residual -= codebooks[-1][codes[-1]]
        errors.append(float((residual**2).sum(1).mean()) / scale)
    return Quantisation(
        codes=np.stack(codes, axis=1),
        codebooks=np.stack(codebooks),
        errors=errors,
        perplexities=[perplexity(c) for c in codes],
    )


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
