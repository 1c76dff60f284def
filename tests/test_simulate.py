"""The simulated store: valid tables, mechanisms that show in the log, and a truth that the log follows."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sagerec.artifacts import write_artifact
from sagerec.catalogue.dataset import read_dataset, write_dataset
from sagerec.catalogue.simulate import (
    RECENT,
    START,
    SimulatedStore,
    StoreSettings,
    Truth,
    brand_names,
    category_names,
    read_store,
    simulate,
    write_store,
)
from sagerec.config import to_json
from sagerec.errors import ArtifactError, DatasetError, SettingsError

SMALL = StoreSettings(users=1500, items=600, seed=3)
TRUTH_FIELDS = [field.name for field in dataclasses.fields(Truth)]
OUTCOMES = ("click", "like", "dislike", "watch_seconds")


@pytest.fixture(scope="module")
def store() -> SimulatedStore:
    return simulate(SMALL)


@pytest.fixture(scope="module")
def planted() -> SimulatedStore:
    return simulate(StoreSettings(users=400, items=200, dynamics="successor", seed=1))


def numbers(table: pl.DataFrame, column: str) -> np.ndarray:
    """Indices that the ids of `column` stand for."""
    return table[column].str.slice(1).cast(pl.Int64).to_numpy()


def logged_slates(
    store: SimulatedStore,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Users (B,), slates (B, K), last items (B,), days (B,) and outcomes (B, K), read off the impressions alone."""
    table = store.exposures
    user, item = numbers(table, "user_id"), numbers(table, "item_id")
    position, click = table["position"].to_numpy(), table["click"].to_numpy()
    opened = table["timestamp"].to_numpy() - position
    slate = np.cumsum(position == 0) - 1
    shape = (slate[-1] + 1, store.settings.exposures_per_event)
    slates = np.full(shape, -1)
    slates[slate, position] = item
    outcomes = {name: np.zeros(shape) for name in OUTCOMES}
    for name in OUTCOMES:
        outcomes[name][slate, position] = table[name].to_numpy()
    users, days = user[position == 0], (opened[position == 0] - START) / 86_400
    last, carried = np.full(len(slates), -1), -1
    taken: list[list[int]] = [[] for _ in slates]
    for s, i in zip(slate[click == 1], item[click == 1], strict=True):
        taken[s].append(i)
    for s, u in enumerate(users):
        carried = -1 if s == 0 or u != users[s - 1] else carried
        last[s] = carried
        carried = taken[s][-1] if taken[s] else carried
    return users, slates, last, days, outcomes


def slow_expected(
    store: SimulatedStore, user: int, slate: list[int], last: int, day: float | None
) -> list[list[float]]:
    """The formulas at the head of `catalogue/store.py`, item by item."""
    s, t = store.settings, store.truth
    rows = []
    for k, i in enumerate(slate):
        if i < 0:
            rows.append([0.0] * 4)
            continue
        fine = t.item_fine[i]
        z = s.taste_strength * float(t.user_taste[user] @ t.item_latent[i]) + float(t.item_quality[i])
        if day is not None:
            z += s.season_strength * math.cos(2 * math.pi * (day / 365 - t.broad_phase[t.fine_broad[fine]]))
        if last >= 0:
            z += s.intent_strength * float(t.accessory[t.item_fine[last], fine])
        c = sum(1 for j in slate[:k] if j >= 0 and t.item_fine[j] == fine)
        p, like, dislike, completion = (
            1 / (1 + math.exp(-x))
            for x in (
                z - 3.5 - float(t.user_satiation[user]) * c - s.position_effect * k,
                0.8 * z - 3,
                0.6 * c - 0.8 * z - 3,
                0.5 * z - 0.5,
            )
        )
        watch = p * completion * float(t.item_duration_seconds[i])
        rows.append([p, p * like, (1 - p * like) * dislike, watch])
    return rows


