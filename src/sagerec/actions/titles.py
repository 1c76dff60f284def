"""Titles as actions: every item is written as its own title, in the vocabulary of a language model.

A title is one line; the tokenizer's line end (or its end of text) ends it, so that no title begins another, and a
history of titles reads as a slate does. Titles are told apart as people would: case, unicode forms and white space do
not count. Where two are the same, or become so by being cut, the later one gets a number (`Soap (2)`), which lists
show; a title that is empty or that the tokenizer cannot write is replaced by brand, categories or item id, and counted.

Shapes: N items, F tokens of all titles, C clusters, D width of vectors.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sagerec.actions.semantic_ids.build import SemanticIdSettings, item_vectors, quantise_items
from sagerec.actions.space import ActionSpace, index_sequences
from sagerec.actions.trie import PADDING, Trie, build_trie, read_trie, write_trie
from sagerec.artifacts import UNREADABLE, hash_file, read_manifest, write_artifact
from sagerec.catalogue.audit import write_events_used
from sagerec.catalogue.dataset import CATEGORIES, ITEM_ID, TITLE, Dataset
from sagerec.catalogue.splits import Sequences
from sagerec.config import between, check_fields, full_path, require, to_json
from sagerec.errors import ArtifactError, DatasetError, MissingExtraError, SettingsError

KIND = "text"
"""Of the artefact, and its folder in a run."""
TENSORS, TABLE, TOKENIZER = "titles.safetensors", "titles.parquet", "tokenizer"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
    *("added_tokens.json", "special_tokens_map.json"),
)
"""What of a model's folder decides how titles are written."""
HALF = "\ufffd"
"""What a tokenizer of bytes reads where a character is cut."""


@dataclass(frozen=True, slots=True)
class TitleSettings:
    """How titles become token sequences."""

    model: str = ""
    """Folder or name of the language model whose tokenizer writes them; where not given, that of the policy."""
    max_tokens: int = 32
    """Tokens of a title, at most: a longer one is cut there; the number that tells two apart comes on top."""
    refuse_empty: bool = False
    """Refuse items without a title, instead of writing brand, categories or item id in its place."""
    seed: int = 0
    """Seed of the clusters by which diversity is measured."""

    def __post_init__(self) -> None:
        check_fields(self, max_tokens=between(1, 1024))
        object.__setattr__(self, "model", full_path(self.model))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Titles(ActionSpace):
    """Titles as an action space; content vectors and clusters are those that Semantic IDs would have."""

    vectors: np.ndarray
    """(N, D) float32 content vectors."""
    points: np.ndarray
    """(C, D) float32 centroids of the clusters."""
    groups: np.ndarray
    """(N,) int64 cluster of each item."""
    written: list[str]
    """(N,) each title as it is written."""
    end: int
    """The token that ends a title."""
    model: str
    """Whose tokenizer wrote them."""
    tokenizer: Path
    """Folder of that tokenizer."""

    def centroids(self) -> tuple[np.ndarray, np.ndarray]:
        """The centroids of the clusters that items have, and the place of each item's among them."""
        used, group = np.unique(self.groups, return_inverse=True)
        return self.points[used], group

    def first_tokens(self) -> np.ndarray:
        """(N,) the cluster of each item: what Semantic IDs would begin with, for a title's first word says little."""
        return self.groups

    def titles(self, given: list[str]) -> list[str]:
        """(N,) titles as they are written."""
        return self.written


def normalise(text: str) -> str:
    """What two titles are compared by: unicode NFKC, case folded, white space as single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def first_line(error: Exception) -> str:
    """What an error of another library says first; the rest is advice on its own settings."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a language model's folder or name. Raises: MissingExtraError; SettingsError."""
    require(
        bool(model), "titles need the tokenizer of a language model; give --model FOLDER (sagerec lm new makes one)"
    )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError('language models need transformers: pip install "sagerec[lm]"') from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsError(
            f"model is {model!r}, whose tokenizer cannot be read ({first_line(error)}); expected a folder with a "
            "Hugging Face language model (sagerec lm new makes one), or the name of one where the hub is at hand"
        ) from error
    # Of a folder without one transformers makes a tokenizer that knows no token.
    require(
        bool(tokenizer("a title", add_special_tokens=False)["input_ids"]),
        f"model is {model!r}, whose tokenizer writes nothing; expected a folder with tokenizer.json, or what else its "
        "tokenizer is kept in, beside the weights",
    )
    return tokenizer


