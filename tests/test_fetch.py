"""`sagerec fetch` against a local server that cuts connections, ignores ranges and serves wrong sizes."""

import gzip
import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sagerec.catalogue.dataset import read_dataset
from sagerec.catalogue.fetch import CATEGORIES, SITES, FetchSettings, _Redirects, fetch_category, fetch_file
from sagerec.cli import main
from sagerec.errors import DatasetError, SettingsError
from tests.test_formats import review_2023

REVIEWS, META = "/review_categories/All_Beauty.jsonl.gz", "/meta_categories/meta_All_Beauty.jsonl.gz"


def packed(rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


class Server(ThreadingHTTPServer):
    """Serves `files`, and misbehaves as its attributes say."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {
            REVIEWS: packed([review_2023(f"u{i % 7}", f"P{i % 5}", i) for i in range(400)]),
            META: packed([{"parent_asin": f"P{i}", "title": f"T{i}"} for i in range(5)]),
        }
        self.asked: list[tuple[str, str | None]] = []
        """Path and Range of each request."""
        self.cut_after: list[int] = []
        """Bytes after which each of the next answers is cut."""
        self.extra_length = 0
        """How far the stated length is off."""
        self.ranges, self.tag, self.status = True, '"v1"', 200
        self.leads_to = ""
        """Address that the first path is redirected to."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        content, wanted = server.files[self.path], self.headers["Range"]
        server.asked.append((self.path, wanted))
        start = 0
        if server.leads_to and len(server.asked) == 1:
            self.send_response(302)
            self.send_header("Location", server.leads_to)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.status != 200:
            self.send_error(server.status)
            return
        if wanted and server.ranges and self.headers["If-Range"] == server.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", server.tag)
        if server.extra_length >= 0:
            self.send_header("Content-Length", str(len(content) - start + server.extra_length))
        self.end_headers()
        end = start + server.cut_after.pop(0) if server.cut_after else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def patient(server: Server, attempts: int = 3) -> FetchSettings:
    return FetchSettings(base_url=server.address, attempts=attempts, pause_seconds=0, timeout_seconds=5)


def test_fetch_and_import(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """400 reviews of 7 users; a second call asks for nothing."""
    out = tmp_path / "data"
    command = ["fetch", "All_Beauty", "--out", str(out), "--base-url", server.address]
    assert main(command) == 0
    assert "400" in capsys.readouterr().out
    data = read_dataset(out)
    assert (data.n_users, data.n_items, data.n_events) == (7, 5, 400)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.downloads"]
    assert sorted(p.name for p in (tmp_path / "data.downloads").iterdir()) == [
        ".All_Beauty.jsonl.gz.json",
        ".meta_All_Beauty.jsonl.gz.json",
        "All_Beauty.jsonl.gz",
        "meta_All_Beauty.jsonl.gz",
    ]
    asked = len(server.asked)
    assert main(command) == 0
    assert len(server.asked) == asked == 2


def test_a_cut_connection_is_taken_up_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    server.cut_after = [100, 50]
    [reviews, _] = fetch_category("All_Beauty", tmp_path, patient(server))
    assert reviews.read_bytes() == server.files[REVIEWS]
    assert [r for p, r in server.asked if p == REVIEWS] == [None, "bytes=100-", "bytes=150-"]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".gz", ".gz", ".json", ".json"]


def test_a_second_call_goes_on_after_the_first_gave_up(server: Server, tmp_path: Path) -> None:
    server.cut_after = [100, 50]
    size = len(server.files[REVIEWS])
    with pytest.raises(DatasetError) as error:
        fetch_category("All_Beauty", tmp_path, patient(server, attempts=2))
    part = tmp_path / "All_Beauty.jsonl.gz.part"
    assert str(error.value) == (
        f"{server.address}{REVIEWS}: the connection was cut after 150 of {size:,} bytes; 150 bytes are in {part}. "
        "Check the network and call again: it goes on there. Or get the file in another way and give it to sagerec "
        "import"
    )
    assert not (tmp_path / "All_Beauty.jsonl.gz").exists()
    [reviews, _] = fetch_category("All_Beauty", tmp_path, patient(server))
    assert reviews.read_bytes() == server.files[REVIEWS]
    assert server.asked[2] == (REVIEWS, "bytes=150-")


@pytest.mark.parametrize("what", ["changed", "no ranges"])
def test_a_file_that_changed_or_cannot_be_continued_is_fetched_anew(server: Server, tmp_path: Path, what: str) -> None:
    server.cut_after = [100]
    with pytest.raises(DatasetError):
        fetch_category("All_Beauty", tmp_path, patient(server, attempts=1))
    if what == "changed":
        server.tag = '"v2"'
        server.files[REVIEWS] = packed([review_2023("other", "P1", i) for i in range(9)])
    else:
        server.ranges = False
    [reviews, _] = fetch_category("All_Beauty", tmp_path, patient(server))
    assert reviews.read_bytes() == server.files[REVIEWS]


def test_a_whole_part_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    """As after a kill between the last byte and the renaming."""
    path = tmp_path / "All_Beauty.jsonl.gz"
    path.with_name(path.name + ".part").write_bytes(server.files[REVIEWS])
    path.with_name(path.name + ".part.json").write_text('{"tag": "\\"v1\\""}')
    fetch_file(server.address + REVIEWS, path, patient(server))
    assert path.read_bytes() == server.files[REVIEWS]
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_a_server_that_states_more_than_it_sends(server: Server, tmp_path: Path) -> None:
    server.extra_length = 10
    size = len(server.files[REVIEWS])
    with pytest.raises(DatasetError, match=rf"the connection was cut after {size:,} of {size + 10:,} bytes"):
        fetch_category("All_Beauty", tmp_path, patient(server, attempts=1))
    assert not (tmp_path / "All_Beauty.jsonl.gz").exists()


def test_a_server_that_states_no_size(server: Server, tmp_path: Path) -> None:
    server.extra_length = -1
    with pytest.raises(DatasetError, match=r"the server does not state the file's size \(Content-Length None, Content"):
        fetch_category("All_Beauty", tmp_path, patient(server))


def test_a_page_in_place_of_the_file(server: Server, tmp_path: Path) -> None:
    server.files[REVIEWS] = b"<html>come back later</html>"
    said = r"got 28 bytes, and the file begins with b'<h'; expected a whole gzip file of 28 bytes"
    with pytest.raises(DatasetError, match=said):
        fetch_category("All_Beauty", tmp_path, patient(server))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [10, -1])
