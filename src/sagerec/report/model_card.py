"""A language-model policy as a folder to share: the Hugging Face files, and a card that says what it is and does."""

import json
import shutil
from pathlib import Path
from typing import Any

from sagerec.artifacts import MANIFEST
from sagerec.catalogue.audit import EVENTS_USED
from sagerec.errors import ArtifactError, SettingsError
from sagerec.files import replace_folder
from sagerec.report import cells
from sagerec.run.folder import Run, check_name

CONFIG = "config.json"
"""By which a Hugging Face folder is known."""
TAG = "tags: [recommender-systems, generative-retrieval, sagerec]"
"""In a card, by which it is known as ours."""
RECORDS = (MANIFEST, EVENTS_USED, "metrics.jsonl")
"""What of a policy's folder is of the run, and stays there."""


def export_model(run: Run, name: str, out: Path) -> Path:
    """Copy a causal-lm policy of a run, with a model card, to `out`.

    Raises: SettingsError for a policy that is no language model; ArtifactError where it is missing or stale.
    """
    folder = run.folder / check_name(name)
    if (reason := run.stale(name)) is not None:
        raise ArtifactError(f"stale: {reason}, then export it")
    if not (folder / CONFIG).is_file():
        raise SettingsError(
            f"{folder} is no language model; expected a policy that was trained with --policy causal-lm"
        )
    if out.exists() and not is_export(out):
        raise SettingsError(f"{out} is there and no exported model, so it is left alone; give another name")
    card = model_card(run, name)
    with replace_folder(out) as fresh:
        for path in folder.iterdir():
            if path.is_file() and path.name not in RECORDS:
                shutil.copy(path, fresh / path.name)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return out


def is_export(folder: Path) -> bool:
    """Whether a folder is empty, or holds a model with a card of ours and nothing that a run has."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    card = folder / "README.md"
    ours = CONFIG in names and card.is_file() and TAG in card.read_text(encoding="utf-8", errors="replace")
    return not names or (ours and not any(path.is_dir() for path in folder.iterdir()) and MANIFEST not in names)


def model_card(run: Run, name: str) -> str:
    """The card in Markdown: what it recommends from, how it was made, and its metrics with intervals where measured."""
    manifest, data, actions = run.manifest(name), run.manifest("dataset"), run.manifest(run.actions)
    writes = "titles" if run.actions == "text" else "Semantic IDs"
    reads = "who a user is, in a line of its own, and " if manifest.settings["policy"].get("profile_tokens") else ""
    counts = ", ".join(f"{data.sizes[n]:,} {n}" for n in ("users", "items", "interactions") if n in data.sizes)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        TAG,
        "---",
        "",
        f"# {name}",
        "",
        f"A causal language model that recommends by writing {writes}: it reads {reads}a user's items, one after "
        f"another, and what it writes next is the next item. Made by sagerec {manifest.versions.get('sagerec', '')} on "
        f"{manifest.created[:10]}.",
        "",
        "## Data",
        "",
        f"{counts}; content hash `{data.content_hash[:16]}`. Actions: {writes}, "
        f"{json.dumps(_without_paths(actions.settings), sort_keys=True)}.",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(_without_paths(manifest.settings), indent=1, sort_keys=True),
        "```",
        "",
        "## Metrics",
        "",
        *_metrics(run, name),
        "",
        "Written without constraints it can name what is no item; sagerec decodes it through a trie of the catalogue.",
        "",
    ]
    return "\n".join(lines)


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which a folder stands by its name alone: what it is called elsewhere is nobody's business."""
    return {
        name: _without_paths(value)
        if isinstance(value, dict)
        else Path(value).name
        if name == "model" and value
        else value
        for name, value in settings.items()
    }


def _metrics(run: Run, name: str) -> list[str]:
    """A table of the evaluation on test, all cases, with 95 % intervals over users."""
    stem = "evaluation" if name == "policy" else f"evaluation{name.removeprefix('policy')}"
    try:
        report: dict[str, Any] = run.report(stem)
    except ArtifactError:
        return [f"Not measured: `sagerec evaluate RUN --policy {name}` does."]
    if run.outdated(report["made_from"]) or report["settings"]["lists"] != "beam":
        return [f"Not measured as it is meant to be decoded: `sagerec evaluate RUN --policy {name}` does."]
    rows = [
        f"| {cells.label(metric)} | {' '.join(cells.value_parts(metric, found))} |"
        for metric, found in report["metrics"].items()
    ]
    title = (
        f"{report['split']}: {report['users']:,} users, {report['cases']:,} cases, {report['settings']['lists']} lists"
    )
    return [f"{title}; 95 % intervals over users.", "", "| metric | value |", "|---|---|", *rows]