def check_invariants(store: SimulatedStore) -> None:
    """What holds in every store, whatever its settings."""
    settings, truth, shown, taken = store.settings, store.truth, store.exposures, store.interactions
    assert store.items["item_id"].n_unique() == store.items["title"].n_unique() == settings.items
    assert set(numbers(taken, "user_id")) == set(range(settings.users))
    counts = np.bincount(numbers(taken, "user_id"))
    assert counts.min() >= 5
    assert (counts >= truth.user_activity).all()
    for table in (shown, taken):
        user, time = numbers(table, "user_id"), table["timestamp"].to_numpy()
        assert (np.diff(user) >= 0).all()
        assert (np.diff(time)[np.diff(user) == 0] > 0).all()
    assert taken.equals(shown.filter(pl.col("click") == 1).drop("position"))
    click, like, dislike, watch = (shown[name].to_numpy() for name in OUTCOMES)
    duration = truth.item_duration_seconds[numbers(shown, "item_id")]
    assert (shown["duration_seconds"].to_numpy() == duration).all()
    assert (duration >= 1).all()
    assert (like <= click).all()
    assert (like + dislike <= 1).all()
    assert ((watch > 0) == (click == 1)).all()
    assert (watch <= duration).all()
    day = np.minimum((shown["timestamp"].to_numpy() - shown["position"].to_numpy() - START) // 86_400, 364)
    assert (day >= truth.item_birth_day[numbers(shown, "item_id")]).all(), "an item was shown before its birth"
    slate = (shown["position"] == 0).cum_sum()
    assert not shown.select(slate, "item_id").is_duplicated().any(), "an item stands twice in a slate"
    assert shown["position"].to_numpy().max() < settings.exposures_per_event


def test_same_seed_same_store_other_seed_other_store(store: SimulatedStore) -> None:
    again, other = simulate(SMALL), simulate(dataclasses.replace(SMALL, seed=4))
    for name in ("items", "interactions", "exposures"):
        assert getattr(store, name).equals(getattr(again, name))
        assert not getattr(store, name).equals(getattr(other, name))
    for name in TRUTH_FIELDS:
        np.testing.assert_array_equal(getattr(store.truth, name), getattr(again.truth, name))
    assert not np.array_equal(store.truth.user_taste, other.truth.user_taste)


def test_a_store_is_a_canonical_dataset_and_reads_back(store: SimulatedStore, tmp_path: Path) -> None:
    content_hash = write_store(tmp_path / "store", store)
    assert content_hash == write_store(tmp_path / "again", store)
    back = read_store(tmp_path / "store")
    assert back.settings == store.settings
    for name in ("items", "interactions", "exposures"):
        assert getattr(back, name).equals(getattr(store, name))
    for name in TRUTH_FIELDS:
        read, written = getattr(back.truth, name), getattr(store.truth, name)
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)
    data = read_dataset(tmp_path / "store")
    assert data.user_ids.external(np.arange(1500)) == [f"u{u:08d}" for u in range(1500)]
    assert data.item_ids.external(np.arange(600)) == [f"i{i:08d}" for i in range(600)]
    np.testing.assert_array_equal(data.event_items, numbers(store.interactions, "item_id"))
    slates = np.arange(40).reshape(8, 5)
    np.testing.assert_array_equal(
        back.expected(np.arange(8), slates, day=9).click, store.expected(np.arange(8), slates, day=9).click
    )


def test_arrays_of_any_memory_order_read_back(planted: SimulatedStore, tmp_path: Path) -> None:
    """Safetensors writes an array's buffer: one in Fortran order would come back transposed."""
    flipped = dataclasses.replace(planted.truth, accessory=np.asfortranarray(planted.truth.accessory))
    assert not np.array_equal(flipped.accessory, flipped.accessory.T)
    write_store(tmp_path / "store", dataclasses.replace(planted, truth=flipped))
    np.testing.assert_array_equal(read_store(tmp_path / "store").truth.accessory, planted.truth.accessory)


