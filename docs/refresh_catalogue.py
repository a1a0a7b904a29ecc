"""Put what came out of finished studies into the pages: ``python docs/refresh_catalogue.py results/*``.

A page of docs/ says where: a block ``<!-- out: NAME -->`` … ``<!-- /out -->`` takes the command and the finding of the study
NAME in words and numbers, ``<!-- numbers: NAME COLUMN | COLUMN … -->`` … ``<!-- /numbers -->`` these columns of its first
table, and an image ``figures/NAME-FIGURE.png`` is the figure of that name in the study's folder.
"""

import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

PAGES = Path(__file__).resolve().parent
LEFT_OUT = ("workers=", "engine=", "--out=")  # they change no number


def with_result(page: str, name: str, text: str) -> str:
    """The page with ``text`` in the block of the study ``name``; as it was where it has none.

    >>> with_result("<!-- out: rate -->\\nold\\n<!-- /out -->", "rate", "new")
    '<!-- out: rate -->\\nnew\\n<!-- /out -->'
    """
    block = re.compile(rf"(<!-- out: {re.escape(name)} -->\n).*?(<!-- /out -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def with_numbers(page: str, name: str, table) -> str:
    """The page with the columns it asks for of ``table`` in the blocks of the study ``name``.

    >>> import pandas as pd
    >>> print(with_numbers("<!-- numbers: rate n | q -->\\n<!-- /numbers -->", "rate", pd.DataFrame({"n": [6], "q": [0.5]})))
    <!-- numbers: rate n | q -->
    | n | q |
    |--:|--:|
    | 6 | 0.5 |
    <!-- /numbers -->
    """
    block = re.compile(rf"(<!-- numbers: {re.escape(name)} ([^>]*?) -->\n).*?(<!-- /numbers -->)", re.DOTALL)
    return block.sub(
        lambda match: f"{match[1]}{markdown(table, [name.strip() for name in match[2].split('|')])}\n{match[3]}", page
    )


def markdown(table, columns: Sequence[str]) -> str:
    """A table of Markdown; a column with an interval "q ±" beside it as q ± interval.

    >>> import pandas as pd
    >>> table = pd.DataFrame({"rule.name": ["sgd"], "loss_tail": [0.12345], "loss_tail ±": [0.01]})
    >>> print(markdown(table, ["rule.name", "loss_tail"]))
    | name | loss |
    |---|--:|
    | sgd | 0.123 ± 0.01 |
    """
    from studies.findings.written import number, short_words
    from studies.report.tables import MORE_HEADINGS

    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"the table has no columns {', '.join(missing)}; it has {', '.join(table.columns)}")

    def cell(row, name: str) -> str:
        value = row[name]
        if isinstance(value, str | bool):
            return str(value)
        if f"{name} ±" not in table.columns:
            return number(value) if isinstance(value, float) else str(value)
        return f"{number(value)} ± {number(row[f'{name} ±'], 2)}" if value == value else "–"

    words = [name for name in columns if not all(isinstance(value, str | bool) for value in table[name])]
    lines = [
        "| " + " | ".join(MORE_HEADINGS.get(name, (short_words(name),))[0] for name in columns) + " |",
        "|" + "|".join("--:" if name in words else "---" for name in columns) + "|",
    ]
    lines += ["| " + " | ".join(cell(row, name) for name in columns) + " |" for _, row in table.iterrows()]
    return "\n".join(lines)


def command_of(frames) -> str:
    """The command as somebody else types it: without the folder, and what changes no number."""
    from studies.report.page import shared

    words = shlex.split(shared(frames.config["provenance"]["command"]))
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return shlex.join(word for word in words if not word.startswith(LEFT_OUT))


def result_text(frames) -> str:
    """The command, and what the study's report opens with."""
    from studies.definition.kinds import kind_of
    from studies.report.paragraph import headline

    kind = kind_of(frames.config.get("kind", "twins"))
    if kind.name == "twins":
        said = [
            (", ".join(f"{name} {value}" for name, value in values.items()) + ": " if values else "") + headline(cut)
            for values, cut in frames.parts()
        ]
    else:
        said = list(kind.finding(frames))
    paragraphs = [f"`{command_of(frames)}`:", *(paragraph.replace("\u00a0", " ") for paragraph in said)]
    return "\n\n".join(textwrap.fill(paragraph, 140, break_on_hyphens=False) for paragraph in paragraphs)


def main(folders: list[Path]) -> None:
    from studies import load_results
    from studies.definition.kinds import kind_of

    pages = {path: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
    for folder in folders:
        name, frames = folder.name.removesuffix("-quick"), load_results(folder)
        if not any(f"<!-- out: {name} -->" in page for page in pages.values()):
            raise ValueError(f"no page of {PAGES} has a block '<!-- out: {name} -->' … '<!-- /out -->'")
        for figure in {
            found for page in pages.values() for found in re.findall(rf"figures/{name}-([\w-]+)\.png", page)
        }:
            shutil.copyfile(folder / "figures" / f"{figure}.png", PAGES / "figures" / f"{name}-{figure}.png")
        text, numbers = result_text(frames), kind_of(frames.config.get("kind", "twins")).numbers(frames)
        for path, page in pages.items():
            page = with_result(page, name, text)
            pages[path] = with_numbers(page, name, numbers[0][1]) if numbers else page
    for path, page in pages.items():
        if page != path.read_text(encoding="utf-8"):
            path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
