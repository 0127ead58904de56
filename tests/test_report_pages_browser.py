"""The pages of a diagnosis and of a comparison of methods in a browser: first screen, folds, paper and phone."""

import json
import re
import shutil

import numpy as np
import pytest

import experiment_setups
import tailscope
from diagnosis_cases import table
from tailscope import report
from tailscope.experiments import compare
from tailscope.results import write

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package chromium")

CLASSES, DIMS = 100, 16
PAPER = 703  # CSS pixels between the margins of A4
UNFOLD = "document.querySelectorAll('details').forEach(one => { one.open = true; })"
FIRST = "all => all.map(one => [one.className || one.tagName, one.getBoundingClientRect().bottom])"
CUT = """svgs => svgs.flatMap(svg => {
    const room = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.width && (box.left < room.left - 1 || box.right > room.right + 1);
    }).map(text => text.textContent);
})"""


def diagnosed(out):
    rng = np.random.default_rng(0)
    centres = 4 * rng.normal(size=(CLASSES, DIMS)) / DIMS**0.5
    counts = (200 * 0.02 ** (np.arange(CLASSES) / (CLASSES - 1))).astype(int)
    sets = []
    for each in (counts, [20] * CLASSES):
        labels = np.repeat(np.arange(CLASSES), each)
        features = centres[labels] + 0.6 * rng.normal(size=(len(labels), DIMS))
        sets.append(table(features, labels, class_names=[f"class number {k}" for k in range(CLASSES)]))
    write(out, "diagnosis", tailscope.diagnose(*sets, permutations=99))


def compared(out):
    values = experiment_setups.settings(seeds=(0, 1))
    settings = compare.CompareSettings.model_validate({**dict(values), "methods": "ce; la; mixup + crt"})
    lab = experiment_setups.lab(out / "store")
    (out / "compare.json").write_text(json.dumps(compare.compare(lab, settings)))


@pytest.fixture(scope="module", params=[diagnosed, compared], ids=["diagnosis", "compare"])
def address(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    request.param(out)
    return report.build(out, figures=False).as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page at a width; nothing may be said on the console."""
    said, opened = [], []

    def open_at(width, height=800):
        page = browser.new_page(viewport={"width": width, "height": height})
        opened.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        return page

    yield open_at
    for page in opened:
        page.close()
    assert said == []


WIDE = [pytest.param(1280, unfold, marks=pytest.mark.slow) for unfold in ("", UNFOLD)]


@pytest.mark.parametrize(("width", "unfold"), [(390, ""), pytest.param(390, UNFOLD, marks=pytest.mark.slow), *WIDE])
def test_no_accessibility_rule_is_broken_with_folds_closed_and_open(open_page, width, unfold):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(width)
    page.evaluate(unfold)
    page.wait_for_timeout(300)
    assert [found["id"] for found in axe.Axe().run(page).response["violations"]] == []


def test_the_first_screen_has_verdict_caveat_and_what_to_do(open_page):
    page = open_page(1280)
    ends = dict(page.eval_on_selector_all("h1, .lead, .caveat, .todo", FIRST))
    assert set(ends) == {"H1", "lead", "caveat", "todo"}
    assert max(ends.values()) <= 800
    assert 100 < len(page.inner_text("main").split()) <= 1500


def test_a_phone_shows_what_to_do_and_cuts_no_label(open_page):
    page = open_page(390, 844)
    assert max(dict(page.eval_on_selector_all("h1, .todo", FIRST)).values()) <= 844
    page.evaluate(UNFOLD)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.eval_on_selector_all(".chart svg", CUT) == []


def test_paper_takes_six_pages_at_most_and_cuts_no_table(open_page):
    page = open_page(PAPER)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widest = page.eval_on_selector_all("main table", "all => all.map(one => one.getBoundingClientRect().right)")
    assert len(widest) > 2
    assert max(widest) <= PAPER
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4"))) <= 6
