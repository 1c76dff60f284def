"""The report: what stands on the page, that nothing of the data is markup there, that parts may be missing, and a real
browser.
"""

import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagerec import files
from sagerec.baselines.tuning import evaluate_baseline
from sagerec.catalogue.dataset import INTERACTIONS, ITEMS
from sagerec.catalogue.splits import SplitSettings
from sagerec.cli import main
from sagerec.errors import ArtifactError
from sagerec.objectives.table import OBJECTIVES
from sagerec.report.coefficients import choose_objectives, coefficients
from sagerec.report.drawing import Line, Style, adapt, canvas, draw_lines, to_svg
from sagerec.report.examples import gather_examples, group_users
from sagerec.report.material import gather
from sagerec.report.page import write_report
from sagerec.report.tradeoffs import pareto_front
from sagerec.report.training_plots import moving_mean
from sagerec.run.folder import Run, open_run
from sagerec.run.stages import align, audit, evaluate, make_actions, prepare, train
from sagerec.training.settings import AlignSettings
from tests.conftest import SMALL_IDS, SMALL_POLICY, SMALL_RUN, SMALL_TRAIN

EVIL = '<script>alert("1")</script>&\'"</td>$x_1${{ 7*7 }}{% raise %}'
ALIGN = AlignSettings(
    slates=4, round_users=32, batch_users=32, validations=2, validation_users=40, checkpoint_every=99, device="cpu"
)


@pytest.fixture(scope="module")
def run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two aligned policies and a baseline, whose items and users have hostile names."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "data"
    data.mkdir()
    items = pl.read_parquet(store_folder / ITEMS)
    events = pl.read_parquet(store_folder / INTERACTIONS)
    items = items.with_columns(title=pl.lit(EVIL) + pl.col("title"), categories=pl.concat_list(pl.lit(EVIL)))
    items.write_parquet(data / ITEMS)
    events.with_columns(user_id=pl.lit(EVIL) + pl.col("user_id")).write_parquet(data / INTERACTIONS)
    made = prepare(data, folder / "run", SplitSettings(reserve="event"))
    make_actions(made, SMALL_IDS)
    train(made, SMALL_POLICY, replace(SMALL_TRAIN, epochs=1))
    evaluate(made, SMALL_RUN.evaluate, device="cpu")
    for objective in ("sft", "sage"):
        name = align(made, ALIGN.for_objective(objective), name=f"{objective}-s0")
        evaluate(made, SMALL_RUN.evaluate, name=name, device="cpu")
    evaluate_baseline(made, "popularity", SMALL_RUN.evaluate)
    return made


@pytest.fixture(scope="module")
def page(run: Run) -> Path:
    """The page of the run."""
    return write_report(run.folder)


@pytest.fixture(scope="module")
def study(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study folder around the run."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(run.folder, folder / "run")

    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.004, "high": value + 0.004, "seed_std": 0.001}

    def row(name: str, kind: str, recall: float, verdict: str | None) -> dict[str, Any]:
        names = ("recall@10", "ndcg@10", "cold_recall@10", "coarse_entropy@10", "coverage@10")
        metrics = {metric: interval(recall * (i + 1)) for i, metric in enumerate(names)}
        difference = {"difference": 0.002, "low": -0.001, "high": 0.005, "p_value": 0.04, "p_holm": 0.12}
        against = {"sft": {"recall@10": difference | {"verdict": verdict}}} if verdict else {}
        return {"name": name, "kind": kind, "seeds": [0, 1, 2], "metrics": metrics, "against": against}

    trials = [
        {
            "objective": objective,
            "settings": {"boost": boost},
            "metrics": {"recall@10": 0.07 + boost / 100, "coarse_entropy@10": 2 - boost / 10, "cold_recall@10": 0.02},
            "chosen": boost == 2,
            "split": "valid",
        }
        for objective in ("sage", "sft")
        for boost in (0, 1, 2)
    ]
    values = {
        "title": f"Objectives {EVIL}",
        "dataset": "a store",
        "objectives": ["sft", "sage"],
        "seeds": [0, 1, 2],
        "rows": [
            row("sft", "control", 0.075, None),
            row("sage", "objective", 0.077, "no difference"),
            row("gbpo", "objective", 0.08, "higher"),
            row("popularity", "baseline", 0.01, "lower"),
        ],
        "trials": trials,
        "published": [{"name": "TIGER", "recall@10": 0.0648, "ndcg@10": 0.0384, "source": "its paper, table 1"}],
        "settings": {"align": {"slates": 32}},
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "hardware": "2 cores",
        "date": "2026-11-24",
        "hashes": {"corpus": "abc123"},
    }
    files.write_record(folder / "study.json", values)
    return folder


