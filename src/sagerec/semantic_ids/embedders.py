"""Item vectors to quantise: words, categories and co-occurrence, each of unit length, weighted and concatenated.

Each embedder gives (N, D) float32 rows of length 1 (0 for an item that it knows nothing of). Only `collaborative`
looks at the log, and it gets the training sequences and nothing else.

Shapes: N items, D dimensions, E' training events.
"""

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from sagerec.catalogue.dataset import CATEGORIES, Dataset
from sagerec.catalogue.splits import Sequences
from sagerec.errors import DatasetError, MissingExtraError

HASH_FEATURES = 2**18


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows divided by their Euclidean length; rows of zeros stay."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: np.ndarray = (x / np.where(norms > 0, norms, 1)).astype(np.float32)
    return scaled


def _reduce(matrix: sparse.csr_matrix, dimensions: int, seed: int) -> np.ndarray:
    """Truncated SVD of a sparse matrix (N, F) to unit rows (N, min(dimensions, N - 1, F - 1))."""
    width = min(dimensions, matrix.shape[0] - 1, matrix.shape[1] - 1)
    if matrix.nnz == 0 or width < 1:
        return np.zeros((matrix.shape[0], 1), dtype=np.float32)
    return unit_rows(TruncatedSVD(width, random_state=seed).fit_transform(matrix))


def embed_text(texts: list[str], *, dimensions: int, seed: int) -> np.ndarray:
    """Hashed TF-IDF over words and pairs of words (sublinear counts), then truncated SVD."""
    hashing = HashingVectorizer(
        n_features=HASH_FEATURES, alternate_sign=False, ngram_range=(1, 2), norm=None, dtype=np.float32
    )
    counts = hashing.transform(texts)
    return _reduce(TfidfTransformer(sublinear_tf=True).fit_transform(counts), dimensions, seed)


def embed_categories(data: Dataset, *, dimensions: int, seed: int) -> np.ndarray:
    """One-hot categories weighted by inverse document frequency, then truncated SVD.

    Raises: DatasetError where no item has a category.
    """
    if not data.has_categories():
        raise DatasetError(
            "the items have no column 'categories' with content, which the category embedder needs; "
            "add it (a list of strings an item) or set its weight to 0"
        )
    pairs = (
        data.items.select(CATEGORIES).with_row_index("row").explode(CATEGORIES).drop_nulls().unique(maintain_order=True)
    )
    column = pairs[CATEGORIES].rank("dense").to_numpy().astype(np.int64) - 1
    ones = np.ones(len(pairs), dtype=np.float32)
    matrix = sparse.csr_matrix((ones, (pairs["row"].to_numpy(), column)), shape=(data.n_items, int(column.max()) + 1))
    return _reduce(TfidfTransformer().fit_transform(matrix), dimensions, seed)


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
    matrix = cooccurrence(train, n_items, window).tocoo()
    totals = np.bincount(matrix.row, weights=matrix.data, minlength=n_items)
    information = np.log(matrix.data * totals.sum() / (totals[matrix.row] * totals[matrix.col]))
    keep = information > 0
    positive = sparse.csr_matrix(
        (information[keep].astype(np.float32), (matrix.row[keep], matrix.col[keep])), shape=matrix.shape
    )
    return _reduce(positive, dimensions, seed)


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
