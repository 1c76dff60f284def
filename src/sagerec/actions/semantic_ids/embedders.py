"""Item vectors to quantise: words, categories and co-occurrence, each of unit length, weighted and concatenated.

Each embedder gives (N, D) float32 rows of length 1 (0 for an item that it knows nothing of). Only `collaborative`
looks at the log, and it gets the training sequences and nothing else. What text and categories were projected by is
kept as plain arrays (`Projection`), so that items that come later get vectors of the same space.

Shapes: N items, F features, D dimensions, E' training events.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from sagerec.catalogue.dataset import CATEGORIES, Dataset
from sagerec.catalogue.splits import Sequences
from sagerec.errors import DatasetError, MissingExtraError

HASH_FEATURES = 2**18
CHUNK_PAIRS = 2**22
"""Pairs of co-occurring items that are weighed at a time."""


@dataclass(frozen=True, slots=True)
class Projection:
    """From weighted counts to a vector: v = unit(sum_f count_f idf_f component_f), over features that were seen."""

    features: np.ndarray
    """(F,) int64 columns of the counts, ascending."""
    idf: np.ndarray
    """(F,) float32 inverse document frequencies."""
    components: np.ndarray
    """(F, D) float16 right singular vectors: most of the artefact, and half precision moves a vector by some 1e-4."""

    def project(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Unit rows (n, D) of counts (n, all features); 0 for a row whose features were never seen."""
        return unit_rows(counts[:, self.features].multiply(self.idf).tocsr() @ self.components.astype(np.float32))


class Fitted(NamedTuple):
    """What an embedder makes of the catalogue."""

    vectors: np.ndarray
    """(N, D) float32 unit rows."""
    projection: Projection
    """What later items are projected by."""


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows divided by their Euclidean length; rows of zeros stay."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: np.ndarray = (x / np.where(norms > 0, norms, 1)).astype(np.float32)
    return scaled


