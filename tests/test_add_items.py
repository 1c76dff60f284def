"""`sagerec ids add`: what was there stays bit for bit, what comes gets a place, and every stage tells the two apart."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagerec import load
from sagerec.actions.registry import KINDS
from sagerec.actions.semantic_ids.add import fill_collaborative
from sagerec.actions.semantic_ids.build import SemanticIds, index_ids
from sagerec.actions.semantic_ids.embedders import embed_text, project_text
from sagerec.actions.semantic_ids.quantisers import separate
from sagerec.actions.space import make_space
from sagerec.actions.trie import ROOT, build_trie
from sagerec.artifacts import check_content
from sagerec.baselines.tuning import evaluate_baseline
from sagerec.catalogue.dataset import ITEM_ID, ITEMS
from sagerec.catalogue.splits import SplitSettings
from sagerec.cli import main
from sagerec.decoding.beam import exact_lists
from sagerec.errors import ArtifactError, DatasetError
from sagerec.files import read_record
from sagerec.policies.history_encoder import CODE_ROWS, grow_weights
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings
from sagerec.run.additions import add_items
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import audit, evaluate, make_actions, prepare, run_all, train
from tests.conftest import SMALL_IDS, SMALL_POLICY, SMALL_RUN, SMALL_TRAIN, semantic_ids

CHEAP = replace(SMALL_IDS, text_weight=0.0, codebook_size=8)
"""Settings that do not pay for hashed words."""


def new_items(run: Run, path: Path, n: int = 6, prefix: str = "new") -> Path:
    """A file of n items that look as the first n of the run do, and one of which nothing is known."""
    looks = run.data.items.head(n).with_columns(pl.format(prefix + "-{}", pl.int_range(pl.len())).alias(ITEM_ID))
    blank = pl.DataFrame({ITEM_ID: [f"{prefix}-blank"], "title": ["zzyzx"]})
    pl.concat([looks, blank], how="diagonal").write_parquet(path)
    return path


@pytest.fixture
def run(small_run: Run, tmp_path: Path) -> Run:
    """A copy of the small run, to add to."""
    shutil.copytree(small_run.folder, tmp_path / "run")
    return open_run(tmp_path / "run")


@pytest.fixture(scope="module")
def grown(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the small run with seven items added; tests must not change it."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(small_run.folder, folder / "run")
    add_items(folder / "run", new_items(small_run, folder / "items.parquet"))
    return open_run(folder / "run")


def next_free(old: SemanticIds, prefixes: np.ndarray) -> list[int]:
    """The slow twin: item by item, the least last code that no item of the same codes has."""
    taken: dict[tuple[int, ...], set[int]] = {}
    for row in old.codes.tolist():
        taken.setdefault(tuple(row[:-1]), set()).add(row[-1])
    found = []
    for row in prefixes.tolist():
        used = taken.setdefault(tuple(row), set())
        found.append(next(code for code in range(10**6) if code not in used))
        used.add(found[-1])
    return found


# --- codes, vectors, trie --------------------------------------------------------------------------------------------


def test_old_codes_stay_and_new_items_get_the_next_free_last_code(small_run: Run, grown: Run) -> None:
    old, new = semantic_ids(small_run), semantic_ids(grown)
    assert new.codes.shape == (207, 3)
    assert (new.codes[:200] == old.codes).all()
    assert (new.vectors[:200] == old.vectors).all()
    assert (new.codebooks == old.codebooks).all()
    assert new.codes[200:, 2].tolist() == next_free(old, new.codes[200:, :2])
    assert new.is_unique
    assert (new.codes.max(axis=0)[:2] == old.codes.max(axis=0)[:2]).all()
    states = new.trie.walk(torch.from_numpy(new.codes).long())
    assert new.trie.item[states[:, -1]].tolist() == list(range(207))
    assert int(new.trie.size[ROOT]) == 207


@given(seed=st.integers(0, 1000), n=st.integers(1, 30), more=st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_last_codes_of_later_items_equal_the_slow_twin(seed: int, n: int, more: int) -> None:
    """What the stage relies on: ranked in order of arrival, later items come after the codes that a group has."""
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(0, 3, (n + more, 2)).astype(np.int32)
    codes = separate(prefixes[:n], rng.integers(0, 5, n))
    old = index_ids(codes=codes, vectors=np.zeros((n, 1)), codebooks=np.zeros((2, 3, 1)), trie=build_trie(codes))
    assert separate(prefixes, np.zeros(n + more))[n:, -1].tolist() == next_free(old, prefixes[n:])


def test_new_items_take_the_nearest_codes_in_use(small_run: Run, grown: Run) -> None:
    """The slow twin, level by level; and none of them is a code that the old items lack."""
    old, new = semantic_ids(small_run), semantic_ids(grown)
    filled = fill_collaborative(new.vectors[200:], old.vectors, small_run.manifest("semantic_ids").sizes["blocks"])
    for vector, codes in zip(filled, new.codes[200:], strict=True):
        residual = vector.astype(np.float64)
        for level, centroids in enumerate(old.codebooks):
            used = np.unique(old.codes[:, level])
            distances = ((residual - centroids[used]) ** 2).sum(1)
            assert distances[np.searchsorted(used, codes[level])] == pytest.approx(distances.min(), abs=1e-5)
            assert codes[level] in used
            residual = residual - centroids[codes[level]]


def test_items_that_look_alike_get_the_vectors_of_their_likes(small_run: Run, grown: Run) -> None:
    """Text and categories of items 0-5, to half precision; of the log what their likes have; the blank one nothing."""
    blocks = small_run.manifest("semantic_ids").sizes["blocks"]
    assert list(blocks) == ["text", "categories", "collaborative"]
    words = blocks["text"] + blocks["categories"]
    vectors = semantic_ids(grown).vectors
    assert vectors[200:206, :words] == pytest.approx(vectors[:6, :words], abs=2e-3)
    alike = np.zeros_like(vectors[200:])
    alike[:, :words] = vectors[200:, :words]
    expected = fill_collaborative(alike, semantic_ids(small_run).vectors, blocks)
    assert np.array_equal(vectors[200:], expected)
    assert (expected[:6, words:] != 0).any(axis=1).all()
    assert (vectors[206] == 0).all()


def test_filled_by_hand() -> None:
    """Words, then the log. Of the old items, the last has no events; 0, 1 and 2 are nearest to 1.1: blocks 3, 6 and 0.

    The second item has no words, so nothing is filled in; and neither where there is only one kind of block.
    """
    old = np.array([[1, 3, 0], [1, 6, 0], [2, 0, 3], [9, 9, 9], [1.1, 0, 0]], dtype=np.float32)
    new = np.array([[1.1, 0, 0], [0, 0, 0]], dtype=np.float32)
    filled = fill_collaborative(new, old, {"text": 1, "collaborative": 2})
    assert filled == pytest.approx(np.array([[1.1, 3, 1], [0, 0, 0]]))
    assert new.tolist() == [[pytest.approx(1.1), 0, 0], [0, 0, 0]]
    assert fill_collaborative(new, old[:1], {"text": 1, "collaborative": 2})[0].tolist() == pytest.approx([1.1, 3, 0])
    for blocks in ({"text": 3}, {"collaborative": 3}):
        assert (fill_collaborative(new, old, blocks) == new).all()


def test_projected_text_is_that_of_the_fit() -> None:
    """The SVD's own vectors again, for texts that it saw; words that it never saw count for nothing."""
    texts = [f"{a} {b} lipstick" for a in ("red", "blue", "green") for b in ("matte", "gloss", "matte matte", "")]
    fitted = embed_text(texts, dimensions=5, seed=0)
    assert project_text(texts, fitted.projection) == pytest.approx(fitted.vectors, abs=2e-3)
    assert project_text(["zzyzx quux", ""], fitted.projection).tolist() == [[0.0] * 5] * 2
    assert fitted.projection.components.dtype == np.float16


