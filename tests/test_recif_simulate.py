"""The simulated RecIF-Bench: its layout, its law, and a run's policy that learns it, evaluated."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sagerec.actions.clusters import item_clusters
from sagerec.actions.semantic_ids.build import SemanticIdSettings
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.formats.importer import import_dataset
from sagerec.catalogue.splits import learnt_counts
from sagerec.cli import main
from sagerec.decoding.cases import list_cases
from sagerec.errors import ArtifactError, SettingsError
from sagerec.evaluation.evaluate import EvaluateSettings
from sagerec.files import read_record
from sagerec.policies.registry import PolicySettings
from sagerec.recif.answers import KnownItems, RunPolicy, constrained_lists, item_keys, known_histories
from sagerec.recif.evaluate import PredictionsFile, evaluate_systems
from sagerec.recif.items import itemic_text, make_key
from sagerec.recif.layout import ItemMap
from sagerec.recif.metrics import auc
from sagerec.recif.simulate import MASKS, RecifStoreSettings, World, law_score, simulate_world
from sagerec.recif.simulated_files import WIDE, write_benchmark
from sagerec.recif.tasks import Histories, read_benchmark
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import RunSettings, run_all
from sagerec.training.settings import TrainSettings
from tests.conftest import semantic_ids

SMALL = RecifStoreSettings(
    users=240, videos=60, ads=60, products=60, history=10, targets=4, law=0.9, cold_share=0.1, shared_ids=0.05, seed=1
)
IDS = SemanticIdSettings(
    quantiser="existing", unique=False, text_dimensions=8, collaborative_dimensions=32, category_weight=0
)
RUN = RunSettings(
    ids=IDS,
    policy=PolicySettings(width=32, dropout=0.1),
    train=TrainSettings(epochs=5, batch_size=16, learning_rate=5e-3, validate_every=0, device="cpu"),
    evaluate=EvaluateSettings(k=(5, 10), beams=10, bootstrap_samples=100),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated benchmark."""
    out = tmp_path_factory.mktemp("recif") / "recif"
    write_benchmark(out, SMALL)
    return out


@pytest.fixture(scope="module")
def world() -> World:
    """The same in arrays."""
    return simulate_world(SMALL)


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """A run of it, trained."""
    import_dataset("recif", [folder], folder.parent / "data")
    run_all(folder.parent / "data", folder.parent / "run", RUN)
    return open_run(folder.parent / "run")


def test_the_layout_is_the_published_one(folder: Path) -> None:
    masks = [f"{side}_video_{name}" for side in ("hist", "target") for name in ("pid", *MASKS)]
    others = [f"{side}_{name}_pid" for side in ("hist", "target") for name in ("ad", "goods")]
    texts = ["inter_keyword_to_items", "inter_user_profile_with_pid", "inter_user_profile_with_sid"]
    reco = ["reco_gsu_caption", "reco_target_caption", "reco_cot"]
    wide = pl.read_parquet(folder / WIDE)
    assert set(wide.columns) == {"uid", "split", "hist_longview_video_list", *masks, *others, *texts, *reco}
    assert wide["split"].value_counts().sort("split").rows() == [(0, 168), (1, 72)]
    assert set(pl.read_parquet(folder / "video_ad_pid2sid.parquet").columns) == {"pid", "sid"}
    benchmark = read_benchmark(folder / "benchmark_data")
    assert len(benchmark.tasks) == 8
    assert not benchmark.left_out
    assert all(not task.skipped for task in benchmark.tasks.values())
    first = pl.read_parquet(folder / "benchmark_data" / "video" / "video_test.parquet")
    assert first.schema == {"messages": pl.String, "metadata": pl.String}
    assert set(json.loads(first["metadata"][0])) == {"uid", "answer", "answer_pid"}
    assert [m["role"] for m in json.loads(first["messages"][0])] == ["system", "user"]


def test_the_same_seed_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_benchmark(tmp_path / "again", SMALL)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path


def test_the_law_holds(world: World) -> None:
    """Successors follow with probability `law` in histories; cold items never stand there, and are rare in training."""
    for name, domain in world.domains.items():
        sequence, cut = world.sequences[name], world.history_length(name)
        before, after = sequence[:, : cut - 1], sequence[:, 1:cut]
        assert (domain.successor[before] == after).mean() == pytest.approx(SMALL.law, abs=0.05)
        assert not domain.cold[sequence[:, :cut]].any()
        assert domain.cold[sequence[world.is_test][:, cut:]].mean() == pytest.approx(SMALL.cold_rate, abs=0.05)
        taken = np.bincount(sequence[~world.is_test][:, cut:].ravel(), minlength=len(domain.pids))
        assert taken[domain.cold].mean() < 4