@pytest.fixture(scope="module")
def study_page(study: Path) -> Path:
    """The page of the study."""
    return write_report(study)


class Outline(HTMLParser):
    """Elements of a page, with the checks of which every page should stand."""

    VOID = ("meta", "link", "input", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_the_page_of_a_run_has_every_section_and_is_small(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.open == []
    sections = [attributes["id"] for attributes in outline.named("section")]
    # One seed of each: no verdict, and so nothing to say in short.
    assert sections == ["run", "results", "trade-offs", "popularity", "users", "training", "coefficients"]
    assert len(text) < 1_000_000
    said = " ".join(outline.text)
    for words in ("150 users, 200 items", "proven exact", "one seed", "Reward hit", "Importance ratio r", "torch"):
        assert words in said, words
    assert len(outline.named("article")) >= 4


def test_the_page_asks_the_network_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    addresses = [value for _, attributes in outline.tags for key, value in attributes.items() if key in ("src", "href")]
    assert [a for a in addresses if not str(a).startswith(("#", "data:"))] == []
    policies = [a["content"] for a in outline.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policies[0]).startswith("default-src 'none'; ")
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_text_of_the_data_is_never_markup(page: Path, study_page: Path) -> None:
    for text in (page.read_text(encoding="utf-8"), study_page.read_text(encoding="utf-8")):
        outline = Outline(text)
        assert len(outline.named("script")) == 1
        assert EVIL in " ".join(outline.text)
        assert '<script>alert("1")' not in text


def test_the_page_is_accessible_in_the_basics(page: Path, study_page: Path) -> None:
    for path in (page, study_page):
        outline = Outline(path.read_text(encoding="utf-8"))
        levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b <= a + 1 for a, b in pairwise(levels))
        for svg in outline.named("svg"):
            assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
        assert len(outline.named("caption")) == len(outline.named("table"))
        assert all(th.get("scope") in ("col", "row") for th in outline.named("th"))
        ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        labelled = [a["aria-labelledby"] for a in outline.named("section")]
        assert set(labelled) <= set(ids)
        assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in outline.tags}
        assert len(outline.named("figure")) <= len(outline.named("details"))


def test_a_study_shows_its_table_verdicts_trials_and_published_figures(study: Path, study_page: Path) -> None:
    assert study_page == study / "report.html"
    said = " ".join(Outline(study_page.read_text(encoding="utf-8")).text)
    for words in ("control", "▲ higher", "no difference", "▼ lower", "seeds ± 0.0010", "Holm", "2 cores", "abc123"):
        assert words in said, words
    assert "Settings tried, on validation" in said
    assert "boost 2" in said
    assert "TIGER" in said
    assert "not measured here" in said
    assert "Outside the frame: popularity (0.0100" in said
    assert "against sft:" in said
    assert "no difference in Recall@10" in said


def test_parts_that_are_missing_are_left_out(run: Run, small_run: Run, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    files.write_record(bare / "study.json", {"title": "Nothing yet", "rows": []})
    outline = Outline(write_report(bare).read_text(encoding="utf-8"))
    assert [a["id"] for a in outline.named("section")] == ["coefficients"]
    plain = Outline(write_report(small_run.folder, tmp_path / "plain.html").read_text(encoding="utf-8"))
    assert "training" not in [a["id"] for a in plain.named("section")]
    stale = tmp_path / "stale"
    shutil.copytree(run.folder, stale)
    report = files.read_record(stale / "evaluation-sage-s0.json")
    report["made_from"] = {"policy-sage-s0": "of last week"}
    files.write_record(stale / "evaluation-sage-s0.json", report)
    for path in stale.glob("evaluation.*"):
        path.unlink()
    shutil.rmtree(stale / "policy-sft-s0")
    material = gather(stale)
    assert [policy.name for policy in material.aligned] == ["policy-sage-s0"]
    said = " ".join(material.notes)
    assert "evaluation-sage-s0.json measures an earlier policy-sage-s0" in said
    assert "Without a test report: policy-sage-s0" in said
    assert gather_examples(material) is None


def test_what_is_neither_run_nor_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtifactError, match="is not a run folder; make one with: sagerec run"):
        write_report(tmp_path)
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"study\.json holds list; expected a record that this version wrote"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 1
    assert "holds list" in capsys.readouterr().err


