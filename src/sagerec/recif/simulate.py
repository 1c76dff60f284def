"""A small world of RecIF-Bench's kind whose law is known: users, items of three domains, sequences, feedback.

The law of the next item, in each domain (videos, ads, products): the items form clusters, each cluster has a next one,
and each item a successor there. After an item comes

- among what the benchmark's users took (`target_*`), with probability `cold_rate`, a cold item of the next cluster, any
  of them alike; among what the others took so rarely that a cold item occurs COLD_EVENTS times on average;
- else with probability `law` its successor;
- else with probability `near` an item of the next cluster by popularity, else any item by popularity.

So whoever writes the successor first scores (1 - cold_rate) · law or a little more at position1_pass@1 (`law_score`),
and no policy can do better. Cold items never stand in histories. How long a video is watched hangs on the user's liking
of its cluster and on its length: a long one is watched for more seconds and to a smaller share.

Shapes: U users, N items of a domain, T places of a sequence.
"""

from dataclasses import dataclass, field

import numpy as np

from sagerec.config import at_least, between, check_fields, require

MASKS = ("longview", "like", "follow", "forward", "not_interested")
"""Feedback on videos, as the wide table names it."""
CLUSTERS = 12
"""Of each domain."""
FIRST_CODE = {"video": 100, "ad": 300, "product": 500}
"""First code of the first cluster, so that no ID belongs to two domains."""
FIRST_ID = {"video": 10_001, "ad": 500_001, "product": 900_001}
COLD_EVENTS = 3
"""How often a cold item is taken by users of the training split, on average, at most."""
LONGVIEW_SHARE = 0.6
"""A long view is one of at least so much of the video."""


@dataclass(frozen=True, slots=True)
class RecifStoreSettings:
    """What is simulated."""

    users: int = 2000
    """Users, of both splits."""
    test_share: float = 0.3
    """Share of them that is the benchmark's."""
    videos: int = 600
    """Videos."""
    ads: int = 150
    """Ads, which have videos' ids."""
    products: int = 240
    """Products."""
    history: int = 30
    """Videos of a history on average; of ads and products there are a third as many."""
    targets: int = 8
    """Items that a user took afterwards, of each domain."""
    law: float = 0.6
    """Probability of an item's successor."""
    near: float = 0.6
    """Of what is left, the share that lies in the next cluster."""
    cold_share: float = 0.2
    """Share of the items that no history holds."""
    cold_rate: float = 0.06
    """Probability that a user of the benchmark takes one of these."""
    shared_ids: float = 0.05
    """Share of the items that bear the Semantic ID of another."""
    watch_seconds: bool = False
    """Two columns a sequence that the published table does not have: seconds watched, and the videos' lengths."""
    seed: int = 0
    """Seed of all of it."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            users=at_least(10, 10_000_000),
            **dict.fromkeys(("videos", "ads", "products"), at_least(5 * CLUSTERS, 100_000)),
            history=at_least(3, 512),
            targets=at_least(3, 100),
            **dict.fromkeys(("law", "near", "cold_rate"), between(0, 1)),
            **dict.fromkeys(("cold_share", "shared_ids"), between(0, 0.5)),
        )
        require(0 < self.test_share < 1, f"test_share is {self.test_share}; expected between 0 and 1")


def law_score(settings: RecifStoreSettings) -> float:
    """What the successor scores at position1_pass@1 of video, ad and product, at least."""
    return (1 - settings.cold_rate) * settings.law


@dataclass(frozen=True, slots=True)
class Domain:
    """The items of a domain and their law."""

    name: str
    """video, ad or product."""
    pids: np.ndarray
    """(N,) int64 external ids."""
    codes: np.ndarray
    """(N, 3) int64 Semantic IDs, some of them shared."""
    cluster: np.ndarray
    """(N,) int64 cluster of each."""
    successor: np.ndarray
    """(N,) int64 the item that the law puts behind each."""
    popularity: np.ndarray
    """(N,) share of the draws by popularity; 0 for cold items."""
    seconds: np.ndarray
    """(N,) int64 length."""

    @property
    def cold(self) -> np.ndarray:
        """(N,) bool: no history holds it."""
        found: np.ndarray = self.popularity == 0
        return found


def make_domain(name: str, size: int, settings: RecifStoreSettings, rng: np.random.Generator) -> Domain:
    """A domain of so many items."""
    cluster = np.arange(size) % CLUSTERS
    codes = np.column_stack(
        [FIRST_CODE[name] + cluster, rng.integers(0, 64, size), rng.choice(8192, size, replace=False)]
    )
    cold = np.zeros(size, dtype=bool)
    cold[rng.choice(np.arange(CLUSTERS, size), round(settings.cold_share * size), replace=False)] = True
    popularity = np.where(cold, 0.0, 1 / (10 + rng.permutation(size)))
    following = rng.permutation(CLUSTERS)
    successor = np.empty(size, dtype=np.int64)
    for c in range(CLUSTERS):
        inside = np.flatnonzero(cluster == c)
        there = np.flatnonzero((cluster == following[c]) & ~cold)
        successor[inside] = np.resize(rng.permutation(there), len(inside))
    for item in rng.choice(size, round(settings.shared_ids * size), replace=False):
        codes[item] = codes[rng.choice(np.flatnonzero(cluster == cluster[item]))]
    seconds = np.clip(np.exp(rng.normal(3.5, 0.8, size)), 5, 600).astype(np.int64)
    return Domain(
        name, FIRST_ID[name] + np.arange(size), codes, cluster, successor, popularity / popularity.sum(), seconds
    )


def draw_sequences(
    domain: Domain, is_test: np.ndarray, length: int, settings: RecifStoreSettings, rng: np.random.Generator
) -> np.ndarray:
    """(U, T) items by the law, of which the last `targets` are what users took after their histories."""
    users, taken = len(is_test), max(1, int((~is_test).sum()) * settings.targets)
    rate = np.where(is_test, settings.cold_rate, min(settings.cold_rate, COLD_EVENTS * domain.cold.sum() / taken))
    following = domain.cluster[domain.successor]
    found = np.empty((users, length + settings.targets), dtype=np.int64)
    found[:, 0] = rng.choice(len(domain.pids), users, p=domain.popularity)
    for place in range(1, found.shape[1]):
        before = found[:, place - 1]
        u, v = rng.random((2, users))
        item = rng.choice(len(domain.pids), users, p=domain.popularity)
        near = (u >= settings.law) & (v < settings.near)
        for c in range(CLUSTERS):
            _redraw(item, near & (following[before] == c), domain.popularity * (domain.cluster == c), rng)
        item = np.where(u < settings.law, domain.successor[before], item)
        if place >= length:
            is_cold = rng.random(users) < rate
            for c in range(CLUSTERS):
                _redraw(item, is_cold & (following[before] == c), domain.cold & (domain.cluster == c), rng)
        found[:, place] = item
    return found


def _redraw(items: np.ndarray, chosen: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> None:
    """Draw the `chosen` of `items` anew by weights (N,), in place; where these are all 0 they stay."""
    if chosen.any() and weights.sum() > 0:
        items[chosen] = rng.choice(len(weights), int(chosen.sum()), p=weights / weights.sum())


@dataclass(frozen=True, slots=True)
class World:
    """All of it."""

    settings: RecifStoreSettings
    """What was asked for."""
    domains: dict[str, Domain]
    """By name."""
    sequences: dict[str, np.ndarray]
    """Domain -> (U, T) items; the last `targets` are what users took after their histories."""
    starts: dict[str, np.ndarray]
    """Domain -> (U,) place at which each user's history begins; 0 of ads or products may be left."""
    is_test: np.ndarray
    """(U,) bool: the user is the benchmark's."""
    watched: np.ndarray
    """(U, T) seconds watched of each video."""
    feedback: dict[str, np.ndarray] = field(default_factory=dict)
    """Of MASKS -> (U, T) 0 or 1."""

    def history_length(self, domain: str) -> int:
        """Place at which what users took begins."""
        return int(self.sequences[domain].shape[1]) - self.settings.targets