def test_watch_time_is_biased_by_length(world: World) -> None:
    """Long videos are watched for more seconds and to a smaller share."""
    seconds = world.domains["video"].seconds[world.sequences["video"]].ravel()
    watched = world.watched.ravel()
    assert np.corrcoef(np.log(seconds), np.log(watched))[0, 1] > 0.5
    assert np.corrcoef(np.log(seconds), watched / seconds)[0, 1] < -0.2
    assert (
        world.feedback["longview"].ravel()[seconds < 20].mean()
        > world.feedback["longview"].ravel()[seconds > 60].mean()
    )


def test_label_pred_hangs_on_feedback_and_not_on_the_law(world: World) -> None:
    """How much of a cluster a user watched long tells .87 what is watched long next, what comes next .5: nothing."""
    videos, sequence, long = world.domains["video"], world.sequences["video"], world.feedback["longview"]
    cut, score, follows, label = world.history_length("video"), [], [], []
    for user in np.flatnonzero(world.is_test):
        begin = world.starts["video"][user]
        for place in range(cut, sequence.shape[1]):
            item, before = sequence[user, place], sequence[user, place - 1]
            like = long[user, begin:cut][videos.cluster[sequence[user, begin:cut]] == videos.cluster[item]]
            score.append((like.sum() + 1) / (len(like) + 2))
            follows.append(float(videos.successor[before] == item))
            label.append(long[user, place])
    assert auc(np.array(score), np.array(label)) > 0.8
    assert auc(np.array(follows), np.array(label)) == pytest.approx(0.5, abs=0.05)


def test_a_follower_of_the_law_scores_it(folder: Path, world: World, tmp_path: Path) -> None:
    """Whoever writes the last item's successor hits the first one with probability `law_score`: of 72 users, within 4
    standard errors of .846 (shared IDs aside, of which a successor is not one).
    """
    following = {
        make_key(*domain.codes[item].tolist()): domain.codes[domain.successor[item]].tolist()
        for domain in world.domains.values()
        for item in range(len(domain.pids))
    }
    benchmark = read_benchmark(folder / "benchmark_data", with_histories=True)
    lines = []
    for name in ("video", "ad", "product"):
        task = benchmark.tasks[name]
        assert task.histories is not None
        last = task.histories.keys[task.histories.offsets[1:] - 1].tolist()
        lines += [
            {"task": name, "row": row, "predictions": [itemic_text(following[key])]}
            for row, key in zip(task.rows.tolist(), last, strict=True)
        ]
    path = tmp_path / "law.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    record = evaluate_systems(benchmark, [PredictionsFile(path)], tmp_path / "out")
    error = (law_score(SMALL) * (1 - law_score(SMALL)) / 72) ** 0.5
    for name in ("video", "product"):
        assert record["tasks"][name]["metrics"]["position1_pass@1"] > law_score(SMALL) - 0.1 - 4 * error


