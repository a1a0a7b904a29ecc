"""The report of every kind, read without a browser; and that each check can fail."""

import pytest

from tests.studies.every_kind import PAGES, write_page
from tests.studies.page_faults import static_faults


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {kind: write_page(kind, folder / kind.replace(" ", "-")).read_text(encoding="utf-8") for kind in PAGES}


@pytest.mark.parametrize("kind", PAGES)
def test_a_sound_page(kind, pages):
    assert static_faults(pages[kind]) == []


def test_the_page_of_bounds_has_its_assumptions(pages):
    for kind in ("twins", "twins of two widths"):
        assert "Assumptions of the theorem" in pages[kind]
        assert '<th scope="row" class="text">positive rate</th>' in pages[kind]
    assert '<a href="#assumptions-width64">' in pages["twins of two widths"]


MUTANTS = {
    "an anchor that leads nowhere": (('href="#again"', 'href="#gone"'), "points to #gone"),
    "an address": (("<h2>Figures</h2>", '<h2>Figures</h2><a href="https://example.org">x</a>'), "leads out"),
    "a picture from elsewhere": (("</main>", '<img src="https://example.org/x.png" alt="x"></main>'), "leads out"),
    "a font from elsewhere": (("</style>", "@font-face{src: url(https://example.org/f)}</style>"), "leads out"),
    "a script": (("</main>", "<script>1</script></main>"), "a script"),
    "a figure without a name": (('role="img" aria-label=', 'role="img" data-x='), "without a name"),
    "a picture without alt": (("</main>", '<img src="data:,"></main>'), "alt"),
    "no finding": (('class="finding"', 'class="other"'), "no finding"),
    "no command": (("<pre>stability run", "<pre>run"), "no command"),
    "no language": (('lang="en"', ""), "no language"),
    "a heading left out": (("<h2>Figures</h2>", "<h4>Figures</h4>"), "h4 after"),
    "a tag left open": (("</figure>", ""), "does not nest"),
    "the same id twice": (("</main>", '<p id="again"></p></main>'), "2 times"),
    "a number that is none": (("</main>", "<p>nan times</p></main>"), "nan"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_spoilt_page_is_seen(mutant, pages):
    (before, after), fault = MUTANTS[mutant]
    assert before in pages["twins"]
    assert any(fault in found for found in static_faults(pages["twins"].replace(before, after, 1)))