def test_invariants_and_sizes(store: SimulatedStore, planted: SimulatedStore) -> None:
    check_invariants(store)
    check_invariants(planted)
    mean = len(store.interactions) / 1500
    assert 11 < mean < 13.5, mean
    assert 0.1 < store.exposures["click"].to_numpy().mean() < 0.4
    days = (store.interactions["timestamp"].to_numpy() - START) / 86_400
    assert days.min() >= 0
    assert 350 < days.max() < 365.1
    user = numbers(store.interactions, "user_id")
    spans = [
        days[rows][-1] - days[rows][0] for rows in np.split(np.arange(len(user)), np.flatnonzero(np.diff(user)) + 1)
    ]
    assert np.median(spans) > 60, "logs do not spread over the year"


def test_words_tell_category_brand_and_attribute(store: SimulatedStore) -> None:
    broad, fine = category_names(SMALL)
    for row, f, b in zip(
        store.items.head(50).iter_rows(named=True), store.truth.item_fine, store.truth.item_brand, strict=False
    ):
        brand = brand_names(SMALL)[b]
        assert row["categories"] == [broad[store.truth.fine_broad[f]], fine[f], f"brand:{brand}"]
        assert row["brand"] == brand
        assert row["title"].startswith(f"{brand} ")
        assert fine[f] in row["title"]
        assert fine[f] in row["text"]
        assert row["text"].endswith("shelf.")
    favourite = {
        np.bincount(store.truth.item_brand[store.truth.fine_broad[store.truth.item_fine] == b]).argmax()
        for b in range(8)
    }
    assert len(favourite) > 4, "each broad category has brands of its own"
    assert (broad[0], fine[0], fine[5]) == ("beauty", "hand cream", "frying pan")


def test_all_names_differ() -> None:
    largest = StoreSettings(categories=12, fine_per_category=64, brands=400)
    broad, fine = category_names(largest)
    assert (len(set(broad)), len(set(fine)), len(set(brand_names(largest)))) == (12, 768, 400)
    assert not set(broad) & set(fine)


def test_popular_items_take_more() -> None:
    """Of a Zipf law with exponent 0.8 over 600 items, the first 60 hold about half; without skew, chance."""

    def top_share(skew: float) -> float:
        store = simulate(dataclasses.replace(SMALL, popularity_skew=skew))
        counts = np.sort(np.bincount(numbers(store.interactions, "item_id"), minlength=600))[::-1]
        return float(counts[:60].sum() / counts.sum())

    assert top_share(0.8) > 0.4
    assert top_share(0.0) < 0.32


def test_cold_items_are_born_late_and_are_rarely_taken(store: SimulatedStore) -> None:
    cold = store.truth.item_birth_day > 0
    assert cold.sum() == 60
    assert store.truth.item_birth_day[cold].min() >= 0.7 * 365 - 1
    counts = np.bincount(numbers(store.interactions, "item_id"), minlength=600)
    assert 0 < counts[cold].mean() < 0.2 * counts[~cold].mean()
    none = simulate(dataclasses.replace(SMALL, cold_share=0.0, users=50))
    assert (none.truth.item_birth_day == 0).all()


@pytest.mark.parametrize(("strength", "low", "high"), [(0.8, 2.0, 9.0), (0.0, 0.8, 1.25)])
def test_seasons_show_in_the_log(strength: float, low: float, high: float) -> None:
    """Clicks of each broad category in the half of the year around its phase, against the other half.

    Divided by the same ratio of all clicks, so that the growth of the log over the year cancels.
    """
    store = simulate(dataclasses.replace(SMALL, season_strength=strength, users=3000))
    day = (store.interactions["timestamp"].to_numpy() - START) / 86_400
    broad = store.truth.fine_broad[store.truth.item_fine[numbers(store.interactions, "item_id")]]
    logs = []
    for b, phase in enumerate(store.truth.broad_phase):
        near = np.cos(2 * np.pi * (day / 365 - phase)) > 0
        logs.append(np.log(near[broad == b].mean() / (~near[broad == b]).mean() * (~near).mean() / near.mean()))
    assert low < np.exp(np.mean(logs)) < high


