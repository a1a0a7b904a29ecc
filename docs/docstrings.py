"""Docstrings as reStructuredText: what their plain style leaves to the reader, made explicit for Sphinx.

The docstrings are written to be read in a terminal: formulas in Unicode, parameters as ``name: what it is`` with hanging
continuation lines, several on a line where they are short. Doctest blocks pass through as they are.
"""

import re
from collections.abc import Collection, Sequence

_LITERAL = re.compile(
    r"``.+?``|:[a-z:]+:`[^`]+`|(?<![\w*])\*\*[^*\s](?:[^*]*[^*\s])?\*\*(?!\w)|(?<![\w*])\*[A-Za-z][\w -]*\*(?![\w*])|`[^`]+`",
    re.DOTALL,
)


def readable(lines: Sequence[str], parameters: Collection[str] = ()) -> list[str]:
    """The lines of a docstring as reStructuredText; ``parameters`` are the names that the signature has.

    >>> readable(["Parameters", "----------", "lr: a step. mass: D,", "    a number.", "", ">>> 1 | 2", "3"], ["lr", "mass"])
    ['**Parameters**', '', '- ``lr``: a step. ``mass``: D,', '  a number.', '', '>>> 1 | 2', '3', '']
    """
    text: list[str] = []
    literal = False  # inside the indented block that a "::" opens
    for block in _blocks(lines):
        first = block[0]
        if first.lstrip().startswith(">>>"):
            text += block
        elif literal and first.startswith(" "):
            text += block
            text.append("")
            continue
        else:
            text += _paragraph(block, parameters)
        literal = block[-1].rstrip().endswith("::")
        text.append("")
    return text


def _blocks(lines: Sequence[str]) -> list[list[str]]:
    """Runs of lines without a blank one between them; a doctest begins a run of its own."""
    found: list[list[str]] = [[]]
    for line in lines:
        starts_test = line.lstrip().startswith(">>>") and found[-1] and not _is_test(found[-1])
        if (not line.strip() or starts_test) and found[-1]:
            found.append([])
        if line.strip():
            found[-1].append(line.rstrip())
    return [block for block in found if block]


def _is_test(block: list[str]) -> bool:
    return block[0].lstrip().startswith(">>>")


def _paragraph(block: list[str], parameters: Collection[str]) -> list[str]:
    if len(block) > 1 and re.fullmatch(r"-{3,}", block[1].strip()):  # a header, and what it is over
        return [f"**{block[0].strip()}**", "", *_items(block[2:], parameters)]
    indents = [_indent(line) for line in block]
    listed = re.match(r"\s*(- |\d+\. )", block[0])
    if not listed and min(indents) < max(indents):
        return _items(block, parameters)
    return _marked(block, parameters)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _items(block: list[str], parameters: Collection[str]) -> list[str]:
    """A bullet for every line at the margin, what hangs below it with it."""
    if not block:
        return []
    margin = min(_indent(line) for line in block)
    hung = ["- " + line.strip() if _indent(line) == margin else "  " + line.strip() for line in block]
    return _marked(hung, parameters)


def _marked(block: list[str], parameters: Collection[str]) -> list[str]:
    """Parameters' names as code where they are explained; characters escaped that reStructuredText would read as markup."""
    text = "\n".join(block)
    pieces, at = [], 0
    for literal in _LITERAL.finditer(text):
        pieces += [_plain(text[at : literal.start()], parameters), _whole(literal.group())]
        at = literal.end()
    return "".join([*pieces, _plain(text[at:], parameters)]).split("\n")


def _whole(literal: str) -> str:
    """A literal with what it needs around it: reStructuredText ends one only before a space or punctuation.

    >>> _whole("`out`")
    '``out``'
    """
    return f"`{literal}`" if re.fullmatch(r"`[^`]+`", literal) else literal


def _plain(text: str, parameters: Collection[str]) -> str:
    r"""Text that is no markup: |e|, R'_ and 2*3 as they stand.

    >>> _plain("|e_i| is x_ and 2*n", ()), _plain("lr: a step. see mass: no", {"lr", "mass"})
    ('\\|e_i\\| is x\\_ and 2\\*n', '``lr``: a step. see mass: no')
    """
    text = re.sub(r"([|*`])", r"\\\1", text)
    text = re.sub(r"(?<=[^\s\\])_(?!\w)", r"\\_", text)

    def named(match: re.Match) -> str:
        names = match[2].split(", ")
        if not all(name.lstrip("\\*") in parameters for name in names):
            return match[0]
        return match[1] + ", ".join(f"``{name.replace(chr(92), '')}``" for name in names) + ":"

    return re.sub(r"((?:^|[.;)\]] )(?:- |  )?)([\\*\w]+(?:, [\\*\w]+)*):(?= )", named, text, flags=re.MULTILINE)
