"""The page at / in a real browser: by keyboard, light and dark, wide and narrow, without a word to any other server."""

import asyncio
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sagerec.run.folder import Run
from sagerec.serving.app import PAGE, create_app
from sagerec.serving.settings import ServeSettings
from sagerec.serving.versions import begin
from tests.test_report import browser as browser
from tests.test_report import size


@pytest.fixture(scope="module")
def address(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the small run, whose policy also goes by a second name, in a thread of this process."""
    import uvicorn

    state, run = tmp_path_factory.mktemp("page-state"), tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(small_run.folder, run)
    shutil.copytree(run / "policy", run / "policy-other")
    begin(run, state)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(run, state, ServeSettings(device="cpu"))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        while not server.started or app.state.service.store.current is None:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(30)


def wait(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What a condition gives once it gives something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_the_page_lists_and_writes_by_keyboard(browser: Any, address: str, small_run: Run) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def at(name: str) -> Any:
        return browser.find_element(By.ID, name)

    def rows(name: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(row => row.innerText)"
        found: list[str] = browser.execute_script(script, f"#{name} > li")
        return found

    size(browser, 1280)
    browser.get(address)
    wait(lambda: "200 items" in at("about").text)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("href").endswith("#lists")
    at("words").send_keys(small_run.data.titles([9])[0])
    wait(lambda: rows("found"))
    assert at("hits").text == f"{len(rows('found'))} found"
    at("words").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.tag_name == "button"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait(lambda: len(rows("list-0")) == len(rows("list-1")) == 10)
    assert len(rows("history")) == 1
    assert at("said").text.startswith("10 by policy, 10 by policy-other; 10 in both.")
    at("k").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    wait(lambda: len(rows("list-0")) == 8)
    assert [at(name).get_attribute("aria-valuetext") for name in ("k", "most", "floor")] == ["8", "any", "any"]
    at("cold").send_keys(Keys.SPACE)
    wait(lambda: all("cold" in row for row in rows("list-0")) and "by policy" in at("said").text)
    at("cold").send_keys(Keys.SPACE)
    at("most").send_keys(Keys.HOME)
    wait(lambda: rows("list-0") and len(rows("list-0")) == 8)
    at("category-in").send_keys("no such category")
    wait(lambda: "expected some of the" in at("said").text)
    at("category-in").clear()
    at("category-in").send_keys(Keys.SPACE, Keys.BACKSPACE)
    at("write").send_keys(Keys.ENTER)
    wait(lambda: "written by policy, seed 1" in at("written").text)
    assert len(rows("slate")) == 8
    at("history").find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    wait(lambda: at("said").text == "Choose a history.")
    assert not rows("list-0")
    assert not rows("slate")  # which was for that history
    at("words").send_keys("no such words")
    wait(lambda: at("hits").text == "No title holds these words, and no item has this id.")
    # What the server refused was meant to be refused; nothing else was said.
    assert [line for line in browser.get_log("browser") if not re.search("404|422", line["message"])] == []


def test_the_page_fits_small_and_dark_windows_and_names_what_it_asks_for(browser: Any, address: str) -> None:
    size(browser, 1280)
    browser.get(address)
    surface = "return getComputedStyle(document.querySelector('section')).backgroundColor"
    light = browser.execute_script(surface)
    size(browser, 400)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    size(browser, 1280, "dark")
    assert browser.execute_script(surface) != light
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('input, select')]"
        ".filter(field => !field.labels.length).map(field => field.outerHTML)"
    )
    assert unnamed == []
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked
    assert all(name.startswith(address) for name in asked)


def test_the_page_asks_no_other_server() -> None:
    for file in (file for file in Path(PAGE).iterdir() if file.suffix != ".svg"):  # which names its kind by an address
        text = file.read_text(encoding="utf-8")
        assert "http" not in text
        assert "url(" not in text
