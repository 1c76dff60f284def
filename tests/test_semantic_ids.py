"""Semantic IDs: quantisers by hand and by identities, embedders against slow twins, the artefact there and back."""

import dataclasses
import math
import shutil
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sagerec.actions.semantic_ids.build import (
    SemanticIds,
    SemanticIdSettings,
    build_semantic_ids,
    chosen_codebook_size,
    item_vectors,
    read_semantic_ids,
)
from sagerec.actions.semantic_ids.embedders import (
    cooccurrence,
    embed_categories,
    embed_collaborative,
    embed_sentences,
    embed_text,
    unit_rows,
)
from sagerec.actions.semantic_ids.quantisers import collision_rate, perplexity, residual_kmeans, separate
from sagerec.actions.trie import ROOT
from sagerec.artifacts import check_content, read_manifest
from sagerec.catalogue.audit import read_events_used
from sagerec.catalogue.dataset import Dataset, assemble
from sagerec.catalogue.splits import Sequences, SplitSettings, make_split
from sagerec.errors import ArtifactError, DatasetError, MissingExtraError, SettingsError

FROM_THE_LOG = SemanticIdSettings(
    levels=2, codebook_size=16, text_weight=0.0, category_weight=0.0, collaborative_dimensions=16
)
"""Settings that do not pay for hashed words."""