@pytest.mark.parametrize("quantiser", ["balanced-kmeans", "rq-vae", "shared"])
def test_every_quantiser_takes_new_items(quantiser: str, store_folder: Path, tmp_path: Path) -> None:
    """An item of the catalogue under another name and with its events forgotten; without a log, the very same codes."""
    chosen: dict[str, Any] = {"unique": False} if quantiser == "shared" else {"quantiser": quantiser}
    ids = replace(CHEAP, collaborative_weight=0.0, vae_epochs=3, vae_width=16, vae_latent=4, **chosen)
    run = prepare(store_folder, tmp_path / "run", SplitSettings())
    make_actions(run, ids)
    old = semantic_ids(run)
    added = add_items(run.folder, new_items(run, tmp_path / "items.parquet"))
    new = semantic_ids(open_run(run.folder))
    assert (new.codes[:200] == old.codes).all()
    if quantiser != "balanced-kmeans":  # its items are not all at the nearest centroid
        assert (new.codes[200:206, :2] == old.codes[:6, :2]).all()
        assert added["collisions"] >= 6
    if quantiser == "shared":
        assert int(new.trie.size[ROOT]) == len(np.unique(new.codes, axis=0))
        kept = sorted(i for i in new.trie.item.tolist() if 0 <= i < 200)
        assert kept == sorted(i for i in old.trie.item.tolist() if i >= 0)
    else:
        assert new.is_unique


