"""Facts and feedback: what the rewards of `core.rewards` need, gathered from a catalogue, a log and, maybe, a store.

Shapes: B users, G slates of each, K places, N items.
"""

from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from scipy import sparse
from torch import Tensor

from sagerec.actions.clusters import ClusterKind, item_clusters
from sagerec.actions.semantic_ids.embedders import unit_rows
from sagerec.actions.space import ActionSpace
from sagerec.catalogue.dataset import CATEGORIES, Dataset
from sagerec.catalogue.similarity import history_scores, item_similarities
from sagerec.catalogue.simulated_store import SimulatedStore
from sagerec.catalogue.splits import Cases, Split, learnt_counts
from sagerec.errors import RewardError
from sagerec.objectives import rewards
from sagerec.objectives.rewards import Facts, Membership

STORE_ANSWERS = ("click", "like", "dislike", "watch")
LOGGED = ("click", "like", "dislike", "follow", "forward", "longview")
NEIGHBOURS, SHRINKAGE, DECAY = 200, 5.0, 0.7
"""Of the item-kNN whose scores are the collaborative reward."""


def membership(table: sparse.csr_matrix) -> Membership:
    """Membership of items in clusters from a sparse (N, Q) matrix whose rows sum to 1."""
    counts = np.diff(table.indptr)
    inside = np.arange(counts.max()) < counts[:, None]
    cluster = np.full(inside.shape, -1, dtype=np.int64)
    share = np.zeros(inside.shape, dtype=np.float32)
    cluster[inside], share[inside] = table.indices, table.data
    return Membership(torch.from_numpy(cluster), torch.from_numpy(share), int(table.shape[1]))


def gather_facts(
    data: Dataset, split: Split, space: ActionSpace, *, clusters: ClusterKind, cold_max_count: int
) -> Facts:
    """The facts of a catalogue; coldness and novelty come from what is learnt from, the reserved events among it."""
    counts = learnt_counts(data, split)
    bits = np.log2(counts.sum() + len(counts)) - np.log2(counts + 1.0)
    return Facts(
        cold=torch.from_numpy(counts <= cold_max_count),
        novelty=torch.from_numpy((bits / (bits.max() or 1.0)).astype(np.float32)),  # of one item all is known
        clusters=membership(item_clusters(data, space, clusters)),
        vectors=None if space.vectors is None else torch.from_numpy(unit_rows(space.vectors)),
        categories=_categories(data, space) if data.has_categories() else None,
    )


def _categories(data: Dataset, space: ActionSpace) -> Membership:
    """Categories of items; one without any is in none, for two such items have nothing in common."""
    found = membership(item_clusters(data, space, "category"))
    without = data.items.select(pl.col(CATEGORIES).list.drop_nulls().list.len().fill_null(0) == 0)[CATEGORIES]
    found.cluster[torch.from_numpy(without.to_numpy().copy())] = -1
    return found