def simulate_world(settings: RecifStoreSettings) -> World:
    """Draw items, users and what they did."""
    rng = np.random.default_rng(settings.seed)
    sizes = {"video": settings.videos, "ad": settings.ads, "product": settings.products}
    domains = {name: make_domain(name, size, settings, rng) for name, size in sizes.items()}
    is_test = np.zeros(settings.users, dtype=bool)
    is_test[rng.choice(settings.users, max(1, round(settings.test_share * settings.users)), replace=False)] = True
    sequences, starts = {}, {}
    for name, domain in domains.items():
        mean = settings.history if name == "video" else max(1, settings.history // 3)
        sequences[name] = draw_sequences(domain, is_test, 2 * mean, settings, rng)
        lengths = rng.integers(3 if name == "video" else 0, 2 * mean + 1, settings.users)
        starts[name] = 2 * mean - lengths
    watched, feedback = _answer(domains["video"], sequences["video"], rng)
    return World(settings, domains, sequences, starts, is_test, watched, feedback)


def _answer(videos: Domain, sequence: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Seconds watched (U, T), and the masks, by each user's liking of clusters and the videos' lengths."""
    liking = rng.random((len(sequence), CLUSTERS))
    mine = np.take_along_axis(liking, videos.cluster[sequence], axis=1)
    seconds = videos.seconds[sequence]
    share = np.clip(0.25 + 0.9 * mine - 0.12 * np.log2(seconds / 30) + rng.normal(0, 0.15, sequence.shape), 0.02, 1.2)
    like = rng.random(sequence.shape) < 0.3 * mine**2
    found = {
        "longview": share >= LONGVIEW_SHARE,
        "like": like,
        "follow": rng.random(sequence.shape) < 0.06 * mine**2,
        "forward": rng.random(sequence.shape) < 0.06 * mine**2,
        "not_interested": ~like & (rng.random(sequence.shape) < 0.15 * (1 - mine) ** 2),
    }
    return share * seconds, {name: mask.astype(np.int8) for name, mask in found.items()}
