"""The Semantic-ID stage: embed, quantise, separate, index; written as one artefact.

The folder holds `ids.safetensors` (codes, codebooks, item vectors), the trie's arrays, the rows of the log that were
used, and what later items need (`semantic_ids.add`): `projections.safetensors`, `categories.parquet` and, for an
RQ-VAE, `network.safetensors`.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sagerec.actions.semantic_ids.balanced import balanced_kmeans
from sagerec.actions.semantic_ids.embedders import (
    Fitted,
    Projection,
    category_vocabulary,
    embed_categories,
    embed_collaborative,
    embed_sentences,
    embed_text,
)
from sagerec.actions.semantic_ids.existing import read_existing
from sagerec.actions.semantic_ids.quantisers import (
    Quantisation,
    codebooks_of,
    collision_rate,
    residual_kmeans,
    separate,
)
from sagerec.actions.semantic_ids.rq_vae import rq_vae
from sagerec.actions.space import ActionSpace, index_sequences
from sagerec.actions.trie import ROOT, Trie, build_trie, read_trie, write_trie
from sagerec.artifacts import hash_file, read_manifest, write_artifact
from sagerec.catalogue.audit import write_events_used
from sagerec.catalogue.dataset import CATEGORIES, Dataset
from sagerec.catalogue.splits import Sequences
from sagerec.config import at_least, between, check_fields, require, to_json
from sagerec.errors import ArtifactError

KIND = "semantic_ids"
"""Of the artefact, and its folder in a run."""
TENSORS, NETWORK = "ids.safetensors", "network.safetensors"
PROJECTIONS, VOCABULARY = "projections.safetensors", "categories.parquet"


@dataclass(frozen=True, slots=True)
class SemanticIdSettings:
    """How items become codes."""

    quantiser: Literal["residual-kmeans", "balanced-kmeans", "rq-vae", "existing"] = "residual-kmeans"
    """residual-kmeans; balanced-kmeans: clusters of equal size; rq-vae: on vectors that an autoencoder learns;
    existing: IDs that the items bring, whose levels and codebook sizes are then theirs."""
    existing: str = ""
    """For `existing`: an index.json with the IDs ({item_id: ["<a_236>", …]}); empty reads the items' column
    `semantic_id`."""
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
    vae_epochs: int = 60
    """For `rq-vae`: passes over the items."""
    vae_width: int = 512
    """Width of the first hidden layer of its encoder; the second has half of it."""
    vae_latent: int = 128
    """Width of the vectors that it quantises."""
    vae_commitment: float = 0.25
    """Weight of the pull of its vectors towards their codes."""
    seed: int = 0
    """Seed of the SVD, of k-means and of the RQ-VAE."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            text_weight=at_least(0),
            category_weight=at_least(0),
            collaborative_weight=at_least(0),
            sentence_weight=at_least(0),
            levels=between(1, 8),
            window=at_least(1),
            vae_epochs=at_least(1, 100_000),
            vae_width=at_least(1, 65_536),
            vae_latent=at_least(1, 65_536),
            vae_commitment=at_least(0),
            text_dimensions=at_least(1, 65_536),
            category_dimensions=at_least(1, 65_536),
            collaborative_dimensions=at_least(1, 65_536),
        )
        require(
            not self.existing or self.quantiser == "existing",
            f"existing is {self.existing!r} and quantiser {self.quantiser!r}; expected quantiser 'existing' with it",
        )
        require(
            self.codebook_size == 0 or 2 <= self.codebook_size <= 32767,
            f"codebook_size is {self.codebook_size}; expected 2 to 32767, or 0 to have it chosen",
        )
        weights = (self.text_weight, self.category_weight, self.collaborative_weight, self.sentence_weight)
        require(max(weights) > 0, "every weight is 0; expected one above")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SemanticIds(ActionSpace):
    """The codes of every item as an action space; where items share an ID, lists hold the one most often trained on."""

    vectors: np.ndarray
    """(N, D) float32 weighted vectors that were quantised."""
    codes: np.ndarray
    """(N, L) int32 code sequence of each item."""
    codebooks: np.ndarray
    """(levels, C, D) float32 centroids."""

    def centroids(self) -> tuple[np.ndarray, np.ndarray]:
        """The centroids of the first codes that items have, and the place of each item's first code among them."""
        used, group = np.unique(self.codes[:, 0], return_inverse=True)
        return self.codebooks[0][used], group


