"""RecBole's atomic files, MiniOneRec's, and plain tables, on files of the real shape."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from sagerec.artifacts import read_manifest
from sagerec.catalogue.formats.delimited import ABOUT_ENCODINGS, ABOUT_QUOTES
from sagerec.catalogue.formats.table import TableColumns
from sagerec.catalogue.formats.times import EXPECTED
from sagerec.catalogue.formats.writer import ImportSettings
from tests.test_formats import SKIP, error_of, imported

STRICT = ImportSettings()


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- RecBole --------------------------------------------------------------------------------------------------------

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"


def test_recbole_atomic_files(tmp_path: Path) -> None:
    """As in ml-100k: a quote in a title is a character like any other, and the classes stand between spaces."""
    inter = write(tmp_path / "ml.inter", INTER + "196\t242\t3\t881250949\n186\t302\t3.5\t891717742\n196\t302\t\t5\n")
    item = write(tmp_path / "ml.item", ITEM + "242\tToy \"Story\t1995\tAnimation Children's\n302\t\t\t\n9\tX\t\tA B\n")
    data, figures = imported("recbole", inter, item, settings=STRICT)
    assert data.events.rows() == [
        ("186", "302", 891717742, 3.5),
        ("196", "302", 5, None),
        ("196", "242", 881250949, 3.0),
    ]
    assert data.items.rows() == [
        ("242", 'Toy "Story', ["Animation", "Children's"]),
        ("302", None, []),
        ("9", "X", ["A", "B"]),
    ]
    assert (figures["feedback"], figures["items_without_events"]) == (["rating"], 1)


def test_recbole_folders_with_sequences_beside(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "x.inter", INTER + "u\ti\t1\t2\n")
    write(folder / "x.train.inter", "user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta b\tc\n")
    data, _ = imported("recbole", folder)
    assert data.n_events == 1
    (folder / "x.inter").unlink()
    assert error_of("recbole", folder) == (
        "no .inter file with one event a row: those there are (x.train.inter) hold whole sequences. Give the plain "
        ".inter file, and the .item file"
    )


def test_recbole_without_a_timestamp(tmp_path: Path) -> None:
    inter = write(tmp_path / "x.inter", "user_id:token\titem_id:token\nu\ti\n")
    assert error_of("recbole", inter) == (
        f"{inter}: column 'timestamp:token' is missing; got user_id:token, item_id:token. Rename or add it"
    )


# --- MiniOneRec -----------------------------------------------------------------------------------------------------

HEADER = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"


def row(user: str, history: list[int], target: int) -> str:
    titles = str([f"t, {i}" for i in history]).replace('"', '""')
    return f'{user},"{titles}",t{target},"{history}",{target},"{[f"<a_{i}>" for i in history]}",<a_{target}>\n'


def minionerec(folder: Path, train: str, valid: str, test: str) -> Path:
    for part, text in (("train", train), ("valid", valid), ("test", test)):
        write(folder / part / "Industrial_5_2016-10-2018-11.csv", HEADER + text)
    items = {str(i): {"title": f"Item {i}", "description": "d", "brand": "b", "categories": "A, B"} for i in range(6)}
    write(folder / "Industrial.item.json", json.dumps(items))
    write(folder / "Industrial.index.json", json.dumps({str(i): [f"<a_{i}>", "<b_0>", "<c_7>"] for i in range(6)}))
    return folder


def test_minionerec_puts_the_sequences_together(tmp_path: Path) -> None:
    """A1: 0 1 2 3 | 4 | 5 from sliding rows, of which one is missing. A2: the test row's history is new after 3."""
    train = row("A1", [0], 1) + row("A1", [0, 1, 2], 3) + row("A2", [5], 3)
    folder = minionerec(tmp_path / "m", train, row("A1", [1, 2, 3], 4), row("A1", [2, 3, 4], 5) + row("A2", [3, 0], 1))
    data, figures = imported("minionerec", folder, settings=STRICT)
    assert data.events.rows() == [
        ("A1", "0", 0, "train"),
        ("A1", "1", 1, "train"),
        ("A1", "2", 2, "train"),
        ("A1", "3", 3, "train"),
        ("A1", "4", 4, "valid"),
        ("A1", "5", 5, "test"),
        ("A2", "5", 0, "train"),
        ("A2", "3", 1, "train"),
        ("A2", "0", 2, "train"),
        ("A2", "1", 3, "test"),
    ]
    assert data.items["semantic_id"].to_list() == [f"<a_{i}><b_0><c_7>" for i in range(6)]
    assert data.items["categories"].to_list() == [["A", "B"]] * 6
    assert figures["items_without_events"] == 0


