"""Versions: what is served together. A catalogue, its action space and policies, read from a folder that nobody writes.

A version is a snapshot of a run: STATE/versions/ID, whose files are links to those of the run. A run's artefacts are
replaced whole, by renaming, so a snapshot stays what it was; and every process opens the same one. STATE/serving.json
names the current and the previous version, and is how the workers agree.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from sagerec.artifacts import MANIFEST, check_content
from sagerec.config import from_json
from sagerec.errors import ArtifactError, SettingsError
from sagerec.files import digest, locked, read_json, recover, remove, write_json
from sagerec.policies.protocol import AnyPolicy
from sagerec.policies.registry import WEIGHTS, read_policy
from sagerec.run.folder import Run, open_run
from sagerec.serving.catalogue import Catalogue, FilterCache, read_catalogue
from sagerec.serving.rows import level_widths
from sagerec.training.loop import choose_device

logger = logging.getLogger(__name__)
RECORD, VERSIONS = "serving.json", "versions"


@dataclass(frozen=True, slots=True)
class Record:
    """Which versions the workers serve."""

    generation: int
    """Swaps so far."""
    current: str
    """The version that answers."""
    previous: str | None = None
    """The one that a rollback brings back."""


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """What an answer is made from; nothing of it changes."""

    id: str
    """The first digits of a hash of all content hashes."""
    run: str
    """Name of the run folder."""
    policies: dict[str, AnyPolicy]
    """By name; the first is the default."""
    catalogue: Catalogue
    """The items."""
    filters: FilterCache
    """What requests may be shown."""
    hashes: dict[str, str]
    """Content hash of each artefact."""
    widths: tuple[int, ...]
    """Nodes of each depth of the trie."""

    @property
    def default(self) -> str:
        """Name of the policy that answers where a query names none."""
        return next(iter(self.policies))


def policy_names(run: Run) -> tuple[str, ...]:
    """Policies of a run that are of today's run, `policy` first. Raises: ArtifactError where there is none."""
    found = sorted(p.name for p in run.folder.glob("policy*") if (p / MANIFEST).is_file())
    stale = {name: reason for name in found if (reason := run.stale(name)) is not None}
    for reason in stale.values():
        logger.warning("not served: %s", reason)
    names = tuple(name for name in found if name not in stale)
    if not names:
        why = next((f": {reason}" for reason in stale.values()), "; make one with: sagerec train, or sagerec run")
        raise ArtifactError(f"{run.folder} has no policy to serve{why}")
    return names


def take_snapshot(run_folder: Path, state: Path, policies: Iterable[str] = ()) -> str:
    """Link a run's artefacts into STATE/versions/ID, once every one of them was read whole and is what was written.

    Returns: ID. Raises: ArtifactError where one is missing, damaged, or does not fit the others.
    """
    fresh = state / VERSIONS / f".{os.getpid()}.fresh"
    remove(fresh)
    try:
        run = open_run(run_folder)
        names = tuple(policies) or policy_names(run)
        artefacts = ("dataset", "split", run.actions, *names)
        for name in artefacts:
            recover(run_folder / name)
            _link(run_folder / name, fresh / name)
        copy = open_run(fresh)
        manifests = {name: copy.manifest(name) for name in artefacts}
        for name, manifest in manifests.items():
            check_content(fresh / name, manifest)
            if (reason := copy.stale(name)) is not None:
                raise ArtifactError(f"{run_folder}: {reason}")
        hashes = {name: manifest.content_hash for name, manifest in manifests.items()}
        version = digest(list(hashes.items()))[:12]
        write_json(
            fresh / "version.json", {"run": run_folder.resolve().name, "policies": list(names)} | {"hashes": hashes}
        )
        target = state / VERSIONS / version
        if not target.exists():
            fresh.replace(target)
        return version
    except ArtifactError as error:  # what is damaged in the copy is damaged in the run
        raise ArtifactError(str(error).replace(str(fresh), str(run_folder))) from error
    except OSError as error:
        raise ArtifactError(f"{run_folder} was changed while it was read ({error}); try again") from error
    finally:
        remove(fresh)


def _link(source: Path, target: Path) -> None:
    """The files of a folder under another name: the same file where the file system can, else a copy."""
    if not (source / MANIFEST).is_file():
        raise ArtifactError(f"{source} is missing; expected an artefact. Run the stage that makes it")

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link)


def open_version(state: Path, version: str, device: str) -> Version:
    """Open a snapshot: the trie and the weights memory-mapped, policies frozen. Raises: ArtifactError."""
    folder = state / VERSIONS / version
    known = read_json(folder / "version.json")
    run = open_run(folder)
    space, place = run.space(), choose_device(device)
    policies = {}
    for name in known["policies"]:
        policy = read_policy(folder / name, space)
        if place.type == "cpu":
            map_weights(policy, folder / name / WEIGHTS)
        policies[name] = policy.move(place).requires_grad_(False)
        policies[name].freeze()
    catalogue = read_catalogue(run.data, run.split)
    first = next(iter(policies.values()))
    return Version(
        id=version,
        run=known["run"],
        policies=policies,
        catalogue=catalogue,
        filters=FilterCache(catalogue, first.space),
        hashes=known["hashes"],
        widths=level_widths(space),
    )


def map_weights(policy: AnyPolicy, file: Path) -> None:
    """Let weights that stand in a file as they are be the file's pages, which processes share, and not a copy."""
    stored = load_file(file)
    for name, weight in policy.state_dict(keep_vars=True).items():
        if name in stored and torch.equal(weight, stored[name]):
            weight.data = stored[name]


def read_record(state: Path) -> Record:
    """Which versions are served. Raises: ArtifactError."""
    try:
        return from_json(Record, read_json(state / RECORD))
    except SettingsError as error:
        raise ArtifactError(f"{state / RECORD}: {error}") from error


def write_record(state: Path, record: Record) -> None:
    """Say which versions are served, and clear away those that are not."""
    write_json(state / RECORD, asdict(record))
    for folder in (state / VERSIONS).iterdir():
        if folder.name not in (record.current, record.previous) and not folder.name.startswith("."):
            remove(folder)


def begin(run_folder: Path, state: Path, policies: Iterable[str] = ()) -> Record:
    """The first version of a server. Raises: ArtifactError, SettingsError."""
    (state / VERSIONS).mkdir(parents=True, exist_ok=True)
    with locked(state / RECORD):
        record = Record(0, take_snapshot(run_folder, state, policies))
        write_record(state, record)
    return record
