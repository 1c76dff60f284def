"""The study: statistics by hand and on planted data, and a small one that is stopped and goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from sagerec.baselines.sasrec import SasRecSettings
from sagerec.catalogue.splits import Cases, SplitSettings
from sagerec.cli import main
from sagerec.cli.tables import print_study
from sagerec.errors import ArtifactError, SagerecError, SettingsError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.evaluation.per_case import Values, Yardstick, make_yardstick
from sagerec.evaluation.tests import (
    Measured,
    block_variances,
    differences,
    holm,
    judge,
    measure,
    seed_variances,
    summarise,
)
from sagerec.files import read_record, write_record
from sagerec.objectives.table import OBJECTIVES
from sagerec.report.cells import how_computed
from sagerec.report.markdown import BY_HAND
from sagerec.report.material import gather
from sagerec.run.folder import open_run
from sagerec.run.stages import evaluate, read_lists
from sagerec.study import CompareSettings, StudySettings, run_study
from sagerec.study.design import NOTES, comparisons
from sagerec.study.jobs import grid, read_trials, row_jobs
from sagerec.study.starts import seeded
from sagerec.study.study import criterion_on_test
from tests.conftest import ENVIRONMENT, SMALL_RUN, SMALL_TRAIN
from tests.test_alignment import QUICK

SMALL_STUDY = CompareSettings(
    StudySettings(
        objectives=("sage,gbpo",), ablations=("sage_no_boost",), baselines=("popularity", "sasrec"), seeds=2, trials=1
    ),
    replace(SMALL_RUN, evaluate=EvaluateSettings(k=(10,), beams=20, bootstrap_samples=100)),
    replace(QUICK, epochs=1),
    SasRecSettings(width=16, heads=2),
    replace(SMALL_TRAIN, learning_rate=2e-3),
)


def test_holm_by_hand() -> None:
    """P = .01, .04, .03 of three: 3 x .01 = .03; 2 x .03 = .06; 1 x .04 = .04, raised to .06."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= min(1.0, len(p_values) * p) + 1e-12 for p, a in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


def planted(share_hit: float, seed: int, *, n: int = 800) -> tuple[np.ndarray, Cases]:
    """Lists of 10 among 100 items that hold the target (item 0) in a share of the cases, of a user each."""
    rng = np.random.default_rng(seed)
    lists = np.stack([1 + rng.permutation(99)[:10] for _ in range(n)])
    lists[: round(share_hit * n), 0] = 0
    rows = np.arange(n)
    users = rows.astype(np.int32)
    return lists, Cases(users, np.zeros(n, dtype=np.int32), rows, rows, np.zeros(n, dtype=np.int32))


def planted_system(share_hit: float, *seeds: int, is_random: bool = True) -> Measured:
    """A system of these seeds; item 0 is cold, and there are four clusters."""
    clusters = sparse.csr_matrix((np.ones(100), (np.arange(100), np.arange(100) % 4)), shape=(100, 4))
    yardstick = Yardstick(cold=np.arange(100) == 0, clusters={"entropy": clusters, "coarse_entropy": clusters})
    lists, cases = zip(*(planted(share_hit, seed) for seed in seeds), strict=True)
    return measure(lists, cases[0], yardstick, 100, is_random=is_random)


def test_a_planted_difference_is_found_and_equals_are_not_told_apart() -> None:
    better, worse, same = planted_system(0.3, 0, 1), planted_system(0.1, 2, 3), planted_system(0.1, 4, 5)
    seeds_of = seed_variances([better, worse, same])
    found, equal = differences(better, worse, seeds_of, seed=0), differences(same, worse, seeds_of, seed=0)
    assert judge([*found.values(), *equal.values()]) == 12
    assert list(found) == [
        f"{name}@10" for name in ("recall", "ndcg", "cold_recall", "entropy", "coarse_entropy", "coverage")
    ]
    assert found["recall@10"]["difference"] == pytest.approx(0.2)
    assert found["recall@10"]["low"] > 0.15
    assert found["recall@10"]["covers"] == "users and seeds"
    assert found["recall@10"]["verdict"] == found["cold_recall@10"]["verdict"] == "higher"
    assert {test["verdict"] for test in equal.values()} == {"no difference"}
    summary = summarise(better, samples=500, seed=0)
    assert summary["recall@10"]["value"] == pytest.approx(0.3)
    assert summary["recall@10"]["low"] < 0.3 < summary["recall@10"]["high"]
    assert summary["recall@10"]["seed_std"] == 0
    assert summary["coverage@10"]["value"] == 1.0


