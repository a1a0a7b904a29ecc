"""Put what came out of finished studies into docs/catalogue.md: ``python docs/refresh_catalogue.py results/*``.

Every folder whose study has a section there fills it: the command, the grid as run, and the finding in words and numbers.
"""

import re
import shlex
import sys
import textwrap
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "catalogue.md"


def with_result(page: str, name: str, text: str) -> str:
    """The page with ``text`` in the block of the study ``name``.

    >>> with_result("<!-- out: rate -->\\nold\\n<!-- /out -->", "rate", "new")
    '<!-- out: rate -->\\nnew\\n<!-- /out -->'
    """
    block = re.compile(rf"(<!-- out: {re.escape(name)} -->\n).*?(<!-- /out -->)", re.DOTALL)
    if not block.search(page):
        raise ValueError(f"the page has no block '<!-- out: {name} -->' … '<!-- /out -->'")
    return block.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def result_text(folder: Path) -> str:
    """The command, and what the study's report opens with."""
    from studies import load_results
    from studies.definition.kinds import kind_of
    from studies.report.paragraph import headline

    frames = load_results(folder)
    words = shlex.split(frames.config["provenance"]["command"])
    if "--out" in words:  # where the folder lay is of no interest
        at = words.index("--out")
        del words[at : at + 2]
    kind = kind_of(frames.config.get("kind", "twins"))
    if kind.name == "twins":
        said = [
            (", ".join(f"{name} {value}" for name, value in values.items()) + ": " if values else "") + headline(cut)
            for values, cut in frames.parts()
        ]
    else:
        said = list(kind.finding(frames))
    paragraphs = [f"`{' '.join(words)}`:", *(paragraph.replace("\u00a0", " ") for paragraph in said)]
    return "\n\n".join(textwrap.fill(paragraph, 140, break_on_hyphens=False) for paragraph in paragraphs)


def main(folders: list[Path]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for folder in folders:
        name = folder.name.removesuffix("-quick")
        page = with_result(page, name, result_text(folder))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
