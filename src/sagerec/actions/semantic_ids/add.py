"""New items into an artefact of Semantic IDs: the codes of the older items stay, and the trie grows.

A new item is embedded by the saved projections; having no events, it takes its co-occurrence block from the items most
alike in the other blocks, or it would stand among the items that nobody takes, by its codes and by its vector. It gets
the nearest centroid at each level among the codes in use and, where IDs are unique, the next free last code of the
items that it collides with. So only the last level can grow, and a policy trained before serves on
(`policies.history_encoder`).

Shapes: N items, n of them new, D dimensions, L codes per item.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import polars as pl
import torch
from safetensors.numpy import save_file

from sagerec.actions.semantic_ids.build import (
    NETWORK,
    PROJECTIONS,
    TENSORS,
    VOCABULARY,
    SemanticIdSettings,
    read_semantic_ids,
    read_tensors,
    sizes_of,
)
from sagerec.actions.semantic_ids.embedders import Projection, embed_sentences, project_categories, project_text
from sagerec.actions.semantic_ids.quantisers import mean_square, nearest_codes, separate
from sagerec.actions.semantic_ids.rq_vae import encode, load_rq_vae
from sagerec.actions.trie import Trie, build_trie, write_trie
from sagerec.artifacts import UNREADABLE, read_manifest, write_artifact
from sagerec.catalogue.audit import EVENTS_USED
from sagerec.catalogue.dataset import CATEGORIES, Dataset
from sagerec.config import from_json
from sagerec.errors import ArtifactError

ALIKE = 3
"""Items whose co-occurrence block stands in for that of a new item while its codes are found."""


@dataclass(frozen=True, slots=True)
class Addition:
    """What becomes of an artefact by its new items."""

    codes: np.ndarray
    """(N + n, L) int32 codes of all items, the new ones last."""
    vectors: np.ndarray
    """(N + n, D) float32 their vectors."""
    trie: Trie
    """Over all of them."""
    items: int
    """n."""
    collisions: int
    """How many of the new items have the quantiser's codes of another item."""
    reconstruction_error: float
    """Mean squared length of what the codes leave over of the vectors that were coded, over that of the vectors (for an
    RQ-VAE, these are what it makes of the items' vectors)."""


def new_item_vectors(folder: Path, new: Dataset, settings: SemanticIdSettings, blocks: dict[str, int]) -> np.ndarray:
    """Vectors (n, D) of the items of `new` in the space of the artefact at `folder`, whose blocks have these widths.

    Raises: ArtifactError where the artefact does not hold its projections.
    """
    arrays = read_tensors(folder / PROJECTIONS)

    def projection(name: str) -> Projection:
        return Projection(**{part: arrays[f"{name}.{part}"] for part in ("features", "idf", "components")})

    found = []
    for name, width in blocks.items():
        if name == "text":
            found.append(settings.text_weight * project_text(new.texts(), projection(name)))
        elif name == "categories":
            found.append(settings.category_weight * project_categories(new, _vocabulary(folder), projection(name)))
        elif name == "sentences":
            found.append(settings.sentence_weight * embed_sentences(new.texts(), settings.sentence_model))
        else:
            found.append(np.zeros((new.n_items, width), dtype=np.float32))
    return np.concatenate(found, axis=1).astype(np.float32)


def fill_collaborative(vectors: np.ndarray, old: np.ndarray, blocks: dict[str, int]) -> np.ndarray:
    """Vectors (n, D) whose co-occurrence block is the mean of the ALIKE old ones (N, D) nearest in the other blocks.

    Only old items with events count. A vector of which nothing is known (zeros) stays, and so do all where there is no
    co-occurrence block or no other.
    """
    names = np.repeat(list(blocks), list(blocks.values()))
    block = names == "collaborative"
    alike = old[(old[:, block] != 0).any(axis=1)]
    known = (vectors[:, ~block] != 0).any(axis=1)
    if len(alike) == 0 or not known.any():
        return vectors
    index = faiss.IndexFlatL2(int((~block).sum()))
    index.add(np.ascontiguousarray(alike[:, ~block]))
    _, nearest = index.search(np.ascontiguousarray(vectors[known][:, ~block]), min(ALIKE, len(alike)))
    filled = vectors.copy()
    filled[np.ix_(known, block)] = alike[:, block][nearest].mean(axis=1)
    return filled


