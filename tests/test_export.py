"""Exports: what a peer reads, by hand; and what comes back is the same log under the same split."""

import ast
import csv
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sagerec.catalogue.dataset import Dataset, read_dataset, write_dataset
from sagerec.catalogue.export import ExportSettings, export_dataset
from sagerec.catalogue.formats.importer import import_dataset
from sagerec.catalogue.splits import Split, SplitSettings, make_split
from sagerec.cli import main
from sagerec.errors import DatasetError
from sagerec.run.folder import Run
from tests.conftest import semantic_ids

EVENTS = [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("u", "a", 4), ("v", "c", 1), ("w", "b", 1), ("w", "c", 2)]


def small(folder: Path, **columns: Any) -> tuple[Dataset, Split]:
    """Leave-one-out: u trains on a b, validates on c, tests on a; v and w only train."""
    items = pl.DataFrame(
        {
            "item_id": ["a", "b", "c"],
            "title": ["A\tone", None, 'C "x", y'],
            "categories": [["Shave & Hair", "x,y"], [], None],
            "price": [1.5, None, 2.0],
        },
        schema_overrides={"categories": pl.List(pl.String)},
    )
    events = pl.DataFrame(EVENTS, schema=["user_id", "item_id", "timestamp"], orient="row").with_columns(**columns)
    write_dataset(folder / "data", items, events)
    data = read_dataset(folder / "data")
    return data, make_split(data, SplitSettings())


def test_recbole_by_hand(tmp_path: Path) -> None:
    """Rows of train: u a -> b and w b -> c; v's only event is a target nowhere."""
    data, split = small(tmp_path, rating=pl.lit(5.0), note=pl.lit("x"))
    assert export_dataset(tmp_path / "peer", data, split, ExportSettings()) == {"train": 2, "valid": 1, "test": 1}
    place = tmp_path / "peer" / "peer"
    head = "user_id:token\titem_id_list:token_seq\titem_id:token\ttimestamp:float\n"
    assert (place / "peer.train.inter").read_text() == head + "u\ta\tb\t2\nw\tb\tc\t2\n"
    assert (place / "peer.valid.inter").read_text() == head + "u\ta b\tc\t3\n"
    assert (place / "peer.test.inter").read_text() == head + "u\ta b c\ta\t4\n"
    log = (place / "peer.inter").read_text().splitlines()
    assert log[0] == "user_id:token\titem_id:token\ttimestamp:float\trating:float\tsplit:token"
    assert log[4] == "u\ta\t4\t5.0\ttest"
    assert (place / "peer.item").read_text().splitlines() == [
        "item_id:token\ttitle:token_seq\tprice:float\tcategories:token_seq",
        "a\tA one\t1.5\tShave_&_Hair x_y",
        "b\t\t\t",
        'c\tC "x", y\t2.0\t',
    ]
    assert "benchmark_filename: [train, valid, test]" in (tmp_path / "peer" / "peer.yaml").read_text()


def test_histories_are_cut_from_the_left(tmp_path: Path) -> None:
    data, split = small(tmp_path)
    export_dataset(tmp_path / "peer", data, split, ExportSettings(max_history=2))
    assert "u\tb c\ta\t4\n" in (tmp_path / "peer" / "peer" / "peer.test.inter").read_text()


def test_dates_become_seconds(tmp_path: Path) -> None:
    times = pl.Series("timestamp", [datetime(1970, 1, 1, 0, 0, row[2]) for row in EVENTS])
    data, split = small(tmp_path, timestamp=times)
    export_dataset(tmp_path / "peer", data, split, ExportSettings())
    assert (tmp_path / "peer" / "peer" / "peer.test.inter").read_text().endswith("\ta\t4.0\n")


