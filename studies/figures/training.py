"""What happens along training: the divergence with its enclosures, and the spectrum of H."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.bounds import shown_masses
from studies.figures.lines import LINES, MEASURED, drawn_lines, hue, known_lines, label_lines, legend_of_kinds
from studies.figures.style import UNIT, log_limits, log_y, new_figure, note_title, panel, styled, width_for
from studies.findings.applicable import loss_note, stated

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STACKED_PATHS = ("T3", "T3H", "T4", "path_l2", "measured_l2")
SAMPLE_PATHS = ("T5", "path_sup", "measured_sup")
BAND = {0.0: 1.0, 0.05: 0.95, 0.25: 0.75}
"""Lower quantile of H's eigenvalues: the upper one that closes the band."""


@panel
def draw_divergence(ax: Axes, rows: pd.DataFrame, columns: Sequence[str] = STACKED_PATHS) -> Axes:
    """Medians over the pairs of one (n, mass) against the step, with the quartiles as a band. Step 0 is 0 by the
    shared start."""
    known_lines(columns)
    rows = rows[rows["step"] > 0]
    for column in stated(rows, columns):
        quartiles = rows.groupby("step")[column].quantile([0.25, 0.5, 0.75]).unstack()  # [steps, 3]
        shown = quartiles[np.isfinite(quartiles).all(axis=1) & (quartiles[0.5] > 0)]
        if shown.empty:
            continue
        line = LINES[column]
        every = max(len(shown) // 6, 1)
        ax.plot(shown.index, shown[0.5], **line.style(), markevery=(every // 2, every))
        ax.fill_between(
            shown.index,
            shown[0.25],
            shown[0.75],
            color=line.color,
            alpha=0.3 if line.kind == MEASURED else 0.18,
            linewidth=0,
        )
    ends = rows[rows["step"] == rows["step"].max()][stated(rows, columns)].to_numpy().ravel()
    low, high = log_limits([*(y for line in ax.get_lines() for y in line.get_ydata()), *ends])
    log_y(ax, low, high)
    ax.set_xlim(left=0)
    ax.set_xlabel("training step")
    ax.set_ylabel(f"divergence of the twins\n[{UNIT}]")
    return ax


@styled
def training_figure(trajectories: pd.DataFrame, summary: pd.DataFrame, n: int | None = None) -> Figure:
    """Divergence over training at one n (the largest when not given), a column per mass; stacked norm above, per
    sample below."""
    n = int(summary["n"].max()) if n is None else n
    rows = trajectories[trajectories["n"] == n]
    masses = shown_masses(summary[summary["n"] == n])
    figure = new_figure(width_for(len(masses)), 5.2)
    axes = figure.subplots(2, len(masses), sharex=True, sharey="row", squeeze=False)
    for column, mass in enumerate(masses):
        pairs = summary[(summary["n"] == n) & (summary["mass"] == mass)]
        axes[0, column].set_title(f"n = {n}, mass {mass:g}", fontweight="bold")
        for ax, names, level in zip(
            axes[:, column], (STACKED_PATHS, SAMPLE_PATHS), ("vacuity_floor", "trivial_sup"), strict=True
        ):
            draw_divergence(ax, rows[rows["mass"] == mass], names)
            steps = rows["step"].max()
            if stated(pairs, [level]):
                ax.plot([0, steps], [pairs[level].median()] * 2, **LINES[level].style())
        axes[0, column].set_xlabel("")
        axes[1, column].set_xlabel(step_label(summary))
        for ax in axes[:, column]:
            ax.set_ylabel("")
    for row, names in zip(axes, (STACKED_PATHS, SAMPLE_PATHS), strict=True):
        drawn = [line.get_ydata() for ax in row for line in drawn_lines(ax).values()]
        # The first steps start at 0: let them run out of the panel, rather than give them most of a log axis.
        ends = rows[rows["step"] == rows["step"].max()][stated(rows, names)].to_numpy().ravel()
        low, high = log_limits(np.concatenate([*drawn, ends]))
        smallest = np.min(ends[ends > 0], initial=np.inf)
        for ax in row:
            log_y(ax, max(low, smallest / 10) if np.isfinite(smallest) else low, high)
    axes[0, 0].set_ylabel(f"all training outputs, ‖e‖\n[{UNIT}]")
    axes[1, 0].set_ylabel(f"worst sample, maxᵢ |eᵢ|\n[{UNIT}]")
    shown = (*stated(rows, (*STACKED_PATHS, *SAMPLE_PATHS)), *stated(summary, ("vacuity_floor", "trivial_sup")))
    legend_of_kinds(figure, shown)
    if note := loss_note(summary):
        note_title(figure, note)
    figure.draw_without_rendering()
    for ax in axes[:, -1]:
        label_lines(ax)
    return figure


def step_label(summary: pd.DataFrame) -> str:
    """The step axis, with the step size where all runs share one."""
    rates = summary["lr"].unique() if "lr" in summary.columns else []
    return f"training step (lr = {rates[0]:g})" if len(rates) == 1 else "training step"


@panel
def draw_spectrum(ax: Axes, spectra: pd.DataFrame, xi: float) -> Axes:
    """Quantiles of the eigenvalues of H against the step, medians over the seeds of one (n, mass), and ξ as a line.

    Bands: all eigenvalues, the middle 90 %, the middle 50 %; the line is the median eigenvalue. Values that are not
    positive (rounding around 0) have no place on the axis.
    """
    values = spectra.groupby(["step", "quantile"])["eigenvalue"].median().unstack()  # [steps, quantiles]
    values = values.where(values > 0)
    for (low, high), shade in zip(BAND.items(), ("0.88", "0.74", "0.58"), strict=True):
        if low in values and high in values:
            ax.fill_between(values.index, values[low].fillna(1e-300), values[high], color=shade, linewidth=0)
    for quantile, dash in ((0.0, "--"), (0.5, "-"), (1.0, "-.")):
        if quantile in values:
            ax.plot(
                values.index,
                values[quantile],
                color="black" if quantile == 0.5 else hue("blue"),
                linestyle=dash,
                linewidth=1.0,
            )
    if xi > 0:
        ax.axhline(xi, color=hue("vermilion"), linestyle=":", linewidth=1.3)
    else:
        ax.text(
            0.5, 0.04, "ξ = 0: not above rounding", transform=ax.transAxes, ha="center", fontsize=6.5, style="italic"
        )
    log_y(ax, *eigenvalue_limits(spectra["eigenvalue"], [xi]))
    ax.set_xlim(0, max(values.index.max(), 1))
    ax.set_xlabel("training step")
    ax.set_ylabel("eigenvalues of H [1/time]")
    return ax


def eigenvalue_limits(eigenvalues: pd.Series, others: Sequence[float]) -> tuple[float, float]:
    """Limits of a log axis. Rounding noise around 0 is no eigenvalue: 1e-14 of the largest is the least that float64
    tells from 0."""
    return log_limits([*eigenvalues[eigenvalues > 1e-14 * eigenvalues.max()], *others])


@styled
def spectrum_figure(spectra: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Spectrum of H of the S runs along training: a column per mass, the smallest n above the largest."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ns = sorted({int(summary["n"].min()), int(summary["n"].max())})
    masses = shown_masses(summary)
    figure = new_figure(width_for(len(masses)), 1.0 + 2.1 * len(ns))
    axes = figure.subplots(len(ns), len(masses), sharex=True, sharey="row", squeeze=False)
    for row, n in enumerate(ns):
        for column, mass in enumerate(masses):
            ax = axes[row, column]
            rows = spectra[(spectra["n"] == n) & (spectra["mass"] == mass)]
            ax.set_title(f"n = {n}, mass {mass:g}", fontweight="bold")
            if rows.empty:
                ax.text(0.5, 0.5, "not run yet", transform=ax.transAxes, ha="center", style="italic")
                continue
            draw_spectrum(ax, rows, float(summary[(summary["n"] == n) & (summary["mass"] == mass)]["xi"].median()))
            ax.set_xlabel("")
            ax.set_ylabel("")
        axes[row, 0].set_ylabel("eigenvalues of H [1/time]")
    for ax in axes[-1]:
        ax.set_xlabel(step_label(summary))
    for row, n in zip(axes, ns, strict=True):
        limits = eigenvalue_limits(spectra.loc[spectra["n"] == n, "eigenvalue"], summary.loc[summary["n"] == n, "xi"])
        for ax in row:
            log_y(ax, *limits)
    handles = [
        Line2D([], [], color=hue("blue"), linestyle="-.", linewidth=1.0),
        Line2D([], [], color="black", linewidth=1.0),
        Line2D([], [], color=hue("blue"), linestyle="--", linewidth=1.0),
        Line2D([], [], color=hue("vermilion"), linestyle=":", linewidth=1.3),
        *(Patch(color=shade) for shade in ("0.88", "0.74", "0.58")),
    ]
    names = [
        "largest",
        "median",
        "smallest",
        "ξ (infimum over the run)",
        "all eigenvalues",
        "middle 90 %",
        "middle 50 %",
    ]
    across = 4 if figure.get_figwidth() > 6 else 2
    figure.legend(handles, names, title="measured, medians over the seeds", loc="outside lower center", ncols=across)
    return figure
