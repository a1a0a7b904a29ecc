"""Numbers as people write them."""

from collections.abc import Iterable

import numpy as np

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """A number for people: three significant digits or as many as asked for, no exponent where it can be helped.

    >>> [number(v) for v in (0.61234, 444.2, 56500, 1.2e6, 3e-14, float("inf"), 0, -0.5)]
    ['0.612', '444', '56\u202f500', '1.2·10⁶', '3·10⁻¹⁴', '∞', '0', '−0.5']
    """
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    rounded = float(f"{size:.{digits}g}")
    if 1e-3 <= rounded < 1e6:
        text = f"{rounded:,.0f}".replace(",", "\u202f") if rounded >= 1000 else f"{rounded:.{digits}g}"
    else:
        mantissa, power = f"{size:.1e}".split("e")
        text = f"{float(mantissa):g}·10" + str(int(power)).translate(SUPERSCRIPT)
    return ("−" if value < 0 else "") + text


AXES = {
    "n": "training samples n",
    "width": "width of the hidden layers",
    "lr": "learning rate",
    "batch": "batch size [samples]",
    "data.label_noise": "label noise",
    "rule.eta": "η",
    "rule.name": "rule",
}
"""What an axis of a grid is called before a reader; others by the last part of their name."""


def axis_words(name: str) -> str:
    """
    >>> axis_words("n"), axis_words("output_metric"), axis_words("data.label_noise")
    ('training samples n', 'output metric', 'label noise')
    """
    return AXES.get(name, short_words(name))


def axis_label(name: str) -> str:
    """What stands at an axis of a figure, with its unit where it has one to name.

    >>> axis_label("mass"), axis_label("batch")
    ('mass [no unit]', 'batch size [samples]')
    """
    return axis_words(name) + (" [no unit]" if name == "mass" else "")


def short_words(name: str) -> str:
    """
    >>> short_words("data.label_noise"), short_words("n")
    ('label noise', 'n')
    """
    return name.rpartition(".")[2].replace("_", " ")


def settings(name: str, values: Iterable[float]) -> str:
    """Several values of a numeric axis, in a sentence.

    >>> settings("n", [6, 12]), settings("mass", [0.1, 1.0])
    ('n = 6, 12', 'mass 0.1, 1')
    """
    first, *others = (f"{value:g}" for value in values)
    return ", ".join([setting(name, float(first)), *others])


def plural_of(name: str) -> str:
    """
    >>> plural_of("n"), plural_of("mass"), plural_of("width")
    ('n', 'masses', 'widths')
    """
    return name if name == "n" else short_words(name) + ("es" if name.endswith("s") else "s")


def setting(name: str, value: float | str) -> str:
    """One value of an axis, as a legend or a sentence says it.

    >>> setting("n", 6), setting("optimizer", "adam"), setting("data.label_noise", 0.5)
    ('n = 6', 'adam', 'label noise 0.5')
    """
    if isinstance(value, bool | np.bool_):
        words = {"normalize": "normalised"}.get(short_words(name), short_words(name))
        return words if value else f"not {words}"
    if isinstance(value, str):
        return value.replace("_", " ")
    return f"n = {value:g}" if name == "n" else f"{short_words(name)} {value:g}"