def code_new_items(folder: Path, data: Dataset) -> Addition:
    """Codes for the last items of `data`, which the artefact at `folder` does not hold yet. Raises: ArtifactError."""
    manifest, ids = read_manifest(folder, "semantic_ids"), read_semantic_ids(folder)
    settings, n_old, levels = from_json(SemanticIdSettings, manifest.settings), len(ids.codes), len(ids.codebooks)
    vectors = new_item_vectors(folder, replace(data, items=data.items[n_old:]), settings, manifest.sizes["blocks"])
    coded = filled = fill_collaborative(vectors, ids.vectors, manifest.sizes["blocks"])
    if settings.quantiser == "rq-vae":
        coded = encode(load_rq_vae(read_tensors(folder / NETWORK)), torch.from_numpy(filled)).numpy()
    chosen, left = nearest_codes(coded, ids.codebooks, [np.unique(column) for column in ids.codes.T[:levels]])
    prefixes = np.concatenate([ids.codes[:, :levels], chosen])
    # Ranked in the order of arrival, a new item comes after all that share its codes: the next free last code.
    ranks = separate(prefixes, np.zeros(len(prefixes)))
    if settings.unique:
        codes = np.concatenate([ids.codes, ranks[n_old:]])
        trie = build_trie(codes)
    else:
        codes = prefixes
        first = n_old + np.flatnonzero(ranks[n_old:, -1] == 0)
        listed = np.concatenate([np.sort(ids.trie.item[ids.trie.item >= 0].numpy()), first])
        trie = build_trie(codes[listed], listed)
    _, inverse, counts = np.unique(prefixes, axis=0, return_inverse=True, return_counts=True)
    return Addition(
        codes=codes,
        vectors=np.concatenate([ids.vectors, filled]),
        trie=trie,
        items=len(vectors),
        collisions=int((counts[inverse.reshape(-1)[n_old:]] > 1).sum()),
        reconstruction_error=mean_square(left) / mean_square(coded),
    )


def write_addition(folder: Path, addition: Addition, *, made_from: dict[str, str]) -> None:
    """Write the artefact at `folder` anew, with the new items; `made_from` holds the hash of the grown dataset.

    Its manifest names the content that it had before, so that what was trained on that is told to fit.
    """
    manifest, ids = read_manifest(folder, "semantic_ids"), read_semantic_ids(folder)
    record = {name: getattr(addition, name) for name in ("items", "collisions", "reconstruction_error")}
    sizes = manifest.sizes | sizes_of(addition.codes, addition.trie, levels=len(ids.codebooks))
    sizes["added"] = [*manifest.sizes.get("added", []), record]
    with write_artifact(
        folder,
        "semantic_ids",
        made_from=manifest.made_from | made_from,
        settings=manifest.settings,
        seed=manifest.seed,
        sizes=sizes,
        grown_from=[*manifest.grown_from, manifest.content_hash],
    ) as fresh:
        tensors = {"codes": addition.codes, "vectors": addition.vectors, "codebooks": ids.codebooks}
        save_file(tensors, fresh / TENSORS)
        write_trie(fresh / "trie", addition.trie)
        for name in (PROJECTIONS, VOCABULARY, NETWORK, EVENTS_USED):
            if (folder / name).is_file():
                shutil.copy(folder / name, fresh / name)


def _vocabulary(folder: Path) -> list[str]:
    """The categories that the artefact knows, in the order of their columns."""
    try:
        values: list[str] = pl.read_parquet(folder / VOCABULARY)[CATEGORIES].to_list()
    except UNREADABLE as error:
        raise ArtifactError(f"{folder / VOCABULARY} cannot be read ({error}); make the Semantic IDs again") from error
    return values