def chosen_codebook_size(n_items: int) -> int:
    """The power of two nearest (in ratio) to a third of the items, from 16 to 4096.

    On Amazon Beauty (12,101 items) 2 x 4096 won on validation over 3 x 256, 2 x 1024 and 2 x 2048 (docs/log.md).
    """
    return int(np.clip(2 ** round(math.log2(max(n_items / 3, 1))), 16, 4096))


@dataclass(frozen=True, slots=True)
class ItemVectors:
    """What is quantised, and what puts later items into the same space."""

    vectors: np.ndarray
    """(N, D) float32 weighted, concatenated blocks."""
    blocks: dict[str, int]
    """Width of each block, in the order in which they stand side by side."""
    projections: dict[str, Projection]
    """Of the blocks text and categories, where they are there."""
    vocabulary: list[str]
    """Categories in the order of their columns."""


def item_vectors(data: Dataset, train: Sequences, settings: SemanticIdSettings) -> ItemVectors:
    """The weighted, concatenated vectors (N, D) of all embedders whose weight is above 0."""
    blocks: dict[str, np.ndarray] = {}
    fitted: dict[str, Fitted] = {}
    if settings.text_weight:
        fitted["text"] = embed_text(data.texts(), dimensions=settings.text_dimensions, seed=settings.seed)
        blocks["text"] = settings.text_weight * fitted["text"].vectors
    if settings.category_weight and data.has_categories():
        fitted["categories"] = embed_categories(data, dimensions=settings.category_dimensions, seed=settings.seed)
        blocks["categories"] = settings.category_weight * fitted["categories"].vectors
    if settings.collaborative_weight:
        collaborative = embed_collaborative(
            train,
            data.n_items,
            dimensions=settings.collaborative_dimensions,
            window=settings.window,
            seed=settings.seed,
        )
        blocks["collaborative"] = settings.collaborative_weight * collaborative
    if settings.sentence_weight:
        blocks["sentences"] = settings.sentence_weight * embed_sentences(data.texts(), settings.sentence_model)
    require(bool(blocks), "no embedder is left: the items have no categories; give another weight above 0")
    return ItemVectors(
        vectors=np.concatenate(list(blocks.values()), axis=1),
        blocks={name: block.shape[1] for name, block in blocks.items()},
        projections={name: found.projection for name, found in fitted.items()},
        vocabulary=category_vocabulary(data) if "categories" in fitted else [],
    )


def quantise_items(data: Dataset, vectors: np.ndarray, settings: SemanticIdSettings) -> Quantisation:
    """Codes of all items from their vectors (N, D), by the quantiser that the settings name."""
    if settings.quantiser == "existing":
        index = Path(settings.existing) if settings.existing else None
        return codebooks_of(vectors, read_existing(data, index))
    size = settings.codebook_size or chosen_codebook_size(data.n_items)
    levels, seed = settings.levels, settings.seed
    if settings.quantiser == "rq-vae":
        return rq_vae(
            vectors,
            levels=levels,
            codebook_size=size,
            width=settings.vae_width,
            latent=settings.vae_latent,
            epochs=settings.vae_epochs,
            commitment=settings.vae_commitment,
            seed=seed,
        )
    if settings.quantiser == "balanced-kmeans":
        return residual_kmeans(vectors, levels=levels, codebook_size=size, seed=seed, cluster=balanced_kmeans)
    return residual_kmeans(vectors, levels=levels, codebook_size=size, seed=seed)