def test_watch_time_is_biased_by_duration(store: SimulatedStore) -> None:
    """Longer films collect more seconds in the log, though users see no larger share of them."""
    watch, duration = (store.interactions[c].to_numpy() for c in ("watch_seconds", "duration_seconds"))
    long, completion = duration > np.median(duration), watch / duration
    assert watch[long].mean() > 2 * watch[~long].mean()
    assert abs(completion[long].mean() - completion[~long].mean()) < 0.03


def test_durations_are_log_normal_by_category(store: SimulatedStore) -> None:
    """Log medians of 40 categories are drawn with deviation 0.5, logs within one with 0.5."""
    logs, fine = np.log(store.truth.item_duration_seconds), store.truth.item_fine
    counts = np.bincount(fine, minlength=40)
    means = np.bincount(fine, weights=logs, minlength=40) / np.maximum(counts, 1)
    assert 0.3 < means[counts > 5].std() < 0.75
    assert 0.45 < (logs - means[fine]).std() < 0.55


def test_twice_the_duration_is_twice_the_watch_time_at_equal_clicks(store: SimulatedStore) -> None:
    doubled = dataclasses.replace(
        store,
        truth=dataclasses.replace(store.truth, item_duration_seconds=2 * store.truth.item_duration_seconds),
    )
    users, slates = np.arange(20), np.arange(100).reshape(20, 5)
    once, twice = store.expected(users, slates), doubled.expected(users, slates)
    np.testing.assert_array_equal(once.click, twice.click)
    np.testing.assert_allclose(twice.watch_seconds, 2 * once.watch_seconds)
    assert (once.watch_seconds > 0).all()


def test_items_of_the_own_taste_are_clicked_more(store: SimulatedStore) -> None:
    users = np.arange(1500)
    best = (store.truth.user_taste @ store.truth.item_latent.T).argmax(axis=1)
    random = np.random.default_rng(0).integers(600, size=1500)
    matched = store.expected(users, best[:, None]).click.mean()
    assert matched > 4 * store.expected(users, random[:, None]).click.mean()
    assert matched > 0.3


def hand_store() -> SimulatedStore:
    """Three items, one user: item 0 (taste 2, quality 0.5) and 1 (0, 0) of fine 0, item 2 (taste 1, 0) of fine 1."""
    truth = Truth(
        item_latent=np.array([[0.5, 0], [0, 1], [0.25, 0]], np.float32),
        item_fine=np.array([0, 0, 1], np.int16),
        item_brand=np.zeros(3, np.int16),
        item_quality=np.array([0.5, 0, 0], np.float32),
        item_popularity=np.full(3, 1 / 3, np.float32),
        item_birth_day=np.zeros(3, np.int16),
        item_duration_seconds=np.array([10, 20, 40], np.float32),
        fine_broad=np.array([0, 1], np.int16),
        fine_centre=np.eye(2, dtype=np.float32),
        accessory=np.array([[0, 0], [1, 0]], np.float32),
        broad_phase=np.array([0.0, 0.5], np.float32),
        user_taste=np.array([[1, 0]], np.float32),
        user_satiation=np.array([2.0], np.float32),
        user_activity=np.array([5], np.int32),
        successor=np.empty(0, np.int32),
    )
    return SimulatedStore(StoreSettings(), truth, pl.DataFrame(), pl.DataFrame(), pl.DataFrame())


