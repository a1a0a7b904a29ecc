"""The site of `make docs`: built without a warning, every page there, nothing loaded from elsewhere, no page too wide."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.docstrings import readable
from docs.formulas import pieces
from tests.pages import DOCS, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("K_{(i,c),(j,d)}", [("", "K"), ("sub", "(i,c),(j,d)")]),
        ("e^(−Ts/(1+s))x", [("", "e"), ("sup", "−Ts/(1+s)"), ("", "x")]),
        ("n^1.69, w", [("", "n"), ("sup", "1.69"), ("", ", w")]),
        ("ẏ'_i", [("", "ẏ'"), ("sub", "i")]),
        ("cL_yR_α", [("", "cL"), ("sub", "y"), ("", "R"), ("sub", "α")]),
        ("label_noise, T3H_drift, in_proj", [("", "label_noise, T3H_drift, in_proj")]),
        ("examples/own_study.py", [("", "examples/own_study.py")]),
        ("a _ b ^ c", [("", "a _ b ^ c")]),
    ],
)
def test_indices_of_formulas(text, made):
    assert pieces(text) == made


def test_docstrings_keep_their_tests_and_their_formulas():
    lines = [
        "|e| ≤ 2*x_, ``a|b``, :class:`~m.C`:",
        "",
        "    S = a_b | c",
        "",
        "x: one, see y: two.",
        "    More.",
        ">>> f(1) | 2",
        "3",
    ]
    made = readable(lines, {"x"})
    assert made[0] == "\\|e\\| ≤ 2\\*x\\_, ``a|b``, :class:`~m.C`:"
    assert "- ``x``: one, see y: two." in made
    assert "  More." in made
    assert made[-4:-1] == ["", ">>> f(1) | 2", "3"]


class Loaded(HTMLParser):
    """Everything that a page asks the browser to fetch."""

    def __init__(self):
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in LOADING and given.get(LOADING[tag]) and given.get("rel") not in ("search", "index", "next", "prev"):
            self.urls.append(given[LOADING[tag]])


def loaded_by(page: Path) -> list[str]:
    reader = Loaded()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader.urls


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for package in ("sphinx", "myst_parser", "furo"):
        if find_spec(package) is None:
            pytest.skip(f"the site needs {package}: make test-slow or make docs installs it (extra docs)")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-d", str(out / ".trees")]
    done = subprocess.run(
        [*command, str(DOCS), str(out / "html")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out / "html"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_slow_suites_have_what_the_site_needs():
    asked = subprocess.run(["make", "-nB", "test-slow"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert -1 < asked.find("--editable '.[docs]'") < asked.find("-m pytest")


@pytest.mark.slow
def test_every_page_is_built_and_loads_nothing_from_elsewhere(site):
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")}
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= pages
    assert {"api/optim.html", "api/stability.html", "api/studies.html", "api/nt_kernel.html"} <= pages
    for page in pages:
        for url in loaded_by(site / page):
            assert not re.match(r"(?:https?:)?//", url), (page, url)
            assert ((site / page).parent / url.partition("?")[0]).exists(), (page, url)
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


@pytest.mark.slow
def test_the_reference_describes_what_it_lists(site):
    page = (site / "api" / "stability.assumptions.html").read_text(encoding="utf-8")
    assert 'id="stability.check_assumptions"' in page
    assert "stability.assumptions.check_assumptions" in page
    assert "<sub>" in page
    listed = re.findall(r'href="#([\w.]+)" title="[\w.]+"><code', page)
    assert "stability.assumptions.add_assumption" in listed
    assert all(f'id="{name}"' in page for name in listed)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [500, 1400])
@pytest.mark.parametrize("name", ["index", "start-here", "theory", "recording", "catalogue", "api/nt_kernel.metric"])
def test_no_page_is_wider_than_its_window(site, name, width):
    """500 is as narrow as a headless window gets."""
    page = site / f"{name}.html"
    probe = page.with_name(f"probe-{width}-{page.name}")
    script = "<script>onload=()=>{document.title='width '+document.documentElement.scrollWidth}</script></body>"
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    shown = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
    assert int(re.search(r"<title>width (\d+)", shown)[1]) <= width
