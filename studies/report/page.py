"""The report of a study: one HTML page with everything in it. No scripts, no network, same results, same bytes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from studies.definition.kinds import Section, kind_of
from studies.definition.points import written
from studies.findings.applicable import scale_words
from studies.findings.exponents import compared
from studies.findings.written import short_words
from studies.report.tables import (
    assumption_table,
    exponent_table,
    flag_list,
    line_table,
    meanings,
    median_tables,
    plain_table,
)
from studies.results.frames import Frames, read_frames

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

LADDER, SECTIONS = "report.html.j2", "sections.html.j2"


def write_report(out: str | Path) -> Path:
    """Draw the figures of the results folder `out` into `out`/figures and write `out`/report.html. Never trains.

    Works on a study that is not finished: what is missing is left out or said.

    Raises:
        ValueError: no readable summary in `out`.
    """
    from studies.results.whole import write_whole

    out = Path(out)
    page = render(read_frames(out), out)
    write_whole(out / "report.html", lambda file: file.write_text(page, encoding="utf-8"))
    return out / "report.html"


def render(frames: Frames, out: Path) -> str:
    """The page as text. Draws the figures into `out`/figures on the way."""
    kind = kind_of(frames.config.get("kind", "twins"))
    provenance = frames.config.get("provenance", {})
    page = {
        "title": str(frames.config.get("title", "Twin networks")),
        "question": str(frames.config.get("question", "")),
        "command": shared(provenance.get("command", f"stability run digits --out {out.name}")),
        "commit": provenance.get("commit", ""),
        "date": when(provenance.get("date", "")),
        "scale": scale_words(frames.summary),
        "versions": versions(provenance),
        "config": config_lines(frames.config),
        "out": out.name,
    }
    drawn = [placed(section, out) for section in kind.sections(frames)]
    if kind.name == "twins":
        parts = [part(cut, out, values) for values, cut in frames.parts()]
        contents = ladder_contents(drawn, parts)
        return (
            environment()
            .get_template(LADDER)
            .render(page=page, contents=contents, across=drawn, parts=parts, lines=line_table(frames.summary))
        )
    numbers = [plain_table(caption, table) for caption, table in kind.numbers(frames)]
    figures = [(figure["id"], figure["title"], []) for figure in drawn]
    tables = [("numbers", "Numbers", [])] if numbers else []
    return (
        environment()
        .get_template(SECTIONS)
        .render(
            page=page,
            contents=[("finding", "What was found", []), *figures, *tables, ("again", "How to reproduce", [])],
            finding=kind.finding(frames),
            figures=drawn,
            numbers=numbers,
        )
    )


def environment(*packages: str) -> Environment:
    """Where pages get their templates: those of ``packages``, and the frame, pieces and style that all pages share."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "studies.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["subscripts"] = subscripts
    return found


Entry = tuple[str, str, Sequence]
"""A line of the table of contents: anchor, title, the lines below it."""


def ladder_contents(across: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> list[Entry]:
    """The contents of a page of bounds; a study of several parts has a list for each."""
    entries: list[Entry] = [("finding", "What was found", []), ("lines", "What the lines are", [])]
    entries += [(figure["id"], figure["title"], []) for figure in across]
    for part in parts:
        suffix, figures = part["suffix"], [(figure["id"], figure["title"], []) for figure in part["figures"]]
        own: list[Entry] = [(f"assumptions{suffix}", "Assumptions of the theorem", []), *figures]
        own.append((f"numbers{suffix}", "Medians", []))
        if part["exponents"]:
            own.append((f"exponents{suffix}", f"Exponents of {part['along']}", []))
        own.append((f"flags{suffix}", "Flags", []))
        entries += own if len(parts) == 1 else [(f"details{suffix}", capital(part["name"]), own)]
    return [*entries, ("again", "How to reproduce", [])]


def capital(text: str) -> str:
    """
    >>> capital("output metric Fisher")
    'Output metric Fisher'
    """
    return text[:1].upper() + text[1:]


def shared(command: str) -> str:
    """A command as somebody else would type it: folders of this machine by their last part.

    >>> shared("stability run digits n=6 --out /home/me/results/mine"), shared("stability run digits --out results/mine")
    ('stability run digits n=6 --out mine', 'stability run digits --out results/mine')
    >>> shared("stability run digits data.name=/home/me/x.npz --out=/home/me/r")
    'stability run digits data.name=x.npz --out=r'
    """
    words = shlex.split(command)
    cut = [re.sub(r"^([\w.-]+=|)/.*?([^/]+)/?$", r"\1\2", word) for word in words]
    return command if cut == words else shlex.join(cut)


def when(date: str) -> str:
    """
    >>> when("2026-01-02T03:04:05+00:00"), when("yesterday")
    ('2026-01-02, 03:04 UTC', 'yesterday')
    """
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:[\d.]+)?(\+00:00|Z)", date)
    return f"{found[1]}, {found[2]} UTC" if found else date


