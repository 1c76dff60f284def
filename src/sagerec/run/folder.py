"""The run folder: what a run holds, by name.

RUN/dataset        the log and the catalogue, copied, so that a run needs nothing else
RUN/split          the part of every event
RUN/semantic_ids   codes, vectors, trie
RUN/policy         the supervised policy      (RUN/policy-refit: with the validation event, for deployment)
RUN/policy-NAME    an aligned policy
RUN/sasrec         the trained baseline, if asked for
RUN/evaluation*.json   one report a row: the policy's is evaluation.json
"""

from dataclasses import dataclass
from pathlib import Path

from sagerec import artifacts
from sagerec.actions.registry import kind_in
from sagerec.actions.space import ActionSpace
from sagerec.catalogue.dataset import Dataset, read_dataset
from sagerec.catalogue.simulated_store import TRUTH, SimulatedStore, read_store
from sagerec.catalogue.splits import Split, read_split
from sagerec.errors import ArtifactError
from sagerec.policies.protocol import AnyPolicy
from sagerec.policies.registry import read_policy
from sagerec.training.loop import choose_device


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
        """Manifest of one artefact of the run. Raises: ArtifactError."""
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

    def aligned(self) -> list[str]:
        """Names of the aligned policies."""
        found = (p.name for p in self.folder.glob("policy-*") if (p / artifacts.MANIFEST).is_file())
        return sorted(name for name in found if name != "policy-refit")

    def store(self) -> SimulatedStore | None:
        """The simulated store that the dataset is, None where it is none."""
        return read_store(self.folder / "dataset") if (self.folder / "dataset" / TRUTH).is_file() else None

    def policy(self, name: str = "policy", *, device: str = "auto") -> AnyPolicy:
        """A trained policy of the run, in evaluation mode."""
        return read_policy(self.folder / name, self.space()).move(choose_device(device))


def open_run(folder: str | Path) -> Run:
    """Open a run folder. Raises: ArtifactError where there is none."""
    folder = Path(folder)
    if not (folder / "dataset").is_dir():
        raise ArtifactError(f"{folder} is not a run folder; make one with: sagerec run DATASET --out {folder}")
    return Run(folder, read_dataset(folder / "dataset"), read_split(folder / "split"))
