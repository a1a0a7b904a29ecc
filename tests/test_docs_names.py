"""Every name, path and link in README.md and docs/*.md leads somewhere, and the API reference has every public name once."""

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

from docs.reference import FLOORS, packages, page_text, public_paths, rooms
from tests.pages import DOCS, INLINE, NAMES, PAGES, PARSER, ROOT, TOKENS, blocks_of


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_and_names_in_the_text_exist(page):
    for where, code in INLINE:
        if where != page:
            continue
        if re.fullmatch(r"(?:nt_kernel|optim|stability|studies|tests|examples|docs|benchmarks)/[\w./-]*", code):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(rf"(?:{'|'.join(FLOORS)})(?:\.[A-Za-z]\w*)+", code):
            assert resolves(code), code


def resolves(name: str) -> bool:
    module, *attributes = name.split(".")
    thing = importlib.import_module(module)
    for attribute in attributes:
        try:
            thing = getattr(thing, attribute)
        except AttributeError:
            try:
                thing = importlib.import_module(f"{thing.__name__}.{attribute}")
            except (ImportError, AttributeError):
                return False
    return True


def slug(heading: str) -> str:
    """GitHub's anchor of a heading, which is MyST's too."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    tokens = TOKENS.get(page) or PARSER.parse(page.read_text(encoding="utf-8"))
    headings = (tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open")
    return {slug("".join(c.content for c in h.children if c.type in ("text", "code_inline"))) for h in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "examples/ci/README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for token in TOKENS.get(page) or PARSER.parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            target = child.attrs.get("href") or child.attrs.get("src")
            if not target or re.match(r"https?://", target):
                continue
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if there == DOCS / "api" / "index.md":
                continue  # made by the build
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_subscripts_are_not_read_as_emphasis(page):
    """x'_a and y'_b on one line: the underscores of primes make italics of what is between. Write x'\\_a."""
    for token in TOKENS[page]:
        italics = [child for child in token.children or [] if child.type == "em_open" and child.markup == "_"]
        assert not italics, token.content


def test_every_page_is_in_the_contents_once():
    lines = "".join(blocks_of(DOCS / "index.md", "{toctree}")).splitlines()
    listed = Counter(line for line in lines if line and not line.startswith(":"))
    assert listed == Counter({*(p.stem for p in DOCS.glob("*.md") if p.stem != "index"), "api/index"})


def test_every_shipped_study_is_in_the_catalogue():
    from studies.definition.config import shipped_studies

    page = (DOCS / "catalogue.md").read_text(encoding="utf-8")
    named = {name.strip() for line in re.findall(r"^## ([^:\n]+)", page, re.MULTILINE) for name in line.split(",")}
    assert named == set(shipped_studies())


# --- the API reference

TEXTS = [page.read_text(encoding="utf-8") for page in PAGES]


def test_every_public_name_is_described_exactly_once():
    found = [entry for room in rooms(TEXTS) for entry in (*room.public, *room.by_module)]
    paths = Counter(path for entry in found for path in (entry.path, *entry.aliases))
    assert set(paths.values()) == {1}
    for module in packages():
        for name in getattr(module, "__all__", ()):
            assert f"{module.__name__}.{name}" in paths
    things = Counter(id(entry.thing) for entry in found if callable(entry.thing))
    assert set(things.values()) == {1}


def test_a_page_has_a_line_and_a_directive_for_each_name():
    for room in rooms(TEXTS):
        page = page_text(room)
        assert room.what.endswith(".")
        for entry in (*room.public, *room.by_module):
            assert len(re.findall(rf"^\.\. (?:auto\w+|py:data):: {re.escape(entry.path)}$", page, re.MULTILINE)) == 1
            assert len(entry.summary) > 5, entry.path
            assert resolves(entry.path)


def test_names_stand_under_the_path_that_users_are_told():
    paths = {e.path: e.aliases for room in rooms(TEXTS) for e in (*room.public, *room.by_module)}
    assert paths["optim.Woodbury"] == ("stability.Woodbury",)
    assert paths["stability.check_assumptions"] == ("stability.assumptions.check_assumptions",)
    assert "stability.testing.assert_bounded" in paths
    assert set(public_paths(packages())) <= {p for path, aliases in paths.items() for p in (path, *aliases)}


def test_every_optimizer_that_a_study_knows_by_a_name_of_ours_is_on_the_page():
    from studies.experiments.optimizers import PRESETS

    (row,) = re.findall(r"^\| `optimizer` .*$", (DOCS / "studies.md").read_text(encoding="utf-8"), re.MULTILINE)
    for name in ("woodbury", "rlo", *PRESETS):
        assert f"`{name}`" in row, name