def end_token(tokenizer: Any) -> int:
    """The token that ends a title: a line end alone where the tokenizer has one, else its end of text.

    Raises: SettingsError where it has neither.
    """
    for token in reversed(tokenizer("a\nb", add_special_tokens=False)["input_ids"]):
        if tokenizer.decode([token]) == "\n":
            return int(token)
    if tokenizer.eos_token_id is None:
        raise SettingsError("the tokenizer has neither a token for the line end nor an end of text; give another model")
    return int(tokenizer.eos_token_id)


def plain_titles(data: Dataset, *, refuse_empty: bool = False) -> tuple[list[str], int]:
    """Titles on one line each, and for how many something else stands: brand and categories, or the item id.

    Raises: DatasetError for an empty title where that is refused.
    """
    columns = {TITLE, "brand", CATEGORIES, ITEM_ID} & set(data.items.columns)
    found, replaced = [], 0
    for row in data.items.select(sorted(columns)).iter_rows(named=True):
        title = " ".join((row.get(TITLE) or "").split())
        if not title:
            if refuse_empty:
                raise DatasetError(
                    f"item {row[ITEM_ID]!r} has no title; give it one, or let brand and categories stand in its place"
                )
            replaced += 1
            named = [row.get("brand") or "", *(category or "" for category in row.get(CATEGORIES) or [])]
            title = " ".join(" ".join(named).split()) or str(row[ITEM_ID])
        found.append(title)
    return found, replaced


def write_titles(
    texts: Sequence[str], tokenizer: Any, *, max_tokens: int, instead: Sequence[str]
) -> tuple[list[list[int]], list[str], dict[str, int]]:
    """The tokens of each title without its end, each as it reads, and counts: cut, numbered, unwritable.

    No two read the same to `normalise`, nor have the same tokens. `instead` is written for a title of which the
    tokenizer leaves nothing. Raises: SettingsError where the tokenizer cannot tell titles apart.
    """
    special, end = set(tokenizer.all_special_ids), end_token(tokenizer)

    def encode(many: Sequence[str]) -> list[list[int]]:
        """Tokens that stand for text, none of which ends a title or means something to the model."""
        encoded = tokenizer(list(many), add_special_tokens=False, verbose=False)["input_ids"] if many else []
        return [[int(t) for t in tokens if t not in special and t != end] for tokens in encoded]

    def decode(tokens: list[int]) -> str:
        return " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())

    counts = {"cut": 0, "numbered": 0, "unwritable": 0}
    found, written = [], []
    taken: set[str] = set()
    used: set[tuple[int, ...]] = set()
    last: dict[str, int] = {}
    for number, tokens in enumerate(encode(texts)):
        is_cut, tokens = len(tokens) > max_tokens, tokens[:max_tokens]
        counts["cut"] += is_cut
        tokens = whole_characters(tokenizer, tokens) if is_cut else tokens
        if not decode(tokens):
            counts["unwritable"] += 1
            tokens = encode([instead[number]])[0]
        text = base = decode(tokens)
        if normalise(text) in taken or tuple(tokens) in used or not tokens:
            counts["numbered"] += 1
            count = last.get(normalise(base), 1)
            while normalise(text) in taken or tuple(tokens) in used or not tokens:
                count += 1
                if count > len(texts) + 1:
                    raise SettingsError(
                        f"the tokenizer writes {base!r} and its numbers alike, so that titles cannot be told apart; "
                        "expected one that knows digits"
                    )
                tokens = encode([f"{base} ({count})"])[0]
                text = decode(tokens)
            last[normalise(base)] = count
        taken.add(normalise(text))
        used.add(tuple(tokens))
        found.append(tokens)
        written.append(text)
    return found, written, counts


