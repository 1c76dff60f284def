"""`sagerec fetch`: files of a named Amazon category from its publishers' sites.

A file is written beside its place (`NAME.part`) and renamed when it is a whole gzip file of the size that the server
states. What was fetched stays, so a second call goes on where the first was cut: it asks for the rest (`Range`) on
condition that the file is still the same (`If-Range`), and begins anew where the server says that it is not. The
publishers state no hashes; that of what came is kept beside it (`.NAME.json`) and compared when the file is used again.
"""

import difflib
import http.client
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sagerec.artifacts import hash_file
from sagerec.catalogue.formats.blocks import gzip_fault
from sagerec.config import above, at_least, check_fields, require
from sagerec.errors import DatasetError, SettingsError
from sagerec.files import read_json, write_json
from sagerec.progress import progress_bar

logger = logging.getLogger(__name__)
Release = Literal["2014", "2018", "2023"]
MB = 1_000_000
PIECE_BYTES = 1 << 20
SITES: dict[Release, tuple[str, str, str]] = {
    "2014": (
        "https://snap.stanford.edu/data/amazon/productGraph/",
        "categoryFiles/reviews_{}_5.json.gz",
        "categoryFiles/meta_{}.json.gz",
    ),
    "2018": (
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/",
        "categoryFilesSmall/{}_5.json.gz",
        "metaFiles2/meta_{}.json.gz",
    ),
    "2023": (
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/",
        "review_categories/{}.jsonl.gz",
        "meta_categories/meta_{}.jsonl.gz",
    ),
}
"""Release -> the publishers' address, and the reviews and the metadata of a category below it."""
CATEGORIES: dict[Release, str] = {
    "2014": """Amazon_Instant_Video Apps_for_Android Automotive Baby Beauty Books CDs_and_Vinyl
        Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Grocery_and_Gourmet_Food
        Health_and_Personal_Care Home_and_Kitchen Kindle_Store Movies_and_TV Musical_Instruments Office_Products
        Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games""",
    "2018": """AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books CDs_and_Vinyl
        Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards
        Grocery_and_Gourmet_Food Home_and_Kitchen Industrial_and_Scientific Kindle_Store Luxury_Beauty
        Magazine_Subscriptions Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies
        Prime_Pantry Software Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games""",
    "2023": """All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Automotive Baby_Products
        Beauty_and_Personal_Care Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry
        Digital_Music Electronics Gift_Cards Grocery_and_Gourmet_Food Handmade_Products Health_and_Household
        Health_and_Personal_Care Home_and_Kitchen Industrial_and_Scientific Kindle_Store Magazine_Subscriptions
        Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies Software
        Sports_and_Outdoors Subscription_Boxes Tools_and_Home_Improvement Toys_and_Games Unknown Video_Games""",
}


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """Which files are fetched, and how patiently."""

    release: Release = "2023"
    """Release of Amazon Product Reviews: 2014 and 2018 are 5-core, 2023 is the whole category."""
    base_url: str = ""
    """Address in place of the publishers', such as a mirror's; the paths below it are theirs."""
    attempts: int = 5
    """How often a cut connection is taken up again before it is an error."""
    pause_seconds: float = 2.0
    """Pause before the second attempt; twice as long before each further one."""
    timeout_seconds: float = 30.0
    """How long a silent server is waited for."""

    def __post_init__(self) -> None:
        day = 86_400
        check_fields(self, attempts=at_least(1, 1000), pause_seconds=at_least(0, day), timeout_seconds=above(0, day))
        require(
            not self.base_url or _is_web(self.base_url), f"base_url is {self.base_url!r}; expected http(s)://HOST/…"
        )


def _is_web(address: str) -> bool:
    """Whether an address can be asked for over http or https."""
    try:
        parts = urllib.parse.urlsplit(address)
        _ = parts.port  # raises where it is none
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and address.isprintable() and " " not in address


def fetch_category(name: str, folder: Path, settings: FetchSettings) -> list[Path]:
    """Fetch reviews and metadata of a category into `folder`; files that are there are left as they are.

    Raises: SettingsError for an unknown category, DatasetError where a file cannot be had, or one that is there is not
    what was fetched.
    """
    known = CATEGORIES[settings.release].split()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise SettingsError(
            f"{name!r} is no category of Amazon {settings.release}; expected for example {', '.join(near)}. "
            f"All: {', '.join(known)}"
        )
    site, *patterns = SITES[settings.release]
    base = (settings.base_url or site).rstrip("/") + "/"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for pattern in patterns:
        address = base + pattern.format(name)
        path = folder / address.rsplit("/", 1)[1]
        if path.is_file():
            check_fetched(path, pattern.format(name))
            logger.info("%s is there already", path)
        else:
            fetch_file(address, path, settings)
            write_json(_record_path(path), {"file": pattern.format(name), "sha256": hash_file(path)})
        paths.append(path)
    return paths


def check_fetched(path: Path, name: str) -> None:
    """Raise DatasetError where a file that is there is not `name` as it was fetched; one put there by hand is taken."""
    record_path = _record_path(path)
    if not record_path.is_file():
        return
    record = read_json(record_path)
    if not isinstance(record, dict) or record.get("file") != name:
        raise DatasetError(
            f"{path} was not fetched from {name}, says {record_path}. Give another folder with --downloads"
        )
    if record.get("sha256") != hash_file(path):
        raise DatasetError(
            f"{path} is not what was fetched: its SHA-256 is not that in {record_path}. Remove the file to fetch it "
            "anew, or the record to take the file as it is"
        )