def test_expected_by_hand() -> None:
    """Slate (0, empty, 1, 2), default strengths 4, 1.5, 0.8 and 0.05, satiation rate 2.

    Without last item and day z = (2.5, -, 0, 1) and c = (0, -, 1, 0), so the click logits are 2.5 - 3.5 = -1,
    0 - 3.5 - 2 - 0.1 = -5.6 and 1 - 3.5 - 0.15 = -2.65. Item 0: like sigma(-1) = .268941 given a click,
    dislike sigma(-5) = .006693 times 1 - .268941^2, watch .268941 sigma(.75) 10 = .268941 x 6.791787.
    With last item 2 on day 0, items of fine 0 gain 1.5 + 0.8 and item 2, whose season is half a year off,
    loses 0.8: logits 1.3, -3.3 and -3.45.
    """
    store, slate = hand_store(), np.array([[0, -1, 1, 2]])
    plain = store.expected(np.array([0]), slate)
    np.testing.assert_allclose(plain.click[0], [0.268941, 0, 0.003684, 0.065989], atol=1e-6)
    np.testing.assert_allclose(plain.like[0, 0], 0.072329, atol=1e-6)
    np.testing.assert_allclose(plain.dislike[0, :2], [0.006209, 0], atol=1e-6)
    np.testing.assert_allclose(plain.watch_seconds[0, 0], 1.826592, atol=1e-5)
    told = store.expected(np.array([0]), slate, last_items=np.array([2]), day=0.0)
    np.testing.assert_allclose(told.click[0], [0.785835, 0, 0.035571, 0.030769], atol=1e-6)


@hypothesis_settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_expected_equals_its_slow_twin(store: SimulatedStore, data: st.DataObject) -> None:
    slate = data.draw(st.lists(st.integers(-1, 599), min_size=1, max_size=6))
    slate += slate[:2]
    user, last = data.draw(st.integers(0, 1499)), data.draw(st.integers(-1, 599))
    day = data.draw(st.none() | st.floats(0, 364))
    got = store.expected(np.array([user]), np.array([slate]), last_items=np.array([last]), day=day)
    rows = np.stack([getattr(got, name)[0] for name in OUTCOMES], axis=1)
    np.testing.assert_allclose(rows, slow_expected(store, user, slate, last, day), rtol=2e-5, atol=1e-9)


