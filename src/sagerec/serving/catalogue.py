"""The catalogue as requests see it: items by id, categories, cold items, filters, words of titles.

Shapes: N items, Q categories, E pairs of an item and one of its categories.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import polars as pl
import torch

from sagerec.actions.filters import Filter, make_filter
from sagerec.actions.space import ActionSpace
from sagerec.catalogue.dataset import CATEGORIES, Dataset, IdMap
from sagerec.catalogue.splits import Split, learnt_counts
from sagerec.serving.settings import COLD_EVENTS, FILTER_BYTES


class FilterKey(NamedTuple):
    """What decides a filter; categories and items by index."""

    categories_in: frozenset[int] | None = None
    categories_out: frozenset[int] = frozenset()
    items_in: frozenset[int] | None = None
    cold_only: bool = False


EVERYTHING = FilterKey()


@dataclass(frozen=True)
class Catalogue:
    """The items of one version."""

    item_ids: IdMap
    """External item ids."""
    titles: list[str]
    """(N,) titles, the id where there is none."""
    counts: np.ndarray
    """(N,) int64 interactions in what was learnt."""
    category_names: list[str]
    """(Q,) names, ascending."""
    category_items: np.ndarray
    """(E,) int64 items, category after category."""
    category_offsets: np.ndarray
    """(Q + 1,) int64 bounds of the categories."""
    item_categories: list[list[str]]
    """(N,) names of each item's categories, in the order of the dataset."""

    def __len__(self) -> int:
        return len(self.titles)

    @cached_property
    def ids(self) -> list[str]:
        """(N,) item ids."""
        found: list[str] = self.item_ids.ids.to_list()
        return found

    @cached_property
    def places(self) -> dict[str, int]:
        """Item id -> index."""
        return {value: i for i, value in enumerate(self.ids)}

    @cached_property
    def category_places(self) -> dict[str, int]:
        """Category -> index."""
        return {name: i for i, name in enumerate(self.category_names)}

    @cached_property
    def cold(self) -> np.ndarray:
        """(N,) bool."""
        found: np.ndarray = self.counts <= COLD_EVENTS
        return found

    @cached_property
    def narrowest(self) -> np.ndarray:
        """(N,) int64 of each item's categories the one with fewest items, -1 where it has none."""
        sizes = np.diff(self.category_offsets)
        found = np.full(len(self), -1, dtype=np.int64)
        for category in np.argsort(-sizes, kind="stable"):  # the smallest writes last
            found[self.items_of(category)] = category
        return found

    @cached_property
    def _lowered(self) -> pl.Series:
        return pl.Series(self.titles, dtype=pl.String).str.to_lowercase()

    @cached_property
    def _by_count(self) -> np.ndarray:
        return np.argsort(-self.counts, kind="stable")

    def items_of(self, category: int) -> np.ndarray:
        """Items of a category."""
        return self.category_items[self.category_offsets[category] : self.category_offsets[category + 1]]

    def mask(self, key: FilterKey) -> np.ndarray:
        """(N,) bool: what the filter of a key allows."""
        allowed = np.ones(len(self), dtype=bool)
        if key.categories_in is not None:
            allowed[:] = False
            for category in key.categories_in:
                allowed[self.items_of(category)] = True
        for category in key.categories_out:
            allowed[self.items_of(category)] = False
        if key.items_in is not None:
            only = np.zeros(len(self), dtype=bool)
            only[list(key.items_in)] = True
            allowed &= only
        return allowed & self.cold if key.cold_only else allowed

    def search(self, words: str, limit: int) -> list[int]:
        """Items whose titles hold every one of `words`, those taken most often first."""
        found = pl.Series([True]).new_from_index(0, len(self))
        for word in words.lower().split():
            found &= self._lowered.str.contains(word, literal=True)
        order = self._by_count
        return [int(i) for i in order[found.to_numpy()[order]][:limit]]

    def describe(self, item: int) -> dict[str, object]:
        """An item as answers name it."""
        return {
            "item_id": self.ids[item],
            "title": self.titles[item],
            "categories": self.item_categories[item],
            "cold": bool(self.cold[item]),
        }


def read_catalogue(data: Dataset, split: Split) -> Catalogue:
    """The catalogue of a run."""
    lists: list[list[str]] = [[] for _ in range(data.n_items)]
    names: list[str] = []
    items, offsets = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    if data.has_categories():
        column = data.items[CATEGORIES].list.drop_nulls().fill_null([])
        lists = column.list.unique(maintain_order=True).to_list()
        table = pl.DataFrame({"name": lists}).with_row_index("item").explode("name").drop_nulls()
        table = table.sort("name", "item")
        names = table["name"].unique(maintain_order=True).to_list()
        items = table["item"].to_numpy().astype(np.int64)
        offsets = np.append(np.flatnonzero(table["name"].rle_id().diff().fill_null(1).to_numpy()), len(items))
    return Catalogue(
        item_ids=data.item_ids,
        titles=data.titles(range(data.n_items)),
        counts=learnt_counts(data, split),
        category_names=names,
        category_items=items,
        category_offsets=offsets.astype(np.int64),
        item_categories=lists,
    )


class FilterCache:
    """The filters of one space that were used last; older ones go where they take too much memory."""

    def __init__(self, catalogue: Catalogue, space: ActionSpace, most_bytes: int = FILTER_BYTES) -> None:
        self._catalogue, self._space, self._most_bytes = catalogue, space, most_bytes
        self._kept: OrderedDict[FilterKey, Filter] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: FilterKey) -> Filter:
        """The filter of a key."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self.make(key)
                while len(self._kept) > 1 and self.n_bytes > self._most_bytes:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def make(self, key: FilterKey, closed_categories: Iterable[int] = ()) -> Filter:
        """The filter of a key, and of categories that are narrowest for no item that may be shown."""
        allowed = self._catalogue.mask(key)
        if closed := list(closed_categories):
            allowed &= ~np.isin(self._catalogue.narrowest, closed)
        return make_filter(self._space, torch.from_numpy(allowed).to(self._space.device))

    @property
    def n_bytes(self) -> int:
        """Memory of the filters that are kept."""
        return sum(one.n_bytes for one in self._kept.values())
