"""Broken files: blocks at every cut, the fast paths against their slow twins, and every importer fed broken bytes."""

import gzip
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sagerec.catalogue.dataset import TIMESTAMP
from sagerec.catalogue.formats import delimited, json_lines
from sagerec.catalogue.formats.amazon import LOG_FIELDS
from sagerec.catalogue.formats.blocks import BadRows, Block, read_blocks
from sagerec.catalogue.formats.delimited import Dialect, slow_chunk
from sagerec.catalogue.formats.event_log import LINE, USER, Codes, in_order
from sagerec.catalogue.formats.fields import Field, log_fields
from sagerec.catalogue.formats.importer import Format, import_dataset
from sagerec.catalogue.formats.quotes import Quoting
from sagerec.catalogue.formats.writer import ImportSettings
from sagerec.errors import DatasetError
from tests.test_formats import META_2014, SKIP, error_of, imported, put, review_2014, review_2018, review_2023
from tests.test_formats_kinds import movielens
from tests.test_formats_tables import INTER, ITEM, minionerec, row

FIELDS = LOG_FIELDS["amazon-2023"]


# --- blocks ---------------------------------------------------------------------------------------------------------


def lines_of(path: Path, block_bytes: int) -> list[tuple[int, bytes]]:
    """(number, line) of every line, put together from the blocks."""
    found = []
    for block in read_blocks(path, BadRows(skip=False), block_bytes=block_bytes):
        lines = block.text.removesuffix(b"\n").split(b"\n")
        assert len(lines) == block.line_count
        found += list(enumerate(lines, block.first_line))
    return found


@given(
    lines=st.lists(st.text('ab\u00e9"', max_size=6), min_size=1, max_size=20),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=20, max_size=20),
    block_bytes=st.integers(1, 30),
    mark=st.booleans(),
    packed=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_blocks_hold_the_lines_that_python_reads(
    lines: list[str], ends: list[str], block_bytes: int, mark: bool, packed: bool
) -> None:
    """The twin is `open` with universal newlines."""
    text = "".join(line + end for line, end in zip(lines, ends, strict=False)) + "end"
    content = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        with path.open(encoding="utf-8-sig") as file:
            expected = [line.removesuffix("\n").encode() for line in file]
        path.write_bytes(gzip.compress(content) if packed else content)
        assert lines_of(path, max(block_bytes, 3)) == list(enumerate(expected, 1))


@given(cells=st.lists(st.text('a,"\n', max_size=5), min_size=1, max_size=12), block_bytes=st.integers(3, 30))
@settings(max_examples=60, deadline=None)
def test_no_block_ends_inside_a_quoted_cell(cells: list[str], block_bytes: int) -> None:
    quoted = ['"' + cell.replace('"', '""') + '"\n' for cell in cells]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_text("".join(quoted), encoding="utf-8")
        blocks = list(read_blocks(path, BadRows(skip=False), quoting=Quoting(), block_bytes=block_bytes))
    assert b"".join(block.text for block in blocks).decode() == "".join(quoted)
    assert all(block.text.count(b'"') % 2 == 0 for block in blocks)
    found = [number for block in blocks for number, _ in delimited.records_of(block, Dialect())]
    assert found == [1 + sum(q.count("\n") for q in quoted[:i]) for i in range(len(quoted))]


def test_a_line_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagerec.catalogue.formats.blocks.MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr("sagerec.catalogue.formats.blocks.BLOCK_BYTES", 1 << 20)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{}\n" + b"x" * (3 << 20))
    with pytest.raises(DatasetError, match=r"line 2: it does not end within 1 MB; expected text of separate lines"):
        list(read_blocks(path, BadRows(skip=False), block_bytes=1 << 20))
    path.write_bytes(b'a,"b\n' + b"c\n" * (2 << 20))
    with pytest.raises(DatasetError, match=r'line 1: a quote \("\) that is opened there is not closed within 1 MB'):
        list(read_blocks(path, BadRows(skip=False), quoting=Quoting(), block_bytes=1 << 20))


@pytest.mark.parametrize("cut", [0.5, 0.999])
def test_gzip_cut_short(tmp_path: Path, cut: float) -> None:
    """The lines before the cut are kept when bad rows are skipped; without that nothing is written."""
    reviews = [review_2023(f"u{i}", f"P{i * 7919 % 1000}", i) for i in range(3000)]
    path = put(tmp_path / "R.jsonl.gz", reviews)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut)])
    message = error_of("amazon-2023", path)
    assert "the file ends early; expected a whole gzip file. Get it again, or keep the lines before with" in message
    data, figures = imported("amazon-2023", path, settings=SKIP)
    assert figures["bad_rows_by_reason"] == {"file cut short": 1}
    assert 1000 < data.n_events < 3000
    assert f": line {data.n_events + 1}: the file ends early" in message


