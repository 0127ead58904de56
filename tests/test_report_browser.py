"""The report in a real browser, opened from disk: charts drawn, tables sorted, nothing fetched, nothing executed."""

import re
import shutil

import pytest

import result_factory as factory
from tailscope import report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package chromium")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ["<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "'];alert(3)//", "${alert(4)}", "{{ 7 * 7 }}"]
DRAWN = """boxes => boxes.map(box => [
    box.dataset.spec,
    box.offsetParent !== null,
    box.querySelectorAll('svg g.role-mark path, svg g.role-mark line').length,
])"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A report on ten classes, five with hostile names, the last three with too few samples for geometry."""
    names = [*NAMES, "five", "six", "seven", "eight", "nine"]
    out = factory.write(
        tmp_path_factory.mktemp("browser"),
        swap=factory.swap(names=names, top=120, warnings=["<b>bold</b>"]),
        ladder=factory.ladder(names=names, top=120),
        geometry=factory.geometry(names=names, top=120),
        claims=factory.claims(),
    )
    return report.build(out, figures=False).as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


class Opened:
    """A page that has drawn its charts, and all that it said and asked for meanwhile."""

    def __init__(self, context, address):
        self.said, self.asked = [], []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.ready()
        self.page.evaluate("document.querySelectorAll('details.part').forEach(part => { part.open = true; })")

    def ready(self):
        self.page.wait_for_selector("body[data-ready=yes]", timeout=60_000)

    def show(self, variant):
        if not self.page.is_checked(f"input[value={variant}]"):
            self.page.evaluate("delete document.body.dataset.ready")
            self.page.check(f"input[value={variant}]")
            self.ready()


@pytest.fixture(scope="module")
def open_page(browser, address):
    """Opens the report in a context of its own, once for each set of the context's options."""
    known = {}

    def open_with(**options):
        key = str(options)
        if key not in known:
            known[key] = Opened(browser.new_context(**options), address)
        return known[key]

    open_with.known = known
    return open_with


@pytest.fixture(autouse=True)
def quiet(open_page, address):
    """No test may leave a message on the console, a dialogue, or a request for anything but the page."""
    yield
    for opened in open_page.known.values():
        assert opened.said == []
        assert set(opened.asked) == {address}


@pytest.fixture
def opened(open_page):
    return open_page()


@pytest.fixture
def dark(open_page):
    return open_page(color_scheme="dark")


def column(page, heading):
    """Return the texts of one column of the class table, shown rows only."""
    return page.evaluate(
        """heading => {
            const table = document.querySelector('#class-scroll table');
            const index = [...table.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === heading);
            return [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[index].textContent);
        }""",
        heading,
    )


def heading(page, label):
    return page.locator("#class-scroll thead th").filter(has_text=label).locator("button").first


def test_every_chart_is_drawn_in_both_variants(opened):
    found = {}
    for variant in ("calibrated", "paper"):
        opened.show(variant)
        charts = opened.page.eval_on_selector_all(".chart", DRAWN)
        found |= {spec: marks for spec, visible, marks in charts if visible}
    assert set(found) == {spec for spec, _, _ in charts}
    assert len(found) > 25
    assert {spec: marks for spec, marks in found.items() if marks < 3} == {}


def test_the_class_table_sorts_by_click_and_by_key(opened):
    page = opened.page
    counts = [int(text) for text in column(page, "images")]
    assert counts == sorted(counts, reverse=True)  # as built
    heading(page, "images").click()
    assert [int(text) for text in column(page, "images")] == sorted(counts)
    heading(page, "images").press("Enter")
    assert [int(text) for text in column(page, "images")] == counts
    assert heading(page, "images").locator("..").get_attribute("aria-sort") == "descending"
    heading(page, "spread gap").click()
    gaps = column(page, "spread gap, °")
    known = [float(text.replace("−", "-")) for text in gaps if text != "–"]
    assert known == sorted(known)
    assert 0 < len(known) < len(gaps)
    assert gaps[len(known) :] == ["–"] * (len(gaps) - len(known))
    heading(page, "spread gap").press("Space")
    assert column(page, "spread gap, °")[len(known) :] == ["–"] * (len(gaps) - len(known))


