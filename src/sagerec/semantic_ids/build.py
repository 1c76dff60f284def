"""The Semantic-ID stage: embed, quantise, separate, index; written as one artefact.

The folder holds `ids.safetensors` (codes, codebooks, item vectors), the trie's arrays, and the rows of the log that
were used.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sagerec.artifacts import read_manifest, write_artifact
from sagerec.catalogue.audit import write_events_used
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.splits import Sequences
from sagerec.core.trie import ROOT, Trie, build_trie, read_trie, write_trie
from sagerec.errors import ArtifactError
from sagerec.semantic_ids.embedders import (
    embed_categories,
    embed_collaborative,
    embed_sentences,
    embed_text,
)
from sagerec.semantic_ids.quantisers import collision_rate, residual_kmeans, separate
from sagerec.settings import require, to_json

TENSORS = "ids.safetensors"


@dataclass(frozen=True, slots=True)
class SemanticIdSettings:
    """How items become codes."""

    levels: int = 2
    """Residual levels; one more code separates items that collide."""
    codebook_size: int = 0
    """Codes per level; 0 takes the power of two nearest to a third of the items, from 16 to 4096."""
    text_weight: float = 0.7
    """Weight of hashed TF-IDF vectors of titles and descriptions."""
    category_weight: float = 0.5
    """Weight of category vectors; ignored where the items have none."""
    collaborative_weight: float = 1.0
    """Weight of co-occurrence vectors, from training events alone."""
    sentence_weight: float = 0.0
    """Weight of sentence-transformers vectors (extra `text`)."""
    sentence_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Name or folder of the sentence-transformers model."""
    text_dimensions: int = 192
    """Width of the text vectors."""
    category_dimensions: int = 64
    """Width of the category vectors."""
    collaborative_dimensions: int = 128
    """Width of the co-occurrence vectors."""
    window: int = 5
    """Items at most this far apart in a sequence count as co-occurring."""
    unique: bool = True
    """Separate items that collide by a last code; without it they share an ID, and the metrics say at what cost."""
    seed: int = 0
    """Seed of the SVD and of k-means."""

    def __post_init__(self) -> None:
        require(1 <= self.levels <= 8, f"levels is {self.levels}; expected 1 to 8")
        require(
            self.codebook_size == 0 or 2 <= self.codebook_size <= 32767,
            f"codebook_size is {self.codebook_size}; expected 2 to 32767, or 0 to have it chosen",
        )
        weights = (self.text_weight, self.category_weight, self.collaborative_weight, self.sentence_weight)
        require(min(weights) >= 0 and max(weights) > 0, f"weights are {weights}; expected none below 0, one above")
        require(self.window >= 1, f"window is {self.window}; expected at least 1")
        widths = (self.text_dimensions, self.category_dimensions, self.collaborative_dimensions)
        require(min(widths) >= 1, f"dimensions are {widths}; expected at least 1")


@dataclass(frozen=True, slots=True)
class SemanticIds:
    """The codes of every item, and the trie over the distinct ones."""

    codes: np.ndarray
    """(N, L) int32 code sequence of each item."""
    vectors: np.ndarray
    """(N, D) float32 weighted vectors that were quantised."""
    codebooks: np.ndarray
    """(levels, C, D) float32 centroids."""
    trie: Trie
    """Index over the distinct code sequences; where items share one, it holds the one most often trained on."""
    content_hash: str = ""
    """Content hash of the artefact, once written."""

    @property
    def length(self) -> int:
        """Codes per item."""
        return int(self.codes.shape[1])

    @property
    def is_unique(self) -> bool:
        """Whether every item has an ID of its own."""
        return int(self.trie.size[ROOT]) == len(self.codes)

    def level_sizes(self) -> list[int]:
        """Codes in use at each place: the largest code plus one."""
        return [int(size) for size in self.codes.max(axis=0) + 1]


def chosen_codebook_size(n_items: int) -> int:
    """The power of two nearest (in ratio) to a third of the items, from 16 to 4096.

    On Amazon Beauty (12,101 items) 2 x 4096 won on validation over 3 x 256, 2 x 1024 and 2 x 2048 (docs/log.md).
    """
    return int(np.clip(2 ** round(math.log2(max(n_items / 3, 1))), 16, 4096))


def item_vectors(data: Dataset, train: Sequences, settings: SemanticIdSettings) -> np.ndarray:
    """The weighted, concatenated vectors (N, D) of all embedders whose weight is above 0."""
    blocks = []
    if settings.text_weight:
        text = embed_text(data.texts(), dimensions=settings.text_dimensions, seed=settings.seed)
        blocks.append(settings.text_weight * text)
    if settings.category_weight and data.has_categories():
        categories = embed_categories(data, dimensions=settings.category_dimensions, seed=settings.seed)
        blocks.append(settings.category_weight * categories)
    if settings.collaborative_weight:
        collaborative = embed_collaborative(
            train,
            data.n_items,
            dimensions=settings.collaborative_dimensions,
            window=settings.window,
            seed=settings.seed,
        )
        blocks.append(settings.collaborative_weight * collaborative)
    if settings.sentence_weight:
        blocks.append(settings.sentence_weight * embed_sentences(data.texts(), settings.sentence_model))
    require(bool(blocks), "no embedder is left: the items have no categories; give another weight above 0")
    return np.concatenate(blocks, axis=1)


def build_semantic_ids(
    folder: Path, data: Dataset, train: Sequences, settings: SemanticIdSettings, *, made_from: dict[str, str]
) -> SemanticIds:
    """Run the stage and write its artefact to `folder`. `train` must hold training events only (audited)."""
    vectors = item_vectors(data, train, settings)
    codebook_size = settings.codebook_size or chosen_codebook_size(data.n_items)
    quantised = residual_kmeans(vectors, levels=settings.levels, codebook_size=codebook_size, seed=settings.seed)
    codes = quantised.codes
    separated = separate(codes, np.bincount(train.items, minlength=data.n_items))
    if settings.unique:
        codes = separated
        trie = build_trie(codes)
    else:
        listed = np.flatnonzero(separated[:, -1] == 0)
        trie = build_trie(codes[listed], listed)
    sizes = {
        "items": data.n_items,
        "distinct_ids": int(trie.size[ROOT]),
        "dimensions": vectors.shape[1],
        "level_sizes": [int(n) for n in codes.max(axis=0) + 1],
        "collision_rate": collision_rate(quantised.codes),
        "perplexity": quantised.perplexities,
        "reconstruction_error": quantised.errors,
        "trie_nodes": trie.n_nodes,
        "trie_bytes": trie.n_bytes,
    }
    with write_artifact(
        folder,
        "semantic_ids",
        made_from=made_from,
        settings=to_json(settings),
        seed=settings.seed,
        sizes=sizes,
    ) as fresh:
        tensors = {"codes": codes, "vectors": vectors, "codebooks": quantised.codebooks}
        save_file(tensors, fresh / TENSORS)
        write_trie(fresh / "trie", trie)
        write_events_used(fresh, train.rows)
    return read_semantic_ids(folder)


def read_semantic_ids(folder: Path) -> SemanticIds:
    """Read the artefact back, the trie memory-mapped. Raises: ArtifactError."""
    manifest = read_manifest(folder, "semantic_ids")
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / TENSORS} cannot be read ({error}); make the Semantic IDs again") from error
    return SemanticIds(**tensors, trie=read_trie(folder / "trie"), content_hash=manifest.content_hash)