# --- the policy ------------------------------------------------------------------------------------------------------


def test_grown_weights_by_hand() -> None:
    """Levels of 2 and 2 codes and 3 items become 2 and 4 codes and 5 items: two copies of the last row, two zeros."""
    shape = LazyDecoderSettings(width=4, heads=2, content=False, item_embedding=True)
    before = np.array([[0, 0], [0, 1], [1, 0]])
    after = np.array([[0, 0], [0, 1], [1, 0], [0, 2], [0, 3]])
    small, large = (LazyDecoder(shape, make_space(codes)) for codes in (before, after))
    weights = small.state_dict()
    grown = grow_weights(weights, large)
    for name in CODE_ROWS:
        assert torch.equal(grown[name][:4], weights[name])
        assert torch.equal(grown[name][4:], weights[name][3:].expand_as(grown[name][4:]))
    items = grown["item_embedding.weight"]
    assert torch.equal(items[:3], weights["item_embedding.weight"])
    assert items[3:].eq(0).all()
    large.load_state_dict(grown)
    assert all(torch.equal(value, weights[name]) for name, value in grow_weights(weights, small).items())


def test_the_policy_serves_on(small_run: Run, grown: Run) -> None:
    """Old items keep their odds, and the probabilities of the grown catalogue sum to one."""
    one, other = small_run.policy(device="cpu"), grown.policy(device="cpu")
    assert other.space.n_items == 207
    history, length = torch.tensor([[3, 1, 4]]), torch.tensor([3])
    with torch.no_grad():
        before, after = (exact_lists(policy, history, length, k=200, beams=250) for policy in (one, other))
        alone = exact_lists(other, history, length, k=207, beams=250)
    assert float(alone.logprobs.exp().sum()) == pytest.approx(1, abs=1e-4)
    # New items take their share from all others alike: the odds between two old items stay.
    kept = [dict(zip(x.items[0].tolist(), x.logprobs[0].tolist(), strict=True)) for x in (before, alone)]
    moved = np.array([kept[0][i] - kept[1][i] for i in range(200)])
    assert np.ptp(moved) < 1e-4
    assert moved.min() > 0
    assert {i for i in after.items[0].tolist() if i >= 200}


