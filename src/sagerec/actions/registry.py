"""The one place that knows concrete action spaces: it builds them from settings and reads them from a run folder.

An action space of one's own is one more `ActionKind`, given to `register_actions`; nothing else changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sagerec.actions import titles
from sagerec.actions.semantic_ids import build
from sagerec.actions.semantic_ids.add import Addition, code_new_items, write_addition
from sagerec.actions.semantic_ids.build import SemanticIdSettings, build_semantic_ids, read_semantic_ids
from sagerec.actions.space import ActionSpace
from sagerec.artifacts import MANIFEST
from sagerec.catalogue.dataset import Dataset
from sagerec.catalogue.splits import Sequences
from sagerec.errors import ArtifactError, SettingsError

ActionSettings = SemanticIdSettings
"""How items become sequences, as the command line offers it."""


class Build(Protocol):
    """Builds a space and writes its artefact; learns from training events alone."""

    def __call__(
        self, folder: Path, data: Dataset, train: Sequences, settings: Any, *, made_from: dict[str, str]
    ) -> ActionSpace:
        """The space that was written to `folder`."""
        ...


@dataclass(frozen=True, slots=True)
class ActionKind:
    """A kind of action space."""

    name: str
    """Of the artefact, and its folder in a run."""
    settings: type[Any]
    """The dataclass that says how items become sequences."""
    build: Build
    """Makes one."""
    read: Callable[[Path], ActionSpace]
    """Reads one back. Raises: ArtifactError."""
    inputs: Callable[[Any], dict[str, str]] = lambda settings: {}
    """Name -> content hash of what it is made from beside dataset and split."""
    code_new_items: Callable[[Path, Dataset], Addition] | None = None
    """Sequences for the last items of a dataset, which the artefact does not hold yet; None where it cannot grow."""
    write_addition: Callable[..., None] | None = None
    """Writes the artefact anew with them."""


KINDS: dict[str, ActionKind] = {
    build.KIND: ActionKind(
        build.KIND,
        SemanticIdSettings,
        build_semantic_ids,
        read_semantic_ids,
        build.inputs,
        code_new_items,
        write_addition,
    ),
    titles.KIND: ActionKind(titles.KIND, titles.TitleSettings, titles.build_titles, titles.read_titles, titles.inputs),
}


def register_actions(kind: ActionKind) -> None:
    """Make a kind of action space known. Raises: SettingsError for a name that is taken by another."""
    if KINDS.get(kind.name, kind) != kind:
        raise SettingsError(f"an action space of the kind {kind.name!r} exists; choose another name")
    KINDS[kind.name] = kind


def kind_of(settings: Any) -> ActionKind:
    """The kind that a settings dataclass belongs to. Raises: SettingsError."""
    for kind in KINDS.values():
        if type(settings) is kind.settings:
            return kind
    expected = ", ".join(kind.settings.__name__ for kind in KINDS.values())
    raise SettingsError(f"no action space has settings of type {type(settings).__name__}; expected one of {expected}")


def kind_in(run_folder: Path) -> ActionKind:
    """The kind of the action space that a run folder holds. Raises: ArtifactError where it holds none, or several."""
    found = [kind for kind in KINDS.values() if (run_folder / kind.name / MANIFEST).is_file()]
    if len(found) != 1:
        raise ArtifactError(
            f"{run_folder} holds {len(found)} action spaces ({', '.join(kind.name for kind in found) or 'none'}); "
            "expected one: make the Semantic IDs with: sagerec ids"
        )
    return found[0]