def whole_characters(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens of a text that was cut, without those of a character that is not all there."""
    while tokens and tokenizer.decode(tokens).endswith(HALF):
        tokens = tokens[:-1]
    return tokens


def inputs(settings: TitleSettings) -> dict[str, str]:
    """Content hashes of the tokenizer's files; a name's hub tells its versions apart by itself."""
    folder = Path(settings.model)
    return {f"tokenizer/{name}": hash_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


def build_titles(
    folder: Path, data: Dataset, train: Sequences, settings: TitleSettings, *, made_from: dict[str, str]
) -> Titles:
    """Write the artefact to `folder`. `train` must hold training events only (audited)."""
    tokenizer = load_tokenizer(settings.model)
    texts, replaced = plain_titles(data, refuse_empty=settings.refuse_empty)
    ids = data.item_ids.external(range(data.n_items))
    tokens, written, counts = write_titles(texts, tokenizer, max_tokens=settings.max_tokens, instead=ids)
    end = end_token(tokenizer)
    table = np.full((len(tokens), max(map(len, tokens)) + 1), PADDING, dtype=np.int32)
    for row, title in zip(table, tokens, strict=True):
        row[: len(title) + 1] = [*title, end]
    trie = build_trie(table)
    clusters = SemanticIdSettings(levels=1, seed=settings.seed)
    vectors = item_vectors(data, train, clusters).vectors
    quantised = quantise_items(data, vectors, clusters)
    lengths = np.array([len(title) + 1 for title in tokens])
    sizes = {
        "items": data.n_items,
        "distinct_ids": data.n_items,
        "empty_replaced": replaced,
        **counts,
        "tokens_per_title": float(lengths.mean()),
        "longest": int(lengths.max()),
        "trie_nodes": trie.n_nodes,
        "trie_bytes": trie.n_bytes,
    }
    with write_artifact(
        folder, KIND, made_from=made_from, settings=to_json(settings), seed=settings.seed, sizes=sizes
    ) as fresh:
        arrays = {
            "tokens": table[table != PADDING],
            "lengths": lengths,
            "end": np.array([end]),
            "vectors": vectors,
            "points": quantised.codebooks[0],
            "groups": quantised.codes[:, 0].astype(np.int64),
        }
        save_file(arrays, fresh / TENSORS)
        pl.DataFrame({TITLE: written}).write_parquet(fresh / TABLE)
        tokenizer.save_pretrained(fresh / TOKENIZER)
        write_trie(fresh / "trie", trie)
        write_events_used(fresh, train.rows)
    return read_titles(folder)


def read_titles(folder: Path) -> Titles:
    """Read the artefact back, the trie memory-mapped. Raises: ArtifactError."""
    manifest = read_manifest(folder, KIND)
    try:
        arrays = load_file(folder / TENSORS)
        written = pl.read_parquet(folder / TABLE)[TITLE].to_list()
    except (SafetensorError, *UNREADABLE) as error:
        raise ArtifactError(f"{folder} cannot be read ({error}); make the titles again") from error
    space = index_titles(
        arrays, written, read_trie(folder / "trie"), model=str(manifest.settings["model"]), tokenizer=folder / TOKENIZER
    )
    return replace(space, content_hash=manifest.content_hash, grown_from=tuple(manifest.grown_from))


def index_titles(
    arrays: dict[str, np.ndarray], written: list[str], trie: Trie, *, model: str, tokenizer: Path
) -> Titles:
    """The titles whose trie is there."""
    ways = index_sequences(trie, arrays["tokens"], arrays["lengths"])
    return Titles(
        trie=trie,
        vectors=arrays["vectors"],
        points=arrays["points"],
        groups=arrays["groups"],
        written=written,
        end=int(arrays["end"][0]),
        model=model,
        tokenizer=tokenizer,
        **ways,
    )