def sequences(rows: list[list[int]]) -> Sequences:
    """Sequences of these items, one user each."""
    items = np.array([i for row in rows for i in row], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return Sequences(items, offsets, np.arange(len(rows), dtype=np.int32), np.arange(len(items)))


def catalogue(n_items: int, **columns: list[Any]) -> Dataset:
    """A dataset of `n_items` items and one event."""
    items = pl.DataFrame({"item_id": [f"i{i}" for i in range(n_items)], "title": [""] * n_items} | columns)
    return assemble(items, pl.DataFrame({"user_id": ["u"], "item_id": ["i0"], "timestamp": [0]}))


# --- separate, collision_rate, perplexity ---------------------------------------------------------------------------


def test_separate_by_hand() -> None:
    """Items 0, 2, 3, 5 share (1, 2); by popularity 9, 7, 7, 1 they are 3, then 0 and 5 by index, then 2."""
    codes = np.array([[1, 2], [1, 3], [1, 2], [1, 2], [0, 2], [1, 2]], dtype=np.int32)
    popularity = np.array([7, 100, 1, 9, 0, 7])
    assert separate(codes, popularity).tolist() == [
        [1, 2, 1],
        [1, 3, 0],
        [1, 2, 3],
        [1, 2, 0],
        [0, 2, 0],
        [1, 2, 2],
    ]


codes_with_collisions = arrays.arrays(
    np.int32, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=st.integers(0, 2)
)


@given(codes=codes_with_collisions, seed=st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_separate_equals_the_slow_twin_and_makes_unique(codes: np.ndarray, seed: int) -> None:
    """The twin ranks each item among those of its codes by (-popularity, index)."""
    popularity = np.random.default_rng(seed).integers(0, 4, len(codes))
    found = separate(codes, popularity)
    rows = list(map(tuple, codes.tolist()))
    for i, row in enumerate(rows):
        group = sorted((j for j in range(len(rows)) if rows[j] == row), key=lambda j: (-popularity[j], j))
        assert found[i].tolist() == [*row, group.index(i)]
    assert len(set(map(tuple, found.tolist()))) == len(codes)
    assert collision_rate(found) == 0
    assert found.dtype == np.int32


def test_collision_rate_by_hand() -> None:
    """(0, 0) three times, (0, 1) once, (1, 0) twice: 5 of 6 items share."""
    codes = np.array([[0, 0], [0, 1], [0, 0], [1, 0], [1, 0], [0, 0]])
    assert collision_rate(codes) == pytest.approx(5 / 6)
    assert collision_rate(np.array([[3], [4]])) == 0
    assert collision_rate(np.array([[3]])) == 0


@given(codes=codes_with_collisions)
@settings(max_examples=50, deadline=None)
def test_collision_rate_and_perplexity_equal_their_slow_twins(codes: np.ndarray) -> None:
    counts = Counter(map(tuple, codes.tolist()))
    assert collision_rate(codes) == pytest.approx(sum(n for n in counts.values() if n > 1) / len(codes))
    shares = [n / len(codes) for n in Counter(codes[:, 0].tolist()).values()]
    assert perplexity(codes[:, 0]) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_perplexity_by_hand() -> None:
    """All alike: as many as there are; one code: 1; shares 1/2, 1/4, 1/4: exp(1.5 log 2) = 2 * sqrt(2)."""
    assert perplexity(np.array([0, 1, 2, 7, 7, 2, 1, 0])) == pytest.approx(4)
    assert perplexity(np.array([5, 5, 5])) == pytest.approx(1)
    assert perplexity(np.array([0, 0, 1, 2])) == pytest.approx(2 * math.sqrt(2))


# --- residual k-means -----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), n=st.integers(2, 60), size=st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_codes_and_codebooks_reproduce_the_stated_errors(seed: int, n: int, size: int) -> None:
    """Error after level l: mean |x - sum_{m<=l} codebook_m[code_m]|^2 / mean |x|^2; no level makes it larger."""
    vectors = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    found = residual_kmeans(vectors, levels=3, codebook_size=size, seed=seed)
    assert found.codes.shape == (n, 3)
    assert found.codebooks.shape == (3, min(size, n), 4)
    assert found.codes.min() >= 0
    assert found.codes.max() < min(size, n)
    residual = vectors.astype(np.float64)
    for level in range(3):
        residual = residual - found.codebooks[level][found.codes[:, level]]
        stated = (residual**2).sum(1).mean() / (vectors.astype(np.float64) ** 2).sum(1).mean()
        assert found.errors[level] == pytest.approx(stated, rel=1e-4, abs=1e-9)
        assert found.perplexities[level] == pytest.approx(perplexity(found.codes[:, level]))
    assert found.errors[0] < 1
    assert all(after <= before + 1e-9 for before, after in zip(found.errors, found.errors[1:], strict=False))


def test_every_level_takes_the_nearest_centroid() -> None:
    """The slow twin: distances of each residual to all centroids, the smallest wins."""
    vectors = np.random.default_rng(0).normal(size=(80, 5)).astype(np.float32)
    found = residual_kmeans(vectors, levels=3, codebook_size=8, seed=0)
    residual = vectors.astype(np.float64)
    for level, centroids in enumerate(found.codebooks):
        distances = ((residual[:, None] - centroids[None]) ** 2).sum(-1)
        chosen = distances[np.arange(80), found.codes[:, level]]
        assert chosen == pytest.approx(distances.min(1), abs=1e-5)
        residual = residual - centroids[found.codes[:, level]]


def test_error_falls_with_every_level() -> None:
    vectors = np.random.default_rng(1).normal(size=(500, 8)).astype(np.float32)
    errors = residual_kmeans(vectors, levels=4, codebook_size=8, seed=0).errors
    assert all(after < 0.9 * before for before, after in zip([1.0, *errors], errors, strict=False))


def test_same_seed_same_codes_and_the_input_is_left_alone() -> None:
    vectors = np.random.default_rng(2).normal(size=(300, 8)).astype(np.float32)
    before = vectors.copy()
    one, same, other = (residual_kmeans(vectors, levels=2, codebook_size=16, seed=s) for s in (0, 0, 1))
    assert (one.codes == same.codes).all()
    assert (one.codebooks == same.codebooks).all()
    assert (one.codes != other.codes).any()
    assert (vectors == before).all()


def test_planted_clusters_are_found() -> None:
    """Four far centres of 24 items, each with four near ones (2 x 2): level 1 finds the far, level 2 the near ones.

    The near offsets are the same around every centre, so that one codebook of four describes them all: of the
    squared length 2 * 5^2 left after level 1 (a share of all), only the noise, 2 * 0.01^2, is left after level 2.
    k-means begins at items drawn at random and may end in a poor optimum, so this is the best of ten seeds.
    """
    rng = np.random.default_rng(0)
    far = np.array([[0, 0], [100, 0], [0, 100], [100, 100]], dtype=np.float32)
    near = np.array([[-5, -5], [5, -5], [-5, 5], [5, 5]], dtype=np.float32)
    which_far, which_near = np.arange(96) // 24, np.arange(96) % 4
    vectors = (far[which_far] + near[which_near] + rng.normal(0, 0.01, (96, 2))).astype(np.float32)
    tries = [residual_kmeans(vectors, levels=2, codebook_size=4, seed=seed) for seed in range(10)]
    found = min(tries, key=lambda quantised: quantised.errors[1])
    pairs = set(zip(which_far.tolist(), found.codes[:, 0].tolist(), strict=True))
    assert len(pairs) == 4
    assert len({code for _, code in pairs}) == 4
    assert found.perplexities[0] == pytest.approx(4)
    scale = (vectors**2).sum(1).mean()
    assert found.errors == pytest.approx([50 / scale, 2e-4 / scale], rel=0.3)
    for cluster in range(4):
        inside = which_far == cluster
        pairs = set(zip(which_near[inside].tolist(), found.codes[inside, 1].tolist(), strict=True))
        assert len({code for _, code in pairs}) == len(pairs) == 4


def test_fewer_items_than_codes() -> None:
    """Three items and 256 codes: a level has three codes, each item its own, and nothing is left over."""
    vectors = np.array([[1, 0], [0, 1], [5, 5]], dtype=np.float32)
    found = residual_kmeans(vectors, levels=2, codebook_size=256, seed=0)
    assert found.codebooks.shape == (2, 3, 2)
    assert sorted(found.codes[:, 0].tolist()) == [0, 1, 2]
    assert found.errors == pytest.approx([0, 0], abs=1e-10)
    single = residual_kmeans(vectors[:1], levels=2, codebook_size=4, seed=0)
    assert single.codes.tolist() == [[0, 0]]


def test_items_that_are_all_alike() -> None:
    """One code serves: nothing is left over after it, and the items stay together."""
    found = residual_kmeans(np.ones((6, 3), dtype=np.float32), levels=2, codebook_size=4, seed=0)
    assert len(np.unique(found.codes, axis=0)) == 1
    assert found.errors == pytest.approx([0, 0], abs=1e-9)
    assert found.perplexities == pytest.approx([1, 1])
    nothing = residual_kmeans(np.zeros((6, 3), dtype=np.float32), levels=1, codebook_size=2, seed=0)
    assert nothing.errors == [0]


# --- embedders ------------------------------------------------------------------------------------------------------


def test_unit_rows_by_hand() -> None:
    """(3, 4) has length 5; a row of zeros stays."""
    assert unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx(np.array([[0.6, 0.8], [0, 0]]))


def cosines(vectors: np.ndarray) -> np.ndarray:
    products: np.ndarray = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    return products


def test_texts() -> None:
    """Identical texts get identical vectors; all have length 1 but those without a word; no word shared, no likeness.

    Words are of two letters or more, so "", "!" and "a" say nothing. The texts have four forms, so three dimensions
    are enough for the likeness of "red lipstick" and "red lipstick matte" to be that of the TF-IDF vectors, which
    share three of five features (red, lipstick, red lipstick; matte, lipstick matte):
    idf(df) = log(10 / (1 + df)) + 1 with df 4 for the shared and 1 for the others (sublinear counts are 1).
    """
    texts = ["red lipstick", "shampoo", "red lipstick", "", "red lipstick matte", "!", "a", "red lipstick", "shampoo"]
    found = embed_text(texts, dimensions=3, seed=0).vectors
    assert found.shape == (9, 3)
    assert found.dtype == np.float32
    assert (found[0] == found[2]).all()
    assert (found[0] == found[7]).all()
    assert (found[1] == found[8]).all()
    lengths = np.linalg.norm(found, axis=1)
    assert lengths == pytest.approx([1, 1, 1, 0, 1, 0, 0, 1, 1], abs=1e-6)
    shared, own = math.log(10 / 5) + 1, math.log(10 / 2) + 1
    likeness = cosines(found)
    assert likeness[0, 4] == pytest.approx(math.sqrt(3 * shared**2 / (3 * shared**2 + 2 * own**2)), abs=1e-4)
    assert likeness[0, 1] == pytest.approx(0, abs=1e-4)
    assert (embed_text(texts, dimensions=3, seed=0).vectors == found).all()


def test_a_repeated_word_counts_by_its_logarithm() -> None:
    """Features soap (df 2) and soap soap (df 1) of 5 texts: `soap soap` has soap twice, so (1 + log 2) idf(2), idf(1).

    idf(df) = log(6 / (1 + df)) + 1. Rank 3 needs three of the four dimensions.
    """
    found = embed_text(["soap", "soap soap", "brush", "", ""], dimensions=10, seed=0).vectors
    twice, pair = (1 + math.log(2)) * (math.log(2) + 1), math.log(3) + 1
    assert cosines(found)[0, 1] == pytest.approx(twice / math.hypot(twice, pair), abs=1e-4)


@pytest.mark.parametrize("texts", [["", "!", ""], ["lipstick"]])
def test_texts_that_cannot_be_told_apart_get_zeros(texts: list[str]) -> None:
    """No word at all, or a single item, of which there is no axis to draw."""
    assert embed_text(texts, dimensions=4, seed=0).vectors.tolist() == [[0.0]] * len(texts)


def test_categories_by_hand() -> None:
    """Items {x}, {x, y}, {x, x, y}, {z}, none: one-hot, so the second and third are equal.

    idf(df) = log(6 / (1 + df)) + 1: x 3 -> log 1.5 + 1, y 2 -> log 2 + 1. cos({x}, {x, y}) = idf_x / |(idf_x, idf_y)|.
    """
    data = catalogue(5, categories=[["x"], ["x", "y"], ["x", "x", "y"], ["z", None], []])
    found = embed_categories(data, dimensions=10, seed=0).vectors
    x, y = math.log(1.5) + 1, math.log(2) + 1
    assert (found[1] == found[2]).all()
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 1, 1, 0], abs=1e-6)
    wide = embed_categories(
        catalogue(5, categories=[["x"], ["x", "y"], ["x", "y"], ["z"], ["w", "v", "u"]]), dimensions=10, seed=0
    ).vectors
    assert wide.shape[1] == 4
    assert cosines(wide)[0, 1] == pytest.approx(x / math.hypot(x, y), abs=1e-4)
    assert cosines(wide)[0, 3] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("columns", [{}, {"categories": [[], None]}, {"categories": [[None], []]}])