def test_the_coverage_of_several_seeds_is_the_mean_of_each() -> None:
    """Two seeds that show ten of a hundred items each, other ones: .1, and not the .2 of both together."""
    _, cases = planted(0.1, 0, n=40)
    seeds = [np.tile(np.arange(10) + first, (40, 1)) for first in (0, 50)]
    found = measure(seeds, cases, Yardstick(), 100)
    assert found.by_seed["coverage@10"].tolist() == [0.1, 0.1]
    assert summarise(found, samples=100, seed=0)["coverage@10"]["value"] == pytest.approx(0.1)


def test_holm_leaves_a_clear_effect_among_many_tests() -> None:
    """The planted effect of .2 in Recall survives 300 tests: p values have no floor."""
    a, b = planted_system(0.3, 0, 1), planted_system(0.1, 2, 3)
    tests: list[dict[str, Any]] = [differences(a, b, seed_variances([a, b]), seed=0)["recall@10"]]
    tests += [{"difference": 0.0, "p_value": 1.0} for _ in range(299)]
    assert judge(tests) == 300
    assert tests[0]["verdict"] == "higher"


def test_one_seed_gets_no_verdict_and_a_row_with_nothing_random_does() -> None:
    """However large the effect: a trained row of one seed has no p, and Holm's family does not count it.

    Without several seeds on the other side, a deterministic row has no verdict either. Its own seed error is 0: against
    two seeds the error is that of users and v / 2.
    """
    two, one, fixed = planted_system(0.3, 0, 1), planted_system(0.1, 2), planted_system(0.1, 2, is_random=False)
    seeds_of = seed_variances([two, one, fixed])
    alone, judged = (differences(two, other, seeds_of, seed=0) for other in (one, fixed))
    assert judge([*alone.values(), *judged.values()]) == len(judged) == 6
    assert {(t["verdict"], t["p_value"], t["covers"]) for t in alone.values()} == {("one seed", None, "users")}
    assert alone["recall@10"]["low"] > 0.15
    assert "p_holm" not in alone["recall@10"]
    assert judged["recall@10"]["verdict"] == "higher"
    assert {t["verdict"] for t in differences(one, fixed, seeds_of, seed=0).values()} == {"one seed"}
    assert (two.seed_error(0.02), one.seed_error(0.02), fixed.seed_error(0.02)) == (0.01, 0.02, 0)


def test_a_user_is_one_draw_however_many_cases() -> None:
    """Both systems hit all 50 cases of user 0 or none: 2 users on one degree, so that p of .5 - 0 is 1/2.

    As in `test_intervals`: m = 1/2, SE = 1/2, t = 1. Cold cases are those of one user: no error, not compared.
    """
    users = np.repeat([0, 1], 50)

    def system(values: list[float]) -> Measured:
        found = Values(np.repeat(values, 50), np.arange(100), users)
        table = {"recall@10": found, "cold_recall@10": found.where(users == 0)}
        by_seed = {name: np.full(2, v.mean()) for name, v in table.items()}
        return Measured((np.zeros((100, 1)),) * 2, users, 1, table, by_seed)

    a, b = system([1.0, 0.0]), system([0.0, 0.0])
    found = differences(a, b, seed_variances([a, b]), seed=0)
    assert found.keys() == {"recall@10"}
    assert found["recall@10"]["difference"] == 0.5
    assert found["recall@10"]["p_value"] == pytest.approx(0.5)


