"""Routes to stability side by side: every bound and what was measured against n, with the fitted exponents in the legends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.lines import hue
from studies.figures.style import PAGE, UNIT, log_limits, log_y, n_axis, new_figure, panel, styled
from studies.findings.exponents import Exponent, signed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {
    "measured": ("measured", "black", "-", "o"),
    "measured_heldout": ("measured, held-out", "grey", "-", "o"),
    "gap": ("generalization gap", "grey", "-", "."),
    "convex": ("convex (HRS)", "green", "-", "^"),
    "kozachkov": ("contraction in θ", "blue", "-", "D"),
    "corollary": ("corollary, measured ε", "purple", "--", "v"),
    "corollary_bound": ("corollary, ε of contraction", "purple", "-.", "P"),
    "T0": ("T0", "vermilion", "-", "s"),
    "T1": ("T1", "blue", "-", "^"),
    "T2": ("T2", "sky", "-", "D"),
    "T3": ("T3", "sky", "--", "p"),
    "T5": ("T5", "green", "--", "X"),
}
"""Column: label, hue, dash, marker. Other columns (beyond any axis, or equal to another line) have no line."""
NEEDED = ("convex", "kozachkov")
"""Routes that the legend names where they do not apply."""
GUIDES = {-1.0: (":", "1/n"), -0.5: ((0, (1, 3)), "1/√n")}


def exponent_text(fit: Exponent) -> str:
    """
    >>> exponent_text(Exponent(-1.0, -1.25, -0.75, (1, 2, 3), 3))
    '−1.00 [−1.25, −0.75]'
    """
    return f"{signed(fit.slope)} [{signed(fit.low)}, {signed(fit.high)}]" if fit.fitted else "not fitted"


@panel
def draw_routes(ax: Axes, frame: pd.DataFrame, fits: Mapping[str, Exponent]) -> Axes:
    """Medians over the twins of one problem against n, log-log; dotted: 1/n and 1/√n through the first measured value."""
    columns = [column for column in LOOKS if column in fits]
    medians = frame.groupby("n")[columns].median()
    values = []
    for column in columns:
        label, color, dash, marker = LOOKS[column]
        y = medians[column].where(np.isfinite(medians[column]) & (medians[column] > 0))
        values += y.tolist()
        look = {"color": hue(color), "linestyle": dash, "marker": marker, "markeredgecolor": "white"}
        ax.plot(y.index, y, label=f"{label}\n{exponent_text(fits[column])}", **look)
    n = np.array(medians.index, float)
    for power, (dash, _) in GUIDES.items():
        ax.plot(
            n, medians["measured"].iloc[0] * (n / n[0]) ** power, color="0.45", linewidth=0.8, linestyle=dash, zorder=1
        )
    n_axis(ax, medians.index)
    log_y(ax, *log_limits(values))
    ax.set_ylabel(f"sup |y' − y| on S [{UNIT}]" if "T0" in fits else "sup over samples of |ℓ' − ℓ| [loss]")
    missing = [LOOKS[column][0] for column in NEEDED if column not in fits]
    note = "not applicable:\n" + ",\n".join(missing) if missing else None
    look = {"fontsize": 5.8, "title_fontsize": 5.8, "handlelength": 1.8, "labelspacing": 0.45, "alignment": "left"}
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title=note, **look)
    return ax


@styled
def routes_figure(results: Mapping[str, tuple[pd.DataFrame, Mapping[str, Exponent]]]) -> Figure:
    """A panel per problem {title: (rows with the columns n and measured, exponents by column)}, two in a row."""
    from matplotlib.lines import Line2D

    rows = -(-len(results) // 2)
    figure = new_figure(PAGE, 2.3 * rows + 0.25)
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for ax, (title, (frame, fits)) in zip(axes, results.items(), strict=False):
        draw_routes(ax, frame, fits)
        ax.set_title(title, fontsize=7.5)
    for ax in axes[len(results) :]:
        ax.remove()
    handles = [Line2D([], [], color="0.45", linewidth=0.8, linestyle=dash) for dash, _ in GUIDES.values()]
    texts = [f"slope of {name}" for _, name in GUIDES.values()]
    figure.legend(handles, texts, loc="outside lower center", ncols=2, handlelength=3.2)
    return figure
