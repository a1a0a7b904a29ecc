"""The report of every kind in a headless browser, on a phone and on a screen; and that each check can fail."""

import os
import shutil

import pytest

from tests.studies.every_kind import PAGES, write_page
from tests.studies.page_faults import MOST_PAGES, NARROW, WIDE, browser_faults, printed_pages

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser on PATH: looked for {', '.join(NAMES)}")
    with api.sync_playwright() as play:
        # Chromium's own sandbox refuses to run as root.
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        started = play.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {kind: write_page(kind, folder / kind.replace(" ", "-")) for kind in PAGES}


@pytest.mark.parametrize("width", [NARROW, 768, WIDE])
@pytest.mark.parametrize("kind", PAGES)
def test_a_sound_page(browser, pages, kind, width):
    assert browser_faults(browser, pages[kind], width) == []


def test_a_browser_with_scripts_has_nothing_to_say_either(browser, pages):
    assert browser_faults(browser, pages["twins"], WIDE, scripts=True) == []


@pytest.mark.parametrize("kind", PAGES)
def test_a_print_has_a_sane_number_of_pages(browser, pages, kind):
    assert 2 <= printed_pages(browser, pages[kind]) <= MOST_PAGES


TABLE = '<table style="width: 2000px"><tr><td>wide</td></tr></table></main>'
MUTANTS = {
    "a table of 2000 px": (("</main>", TABLE), "the page is"),
    "a figure outside a frame": (
        ("</main>", '<svg role="img" id="w" width="2000" height="9"></svg></main>'),
        "leaves the window",
    ),
    "a word that does not break": (
        ("</main>", f'<p style="overflow-wrap: normal">{"x" * 400}</p></main>'),
        "the page is",
    ),
    "an empty figure": (("</main>", '<svg role="img" id="e" width="0" height="0"></svg></main>'), "e has no size"),
    "a target that is not shown": (("</style>", "#again { display: none }</style>"), "no target for How to reproduce"),
    "type of 11 px": (("</style>", "p { font-size: 11px !important }</style>"), "P of 11 px"),
    "figures shrunk to the screen": (("</style>", "figure svg { max-width: 100% !important }</style>"), "type of"),
    "a picture from elsewhere": (
        ("img-src data:", "img-src *"),
        ("</main>", '<img src="http://127.0.0.1:9/x.png" alt="x"></main>'),
        "127.0.0.1",
    ),
    "a script that the policy refuses": (("</main>", "<script>document.title = 1</script></main>"), "script"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_spoilt_page_is_seen(browser, pages, tmp_path, mutant):
    *changes, fault = MUTANTS[mutant]
    text = pages["twins"].read_text(encoding="utf-8")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after, 1)
    spoilt = tmp_path / "report.html"
    spoilt.write_text(text, encoding="utf-8")
    found = browser_faults(browser, spoilt, NARROW, scripts=True)
    assert any(fault in one for one in found), found


def test_figures_are_not_split_over_printed_pages(browser, pages):
    """The print style keeps each figure whole and inside the page."""
    context = browser.new_context(viewport={"width": 690, "height": 1000})  # A4 less its margins
    page = context.new_page()
    page.goto(pages["twins"].as_uri())
    page.emulate_media(media="print")
    boxes = page.evaluate(
        "() => [...document.querySelectorAll('figure')].map(f => [getComputedStyle(f).breakInside,"
        " f.querySelector('svg').getBoundingClientRect().width, f.getBoundingClientRect().height])"
    )
    context.close()
    assert boxes
    for inside, width, height in boxes:
        assert inside == "avoid"
        assert 200 < width <= 690
        assert height < 269 / 25.4 * 96  # what A4 has between its margins
