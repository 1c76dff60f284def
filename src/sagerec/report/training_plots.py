"""Plots of what an alignment logged: one panel a quantity, one line a policy.

`docs/metrics.md` defines every quantity.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sagerec.files import replace_folder
from sagerec.report.drawing import Line, Style, canvas, draw_lines, to_svg
from sagerec.training.tracking import read_metrics

logger = logging.getLogger(__name__)
PLOTS = "plots"
SMOOTH_SHARE = 1 / 15
"""A line is the moving mean over this share of the rounds."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot of one or several logged quantities."""

    name: str
    """For ids and file names."""
    title: str
    """In words."""
    keys: tuple[str, ...]
    """Names in metrics.jsonl; the middle one of three is the main line, the others are drawn finer."""
    y_label: str
    """With the unit."""
    group: str
    """Heading under which the page shows it."""
    points: bool = False
    """Measured a few times only: drawn as they are, with markers."""


PANELS = (
    Panel("groups-with-hit", "Contexts with a hit in the group", ("groups_with_hit",), "share", "Rewards"),
    Panel("ratio", "Importance ratio r", ("ratio_q05", "ratio_q50", "ratio_q95"), "r (5, 50, 95 %)", "Bounds"),
    Panel("share-at-upper", "At the bound, advantage > 0", ("share_at_upper",), "share of units", "Bounds"),
    Panel("share-at-lower", "At the bound, advantage < 0", ("share_at_lower",), "share of units", "Bounds"),
    Panel("coefficient-positive", "Mean c, advantage > 0", ("coefficient_positive",), "c", "Bounds"),
    Panel("coefficient-negative", "Mean c, advantage < 0", ("coefficient_negative",), "c", "Bounds"),
    Panel("gradient-norm", "Gradient norm before clipping", ("gradient_norm",), "norm", "Optimisation"),
    Panel("sft-loss", "Next-item loss, reserved events", ("sft_loss_nats",), "nats an item", "Optimisation"),
    Panel("kl", "Divergence from the start", ("kl_nats",), "nats a code", "Optimisation"),
    Panel("entropy", "Entropy of the first code", ("entropy_nats",), "nats", "Diversity of rollouts"),
    Panel(
        "diversity",
        "Diversity H of rolled-out units",
        ("diversity_q10", "diversity_q50", "diversity_q90"),
        "H (10, 50, 90 %)",
        "Diversity of rollouts",
    ),
    Panel("coldness", "Cold items among those rolled out", ("coldness",), "share", "Diversity of rollouts"),
    Panel("valid-recall", "Recall@10", ("valid_recall@10",), "share", "Validation", True),
    Panel("valid-ndcg", "NDCG@10", ("valid_ndcg@10",), "", "Validation", True),
    Panel("valid-cold-recall", "Cold-Recall@10", ("valid_cold_recall@10",), "share", "Validation", True),
    Panel("valid-coarse-entropy", "Coarse entropy@10", ("valid_coarse_entropy@10",), "bits", "Validation", True),
    Panel("valid-entropy", "Entropy@10", ("valid_entropy@10",), "bits", "Validation", True),
    Panel("valid-coverage", "Coverage@10", ("valid_coverage@10",), "share", "Validation", True),
    Panel("criterion", "Criterion by which a round is kept", ("criterion",), "", "Validation", True),
)


@dataclass(frozen=True, slots=True)
class Log:
    """What one policy logged, and how it is drawn."""

    name: str
    """In legends and tables."""
    lines: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    style: Style
    """Of its lines."""


def panels_of(logs: Sequence[Log]) -> list[Panel]:
    """The panels for which something was logged, one for each reward first."""
    logged = [key for log in logs for line in log.lines for key, value in line.items() if is_number(value)]
    rewards = [key for key in dict.fromkeys(logged) if key.startswith("reward/")]
    names = [key.removeprefix("reward/") for key in rewards]
    panels = [
        Panel(f"reward-{i + 1}", f"Reward {name}", (key,), "mean over slates", "Rewards")
        for i, (key, name) in enumerate(zip(rewards, names, strict=True))
    ]
    return [panel for panel in (*panels, *PANELS) if set(panel.keys) & set(logged)]


def is_number(value: object) -> bool:
    """Whether a logged value can be drawn."""
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def values_of(log: Log, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a quantity."""
    found = [(line["step"], line[key]) for line in log.lines if "step" in line and is_number(line.get(key))]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps, values


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` values (an odd number), over fewer at the ends."""
    half = min(width // 2, max(len(values) - 1, 0))
    total = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    mean: np.ndarray = (total[high] - total[low]) / (high - low)
    return mean


def smoothing(logs: Iterable[Log]) -> int:
    """Rounds that a moving mean spans: odd, 1 where there are few."""
    longest = max((len(log.lines) for log in logs), default=0)
    return 2 * (round(longest * SMOOTH_SHARE) // 2) + 1


def panel_lines(panel: Panel, logs: Sequence[Log], width: int) -> list[Line]:
    """The lines of a panel."""
    found = []
    for log in logs:
        for place, key in enumerate(panel.keys):
            steps, values = values_of(log, key)
            if len(values):
                shown = values if panel.points else moving_mean(values, width)
                thin = len(panel.keys) == 3 and place != 1
                found.append(Line(log.name, steps.tolist(), shown.tolist(), log.style, thin, panel.points))
    return found


def draw_panel(panel: Panel, logs: Sequence[Log], *, themed: bool = True) -> str:
    """A panel as SVG."""
    with canvas(panel.title, "updates", panel.y_label) as axes:
        draw_lines(axes, panel_lines(panel, logs, smoothing(logs)))
        spoken = f"{panel.title}, {panel.y_label or 'value'} over updates, for {', '.join(log.name for log in logs)}"
        return to_svg(axes, panel.name, label=spoken, themed=themed)


def panel_table(panel: Panel, logs: Sequence[Log], most: int = 12) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a panel's data as logged, at `most` steps evenly spread; the first and the last are there."""
    steps = sorted({int(step) for log in logs for key in panel.keys for step in values_of(log, key)[0]})
    if len(steps) > most:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))]
    columns: dict[str, Mapping[int, float]] = {}
    for log in logs:
        for key in panel.keys:
            at, values = values_of(log, key)
            if len(at):
                label = log.name if len(panel.keys) == 1 else f"{log.name}, {key.rpartition('_')[2]}"
                columns[label] = dict(zip(at.astype(int).tolist(), values.tolist(), strict=True))
    rows = [
        [str(step), *(f"{column[step]:.4g}" if step in column else "" for column in columns.values())] for step in steps
    ]
    return ["updates", *columns], rows


def write_plots(policy_folder: Path) -> Path:
    """Draw the metrics.jsonl of an aligned policy as SVG files; returns their folder, RUN/plots/policy-NAME.

    They stand beside the artefact, whose content hash is not theirs.
    """

    folder = policy_folder.parent / PLOTS / policy_folder.name
    log = Log(policy_folder.name, read_metrics(policy_folder), Style(1))
    panels = panels_of([log])
    with replace_folder(folder) as fresh:
        for panel in panels:
            (fresh / f"{panel.name}.svg").write_text(draw_panel(panel, [log], themed=False), encoding="utf-8")
    logger.info("%d plots of the alignment in %s", len(panels), folder)
    return folder
