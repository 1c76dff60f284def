"""Kinds of input on which importers were wrong once: dates, parts, categories, quotes, missing ids, MovieLens."""

import gzip
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sagerec.catalogue.dataset import read_dataset
from sagerec.catalogue.formats.blocks import BadRows, Block
from sagerec.catalogue.formats.delimited import Dialect, read_delimited, slow_cells, slow_chunk
from sagerec.catalogue.formats.fields import Field
from sagerec.catalogue.formats.importer import import_dataset
from sagerec.catalogue.formats.movielens import GENRES
from sagerec.catalogue.formats.quotes import Quoting, end_of_records, is_closed, is_regular, records
from sagerec.catalogue.formats.table import TableColumns
from sagerec.catalogue.formats.times import EXPECTED, cast_times, time_of
from sagerec.catalogue.formats.writer import ImportSettings
from sagerec.cli import main
from sagerec.cli.measure import named_items
from sagerec.errors import DatasetError, SettingsError
from tests.test_formats import SKIP, error_of, imported, put
from tests.test_formats_tables import write

STRICT = ImportSettings()
LOG = "user_id,item_id,timestamp\n"
MEND = "Mend it, or leave such rows out with --skip-bad-rows"


# --- times ----------------------------------------------------------------------------------------------------------

US = [("02/01/2011 08:26", 2, 1), ("01/12/2011 08:26", 1, 12), ("07/24/2011 08:26", 7, 24)]


@pytest.mark.parametrize("rows", [US, US[:2]], ids=["with a day above 12", "without"])
def test_no_day_and_month_is_guessed(tmp_path: Path, rows: list[tuple[str, int, int]]) -> None:
    """12 January is 01/12 there: refused without a format, and read by it."""
    log = write(tmp_path / "log.csv", LOG + "".join(f"u,i{i},{row[0]}\n" for i, row in enumerate(rows)))
    assert error_of("table", log) == (
        f"{log}: line 2: wrong type: 'timestamp' is '02/01/2011 08:26'; expected {EXPECTED}. {MEND}"
    )
    data, _ = imported("table", log, columns=TableColumns(time_format="%m/%d/%Y %H:%M"))
    assert data.events["timestamp"].to_list() == sorted(datetime(2011, month, day, 8, 26) for _, month, day in rows)


def test_one_bad_row_does_not_change_how_the_others_are_read(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.csv", LOG + "u,a,13/11/2020 10:00:00\nu,,14/11/2020 10:00:00\nu,b,01/12/2020 10:00:00\n"
    )
    columns = TableColumns(time_format="%d/%m/%Y %H:%M:%S")
    data, figures = imported("table", log, settings=SKIP, columns=columns)
    assert data.events["timestamp"].to_list() == [datetime(2020, 11, 13, 10), datetime(2020, 12, 1, 10)]
    assert figures["bad_rows_by_reason"] == {"missing value": 1}
    bad = write(tmp_path / "bad.csv", LOG + "u,a,13/11/2020 10:00:00\nu,b,2020-11-14\n")
    said = "line 3: wrong type: 'timestamp' is '2020-11-14'; expected a time as %d/%m/%Y %H:%M:%S"
    assert said in error_of("table", bad, columns=columns)


TIMES = [
    "2024-01-31", "2024-02-30", "2024-01-31T12:00", "2024-01-31 12:00:30.5", "2024-01-31T12:00:00,123456789Z",
    "2024-01-31T24:00", "2024-01-31T12:00:60", "20240131", "2024-W05", "0024-01-31", "1000-01-01T00:00+05:00",
    "9999-12-31T23:59-05:00", "2024-01-31T12:00:00+02", "2024-01-31T12:00:00+2359", "01/02/2024", "2024-1-3",
    "inf", "-inf", "nan", "1e400", "1_000", "٣", " 7 ", "1.", "1e3", "9" * 400, str(2**63), "+5", "0x10",
]  # fmt: skip
CELL = st.one_of(
    st.sampled_from(TIMES),
    st.text("0123456789-:T .,Z+e", min_size=1, max_size=12).filter(str.strip),
)


