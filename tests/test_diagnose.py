"""Where lists miss, by hand; and the command on a run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec.actions.space import make_space
from sagerec.baselines.tuning import evaluate_baseline
from sagerec.cli import main
from sagerec.evaluation.diagnose import HIT, UNSEEN, diagnose
from sagerec.files import read_record, write_record
from sagerec.run.folder import Run
from tests.conftest import SMALL_RUN


def test_outcomes_by_hand() -> None:
    """Items 0 (0, 0), 1 (0, 1), 2 (1, 0), 3 (1, 0), 4 (2, 0), the last never trained on; lists hold item 0, then none.

    Targets 0: hit; 1: first code right, second missed; 2: first code missed; 4: never trained on. In the last case
    item 3 is listed for target 2, which has the same codes.
    """
    space = make_space(np.array([[0, 0], [0, 1], [1, 0], [1, 0], [2, 0]]), listed=np.array([0, 1, 2, 4]))
    counts = np.array([9, 1, 3, 3, 0])
    lists = np.array([[0, -1], [0, -1], [0, -1], [0, -1], [3, -1]])
    found = diagnose(lists, np.array([0, 1, 2, 4, 2]), space, counts, (5,))
    assert found.outcomes == {
        HIT: 0.2,
        UNSEEN: 0.2,
        "missed at code 1": 0.2,
        "missed at code 2": 0.2,
        "shares its ID with a listed item": 0.2,
    }
    assert found.by_popularity.tolist() == [0.0, 1.0]
    assert np.isnan(diagnose(lists[:1], np.array([0]), space, counts, (5,)).by_popularity[0])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_outcomes_add_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, counts = rng.integers(0, 3, (30, 2)), rng.integers(0, 4, 30)
    space = make_space(codes, listed=np.unique(codes, axis=0, return_index=True)[1])
    found = diagnose(rng.integers(-1, 30, (40, 5)), rng.integers(0, 30, 40), space, counts, (1, 2))
    assert sum(found.outcomes.values()) == pytest.approx(1)


def test_the_command_compares_systems(small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The gaps of the buckets add up to the difference of the two Recalls; an unknown system says what to do."""
    evaluate_baseline(small_run, "popularity", SMALL_RUN.evaluate)
    assert main(["diagnose", str(small_run.folder), "policy", "popularity"]) == 0
    printed = capsys.readouterr().out
    gaps = [float(line.split("(")[1].split(")")[0]) for line in printed.splitlines() if "(+" in line or "(-" in line]
    recalls = [
        read_record(small_run.folder / f"evaluation{name}.json")["metrics"]["recall@10"]["value"]
        for name in ("", "-popularity")
    ]
    assert sum(gaps) == pytest.approx(recalls[1] - recalls[0], abs=5e-4)
    assert main(["diagnose", str(small_run.folder), "--k", "50"]) == 1
    assert "have 10 places; expected 50 or more" in " ".join(capsys.readouterr().err.split())
    assert main(["diagnose", str(small_run.folder), "policy-absent"]) == 1
    assert "evaluation-absent.json is missing; make it with: sagerec evaluate" in capsys.readouterr().err


def test_lists_of_an_earlier_artefact_are_refused(
    small_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run.folder, folder)
    report = read_record(folder / "evaluation.json")
    write_record(folder / "evaluation.json", report | {"made_from": report["made_from"] | {"policy": "0" * 64}})
    assert main(["diagnose", str(folder)]) == 1
    assert "measures another split or an earlier artefact; evaluate policy again" in capsys.readouterr().err


def test_no_places_are_an_error(small_run: Run) -> None:
    assert main(["diagnose", str(small_run.folder), "--k", "0"]) == 2
