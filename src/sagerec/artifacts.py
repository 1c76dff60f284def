"""Artefacts on disk: folders with a manifest, written beside and renamed, refused where they do not fit.

A manifest (`manifest.json`) holds the kind, the format version, the sizes, the SHA-256 of the content, the
hashes of what the artefact was made from, the settings, the seed and the package versions.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl

from sagerec.errors import ArtifactError

FORMAT_VERSION = 1
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
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON to `path`; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it into place, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read JSON. Raises: ArtifactError where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}); remove it and run the stage again") from error


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Give a fresh folder beside `target`; on success it takes target's place, on failure it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        fresh.chmod(0o755)
        yield fresh
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            target.replace(old / target.name)
            fresh.replace(target)
            shutil.rmtree(old)
        else:
            fresh.replace(target)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


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

    Raises: ArtifactError where `target` is a file, or a folder of other things: only artefacts are replaced.
    """
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise ArtifactError(
            f"{target} exists and is not an artefact of sagerec, so it is left alone; give another place or remove it"
        )
    with replace_folder(target) as fresh:
        yield fresh
        manifest = Manifest(
            kind=kind,
            content_hash=hash_folder(fresh),
            made_from=made_from or {},
            settings=settings or {},
            seed=seed,
            sizes=sizes or {},
            versions=package_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            grown_from=grown_from or [],
        )
        write_json(fresh / MANIFEST, asdict(manifest))


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Read and check the manifest of `folder`.

    Raises: ArtifactError where it is missing, of another kind, or of another format version.
    """
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
    try:
        manifest = Manifest(**values)
    except TypeError as error:
        raise ArtifactError(f"{folder / MANIFEST}: {error}; make the artefact again") from error
    if manifest.kind != kind:
        raise ArtifactError(f"{folder} holds a {manifest.kind!r} artefact, expected {kind!r}")
    return manifest


def check_content(folder: Path, manifest: Manifest) -> None:
    """Raise ArtifactError unless the files of `folder` hash to what the manifest says."""
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