@given(cell=CELL)
@settings(max_examples=300, deadline=None)
@example("2024-01-31T12:00:00.9999999")
def test_a_time_is_the_same_in_a_column_and_alone(cell: str) -> None:
    """The column may leave a cell to the slow twin only where that does not read it either, and -2^63 as a float."""
    column = cast_times(pl.Series([cell.strip()]))
    alone = time_of(cell)
    assert (None if column is None else column.to_list()[0]) == (None if alone == -(2.0**63) else alone)


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "1e400", "nan"])
def test_a_time_that_is_not_finite_is_a_bad_row(tmp_path: Path, cell: str) -> None:
    log = write(tmp_path / "log.csv", LOG + f"u,a,1.5\nu,b,{cell}\n")
    assert f"line 3: wrong type: 'timestamp' is '{cell}'; expected {EXPECTED}" in error_of("table", log)
    pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [1.5, float(cell)]}).write_parquet(
        tmp_path / "log.parquet"
    )
    data, figures = imported("table", tmp_path / "log.parquet", settings=SKIP)
    assert (data.n_events, figures["bad_rows_by_reason"]) == (1, {"wrong type": 1})


@pytest.mark.parametrize("form", ["abc", "%H", "%Y", "%d.%m.%Y %H", "%d/%m", "%Q", "%"])
def test_a_format_that_reads_no_time(form: str) -> None:
    with pytest.raises(SettingsError, match=r"time_format is .*; expected one that reads year, month and day"):
        TableColumns(time_format=form)


def test_a_format_is_for_text_and_its_zone_is_heeded(tmp_path: Path) -> None:
    columns = TableColumns(time_format="%d/%m/%Y %H:%M %z")
    log = write(tmp_path / "log.csv", LOG + "u,a,31/01/2024 12:00 +0200\n")
    data, _ = imported("table", log, columns=columns)
    assert data.events["timestamp"].to_list() == [datetime(2024, 1, 31, 10)]
    pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [7]}).write_parquet(tmp_path / "log.parquet")
    assert imported("table", tmp_path / "log.parquet", columns=columns)[0].events["timestamp"].to_list() == [7]


def test_units_that_are_mixed_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log.csv", LOG + "u,a,1500794772\nu,b,1500794773\nu,c,1500794774000\n")
    _, figures = imported("table", log)
    assert "MIXED UNITS (2 in seconds, 1 in milliseconds)" in figures["times"]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "MIXED UNITS" in capsys.readouterr().out


# --- RecBole's benchmark files --------------------------------------------------------------------------------------

INTER = "user_id:token\titem_id:token\ttimestamp:float\n"


def test_the_parts_of_recbole_keep_their_split(tmp_path: Path) -> None:
    """Of events at one time those of train come first, though test stands before train in the folder."""
    for part, row in (("train", "u\ta\t5\n"), ("valid", "u\tb\t5\n"), ("test", "u\tc\t5\n")):
        write(tmp_path / "x" / f"x.{part}.inter", INTER + row)
    data, _ = imported("recbole", tmp_path / "x")
    assert data.events.select("item_id", "split").rows() == [("a", "train"), ("b", "valid"), ("c", "test")]
    whole = write(tmp_path / "x" / "x.inter", INTER + "u\ta\t5\n")
    assert error_of("recbole", tmp_path / "x") == (
        "x.inter stands beside the parts x.test.inter, x.train.inter, x.valid.inter, so that events would come twice. "
        "Give the parts, to keep their split, or the whole file"
    )
    assert imported("recbole", whole)[0].n_events == 1


def test_parts_of_other_names_are_not_merged(tmp_path: Path) -> None:
    for part in ("part1", "part2"):
        write(tmp_path / "x" / f"x.{part}.inter", INTER + "u\ta\t5\n")
    assert error_of("recbole", tmp_path / "x") == (
        "x.part1.inter, x.part2.inter are parts of one data set; expected them to be named train, valid and test, such "
        "as x.train.inter. Rename them, or give one whole file"
    )


# --- categories -----------------------------------------------------------------------------------------------------

CATEGORIES: list[tuple[list[str], str, str, list[list[str]]]] = [
    (["Science Fiction|Drama", "Science Fiction", "Shoes, Men|x", ""], "", "|",
     [["Science Fiction", "Drama"], ["Science Fiction"], ["Shoes, Men", "x"], []]),
    (["Home and Kitchen", "Drama", "(no genres listed)"], "", "none", [["Home and Kitchen"], ["Drama"], []]),
    (["a b, c", "a b"], "", "comma", [["a b", "c"], ["a b"]]),
    (["Shoes, Men", "x|y"], "none", "none", [["Shoes, Men"], ["x|y"]]),
    (["a b", "c;d"], ";", ";", [["a b"], ["c", "d"]]),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "given", "printed", "expected"), CATEGORIES)