def test_a_day_for_each_row_equals_one_call_a_day(store: SimulatedStore) -> None:
    users, slates, days = np.arange(3), np.arange(12).reshape(3, 4), np.array([0.0, 90.5, 300.0])
    together = store.expected(users, slates, day=days).click
    alone = [store.expected(users[r : r + 1], slates[r : r + 1], day=days[r]).click[0] for r in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert np.abs(together - store.expected(users, slates).click).max() > 1e-3


def test_respond_draws_what_expected_says(store: SimulatedStore) -> None:
    """The mean of n = 20,000 draws lies within 5 standard errors of the expectation, cell by cell."""
    n, users = 20_000, np.array([0, 1])
    ranked = np.argsort(-store.truth.user_taste[users] @ store.truth.item_latent.T, axis=1)
    slates = np.array([ranked[0, [0, 9, 0, 1, 0]], ranked[1, [2, 0, 1, 9, 3]]])
    slates[0, 2] = -1
    last = np.array([2, -1])
    mean = store.expected(users, slates, last_items=last, day=10)
    rng = np.random.default_rng(0)
    drawn = store.respond(np.tile(users, n), np.tile(slates, (n, 1)), rng=rng, last_items=np.tile(last, n), day=10)
    for name in OUTCOMES:
        sample = getattr(drawn, name).reshape(n, 2, 5)
        error = sample.std(axis=0) / n**0.5
        assert (np.abs(sample.mean(axis=0) - getattr(mean, name)) <= 5 * error + 1e-12).all(), name
        assert (sample[:, 0, 2] == 0).all()
    assert set(np.unique(drawn.click)) == {0.0, 1.0}
    assert (drawn.like <= drawn.click).all()
    assert ((drawn.watch_seconds > 0) == (drawn.click > 0)).all()


def test_repetition_costs_clicks_and_earns_dislikes(store: SimulatedStore) -> None:
    """Five items of one fine category in places 0 to 4, against each alone in the same place."""
    same = np.flatnonzero(store.truth.item_fine == store.truth.item_fine[0])[:5]
    users = np.arange(200)
    together = store.expected(users, np.tile(same, (200, 1)))
    for place, item in enumerate(same):
        slate = np.full((200, 5), -1)
        slate[:, place] = item
        alone = store.expected(users, slate)
        if place == 0:
            np.testing.assert_array_equal(together.click[:, 0], alone.click[:, 0])
        else:
            assert (together.click[:, place] < alone.click[:, place]).all()
            assert (together.dislike[:, place] > 1.3 * alone.dislike[:, place]).all()


def test_a_varied_slate_is_worth_more_than_a_repeated_one(store: SimulatedStore) -> None:
    """Copies of one item, so that interest is equal: in one fine category, or each in a category of its own."""
    fine = store.truth.item_fine.copy()
    fine[:4] = 0
    latent, quality = store.truth.item_latent.copy(), store.truth.item_quality.copy()
    latent[1:8], quality[1:8] = latent[0], quality[0]
    fine[4:8] = [0, 1, 2, 3]
    twin = dataclasses.replace(
        store, truth=dataclasses.replace(store.truth, item_fine=fine, item_latent=latent, item_quality=quality)
    )
    users = np.arange(100)
    repeated = twin.expected(users, np.tile(np.arange(4), (100, 1)))
    varied = twin.expected(users, np.tile(np.arange(4, 8), (100, 1)))
    assert (varied.click.sum(axis=1) > repeated.click.sum(axis=1)).all()
    assert (varied.dislike.sum(axis=1) < repeated.dislike.sum(axis=1)).all()


def test_the_log_follows_the_truth(store: SimulatedStore) -> None:
    """Outcomes of all impressions against the truth's expectation for the logged slates.

    The difference is a martingale over each user's slates, so its sum has mean 0 though users leave after a
    number of clicks; it must lie within 5 standard errors, over all and over each half of the year.
    """
    users, slates, last, days, outcomes = logged_slates(store)
    mean = store.expected(users, slates, last_items=last, day=days)
    assert (last >= 0).mean() > 0.5
    for rows in (days >= 0, days < 182, days >= 182):
        for name in OUTCOMES:
            difference = (outcomes[name] - getattr(mean, name))[rows].sum(axis=1)
            assert abs(difference.sum()) < 5 * np.sqrt((difference**2).sum()), name
    blind = store.expected(users, slates).click
    gap = (outcomes["click"] - blind).sum(axis=1)
    assert abs(gap.sum()) > 5 * np.sqrt((gap**2).sum()), "last item and day make no difference"


def test_recent_items_are_not_shown_again(store: SimulatedStore) -> None:
    users, slates, _, _, outcomes = logged_slates(store)
    for user in range(100):
        taken: list[int] = []
        for slate, click in zip(slates[users == user], outcomes["click"][users == user], strict=True):
            assert not set(slate[slate >= 0]) & set(taken[-RECENT:])
            taken += slate[click == 1].tolist()


def test_the_last_item_tells_more_than_popularity() -> None:
    """Recall@10 of each user's last item: popularity against popularity within what follows a category."""
    store = simulate(StoreSettings(users=3000, items=300, seed=5))
    user, item = numbers(store.interactions, "user_id"), numbers(store.interactions, "item_id")
    final = np.append(user[1:] != user[:-1], True)
    count = np.bincount(item[~final], minlength=300)
    fine = store.truth.item_fine
    step = np.flatnonzero(~final[1:] & (user[1:] == user[:-1]))
    follows = np.zeros((40, 300))
    np.add.at(follows, (fine[item[step]], item[step + 1]), 1)
    follows = follows / np.maximum(follows.sum(axis=1, keepdims=True), 1) + 0.01 * count / count.sum()
    target, before = item[final], item[np.flatnonzero(final) - 1]

    def recall(scores: np.ndarray) -> float:
        return float((np.argsort(-scores, axis=1)[:, :10] == target[:, None]).any(axis=1).mean())

    popularity = recall(np.tile(count, (3000, 1)))
    assert popularity > 2 * 10 / 300
    assert recall(follows[fine[before]]) > 1.2 * popularity


def test_successor_dynamics_are_one_cycle_that_every_user_follows(planted: SimulatedStore) -> None:
    successor, warm = planted.truth.successor, np.flatnonzero(planted.truth.item_birth_day == 0)
    item, visited = int(warm[0]), []
    for _ in warm:
        visited.append(item)
        item = int(successor[item])
    assert item == warm[0]
    assert sorted(visited) == warm.tolist()
    assert set(successor) == set(warm.tolist())
    user, item_of = numbers(planted.interactions, "user_id"), numbers(planted.interactions, "item_id")
    same = user[1:] == user[:-1]
    np.testing.assert_array_equal(item_of[1:][same], successor[item_of[:-1][same]])
    assert same.sum() > 3000
    np.testing.assert_array_equal(np.bincount(user), planted.truth.user_activity)


def test_successor_users_start_anywhere_and_the_successor_stands_anywhere(planted: SimulatedStore) -> None:
    """400 uniform starts over 180 items reach 180 (1 - (179/180)^400) = 160 of them on average."""
    user = numbers(planted.interactions, "user_id")
    starts = numbers(planted.interactions, "item_id")[np.append(True, user[1:] != user[:-1])]
    assert 150 <= len(set(starts)) <= 172
    clicked = planted.exposures.filter(pl.col("click") == 1)["position"].value_counts(normalize=True)
    assert len(clicked) == 6
    assert clicked["proportion"].to_numpy().min() > 0.1


def test_successor_truth_is_exact(planted: SimulatedStore) -> None:
    successor = planted.truth.successor
    slates = np.array([[-1, 5, successor[7], 9], [-1, 5, 6, 9], [5, 6, 8, 9]])
    last = np.array([7, -1, 7])
    slates[2][slates[2] == successor[7]] = -1
    want = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    want[0, 1], want[0, 3] = slates[0, 1] == successor[7], slates[0, 3] == successor[7]
    got = planted.expected(np.arange(3), slates, last_items=last)
    drawn = planted.respond(np.arange(3), slates, last_items=last, rng=np.random.default_rng(0))
    seconds = want * planted.truth.item_duration_seconds[slates]
    for answer in (got, drawn):
        np.testing.assert_array_equal(answer.click, want)
        np.testing.assert_array_equal(answer.like, want)
        np.testing.assert_array_equal(answer.dislike, 0)
        np.testing.assert_allclose(answer.watch_seconds, seconds)
    assert planted.expected(np.arange(3), slates).click[0].tolist() == [0, 1, 0, 0]


@hypothesis_settings(max_examples=50, deadline=None)
@given(
    users=st.integers(1, 30),
    items=st.integers(200, 260),
    events_per_user=st.floats(5, 9),
    dynamics=st.sampled_from(["taste", "successor"]),
    categories=st.integers(2, 12),
    fine_per_category=st.sampled_from([1, 3, 9, 64]),
    brands=st.sampled_from([1, 7, 400]),
    latent_width=st.sampled_from([2, 5]),
    popularity_skew=st.sampled_from([0.0, 1.5]),
    season_strength=st.sampled_from([0.0, 2.0]),
    logging_skill=st.sampled_from([0.0, 1.0]),
    cold_share=st.sampled_from([0.0, 0.49]),
    exposures_per_event=st.sampled_from([1, 2, 30]),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_small_settings_give_a_valid_store(**values: object) -> None:
    settings = StoreSettings(**values)  # type: ignore[arg-type]
    store = simulate(settings)
    check_invariants(store)
    if settings.dynamics == "successor":
        user, item = numbers(store.interactions, "user_id"), numbers(store.interactions, "item_id")
        same = user[1:] == user[:-1]
        assert (item[1:][same] == store.truth.successor[item[:-1][same]]).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"items": 199}, "items is 199; expected 200 to 100,000,000"),
        ({"users": 2.5}, "users is 2.5; expected a whole number, 1 to 100,000,000"),
        ({"events_per_user": 4.9}, "events_per_user is 4.9; expected 5 to 10,000"),
        ({"satiation": math.nan}, "satiation is nan; expected a finite number, 0 to 5"),
        ({"brands": 401}, "brands is 401; expected 1 to 400"),
        ({"cold_share": 0.5}, "cold_share is 0.5; expected from 0 to below 0.5"),
        ({"dynamics": "random"}, "dynamics is 'random'; expected one of taste, successor"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        StoreSettings(**values)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("users", "slates", "last_items", "message"),
    [
        ([0], [[600]], None, "slates holds 600; expected indices from -1 to 599 of this store"),
        ([0], [[-2]], None, "slates holds -2; expected indices from -1 to 599 of this store"),
        ([-1], [[0]], None, "users holds -1; expected indices from 0 to 1499 of this store"),
        ([0], [[0]], [600], "last_items holds 600; expected indices from -1 to 599 of this store"),
        ([0], [[0.5]], None, "slates has type float64; expected integer indices"),
        ([0, 1], [[0]], None, "users has shape (2,) and slates (1, 1); expected (B,) and (B, K) of one B"),
        ([0], [0], None, "users has shape (1,) and slates (1,); expected (B,) and (B, K) of one B"),
    ],
)
def test_the_truth_refuses_what_the_store_does_not_have(
    store: SimulatedStore, users: list[int], slates: list[list[int]], last_items: list[int] | None, message: str
) -> None:
    last = None if last_items is None else np.array(last_items)
    with pytest.raises(DatasetError) as caught:
        store.expected(np.array(users), np.array(slates), last_items=last)
    assert str(caught.value) == message