def test_the_class_table_filters(opened):
    page = opened.page
    page.fill("#find", "IGHT")
    assert column(page, "class") == ["eight"]
    assert page.inner_text("#shown") == "1 of 10 classes"
    page.fill("#find", "")
    page.select_option("#group", "tail")
    assert set(column(page, "group")) == {"tail"}
    page.select_option("#group", "")


def test_names_stay_text_in_the_page_and_in_tooltips(opened):
    page = opened.page
    assert set(NAMES) < set(column(page, "class"))
    assert "<b>bold</b>" in page.inner_text("#warnings")
    page.locator("#profile .chart g.role-mark.mark-rect path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert NAMES[0] in page.inner_text("#vg-tooltip-element")


@pytest.mark.parametrize("scheme", ["opened", "dark"])
def test_text_and_charts_stand_out_in_light_and_dark(scheme, request):
    page = request.getfixturevalue(scheme).page
    background, label = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor,
                  getComputedStyle(document.querySelector('.chart svg g.role-axis-label text')).fill]"""
    )
    assert contrast(background, label) > 4.5
    assert contrast(background, "rgb(0, 0, 0)" if scheme == "opened" else "rgb(255, 255, 255)") > 15
    assert len(page.screenshot(full_page=True)) > 50_000


def contrast(*colours):
    """Return the contrast ratio of WCAG 2 between two `rgb(r, g, b)` colours."""
    luminances = []
    for colour in colours:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(luminances)
    return (high + 0.05) / (low + 0.05)


def test_paper_is_white_and_shows_what_is_folded(dark):
    page = dark.page
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.eval_on_selector_all("details", "all => all.every(entry => entry.open)")
    assert len(page.screenshot(full_page=True)) > 50_000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.eval_on_selector_all("details:not(.part)", "all => all.every(entry => !entry.open)")
    page.emulate_media(media="screen")


def test_heads_repeat_on_paper_and_provenance_stays_out(opened):
    page = opened.page
    page.emulate_media(media="print")
    assert page.eval_on_selector("#class-scroll thead", "e => getComputedStyle(e).display") == "table-header-group"
    assert page.eval_on_selector("#class-scroll thead button", "e => getComputedStyle(e).display") == "contents"
    assert not page.is_visible("#provenance")
    page.emulate_media(media="screen")


def test_swap_ladder_and_geometry_print_on_six_pages(browser, tmp_path):
    made = {verb: getattr(factory, verb)(top=120) for verb in ("swap", "ladder", "geometry")}
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(report.build(factory.write(tmp_path, **made), figures=False).as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
    printed = page.pdf(format="A4")
    page.close()
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 6


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 390])
def test_no_accessibility_rule_is_broken(open_page, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(viewport={"width": width, "height": 800}).page
    assert [found["id"] for found in axe.Axe().run(page).response["violations"]] == []


def test_the_first_screen_and_few_words_before_the_folds(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(address)
    words = len(page.inner_text("main").split())
    ends = page.eval_on_selector_all(
        "h1, .lead, .caveat, .todo", "all => all.map(e => e.getBoundingClientRect().bottom)"
    )
    page.close()
    assert 100 < words <= 1500
    assert max(ends) <= 800


def test_a_phone_scrolls_down_only(open_page):
    page = open_page(viewport={"width": 380, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    widest = page.eval_on_selector_all(
        ".chart", "all => Math.max(...all.map(box => box.getBoundingClientRect().right))"
    )
    assert widest <= 380


def test_the_keyboard_reaches_everything(opened):
    page = opened.page
    order = page.eval_on_selector_all(
        "a[href], button, summary, input, select, .scroll", "all => all.map(entry => [entry.tabIndex, entry.innerText])"
    )
    assert order[0] == [0, "Skip to the verdict"]
    assert {index for index, _ in order} == {0}
    page.focus("input[value=calibrated]")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.body.dataset.shown") == "paper"
    opened.ready()
