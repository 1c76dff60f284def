"""The benchmarks run, in `--quick` mode, and write JSON of the shape that `benchmarks/README.md` documents."""

import dataclasses
import gzip
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from sagerec.actions.semantic_ids.quantisers import separate
from sagerec.actions.trie import build_trie
from sagerec.errors import MissingExtraError, SettingsError
from sagerec.objectives.table import OBJECTIVES
from tests.test_formats import review_2023

FOLDER = Path(__file__).parents[1] / "benchmarks"
RECORD = {"benchmark", "date", "command", "hardware", "versions", "seed", "settings", "results", "limits", "ok"}
HARDWARE = {"cpu", "cores", "threads", "memory_gb", "load_average_at_start"}
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (extra bench)"
)


def run_quick(name: str, folder: Path) -> dict[str, Any]:
    """Run a benchmark in a process of its own and read what it writes."""
    out = folder / f"{name}.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--seed", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no limit checked" in done.stdout
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert record["benchmark"] == name
    assert record["seed"] == record["settings"]["seed"] == 1
    assert set(record["hardware"]) == HARDWARE
    assert record["limits"] == []
    return record


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark by name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load_module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load_module


@needs_transformers
def test_text_runs(tmp_path: Path) -> None:
    """60 titles for lists and loss, 500 in the trie; each with its peer."""
    results = run_quick("text", tmp_path)["results"]
    assert set(results["lists"]) == {"ours", "generate"}
    assert all(row["users_per_second"] > 0 for row in results["lists"].values())
    assert set(results["loss"]) == {"ours", "naive copies"}
    assert [row["titles"] for row in results["trie"]] == [500]


def test_trie_runs(tmp_path: Path) -> None:
    """2,000 items: 1 root, at most 256 nodes of depth 1, and 2,000 leaves among the nodes."""
    record = run_quick("trie", tmp_path)
    assert set(record) == RECORD
    assert record["ok"] is None
    (trie,), (dictionary,) = record["results"]["trie"], record["results"]["dictionary"]
    sizes = {"items", "build_seconds", "peak_gb", "rise_gb"}
    assert set(trie) == sizes | {"nodes", "trie_mb", "write_seconds", "open_seconds", "steps"}
    assert set(dictionary) == sizes | {"prefixes", "look_up_microseconds"}
    assert trie["items"] == dictionary["items"] == 2_000
    assert dictionary["prefixes"] == trie["nodes"] - 2_000
    assert [(step["depth"], step["one_child"]) for step in trie["steps"]] == [
        (0, False),
        (1, False),
        (2, False),
        (3, True),
    ]
    assert trie["steps"][3]["children_per_state"] == 1
    assert all(
        step[f"{call}_microseconds"] > 0 for step in trie["steps"] for call in ("children", "allowed", "advance")
    )


def test_trie_codes_equal_the_packages_own_separation(load: Any) -> None:
    codes = load("trie").draw_codes(60_000, np.random.default_rng(0))
    assert codes[:, 3].max() >= 1, "no collision among 60,000 of 2^24"
    assert np.array_equal(codes, separate(codes[:, :3].astype(np.int32), np.zeros(len(codes))))


def test_trie_limits_are_checked_on_the_catalogue_that_they_are_for(load: Any) -> None:
    """60.1 s misses 60 s; a step of 30 us against 10 us stays under 4 times."""
    module = load("trie")

    def row(items: int, seconds: float, microseconds: float) -> dict[str, Any]:
        step = {f"{call}_microseconds": microseconds for call in ("children", "allowed", "advance")}
        return {"items": items, "build_seconds": seconds, "peak_gb": 1.0, "steps": [step] * len(module.STEPS)}

    assert module.check_limits([row(10_000, 0.1, 10)]) == []
    limits = module.check_limits([row(10_000, 0.1, 10), row(10_000_000, 60.1, 30)])
    assert [limit["ok"] for limit in limits] == [False] + [True] * 7
    assert {limit["measured"] for limit in limits[2:]} == {3.0}