def test_seeds_that_scatter_widen_the_interval_by_hand() -> None:
    """Two systems of seeds .1, .3 and .2, .4: pooled variance .02 over 2 degrees; SE^2 adds .02 (1/2 + 1/2) = .02.

    Users add nothing where every case of a seed is alike: t has 2 degrees, and 4.3027 x .14142 = .6085 either side.
    Where half of the 50 users have -.4 and half .2, the variance over users is .09 x 50/49 / 50 = .0018367 on 49
    degrees; together .0218367, on .0218367^2 / (.0018367^2 / 49 + .02^2 / 2) = 2.3834 degrees.
    """

    def system(values: tuple[float, float], shape: np.ndarray) -> Measured:
        table = {"recall@10": Values(np.mean(values) + shape, np.arange(50), np.arange(50))}
        return Measured((np.zeros((50, 1)),) * 2, np.arange(50), 1, table, {"recall@10": np.array(values)})

    flat, uneven = np.zeros(50), np.tile([-0.3, 0.3], 25)
    a, b = system((0.1, 0.3), flat), system((0.2, 0.4), flat)
    pooled = seed_variances([a, b])
    assert pooled["recall@10"].variance == pytest.approx(0.02)
    assert pooled["recall@10"].degrees == 2
    found = differences(a, b, pooled, seed=0)["recall@10"]
    assert found["difference"] == pytest.approx(-0.1)
    assert found["high"] - found["difference"] == pytest.approx(0.6085, abs=1e-3)
    assert found["p_value"] > 0.5
    both = differences(system((0.1, 0.3), uneven), b, pooled, seed=0)["recall@10"]
    reach = stats.t.ppf(0.975, 2.3834) * 0.0218367**0.5
    assert both["high"] - both["difference"] == pytest.approx(reach, abs=1e-4)


def rows_of_seeds(values: np.ndarray, shape: np.ndarray) -> list[Measured]:
    """Systems with Recall `values` (R, S); every case of a seed is alike but for `shape` (n,)."""
    n = len(shape)
    return [
        Measured(
            (np.zeros((n, 1)),) * len(own),
            np.arange(n),
            1,
            {"recall@10": Values(own.mean() + shape, np.arange(n), np.arange(n))},
            {"recall@10": own},
        )
        for own in values
    ]


def test_seeds_are_blocks_where_rows_share_a_start_by_hand() -> None:
    """Rows of seeds .1, .3 and .2, .5: means .2, .35 of rows, .15, .4 of seeds, .275 of all; residuals +-.025.

    v = 4 x .025^2 / 1 = .0025 on one degree, in place of (.02 + .045) / 2 = .0325 on two.
    """
    a, b = rows_of_seeds(np.array([[0.1, 0.3], [0.2, 0.5]]), np.zeros(50))
    blocks, pooled = block_variances([a, b]), seed_variances([a, b])
    assert blocks["recall@10"].variance == pytest.approx(0.0025)
    assert pooled["recall@10"].variance == pytest.approx(0.0325)
    assert (blocks["recall@10"].degrees, pooled["recall@10"].degrees) == (1, 2)
    found = differences(a, b, pooled, seed=0, blocks=blocks)["recall@10"]
    reach = stats.t.ppf(0.975, 1) * 0.0025**0.5
    assert found["high"] - found["difference"] == pytest.approx(reach)
    fixed = replace(b, is_random=False)
    without = differences(a, fixed, pooled, seed=0, blocks=blocks)["recall@10"]
    assert without == differences(a, fixed, pooled, seed=0)["recall@10"]
    assert block_variances([a]) == {}