def test_new_items_are_recommended_and_read(grown: Run) -> None:
    recommender = load(grown.folder, device="cpu")
    everything = recommender.recommend(["new-0", grown.data.item_ids.external([5])[0]], k=500)
    assert len(everything) == 205
    assert {"new-1", "new-blank"} <= set(everything["item_id"])
    assert everything.filter(pl.col("item_id") == "new-1")["title"].item() == grown.data.titles([1])[0]


# --- the run's manifests --------------------------------------------------------------------------------------------


def hashes(run: Run) -> dict[str, str]:
    return run.hashes("dataset", "split", "semantic_ids", "policy")


def test_the_same_command_goes_on_with_the_grown_catalogue(run: Run, store_folder: Path, tmp_path: Path) -> None:
    """`sagerec run` on the original dataset neither drops the new items nor trains again; the report is a new one."""
    before = hashes(run)
    old = read_record(run.folder / "evaluation.json")
    add_items(run.folder, new_items(run, tmp_path / "items.parquet"))
    grown = hashes(open_run(run.folder))
    assert grown["dataset"] != before["dataset"]
    assert grown["semantic_ids"] != before["semantic_ids"]
    assert (grown["split"], grown["policy"]) == (before["split"], before["policy"])
    [report] = run_all(store_folder, run.folder, SMALL_RUN)
    assert hashes(open_run(run.folder)) == grown
    assert report["made_from"] == {name: grown[name] for name in ("policy", "semantic_ids")}
    assert report["made_from"] != old["made_from"]
    assert report["cases"] == old["cases"]
    assert evaluate(open_run(run.folder), SMALL_RUN.evaluate) == report
    again = open_run(run.folder)
    for name in ("dataset", "semantic_ids"):
        manifest = again.manifest(name)
        check_content(again.folder / name, manifest)
        assert manifest.grown_from == [before[name]]
        assert manifest.sizes["items"] == 207
    [added] = again.manifest("semantic_ids").sizes["added"]
    assert added["items"] == 7
    assert len(audit(again)) == 2


def test_items_can_be_added_again_and_other_ids_are_still_refused(run: Run, tmp_path: Path) -> None:
    first = hashes(run)
    for number in (1, 2):
        add_items(run.folder, new_items(run, tmp_path / "items.parquet", prefix=f"n{number}"))
    again = open_run(run.folder)
    assert again.data.n_items == 214
    assert len(again.manifest("semantic_ids").grown_from) == 2
    assert again.manifest("semantic_ids").grown_from[0] == first["semantic_ids"]
    assert again.policy(device="cpu").space.n_items == 214
    train(again, SMALL_POLICY, SMALL_TRAIN)
    assert hashes(again)["policy"] == first["policy"]
    make_actions(again, replace(CHEAP, seed=1))
    assert again.manifest("semantic_ids").grown_from == []
    with pytest.raises(ArtifactError, match="was trained on other Semantic IDs than those given; train it again"):
        again.policy()


def test_a_baseline_is_of_the_grown_catalogue(run: Run, tmp_path: Path) -> None:
    """Its report names the dataset, so one from before is not taken for one after."""
    before = evaluate_baseline(run, "popularity", SMALL_RUN.evaluate)
    add_items(run.folder, new_items(run, tmp_path / "items.parquet"))
    after = evaluate_baseline(open_run(run.folder), "popularity", SMALL_RUN.evaluate)
    assert before["made_from"]["dataset"] != after["made_from"]["dataset"]
    assert after["metrics"]["recall@10"] == before["metrics"]["recall@10"]
    assert after["metrics"]["coverage@10"]["value"] < before["metrics"]["coverage@10"]["value"]


