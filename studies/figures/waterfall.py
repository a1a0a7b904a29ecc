"""What each inequality costs, as waterfalls: a floating bar per step of the chain, a panel per mass, a bar per n."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.figures.bounds import shown_masses
from studies.figures.style import decade, new_figure, note_title, panel, series_style, styled, width_for
from studies.findings.applicable import loss_note
from studies.findings.waterfall import waterfall
from studies.findings.written import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"T5_l2": "T5", "T5": "T5", "path_l2": "path", "path_sup": "path"}
SHOWN = 3
"""So many n a panel, from the smallest to the largest."""


def shown_n(frame: pd.DataFrame) -> list[int]:
    """The n of a figure: at most three, the ends among them.

    >>> import pandas as pd
    >>> shown_n(pd.DataFrame({"n": [6, 12, 24, 48]}))
    [6, 24, 48]
    """
    ns = sorted(int(n) for n in frame["n"].unique())
    picks = np.linspace(0, len(ns) - 1, min(SHOWN, len(ns))).round().astype(int)
    return [ns[i] for i in picks]


@panel
def draw_waterfall(ax: Axes, steps: pd.DataFrame, *, largest: float | None = None) -> Axes:
    """The steps of one mass (rows of :func:`studies.findings.waterfall.waterfall`) as floating horizontal bars.

    From the measurement (top, 1) downwards; a bar runs from the value/measured before a step to the one after it, and the
    number beside it is the factor at the largest n. Hatched bars run backwards: there the chain compares two kinds of
    statement, and the second is smaller.
    """
    ns = shown_n(steps)
    chain = steps.drop_duplicates("step").sort_values("step")
    height = 0.8 / len(ns)
    for position, n in enumerate(ns):
        rows = steps[steps["n"] == n].sort_values("step")
        style = series_style(position, len(ns))
        offset = (position - (len(ns) - 1) / 2) * height
        for row in rows.itertuples():
            if not np.isfinite(row.after):
                continue
            low, high = sorted((row.before, row.after))
            ax.barh(
                row.step + offset, high - low, height * 0.92, left=low, color=style["color"], linewidth=0.5,
                edgecolor="white" if row.after >= row.before else "0.15",
                hatch=None if row.after >= row.before else "//////",
            )  # fmt: skip
    last = steps[steps["n"] == ns[-1]].sort_values("step")
    reach = np.nanmax(np.append(steps["after"].to_numpy(float), 0.0)) if largest is None else largest
    for row in last.itertuples():
        if not np.isfinite(row.after):
            ax.text(0.02 * reach, row.step, "no finite bound (ξ = 0)", va="center", fontsize=6.5, style="italic")
            continue
        edge = float(np.nanmax(steps.loc[steps["step"] == row.step, ["before", "after"]].to_numpy()))
        ax.text(edge + 0.015 * reach, row.step, f"×{number(row.factor)}", va="center", fontsize=6.5)
    ax.set_yticks(chain["step"], [label(row.end) for row in chain.itertuples()])
    ax.set_ylim(len(chain) - 0.45, -0.55)
    ax.set_xlabel("value / measured [no unit]")
    ax.set_ylabel("step of the chain")
    ax.axvline(0, color="black", linewidth=1.2, zorder=3)
    ax.grid(axis="y", visible=False)
    ax.set_xlim(
        min(-0.06 * reach, 1.15 * float(np.nanmin(np.append(steps["after"].to_numpy(float), 0.0)))), 1.16 * reach
    )
    if reach >= 1.5:
        ticks = [10.0**t for t in range(int(np.floor(reach)) + 1)]
    else:
        marks = (1, 1.2, 1.5, 2) if reach < 0.32 else (1, 2, 5) if reach < 0.8 else (1, 3, 10, 30)
        ticks = [t for t in marks if np.log10(t) <= 1.16 * reach]
    ax.set_xticks(np.log10(ticks), [decade(t) if reach >= 1.5 else f"{t:g}" for t in ticks])
    return ax


def label(end: str) -> str:
    """What a bound is called on the axis.

    >>> label("T5_l2"), label("T1c")
    ('T5', 'T1c')
    """
    return NAMES.get(end, end)


@styled
def waterfall_figure(summary: pd.DataFrame) -> Figure:
    """Two rows of panels, a column per mass: the chain of ‖e‖ up to T0, and the chain of the worst sample up to T5."""
    from matplotlib.patches import Patch

    masses = shown_masses(summary)
    frames = {quantity: waterfall(summary, quantity) for quantity in ("l2", "sup")}
    ns = shown_n(summary)
    panels = max(len(masses), 1)
    heights = [max(int(frame["step"].max()) + 1, 1) if len(frame) else 1 for frame in frames.values()]
    figure = new_figure(width_for(panels), 1.5 + 0.36 * sum(heights))
    axes = figure.subplots(2, panels, squeeze=False, sharey="row", height_ratios=heights)
    titles = {"l2": "all training outputs, ‖e‖", "sup": "worst sample,\nmaxᵢ |eᵢ|"}
    for row, (quantity, frame) in enumerate(frames.items()):
        reach = max(float(np.nanmax(np.append(frame["after"].to_numpy(float), 0.1))), 0.1)
        for column, mass in enumerate(masses):
            draw_waterfall(axes[row, column], frame[frame["mass"] == mass], largest=reach)
            axes[row, column].set_ylabel("")
        axes[row, 0].set_ylabel(titles[quantity])
    for column, mass in enumerate(masses):
        axes[0, column].set_title(f"mass {mass:g}", fontweight="bold")
    handles = [Patch(color=series_style(i, len(ns))["color"], label=f"n = {n}") for i, n in enumerate(ns)]
    handles.append(Patch(facecolor="0.8", edgecolor="0.15", hatch="//////", label="smaller than the one before"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if panels > 1 else 2)
    if note := loss_note(summary):
        note_title(figure, note)
    return figure