def build_semantic_ids(
    folder: Path, data: Dataset, train: Sequences, settings: SemanticIdSettings, *, made_from: dict[str, str]
) -> SemanticIds:
    """Run the stage and write its artefact to `folder`. `train` must hold training events only (audited)."""
    embedded = item_vectors(data, train, settings)
    quantised = quantise_items(data, embedded.vectors, settings)
    codes = quantised.codes
    separated = separate(codes, np.bincount(train.items, minlength=data.n_items))
    if settings.unique:
        codes = separated
        trie = build_trie(codes)
    else:
        listed = np.flatnonzero(separated[:, -1] == 0)
        trie = build_trie(codes[listed], listed)
    sizes = {
        **sizes_of(codes, trie, levels=quantised.codes.shape[1]),
        "dimensions": embedded.vectors.shape[1],
        "blocks": embedded.blocks,
        "perplexity": quantised.perplexities,
        "reconstruction_error": quantised.errors,
    }
    with write_artifact(
        folder,
        KIND,
        made_from=made_from,
        settings=to_json(settings),
        seed=settings.seed,
        sizes=sizes,
    ) as fresh:
        tensors = {"codes": codes, "vectors": embedded.vectors, "codebooks": quantised.codebooks}
        save_file(tensors, fresh / TENSORS)
        if quantised.network:
            save_file(quantised.network, fresh / NETWORK)
        _write_projections(fresh, embedded)
        write_trie(fresh / "trie", trie)
        write_events_used(fresh, train.rows)
    return read_semantic_ids(folder)


def inputs(settings: SemanticIdSettings) -> dict[str, str]:
    """Content hash of the file of existing IDs, where one is given. Raises: ArtifactError where it is missing."""
    if not settings.existing:
        return {}
    if not Path(settings.existing).is_file():
        raise ArtifactError(f"{settings.existing} is missing; give the index.json that holds the existing Semantic IDs")
    return {"existing": hash_file(Path(settings.existing))}


def sizes_of(codes: np.ndarray, trie: Trie, *, levels: int) -> dict[str, object]:
    """Counts for the manifest: of codes (N, L) whose first `levels` the quantiser gave, and of their trie."""
    return {
        "items": len(codes),
        "distinct_ids": int(trie.size[ROOT]),
        "level_sizes": [int(n) for n in codes.max(axis=0) + 1],
        "codes_in_use": [len(np.unique(column)) for column in codes.T],
        "collision_rate": collision_rate(codes[:, :levels]),
        "trie_nodes": trie.n_nodes,
        "trie_bytes": trie.n_bytes,
    }


def _write_projections(folder: Path, embedded: ItemVectors) -> None:
    """Save what `semantic_ids.add` embeds later items by."""
    arrays = {}
    for name, projection in embedded.projections.items():
        for part in ("features", "idf", "components"):
            arrays[f"{name}.{part}"] = getattr(projection, part)
    save_file(arrays, folder / PROJECTIONS)
    pl.DataFrame({CATEGORIES: embedded.vocabulary}, schema={CATEGORIES: pl.String}).write_parquet(folder / VOCABULARY)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a file of the artefact. Raises: ArtifactError."""
    try:
        tensors: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); make the Semantic IDs again") from error
    return tensors


def read_semantic_ids(folder: Path) -> SemanticIds:
    """Read the artefact back, the trie memory-mapped. Raises: ArtifactError."""
    manifest = read_manifest(folder, KIND)
    ids = index_ids(**read_tensors(folder / TENSORS), trie=read_trie(folder / "trie"))
    return replace(ids, content_hash=manifest.content_hash, grown_from=tuple(manifest.grown_from))


def index_ids(*, codes: np.ndarray, vectors: np.ndarray, codebooks: np.ndarray, trie: Trie) -> SemanticIds:
    """The Semantic IDs of codes (N, L) whose trie is there."""
    ways = index_sequences(trie, codes.ravel(), np.full(len(codes), codes.shape[1]))
    return SemanticIds(codes=codes, vectors=vectors, codebooks=codebooks, trie=trie, **ways)
