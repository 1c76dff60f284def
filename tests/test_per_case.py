"""The table of per-case metrics: by hand, against the formulas, and as the one source of every average."""

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sagerec.catalogue.splits import Cases, learnt_counts
from sagerec.evaluation import metrics
from sagerec.evaluation.per_case import (
    Values,
    Yardstick,
    make_yardstick,
    mean_over_seeds,
    per_case,
    validation_means,
)
from sagerec.files import read_record
from sagerec.run.folder import Run
from sagerec.run.stages import read_lists
from tests.conftest import SMALL_RUN

SOURCE = Path(__file__).parents[1] / "src" / "sagerec"
N_ITEMS = 8


def make_cases(users: list[int], targets: list[int]) -> Cases:
    rows = np.arange(1, len(users) + 1)
    events = np.zeros(len(users) + 1, dtype=np.int32)
    return Cases(np.array(users, dtype=np.int32), np.array(targets, dtype=np.int32), rows, rows - 1, events)


def test_a_table_by_hand() -> None:
    """Users 5, 5, 9; targets 0, 3, 1; lists [0, 2], [1, -1], [2, 1] at k = 2: ranks 1, none, 2.

    Recall 1, 0, 1; NDCG 1, 0, 1/log2 3; MRR 1, 0, 1/2. Items 1 and 3 are cold: cases 1 and 2, Cold-Recall 0, 1 of
    users 5, 9. Clusters {0, 1}, {2, 3}: 1, 0, 1 bits. Invalid 0, 1/2, 0.
    """
    cases = make_cases([5, 5, 9], [0, 3, 1])
    lists = np.array([[0, 2], [1, -1], [2, 1]])
    clusters = sparse.csr_array(np.repeat(np.eye(2), 2, axis=0))
    cold = np.array([False, True, False, True])
    table = per_case(lists, cases, (2,), Yardstick(cold=cold, clusters={"entropy": clusters}))
    assert table.keys() == {
        *("recall@2", "ndcg@2", "mrr@2", "entropy@2", "invalid_rate@2", "duplicate_rate@2", "cold_recall@2")
    }
    assert table["recall@2"].values.tolist() == [1, 0, 1]
    assert table["ndcg@2"].values.tolist() == pytest.approx([1, 0, 1 / np.log2(3)])
    assert table["mrr@2"].values.tolist() == [1, 0, 0.5]
    assert table["entropy@2"].values.tolist() == [1, 0, 1]
    assert table["invalid_rate@2"].values.tolist() == [0, 0.5, 0]
    chosen = table["cold_recall@2"]
    assert (chosen.values.tolist(), chosen.cases.tolist(), chosen.users.tolist()) == ([0, 1], [1, 2], [5, 9])
    assert chosen.where(np.array([True, False, True])).users.tolist() == [9]
    assert table["recall@2"].minus(table["mrr@2"]).values.tolist() == [0, 0, 0.5]
    with pytest.raises(AssertionError, match="different cases"):
        chosen.minus(table["recall@2"])


def test_what_is_absent_is_not_measured() -> None:
    """Without a yardstick the lists alone; no cold case, no Cold-Recall, and 0 where validation asks for it."""
    cases, lists = make_cases([0, 1], [0, 1]), np.array([[0], [0]])
    assert {name.partition("@")[0] for name in per_case(lists, cases, (1,))} == {
        *("recall", "ndcg", "mrr", "invalid_rate", "duplicate_rate")
    }
    warm = Yardstick(cold=np.zeros(N_ITEMS, dtype=bool), counts=np.ones(N_ITEMS, dtype=np.int64))
    assert {"cold_recall@1", "novelty@1"} & per_case(lists, cases, (1,), warm).keys() == {"novelty@1"}
    assert validation_means(lists, cases, ("recall", "cold_recall"), warm, k=1) == {
        "valid_recall@1": 0.5,
        "valid_cold_recall@1": 0.0,
    }


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_table_is_the_formulas_and_unshared_ids_have_one_view(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 12)), int(rng.integers(1, 6))
    lists = rng.integers(-1, N_ITEMS, size=(n, width))
    cases = make_cases(rng.integers(4, size=n).tolist(), rng.integers(N_ITEMS, size=n).tolist())
    counts, k = rng.integers(0, 9, size=N_ITEMS), int(rng.integers(1, width + 1))
    table = per_case(lists, cases, (k,), Yardstick(counts=counts, id_sizes=np.ones(N_ITEMS, dtype=np.int64)))
    ranks = metrics.first_rank(lists, cases.targets)
    for name, function in (("recall", metrics.recall_at), ("ndcg", metrics.ndcg_at), ("mrr", metrics.mrr_at)):
        for tail in ("", "_optimistic", "_pessimistic"):
            assert table[f"{name}@{k}{tail}"].values.tolist() == function(ranks, k).tolist()
    assert table[f"novelty@{k}"].values.tolist() == metrics.novelty_at(lists, counts, k).tolist()
    assert all(np.array_equal(found.users, cases.users) for found in table.values())


def test_seeds_are_averaged_case_by_case() -> None:
    def table(values: list[float]) -> dict[str, Values]:
        return {"recall@10": Values(np.array(values), np.arange(2), np.array([3, 4]))}

    found = mean_over_seeds([table([0, 1]), table([1, 1])])["recall@10"]
    assert found.values.tolist() == [0.5, 1]
    assert found.users.tolist() == [3, 4]


def test_the_report_of_a_run_is_the_table_s_means(small_run: Run) -> None:
    """Every mean of evaluation.json but coverage and Gini; the store's answers and both entropies are among them."""
    run, settings_ = small_run, SMALL_RUN.evaluate
    yardstick = make_yardstick(
        run.data, run.split, run.space(), cold_max_count=settings_.cold_max_count, store=run.store()
    )
    assert yardstick.cold is not None
    assert np.array_equal(yardstick.cold, learnt_counts(run.data, run.split) <= settings_.cold_max_count)
    table = per_case(read_lists(run), run.split.cases(run.data, "test"), settings_.k, yardstick)
    saved = read_record(run.folder / "evaluation.json")["metrics"]
    assert table.keys() == {name for name in saved if not name.startswith(("coverage", "gini"))}
    assert {"entropy@10", "coarse_entropy@10", "clicks@10", "watch_seconds@10"} <= table.keys()
    for name, found in table.items():
        assert saved[name]["value"] == pytest.approx(found.mean())


def test_nobody_else_computes_a_per_case_metric() -> None:
    """The formulas are called here alone; a second place would be a second definition."""
    formulas = {"recall_at", "ndcg_at", "mrr_at", "tied_value", "entropy_at", "novelty_at"}
    formulas |= {"invalid_rate", "duplicate_rate", "expected_answers"}
    home = {"metrics.py", "per_case.py", "simulated_store.py"}
    for path in SOURCE.rglob("*.py"):
        if path.name not in home:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
                assert name not in formulas, f"{path.relative_to(SOURCE)} calls {name}"
