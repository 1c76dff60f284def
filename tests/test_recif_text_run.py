"""RecIF-Bench by a language model that writes titles: imported, trained, aligned, evaluated both ways."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from sagerec.actions.titles import TitleSettings
from sagerec.catalogue.dataset import read_dataset
from sagerec.catalogue.formats.importer import import_dataset
from sagerec.catalogue.splits import learnt_counts
from sagerec.cli import main
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.files import read_record
from sagerec.policies.registry import PolicySettings
from sagerec.policies.small_lm import SmallLMSettings, new_language_model
from sagerec.recif.answers import KnownItems, RunPolicy, constrained_lists, free_lists, item_keys, make_cases
from sagerec.recif.simulate import RecifStoreSettings
from sagerec.recif.simulated_files import write_benchmark
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import RunSettings, align, run_all
from sagerec.training.settings import TrainSettings
from tests.test_alignment import QUICK

pytest.importorskip("transformers")
TINY = RecifStoreSettings(users=60, videos=60, ads=60, products=60, history=4, targets=3, shared_ids=0.2, seed=2)
TASKS = ("video", "product", "label_pred")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated benchmark of three tasks."""
    out = tmp_path_factory.mktemp("recif") / "recif"
    write_benchmark(out, TINY)
    for path in (out / "benchmark_data").glob("*/*.parquet"):
        if path.parent.name not in TASKS:
            path.unlink()
    return out


@pytest.fixture(scope="module")
def text_run(benchmark: Path) -> Run:
    """A run of it in native text with an aligned policy."""
    folder = benchmark.parent
    import_dataset("recif", [benchmark], folder / "data")
    lm = SmallLMSettings(parameters="40K", vocabulary=400, positions=256)
    new_language_model(folder / "lm", read_dataset(folder / "data").texts(), lm)
    settings = RunSettings(
        actions="text",
        text=TitleSettings(max_tokens=12),
        policy=PolicySettings(kind="causal-lm", model=str(folder / "lm"), max_items=4, free_weight=1.0),
        train=TrainSettings(epochs=2, batch_size=16, learning_rate=5e-3, validate_every=0, device="cpu"),
        evaluate=EvaluateSettings(k=(10,), beams=10, bootstrap_samples=100),
    )
    run_all(folder / "data", folder / "run", settings)
    align(open_run(folder / "run"), replace(QUICK, epochs=1, validations=0), name="sage")
    return open_run(folder / "run")


def test_titles_are_evaluated_constrained_and_unconstrained(text_run: Run, benchmark: Path, tmp_path: Path) -> None:
    words = ["recif", "evaluate", "--benchmark", str(benchmark / "benchmark_data"), "--run", str(text_run.folder)]
    words += ["--policy", "policy", "policy-sage", "--device", "cpu", "--out", str(tmp_path), "--save-predictions"]
    assert main(words) == 0
    record = read_record(tmp_path / "recif.json")
    names = ["policy", "policy-unconstrained", "policy-sage", "policy-sage-unconstrained"]
    assert list(record["systems"]) == names
    for name in names:
        system = record["systems"][name]
        assert list(system["tasks"]) == ["video", "product", "label_pred"]
        assert system["decoding"].startswith("unconstrained" if "unconstrained" in name else "constrained")
        assert not any("not defined" in note for note in system["about"])
        found = system["tasks"]["video"]
        assert found["missing"] == 0
        assert {"entropy@10", "cold_recall@10"} <= found["intervals"].keys()
        if name.endswith("unconstrained"):
            assert "the history is not left out of lists" in system["about"]
            assert found["metrics"]["invalid_rate@32"] > 0  # texts that are no title, and of two domains
        else:
            assert found["metrics"]["invalid_rate@32"] == found["metrics"]["duplicate_rate@32"] == 0
            assert found["metrics"]["recall@32"] > 0
    assert len(record["differences"]) == 6 * 2
    assert "| policy-sage | policy | video |" in (tmp_path / "recif.md").read_text(encoding="utf-8")


def test_policies_of_several_runs_stand_in_one_table(text_run: Run, benchmark: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(text_run.folder, other)
    small = tmp_path / "b" / "video"
    shutil.copytree(benchmark / "benchmark_data" / "video", small)
    words = ["recif", "evaluate", "--benchmark", str(small.parent), "--run", str(text_run.folder), str(other)]
    assert main([*words, "--device", "cpu", "--no-unconstrained", "--out", str(tmp_path / "out")]) == 0
    record = read_record(tmp_path / "out" / "recif.json")
    assert list(record["systems"]) == ["run-policy", "other-policy"]
    (found,) = record["differences"]
    assert (found["system"], found["metrics"]["recall@32"]["value"]) == ("other-policy", 0)


def test_titles_become_the_benchmarks_ids(text_run: Run) -> None:
    """Items that share an ID are one prediction when constrained; what is written freely stays as it comes."""
    keys, counts = item_keys(text_run.data), learnt_counts(text_run.data, text_run.split)
    policy = text_run.policy(device="cpu")
    known = KnownItems.of(policy.space, keys, counts)
    assert len(known.distinct) < len(keys)  # shared
    one = make_cases(known.stands[:2], np.array([0, 2]))
    (found,) = constrained_lists(policy, one, known, None, exclude_history=False)
    assert len(set(found)) == len(found) == 32

    def write_texts(items: torch.Tensor, lengths: torch.Tensor, *, k: int, beams: int) -> list[list[tuple[int, str]]]:
        assert (items.tolist(), lengths.tolist(), k, beams) == ([known.stands[:2].tolist()], [2], 32, 32)
        return [[(5, "a title"), (-1, "no title"), (5, "a title")]]

    wild = SimpleNamespace(device="cpu", max_items=4, most_users=8, write_texts=write_texts)
    ((first, text, again),) = free_lists(cast(Any, wild), one, known)
    a, b, c = (int(part) for part in text_run.data.items["semantic_id"][5][1:-1].replace("><", "_").split("_")[1::2])
    assert first == again == f"<|sid_begin|><s_a_{a}><s_b_{b}><s_c_{c}><|sid_end|>"
    assert text == "no title"


def test_what_is_written_freely_reads_as_titles(text_run: Run) -> None:
    policy: Any = text_run.policy(device="cpu")
    items = torch.zeros(1, 1, dtype=torch.int64)
    texts = policy.write_texts(items, torch.ones(1, dtype=torch.int64), k=8, beams=8)[0]
    expected = policy.write_freely(items, torch.ones(1, dtype=torch.int64), k=8, beams=8)[0].tolist()
    assert [item for item, _ in texts] == expected[: len(texts)]
    for item, text in texts:
        if item >= 0:
            assert " ".join(text.casefold().split()) == " ".join(policy.space.written[item].casefold().split())


def test_only_language_models_write_freely(text_run: Run) -> None:
    system = RunPolicy(text_run, "policy-sage", "cpu")
    assert [way.name for way in system.ways] == ["policy-sage", "policy-sage-unconstrained"]