def test_one_separator_of_categories_a_file(
    tmp_path: Path, cells: list[str], given: str, printed: str, expected: list[list[str]], monkeypatch: Any
) -> None:
    """Decided on all rows, also where they come in several blocks."""
    monkeypatch.setattr("sagerec.catalogue.formats.blocks.BLOCK_BYTES", 10)
    log = write(tmp_path / "log.csv", LOG + "u,i0,1\n")
    rows = "".join(f'i{i},T,"{cell}"\n' for i, cell in enumerate(reversed(cells)))
    items = write(tmp_path / "items.csv", "item_id,title,categories\n" + rows)
    data, figures = imported("table", log, items, columns=TableColumns(category_separator=given))
    assert data.items["categories"].to_list() == expected[::-1]
    assert figures["category_separator"] == printed


def test_lists_of_a_parquet_file_are_not_split(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", LOG + "u,a,1\n")
    lists = [["Shoes, Men"], ["x|y", "z"], [], None, [None, "w"]]
    pl.DataFrame({"item_id": list("abcde"), "title": ["T"] * 5, "categories": lists}).write_parquet(
        tmp_path / "items.parquet"
    )
    data, _ = imported("table", log, tmp_path / "items.parquet")
    assert data.items["categories"].to_list() == [["Shoes, Men"], ["x|y", "z"], [], [], ["w"]]


# --- quotes ---------------------------------------------------------------------------------------------------------


def ends_of_records(text: str) -> list[int]:
    """The slow twin: character by character."""
    ends, state = [], "start"
    for place, char in enumerate(text, 1):
        if state == "quoted":
            state = "closed" if char == '"' else "quoted"
        elif char == '"' and state in ("start", "closed"):
            state = "quoted"
        else:
            state = "start" if char in ",\n" else "plain"
            if char == "\n":
                ends.append(place)
    return ends


@given(text=st.text('a,"\n', max_size=20).map(lambda text: text + "\n"))
@settings(max_examples=400, deadline=None)
def test_records_end_where_the_slow_twin_says(text: str) -> None:
    content, quoting = text.encode(), Quoting()
    expected = ends_of_records(text)
    assert [stop for _, stop, is_whole in records(content, quoting) if is_whole] == expected
    assert end_of_records(content, quoting, regular=is_regular(content, quoting)) == max(expected, default=0)
    if is_regular(content, quoting) and is_closed(content, quoting):
        outside = [place for place, char in enumerate(text, 1) if char == "\n" and text[:place].count('"') % 2 == 0]
        assert outside == expected


ITEMS = "item_id,title,brand\n"
OPENS = 'line {}: broken line: the quote (") that opens in line {} '
STRAY: list[tuple[str, list[str | None], str | None]] = [
    ('a,15.6" sleeve,x\nb,7" tablet,x\nc,T,x\n', ['15.6" sleeve', '7" tablet', "T"], None),
    (
        'a,T,"x\nb,T,x\nc,T,y"\n',
        ["T", "T"],
        OPENS.format(2, 2) + "closes in line 4, and each line looks like a row",
    ),
    ('a,"Weird Al" live,x\nb,T,x\nc,T,x\n', ["T", "T"], OPENS.format(2, 2) + "closes before ' '"),
    ('a,T,x\nb,"T,x\nc,T,x\n', ["T", "T"], OPENS.format(3, 3) + "is not closed"),
    ('a,"two\nlines",x\nb,"T ""q"", u",x\nc,T,x\n', ["two lines", 'T "q", u', "T"], None),
]


@pytest.mark.parametrize(("rows", "titles", "fault"), STRAY)
def test_a_stray_quote_is_named_and_swallows_no_rows(
    tmp_path: Path, rows: str, titles: list[str], fault: str | None
) -> None:
    log = write(tmp_path / "log.csv", LOG + "u,c,1\n")
    items = write(tmp_path / "items.csv", ITEMS + rows)
    if fault:
        message = error_of("table", log, items)
        assert message.startswith(f"{items}: {fault}")
        assert "have quotes read as other characters with --columns.quote none" in message
    data, figures = imported("table", log, items, settings=ImportSettings(skip_bad_rows=True))
    assert data.items["title"].to_list() == titles
    assert figures["bad_rows"] == (fault is not None)


def test_quotes_are_read_as_asked(tmp_path: Path) -> None:
    """None in .tsv; a quote that is given is trusted, also with lines that look like rows; another one is possible."""
    log = write(tmp_path / "log.csv", LOG + "u,b,1\n")
    tsv = write(tmp_path / "items.tsv", 'item_id\ttitle\na\t"Weird Al" live\nb\t"Unbalanced\nc\tOther"\n')
    data, _ = imported("table", log, tsv)
    assert data.items["title"].to_list() == ['"Weird Al" live', '"Unbalanced', 'Other"']
    items = write(tmp_path / "items.csv", 'item_id,title\nb,"one\n2,two"\n')
    assert imported("table", log, items, columns=TableColumns(quote='"'))[0].items["title"].to_list() == ["one 2,two"]
    data, _ = imported("table", log, items, columns=TableColumns(quote="none"))
    assert data.items["title"].to_list() == ['"one', 'two"']
    items = write(tmp_path / "items.csv", "item_id,title\nb,'x, y'\n")
    assert imported("table", log, items, columns=TableColumns(quote="'"))[0].items["title"].to_list() == ["x, y"]


# --- values that cannot be read, and words for none -----------------------------------------------------------------


@pytest.mark.parametrize("cell", ["NaN", "4;5", "good", "inf", "1_0"])
def test_an_optional_value_that_cannot_be_read_keeps_its_event(tmp_path: Path, cell: str) -> None:
    log = write(tmp_path / "log.csv", f"user_id,item_id,rating,timestamp\nu,a,{cell},1\nu,b,4,2\n")
    data, figures = imported("table", log)
    assert data.events["rating"].to_list() == [None, 4.0]
    assert (figures["bad_rows"], figures["unreadable_values_by_column"]) == (0, {"rating": 1})


@pytest.mark.parametrize("word", ["", " ", "nan", "NaN", "NULL", "null", "None", "NA", "N/A", "<NA>"])
def test_words_for_a_missing_id(tmp_path: Path, word: str) -> None:
    """In all readers, on the fast and on the slow path (which the bad time of the second file calls)."""
    for rows in (f"{word},a,1\nu,b,2\n", f"u,{word},1\nu,b,2\nu,c,soon\n"):
        log = write(tmp_path / "log.csv", LOG + rows)
        data, figures = imported("table", log, settings=SKIP)
        assert (data.n_events, figures["bad_rows_by_reason"]["missing value"]) == (1, 1)
    if word.strip():
        table = pl.DataFrame({"user_id": [word, "u"], "item_id": ["a", "b"], "timestamp": [1, 2]})
        table.write_parquet(tmp_path / "log.parquet")
        assert imported("table", tmp_path / "log.parquet", settings=SKIP)[1]["bad_rows"] == 1
        log = put(tmp_path / "R.jsonl", [{"user_id": u, "parent_asin": "a", "timestamp": 1} for u in (word, "u")])
        assert imported("amazon-2023", log, settings=SKIP)[1]["bad_rows"] == 1
    assert imported("table", write(tmp_path / "log.csv", LOG + "none,na,1\n"))[0].n_events == 1


# --- ids ------------------------------------------------------------------------------------------------------------


def test_whole_floats_are_whole_ids(tmp_path: Path) -> None:
    """12.0 is 12 in a Parquet table, in JSON and in a dataset folder; a NaN is missing, a fraction refused."""
    events = pl.DataFrame({"user_id": [1.0, 2.0, float("nan")], "item_id": [12.0, 7.0, 7.0], "timestamp": [1, 2, 3]})
    events.write_parquet(tmp_path / "log.parquet")
    pl.DataFrame({"item_id": [7.0, 12.0], "title": ["S", "T"]}).write_parquet(tmp_path / "items.parquet")
    data, figures = imported("table", tmp_path / "log.parquet", tmp_path / "items.parquet", settings=SKIP)
    assert data.events["item_id"].to_list() == ["12", "7"]
    assert figures["bad_rows_by_reason"] == {"missing value": 1}
    log = put(tmp_path / "R.jsonl", [{"user_id": 1.0, "parent_asin": 12.0, "timestamp": 1}])
    assert imported("amazon-2023", log)[0].events.rows()[0][:2] == ("1", "12")
    events[:2].write_parquet(tmp_path / "interactions.parquet")
    assert read_dataset(tmp_path).item_ids.external([0, 1]) == ["7", "12"]
    events.with_columns(pl.col("item_id") + 0.5).write_parquet(tmp_path / "log.parquet")
    assert error_of("table", tmp_path / "log.parquet").endswith(
        "column 'item_id' holds 12.5 in row 0 (from 0); expected text or whole numbers. Cast it to text"
    )


def test_an_id_with_a_comma_can_be_named(tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": ["a", "b", "a,b", " c"], "title": ["T"] * 4})
    items.write_parquet(tmp_path / "items.parquet")
    pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]}).write_parquet(
        tmp_path / "interactions.parquet"
    )
    known = read_dataset(tmp_path).item_ids
    assert named_items("a,b", known) == ["a,b"]
    assert named_items("b,a", known) == ["b", "a"]
    assert named_items(" a , b,", known) == ["a", "b"]
    assert named_items("b, c", known) == ["b", " c"]


