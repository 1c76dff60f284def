"""Importers on files of the real shape, as the publishers have them, faults included; every figure worked by hand."""

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from sagerec.artifacts import read_manifest
from sagerec.catalogue.dataset import INTERACTIONS, Dataset, read_dataset
from sagerec.catalogue.formats.importer import Format, import_dataset
from sagerec.catalogue.formats.source import clean_list, clean_price, clean_text
from sagerec.catalogue.formats.table import TableColumns
from sagerec.catalogue.formats.writer import ImportSettings
from sagerec.errors import DatasetError, SettingsError

KEEP = ImportSettings(unknown_items="keep")
SKIP = ImportSettings(skip_bad_rows=True)


def put(path: Path, lines: list[Any], *, dump: Any = json.dumps, end: str = "\n") -> Path:
    """One object a line; compressed where the name ends in .gz."""
    text = "".join((line if isinstance(line, str) else dump(line)) + end for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def imported(
    name: Format, *sources: Path, settings: ImportSettings = KEEP, **more: Any
) -> tuple[Dataset, dict[str, Any]]:
    out = sources[0].parent / "out"
    figures = import_dataset(name, sources, out, settings, **more)
    return read_dataset(out), figures


def error_of(name: Format, *sources: Path, settings: ImportSettings | None = None, **more: Any) -> str:
    """The message; and nothing may be left of what was begun."""
    out = sources[0].parent / "out"
    before = sorted(sources[0].parent.iterdir())
    with pytest.raises(DatasetError) as error:
        import_dataset(name, sources, out, settings or ImportSettings(), **more)
    assert sorted(sources[0].parent.iterdir()) == before
    return str(error.value)


def review_2014(user: str, item: str, time: int, rating: float = 5.0) -> dict[str, Any]:
    return {
        "reviewerID": user,
        "asin": item,
        "reviewerName": 'J. "Mac" O\'Neil',
        "helpful": [2, 3],
        "reviewText": "Très bon 👍\nsecond line",
        "overall": rating,
        "summary": "ok",
        "unixReviewTime": time,
        "reviewTime": "05 3, 2011",
    }


def review_2018(user: str, item: str, time: int, **more: Any) -> dict[str, Any]:
    return {
        "overall": 4.0,
        "vote": "1,023",
        "verified": True,
        "reviewTime": "09 13, 2009",
        "reviewerID": user,
        "asin": item,
        "style": {"Size:": " 9.5", "Color:": " Black"},
        "reviewerName": "x",
        "reviewText": "fine",
        "summary": "s",
        "unixReviewTime": time,
    } | more


def review_2023(user: str, item: str, time: int, **more: Any) -> dict[str, Any]:
    return {
        "rating": 5.0,
        "title": "Such a lovely scent",
        "text": 'This spray is really nice. 喜欢 \\ "quoted"',
        "images": [{"small_image_url": "https://m.media-amazon.com/images/I/x.jpg", "attachment_type": "IMAGE"}],
        "asin": "B00CHILD00",
        "parent_asin": item,
        "user_id": user,
        "timestamp": time,
        "helpful_vote": 3,
        "verified_purchase": True,
    } | more


META_2014 = [
    {
        "asin": "B1",
        "title": "Men's Shaver \u00e9",
        "price": 12.99,
        "imUrl": "http://ecx.images-amazon.com/x.jpg",
        "related": {"also_bought": ["B2"], "buy_after_viewing": []},
        "salesRank": {"Beauty": 5},
        "brand": "Braun",
        "categories": [["Beauty", "Shave & Hair Removal"], ["Beauty", "Gifts"]],
        "description": 'It\'s "sharp" &amp; good',
    },
    {"asin": "B2", "categories": [["Beauty"]]},
    {"asin": "B9", "title": "Nobody reviewed this", "categories": [["Beauty"]]},
]


# --- Amazon ---------------------------------------------------------------------------------------------------------


def test_amazon_2014_with_python_literals(tmp_path: Path) -> None:
    """B9 has no review and is left out; of B2 nothing but its category is known."""
    log = put(tmp_path / "reviews_Beauty_5.json.gz", [review_2014("u", "B1", 20), review_2014("u", "B2", 10, 3.0)])
    meta = put(tmp_path / "meta_Beauty.json.gz", META_2014, dump=repr)
    assert gzip.decompress(meta.read_bytes()).startswith(b"{'asin': 'B1', 'title': \"Men's Shaver")
    data, figures = imported("amazon-2014", log, meta, settings=ImportSettings())
    assert data.events.rows() == [("u", "B2", 10, 3.0), ("u", "B1", 20, 5.0)]
    assert data.events.columns == ["user_id", "item_id", "timestamp", "rating"]
    first, second = data.items.rows(named=True)
    assert first == {
        "item_id": "B1",
        "title": "Men's Shaver é",
        "brand": "Braun",
        "description": 'It\'s "sharp" & good',
        "categories": ["Beauty", "Shave & Hair Removal", "Gifts"],
        "price": 12.99,
    }
    assert second == {
        "item_id": "B2", "title": None, "brand": None, "description": None, "categories": ["Beauty"], "price": None,
    }  # fmt: skip
    assert (figures["users"], figures["items"], figures["interactions"]) == (1, 2, 2)
    assert (figures["items_without_text"], figures["feedback"]) == (1, ["rating"])


def test_amazon_2014_metadata_cannot_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    log = put(tmp_path / "reviews_Beauty_5.json.gz", [review_2014("u", "B1", 20)])
    meta = put(tmp_path / "meta_Beauty.json.gz", [f"{{'asin': open({str(marker)!r}, 'w')}}"])
    message = error_of("amazon-2014", log, meta)
    assert f"{meta}: line 1: broken line: neither JSON nor a Python literal (malformed node" in message
    assert not marker.exists()


def test_amazon_2018(tmp_path: Path) -> None:
    """Prices as text: $1,234.50 is a price, a range is none, nor is a piece of the page; a script is no title."""
    log = put(
        tmp_path / "All_Beauty_5.json.gz",
        [review_2018("u", "A", 3), review_2018("u", "B", 1, verified=False), review_2018("v", "C", 2, overall=None)],
    )
    items: list[dict[str, Any]] = [
        {"category": ["Beauty", "Hair"], "feature": ["soft", "  blue "], "description": ["<b>One</b>", "two"]},
        {"title": "var aPageStart = (new Date()).getTime(); Buy", "price": "$5.00 - $7.00", "category": []},
        {"title": "Kämme &amp; Bürsten\n", "price": ".a-box-inner{background-color:#fff}", "rank": ["1", "2"]},
    ]
    items[0] |= {
        "title": "T",
        "price": "$1,234.50",
        "brand": "  X ",
        "also_buy": ["Z"],
        "tech1": {"a": "b"},
        "main_cat": "x",
    }
    meta = put(tmp_path / "meta_All_Beauty.json.gz", [{"asin": i} | item for i, item in zip("ABC", items, strict=True)])
    data, figures = imported("amazon-2018", log, meta, settings=ImportSettings())
    assert data.events.select("user_id", "item_id", "rating", "verified").rows() == [
        ("u", "B", 4.0, False),
        ("u", "A", 4.0, True),
        ("v", "C", None, True),
    ]
    assert data.items["title"].to_list() == ["T", None, "Kämme & Bürsten"]
    assert data.items["price"].to_list() == [1234.5, None, None]
    assert data.items["text"].to_list() == ["soft blue", None, None]
    assert data.items["description"].to_list() == ["<b>One</b> two", None, None]
    assert data.items["categories"].to_list() == [["Beauty", "Hair"], [], []]
    assert figures["feedback"] == ["rating", "verified"]


def test_amazon_2023(tmp_path: Path) -> None:
    """The item is the parent product. An item of the log without metadata is kept when asked, without words."""
    log = put(
        tmp_path / "All_Beauty.jsonl.gz",
        [review_2023("u", "P1", 1588687728923), review_2023("u", "P2", 1588687728000, helpful_vote=0, rating=1.0)],
    )
    meta = {
        "main_category": "All Beauty",
        "title": "Howard LC0008 Leather Conditioner, 8-Ounce (4-Pack)",
        "average_rating": 4.8,
        "rating_number": 10,
        "features": ["a", "b"],
        "description": [],
        "price": None,
        "images": [{"thumb": "x", "large": None}],
        "videos": [],
        "store": "Howard Products",
        "categories": ["Care", "Leather"],
        "details": {"Package Dimensions": "7.1 x 5.5 x 3 inches"},
        "parent_asin": "P1",
        "bought_together": None,
    }
    data, figures = imported("amazon-2023", log, put(tmp_path / "meta_All_Beauty.jsonl.gz", [meta]))
    assert data.events.rows() == [
        ("u", "P2", 1588687728000, 1.0, True, 0),
        ("u", "P1", 1588687728923, 5.0, True, 3),
    ]
    assert data.items["categories"].to_list() == [["All Beauty", "Care", "Leather"], None]
    assert data.items.drop("categories").rows() == [
        ("P1", "Howard LC0008 Leather Conditioner, 8-Ounce (4-Pack)", "Howard Products", "a b"),
        ("P2", None, None, None),
    ]
    assert figures["unknown_items"] == 1
    manifest = read_manifest(tmp_path / "out", "dataset")
    assert manifest.settings["format"] == "amazon-2023"
    assert manifest.sizes["feedback"] == ["rating", "verified", "helpful_votes"]
    assert len(manifest.made_from) == 2
    assert all(len(value) == 64 for value in manifest.made_from.values())


def test_duplicated_metadata_is_one_item_and_contradictions_are_bad_rows(tmp_path: Path) -> None:
    log = put(tmp_path / "R.jsonl", [review_2023("u", "P", 1)])
    same, other = {"parent_asin": "P", "title": "T"}, {"parent_asin": "P", "title": "U"}
    meta = put(tmp_path / "meta_R.jsonl", [same, same, same])
    data, figures = imported("amazon-2023", log, meta)
    assert (data.items["title"].to_list(), figures["duplicate_items"]) == (["T"], 2)
    meta = put(tmp_path / "meta_R.jsonl", [same, same, other])
    assert error_of("amazon-2023", log, meta) == (
        f"{meta}: line 3: duplicate item: 'P' is in meta_R.jsonl, line 1, with other content. "
        "Mend it, or leave such rows out with --skip-bad-rows"
    )
    data, figures = imported("amazon-2023", log, meta, settings=SKIP)
    assert (data.items["title"].to_list(), figures["bad_rows_by_reason"]) == (["T"], {"duplicate item": 1})


def test_an_unknown_item_is_named_with_its_line(tmp_path: Path) -> None:
    log = put(tmp_path / "R.jsonl", [review_2023("v", "P", 1), review_2023("u", "X", 2), review_2023("u", "Y", 1)])
    meta = put(tmp_path / "meta_R.jsonl", [{"parent_asin": "P", "title": "T"}])
    assert error_of("amazon-2023", log, meta) == (
        f"{log}: line 2: item 'X' is in no item file, like 1 others. Add the items, keep them without words with "
        "--unknown-items keep, or leave their events out with --unknown-items drop"
    )
    for settings in (SKIP, ImportSettings(unknown_items="drop")):
        data, figures = imported("amazon-2023", log, meta, settings=settings)
        assert data.events["item_id"].to_list() == ["P"]
        assert (figures["unknown_items"], figures["events_of_dropped_items"]) == (2, 2)


def test_mixed_line_ends_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    lines = [json.dumps(review_2023("u", f"P{i}", i), ensure_ascii=False) for i in range(5)]
    path = tmp_path / "R.jsonl"
    text = lines[0] + "\r\n" + lines[1] + "\r" + lines[2] + "\n\n  \n" + lines[3] + "\r\n\r\n" + lines[4]
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    data, figures = imported("amazon-2023", path)
    assert (data.n_events, figures["bad_rows"]) == (5, 0)


def test_no_reviews_among_the_files(tmp_path: Path) -> None:
    meta = put(tmp_path / "meta_R.jsonl", [{}])
    assert error_of("amazon-2023", meta) == (
        "no file with reviews among meta_R.jsonl; expected one whose name does not begin with meta_"
    )
    with pytest.raises(DatasetError, match="absent is missing; give the files to import"):
        import_dataset("amazon-2023", [tmp_path / "absent"], tmp_path / "out")


# --- what is left out -----------------------------------------------------------------------------------------------


def events(tmp_path: Path, rows: list[tuple[str, str, int]]) -> Path:
    return put(tmp_path / "R.jsonl", [review_2023(*row) for row in rows])


def test_duplicate_events(tmp_path: Path) -> None:
    """In order: u has b, c, b at 5, and b at 6; the second b at 5 is a duplicate, the one at 6 a repeat."""
    log = events(tmp_path, [("u", "b", 6), ("u", "b", 5), ("u", "c", 5), ("u", "b", 5), ("v", "b", 5)])
    kept = {"event": ["b", "c", "b", "b"], "item": ["b", "c", "b"], "keep": ["b", "c", "b", "b", "b"]}
    for mode, expected in kept.items():
        data, figures = imported("amazon-2023", log, settings=ImportSettings(duplicates=mode))  # type: ignore[arg-type]
        assert data.events["item_id"].to_list() == expected, mode
        assert figures["duplicate_events"] == 5 - len(expected)
        assert figures["same_time_ties"] == (2 if mode == "keep" else 1)


def test_ties_keep_the_order_of_the_file_and_are_counted(tmp_path: Path) -> None:
    log = events(tmp_path, [("u", item, 7) for item in "zabyx"])
    data, figures = imported("amazon-2023", log)
    assert data.events["item_id"].to_list() == list("zabyx")
    assert figures["same_time_ties"] == 4
    again = (tmp_path / "out" / INTERACTIONS).read_bytes()
    imported("amazon-2023", log)
    assert (tmp_path / "out" / INTERACTIONS).read_bytes() == again


def test_the_k_core_is_repeated_until_it_holds(tmp_path: Path) -> None:
    """2-core: c has one event and goes; then w has one left and goes; u and v with a and b stay."""
    rows = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "b", 2), ("w", "c", 1), ("w", "a", 2)]
    log = events(tmp_path, rows)
    data, figures = imported("amazon-2023", log, settings=ImportSettings(k_core=2))
    assert (data.n_users, data.n_items, data.n_events) == (2, 2, 4)
    assert figures["events_below_k_core"] == 2
    assert error_of("amazon-2023", log, settings=ImportSettings(k_core=4)).startswith(
        "no event is left (6 rows read, 0 duplicate events"
    )


