"""The truth of a simulated store: how its users respond to any slate, and the folder that keeps it.

`simulate` draws a store; this file holds what was drawn and answers for it, so that an aligned policy can be
judged by expected clicks and watch time instead of by a log. A user u with the last item j meets item i at
position k (from 0) of a slate on day d. With sigma the logistic function:

    interest    z = taste_strength <t_u, v_i> + q_i + season_strength cos(2 pi (d / 365 - phase_b(i)))
                    + intent_strength A[f(j), f(i)]
    click       p = sigma(z - 3.5 - s_u c - position_effect k)
    like        p l,             l = sigma(0.8 z - 3), given a click
    dislike     (1 - p l) d,     d = sigma(0.6 c - 0.8 z - 3), given no like
    watch       p r duration_i,  r = sigma(0.5 z - 0.5), the mean completion, given a click

where t_u is the taste, v_i the latent vector, q_i the quality, b and f the broad and fine category, A the pull
of accessories, s_u the satiation rate, and c the number of earlier items of the slate in the fine category of i:
repetition costs clicks and earns dislikes, so a varied slate has a higher true value. Without a day the season
term is 0, its mean over the year; without a last item the intent term is 0. Watch time carries the duration
bias of video logs: for the same interest a longer film collects more seconds. Completion is drawn from
Beta(8 r, 8 (1 - r)), the others from Bernoulli distributions.

Under "successor" dynamics p is 1 for the successor of the last item, or, without a last item, for the first
item of the slate, and 0 elsewhere; then l = r = 1 and d = 0.

Shapes: B users, K items per slate, N items, U users, F fine and C broad categories, W latent width, E events.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sagerec.artifacts import check_content, read_manifest
from sagerec.catalogue.dataset import SOURCE, read_dataset, read_table, write_dataset
from sagerec.catalogue.splits import Cases
from sagerec.config import between, check_fields, from_json, to_json
from sagerec.errors import ArtifactError, DatasetError
from sagerec.files import read_json

EXPOSURES, TRUTH = "exposures.parquet", "truth.safetensors"
YEAR_DAYS = 365
DAY_SECONDS = 86_400
EMPTY = -1
"""Item index of an empty place in a slate, and of no last item."""
MAX_BRANDS, MAX_CATEGORIES, MAX_FINE = 400, 12, 64
"""How many names there are: brands, broad categories, fine categories of one broad."""
MIN_EVENTS = 5
"""Interactions that every user has at least."""
CONCENTRATION = 8.0
"""Of the Beta distribution of completion."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """What the simulated store is like."""

    users: int = 2000
    """Number of users."""
    items: int = 1000
    """Number of items, 200 to 100 million."""
    events_per_user: float = 12.0
    """Mean number of interactions that a user aims at, 5 or more; the last slate may add one or two."""
    dynamics: Literal["taste", "successor"] = "taste"
    """taste: users follow taste, season and intent; successor: each next item is a fixed function of the last."""
    categories: int = 8
    """Number of broad categories, at most 12."""
    fine_per_category: int = 5
    """Number of fine categories in each broad one, at most 64."""
    brands: int = 24
    """Number of brands, at most 400."""
    latent_width: int = 16
    """Width of the latent vectors of items and users."""
    popularity_skew: float = 0.8
    """Exponent of the Zipf law by which the logging policy favours popular items; 0 shows all alike."""
    taste_strength: float = 4.0
    """Weight, in logits, of the match between a user's taste and an item."""
    intent_strength: float = 1.5
    """Weight, in logits, of an accessory of the last item."""
    season_strength: float = 0.8
    """Height, in logits, of the yearly wave of each broad category's attraction."""
    satiation: float = 0.7
    """Mean over users of the click logits lost for each earlier item of the same fine category in a slate."""
    position_effect: float = 0.05
    """Click logits lost with each position of a slate."""
    logging_skill: float = 0.7
    """How much of taste and intent the logging policy knows: 0 nothing, 1 all that categories tell."""
    cold_share: float = 0.1
    """Share of items that appear in the last 30 % of the year, with few or no interactions; below 0.5."""
    exposures_per_event: int = 6
    """Number of items in a slate of the logging policy, at most 100."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            users=between(1, 10**8),
            items=between(200, 10**8),
            events_per_user=between(MIN_EVENTS, 10_000),
            categories=between(2, MAX_CATEGORIES),
            fine_per_category=between(1, MAX_FINE),
            brands=between(1, MAX_BRANDS),
            latent_width=between(2, 1024),
            popularity_skew=between(0, 3),
            taste_strength=between(0, 10),
            intent_strength=between(0, 10),
            season_strength=between(0, 5),
            satiation=between(0, 5),
            position_effect=between(0, 1),
            logging_skill=between(0, 1),
            cold_share=between(0, 0.5, below=True),
            exposures_per_event=between(1, 100),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What was drawn for a store and never shows in its log."""

    item_latent: np.ndarray
    """(N, W) float32 latent vector v of each item."""
    item_fine: np.ndarray
    """(N,) int16 fine category f of each item."""
    item_brand: np.ndarray
    """(N,) int16 brand of each item."""
    item_quality: np.ndarray
    """(N,) float32 quality q of each item, in logits."""
    item_popularity: np.ndarray
    """(N,) float32 weight of each item in the logging policy, summing to 1."""
    item_birth_day: np.ndarray
    """(N,) int16 day from which an item can be shown: 0, or late for cold items."""
    item_duration_seconds: np.ndarray
    """(N,) float32 length of each item's film."""
    fine_broad: np.ndarray
    """(F,) int16 broad category of each fine one."""
    fine_centre: np.ndarray
    """(F, W) float32 latent centre of each fine category."""
    accessory: np.ndarray
    """(F, F) float32 pull A of each fine category (column) after an item of another (row)."""
    broad_phase: np.ndarray
    """(C,) float32 share of the year at which a broad category attracts most."""
    user_taste: np.ndarray
    """(U, W) float32 taste t of each user, of norm 1."""
    user_satiation: np.ndarray
    """(U,) float32 satiation rate s of each user."""
    user_activity: np.ndarray
    """(U,) int32 interactions that each user aims at."""
    successor: np.ndarray
    """(N,) int32 item that follows each item: one cycle over the warm items, into which the cold ones lead; (0,)
    under taste dynamics."""


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """Responses to slates: probabilities and mean seconds where expected, 0 / 1 and seconds where drawn."""

    click: np.ndarray
    """(B, K) float64 click on each item; 0 in empty places, like every field."""
    like: np.ndarray
    """(B, K) float64 like, which needs a click."""
    dislike: np.ndarray
    """(B, K) float64 dislike, with or without a click, never with a like."""
    watch_seconds: np.ndarray
    """(B, K) float64 watch time."""


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)))


