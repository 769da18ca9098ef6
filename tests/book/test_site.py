"""The published book, without a browser and in one."""

import functools
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from conftest import CHAPTERS

PAGES = [*CHAPTERS, "papers", "glossary", "notation"]
DEVICES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


def in_browser(test):
    """Mark a test that needs the executed chapters and Chromium."""
    return pytest.mark.chapter(pytest.mark.browser(test))


# contrast of two colours as WCAG defines it, of a text against what lies under it
CONTRAST = """(node) => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => parse(c).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const solid = (c) => { const p = parse(c); return p.length < 4 || p[3] > 0.5; };
  const style = getComputedStyle(node);
  const text = node instanceof SVGElement ? style.fill : style.color;
  let under = node;
  while (under && !solid(getComputedStyle(under).backgroundColor)) under = under.parentElement;
  const back = under ? getComputedStyle(under).backgroundColor : "rgb(255, 255, 255)";
  const [high, low] = [light(text), light(back)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}"""


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.loaded, self.linked = [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "embed") and given.get("src"):
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("href"):
            self.loaded.append(given["href"])
        elif tag == "a" and given.get("href"):
            self.linked.append(given["href"])


@pytest.mark.chapter
@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_and_links_only_what_the_book_holds(name, site):
    links = _Links()
    links.feed((site / f"{name}.html").read_text())
    assert [url for url in links.loaded if urlsplit(url).netloc] == []
    for url in [*links.loaded, *links.linked]:
        parts = urlsplit(url)
        if parts.path and not parts.scheme and not parts.netloc:
            assert (site / unquote(parts.path)).exists(), url


@pytest.mark.chapter
@pytest.mark.parametrize("name", CHAPTERS)
def test_without_an_address_no_button_leaves_the_book(name, site):
    assert "launch-buttons" not in (site / f"{name}.html").read_text()


@pytest.mark.chapter
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_small_enough_for_a_phone(name, site):
    assert (site / f"{name}.html").stat().st_size < 8e6


@pytest.fixture(scope="module")
def visit(browser, address):
    """A function that opens a page, once for all tests, and notes what goes wrong there."""

    @functools.cache
    def open_page(name, device, scheme):
        page, faults = browser.new_page(viewport=DEVICES[device], color_scheme=scheme), []
        page.on("console", lambda m: m.type in ("error", "warning") and faults.append(m.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
        page.on("response", lambda r: r.status >= 400 and faults.append(f"{r.status}: {r.url}"))
        page.on("request", lambda r: _is_outside(r.url, address) and faults.append(r.url))
        page.goto(address + name, wait_until="load")
        page.wait_for_function(
            "[...document.querySelectorAll('.plotly-graph-div')].every((f) => f._fullLayout)"
        )
        return page, faults

    return lambda name, device="desk", scheme="light": open_page(name, device, scheme)


def _is_outside(url, address):
    return not url.startswith((address, "data:", "blob:", "about:"))


@in_browser
@pytest.mark.parametrize("name", [*PAGES, "search", "genindex"])
def test_a_page_loads_without_errors_and_asks_no_other_host(name, visit):
    page, faults = visit(f"{name}.html")
    page.wait_for_load_state("networkidle")
    assert faults == []
    assert page.title()


@in_browser
@pytest.mark.parametrize("name", [*CHAPTERS, "notation"])
def test_formulas_are_typeset(name, visit):
    page, faults = visit(f"{name}.html")
    if page.locator(".math").count() == 0:
        pytest.skip(f"{name} has no formula")
    page.wait_for_selector("mjx-container svg")
    page.wait_for_function(
        "document.querySelectorAll('mjx-container').length >="
        " document.querySelectorAll('.math').length"
    )
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert faults == []


@in_browser
@pytest.mark.parametrize("name", CHAPTERS)
def test_every_figure_is_drawn(name, visit):
    page, _ = visit(f"{name}.html")
    figures = page.locator(".js-plotly-plot")
    assert figures.count() >= 1
    for i in range(figures.count()):
        drawn = figures.nth(i).evaluate(
            "(f) => ({n: f._fullData.length + (f.layout.images ?? []).length,"
            " width: f.querySelector('.main-svg').clientWidth,"
            " marks: f.querySelectorAll('.main-svg path, .main-svg image, canvas').length})"
        )
        assert drawn["n"] >= 1
        assert drawn["width"] > 200
        assert drawn["marks"] >= 1


@in_browser
@pytest.mark.parametrize("name", [name for name in CHAPTERS if name != "00_start"])
def test_every_slider_changes_its_figure_by_key_and_by_pointer(name, visit):
    page, faults = visit(f"{name}.html")
    sliders = page.locator(".explore input[type=range]")
    assert sliders.count() >= 1
    for i in range(sliders.count()):
        slider = sliders.nth(i)
        assert slider.evaluate("(s) => s.closest('label').textContent.trim()")
        figure = page.locator("#" + slider.get_attribute("aria-controls"))
        state = "(f) => JSON.stringify([f.data, f.layout.title, f.layout.annotations])"
        before, said = figure.evaluate(state), slider.get_attribute("aria-valuetext")
        slider.focus()
        page.keyboard.press("End")
        assert figure.evaluate(state) != before
        assert slider.get_attribute("aria-valuetext") != said
        slider.click(position={"x": 2, "y": slider.bounding_box()["height"] / 2})
        assert slider.get_attribute("aria-valuetext") == said
        assert slider.evaluate("(s) => s.nextElementSibling.value") == said
    assert faults == []


@in_browser
def test_the_search_finds_a_page(visit):
    page, faults = visit("search.html?q=noise")
    page.wait_for_selector("#search-results li a")
    assert "notation" in " ".join(
        link.get_attribute("href") for link in page.locator("#search-results li a").all()
    )
    assert faults == []


@in_browser
@pytest.mark.parametrize("name", PAGES)
def test_a_phone_needs_no_sideways_scroll(name, visit):
    page, _ = visit(f"{name}.html", "phone")
    width = DEVICES["phone"]["width"]
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for figure in page.locator(".js-plotly-plot").all():
        assert figure.bounding_box()["width"] <= width


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_and_figures_can_be_read_in_the_light_and_in_the_dark(name, scheme, visit):
    page, _ = visit(f"{name}.html", scheme=scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    written = page.locator(
        "article p, article label, article td, .js-plotly-plot .xtick text,"
        " .js-plotly-plot .ytick text, .js-plotly-plot .legendtext, .js-plotly-plot .g-xtitle text"
    )
    assert written.count() >= 1
    low = written.evaluate_all(
        f"(nodes) => nodes.filter((n) => ({CONTRAST})(n) < 4.5).map((n) => n.textContent)"
    )
    assert low == []
