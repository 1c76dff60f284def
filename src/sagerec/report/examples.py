"""Example users: what they had, what they took next, and the lists of several policies side by side.

Users are drawn at random from four groups, told apart by who found the item taken: the supervised policy, the first
aligned one, both or neither. A page of hits alone would flatter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from sagerec.catalogue.dataset import CATEGORIES
from sagerec.catalogue.splits import learnt_counts
from sagerec.evaluation.metrics import first_rank
from sagerec.report.material import Material, stem
from sagerec.run.folder import Run
from sagerec.study.design import START

HISTORY, PLACES, POLICIES = 8, 10, 3
PER_GROUP = 4


@dataclass(frozen=True, slots=True)
class Item:
    """An item as a reader sees it."""

    item_id: str
    """External id."""
    title: str
    """Title, or the id where there is none."""
    categories: str
    """Joined by commas; empty where there are none."""
    cold: bool
    """At most `cold_max_count` training interactions."""
    count: int
    """Training interactions."""


@dataclass(frozen=True, slots=True)
class User:
    """An example."""

    user_id: str
    """External id."""
    group: str
    """Who found the item taken."""
    earlier: int
    """Items of the history before those shown."""
    history: list[Item]
    """The last items before the target, oldest first."""
    target: Item
    """What the user took next."""
    lists: dict[str, list[Item]]
    """Policy -> its first places; the supervised policy's first."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Users, and how common each of their groups is."""

    users: list[User]
    """In the order of the groups."""
    shares: dict[str, float]
    """Group -> share of all test users."""
    cold_max_count: int
    """What cold means here."""
    places: int = PLACES
    """Length of the lists."""


def choose_policies(material: Material) -> list[str]:
    """The supervised policy and the first of each aligned group whose lists are there, POLICIES at most."""
    run, found = material.run, []
    if run is None or START not in material.reports:
        return []
    seen: set[str] = set()
    for policy in material.aligned:
        name = policy.name.removeprefix("policy-")
        if policy.group not in seen and name in material.reports:
            seen.add(policy.group)
            found.append(name)
    # The control last: what it changes is the yardstick of the others.
    objective = {p.name.removeprefix("policy-"): p.settings.get("objective") for p in material.aligned}
    found.sort(key=lambda name: objective[name] == "sft")
    return [START, *found[:POLICIES]] if START in material.reports else []


def gather_examples(material: Material, *, seed: int = 0) -> Examples | None:
    """Examples of a run with lists of the supervised policy; None where there are none."""
    names = choose_policies(material)
    if not names or material.run is None:
        return None
    run = material.run
    tables = {name: pl.read_parquet(run.lists_path(stem(name))) for name in names}
    rows = tables[START]["event_row"].to_numpy()
    tables = {name: table for name, table in tables.items() if np.array_equal(table["event_row"].to_numpy(), rows)}
    lists = {name: table["items"].to_numpy()[:, :PLACES] for name, table in tables.items()}
    targets = tables[START]["target"].to_numpy()
    groups, of_case = group_users(targets, list(lists.items()))
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for group in range(len(groups)):
        members = np.flatnonzero(of_case == group)
        chosen += rng.choice(members, size=min(PER_GROUP, len(members)), replace=False).tolist()
    most = int(material.reports[START]["settings"]["cold_max_count"])
    counts = learnt_counts(run.data, run.split)
    users = []
    for case in chosen:
        row = int(rows[case])
        first = int(run.data.user_offsets[run.data.event_users[row]])
        begin = max(first, row - HISTORY)
        users.append(
            User(
                user_id=run.data.user_ids.external([int(run.data.event_users[row])])[0],
                group=groups[int(of_case[case])],
                earlier=begin - first,
                history=describe_items(run, run.data.event_items[begin:row], counts, most),
                target=describe_items(run, targets[case : case + 1], counts, most)[0],
                lists={name: describe_items(run, part[case], counts, most) for name, part in lists.items()},
            )
        )
    shares = {name: float((of_case == i).mean()) for i, name in enumerate(groups)}
    return Examples(users, shares, most) if users else None


def group_users(targets: np.ndarray, lists: Sequence[tuple[str, np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """Names of the groups, and (n,) the place therein of each case: by whether the first and the second list hold the
    target; with one list alone, found or not.
    """
    found = [first_rank(part, targets) > 0 for _, part in lists[:2]]
    if len(found) == 1:
        return [f"found by {lists[0][0]}", "found by none"], np.where(found[0], 0, 1)
    one, two = lists[1][0], lists[0][0]
    names = [f"found by {one} alone", f"found by {two} alone", "found by both", f"found neither by {one} nor {two}"]
    start, aligned = found
    return names, np.select([aligned & ~start, start & ~aligned, aligned & start], [0, 1, 2], default=3)


def describe_items(run: Run, items: np.ndarray, counts: np.ndarray, cold_max_count: int) -> list[Item]:
    """Items (n,) in words; places without an item are left out."""
    places = np.asarray(items, dtype=np.int64)
    places = places[places >= 0]
    ids, titles = run.data.item_ids.external(places), run.data.titles(places)
    categories = [""] * len(places)
    if CATEGORIES in run.data.items.columns:
        for i, values in enumerate(run.data.items[places][CATEGORIES].to_list()):
            categories[i] = ", ".join(str(value) for value in values or [] if value)
    return [
        Item(ids[i], titles[i], categories[i], bool(counts[place] <= cold_max_count), int(counts[place]))
        for i, place in enumerate(places)
    ]