def test_missing_categories(columns: dict[str, Any]) -> None:
    series = {name: pl.Series(values, dtype=pl.List(pl.String)) for name, values in columns.items()}
    with pytest.raises(DatasetError) as error:
        embed_categories(catalogue(2, **series), dimensions=4, seed=0)  # type: ignore[arg-type]
    assert str(error.value) == (
        "the items have no column 'categories' with content, which the category embedder needs; "
        "add it (a list of strings an item) or set its weight to 0"
    )


def slow_cooccurrence(rows: list[list[int]], n_items: int, window: int) -> np.ndarray:
    """The twin: every ordered pair of places of a row at most `window` apart adds 1 / distance."""
    matrix = np.zeros((n_items, n_items))
    for row in rows:
        for p, one in enumerate(row):
            for q, other in enumerate(row):
                if p != q and abs(p - q) <= window:
                    matrix[one, other] += 1 / abs(p - q)
    return matrix


def test_cooccurrence_by_hand() -> None:
    """Row 0 1 2 0 with window 2: 0-1 and 1-2 and 2-0 count 1, 0-2 and 1-0 two apart count 1/2; row 2 adds nothing.

    The window does not reach from one row into the next, and three apart (0 … 0) is too far.
    """
    found = cooccurrence(sequences([[0, 1, 2, 0], [2]]), 4, 2).toarray()
    assert found.tolist() == [[0, 1.5, 1.5, 0], [1.5, 0, 1, 0], [1.5, 1, 0, 0], [0, 0, 0, 0]]
    assert cooccurrence(sequences([[0, 0]]), 1, 5).toarray().tolist() == [[2.0]]


