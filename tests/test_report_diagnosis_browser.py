"""The page of a diagnosis in a real browser: many classes a page at a time, and names that are code stay text."""

import shutil

import numpy as np
import pytest

import tailscope
from diagnosis_cases import table
from tailscope import report
from tailscope.results import write

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package chromium")

CLASSES = 600
UNFOLD = "document.querySelectorAll('details.part').forEach(part => { part.open = true; })"
HOSTILE = ["<script>alert(1)</script>", 'a, b; "c"', "<img src=x onerror=alert(2)>", "=1+1,2"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The page of 600 classes, four with hostile names, and all that it said and asked for."""
    rng, labels = np.random.default_rng(0), np.arange(2 * CLASSES) % CLASSES
    names = [*HOSTILE, *(f"class {k}" for k in range(4, CLASSES))]
    train, unseen = (table(rng.normal(size=(len(labels), 3)), labels, class_names=names) for _ in range(2))
    out = tmp_path_factory.mktemp("many")
    write(out, "diagnosis", tailscope.diagnose(train, unseen, verdict=False, permutations=0))
    address, said = report.build(out, figures=False).as_uri(), []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: said.append(request.url) if request.url != address else None)
        page.goto(address)
        page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        page.evaluate(UNFOLD)
        yield page
        browser.close()
    assert said == []


def visible(page):
    return page.eval_on_selector_all(
        "#class-scroll tbody tr", "rows => rows.filter(r => !r.hidden).map(r => r.cells[0].textContent)"
    )


def test_many_classes_come_a_page_at_a_time(opened):
    assert len(visible(opened)) == 500
    assert opened.inner_text("#shown") == "600 classes, the first 500 shown"
    opened.click("#more")
    assert len(visible(opened)) == CLASSES
    assert not opened.is_visible("#more")
    assert opened.inner_text("#shown") == "600 classes"


def test_the_first_page_follows_the_order(opened):
    opened.reload()
    opened.wait_for_selector("body[data-ready=yes]")
    opened.evaluate(UNFOLD)
    before = visible(opened)
    heading = opened.locator("#class-scroll thead th").filter(has_text="rank").locator("button").first
    heading.click()
    heading.click()
    assert len(visible(opened)) == 500
    assert len({*before} & {*visible(opened)}) == 400
    opened.fill("#find", "class 599")
    found = visible(opened)
    assert "class 599" in found  # and those whose nearest class it is
    assert opened.inner_text("#shown") == f"{len(found)} of 600 classes"


def test_names_are_text(opened):
    opened.fill("#find", "alert(")
    assert {HOSTILE[0], HOSTILE[2]} <= set(visible(opened))
    opened.fill("#find", "a, b;")
    assert HOSTILE[1] in visible(opened)
