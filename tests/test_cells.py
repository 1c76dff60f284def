"""What tables of results say: labels, numbers, verdicts, notes; and the differences within a run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sagerec.baselines.tuning import evaluate_baseline
from sagerec.evaluation.tests import COMPARED
from sagerec.files import read_record
from sagerec.report import cells
from sagerec.report.material import differences_to_start, study_row
from sagerec.run.folder import Run, open_run
from tests.conftest import SMALL_RUN


def test_labels_and_numbers() -> None:
    names = ("recall@10", "cold_recall@5", "entropy@10", "coarse_entropy@10", "coverage@10", "watch_seconds@10")
    assert [cells.label(name) for name in names] == [
        *("Recall@10", "Cold-Recall@5", "Entropy@10", "coarse Entropy@10", "coverage@10", "seconds watched@10")
    ]
    assert cells.label("duplicate_rate") == "duplicate rate"
    assert (cells.number("recall@10", 0.07123), cells.number("entropy@10", 1.5678)) == ("0.0712", "1.568")
    assert cells.value_parts("recall@10", {"value": 0.1, "low": 0.09, "high": 0.11}) == ("0.1000", "[0.0900 – 0.1100]")
    assert cells.value_parts("recall@10", None) == ("", "")
    assert (cells.p_text(0.0004), cells.p_text(0.0312)) == ("p < 0.001", "p 0.031")


@pytest.mark.parametrize(
    ("test", "base", "text"),
    [
        ({"verdict": "higher", "difference": 0.02, "p_holm": 0.004}, 0.08, "+25.0% (p 0.004)"),
        ({"verdict": "lower", "difference": -0.02, "p_holm": 1e-9}, 0.0, "-0.0200 (p < 0.001)"),
        ({"verdict": "higher", "difference": 0.02, "p_holm": 0.04}, 0.0, "+0.0200 (p 0.040)"),
        ({"verdict": "no difference", "difference": 0.02, "p_holm": 0.4}, 0.08, "no difference"),
        (
            {"verdict": "one seed", "difference": 0.02, "low": -0.01, "high": 0.05},
            0.1,
            "one seed: +20.0% [-10.0% – +50.0%]",
        ),
        (None, 0.1, ""),
    ],
)
def test_a_difference_says_how_much_or_why_not(test: dict[str, Any] | None, base: float, text: str) -> None:
    assert cells.difference_text("recall@10", test, base) == text


def test_notes_are_numbered_once_and_old_records_have_none() -> None:
    rows: list[dict[str, Any]] = [{"name": "a", "note": "x"}, {"name": "b"}, {"name": "c", "note": "x"}]
    record = {"rows": [row | {"seeds": [0], "metrics": {}, "against": {}} for row in rows]}
    assert [row[0] for row in cells.value_table(record)[1]] == ["a (1)", "b", "c (1)"]
    assert cells.note_lines(record) == ["(1) x."]
    assert [study_row(row).note for row in record["rows"]] == ["x", "", "x"]
    assert cells.by_criterion(record) == ""


def test_the_best_by_the_criterion_is_named() -> None:
    def row(name: str, value: float) -> dict[str, Any]:
        return {"name": name, "seeds": [0, 1], "criterion": {"value": value}, "settings": {}}

    record = {
        "rows": [row("sft", 3.0) | {"seeds": [0]}, row("sage", 3.25)],
        "settings": {"align": {"criterion": ["recall=2"]}},
    }
    assert cells.by_criterion(record) == (
        "By the criterion that chose on validation (recall=2, each relative to the start), on test: sage 3.250, "
        "sft 3.000 (one seed). sage wins by it. No test was made of it."
    )


def test_differences_within_a_run_are_of_one_seed(small_run: Run, tmp_path: Path) -> None:
    """Recall's difference is that of the two reports; lists of other cases, or of too few places, are left out."""
    shutil.copytree(small_run.folder, tmp_path / "run")
    run = open_run(tmp_path / "run")
    evaluate_baseline(run, "popularity", SMALL_RUN.evaluate)
    reports = {
        name: read_record(run.folder / f"evaluation{tail}.json")
        for name, tail in (("supervised", ""), ("popularity", "-popularity"))
    }
    found = differences_to_start(run, reports, 10)
    assert found.keys() == {"popularity"}
    against = found["popularity"]["supervised"]
    assert {f"{name}@10" for name in COMPARED} >= against.keys() >= {"recall@10", "entropy@10", "coverage@10"}
    assert {test["verdict"] for test in against.values()} == {"one seed"}
    values = [report["metrics"]["recall@10"]["value"] for report in reports.values()]
    assert against["recall@10"]["difference"] == pytest.approx(values[1] - values[0])
    assert against["recall@10"]["low"] < values[1] - values[0] < against["recall@10"]["high"]
    assert differences_to_start(run, reports, 11) == {}
    path = run.folder / "evaluation-popularity.lists.parquet"
    pl.read_parquet(path).with_columns(pl.col("event_row") + 1).write_parquet(path)
    assert differences_to_start(run, reports, 10) == {}
    assert np.isfinite(against["coverage@10"]["high"])