some_rows = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=8)


@given(rows=some_rows, window=st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_cooccurrence_equals_the_slow_twin(rows: list[list[int]], window: int) -> None:
    found = cooccurrence(sequences(rows), 7, window).toarray()
    assert found == pytest.approx(slow_cooccurrence(rows, 7, window), abs=1e-5)
    assert (found == found.T).all()


@given(rows=some_rows, window=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_collaborative_likeness_is_that_of_the_slow_mutual_information(rows: list[list[int]], window: int) -> None:
    """The twin: max(0, log(n_ij n / (n_i n_j))), zero where n_ij is; cosines of its rows. 12 items, 6 of them known.

    With 11 dimensions for a matrix of rank 6 at most, the SVD loses nothing.
    """
    counts = slow_cooccurrence(rows, 12, window)
    totals = counts.sum(1)
    information = np.zeros_like(counts)
    for i, j in zip(*counts.nonzero(), strict=True):
        information[i, j] = max(0.0, math.log(counts[i, j] * counts.sum() / (totals[i] * totals[j])))
    information[information < 1e-6] = 0  # a logarithm of 1 but for rounding
    assume(np.linalg.norm(information, axis=1)[information.any(axis=1)].min(initial=1) > 1e-3)
    found = embed_collaborative(sequences(rows), 12, dimensions=11, window=window, seed=0)
    expected = information / np.maximum(np.linalg.norm(information, axis=1, keepdims=True), 1e-12)
    assert cosines(found) == pytest.approx(cosines(expected), abs=1e-3)


def test_items_without_a_neighbour_get_zeros() -> None:
    """Item 2 was taken alone and item 3 never; where no two items met, there is nothing to say of any."""
    found = embed_collaborative(sequences([[0, 1], [2]]), 4, dimensions=3, window=5, seed=0)
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 0, 0], abs=1e-6)
    assert embed_collaborative(sequences([[0], [1]]), 3, dimensions=3, window=5, seed=0).tolist() == [[0.0]] * 3


