"""IDs that others made: reading MiniOneRec's forms, each fault by its message, and shared IDs from end to end."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagerec.actions.semantic_ids.build import SemanticIdSettings
from sagerec.actions.semantic_ids.existing import parse_id, read_existing
from sagerec.actions.space import make_space
from sagerec.actions.trie import ROOT
from sagerec.baselines.tuning import evaluate_baseline
from sagerec.catalogue.dataset import INTERACTIONS, ITEM_ID, ITEMS, Dataset, assemble, read_dataset, write_dataset
from sagerec.catalogue.splits import SplitSettings
from sagerec.decoding.beam import exact_lists
from sagerec.errors import ArtifactError, DatasetError, SettingsError
from sagerec.files import read_json
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings
from sagerec.run.folder import Run
from sagerec.run.stages import evaluate, make_actions, prepare, train
from tests.conftest import SMALL_POLICY, SMALL_RUN, SMALL_TRAIN, semantic_ids

EXISTING = SemanticIdSettings(quantiser="existing", text_weight=0.0, category_weight=0.0, collaborative_dimensions=8)


def catalogue(ids: list[Any]) -> Dataset:
    """Items i0, i1, … with these Semantic IDs."""
    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(len(ids))], "title": [""] * len(ids), "semantic_id": ids})
    return assemble(items, pl.DataFrame({"user_id": ["u"], "item_id": ["i0"], "timestamp": [0]}))


# --- reading --------------------------------------------------------------------------------------------------------


def test_the_column_and_the_index_file_say_the_same(tmp_path: Path) -> None:
    data = catalogue(["<a_236><b_231><c_226>", "<a_0><b_231><c_7>", "<a_236><b_231><c_226>"])
    expected = [[236, 231, 226], [0, 231, 7], [236, 231, 226]]
    assert read_existing(data, None).tolist() == expected
    index = {"i1": ["<a_0>", "<b_231>", "<c_7>"], "i0": ["<a_236>", "<b_231>", "<c_226>"], "other": ["<a_1>"]}
    (tmp_path / "index.json").write_text(json.dumps(index | {"i2": index["i0"]}))
    found = read_existing(data, tmp_path / "index.json")
    assert found.tolist() == expected
    assert found.dtype == np.int32


@given(codes=st.lists(st.integers(0, 32767), min_size=1, max_size=8))
def test_an_id_there_and_back(codes: list[int]) -> None:
    text = "".join(f"<{letter}_{code}>" for letter, code in zip("abcdefgh", codes, strict=False))
    assert parse_id(text, "here") == codes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "here has no Semantic ID; give it one, such as <a_236><b_231><c_226>"),
        ("", "here has no Semantic ID; give it one, such as <a_236><b_231><c_226>"),
        ("<a_1> <b_2>", "'<a_1> <b_2>'; expected tokens <a_…><b_…>… with a number each, at most 8"),
        ("<a_1><c_2>", "'<a_1><c_2>'; expected tokens"),
        ("<a_1><b_x>", "'<a_1><b_x>'; expected tokens"),
        ("<a_01>", None),
        ("1,2,3", "'1,2,3'; expected tokens"),
        ("<a_1><b_40000>", "here has the code 40000; expected at most 32767. Number the codes anew"),
    ],
)
def test_ids_that_cannot_be_read(text: str | None, message: str | None) -> None:
    if message is None:
        assert parse_id(text, "here") == [1]
        return
    with pytest.raises(DatasetError) as error:
        parse_id(text, "here")
    assert message in str(error.value)


@given(text=st.text(alphabet="<>ab_12 ", max_size=12))
def test_broken_ids_are_refused_with_a_clear_error(text: str) -> None:
    if re.fullmatch("<a_[12]{1,5}>(<b_[12]{1,5}>)?", text):
        assert max(parse_id(text, "here")) <= 22222
        return
    with pytest.raises(DatasetError, match=r"^here has "):
        parse_id(text, "here")


def test_catalogues_whose_ids_do_not_serve(tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    with pytest.raises(
        DatasetError, match=r"column 'semantic_id': item 'i1' has 1 codes, the first item 2; expected as"
    ):
        read_existing(catalogue(["<a_1><b_2>", "<a_1>"]), None)
    with pytest.raises(DatasetError, match="column 'semantic_id' has type Int64, expected text"):
        read_existing(catalogue([1, 2]), None)
    bare = catalogue(["", ""])
    bare = replace(bare, items=bare.items.drop("semantic_id"))
    with pytest.raises(DatasetError, match=r"no column 'semantic_id'.+ or give an index\.json with --ids\.existing"):
        read_existing(bare, None)
    index.write_text('{"x": ["<a_1>"]}')
    with pytest.raises(DatasetError, match=r"has no item 'i0', which the catalogue has; got 1 such as 'x'\. Name the"):
        read_existing(bare, index)
    index.write_text('{"i0": "<a_1>", "i1": ["<a_1>"]}')
    with pytest.raises(DatasetError, match=r"item 'i0' holds '<a_1>'; expected a list of tokens such as '<a_236>'"):
        read_existing(bare, index)
    index.write_text("[]")
    with pytest.raises(DatasetError, match=r"holds no JSON object with items; expected \{item_id: \['<a_236>', …\]\}"):
        read_existing(bare, index)
    with pytest.raises(ArtifactError, match=r"absent\.json is missing"):
        read_existing(bare, tmp_path / "absent.json")
    with pytest.raises(SettingsError, match=r"quantiser 'residual-kmeans'; expected quantiser 'existing' with it"):
        SemanticIdSettings(existing="index.json")


# --- shared IDs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_store(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated store with 40 IDs for its 200 items: five items of a row share one, codes 0-7 and 0-4."""
    folder = tmp_path_factory.mktemp("shared") / "dataset"
    data = read_dataset(store_folder)
    group = np.arange(data.n_items) // 5
    column = pl.Series("semantic_id", [f"<a_{g // 5}><b_{g % 5}>" for g in group])
    write_dataset(folder, data.items.with_columns(column), pl.read_parquet(store_folder / INTERACTIONS))
    return folder