def test_semantic_ids_runs(tmp_path: Path) -> None:
    """Three quantisers of one level of 8 codes on 200 items: balanced ones have 25 items each, so perplexity 8."""
    record = run_quick("semantic_ids", tmp_path)
    assert set(record) == RECORD
    rows = record["results"]["rows"]
    assert [row["quantiser"] for row in rows] == ["residual-kmeans", "balanced-kmeans", "rq-vae"]
    assert rows[1]["perplexity"] == pytest.approx([8])
    assert all(row["items"] == row["distinct_ids"] == 200 and row["proven_exact"] == 1 for row in rows)
    assert {"recall@10", "ndcg@10", "cold_recall@10", "coverage@10"} <= set(rows[0]["metrics"])


def test_semantic_ids_writes_between_the_marks_of_a_page(load: Any, tmp_path: Path) -> None:
    module, page = load("semantic_ids"), tmp_path / "page.md"
    record = {
        "date": "today",
        "seed": 0,
        "settings": dict.fromkeys(module.PAGE_FLAGS, 1),
        "hardware": {"cpu": "a", "cores": 2, "threads": 1, "load_average_at_start": 0.0},
        "versions": {"torch": "2"},
        "results": {"rows": []},
    }
    page.write_text(f"# Title\n\n{module.BEGIN}\nold\n{module.END}\n\nThe end.\n")
    module.write_page(page, record)
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{module.BEGIN}\ntoday, a, 2 cores")
    assert text.endswith(f"{module.END}\n\nThe end.\n")
    assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(SettingsError, match="has no marks <!-- figures: begin -->"):
        module.write_page(page, record)


@needs_transformers
def test_decode_runs(tmp_path: Path) -> None:
    record = run_quick("decode", tmp_path)
    assert set(record) == RECORD | {"checks"}
    assert record["ok"] is True
    assert all(check["ok"] for check in record["checks"])
    assert "transformers" in record["versions"]
    results = record["results"]
    assert set(results) == {"contenders", "items_alone_after_codes", "proven_in_one_pass", "probability_of_lists"}
    assert [row["name"] for row in results["contenders"]] == [
        "ours, one pass",
        "ours, proven exact",
        "Hugging Face generate",
    ]
    for row in results["contenders"]:
        assert row["users_per_second"] == pytest.approx(1000 / row["milliseconds_per_user"])
        assert row["ratio"] == pytest.approx(row["users_per_second"] / results["contenders"][2]["users_per_second"])
        assert set(row) == {
            "name",
            "parameters",
            "users",
            "batch_size",
            "milliseconds_per_user",
            "milliseconds_per_user_of_rounds",
            "users_per_second",
            "peak_gb",
            "ratio",
        }
    ours, _, peer = results["contenders"]
    assert peer["parameters"] == pytest.approx(ours["parameters"], rel=0.05)