def test_sentences_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError) as error:
        embed_sentences(["text"], "any")
    assert str(error.value) == (
        "sentence vectors need sentence-transformers; install it with: pip install 'sagerec[text]'"
    )


class FakeSentences:
    """Stands in for SentenceTransformer: a vector (words, letters) a text; knows one model."""

    def __init__(self, model: str, device: str | None = None) -> None:
        if model != "known":
            raise OSError(f"no such model: {model}")

    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        return np.array([[len(text.split()), len(text)] for text in texts])


@pytest.fixture
def _fake_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sentence_transformers")
    module.__dict__["SentenceTransformer"] = FakeSentences
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


@pytest.mark.usefixtures("_fake_sentences")
def test_sentences_become_unit_vectors() -> None:
    """The text `ab c` has 2 words and 4 letters, so (1, 2) / sqrt(5); an empty text is (0, 0)."""
    found = embed_sentences(["ab c", ""], "known")
    assert found == pytest.approx(np.array([[1, 2], [0, 0]]) / math.sqrt(5))
    assert found.dtype == np.float32


@pytest.mark.usefixtures("_fake_sentences")
def test_a_sentence_model_that_cannot_be_loaded() -> None:
    with pytest.raises(DatasetError) as error:
        embed_sentences(["text"], "unknown")
    assert str(error.value) == (
        "sentence model 'unknown' cannot be loaded (no such model: unknown); give the name of a model that can be "
        "downloaded or the folder of a saved one"
    )


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_fake_sentences")
def test_item_vectors_are_the_weighted_blocks_side_by_side() -> None:
    """Weights 0.5, 2, 0.25 and 3 of the text, the categories, the log and the sentences, in this order."""
    data = catalogue(
        4,
        categories=[["x"], ["x", "y"], ["y"], ["z"]],
        text=["red lipstick", "red rouge", "shampoo", "soap soap"],
    )
    train = sequences([[0, 1, 2], [2, 3], [1, 3]])
    chosen = SemanticIdSettings(
        text_weight=0.5,
        category_weight=2.0,
        collaborative_weight=0.25,
        sentence_weight=3.0,
        sentence_model="known",
        text_dimensions=3,
        category_dimensions=2,
        collaborative_dimensions=2,
        window=1,
        seed=4,
    )
    expected = [
        0.5 * embed_text(data.texts(), dimensions=3, seed=4).vectors,
        2.0 * embed_categories(data, dimensions=2, seed=4).vectors,
        0.25 * embed_collaborative(train, 4, dimensions=2, window=1, seed=4),
        3.0 * embed_sentences(data.texts(), "known"),
    ]
    assert (item_vectors(data, train, chosen).vectors == np.concatenate(expected, axis=1)).all()


