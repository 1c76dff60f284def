"""`sagerec report`: one self-contained HTML page of a run or a study.

No network: styles, script and plots stand in the page, and its content policy forbids everything else. It reads without
the script, which only shows one example user at a time.
"""

import base64
import hashlib
import logging
from importlib import resources
from pathlib import Path

from sagerec.report.markup import Html, join, tag
from sagerec.report.material import Material, gather
from sagerec.report.process import coefficient_section, facts_section, training_section
from sagerec.report.results import bucket_section, short_section, table_section, tradeoff_section
from sagerec.report.users import users_section

logger = logging.getLogger(__name__)
SECTIONS = (
    ("run", "What was run", facts_section),
    ("short", "In short", short_section),
    ("results", "Results", table_section),
    ("trade-offs", "Trade-offs", tradeoff_section),
    ("popularity", "By popularity", bucket_section),
    ("users", "Example users", users_section),
    ("training", "Alignment as it ran", training_section),
    ("coefficients", "What each objective does with a ratio", coefficient_section),
)
REPORT = "report.html"


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run or study folder to `out`, else into the folder; returns where it is.

    Raises: ArtifactError where the folder is neither, or a file of it is damaged.
    """
    out = out or folder / REPORT
    page = render(gather(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    logger.info("%s: %.2f MB", out, len(page.encode()) / 1e6)
    return out


def render(material: Material) -> str:
    """The page; a section whose data is not there is left out."""
    title = str(material.study.get("title") or f"Run {material.folder.resolve().name}")
    found = [(name, heading, body) for name, heading, make in SECTIONS if (body := make(material)) is not None]
    links = [tag("li", tag("a", heading, href=f"#{name}")) for name, heading, _ in found]
    sections = [
        tag("section", tag("h2", heading, id=f"{name}-heading"), body, id=name, aria_labelledby=f"{name}-heading")
        for name, heading, body in found
    ]
    notes = tag("ul", *(tag("li", note) for note in material.notes), class_="notes") if material.notes else None
    kind = "Study" if material.study else "Run"
    style, script = read_part("page.css"), read_part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: sagerec report"),
        Html('<link rel="icon" href="data:,">'),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag("a", "Skip to the report", href="#main", class_="skip"),
        tag("header", tag("p", f"{kind} report, sagerec", class_="kicker"), tag("h1", title)),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", notes, *sections, id="main"),
        tag("footer", tag("p", "Every metric is defined in docs/metrics.md of sagerec.")),
        tag("script", Html(script)),
    )
    return str(join((Html("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n")))


def read_part(name: str) -> str:
    """A file that stands beside this module."""
    return resources.files("sagerec.report").joinpath(name).read_text(encoding="utf-8")