def test_ids_with_spaces_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    data, split = small(tmp_path, user_id=pl.Series([f"{row[0]} x" for row in EVENTS]))
    with pytest.raises(DatasetError, match="user_id 'u x' is empty or holds a space, at which RecBole separates ids"):
        export_dataset(tmp_path / "peer", data, split, ExportSettings())
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_minionerec_by_hand(tmp_path: Path) -> None:
    """Items by index, a 0, b 1, c 2; b has no title and is called by its id."""
    data, split = small(tmp_path)
    tokens = [["<a_1>", "<b_0>"], ["<a_1>", "<b_1>"], ["<a_9>", "<b_0>"]]
    export_dataset(tmp_path / "peer", data, split, ExportSettings(format="minionerec"), semantic_ids=tokens)
    with (tmp_path / "peer" / "test" / "peer.csv").open(encoding="utf-8", newline="") as file:
        [row] = csv.DictReader(file)
    assert {key: ast.literal_eval(value) if "[" in value else value for key, value in row.items()} == {
        "user_id": "u",
        "history_item_title": ["A\tone", "b", 'C "x", y'],
        "item_title": "A\tone",
        "history_item_id": [0, 1, 2],
        "item_id": "0",
        "history_item_sid": ["<a_1><b_0>", "<a_1><b_1>", "<a_9><b_0>"],
        "item_sid": "<a_1><b_0>",
    }
    assert json.loads((tmp_path / "peer" / "peer.index.json").read_text())["2"] == ["<a_9>", "<b_0>"]
    assert json.loads((tmp_path / "peer" / "peer.item.json").read_text())["0"]["categories"] == "Shave & Hair,x,y"
    assert (tmp_path / "peer" / "info" / "peer.txt").read_text().splitlines()[0] == "<a_1><b_0>\tA one\t0"
    assert (tmp_path / "peer" / "peer.item2id").read_text() == "a\t0\nb\t1\nc\t2\n"
    assert (tmp_path / "peer" / "peer.valid.inter").read_text().endswith("item_id:token\n0\t0 1\t2\n")


def test_minionerec_without_ids_has_what_its_quantiser_needs(tmp_path: Path) -> None:
    data, split = small(tmp_path)
    export_dataset(tmp_path / "peer", data, split, ExportSettings(format="minionerec"))
    assert sorted(p.name for p in (tmp_path / "peer").iterdir()) == [
        "manifest.json",
        "peer.item.json",
        "peer.item2id",
        "peer.test.inter",
        "peer.train.inter",
        "peer.user2id",
        "peer.valid.inter",
    ]


@pytest.mark.parametrize("reserve", ["none", "event"])
def test_recbole_comes_back_with_the_same_split(store_folder: Path, tmp_path: Path, reserve: Any) -> None:
    data = read_dataset(store_folder)
    split = make_split(data, SplitSettings(reserve=reserve))
    export_dataset(tmp_path / "peer", data, split, ExportSettings())
    import_dataset("recbole", [tmp_path / "peer"], tmp_path / "back")
    back = read_dataset(tmp_path / "back")
    assert np.array_equal(make_split(back, SplitSettings()).parts, split.parts)
    assert back.events.select("user_id", "item_id", "timestamp").equals(
        data.events.select("user_id", "item_id", "timestamp")
    )
    assert back.items["title"].equals(data.items["title"])


def test_minionerec_of_a_run_comes_back_with_the_same_split(small_run: Run, tmp_path: Path) -> None:
    """Items come back as indices; every user of the store has more than one event, so none is lost."""
    assert main(["export", str(small_run.folder), "--out", str(tmp_path / "peer"), "--format", "minionerec"]) == 0
    import_dataset("minionerec", [tmp_path / "peer"], tmp_path / "back")
    back, data = read_dataset(tmp_path / "back"), small_run.data
    assert np.array_equal(back.event_items, data.event_items)
    assert np.array_equal(back.event_users, data.event_users)
    assert np.array_equal(make_split(back, SplitSettings()).parts, small_run.split.parts)
    first = semantic_ids(small_run).codes[0].tolist()
    assert back.items["semantic_id"][0] == "".join(f"<{'abcdefgh'[k]}_{code}>" for k, code in enumerate(first))