def test_the_k_core_is_taken_again_after_items_are_left_out(tmp_path: Path) -> None:
    """All of u, v, w have a and b; x has a and c, y has b and c. c is in no item file, so x and y fall below two."""
    rows = [(user, item, t) for user in "uvw" for t, item in enumerate("ab")]
    rows += [("x", "a", 0), ("x", "c", 1), ("y", "b", 0), ("y", "c", 1)]
    log = events(tmp_path, rows)
    meta = put(tmp_path / "meta_R.jsonl", [{"parent_asin": "a", "title": "A"}, {"parent_asin": "b", "title": "B"}])
    settings = ImportSettings(k_core=2, unknown_items="drop")
    data, figures = imported("amazon-2023", log, meta, settings=settings)
    assert data.user_ids.external(range(3)) == ["u", "v", "w"]
    assert (figures["events_of_dropped_items"], figures["events_below_k_core"]) == (2, 2)


def test_users_with_one_event_and_items_without_text(tmp_path: Path) -> None:
    log = events(tmp_path, [("u", "a", 1), ("u", "b", 2), ("v", "a", 1)])
    meta = put(tmp_path / "meta_R.jsonl", [{"parent_asin": "a", "title": "A"}, {"parent_asin": "b", "title": " "}])
    _, figures = imported("amazon-2023", log, meta)
    assert (figures["users_with_one_event"], figures["items_without_text"]) == (1, 1)
    data, _ = imported("amazon-2023", log, meta, settings=ImportSettings(min_user_events=2))
    assert data.user_ids.external([0]) == ["u"]
    data, figures = imported("amazon-2023", log, meta, settings=ImportSettings(items_without_text="drop"))
    assert (data.n_items, data.n_events, figures["events_of_dropped_items"]) == (1, 2, 1)


