"""`sagerec import recif`, on tables written by hand, and its rewards."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from sagerec.actions.semantic_ids.build import SemanticIdSettings, build_semantic_ids
from sagerec.artifacts import read_manifest
from sagerec.catalogue.dataset import Dataset, read_dataset
from sagerec.catalogue.formats import recif
from sagerec.catalogue.formats.importer import import_dataset
from sagerec.catalogue.formats.writer import ImportSettings
from sagerec.catalogue.splits import SplitSettings, make_split
from sagerec.errors import DatasetError, SettingsError
from sagerec.training.feedback import gather_facts, gather_feedback

WIDE: dict[str, Any] = {
    "uid": [7, 8, 9],
    "split": [0, 0, 1],
    "hist_video_pid": [[1, 2, 3], [2, 99], [1]],
    "hist_video_longview": [[1, 0, 1], [1, 0], [1]],
    "hist_video_like": [[0, 0, 1], [1], [1]],  # user 8: another length
    "hist_video_not_interested": [[0, 1, 0], None, [1]],
    "target_video_pid": [[3, 2, 1], [3], [2]],
    "target_video_longview": [[1, 1, 0], [0], [1]],
    "target_video_like": [[1, 0, 0], [1], [1]],
    "hist_ad_pid": [[4], [], None],
    "target_ad_pid": [[1, 4], None, [4]],
    "hist_goods_pid": [None, [1], None],
    "target_goods_pid": [None, [2], None],
}
MAP = {"pid": [1, 2, 3, 4, 5, 2], "sid": [[1, 1, 1], [9, 9, 9], [3, 3, 3], [3, 3, 3], [5, 5, 5], [2, 2, 2]]}
PRODUCTS = {"pid": [1, 2], "sid": [[7, 7, 7], [7, 7, 8]]}


def write_source(folder: Path, wide: dict[str, Any] | None = None, caption: str = "dense_caption") -> Path:
    folder.mkdir(exist_ok=True)
    pl.DataFrame(wide or WIDE, strict=False).write_parquet(folder / recif.WIDE)
    pl.DataFrame(MAP).write_parquet(folder / recif.VIDEO_MAP)
    pl.DataFrame(PRODUCTS).write_parquet(folder / recif.PRODUCT_MAP)
    texts = pl.DataFrame({"pid": [1, 2, 99], caption: ["一个女孩在吃饭。很香", "  ", "无"]})
    texts.write_parquet(folder / recif.CAPTIONS)
    return folder


def imported(folder: Path, **settings: Any) -> tuple[Dataset, dict[str, Any]]:
    figures = import_dataset("recif", [folder], folder.parent / "data", ImportSettings(**settings))
    return read_dataset(folder.parent / "data"), figures


def events_of(data: Dataset, user: str) -> list[tuple[Any, ...]]:
    chosen = data.events.filter(pl.col("user_id") == user)
    return chosen.select("item_id", "timestamp", "split", "longview", "like", "dislike").rows()


def test_three_domains_by_hand(tmp_path: Path) -> None:
    data, figures = imported(write_source(tmp_path / "source"))
    assert events_of(data, "7") == [
        ("v1", 0, "train", 1, 0, 0),
        ("v2", 1, "train", 0, 0, 1),
        ("v3", 2, "train", 1, 1, 0),
        ("v3", 3, "align", 1, 1, None),
        ("v2", 4, "valid", 1, 0, None),
        ("v1", 5, "test", 0, 0, None),
    ]
    # 99 has no Semantic ID; the likes of user 8 are not as long as the pids, so they are unknown
    assert events_of(data, "8") == [("v2", 0, "train", 1, None, None), ("v3", 1, "test", 0, 1, None)]
    assert events_of(data, "7/ad") == [
        ("v4", 0, "train", None, None, None),
        ("v1", 1, "valid", None, None, None),
        ("v4", 2, "test", None, None, None),
    ]
    assert [e[:3] for e in events_of(data, "8/product")] == [("p1", 0, "train"), ("p2", 1, "test")]
    assert data.items.rows() == [
        ("v1", "一个女孩在吃饭", "一个女孩在吃饭。很香", "<a_1><b_1><c_1>"),
        ("v3", None, None, "<a_3><b_3><c_3>"),
        ("v4", None, None, "<a_3><b_3><c_3>"),  # shared, and stays so
        ("v2", None, None, "<a_2><b_2><c_2>"),  # the last of its two
        ("p1", None, None, "<a_7><b_7><c_7>"),
        ("p2", None, None, "<a_7><b_7><c_8>"),
    ]
    assert figures == {
        "rows_without_uid": 0,
        "repeated_uids": 0,
        "null_pids": 0,
        "pids_without_sid": 1,
        "events_without_sid": 1,
        "pids_with_several_sids": 1,
        "shared_sids": 1,
        "masks_of_another_length": 1,
        "columns_absent": [
            "hist_video_follow", "hist_video_forward",
            "target_video_follow", "target_video_forward", "target_video_not_interested",
        ],
        "users": 4,
        "interactions": 13,
        "test_users": 1,
        "items": 6,
        "items_without_text": 5,
    }  # fmt: skip
    assert read_manifest(tmp_path / "data", "dataset").sizes["shared_sids"] == 1
    assert not (tmp_path / "data" / ".parts").exists()


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    whole, figures = imported(source)
    monkeypatch.setattr(recif, "BLOCK_USERS", 1)
    parts, of_parts = imported(source)
    assert parts.events.equals(whole.events)
    assert parts.items.equals(whole.items)
    assert of_parts == figures


def test_bad_rows_are_counted(tmp_path: Path) -> None:
    wide = {
        "uid": [7, None, 8, 7],
        "split": [0, 0, 5, 0],
        "hist_video_pid": [[1, None, 2]] * 4,
        "target_video_pid": [[3]] * 4,
    }
    data, figures = imported(write_source(tmp_path / "source", wide, caption="caption"))
    assert [e[0] for e in data.events.select("item_id").rows()] == ["v1", "v2", "v3"]
    assert (figures["rows_without_uid"], figures["repeated_uids"], figures["null_pids"]) == (2, 1, 1)
    assert data.items["title"].to_list()[0] == "一个女孩在吃饭"


def test_all_items_of_the_maps(tmp_path: Path) -> None:
    data, figures = imported(write_source(tmp_path / "source"), items="all")
    assert figures["items"] == 7
    assert "v5" in data.items["item_id"]


def test_what_cannot_be_imported(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    with pytest.raises(SettingsError, match="k_core is 5, which the format recif does not read; leave it out"):
        imported(source, k_core=5)
    path = source / recif.WIDE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="cannot be read as Parquet"):
        imported(source)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{recif.WIDE} is not among the files"):
        imported(source)
    write_source(source, {"uid": [1], "hist_video_pid": [[1]]})
    with pytest.raises(DatasetError, match="column 'split' is missing; got uid, hist_video_pid"):
        imported(source)
    write_source(source, {"uid": [1], "split": [1], "hist_video_pid": [[1]]})
    with pytest.raises(DatasetError, match="no event of a training user is left"):
        imported(source)
    assert not (tmp_path / "data").exists()


def test_feedback_is_a_reward_each(tmp_path: Path) -> None:
    """User 7's reserved event is v3, watched long and liked: those rewards pay on v3 alone, dislike and forward not."""
    wide = WIDE | {"target_video_forward": [[0, 0, 0], [0], [0]]}
    data, _ = imported(write_source(tmp_path / "source", wide))
    split = make_split(data, SplitSettings())
    train = split.sequences(data, "train")
    settings = SemanticIdSettings(
        quantiser="existing", unique=False, text_dimensions=2, collaborative_dimensions=2, category_dimensions=2
    )
    space = build_semantic_ids(tmp_path / "ids", data, train, settings, made_from={})
    assert space.n_sequences == 5
    facts = gather_facts(data, split, space, clusters="first-code", cold_max_count=5)
    cases = split.cases(data, "align")
    names = ["longview", "like", "dislike", "forward"]
    feedback = gather_feedback(data, split, cases, None, names, facts)
    v3, v1 = data.item_ids.index(["v3", "v1"]).tolist()
    history, lengths = cases.histories(np.array([0]), 10)
    slates, targets = torch.tensor([[[v3], [v1]]]), torch.tensor([v3])
    found = feedback.answers(np.array([0]), history, lengths, slates=slates, targets=targets)
    assert {name: found[name].flatten().tolist() for name in names} == {
        "longview": [1.0, 0.0], "like": [1.0, 0.0], "dislike": [0.0, 0.0], "forward": [0.0, 0.0]
    }  # fmt: skip


def test_watch_time_where_a_table_has_it(tmp_path: Path) -> None:
    """The dataset takes seconds and lengths, which the reward `watch` ranks among videos of like length."""
    wide = WIDE | {
        f"{side}_video_{name}": [[float(10 * i + n) for i in range(len(pids))] for pids in WIDE[f"{side}_video_pid"]]
        for side in ("hist", "target")
        for n, name in enumerate(("watch_seconds", "duration_seconds"), 5)
    }
    data, _ = imported(write_source(tmp_path / "source", wide))
    seven = data.events.filter(pl.col("user_id") == "7")
    assert seven["watch_seconds"].to_list() == [5.0, 15.0, 25.0, 5.0, 15.0, 25.0]
    assert seven["duration_seconds"].to_list() == [6.0, 16.0, 26.0, 6.0, 16.0, 26.0]
