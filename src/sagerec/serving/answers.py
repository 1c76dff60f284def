"""Queries to answers: names to indices of one version, a batch through the decoder, and indices back to names.

A diversity filter (`max_per_category`) is exact too: the list is, place by place, the most probable item that the
categories which are full by then do not close. Where the K best hold such an item, full categories are closed in the
trie and the rest of the list is decoded anew.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sagerec.errors import SagerecError
from sagerec.serving.catalogue import EVERYTHING, FilterKey
from sagerec.serving.queries import NO_FILTERS, Query
from sagerec.serving.rows import Found, Row, list_rows, row_bytes, write_rows
from sagerec.serving.settings import MOST_PLACES, SHOWN, ServeSettings
from sagerec.serving.versions import Version


class QueryError(SagerecError):
    """A query that cannot be answered: what was got, and what was expected."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A query in the numbers of one version."""

    version: Version
    """Which answers it, whatever comes after."""
    policy: str
    """Name of the policy."""
    row: Row
    """What the decoder needs of it."""
    key: FilterKey
    """What decides its filter."""
    query: Query
    """As it was asked."""
    seed: int | None
    """Of a drawn slate."""
    unknown: list[str]
    """Ids that the catalogue does not have."""

    @property
    def _at_once(self) -> bool:
        """Whether one pass finds all places."""
        return self.query.kind == "list" and self.query.filters.max_per_category is None

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs of one group are decoded together: lists of like length, slates that are written alike."""
        query = self.query
        if query.kind == "list":
            return (self.version.id, self.policy, self._at_once, max(16, 1 << (query.k - 1).bit_length()))
        return (self.version.id, self.policy, query.k, query.temperature, query.top_p)

    def most_rows(self, settings: ServeSettings) -> int:
        """Jobs like this one that are decoded together: few enough for memory and, where they are decoded place by
        place, for those that wait behind them.
        """
        children, k = self.version.policies[self.policy].space.trie.max_children, self.query.k
        rows = min(settings.batch, settings.batch_bytes // row_bytes(self.version.widths, children, k))
        return max(1, rows if self._at_once else min(rows, MOST_PLACES // k))


def resolve(version: Version, query: Query) -> Job:
    """The job of a query. Raises: QueryError for a policy, a category or a history that the version does not have."""
    catalogue, filters, unknown = version.catalogue, query.filters, dict[str, None]()
    policy = query.policy or version.default
    if policy not in version.policies:
        raise QueryError(f"policy is {policy[:SHOWN]!r}; expected one of {', '.join(version.policies)}")

    if query.profile and not version.policies[policy].reads_profiles:
        raise QueryError(f"the policy {policy} reads no profiles; expected none, or another policy")

    def known(ids: Sequence[str]) -> list[int]:
        places = catalogue.places
        unknown.update((value, None) for value in ids if value not in places)
        return [places[value] for value in ids if value in places]

    history = known(query.history)
    if unknown and query.unknown == "refuse":
        raise QueryError(
            f"history has {len(unknown)} unknown ids, the first {next(iter(unknown))[:SHOWN]!r}; expected none"
        )
    if not history:
        raise QueryError(
            f"history has no id of the catalogue, the first is {query.history[0][:SHOWN]!r}; expected at least one"
        )
    left_out = {*(history if query.exclude_history else ()), *known(filters.items_out)}
    only = None if filters.items_in is None else frozenset(known(filters.items_in))
    key = FilterKey(
        None if filters.categories_in is None else _categories(version, filters.categories_in, "categories_in"),
        _categories(version, filters.categories_out, "categories_out"),
        only,
        filters.cold_only,
    )
    seed = query.seed
    if seed is None and query.temperature > 0:
        seed = secrets.randbits(53)  # a number that JSON readers keep whole
    row = Row(np.array(history, dtype=np.int64), np.array(sorted(left_out), dtype=np.int64), profile=query.profile)
    return Job(version, policy, row, key, query, seed, list(unknown))


def _categories(version: Version, names: Sequence[str], field_name: str) -> frozenset[int]:
    places = version.catalogue.category_places
    for name in names:
        if name not in places:
            such = f", such as {next(iter(places))!r}" if places else ""
            raise QueryError(
                f"filters.{field_name} has {name[:SHOWN]!r}; expected some of the {len(places)} categories{such}"
            )
    return frozenset(places[name] for name in names)


def answer(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The answers of jobs of one group, as the model Answer has them."""
    first = jobs[0]
    policy = first.version.policies[first.policy]
    rows = [
        job.row if job.key == EVERYTHING else replace(job.row, filter=first.version.filters.get(job.key))
        for job in jobs
    ]
    if first.query.kind == "slate":
        query, seeds = first.query, [job.seed or 0 for job in jobs]
        found = write_rows(policy, rows, query.k, temperature=query.temperature, top_p=query.top_p, seeds=seeds)
    else:
        found = list_rows(policy, rows, max(job.query.k for job in jobs))
        for at, job in enumerate(jobs):
            if job.query.filters.max_per_category is not None:
                found[at] = _spread(job, rows[at], job.query.filters.max_per_category, found[at])
    return [_words(job, one) for job, one in zip(jobs, found, strict=True)]


@dataclass(slots=True)
class _Spread:
    """A list in which no narrowest category has more than so many items."""

    items: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    listed: list[int] = field(default_factory=list)
    count: Counter[int] = field(default_factory=Counter)


def _spread(job: Job, row: Row, most: int, found: Found) -> Found:
    """The list of a diversity filter; `found` is the beginning of the plain one."""
    kept, narrowest, k = _Spread(), job.version.catalogue.narrowest, job.query.k
    policy = job.version.policies[job.policy]
    while True:
        for item, score, listed in zip(found.items, found.scores, found.listed, strict=True):
            category = int(narrowest[item])
            if len(kept.items) < k and (category < 0 or kept.count[category] < most):
                kept.items.append(item)
                kept.scores.append(score)
                kept.listed.append(listed)
                kept.count[category] += 1
        wanted = k - len(kept.items)
        if wanted == 0 or len(found.items) < k:
            return Found(kept.items, kept.scores, kept.listed)
        full = [category for category, count in kept.count.items() if category >= 0 and count >= most]
        closed = job.version.filters.make(job.key, full)
        more = replace(row, filter=closed, listed=tuple(kept.listed))
        found = list_rows(policy, [more], k)[0]


def _words(job: Job, found: Found) -> dict[str, Any]:
    """An answer in names."""
    query, catalogue, space = job.query, job.version.catalogue, job.version.policies[job.policy].space
    scores = found.scores[: query.k]
    floor = query.filters.min_score
    size = len(scores) if floor is None else sum(score >= floor for score in scores)
    items: list[dict[str, Any]] = []
    for place, (item, score) in enumerate(zip(found.items[:size], scores, strict=False)):
        named = catalogue.describe(item) | {"score": score}
        if query.kind == "slate":
            named |= {"tokens": space.sequence(item), "logprobs": found.logprobs[place]}
        items.append(named)
    return {
        "items": items,
        "policy": job.policy,
        "version": job.version.id,
        "unknown": job.unknown,
        "short": _why_short(query, size, len(scores)),
        "seed": job.seed,
    }


def _why_short(query: Query, size: int, before_floor: int) -> str | None:
    """Why an answer of `size` items has fewer than were asked for; None where it has not."""
    if size == query.k:
        return None
    if size < before_floor:
        return f"{size} of {query.k}: no other item has a score of {query.filters.min_score} or above"
    what = "the filters leave" if query.filters != NO_FILTERS else "history and catalogue leave"
    return f"{size} of {query.k}: {what} no more"
