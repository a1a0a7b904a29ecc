"""Numbers as people write them."""

import numpy as np

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """A number for people: three significant digits, no exponent where it can be helped.

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
    rounded = float(f"{size:.3g}")
    if 1e-3 <= rounded < 1e6:
        text = f"{rounded:,.0f}".replace(",", "\u202f") if rounded >= 1000 else f"{rounded:g}"
    else:
        mantissa, power = f"{size:.1e}".split("e")
        text = f"{float(mantissa):g}·10" + str(int(power)).translate(SUPERSCRIPT)
    return ("−" if value < 0 else "") + text
