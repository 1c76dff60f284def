"""The run folder: what a run holds, by name.

RUN/dataset        the log and the catalogue, copied, so that a run needs nothing else
RUN/split          the part of every event
RUN/semantic_ids   codes, vectors, trie       (RUN/text: titles as tokens, trie)
RUN/policy         the supervised policy      (RUN/policy-refit: with the validation event, for deployment)
RUN/policy-all-at-once   trained on train and align events together, the reference that alignment must beat
RUN/policy-zero-shot     a language model as it comes
RUN/policy-NAME    an aligned policy
RUN/sasrec         the trained baseline, if asked for
RUN/evaluation*.json   one report a row: the policy's is evaluation.json
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagerec import artifacts
from sagerec.actions.registry import KINDS, kind_in
from sagerec.actions.space import ActionSpace
from sagerec.catalogue.dataset import Dataset, read_dataset
from sagerec.catalogue.simulated_store import TRUTH, SimulatedStore, read_store
from sagerec.catalogue.splits import PARTS, Split, read_split
from sagerec.errors import ArtifactError, SettingsError
from sagerec.files import read_record, recover
from sagerec.policies.protocol import AnyPolicy
from sagerec.policies.registry import read_policy
from sagerec.training.loop import choose_device

logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""What an artefact of a run may be called: one component of a path."""
ALL_AT_ONCE = "all-at-once"
"""What the policy is called that learnt the reserved events together with the training events."""
ZERO_SHOT = "zero-shot"
"""What a language model is called as it comes, trained on nothing of the run."""
RESERVED = ("supervised", "refit", ALL_AT_ONCE, ZERO_SHOT, "sasrec", "sasrec-refit", "popularity", "item-knn", *PARTS)
"""What an aligned policy is not called: its reports would be those of something else."""


def check_name(name: str, what: str = "name", *, longest: int = 100) -> str:
    """The name of an artefact. Raises: SettingsError for what is no single component of a path."""
    if not NAME.fullmatch(name) or len(name) > longest:
        raise SettingsError(
            f"{what} is {name!r}; expected at most {longest} letters, digits, '.', '_' and '-', and no '.' at first"
        )
    return name


def check_aligned_name(name: str) -> str:
    """The name of an aligned policy. Raises: SettingsError where it, or the split at its end, is taken."""
    check_name(name, longest=80)
    if name in RESERVED or name.endswith((".training", *(f"-{part}" for part in PARTS))):
        raise SettingsError(
            f"name is {name!r}, which is taken; expected none of {', '.join(RESERVED)}, nor one that ends like a split"
        )
    return name


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder that holds at least a dataset and a split."""

    folder: Path
    """Where it is."""
    data: Dataset
    """The log and the catalogue."""
    split: Split
    """The part of every event."""

    def manifest(self, name: str) -> artifacts.Manifest:
        """Manifest of one artefact of the run. Raises: SettingsError for what is no name; ArtifactError."""
        check_name(name, "the artefact")
        kind = next((kind for kind in ("policy", "sasrec") if name.startswith(kind)), name)
        return artifacts.read_manifest(self.folder / name, kind)

    def hashes(self, *names: str) -> dict[str, str]:
        """Content hashes of artefacts, for `made_from`."""
        return {name: self.manifest(name).content_hash for name in names}

    def grown_from(self, *names: str) -> dict[str, list[str]]:
        """Content hashes that artefacts had before items were added to them, for `misfit`."""
        return {name: self.manifest(name).grown_from for name in names}

    @property
    def actions(self) -> str:
        """Name of the artefact of the action space. Raises: ArtifactError where there is none."""
        return kind_in(self.folder).name

    def space(self) -> ActionSpace:
        """The action space. Raises: ArtifactError where it is of another number of items than the dataset."""
        kind = kind_in(self.folder)
        space = kind.read(self.folder / kind.name)
        if space.n_items != self.data.n_items:
            raise ArtifactError(
                f"{self.folder / kind.name} holds {space.n_items:,} items and the dataset {self.data.n_items:,}; "
                "make the Semantic IDs again, or, where `sagerec ids add` was cut short, give it the same items again"
            )
        return space

    def outdated(self, made_from: Mapping[str, str], *, grown: bool = True) -> list[str]:
        """Those of the inputs (name -> content hash) that are not the run's of today, or were made from such.

        With `grown`, one that has only had items added since is that of today.
        """
        found = []
        ours = {"dataset", "split", *KINDS}
        for name in (n for n in made_from if n in ours or n.startswith(("policy", "sasrec"))):
            if not (self.folder / name).exists():
                found.append(name)
                continue
            manifest = self.manifest(name)
            same = made_from[name] == manifest.content_hash or (grown and made_from[name] in manifest.grown_from)
            if not same or self.outdated(manifest.made_from):
                found.append(name)
        return found

    def stale(self, name: str) -> str | None:
        """Why an artefact is not one of today's run: what it was made from has been made again; None where it is."""
        old = self.outdated(self.manifest(name).made_from)
        return f"{name} was made from an earlier {' and '.join(old)}; make it again" if old else None

    def report(self, stem: str) -> dict[str, Any]:
        """RUN/`stem`.json. Raises: ArtifactError where it is missing, was changed, or is not of the lists beside it."""
        path = self.folder / f"{stem}.json"
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; make it with: sagerec evaluate, or sagerec baseline")
        report = read_record(path)
        lists = self.lists_path(stem)
        if not lists.is_file() or artifacts.hash_file(lists) != report["hashes"]["lists"]:
            raise ArtifactError(f"{path} and {lists.name} are not of one evaluation; evaluate again")
        return report

    def lists_path(self, stem: str) -> Path:
        """Where the lists of a report are."""
        return self.folder / f"{stem}.lists.parquet"

    def aligned(self) -> list[str]:
        """Names of the aligned policies."""
        found = {p.name for p in self.folder.glob("policy-*") if (p / artifacts.MANIFEST).is_file()}
        return sorted(found - {"policy-refit", f"policy-{ALL_AT_ONCE}", f"policy-{ZERO_SHOT}"})

    def store(self) -> SimulatedStore | None:
        """The simulated store that the dataset is, None where it is none."""
        return read_store(self.folder / "dataset") if (self.folder / "dataset" / TRUTH).is_file() else None

    def policy(self, name: str = "policy", *, device: str = "auto") -> AnyPolicy:
        """A trained policy of the run, in evaluation mode; the log says where it is stale."""
        if (reason := self.stale(name)) is not None:
            logger.warning("stale: %s", reason)
        return read_policy(self.folder / name, self.space()).move(choose_device(device))


def open_run(folder: str | Path) -> Run:
    """Open a run folder. Raises: ArtifactError where there is none."""
    folder = Path(folder)
    for name in ("dataset", *KINDS):
        recover(folder / name)
    if not (folder / "dataset").is_dir():
        raise ArtifactError(f"{folder} is not a run folder; make one with: sagerec run DATASET --out {folder}")
    artifacts.read_manifest(folder / "dataset", "dataset")
    return Run(folder, read_dataset(folder / "dataset"), read_split(folder / "split"))