@pytest.fixture(scope="module")
def shared_run(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = prepare(shared_store, tmp_path_factory.mktemp("run"), SplitSettings())
    make_actions(run, replace(EXISTING, unique=False))
    train(run, SMALL_POLICY, SMALL_TRAIN)
    return run


def test_a_policy_on_shared_ids_reports_three_views(shared_run: Run) -> None:
    """The slow twin reads the saved lists: if p IDs stand before the target's, it is at one of 5 p + 1 … 5 p + 5.

    So Recall@5 is the share of targets whose ID is first, in all views; at 4, the expected view has four fifths of it.
    """
    ids = semantic_ids(shared_run)
    assert not ids.is_unique
    assert int(ids.trie.size[ROOT]) == 40
    settings = replace(SMALL_RUN.evaluate, k=(4, 5, 10))
    metrics = evaluate(shared_run, settings, device="cpu")["metrics"]
    lists = pl.read_parquet(shared_run.folder / "evaluation.lists.parquet")
    found = np.stack(lists["items"].to_list())
    group, target = np.arange(200) // 5, lists["target"].to_numpy()
    first = [5 * np.flatnonzero(group[row] == group[t]) for row, t in zip(found, target, strict=True)]
    for k in (4, 5, 10):
        before = np.array([places[0] if len(places) else 10**6 for places in first])
        views = {
            "_optimistic": (before + 1 <= k).mean(),
            "_pessimistic": (before + 5 <= k).mean(),
            "": np.mean([[before + s <= k] for s in range(1, 6)]),
        }
        for tail, value in views.items():
            assert metrics[f"recall@{k}{tail}"]["value"] == pytest.approx(value)
        ndcg = [metrics[f"ndcg@{k}{tail}"]["value"] for tail in ("_pessimistic", "", "_optimistic")]
        assert ndcg == sorted(ndcg)
    assert metrics["recall@10"]["value"] > 0


def test_a_baseline_lists_items_not_ids(shared_run: Run) -> None:
    """So it has one view, and it is that of a run whose IDs are unique."""
    report = evaluate_baseline(shared_run, "popularity", SMALL_RUN.evaluate)
    assert not [name for name in report["metrics"] if "optimistic" in name]
    lists = pl.read_parquet(shared_run.folder / "evaluation-popularity.lists.parquet")
    hits = np.mean([t in row for row, t in zip(lists["items"].to_list(), lists["target"], strict=True)])
    assert report["metrics"]["recall@10"]["value"] == pytest.approx(hits)


def test_made_unique_they_get_a_last_code(shared_store: Path, shared_run: Run, tmp_path: Path) -> None:
    run = prepare(shared_store, tmp_path / "run", SplitSettings())
    make_actions(run, EXISTING)
    ids = semantic_ids(run)
    assert ids.is_unique
    assert (ids.codes[:, :2] == semantic_ids(shared_run).codes).all()
    assert sorted(ids.codes[:5, 2].tolist()) == [0, 1, 2, 3, 4]
    assert ids.codebooks.shape == (2, 8, 8)
    sizes = run.manifest("semantic_ids").sizes
    assert (sizes["collision_rate"], sizes["codes_in_use"]) == (1.0, [8, 5, 5])
    assert sizes["perplexity"] == pytest.approx([8, 5])


def test_an_index_file_is_part_of_what_the_ids_are_made_from(store_folder: Path, tmp_path: Path) -> None:
    """The same file: they fit. Another content under the same name: they are made again. No file: an error."""
    run, index = prepare(store_folder, tmp_path / "run", SplitSettings()), tmp_path / "index.json"
    items = pl.read_parquet(store_folder / ITEMS)[ITEM_ID].to_list()
    index.write_text(json.dumps({item: ["<a_1>", f"<b_{n % 7}>"] for n, item in enumerate(items)}))
    chosen = replace(EXISTING, existing=str(index))
    made = make_actions(run, chosen)
    assert make_actions(run, chosen).content_hash == made.content_hash
    index.write_text(json.dumps({item: ["<a_1>", f"<b_{n % 6}>"] for n, item in enumerate(items)}))
    again = make_actions(run, chosen)
    assert again.content_hash != made.content_hash
    assert [int(n) for n in semantic_ids(run).codes.max(axis=0) + 1][:2] == [2, 6]
    assert set(read_json(run.folder / "semantic_ids" / "manifest.json")["made_from"]) == {
        "dataset",
        "split",
        "existing",
    }
    index.unlink()
    with pytest.raises(ArtifactError, match=r"index\.json is missing; give the index\.json that holds the existing"):
        make_actions(run, chosen)


def test_excluded_items_that_share_an_id_bar_it_once() -> None:
    """Items 0 and 1 share (0, 0); 2 is (0, 1), 3 is (1, 0). Without 0 and 1, both 2 and 3 are left, and no other."""
    space = make_space(np.array([[0, 0], [0, 0], [0, 1], [1, 0]]), listed=np.array([0, 2, 3]))
    torch.manual_seed(0)
    policy = LazyDecoder(LazyDecoderSettings(width=8, heads=2, content=False, cooccurrence=False), space).eval()
    history, excluded = torch.tensor([[3]]), torch.tensor([[0, 1]])
    lists = exact_lists(policy, history, torch.tensor([1]), k=3, excluded=excluded)
    assert sorted(lists.items[0].tolist()) == [-1, 2, 3]