def test_items_that_the_log_does_not_hold_are_kept_when_asked(tmp_path: Path) -> None:
    log = events(tmp_path, [("u", "a", 1)])
    meta = put(tmp_path / "meta_R.jsonl", [{"parent_asin": "z", "title": "Z"}, {"parent_asin": "a", "title": "A"}])
    data, figures = imported("amazon-2023", log, meta, settings=ImportSettings(items="all"))
    assert (data.items["item_id"].to_list(), figures["items_without_events"]) == (["z", "a"], 1)


def test_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match="k_core is 0; expected at least 1"):
        ImportSettings(k_core=0)
    with pytest.raises(SettingsError, match="duplicates is 'all'; expected one of event, item, keep"):
        ImportSettings(duplicates="all")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"separator is '\\n'; expected no line end"):
        TableColumns(separator="\n")
    with pytest.raises(SettingsError, match="quote is '--'; expected one character of ASCII, or none"):
        TableColumns(quote="--")


# --- cells ----------------------------------------------------------------------------------------------------------


PRICES: list[tuple[Any, float | None]] = [
    ("$12.99", 12.99),
    ("12", 12.0),
    (" $1,234.50 ", 1234.5),
    ("US$3", 3.0),
    (7, 7.0),
    ("$1 - $2", None),
    ("", None),
    (None, None),
    ("from 3", None),
    (True, None),
    (-1.0, None),
    ("1,23", None),
    ([], None),
]


@pytest.mark.parametrize(("value", "price"), PRICES)
def test_prices(value: Any, price: float | None) -> None:
    assert clean_price(value) == price


def test_texts_and_lists() -> None:
    assert clean_text(["a ", None, "&lt;b&gt;\u00a0c"]) == "a <b> c"
    assert clean_text("\ud800x") == "?x"
    assert clean_text(3) is None
    assert clean_list([["a", "b"], ["a", ["c"]], None, " "]) == ["a", "b", "c"]
    assert clean_list("one") == ["one"]


def test_the_dataset_of_an_import_is_read_like_any_other(tmp_path: Path) -> None:
    log = events(tmp_path, [("u", "a", 1), ("u", "b", 2)])
    imported("amazon-2023", log)
    table = pl.read_parquet(tmp_path / "out" / INTERACTIONS)
    assert table.schema["user_id"] == table.schema["item_id"] == pl.String()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "interactions.parquet",
        "items.parquet",
        "manifest.json",
    ]
