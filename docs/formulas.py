"""Unicode formulas with their indices set as indices: y_i, λ_max, e_{t+1} and e^{−ξt} are written so that a terminal shows
them; a page can do better.
"""

import re

_WORDS = "argmin|argmax|sup|inf|max|min|lim|log|exp|pull|lr|limit|du"
_LETTER = "A-Za-zÀ-ÖØ-öø-ÿĀ-žΑ-ωϑϕ\u1e00-\u1eff\u2113∇∂𝒦Σ∑Π∏∫"
_MARKS = "'\u0300-\u036f⁰¹²³⁴-⁹⁺⁻½ᵀ₀-₉"
# What an index can hang on: a word of the list, a letter alone, capitals multiplied, cL in a product, or a closing bracket.
_BASE = re.compile(
    rf"(?:(?<![A-Za-z])(?:{_WORDS})|(?<![A-Za-z_])(?<![A-Za-z]\d)[{_LETTER}]|(?<![A-Za-z_\d])[A-Z]{{2,3}}"
    rf"|(?<=[a-z])[A-ZΑ-Ωα-ω]|[)\]‖])[{_MARKS}]*$"
)
_MARK = re.compile(
    r"\^\(((?:[^()]|\([^()]*\))*)\)|[_^](?:\{([^{}]*(?:\{[^{}]*\})?[^{}]*)\}"
    r"|([a-z]+|[−-]?[0-9]+(?:\.[0-9]+)?½?|[−-]½|(?<=‖_)[A-Z]⁻¹|.))"
)


def pieces(text: str) -> list[tuple[str, str]]:
    """("", "sub" or "sup", text) of a line: what stands on it, below and above.

    >>> pieces("λ_max(J_αG_α⁻¹), not measured_sup")
    [('', 'λ'), ('sub', 'max'), ('', '(J'), ('sub', 'α'), ('', 'G'), ('sub', 'α'), ('', '⁻¹), not measured_sup')]
    >>> pieces("A_te_{t−1}")
    [('', 'A'), ('sub', 't'), ('', 'e'), ('sub', 't−1')]
    >>> pieces("a_b_c and 2^k")
    [('', 'a'), ('sub', 'b'), ('sub', 'c'), ('', ' and 2'), ('sup', 'k')]
    """
    found: list[tuple[str, str]] = []
    line, at = "", 0
    while at < len(text):
        mark = _MARK.match(text, at)
        index, end = _index(mark, text) if mark else ("", at)
        below = text[at] == "_"
        if index and (_BASE.search(line) or (not line and found) or (not below and line[-1:].isalnum())):
            if line:
                found.append(("", line))
            found.append(("sub" if below else "sup", index))
            line, at = "", end
        else:
            line, at = line + text[at], at + 1
    return [*found, ("", line)] if line else found


def _index(mark: re.Match, text: str) -> tuple[str, int]:
    """What the mark is over, and where it ends: braces, a number, a word of small letters, or one sign.

    In A_te_t the first index is t: the e has one of its own.
    """
    braced = mark[1] if mark[1] is not None else mark[2]
    if braced is not None:
        return braced, mark.end()
    index, end = mark[3], mark.end()
    if text[end : end + 1] in ("_", "^") and len(index) > 1 and index.isalpha():
        index, end = index[:-1], end - 1
    return ("" if index.isspace() or index in '_^*|`\\,.;:()[]"' else index), end