def test_blocks_call_few_true_hypotheses_false_where_starts_differ_much() -> None:
    """400 studies of 5 rows and 3 seeds: seeds differ by .1, rows of a seed by .01, and no row is better.

    At .05 some 20 of 400 comparisons may be called different (8 to 34 with probability .998); pooled within rows, none,
    and a difference of .05 is found by blocks alone.
    """
    rng, shape = np.random.default_rng(0), np.zeros(30)
    called: list[list[bool]] = []
    for _ in range(400):
        values = 0.5 + 0.1 * rng.standard_normal(3) + 0.01 * rng.standard_normal((5, 3))
        values[4] += 0.05
        rows = rows_of_seeds(values, shape)
        pooled, ways = seed_variances(rows), (block_variances(rows), None)
        tests = [differences(rows[i], rows[1], pooled, seed=0, blocks=blocks) for i in (0, 4) for blocks in ways]
        called.append([test["recall@10"]["p_value"] < 0.05 for test in tests])
    by_blocks, by_pool, found, missed = np.sum(called, axis=0).tolist()
    assert 8 <= by_blocks <= 34
    assert by_pool <= 2
    assert found > 390
    assert missed < 60


def test_comparisons_are_named_before_and_no_pair_stands_twice() -> None:
    rows = ["supervised", "all-at-once", "sft", "sage", "sage_paper", "gbpo_decoupled", "gbpo", "gdpo", "grpo"]
    rows += ["sage_no_boost", "popularity", "item-knn", "sasrec"]
    pairs = comparisons(rows)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 12 + 11 + 4 + 1
    assert [row for row, rival in pairs if rival == "sft"] == [row for row in rows if row != "sft"]
    together = [row for row, rival in pairs if rival == "all-at-once"]
    assert together == [row for row in rows if row not in ("sft", "all-at-once")]
    assert [pair for pair in pairs if not {"sft", "all-at-once"} & set(pair)] == [
        ("sage", "gbpo"),
        ("sage", "gbpo_decoupled"),
        ("sage", "gdpo"),
        ("sage", "sage_paper"),
        ("sage_no_boost", "sage"),
    ]
    assert comparisons(["sft", "gbpo", "sage_token"]) == [("gbpo", "sft"), ("sage_token", "sft")]


def test_the_criterion_on_test_by_hand() -> None:
    """Recall .2 and .4 against the start's .2, weight 2; Cold-Recall .3 where the start has 0, weight 1.

    Seeds: 2 x 1 + .3 = 2.3 and 2 x 2 + .3 = 4.3, mean 3.3; a metric that nothing counts for is 0. Against a start of
    its own with Recall .4, the second seed is worth 2 x 1 + .3.
    """
    by_seed = {"recall@10": np.array([0.2, 0.4]), "cold_recall@10": np.array([0.3, 0.3])}
    start = {"recall@10": 0.2, "cold_recall@10": 0.0}
    weights = {"recall": 2.0, "cold_recall": 1.0, "clicks": 1.0}
    found = criterion_on_test(by_seed, [start], weights)
    assert found["by_seed"] == pytest.approx([2.3, 4.3])
    assert found["value"] == pytest.approx(3.3)
    own = criterion_on_test(by_seed, [start, start | {"recall@10": 0.4}], weights)
    assert own["by_seed"] == pytest.approx([2.3, 2.3])


def test_trials_begin_with_what_is_given_and_are_as_many_for_each() -> None:
    for objective in ("sage", "sage_paper", "gbpo", "gbpo_decoupled", "gbpo_raw", "up_grpo", "gdpo", "sft"):
        points = grid(objective, 3, replace(QUICK, learning_rate=3e-3))
        assert len({tuple(point.items()) for point in points}) == 3
        assert points[0]["learning_rate"] == 3e-3
    assert grid("sage", 1, QUICK)[0]["boost"] == OBJECTIVES["sage"].boost
    assert grid("sage", 0, QUICK) == []
    with pytest.raises(SettingsError, match="trials is 9, and sft has 4 settings to try"):
        grid("sft", 9, QUICK)


