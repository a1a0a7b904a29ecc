"""Optimizers in one metric: how much action each spends beyond the descent it buys, and in which direction it steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.lines import hue
from studies.figures.style import PAGE, log_limits, log_y, new_figure, only_ticks, panel, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = (("blue", "-", "o"), ("vermilion", "--", "s"), ("green", "-.", "^"), ("purple", "-", "D"), ("sky", "--", "v"))
"""Hue, dash and marker of the optimizers, in the order in which they come."""
MARKS = 7
"""Markers along a line."""


def excess_action(steps: pd.DataFrame) -> pd.DataFrame:
    """Of one run (``ActionRecord.to_frame()``), after every step: loss, its fall since the start, and what was spent on it.

    ``excess`` is Σ‖Δθ‖_G‖∇h‖_{G⁻¹}/(h(0) − h) − 1, the scale-free gap over the descent; it is NaN where h did not fall.
    ``across`` is the part Σdirection of it, steps that are not along −G⁻¹∇h; the rest is the curvature of h.

    >>> import pandas as pd
    >>> run = pd.DataFrame({"h": [3.0, 2.0], "h_next": [2.0, 1.0], "length": [1.5, 2.5], "direction": [0.25, 0.75]})
    >>> excess_action(run)[["loss", "excess", "across"]].to_numpy().tolist()
    [[2.0, 0.5, 0.25], [1.0, 1.0, 0.5]]
    """
    import pandas as pd

    fall = steps["h"].iloc[0] - steps["h_next"]
    fall = fall.where(fall > 0)
    spent, across = steps["length"].cumsum() / fall - 1, steps["direction"].cumsum() / fall
    return pd.DataFrame({"loss": steps["h_next"], "fall": fall, "excess": spent, "across": across})


def optimizers_of(frame: pd.DataFrame) -> list[str]:
    """The optimizers of a frame, in the order in which they come."""
    return list(dict.fromkeys(frame["optimizer"]))


def optimizer_style(frame: pd.DataFrame, name: str) -> dict:
    """Colour, dash and marker of an optimizer."""
    color, dash, marker = STYLES[optimizers_of(frame).index(name) % len(STYLES)]
    return {"color": hue(color), "linestyle": dash, "marker": marker, "markeredgecolor": "white"}


@panel
def draw_excess(ax: Axes, frame: pd.DataFrame) -> Axes:
    """Excess action against the training loss that was reached (falling to the right), a line per optimizer."""
    for name in optimizers_of(frame):
        run = excess_action(frame[frame["optimizer"] == name]).query("excess > 0")
        if len(run):  # a gap at or below 0 has no place on a log axis
            ax.plot(
                run["loss"], run["excess"], label=name, markevery=marks(run["loss"]), **optimizer_style(frame, name)
            )
    lowest = frame["h_next"][frame["h_next"] > 0].min()
    loss_axis(ax, lowest, frame["h"].max())
    drawn = [line.get_ydata() for line in ax.get_lines()]
    log_y(ax, *log_limits(np.concatenate(drawn) if drawn else []))
    ax.set_ylabel("excess action [no unit]\n(scale-free gap / fall of h)")
    return ax


@panel
def draw_alignment(ax: Axes, frame: pd.DataFrame) -> Axes:
    """The cosine in G between every step and −G⁻¹∇h, against the training loss that the step starts from."""
    for name in optimizers_of(frame):
        run = frame[frame["optimizer"] == name]
        ax.plot(run["h"], run["alignment"], label=name, markevery=marks(run["h"]), **optimizer_style(frame, name))
    loss_axis(ax, frame["h_next"][frame["h_next"] > 0].min(), frame["h"].max())
    low = min(0.0, float(np.nanmin(frame["alignment"].to_numpy(), initial=0.0)))
    ax.set_ylim(low - 0.05, 1.05)
    ax.set_ylabel("cosine in G between the\nstep and −G⁻¹∇h [no unit]")
    return ax


@styled
def loss_axis(ax: Axes, low: float, high: float) -> None:
    """Logarithmic loss, large on the left: training goes to the right."""
    ax.set_xscale("log")
    decades = np.log10(high / low)
    grid = [m * 10.0**e for e in range(-12, 6) for m in ((1, 2, 5) if decades < 2 else (1,))]
    only_ticks(ax.xaxis, [value for value in grid if low <= value <= high])
    ax.set_xlim(high * 1.15, low / 1.15)
    ax.set_xlabel("training loss h (training goes to the right)")


def marks(losses: Sequence[float]) -> list[int]:
    """Places of the markers: even along a logarithmic loss axis, however fast the run goes there.

    >>> marks([8.0, 4.0, 2.0, 1.0])
    [0, 1, 2, 3]
    """
    travelled = np.cumsum(np.abs(np.diff(np.log(losses), prepend=np.log(losses)[:1])))
    return sorted({int(np.searchsorted(travelled, place)) for place in np.linspace(0, travelled[-1], MARKS)})


@styled
def action_figure(frame: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Figure:
    """Two panels from the steps of several runs: excess action, and direction, against the training loss.

    ``frame``: ``ActionRecord.to_frame()`` of every run below each other, with a column ``optimizer``; the runs start at the
    same parameters and are recorded in the same metric. ``axes``: two panels of a figure of one's own.
    """
    if missing := {"optimizer", "h", "h_next", "length", "direction", "alignment"} - set(frame.columns):
        raise ValueError(
            f"frame needs the columns of ActionRecord.to_frame() and 'optimizer'; missing: {sorted(missing)}"
        )
    own = axes is None
    if own:
        axes = new_figure(PAGE, 2.9).subplots(1, 2)
    left, right = axes
    draw_excess(left, frame)
    draw_alignment(right, frame)
    handles, names = right.get_lines(), optimizers_of(frame)  # a run whose loss only rose has no line on the left
    if own:
        left.figure.legend(handles, names, loc="outside lower center", ncols=len(names), handlelength=3.2)
    else:
        left.legend(handles, names, handlelength=3.2)
    return left.figure