def test_cut_short_it_goes_on_with_the_same_items(
    run: Run, grown: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset has the items and the Semantic IDs do not: nothing is read until the same call ends the work."""
    path = new_items(run, tmp_path / "items.parquet")
    with monkeypatch.context() as patch:
        stopped = replace(
            KINDS["semantic_ids"], write_addition=lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        patch.setitem(KINDS, "semantic_ids", stopped)
        with pytest.raises(KeyboardInterrupt):
            add_items(run.folder, path)
    half = open_run(run.folder)
    with pytest.raises(ArtifactError, match=r"holds 200 items and the dataset 207; .+ give it the same items again$"):
        half.space()
    with pytest.raises(ArtifactError, match="holds 200 items and the dataset 207"):
        add_items(run.folder, new_items(run, tmp_path / "others.parquet", prefix="other"))
    add_items(run.folder, path)
    assert (semantic_ids(open_run(run.folder)).codes == semantic_ids(grown).codes).all()
    assert hashes(open_run(run.folder)) == hashes(grown)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {ITEM_ID: ["a", "i00000003"], "title": ["A", "B"]},
            r"1 of 2 items are in the run already, the first 'i00000003' in row 1 \(from 0\)\. Drop these rows$",
        ),
        ({ITEM_ID: ["a"], "title": ["A"], "colour": ["red"]}, r"column 'colour' is not one of the items' \(item_id, "),
        ({ITEM_ID: ["a"]}, "column 'title' is missing"),
        ({ITEM_ID: ["a", "a"], "title": ["A", "B"]}, "column 'item_id' holds 'a' more than once"),
        ({ITEM_ID: ["a"], "title": [3]}, "column 'title' has type Int64, expected text"),
    ],
)
def test_items_that_cannot_be_added(run: Run, tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    before = hashes(run)
    pl.DataFrame(columns).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DatasetError, match=message):
        add_items(run.folder, tmp_path / "items.parquet")
    with pytest.raises(DatasetError, match=r"absent\.parquet is missing"):
        add_items(run.folder, tmp_path / "absent.parquet")
    assert hashes(open_run(run.folder)) == before


def test_without_its_projections_nothing_grows(run: Run, tmp_path: Path) -> None:
    """Refused before anything grows."""
    before = hashes(run)
    (run.folder / "semantic_ids" / "projections.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ArtifactError, match=r"projections\.safetensors cannot be read \(No such file"):
        add_items(run.folder, new_items(run, tmp_path / "items.parquet"))
    (tmp_path / "kept").rename(run.folder / "semantic_ids" / "projections.safetensors")
    assert hashes(open_run(run.folder)) == before


def test_from_the_command_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ids add RUN ITEMS`; and `ids RUN` is still the stage, also where it makes the IDs anew."""
    path = str(new_items(run, tmp_path / "items.parquet"))
    assert main(["ids", "add", str(run.folder), path]) == 0
    printed = capsys.readouterr().out
    assert "7 items added, " in printed
    assert "Semantic IDs: 207 for 207 items" in printed
    assert main(["ids", "add", str(run.folder), path]) == 0, "done is done"
    assert "7 items added, " in capsys.readouterr().out
    pl.read_parquet(path).with_columns(pl.lit("other").alias("title")).write_parquet(path)
    assert main(["ids", "add", str(run.folder), path]) == 1
    assert "7 of 7 items are in the run already" in capsys.readouterr().err
    assert main(["recommend", str(run.folder), "--history", "new-0", "-k", "3"]) == 0
    same = ["--levels", "2", "--codebook-size", "16", "--text-dimensions", "16", "--collaborative-dimensions", "16"]
    kept = open_run(run.folder).hashes("semantic_ids")
    assert main(["ids", str(run.folder), *same]) == 0
    assert open_run(run.folder).hashes("semantic_ids") == kept


def test_extra_files_and_the_source_of_a_dataset_stay(small_run: Run, grown: Run) -> None:
    """A simulated store has more files than two; and the manifest says still what the copy was made from."""
    names = {path.name for path in (small_run.folder / "dataset").iterdir()}
    assert {path.name for path in (grown.folder / "dataset").iterdir()} == names
    assert grown.manifest("dataset").made_from == small_run.manifest("dataset").made_from
    assert pl.read_parquet(grown.folder / "dataset" / ITEMS).head(200).equals(small_run.data.items)
    assert (grown.data.event_items == small_run.data.event_items).all()