def test_decode_without_transformers_says_how_to_get_it(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("decode")
    monkeypatch.setitem(sys.modules, "transformers", None)
    codes = np.array([[0, 1], [1, 0]])
    with pytest.raises(MissingExtraError, match=r'pip install "sagerec\[bench\]"'):
        module.make_peer(codes, build_trie(codes), 1000, module.DecodeSettings())


def test_decode_knows_lists_with_repeats_and_holes(load: Any) -> None:
    distinct = load("decode").distinct
    assert distinct(torch.tensor([[3, 1], [0, 2]]))
    assert not distinct(torch.tensor([[3, 1], [2, 2]]))
    assert not distinct(torch.tensor([[3, -1], [0, 2]]))


def test_objectives_runs(tmp_path: Path) -> None:
    record = run_quick("objectives", tmp_path)
    assert set(record) == RECORD
    assert record["ok"] is None
    rows = record["results"]
    assert [row["objective"] for row in rows] == [
        "plain",
        *(n for n, o in OBJECTIVES.items() if not o.trains_on_targets),
    ]
    assert all(row["ratio"] == pytest.approx(row["microseconds"] / rows[0]["microseconds"]) for row in rows)


def test_objectives_plain_step_is_a_masked_mean(load: Any) -> None:
    module = load("objectives")
    x = module.draw_inputs((2, 3, 4), seed=0)
    assert torch.allclose(module.plain_step(x), -x["mask"].float() / x["mask"].sum())


def test_objectives_limit_is_checked_on_the_shape_that_it_is_for(load: Any) -> None:
    check = load("objectives").check_limits
    assert check([{"objective": "sage", "shape": [4, 4, 5], "ratio": 9.0}]) == []
    row = {"objective": "sage", "shape": [64, 16, 40], "ratio": 1.6}
    assert not check([row])[0]["ok"]
    assert [found["ok"] for found in check([row, row | {"objective": "sage, compiled"}])] == [True, False]


def test_ratio_spread_runs(tmp_path: Path) -> None:
    """With one update a round every ratio is 1 and no bound of one acts; with four it has left 1, and both act."""
    record = run_quick("ratio_spread", tmp_path)
    assert set(record) == RECORD
    rows = record["results"]
    assert [(row["objective"], row["minibatches"], row["passes"]) for row in rows] == [
        (objective, minibatches, passes)
        for objective in ("sage", "sage_paper")
        for minibatches in (1, 2)
        for passes in (1, 2)
    ]
    assert all(row["updates"] == row["minibatches"] * row["passes"] and row["rounds"] >= 2 for row in rows)
    for first, last in ((rows[0], rows[3]), (rows[4], rows[7])):
        assert [first[f"ratio_q{q}"] for q in ("05", "50", "95")] == pytest.approx([1.0] * 3, abs=1e-5)
        assert last["ratio_q05"] < 0.9999 < 1.0001 < last["ratio_q95"]
        assert last["share_at_upper"] > 0
        assert last["share_at_lower"] > 0
    assert rows[4]["share_at_upper"] == rows[4]["share_at_lower"] == 0


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (extra bench)")
def test_align_runs(tmp_path: Path) -> None:
    record = run_quick("align", tmp_path)
    assert set(record) == RECORD | {"checks"}
    rows = record["results"]
    assert [row["name"] for row in rows] == ["ours, sampled", "ours, beams", "TRL, 8 a pass"]
    assert [row["valid"] for row in rows[:2]] == [1, 1]
    for row in rows:
        assert row["completions_per_second"] == pytest.approx(16 / row["seconds_per_step"])
        assert row["ratio"] == pytest.approx(row["completions_per_second"] / rows[2]["completions_per_second"])


def test_align_step_of_ours_learns_and_writes_legal_items(load: Any) -> None:
    """One step on a tiny catalogue changes the policy; its 4 completions of each user are distinct items."""
    module = load("align")
    settings = dataclasses.replace(module.AlignBenchmarkSettings(), **module.QUICK)
    torch.manual_seed(0)
    codes = module.draw_codes(settings.items, settings.codebook_size, np.random.default_rng(0))
    policy, reference = (module.make_policy(codes, settings.shape) for _ in range(2))
    before = [p.detach().clone() for p in policy.parameters()]
    stage = module.make_stage(policy, reference, module.draw_events(settings, 1), None, settings)
    slates = module.our_step(stage, np.arange(settings.users), 0, 1)
    assert slates.shape == (4, 4, 1)
    assert all(len(set(row.tolist())) == 4 for row in slates.flatten(1))
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))


