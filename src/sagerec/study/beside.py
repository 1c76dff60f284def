"""A finished study of the same events, whose rows stand beside those of another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagerec.config import from_json, require, to_json
from sagerec.errors import ArtifactError
from sagerec.files import read_record
from sagerec.run.folder import ALL_AT_ONCE, Run, check_name, open_run
from sagerec.study.design import START, STUDY, CompareSettings, StudySettings, name_beside
from sagerec.study.folder import stale_study

SAME_LISTS = ("split", "lists", "history")
"""Settings of evaluation that make lists comparable."""
Sources = dict[str, list[tuple[Run, str]]]
"""Row -> run and suffix of the report of each of its seeds."""


def row_sources(runs: Sequence[Run], study: StudySettings) -> Sources:
    """The rows with a policy; those that share a start are all in the first run."""
    found = {START: [(own, "") for own in runs], ALL_AT_ONCE: [(own, f"-{ALL_AT_ONCE}") for own in runs]}
    return found | {o: [(runs[s % len(runs)], f"-{o}-s{s}") for s in range(n)] for o, n in study.rows().items()}


@dataclass(frozen=True, slots=True)
class Beside:
    """Another study, as far as its rows are needed."""

    folder: Path
    """Where it is."""
    sources: Sources
    """Its rows, by the names that they have beside another's."""
    made: dict[str, Any]
    """What the record of the study that it stands beside says of it: folder, hashes, date."""

    def check_events(self, run: Run) -> None:
        """Raises: SettingsError where it is not of the events and the split of that run."""
        events = run.hashes("dataset", "split")
        require(
            all(own.hashes("dataset", "split") == events for each in self.sources.values() for own, _ in each),
            f"beside is {self.folder}, a study of other events or of another split; expected one of the same",
        )


def read_beside(settings: CompareSettings, own: Path) -> Beside | None:
    """The study that is to stand beside the one in the folder `own`, if any, its lists those of its table.

    Raises: SettingsError where its seeds share a start or its lists are of another kind, or it is the study itself;
    ArtifactError where it is not finished, or its lists are not those of its table.
    """
    if settings.study.beside is None:
        return None
    folder = Path(settings.study.beside)
    check_name(folder.resolve().name, "the name of the folder beside")
    require(folder.resolve() != own.resolve(), f"beside is {folder}, the study itself; expected another")
    if not (folder / STUDY).is_file():
        raise ArtifactError(f"{folder / STUDY} is missing; expected the folder of a finished study: sagerec compare")
    record = read_record(folder / STUDY)
    study = from_json(StudySettings, record["settings"]["study"])
    require(
        not (study.share_start or settings.study.share_start),
        "studies stand beside each other where each seed has a start of its own; leave out --share-start",
    )
    theirs, ours = record["settings"]["evaluate"], to_json(settings.run.evaluate)
    require(
        [theirs[name] for name in SAME_LISTS] == [ours[name] for name in SAME_LISTS],
        f"beside is {folder}, whose lists are of {', '.join(f'{name} {theirs[name]}' for name in SAME_LISTS)}; "
        f"expected {', '.join(f'{name} {ours[name]}' for name in SAME_LISTS)}",
    )
    if (stale := stale_study(folder)) is not None:
        raise ArtifactError(stale)
    sources = row_sources([open_run(folder / study.run_of(seed)) for seed in range(study.n_starts)], study)
    reports = [(run, run.report(f"evaluation{suffix}")) for each in sources.values() for run, suffix in each]
    if any(report["settings"] != theirs or run.outdated(report["made_from"], grown=False) for run, report in reports):
        raise ArtifactError(
            f"the lists of {folder} are not those that its table was made of; make it again with: sagerec compare"
        )
    made = {"folder": str(folder.resolve()), "hashes": record["hashes"], "date": record["date"]}
    return Beside(folder, {name_beside(name, str(folder)): each for name, each in sources.items()}, made)