def test_report_and_align_from_the_command_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sagerec align` leaves plots beside the artefact, whose content hash still holds."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    quick = ["--slates", "4", "--validations", "1", "--round-users", "64", "--batch-users", "64", "--device", "cpu"]
    assert main(["align", str(folder), "--objective", "gbpo", "--reward", "hit=1", *quick]) == 0
    plots = {path.stem: path for path in (folder / "plots" / "policy-gbpo").iterdir()}
    assert {
        "reward-1",
        "ratio",
        "share-at-upper",
        "gradient-norm",
        "entropy",
        "valid-recall",
        "valid-coarse-entropy",
    } <= set(plots)
    for path in plots.values():
        assert ET.parse(path).getroot().tag.endswith("svg")
    audit(open_run(folder))
    assert "policy-gbpo" in open_run(folder).aligned()
    capsys.readouterr()
    assert main(["report", str(folder), "--out", str(tmp_path / "deep" / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    assert "gbpo" in (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium or chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def size(browser: Any, width: int, scheme: str = "light") -> None:
    """Give the window a width and a colour scheme."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_a_browser_shows_the_page_without_an_error(browser: Any, page: Path, study_page: Path) -> None:
    for path in (page, study_page):
        browser.get(path.as_uri())
        for width in (1280, 400):
            size(browser, width)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        size(browser, 1280)
        surface = "return getComputedStyle(document.querySelector('section')).backgroundColor"
        light = browser.execute_script(surface)
        size(browser, 1280, "dark")
        assert browser.execute_script(surface) != light
        assert browser.get_log("browser") == []
        names = browser.execute_script(
            "return [...document.querySelectorAll('figure > svg')].map(svg => svg.getBoundingClientRect().height)"
        )
        assert len(names) > 10
        assert min(names) > 100


def test_the_controls_of_the_page_work_by_keyboard(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def shown() -> list[str]:
        return [card.get_attribute("data-number") for card in cards if card.is_displayed()]

    size(browser, 1280)
    browser.get(page.as_uri())
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    skip = browser.switch_to.active_element
    assert skip.get_attribute("href").endswith("#main")
    assert skip.value_of_css_property("outline-style") == "solid"
    cards = browser.find_elements(By.CSS_SELECTOR, "#cards > .user")
    first = shown()
    assert len(first) == 1
    browser.find_element(By.ID, "next").send_keys(Keys.ENTER)
    assert len(shown()) == 1
    assert shown() != first
    assert browser.find_element(By.ID, "place").text == f"2 of {len(cards)}"
    browser.find_element(By.ID, "previous").send_keys(Keys.SPACE)
    assert shown() == first
    browser.find_element(By.ID, "group").send_keys(Keys.END)
    last = browser.find_element(By.ID, "group").get_attribute("value")
    (card,) = [card for card in cards if card.is_displayed()]
    assert card.get_attribute("data-group") == last
    line = browser.find_element(By.CSS_SELECTOR, "#training figure .series.s1")
    assert line.is_displayed()
    browser.find_element(By.CSS_SELECTOR, "#training .show1").send_keys(Keys.SPACE)
    assert not line.is_displayed()
    summary = browser.find_element(By.CSS_SELECTOR, "#training summary")
    summary.send_keys(Keys.ENTER)
    assert browser.find_element(By.CSS_SELECTOR, "#training details[open] table").is_displayed()
    assert browser.get_log("browser") == []


def test_a_browser_without_scripts_shows_every_user(browser: Any, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.as_uri())
        cards = browser.find_elements("css selector", "#cards > .user")
        assert cards
        assert all(card.is_displayed() for card in cards)
        assert not browser.find_element("id", "controls").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_coefficients_are_those_of_the_code() -> None:
    """At q = 0.2: GBPO's c is min(r, 1) for A > 0 and min(r, p / (1 - p)) for A < 0, p = 0.2 r; SAGE doubles by b."""
    ratios = np.array([0.5, 1.0, 1.5])
    np.testing.assert_allclose(coefficients("gbpo", advantage=1.0, ratios=ratios), [0.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(
        coefficients("gbpo", advantage=-1.0, ratios=ratios), [0.1 / 0.9, 0.2 / 0.8, 0.3 / 0.7], rtol=1e-6
    )
    half_cold = coefficients("sage", advantage=1.0, coldness=0.5, ratios=ratios)  # boost 4
    np.testing.assert_allclose(half_cold, [1.5, 3.0, 3.0], rtol=1e-6)  # (1 + 4 x 0.5) min(r, 1)
    names = [row.name for row in choose_objectives([("mine", OBJECTIVES["sage"])])]
    assert names == ["mine", "gbpo", "gspo", "grpo, gdpo"]


def test_the_pareto_front_by_hand() -> None:
    """(1, 1) is beaten by (2, 2); (3, 0) and (2, 2) beat nobody; an equal point is kept once."""
    assert pareto_front([(1, 1), (2, 2), (3, 0), (2, 2), (2.5, 0)]) == [2, 1]
    assert pareto_front([]) == []


def test_moving_mean_by_hand() -> None:
    assert moving_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert moving_mean(np.array([1.0, 2.0]), 1).tolist() == [1.0, 2.0]


def test_users_are_grouped_by_who_found_the_item() -> None:
    targets = np.array([1, 1, 1, 1])
    start, aligned = np.array([[1], [0], [1], [0]]), np.array([[0], [1], [1], [0]])
    groups, of_case = group_users(targets, [("supervised", start), ("sage", aligned)])
    assert [groups[i] for i in of_case] == [
        "found by supervised alone",
        "found by sage alone",
        "found by both",
        "found neither by sage nor supervised",
    ]


def test_a_plot_keeps_small_numbers_hostile_words_and_its_ids_to_itself() -> None:
    def draw(name: str) -> str:
        with canvas(EVIL, "x", "y") as axes:
            draw_lines(axes, [Line("a", [0, 1], [0.00012, 0.00034], Style(1), marked=True)])
            return to_svg(axes, name)

    first, second = draw("one"), draw("two")
    assert "0.0002" in first
    assert "<script" not in first
    assert EVIL in "".join(ET.fromstring(first).itertext())
    assert "var(--s1)" in first
    assert "#0067a5" not in first
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert draw("one") == first


def test_a_drawing_becomes_part_of_a_page_by_hand() -> None:
    """Metadata, style element, sizes, fonts and the rotation by -0 go; the id that is used gets the prefix, the other
    goes, that of a series becomes its class; a colour of the page becomes its variable, another one stays, and so does
    text that looks like either; 10.129 and 0.005 are cut to 10.12 and 0.00.
    """
    drawn = """<?xml version="1.0"?>
<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt"
  viewBox="0 0 9 9" version="1.1">
 <metadata><a/></metadata>
 <defs><style type="text/css">*{stroke-linejoin: round}</style></defs>
 <!-- a comment -->
 <g id="series-3-0-range"><path d="M 1.5 10.129
L 0.005 2
z
" clip-path="url(#clip)" style="fill: #00805f; stroke:#123456; font-family: 'A', sans-serif"/></g>
 <defs><clipPath id="clip"><rect id="lost" width="4" height="5"/></clipPath></defs>
 <use xlink:href="#clip" fill="#16191d"/>
 <text x="1.999" transform="rotate(-0 1 2)">#clip  &lt;b> #16191d 1.2345</text>
</svg>"""
    assert adapt(drawn, "p", 'A "plot"') == (
        '<svg viewBox="0 0 9 9" role="img" aria-label="A &quot;plot&quot;" focusable="false"><defs />'
        '<g class="series s3"><path d="M 1.5 10.12L0.00 2 z" clip-path="url(#p-clip)" '
        'style="fill: var(--s3); stroke: #123456" /></g>'
        '<defs><clipPath id="p-clip"><rect width="4" height="5" /></clipPath></defs>'
        '<use href="#p-clip" fill="var(--ink)" />'
        '<text x="1.99">#clip  &lt;b&gt; #16191d 1.2345</text></svg>'
    )
    assert adapt(drawn, "p").startswith('<svg viewBox="0 0 9 9" aria-hidden="true">')


@given(
    st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), min_size=1).filter(str.strip),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
)
def test_a_drawing_keeps_its_words_and_its_places_to_a_hundredth(words: str, places: list[float]) -> None:
    root = ET.Element("{http://www.w3.org/2000/svg}svg")
    ET.SubElement(root, "{http://www.w3.org/2000/svg}text").text = words
    path = " L ".join(f"{x:.6f} 0" for x in places)
    ET.SubElement(root, "{http://www.w3.org/2000/svg}path", d=f"M {path}")
    text, line = ET.fromstring(adapt(ET.tostring(root, encoding="unicode"), "p", words))
    assert text.text == words
    kept = [float(word) for word in re.findall(r"[-\d.]+", line.attrib["d"])[::2]]
    assert np.abs(np.subtract(kept, places)).max() <= 0.01 + 1e-6


@pytest.mark.parametrize(
    "words", ["[/bold]", "<script>alert(1)</script>", "{{ 7*7 }}", "{% raise %}", "{# x #}", "{{ folder.unlink() }}"]
)
def test_a_study_of_hostile_words_shows_them_as_they_are(words: str, tmp_path: Path) -> None:
    """Each place of a study's record in which words may stand: title, names, kinds, notes, verdicts, settings …"""
    metrics = {f"{name}@10": {"value": 0.1, "low": 0.0, "high": 0.2} for name in ("recall", "coarse_entropy", words)}
    test = {"difference": 0.1, "low": None, "high": None, "p_value": None, "p_holm": None, "verdict": words}
    row = {"name": f"row {words}", "kind": f"kind {words}", "note": f"note {words}", "seeds": [0], "metrics": metrics}
    trial = {"objective": f"tried {words}", "settings": {f"set {words}": f"to {words}"}, "chosen": True}
    record = {
        "title": f"title {words}",
        "dataset": {f"data {words}": 1},
        "rows": [row | {"against": {f"rival {words}": {"recall@10": test}}}, {"name": "other", "metrics": metrics}],
        "trials": [trial | {"metrics": {"recall@10": 0.1 * i, "coarse_entropy@10": 0.2}} for i in range(2)],
        "published": [{"name": f"paper {words}", "recall@10": 0.1, "source": f"source {words}"}],
        "settings": {f"setting {words}": f"value {words}"},
        "versions": {f"package {words}": f"version {words}"},
        "hashes": {f"artefact {words}": f"hash {words}"},
        "hardware": f"cores {words}",
    }
    files.write_record(tmp_path / "study.json", record)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.open == []
    assert len(outline.named("script")) == 1
    said = "\n".join(outline.text)
    names = "title row kind note rival tried set to paper source setting value package version artefact hash cores"
    for name in (*names.split(), "data"):
        assert f"{name} {words}" in said, name
    labels = {a["aria-label"] for a in outline.named("div") if "aria-label" in a}
    assert f"Table: Differences to rival {words}, user by user" in labels


def test_a_row_of_one_seed_a_note_and_both_entropies(tmp_path: Path) -> None:
    """What is not tested has no p-value and is said not to be; the note stands wherever the row is named first."""
    names = ("recall@10", "coarse_entropy@10", "entropy@10")
    metrics = {name: {"value": 1.5, "low": None, "high": None, "seed_std": None} for name in names}
    untested = {"difference": 0.1, "low": None, "high": None, "p_value": None, "p_holm": None, "verdict": "one seed"}
    tested = {"difference": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01, "p_holm": 0.02, "verdict": "higher"}
    rows = [
        {"name": "sft", "kind": "control", "seeds": [0, 1], "metrics": metrics, "against": {}},
        {
            "name": "gspo",
            "kind": "objective",
            "seeds": [0],
            "note": "under-tuned",
            "metrics": metrics,
            "against": {"sft": {"recall@10": untested, "coarse_entropy@10": tested, "entropy@10": untested}},
        },
    ]
    files.write_record(tmp_path / "study.json", {"title": "One seed", "rows": rows})
    outline = Outline(write_report(tmp_path).read_text(encoding="utf-8"))
    said = " ".join(" ".join(outline.text).split())
    assert (
        "gspo (under-tuned) against sft: higher in coarse Entropy@10; not tested (one seed) in Recall@10, Entropy@10."
        in said
    )
    assert "seeds Recall@10 coarse Entropy@10 Entropy@10 sft control 0, 1 1.5000 1.500 1.500" in said
    assert "gspo under-tuned objective 0 1.5000 one seed 1.500 ▲ higher 1.500 one seed" in said
    assert "gspo +0.1000 one seed +0.2000 +0.1000 to +0.3000 p 0.020 ▲ higher +0.1000 one seed" in said
    assert '"one seed": 2 differences involve a trained row of one seed' in said
    assert [a["class"] for a in outline.named("span") if "verdict" in str(a.get("class"))].count("verdict same") == 4