def refusal(folder: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        read_store(folder)
    return str(caught.value)


def test_folders_that_are_no_store_are_refused(planted: SimulatedStore, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert refusal(absent, DatasetError) == (
        f"{absent} is not a folder; expected a simulated store, as `sagerec simulate` writes it"
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    assert refusal(bare, ArtifactError) == (
        f"{bare} is not a dataset artefact: it has no manifest.json; run the stage that makes it"
    )
    codes = tmp_path / "codes"
    with write_artifact(codes, "semantic_ids"):
        pass
    assert refusal(codes, ArtifactError) == f"{codes} holds a 'semantic_ids' artefact, expected 'dataset'"
    plain = tmp_path / "plain"
    write_dataset(plain, planted.items, planted.interactions)
    assert refusal(plain, ArtifactError) == (
        f"{plain} is a dataset but no simulated store: it has no truth.safetensors. "
        "`sagerec simulate DATASET` writes one"
    )
    changed = tmp_path / "changed"
    write_store(changed, planted)
    planted.items.reverse().write_parquet(changed / "items.parquet")
    assert refusal(changed, ArtifactError) == (
        f"{changed}/items.parquet was changed after it was written; make {changed} again"
    )


def test_a_truth_of_another_version_is_refused(planted: SimulatedStore, tmp_path: Path) -> None:
    folder = tmp_path / "store"

    def write(settings: dict[str, object], truth: dict[str, np.ndarray] | None) -> None:
        with write_artifact(folder, "dataset", settings=settings) as fresh:
            if truth is None:
                (fresh / "truth.safetensors").write_bytes(b"no tensors")
            else:
                save_file(truth, fresh / "truth.safetensors")

    truth = {name: getattr(planted.truth, name) for name in TRUTH_FIELDS}
    write({"users": 3}, truth)
    assert refusal(folder, ArtifactError) == (
        f"{folder}: its settings ['users'] are not those of a simulated store of this version; simulate it again"
    )
    write(to_json(planted.settings), None)
    assert refusal(folder, ArtifactError).startswith(f"{folder / 'truth.safetensors'} is not safetensors (")
    write(to_json(planted.settings), {"item_fine": truth["item_fine"]})
    assert refusal(folder, ArtifactError) == (
        f"{folder / 'truth.safetensors'} holds item_fine; expected {', '.join(TRUTH_FIELDS)}. Simulate the store again"
    )