def test_align_without_trl_says_how_to_get_it(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("align")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "sagerec\[bench\]"'):
        module.require_trl()


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed (extra bench)")
def test_import_runs(tmp_path: Path) -> None:
    record = run_quick("import", tmp_path)
    assert set(record) == RECORD
    assert record["ok"] is None
    assert "pandas" in record["versions"]
    results = record["results"]
    assert set(results) == {"file", "import", "pandas", "ratio"}
    ours, pandas = results["import"], results["pandas"]
    assert (ours["rows"], pandas["rows"], results["file"]["rows"]) == (3_000, 1_000, 3_000)
    assert (ours["users"] <= 500, ours["items"] <= 200) == (True, True)
    assert results["ratio"] == pytest.approx(ours["rows_per_second"] / pandas["rows_per_second"])
    assert pandas["rows_per_second"] == max(pandas["rows_per_second_of_rounds"])
    assert min(ours["peak_gb"], pandas["peak_gb"], results["file"]["json_gb"]) > 0


def test_recif_runs(tmp_path: Path) -> None:
    record = run_quick("recif", tmp_path)
    assert set(record) == RECORD
    evaluated, imported = record["results"]["evaluate"], record["results"]["import"]
    assert (evaluated["rows"], evaluated["beams"], imported["users"]) == (200, 8, 300)
    assert min(evaluated["peak_gb"], imported["peak_gb"]) > 0


def test_recif_limits_are_checked_at_their_size(load: Any) -> None:
    """21 s miss 20 s, 2.1 GB miss 2 GB."""
    check = load("recif").check_limits
    evaluated = {"rows": 40_000, "beams": 32, "seconds": 21.0, "peak_gb": 0.9}
    assert check({"evaluate": evaluated | {"beams": 31}, "import": {"users": 162_073, "peak_gb": 9.0}}) == []
    limits = check({"evaluate": evaluated, "import": {"users": 162_074, "peak_gb": 2.1}})
    assert [limit["ok"] for limit in limits] == [False, True, False]


def test_import_limits_are_checked_on_the_rows_that_they_are_for(load: Any) -> None:
    """2.1 GB misses 2 GB; five times as fast is fast enough."""
    check = load("import").check_limits
    assert check({"import": {"rows": 9_999_999, "peak_gb": 1.0}, "ratio": 9.0}) == []
    limits = check({"import": {"rows": 10_000_000, "peak_gb": 2.1}, "ratio": 5.0})
    assert [limit["ok"] for limit in limits] == [False, True]


def test_import_draws_reviews_of_the_releases_fields(load: Any, tmp_path: Path) -> None:
    module = load("import")
    settings = module.ImportBenchmarkSettings(rows=200, pandas_rows=50, users=30, items=20, bodies=10)
    sizes = module.write_reviews(tmp_path, settings)
    lines = gzip.decompress((tmp_path / "reviews.jsonl.gz").read_bytes()).splitlines()
    assert gzip.decompress((tmp_path / "pandas.jsonl.gz").read_bytes()).splitlines() == lines[:50]
    reviews = [json.loads(line) for line in lines]
    assert (len(reviews), sizes["rows"]) == (200, 200)
    assert {tuple(sorted(review)) for review in reviews} == {tuple(sorted(review_2023("u", "i", 1)))}
    assert {len(review["user_id"]) for review in reviews} == {28}
    assert sizes["json_gb"] == sum(len(line) + 1 for line in lines) / 1e9


def test_import_without_pandas_says_how_to_get_it(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("import")

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "version", absent)
    with pytest.raises(MissingExtraError, match=r'pip install "sagerec\[bench\]"'):
        module.pandas_version()


@needs_transformers
def test_the_formulas_of_scale_are_what_is_counted(load: Any) -> None:
    """Every formula within 2 % of its count on the smallest sizes; two by hand.

    10^7 random items of three codes of 10 and one more: all 10 + 100 + 1,000 prefixes are met, and a leaf an item.
    Adding 4 bytes up over 8 ranks sends 2 x 7 / 8 of them.
    """
    scale = load("scale")
    for row in scale.checks(0, quick=True):
        assert row["formula"] == pytest.approx(row["counted"], rel=scale.TOLERANCE), row["what"]
    assert scale.trie_nodes(10**7, 10, 4) == pytest.approx(1 + 10 + 100 + 1_000 + 10**7)
    assert scale.all_reduce_bytes(1, 8) == 7.0
    assert [row["policy"] for row in scale.policy_rows()] == ["0.1B", "0.6B", "1.7B", "4B", "8B"]
