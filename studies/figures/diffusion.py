"""Figures of the latent-diffusion testbed: losses along the rounds, and the samples themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.figures.movements import look, solver_legend, solvers_of
from studies.figures.style import PAGE, log_limits, log_y, new_figure, panel, styled, whole_steps

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from studies.results.frames import Frames

QUANTITIES = {
    "loss": "held-out noise-prediction\nloss [no unit]",
    "inexactness": "δ, distance to the proximal\npoint / exact step [no unit]",
}
ACROSS, GAP = 8, 1  # images of a row; pixels between two


def tuned_table(frames: Frames, table: str) -> pd.DataFrame:
    """``rounds`` or ``samples`` at each solver's and budget's best learning rate."""
    from studies.findings.diffusion import best

    keys = ["solver", "budget", "lr", "seed"]
    return getattr(frames, table).merge(best(frames)[keys], on=keys)


@panel
def draw_rounds(ax: Axes, rounds: pd.DataFrame, quantity: str, budget: str) -> Axes:
    """``loss`` or ``inexactness`` against the round under one kind of budget, a line per solver: means over seeds, bands
    from the least to the largest. ``rounds``: rows of one learning rate per solver (:func:`tuned_table`)."""
    for position, solver in enumerate(solvers_of(rounds)):
        by = rounds[(rounds["budget"] == budget) & (rounds["solver"] == solver)].groupby("round")[quantity]
        style, mean = look(solver), by.mean()
        every = max(len(mean) // 5, 1)
        ax.plot(mean.index, mean, label=solver, markevery=((position * every) // 4, every), **style)
        ax.fill_between(mean.index, by.min(), by.max(), color=style["color"], alpha=0.15, linewidth=0)
    log_y(ax, *log_limits(rounds[quantity]))  # of every budget: the panels of a row compare
    whole_steps(ax)
    ax.set_xlabel("round (outer step)")
    ax.set_ylabel(QUANTITIES[quantity])
    return ax


@panel
def draw_samples(ax: Axes, samples: pd.DataFrame, budget: str = "seconds") -> Axes:
    """Rows of eight images of the first seed: real ones, their reconstructions, and samples of each solver."""
    table = samples[(samples["seed"] == samples["seed"].min()) & (samples["budget"] == budget)]
    pixels = [name for name in table.columns if name.startswith("pixel_")]
    side, solvers = round(len(pixels) ** 0.5), solvers_of(table)
    own = {solver: table[table["solver"] == solver] for solver in solvers}
    rows = {kind: own[solvers[0]].query("source == @kind") for kind in ("real", "reconstructed")}
    rows |= {solver: own[solver].query("source == 'sample'") for solver in solvers}
    pitch = side + GAP
    sheet = np.full((len(rows) * pitch - GAP, ACROSS * pitch - GAP), np.nan)
    for i, images in enumerate(rows.values()):
        for j, image in enumerate(images.sort_values("image")[pixels].to_numpy(float)[:ACROSS]):
            sheet[i * pitch : i * pitch + side, j * pitch : j * pitch + side] = image.reshape(side, side)
    ax.imshow(np.clip(sheet, 0, None), cmap="gray_r", vmin=0, vmax=0.8, interpolation="nearest")
    ax.set_yticks([i * pitch + (side - 1) / 2 for i in range(len(rows))], list(rows))
    ax.set_xticks([j * pitch + (side - 1) / 2 for j in range(ACROSS)], range(1, ACROSS + 1))
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("image")
    ax.set_ylabel("source")
    return ax


@styled
def rounds_figure(frames: Frames) -> Figure:
    """Loss and inexactness against the round, a column for each kind of budget."""
    rows = tuned_table(frames, "rounds")
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = new_figure(PAGE, 4.4)
    axes = figure.subplots(2, len(budgets), squeeze=False, sharey="row", sharex=True)
    for j, budget in enumerate(budgets):
        for ax, quantity in zip(axes[:, j], QUANTITIES, strict=True):
            draw_rounds(ax, rows, quantity, budget)
            if j:
                ax.set_ylabel("")
        axes[0, j].set_title(f"equal {budget}", loc="left")
        axes[0, j].set_xlabel("")
    solver_legend(figure, solvers_of(rows))
    return figure


@styled
def samples_figure(frames: Frames) -> Figure:
    """The images of one kind of budget, equal seconds where there are any."""
    table = tuned_table(frames, "samples")
    budget = "seconds" if "seconds" in set(table["budget"]) else table["budget"].iloc[0]
    rows = 2 + table["solver"].nunique()
    figure = new_figure(PAGE, 0.72 * rows + 0.4)
    draw_samples(figure.subplots(), table, budget)
    return figure
