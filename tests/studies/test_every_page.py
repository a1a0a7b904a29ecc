"""The report of every kind, read without a browser; and that each check can fail."""

import pytest

from tests.studies.every_kind import PAGES, write_page
from tests.studies.page_faults import static_faults

QUICK = {"twins", "rlo", "predict"}  # one of each template; drawing the rest takes half a minute


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """kind → its page, drawn when it is first asked for."""
    folder, drawn = tmp_path_factory.mktemp("pages"), {}

    def page(kind: str) -> str:
        if kind not in drawn:
            drawn[kind] = write_page(kind, folder / kind.replace(" ", "-")).read_text(encoding="utf-8")
        return drawn[kind]

    return page


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in PAGES]
)
def test_a_sound_page(kind, page_of):
    assert static_faults(page_of(kind)) == []


def test_the_page_of_bounds_has_its_assumptions(page_of):
    assert "Assumptions of the theorem" in page_of("twins")
    assert '<th scope="row" class="text">positive rate</th>' in page_of("twins")


@pytest.mark.slow
def test_the_parts_of_a_page_have_their_own(page_of):
    assert '<a href="#assumptions-width64">' in page_of("twins of two widths")


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
def test_a_spoilt_page_is_seen(mutant, page_of):
    (before, after), fault = MUTANTS[mutant]
    sound = page_of("twins")
    assert before in sound
    assert any(fault in found for found in static_faults(sound.replace(before, after, 1)))
