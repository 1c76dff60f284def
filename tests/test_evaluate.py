"""The evaluation harness: a report worked by hand, shared IDs, baselines, and what is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from sagerec.actions.clusters import item_clusters
from sagerec.actions.semantic_ids.build import SemanticIds, index_ids
from sagerec.actions.trie import build_trie
from sagerec.baselines import sasrec as sasrec_module
from sagerec.baselines import tuning
from sagerec.baselines.item_knn import item_knn_lists, top_k
from sagerec.baselines.popularity import popularity_lists
from sagerec.baselines.sasrec import SasRec, SasRecSettings
from sagerec.baselines.tuning import BaselineName, evaluate_baseline, sasrec_grid, sasrec_trials
from sagerec.catalogue import similarity
from sagerec.catalogue.dataset import Dataset, assemble, check_interactions, check_items
from sagerec.catalogue.similarity import item_similarities
from sagerec.catalogue.splits import Sequences, SplitSettings, make_split
from sagerec.errors import DatasetError, SettingsError, TrainingError
from sagerec.evaluation.evaluate import EvaluateSettings, evaluate_lists, excludes_history
from sagerec.files import read_record
from sagerec.run.folder import Run
from sagerec.run.stages import audit, evaluate, make_actions, prepare, read_lists
from tests.conftest import SMALL_RUN, SMALL_TRAIN, semantic_ids

TINY_SASREC = SasRecSettings(width=16, heads=2)


def hand_data() -> Dataset:
    """Items a-e; users: u abcd, v abce, w bade. Leave-one-out trains on ab, ab, ba; tests on d, e, e."""
    items = pl.DataFrame(
        {
            "item_id": list("abcde"),
            "title": ["A", "B", "C", "D", "E"],
            "categories": [["x"], ["x"], ["x", "y"], ["y"], []],
        }
    )
    rows = [
        (user, item, time) for user, s in (("u", "abcd"), ("v", "abce"), ("w", "bade")) for time, item in enumerate(s)
    ]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return assemble(check_items(items, Path("items")), check_interactions(events, Path("log")))


def hand_ids(codes: list[list[int]], listed: list[int] | None = None) -> SemanticIds:
    array = np.array(codes, dtype=np.int32)
    leaves = np.arange(len(codes)) if listed is None else np.array(listed)
    codebooks = np.zeros((1, int(array.max()) + 1, 2), dtype=np.float32)
    vectors = np.zeros((len(codes), 2), dtype=np.float32)
    return index_ids(codes=array, vectors=vectors, codebooks=codebooks, trie=build_trie(array[leaves], leaves))


def value(report: dict[str, object], metric: str) -> float:
    return float(report["metrics"][metric]["value"])  # type: ignore[index]


def test_a_report_by_hand() -> None:
    """Targets d, e, e (3, 4, 4). Lists [3, 0], [0, 4], [0, 1]: ranks 1, 2, absent.

    recall@1 1/3, recall@2 2/3; ndcg@2 (1 + 1/log2 3)/3; mrr@2 (1 + 1/2)/3. Training counts: a 3, b 3, the rest 0, so
    every target is cold at 0 and cold recall equals recall. Shown at 2: items 3, 0, 4, 1 of 5 -> coverage 4/5.
    Categories at 2: {y, x} 1 bit; {x, none} 1 bit; {x, x} 0 -> 2/3.
    """
    data = hand_data()
    split = make_split(data, SplitSettings())
    cases = split.cases(data, "test")
    assert cases.targets.tolist() == [3, 4, 4]
    lists = np.array([[3, 0], [0, 4], [0, 1]])
    settings = EvaluateSettings(k=(1, 2), cold_max_count=0, bootstrap_samples=100)
    report = evaluate_lists(lists, cases, data, split, hand_ids([[0], [1], [2], [3], [4]]), settings)
    assert value(report, "recall@1") == pytest.approx(1 / 3)
    assert value(report, "recall@2") == pytest.approx(2 / 3)
    assert value(report, "ndcg@2") == pytest.approx((1 + 1 / np.log2(3)) / 3)
    assert value(report, "mrr@2") == pytest.approx(0.5)
    assert value(report, "cold_recall@2") == value(report, "recall@2")
    assert value(report, "coverage@2") == pytest.approx(4 / 5)
    assert value(report, "entropy@2") == pytest.approx(2 / 3)
    assert value(report, "invalid_rate@2") == 0
    assert report["cold_cases"] == 3
    assert (report["users"], report["cases"]) == (3, 3)
    assert [row["cases"] for row in report["buckets"]] == [3, 0, 0, 0, 0]
    json.dumps(report)


def test_shared_ids_give_three_views() -> None:
    """D and e (3, 4) share an ID that lists show as 3; every list is [3, 0]; targets 3, 4, 4.

    The ID stands for two items, so each target is first or second: recall@1 is 1, 1/2 or 0; recall@2 is 1 in all.
    """
    data = hand_data()
    split = make_split(data, SplitSettings())
    ids = hand_ids([[0], [1], [2], [3], [3]], listed=[0, 1, 2, 3])
    assert not ids.is_unique
    settings = EvaluateSettings(k=(1, 2), bootstrap_samples=100)
    lists = np.array([[3, 0]] * 3)
    report = evaluate_lists(lists, split.cases(data, "test"), data, split, ids, settings, shared_ids=True)
    views = [value(report, f"recall@1{tail}") for tail in ("_optimistic", "", "_pessimistic")]
    assert views == [1.0, 0.5, 0.0]
    assert value(report, "recall@2_pessimistic") == 1.0


def test_clusters_by_hand() -> None:
    data = hand_data()
    ids = hand_ids([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
    category = item_clusters(data, ids, "category").toarray()
    assert category.shape == (5, 3)
    np.testing.assert_allclose(category.sum(axis=1), 1)
    x = category[0].argmax()
    assert category[2, x] == 0.5
    assert category[4, x] == 0
    first = item_clusters(data, ids, "first-code").toarray()
    assert first.argmax(axis=1).tolist() == [0, 0, 1, 1, 2]
    bare = replace(data, items=data.items.drop("categories"))
    with pytest.raises(DatasetError, match="choose the clusters first-code or coarse"):
        item_clusters(bare, ids, "category")


def test_coarse_clusters_join_first_codes(small_run: Run) -> None:
    ids = semantic_ids(small_run)
    many = replace(ids, codebooks=np.random.default_rng(0).normal(size=(2, 100, 4)).astype(np.float32))
    coarse = item_clusters(small_run.data, many, "coarse")
    assert coarse.shape[1] <= 32
    same_first = coarse.toarray().argmax(axis=1)
    for code in np.unique(ids.codes[:, 0]):
        assert len(set(same_first[ids.codes[:, 0] == code])) == 1


def test_history_is_excluded_only_where_training_never_repeats() -> None:
    def sequences(items: list[int]) -> Sequences:
        return Sequences(np.array(items, dtype=np.int32), np.array([0, 3, 5]), np.array([0, 1]), np.arange(5))

    assert excludes_history(sequences([1, 2, 3, 1, 2]), EvaluateSettings())
    assert not excludes_history(sequences([1, 2, 1, 4, 5]), EvaluateSettings())
    assert not excludes_history(sequences([1, 2, 3, 1, 2]), EvaluateSettings(history="keep"))
    assert excludes_history(sequences([1, 1, 1, 1, 1]), EvaluateSettings(history="exclude"))


def test_top_k_equals_a_sort_and_marks_missing_items() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (20, 30)).astype(float)
    scores[3, 2:] = -np.inf
    result = top_k(scores, 4)
    for row in range(20):
        expected = sorted(range(30), key=lambda i: (-scores[row, i], i))[:4]
        assert result[row].tolist() == [i if np.isfinite(scores[row, i]) else -1 for i in expected]
    assert top_k(np.array([[1.0, 2.0]]), 3).tolist() == [[1, 0, -1]]


def test_popularity_by_hand() -> None:
    """Training counts a 3, b 3, others 0. Without the history (u and v had a, b, c; w had b, a, d): u d, e; w c, e."""
    data = hand_data()
    split = make_split(data, SplitSettings())
    train, cases = split.sequences(data, "train"), split.cases(data, "test")
    keep = popularity_lists(train, cases, n_items=5, k=2, exclude_history=False)
    assert keep.tolist() == [[0, 1]] * 3
    fresh = popularity_lists(train, cases, n_items=5, k=3, exclude_history=True)
    assert fresh.tolist() == [[3, 4, -1], [3, 4, -1], [2, 4, -1]]


def test_item_similarities_by_hand() -> None:
    """Users ab, ab, ac: n_a 3, n_b 2, n_c 1; s_ab = 2 / sqrt(6), s_ac = 1 / sqrt(3); one neighbour: a keeps b."""
    train = Sequences(np.array([0, 1, 0, 1, 0, 2], dtype=np.int32), np.array([0, 2, 4, 6]), np.arange(3), np.arange(6))
    full = item_similarities(train, 3, neighbours=5, shrinkage=0).toarray()
    np.testing.assert_allclose(full, [[0, 2 / 6**0.5, 1 / 3**0.5], [2 / 6**0.5, 0, 0], [1 / 3**0.5, 0, 0]], rtol=1e-6)
    cut = item_similarities(train, 3, neighbours=1, shrinkage=0).toarray()
    assert (cut[0] > 0).tolist() == [False, True, False]


def test_similarities_do_not_hang_on_the_blocks(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    train = small_run.split.sequences(small_run.data, "train")
    given: dict[str, Any] = {"n_items": small_run.data.n_items, "neighbours": 7, "shrinkage": 5.0}
    whole = item_similarities(train, **given)
    monkeypatch.setattr(similarity, "MOST_PAIRS", 1000)
    assert np.array_equal(item_similarities(train, **given).toarray(), whole.toarray())


def test_item_knn_equals_a_slow_twin(small_run: Run) -> None:
    data, split = small_run.data, small_run.split
    train, cases = split.sequences(data, "train"), split.cases(data, "test")
    lists = item_knn_lists(train, cases, n_items=data.n_items, k=5, exclude_history=True, max_items=9, decay=0.5)
    similar = item_similarities(train, data.n_items, neighbours=100, shrinkage=5.0).toarray()
    for case in range(0, len(cases), 17):
        history = data.event_items[max(cases.starts[case], cases.rows[case] - 9) : cases.rows[case]]
        scores = np.zeros(data.n_items)
        for back, item in enumerate(reversed(history.tolist())):
            scores += 0.5**back * similar[item]
        scores[data.event_items[cases.starts[case] : cases.rows[case]]] = -np.inf  # whole, whatever is read of it
        np.testing.assert_allclose(scores[lists[case]], np.sort(scores)[::-1][:5], rtol=1e-5, atol=1e-9)


def test_sasrec_lists_are_its_highest_scores_and_its_losses_agree(small_run: Run) -> None:
    """Lists against brute force; a sample that is the whole catalogue, each item once, gives the full softmax."""
    torch.manual_seed(0)
    data = small_run.data
    cases = small_run.split.cases(data, "test").sample(40, np.random.default_rng(0))
    model = SasRec(SasRecSettings(width=16, heads=2, max_items=6), data.n_items).eval()
    lists = model.lists(cases, k=4, exclude_history=True)
    for case in range(40):
        history = data.event_items[max(cases.starts[case], cases.rows[case] - 6) : cases.rows[case]].astype(np.int64)
        with torch.no_grad():
            states = model.encode(torch.from_numpy(history)[None], torch.tensor([len(history)]))
            scores = model.items.weight @ states[0, -1]
        had = data.event_items[cases.starts[case] : cases.rows[case]].astype(np.int64)  # whole, whatever is read of it
        scores[torch.from_numpy(had)] = -torch.inf
        torch.testing.assert_close(scores[torch.from_numpy(lists[case])], scores.topk(4).values)

    inputs, targets, counted = torch.tensor([[1, 2]]), torch.tensor([[2, 3]]), torch.tensor([[True, False]])
    full = model.loss(inputs, targets, counted)
    everything = torch.arange(data.n_items)[None]
    model.settings = replace(model.settings, sampled=data.n_items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: everything)
        torch.testing.assert_close(model.loss(inputs, targets, counted), full)


def test_evaluation_files_of_a_run(small_run: Run) -> None:
    report = read_record(small_run.folder / "evaluation.json")
    assert report["split"] == "test"
    assert report["users"] == small_run.split.counts()["test"]
    recall = report["metrics"]["recall@10"]
    assert 0 <= recall["low"] <= recall["value"] <= recall["high"] <= 1
    assert report["proven_exact"] == 1.0
    lists = pl.read_parquet(small_run.folder / "evaluation.lists.parquet")
    shown = np.array(lists["items"].to_list())
    hits = (shown[:, :10] == lists["target"].to_numpy()[:, None]).any(axis=1)
    assert hits.mean() == pytest.approx(recall["value"])


def test_baselines_of_a_run_and_a_saved_report_is_reused(small_run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    settings = SMALL_RUN.evaluate
    popular = evaluate_baseline(small_run, "popularity", settings)
    knn = evaluate_baseline(small_run, "item-knn", settings)
    sasrec = evaluate_baseline(small_run, "sasrec", settings, model=TINY_SASREC, training=SMALL_TRAIN)
    assert knn["metrics"]["recall@10"]["value"] > popular["metrics"]["recall@10"]["value"]
    assert {popular["cases"], knn["cases"], sasrec["cases"]} == {popular["cases"]}
    assert evaluate(small_run, settings) == read_record(small_run.folder / "evaluation.json")
    assert "evaluation.json is there and fits" in caplog.text


def test_sasrec_is_tuned_on_validation_and_learns_from_the_reserved_events(store_folder: Path, tmp_path: Path) -> None:
    run = prepare(store_folder, tmp_path / "run", SplitSettings(reserve="event"))
    make_actions(run, SMALL_RUN.ids)
    report = evaluate_baseline(run, "sasrec", SMALL_RUN.evaluate, model=TINY_SASREC, training=SMALL_TRAIN, trials=3)
    trials = sasrec_trials(run, TINY_SASREC, 3)
    assert [trial["settings"] for trial in trials] == sasrec_grid(TINY_SASREC, 3)
    best = max(range(3), key=lambda number: trials[number]["criterion"])
    assert [trial["chosen"] for trial in trials] == [number == best for number in range(3)]
    chosen, copied = (run.folder / name / "model.safetensors" for name in (f"sasrec-{best}", "sasrec"))
    assert chosen.read_bytes() == copied.read_bytes()
    counts = {finding.stage: finding.counts for finding in audit(run)}["sasrec"]
    assert counts == run.split.counts() | {"valid": 0, "test": 0}
    assert counts["align"] > 0
    # Once more: nothing is trained, and the report is the same.
    times = {path: path.stat().st_mtime_ns for path in run.folder.glob("sasrec-*/model.safetensors")}
    again = evaluate_baseline(run, "sasrec", SMALL_RUN.evaluate, model=TINY_SASREC, training=SMALL_TRAIN, trials=3)
    assert again == report
    assert {path: path.stat().st_mtime_ns for path in times} == times
    refit = evaluate_baseline(
        run, "sasrec", SMALL_RUN.evaluate, model=TINY_SASREC, training=SMALL_TRAIN, trials=3, refit=True
    )
    assert refit["made_from"].keys() == {"sasrec-refit", "semantic_ids"}
    assert {f.stage: f.counts for f in audit(run)}["sasrec-refit"] == run.split.counts() | {"test": 0}
    with pytest.raises(SettingsError, match="trials is 1 and refit True for item-knn; expected them for sasrec alone"):
        evaluate_baseline(run, "item-knn", SMALL_RUN.evaluate, refit=True)
    with pytest.raises(SettingsError, match="learns from the validation events, and the split is valid; expected test"):
        evaluate_baseline(run, "sasrec", replace(SMALL_RUN.evaluate, split="valid"), refit=True)
    with pytest.raises(SettingsError, match="trials is 9; expected 1 to"):
        sasrec_grid(TINY_SASREC, 9)


@pytest.mark.parametrize("name", ["popularity", "item-knn"])
def test_baselines_learn_from_the_reserved_events(name: BaselineName, store_folder: Path, tmp_path: Path) -> None:
    """A run that reserves events gives the lists of one whose training holds them."""
    lists = []
    for reserve in ("event", "none"):
        run = prepare(store_folder, tmp_path / reserve, SplitSettings(reserve=reserve))
        make_actions(run, SMALL_RUN.ids)
        evaluate_baseline(run, name, SMALL_RUN.evaluate)
        lists.append(read_lists(run, f"-{name}"))
    assert np.array_equal(lists[0], lists[1])


def test_a_trial_of_sasrec_that_diverges_loses(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(store_folder, tmp_path / "run", SplitSettings())
    make_actions(run, SMALL_RUN.ids)
    train = sasrec_module.train_sasrec

    def diverge(folder: Path, *others: Any, **named: Any) -> Any:
        if folder.name == "sasrec-1":
            raise TrainingError("loss nan")
        return train(folder, *others, **named)

    monkeypatch.setattr(tuning, "train_sasrec", diverge)
    evaluate_baseline(run, "sasrec", SMALL_RUN.evaluate, model=TINY_SASREC, training=SMALL_TRAIN, trials=2)
    trials = sasrec_trials(run, TINY_SASREC, 2)
    assert [trial["chosen"] for trial in trials] == [True, False]
    assert trials[1]["criterion"] == 0
    monkeypatch.setattr(tuning, "train_sasrec", lambda *_, **__: diverge(tmp_path / "sasrec-1"))
    with pytest.raises(TrainingError, match="all 2 trials of SASRec failed, the last: loss nan"):
        evaluate_baseline(
            run, "sasrec", SMALL_RUN.evaluate, model=replace(TINY_SASREC, layers=2), training=SMALL_TRAIN, trials=2
        )


def test_an_empty_part_and_bad_settings_are_errors(small_run: Run) -> None:
    data = hand_data()
    split = replace(make_split(data, SplitSettings()), parts=np.zeros(12, dtype=np.uint8))
    with pytest.raises(DatasetError, match="has 0 cases for test, of 0 users; expected at least 2 users"):
        evaluate_lists(
            np.zeros((0, 5), int), split.cases(data, "test"), data, split, semantic_ids(small_run), EvaluateSettings()
        )
    for wrong, said in (
        ({"heads": 3}, "multiple of twice the 3 heads"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ):
        with pytest.raises(SettingsError, match=said):
            SasRecSettings(**wrong)
    with pytest.raises(SettingsError, match=r"k is 0"):
        EvaluateSettings(k=(0,))
    with pytest.raises(SettingsError, match="at least 100"):
        EvaluateSettings(bootstrap_samples=5)