def test_no_embedder_is_left() -> None:
    chosen = SemanticIdSettings(text_weight=0.0, collaborative_weight=0.0)
    with pytest.raises(SettingsError) as error:
        item_vectors(catalogue(3), sequences([[0]]), chosen)
    assert str(error.value) == ("no embedder is left: the items have no categories; give another weight above 0")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": 0}, "levels is 0; expected 1 to 8"),
        ({"levels": 9}, "levels is 9; expected 1 to 8"),
        ({"codebook_size": 1}, "codebook_size is 1; expected 2 to 32767, or 0 to have it chosen"),
        ({"codebook_size": 32768}, "codebook_size is 32768; expected 2 to 32767, or 0 to have it chosen"),
        ({"text_weight": -1.0}, "text_weight is -1.0; expected 0 or above"),
        (
            {"text_weight": 0.0, "category_weight": 0.0, "collaborative_weight": 0.0},
            "every weight is 0; expected one above",
        ),
        ({"window": 0}, "window is 0; expected at least 1"),
        ({"category_dimensions": 0}, "category_dimensions is 0; expected at least 1"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        SemanticIdSettings(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(("items", "size"), [(1, 16), (60, 16), (100, 32), (200, 64), (12_101, 4096), (10**6, 4096)])
def test_chosen_codebook_size(items: int, size: int) -> None:
    """A third of 100 is 33, of 200 is 67, of 12,101 is 4,034; below 16 and above 4,096 the bounds hold."""
    assert chosen_codebook_size(items) == size


@pytest.fixture(scope="module")
def built(store_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SemanticIds]:
    folder = tmp_path_factory.mktemp("ids") / "semantic_ids"
    train = make_split(store_data, SplitSettings()).sequences(store_data, "train")
    return folder, build_semantic_ids(folder, store_data, train, FROM_THE_LOG, made_from={"dataset": "x"})


def test_the_artefact_there_and_back(store_data: Dataset, built: tuple[Path, SemanticIds]) -> None:
    folder, ids = built
    train = make_split(store_data, SplitSettings()).sequences(store_data, "train")
    vectors = item_vectors(store_data, train, FROM_THE_LOG).vectors
    quantised = residual_kmeans(vectors, levels=2, codebook_size=16, seed=0)
    codes = separate(quantised.codes, np.bincount(train.items, minlength=store_data.n_items))
    assert (ids.vectors == vectors).all()
    assert (ids.codebooks == quantised.codebooks).all()
    assert (ids.codes == codes).all()
    assert ids.is_unique
    assert ids.codes.shape[1] == 3
    assert [int(n) for n in ids.codes.max(axis=0) + 1] == [int(c.max()) + 1 for c in codes.T]
    again = read_semantic_ids(folder)
    assert (again.codes == ids.codes).all()
    assert (again.vectors == ids.vectors).all()
    assert (again.codebooks == ids.codebooks).all()
    assert again.trie.token.tolist() == ids.trie.token.tolist()
    assert again.trie.item.tolist() == ids.trie.item.tolist()
    manifest = read_manifest(folder, "semantic_ids")
    check_content(folder, manifest)
    assert again.content_hash == ids.content_hash == manifest.content_hash
    assert manifest.made_from == {"dataset": "x"}
    assert manifest.sizes["items"] == manifest.sizes["distinct_ids"] == 200
    assert manifest.sizes["collision_rate"] == collision_rate(quantised.codes) > 0
    assert manifest.sizes["reconstruction_error"] == quantised.errors
    assert manifest.sizes["perplexity"] == quantised.perplexities
    assert manifest.sizes["level_sizes"] == [int(n) for n in ids.codes.max(axis=0) + 1]
    assert manifest.sizes["dimensions"] == vectors.shape[1] == 16
    assert (manifest.sizes["trie_nodes"], manifest.sizes["trie_bytes"]) == (ids.trie.n_nodes, ids.trie.n_bytes)
    assert read_events_used(folder).tolist() == train.rows.tolist()


def test_every_item_is_at_the_end_of_its_codes(built: tuple[Path, SemanticIds]) -> None:
    _, ids = built
    states = ids.trie.walk(torch.from_numpy(ids.codes).long())
    assert ids.trie.item[states[:, -1]].tolist() == list(range(200))


def test_two_builds_have_the_same_content_hash(
    store_data: Dataset, built: tuple[Path, SemanticIds], tmp_path: Path
) -> None:
    """The hash depends on what is in the files, not on where or when they were written; another seed changes it."""
    train = make_split(store_data, SplitSettings()).sequences(store_data, "train")
    again = build_semantic_ids(tmp_path / "a" / "ids", store_data, train, FROM_THE_LOG, made_from={"dataset": "y"})
    assert again.content_hash == built[1].content_hash
    seeded = dataclasses.replace(FROM_THE_LOG, seed=1)
    other = build_semantic_ids(tmp_path / "b", store_data, train, seeded, made_from={"dataset": "x"})
    assert other.content_hash != again.content_hash


def test_words_and_categories_build_too(store_data: Dataset, tmp_path: Path) -> None:
    """With the codebook chosen: 200 items, a third is 67, so 64 codes a level."""
    train = make_split(store_data, SplitSettings()).sequences(store_data, "train")
    chosen = SemanticIdSettings(text_dimensions=4, category_dimensions=4, collaborative_dimensions=4)
    one, two = (build_semantic_ids(tmp_path / n, store_data, train, chosen, made_from={}) for n in "ab")
    assert one.codebooks.shape == (2, 64, 12)
    lengths = np.linalg.norm(one.vectors.reshape(200, 3, 4), axis=2)
    assert lengths[:, 0] == pytest.approx(0.7, abs=1e-5)
    assert lengths[:, 1] == pytest.approx(0.5, abs=1e-5)
    assert set(lengths[:, 2].round(4)) <= {0.0, 1.0}
    assert one.content_hash == two.content_hash


def shared_ids(tmp_path: Path, rows: list[list[int]], *, unique: bool) -> SemanticIds:
    """Six items with two categories and nothing else: 0, 2, 4 are x and 1, 3, 5 are y."""
    data = catalogue(6, categories=[["x"], ["y"]] * 3)
    chosen = SemanticIdSettings(
        levels=2, codebook_size=2, text_weight=0.0, collaborative_weight=0.0, unique=unique, category_dimensions=4
    )
    return build_semantic_ids(tmp_path / f"ids-{unique}", data, sequences(rows), chosen, made_from={})


def test_shared_ids_and_the_item_that_the_trie_lists(tmp_path: Path) -> None:
    """Trained: 4 twice, 2 and 3 and 5 once. x lists 4, the most trained; y lists 3, the first of 3 and 5.

    Made unique, x's last codes go 4, 2, 0 by training and y's 3, 5, 1.
    """
    rows = [[4, 2, 4], [5, 3]]
    shared = shared_ids(tmp_path, rows, unique=False)
    assert not shared.is_unique
    assert shared.codes.shape[1] == 2
    assert int(shared.trie.size[ROOT]) == 2
    assert len({tuple(shared.codes[i]) for i in (0, 2, 4)}) == len({tuple(shared.codes[i]) for i in (1, 3, 5)}) == 1
    assert sorted(i for i in shared.trie.item.tolist() if i >= 0) == [3, 4]
    sizes = read_manifest(tmp_path / "ids-False", "semantic_ids").sizes
    assert (sizes["items"], sizes["distinct_ids"], sizes["collision_rate"]) == (6, 2, 1.0)
    apart = shared_ids(tmp_path, rows, unique=True)
    assert apart.is_unique
    assert (apart.codes[:, :2] == shared.codes).all()
    assert apart.codes[:, 2].tolist() == [2, 2, 1, 0, 0, 1]


def test_artefacts_that_cannot_be_read(built: tuple[Path, SemanticIds], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as error:
        read_semantic_ids(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is not a semantic_ids artefact: it has no manifest.json; run the stage that makes it"
    )
    folder = tmp_path / "ids"
    shutil.copytree(built[0], folder)
    (folder / "ids.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match=r"ids\.safetensors was changed after it was written; make .+ids again$"):
        read_semantic_ids(folder)
    (folder / "ids.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"ids\.safetensors cannot be read \(No such file .+\); make .+ again$"):
        read_semantic_ids(folder)