def test_a_study_that_is_killed_goes_on_to_the_same_table(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NOTES, "sasrec", "what a reader must know")
    script = (
        "import sys; from pathlib import Path; from sagerec.study import run_study; from tests.test_study import *\n"
    )
    script += "if __name__ == '__main__': run_study(Path(sys.argv[1]), Path(sys.argv[2]), SMALL_STUDY)"
    (tmp_path / "study.py").write_text(script)
    out = tmp_path / "study"
    command = [sys.executable, str(tmp_path / "study.py"), str(store_folder), str(out)]
    for moment in ("run-s1/semantic_ids", "trials/*.json"):  # before the policies of the seeds, and in the trials
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while not list(out.glob(moment)) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, "the study ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "trials").glob("*.json")}
    record = run_study(store_folder, out, SMALL_STUDY)
    assert {name: (out / "trials" / name).stat().st_mtime_ns for name in kept} == kept
    assert read_record(out / "study.json") == record
    names = [row["name"] for row in record["rows"]]
    assert names == ["supervised", "all-at-once", "sft", "sage", "gbpo", "sage_no_boost", "popularity", "sasrec"]
    rows = {row["name"]: row for row in record["rows"]}
    assert {n for n in names if rows[n]["seeds"] == [0, 1]} == {"supervised", "all-at-once", "sft", "sage", "gbpo"}
    assert rows["all-at-once"]["kind"] == "reference"
    assert rows["sage_no_boost"]["seeds"] == [0]
    assert rows["sage_no_boost"]["kind"] == "ablation"
    assert list(rows["sage"]["against"]) == ["sft", "all-at-once", "gbpo"]
    assert list(rows["sage_no_boost"]["against"]) == ["sft", "all-at-once", "sage"]
    assert list(rows["all-at-once"]["against"]) == ["sft"]
    assert rows["sft"]["against"] == {}
    assert rows["supervised"]["criterion"]["value"] == pytest.approx(2.75)
    assert len(rows["sage"]["criterion"]["by_seed"]) == 2
    assert {"entropy@10", "coarse_entropy@10"} <= rows["sage"]["metrics"].keys()
    assert (rows["sasrec"]["note"], rows["sage"]["note"]) == ("what a reader must know", "")
    assert rows["sage"]["settings"]["objective"] == "sage"
    assert rows["sage_no_boost"]["settings"]["boost"] is None
    assert {len(read_trials(out, objective)) for objective in ("sft", "sage", "gbpo")} == {1}
    assert sum(trial["chosen"] for trial in record["trials"]) == 4
    verdicts = {
        (row["name"], rival): {test["verdict"] == "one seed" for test in tests.values()}
        for row in record["rows"]
        for rival, tests in row["against"].items()
    }
    assert [list(pair) for pair in verdicts] == sorted(
        record["comparisons"], key=lambda pair: (names.index(pair[0]), record["comparisons"].index(pair))
    )
    alone = {"sage_no_boost", "sasrec"}
    assert verdicts == {pair: {not alone.isdisjoint(pair)} for pair in verdicts}
    tests = [test for row in record["rows"] for tests in row["against"].values() for test in tests.values()]
    assert record["tests"] == sum("p_holm" in test for test in tests) == len(tests) - record["one_seed"] > 0
    assert rows["popularity"]["metrics"]["clicks@10"]["value"] > rows["popularity"]["metrics"]["likes@10"]["value"] > 0
    assert rows["sasrec"]["kind"] == "baseline"
    assert [t["settings"] for t in record["trials"] if t["objective"] == "sasrec"] == [{"dropout": 0.2, "width": 16}]
    # Each seed has Semantic IDs and policies of its own, from which its alignments start, over one split.
    runs = [open_run(out / name) for name in ("run", "run-s1")]
    for name in ("semantic_ids", "policy", "policy-all-at-once"):
        assert [run.manifest(name).seed for run in runs] == [0, 1]
        assert runs[0].hashes(name) != runs[1].hashes(name)
    assert runs[0].hashes("dataset", "split") == runs[1].hashes("dataset", "split")
    for seed, run in enumerate(runs):
        aligned = [f"policy-{name}-s{seed}" for name in ("gbpo", "sage", "sft")]
        assert [name for name in run.aligned() if "no_boost" not in name] == aligned
        assert run.manifest(aligned[1]).made_from["policy"] == run.manifest("policy").content_hash
    for name in ("policy", "policy-sage-s1"):
        assert record["hashes"]["run-s1"][name] == runs[1].manifest(name).content_hash
    # All lists are measured by the clusters of the first run.
    yardstick = make_yardstick(runs[0].data, runs[0].split, runs[0].space(), cold_max_count=5, store=runs[0].store())
    cases = runs[1].split.cases(runs[1].data, "test")
    theirs = measure([read_lists(runs[1], "-sage-s1")], cases, yardstick, runs[1].data.n_items)
    assert theirs.by_seed["coarse_entropy@10"][0] == rows["sage"]["by_seed"]["coarse_entropy@10"][1]
    # The report shows the alignments of all, and says what a seed is.
    assert {f"policy-{name}-s{seed}" for name in ("sft", "sage", "gbpo") for seed in (0, 1)} <= {
        policy.name for policy in gather(out).aligned
    }
    said = " ".join(how_computed(record))
    assert "each row with sft and all-at-once, sage with its rivals" in said
    assert "Each seed has Semantic IDs, a supervised policy and alignments of its own." in said
    # Every job is done, so that none is started.
    monkeypatch.setattr("sagerec.study.workers._finished", None)
    again = run_study(store_folder, out, SMALL_STUDY)
    assert {k: v for k, v in again.items() if k != "date"} == {k: v for k, v in record.items() if k != "date"}
    # Another study of the same events beside it: its rows under its name, each compared with its namesake; a twin.
    shutil.copytree(out, tmp_path / "twin")
    beside = replace(SMALL_STUDY, study=replace(SMALL_STUDY.study, beside=str(tmp_path / "twin")))
    record = run_study(store_folder, out, beside)
    assert record["beside"]["hashes"] == read_record(tmp_path / "twin" / "study.json")["hashes"]
    found = {row["name"]: row for row in record["rows"]}
    assert list(found) == [*names, *(f"{name} (twin)" for name in names[:6])]
    for name in names:
        rivals = rows[name]["against"]
        assert list(found[name]["against"]) == [*rivals, *([f"{name} (twin)"] if name in names[:6] else [])]
        assert {r: t["recall@10"]["p_value"] for r, t in found[name]["against"].items() if r in rivals} == {
            rival: test["recall@10"]["p_value"] for rival, test in rivals.items()
        }
    assert found["sage (twin)"]["kind"] == "beside"
    assert found["sage (twin)"]["metrics"].keys() == rows["sage"]["metrics"].keys()
    assert found["sage (twin)"]["by_seed"] == rows["sage"]["by_seed"]
    twins = found["sage"]["against"]["sage (twin)"]
    assert {test["difference"] for test in twins.values()} == {0.0}
    assert {test["verdict"] for test in twins.values()} == {"no difference"}
    # Their seeds share no start: the variance is that of the two rows, and no block.
    twin_runs = [open_run(tmp_path / "twin" / name) for name in ("run", "run-s1")]
    own, other = (
        measure([read_lists(run, f"-sage-s{s}") for s, run in enumerate(each)], cases, yardstick, runs[0].data.n_items)
        for each in (runs, twin_runs)
    )
    expected = differences(own, other, seed_variances([own, other]), seed=0)
    assert {name: (test["low"], test["high"]) for name, test in twins.items()} == {
        name: (test["low"], test["high"]) for name, test in expected.items()
    }
    assert any(test["high"] > 0 for test in twins.values())
    # What cannot stand beside is refused before anything is trained.
    given = replace(SMALL_STUDY, study=replace(SMALL_STUDY.study, beside=str(tmp_path / "twin")))
    free = replace(given.run, evaluate=replace(given.run.evaluate, history="keep"))
    for wrong, said in (
        (
            replace(given, run=replace(given.run, split=SplitSettings(reserve="users"))),
            "twin, a study of other events or",
        ),
        (replace(given, run=free), "history auto; expected split test, lists beam, history keep"),
        (replace(given, study=replace(given.study, share_start=True)), "leave out --share-start"),
        (
            replace(given, study=replace(given.study, beside=str(tmp_path / "new"))),
            "the study itself; expected another",
        ),
        (replace(given, study=replace(given.study, beside=str(tmp_path / "none"))), "study.json is missing; expected"),
    ):
        with pytest.raises(SagerecError, match=said):
            run_study(store_folder, tmp_path / "new", wrong)
        assert not list((tmp_path / "new").glob("run*/policy"))
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    evaluate(open_run(tmp_path / "twin" / "run-s1"), EvaluateSettings(k=(10,), beams=11), name="policy-sage-s1")
    with pytest.raises(ArtifactError, match=r"lists of .*twin are not those that its table was made of"):
        run_study(store_folder, out, given)


