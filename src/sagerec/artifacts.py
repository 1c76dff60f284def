"""Artefacts on disk: folders with a manifest, written beside and renamed, refused where they do not fit.

A manifest (`manifest.json`) holds the kind, the format version, the sizes, the SHA-256 of the content, the
hashes of what the artefact was made from, the settings, the seed and the package versions. Who reads it is told where a
file is not what was written: by size and time of change, and by its hash where the time is another, as after a copy.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl

from sagerec.errors import ArtifactError
from sagerec.files import digest, read_json, recover, replace_folder, write_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
"""What reading a missing or damaged Parquet file raises; a panic of polars is a BaseException."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artefact is and where it came from."""

    kind: str
    """What the folder holds, such as `dataset` or `semantic_ids`."""
    content_hash: str = ""
    """SHA-256 over the names and bytes of every file but the manifest."""
    made_from: dict[str, str] = field(default_factory=dict)
    """Kind -> content hash of each artefact that this one was made from."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The resolved settings of the stage that wrote it."""
    seed: int | None = None
    """The seed of that stage, None where it draws nothing."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Counts and quality figures of the content."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package versions and platform."""
    created: str = ""
    """UTC time of writing, ISO 8601."""
    grown_from: list[str] = field(default_factory=list)
    """Content hashes of the artefact before items were added to it, oldest first: what was made from one of these
    serves with the grown one too."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    hashes: dict[str, Any] = field(default_factory=dict)
    """`files`: name -> [SHA-256, bytes, time of change in ns] of each; `manifest`: SHA-256 of the rest of this."""


def package_versions() -> dict[str, str]:
    """Versions of what decides a result: Python, this package, and the numerical libraries."""
    names = ("sagerec", "torch", "numpy", "polars", "scikit-learn", "faiss-cpu")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> str:
    """SHA-256 over (relative name, content) of every file in `folder` but the manifest, in name order."""
    return _content_hash(_stamps(folder))


def _stamps(folder: Path) -> dict[str, list[Any]]:
    """Relative name -> [SHA-256, bytes, time of change in ns] of every file but the manifest, in name order."""
    found: dict[str, list[Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        size, changed = _size_and_time(path)
        found[path.relative_to(folder).as_posix()] = [hash_file(path), size, changed]
    return found


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _content_hash(stamps: dict[str, list[Any]]) -> str:
    return hashlib.sha256("".join(f"{name}\0{stamp[0]}\n" for name, stamp in stamps.items()).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _hash_at(path: Path, size: int, changed: int) -> str:
    """`hash_file`, once as long as size and time of change stay."""
    return hash_file(path)


@contextmanager
def write_artifact(
    target: Path,
    kind: str,
    *,
    made_from: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
    seed: int | None = None,
    sizes: dict[str, Any] | None = None,
    grown_from: list[str] | None = None,
) -> Iterator[Path]:
    """Write an artefact: fill the folder given, and the manifest is added and the whole renamed to `target`.

    `sizes` may still be filled inside the `with` block; it is read when the block ends.

    Raises: ArtifactError where `target` is a file, a folder of other things or an artefact of another kind: only
    artefacts are replaced, by such as themselves.
    """
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise ArtifactError(
            f"{target} exists and is not an artefact of sagerec, so it is left alone; give another place or remove it"
        )
    if (held := _kind(target)) not in (None, kind):
        raise ArtifactError(f"{target} holds a {held}, which a {kind} would replace; give another place or remove it")
    with replace_folder(target) as fresh:
        yield fresh
        stamps = _stamps(fresh)
        manifest = Manifest(
            kind=kind,
            content_hash=_content_hash(stamps),
            made_from=made_from or {},
            settings=settings or {},
            seed=seed,
            sizes=sizes or {},
            versions=package_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            grown_from=grown_from or [],
            hashes={"files": stamps},
        )
        values = json.loads(json.dumps(asdict(manifest)))
        values["hashes"]["manifest"] = digest(values)
        write_json(fresh / MANIFEST, values)


def _kind(folder: Path) -> str | None:
    """The kind that the manifest of a folder gives, None where it gives none."""
    try:
        found = read_json(folder / MANIFEST)
    except ArtifactError:
        return None
    return str(found["kind"]) if isinstance(found, dict) and "kind" in found else None


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Read and check the manifest of `folder`, and that its files are those that were written.

    Raises: ArtifactError where it is missing, of another kind, of another format version, or anything was changed.
    """
    recover(folder)
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} is not a {kind} artefact: it has no {MANIFEST}; run the stage that makes it")
    values = read_json(folder / MANIFEST)
    if not isinstance(values, dict):
        raise ArtifactError(f"{folder / MANIFEST} holds no JSON object; make the artefact again")
    if values.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format version {values.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "make it again"
        )
    hashes = values.get("hashes")
    if not isinstance(hashes, dict) or hashes.pop("manifest", None) != digest(values):
        raise ArtifactError(f"{folder / MANIFEST} was changed after it was written; make the artefact again")
    manifest = Manifest(**values)
    if manifest.kind != kind:
        raise ArtifactError(f"{folder} holds a {manifest.kind!r} artefact, expected {kind!r}")
    for name, (sha256, size, changed) in manifest.hashes["files"].items():
        _check_file(folder, name, sha256, size, changed)
    return manifest


def _check_file(folder: Path, name: str, sha256: str, size: int, changed: int) -> None:
    """Raise ArtifactError unless a file is what was written."""
    path = folder / name
    try:
        now = _size_and_time(path)
        intact = now[0] == size and (now[1] == changed or _hash_at(path, *now) == sha256)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); make {folder} again") from error
    if not intact:
        raise ArtifactError(f"{path} was changed after it was written; make {folder} again")


def check_content(folder: Path, manifest: Manifest) -> None:
    """Raise ArtifactError unless the files of `folder`, each read whole, are those that were written, and no others."""
    if hash_folder(folder) != manifest.content_hash:
        raise ArtifactError(f"{folder} was changed after it was written; make it again")


def misfit(
    folder: Path,
    kind: str,
    *,
    made_from: dict[str, str],
    settings: dict[str, Any],
    seed: int | None = None,
    grown_from: dict[str, list[str]] | None = None,
) -> str | None:
    """Why the artefact at `folder` cannot serve for these inputs and settings; None where it fits.

    `grown_from` (input -> older content hashes) names inputs that have only had items added since.
    """
    try:
        manifest = read_manifest(folder, kind)
    except ArtifactError as error:
        return str(error)
    older = grown_from or {}
    used = {name: made_from.get(name, h) if h in older.get(name, []) else h for name, h in manifest.made_from.items()}
    if used != made_from:
        changed = sorted(k for k in made_from if used.get(k) != made_from[k])
        return f"it was made from another {' and '.join(changed) or 'input'}"
    for name, value in settings.items():
        if manifest.settings.get(name) != value:
            return f"its setting {name} is {manifest.settings.get(name)!r}, not {value!r}"
    if set(manifest.settings) != set(settings):
        return "its settings are those of another version"
    if manifest.seed != seed:
        return f"its seed is {manifest.seed}, not {seed}"
    return None