def _record_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def fetch_file(address: str, path: Path, settings: FetchSettings) -> None:
    """Fetch one gzip file. Raises: DatasetError; what was fetched stays in `PATH.part` for the next call."""
    part = path.with_name(path.name + ".part")
    pause = settings.pause_seconds
    with progress_bar(f"MB {path.name}", 0) as bar:

        def report(done: int, total: int) -> None:
            bar.update(done // MB, total=total // MB)

        for attempt in range(1, settings.attempts + 1):
            try:
                total = _continue(address, part, settings.timeout_seconds, report)
                break
            except _CutError as error:
                have = part.stat().st_size if part.exists() else 0
                if attempt == settings.attempts:
                    raise DatasetError(
                        f"{address}: {error}; {have:,} bytes are in {part}. Check the network and call again: it "
                        "goes on there. Or get the file in another way and give it to sagerec import"
                    ) from error
                logger.info("%s: %s; attempt %d follows", path.name, error, attempt + 1)
                time.sleep(pause)
                pause *= 2
    size, fault = part.stat().st_size, gzip_fault(part)
    if size != total or fault:
        _discard(part)
        raise DatasetError(
            f"{address}: got {size:,} bytes, and the file {fault or 'is whole'}; expected a whole gzip file of "
            f"{total:,} bytes. The server sent another thing: try later, or give another address with --base-url"
        )
    part.replace(path)
    _discard(part)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows where a server leads, to http and https only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        is_secure = req.type == "https"
        if not _is_web(newurl) or (is_secure and urllib.parse.urlsplit(newurl).scheme != "https"):
            raise DatasetError(
                f"{req.full_url}: the server leads to {newurl!r}, which is not followed; expected "
                f"{'https' if is_secure else 'http(s)'}://HOST/…. Give the file's new address with --base-url"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _CutError(Exception):
    """An attempt ended before the file did; another may go on."""


def _continue(address: str, part: Path, timeout: float, report: Callable[[int, int], None]) -> int:
    """Fetch what `part` lacks; returns the size of the whole file.

    Raises: _CutError where another attempt may help, DatasetError where none will.
    """
    have = part.stat().st_size if part.exists() else 0
    tag = _read_tag(part) if have else ""
    request = urllib.request.Request(address, headers={"Accept-Encoding": "identity", "User-Agent": "sagerec"})
    if have and tag:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=timeout) as response:
            resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
            total = _whole_size(response, have if resumed else 0, address)
            _write_tag(part, response)
            done = have if resumed else 0
            with part.open("ab" if resumed else "wb") as file:
                while piece := response.read(PIECE_BYTES):
                    _write(file, piece, part)
                    done += len(piece)
                    report(done, total)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if error.headers["Content-Range"] == f"bytes */{have}":
                return have
            _discard(part)
            raise _CutError("the file on the server is shorter than what is here, so it is fetched anew") from error
        if error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _CutError(f"the server answered {error.code} {error.reason}") from error
        raise DatasetError(
            f"{address}: the server answered {error.code} {error.reason}; expected the file. Its publishers may "
            "have moved it: give its new address with --base-url, or get it by hand and give it to sagerec import"
        ) from error
    except (ValueError, http.client.InvalidURL) as error:
        raise DatasetError(
            f"{address}: it leads to an address that is none ({error}); give another one with --base-url"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise _CutError(f"no connection ({getattr(error, 'reason', None) or error})") from error
    if done < total:
        raise _CutError(f"the connection was cut after {done:,} of {total:,} bytes")
    return total


def _whole_size(response: http.client.HTTPResponse, have: int, address: str) -> int:
    """The size of the whole file as the server states it. Raises: DatasetError where it does not."""
    try:
        if not have:
            return int(response.headers["Content-Length"])
        unit, _, span = response.headers["Content-Range"].partition(" ")
        window, _, total = span.partition("/")
        if unit == "bytes" and int(window.split("-")[0]) == have:
            return int(total)
    except (TypeError, ValueError, AttributeError, KeyError):
        pass
    raise DatasetError(
        f"{address}: the server does not state the file's size (Content-Length {response.headers['Content-Length']!r}, "
        f"Content-Range {response.headers['Content-Range']!r}), so it cannot be checked. Get the file by hand "
        "and give it to sagerec import"
    )


def _write(file: BinaryIO, piece: bytes, part: Path) -> None:
    try:
        file.write(piece)
    except OSError as error:
        raise DatasetError(
            f"{part} cannot be written ({error}); free space, or give another folder with --downloads"
        ) from error


def _tag_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _write_tag(part: Path, response: http.client.HTTPResponse) -> None:
    """Keep what tells this version of the file from another; weak tags do not."""
    tag = response.headers["ETag"] or ""
    if not tag or tag.startswith("W/"):
        tag = response.headers["Last-Modified"] or ""
    write_json(_tag_path(part), {"tag": tag})


def _read_tag(part: Path) -> str:
    try:
        return str(json.loads(_tag_path(part).read_text(encoding="utf-8"))["tag"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_path(part).unlink(missing_ok=True)