def test_results_are_tables_of_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recall .1 against the control's .08 is +25 %; an effect that Holm's correction does not leave says so."""

    def row(name: str, value: float, against: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": name,
            "seeds": [0, 1],
            "metrics": {
                name: {"value": value, "low": value - 0.01, "high": value + 0.01, "seed_std": 0.001}
                for name in ("recall@10", "cold_recall@10", "coarse_entropy@10")
            },
            "against": {o: {"recall@10": test, "cold_recall@10": test} for o, test in against.items()},
            "seconds": [60.0, 120.0],
        }

    higher = {"difference": 0.02, "p_holm": 0.004, "verdict": "higher"}
    alone = {"difference": 0.004, "low": -0.004, "high": 0.012, "p_value": None, "verdict": "one seed"}
    record = {
        "rows": [
            row("sage_token", 0.09, {}) | {"kind": "ablation"},
            row("sft", 0.08, {}) | {"criterion": {"value": 3.1}, "settings": {}},
            row("sage", 0.1, {"sft": higher}) | {"criterion": {"value": 3.0}, "settings": {}},
            row("gbpo", 0.081, {"sft": NO_DIFFERENCE}),
            row("sasrec", 0.084, {"sft": alone}) | {"seeds": [0], "note": "under-tuned"},
        ],
        "trials": [{"objective": "sage", "chosen": True, "criterion": 2.5, "settings": {"boost": 4.0}}],
        "settings": {"align": {"criterion": ["recall=2"]}},
        "dataset": {"users": 10, "items": 20, "interactions": 30},
        "cases": 10,
        "cold_cases": 3,
        "seeds": [0, 1],
        "hardware": "2 cores",
        "date": "2026-11-24",
        "versions": {"torch": "2.13.0"},
    }
    write_record(tmp_path / "study" / "study.json", record)
    page = tmp_path / "results.md"
    assert main(["results", f"A store={tmp_path / 'study'}", "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "## A store" in text
    assert "(results-a-store.svg)" in text
    assert text.endswith(f"{BY_HAND}\n")
    page.write_text(f"old\n{BY_HAND}\n\n## Why\n\nBecause.\n", encoding="utf-8")
    assert main(["results", f"A store={tmp_path / 'study'}", "--out", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == f"{text}\n## Why\n\nBecause.\n"
    drawn = (tmp_path / "results-a-store.svg").read_text(encoding="utf-8")
    assert ">sage<" in drawn
    assert ">sage_token<" not in drawn
    assert "| row | seeds | Recall@10 | Cold-Recall@10 | coarse Entropy@10 | criterion | minutes |" in text
    assert (
        "| sage | 2 | 0.1000 [0.0900 – 0.1100] | 0.1000 [0.0900 – 0.1100] | 0.100 [0.090 – 0.110] | 3.000 | 1.5 |"
        in text
    )
    assert "| sage | sft | +25.0% (p 0.004) | +25.0% (p 0.004) |  |" in text
    assert "| gbpo | sft | no difference | no difference |  |" in text
    assert "| sasrec (1) | sft | one seed: +5.0% [-5.0% – +15.0%] | one seed: +5.0% [-5.0% – +15.0%] |  |" in text
    assert "(1) under-tuned." in text
    assert "on test: sft 3.100, sage 3.000. sage is number 2 by it. No test was made of it." in text
    assert "Compared were 3 pairs of rows" in text
    assert "4 differences have a p, corrected by Holm over all 4" in text
    assert '"one seed": 2 differences' in text
    print_study(record)
    printed = capsys.readouterr().out
    assert "(1) under-tuned." in printed
    assert "number 2 by it" in printed
    assert "| sage | 1 | boost 4 | 2.500 | 2.500 |" in text
    again = [f"A store={tmp_path / 'study'}", f"A-store={tmp_path / 'study'}", f"日本={tmp_path / 'study'}"]
    assert main(["results", *again, "--out", str(page)]) == 0
    plots = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert plots == ["results-a-store-2.svg", "results-a-store.svg", "results-study.svg"]
    assert main(["results", again[0], again[0], "--out", str(page)]) == 2, "a title that stands twice"
    (tmp_path / "results-study.svg").write_text("<svg>mine</svg>")
    assert main(["results", again[2], "--out", str(page)]) == 1
    assert (tmp_path / "results-study.svg").read_text() == "<svg>mine</svg>"
    assert main(["results", "nothing", "--out", str(page)]) == 2
    assert "expected TITLE=FOLDER" in capsys.readouterr().err


NO_DIFFERENCE = {"difference": 0.001, "p_holm": 0.7, "verdict": "no difference"}


def test_wrong_studies_are_refused() -> None:
    with pytest.raises(SettingsError, match="unknown objective 'ppo'"):
        StudySettings(objectives=("ppo",))
    with pytest.raises(SettingsError, match="seeds is 0"):
        StudySettings(seeds=0)
    with pytest.raises(SettingsError, match="boost is set for all objectives"):
        CompareSettings(align=replace(QUICK, boost=8.0))
    with pytest.raises(SettingsError, match="validations is 0, so that no trial could win"):
        CompareSettings(align=replace(QUICK, validations=0))
    with pytest.raises(SettingsError, match="a k of at least 10"):
        CompareSettings(run=replace(SMALL_RUN, evaluate=EvaluateSettings(k=(5,))))
    assert StudySettings(ablations=("all",)).rows()["sage_bound"] == 1


def test_each_seed_has_a_run_unless_all_share_one() -> None:
    own, shared = StudySettings(seeds=3), StudySettings(seeds=3, share_start=True)
    for study, names in ((own, ["run", "run-s1", "run-s2"]), (shared, ["run"] * 3)):
        assert [study.run_of(seed) for seed in range(3)] == names
        assert study.n_starts == len(set(names))
        assert [job.run for job in row_jobs(Path("none"), study, QUICK) if job.objective == "sage"] == names
    seeds = [seeded(replace(SMALL_RUN, train=replace(SMALL_TRAIN, seed=7)), seed) for seed in (0, 2)]
    assert [(s.ids.seed, s.train.seed, s.split) for s in seeds] == [(0, 7, seeds[0].split), (2, 9, seeds[0].split)]


POOL = """
import os, time
from sagerec.study.workers import worker_pool
if __name__ == "__main__":
    pool = worker_pool(2)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 300)
    pool.submit(time.sleep, 300)
    time.sleep(300)
"""


def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, str(tmp_path / "pool.py")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker of a killed study was there ten seconds later")