def season(truth: Truth, day: np.ndarray) -> np.ndarray:
    """(B, C) wave of each broad category on each `day` (B,), from -1 to 1."""
    return np.asarray(np.cos(2 * np.pi * (day[:, None] / YEAR_DAYS - truth.broad_phase)))


def repetitions(truth: Truth, slates: np.ndarray) -> np.ndarray:
    """(B, K) number of earlier items of the slate in the same fine category."""
    fine = truth.item_fine[slates]
    earlier = np.tri(slates.shape[1], k=-1, dtype=bool) & (slates >= 0)[:, None, :]
    return np.asarray(((fine[:, :, None] == fine[:, None, :]) & earlier).sum(axis=2))


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedStore:
    """A simulated store: its tables and its truth. Row and user numbers are those of `read_dataset`."""

    settings: StoreSettings
    """What it was drawn from."""
    truth: Truth
    """What was drawn."""
    items: pl.DataFrame
    """N rows: item_id, title, text, categories (broad, fine, brand), brand."""
    interactions: pl.DataFrame
    """E rows by user and time, the clicked impressions: user_id, item_id, timestamp and feedback columns."""
    exposures: pl.DataFrame
    """All impressions by user and time: the columns of interactions, and `position` in the slate."""

    def known(self, slates: np.ndarray) -> np.ndarray:
        """Slates with -1 in the place of items that joined the catalogue after the store was simulated."""
        found: np.ndarray = np.where(slates < len(self.truth.item_duration_seconds), slates, -1)
        return found

    def expected(
        self,
        users: np.ndarray,
        slates: np.ndarray,
        *,
        last_items: np.ndarray | None = None,
        day: float | np.ndarray | None = None,
    ) -> Responses:
        """Expected feedback of `users` (B,) on `slates` (B, K) of item indices, -1 where empty.

        `last_items` (B,): the item that each user took last, -1 for none. `day`: day of the year, one for all
        or (B,). See the head of this file for the formulas.

        Raises: DatasetError for a user or an item that the store does not have.
        """
        rates = response_rates(self.settings, self.truth, users, slates, last_items=last_items, day=day)
        like = rates.click * rates.like
        return Responses(rates.click, like, (1 - like) * rates.dislike, rates.click * rates.watch_seconds)

    def respond(
        self,
        users: np.ndarray,
        slates: np.ndarray,
        *,
        rng: np.random.Generator,
        last_items: np.ndarray | None = None,
        day: float | np.ndarray | None = None,
    ) -> Responses:
        """Draw feedback whose mean is `expected` of the same arguments."""
        rates = response_rates(self.settings, self.truth, users, slates, last_items=last_items, day=day)
        return draw_feedback(self.truth, rates, slates, rng)


