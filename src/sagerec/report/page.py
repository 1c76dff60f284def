"""`sagerec report`: one self-contained HTML page of a run or a study.

Modules of this package gather plain records; `templates/` lays them out, each section in a template of its name, and
escapes all text. No network: styles, script and plots stand in the page, and its content policy forbids everything
else. It reads without the script, which only shows one example user at a time.
"""

import base64
import hashlib
import logging
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sagerec.files import refuse_other, write_text
from sagerec.report.examples import gather_examples
from sagerec.report.material import Material, gather
from sagerec.report.popularity import bucket_section
from sagerec.report.process import coefficient_section, facts_section, training_section
from sagerec.report.results import short_section, table_section
from sagerec.report.tradeoffs import tradeoff_section

logger = logging.getLogger(__name__)
SECTIONS: tuple[tuple[str, str, Callable[[Material], object | None]], ...] = (
    ("run", "What was run", facts_section),
    ("short", "In short", short_section),
    ("results", "Results", table_section),
    ("trade-offs", "Trade-offs", tradeoff_section),
    ("popularity", "By popularity", bucket_section),
    ("users", "Example users", gather_examples),
    ("training", "Alignment as it ran", training_section),
    ("coefficients", "What each objective does with a ratio", coefficient_section),
)
"""Name (of the template, too), heading, and what gathers its record."""
REPORT = "report.html"
GENERATOR = '<meta name="generator" content="sagerec">'
"""By which a report is known."""


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run or study folder to `out`, else into the folder; returns where it is.

    Raises: ArtifactError where the folder is neither, a file of it is damaged, or `out` is something else.
    """
    out = out or folder / REPORT
    refuse_other(out, GENERATOR, "a report")
    page = render(gather(folder))
    write_text(out, page)
    logger.info("%s: %.2f MB", out, len(page.encode()) / 1e6)
    return out


def render(material: Material) -> str:
    """The page; a section whose data is not there is left out."""
    style, script = (
        resources.files("sagerec.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    templates = Environment(
        loader=PackageLoader("sagerec.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("page.html").render(
        title=str(material.study.get("title") or f"Run {material.folder.resolve().name}"),
        kind="Study" if material.study else "Run",
        notes=material.notes,
        sections=[(name, heading, found) for name, heading, make in SECTIONS if (found := make(material)) is not None],
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
