"""Ticks of logarithmic axes that a reader can use: never fewer than three numbers, never a crowd."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import Locator, MaxNLocator

STEPS = ((1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
"""Mantissas, from sparse to dense."""
LEAST, MOST = 3, 7


def log_ticks(low: float, high: float) -> list[float]:
    """Where numbers stand on a log axis from ``low`` to ``high``.

    Decades where there are three of them, every second or third one where there are more than seven; otherwise the
    sparsest mantissas that give three ticks, of which at most seven are kept.

    >>> log_ticks(0.05, 30), log_ticks(0.7, 6), log_ticks(0.38, 0.57)
    ([0.1, 1.0, 10.0], [1.0, 2.0, 5.0], [0.4, 0.45, 0.5, 0.55])
    >>> log_ticks(1e-13, 2)
    [1e-12, 1e-10, 1e-08, 1e-06, 0.0001, 0.01, 1.0]
    """
    first, last = int(np.ceil(np.log10(low) - 1e-9)), int(np.floor(np.log10(high) + 1e-9))
    if last - first + 1 >= LEAST:
        step = -(-(last - first + 1) // MOST)
        return [float(f"1e{power}") for power in range(first, last + 1) if (last - power) % step == 0]
    inside: list[float] = []
    for mantissas in STEPS:
        grid = [float(f"{m}e{power}") for power in range(first - 1, last + 1) for m in mantissas]
        inside = [tick for tick in grid if low <= tick <= high]
        if len(inside) >= LEAST:
            break
    else:  # within a factor of two or so: as on a linear axis
        inside = [
            float(f"{tick:.8g}")
            for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
            if low <= tick <= high
        ]
    return inside if len(inside) <= MOST else inside[:: -(-len(inside) // MOST)]


class LogTicks(Locator):
    """`log_ticks` of whatever the axis shows; follows an axis whose limits change."""

    def __call__(self) -> Sequence[float]:
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        low, high = sorted((vmin, vmax))
        return log_ticks(low, high) if 0 < low < high else []
