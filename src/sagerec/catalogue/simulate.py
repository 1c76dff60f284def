"""The simulated store, the embedded default dataset: a catalogue, its users and a year of their log.

It stands at the head of the pipeline where no log is at hand, and in tests, because its truth is known
(`catalogue/store.py`). All is drawn from one generator by array operations over users, items and events; the
only loops run over rounds (one slate a user each) and over chunks that bound the memory.

An item belongs to a fine category, has a brand and an attribute, and lies in latent space at

    v_i = centre_f + 0.3 attribute + 0.2 brand + 0.2 noise

so the words of its title tell much of it. A round: the logging policy shows each active user a slate of distinct
items that are born and not among the user's last 20, drawn in two steps,

    P(fine category f) ~ mass_f(d) exp(skill (taste_strength <t_u, centre_f> + intent_strength A[f(last), f])
                                       + season_strength wave_b(f)(d))
    P(item i | f)      ~ popularity_i,    mass_f(d) the popularity of the items of f that are born by day d;

the user responds by the truth; the clicked items become the user's interactions, the last of them the last item.
A user leaves after `user_activity` interactions. The pause after a slate is the share min(1/2, e / (rest + 1)) of
the time that the user has left, with e exponential of mean 1 and rest the interactions still aimed at: a log ends
with its year.

Under "successor" dynamics the slate also holds the successor of the last item, at a random position; a user's
first slate opens with a uniformly drawn warm item.

Shapes: U users, N items, B users of a chunk, K items per slate, M candidates, F fine and C broad categories.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from sagerec.catalogue.simulated_store import (
    DAY_SECONDS,
    EMPTY,
    MIN_EVENTS,
    YEAR_DAYS,
    Responses,
    SimulatedStore,
    StoreSettings,
    Truth,
    draw_feedback,
    read_store,
    response_rates,
    season,
    write_store,
)

__all__ = ["Responses", "SimulatedStore", "StoreSettings", "Truth", "read_store", "simulate", "write_store"]

START = 1_704_067_200
"""Unix time at which the simulated year begins: 1 January 2024, UTC."""
RECENT = 20
"""How many of a user's last items the logging policy does not show again."""
ITEM_CHUNK, USER_CHUNK = 1 << 19, 1 << 12
NO_ITEM = -2
"""Fills the recent items; differs from EMPTY so that it equals no candidate."""

CATALOGUE_WORDS = """
beauty: hand cream, face mask, lip balm, shampoo, perfume, body lotion, nail polish, hair oil
kitchen: frying pan, tea kettle, chef knife, mixing bowl, cake tin, pepper mill, coffee press, cutting board
garden: watering can, hand trowel, plant pot, seed box, garden hose, bird feeder, lawn rake, potting bench
sports: yoga mat, jump rope, running belt, dumbbell, water bottle, tennis racket, foam roller, swim cap
audio: headset, speaker, microphone, record player, earbud set, sound bar, guitar amp, radio
toys: puzzle, building set, plush bear, toy train, board game, kite, doll house, marble run
office: desk lamp, notebook, fountain pen, paper tray, office chair, stapler, wall planner, pencil case
fashion: scarf, leather belt, rain jacket, wool hat, canvas bag, sneaker, sun visor, wrist watch
pets: dog leash, cat tree, pet bed, food bowl, chew toy, aquarium, bird cage, grooming brush
travel: suitcase, neck pillow, travel mug, passport wallet, packing cube, backpack, luggage tag, camping tent
bedding: duvet, pillow, bed sheet, quilt, mattress pad, throw blanket, sleep mask, canopy
crafts: yarn set, sewing kit, paint box, clay block, brush set, sketch pad, bead kit, loom
"""
MODIFIERS = ("", "compact ", "classic ", "outdoor ", "junior ", "studio ", "folding ", "deluxe ")
ATTRIBUTE_WORDS = """
amber birch cedar charcoal cobalt copper coral denim honey indigo ivory jade
linen moss olive pearl plum ruby rust saffron sand slate teal walnut
"""
ATTRIBUTES = ATTRIBUTE_WORDS.split()
GRADES = ("plain", "decent", "good", "superb")
BRAND_WORDS = """
Nor Al Bel Cor Dra El Fen Gal Hel Is Jor Kal Lum Mar Ost Pel Quin Ros Sol Tor
vik ora mont dale lyn gard sen wick tara bo land fell mere nova quist ridge stad ton via wen
"""