def response_rates(
    settings: StoreSettings,
    truth: Truth,
    users: np.ndarray,
    slates: np.ndarray,
    *,
    last_items: np.ndarray | None = None,
    day: float | np.ndarray | None = None,
) -> Responses:
    """The factors p, l, d and r x duration (B, K): like and watch given a click, dislike given no like."""
    slates = np.asarray(slates)
    users = _indices(users, slates, "users", 0, len(truth.user_taste))
    _check_range(slates, "slates", EMPTY, len(truth.item_fine))
    last = _indices(
        np.full(len(slates), EMPTY) if last_items is None else last_items,
        slates,
        "last_items",
        EMPTY,
        len(truth.item_fine),
    )
    shown = slates >= 0
    duration = truth.item_duration_seconds[slates].astype(np.float64)
    if settings.dynamics == "successor":
        first = shown & (np.cumsum(shown, axis=1) == 1)
        follows = np.where((last >= 0)[:, None], slates == truth.successor[last][:, None], first) & shown
        return Responses(follows.astype(np.float64), 1.0 * shown, 0.0 * shown, duration * shown)
    fine = truth.item_fine[slates]
    interest = (
        settings.taste_strength * np.einsum("bkw,bw->bk", truth.item_latent[slates], truth.user_taste[users])
        + truth.item_quality[slates]
        + settings.intent_strength
        * np.where((last >= 0)[:, None], truth.accessory[truth.item_fine[last][:, None], fine], 0.0)
    ).astype(np.float64)
    if day is not None:
        wave = season(truth, np.broadcast_to(np.asarray(day, dtype=np.float64), len(slates)))
        interest += settings.season_strength * np.take_along_axis(wave, truth.fine_broad[fine].astype(int), 1)
    repeated = repetitions(truth, slates)
    place = settings.position_effect * np.arange(slates.shape[1])
    click = sigmoid(interest - 3.5 - truth.user_satiation[users][:, None] * repeated - place)
    like = sigmoid(0.8 * interest - 3.0)
    dislike = sigmoid(0.6 * repeated - 0.8 * interest - 3.0)
    watch_seconds = sigmoid(0.5 * interest - 0.5) * duration
    return Responses(click * shown, like * shown, dislike * shown, watch_seconds * shown)


def draw_feedback(truth: Truth, rates: Responses, slates: np.ndarray, rng: np.random.Generator) -> Responses:
    """Feedback (B, K) drawn from the factors that `response_rates` gives."""
    click = rng.random(slates.shape) < rates.click
    like = click & (rng.random(slates.shape) < rates.like)
    dislike = ~like & (rng.random(slates.shape) < rates.dislike)
    duration = truth.item_duration_seconds[slates[click]]
    mean = rates.watch_seconds[click] / duration
    spread = CONCENTRATION * np.clip(mean, 1e-6, 1 - 1e-6)
    completion = np.where(mean < 1, rng.beta(spread, CONCENTRATION - spread), 1.0)
    watch_seconds = np.zeros(slates.shape)
    watch_seconds[click] = completion * duration
    return Responses(1.0 * click, 1.0 * like, 1.0 * dislike, watch_seconds)