def test_a_policy_learns_the_law_and_is_evaluated(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ["recif", "evaluate", "--benchmark", str(folder / "benchmark_data"), "--run", str(run.folder)]
    assert main([*words, "--out", str(tmp_path / "out"), "--device", "cpu", "--save-predictions"]) == 0
    record = read_record(tmp_path / "out" / "recif.json")
    video = record["tasks"]["video"]["metrics"]
    assert video["position1_pass@1"] > 0.6
    assert video["invalid_rate@32"] == video["duplicate_rate@32"] == 0
    assert 0.4 < record["tasks"]["label_pred"]["metrics"]["auc"] <= 1
    assert record["decoding"] == "constrained to the task's items, exact"
    assert any("unconstrained decoding is not defined" in note for note in record["about"])
    assert record["tasks"]["rec_reason"]["metrics"] == {}
    assert any("no judge is configured" in note for note in record["tasks"]["rec_reason"]["notes"])
    assert "policy: decoding constrained" in (tmp_path / "out" / "recif.md").read_text(encoding="utf-8")
    # what it wrote is a file of predictions, of the same figures
    again = evaluate_systems(
        read_benchmark(folder / "benchmark_data"),
        [PredictionsFile(tmp_path / "out" / "policy.predictions.jsonl")],
        tmp_path / "again",
    )
    assert (
        again["tasks"]["product"]["metrics"]["pid_recall@32"] == record["tasks"]["product"]["metrics"]["pid_recall@32"]
    )


def known_items(run: Run) -> KnownItems:
    """Of a run."""
    return KnownItems.of(run.space(), item_keys(run.data), learnt_counts(run.data, run.split))


def test_lists_hold_the_tasks_items_alone_and_are_exact(run: Run) -> None:
    """Against a list of the whole catalogue, from which the items of other tasks are taken out, and repeated IDs."""
    policy, known = run.policy(device="cpu"), known_items(run)
    products = np.array([item.startswith("p") for item in run.data.item_ids.ids])
    keys = np.unique(known.keys[products])
    item_map = ItemMap(keys, keys, np.ones(len(keys)))
    cases = run.split.cases(run.data, "test").sample(20, np.random.default_rng(0))
    found = constrained_lists(policy, cases, known, item_map, exclude_history=False)
    every, _ = list_cases(policy, cases, k=policy.space.n_sequences, beams=policy.space.n_sequences)
    for keys_of_case, items in zip(found, every, strict=True):
        expected = [key for key in dict.fromkeys(known.keys[items].tolist()) if key in set(keys.tolist())]
        assert keys_of_case == expected[:32]


def test_histories_in_a_runs_items(run: Run) -> None:
    """Unknown items are left out; of one ID the item stands that lists show; what is asked about is not history."""
    known = known_items(run)
    a, b = known.distinct[:2].tolist()
    unknown = make_key(8000, 1, 1)
    histories = Histories(np.array([a, unknown, b, b, unknown]), np.array([0, 3, 4, 4, 5]))
    cases, last = known_histories(histories, known, without_last=False)
    stands = known.stands[:2].tolist()
    assert [cases.event_items[s:r].tolist() for s, r in zip(cases.starts, cases.rows, strict=True)] == [
        stands, [stands[1]], [], []
    ]  # fmt: skip
    assert last.tolist() == [stands[1], stands[1], -1, -1]
    cases, _ = known_histories(histories, known, without_last=True)
    assert [int(r - s) for s, r in zip(cases.starts, cases.rows, strict=True)] == [1, 0, 0, 0]
    space = run.space()
    assert np.array_equal(known.items(known.keys), space.listed_as(np.arange(space.n_items)))
    codes = semantic_ids(run).codes
    assert known.keys.tolist() == [make_key(*row) for row in codes.tolist()]


def test_runs_of_other_items_are_refused(run: Run, store_data: Dataset) -> None:
    with pytest.raises(ArtifactError, match="the run's items have no column 'semantic_id'"):
        item_keys(store_data)
    cut = replace(run.data, items=run.data.items.with_columns(pl.lit("<a_1><b_2>").alias("semantic_id")))
    with pytest.raises(ArtifactError, match="has no Semantic ID of three codes"):
        item_keys(cut)


def test_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match="test_share is 1"):
        RecifStoreSettings(test_share=1)
    with pytest.raises(SettingsError, match="videos is 5; expected at least 60"):
        RecifStoreSettings(videos=5)


def test_further_columns_where_asked(tmp_path: Path) -> None:
    write_benchmark(tmp_path / "recif", replace(SMALL, users=20, watch_seconds=True))
    wide = pl.read_parquet(tmp_path / "recif" / WIDE)
    assert wide["hist_video_watch_seconds"].list.len().to_list() == wide["hist_video_pid"].list.len().to_list()
    figures = import_dataset("recif", [tmp_path / "recif"], tmp_path / "data")
    assert figures["masks_of_another_length"] == 0
    assert pl.read_parquet(tmp_path / "data" / "interactions.parquet")["watch_seconds"].null_count() > 0


def test_systems_are_named_by_policy(run: Run) -> None:
    system = RunPolicy(run, "policy", "cpu")
    assert system.name == "policy"
    counts = dict(system.learnt)
    events = run.data.events.filter(pl.col("split").is_in(["train", "align"]))
    assert sum(counts.values()) == len(events)


def test_coarse_clusters_tell_the_first_codes_apart(run: Run) -> None:
    """36 first codes among 512 numbers: 32 coarse clusters of those in use, none of numbers that no item has."""
    clusters = item_clusters(run.data, run.space(), "coarse")
    sizes = np.asarray(clusters.sum(axis=0)).ravel()
    assert clusters.shape == (run.data.n_items, 32)
    assert sizes.max() < 0.2 * run.data.n_items