@dataclass(frozen=True, slots=True)
class Feedback:
    """Who answers for users: the store, where it is simulated, else the log, which knows the logged item alone."""

    cases: Cases
    """The contexts; a target's event row is its sample id."""
    store: SimulatedStore | None = None
    """The simulated store."""
    logged: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> (n,) what the log says of each case's target."""
    similar: sparse.csr_matrix | None = None
    """(N, N) item-kNN similarities, where the collaborative reward is asked for."""

    def answers(
        self, index: np.ndarray, history: np.ndarray, lengths: np.ndarray, *, slates: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """Answers (B, G, K) to slates of the cases `index` with histories (B, T) and targets (B,).

        From the store, expected values; from the log, what it says of the target, and 0 for every other item. Where a
        slate has no item (-1), nobody answers: 0; nor does the store for an item that it does not know.
        """
        found: dict[str, Tensor] = {}
        shape, device = slates.shape, slates.device
        there, slates = slates >= 0, slates.clamp(min=0)
        if self.store is not None:
            flat = self.store.known(slates.cpu().numpy().reshape(-1, shape[2]))
            users = self.cases.users[index].repeat(shape[1])
            last = history[np.arange(len(index)), lengths - 1].repeat(shape[1])
            expected = self.store.expected(users, flat, last_items=last)
            duration = self.store.truth.item_duration_seconds[flat]
            values = (expected.click, expected.like, expected.dislike, expected.watch_seconds / duration)
            for name, value in zip(STORE_ANSWERS, values, strict=True):
                found[name] = torch.from_numpy(value.astype(np.float32)).view(shape).to(device)
        for name, value in self.logged.items():
            known = torch.from_numpy(value[index]).to(device)
            found[name] = (slates == targets[:, None, None]) * known[:, None, None]
        if self.similar is not None:
            scores = history_scores(self.similar, history, lengths, decay=DECAY)
            asked = slates.cpu().flatten(1).numpy()
            picked = scores[np.arange(len(asked)).repeat(asked.shape[1]), asked.ravel()]
            best = np.maximum(scores.max(axis=1).toarray(), 1e-9)
            values = (np.asarray(picked).reshape(asked.shape) / best).astype(np.float32)
            found[rewards.COLLABORATIVE] = torch.from_numpy(values).view(shape).to(device)
        return {name: value * there for name, value in found.items()}


def gather_feedback(
    data: Dataset, split: Split, cases: Cases, store: SimulatedStore | None, expressions: list[str], facts: Facts
) -> Feedback:
    """What the rewards of `expressions` need.

    Raises: RewardError for one that this data cannot give.
    """
    needs = set().union(*(rewards.needs_of(expression) for expression in expressions))
    similar, logged = None, {}
    if rewards.CATEGORIES in needs and facts.categories is None:
        raise RewardError(
            "the reward 'category' needs categories, and no item has one; add the column 'categories' to items.parquet "
            "or choose 'similarity'"
        )
    if rewards.VECTORS in needs and facts.vectors is None:
        raise RewardError("the reward 'similarity' needs content vectors, and this action space has none")
    if rewards.COLLABORATIVE in needs:
        train = split.sequences(data, "train")
        similar = item_similarities(train, data.n_items, neighbours=NEIGHBOURS, shrinkage=SHRINKAGE)
    if store is None:
        for name in sorted(needs & {*LOGGED, "watch"}):
            logged[name] = _logged(data, split, cases, name)
    elif unanswered := sorted(needs & set(LOGGED) - set(STORE_ANSWERS)):
        raise RewardError(
            f"the simulated store answers {', '.join(STORE_ANSWERS)}, not {unanswered[0]!r}; choose among these"
        )
    return Feedback(cases, store, logged, similar)


def _logged(data: Dataset, split: Split, cases: Cases, name: str) -> np.ndarray:
    """(n,) float32 what the log says of the targets, 0 where it says nothing.

    Watch time is ranked among the user's training and reserved events alone: what a user watches later tells nothing.

    Raises: RewardError where the log has no such column.
    """
    columns = ("watch_seconds", "duration_seconds") if name == "watch" else (name,)
    for column in columns:
        if column not in data.events.columns:
            raise RewardError(
                f"the reward {name!r} needs the column {column!r} of interactions.parquet, which has "
                f"{', '.join(data.events.columns)}; add it or choose another reward"
            )
    if name != "watch":
        values: np.ndarray = data.events[name].fill_null(0).cast(float).to_numpy()[cases.rows].astype(np.float32)
        return values
    known = split.mask("train", "align")
    for column in columns:
        known &= data.events[column].is_not_null().to_numpy()
    seen = data.events.filter(known)
    seconds, duration = (torch.from_numpy(seen[c].cast(float).to_numpy().copy()) for c in columns)
    disliked = None
    if "dislike" in seen.columns:
        disliked = torch.from_numpy(seen["dislike"].fill_null(0).cast(float).to_numpy().copy()) > 0
    shaped = np.zeros(data.n_events, dtype=np.float32)
    users = torch.from_numpy(data.event_users[known].astype(np.int64))
    shaped[known] = rewards.shaped_watch_time(seconds, duration, users, disliked).numpy()
    found: np.ndarray = shaped[cases.rows]
    return found


def to_device(facts: Facts, device: torch.device) -> Facts:
    """The facts on a device."""

    def move(value: Membership | None) -> Membership | None:
        return value and Membership(value.cluster.to(device), value.share.to(device), value.n_clusters)

    clusters = move(facts.clusters)
    assert clusters is not None
    vectors = None if facts.vectors is None else facts.vectors.to(device)
    return Facts(facts.cold.to(device), facts.novelty.to(device), clusters, vectors, move(facts.categories))
