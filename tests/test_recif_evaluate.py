"""`sagerec recif evaluate --predictions`: files to record and table, hostile ones too."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sagerec.artifacts import MANIFEST
from sagerec.cli import main
from sagerec.errors import DatasetError
from sagerec.files import read_record
from sagerec.recif.layout import read_item_map
from sagerec.recif.predictions import Prediction, read_predictions
from sagerec.recif.tasks import read_benchmark
from tests.recif_files import A, B, C, D, row, tag, write_lines, write_map, write_task

Run = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


@pytest.fixture
def evaluate(tmp_path: Path) -> Run:
    """Evaluate lines on the benchmark in tmp_path / "b"; returns the record."""

    def run(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        path, out = write_lines(tmp_path / "theirs.jsonl", lines), tmp_path / "out"
        assert (
            main(
                ["recif", "evaluate", "--benchmark", str(tmp_path / "b"), "--predictions", str(path), "--out", str(out)]
            )
            == 0
        )
        return read_record(out / "recif.json")

    return run


def metrics_of(record: Mapping[str, Any], task: str = "video") -> dict[str, float]:
    found: dict[str, float] = record["tasks"][task]["metrics"]
    return found


def test_every_metric_by_hand(tmp_path: Path, evaluate: Run) -> None:
    """Three samples, a fourth without predictions. By IDs:

    0 asks for A, B; says C, B, B (a repeat): pass@1 0, pass@32 1, position1 0 0, recall@32 1/2
    1 asks for A; says a thought about B, then A without an end tag, then nothing of use: 1, 1, 1, 1
    2 asks for B, A (A twice); says B, A, C: recall@1 1/2, recall@32 1
    3 asks for A; says nothing: 0

    By pids, A -> 11 (12 is as frequent and larger), B -> 20, C -> none, answers 11, 0, 20, 0 / 12 / [20, 11] as text /
    11: sample 0 says -, 20, 20 for 11, 20; sample 1 says 11 for 12; sample 2 says 20, 11 for 20, 11.
    """
    folder = tmp_path / "b"
    rows = [
        row(tag(A, B), uid=1, answer_pid=[11, 0, 20, 0]),
        row(tag(A), uid=1, answer_pid=[12]),
        row(tag(B, A, A), uid=2, answer_pid="[20, 11]"),
        row(tag(A), uid=3, answer_pid=[11]),
    ]
    write_task(folder, "video", rows)
    write_map(folder, {1: [(12, 5), (11, 5), (10, 4)], 2: [(20, 1)]})
    record = evaluate(
        [
            {"task": "video", "row": 2, "predictions": [tag(B), tag(A), tag(C)]},
            {"task": "video", "row": 0, "predictions": [tag(C), tag(B), tag(B)]},
            {"task": "video", "row": 1, "predictions": [f"<think>{tag(B)}</think>\n<|sid_begin|>{A}", "nothing"]},
        ]
    )
    found = record["tasks"]["video"]
    assert (found["samples"], found["skipped"], found["missing"]) == (4, 0, 1)
    assert metrics_of(record) == {
        "pass@1": 2 / 4,
        "position1_pass@1": 2 / 4,
        "recall@1": (1 + 0.5) / 4,
        "pass@32": 3 / 4,
        "position1_pass@32": 2 / 4,
        "recall@32": (0.5 + 1 + 1) / 4,
        "pid_pass@1": 1 / 4,
        "pid_position1_pass@1": 1 / 4,
        "pid_recall@1": 0.5 / 4,
        "pid_pass@32": 2 / 4,
        "pid_position1_pass@32": 1 / 4,
        "pid_recall@32": (0.5 + 0 + 1) / 4,
        # first codes: {3, 2, 2} has .918 bits, {1} none, {2, 1, 3} log2 3
        "entropy@10": pytest.approx((-(1 / 3) * np.log2(1 / 3) - (2 / 3) * np.log2(2 / 3) + np.log2(3)) / 4),
        "invalid_rate@32": pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3),
        "duplicate_rate@32": pytest.approx(1 / 9),
        # cold by count (twice the other) at most 5: B alone, found by samples 0 and 2
        "cold_recall@10": 1.0,
    }
    assert record["tasks"]["video"]["cold_samples"] == 2
    assert list(record["left_out"]) == [
        "ad", "product", "label_cond", "interactive", "label_pred", "item_understand", "rec_reason"
    ]  # fmt: skip
    page = (tmp_path / "out" / "recif.md").read_text(encoding="utf-8")
    assert "| OneRec-8B-Pro, *published* | 0.0369 | 0.0964 | 0.0538 | 0.0235 | 0.3458 | 0.6912 |" in page
    assert "| **theirs** | **0.6250** | – | – | – | – | – |" in page
    assert "ad is left out: absent: no ad/ad_test.parquet" in page


def test_beyond_the_cut_nothing_counts(tmp_path: Path, evaluate: Run) -> None:
    """32 repeats of B before A: A is the 33rd prediction, and no hit."""
    write_task(tmp_path / "b", "ad", [row(tag(A))])
    record = evaluate([{"task": "ad", "row": 0, "predictions": [tag(B)] * 32 + [tag(A)]}])
    assert metrics_of(record, "ad")["pass@32"] == 0
    assert "pid_pass@1" not in metrics_of(record, "ad")
    assert (
        record["tasks"]["ad"]["notes"][-1] == "no pid metrics, Cold-Recall and existing items: sid2pid.json is absent"
    )
    record = evaluate([{"task": "ad", "row": 0, "predictions": [tag(B)] * 31 + [tag(A)]}])
    assert metrics_of(record, "ad")["pass@32"] == 1


def test_products_have_a_map_and_answers_of_their_own(tmp_path: Path, evaluate: Run) -> None:
    """answer_iid counts where there is no answer_pid; an empty answer_pid stands, and misses."""
    folder = tmp_path / "b"
    write_task(folder, "product", [row(tag(A), answer_iid=[7]), row(tag(A), answer_pid=[], answer_iid=[7])])
    write_map(folder, {1: [(99, 1)]})
    write_map(folder, {1: [(7, 1)]}, key="iid")
    record = evaluate([{"task": "product", "row": r, "predictions": [tag(A)]} for r in (0, 1)])
    assert metrics_of(record, "product")["pid_pass@1"] == 0.5
    assert metrics_of(record, "product")["pass@1"] == 1.0


def test_rows_are_skipped_as_published_and_counted(tmp_path: Path, evaluate: Run) -> None:
    """Only rows 0 and 7 stay; predictions of others belong to no row. Places stay those of the file."""
    good = row(tag(A))
    bad = [
        good | {"metadata": "{broken"},
        good | {"metadata": None},
        good | {"metadata": json.dumps({"answer": "  "})},
        good | {"metadata": json.dumps(["no object"])},
        good | {"messages": "[broken"},
        good | {"messages": " "},
    ]
    write_task(tmp_path / "b", "video", [good, *bad, row("没有物品")])
    record = evaluate([{"task": "video", "row": r, "predictions": [tag(A)]} for r in range(9)])
    found = record["tasks"]["video"]
    assert (found["samples"], found["skipped"]) == (2, 6)
    assert found["skipped_by_reason"] == {
        "metadata cannot be read": 2,
        "metadata is empty": 1,
        "answer is empty": 1,
        "messages cannot be read": 1,
        "messages are empty": 1,
    }
    assert found["metrics"]["pass@1"] == 0.5
    assert record["faults"] == {"unknown or skipped rows": 7}
    assert found["notes"][0] == "1 answers name no item and count as misses"


def test_json_as_python_writes_it_is_read(tmp_path: Path, evaluate: Run) -> None:
    """NaN and halves of surrogate pairs, which strict JSON has not, are no reason to skip a row; an answer of NaN is.
    Users that are NaN are users of their own. An id that is null counts and is hit by nothing, as published.
    """
    folder, nan = tmp_path / "b", float("nan")
    rows = [
        row(tag(A), uid=nan, score=nan, answer_pid=[None, 11]),
        row(tag(A), uid=nan, answer_pid=f"[11, {nan}]".replace("nan", "NaN")),
        row(nan),
        row(tag(B), title="x") | {"messages": json.dumps([{"role": "user", "content": "\ud83d"}])},
    ]
    write_task(folder, "video", rows)
    write_map(folder, {1: [(11, 1)]})
    record = evaluate([{"task": "video", "row": r, "predictions": [tag(A)]} for r in (0, 1, 3)])
    found = record["tasks"]["video"]
    assert (found["samples"], found["skipped_by_reason"]) == (3, {"answer is empty": 1})
    assert found["metrics"]["pass@1"] == 2 / 3
    assert found["metrics"]["pid_recall@1"] == (1 / 2 + 1 / 2) / 3
    assert found["metrics"]["pid_position1_pass@1"] == 1 / 3
    assert read_benchmark(folder).tasks["video"].users.tolist() == [0, 1, 2]


def test_metadata_as_object_and_answers_in_columns(tmp_path: Path, evaluate: Run) -> None:
    folder = tmp_path / "b"
    table = {
        "messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
        "metadata": [{"answer": tag(A), "uid": 1}, {"answer": tag(B), "uid": 2}],
        "answer_pid": [[5], [6]],
    }
    write_task(folder, "video", pl.DataFrame(table).to_dicts())
    write_map(folder, {1: [(5, 1)], 2: [(6, 1)]})
    record = evaluate([{"task": "video", "row": r, "predictions": [tag(A)]} for r in (0, 1)])
    assert metrics_of(record)["pass@1"] == metrics_of(record)["pid_pass@1"] == 0.5


def test_label_pred(tmp_path: Path, evaluate: Run) -> None:
    """Scores: yes .875, absent / .1 -> 1e-9, tie of .5 with a no of .5; no .5 and .2.

    Of 3 x 2 pairs: .875 beats both (2), ~0 none (0), .5 ties and beats (1.5): 3.5 / 6. Row 5, a no, names neither
    token: .5, so .875 wins, ~0 loses, .5 ties: 5 / 9. Row 6, a no, has no line and is left out as published; over all
    rows it counts .5 too: 6.5 / 12.
    """
    answers = ["是", "是<|im_end|>", "是", "否", "否", "否", "否", "也许"]
    write_task(tmp_path / "b", "label_pred", [row(a, uid=i) for i, a in enumerate(answers)])
    said: list[dict[str, Any]] = [
        {"p_yes": 0.7, "p_no": 0.1},
        {"p_no": 0.1},
        {"p_yes": 0.3, "p_no": 0.3},
        {"p_yes": 0.2, "p_no": 0.2},
        {"p_yes": 0.2, "p_no": 0.8},
        {"p_yes": None},
    ]
    record = evaluate([{"task": "label_pred", "row": r} | s for r, s in enumerate(said)])
    found = record["tasks"]["label_pred"]
    assert found["metrics"] == {"auc": pytest.approx(5 / 9), "auc_all_rows": pytest.approx(6.5 / 12)}
    assert found["samples"] == 8
    assert found["missing"] == 2
    assert "1 answers are neither 是 nor 否 and are left out, as published" in found["notes"]


def test_label_pred_of_one_class_and_of_none(tmp_path: Path, evaluate: Run) -> None:
    write_task(tmp_path / "b", "label_pred", [row("是"), row("是")])
    lines = [{"task": "label_pred", "row": r, "p_yes": 0.1 * r, "p_no": 0.5} for r in (0, 1)]
    assert metrics_of(evaluate(lines), "label_pred")["auc"] == 0.5
    write_task(tmp_path / "b", "video", [row(tag(A))])
    found = evaluate([{"task": "video", "row": 0, "predictions": [tag(A)]}])
    assert metrics_of(found, "label_pred")["auc"] == 0.0


def test_hostile_lines_are_counted(tmp_path: Path, evaluate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of two predictions of a row counts; what is no line is counted, and nothing is half-written."""
    write_task(tmp_path / "b", "video", [row(tag(A)), row(tag(B))])
    path = tmp_path / "theirs.jsonl"
    lines = [
        '{"task": "video", "row": 0, "predictions": ["' + tag(A) + '"]}',
        '{"task": "video", "row": 0, "predictions": []}',
        "",
        "no line",
        '{"task": "video", "row": "0", "predictions": []}',
        '{"task": "video", "row": 1, "predictions": [null]}',
        '{"task": "label_pred", "row": 0, "p_yes": -1}',
        '{"task": "videos", "row": 0, "predictions": []}',
        '{"task": "video", "row": -1, "predictions": []}',
        '{"task": "video", "row": 99, "predictions": []}',
        '{"task": "video", "row": 1, "predictions": ["' + tag(B),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    words = ["recif", "evaluate", "--benchmark", str(tmp_path / "b"), "--predictions", str(path), "--out", str(out)]
    assert main(words) == 0
    record = read_record(out / "recif.json")
    assert record["faults"] == {
        "lines that cannot be read": 5, "repeated rows": 1, "unknown tasks": 1, "unknown or skipped rows": 2
    }  # fmt: skip
    assert metrics_of(record)["pass@1"] == 0.5
    assert sorted(p.name for p in out.iterdir()) == ["recif.json", "recif.md"]
    assert "5 lines that cannot be read" in (out / "recif.md").read_text(encoding="utf-8")
    capsys.readouterr()


def test_damaged_tasks_are_named_and_left_out(tmp_path: Path, evaluate: Run) -> None:
    folder = tmp_path / "b"
    write_task(folder, "video", [row(tag(A))])
    whole = write_task(folder, "ad", [row(tag(A))] * 50)
    whole.write_bytes(whole.read_bytes()[:-100])
    write_task(folder, "product", [{"messages": row("x")["messages"]}])
    (folder / "sid2pid.json").write_text(
        '{"5": [{"pid": 1, "count": 1, "count_after_downsample": 1}]', encoding="utf-8"
    )
    record = evaluate([{"task": "video", "row": 0, "predictions": [tag(A)]}])
    assert list(record["tasks"]) == ["video"]
    assert "ad_test.parquet cannot be read as Parquet" in record["left_out"]["ad"]
    assert "column 'metadata' is missing; got messages" in record["left_out"]["product"]
    assert "sid2pid.json cannot be read" in record["tasks"]["video"]["notes"][-1]
    assert "sid2pid.json" not in record["made_from"]


def test_nothing_to_evaluate_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "p.jsonl", [])
    words = ["recif", "evaluate", "--benchmark", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--predictions", str(path)]) == 1
    assert "holds no task that can be read" in capsys.readouterr().err
    assert main(words) == 2
    assert "neither --run nor --predictions is given" in capsys.readouterr().err
    write_task(tmp_path, "video", [row(tag(A))])
    assert main([*words, "--predictions", str(path)]) == 1
    assert "p.jsonl is empty" in capsys.readouterr().err
    assert not (tmp_path / "out" / "recif.json").exists()


def test_predictions_as_parquet_and_gzip_say_the_same(tmp_path: Path) -> None:
    lines = [
        {"task": "video", "row": 0, "predictions": [tag(A), tag(B)]},
        {"task": "label_pred", "row": 3, "predictions": None, "p_yes": 0.5, "p_no": None},
    ]
    pl.DataFrame(lines, schema_overrides={"p_yes": pl.Float64, "p_no": pl.Float64}).write_parquet(
        tmp_path / "p.parquet"
    )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    expected = [Prediction("video", 0, [tag(A), tag(B)]), Prediction("label_pred", 3, p_yes=0.5)]
    for name in ("p.parquet", "p.jsonl.gz"):
        assert list(read_predictions(tmp_path / name, Counter())) == expected
    pl.DataFrame(lines).with_columns(p_yes=pl.Series([np.nan, 0.5]), p_no=np.nan).write_parquet(tmp_path / "n.parquet")
    assert list(read_predictions(tmp_path / "n.parquet", Counter())) == expected
    pl.DataFrame({"id": [1]}).write_parquet(tmp_path / "q.parquet")
    with pytest.raises(DatasetError, match="got the columns id; expected task, row, and predictions"):
        list(read_predictions(tmp_path / "q.parquet", Counter()))


def test_lines_as_python_writes_them_are_read(tmp_path: Path) -> None:
    """Infinities beside what is read and half of a surrogate pair, which strict JSON has not; p_yes is a number."""
    lines = [
        {"task": "video", "row": 0, "predictions": [tag(A)], "logprobs": [-np.inf]},
        {"task": "video", "row": 1, "predictions": ["\ud83d", tag(B)]},
        {"task": "label_pred", "row": 0, "p_yes": np.nan},
        {"task": "label_pred", "row": 0, "p_yes": np.inf},
    ]
    path, faults = tmp_path / "p.jsonl", Counter[str]()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert list(read_predictions(path, faults)) == [
        Prediction("video", 0, [tag(A)]),
        Prediction("video", 1, ["?", tag(B)]),
    ]
    assert faults == {"lines that cannot be read": 2}


def test_several_systems_and_their_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second finds what the first does not in every row: differences of 1, whatever is drawn."""
    folder = tmp_path / "b"
    write_task(folder, "video", [row(tag(A), uid=i) for i in range(5)])
    paths = []
    for name, said in (("bad", D), ("good", A)):
        lines = [{"task": "video", "row": r, "predictions": [tag(said)]} for r in range(5)]
        paths.append(str(write_lines(tmp_path / f"{name}.jsonl", lines)))
    words = ["recif", "evaluate", "--benchmark", str(folder), "--out", str(tmp_path / "out"), "--save-predictions"]
    assert main([*words, "--predictions", *paths]) == 0
    record = read_record(tmp_path / "out" / "recif.json")
    assert list(record["systems"]) == ["bad", "good"]
    (found,) = record["differences"]
    assert (found["system"], found["against"], found["task"]) == ("good", "bad", "video")
    assert found["metrics"]["recall@32"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (tmp_path / "out" / "good.predictions.jsonl").read_text().count("\n") == 5
    assert "| good | bad | video | +1.0000 [+1.0000 – +1.0000] |" in (tmp_path / "out" / "recif.md").read_text()
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert main([*words, "--predictions", paths[0], paths[0]]) == 2
    assert "expected a name each" in capsys.readouterr().err


def test_a_map_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the pieces, and with space anywhere, the map is that of the whole text."""
    values = {
        str(k): [{"pid": k * 10 + i, "count": i, "count_after_downsample": i % 2} for i in range(k % 4)]
        for k in range(40)
    }
    path = tmp_path / "sid2pid.json"
    for indent in (None, 2):
        path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
        for size in (7, 64, 1 << 20):
            monkeypatch.setattr("sagerec.recif.layout.PIECE_BYTES", size)
            found = read_item_map(path)
            assert found.keys.tolist() == list(range(40))
            # of 0, 1, 2 entries' ids the only one, that with an odd place, and of three again that
            assert found.ids.tolist() == [[0, k * 10, k * 10 + 1, k * 10 + 1][k % 4] for k in range(40)]
            assert found.counts.tolist() == [[0, 0, 1, 3][k % 4] for k in range(40)]
            assert found.places([3, 99, -1]).tolist() == [3, -1, -1]
    path.write_text("{}", encoding="utf-8")
    assert read_item_map(path).places([1]).tolist() == [-1]
    for text in ("[]", '{"a": []}', '{"1": [{"pid": 2}]}', '{"1": []} more', '{"1": []', ""):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DatasetError, match="cannot be read"):
            read_item_map(path)