def _reduce(matrix: sparse.csr_matrix, dimensions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Truncated SVD of a sparse matrix (N, F): unit rows (N, D) and components (D, F).

    D is the least of `dimensions`, N - 1 and F - 1; zeros of width 1 where there is nothing to reduce.
    """
    width = min(dimensions, matrix.shape[0] - 1, matrix.shape[1] - 1)
    if matrix.nnz == 0 or width < 1:
        return np.zeros((matrix.shape[0], 1), dtype=np.float32), np.zeros((1, matrix.shape[1]), dtype=np.float32)
    svd = TruncatedSVD(width, random_state=seed)
    return unit_rows(svd.fit_transform(matrix)), svd.components_


def _fit(counts: sparse.csr_matrix, weighting: TfidfTransformer, dimensions: int, seed: int) -> Fitted:
    """TF-IDF of counts (N, all features), reduced."""
    vectors, components = _reduce(weighting.fit_transform(counts), dimensions, seed)
    seen = np.unique(counts.indices).astype(np.int64)
    return Fitted(
        vectors,
        Projection(
            features=seen,
            idf=weighting.idf_[seen].astype(np.float32),
            components=np.ascontiguousarray(components[:, seen].T, dtype=np.float16),
        ),
    )


def count_words(texts: list[str]) -> sparse.csr_matrix:
    """Hashed counts (n, 2^18) of words and pairs of words."""
    hashing = HashingVectorizer(
        n_features=HASH_FEATURES, alternate_sign=False, ngram_range=(1, 2), norm=None, dtype=np.float32
    )
    counts: sparse.csr_matrix = hashing.transform(texts)
    return counts


def embed_text(texts: list[str], *, dimensions: int, seed: int) -> Fitted:
    """Hashed TF-IDF over words and pairs of words (sublinear counts), then truncated SVD."""
    return _fit(count_words(texts), TfidfTransformer(sublinear_tf=True), dimensions, seed)


def project_text(texts: list[str], projection: Projection) -> np.ndarray:
    """Vectors (n, D) of later texts, in the space of `embed_text`."""
    counts = count_words(texts)
    counts.data = 1 + np.log(counts.data)
    return projection.project(counts)


def count_categories(data: Dataset, vocabulary: list[str]) -> sparse.csr_matrix:
    """One-hot categories (N, F) by a vocabulary (F,); those that it does not hold are left out."""
    pairs = (
        data.items.select(CATEGORIES).with_row_index("row").explode(CATEGORIES).drop_nulls().unique(maintain_order=True)
    )
    columns = pl.DataFrame({CATEGORIES: vocabulary}).with_row_index("column")
    pairs = pairs.join(columns, on=CATEGORIES, how="inner", maintain_order="left")
    ones = np.ones(len(pairs), dtype=np.float32)
    return sparse.csr_matrix(
        (ones, (pairs["row"].to_numpy(), pairs["column"].to_numpy())), shape=(data.n_items, len(vocabulary))
    )


def category_vocabulary(data: Dataset) -> list[str]:
    """The categories of the catalogue, sorted; empty where the items have none."""
    if not data.has_categories():
        return []
    values: list[str] = data.items[CATEGORIES].explode().drop_nulls().unique().sort().to_list()
    return values


def embed_categories(data: Dataset, *, dimensions: int, seed: int) -> Fitted:
    """One-hot categories (by `category_vocabulary`) weighted by inverse document frequency, then truncated SVD.

    Raises: DatasetError where no item has a category.
    """
    if not data.has_categories():
        raise DatasetError(
            "the items have no column 'categories' with content, which the category embedder needs; "
            "add it (a list of strings an item) or set its weight to 0"
        )
    return _fit(count_categories(data, category_vocabulary(data)), TfidfTransformer(), dimensions, seed)


def project_categories(data: Dataset, vocabulary: list[str], projection: Projection) -> np.ndarray:
    """Vectors (N, D) of later items, in the space of `embed_categories`."""
    return projection.project(count_categories(data, vocabulary))


def cooccurrence(train: Sequences, n_items: int, window: int) -> sparse.csr_matrix:
    """Symmetric (N, N) counts of items at most `window` places apart in a sequence, a pair d apart counting 1/d."""
    sequence = np.repeat(np.arange(len(train)), np.diff(train.offsets))
    rows, columns, weights = [], [], []
    for distance in range(1, window + 1):
        together = sequence[distance:] == sequence[:-distance]
        rows.append(train.items[:-distance][together])
        columns.append(train.items[distance:][together])
        weights.append(np.full(int(together.sum()), 1 / distance, dtype=np.float32))
    matrix = sparse.csr_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(n_items, n_items)
    )
    return (matrix + matrix.T).tocsr()


def embed_collaborative(train: Sequences, n_items: int, *, dimensions: int, window: int, seed: int) -> np.ndarray:
    """Positive pointwise mutual information of co-occurrence, max(0, log(n_ij n / (n_i n_j))), then truncated SVD.

    Levy and Goldberg, "Neural word embedding as implicit matrix factorization" (2014). `train` must be the
    training sequences: the audit checks that it is.
    """
    matrix = cooccurrence(train, n_items, window)
    row = np.repeat(np.arange(n_items, dtype=np.int32), np.diff(matrix.indptr))
    totals = np.bincount(row, weights=matrix.data, minlength=n_items)
    total = totals.sum()
    for begin in range(0, len(row), CHUNK_PAIRS):  # in place: of a large catalogue the pairs fill the memory
        part = slice(begin, begin + CHUNK_PAIRS)
        expected = totals[row[part]] * totals[matrix.indices[part]]
        matrix.data[part] = np.log(matrix.data[part] * total / expected).clip(min=0)
    del row
    matrix.eliminate_zeros()
    return _reduce(matrix, dimensions, seed)[0]


def embed_sentences(texts: list[str], model: str, *, device: str | None = None) -> np.ndarray:
    """Unit vectors of a sentence-transformers model, given by name or folder (extra `text`).

    Raises: MissingExtraError without the library; DatasetError where the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError(
            "sentence vectors need sentence-transformers; install it with: pip install 'sagerec[text]'"
        ) from error
    try:
        encoder = SentenceTransformer(model, device=device)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"sentence model {model!r} cannot be loaded ({error}); give the name of a model that can be downloaded "
            "or the folder of a saved one"
        ) from error
    vectors = encoder.encode(texts, batch_size=64, convert_to_numpy=True, show_progress_bar=False)
    return unit_rows(np.asarray(vectors, dtype=np.float32))