def _indices(values: np.ndarray, slates: np.ndarray, what: str, low: int, high: int) -> np.ndarray:
    values = np.asarray(values)
    if slates.ndim != 2 or values.shape != slates.shape[:1]:
        raise DatasetError(
            f"{what} has shape {values.shape} and slates {slates.shape}; expected (B,) and (B, K) of one B"
        )
    _check_range(values, what, low, high)
    return values


def _check_range(values: np.ndarray, what: str, low: int, high: int) -> None:
    if not np.issubdtype(values.dtype, np.integer):
        raise DatasetError(f"{what} has type {values.dtype}; expected integer indices")
    if values.size and (values.min() < low or values.max() >= high):
        wrong = values[(values < low) | (values >= high)][0]
        raise DatasetError(f"{what} holds {wrong}; expected indices from {low} to {high - 1} of this store")


def expected_answers(store: SimulatedStore, cases: Cases, lists: np.ndarray) -> dict[str, np.ndarray]:
    """Expected clicks, likes, dislikes and seconds watched of each list (n, K), summed over its places: (n,) each.

    Items that joined the catalogue after the store was simulated are answered by nobody.
    """
    last = cases.event_items[cases.rows - 1]
    found = store.expected(cases.users, store.known(lists), last_items=last)
    answers = {"clicks": found.click, "likes": found.like, "dislikes": found.dislike}
    return {n: v.sum(axis=1) for n, v in (answers | {"watch_seconds": found.watch_seconds}).items()}


def write_store(folder: str | Path, store: SimulatedStore) -> str:
    """Write a store as a dataset folder with its impressions and its truth; returns its content hash."""
    truth = {field.name: getattr(store.truth, field.name) for field in dataclasses.fields(Truth)}
    return write_dataset(
        folder,
        store.items,
        store.interactions,
        settings=to_json(store.settings),
        seed=store.settings.seed,
        extra_files={EXPOSURES: store.exposures},
        extra_tensors={TRUTH: truth},
    )


def read_store(folder: str | Path) -> SimulatedStore:
    """Read a store back.

    Raises: DatasetError where there is no folder; ArtifactError where the folder is no dataset that sagerec
    wrote, is one without a truth, was changed since, or was written by another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; expected a simulated store, as `sagerec simulate` writes it")
    manifest = read_manifest(folder, "dataset")
    if not (folder / TRUTH).is_file():
        raise ArtifactError(
            f"{folder} is a dataset but no simulated store: it has no {TRUTH}. `sagerec simulate DATASET` writes one"
        )
    check_content(folder, manifest)
    settings = manifest.settings
    if not settings and (folder / SOURCE).is_file():
        settings = read_json(folder / SOURCE).get("settings", {})  # a copy in a run folder
    if set(settings) != {field.name for field in dataclasses.fields(StoreSettings)}:
        raise ArtifactError(
            f"{folder}: its settings {sorted(settings)} are not those of a simulated store of this "
            "version; simulate it again"
        )
    try:
        arrays = load_file(folder / TRUTH)
    except SafetensorError as error:
        raise ArtifactError(f"{folder / TRUTH} is not safetensors ({error}); simulate the store again") from error
    expected = [field.name for field in dataclasses.fields(Truth)]
    if set(arrays) != set(expected):
        raise ArtifactError(
            f"{folder / TRUTH} holds {', '.join(sorted(arrays))}; expected {', '.join(expected)}. "
            "Simulate the store again"
        )
    data = read_dataset(folder)
    return SimulatedStore(
        settings=from_json(StoreSettings, settings),
        truth=Truth(**arrays),
        items=data.items,
        interactions=data.events,
        exposures=read_table(folder / EXPOSURES),
    )