def test_minionerec_faults(tmp_path: Path) -> None:
    folder = minionerec(tmp_path / "m", row("A1", [0], 1), row("A1", [0, 1], 2), row("A1", [1, 2], 3))
    path = folder / "valid" / "Industrial_5_2016-10-2018-11.csv"
    write(path, HEADER + "A1,\"['t']\",t2,__import__('os'),2,\"['<a_0>']\",<a_2>\n")
    assert error_of("minionerec", folder) == (
        f"{path}: line 2: wrong type: 'history_item_id' is \"__import__('os')\"; expected a list of item ids. "
        "Mend it, or leave such rows out with --skip-bad-rows"
    )
    _, figures = imported("minionerec", folder, settings=SKIP)
    assert figures["bad_rows_by_reason"] == {"wrong type": 1}
    write(path, HEADER)
    (folder / "Industrial.item.json").write_text("[]")
    assert error_of("minionerec", folder).endswith("holds a list, expected an object from item id to its content")
    (folder / "Industrial.item.json").unlink()
    assert error_of("minionerec", folder).startswith("3 .csv, 0 .item.json and 1 .index.json files are given; expected")
    other = write(tmp_path / "n" / "rows.csv", HEADER)
    write(tmp_path / "n" / "x.item.json", "{}")
    assert error_of("minionerec", tmp_path / "n") == (
        f"{other}: neither the folder nor the file says train, valid or test; expected a name such as train/NAME.csv"
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_csv_with_named_columns(tmp_path: Path) -> None:
    """Quoted cells hold commas, quotes and newlines; `watch_seconds` is known, `price_paid` is asked for."""
    log = write(
        tmp_path / "log.csv",
        "who;what;when;watch_seconds;price_paid;ignored\r\n"
        'u;"a;1";2024-01-31T12:00:00Z;12.5;3;x\r\n'
        '"v ""x""";b;2024-01-31 13:00:00;;4\r\n'
        'u;b;2024-01-30;1;5;"two\nlines"\r\n',
    )
    items = write(tmp_path / "items.csv", 'what;name;tags\n"a;1";Ämne;x|y z\nb;;\n')
    columns = TableColumns(
        user="who", item="what", time="when", title="name", categories="tags", separator=";", feedback=("price_paid",)
    )
    data, figures = imported("table", log, items, settings=STRICT, columns=columns)
    assert data.events.drop("timestamp").rows() == [
        ("u", "b", 5.0, 1.0),
        ("u", "a;1", 3.0, 12.5),
        ('v "x"', "b", 4.0, None),
    ]
    assert data.events["timestamp"].dt.strftime("%d %H").to_list() == ["30 00", "31 12", "31 13"]
    assert data.items.rows() == [("a;1", "Ämne", ["x", "y z"]), ("b", None, [])]
    assert figures["feedback"] == ["price_paid", "watch_seconds"]
    manifest = read_manifest(tmp_path / "out", "dataset")
    assert manifest.sizes["feedback"] == ["price_paid", "watch_seconds"]
    assert manifest.settings["columns"]["user"] == "who"


@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_parquet_tables(tmp_path: Path, zone: str | None) -> None:
    """Types of their own: times with a zone become UTC, a boolean 0 or 1, a list of categories stays one."""
    times = pl.datetime_range(pl.datetime(2024, 7, 1), pl.datetime(2024, 7, 1, 1), "1h", eager=True).alias("timestamp")
    table = pl.DataFrame({"user_id": [7, 8], "item_id": [1, 2], "click": [True, None], "split": ["train", "test"]})
    table = table.with_columns(times.dt.replace_time_zone(zone))
    table.write_parquet(tmp_path / "log.parquet")
    pl.DataFrame({"item_id": [2, 1], "title": ["B", "A"], "categories": [["x", "y"], []]}).write_parquet(
        tmp_path / "items.parquet"
    )
    data, _ = imported("table", tmp_path / "log.parquet", tmp_path / "items.parquet", settings=STRICT)
    assert data.events.select("user_id", "item_id", "split", "click").rows() == [
        ("7", "1", "train", 1.0),
        ("8", "2", "test", None),
    ]
    assert data.events["timestamp"].dt.hour().to_list() == ([0, 1] if zone is None else [22, 23])
    assert data.items["categories"].to_list() == [["x", "y"], []]


def test_a_log_alone_makes_items_of_what_it_names(tmp_path: Path) -> None:
    log = write(tmp_path / "log.tsv", "user_id\titem_id\ttimestamp\nu\tb\t1.5\nu\ta\t2\n")
    data, figures = imported("table", log, settings=STRICT)
    assert data.items.rows() == [("b", None), ("a", None)]
    assert data.events["timestamp"].to_list() == [1.5, 2.0]
    assert (figures["items_without_text"], figures["unknown_items"]) == (2, 0)


LOG = "user_id,item_id,timestamp,rating\n"
CSV_FAULTS: list[tuple[str, str]] = [
    ("u,a,1,5\nu,b\n", "line 3: missing value: 'timestamp' is missing or empty"),
    ("u,a,1,5\n\n ,b,2,5\n", "line 4: missing value: 'user_id' is missing or empty"),
    ("u,a,1,5\nu,b,2,5,6\n", "line 3: broken line: 5 cells, the header has 4"),
    (
        "u,a,soon,5\n",
        f"line 2: wrong type: 'timestamp' is 'soon'; expected {EXPECTED}",
    ),
    (
        "u,a,2024-01-01,5\nu,b,7,5\n",
        "line 3: wrong type: 'timestamp' is '7'; expected times all of one kind, numbers or dates",
    ),
    (
        'u,"a\nb",1,5\nu,"c" d,1,5\n',
        f"line 4: broken line: the quote (\") that opens in line 4 closes before ' '; {ABOUT_QUOTES}",
    ),
]


@pytest.mark.parametrize(("rows", "fault"), CSV_FAULTS)
def test_a_bad_row_is_named_and_can_be_left_out(tmp_path: Path, rows: str, fault: str) -> None:
    log = write(tmp_path / "log.csv", LOG + rows + "z,z,3,1\n" if "2024" not in rows else LOG + rows)
    assert error_of("table", log) == f"{log}: {fault}. Mend it, or leave such rows out with --skip-bad-rows"
    _, figures = imported("table", log, settings=SKIP)
    assert figures["bad_rows"] == 1
    assert figures["interactions"] == figures["rows_read"] - 1


def test_bad_rows_of_a_parquet_file(tmp_path: Path) -> None:
    table = pl.DataFrame({"user_id": ["u", None, "v"], "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]})
    table.write_parquet(tmp_path / "log.parquet")
    assert error_of("table", tmp_path / "log.parquet") == (
        f"{tmp_path}/log.parquet: row 2: missing value: 'user_id' is missing or empty. "
        "Mend it, or leave such rows out with --skip-bad-rows"
    )
    _, figures = imported("table", tmp_path / "log.parquet", settings=SKIP)
    assert (figures["interactions"], figures["bad_rows"]) == (2, 1)
    pl.DataFrame({"user_id": [[1]], "item_id": [1], "timestamp": [1]}).write_parquet(tmp_path / "log.parquet")
    assert error_of("table", tmp_path / "log.parquet").endswith(
        "column 'user_id' has type List(Int64), expected text or integers. Cast it"
    )
    table.clear().write_parquet(tmp_path / "log.parquet")
    assert error_of("table", tmp_path / "log.parquet").endswith("log.parquet has no row; expected at least one")


FILE_FAULTS: list[tuple[bytes, str]] = [
    (b"", "is empty; expected at least one line. Get it again, or leave it out"),
    (LOG.encode(), "log.csv: no row can be used; expected at least one event"),
    (
        b"user_id,thing,timestamp\nu,a,1\n",
        "column 'item_id' is missing; got user_id, thing, timestamp. Give its name in the file with --columns.…, what "
        "stands between cells (now ',') with --columns.separator, or the names of all columns, where the first line "
        "is a row, with --columns.header",
    ),
    (LOG.encode("utf-16"), "is UTF-16 text; expected UTF-8. Convert it, for example with: iconv -f UTF-16 -t UTF-8"),
    (
        b"\xff\x00,\n",
        f"the first line names no columns: not UTF-8 (invalid start byte); {ABOUT_ENCODINGS}. Expected a header line",
    ),
]


@pytest.mark.parametrize(("content", "fault"), FILE_FAULTS)
def test_faults_of_a_whole_file(tmp_path: Path, content: bytes, fault: str) -> None:
    log = write(tmp_path / "log.csv", content)
    assert error_of("table", log).endswith(fault)


def test_three_files_are_not_a_log_and_items(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", LOG)
    assert error_of("table", log, log, log) == (
        "3 files are given; expected the log, or the log and the items, in this order"
    )


def test_an_unknown_part(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp,split\nu,a,1,train\nu,b,2,dev\n")
    assert "line 3: wrong type: 'split' is 'dev'; expected train, align, valid or test" in error_of("table", log)


def test_dates_in_one_file_and_numbers_in_the_other(tmp_path: Path) -> None:
    one = write(tmp_path / "x.inter", INTER + "u\ti\t1\t2\n")
    two = write(tmp_path / "y.inter", INTER + "u\ti\t1\t2024-01-01\n")
    assert error_of("recbole", one, two) == (
        "the times are numbers in some rows and dates in others; write them in one way"
    )


def test_columns_are_found_in_any_order(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "timestamp,rating,item_id,user_id\n1,5,a,u\n")
    data, _ = imported("table", log)
    rows: list[Any] = data.events.select("user_id", "item_id", "timestamp", "rating").rows()
    assert rows == [("u", "a", 1, 5.0)]


def test_true_and_false_are_feedback(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp,click,like\nu,a,1,True,1\nu,b,2,false,0\nu,c,3,,\n")
    data, _ = imported("table", log)
    assert data.events.select("click", "like").rows() == [(1.0, 1.0), (0.0, 0.0), (None, None)]