def test_gzip_damaged_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagerec.catalogue.formats.blocks.PACKED_BYTES", 1000)
    path = put(tmp_path / "R.jsonl.gz", [review_2023(f"u{i * 7919 % 3001}", f"P{i}", i) for i in range(3000)])
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 60] = bytes(range(60))
    path.write_bytes(content)
    assert re.search(r"line \d+: (the file cannot be read|broken line)", error_of("amazon-2023", path))
    data, figures = imported("amazon-2023", path, settings=SKIP)
    assert 500 < data.n_events < 2500
    assert figures["bad_rows"] >= 1


def test_gzip_of_several_members_and_padding(tmp_path: Path) -> None:
    path = tmp_path / "R.jsonl.gz"
    lines = [json.dumps(review_2023("u", f"P{i}", i)).encode() + b"\n" for i in range(3)]
    path.write_bytes(gzip.compress(lines[0] + lines[1][:9]) + gzip.compress(lines[1][9:] + lines[2]) + bytes(100))
    data, _ = imported("amazon-2023", path)
    assert data.n_events == 3
    path.write_bytes(path.read_bytes() + b"junk")
    assert "line 4: the file ends early" in error_of("amazon-2023", path)


# --- bad rows of JSON lines -----------------------------------------------------------------------------------------

DEEP = "while decoding a JSON array from a unicode string"
GOOD = review_2023("u", "P", 1)
BAD_LINES: list[tuple[Any, str]] = [
    ("{bad", "broken line: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    ("[1]", "broken line: holds a list, expected an object"),
    ('{"rating": NaN}', "broken line: not JSON (NaN is no JSON value)"),
    ({"user_id": "u", "timestamp": 1}, "missing value: 'parent_asin' is missing or empty"),
    (GOOD | {"user_id": None}, "missing value: 'user_id' is missing or empty"),
    (GOOD | {"user_id": ""}, "missing value: 'user_id' is missing or empty"),
    (GOOD | {"user_id": ["u"]}, "wrong type: 'user_id' is ['u']; expected text"),
    (GOOD | {"timestamp": "1"}, "wrong type: 'timestamp' is '1'; expected a number"),
    (GOOD | {"timestamp": 1.5}, "wrong type: 'timestamp' is 1.5; expected a whole number"),
    (
        GOOD | {"timestamp": 10**30},
        "wrong type: 'timestamp' is 1000000000000000000000000000000; expected a whole number",
    ),
    (GOOD | {"parent_asin": "NULL"}, "missing value: 'parent_asin' is missing or empty"),
    (GOOD | {"parent_asin": 1.5}, "wrong type: 'parent_asin' is 1.5; expected text or a whole number"),
    (
        "[" * 100_000,
        "broken line: not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string)",
    ),
]


@pytest.mark.parametrize(("line", "fault"), BAD_LINES)
def test_a_bad_line_is_named_and_can_be_left_out(tmp_path: Path, line: Any, fault: str) -> None:
    path = put(tmp_path / "R.jsonl", [GOOD, "", line, GOOD | {"timestamp": 2}])
    assert error_of("amazon-2023", path) == (
        f"{path}: line 3: {fault}. Mend it, or leave such rows out with --skip-bad-rows"
    )
    data, figures = imported("amazon-2023", path, settings=SKIP)
    assert data.events["timestamp"].to_list() == [1, 2]
    assert figures["bad_rows_by_reason"] == {fault.split(":")[0]: 1}


UNREADABLE: list[tuple[dict[str, Any], str, str]] = [
    ({"rating": 10**400}, "rating", f"'rating' is 1{'0' * 56}...; expected a number"),
    ({"rating": "good"}, "rating", "'rating' is 'good'; expected a number"),
    ({"verified_purchase": 1}, "verified", "'verified_purchase' is 1; expected true or false"),
    ({"helpful_vote": True}, "helpful_votes", "'helpful_vote' is True; expected a number"),
]


@pytest.mark.parametrize(("values", "column", "detail"), UNREADABLE)
def test_an_optional_value_that_cannot_be_read_is_null_and_counted(
    tmp_path: Path, values: dict[str, Any], column: str, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The event stays, also where bad rows are an error."""
    path = put(tmp_path / "R.jsonl", [GOOD, GOOD | values | {"timestamp": 2}, GOOD | values | {"timestamp": 3}])
    data, figures = imported("amazon-2023", path)
    assert data.events[column].null_count() == 2
    assert (data.n_events, figures["bad_rows"], figures["unreadable_values"]) == (3, 0, 2)
    assert figures["unreadable_values_by_column"] == {column: 2}
    assert caplog.messages == [
        f"no {column} for R.jsonl, line 2: {detail}; the row stays, and further ones are counted"
    ]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "R.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"user_id": "\xff\xfe"}\n')
    assert "line 2: broken line: not UTF-8 (invalid start byte)" in error_of("amazon-2023", path)


def test_bad_rows_are_logged_up_to_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = put(tmp_path / "R.jsonl", [GOOD, *["x"] * 20])
    _, figures = imported("amazon-2023", path, settings=SKIP)
    assert figures["bad_rows"] == 20
    assert len(caplog.messages) == 5
    assert caplog.messages[0] == (
        "left out R.jsonl, line 2: broken line: not JSON (Expecting value: line 1 column 1 (char 0))"
    )
    assert caplog.messages[4].endswith("; further ones are only counted")


# --- the fast paths against their slow twins ------------------------------------------------------------------------

UNICODE = st.characters(codec="utf-8")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(UNICODE, max_size=5), st.lists(st.integers(), max_size=1), st.just({}),
)  # fmt: skip
GOOD_VALUES = {
    "user_id": st.text(UNICODE, max_size=5),
    "parent_asin": st.text("ABC123", min_size=1, max_size=3),
    "timestamp": st.integers(0, 2**50),
    "rating": st.one_of(st.none(), st.floats(0, 5), st.integers(1, 5)),
    "verified_purchase": st.one_of(st.none(), st.booleans()),
    "helpful_vote": st.one_of(st.none(), st.integers(0, 100)),
}
RECORDS = st.lists(
    st.one_of(
        st.fixed_dictionaries(GOOD_VALUES),
        st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD_VALUES, VALUES)),
    ),
    min_size=1,
    max_size=6,
)


def check_json_twins(text: bytes) -> bool:
    """Whether the fast path answers; where it does, the slow one finds no bad row and the same table."""
    block = Block(Path("x"), text, 5, text.count(b"\n"), 0)
    fast = json_lines.fast_chunk(block, FIELDS)
    bad = BadRows(skip=True)
    slow = json_lines.slow_chunk(block, FIELDS, bad, json_lines.parse_json)
    if fast is not None:
        assert bad.counts.total() == 0
        assert fast.table.equals(slow.table)
        assert fast.lines.tolist() == slow.lines.tolist() == list(range(5, 5 + block.line_count))
    return fast is not None


@given(records=RECORDS, escape=st.booleans())
@settings(max_examples=150, deadline=None)
def test_json_fast_path_equals_its_twin(records: list[dict[str, Any]], escape: bool) -> None:
    text = "".join(json.dumps(r, ensure_ascii=escape) + "\n" for r in records).encode()
    check_json_twins(text)
    bad = BadRows(skip=True)
    slow = json_lines.slow_chunk(Block(Path("x"), text, 5, len(records), 0), FIELDS, bad, json_lines.parse_json)
    assert len(slow.table) + bad.counts.total() == len(records)


RAW_VALUES = [
    "null", "true", "0", "-0", "-0.0", "01", "1.", "1.0", "1.5", "1e3", "1e", "1e400", "5e-324", "0.30000000000000004",
    "NaN", "-Infinity", str(2**53 + 1), str(2**63 - 1), str(2**63), str(-(2**63)), str(1 - 2**63), "9.3e18", "1" * 400,
    '""', '"1"', '"[1]"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\ud800\\u0041"', '"\\u0000"', '"a\tb"', '"\\x"', '"\xff"',
    '"\\"', "[]", '{"user_id": "v"}', "[1,]", "nul", "[" * 300 + "]" * 300, "[" * 5000,
]  # fmt: skip
GOOD_LINE = json.dumps(GOOD).encode()


@pytest.mark.parametrize("value", RAW_VALUES)
@pytest.mark.parametrize("name", [*GOOD_VALUES, "text"])
def test_json_twins_on_values_at_the_edge(name: str, value: str) -> None:
    """In place of the good value, and behind it under the same name: of two, both take the last."""
    raw = value.encode("latin1")
    check_json_twins(json.dumps(GOOD | {name: "@"}).encode().replace(b'"@"', raw) + b"\n")
    check_json_twins(GOOD_LINE + b"\n" + GOOD_LINE[:-1] + b', "' + name.encode() + b'": ' + raw + b"}\n")


@pytest.mark.parametrize(
    "text",
    [
        b"\n",
        b"{}\n",
        b"[1]\n",
        GOOD_LINE + b"\n \n" + GOOD_LINE + b"\n",
        GOOD_LINE + b" " + GOOD_LINE + b"\n",
        GOOD_LINE + b", " + GOOD_LINE + b"\n",
        GOOD_LINE + GOOD_LINE + b"\n" + GOOD_LINE.replace(b": 1,", b":\n1,") + b"\n",  # three objects on three lines
        GOOD_LINE + GOOD_LINE[:-1] + b', "more": [{}\n, {}]}\n',  # two on two
        b"\xef\xbb\xbf" + GOOD_LINE + b"\n",
        GOOD_LINE[:-1] + b"\n",
    ],
)
def test_json_twins_on_lines_that_are_not_an_object(text: bytes) -> None:
    assert not check_json_twins(text)


def test_the_json_fast_path_takes_what_files_hold() -> None:
    for line in (GOOD_LINE, json.dumps(GOOD, ensure_ascii=False).encode(), GOOD_LINE.replace(b"_id", b"\\u005fid")):
        assert check_json_twins((line + b"\n") * 3)


CELLS = st.one_of(
    st.text(st.sampled_from('a1 ,"\n.-é'), max_size=4), st.integers(-(2**66), 2**66).map(str),
    st.floats().map(str), st.sampled_from(["true", "2024-01-01", "2024-02-30", "train", "", " ", "1e3"]),
)  # fmt: skip
COLUMNS = ("user_id", "item_id", "timestamp", "rating", "split", "ok")
CELL_FIELDS = (
    *log_fields("user_id", "item_id", "timestamp"),
    Field("rating", "rating", "number"),
    Field("split", "split", "split"),
    Field("ok", "ok", "flag"),
)
GOOD_ROW = st.tuples(
    st.text("ab é", min_size=1, max_size=3).filter(str.strip),
    st.text('a"\n,', min_size=1, max_size=3).filter(str.strip),
    st.integers(0, 2**40).map(str), st.sampled_from(["", "1", "2.5"]), st.sampled_from(["", "train"]), st.just("1"),
)  # fmt: skip


@given(rows=st.lists(st.one_of(GOOD_ROW, GOOD_ROW, st.tuples(*[CELLS] * 6)), min_size=1, max_size=5))
@example(rows=[("1", "1", "9.223372036854776e+18", "", "", "")])  # 2^63, which no whole number of 64 bits holds
@settings(max_examples=150, deadline=None)
def test_delimited_fast_path_equals_its_twin(rows: list[tuple[str, ...]]) -> None:
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n" for cells in rows]
    text = "".join(quoted).encode()
    block = Block(Path("x"), text, 2, text.count(b"\n"), 0)
    fast = delimited.fast_chunk(block, list(COLUMNS), CELL_FIELDS, Dialect())
    bad = BadRows(skip=True)
    cells = delimited.slow_cells(block, list(COLUMNS), CELL_FIELDS, bad, Dialect())
    slow = slow_chunk(block.path, cells, CELL_FIELDS, bad, 0)
    assert len(slow.table) + bad.counts.total() == len(rows)
    if fast is not None:
        assert bad.counts.total() == 0
        assert fast.table.equals(slow.table)
        assert fast.lines.tolist() == slow.lines.tolist()


# --- the order of the log ---------------------------------------------------------------------------------------------

IDS = st.builds(str.__add__, st.sampled_from(["", "user_000", "é"]), st.text("a\0bé\U0001f600", max_size=10))


@given(prefix=st.text("aé", max_size=9), rows=st.lists(st.tuples(IDS, st.integers(-2, 2)), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_the_order_of_events_is_that_of_a_stable_sort(prefix: str, rows: list[tuple[str, int]]) -> None:
    """The twin is `sorted`; ids differ before, within and behind the eight bytes that are compared first."""
    users = Codes()
    named = [(prefix + user, time, line) for line, (user, time) in enumerate(rows)]
    log = pl.DataFrame(named, schema={"user": pl.String, TIMESTAMP: pl.Int64, LINE: pl.UInt32}, orient="row")
    events = log.select(users.encode(log["user"]).alias(USER), TIMESTAMP, LINE)
    expected = sorted(range(len(named)), key=lambda line: named[line][:2])
    assert in_order(events, users)[LINE].to_list() == expected


def test_merged_parts_of_the_log_make_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = [put(tmp_path / f"{i}.jsonl", [review_2023(f"u{i * 7 % 3}", f"P{i}", i)] * 2) for i in range(5)]
    expected, _ = imported("amazon-2023", *logs)
    monkeypatch.setattr("sagerec.catalogue.formats.event_log.MERGED_ROWS", 3)
    data, figures = imported("amazon-2023", *logs)
    assert data.events.equals(expected.events)
    assert (data.n_events, figures["duplicate_events"]) == (5, 5)


# --- every importer fed broken bytes --------------------------------------------------------------------------------


def samples(folder: Path) -> dict[Format, list[Path]]:
    """Small good files of every format."""
    old = [review_2014("u", "B1", 1), review_2014("v", "B2", 2)]
    table = folder / "table"
    table.mkdir(parents=True)
    pl.DataFrame({"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": [1, 2]}).write_csv(table / "log.csv")
    pl.DataFrame({"item_id": ["a", "b"], "title": ['A "x"', "B"]}).write_csv(table / "items.csv")
    mini = minionerec(folder / "mini", row("A1", [0], 1), row("A1", [0, 1], 2), row("A1", [1, 2], 3))
    recbole = folder / "recbole"
    recbole.mkdir()
    (recbole / "x.inter").write_text(INTER + "u\ta\t1\t2\nv\tb\t2\t3\n", encoding="utf-8")
    (recbole / "x.item").write_text(ITEM + "a\tA é\t1999\tx y\nb\tB\t\t\n", encoding="utf-8")
    return {
        "amazon-2014": [
            put(folder / "2014" / "reviews_B_5.json", old),
            put(folder / "2014" / "meta_B.json", META_2014, dump=repr),
        ],
        "amazon-2018": [
            put(folder / "2018" / "B_5.json", [review_2018("u", "A", 1), review_2018("v", "A", 2)]),
            put(folder / "2018" / "meta_B.json", [{"asin": "A", "title": "T", "price": "$1"}]),
        ],
        "amazon-2023": [
            put(folder / "2023" / "B.jsonl", [review_2023("u", "A", 1), review_2023("v", "A", 2)]),
            put(folder / "2023" / "meta_B.jsonl", [{"parent_asin": "A", "title": "T", "features": ["x"]}]),
        ],
        "recbole": [recbole / "x.inter", recbole / "x.item"],
        "table": [table / "log.csv", table / "items.csv"],
        "movielens": sorted(movielens(folder / "movielens", "1m").iterdir()),
        "minionerec": sorted(p for p in mini.rglob("*") if p.is_file()),
    }


@pytest.fixture(scope="module")
def sample_files(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, list[Path]]:
    return samples(tmp_path_factory.mktemp("samples"))


BYTES = st.one_of(
    st.binary(max_size=8), st.sampled_from([b"\n", b"\r", b'"', b"\x00", b"\xff", b"{", b"[", b"\\ud800"])
)


@pytest.mark.parametrize(
    "name", ["amazon-2014", "amazon-2018", "amazon-2023", "recbole", "table", "movielens", "minionerec"]
)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_bytes_are_an_error_or_a_counted_skip(
    name: Format, data: st.DataObject, sample_files: dict[Format, list[Path]]
) -> None:
    """Bytes are cut out, put in, or the file is packed and cut: a DatasetError, or with skipping also a whole dataset.

    Whatever happens, the folder is either there and readable, or not there, with nothing beside it.
    """
    files = sample_files[name]
    chosen = data.draw(st.sampled_from(files))
    content = chosen.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.sampled_from([0, 1, 2, 20, 10_000]))
    broken = content[:start] + data.draw(BYTES) + content[start + length :]
    if data.draw(st.booleans()):
        broken = gzip.compress(broken)
        broken = broken[: data.draw(st.integers(0, len(broken)))]
    skip = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for path in files:
            copy = Path(folder) / path.relative_to(files[0].parents[1])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(broken if path == chosen else path.read_bytes())
            paths.append(copy)
        out = Path(folder) / "place" / "out"
        try:
            figures = import_dataset(name, paths, out, ImportSettings(skip_bad_rows=skip, unknown_items="keep"))
        except DatasetError:
            assert not out.parent.exists() or list(out.parent.iterdir()) == []
        else:
            assert skip or figures["bad_rows"] == 0
            assert [p.name for p in out.parent.iterdir()] == ["out"]
            assert len(pl.read_parquet(out / "interactions.parquet")) == figures["interactions"] > 0


@given(length=st.integers(0, 2000))
@settings(max_examples=20, deadline=None)
def test_a_parquet_table_cut_short(length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.parquet"
        pl.DataFrame({"user_id": ["u"] * 50, "item_id": range(50), "timestamp": range(50)}).write_parquet(path)
        content = path.read_bytes()
        path.write_bytes(content[: min(length, len(content) - 1)])
        with pytest.raises(DatasetError, match="cannot be read as Parquet"):
            import_dataset("table", [path], Path(folder) / "out")