# --- MovieLens ------------------------------------------------------------------------------------------------------

FLAGS = {name: "0" for name in GENRES}


def movie(number: int, title: str, *genres: str) -> str:
    flags = FLAGS | dict.fromkeys(genres, "1")
    return "|".join([str(number), title, "01-Jan-1995", "", "http://x", *flags.values()]) + "\n"


def movielens(folder: Path, generation: str) -> Path:
    """A folder as GroupLens publishes it, with what stands beside."""
    rows = [("1", "2", "3", "978300760"), ("1", "1", "4.5" if generation in ("10m", "csv") else "4", "978300761")]
    if generation == "100k":
        write(folder / "u.data", "".join("\t".join(row) + "\n" for row in rows))
        text = movie(1, "Les Misérables (1995)", "Drama", "Children's") + movie(2, 'A "q", (1)', "unknown")
        write(folder / "u.item", text.encode("latin-1"))
        write(folder / "u1.base", "1\t1\t1\t1\n")
    elif generation == "csv":
        write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n" + "".join(",".join(r) + "\n" for r in rows))
        movies = '1,"Misérables, Les (1995)",Children\'s|Drama\n2,"A ""q"", (1)",(no genres listed)\n'
        write(folder / "movies.csv", "movieId,title,genres\n" + movies)
        write(folder / "tags.csv", "userId,movieId,tag,timestamp\n1,1,x,1\n")
    else:
        write(folder / "ratings.dat", "".join("::".join(row) + "\n" for row in rows))
        text = '1::Les Misérables (1995)::Children\'s|Drama\n2::A "q", (1)::(no genres listed)\n'
        write(folder / "movies.dat", text.encode("latin-1" if generation == "1m" else "utf-8"))
        write(folder / "users.dat", "1::F::1::10::48067\n")
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("generation", ["100k", "1m", "10m", "csv"])
def test_movielens(tmp_path: Path, generation: str, packed: bool) -> None:
    folder = movielens(tmp_path / "ml", generation)
    if packed:
        for path in list(folder.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    data, figures = imported("movielens", folder, settings=STRICT)
    half = 4.5 if generation in ("10m", "csv") else 4.0
    assert data.events.rows() == [("1", "2", 978300760, 3.0), ("1", "1", 978300761, half)]
    first = "Misérables, Les (1995)" if generation == "csv" else "Les Misérables (1995)"
    assert data.items.select("item_id", "title").rows() == [("1", first), ("2", 'A "q", (1)')]
    assert [sorted(genres) for genres in data.items["categories"]] == [["Children's", "Drama"], []]
    assert figures.get("encoding") == {"100k": "latin-1", "1m": "latin-1", "10m": "UTF-8"}.get(generation)


def test_movielens_of_two_generations_and_of_none(tmp_path: Path) -> None:
    folder = movielens(movielens(tmp_path / "ml", "100k"), "csv")
    assert error_of("movielens", folder) == (
        f"2 files of ratings are given: {folder}/ratings.csv, {folder}/u.data; expected one of u.data, ratings.dat, "
        "ratings.csv, as GroupLens names them. Give the folder of one unpacked MovieLens"
    )
    assert error_of("movielens", folder / "u.item").startswith("0 files of ratings are given; expected one of u.data")
    data, _ = imported("movielens", folder / "u.data", settings=STRICT)
    assert data.items["title"].null_count() == 2


def test_movielens_is_wrong_in_a_line(tmp_path: Path) -> None:
    folder = movielens(tmp_path / "ml", "1m")
    ratings = write(folder / "ratings.dat", "1::1::5::978300760\n1::2::5\n")
    assert error_of("movielens", folder) == f"{ratings}: line 2: missing value: 'timestamp' is missing or empty. {MEND}"


# --- tables without a header, of other encodings and separators -----------------------------------------------------


def test_a_table_without_a_header_and_two_separators(tmp_path: Path) -> None:
    log = write(tmp_path / "u.data", "1\t2\t3\t978300760\n")
    items = write(tmp_path / "movies.dat", "2::Les Misérables::Drama".encode("latin-1"))
    columns = TableColumns(
        header=("user_id", "item_id", "rating", "timestamp"), items_header=("item_id", "title", "categories"),
        separator="\t", items_separator="::", encoding="latin-1",
    )  # fmt: skip
    data, _ = imported("table", log, items, columns=columns)
    assert data.events.rows() == [("1", "2", 978300760, 3.0)]
    assert data.items.rows() == [("2", "Les Misérables", ["Drama"])]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252", "gb18030", "utf-8-sig"])
def test_encodings(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagerec.catalogue.formats.blocks.PACKED_BYTES", 3)
    log = write(tmp_path / "log.csv", (LOG + "ü,é,1\r\nü,b,2\r\n").encode(encoding))
    data, _ = imported("table", log, columns=TableColumns(encoding=encoding))
    assert data.events.rows() == [("ü", "é", 1), ("ü", "b", 2)]


def test_a_wrong_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", (LOG + "u,b,2\nü,é,1\n").encode("latin-1"))
    message = error_of("table", log)
    assert f"{log}: line 3: broken line: not UTF-8" in message
    assert "other encodings are read with --columns.encoding, such as latin-1" in message
    assert f"{log}: line 3 is not ascii (" in error_of("table", log, columns=TableColumns(encoding="ascii"))
    for name in ("nonsense", "base64", "undefined", "a\0b"):
        with pytest.raises(SettingsError, match="expected one such as latin-1, cp1252 or utf-16"):
            TableColumns(encoding=name)


def test_separators_and_quotes_that_do_not_go_together() -> None:
    with pytest.raises(SettingsError, match=r"separator is '\"'; expected another character than the quote"):
        TableColumns(separator='"')
    with pytest.raises(SettingsError, match="quote is \"'\"; expected none where cells are told apart at '::'"):
        TableColumns(items_separator="::", quote="'")
    assert TableColumns(separator="§").log_dialect(Path("x.csv")).quote == ""
    assert TableColumns(separator='"', quote="none").log_dialect(Path("x.csv")) == Dialect('"', "", True)


def test_a_zip_archive_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "u.data", b"PK\x03\x04rest of it")
    assert error_of("movielens", path) == f"{path} is a zip archive; expected text, plain or gzip. Unpack it"


def test_a_separator_of_several_characters_and_its_slow_twin(tmp_path: Path) -> None:
    """A bad value sends the block along the slow path, which tells the same cells apart."""
    fields = [Field("a", "a"), Field("b", "b", "number")]
    dialect = Dialect("||", quote="", header=("a", "b"))
    path = write(tmp_path / "x", "p|q||1\nr||2\n")
    [chunk] = read_delimited(path, lambda _: fields, BadRows(skip=False), dialect)
    assert chunk.table.rows() == [("p|q", 1.0), ("r", 2.0)]
    block = Block(path, b"p|q\x1f1\nr\x1f2\n", 1, 2, 0)
    bad = BadRows(skip=False)
    assert slow_chunk(path, slow_cells(block, ["a", "b"], fields, bad, dialect), fields, bad, 0).table.equals(
        chunk.table
    )


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["interactions.parquet", "manifest.json", "notes.txt"])
def test_a_link_out_of_a_dataset_folder_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset folder that is itself a link, and a link within it, are read."""
    imported("table", write(tmp_path / "log.csv", LOG + "u,a,1\nu,b,2\nu,a,3\n"))
    folder, secret = tmp_path / "out", write(tmp_path / "secret", "s")
    (tmp_path / "link").symlink_to(folder)
    (folder / "same").symlink_to("items.parquet")
    assert read_dataset(tmp_path / "link").n_events == 3
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert main(["prepare", str(tmp_path / "link"), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'link' / name} is a link to {secret}, outside the dataset folder" in said
    assert not (tmp_path / "run" / "dataset").exists()


def test_a_wanted_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,item_id\nu,a,1,b\n")
    with pytest.raises(DatasetError, match="column 'item_id' stands twice in the header; rename one of them"):
        import_dataset("table", (tmp_path / "log.csv",), tmp_path / "out", ImportSettings(), TableColumns())


def test_parts_of_several_recbole_sets_are_refused(tmp_path: Path) -> None:
    rows = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n"
    for name in ("c.train.inter", "d.test.inter"):
        (tmp_path / name).write_text(rows)
    with pytest.raises(DatasetError, match=r"the parts are of several data sets \(c, d\); give those of one"):
        import_dataset("recbole", (tmp_path,), tmp_path / "out", ImportSettings(), TableColumns())