def placed(section: Section, out: Path, suffix: str = "") -> dict[str, Any]:
    """A section's figure drawn into the folder and as an element of the page."""
    from studies.figures.style import save_figure

    name = section.name + suffix
    files = save_figure(section.make(), out / "figures" / name)
    svg = inline_svg(files[0], anchor(name), f"{section.title}. {first_sentence(section.caption)}")
    return {"id": anchor(name), "title": section.title, "caption": section.caption, "svg": svg}


def part(frames: Frames, out: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What the page says of one width and one value of every further axis; ``values``: those that the study varies."""
    from studies.figures.overview import drawings
    from studies.report.paragraph import details, headline

    suffix = "".join(f"-{name.rpartition('.')[2]}{slug(written(value))}" for name, value in values.items())
    return {
        "suffix": anchor(suffix),
        "name": ", ".join(f"{short_words(name)} {written(value)}" for name, value in values.items()),
        "headline": headline(frames),
        "details": details(frames),
        "assumptions": assumption_table(frames.assumptions),
        "meanings": meanings(frames.assumptions),
        "figures": [placed(drawing, out, suffix) for drawing in drawings(frames)],
        "medians": median_tables(frames.summary),
        "exponents": exponent_table(frames.summary),
        "along": short_words(compared(frames.summary)),
        "flags": flag_list(frames.summary),
        "pairs": len(frames.summary),
    }


def first_sentence(text: str) -> str:
    """What a screen reader says of a figure beside its title; the caption has the rest.

    >>> first_sentence("A mark per twin, n = 0.5. Look at it.")
    'A mark per twin, n = 0.5.'
    """
    return re.split(r"(?<=[.!?])\s+(?=[A-Z0-9‖|])", text, maxsplit=1)[0]


def anchor(text: str) -> str:
    """A name as an id that a style rule can hold too.

    >>> anchor("bounds-label_noise0.5")
    'bounds-label_noise0_5'
    """
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def slug(text: str) -> str:
    """
    >>> slug("package.module:factory")
    'package.module_factory'
    """
    return re.sub(r"[^A-Za-z0-9.+-]", "_", text)


def inline_svg(path: Path, prefix: str, title: str) -> Markup:
    """An SVG file as an element of a page: no XML prologue, no metadata, ids and styles of its own, a title for
    screen readers."""
    from markupsafe import Markup, escape

    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r'\sd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text
    )  # a hundredth of a point is enough
    text = prefixed(text, prefix)
    head = text[: text.index(">")]
    sized = re.sub(r'\s(width|height)="[^"]*"', "", head)
    wide = float(re.search(r'width="([0-9.]+)pt"', head)[1]) if re.search(r'width="([0-9.]+)pt"', head) else 502.0
    name = escape(title)
    opening = f'{sized} id="{prefix}-svg" role="img" aria-label="{name}" style="--points: {wide:g}"'
    return Markup(opening + text[text.index(">") :])


def prefixed(svg: str, prefix: str) -> str:
    """Ids, references to them and style rules of an SVG made its own, so that several may stand in one page.

    >>> prefixed('<style>*{a: b}</style><g id="p1"/><use xlink:href="#p1" clip-path="url(#p2)"/>', "f")
    '<style>#f-svg *{a: b}</style><g id="f-p1"/><use xlink:href="#f-p1" clip-path="url(#f-p2)"/>'
    """
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    return re.sub(r"(<style[^>]*>\s*)\*\{", rf"\1#{prefix}-svg *{{", svg)


def subscripts(text: str) -> Markup:
    """λ_max, H'_S and the like as a page writes them; nothing else is touched.

    >>> str(subscripts("lr·λ_max(H) < 2 and train_loss"))
    'lr·λ<sub>max</sub>(H) &lt; 2 and train_loss'
    """
    from markupsafe import Markup, escape

    written = re.sub(r"_(max|min|[a-zα]|S)(?![\w])", r"<sub>\1</sub>", str(escape(text)))
    return Markup(re.sub(r"\^(−?½|b)", r"<sup>\1</sup>", written))


def versions(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything of the provenance that is a version. The name of the machine stays in config.toml: a report is
    shared."""
    known = {"command", "date", "host", "commit", "versions"}
    nested = provenance.get("versions", {})
    flat = {key: value for key, value in provenance.items() if key not in known}
    return [(str(key), str(value)) for key, value in (flat | (nested if isinstance(nested, dict) else {})).items()]


def config_lines(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Dotted keys and values of the configuration as run, without provenance, title and question.

    >>> config_lines({"lr": 0.1, "grid": {"n": [6, 12]}, "title": "x"})
    [('lr', '0.1'), ('grid.n', '6, 12')]
    """

    def walk(table: dict[str, Any], path: str) -> Iterable[tuple[str, str]]:
        for key, value in table.items():
            if isinstance(value, dict):
                yield from walk(value, f"{path}{key}.")
            else:
                yield (
                    f"{path}{key}",
                    ", ".join(map(str, value)) if isinstance(value, list | tuple | np.ndarray) else str(value),
                )

    return list(
        walk({key: value for key, value in config.items() if key not in {"provenance", "title", "question"}}, "")
    )