def category_names(settings: StoreSettings) -> tuple[list[str], list[str]]:
    """Names of the broad (C,) and of the fine (F,) categories, broad by broad."""
    lines = [line.split(": ") for line in CATALOGUE_WORDS.strip().splitlines()[: settings.categories]]
    fine = [
        f"{modifier}{noun}"
        for _, nouns in lines
        for modifier, noun in [(m, n) for m in MODIFIERS for n in nouns.split(", ")][: settings.fine_per_category]
    ]
    return [broad for broad, _ in lines], fine


def brand_names(settings: StoreSettings) -> list[str]:
    """Names of the brands: every pair of a head and a tail once before any comes again."""
    heads, tails = (line.split() for line in BRAND_WORDS.strip().splitlines())
    size = len(heads)
    return [heads[i % size] + tails[(i // size + i) % size] for i in range(settings.brands)]


def chunks(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`indices` in pieces of at most `size`."""
    for first in range(0, len(indices), size):
        yield indices[first : first + size]


def unit_vectors(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """(rows, width) float32 random directions."""
    return normalise(rng.standard_normal((rows, width), dtype=np.float32))


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to norm 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def draw_truth(settings: StoreSettings, rng: np.random.Generator) -> tuple[Truth, np.ndarray]:
    """The truth of a store, and the attribute (N,) of each item, which only its words show."""
    n, width = settings.items, settings.latent_width
    n_fine = settings.categories * settings.fine_per_category
    fine_broad = np.repeat(np.arange(settings.categories), settings.fine_per_category).astype(np.int16)
    centre = normalise(
        unit_vectors(rng, settings.categories, width)[fine_broad] + 0.7 * unit_vectors(rng, n_fine, width)
    )
    attribute_vectors = unit_vectors(rng, len(ATTRIBUTES), width)
    brand_vectors = unit_vectors(rng, settings.brands, width)

    share = np.exp(0.4 * rng.standard_normal(n_fine))
    fine = rng.choice(n_fine, n, p=share / share.sum()).astype(np.int16)
    attribute = rng.integers(len(ATTRIBUTES), size=n, dtype=np.int8)
    brand_share = 1.0 / np.arange(1, settings.brands + 1)
    brand = rng.choice(settings.brands, n, p=brand_share / brand_share.sum())
    brand = ((brand + 7 * fine_broad[fine].astype(np.int64)) % settings.brands).astype(np.int16)
    latent = np.empty((n, width), dtype=np.float32)
    for rows in chunks(np.arange(n), ITEM_CHUNK):
        noise = rng.standard_normal((len(rows), width), dtype=np.float32) / np.float32(np.sqrt(width))
        latent[rows] = centre[fine[rows]] + 0.3 * attribute_vectors[attribute[rows]]
        latent[rows] += 0.2 * brand_vectors[brand[rows]] + 0.2 * noise

    quality = rng.standard_normal(n, dtype=np.float32)
    fame = 0.5 * quality + np.float32(0.75**0.5) * rng.standard_normal(n, dtype=np.float32)
    popularity = np.empty(n)
    popularity[np.argsort(-fame)] = np.arange(1, n + 1) ** -settings.popularity_skew
    popularity /= popularity.sum()
    median_seconds = np.exp(rng.normal(np.log(45), 0.5, n_fine)).astype(np.float32)
    duration = np.maximum(1, np.rint(median_seconds[fine] * np.exp(0.5 * rng.standard_normal(n, dtype=np.float32))))
    birth = np.zeros(n, dtype=np.int16)
    cold = rng.permutation(n)[: round(settings.cold_share * n)]
    birth[cold] = rng.integers(round(0.7 * YEAR_DAYS), round(0.95 * YEAR_DAYS), size=len(cold))

    accessory = np.zeros((n_fine, n_fine), dtype=np.float32)
    order = rng.random((n_fine, n_fine))
    np.fill_diagonal(order, np.inf)
    targets = np.argsort(order, axis=1)[:, : min(3, n_fine - 1)]
    np.put_along_axis(accessory, targets, np.array([1.0, 0.7, 0.4], np.float32)[None, : targets.shape[1]], 1)
    phase = (rng.permutation(settings.categories) / settings.categories + rng.random()) % 1.0

    liked = fine[rng.integers(n, size=(settings.users, 3))]
    weights = rng.standard_exponential((settings.users, 3), dtype=np.float32)
    weights *= np.arange(3) < rng.integers(1, 4, size=(settings.users, 1))
    taste = np.einsum("ur,urw->uw", weights / weights.sum(axis=1, keepdims=True), centre[liked])
    taste += 0.3 * attribute_vectors[rng.integers(len(ATTRIBUTES), size=settings.users)]
    taste = normalise(taste + 0.1 * unit_vectors(rng, settings.users, width))
    spread = np.exp(0.7 * rng.standard_normal(settings.users) - 0.7**2 / 2)
    truth = Truth(
        item_latent=latent,
        item_fine=fine,
        item_brand=brand,
        item_quality=0.5 * quality,
        item_popularity=popularity.astype(np.float32),
        item_birth_day=birth,
        item_duration_seconds=duration.astype(np.float32),
        fine_broad=fine_broad,
        fine_centre=centre,
        accessory=accessory,
        broad_phase=phase.astype(np.float32),
        user_taste=taste.astype(np.float32),
        user_satiation=(settings.satiation * rng.gamma(4.0, 0.25, settings.users)).astype(np.float32),
        user_activity=MIN_EVENTS + rng.poisson((settings.events_per_user - MIN_EVENTS) * spread).astype(np.int32),
        successor=draw_successor(birth, rng) if settings.dynamics == "successor" else np.empty(0, np.int32),
    )
    return truth, attribute


def draw_successor(birth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) int32: one random cycle over the items born on day 0; the others lead to one of these."""
    warm = rng.permutation(np.flatnonzero(birth == 0)).astype(np.int32)
    successor = rng.choice(warm, len(birth))
    successor[warm] = np.roll(warm, -1)
    return successor


@dataclass(frozen=True, slots=True, eq=False)
class Shelves:
    """The items by fine category and birth, so that those born by a day are a run of each shelf."""

    order: np.ndarray
    """(N,) item indices, shelf after shelf."""
    start: np.ndarray
    """(F,) where each shelf begins in `order`."""
    end: np.ndarray
    """(F, 365) where the items born by each day end."""
    cumulative: np.ndarray
    """(N + 1,) float64 popularity of the items before each place of `order`."""
    log_mass: np.ndarray
    """(F, 365) log popularity of the born items of each shelf, -inf where there is none."""
    warm: np.ndarray
    """Indices of the items born on day 0."""


def shelve(truth: Truth) -> Shelves:
    """Sort the items into shelves."""
    key = truth.item_fine.astype(np.int32) * YEAR_DAYS + truth.item_birth_day
    order = np.argsort(key, kind="stable")
    key = key[order]
    days = np.arange(len(truth.fine_broad))[:, None] * YEAR_DAYS + np.arange(YEAR_DAYS)
    start, end = np.searchsorted(key, days[:, 0]), np.searchsorted(key, days, side="right")
    cumulative = np.concatenate([[0.0], np.cumsum(truth.item_popularity[order], dtype=np.float64)])
    with np.errstate(divide="ignore"):
        log_mass = np.log(cumulative[end] - cumulative[start][:, None])
    warm = np.flatnonzero(truth.item_birth_day == 0)
    return Shelves(order.astype(np.int32), start, end, cumulative, log_mass, warm)


def draw_candidates(
    settings: StoreSettings,
    truth: Truth,
    shelves: Shelves,
    users: np.ndarray,
    last: np.ndarray,
    day: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """(B, M) items that the logging policy draws with replacement; M is twice K."""
    born = np.minimum(day.astype(np.int64), YEAR_DAYS - 1)
    known = settings.taste_strength * truth.user_taste[users] @ truth.fine_centre.T
    known += settings.intent_strength * np.where(
        (last >= 0)[:, None], truth.accessory[truth.item_fine[last]], np.float32(0)
    )
    logits = settings.logging_skill * known + shelves.log_mass[:, born].T
    logits += settings.season_strength * season(truth, day)[:, truth.fine_broad]
    cumulative = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
    cumulative /= cumulative[:, -1:]
    # One sorted line of thresholds: row r fills [r, r + 1]; rounding must not carry a draw into the next row.
    row = np.arange(len(users))[:, None]
    wanted = rng.random((len(users), 2 * settings.exposures_per_event)) * (1 - 1e-9)
    fine = np.searchsorted((cumulative + row).ravel(), (wanted + row).ravel(), side="right").reshape(wanted.shape)
    fine -= row * cumulative.shape[1]
    start, end = shelves.start[fine], shelves.end[fine, born[:, None]]
    low, high = shelves.cumulative[start], shelves.cumulative[end]
    place = np.searchsorted(shelves.cumulative, low + rng.random(fine.shape) * (high - low), side="right") - 1
    return np.asarray(shelves.order[np.clip(place, start, end - 1)])


def choose_slates(candidates: np.ndarray, barred: np.ndarray, size: int) -> np.ndarray:
    """(B, size) the first distinct `candidates` (B, M) not in `barred` (B, R), then -1 where they run out."""
    seen = np.tri(candidates.shape[1], k=-1, dtype=bool) & (candidates[:, :, None] == candidates[:, None, :])
    wrong = seen.any(axis=2) | (candidates[:, :, None] == barred[:, None, :]).any(axis=2)
    first = np.argsort(wrong, axis=1, kind="stable")[:, :size]
    slates = np.take_along_axis(candidates, first, axis=1)
    return np.where(np.take_along_axis(wrong, first, axis=1), EMPTY, slates)


def with_successor(
    truth: Truth,
    shelves: Shelves,
    candidates: np.ndarray,
    last: np.ndarray,
    barred: np.ndarray,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """(B, size) slates that hold the successor of `last` somewhere, or open with a random warm item."""
    chosen = np.where(last >= 0, truth.successor[last], rng.choice(shelves.warm, len(last)))
    barred = np.where(barred == chosen[:, None], NO_ITEM, barred)
    slates = choose_slates(np.column_stack([chosen, candidates]), barred, size)
    row = np.arange(len(slates))
    place = np.where(last >= 0, rng.integers((slates >= 0).sum(axis=1)), 0)
    slates[row, 0], slates[row, place] = slates[row, place], chosen
    return slates


def simulate(settings: StoreSettings) -> SimulatedStore:
    """Draw a store; the same settings give the same store."""
    rng = np.random.default_rng(settings.seed)
    truth, attribute = draw_truth(settings, rng)
    shelves = shelve(truth)
    year_seconds, size = YEAR_DAYS * DAY_SECONDS, settings.exposures_per_event
    time = rng.integers(year_seconds * 6 // 10, size=settings.users)
    leaves = time + ((year_seconds - time) * rng.uniform(0.3, 1.0, settings.users)).astype(np.int64)
    last = np.full(settings.users, EMPTY, dtype=np.int32)
    recent = np.full((settings.users, RECENT), NO_ITEM, dtype=np.int32)
    taken = np.zeros(settings.users, dtype=np.int32)
    log: list[tuple[np.ndarray, ...]] = []
    while len(active := np.flatnonzero(taken < truth.user_activity)):
        for users in chunks(active, USER_CHUNK):
            day = time[users] / DAY_SECONDS
            candidates = draw_candidates(settings, truth, shelves, users, last[users], day, rng)
            if settings.dynamics == "successor":
                slates = with_successor(truth, shelves, candidates, last[users], recent[users], size, rng)
            else:
                slates = choose_slates(candidates, recent[users], size)
            rates = response_rates(settings, truth, users, slates, last_items=last[users], day=day)
            feedback = draw_feedback(truth, rates, slates, rng)

            row, position = np.nonzero(slates >= 0)
            drawn = (feedback.click, feedback.like, feedback.dislike)
            log.append(
                (
                    users[row].astype(np.int32),
                    slates[row, position].astype(np.int32),
                    time[users][row] + position,
                    position.astype(np.int16),
                    *(values[row, position].astype(np.int8) for values in drawn),
                    feedback.watch_seconds[row, position].astype(np.float32),
                )
            )
            clicked = np.where(feedback.click > 0, slates, NO_ITEM)
            history = np.concatenate([recent[users], clicked], axis=1)
            # Empty places first, then items from old to new: the last columns are the latest items.
            order = np.argsort(history >= 0, axis=1, kind="stable")[:, -RECENT:]
            recent[users] = np.take_along_axis(history, order, axis=1)
            last[users] = np.where(recent[users, -1] >= 0, recent[users, -1], EMPTY)
            taken[users] += (clicked >= 0).sum(axis=1).astype(np.int32)
            rest = np.maximum(truth.user_activity[users] - taken[users], 0)
            pause = np.minimum(0.5, rng.standard_exponential(len(users)) / (rest + 1))
            time[users] += size + (pause * np.maximum(leaves[users] - time[users], 0)).astype(np.int64)
    items = item_table(settings, truth, attribute)
    exposures = exposure_table(settings, truth, items, log)
    interactions = exposures.filter(pl.col("click") == 1).drop("position")
    return SimulatedStore(settings, truth, items, interactions, exposures)


def item_table(settings: StoreSettings, truth: Truth, attribute: np.ndarray) -> pl.DataFrame:
    """N rows: item_id, title, text, categories, brand; a number tells items of the same words apart."""
    n = settings.items
    broad_names, fine_names = category_names(settings)
    kind = truth.item_brand.astype(np.int64) * len(fine_names) + truth.item_fine
    kind = kind * len(ATTRIBUTES) + attribute
    order = np.argsort(kind, kind="stable")
    opens = np.flatnonzero(np.diff(kind[order], prepend=-1))
    number = np.empty(n, dtype=np.int32)
    number[order] = np.arange(n) - np.repeat(opens, np.diff(opens, append=n)) + 1
    grade = np.digitize(truth.item_quality, [-0.35, 0.0, 0.35])
    words = pl.DataFrame(
        {
            "brand": pl.Series(brand_names(settings)).gather(truth.item_brand),
            "attribute": pl.Series(ATTRIBUTES).gather(attribute),
            "fine": pl.Series(fine_names).gather(truth.item_fine),
            "broad": pl.Series(broad_names).gather(truth.fine_broad[truth.item_fine]),
            "grade": pl.Series(GRADES).gather(grade),
            "brand_category": pl.Series([f"brand:{b}" for b in brand_names(settings)]).gather(truth.item_brand),
            "number": number,
        }
    )
    return words.select(
        external_ids("i", n).alias("item_id"),
        pl.format("{} {} {} {}", "brand", "attribute", "fine", "number").alias("title"),
        pl.format("A {} {} in {} by {}, from the {} shelf.", "grade", "fine", "attribute", "brand", "broad").alias(
            "text"
        ),
        pl.concat_list("broad", "fine", "brand_category").alias("categories"),
        "brand",
    )


def external_ids(letter: str, n: int) -> pl.Series:
    """(n,) ids such as i00000012, whose order as text is that of the numbers."""
    return pl.select(letter + pl.int_range(n).cast(pl.String).str.zfill(8)).to_series()


def exposure_table(
    settings: StoreSettings, truth: Truth, items: pl.DataFrame, log: list[tuple[np.ndarray, ...]]
) -> pl.DataFrame:
    """All impressions by user and time, from the arrays that each round left in `log`."""
    user, item, time, position, click, like, dislike, watch_seconds = (
        np.concatenate(column) for column in zip(*log, strict=True)
    )
    order = np.lexsort((time, user))
    return pl.DataFrame(
        {
            "user_id": external_ids("u", settings.users).gather(user[order]),
            "item_id": items["item_id"].gather(item[order]),
            "timestamp": START + time[order],
            "position": position[order],
            "click": click[order],
            "like": like[order],
            "dislike": dislike[order],
            "watch_seconds": watch_seconds[order],
            "duration_seconds": truth.item_duration_seconds[item[order]],
        }
    )