def test_a_gzip_file_that_is_cut_on_the_server(server: Server, tmp_path: Path, kept: int) -> None:
    """It begins as it should and is as long as the server says; it never gets its name."""
    server.files[REVIEWS] = server.files[REVIEWS][:kept]
    with pytest.raises(DatasetError, match=r"and the file ends early; expected a whole gzip file"):
        fetch_category("All_Beauty", tmp_path, patient(server))
    assert list(tmp_path.iterdir()) == []


def test_a_gzip_file_with_a_wrong_byte(server: Server, tmp_path: Path) -> None:
    content = bytearray(server.files[REVIEWS])
    content[len(content) // 2] ^= 1
    server.files[REVIEWS] = bytes(content)
    with pytest.raises(DatasetError, match=r"and the file cannot be read"):
        fetch_category("All_Beauty", tmp_path, patient(server))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changed_since_it_was_fetched(server: Server, tmp_path: Path) -> None:
    [reviews, _] = fetch_category("All_Beauty", tmp_path, patient(server))
    reviews.write_bytes(packed([review_2023("other", "P1", 1)]))
    record = tmp_path / ".All_Beauty.jsonl.gz.json"
    with pytest.raises(DatasetError) as error:
        fetch_category("All_Beauty", tmp_path, patient(server))
    assert str(error.value) == (
        f"{reviews} is not what was fetched: its SHA-256 is not that in {record}. Remove the file to fetch it anew, or "
        "the record to take the file as it is"
    )
    record.unlink()
    fetch_category("All_Beauty", tmp_path, patient(server))
    assert len(server.asked) == 2


def test_a_file_of_the_same_name_of_another_release(server: Server, tmp_path: Path) -> None:
    """Metadata of Books is meta_Books.json.gz in 2014 and 2018."""
    packed_meta = server.files[META]
    server.files |= {
        "/categoryFiles/reviews_Books_5.json.gz": packed_meta,
        "/categoryFiles/meta_Books.json.gz": packed_meta,
    }
    server.files["/categoryFilesSmall/Books_5.json.gz"] = packed_meta
    settings = patient(server)
    fetch_category("Books", tmp_path, replace(settings, release="2014"))
    with pytest.raises(
        DatasetError, match=r"meta_Books.json.gz was not fetched from metaFiles2/meta_Books.json.gz, says"
    ):
        fetch_category("Books", tmp_path, replace(settings, release="2018"))


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x", "http://[::1"])
def test_redirects_lead_to_the_web_only(server: Server, tmp_path: Path, place: str) -> None:
    server.leads_to = place
    with pytest.raises(DatasetError) as error:
        fetch_category("All_Beauty", tmp_path, patient(server))
    assert str(error.value).startswith(f"{server.address}{REVIEWS}: ")
    assert "--base-url" in str(error.value)
    assert len(server.asked) == 1


def test_a_redirect_on_the_web_is_followed_and_never_from_https_to_http(server: Server, tmp_path: Path) -> None:
    server.files["/moved.gz"] = server.files[REVIEWS]
    server.leads_to = "/moved.gz"
    [reviews, _] = fetch_category("All_Beauty", tmp_path, patient(server))
    assert reviews.read_bytes() == server.files["/moved.gz"]
    asked = urllib.request.Request("https://a.org/x")
    with pytest.raises(
        DatasetError, match=r"the server leads to 'http://a.org/x', which is not followed; expected https:"
    ):
        _Redirects().redirect_request(asked, None, 302, "", {}, "http://a.org/x")
    assert _Redirects().redirect_request(asked, None, 302, "", {}, "https://b.org/x") is not None


@pytest.mark.parametrize(
    "address", ["http://[::1", "http://", "https://a b/", "http://h:x/", "http://h\n/", "ftp://h/"]
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(SettingsError, match=r"base_url is .*; expected http\(s\)://HOST/…"):
        FetchSettings(base_url=address)


def test_addresses_are_secure() -> None:
    assert all(site.startswith("https://") for site, _, _ in SITES.values())


@pytest.mark.parametrize(("status", "said"), [(404, "the server answered 404"), (503, "the server answered 503")])
def test_errors_of_the_server(server: Server, tmp_path: Path, status: int, said: str) -> None:
    """Only those that may pass are tried again."""
    server.status = status
    with pytest.raises(DatasetError, match=said):
        fetch_category("All_Beauty", tmp_path, patient(server))
    assert len(server.asked) == (1 if status == 404 else 3)


def test_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens there; the dataset is not begun."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        address = f"http://127.0.0.1:{closed.server_address[1]}"
    out = str(tmp_path / "data")
    command = ["fetch", "All_Beauty", "--out", out, "--base-url", address, "--pause-seconds", "0", "--attempts", "2"]
    assert main(command) == 1
    printed = capsys.readouterr().err
    assert "no connection ([Errno 111] Connection refused); 0 bytes are in" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "data").exists()


def test_unknown_categories_and_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'beauty' is no category of Amazon 2014; expected for example Beauty"):
        fetch_category("beauty", tmp_path, FetchSettings(release="2014"))
    with pytest.raises(SettingsError, match=r"base_url is 'file:///etc'; expected http\(s\)://HOST/…"):
        FetchSettings(base_url="file:///etc")
    assert set(CATEGORIES) == set(SITES)
